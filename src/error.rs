//! Status codes and the one error type.

use std::any::Any;
use std::fmt;

/// What went wrong, as it crosses the C boundary. Numbers are never reused: 1xx the caller,
/// 2xx data, 3xx device, 9xx this library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    Ok = 0,
    InvalidArgument = 100,
    NullPointer = 101,
    StructSize = 102,
    Shape = 103,
    Dtype = 104,
    Layout = 105,
    DeviceMismatch = 106,
    WorkspaceTooSmall = 107,
    LatentRange = 108,
    Unsupported = 109,
    LatentDuplicate = 110,
    Overlap = 111,
    Io = 200,
    Format = 201,
    TensorMissing = 202,
    RecipeIncomplete = 203,
    UnsafePickle = 204,
    NonFinite = 205,
    CacheStale = 206,
    MaskEmpty = 207,
    ProvenanceMismatch = 208,
    CacheMiss = 209,
    CacheBusy = 210,
    MaskUnaligned = 211,
    CudaUnavailable = 300,
    CudaDriver = 301,
    NoKernelImage = 302,
    DriverTooOld = 303,
    OutOfMemory = 304,
    CaptureUnsafe = 305,
    Forked = 306,
    Panic = 900,
    Internal = 901,
}

impl Status {
    pub const ALL: [Status; 34] = [
        Status::Ok,
        Status::InvalidArgument,
        Status::NullPointer,
        Status::StructSize,
        Status::Shape,
        Status::Dtype,
        Status::Layout,
        Status::DeviceMismatch,
        Status::WorkspaceTooSmall,
        Status::LatentRange,
        Status::Unsupported,
        Status::LatentDuplicate,
        Status::Overlap,
        Status::Io,
        Status::Format,
        Status::TensorMissing,
        Status::RecipeIncomplete,
        Status::UnsafePickle,
        Status::NonFinite,
        Status::CacheStale,
        Status::MaskEmpty,
        Status::ProvenanceMismatch,
        Status::CacheMiss,
        Status::CacheBusy,
        Status::MaskUnaligned,
        Status::CudaUnavailable,
        Status::CudaDriver,
        Status::NoKernelImage,
        Status::DriverTooOld,
        Status::OutOfMemory,
        Status::CaptureUnsafe,
        Status::Forked,
        Status::Panic,
        Status::Internal,
    ];

    pub fn code(self) -> i32 {
        self as i32
    }

    pub fn from_code(code: i32) -> Option<Status> {
        Status::ALL.into_iter().find(|s| s.code() == code)
    }

    /// The name in the header, without its prefix.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "OK",
            Status::InvalidArgument => "INVALID_ARGUMENT",
            Status::NullPointer => "NULL_POINTER",
            Status::StructSize => "STRUCT_SIZE",
            Status::Shape => "SHAPE",
            Status::Dtype => "DTYPE",
            Status::Layout => "LAYOUT",
            Status::DeviceMismatch => "DEVICE_MISMATCH",
            Status::WorkspaceTooSmall => "WORKSPACE_TOO_SMALL",
            Status::LatentRange => "LATENT_RANGE",
            Status::Unsupported => "UNSUPPORTED",
            Status::LatentDuplicate => "LATENT_DUPLICATE",
            Status::Overlap => "OVERLAP",
            Status::Io => "IO",
            Status::Format => "FORMAT",
            Status::TensorMissing => "TENSOR_MISSING",
            Status::RecipeIncomplete => "RECIPE_INCOMPLETE",
            Status::UnsafePickle => "UNSAFE_PICKLE",
            Status::NonFinite => "NON_FINITE",
            Status::CacheStale => "CACHE_STALE",
            Status::MaskEmpty => "MASK_EMPTY",
            Status::ProvenanceMismatch => "PROVENANCE_MISMATCH",
            Status::CacheMiss => "CACHE_MISS",
            Status::CacheBusy => "CACHE_BUSY",
            Status::MaskUnaligned => "MASK_UNALIGNED",
            Status::CudaUnavailable => "CUDA_UNAVAILABLE",
            Status::CudaDriver => "CUDA_DRIVER",
            Status::NoKernelImage => "NO_KERNEL_IMAGE",
            Status::DriverTooOld => "DRIVER_TOO_OLD",
            Status::OutOfMemory => "OUT_OF_MEMORY",
            Status::CaptureUnsafe => "CAPTURE_UNSAFE",
            Status::Forked => "FORKED",
            Status::Panic => "PANIC",
            Status::Internal => "INTERNAL",
        }
    }
}

/// A status with one clear sentence: what, where, and the remedy.
#[derive(Clone, Debug)]
pub struct Error {
    pub status: Status,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error { status, message: message.into() }
    }

    /// An operating-system error on a named file.
    pub fn io(path: &std::path::Path, what: &str, err: &std::io::Error) -> Error {
        let name = if path.as_os_str().is_empty() {
            "(empty path)".into()
        } else {
            path.display().to_string()
        };
        Error::new(Status::Io, format!("{name}: cannot {what}: {err}"))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// What a caught panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(|s| &s[..])).unwrap_or("no message")
}

/// `bail!(Shape, "hidden has {} columns", d)` returns that error.
macro_rules! bail {
    ($status:ident, $($text:tt)*) => {
        return Err($crate::error::Error::new($crate::error::Status::$status, format!($($text)*)))
    };
}
pub(crate) use bail;
