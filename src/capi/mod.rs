//! The C ABI: conversion and nothing else. One file per section of `include/blockem.h`, which
//! cbindgen generates from here; the comments are the header's documentation.
//!
//! Conventions, obeyed mechanically:
//! - every body runs inside [`guard`], which turns errors and panics into a status;
//! - structs begin with `struct_size` and are read through [`read_struct`];
//! - outputs are written only on success.

#![allow(non_camel_case_types)]
// The header's comments say what a caller promises; C has no `# Safety`.
#![allow(clippy::missing_safety_doc)]

pub mod cache;
pub mod device;
pub mod latents;
pub mod mask;
pub mod plan;
pub mod raw;
pub mod run;
pub mod sae;
pub mod stats;
pub mod status;
pub mod steer;
pub mod tensor;
#[cfg(feature = "test-isa")]
pub mod test_isa;
pub mod tokenizer;
pub mod version;
pub mod xla;

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use crate::error::{Error, Result, Status, bail, panic_text};
use crate::tensor::{Device, Stream};
use status::blockem_status;

/// Runs a fallible body; its error or panic becomes the status and the thread's last error.
fn guard(body: impl FnOnce() -> Result<()>) -> blockem_status {
    status::set_last_error("");
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return Status::Ok.code(),
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic_text(&*panic);
            Error::new(Status::Panic, format!("a defect of libblockem: {text}"))
        }
    };
    status::set_last_error(&error.message);
    error.status.code()
}

/// A struct of plain numbers and pointers, for which all zero bytes are a value.
///
/// # Safety
/// `#[repr(C)]`, first field `struct_size: usize`, no tail padding, valid when zeroed.
unsafe trait Versioned: Copy {
    /// Bytes of the struct when it first appeared.
    const FIRST_SIZE: usize;
}

/// Copies the caller's struct, whatever version of the header it was compiled with: fields that
/// it lacks are zero, fields that we lack must be zero.
///
/// # Safety
/// A non-null `ptr` must point to as many bytes as its `struct_size` says.
unsafe fn read_struct<T: Versioned>(name: &str, ptr: *const T) -> Result<T> {
    let size = check_struct(name, ptr)?;
    let ours = size_of::<T>();
    // SAFETY: `Versioned` promises that zero bytes are a value.
    let mut value: T = unsafe { std::mem::zeroed() };
    // SAFETY: both sides hold min(size, ours) bytes.
    unsafe {
        let to = (&raw mut value).cast::<u8>();
        std::ptr::copy_nonoverlapping(ptr.cast::<u8>(), to, size.min(ours));
    }
    for i in ours..size {
        // SAFETY: the caller's struct has `size` bytes.
        if unsafe { *ptr.cast::<u8>().add(i) } != 0 {
            bail!(
                StructSize,
                "{name} has {size} bytes, this library knows {ours} of them and a later one is \
                 not zero: the caller was compiled for a newer libblockem"
            );
        }
    }
    Ok(value)
}

/// Writes as much of the struct as the caller's version has; its `struct_size` stays.
///
/// # Safety
/// As [`read_struct`], writable.
unsafe fn write_struct<T: Versioned>(name: &str, ptr: *mut T, value: &T) -> Result<()> {
    let size = check_struct(name, ptr)?;
    let (head, ours) = (size_of::<usize>(), size_of::<T>());
    // SAFETY: both sides hold min(size, ours) bytes.
    unsafe {
        let (from, to) = ((&raw const *value).cast::<u8>(), ptr.cast::<u8>());
        std::ptr::copy_nonoverlapping(from.add(head), to.add(head), size.min(ours) - head);
    }
    Ok(())
}

fn check_struct<T: Versioned>(name: &str, ptr: *const T) -> Result<usize> {
    if ptr.is_null() {
        bail!(NullPointer, "{name} is NULL");
    }
    if !ptr.is_aligned() {
        bail!(Layout, "{name} is not aligned");
    }
    // SAFETY: non-null and aligned; the first field is struct_size.
    let size = unsafe { *ptr.cast::<usize>() };
    if size < T::FIRST_SIZE || size > MAX_STRUCT_SIZE {
        bail!(
            StructSize,
            "{name} says struct_size {size}, expected {}; initialise it with its _INIT macro",
            size_of::<T>()
        );
    }
    Ok(size)
}

/// No future struct is larger; an uninitialised size is caught before it is followed.
const MAX_STRUCT_SIZE: usize = 1 << 14;

/// Declares a versioned struct: what it was when it first appeared, and that it has no tail padding.
macro_rules! versioned {
    ($name:ident, first_size = $size:expr, last = $last:ident : $last_type:ty) => {
        // SAFETY: repr(C), struct_size first, plain numbers and pointers, no padding at the end.
        unsafe impl $crate::capi::Versioned for $name {
            const FIRST_SIZE: usize = $size;
        }
        const _: () = assert!(std::mem::offset_of!($name, struct_size) == 0);
        const _: () = assert!($size <= size_of::<$name>());
        const _: () = assert!(
            std::mem::offset_of!($name, $last) + size_of::<$last_type>() == size_of::<$name>()
        );
    };
}
use versioned;

/// Options may be NULL: then all are at their defaults.
///
/// # Safety
/// As [`read_struct`].
unsafe fn read_options<T: Versioned>(name: &str, ptr: *const T) -> Result<Option<T>> {
    if ptr.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { read_struct(name, ptr) }.map(Some)
}

/// # Safety
/// A non-null `handle` must come from this library and not have been freed.
unsafe fn handle<'a, T>(name: &str, handle: *const T) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    match unsafe { handle.as_ref() } {
        Some(object) => Ok(object),
        None => bail!(NullPointer, "{name} is NULL"),
    }
}

/// Checks an out-pointer before any work is done.
fn check_out<T>(name: &str, out: *mut T) -> Result<()> {
    if out.is_null() {
        bail!(NullPointer, "{name} is NULL");
    }
    if !out.is_aligned() {
        bail!(Layout, "{name} is not aligned");
    }
    Ok(())
}

/// # Safety
/// A non-null `handle` must come from `Box::into_raw` and not have been freed.
unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // A destructor that panics must not unwind into C.
        // SAFETY: the caller's promise.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(unsafe { Box::from_raw(handle) })));
    }
}

/// # Safety
/// A non-null `text` must be a NUL-terminated string.
unsafe fn read_text<'a>(name: &str, text: *const c_char) -> Result<Option<&'a str>> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    match unsafe { CStr::from_ptr(text) }.to_str() {
        Ok(text) => Ok(Some(text)),
        Err(_) => bail!(InvalidArgument, "{name} is not UTF-8"),
    }
}

/// # Safety
/// As [`read_text`].
unsafe fn required_text<'a>(name: &str, text: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller's promise.
    match unsafe { read_text(name, text)? } {
        Some(text) => Ok(text),
        None => bail!(NullPointer, "{name} is NULL"),
    }
}

/// # Safety
/// As [`read_text`].
unsafe fn read_path(path: *const c_char) -> Result<PathBuf> {
    if path.is_null() {
        bail!(NullPointer, "path is NULL");
    }
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        // SAFETY: the caller's promise.
        let bytes = unsafe { CStr::from_ptr(path) }.to_bytes();
        Ok(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
    }
    #[cfg(not(unix))]
    {
        // SAFETY: the caller's promise.
        Ok(PathBuf::from(unsafe { read_text("path", path) }?.unwrap_or_default()))
    }
}

/// Copies text with a final NUL, cut to the buffer; returns the full length without the NUL.
///
/// # Safety
/// A non-null `buf` must have `cap` writable bytes.
unsafe fn write_text(text: &str, buf: *mut c_char, cap: usize) -> usize {
    if !buf.is_null() && cap > 0 {
        let n = text.len().min(cap - 1);
        // SAFETY: n + 1 <= cap bytes.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast::<u8>(), n);
            *buf.add(n) = 0;
        }
    }
    text.len()
}

/// Fills a fixed array with text and a final NUL.
fn fixed_text<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (to, from) in out[..N - 1].iter_mut().zip(text.bytes()) {
        *to = from as c_char;
    }
    out
}

/// CPU calls take no stream.
///
/// # Safety
/// On CUDA, NULL or a stream that lives until the call's work is done.
unsafe fn read_stream(device: Device, stream: *mut c_void) -> Result<Stream> {
    if device == Device::Cpu && !stream.is_null() {
        bail!(InvalidArgument, "a CPU call takes no stream; pass NULL");
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { Stream::from_raw(stream) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        let code = guard(|| panic!("planted"));
        assert_eq!(code, Status::Panic.code());
        let mut buf = [0; 64];
        // SAFETY: the buffer has its length.
        let len = unsafe { status::blockem_last_error(buf.as_mut_ptr(), buf.len()) };
        // SAFETY: the text is NUL-terminated.
        let text = unsafe { CStr::from_ptr(buf.as_ptr()) }.to_str().unwrap();
        assert_eq!(text, "a defect of libblockem: planted");
        assert_eq!(len, text.len());
    }
}
