use std::ffi::c_void;

use crate::error::{Result, bail};
use crate::tensor::{DType, Device, Tensor, TensorMut};

/// Element types of blockem_tensor.dtype.
pub const BLOCKEM_DTYPE_F32: i32 = 0;
/// IEEE half.
pub const BLOCKEM_DTYPE_F16: i32 = 1;
/// bfloat16.
pub const BLOCKEM_DTYPE_BF16: i32 = 2;
/// Double.
pub const BLOCKEM_DTYPE_F64: i32 = 3;
/// Unsigned byte.
pub const BLOCKEM_DTYPE_U8: i32 = 4;
/// One byte, 0 or not 0.
pub const BLOCKEM_DTYPE_BOOL: i32 = 5;
/// Signed 64-bit integer.
pub const BLOCKEM_DTYPE_I64: i32 = 6;

/// Host memory.
pub const BLOCKEM_DEVICE_CPU: i32 = 0;
/// Memory of a CUDA device.
pub const BLOCKEM_DEVICE_CUDA: i32 = 1;

/// A view of memory that the caller owns. Plain data: build it on the stack.
/// data NULL is an absent tensor where one is optional, and legal where the shape holds no element.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct blockem_tensor {
    /// The first element, aligned to its size.
    pub data: *mut c_void,
    /// BLOCKEM_DTYPE_...
    pub dtype: i32,
    /// BLOCKEM_DEVICE_...
    pub device_type: i32,
    /// Which device of that type; 0 for the CPU.
    pub device_index: i32,
    /// Dimensions, 0 to 4.
    pub ndim: i32,
    /// Elements along each dimension; entries from ndim on are ignored.
    pub shape: [i64; 4],
    /// Elements (not bytes) from one index to the next along each dimension, not negative.
    pub stride: [i64; 4],
}

impl blockem_tensor {
    fn device(&self, name: &str) -> Result<Device> {
        device(name, self.device_type, self.device_index)
    }

    fn dims(&self, name: &str) -> Result<([usize; 4], [usize; 4], usize)> {
        let Some(ndim) = usize::try_from(self.ndim).ok().filter(|n| *n <= 4) else {
            bail!(Shape, "{name} has {} dimensions; 0 to 4 are possible", self.ndim);
        };
        let (mut shape, mut stride) = ([1; 4], [1; 4]);
        for i in 0..ndim {
            match usize::try_from(self.shape[i]) {
                Ok(n) => shape[i] = n,
                Err(_) => bail!(Shape, "{name} has the negative dimension {}", self.shape[i]),
            }
            match usize::try_from(self.stride[i]) {
                Ok(n) => stride[i] = n,
                Err(_) => bail!(Layout, "{name} has the negative stride {}", self.stride[i]),
            }
        }
        Ok((shape, stride, ndim))
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        match DType::from_code(self.dtype) {
            Some(dtype) => Ok(dtype),
            None => bail!(Dtype, "{name} has the unknown dtype {}", self.dtype),
        }
    }

    /// Absent: no data, though the shape would hold elements or is not given.
    fn is_absent(&self) -> bool {
        let dims = usize::try_from(self.ndim).unwrap_or(0).min(4);
        self.data.is_null() && !self.shape[..dims].contains(&0)
    }

    /// # Safety
    /// What shape and stride reach must be readable for 'a.
    pub(super) unsafe fn optional<'a>(&self, name: &str) -> Result<Option<Tensor<'a>>> {
        if self.is_absent() {
            return Ok(None);
        }
        let (shape, stride, ndim) = self.dims(name)?;
        let (dtype, device) = (self.dtype(name)?, self.device(name)?);
        let (shape, stride) = (&shape[..ndim], &stride[..ndim]);
        // SAFETY: the caller's promise.
        unsafe { Tensor::from_raw(self.data.cast(), dtype, device, shape, stride) }.map(Some)
    }

    /// # Safety
    /// As [`Self::optional`].
    pub(super) unsafe fn required<'a>(&self, name: &str) -> Result<Tensor<'a>> {
        // SAFETY: the caller's promise.
        match unsafe { self.optional(name) }? {
            Some(tensor) => Ok(tensor),
            None => bail!(NullPointer, "{name} is required by this call"),
        }
    }

    /// # Safety
    /// What shape and stride reach must be writable for 'a.
    pub(super) unsafe fn optional_mut<'a>(&self, name: &str) -> Result<Option<TensorMut<'a>>> {
        if self.is_absent() {
            return Ok(None);
        }
        let (shape, stride, ndim) = self.dims(name)?;
        let (dtype, device) = (self.dtype(name)?, self.device(name)?);
        let (shape, stride) = (&shape[..ndim], &stride[..ndim]);
        // SAFETY: the caller's promise; overlaps are checked before anything is written.
        unsafe { TensorMut::from_raw(self.data.cast(), dtype, device, shape, stride) }.map(Some)
    }

    /// # Safety
    /// As [`Self::optional_mut`].
    pub(super) unsafe fn required_mut<'a>(&self, name: &str) -> Result<TensorMut<'a>> {
        // SAFETY: the caller's promise.
        match unsafe { self.optional_mut(name) }? {
            Some(tensor) => Ok(tensor),
            None => bail!(NullPointer, "{name} is required by this call"),
        }
    }
}

pub(super) fn device(name: &str, device_type: i32, index: i32) -> Result<Device> {
    match (device_type, index) {
        (BLOCKEM_DEVICE_CPU, 0) => Ok(Device::Cpu),
        (BLOCKEM_DEVICE_CUDA, index @ 0..) => Ok(Device::Cuda(index)),
        (BLOCKEM_DEVICE_CPU | BLOCKEM_DEVICE_CUDA, index) => {
            bail!(InvalidArgument, "{name} names the device index {index}")
        }
        (other, _) => bail!(InvalidArgument, "{name} names the unknown device type {other}"),
    }
}
