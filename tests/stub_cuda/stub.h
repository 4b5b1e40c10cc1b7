/*
 * What tests ask of the stub driver (stub.c) beside the CUDA driver's own interface. A program gets
 * these functions with dlsym from the libcuda.so.1 that it runs with.
 *
 * The environment, read by the stub when a call needs it:
 *   STUB_CUDA_VERSION        what cuDriverGetVersion answers (13000)
 *   STUB_CUDA_DEVICES        how many devices there are (2); 0 fails cuInit with NO_DEVICE
 *   STUB_CUDA_CAPABILITY     compute capability times ten (90)
 *   STUB_CUDA_BLOCKS         how many blocks of clusters run at a time (128)
 *   STUB_CUDA_INIT           what cuInit answers (0)
 *   STUB_CUDA_FAIL           "name=code,name=code": what these functions answer, such as
 *                            "cuMemAlloc=2"; "cuMemAlloc=2@3" from the third call on
 */

#ifndef BLOCKEM_STUB_CUDA_H
#define BLOCKEM_STUB_CUDA_H

#include <stddef.h>

/* Calls of a function since the last stub_reset; of all functions for "*". */
typedef int stub_calls_fn(const char *name);
/* Forgets the counts and the launches. */
typedef void stub_reset_fn(void);
/* Overrides STUB_CUDA_FAIL. */
typedef void stub_fail_fn(const char *failures);
/* A context of a device, primary or not, that is not current; the primary one only if it lives. */
typedef void *stub_context_fn(int device, int primary);
/* The thread's current context. */
typedef void *stub_current_fn(void);
typedef void stub_set_current_fn(void *context);
/* How many references a device's primary context has. */
typedef int stub_primary_count_fn(int device);
/* A stream of a context. */
typedef void *stub_stream_fn(void *context);
/* A stream is captured from now on, or (off) no longer; NULL stands for one that the test has not. */
enum { STUB_CAPTURE_OFF, STUB_CAPTURE_BLOCKING, STUB_CAPTURE_NON_BLOCKING };
typedef void stub_capture_fn(void *stream, int kind);
/* Memory of a device and of no one context, pinned memory (device -1) or managed memory (device -2). */
typedef void *stub_memory_fn(int device, size_t bytes);
typedef void stub_release_fn(void *memory);
/* Makes host memory pass for a device's, until stub_release. */
typedef void stub_adopt_fn(int device, void *memory, size_t bytes);
/* Allocations of all kinds, modules and streams that live. */
typedef int stub_alive_fn(void);
/* From now on everything answers DEINITIALIZED, as at exit. */
typedef void stub_shut_down_fn(void);
/* The i-th launch since the last stub_reset, NULL beyond. */
typedef struct {
  const char *kernel;
  void *stream, *context;
  /* overlaps: whether it may begin while the one before ends. */
  unsigned grid[3], cluster, block, shared, overlaps;
} stub_launch;
typedef const stub_launch *stub_launch_at_fn(int i);

#endif
