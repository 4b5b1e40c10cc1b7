use std::ffi::{c_char, c_void};

use super::plan::blockem_plan;
use super::{blockem_status, guard, handle, required_text, status};
use crate::error::Status;
use crate::xla::{self, Frame, Platform, Work};

/// Makes a plan known to the XLA handlers of this process by a name, for as long as it lives.
/// The handlers are custom calls of XLA (JAX's jax.ffi; xla/ffi/api/c_api.h, interface versions
/// 0.1 to 0.3), to be registered under any name for the execute stage: those with _cpu for the
/// platform "Host", those with _cuda for "CUDA". A program states the plan's name as its string
/// attribute "plan"; where it runs on several devices, bind one plan of each to the name.
/// All arrays are row-major, with any number of leading dimensions [..]: the call is made for each
/// of what they hold, with one result each. The workspace is an output of U8 elements that nobody
/// reads, of 64 bytes more than blockem_plan_workspace_size says for T; it is used where the call
/// of the same name needs one.
/// name: UTF-8, copied. Plans of one name must be equal but for their device.
/// Errors: NULL_POINTER, INVALID_ARGUMENT (name). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_bind(
    plan: *const blockem_plan,
    name: *const c_char,
) -> blockem_status {
    guard(|| {
        // SAFETY: a live handle and a NUL-terminated string, or NULL.
        let (plan, name) = unsafe { (&handle("plan", plan)?.0, required_text("name", name)?) };
        xla::bind(plan, name);
        Ok(())
    })
}

/// blockem_encode. Inputs: hidden [.., T, d]. Outputs: latents [.., T, K], workspace.
/// frame: XLA_FFI_CallFrame. Returns XLA_FFI_Error, NULL on success (and for a NULL frame, which
/// says nowhere to make an error). Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_encode_cpu(frame: *mut c_void) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { call(frame, Platform::Cpu, xla::encode) }
}

/// As blockem_xla_encode_cpu, on the call's stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_encode_cuda(frame: *mut c_void) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { call(frame, Platform::Cuda, xla::encode) }
}

/// blockem_penalty_forward. Inputs: hidden [.., T, d], reference [.., T, K], optionally mask
/// [.., T]. Outputs: loss_sum [..], token_count [..], latent_loss [.., K] or [.., 0] (not asked
/// for), coef [.., T, K], workspace. frame, result: as blockem_xla_encode_cpu.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_penalty_forward_cpu(frame: *mut c_void) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { call(frame, Platform::Cpu, xla::forward) }
}

/// As blockem_xla_penalty_forward_cpu, on the call's stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_penalty_forward_cuda(frame: *mut c_void) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { call(frame, Platform::Cuda, xla::forward) }
}

/// blockem_penalty_backward, scaled by upstream. Inputs: coef [.., T, K], upstream [..] F32 (F64 on
/// the CPU, too), and hidden [.., T, d] where blockem_plan_info.backward_needs_hidden is 1.
/// Outputs: grad_hidden [.., T, d], workspace. frame, result: as blockem_xla_encode_cpu.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_penalty_backward_cpu(frame: *mut c_void) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { call(frame, Platform::Cpu, xla::backward) }
}

/// As blockem_xla_penalty_backward_cpu, on the call's stream.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_xla_penalty_backward_cuda(frame: *mut c_void) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { call(frame, Platform::Cuda, xla::backward) }
}

/// # Safety
/// A frame that XLA made for a program of the platform, or NULL.
unsafe fn call(frame: *mut c_void, platform: Platform, work: Work) -> *mut c_void {
    // SAFETY: the caller's promise.
    let status =
        guard(|| unsafe { xla::run(handle("frame", frame.cast::<Frame>())?, platform, work) });
    // SAFETY: the caller's promise.
    match unsafe { frame.cast::<Frame>().as_ref() } {
        // SAFETY: as above.
        Some(frame) if status != Status::Ok.code() => unsafe {
            frame.error(status, &status::last_error())
        },
        _ => std::ptr::null_mut(),
    }
}
