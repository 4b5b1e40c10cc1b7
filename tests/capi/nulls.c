/*
 * NULL for every pointer argument of every function: the required ones answer NULL_POINTER and
 * write nothing, the optional ones are legal.
 */

#include "support.h"

static char sentinel;
/* What an out-pointer holds before a call that must not write it. */
#define UNTOUCHED(type) ((type *)(void *)&sentinel)

static void library(void) {
  CHECK_STATUS(blockem_build_info_get(NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_device_count(BLOCKEM_DEVICE_CPU, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(blockem_last_error(NULL, 0) > 0);
  blockem_sae_free(NULL);
  blockem_latents_free(NULL);
  blockem_plan_free(NULL);
  blockem_cache_free(NULL);
  blockem_stats_free(NULL);
  blockem_steering_free(NULL);
}

static void sae(const char *folder) {
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
  blockem_sae_info info = BLOCKEM_SAE_INFO_INIT;
  blockem_sae_options options = BLOCKEM_SAE_OPTIONS_INIT;
  blockem_sae *out = UNTOUCHED(blockem_sae), *small = small_sae();
  char text[64];

  CHECK_STATUS(blockem_sae_open(NULL, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_sae_open(folder, &options, NULL), BLOCKEM_STATUS_NULL_POINTER);
  /* Options may be NULL; the folder holds no SAE. */
  CHECK_STATUS(blockem_sae_open(folder, NULL, &out), BLOCKEM_STATUS_IO);

  CHECK_STATUS(blockem_sae_from_tensors(NULL, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_sae_from_tensors(&desc, NULL), BLOCKEM_STATUS_NULL_POINTER);
  desc.d_in = SMALL_D;
  desc.d_sae = SMALL_F;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("encoder_weight"));

  CHECK_STATUS(blockem_sae_info_get(NULL, &info), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(info.d_in == 0);
  CHECK_STATUS(blockem_sae_info_get(small, NULL), BLOCKEM_STATUS_NULL_POINTER);

  text[0] = 'x';
  CHECK(blockem_sae_describe(NULL, text, sizeof text) == 0);
  CHECK(text[0] == 'x');
  CHECK(message_has("sae"));
  CHECK(blockem_sae_describe(small, NULL, 0) > 100);
  CHECK(blockem_sae_describe(small, NULL, 64) > 100);
  CHECK(blockem_last_error(NULL, 0) == 0);
  CHECK(blockem_sae_describe(small, text, sizeof text) > 100);
  CHECK(strlen(text) == sizeof text - 1);

  CHECK(out == UNTOUCHED(blockem_sae));
  blockem_sae_free(small);
}

static void latents(const char *folder) {
  static const int64_t ids[] = {1, 2};
  static const int8_t signs[] = {1, -1};
  blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
  blockem_latents_info info = BLOCKEM_LATENTS_INFO_INIT;
  blockem_latents_save_options options = BLOCKEM_LATENTS_SAVE_OPTIONS_INIT;
  blockem_latents *out = UNTOUCHED(blockem_latents), *set = small_latents(), *opened = NULL;
  blockem_sae *of = small_sae();
  char *path = join_path(folder, "K0.json");

  CHECK_STATUS(blockem_latents_create(NULL, &out), BLOCKEM_STATUS_NULL_POINTER);
  desc.n = 2;
  desc.signs = signs;
  CHECK_STATUS(blockem_latents_create(&desc, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("ids"));
  desc.ids = ids;
  desc.signs = NULL;
  CHECK_STATUS(blockem_latents_create(&desc, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("signs"));
  desc.signs = signs;
  CHECK_STATUS(blockem_latents_create(&desc, NULL), BLOCKEM_STATUS_NULL_POINTER);

  CHECK_STATUS(blockem_latents_save(NULL, path, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_latents_save(set, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_latents_save(set, path, &options));
  CHECK_OK(blockem_latents_save(set, path, NULL));

  CHECK_STATUS(blockem_latents_open(NULL, of, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_latents_open(path, NULL, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_latents_open(path, of, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_latents_open(path, of, &opened));
  blockem_latents_free(opened);

  CHECK_STATUS(blockem_latents_info_get(NULL, &info), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_latents_info_get(set, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_latents_get(NULL, NULL, NULL, NULL, 8), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_latents_get(set, NULL, NULL, NULL, 8));

  CHECK(out == UNTOUCHED(blockem_latents));
  free(path);
  blockem_sae_free(of);
  blockem_latents_free(set);
}

static void plan(void) {
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
  blockem_sae *of = small_sae();
  blockem_latents *set = small_latents();
  blockem_plan *out = UNTOUCHED(blockem_plan), *made = NULL;
  size_t bytes = 77;

  CHECK_STATUS(blockem_plan_create(NULL, set, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_plan_create(of, NULL, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_plan_create(of, set, &options, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(out == UNTOUCHED(blockem_plan));
  CHECK_OK(blockem_plan_create(of, set, NULL, &made));

  CHECK_STATUS(blockem_plan_info_get(NULL, &info), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_plan_info_get(made, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_plan_workspace_size(NULL, 1, &bytes), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_plan_workspace_size(made, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_plan_workspace_size(made, -1, &bytes), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(bytes == 77);
  CHECK_STATUS(blockem_xla_bind(NULL, "name"), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_xla_bind(made, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(blockem_xla_encode_cpu(NULL) == NULL && message_has("frame"));
  CHECK(blockem_xla_encode_cuda(NULL) == NULL && message_has("frame"));
  CHECK(blockem_xla_penalty_forward_cpu(NULL) == NULL && message_has("frame"));
  CHECK(blockem_xla_penalty_forward_cuda(NULL) == NULL && message_has("frame"));
  CHECK(blockem_xla_penalty_backward_cpu(NULL) == NULL && message_has("frame"));
  CHECK(blockem_xla_penalty_backward_cuda(NULL) == NULL && message_has("frame"));

  blockem_plan_free(made);
  blockem_latents_free(set);
  blockem_sae_free(of);
}

/* Each required tensor of a run call, absent in turn. */
static void run(void) {
  enum { T = 2 };
  float *h = random_floats(T * SMALL_D, 3), *z = random_floats(T * SMALL_K, 4);
  float *coef = random_floats(T * SMALL_K, 5), *grad = random_floats(T * SMALL_D, 6);
  blockem_plan *of = small_plan(BLOCKEM_BACKEND_CPU, 1);
  blockem_tensor absent = BLOCKEM_TENSOR_INIT;
  blockem_encode_args encode = BLOCKEM_ENCODE_ARGS_INIT;
  blockem_penalty_args good = BLOCKEM_PENALTY_ARGS_INIT, args;
  void *block;

  encode.hidden = f32_2(h, T, SMALL_D);
  encode.latents = f32_2(z, T, SMALL_K);
  CHECK_STATUS(blockem_encode(NULL, &encode, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_encode(of, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  encode.hidden = absent;
  CHECK_STATUS(blockem_encode(of, &encode, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("hidden"));
  encode.hidden = f32_2(h, T, SMALL_D);
  encode.latents = absent;
  CHECK_STATUS(blockem_encode(of, &encode, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("latents"));

  good.hidden = f32_2(h, T, SMALL_D);
  good.reference = f32_2(z, T, SMALL_K);
  good.coef = f32_2(coef, T, SMALL_K);
  good.grad_hidden = f32_2(grad, T, SMALL_D);
  CHECK_OK(blockem_plan_workspace_size(of, T, &good.workspace_size));
  good.workspace = aligned64(good.workspace_size, &block);
  CHECK_OK(blockem_penalty_forward(of, &good, NULL));
  CHECK_OK(blockem_penalty_backward(of, &good, NULL));
  CHECK_OK(blockem_penalty(of, &good, NULL));

  CHECK_STATUS(blockem_penalty_forward(NULL, &good, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_penalty_backward(NULL, &good, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_penalty(NULL, &good, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_penalty_forward(of, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_penalty_backward(of, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_penalty(of, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);

  args = good;
  args.hidden = absent;
  CHECK_STATUS(blockem_penalty_forward(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("hidden"));
  CHECK_STATUS(blockem_penalty(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_penalty_backward(of, &args, NULL));

  args = good;
  args.reference = absent;
  CHECK_STATUS(blockem_penalty_forward(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("reference"));
  CHECK_STATUS(blockem_penalty(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_penalty_backward(of, &args, NULL));

  args = good;
  args.coef = absent;
  CHECK_OK(blockem_penalty_forward(of, &args, NULL));
  CHECK_STATUS(blockem_penalty_backward(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("coef"));
  CHECK_OK(blockem_penalty(of, &args, NULL));

  args = good;
  args.grad_hidden = absent;
  CHECK_OK(blockem_penalty_forward(of, &args, NULL));
  CHECK_STATUS(blockem_penalty_backward(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("grad_hidden"));
  CHECK_STATUS(blockem_penalty(of, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);

  args = good;
  args.workspace = NULL;
  CHECK_STATUS(blockem_penalty(of, &args, NULL), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);

  free(block);
  blockem_plan_free(of);
  free(grad);
  free(coef);
  free(z);
  free(h);
}

static void raw(void) {
  enum { T = 2, D = 8, K = 3 };
  float *weight = random_floats(K * D, 1), *vector = random_floats(K, 2);
  float *h = random_floats(T * D, 3), *z = random_floats(T * K, 4);
  float *coef = random_floats(T * K, 5), *grad = random_floats(T * D, 6);
  blockem_tensor absent = BLOCKEM_TENSOR_INIT;
  blockem_raw_penalty_args good = BLOCKEM_RAW_PENALTY_ARGS_INIT, args;
  size_t bytes = 77;

  good.hidden = f32_2(h, T, D);
  good.reference = f32_2(z, T, K);
  good.coef = f32_2(coef, T, K);
  good.grad_hidden = f32_2(grad, T, D);
  good.weight = f32_2(weight, K, D);
  good.bias = f32_1(vector, K);
  good.sign_weight = f32_1(vector, K);
  good.num_threads = 1;
  CHECK_OK(blockem_raw_penalty_forward(&good, NULL));
  CHECK_OK(blockem_raw_penalty_backward(&good, NULL));

  CHECK_STATUS(blockem_raw_penalty_forward(NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_raw_penalty_backward(NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_raw_penalty_workspace_size(1, 1, 1, BLOCKEM_BACKEND_AUTO, 0, NULL),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_raw_penalty_workspace_size(-1, 1, 1, BLOCKEM_BACKEND_AUTO, 0, &bytes),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_raw_penalty_workspace_size(1, -1, 1, BLOCKEM_BACKEND_AUTO, 0, &bytes),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_raw_penalty_workspace_size(1, 1, -1, BLOCKEM_BACKEND_AUTO, 0, &bytes),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_raw_penalty_workspace_size(1, 1, 1, 55, 0, &bytes),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_raw_penalty_workspace_size(1, INT64_MAX, INT64_MAX, 0, 0, &bytes),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(bytes == 77);

  args = good;
  args.weight = absent;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_raw_penalty_backward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("weight"));
  args = good;
  args.bias = absent;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("bias"));
  args = good;
  args.sign_weight = absent;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("sign_weight"));
  args = good;
  args.hidden = absent;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  args = good;
  args.reference = absent;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  args = good;
  args.coef = absent;
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  CHECK_STATUS(blockem_raw_penalty_backward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  args = good;
  args.grad_hidden = absent;
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  CHECK_STATUS(blockem_raw_penalty_backward(&args, NULL), BLOCKEM_STATUS_NULL_POINTER);

  /* Arrays that belong to another activation, and activations that lack theirs. */
  args = good;
  args.activation_kind = BLOCKEM_ACTIVATION_KIND_JUMPRELU;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_INVALID_ARGUMENT);
  args.activation_kind = BLOCKEM_ACTIVATION_KIND_GATED;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_INVALID_ARGUMENT);
  args = good;
  args.threshold = f32_1(vector, K);
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_INVALID_ARGUMENT);
  args = good;
  args.activation_kind = BLOCKEM_ACTIVATION_KIND_TOPK;
  CHECK_STATUS(blockem_raw_penalty_forward(&args, NULL), BLOCKEM_STATUS_UNSUPPORTED);

  free(grad);
  free(coef);
  free(z);
  free(h);
  free(vector);
  free(weight);
}

static void cache(const char *folder) {
  enum { T = 2 };
  static const int64_t tokens[T] = {7, 8};
  float *z = random_floats(T * SMALL_K, 4);
  uint8_t key[BLOCKEM_CACHE_KEY_SIZE] = {0}, missing[SMALL_K];
  char *path = join_path(folder, "null.cache");
  blockem_plan *of = small_plan(BLOCKEM_BACKEND_CPU, 1);
  blockem_tensor latents = f32_2(z, T, SMALL_K), absent = BLOCKEM_TENSOR_INIT;
  blockem_cache_options options = BLOCKEM_CACHE_OPTIONS_INIT;
  blockem_cache_info info = BLOCKEM_CACHE_INFO_INIT;
  blockem_cache_example example = BLOCKEM_CACHE_EXAMPLE_INIT;
  size_t length;
  blockem_cache *out = UNTOUCHED(blockem_cache), *made = NULL;

  options.mode = BLOCKEM_CACHE_MODE_CREATE;
  options.base_model = "base";
  options.hidden_dtype = BLOCKEM_DTYPE_F32;
  options.plan = of;
  CHECK_STATUS(blockem_cache_open(NULL, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_open(path, NULL, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_open(path, &options, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(out == UNTOUCHED(blockem_cache));
  CHECK_OK(blockem_cache_open(path, &options, &made));

  CHECK_STATUS(blockem_cache_info_get(NULL, &info), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_info_get(made, NULL), BLOCKEM_STATUS_NULL_POINTER);

  CHECK_STATUS(blockem_cache_example_key(NULL, tokens, NULL, T, key), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_example_key(made, NULL, NULL, T, key), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_example_key(made, tokens, NULL, T, NULL),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_cache_example_key(made, tokens, NULL, T, key));
  CHECK_STATUS(blockem_cache_key(NULL, &example, key), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_key(made, NULL, key), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_key(made, &example, key), BLOCKEM_STATUS_INVALID_ARGUMENT);
  example.num_tokens = T;
  CHECK_STATUS(blockem_cache_key(made, &example, key), BLOCKEM_STATUS_NULL_POINTER);
  example.token_ids = tokens;
  CHECK_STATUS(blockem_cache_key(made, &example, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_cache_key(made, &example, key));
  example.context_size = 1;
  CHECK_STATUS(blockem_cache_key(made, &example, key), BLOCKEM_STATUS_NULL_POINTER);

  CHECK_STATUS(blockem_cache_put_note(NULL, "n", "x"), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_put_note(made, NULL, "x"), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_put_note(made, "n", NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get_note(NULL, "n", NULL, 0, &length), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get_note(made, NULL, NULL, 0, &length), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get_note(made, "n", NULL, 0, NULL), BLOCKEM_STATUS_NULL_POINTER);

  CHECK_STATUS(blockem_cache_missing(NULL, of, key, 1, missing), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_missing(made, NULL, key, 1, missing), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_missing(made, of, NULL, 1, missing), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_missing(made, of, key, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_cache_missing(made, of, NULL, 0, NULL));

  CHECK_STATUS(blockem_cache_put(NULL, of, key, &latents, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_put(made, NULL, key, &latents, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_put(made, of, NULL, &latents, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_put(made, of, key, NULL, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_put(made, of, key, &absent, 1, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("latents[0]"));
  CHECK_OK(blockem_cache_put(made, of, key, &latents, 1, NULL));
  CHECK_OK(blockem_cache_put(made, of, NULL, NULL, 0, NULL));

  CHECK_STATUS(blockem_cache_get(NULL, of, key, &latents, 1), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get(made, NULL, key, &latents, 1), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get(made, of, NULL, &latents, 1), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get(made, of, key, NULL, 1), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_cache_get(made, of, key, &absent, 1), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_cache_get(made, of, key, &latents, 1));
  CHECK_OK(blockem_cache_get(made, of, NULL, NULL, 0));

  blockem_cache_free(made);
  blockem_plan_free(of);
  free(path);
  free(z);
}

static void stats(void) {
  enum { T = 2 };
  float *h = random_floats(T * SMALL_D, 3);
  double *state = (double *)allocate(BLOCKEM_STATS_ROWS * SMALL_F * sizeof(double));
  blockem_sae *of = small_sae();
  blockem_tensor absent = BLOCKEM_TENSOR_INIT;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_stats_info info = BLOCKEM_STATS_INFO_INIT;
  blockem_stats_args good = BLOCKEM_STATS_ARGS_INIT, args;
  blockem_stats *out = UNTOUCHED(blockem_stats), *made = NULL;
  void *block;
  size_t bytes = 77;

  options.num_threads = 1;
  CHECK_STATUS(blockem_stats_create(NULL, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_stats_create(of, &options, NULL), BLOCKEM_STATUS_NULL_POINTER);
  options.activation = 55;
  CHECK_STATUS(blockem_stats_create(of, &options, &out), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(out == UNTOUCHED(blockem_stats));
  CHECK_OK(blockem_stats_create(of, NULL, &made));

  CHECK_STATUS(blockem_stats_info_get(NULL, &info), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_stats_info_get(made, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_stats_workspace_size(NULL, 1, 0, &bytes), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_stats_workspace_size(made, 1, 0, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_stats_workspace_size(made, -1, 0, &bytes), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_stats_workspace_size(made, 1, 2, &bytes), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(bytes == 77);

  good.hidden = f32_2(h, T, SMALL_D);
  good.state = f64_2(state, BLOCKEM_STATS_ROWS, SMALL_F);
  CHECK_OK(blockem_stats_workspace_size(made, T, 0, &good.workspace_size));
  good.workspace = aligned64(good.workspace_size, &block);
  CHECK_OK(blockem_stats_update(made, &good, NULL));
  CHECK_STATUS(blockem_stats_update(NULL, &good, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_stats_update(made, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  args = good;
  args.hidden = absent;
  CHECK_STATUS(blockem_stats_update(made, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("hidden"));
  args = good;
  args.state = absent;
  CHECK_STATUS(blockem_stats_update(made, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("state"));
  args = good;
  args.workspace = NULL;
  CHECK_STATUS(blockem_stats_update(made, &args, NULL), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
  args = good;
  args.accumulate = 2;
  CHECK_STATUS(blockem_stats_update(made, &args, NULL), BLOCKEM_STATUS_INVALID_ARGUMENT);
  args = good;
  args.reserved = 1;
  CHECK_STATUS(blockem_stats_update(made, &args, NULL), BLOCKEM_STATUS_INVALID_ARGUMENT);

  free(block);
  blockem_stats_free(made);
  blockem_sae_free(of);
  free(state);
  free(h);
}

static void steering(void) {
  enum { B = 2, S = 3 };
  static const int64_t ids[] = {5, 1}, rows[B] = {1, -1};
  static const float strengths[B] = {1.0f, 1.0f};
  float *h = random_floats(B * S * SMALL_D, 3), norms[B * S];
  blockem_sae *of = small_sae();
  blockem_tensor absent = BLOCKEM_TENSOR_INIT;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_steering_info info = BLOCKEM_STEERING_INFO_INIT;
  blockem_steer_args good = BLOCKEM_STEER_ARGS_INIT, args;
  blockem_token_norms_args of_norms = BLOCKEM_TOKEN_NORMS_ARGS_INIT;
  blockem_steering *out = UNTOUCHED(blockem_steering), *made = NULL;

  options.num_threads = 1;
  CHECK_STATUS(blockem_steering_create(NULL, ids, 2, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_steering_create(of, NULL, 2, &options, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_steering_create(of, ids, 2, &options, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_steering_create(of, NULL, 0, NULL, &out), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(blockem_steering_create(of, ids, SIZE_MAX, NULL, &out),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.backend = 55;
  CHECK_STATUS(blockem_steering_create(of, ids, 2, &options, &out),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(out == UNTOUCHED(blockem_steering));
  CHECK_OK(blockem_steering_create(of, ids, 2, NULL, &made));

  CHECK_STATUS(blockem_steering_info_get(NULL, &info), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_steering_info_get(made, NULL), BLOCKEM_STATUS_NULL_POINTER);

  good.hidden = f32_3(h, B, S, SMALL_D);
  good.row = i64_1(rows, B);
  good.strength = f32_1(strengths, B);
  CHECK_OK(blockem_steer(made, &good, NULL));
  CHECK_STATUS(blockem_steer(NULL, &good, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_steer(made, NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_steer(made, &good, h), BLOCKEM_STATUS_INVALID_ARGUMENT);
  args = good;
  args.hidden = absent;
  CHECK_STATUS(blockem_steer(made, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("hidden"));
  args = good;
  args.row = absent;
  CHECK_STATUS(blockem_steer(made, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("row"));
  args = good;
  args.strength = absent;
  CHECK_STATUS(blockem_steer(made, &args, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("strength"));

  of_norms.hidden = f32_2(h, B * S, SMALL_D);
  of_norms.norms = f32_1(norms, B * S);
  CHECK_OK(blockem_token_norms(&of_norms, NULL));
  CHECK_STATUS(blockem_token_norms(NULL, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_token_norms(&of_norms, h), BLOCKEM_STATUS_INVALID_ARGUMENT);
  of_norms.norms = absent;
  CHECK_STATUS(blockem_token_norms(&of_norms, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("norms"));
  of_norms.hidden = absent;
  CHECK_STATUS(blockem_token_norms(&of_norms, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("hidden"));

  blockem_steering_free(made);
  blockem_sae_free(of);
  free(h);
}

static void text_mask(const char *folder) {
  static const int64_t offsets[] = {0, 3}, ids[] = {1};
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT;
  blockem_tokenizer *out = UNTOUCHED(blockem_tokenizer);
  uint8_t mask[1];
  size_t n = 77;
  options.spans = offsets;
  options.num_spans = 1;

  CHECK_STATUS(blockem_tokenizer_open(NULL, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_tokenizer_open(folder, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_tokenizer_from_json(NULL, 5, &out), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_tokenizer_from_json("{}", 2, NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(out == UNTOUCHED(blockem_tokenizer));
  CHECK_STATUS(blockem_tokenizer_mask(NULL, "why", 3, &options, NULL, NULL, 0, &n),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_tokenizer_mask(NULL, "why", 3, &options, NULL, NULL, 0, NULL),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK(n == 77);
  CHECK_STATUS(blockem_tokenizer_mask_ids(NULL, "why", 3, &options, ids, 1, mask),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_tokenizer_mask_ids(NULL, "why", 3, &options, ids, 1, NULL),
               BLOCKEM_STATUS_NULL_POINTER);
  blockem_tokenizer_free(NULL);

  CHECK_STATUS(blockem_mask_preset(NULL, &options), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_mask_preset("chatml", NULL), BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_mask_from_offsets(NULL, 3, &options, offsets, 1, mask),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_mask_from_offsets("why", 3, NULL, offsets, 1, mask),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_mask_from_offsets("why", 3, &options, NULL, 1, mask),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_STATUS(blockem_mask_from_offsets("why", 3, &options, offsets, 1, NULL),
               BLOCKEM_STATUS_NULL_POINTER);
  CHECK_OK(blockem_mask_from_offsets("why", 3, &options, offsets, 1, mask));
  options.allow_empty = 1;
  CHECK_OK(blockem_mask_from_offsets("why", 3, &options, NULL, 0, NULL));
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  library();
  sae(argv[1]);
  latents(argv[1]);
  plan();
  run();
  raw();
  cache(argv[1]);
  stats();
  steering();
  text_mask(argv[1]);
  return finish_checks("nulls");
}
