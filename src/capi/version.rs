use std::ffi::c_char;

use super::{blockem_status, fixed_text, guard, versioned, write_struct};
use crate::backend::{cpu, cuda};

/// What this build of the library is. Filled by blockem_build_info_get.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_build_info {
    /// sizeof(blockem_build_info), set by BLOCKEM_BUILD_INFO_INIT.
    pub struct_size: usize,
    /// As blockem_version().
    pub version: u32,
    /// 1 when the build has CUDA kernels; whether they can run, blockem_device_count says.
    pub has_cuda: i32,
    /// The instruction set that the CPU backend uses on this machine, such as "avx512".
    pub cpu_isa: [c_char; 32],
}
versioned!(blockem_build_info, first_size = 48, last = cpu_isa: [c_char; 32]);

/// major << 16 | minor << 8 | patch of the library that runs. Thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn blockem_version() -> u32 {
    const fn number(text: &str) -> u32 {
        let (bytes, mut i, mut n) = (text.as_bytes(), 0, 0);
        while i < bytes.len() {
            n = n * 10 + (bytes[i] - b'0') as u32;
            i += 1;
        }
        n
    }
    const {
        number(env!("CARGO_PKG_VERSION_MAJOR")) << 16
            | number(env!("CARGO_PKG_VERSION_MINOR")) << 8
            | number(env!("CARGO_PKG_VERSION_PATCH"))
    }
}

/// The version as text, such as "0.1.0"; a static string. Thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn blockem_version_string() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// Describes this build.
/// Errors: NULL_POINTER, STRUCT_SIZE. Thread-safe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_build_info_get(info: *mut blockem_build_info) -> blockem_status {
    guard(|| {
        let value = blockem_build_info {
            struct_size: size_of::<blockem_build_info>(),
            version: blockem_version(),
            has_cuda: cuda::is_embedded() as i32,
            cpu_isa: fixed_text(cpu::isa_name()),
        };
        // SAFETY: the caller's struct has the bytes that its struct_size says.
        unsafe { write_struct("info", info, &value) }
    })
}
