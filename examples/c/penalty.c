/*
 * The BLOCK-EM penalty from C: hold latents of a sparse autoencoder where the base model had them.
 *
 *     penalty                    on a small SAE made here
 *     penalty SAE [K0.json]      on an SAE of yours (a SAELens folder or a safetensors file), with
 *                                the latents of K0.json or with its first four
 *
 * "Training" is gradient descent on the hidden states themselves: they start where a fine-tuned
 * model has drifted to, and the printed penalty falls to nothing. A real trainer adds grad_hidden
 * to the gradient that arrives at the layer's output. C99; build lines in examples/README.md.
 */

#include <blockem.h>

#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 96, STEPS = 8 };

static void fail(const char *what) {
  char message[1024];
  blockem_last_error(message, sizeof message);
  fprintf(stderr, "cannot %s: %s\n", what, message);
  exit(1);
}

/* Every fallible call goes through this. */
static void check(blockem_status status, const char *what) {
  if (status != BLOCKEM_STATUS_OK) fail(what);
}

static void *allocate(size_t bytes) {
  void *memory = malloc(bytes);
  if (memory == NULL) {
    fprintf(stderr, "out of memory\n");
    exit(1);
  }
  return memory;
}

static float *floats(int64_t count) { return allocate((size_t)count * sizeof(float)); }

/* Uniform in [-1, 1), the same on every machine. */
static float noise(void) {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return (float)(state >> 8) / 8388608.0f - 1.0f;
}

/* A row-major [rows, cols] array of floats in host memory. */
static blockem_tensor matrix(float *data, int64_t rows, int64_t cols) {
  blockem_tensor tensor = BLOCKEM_TENSOR_INIT;
  tensor.data = data;
  tensor.dtype = BLOCKEM_DTYPE_F32;
  tensor.ndim = 2;
  tensor.shape[0] = rows;
  tensor.shape[1] = cols;
  tensor.stride[0] = cols;
  tensor.stride[1] = 1;
  return tensor;
}

static blockem_tensor vector(void *data, int32_t dtype, int64_t count) {
  blockem_tensor tensor = BLOCKEM_TENSOR_INIT;
  tensor.data = data;
  tensor.dtype = dtype;
  tensor.ndim = 1;
  tensor.shape[0] = count;
  tensor.stride[0] = 1;
  return tensor;
}

/* An SAE of random rows: z = relu(W . h + b) with W [F, d]. */
static blockem_sae *make_sae(void) {
  const int64_t d_in = 64, d_sae = 256;
  float *weight = floats(d_sae * d_in), *bias = floats(d_sae);
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
  blockem_sae *sae = NULL;
  for (int64_t i = 0; i < d_sae * d_in; i++) weight[i] = 0.25f * noise();
  for (int64_t i = 0; i < d_sae; i++) bias[i] = 0.1f * noise();
  desc.encoder_weight = matrix(weight, d_sae, d_in);
  desc.encoder_bias = vector(bias, BLOCKEM_DTYPE_F32, d_sae);
  desc.d_in = d_in;
  desc.d_sae = d_sae;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_RELU;
  check(blockem_sae_from_tensors(&desc, &sae), "make the SAE");
  free(weight); /* the SAE keeps copies */
  free(bias);
  return sae;
}

static blockem_sae *open_sae(const char *path) {
  blockem_sae *sae = NULL;
  check(blockem_sae_open(path, NULL, &sae), "open the SAE");
  return sae;
}

/* Blocks a rise of latents 0 and 1 and a fall of 2 and 3, or what K0.json says. */
static blockem_latents *register_latents(const blockem_sae *sae, const char *path) {
  static const int64_t ids[] = {0, 1, 2, 3};
  static const int8_t signs[] = {1, 1, -1, -1};
  blockem_latents *latents = NULL;
  if (path != NULL) {
    check(blockem_latents_open(path, sae, &latents), "open the latent set");
  } else {
    blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
    desc.ids = ids;
    desc.signs = signs;
    desc.n = sizeof ids / sizeof *ids;
    check(blockem_latents_create(&desc, &latents), "register the latents");
  }
  return latents;
}

static void print_sae(const blockem_sae *sae) {
  size_t length = blockem_sae_describe(sae, NULL, 0);
  char *text = allocate(length + 1);
  if (length == 0) fail("describe the SAE");
  blockem_sae_describe(sae, text, length + 1);
  printf("SAE: %s\n", text);
  free(text);
}

/* Scratch memory must start at a multiple of 64 bytes; *block is what to free. */
static void *workspace(size_t bytes, void **block) {
  *block = allocate(bytes + 63);
  return (void *)(((uintptr_t)*block + 63) & ~(uintptr_t)63);
}

/* Gradient descent on hidden [T, d] until the penalty is small; 0 when it fell. */
static int descend(const blockem_plan *plan, float *hidden, float *reference, int64_t tokens,
                   int64_t d_in, int64_t num_latents) {
  float *grad = floats(tokens * d_in);
  double loss_sum = 0, token_count = 0, first = 0;
  void *scratch_block;
  blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;

  args.hidden = matrix(hidden, tokens, d_in);
  args.reference = matrix(reference, tokens, num_latents);
  args.loss_sum = vector(&loss_sum, BLOCKEM_DTYPE_F64, 1);
  args.token_count = vector(&token_count, BLOCKEM_DTYPE_F64, 1);
  args.grad_hidden = matrix(grad, tokens, d_in);
  check(blockem_plan_workspace_size(plan, tokens, &args.workspace_size), "size the workspace");
  args.workspace = workspace(args.workspace_size, &scratch_block);

  for (int step = 0; step <= STEPS; step++) {
    double squares = 0;
    check(blockem_penalty(plan, &args, NULL), "compute the penalty");
    printf("step %d  loss %.6f  (sum %.4f over %.0f tokens)\n", step, loss_sum / token_count,
           loss_sum, token_count);
    if (step == 0) first = loss_sum;
    if (step == STEPS) break;
    for (int64_t i = 0; i < tokens * d_in; i++) squares += (double)grad[i] * grad[i];
    if (squares == 0) break;
    /* Polyak's step, loss / |gradient|^2, needs no learning rate. */
    for (int64_t i = 0; i < tokens * d_in; i++) {
      hidden[i] -= (float)(loss_sum / squares * grad[i]);
    }
  }

  free(scratch_block);
  free(grad);
  if (first == 0) printf("nothing to block: no latent moved\n");
  return first > 0 && loss_sum < 0.1 * first ? 0 : 1;
}

int main(int argc, char **argv) {
  const char *sae_path = argc > 1 ? argv[1] : NULL, *latents_path = argc > 2 ? argv[2] : NULL;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_plan *plan = NULL;
  int failed;

  printf("libblockem %s\n", blockem_version_string());
  blockem_sae *sae = sae_path != NULL ? open_sae(sae_path) : make_sae();
  blockem_latents *latents = register_latents(sae, latents_path);
  print_sae(sae);

  /* Without the gate a latent that has fallen below its threshold still has a gradient. */
  options.activation = BLOCKEM_ACTIVATION_PREACTIVATION;
  check(blockem_plan_create(sae, latents, &options, &plan), "make the plan");
  blockem_latents_free(latents); /* the plan keeps its own copies */
  blockem_sae_free(sae);
  check(blockem_plan_info_get(plan, &info), "describe the plan");
  printf("plan: d %lld, K %lld, %s\n", (long long)info.d_in, (long long)info.num_latents,
         info.numerics);

  /* The base model's hidden states give the reference ... */
  float *hidden = floats(TOKENS * info.d_in), *reference = floats(TOKENS * info.num_latents);
  for (int64_t i = 0; i < TOKENS * info.d_in; i++) hidden[i] = noise();
  encode.hidden = matrix(hidden, TOKENS, info.d_in);
  encode.latents = matrix(reference, TOKENS, info.num_latents);
  check(blockem_encode(plan, &encode, NULL), "encode the reference");

  /* ... and fine-tuning has moved them. */
  for (int64_t i = 0; i < TOKENS * info.d_in; i++) hidden[i] += 0.5f * noise();
  failed = descend(plan, hidden, reference, TOKENS, info.d_in, info.num_latents);

  free(reference);
  free(hidden);
  blockem_plan_free(plan);
  return failed;
}
