/*
 * The CUDA backend on a driver that keeps records instead of a device (tests/stub_cuda): which
 * statuses it answers, which driver calls a run call makes, and in which context. The second
 * argument names the case; each runs in a process of its own, since a driver is opened once.
 */

#define _GNU_SOURCE
#include "support.h"

#include "stub_functions.h"

#include <sys/wait.h>
#include <unistd.h>

enum { T = 100, D = SMALL_D, K = SMALL_K };

/* ---- Plans and calls ------------------------------------------------------------------------- */

/* A plan of a SAE, which it frees. */
static blockem_status create_of(blockem_sae *sae, int32_t device_type, int32_t device,
                                int32_t backend, blockem_plan **plan) {
  blockem_latents *latents = small_latents();
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_status status;
  char message[512];
  options.device_type = device_type;
  options.device_index = device;
  options.backend = backend;
  *plan = NULL;
  status = blockem_plan_create(sae, latents, &options, plan);
  blockem_last_error(message, sizeof message);
  if (status != BLOCKEM_STATUS_OK) fprintf(stderr, "  %s\n", message);
  CHECK((status == BLOCKEM_STATUS_OK) == (*plan != NULL));
  blockem_latents_free(latents);
  blockem_sae_free(sae);
  return status;
}

static blockem_status create(int32_t device_type, int32_t device, int32_t backend,
                             blockem_plan **plan) {
  return create_of(small_sae(), device_type, device, backend, plan);
}

static blockem_status create_on(int32_t device, blockem_plan **plan) {
  return create(BLOCKEM_DEVICE_CUDA, device, BLOCKEM_BACKEND_AUTO, plan);
}

static blockem_plan *plan_on(int32_t device) {
  blockem_plan *plan = NULL;
  if (!CHECK_OK(create_on(device, &plan))) exit(1);
  return plan;
}

/* Latents that are chosen among all 32, of tokens that are normalised. */
static blockem_sae *topk_sae(void) {
  float *weight = random_floats(SMALL_F * SMALL_D, 1), *bias = random_floats(SMALL_F, 2);
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
  blockem_sae *sae = NULL;
  desc.encoder_weight = f32_2(weight, SMALL_F, SMALL_D);
  desc.encoder_bias = f32_1(bias, SMALL_F);
  desc.d_in = SMALL_D;
  desc.d_sae = SMALL_F;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_TOPK;
  desc.k = 4;
  desc.token_norm = BLOCKEM_TOKEN_NORM_LAYER;
  CHECK_OK(blockem_sae_from_tensors(&desc, &sae));
  free(weight);
  free(bias);
  return sae;
}

static blockem_status create_topk_on(int32_t device, blockem_plan **plan) {
  return create_of(topk_sae(), BLOCKEM_DEVICE_CUDA, device, BLOCKEM_BACKEND_AUTO, plan);
}

static blockem_tensor on_device(blockem_tensor t, int32_t device) {
  t.device_type = BLOCKEM_DEVICE_CUDA;
  t.device_index = device;
  return t;
}

/* Arguments of every call, in memory of a device. */
typedef struct {
  int device;
  blockem_encode_args encode;
  blockem_penalty_args penalty;
  void *memory[16];
  int count;
} arguments;

static blockem_tensor matrix(arguments *a, int64_t rows, int64_t cols) {
  void *m = a->memory[a->count++] = stub.memory(a->device, (size_t)(rows * cols) * 4);
  return on_device(f32_2(m, rows, cols), a->device);
}

static blockem_tensor vector(arguments *a, int64_t n) {
  void *m = a->memory[a->count++] = stub.memory(a->device, (size_t)n * 4);
  return on_device(f32_1(m, n), a->device);
}

static arguments new_arguments(const blockem_plan *plan, int device) {
  arguments a = {0, BLOCKEM_ENCODE_ARGS_INIT, BLOCKEM_PENALTY_ARGS_INIT, {NULL}, 0};
  a.device = device;
  a.encode.hidden = a.penalty.hidden = matrix(&a, T, D);
  a.encode.latents = matrix(&a, T, K);
  a.penalty.reference = matrix(&a, T, K);
  a.penalty.coef = matrix(&a, T, K);
  a.penalty.grad_hidden = matrix(&a, T, D);
  a.penalty.mask = vector(&a, T);
  a.penalty.loss_sum = vector(&a, 1);
  a.penalty.token_count = vector(&a, 1);
  a.penalty.latent_loss = vector(&a, K);
  a.penalty.scale_tensor = vector(&a, 1);
  if (plan != NULL) {
    CHECK_OK(blockem_plan_workspace_size(plan, T, &a.penalty.workspace_size));
    a.penalty.workspace = a.memory[a.count++] = stub.memory(device, a.penalty.workspace_size);
    a.encode.workspace = a.penalty.workspace;
    a.encode.workspace_size = a.penalty.workspace_size;
  }
  return a;
}

static void free_arguments(arguments *a) {
  while (a->count > 0) stub.release(a->memory[--a->count]);
}

/* What a run call may never do. */
static void check_only_launches(void) {
  static const char *const forbidden[] = {
      "cuMemAlloc",       "cuMemFree",         "cuModuleLoadData",         "cuModuleGetFunction",
      "cuModuleUnload",   "cuFuncLoad",        "cuFuncSetAttribute",       "cuStreamCreate",
      "cuStreamDestroy",  "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync",        "cuStreamSynchronize",
      "cuCtxSynchronize", "cuCtxSetCurrent",   "cuDevicePrimaryCtxRetain", "cuInit"};
  size_t i;
  for (i = 0; i < sizeof forbidden / sizeof *forbidden; i++) {
    if (stub.calls(forbidden[i]) != 0) {
      fprintf(stderr, "a run call called %s\n", forbidden[i]);
      check_failures++;
    }
  }
  CHECK(stub.calls("cuCtxPushCurrent") == stub.calls("cuCtxPopCurrent"));
}

/* Every launch since the reset went to this stream, in this context. */
static int launches_on(void *stream, void *context) {
  const stub_launch *launch;
  int i;
  for (i = 0; (launch = stub.launch_at(i)) != NULL; i++) {
    CHECK(launch->stream == stream);
    CHECK(launch->context == context);
  }
  return i;
}

typedef blockem_status penalty_call(const blockem_plan *, const blockem_penalty_args *, void *);

/* The four run calls on one stream. A plan that compares and normalises launches more. */
static void run_all(const blockem_plan *plan, arguments *a, void *stream, void *context) {
  blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
  static penalty_call *const penalties[] = {blockem_penalty_forward, blockem_penalty_backward,
                                            blockem_penalty};
  static const char *const names[] = {"forward", "backward", "penalty"};
  void *before = stub.current();
  int more, launches;
  size_t i;
  CHECK_OK(blockem_plan_info_get(plan, &info));
  /* The norm, the rivals, the largest of them. */
  more = info.encode_needs_workspace ? 3 : 0;
  stub.reset();
  CHECK_OK(blockem_encode(plan, &a->encode, stream));
  launches = launches_on(stream, context);
  CHECK(launches == 1 + more);
  check_only_launches();
  printf("encode: %d driver calls, %d of them launches\n", stub.calls("*"), launches);
  CHECK(stub.calls("*") <= 6 + (more ? more + 1 : 0));
  for (i = 0; i < 3; i++) {
    stub.reset();
    CHECK_OK(penalties[i](plan, &a->penalty, stream));
    launches = launches_on(stream, context);
    CHECK(launches >= 1);
    check_only_launches();
    printf("%s: %d driver calls, %d of them launches, %d for pointers\n", names[i],
           stub.calls("*"), launches, stub.calls("cuPointerGetAttributes"));
    CHECK(stub.calls("*") <= 17 + (more ? more + 1 : 0));
  }
  CHECK(stub.current() == before);
}

/* Statistics with a base model on a stream, and what they leave behind. */
static void run_stats(blockem_sae *sae, int more, void *stream, void *context) {
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_stats_info info = BLOCKEM_STATS_INFO_INIT;
  blockem_stats_args args = BLOCKEM_STATS_ARGS_INIT;
  blockem_stats *stats = NULL;
  void *before = stub.current(), *memory[6];
  int launches;
  size_t i;
  options.device_type = BLOCKEM_DEVICE_CUDA;
  if (!CHECK_OK(blockem_stats_create(sae, &options, &stats))) exit(1);
  blockem_sae_free(sae);
  CHECK(stub.current() == before);
  CHECK_OK(blockem_stats_info_get(stats, &info));
  CHECK(info.backend == BLOCKEM_BACKEND_CUDA && info.num_threads == 0);
  CHECK(strcmp(info.numerics, "cuda-2-sm90") == 0); /* of the device of the stub */
  CHECK_OK(blockem_stats_workspace_size(stats, T, 1, &args.workspace_size));
  memory[0] = stub.memory(0, T * D * 4);
  memory[1] = stub.memory(0, T * D * 4);
  memory[2] = stub.memory(0, T * 4);
  memory[3] = stub.memory(0, BLOCKEM_STATS_ROWS_WITH_BASE * SMALL_F * 8);
  memory[4] = stub.memory(0, 8);
  memory[5] = stub.memory(0, args.workspace_size);
  args.hidden = on_device(f32_2(memory[0], T, D), 0);
  args.base_hidden = on_device(f32_2(memory[1], T, D), 0);
  args.mask = on_device(f32_1(memory[2], T), 0);
  args.state = on_device(f64_2(memory[3], BLOCKEM_STATS_ROWS_WITH_BASE, SMALL_F), 0);
  args.token_count = on_device(f64_1(memory[4], 1), 0);
  args.workspace = memory[5];
  stub.reset();
  CHECK_OK(blockem_stats_update(stats, &args, stream));
  launches = launches_on(stream, context);
  /* z of both models, and the sums. */
  CHECK(launches == 3 + more);
  CHECK(strcmp(stub.launch_at(launches - 1)->kernel, "blockem_stats") == 0);
  check_only_launches();
  printf("statistics: %d driver calls, %d of them launches\n", stub.calls("*"), launches);
  stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
  args.accumulate = 1;
  CHECK_OK(blockem_stats_update(stats, &args, stream));
  stub.capture(stream, STUB_CAPTURE_OFF);
  args.workspace_size--;
  CHECK_STATUS(blockem_stats_update(stats, &args, stream), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  args.workspace_size++;
  stub.release(memory[4]);
  CHECK_STATUS(blockem_stats_update(stats, &args, stream), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("token_count"));
  memory[4] = stub.memory(0, 8);
  CHECK(stub.current() == before);
  for (i = 0; i < 6; i++) stub.release(memory[i]);
  blockem_stats_free(stats);
}

/* Steering and norms on a stream, and what they leave behind. */
static void run_steering(void *stream, void *context) {
  enum { B = 4, S = T / B };
  static const int64_t ids[] = {3, 31};
  blockem_sae *sae = small_sae();
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_steering_info info = BLOCKEM_STEERING_INFO_INIT;
  blockem_steer_args args = BLOCKEM_STEER_ARGS_INIT;
  blockem_steering *steering = NULL;
  void *before = stub.current(), *memory[5];
  size_t i;
  options.device_type = BLOCKEM_DEVICE_CUDA;
  if (!CHECK_OK(blockem_steering_create(sae, ids, 2, &options, &steering))) exit(1);
  blockem_sae_free(sae);
  CHECK(stub.current() == before);
  CHECK_OK(blockem_steering_info_get(steering, &info));
  CHECK(info.backend == BLOCKEM_BACKEND_CUDA && info.num_threads == 0);
  memory[0] = stub.memory(0, T * D * 4);
  memory[1] = stub.memory(0, B * 8);
  memory[2] = stub.memory(0, B * 4);
  memory[3] = stub.memory(0, T * 4);
  memory[4] = stub.memory(0, 4);
  args.hidden = on_device(f32_3(memory[0], B, S, D), 0);
  args.row = on_device(i64_1(memory[1], B), 0);
  args.strength = on_device(f32_1(memory[2], B), 0);
  args.mask = on_device(f32_2(memory[3], B, S), 0);
  args.scale_tensor = on_device(f32_1(memory[4], 1), 0);
  stub.reset();
  CHECK_OK(blockem_steer(steering, &args, stream));
  CHECK(launches_on(stream, context) == 1);
  CHECK(strcmp(stub.launch_at(0)->kernel, "blockem_steer") == 0);
  check_only_launches();
  printf("steering: %d driver calls\n", stub.calls("*"));
  stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
  CHECK_OK(blockem_steer(steering, &args, stream));
  stub.capture(stream, STUB_CAPTURE_OFF);
  args.hidden.shape[1] = args.mask.shape[1] = 0;
  stub.reset();
  CHECK_OK(blockem_steer(steering, &args, stream));
  CHECK(stub.launch_at(0) == NULL);
  args.hidden.shape[1] = args.mask.shape[1] = S;
  stub.release(memory[2]);
  CHECK_STATUS(blockem_steer(steering, &args, stream), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("strength"));
  memory[2] = stub.memory(0, B * 4);
  CHECK(stub.current() == before);
  for (i = 0; i < 5; i++) stub.release(memory[i]);
  blockem_steering_free(steering);
}

/* Like the raw calls it keeps the context's kernels from the first call on. */
static void run_token_norms(void *stream, void *context) {
  blockem_token_norms_args args = BLOCKEM_TOKEN_NORMS_ARGS_INIT;
  void *hidden = stub.memory(0, T * D * 4), *norms = stub.memory(0, T * 4);
  args.hidden = on_device(f32_2(hidden, T, D), 0);
  args.norms = on_device(f32_1(norms, T), 0);
  stub.reset();
  stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
  CHECK_OK(blockem_token_norms(&args, stream));
  stub.capture(stream, STUB_CAPTURE_OFF);
  CHECK(launches_on(stream, context) == 1);
  CHECK(strcmp(stub.launch_at(0)->kernel, "blockem_token_norms") == 0);
  check_only_launches();
  stub.release(norms);
  CHECK_STATUS(blockem_token_norms(&args, stream), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("norms"));
  stub.release(hidden);
}

/* ---- Cases ----------------------------------------------------------------------------------- */

static int32_t device_count(void) {
  int32_t count = -1;
  CHECK_OK(blockem_device_count(BLOCKEM_DEVICE_CUDA, &count));
  return count;
}

/* Plan creation, run calls on streams and in contexts of all kinds, and what is left behind. */
static void runs(void) {
  blockem_plan *plan, *second, *inside;
  blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
  arguments a, b;
  void *primary, *other, *stream;
  CHECK(device_count() == 2);
  CHECK(stub.primary_count(0) == 0);

  /* Without a current context: the primary one, kept while the plan lives. */
  plan = plan_on(0);
  CHECK(stub.current() == NULL);
  CHECK(stub.primary_count(0) == 1);
  primary = stub.context(0, 1);
  CHECK_OK(blockem_plan_info_get(plan, &info));
  CHECK(info.device_type == BLOCKEM_DEVICE_CUDA && info.device_index == 0);
  CHECK(info.backend == BLOCKEM_BACKEND_CUDA && info.num_threads == 0);
  CHECK(strcmp(info.numerics, "cuda-2-sm90") == 0); /* of the device of the stub */
  a = new_arguments(plan, 0);
  run_all(plan, &a, NULL, primary);
  stream = stub.stream(primary);
  run_all(plan, &a, stream, primary);
  /* The host's current context, whatever it is, stays. */
  other = stub.context(1, 0);
  stub.set_current(other);
  run_all(plan, &a, stream, primary);
  CHECK(stub.current() == other);

  /* A second plan shares the loaded kernels. */
  stub.reset();
  second = plan_on(0);
  CHECK(stub.calls("cuModuleLoadData") == 0);
  CHECK(stub.current() == other);
  blockem_plan_free(second);

  /* A current context of the device, not its primary one: the plan belongs to it. */
  other = stub.context(0, 0);
  stub.set_current(other);
  inside = plan_on(0);
  stub.set_current(NULL);
  run_all(inside, &a, NULL, other);
  run_all(inside, &a, stub.stream(other), other);
  CHECK(stub.primary_count(0) == 1);
  CHECK_STATUS(blockem_encode(inside, &a.encode, stream), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("context"));
  CHECK_STATUS(blockem_encode(plan, &a.encode, stub.stream(other)), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(stub.current() == NULL);

  /* A SAE whose latents compete, and that normalises every token. */
  CHECK_OK(create_topk_on(0, &second));
  b = new_arguments(second, 0);
  run_all(second, &b, stream, primary);
  stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
  run_all(second, &b, stream, primary);
  stub.capture(stream, STUB_CAPTURE_OFF);
  b.encode.workspace_size = 0;
  CHECK_STATUS(blockem_encode(second, &b.encode, stream), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  b.encode.workspace_size = b.penalty.workspace_size;
  b.encode.workspace = b.penalty.workspace;
  b.penalty.hidden.data = NULL;
  CHECK_STATUS(blockem_penalty_backward(second, &b.penalty, stream), BLOCKEM_STATUS_NULL_POINTER);
  free_arguments(&b);
  blockem_plan_free(second);

  run_stats(small_sae(), 0, stream, primary);
  /* The norm, the rivals, the largest of them, of either model. */
  run_stats(topk_sae(), 6, stream, primary);
  run_steering(stream, primary);

  /* No tokens: nothing to launch but the sums. */
  a.encode.hidden.shape[0] = a.encode.latents.shape[0] = 0;
  stub.reset();
  CHECK_OK(blockem_encode(plan, &a.encode, stream));
  CHECK(stub.launch_at(0) == NULL);

  free_arguments(&a);
  blockem_plan_free(inside);
  blockem_plan_free(plan);
  CHECK(stub.primary_count(0) == 0);
  CHECK(stub.alive() == 0);
  CHECK(stub.current() == NULL);
}

/* Pointers that are not what their tensors say. */
static void pointers(void) {
  blockem_plan *plan = plan_on(0);
  arguments a = new_arguments(plan, 0), b = new_arguments(NULL, 1);
  float host[K];
  void *pinned = stub.memory(-1, K * 4), *managed = stub.memory(-2, K * 4), *gone;
  blockem_tensor good = a.penalty.latent_loss;

  a.penalty.latent_loss.data = host;
  CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("latent_loss") && message_has("host memory"));
  a.penalty.latent_loss.data = pinned;
  CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("latent_loss") && message_has("pinned"));
  a.penalty.latent_loss.data = managed;
  CHECK_OK(blockem_penalty(plan, &a.penalty, NULL));
  /* Memory of another device behind a tensor that says this one, and a tensor that says so. */
  a.penalty.latent_loss.data = b.penalty.latent_loss.data;
  CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("cuda:1") && message_has("cuda:0"));
  a.penalty.latent_loss = b.penalty.latent_loss;
  CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  a.penalty.latent_loss = good;
  a.penalty.latent_loss.device_type = BLOCKEM_DEVICE_CPU;
  CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  a.penalty.latent_loss = good;

  /* Memory of another context of the same device. */
  {
    unsigned long long address = 0;
    void *other = stub.context(0, 0), *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    int (*alloc)(unsigned long long *, size_t) = NULL;
    int (*free_memory)(unsigned long long) = NULL;
    *(void **)&alloc = dlsym(driver, "cuMemAlloc_v2");
    *(void **)&free_memory = dlsym(driver, "cuMemFree_v2");
    stub.set_current(other);
    CHECK(alloc != NULL && alloc(&address, K * 4) == 0);
    stub.set_current(NULL);
    a.penalty.latent_loss.data = (void *)(size_t)address;
    CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
    CHECK(message_has("latent_loss") && message_has("another CUDA context"));
    a.penalty.latent_loss = good;
    stub.set_current(other);
    CHECK(free_memory != NULL && free_memory(address) == 0);
    stub.set_current(NULL);
  }

  gone = a.encode.latents.data;
  a.memory[1] = stub.memory(0, 4);
  stub.release(gone);
  CHECK_STATUS(blockem_encode(plan, &a.encode, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  CHECK(message_has("latents") && message_has("freed"));

  /* The workspace: too small, not aligned, on the host. */
  {
    blockem_penalty_args args = a.penalty;
    void *block, *aligned = aligned64(args.workspace_size, &block);
    args.workspace_size--;
    CHECK_STATUS(blockem_penalty(plan, &args, NULL), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
    args = a.penalty;
    args.workspace = (char *)args.workspace + 32;
    CHECK_STATUS(blockem_penalty(plan, &args, NULL), BLOCKEM_STATUS_LAYOUT);
    args.workspace = aligned;
    CHECK_STATUS(blockem_penalty(plan, &args, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
    CHECK(message_has("workspace"));
    args = a.penalty;
    args.grad_hidden.data = args.hidden.data;
    CHECK_STATUS(blockem_penalty(plan, &args, NULL), BLOCKEM_STATUS_OVERLAP);
    free(block);
  }
  {
    blockem_plan *none = NULL;
    CHECK_STATUS(create_on(7, &none), BLOCKEM_STATUS_INVALID_ARGUMENT);
    CHECK(message_has("cuda:7") && message_has("2 devices"));
    CHECK_STATUS(create(BLOCKEM_DEVICE_CPU, 0, BLOCKEM_BACKEND_CUDA, &none),
                 BLOCKEM_STATUS_INVALID_ARGUMENT);
    CHECK_STATUS(create(BLOCKEM_DEVICE_CUDA, 0, BLOCKEM_BACKEND_REFERENCE, &none),
                 BLOCKEM_STATUS_INVALID_ARGUMENT);
  }
  stub.release(pinned);
  stub.release(managed);
  free_arguments(&a);
  free_arguments(&b);
  blockem_plan_free(plan);
  CHECK(stub.alive() == 0);
}

/* How many of the launches may begin while the one before ends. */
static int overlapping(void) {
  const stub_launch *launch;
  int i, n = 0;
  for (i = 0; (launch = stub.launch_at(i)) != NULL; i++) n += launch->overlaps;
  return n;
}

/* Calls without a plan. */
static void raw(void) {
  blockem_raw_penalty_args args = BLOCKEM_RAW_PENALTY_ARGS_INIT;
  arguments a = new_arguments(NULL, 0);
  void *context = stub.context(0, 0), *stream = stub.stream(context), *workspace;
  args.hidden = a.penalty.hidden;
  args.reference = a.penalty.reference;
  args.mask = a.penalty.mask;
  args.coef = a.penalty.coef;
  args.loss_sum = a.penalty.loss_sum;
  args.token_count = a.penalty.token_count;
  args.grad_hidden = a.penalty.grad_hidden;
  args.weight = matrix(&a, K, D);
  args.bias = vector(&a, K);
  args.sign_weight = vector(&a, K);
  CHECK_OK(blockem_raw_penalty_workspace_size(T, K, D, BLOCKEM_BACKEND_CUDA, 0,
                                              &args.workspace_size));
  CHECK(args.workspace_size > 0);
  args.workspace = workspace = stub.memory(0, args.workspace_size);

  /* The first call in a context loads, which a capture forbids. */
  stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
  CHECK_STATUS(blockem_raw_penalty_forward(&args, stream), BLOCKEM_STATUS_CAPTURE_UNSAFE);
  stub.capture(stream, STUB_CAPTURE_OFF);
  CHECK_OK(blockem_raw_penalty_forward(&args, stream));
  stub.capture(stream, STUB_CAPTURE_NON_BLOCKING);
  stub.reset();
  CHECK_OK(blockem_raw_penalty_forward(&args, stream));
  CHECK(launches_on(stream, context) >= 3);
  CHECK(strcmp(stub.launch_at(0)->kernel, "blockem_pack") == 0);
  check_only_launches();
  /* Others may have written the rows just before: nothing begins early. */
  CHECK(overlapping() == 0);
  printf("raw forward: %d driver calls\n", stub.calls("*"));
  CHECK_OK(blockem_raw_penalty_backward(&args, stream));
  CHECK(stub.current() == NULL);
  stub.capture(stream, STUB_CAPTURE_OFF);
  run_token_norms(stream, context);

  /* In the primary context, which stays from the first call on. */
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  CHECK(stub.primary_count(0) == 1);
  stub.reset();
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  CHECK(launches_on(NULL, stub.context(0, 1)) >= 3);
  check_only_launches();
  stub.set_current(stub.context(0, 1));
  stub.reset();
  CHECK_OK(blockem_raw_penalty_forward(&args, stub.stream(stub.context(0, 1))));
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  check_only_launches();
  stub.set_current(NULL);

  /* No memory of our own on a device. */
  args.workspace = NULL;
  args.workspace_size = 0;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, stream), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  CHECK_STATUS(blockem_raw_penalty_backward(&args, stream), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  args.workspace = workspace;
  CHECK_OK(blockem_raw_penalty_workspace_size(T, K, D, BLOCKEM_BACKEND_CUDA, 0,
                                              &args.workspace_size));
  {
    float host[K];
    blockem_tensor bias = args.bias;
    args.bias.data = host;
    CHECK_STATUS(blockem_raw_penalty_forward(&args, stream), BLOCKEM_STATUS_DEVICE_MISMATCH);
    CHECK(message_has("bias"));
    args.bias = bias;
  }
  CHECK_STATUS(blockem_raw_penalty_forward(&args, stub.stream(stub.context(1, 0))),
               BLOCKEM_STATUS_DEVICE_MISMATCH);
  args.backend = BLOCKEM_BACKEND_CPU;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, stream), BLOCKEM_STATUS_INVALID_ARGUMENT);
  stub.release(workspace);
  free_arguments(&a);
}

/* Captures: run calls may be captured, plans may not be made meanwhile but may be freed. */
static void capture(void) {
  blockem_plan *plan = plan_on(0), *none = NULL, *second = plan_on(0);
  arguments a = new_arguments(plan, 0);
  void *primary = stub.context(0, 1), *stream = stub.stream(primary);
  int kind;
  for (kind = STUB_CAPTURE_BLOCKING; kind <= STUB_CAPTURE_NON_BLOCKING; kind++) {
    stub.capture(stream, kind);
    run_all(plan, &a, stream, primary);
    CHECK_STATUS(create_on(0, &none), BLOCKEM_STATUS_CAPTURE_UNSAFE);
    CHECK(message_has("before the capture"));
    stub.capture(stream, STUB_CAPTURE_OFF);
  }
  /* The legacy stream would wait for a blocking stream that is captured. */
  stub.capture(stream, STUB_CAPTURE_BLOCKING);
  CHECK_STATUS(blockem_encode(plan, &a.encode, NULL), BLOCKEM_STATUS_CAPTURE_UNSAFE);
  blockem_plan_free(second);
  /* The last one unloads the kernels. */
  blockem_plan_free(plan);
  stub.capture(stream, STUB_CAPTURE_OFF);
  free_arguments(&a);
  CHECK(stub.alive() == 0);
}

/* A child of fork. */
static void forked(void) {
  blockem_plan *plan = plan_on(0);
  arguments a = new_arguments(plan, 0);
  int status = 0;
  pid_t child;
  fflush(stdout);
  child = fork();
  if (child == 0) {
    blockem_plan *none = NULL;
    int32_t count;
    alarm(60);
    CHECK_STATUS(blockem_encode(plan, &a.encode, NULL), BLOCKEM_STATUS_FORKED);
    CHECK_STATUS(blockem_penalty(plan, &a.penalty, NULL), BLOCKEM_STATUS_FORKED);
    CHECK_STATUS(create_on(0, &none), BLOCKEM_STATUS_FORKED);
    CHECK_STATUS(blockem_device_count(BLOCKEM_DEVICE_CUDA, &count), BLOCKEM_STATUS_FORKED);
    stub.reset();
    blockem_plan_free(plan);
    CHECK(stub.calls("*") == 0);
    fflush(stdout);
    _exit(check_failures > 0);
  }
  CHECK(child > 0 && waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK_OK(blockem_encode(plan, &a.encode, NULL));
  free_arguments(&a);
  blockem_plan_free(plan);
  CHECK(stub.alive() == 0);
}

/* The driver shuts down before the last plan goes, as at exit. */
static void at_exit(void) {
  blockem_plan *plan = plan_on(0);
  arguments a = new_arguments(plan, 0);
  stub.shut_down();
  CHECK_STATUS(blockem_encode(plan, &a.encode, NULL), BLOCKEM_STATUS_CUDA_DRIVER);
  CHECK(message_has("CUDA_ERROR_DEINITIALIZED") && message_has("driver shutting down"));
  blockem_plan_free(plan);
  free_arguments(&a);
}

/* A driver call that fails in the middle leaves nothing behind, and the context as it was. */
static void failures(void) {
  static const struct {
    const char *plan;
    blockem_status status;
  } creation[] = {
      {"cuMemAlloc=2", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuModuleLoadData=2", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuModuleLoadData=209", BLOCKEM_STATUS_NO_KERNEL_IMAGE},
      {"cuModuleLoadData=222", BLOCKEM_STATUS_DRIVER_TOO_OLD},
      {"cuModuleLoadData=200", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuModuleGetFunction=500", BLOCKEM_STATUS_INTERNAL},
      {"cuFuncSetAttribute=1", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuFuncLoad=2", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuDeviceGetCount=999", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuDevicePrimaryCtxRetain=2", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuCtxGetId=201", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuCtxPushCurrent=201", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuStreamCreate=2", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuMemcpyHtoDAsync=700", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuLaunchKernelEx=1", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuStreamSynchronize=700", BLOCKEM_STATUS_CUDA_DRIVER},
  };
  static const struct {
    const char *plan;
    blockem_status status;
  } run[] = {
      {"cuPointerGetAttributes=1", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuStreamGetCtx=400", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuCtxPushCurrent=201", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuLaunchKernelEx=700", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuLaunchKernelEx=901", BLOCKEM_STATUS_CAPTURE_UNSAFE},
  };
  /* A plan's own rows come first, in two allocations and a launch; then those of its rivals. */
  static const struct {
    const char *plan;
    blockem_status status;
  } rivals[] = {
      {"cuMemAlloc=2@3", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuMemAlloc=2@4", BLOCKEM_STATUS_OUT_OF_MEMORY},
      {"cuMemcpyHtoDAsync=700@5", BLOCKEM_STATUS_CUDA_DRIVER},
      {"cuLaunchKernelEx=1@2", BLOCKEM_STATUS_CUDA_DRIVER},
  };
  void *current = stub.context(1, 0);
  blockem_plan *plan = NULL;
  arguments a;
  size_t i;
  stub.set_current(current);
  for (i = 0; i < sizeof creation / sizeof *creation; i++) {
    stub.fail(creation[i].plan);
    if (!CHECK_STATUS(create_on(0, &plan), creation[i].status)) {
      fprintf(stderr, "  with %s\n", creation[i].plan);
    }
    if (creation[i].status == BLOCKEM_STATUS_DRIVER_TOO_OLD) {
      CHECK(message_has("the driver serves CUDA") && message_has("the kernels are of"));
    }
    stub.fail("");
    CHECK(stub.current() == current);
    CHECK(stub.alive() == 0);
    CHECK(stub.primary_count(0) == 0);
  }
  /* Rivals that do not fit: told with the remedy, and nothing is left behind. */
  for (i = 0; i < sizeof rivals / sizeof *rivals; i++) {
    stub.reset();
    stub.fail(rivals[i].plan);
    CHECK_STATUS(create_topk_on(0, &plan), rivals[i].status);
    CHECK(i > 0 || message_has("dense_relu"));
    stub.fail("");
    CHECK(stub.current() == current);
    CHECK(stub.alive() == 0);
    CHECK(stub.primary_count(0) == 0);
  }
  plan = plan_on(0);
  a = new_arguments(plan, 0);
  for (i = 0; i < sizeof run / sizeof *run; i++) {
    stub.fail(run[i].plan);
    CHECK_STATUS(blockem_encode(plan, &a.encode, stub.stream(stub.context(0, 1))), run[i].status);
    stub.fail("");
    CHECK(stub.current() == current);
  }
  stub.fail("cuLaunchKernelEx=700");
  CHECK_STATUS(blockem_encode(plan, &a.encode, NULL), BLOCKEM_STATUS_CUDA_DRIVER);
  CHECK(message_has("CUDA_ERROR_ILLEGAL_ADDRESS (700)"));
  CHECK(message_has("an illegal memory access was encountered"));
  stub.fail("cuLaunchKernelEx=12345");
  CHECK_STATUS(blockem_encode(plan, &a.encode, NULL), BLOCKEM_STATUS_CUDA_DRIVER);
  CHECK(message_has("12345"));
  stub.fail("");
  free_arguments(&a);
  blockem_plan_free(plan);
  CHECK(stub.alive() == 0);
}

/* Which kernels a device gets: those of its own architecture, in clusters of so many blocks where there
 * are such, and from 9.0 on so that they overlap. */
static void kernels(void) {
  blockem_plan *plan = plan_on(0);
  arguments a = new_arguments(plan, 0);
  blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
  const stub_launch *first;
  CHECK_OK(blockem_plan_info_get(plan, &info));
  CHECK(strcmp(info.numerics, getenv("NUMERICS")) == 0);
  stub.reset();
  CHECK_OK(blockem_penalty(plan, &a.penalty, NULL));
  first = stub.launch_at(0);
  CHECK(first != NULL && strcmp(first->kernel, getenv("KERNEL")) == 0);
  CHECK(first != NULL && first->cluster == (unsigned)atoi(getenv("CLUSTER")));
  CHECK((overlapping() > 0) == atoi(getenv("OVERLAPS")));
  check_only_launches();
  free_arguments(&a);
  blockem_plan_free(plan);
  CHECK(stub.alive() == 0);
}

/* ---- Where no plan can be made --------------------------------------------------------------- */

static void refused(blockem_status expected, const char *word, const char *second) {
  blockem_plan *plan = NULL;
  CHECK_STATUS(create_on(0, &plan), expected);
  CHECK(message_has(word) && message_has(second));
}

int main(int argc, char **argv) {
  const char *name = argc == 3 ? argv[2] : "";
  if (strcmp(name, "no-driver") != 0) find_stub();
  if (strcmp(name, "runs") == 0) {
    runs();
  } else if (strcmp(name, "kernels") == 0) {
    kernels();
  } else if (strcmp(name, "pointers") == 0) {
    pointers();
  } else if (strcmp(name, "raw") == 0) {
    raw();
  } else if (strcmp(name, "capture") == 0) {
    capture();
  } else if (strcmp(name, "forked") == 0) {
    forked();
  } else if (strcmp(name, "at-exit") == 0) {
    at_exit();
  } else if (strcmp(name, "failures") == 0) {
    failures();
  } else if (strcmp(name, "no-driver") == 0) {
    blockem_plan *plan;
    CHECK(device_count() == 0);
    refused(BLOCKEM_STATUS_CUDA_UNAVAILABLE, "no CUDA driver", "libcuda");
    CHECK_STATUS(create(BLOCKEM_DEVICE_CPU, 0, BLOCKEM_BACKEND_CUDA, &plan),
                 BLOCKEM_STATUS_CUDA_UNAVAILABLE);
  } else if (strcmp(name, "no-device") == 0) {
    CHECK(device_count() == 0);
    refused(BLOCKEM_STATUS_CUDA_UNAVAILABLE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device");
  } else if (strcmp(name, "forked-before") == 0) {
    refused(BLOCKEM_STATUS_FORKED, "forked", "spawn");
  } else if (strcmp(name, "old-driver") == 0) {
    CHECK(device_count() == 0);
    refused(BLOCKEM_STATUS_DRIVER_TOO_OLD, getenv("FOUND"), getenv("NEEDED"));
  } else if (strcmp(name, "old-device") == 0) {
    refused(BLOCKEM_STATUS_NO_KERNEL_IMAGE, "7.5", "8.0");
  } else {
    fprintf(stderr, "no such case: %s\n", name);
    return 2;
  }
  return finish_checks(name);
}
