/*
 * What the caller's memory may look like: strides, alignment, overlaps, workspaces, no tokens at
 * all; and that a call that fails writes nothing.
 */

#include "support.h"

enum { T = 6, D = SMALL_D, K = SMALL_K };

/* Everything that a penalty call can be given, row-major and apart. */
typedef struct {
  blockem_plan *plan;
  float *h, *z, *coef, *grad, *latent_loss;
  double loss_sum, between, token_count;
  unsigned char mask[T];
  void *workspace, *block;
  size_t workspace_size;
} fixture;

static void make(fixture *f) {
  f->plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  f->h = random_floats(T * D, 11);
  f->z = random_floats(T * K, 12);
  f->coef = random_floats(T * K, 13);
  f->grad = random_floats(T * D, 14);
  f->latent_loss = random_floats(K, 15);
  f->loss_sum = f->between = f->token_count = -7;
  memset(f->mask, 1, T);
  CHECK_OK(blockem_plan_workspace_size(f->plan, T, &f->workspace_size));
  f->workspace = aligned64(f->workspace_size + 64, &f->block);
}

static void drop(fixture *f) {
  blockem_plan_free(f->plan);
  free(f->h);
  free(f->z);
  free(f->coef);
  free(f->grad);
  free(f->latent_loss);
  free(f->block);
}

static blockem_penalty_args args_of(fixture *f) {
  blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
  args.hidden = f32_2(f->h, T, D);
  args.reference = f32_2(f->z, T, K);
  args.mask = tensor1(f->mask, BLOCKEM_DTYPE_U8, T);
  args.coef = f32_2(f->coef, T, K);
  args.loss_sum = f64_1(&f->loss_sum, 1);
  args.token_count = f64_1(&f->token_count, 1);
  args.latent_loss = f32_1(f->latent_loss, K);
  args.grad_hidden = f32_2(f->grad, T, D);
  args.workspace = f->workspace;
  args.workspace_size = f->workspace_size;
  return args;
}

static void poison(fixture *f) {
  memset(f->coef, 0xa5, T * K * 4);
  memset(f->grad, 0xa5, T * D * 4);
  memset(f->latent_loss, 0xa5, K * 4);
  memset(&f->loss_sum, 0xa5, 8);
  memset(&f->token_count, 0xa5, 8);
}

static int all_poison(const void *memory, size_t bytes) {
  const unsigned char *at = (const unsigned char *)memory;
  size_t i;
  for (i = 0; i < bytes; i++) {
    if (at[i] != 0xa5) return 0;
  }
  return 1;
}

static void check_poison(const fixture *f, const char *what) {
  if (all_poison(f->coef, T * K * 4) && all_poison(f->grad, T * D * 4) &&
      all_poison(f->latent_loss, K * 4) && all_poison(&f->loss_sum, 8) &&
      all_poison(&f->token_count, 8)) {
    return;
  }
  fprintf(stderr, "an output was written although the call failed: %s\n", what);
  check_failures++;
}

/* All three calls refuse these arguments with this status and write nothing. */
static void refuse(fixture *f, const char *what, blockem_penalty_args args,
                   blockem_status expected) {
  int before = check_failures;
  poison(f);
  CHECK_STATUS(blockem_penalty_forward(f->plan, &args, NULL), expected);
  CHECK_STATUS(blockem_penalty(f->plan, &args, NULL), expected);
  if (check_failures != before) fprintf(stderr, "    in: %s\n", what);
  check_poison(f, what);
}

/* Only the gradient is wrong: forward does not look at it. */
static void refuse_grad(fixture *f, const char *what, blockem_penalty_args args,
                        blockem_status expected) {
  int before = check_failures;
  poison(f);
  CHECK_STATUS(blockem_penalty_backward(f->plan, &args, NULL), expected);
  CHECK_STATUS(blockem_penalty(f->plan, &args, NULL), expected);
  if (check_failures != before) fprintf(stderr, "    in: %s\n", what);
  check_poison(f, what);
}

/* ---- Shapes and strides ---------------------------------------------------------------------- */

static void shapes(fixture *f) {
  blockem_penalty_args args;
#define REFUSE(change, status) \
  do {                         \
    args = args_of(f);         \
    change;                    \
    refuse(f, #change, args, status); \
  } while (0)
  REFUSE(args.hidden.shape[0] = -1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.shape[1] = -D, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.shape[1] = D + 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.ndim = 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.ndim = -1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.ndim = 5, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.stride[0] = -D, BLOCKEM_STATUS_LAYOUT);
  REFUSE(args.hidden.stride[1] = 2, BLOCKEM_STATUS_LAYOUT);
  REFUSE(args.hidden.stride[1] = -1, BLOCKEM_STATUS_LAYOUT);
  REFUSE(args.hidden.stride[0] = INT64_MAX, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.hidden.shape[0] = INT64_MAX, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.reference.shape[0] = T - 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.reference.shape[1] = K + 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.reference.dtype = BLOCKEM_DTYPE_F16, BLOCKEM_STATUS_DTYPE);
  REFUSE(args.mask.shape[0] = T + 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.mask.dtype = BLOCKEM_DTYPE_I64, BLOCKEM_STATUS_DTYPE);
  REFUSE(args.coef.shape[1] = K - 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.coef.dtype = BLOCKEM_DTYPE_F64, BLOCKEM_STATUS_DTYPE);
  REFUSE(args.coef.stride[0] = K - 1, BLOCKEM_STATUS_LAYOUT);
  REFUSE(args.coef.stride[0] = 0, BLOCKEM_STATUS_LAYOUT);
  REFUSE(args.loss_sum.shape[0] = 2, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.loss_sum.dtype = BLOCKEM_DTYPE_F16, BLOCKEM_STATUS_DTYPE);
  REFUSE(args.token_count.dtype = BLOCKEM_DTYPE_I64, BLOCKEM_STATUS_DTYPE);
  REFUSE(args.latent_loss.shape[0] = K - 1, BLOCKEM_STATUS_SHAPE);
  REFUSE(args.latent_loss.stride[0] = 0, BLOCKEM_STATUS_LAYOUT);
  REFUSE(args.accumulate = 2, BLOCKEM_STATUS_INVALID_ARGUMENT);
  REFUSE(args.reserved = 1, BLOCKEM_STATUS_INVALID_ARGUMENT);
  REFUSE(args.hidden.device_type = BLOCKEM_DEVICE_CUDA, BLOCKEM_STATUS_DEVICE_MISMATCH);
  REFUSE(args.loss_sum.device_type = BLOCKEM_DEVICE_CUDA, BLOCKEM_STATUS_DEVICE_MISMATCH);
  REFUSE(args.hidden.device_index = 1, BLOCKEM_STATUS_INVALID_ARGUMENT);
#undef REFUSE
#define REFUSE_GRAD(change, status) \
  do {                              \
    args = args_of(f);              \
    change;                         \
    refuse_grad(f, #change, args, status); \
  } while (0)
  REFUSE_GRAD(args.grad_hidden.shape[0] = T - 1, BLOCKEM_STATUS_SHAPE);
  REFUSE_GRAD(args.grad_hidden.stride[0] = D - 1, BLOCKEM_STATUS_LAYOUT);
  REFUSE_GRAD(args.grad_hidden.stride[0] = 0, BLOCKEM_STATUS_LAYOUT);
  REFUSE_GRAD(args.grad_hidden.dtype = BLOCKEM_DTYPE_BF16, BLOCKEM_STATUS_DTYPE);
  REFUSE_GRAD(args.grad_hidden.dtype = BLOCKEM_DTYPE_F64, BLOCKEM_STATUS_DTYPE);
  REFUSE_GRAD(args.scale_tensor = f64_1(&f->h[0], 1), BLOCKEM_STATUS_DTYPE);
  REFUSE_GRAD(args.scale_tensor = f32_1(&f->h[0], 2), BLOCKEM_STATUS_SHAPE);
#undef REFUSE_GRAD
}

static void alignment(fixture *f) {
  blockem_penalty_args args = args_of(f);
  args.hidden.data = (char *)f->h + 1;
  refuse(f, "hidden off by 1", args, BLOCKEM_STATUS_LAYOUT);
  args = args_of(f);
  args.loss_sum.data = (char *)&f->loss_sum + 4;
  refuse(f, "f64 loss_sum off by 4", args, BLOCKEM_STATUS_LAYOUT);
  args = args_of(f);
  args.mask = tensor1((char *)f->h + 2, BLOCKEM_DTYPE_F32, T);
  refuse(f, "f32 mask off by 2", args, BLOCKEM_STATUS_LAYOUT);
  args = args_of(f);
  args.grad_hidden.data = (char *)f->grad + 2;
  refuse_grad(f, "grad_hidden off by 2", args, BLOCKEM_STATUS_LAYOUT);
}

/* ---- Workspaces ------------------------------------------------------------------------------ */

static void workspaces(fixture *f) {
  blockem_penalty_args args = args_of(f);
  size_t bytes = 0, more = 0;
  CHECK(f->workspace_size > 0);
  args.workspace_size = f->workspace_size - 1;
  refuse(f, "workspace a byte too small", args, BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  args.workspace = NULL;
  args.workspace_size = f->workspace_size;
  refuse(f, "workspace NULL", args, BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  args = args_of(f);
  args.workspace = (char *)f->workspace + 8;
  refuse(f, "workspace off by 8", args, BLOCKEM_STATUS_LAYOUT);
  args = args_of(f);
  args.workspace_size = SIZE_MAX;
  refuse(f, "workspace_size of all memory", args, BLOCKEM_STATUS_INVALID_ARGUMENT);

  /* More tokens never need less, and the size stays bounded. */
  CHECK_OK(blockem_plan_workspace_size(f->plan, 0, &bytes));
  CHECK_OK(blockem_plan_workspace_size(f->plan, 1 << 20, &more));
  CHECK(bytes <= f->workspace_size && f->workspace_size <= more);
  CHECK_OK(blockem_plan_workspace_size(f->plan, INT64_MAX, &bytes));
  CHECK(bytes >= more && bytes < (size_t)1 << 30);
}

/* ---- Overlaps -------------------------------------------------------------------------------- */

static void overlaps(fixture *f) {
  float *memory = floats(2 * T * D);
  blockem_penalty_args args = args_of(f);
  memcpy(memory, f->h, T * D * 4);

  args.grad_hidden = args.hidden;
  refuse_grad(f, "grad_hidden is hidden", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.hidden.data = memory;
  args.grad_hidden.data = memory + T * D - 1;
  refuse_grad(f, "grad_hidden begins in hidden's last element", args, BLOCKEM_STATUS_OVERLAP);
  args.grad_hidden.data = memory + T * D;
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));

  args = args_of(f);
  args.coef = args.reference;
  refuse(f, "coef is reference", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.token_count = args.loss_sum;
  refuse(f, "token_count is loss_sum", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.loss_sum = f32_1(f->latent_loss + K - 1, 1);
  refuse(f, "loss_sum is in latent_loss", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.loss_sum = f32_1(f->h, 1);
  refuse(f, "loss_sum is in hidden", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.coef.data = f->grad;
  refuse_grad(f, "coef is in grad_hidden", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.scale_tensor = f32_1(f->grad + 3, 1);
  refuse_grad(f, "scale_tensor is in grad_hidden", args, BLOCKEM_STATUS_OVERLAP);
  args = args_of(f);
  args.mask.data = f->coef;
  refuse(f, "mask is in coef", args, BLOCKEM_STATUS_OVERLAP);

  /* Inputs may share memory. */
  args = args_of(f);
  args.mask.data = f->h;
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));
  free(memory);
}

/* Columns of one matrix: hidden | reference | coef | gradient, in each row. */
static void interleaved(fixture *f) {
  enum { PITCH = D + K + K + D };
  float *memory = random_floats(T * PITCH, 21), *before = floats(T * PITCH);
  double loss_apart;
  blockem_penalty_args apart = args_of(f), args = args_of(f);
  int t;
  for (t = 0; t < T; t++) {
    memcpy(memory + t * PITCH, f->h + t * D, D * 4);
    memcpy(memory + t * PITCH + D, f->z + t * K, K * 4);
  }
  memcpy(before, memory, T * PITCH * 4);
  CHECK_OK(blockem_penalty(f->plan, &apart, NULL));
  loss_apart = f->loss_sum;

  args.hidden.data = memory;
  args.reference.data = memory + D;
  args.coef.data = memory + D + K;
  args.grad_hidden.data = memory + D + K + K;
  args.hidden.stride[0] = args.reference.stride[0] = PITCH;
  args.coef.stride[0] = args.grad_hidden.stride[0] = PITCH;
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));
  CHECK(memcmp(&f->loss_sum, &loss_apart, 8) == 0);
  for (t = 0; t < T; t++) {
    const float *row = memory + t * PITCH;
    CHECK(memcmp(row, before + t * PITCH, (D + K) * 4) == 0);
    CHECK(memcmp(row + D + K, f->coef + t * K, K * 4) == 0);
    CHECK(memcmp(row + D + K + K, f->grad + t * D, D * 4) == 0);
  }

  /* One column too far to the left, and a pitch of its own. */
  args.grad_hidden.data = memory + D + K + K - 1;
  CHECK_STATUS(blockem_penalty(f->plan, &args, NULL), BLOCKEM_STATUS_OVERLAP);
  args.grad_hidden.data = memory + D + K + K;
  args.grad_hidden.shape[0] = args.coef.shape[0] = args.reference.shape[0] = T / 2;
  args.hidden.shape[0] = T / 2;
  args.mask.shape[0] = T / 2;
  args.grad_hidden.stride[0] = PITCH + 1;
  CHECK_STATUS(blockem_penalty(f->plan, &args, NULL), BLOCKEM_STATUS_OVERLAP);
  free(before);
  free(memory);
}

static void encode_overlaps(fixture *f) {
  enum { PITCH = D + K };
  float *memory = random_floats(T * PITCH, 22), *z = floats(T * K);
  blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
  int t;
  for (t = 0; t < T; t++) memcpy(memory + t * PITCH, f->h + t * D, D * 4);
  args.hidden = f32_2(f->h, T, D);
  args.latents = f32_2(z, T, K);
  CHECK_OK(blockem_encode(f->plan, &args, NULL));

  args.hidden.data = memory;
  args.latents.data = memory + D;
  args.hidden.stride[0] = args.latents.stride[0] = PITCH;
  CHECK_OK(blockem_encode(f->plan, &args, NULL));
  for (t = 0; t < T; t++) CHECK(memcmp(memory + t * PITCH + D, z + t * K, K * 4) == 0);

  memset(z, 0xa5, T * K * 4);
  args.latents = f32_2(z, T, K);
  args.hidden = f32_2(z, T, D);
  args.hidden.stride[0] = 0; /* one row for every token: legal for an input */
  CHECK_STATUS(blockem_encode(f->plan, &args, NULL), BLOCKEM_STATUS_OVERLAP);
  CHECK(all_poison(z, T * K * 4));
  args.hidden.data = f->h;
  CHECK_OK(blockem_encode(f->plan, &args, NULL));
  for (t = 1; t < T; t++) CHECK(memcmp(z, z + t * K, K * 4) == 0);
  free(z);
  free(memory);
}

/* Outputs of a raw call that lie in the rows it reads. */
static void raw_overlaps(fixture *f) {
  float *weight = random_floats((K + T) * D, 31), *vector = random_floats(K + T * D, 32);
  float *copy = floats((K + T) * D);
  blockem_raw_penalty_args args = BLOCKEM_RAW_PENALTY_ARGS_INIT;
  memcpy(copy, weight, (K + T) * D * 4);
  args.hidden = f32_2(f->h, T, D);
  args.reference = f32_2(f->z, T, K);
  args.coef = f32_2(f->coef, T, K);
  args.grad_hidden = f32_2(weight, T, D);
  args.weight = f32_2(weight, K, D);
  args.bias = f32_1(vector, K);
  args.sign_weight = f32_1(vector, K);
  args.num_threads = 1;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_OVERLAP);
  CHECK_STATUS(blockem_raw_penalty_backward(&args, NULL), BLOCKEM_STATUS_OVERLAP);
  CHECK(memcmp(copy, weight, (K + T) * D * 4) == 0);
  args.grad_hidden = f32_2(weight + K * D, T, D);
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  args.grad_hidden = f32_2(f->grad, T, D);
  args.loss_sum = f32_1(vector + K - 1, 1);
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_OVERLAP);
  free(copy);
  free(vector);
  free(weight);
}

/* ---- No tokens, no mask ---------------------------------------------------------------------- */

static void no_tokens(fixture *f) {
  blockem_penalty_args args = args_of(f);
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  int null_data, k;
  encode.hidden = f32_2(f->h, 0, D);
  encode.latents = f32_2(f->z, 0, K);
  args.hidden = f32_2(f->h, 0, D);
  args.reference = f32_2(f->z, 0, K);
  args.mask = tensor1(f->mask, BLOCKEM_DTYPE_U8, 0);
  args.coef = f32_2(f->coef, 0, K);
  args.grad_hidden = f32_2(f->grad, 0, D);
  for (null_data = 0; null_data < 2; null_data++) {
    poison(f);
    CHECK_OK(blockem_encode(f->plan, &encode, NULL));
    CHECK_OK(blockem_penalty_forward(f->plan, &args, NULL));
    CHECK_OK(blockem_penalty_backward(f->plan, &args, NULL));
    CHECK(f->loss_sum == 0 && f->token_count == 0);
    f->loss_sum = f->token_count = 5;
    CHECK_OK(blockem_penalty(f->plan, &args, NULL));
    CHECK(f->loss_sum == 0 && f->token_count == 0);
    for (k = 0; k < K; k++) CHECK(f->latent_loss[k] == 0);
    CHECK(all_poison(f->coef, T * K * 4) && all_poison(f->grad, T * D * 4));
    /* Frameworks give empty tensors no memory. */
    encode.hidden.data = encode.latents.data = NULL;
    args.hidden.data = args.reference.data = args.mask.data = NULL;
    args.coef.data = args.grad_hidden.data = NULL;
  }
}

static void masks(fixture *f) {
  blockem_penalty_args args = args_of(f);
  int i;
  memset(f->mask, 0, T);
  f->h[3] = NAN; /* a token that does not count may hold anything */
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));
  CHECK(f->loss_sum == 0 && f->token_count == 0);
  for (i = 0; i < T * D; i++) CHECK(f->grad[i] == 0);
  f->mask[0] = 200; /* any value but 0 counts once */
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));
  CHECK(isnan(f->loss_sum) && f->token_count == 1);
  f->h[3] = 0.5f;
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));
  CHECK(isfinite(f->loss_sum) && f->token_count == 1);
}

/* Hidden states of the base model give a penalty of exactly 0. */
static void at_the_reference(fixture *f) {
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_penalty_args args = args_of(f);
  int i;
  encode.hidden = args.hidden;
  encode.latents = args.reference;
  CHECK_OK(blockem_encode(f->plan, &encode, NULL));
  CHECK_OK(blockem_penalty(f->plan, &args, NULL));
  CHECK(f->loss_sum == 0 && f->token_count == T);
  for (i = 0; i < T * D; i++) CHECK(f->grad[i] == 0);
}

int main(void) {
  static void (*const parts[])(fixture *) = {
      shapes,          alignment, workspaces, overlaps,         interleaved, encode_overlaps,
      raw_overlaps,    no_tokens, masks,      at_the_reference,
  };
  size_t i;
  for (i = 0; i < sizeof parts / sizeof *parts; i++) {
    fixture f;
    make(&f);
    parts[i](&f);
    drop(&f);
  }
  return finish_checks("memory");
}
