/*
 * A libcuda.so.1 without a device, for tests: device memory is host memory, contexts and streams
 * are records, kernels are not run but written down. It keeps the driver's rules that libblockem
 * relies on (current contexts, owners of streams, captures, forks) and answers failures on demand:
 * see stub.h. Names and numbers are those of NVIDIA's cuda.h.
 */

#define _GNU_SOURCE
#include "stub.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int CUresult;
typedef struct context context;
typedef struct stream stream;
typedef struct module module;
typedef struct function function;
typedef uint64_t deviceptr;

enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  DEINITIALIZED = 4,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  CAPTURE_UNSUPPORTED = 900,
  CAPTURE_IMPLICIT = 906
};

#define MAX_DEVICES 8
#define MAX_THINGS 4096
#define EXPORT __attribute__((visibility("default")))

struct context {
  int device, references, is_primary;
  unsigned long long id;
};
struct stream {
  context *owner;
  int capturing;
};
struct module {
  context *owner;
};
struct function {
  char name[64];
  context *owner;
};
typedef struct {
  uintptr_t start;
  size_t bytes;
  int device, owned;
  context *owner; /* NULL: of no one context, as a driver's memory pools are */
} memory;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static context primaries[MAX_DEVICES], others[64];
static int other_count;
static unsigned long long next_id = 1;
static memory memories[MAX_THINGS];
static int memory_count, alive, capture, shut_down;
static stream streams[MAX_THINGS];
static module modules[MAX_THINGS];
static int stream_count, module_count;
static pid_t initialised_by;
static struct {
  char name[48];
  int calls;
} counts[64];
static stub_launch launches[256];
static int launch_count;
static const char *failures;
static __thread context *stack[32];
static __thread int depth, capture_mode;

static int setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text != NULL && *text != '\0' ? atoi(text) : otherwise;
}

/* ---- Bookkeeping ----------------------------------------------------------------------------- */

static void count(const char *name) {
  int i;
  pthread_mutex_lock(&lock);
  for (i = 0; i < 63 && counts[i].name[0] != '\0' && strcmp(counts[i].name, name) != 0; i++) {
  }
  snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
  counts[i].calls++;
  pthread_mutex_unlock(&lock);
}

EXPORT int stub_calls(const char *name) {
  int i, all = 0;
  for (i = 0; i < 64; i++) {
    if (strcmp(name, "*") == 0) all += counts[i].calls;
    else if (strcmp(counts[i].name, name) == 0) return counts[i].calls;
  }
  return all;
}

/* What a call must answer instead of doing its work. */
static CUresult planned(const char *name) {
  const char *list = failures != NULL ? failures : getenv("STUB_CUDA_FAIL");
  size_t length = strlen(name);
  for (; list != NULL && *list != '\0'; list = strchr(list, ',')) {
    int code, first = 0;
    if (*list == ',') list++;
    if (strncmp(list, name, length) != 0) continue;
    if (sscanf(list + length, "=%d@%d", &code, &first) >= 1 && stub_calls(name) >= first) {
      return code;
    }
  }
  if (shut_down) return DEINITIALIZED;
  if (initialised_by != getpid()) return NOT_INITIALIZED;
  return SUCCESS;
}

#define BEGIN(name)                                   \
  do {                                                \
    CUresult planned_result;                          \
    count(name);                                      \
    planned_result = planned(name);                   \
    if (planned_result != SUCCESS) return planned_result; \
  } while (0)

static context *current(void) { return depth > 0 ? stack[depth - 1] : NULL; }

/* What a capture forbids: allocations, loads and their like, unless the thread relaxed. */
static CUresult unsafe_in_capture(void) {
  return capture && capture_mode != 2 ? CAPTURE_UNSUPPORTED : SUCCESS;
}

static context *new_context(context *at, int device, int is_primary) {
  at->device = device;
  at->is_primary = is_primary;
  at->id = next_id++;
  return at;
}

static void *new_memory(int device, size_t bytes) {
  memory *m = &memories[memory_count++];
  void *start = NULL;
  if (memory_count >= MAX_THINGS || posix_memalign(&start, 256, bytes + 1) != 0) abort();
  memset(start, 0xa5, bytes);
  m->start = (uintptr_t)start;
  m->bytes = bytes;
  m->device = device;
  m->owned = 1;
  m->owner = NULL;
  alive++;
  return start;
}

static memory *find_memory(uintptr_t address) {
  int i;
  for (i = 0; i < memory_count; i++) {
    if (address - memories[i].start < memories[i].bytes) return &memories[i];
  }
  return NULL;
}

static CUresult free_memory(uintptr_t address) {
  memory *m = find_memory(address);
  if (m == NULL || m->start != address) return INVALID_VALUE;
  if (m->owned) {
    free((void *)m->start);
    alive--;
  }
  m->bytes = 0;
  m->start = 0;
  return SUCCESS;
}

/* ---- What tests ask -------------------------------------------------------------------------- */

EXPORT void stub_reset(void) {
  memset(counts, 0, sizeof counts);
  launch_count = 0;
}

EXPORT void stub_fail(const char *list) { failures = list; }

EXPORT void *stub_context(int device, int primary) {
  if (primary) return primaries[device].references > 0 ? &primaries[device] : NULL;
  return new_context(&others[other_count++], device, 0);
}

EXPORT void *stub_current(void) { return current(); }

EXPORT void stub_set_current(void *c) {
  depth = c != NULL ? 1 : 0;
  stack[0] = c;
}

EXPORT int stub_primary_count(int device) { return primaries[device].references; }

EXPORT void *stub_stream(void *c) {
  stream *s = &streams[stream_count++];
  if (stream_count == MAX_THINGS) abort();
  s->owner = c;
  return s;
}

EXPORT void stub_capture(void *s, int kind) {
  capture = kind;
  if (s != NULL) ((stream *)s)->capturing = kind != STUB_CAPTURE_OFF;
}

EXPORT void *stub_memory(int device, size_t bytes) {
  void *m = new_memory(device, bytes);
  alive--;
  return m;
}

EXPORT void stub_release(void *m) {
  memory *found = find_memory((uintptr_t)m);
  if (found != NULL && found->owned) alive++;
  free_memory((uintptr_t)m);
}

EXPORT void stub_adopt(int device, void *start, size_t bytes) {
  memory *m = &memories[memory_count++];
  m->start = (uintptr_t)start;
  m->bytes = bytes;
  m->device = device;
  m->owned = 0;
  m->owner = NULL;
}

EXPORT int stub_alive(void) { return alive; }
EXPORT void stub_shut_down(void) { shut_down = 1; }

EXPORT const stub_launch *stub_launch_at(int i) {
  return i < launch_count ? &launches[i] : NULL;
}

/* ---- The driver's interface ------------------------------------------------------------------ */

EXPORT CUresult cuInit(unsigned flags) {
  int answer = setting("STUB_CUDA_INIT", SUCCESS);
  count("cuInit");
  if (flags != 0) return INVALID_VALUE;
  if (answer != SUCCESS) return answer;
  if (setting("STUB_CUDA_DEVICES", 2) == 0) return NO_DEVICE;
  if (initialised_by != 0 && initialised_by != getpid()) return NOT_INITIALIZED;
  initialised_by = getpid();
  return SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version) {
  *version = setting("STUB_CUDA_VERSION", 13000);
  return SUCCESS;
}

static const struct {
  CUresult code;
  const char *name, *text;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {DEINITIALIZED, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
     "operation would make the legacy stream depend on a capturing blocking stream"},
};

static CUresult describe(CUresult code, int text, const char **out) {
  size_t i;
  *out = NULL;
  for (i = 0; i < sizeof errors / sizeof *errors; i++) {
    if (errors[i].code == code) *out = text ? errors[i].text : errors[i].name;
  }
  return *out != NULL ? SUCCESS : INVALID_VALUE;
}

EXPORT CUresult cuGetErrorName(CUresult code, const char **out) { return describe(code, 0, out); }
EXPORT CUresult cuGetErrorString(CUresult code, const char **out) { return describe(code, 1, out); }

EXPORT CUresult cuDeviceGetCount(int *out) {
  BEGIN("cuDeviceGetCount");
  *out = setting("STUB_CUDA_DEVICES", 2);
  return SUCCESS;
}

EXPORT CUresult cuDeviceGet(int *device, int ordinal) {
  BEGIN("cuDeviceGet");
  if (ordinal < 0 || ordinal >= setting("STUB_CUDA_DEVICES", 2)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *out, int attribute, int device) {
  int capability = setting("STUB_CUDA_CAPABILITY", 90);
  BEGIN("cuDeviceGetAttribute");
  (void)device;
  /* COMPUTE_CAPABILITY_MAJOR and _MINOR */
  if (attribute != 75 && attribute != 76) return INVALID_VALUE;
  *out = attribute == 75 ? capability / 10 : capability % 10;
  return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  BEGIN("cuDevicePrimaryCtxGetState");
  *flags = 0;
  *active = primaries[device].references > 0;
  return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(context **out, int device) {
  BEGIN("cuDevicePrimaryCtxRetain");
  pthread_mutex_lock(&lock);
  if (primaries[device].references++ == 0) new_context(&primaries[device], device, 1);
  pthread_mutex_unlock(&lock);
  *out = &primaries[device];
  return SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease_v2(int device) {
  BEGIN("cuDevicePrimaryCtxRelease");
  if (primaries[device].references == 0) return INVALID_CONTEXT;
  primaries[device].references--;
  return SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(context **out) {
  BEGIN("cuCtxGetCurrent");
  *out = current();
  return SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(int *device) {
  BEGIN("cuCtxGetDevice");
  if (current() == NULL) return INVALID_CONTEXT;
  *device = current()->device;
  return SUCCESS;
}

EXPORT CUresult cuCtxGetId(context *c, unsigned long long *id) {
  BEGIN("cuCtxGetId");
  *id = c->id;
  return SUCCESS;
}

EXPORT CUresult cuCtxPushCurrent_v2(context *c) {
  BEGIN("cuCtxPushCurrent");
  if (c == NULL || depth == 32) return INVALID_VALUE;
  stack[depth++] = c;
  return SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent_v2(context **c) {
  BEGIN("cuCtxPopCurrent");
  if (depth == 0) return INVALID_CONTEXT;
  *c = stack[--depth];
  return SUCCESS;
}

EXPORT CUresult cuModuleLoadData(module **out, const void *image) {
  BEGIN("cuModuleLoadData");
  if (current() == NULL) return INVALID_CONTEXT;
  if (unsafe_in_capture() != SUCCESS) return CAPTURE_UNSUPPORTED;
  /* The first word of every fatbin. */
  if ((uintptr_t)image % 8 != 0 || *(const uint32_t *)image != 0xba55ed50u) return INVALID_IMAGE;
  if (module_count == MAX_THINGS) abort();
  *out = &modules[module_count++];
  (*out)->owner = current();
  alive++;
  return SUCCESS;
}

EXPORT CUresult cuModuleUnload(module *m) {
  BEGIN("cuModuleUnload");
  if (current() != m->owner) return INVALID_CONTEXT;
  if (unsafe_in_capture() != SUCCESS) return CAPTURE_UNSUPPORTED;
  m->owner = NULL;
  alive--;
  return SUCCESS;
}

/* Functions live as long as the process: the tests' launches name them. */
EXPORT CUresult cuModuleGetFunction(function **out, module *m, const char *name) {
  static function functions[MAX_THINGS];
  static int used;
  BEGIN("cuModuleGetFunction");
  if (used == MAX_THINGS) abort();
  *out = &functions[used++];
  snprintf((*out)->name, sizeof (*out)->name, "%s", name);
  (*out)->owner = m->owner;
  return SUCCESS;
}

/* Of a block: 99 KB is what the smallest devices have. */
static int shared_most(void) {
  return setting("STUB_CUDA_CAPABILITY", 90) == 90 ? 227 * 1024 : 99 * 1024;
}

EXPORT CUresult cuFuncSetAttribute(function *f, int attribute, int value) {
  BEGIN("cuFuncSetAttribute");
  /* MAX_DYNAMIC_SHARED_SIZE_BYTES */
  return f != NULL && attribute == 8 && value <= shared_most() ? SUCCESS : INVALID_VALUE;
}

EXPORT CUresult cuFuncLoad(function *f) {
  BEGIN("cuFuncLoad");
  return f != NULL ? SUCCESS : INVALID_HANDLE;
}

EXPORT CUresult cuMemAlloc_v2(deviceptr *out, size_t bytes) {
  BEGIN("cuMemAlloc");
  if (current() == NULL) return INVALID_CONTEXT;
  if (bytes == 0) return INVALID_VALUE;
  if (unsafe_in_capture() != SUCCESS) return CAPTURE_UNSUPPORTED;
  *out = (deviceptr)(uintptr_t)new_memory(current()->device, bytes);
  find_memory((uintptr_t)*out)->owner = current();
  return SUCCESS;
}

EXPORT CUresult cuMemFree_v2(deviceptr address) {
  BEGIN("cuMemFree");
  if (current() == NULL) return INVALID_CONTEXT;
  if (unsafe_in_capture() != SUCCESS) return CAPTURE_UNSUPPORTED;
  return free_memory((uintptr_t)address);
}

static CUresult copy(void *to, const void *from, uintptr_t device, size_t bytes, stream *s) {
  memory *m = find_memory(device);
  if (m == NULL || m->start + m->bytes < device + bytes) return INVALID_VALUE;
  if (s != NULL && s->capturing) return CAPTURE_UNSUPPORTED;
  memcpy(to, from, bytes);
  return SUCCESS;
}

EXPORT CUresult cuMemcpyHtoDAsync_v2(deviceptr to, const void *from, size_t bytes, stream *s) {
  BEGIN("cuMemcpyHtoDAsync");
  return copy((void *)(uintptr_t)to, from, (uintptr_t)to, bytes, s);
}

EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, deviceptr from, size_t bytes, stream *s) {
  BEGIN("cuMemcpyDtoHAsync");
  return copy(to, (void *)(uintptr_t)from, (uintptr_t)from, bytes, s);
}

EXPORT CUresult cuPointerGetAttributes(unsigned n, const int *keys, void **out, deviceptr address) {
  memory *m = find_memory((uintptr_t)address);
  unsigned i;
  BEGIN("cuPointerGetAttributes");
  for (i = 0; i < n; i++) {
    switch (keys[i]) {
      case 1: /* CONTEXT */
        *(void **)out[i] = m == NULL ? NULL : m->owner;
        break;
      case 2: /* MEMORY_TYPE: host 1, device 2, unknown 0 */
        *(unsigned *)out[i] = m == NULL ? 0 : m->device == -1 ? 1 : 2;
        break;
      case 8: /* IS_MANAGED */
        *(unsigned char *)out[i] = m != NULL && m->device == -2;
        break;
      case 9: /* DEVICE_ORDINAL */
        *(int *)out[i] = m == NULL || m->device < 0 ? -2 : m->device;
        break;
      default:
        return INVALID_VALUE;
    }
  }
  return SUCCESS;
}

EXPORT CUresult cuStreamCreate(stream **out, unsigned flags) {
  BEGIN("cuStreamCreate");
  (void)flags;
  *out = stub_stream(current());
  alive++;
  return SUCCESS;
}

EXPORT CUresult cuStreamDestroy_v2(stream *s) {
  BEGIN("cuStreamDestroy");
  /* The record stays in the table: a call with a stale handle is a test's to find. */
  s->owner = NULL;
  alive--;
  return SUCCESS;
}

EXPORT CUresult cuStreamGetCtx(stream *s, context **out) {
  BEGIN("cuStreamGetCtx");
  *out = s == NULL ? current() : s->owner;
  return SUCCESS;
}

EXPORT CUresult cuStreamSynchronize(stream *s) {
  BEGIN("cuStreamSynchronize");
  return s != NULL && s->capturing ? CAPTURE_UNSUPPORTED : SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(stream *s, int *out) {
  BEGIN("cuStreamIsCapturing");
  if (s == NULL && capture == STUB_CAPTURE_BLOCKING) return CAPTURE_IMPLICIT;
  *out = s != NULL && s->capturing;
  return SUCCESS;
}

EXPORT CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
  int old = capture_mode;
  BEGIN("cuThreadExchangeStreamCaptureMode");
  capture_mode = *mode;
  *mode = old;
  return SUCCESS;
}

/* Blocks of a cluster, and whether the launch may begin while the one before ends. */
typedef struct {
  unsigned cluster, overlaps;
} manner;

static CUresult start(function *f, const unsigned grid[3], manner how, unsigned block,
                      unsigned shared, stream *s, void **params, void **extra) {
  stub_launch *launch = &launches[launch_count];
  if (current() != f->owner) return INVALID_CONTEXT;
  if (s != NULL && s->owner != current()) return INVALID_HANDLE;
  if (s == NULL && capture == STUB_CAPTURE_BLOCKING) return CAPTURE_IMPLICIT;
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[1] > 65535 || grid[2] > 65535 ||
      grid[0] % how.cluster != 0 || block == 0 || block > 1024 || shared > (unsigned)shared_most() ||
      params == NULL || extra != NULL) {
    return INVALID_VALUE;
  }
  if (launch_count == 256) return SUCCESS;
  launch->kernel = f->name;
  launch->stream = s;
  launch->context = current();
  memcpy(launch->grid, grid, sizeof launch->grid);
  launch->cluster = how.cluster;
  launch->overlaps = how.overlaps;
  launch->block = block;
  launch->shared = shared;
  launch_count++;
  return SUCCESS;
}

typedef struct {
  int id;
  char pad[4];
  union {
    char pad[64];
    unsigned size[3];
  } value;
} launch_attribute;

typedef struct {
  unsigned grid[3], block[3], shared;
  stream *stream;
  const launch_attribute *attributes;
  unsigned attribute_count;
} launch_config;

/* Of the attributes that there may be: 4, CLUSTER_DIMENSION, and 6, PROGRAMMATIC_STREAM_SERIALIZATION.
 * No cluster for others, and for devices and drivers without them. */
static manner manner_of(const launch_config *config) {
  const manner bad = {0, 0};
  manner found = {1, 0};
  unsigned i;
  for (i = 0; i < config->attribute_count; i++) {
    const launch_attribute *attribute = &config->attributes[i];
    const unsigned *size = attribute->value.size;
    if (setting("STUB_CUDA_CAPABILITY", 90) < 90) return bad;
    if (attribute->id == 4 && size[0] >= 1 && size[0] <= 8 && size[1] == 1 && size[2] == 1) {
      found.cluster = size[0];
    } else if (attribute->id == 6 && size[0] == 1 && setting("STUB_CUDA_VERSION", 13000) >= 12030) {
      found.overlaps = 1;
    } else {
      return bad;
    }
  }
  return found;
}

EXPORT CUresult cuLaunchKernelEx(const launch_config *config, function *f, void **params,
                                 void **extra) {
  const unsigned *block = config->block;
  const manner how = manner_of(config);
  BEGIN("cuLaunchKernelEx");
  if (how.cluster == 0) return INVALID_VALUE;
  return start(f, config->grid, how, block[0] * block[1] * block[2], config->shared,
               config->stream, params, extra);
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *out, function *f, const launch_config *config) {
  const unsigned cluster = manner_of(config).cluster;
  BEGIN("cuOccupancyMaxActiveClusters");
  if (f == NULL || current() != f->owner || cluster == 0) return INVALID_VALUE;
  *out = setting("STUB_CUDA_BLOCKS", 128) / cluster;
  return SUCCESS;
}
