use std::cell::RefCell;
use std::ffi::{CStr, c_char};

use crate::error::Status;

/// What a call answers: 0 or the reason why not. Numbers are never reused.
pub type blockem_status = i32;

/// The call did what it says.
pub const BLOCKEM_STATUS_OK: i32 = 0;
/// An argument has a value that the call does not take.
pub const BLOCKEM_STATUS_INVALID_ARGUMENT: i32 = 100;
/// A required pointer is NULL.
pub const BLOCKEM_STATUS_NULL_POINTER: i32 = 101;
/// struct_size is not set, or a field that this library does not know is not zero.
pub const BLOCKEM_STATUS_STRUCT_SIZE: i32 = 102;
/// A tensor has another shape than the call needs.
pub const BLOCKEM_STATUS_SHAPE: i32 = 103;
/// A tensor has an element type that the call does not take.
pub const BLOCKEM_STATUS_DTYPE: i32 = 104;
/// Strides or alignment that the call does not take.
pub const BLOCKEM_STATUS_LAYOUT: i32 = 105;
/// A tensor lives on another device than the plan.
pub const BLOCKEM_STATUS_DEVICE_MISMATCH: i32 = 106;
/// The workspace is smaller than the workspace_size function says.
pub const BLOCKEM_STATUS_WORKSPACE_TOO_SMALL: i32 = 107;
/// A latent id is negative or not below d_sae, or not in a partial file.
pub const BLOCKEM_STATUS_LATENT_RANGE: i32 = 108;
/// Understood, and not done by this version; the message names the remedy.
pub const BLOCKEM_STATUS_UNSUPPORTED: i32 = 109;
/// A latent stands in a set twice, or in both K_pos and K_neg.
pub const BLOCKEM_STATUS_LATENT_DUPLICATE: i32 = 110;
/// An output shares memory with another argument.
pub const BLOCKEM_STATUS_OVERLAP: i32 = 111;
/// The operating system refused a file operation.
pub const BLOCKEM_STATUS_IO: i32 = 200;
/// A file is not what it should be.
pub const BLOCKEM_STATUS_FORMAT: i32 = 201;
/// A file lacks a tensor.
pub const BLOCKEM_STATUS_TENSOR_MISSING: i32 = 202;
/// A file does not say how to read it; the message names the key and the remedy.
pub const BLOCKEM_STATUS_RECIPE_INCOMPLETE: i32 = 203;
/// A pickle, which could execute code when it is read.
pub const BLOCKEM_STATUS_UNSAFE_PICKLE: i32 = 204;
/// NaN or infinity in weights, or in a reference that is to be stored.
pub const BLOCKEM_STATUS_NON_FINITE: i32 = 205;
/// A reference cache was made for another base model, layer, dtype, numerics or SAE.
pub const BLOCKEM_STATUS_CACHE_STALE: i32 = 206;
/// A mask of text marks no token: the template writes no assistant text, or it was cut off.
pub const BLOCKEM_STATUS_MASK_EMPTY: i32 = 207;
/// A latent set records another SAE or activation than it is used with.
pub const BLOCKEM_STATUS_PROVENANCE_MISMATCH: i32 = 208;
/// A reference cache lacks an example, or latents of it; the message names it.
pub const BLOCKEM_STATUS_CACHE_MISS: i32 = 209;
/// A reference cache is in use: one process may write it, or several read it.
pub const BLOCKEM_STATUS_CACHE_BUSY: i32 = 210;
/// Markers, spans or token ids do not fit the text; the message names the first place.
pub const BLOCKEM_STATUS_MASK_UNALIGNED: i32 = 211;
/// No CUDA driver, or no device that it can use.
pub const BLOCKEM_STATUS_CUDA_UNAVAILABLE: i32 = 300;
/// A call of the CUDA driver failed; the message has the driver's own name and text for it. The
/// cause may be earlier work of the process.
pub const BLOCKEM_STATUS_CUDA_DRIVER: i32 = 301;
/// This build has no kernels (it was made without nvcc), or none for the device.
pub const BLOCKEM_STATUS_NO_KERNEL_IMAGE: i32 = 302;
/// The CUDA driver is older than the kernels need; the message has both versions.
pub const BLOCKEM_STATUS_DRIVER_TOO_OLD: i32 = 303;
/// The device has not enough memory left.
pub const BLOCKEM_STATUS_OUT_OF_MEMORY: i32 = 304;
/// The call allocates or loads, or its stream waits for others, while a stream is being captured.
pub const BLOCKEM_STATUS_CAPTURE_UNSAFE: i32 = 305;
/// The process was forked after CUDA was initialised or the cache opened; a child cannot use the
/// parent's.
pub const BLOCKEM_STATUS_FORKED: i32 = 306;
/// A defect of this library was caught at the boundary.
pub const BLOCKEM_STATUS_PANIC: i32 = 900;
/// A defect of this library.
pub const BLOCKEM_STATUS_INTERNAL: i32 = 901;

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

pub(super) fn set_last_error(message: &str) {
    // A thread that is being torn down has no last error.
    let _ = LAST_ERROR.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            last.clear();
            last.push_str(message);
        }
    });
}

pub(super) fn last_error() -> String {
    let copy =
        |last: &RefCell<String>| last.try_borrow().map_or_else(|_| String::new(), |s| s.clone());
    LAST_ERROR.try_with(copy).unwrap_or_default()
}

/// The name of a status without its prefix, such as "SHAPE"; "UNKNOWN" for a foreign number.
/// A static string: never free it. Thread-safe.
#[unsafe(no_mangle)]
pub extern "C" fn blockem_status_name(status: blockem_status) -> *const c_char {
    // The NUL-terminated twin of each name, spelled once.
    macro_rules! names {
        ($($variant:ident $text:literal),* $(,)?) => {
            match Status::from_code(status) {
                $(Some(Status::$variant) => $text,)*
                None => c"UNKNOWN",
            }
        };
    }
    let name: &CStr = names! {
        Ok c"OK", InvalidArgument c"INVALID_ARGUMENT", NullPointer c"NULL_POINTER",
        StructSize c"STRUCT_SIZE", Shape c"SHAPE", Dtype c"DTYPE", Layout c"LAYOUT",
        DeviceMismatch c"DEVICE_MISMATCH", WorkspaceTooSmall c"WORKSPACE_TOO_SMALL",
        LatentRange c"LATENT_RANGE", Unsupported c"UNSUPPORTED",
        LatentDuplicate c"LATENT_DUPLICATE", Overlap c"OVERLAP", Io c"IO", Format c"FORMAT",
        TensorMissing c"TENSOR_MISSING", RecipeIncomplete c"RECIPE_INCOMPLETE",
        UnsafePickle c"UNSAFE_PICKLE", NonFinite c"NON_FINITE",
        CacheStale c"CACHE_STALE", MaskEmpty c"MASK_EMPTY", ProvenanceMismatch c"PROVENANCE_MISMATCH",
        CacheMiss c"CACHE_MISS", CacheBusy c"CACHE_BUSY",
        MaskUnaligned c"MASK_UNALIGNED", CudaUnavailable c"CUDA_UNAVAILABLE",
        CudaDriver c"CUDA_DRIVER", NoKernelImage c"NO_KERNEL_IMAGE",
        DriverTooOld c"DRIVER_TOO_OLD", OutOfMemory c"OUT_OF_MEMORY",
        CaptureUnsafe c"CAPTURE_UNSAFE", Forked c"FORKED",
        Panic c"PANIC", Internal c"INTERNAL",
    };
    name.as_ptr()
}

/// The message of the last failed call of this thread; empty after a call that succeeded.
/// Writes at most cap bytes including the final NUL (buf NULL or cap 0 writes nothing) and returns
/// the full length without the NUL, so that a second call can bring a larger buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn blockem_last_error(buf: *mut c_char, cap: usize) -> usize {
    let copy = |last: &RefCell<String>| {
        // SAFETY: the caller's buffer has cap bytes.
        last.try_borrow().map_or(0, |last| unsafe { super::write_text(&last, buf, cap) })
    };
    LAST_ERROR.try_with(copy).unwrap_or(0)
}
