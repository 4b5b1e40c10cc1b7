//! Element types and borrowed views of caller memory.

use std::ffi::c_void;
use std::marker::PhantomData;

use crate::error::{Result, bail};

/// Element type; the numbers are those of the C header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum DType {
    F32 = 0,
    F16 = 1,
    BF16 = 2,
    F64 = 3,
    U8 = 4,
    Bool = 5,
    I64 = 6,
}

impl DType {
    pub fn from_code(code: i32) -> Option<DType> {
        use DType::*;
        [F32, F16, BF16, F64, U8, Bool, I64].into_iter().find(|d| *d as i32 == code)
    }

    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 | DType::Bool => 1,
        }
    }

    /// The name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            DType::F64 => "float64",
            DType::U8 => "uint8",
            DType::Bool => "bool",
            DType::I64 => "int64",
        }
    }
}

/// Where memory lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(i32),
}

/// A CUDA stream that the caller owns; the CPU takes none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(*mut c_void);

impl Stream {
    /// No stream on the CPU; on CUDA the legacy default stream of the plan's context.
    pub const NULL: Stream = Stream(std::ptr::null_mut());

    /// # Safety
    /// A `CUstream` (a `cudaStream_t` is one) that lives until the work of the call is done.
    pub unsafe fn from_raw(stream: *mut c_void) -> Stream {
        Stream(stream)
    }

    pub(crate) fn as_raw(self) -> *mut c_void {
        self.0
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: Copy {
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => { $(impl Element for $t { const DTYPE: DType = DType::$d; })* };
}
elements!(f32 => F32, half::f16 => F16, half::bf16 => BF16, f64 => F64, u8 => U8, bool => Bool, i64 => I64);

/// A read-only view of up to four dimensions; strides count elements.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub(crate) data: *const u8,
    pub dtype: DType,
    pub device: Device,
    ndim: usize,
    shape: [usize; 4],
    stride: [usize; 4],
    borrow: PhantomData<&'a [u8]>,
}

/// The same, writable.
#[derive(Debug)]
pub struct TensorMut<'a> {
    view: Tensor<'a>,
    borrow: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view is a shared borrow of plain numbers.
unsafe impl Send for Tensor<'_> {}
// SAFETY: as above.
unsafe impl Sync for Tensor<'_> {}
// SAFETY: a view is a unique borrow of plain numbers.
unsafe impl Send for TensorMut<'_> {}

impl<'a> Tensor<'a> {
    /// A row-major view of a slice.
    pub fn from_slice<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Tensor<'a>> {
        let stride = row_major(data.len(), shape)?;
        // SAFETY: the slice holds every element of the row-major shape and is borrowed for 'a.
        unsafe { Tensor::from_raw(data.as_ptr().cast(), T::DTYPE, Device::Cpu, shape, &stride) }
    }

    /// A view of memory that something else owns.
    ///
    /// # Safety
    /// Every element that shape and stride reach must be readable on `device` for 'a; on CUDA,
    /// until the work that reads it is done.
    pub unsafe fn from_raw(
        data: *const u8,
        dtype: DType,
        device: Device,
        shape: &[usize],
        stride: &[usize],
    ) -> Result<Tensor<'a>> {
        if shape.len() > 4 || shape.len() != stride.len() {
            bail!(Shape, "a tensor has at most 4 dimensions and one stride for each");
        }
        let mut view = Tensor {
            data,
            dtype,
            device,
            ndim: shape.len(),
            shape: [1; 4],
            stride: [1; 4],
            borrow: PhantomData,
        };
        view.shape[..shape.len()].copy_from_slice(shape);
        view.stride[..shape.len()].copy_from_slice(stride);
        if view.extent().is_none() {
            bail!(Shape, "shape {shape:?} with strides {stride:?} overflows the address space");
        }
        Ok(view)
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.ndim]
    }

    pub fn stride(&self) -> &[usize] {
        &self.stride[..self.ndim]
    }

    /// Bytes from the first element to the end of the last; `None` when that overflows.
    fn extent(&self) -> Option<usize> {
        if self.shape().contains(&0) {
            return Some(0);
        }
        let mut last = 0usize;
        for (n, s) in self.shape().iter().zip(self.stride()) {
            last = last.checked_add((n - 1).checked_mul(*s)?)?;
        }
        let bytes = last.checked_add(1)?.checked_mul(self.dtype.size())?;
        (bytes <= isize::MAX as usize).then_some(bytes)
    }

    /// The addresses that the view spans.
    pub(crate) fn span(&self) -> std::ops::Range<usize> {
        let start = self.data as usize;
        start..start.saturating_add(self.extent().unwrap_or(0))
    }
}

impl<'a> TensorMut<'a> {
    /// A row-major view of a slice.
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<TensorMut<'a>> {
        let stride = row_major(data.len(), shape)?;
        let ptr = data.as_mut_ptr().cast();
        // SAFETY: the slice holds every element of the row-major shape and is borrowed for 'a.
        unsafe { TensorMut::from_raw(ptr, T::DTYPE, Device::Cpu, shape, &stride) }
    }

    /// A writable view of memory that something else owns.
    ///
    /// # Safety
    /// As [`Tensor::from_raw`], writable, and nothing else may touch the elements for 'a.
    pub unsafe fn from_raw(
        data: *mut u8,
        dtype: DType,
        device: Device,
        shape: &[usize],
        stride: &[usize],
    ) -> Result<TensorMut<'a>> {
        // SAFETY: the caller's promise covers it.
        let view = unsafe { Tensor::from_raw(data.cast_const(), dtype, device, shape, stride)? };
        Ok(TensorMut { view, borrow: PhantomData })
    }

    pub fn view(&self) -> &Tensor<'a> {
        &self.view
    }

    pub(crate) fn data_mut(&self) -> *mut u8 {
        self.view.data.cast_mut()
    }
}

/// Strides of a row-major tensor that fills `count` elements.
fn row_major(count: usize, shape: &[usize]) -> Result<Vec<usize>> {
    let product = shape.iter().try_fold(1usize, |n, s| n.checked_mul(*s));
    if product != Some(count) {
        bail!(Shape, "a slice of {count} elements cannot have the shape {shape:?}");
    }
    let mut stride = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        stride[i - 1] = stride[i] * shape[i].max(1);
    }
    Ok(stride)
}
