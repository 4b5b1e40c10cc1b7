/* blockem/dlpack.h: views of DLPack tensors, without dlpack.h. */

#include "support.h"

#include <blockem/dlpack.h>
#include <blockem/dlpack.h>

/* The fields of DLPack's DLTensor, written out from its specification. */
typedef struct {
  void *data;
  struct {
    int device_type; /* an enum there */
    int32_t device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} dl_tensor;

enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_HANDLE = 3, DL_BFLOAT = 4, DL_COMPLEX = 5,
       DL_BOOL = 6 };
enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_OPENCL = 4, DL_METAL = 8, DL_MANAGED = 13 };

static float memory[64];
static int64_t shape[5] = {4, 3, 2, 1, 1}, strides[5] = {10, 2, 1, 1, 1};

static dl_tensor example(void) {
  dl_tensor t;
  memset(&t, 0, sizeof t);
  t.data = memory;
  t.device.device_type = DL_CPU;
  t.ndim = 2;
  t.dtype.code = DL_FLOAT;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  t.strides = strides;
  return t;
}

static void views(void) {
  dl_tensor dl = example();
  blockem_tensor t = BLOCKEM_TENSOR_INIT;
  int64_t empty[2] = {0, 7}, one[2] = {1, 3}, odd[2] = {-1, 1};

  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == BLOCKEM_STATUS_OK);
  CHECK(t.data == memory && t.dtype == BLOCKEM_DTYPE_F32 && t.ndim == 2);
  CHECK(t.device_type == BLOCKEM_DEVICE_CPU && t.device_index == 0);
  CHECK(t.shape[0] == 4 && t.shape[1] == 3 && t.stride[0] == 10 && t.stride[1] == 2);

  /* NULL strides are row-major; the offset counts bytes. */
  dl.strides = NULL;
  dl.ndim = 3;
  dl.byte_offset = 12;
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == BLOCKEM_STATUS_OK);
  CHECK(t.data == memory + 3 && t.ndim == 3);
  CHECK(t.stride[0] == 6 && t.stride[1] == 2 && t.stride[2] == 1);

  dl = example();
  dl.ndim = 0;
  dl.shape = NULL;
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == BLOCKEM_STATUS_OK);
  CHECK(t.ndim == 0 && t.data == memory);

  /* No elements, no memory. */
  dl = example();
  dl.shape = empty;
  dl.strides = NULL;
  dl.data = NULL;
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == BLOCKEM_STATUS_OK);
  CHECK(t.data == NULL && t.shape[0] == 0 && t.shape[1] == 7);

  /* The stride of a dimension of 1 means nothing. */
  dl = example();
  dl.shape = one;
  dl.strides = odd;
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == BLOCKEM_STATUS_OK);
  CHECK(t.stride[0] == 3 && t.stride[1] == 1);
}

static int32_t device_of(int device_type, int32_t id, blockem_status expected) {
  dl_tensor dl = example();
  blockem_tensor t = BLOCKEM_TENSOR_INIT;
  dl.device.device_type = device_type;
  dl.device.device_id = id;
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == expected);
  return t.device_type * 100 + t.device_index;
}

static void devices(void) {
  CHECK(device_of(DL_CPU, 0, BLOCKEM_STATUS_OK) == 0);
  CHECK(device_of(DL_CUDA_HOST, 1, BLOCKEM_STATUS_OK) == 0);
  CHECK(device_of(DL_CUDA, 3, BLOCKEM_STATUS_OK) == 103);
  CHECK(device_of(DL_MANAGED, 1, BLOCKEM_STATUS_OK) == 101);
  device_of(DL_CUDA, -1, BLOCKEM_STATUS_INVALID_ARGUMENT);
  device_of(DL_OPENCL, 0, BLOCKEM_STATUS_UNSUPPORTED);
  device_of(DL_METAL, 0, BLOCKEM_STATUS_UNSUPPORTED);
  device_of(0, 0, BLOCKEM_STATUS_UNSUPPORTED);
}

static void dtypes(void) {
  static const struct {
    int code, bits, dtype;
  } known[] = {
      {DL_FLOAT, 32, BLOCKEM_DTYPE_F32}, {DL_FLOAT, 16, BLOCKEM_DTYPE_F16},
      {DL_BFLOAT, 16, BLOCKEM_DTYPE_BF16}, {DL_FLOAT, 64, BLOCKEM_DTYPE_F64},
      {DL_UINT, 8, BLOCKEM_DTYPE_U8}, {DL_BOOL, 8, BLOCKEM_DTYPE_BOOL},
      {DL_INT, 64, BLOCKEM_DTYPE_I64},
  };
  size_t i;
  int code, bits, accepted = 0;
  for (i = 0; i < sizeof known / sizeof *known; i++) {
    CHECK(blockem_dtype_from_dlpack(known[i].code, known[i].bits, 1) == known[i].dtype);
  }
  for (code = 0; code < 20; code++) {
    for (bits = 1; bits <= 128; bits++) {
      accepted += blockem_dtype_from_dlpack(code, bits, 1) >= 0;
      CHECK(blockem_dtype_from_dlpack(code, bits, 4) < 0);
      CHECK(blockem_dtype_from_dlpack(code, bits, 0) < 0);
    }
  }
  CHECK(accepted == (int)(sizeof known / sizeof *known));
  CHECK(blockem_dtype_from_dlpack(DL_HANDLE, 64, 1) < 0);
  CHECK(blockem_dtype_from_dlpack(DL_COMPLEX, 64, 1) < 0);
}

static void refused(void) {
  int64_t negative[2] = {4, -3}, backwards[2] = {3, -1}, huge[3] = {INT64_MAX, 2, 2};
  blockem_tensor t, before;
  dl_tensor dl;
  memset(&before, 0xa5, sizeof before);
  t = before;
#define REFUSE(change, expected)                                \
  do {                                                          \
    dl = example();                                             \
    change;                                                     \
    CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &t) == (expected));   \
    CHECK(memcmp(&t, &before, sizeof t) == 0);                  \
  } while (0)
  REFUSE(dl.ndim = -1, BLOCKEM_STATUS_INVALID_ARGUMENT);
  REFUSE(dl.ndim = 5, BLOCKEM_STATUS_UNSUPPORTED);
  REFUSE(dl.shape = NULL, BLOCKEM_STATUS_NULL_POINTER);
  REFUSE(dl.data = NULL, BLOCKEM_STATUS_NULL_POINTER);
  REFUSE(dl.shape = negative, BLOCKEM_STATUS_INVALID_ARGUMENT);
  REFUSE(dl.strides = backwards, BLOCKEM_STATUS_LAYOUT);
  REFUSE((dl.shape = huge, dl.ndim = 3), BLOCKEM_STATUS_INVALID_ARGUMENT);
  REFUSE(dl.dtype.lanes = 2, BLOCKEM_STATUS_UNSUPPORTED);
  REFUSE(dl.dtype.code = DL_COMPLEX, BLOCKEM_STATUS_UNSUPPORTED);
  REFUSE(dl.byte_offset = UINT64_MAX, BLOCKEM_STATUS_INVALID_ARGUMENT);
#undef REFUSE
  dl = example();
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, (blockem_tensor *)NULL) == BLOCKEM_STATUS_NULL_POINTER);
}

/* A view reaches the library: a strided slice encodes as its contiguous copy. */
static void used(void) {
  enum { T = 3, PITCH = SMALL_D + 5 };
  float *base = random_floats(T * PITCH, 5), *copy = floats(T * SMALL_D);
  float a[T * SMALL_K], b[T * SMALL_K];
  int64_t dims[2] = {T, SMALL_D}, steps[2] = {PITCH, 1};
  dl_tensor dl = example();
  blockem_plan *plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
  int t;
  dl.data = base;
  dl.shape = dims;
  dl.strides = steps;
  dl.byte_offset = 3 * sizeof(float);
  CHECK(BLOCKEM_TENSOR_FROM_DLPACK(&dl, &args.hidden) == BLOCKEM_STATUS_OK);
  args.latents = f32_2(a, T, SMALL_K);
  CHECK_OK(blockem_encode(plan, &args, NULL));
  for (t = 0; t < T; t++) memcpy(copy + t * SMALL_D, base + 3 + t * PITCH, SMALL_D * 4);
  args.hidden = f32_2(copy, T, SMALL_D);
  args.latents.data = b;
  CHECK_OK(blockem_encode(plan, &args, NULL));
  CHECK(memcmp(a, b, sizeof a) == 0);
  blockem_plan_free(plan);
  free(copy);
  free(base);
}

int main(void) {
  views();
  devices();
  dtypes();
  refused();
  used();
  return finish_checks("dlpack");
}
