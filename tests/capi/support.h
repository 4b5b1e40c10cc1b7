/*
 * What the C and C++ tests of the ABI share: checks that name their line, arrays, a small SAE, and
 * safetensors files. C99 and C++11. Each program takes the path of an empty scratch folder.
 */

#ifndef BLOCKEM_TEST_SUPPORT_H
#define BLOCKEM_TEST_SUPPORT_H

#include <blockem.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define UNUSED_OK __attribute__((unused))
#else
#define UNUSED_OK
#endif

/* ---- Checks ---------------------------------------------------------------------------------- */

static int check_failures UNUSED_OK = 0;

#define CHECK(condition)                                                       \
  do {                                                                         \
    if (!(condition)) {                                                        \
      fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      check_failures++;                                                        \
    }                                                                          \
  } while (0)

/* The call answers this status, and its message says something exactly when it failed. */
#define CHECK_STATUS(call, expected) check_status(__FILE__, __LINE__, #call, (call), (expected))
#define CHECK_OK(call) CHECK_STATUS(call, BLOCKEM_STATUS_OK)

static UNUSED_OK int check_status(const char *file, int line, const char *call,
                                  blockem_status status, blockem_status expected) {
  char message[512] = "";
  size_t length = blockem_last_error(message, sizeof message);
  if (status == expected && (length > 0) == (expected != BLOCKEM_STATUS_OK)) {
    if (expected != BLOCKEM_STATUS_OK) printf("reached %d\n", (int)expected);
    return 1;
  }
  fprintf(stderr, "%s:%d: %s\n    expected %s, got %s (%d): %s\n", file, line, call,
          blockem_status_name(expected), blockem_status_name(status), (int)status,
          length > 0 ? message : "no message");
  check_failures++;
  return 0;
}

/* The message of the last call contains a word. */
static UNUSED_OK int message_has(const char *word) {
  char message[2048];
  blockem_last_error(message, sizeof message);
  if (strstr(message, word) != NULL) return 1;
  fprintf(stderr, "the message lacks \"%s\": %s\n", word, message);
  return 0;
}

static UNUSED_OK int finish_checks(const char *name) {
  if (check_failures > 0) {
    fprintf(stderr, "%s: %d failed\n", name, check_failures);
    return 1;
  }
  printf("%s: ok\n", name);
  return 0;
}

/* ---- Arrays ---------------------------------------------------------------------------------- */

static UNUSED_OK void *allocate(size_t bytes) {
  void *memory = malloc(bytes > 0 ? bytes : 1);
  if (memory == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(2);
  }
  return memory;
}

static UNUSED_OK float *floats(size_t count) { return (float *)allocate(count * sizeof(float)); }

/* Uniform in [-1, 1) from a state that the caller keeps. */
static UNUSED_OK float noise(uint32_t *state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

static UNUSED_OK float *random_floats(size_t count, uint32_t seed) {
  float *values = floats(count);
  size_t i;
  for (i = 0; i < count; i++) values[i] = noise(&seed);
  return values;
}

static UNUSED_OK blockem_tensor tensor1(const void *data, int32_t dtype, int64_t n) {
  blockem_tensor t = BLOCKEM_TENSOR_INIT;
  t.data = (void *)(uintptr_t)data;
  t.dtype = dtype;
  t.ndim = 1;
  t.shape[0] = n;
  t.stride[0] = 1;
  return t;
}

static UNUSED_OK blockem_tensor tensor2(const void *data, int32_t dtype, int64_t rows,
                                        int64_t cols) {
  blockem_tensor t = tensor1(data, dtype, rows);
  t.ndim = 2;
  t.stride[0] = cols;
  t.shape[1] = cols;
  t.stride[1] = 1;
  return t;
}

static UNUSED_OK blockem_tensor f32_2(const void *data, int64_t rows, int64_t cols) {
  return tensor2(data, BLOCKEM_DTYPE_F32, rows, cols);
}

static UNUSED_OK blockem_tensor f32_1(const void *data, int64_t n) {
  return tensor1(data, BLOCKEM_DTYPE_F32, n);
}

static UNUSED_OK blockem_tensor f64_2(const void *data, int64_t rows, int64_t cols) {
  return tensor2(data, BLOCKEM_DTYPE_F64, rows, cols);
}

static UNUSED_OK blockem_tensor f32_3(const void *data, int64_t planes, int64_t rows,
                                      int64_t cols) {
  blockem_tensor t = f32_2(data, rows, cols);
  t.ndim = 3;
  t.shape[0] = planes;
  t.shape[1] = rows;
  t.shape[2] = cols;
  t.stride[0] = rows * cols;
  t.stride[1] = cols;
  t.stride[2] = 1;
  return t;
}

static UNUSED_OK blockem_tensor i64_1(const void *data, int64_t n) {
  blockem_tensor t = f32_1(data, n);
  t.dtype = BLOCKEM_DTYPE_I64;
  return t;
}

static UNUSED_OK blockem_tensor f64_1(const void *data, int64_t n) {
  return tensor1(data, BLOCKEM_DTYPE_F64, n);
}

/* Scratch memory at a multiple of 64 bytes; *block is what to free. */
static UNUSED_OK void *aligned64(size_t bytes, void **block) {
  *block = allocate(bytes + 64);
  return (void *)(((uintptr_t)*block + 63) & ~(uintptr_t)63);
}

/* ---- A small SAE and its parts --------------------------------------------------------------- */

enum { SMALL_D = 40, SMALL_F = 32, SMALL_K = 5 };

/* z = relu(W . h + b) of random rows. */
static UNUSED_OK blockem_sae *small_sae(void) {
  float *weight = random_floats(SMALL_F * SMALL_D, 1), *bias = random_floats(SMALL_F, 2);
  float *decoder = random_floats(SMALL_F * SMALL_D, 7);
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
  blockem_sae *sae = NULL;
  desc.encoder_weight = f32_2(weight, SMALL_F, SMALL_D);
  desc.encoder_bias = f32_1(bias, SMALL_F);
  desc.decoder_weight = f32_2(decoder, SMALL_F, SMALL_D);
  desc.d_in = SMALL_D;
  desc.d_sae = SMALL_F;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_RELU;
  desc.hook_name = "blocks.3.hook_resid_post";
  CHECK_OK(blockem_sae_from_tensors(&desc, &sae));
  free(weight);
  free(bias);
  free(decoder);
  return sae;
}

static UNUSED_OK blockem_latents *small_latents(void) {
  static const int64_t ids[SMALL_K] = {3, 31, 0, 17, 8};
  static const int8_t signs[SMALL_K] = {1, 1, -1, 1, -1};
  static const float weights[SMALL_K] = {1.0f, 0.5f, 2.0f, 1.0f, 1.5f};
  blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
  blockem_latents *latents = NULL;
  desc.ids = ids;
  desc.signs = signs;
  desc.weights = weights;
  desc.n = SMALL_K;
  CHECK_OK(blockem_latents_create(&desc, &latents));
  return latents;
}

static UNUSED_OK blockem_plan *small_plan(int32_t backend, int32_t num_threads) {
  blockem_sae *sae = small_sae();
  blockem_latents *latents = small_latents();
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_plan *plan = NULL;
  options.backend = backend;
  options.num_threads = num_threads;
  if (!CHECK_OK(blockem_plan_create(sae, latents, &options, &plan))) exit(1);
  blockem_latents_free(latents);
  blockem_sae_free(sae);
  return plan;
}

/* A plan of the first k latents, + and - in turn, of a random SAE. */
static UNUSED_OK blockem_plan *random_plan(int64_t d, int64_t k, int32_t num_threads) {
  float *weight = random_floats((size_t)(k * d), 61), *bias = random_floats((size_t)k, 62);
  int64_t *ids = (int64_t *)allocate((size_t)k * sizeof(int64_t)), i;
  int8_t *signs = (int8_t *)allocate((size_t)k);
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
  blockem_latents_desc set = BLOCKEM_LATENTS_DESC_INIT;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_sae *sae = NULL;
  blockem_latents *latents = NULL;
  blockem_plan *plan = NULL;
  for (i = 0; i < k; i++) {
    ids[i] = i;
    signs[i] = i % 2 == 0 ? 1 : -1;
  }
  desc.encoder_weight = f32_2(weight, k, d);
  desc.encoder_layout = BLOCKEM_ENCODER_LAYOUT_F_D;
  desc.encoder_bias = f32_1(bias, k);
  desc.d_in = d;
  desc.d_sae = k;
  set.ids = ids;
  set.signs = signs;
  set.n = (size_t)k;
  options.num_threads = num_threads;
  CHECK_OK(blockem_sae_from_tensors(&desc, &sae));
  CHECK_OK(blockem_latents_create(&set, &latents));
  if (!CHECK_OK(blockem_plan_create(sae, latents, &options, &plan))) exit(1);
  blockem_latents_free(latents);
  blockem_sae_free(sae);
  free(signs);
  free(ids);
  free(bias);
  free(weight);
  return plan;
}

/* ---- Files ----------------------------------------------------------------------------------- */

/* folder/name; free it. */
static UNUSED_OK char *join_path(const char *folder, const char *name) {
  size_t length = strlen(folder) + strlen(name) + 2;
  char *path = (char *)allocate(length);
  snprintf(path, length, "%s/%s", folder, name);
  return path;
}

static UNUSED_OK void write_file(const char *path, const void *data, size_t bytes) {
  FILE *file = fopen(path, "wb");
  if (file == NULL || fwrite(data, 1, bytes, file) != bytes || fclose(file) != 0) {
    perror(path);
    exit(2);
  }
}

static UNUSED_OK void write_text(const char *path, const char *text) {
  write_file(path, text, strlen(text));
}

/* One F32 tensor of a safetensors file; cols 0 makes it a vector. */
typedef struct {
  const char *name;
  size_t rows, cols;
  const float *data;
} file_tensor;

/* metadata: a JSON object of strings, or NULL. */
static UNUSED_OK void write_safetensors(const char *path, const char *metadata,
                                        const file_tensor *tensors, size_t count) {
  char header[4096], prefix[8];
  size_t i, used = 0, offset = 0;
  FILE *file = fopen(path, "wb");
  if (file == NULL) {
    perror(path);
    exit(2);
  }
  header[used++] = '{';
  if (metadata != NULL) {
    used += (size_t)snprintf(header + used, sizeof header - used, "\"__metadata__\":%s%s",
                             metadata, count > 0 ? "," : "");
  }
  for (i = 0; i < count; i++) {
    const file_tensor *t = &tensors[i];
    size_t bytes = 4 * t->rows * (t->cols > 0 ? t->cols : 1);
    char shape[64];
    if (t->cols > 0) {
      snprintf(shape, sizeof shape, "%zu,%zu", t->rows, t->cols);
    } else {
      snprintf(shape, sizeof shape, "%zu", t->rows);
    }
    used += (size_t)snprintf(header + used, sizeof header - used,
                             "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                             i > 0 ? "," : "", t->name, shape, offset, offset + bytes);
    offset += bytes;
  }
  header[used++] = '}';
  while (used % 8 != 0) header[used++] = ' ';
  for (i = 0; i < 8; i++) prefix[i] = (char)((uint64_t)used >> (8 * i));
  fwrite(prefix, 1, 8, file);
  fwrite(header, 1, used, file);
  for (i = 0; i < count; i++) {
    const file_tensor *t = &tensors[i];
    fwrite(t->data, 4, t->rows * (t->cols > 0 ? t->cols : 1), file);
  }
  if (fclose(file) != 0) {
    perror(path);
    exit(2);
  }
}

#endif
