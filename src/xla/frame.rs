//! What XLA hands to a handler: the C structs of xla/ffi/api/c_api.h as of interface version 0.1
//! (jaxlib 0.5.0). Up to 0.3 (jaxlib 0.10) what is used here did not change, and structs grow at
//! the end. tests/capi/xla.c meets these with the headers of the oldest and the newest jaxlib.

use std::ffi::{CString, c_char, c_void};
use std::ptr::null_mut;

use crate::error::{Result, Status, bail};
use crate::tensor::{DType, Device, Stream, Tensor, TensorMut};

/// A call: inputs, outputs, attributes, and functions to ask XLA for more.
#[repr(C)]
pub struct Frame {
    struct_size: usize,
    extension: *const Extension,
    api: *const Api,
    context: *mut c_void,
    stage: i32,
    inputs: Buffers,
    outputs: Buffers,
    attributes: Attributes,
}

/// The question for a handler's version comes as a call with this extension.
#[repr(C)]
struct Extension {
    struct_size: usize,
    kind: i32,
    next: *const Extension,
    /// Only of the kind [`METADATA`].
    metadata: *mut Metadata,
}

#[repr(C)]
struct Metadata {
    struct_size: usize,
    version: Version,
    traits: u32,
}

#[repr(C)]
struct Version {
    struct_size: usize,
    extension: *const Extension,
    major: i32,
    minor: i32,
}

#[repr(C)]
struct Api {
    struct_size: usize,
    extension: *const Extension,
    version: Version,
    internal: *const c_void,
    error_create: unsafe extern "C" fn(*mut ErrorArgs) -> *mut c_void,
    error_message: unsafe extern "C" fn(*mut ErrorMessageArgs),
    error_destroy: unsafe extern "C" fn(*mut ErrorDestroyArgs),
    handler_register: *const c_void,
    stream_get: unsafe extern "C" fn(*mut StreamArgs) -> *mut c_void,
}

#[repr(C)]
struct ErrorArgs {
    struct_size: usize,
    extension: *const Extension,
    message: *const c_char,
    code: i32,
}

#[repr(C)]
struct ErrorMessageArgs {
    struct_size: usize,
    extension: *const Extension,
    error: *mut c_void,
    message: *const c_char,
}

#[repr(C)]
struct ErrorDestroyArgs {
    struct_size: usize,
    extension: *const Extension,
    error: *mut c_void,
}

#[repr(C)]
struct StreamArgs {
    struct_size: usize,
    extension: *const Extension,
    context: *mut c_void,
    stream: *mut c_void,
}

#[repr(C)]
struct Buffers {
    struct_size: usize,
    extension: *const Extension,
    size: i64,
    kinds: *const i32,
    items: *const *const Buffer,
}

#[repr(C)]
struct Buffer {
    struct_size: usize,
    extension: *const Extension,
    dtype: i32,
    data: *mut c_void,
    rank: i64,
    dims: *const i64,
}

#[repr(C)]
struct Attributes {
    struct_size: usize,
    extension: *const Extension,
    size: i64,
    kinds: *const i32,
    names: *const *const Text,
    items: *const *const c_void,
}

#[repr(C)]
struct Text {
    data: *const u8,
    size: usize,
}

const METADATA: i32 = 1;
const BUFFER: i32 = 1;
const STRING: i32 = 4;
/// Versions of the interface in which these structs are as they are here.
const MAJOR: i32 = 0;
const MINORS: std::ops::RangeInclusive<i32> = 1..=3;
/// A call may be captured into a CUDA graph: it always launches the same kernels.
const CAPTURABLE: u32 = 1;

impl Frame {
    /// Answers if XLA only asks what version of the interface the handler speaks.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn is_question(&self, capturable: bool) -> bool {
        // SAFETY: NULL or XLA's extension.
        let Some(extension) = (unsafe { self.extension.as_ref() }) else { return false };
        if extension.kind != METADATA {
            return false;
        }
        // SAFETY: an extension of this kind has the field, and XLA the struct to fill.
        let metadata = unsafe { &mut *extension.metadata };
        // XLA drops versions that are too old, so the answer is its own where that is known here.
        // SAFETY: NULL or XLA's own table.
        let minor = unsafe { self.api.as_ref() }.map_or(0, |api| api.version.minor);
        metadata.version.major = MAJOR;
        metadata.version.minor = minor.clamp(*MINORS.start(), *MINORS.end());
        metadata.traits = if capturable { CAPTURABLE } else { 0 };
        true
    }

    /// The stream of a CUDA call.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn stream(&self) -> Result<Stream> {
        // SAFETY: XLA's own table and context; the structs say their size.
        unsafe {
            let api = &*self.api;
            let mut args = StreamArgs {
                struct_size: size_of::<StreamArgs>(),
                extension: null_mut(),
                context: self.context,
                stream: null_mut(),
            };
            let error = (api.stream_get)(&mut args);
            if !error.is_null() {
                let text = api.take_message(error);
                bail!(DeviceMismatch, "XLA has no CUDA stream for the call: {text}");
            }
            Ok(Stream::from_raw(args.stream))
        }
    }

    /// An error for XLA, which owns it.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn error(&self, status: i32, message: &str) -> *mut c_void {
        let status = Status::from_code(status).unwrap_or(Status::Internal);
        let text = format!("blockem {}: {message}", status.name()).replace('\0', " ");
        let text = CString::new(text).unwrap_or_default();
        // absl's status codes, which XLA's own errors have.
        let code = match status {
            Status::OutOfMemory => 8,
            status if status.code() < 200 => 3,
            _ => 13,
        };
        let mut args = ErrorArgs {
            struct_size: size_of::<ErrorArgs>(),
            extension: null_mut(),
            message: text.as_ptr(),
            code,
        };
        // SAFETY: XLA's own table; it copies the message.
        unsafe { ((*self.api).error_create)(&mut args) }
    }

    /// The i-th input.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn input<'a>(&'a self, i: usize, name: &'static str) -> Result<Array<'a>> {
        // SAFETY: the caller's promise.
        match unsafe { self.inputs.get(i, name) }? {
            Some(array) => Ok(array),
            None => bail!(InvalidArgument, "the call lacks its input {i}, {name}"),
        }
    }

    /// The i-th input, where the call has one.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn optional_input<'a>(
        &'a self,
        i: usize,
        name: &'static str,
    ) -> Result<Option<Array<'a>>> {
        // SAFETY: the caller's promise.
        unsafe { self.inputs.get(i, name) }
    }

    /// The i-th output.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn output<'a>(&'a self, i: usize, name: &'static str) -> Result<Array<'a>> {
        // SAFETY: the caller's promise.
        match unsafe { self.outputs.get(i, name) }? {
            Some(array) => Ok(array),
            None => bail!(InvalidArgument, "the call lacks its output {i}, {name}"),
        }
    }

    /// A string attribute.
    ///
    /// # Safety
    /// A frame that XLA made.
    pub unsafe fn text<'a>(&'a self, name: &str) -> Result<&'a str> {
        let attributes = &self.attributes;
        for i in 0..usize::try_from(attributes.size).unwrap_or(0) {
            // SAFETY: there are so many kinds, names and items, and a string's item is a span.
            unsafe {
                if (**attributes.names.add(i)).bytes() != name.as_bytes()
                    || *attributes.kinds.add(i) != STRING
                {
                    continue;
                }
                let text = &*(*attributes.items.add(i)).cast::<Text>();
                if let Ok(text) = std::str::from_utf8(text.bytes()) {
                    return Ok(text);
                }
            }
        }
        bail!(InvalidArgument, "the call lacks its string attribute \"{name}\"")
    }
}

impl Api {
    /// The message of an error that XLA gave us.
    ///
    /// # Safety
    /// XLA's own table, and an error that nobody else has.
    unsafe fn take_message(&self, error: *mut c_void) -> String {
        let mut question = ErrorMessageArgs {
            struct_size: size_of::<ErrorMessageArgs>(),
            extension: null_mut(),
            error,
            message: null_mut(),
        };
        let mut end = ErrorDestroyArgs {
            struct_size: size_of::<ErrorDestroyArgs>(),
            extension: null_mut(),
            error,
        };
        // SAFETY: the caller's promise; the text lives as long as the error.
        unsafe {
            (self.error_message)(&mut question);
            let text = match question.message.is_null() {
                true => String::new(),
                false => std::ffi::CStr::from_ptr(question.message).to_string_lossy().into_owned(),
            };
            (self.error_destroy)(&mut end);
            text
        }
    }
}

impl Buffers {
    /// # Safety
    /// A list that XLA made.
    unsafe fn get<'a>(&'a self, i: usize, name: &'static str) -> Result<Option<Array<'a>>> {
        if i >= usize::try_from(self.size).unwrap_or(0) {
            return Ok(None);
        }
        // SAFETY: the list has so many kinds and items, and a buffer as many dims as its rank.
        unsafe {
            if *self.kinds.add(i) != BUFFER {
                bail!(InvalidArgument, "{name} is not an array");
            }
            let buffer = &**self.items.add(i);
            let rank = usize::try_from(buffer.rank).unwrap_or(0);
            let dims = match rank {
                0 => &[],
                _ => std::slice::from_raw_parts(buffer.dims, rank),
            };
            let dtype = dtype(name, buffer.dtype)?;
            Ok(Some(Array { name, data: buffer.data.cast(), dtype, dims }))
        }
    }
}

impl Text {
    /// # Safety
    /// A span that XLA made.
    unsafe fn bytes(&self) -> &[u8] {
        match self.size {
            0 => &[],
            // SAFETY: the caller's promise.
            _ => unsafe { std::slice::from_raw_parts(self.data, self.size) },
        }
    }
}

/// A row-major array on the device of the call.
#[derive(Clone, Copy)]
pub struct Array<'a> {
    name: &'static str,
    data: *mut u8,
    dtype: DType,
    dims: &'a [i64],
}

impl<'a> Array<'a> {
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The last dimension.
    pub fn width(&self) -> usize {
        self.dims.last().map_or(1, |n| *n as usize)
    }

    /// The dimensions before the last `rank`.
    pub fn lead(&self, rank: usize) -> Result<&'a [i64]> {
        match self.dims.len().checked_sub(rank) {
            Some(lead) => Ok(&self.dims[..lead]),
            None => bail!(Shape, "{} must have {rank} dimensions, not {:?}", self.name, self.dims),
        }
    }

    /// Refuses leading dimensions other than these.
    pub fn expect_lead(self, rank: usize, lead: &[i64]) -> Result<Array<'a>> {
        if self.lead(rank)? != lead {
            bail!(
                Shape,
                "{} is {:?}: the dimensions before its last {rank} must be {lead:?}",
                self.name,
                self.dims
            );
        }
        Ok(self)
    }

    /// The n-th array of this shape that it holds.
    ///
    /// # Safety
    /// XLA's buffers are as large as their dimensions say; it is read while the call runs.
    pub unsafe fn at(&self, n: usize, shape: &[usize], device: Device) -> Result<Tensor<'a>> {
        self.check(n, shape)?;
        // SAFETY: within the buffer.
        unsafe {
            Tensor::from_raw(self.start(n, shape), self.dtype, device, shape, &row_major(shape))
        }
    }

    /// The same, to be written.
    ///
    /// # Safety
    /// As [`Array::at`]; the array is an output, which overlaps nothing.
    pub unsafe fn at_mut(
        &self,
        n: usize,
        shape: &[usize],
        device: Device,
    ) -> Result<TensorMut<'a>> {
        self.check(n, shape)?;
        // SAFETY: within the buffer.
        unsafe {
            TensorMut::from_raw(self.start(n, shape), self.dtype, device, shape, &row_major(shape))
        }
    }

    /// The n-th number of an array of f64 in host memory.
    ///
    /// # Safety
    /// As [`Array::at`].
    pub unsafe fn f64_at(&self, n: usize) -> Result<f64> {
        self.check(n, &[])?;
        // SAFETY: within the buffer.
        Ok(unsafe { self.data.cast::<f64>().add(n).read_unaligned() })
    }

    /// All of it from a multiple of `align` on: where that is, and how many bytes there are.
    pub fn aligned(&self, align: usize) -> (*mut u8, usize) {
        let skip = self.data.addr().next_multiple_of(align) - self.data.addr();
        let size = self.len() * self.dtype.size();
        (self.data.wrapping_add(skip), size.saturating_sub(skip))
    }

    fn check(&self, n: usize, shape: &[usize]) -> Result<()> {
        if (n + 1) * shape.iter().product::<usize>() > self.len() {
            bail!(Shape, "{} is {:?}; the call needs {shape:?} of it", self.name, self.dims);
        }
        Ok(())
    }

    fn len(&self) -> usize {
        count(self.dims)
    }

    fn start(&self, n: usize, shape: &[usize]) -> *mut u8 {
        self.data.wrapping_add(n * shape.iter().product::<usize>() * self.dtype.size())
    }
}

/// How many elements have these dimensions, which XLA never lets overflow.
pub fn count(dims: &[i64]) -> usize {
    dims.iter().map(|n| *n as usize).product()
}

fn row_major(shape: &[usize]) -> Vec<usize> {
    let mut stride = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        stride[i - 1] = stride[i] * shape[i].max(1);
    }
    stride
}

/// The element type behind one of XLA's numbers.
fn dtype(name: &str, code: i32) -> Result<DType> {
    Ok(match code {
        1 => DType::Bool,
        5 => DType::I64,
        6 => DType::U8,
        10 => DType::F16,
        11 => DType::F32,
        12 => DType::F64,
        16 => DType::BF16,
        _ => bail!(Dtype, "{name} has XLA's element type {code}, which no argument may have"),
    })
}
