/*
 * From DLPack to blockem_tensor: a view of the same memory, nothing is copied or owned.
 *
 *     DLTensor *dl = &managed->dl_tensor;
 *     blockem_status status = BLOCKEM_TENSOR_FROM_DLPACK(dl, &args.hidden);
 *
 * Needs no dlpack.h: the macro takes a pointer to any struct with DLTensor's fields (data, device,
 * ndim, dtype, shape, strides, byte_offset), so any version of that header serves. Callers whose
 * struct has other names call blockem_tensor_from_dlpack_fields.
 *
 * The managed tensor must outlive the calls that use the view; its deleter stays the caller's to
 * run. DLPack may describe more than libblockem takes: that is UNSUPPORTED (element types, vector
 * lanes, devices, more than 4 dimensions) or LAYOUT (negative strides). Pure functions, C99 and
 * C++11, usable from any thread. blockem_last_error does not know about them.
 */

#ifndef BLOCKEM_DLPACK_H
#define BLOCKEM_DLPACK_H

#include "../blockem.h"

/* BLOCKEM_STATUS_OK, or why not: then *out, a blockem_tensor *, is untouched. */
#define BLOCKEM_TENSOR_FROM_DLPACK(dl, out)                                                     \
  blockem_tensor_from_dlpack_fields((dl)->data, (int32_t)(dl)->device.device_type,              \
                                    (int32_t)(dl)->device.device_id, (int32_t)(dl)->ndim,       \
                                    (int32_t)(dl)->dtype.code, (int32_t)(dl)->dtype.bits,       \
                                    (int32_t)(dl)->dtype.lanes, (dl)->shape, (dl)->strides,     \
                                    (dl)->byte_offset, (out))

/* The BLOCKEM_DTYPE_... of a DLDataType; -1 for one that libblockem does not have. */
static inline int32_t blockem_dtype_from_dlpack(int32_t code, int32_t bits, int32_t lanes) {
  enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };
  if (lanes != 1) return -1;
  switch (code) {
    case DL_FLOAT:
      if (bits == 32) return BLOCKEM_DTYPE_F32;
      if (bits == 16) return BLOCKEM_DTYPE_F16;
      return bits == 64 ? BLOCKEM_DTYPE_F64 : -1;
    case DL_BFLOAT:
      return bits == 16 ? BLOCKEM_DTYPE_BF16 : -1;
    case DL_UINT:
      return bits == 8 ? BLOCKEM_DTYPE_U8 : -1;
    case DL_BOOL:
      return bits == 8 ? BLOCKEM_DTYPE_BOOL : -1;
    case DL_INT:
      return bits == 64 ? BLOCKEM_DTYPE_I64 : -1;
    default:
      return -1;
  }
}

/*
 * The same from single values. shape: [ndim]. strides: [ndim] in elements, or NULL for row-major.
 * byte_offset: from data to the first element.
 */
static inline blockem_status blockem_tensor_from_dlpack_fields(
    void *data, int32_t device_type, int32_t device_id, int32_t ndim, int32_t code, int32_t bits,
    int32_t lanes, const int64_t *shape, const int64_t *strides, uint64_t byte_offset,
    blockem_tensor *out) {
  enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
  blockem_tensor view = BLOCKEM_TENSOR_INIT;
  int64_t row_major = 1;
  int empty = 0;
  int32_t i;

  if (out == NULL || (ndim > 0 && shape == NULL)) return BLOCKEM_STATUS_NULL_POINTER;
  if (ndim < 0) return BLOCKEM_STATUS_INVALID_ARGUMENT;
  if (ndim > 4) return BLOCKEM_STATUS_UNSUPPORTED;
  view.ndim = ndim;

  view.dtype = blockem_dtype_from_dlpack(code, bits, lanes);
  if (view.dtype < 0) return BLOCKEM_STATUS_UNSUPPORTED;

  switch (device_type) {
    case DL_CPU:
    case DL_CUDA_HOST: /* pinned host memory: device_id names the device that pinned it */
      view.device_type = BLOCKEM_DEVICE_CPU;
      break;
    case DL_CUDA:
    case DL_CUDA_MANAGED:
      if (device_id < 0) return BLOCKEM_STATUS_INVALID_ARGUMENT;
      view.device_type = BLOCKEM_DEVICE_CUDA;
      view.device_index = device_id;
      break;
    default:
      return BLOCKEM_STATUS_UNSUPPORTED;
  }

  for (i = ndim - 1; i >= 0; i--) {
    view.shape[i] = shape[i];
    if (shape[i] < 0) return BLOCKEM_STATUS_INVALID_ARGUMENT;
    if (shape[i] == 0) empty = 1;
    /* Producers leave any stride in a dimension that is never stepped along. */
    view.stride[i] = strides != NULL && shape[i] > 1 ? strides[i] : row_major;
    if (view.stride[i] < 0) return BLOCKEM_STATUS_LAYOUT;
    if (shape[i] > 1) {
      if (row_major > INT64_MAX / shape[i]) return BLOCKEM_STATUS_INVALID_ARGUMENT;
      row_major *= shape[i];
    }
  }

  if (data == NULL && !empty) return BLOCKEM_STATUS_NULL_POINTER;
  if (data != NULL) {
    if (byte_offset > (uint64_t)(UINTPTR_MAX - (uintptr_t)data)) {
      return BLOCKEM_STATUS_INVALID_ARGUMENT;
    }
    view.data = (unsigned char *)data + (size_t)byte_offset;
  }
  *out = view;
  return BLOCKEM_STATUS_OK;
}

#endif /* BLOCKEM_DLPACK_H */
