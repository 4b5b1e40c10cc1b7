//! Of builds for tests and benchmarks alone: no part of the C ABI, and in no header.

use std::ffi::{CStr, c_char};

use crate::backend::cpu;

/// Makes the CPU backend use an instruction set, by its name in `blockem_build_info.cpu_isa`. 1, or 0
/// where the machine lacks it.
///
/// # Safety
/// `name` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_test_use_isa(name: *const c_char) -> i32 {
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) };
    name.to_str().is_ok_and(cpu::use_isa) as i32
}
