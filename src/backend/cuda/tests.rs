//! Kernels, executed without a device.
