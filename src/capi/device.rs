use super::{blockem_status, check_out, guard};
use crate::backend::cuda;
use crate::capi::tensor::{BLOCKEM_DEVICE_CPU, BLOCKEM_DEVICE_CUDA};
use crate::error::bail;

/// Writes how many devices of a type this library can use: 1 for BLOCKEM_DEVICE_CPU; for
/// BLOCKEM_DEVICE_CUDA 0 where there is no driver, one that is too old, or no kernels in this build,
/// which is not an error. The first call initialises the CUDA driver (cuInit), and no context.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (unknown device type), CUDA_DRIVER, FORKED. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_device_count(device_type: i32, count: *mut i32) -> blockem_status {
    guard(|| {
        check_out("count", count)?;
        let found = match device_type {
            BLOCKEM_DEVICE_CPU => 1,
            BLOCKEM_DEVICE_CUDA => cuda::device_count()?,
            other => bail!(InvalidArgument, "there is no device type {other}"),
        };
        // SAFETY: non-null and aligned.
        unsafe { *count = found };
        Ok(())
    })
}
