/*
 * struct_size of every versioned struct: callers of other versions of the header, and callers who
 * forgot to initialise.
 */

#include "support.h"

enum { TAIL = 24 };

/* A struct as a newer header might have it: ours, then fields that this library does not know. */
#define LONGER(type)                        \
  union {                                   \
    type now;                               \
    size_t struct_size;                     \
    unsigned char bytes[sizeof(type) + TAIL]; \
  }

/* A struct's size in the first version of the header; 0 where it has not grown. */
#define FIRST(type, size) ((size) != 0 ? (size_t)(size) : sizeof(type))

/*
 * For an input struct: call(&longer.now) answers OK at its own size and with a zero tail, and
 * STRUCT_SIZE otherwise. cleanup runs after each success.
 */
#define CHECK_INPUT(type, first_size, longer, call, cleanup)                  \
  do {                                                                        \
    memset((longer).bytes + sizeof(type), 0, TAIL);                           \
    CHECK((longer).struct_size == sizeof(type));                              \
    if (CHECK_OK(call)) cleanup;                                              \
    (longer).struct_size = sizeof(type) + TAIL;                               \
    if (CHECK_OK(call)) cleanup;                                              \
    (longer).bytes[sizeof(type) + TAIL - 1] = 1;                              \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    (longer).struct_size = sizeof(type) + TAIL - 1;                           \
    if (CHECK_OK(call)) cleanup;                                              \
    (longer).struct_size = 0;                                                 \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    CHECK(message_has("_INIT"));                                              \
    (longer).struct_size = FIRST(type, first_size) - 1;                       \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    (longer).struct_size = SIZE_MAX;                                          \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    (longer).struct_size = sizeof(type);                                      \
  } while (0)

/* For a struct that is filled: a newer caller's tail stays as it is. */
#define CHECK_OUTPUT(type, first_size, longer, call)                          \
  do {                                                                        \
    size_t byte_;                                                             \
    memset((longer).bytes + sizeof(size_t), 0xa5, sizeof(type) + TAIL - sizeof(size_t)); \
    (longer).struct_size = 0;                                                 \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    (longer).struct_size = FIRST(type, first_size) - 1;                                  \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    (longer).struct_size = SIZE_MAX;                                          \
    CHECK_STATUS(call, BLOCKEM_STATUS_STRUCT_SIZE);                           \
    for (byte_ = sizeof(size_t); byte_ < sizeof(type); byte_++) {             \
      CHECK((longer).bytes[byte_] == 0xa5);                                   \
    }                                                                         \
    (longer).struct_size = FIRST(type, first_size);                           \
    CHECK_OK(call);                                                           \
    for (byte_ = FIRST(type, first_size); byte_ < sizeof(type); byte_++) {    \
      CHECK((longer).bytes[byte_] == 0xa5);                                   \
    }                                                                         \
    (longer).struct_size = sizeof(type) + TAIL;                               \
    CHECK_OK(call);                                                           \
    CHECK((longer).struct_size == sizeof(type) + TAIL);                       \
    for (byte_ = 0; byte_ < TAIL; byte_++) {                                  \
      CHECK((longer).bytes[sizeof(type) + byte_] == 0xa5);                    \
    }                                                                         \
    (longer).struct_size = sizeof(type);                                      \
    CHECK_OK(call);                                                           \
  } while (0)

static void inputs(const char *folder) {
  enum { T = 2 };
  float *weight = random_floats(SMALL_F * SMALL_D, 1), *bias = random_floats(SMALL_F, 2);
  float *h = random_floats(T * SMALL_D, 3), *z = random_floats(T * SMALL_K, 4);
  float *coef = random_floats(T * SMALL_K, 5), *grad = random_floats(T * SMALL_D, 6);
  static const int64_t ids[] = {1, 2};
  static const int8_t signs[] = {1, -1};
  char *path = join_path(folder, "sae.safetensors"), *set_path = join_path(folder, "K0.json");
  char *cache_path = join_path(folder, "struct.cache");
  blockem_cache *cache = NULL;
  blockem_sae *sae = NULL, *of = small_sae();
  blockem_latents *latents = NULL, *set = small_latents();
  blockem_plan *made = NULL, *plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  blockem_stats *stats = NULL;
  blockem_steering *steering = NULL;
  static const int64_t rows[] = {0};
  double *state = (double *)allocate(BLOCKEM_STATS_ROWS * SMALL_F * sizeof(double));
  file_tensor tensors[] = {{"W_enc", SMALL_D, SMALL_F, NULL}, {"b_enc", SMALL_F, 0, NULL}};
  void *block, *stats_block;

  LONGER(blockem_sae_options) sae_options = {BLOCKEM_SAE_OPTIONS_INIT};
  LONGER(blockem_sae_desc) sae_desc = {BLOCKEM_SAE_DESC_INIT};
  LONGER(blockem_latents_desc) latents_desc = {BLOCKEM_LATENTS_DESC_INIT};
  LONGER(blockem_latents_save_options) save_options = {BLOCKEM_LATENTS_SAVE_OPTIONS_INIT};
  LONGER(blockem_plan_options) plan_options = {BLOCKEM_PLAN_OPTIONS_INIT};
  LONGER(blockem_encode_args) encode = {BLOCKEM_ENCODE_ARGS_INIT};
  LONGER(blockem_penalty_args) penalty = {BLOCKEM_PENALTY_ARGS_INIT};
  LONGER(blockem_raw_penalty_args) raw = {BLOCKEM_RAW_PENALTY_ARGS_INIT};
  LONGER(blockem_cache_options) cache_options = {BLOCKEM_CACHE_OPTIONS_INIT};
  LONGER(blockem_cache_example) example = {BLOCKEM_CACHE_EXAMPLE_INIT};
  LONGER(blockem_stats_args) update = {BLOCKEM_STATS_ARGS_INIT};
  LONGER(blockem_steer_args) steer = {BLOCKEM_STEER_ARGS_INIT};
  LONGER(blockem_token_norms_args) norms = {BLOCKEM_TOKEN_NORMS_ARGS_INIT};
  LONGER(blockem_mask_options) mask_options = {BLOCKEM_MASK_OPTIONS_INIT};
  static const int64_t offsets[] = {0, 3};
  uint8_t mask[1], key[BLOCKEM_CACHE_KEY_SIZE];

  tensors[0].data = weight;
  tensors[1].data = bias;
  write_safetensors(path, NULL, tensors, 2);
  sae_options.now.recipe_json =
      "{\"architecture\": \"standard\", \"d_in\": 40, \"d_sae\": 32,"
      " \"apply_b_dec_to_input\": false, \"normalize_activations\": \"none\"}";
  CHECK_INPUT(blockem_sae_options, 0, sae_options, blockem_sae_open(path, &sae_options.now, &sae),
              blockem_sae_free(sae));

  sae_desc.now.encoder_weight = f32_2(weight, SMALL_F, SMALL_D);
  sae_desc.now.encoder_bias = f32_1(bias, SMALL_F);
  sae_desc.now.d_in = SMALL_D;
  sae_desc.now.d_sae = SMALL_F;
  CHECK_INPUT(blockem_sae_desc, 768, sae_desc, blockem_sae_from_tensors(&sae_desc.now, &sae),
              blockem_sae_free(sae));

  latents_desc.now.ids = ids;
  latents_desc.now.signs = signs;
  latents_desc.now.n = 2;
  CHECK_INPUT(blockem_latents_desc, 0, latents_desc,
              blockem_latents_create(&latents_desc.now, &latents), blockem_latents_free(latents));

  save_options.now.plan = plan;
  CHECK_INPUT(blockem_latents_save_options, 0, save_options,
              blockem_latents_save(set, set_path, &save_options.now), (void)0);

  CHECK_INPUT(blockem_plan_options, 32, plan_options,
              blockem_plan_create(of, set, &plan_options.now, &made), blockem_plan_free(made));

  encode.now.hidden = f32_2(h, T, SMALL_D);
  encode.now.latents = f32_2(z, T, SMALL_K);
  CHECK_INPUT(blockem_encode_args, 184, encode, blockem_encode(plan, &encode.now, NULL), (void)0);

  penalty.now.hidden = f32_2(h, T, SMALL_D);
  penalty.now.reference = f32_2(z, T, SMALL_K);
  penalty.now.coef = f32_2(coef, T, SMALL_K);
  penalty.now.grad_hidden = f32_2(grad, T, SMALL_D);
  CHECK_OK(blockem_plan_workspace_size(plan, T, &penalty.now.workspace_size));
  penalty.now.workspace = aligned64(penalty.now.workspace_size, &block);
  CHECK_INPUT(blockem_penalty_args, 0, penalty, blockem_penalty_forward(plan, &penalty.now, NULL),
              (void)0);
  CHECK_INPUT(blockem_penalty_args, 0, penalty, blockem_penalty_backward(plan, &penalty.now, NULL),
              (void)0);
  CHECK_INPUT(blockem_penalty_args, 0, penalty, blockem_penalty(plan, &penalty.now, NULL), (void)0);

  raw.now.hidden = f32_2(h, T, SMALL_D);
  raw.now.reference = f32_2(z, T, SMALL_K);
  raw.now.coef = f32_2(coef, T, SMALL_K);
  raw.now.grad_hidden = f32_2(grad, T, SMALL_D);
  raw.now.weight = f32_2(weight, SMALL_K, SMALL_D);
  raw.now.bias = f32_1(bias, SMALL_K);
  raw.now.sign_weight = f32_1(bias, SMALL_K);
  raw.now.num_threads = 1;
  CHECK_INPUT(blockem_raw_penalty_args, 0, raw, blockem_raw_penalty_forward(&raw.now, NULL), (void)0);
  CHECK_INPUT(blockem_raw_penalty_args, 0, raw, blockem_raw_penalty_backward(&raw.now, NULL),
              (void)0);

  cache_options.now.mode = BLOCKEM_CACHE_MODE_CREATE;
  cache_options.now.base_model = "base";
  cache_options.now.hidden_dtype = BLOCKEM_DTYPE_BF16;
  cache_options.now.plan = plan;
  CHECK_INPUT(blockem_cache_options, 40, cache_options,
              blockem_cache_open(cache_path, &cache_options.now, &cache),
              blockem_cache_free(cache));
  CHECK_OK(blockem_cache_open(cache_path, &cache_options.now, &cache));
  example.now.token_ids = rows;
  example.now.num_tokens = 1;
  CHECK_INPUT(blockem_cache_example, 0, example, blockem_cache_key(cache, &example.now, key), (void)0);
  blockem_cache_free(cache);

  plan_options.now.num_threads = 1;
  CHECK_INPUT(blockem_plan_options, 32, plan_options,
              blockem_stats_create(of, &plan_options.now, &stats), blockem_stats_free(stats));
  CHECK_OK(blockem_stats_create(of, &plan_options.now, &stats));
  update.now.hidden = f32_2(h, T, SMALL_D);
  update.now.state = f64_2(state, BLOCKEM_STATS_ROWS, SMALL_F);
  CHECK_OK(blockem_stats_workspace_size(stats, T, 0, &update.now.workspace_size));
  update.now.workspace = aligned64(update.now.workspace_size, &stats_block);
  CHECK_INPUT(blockem_stats_args, 0, update, blockem_stats_update(stats, &update.now, NULL),
              (void)0);
  free(stats_block);
  blockem_stats_free(stats);
  free(state);

  CHECK_INPUT(blockem_plan_options, 32, plan_options,
              blockem_steering_create(of, ids, 2, &plan_options.now, &steering),
              blockem_steering_free(steering));
  CHECK_OK(blockem_steering_create(of, ids, 2, &plan_options.now, &steering));
  CHECK(steer.now.scale == 1.0);
  steer.now.hidden = f32_3(h, 1, T, SMALL_D);
  steer.now.row = i64_1(rows, 1);
  steer.now.strength = f32_1(z, 1);
  CHECK_INPUT(blockem_steer_args, 0, steer, blockem_steer(steering, &steer.now, NULL), (void)0);
  blockem_steering_free(steering);
  norms.now.hidden = f32_2(h, T, SMALL_D);
  norms.now.norms = f32_1(z, T);
  norms.now.num_threads = 1;
  CHECK_INPUT(blockem_token_norms_args, 0, norms, blockem_token_norms(&norms.now, NULL), (void)0);

  mask_options.now.spans = offsets;
  mask_options.now.num_spans = 1;
  CHECK_INPUT(blockem_mask_options, 88, mask_options,
              blockem_mask_from_offsets("why", 3, &mask_options.now, offsets, 1, mask), (void)0);

  free(block);
  blockem_plan_free(plan);
  blockem_latents_free(set);
  blockem_sae_free(of);
  free(cache_path);
  free(set_path);
  free(path);
  free(grad);
  free(coef);
  free(z);
  free(h);
  free(bias);
  free(weight);
}

static void outputs(const char *folder) {
  char *path = join_path(folder, "info.cache");
  blockem_cache_options options = BLOCKEM_CACHE_OPTIONS_INIT;
  blockem_cache *cache = NULL;
  blockem_sae *sae = small_sae();
  blockem_latents *latents = small_latents();
  blockem_plan *plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  LONGER(blockem_build_info) build = {BLOCKEM_BUILD_INFO_INIT};
  LONGER(blockem_sae_info) sae_info = {BLOCKEM_SAE_INFO_INIT};
  LONGER(blockem_latents_info) latents_info = {BLOCKEM_LATENTS_INFO_INIT};
  LONGER(blockem_plan_info) plan_info = {BLOCKEM_PLAN_INFO_INIT};
  LONGER(blockem_cache_info) cache_info = {BLOCKEM_CACHE_INFO_INIT};
  LONGER(blockem_stats_info) stats_info = {BLOCKEM_STATS_INFO_INIT};
  LONGER(blockem_steering_info) steering_info = {BLOCKEM_STEERING_INFO_INIT};
  blockem_stats *stats = NULL;
  blockem_steering *steering = NULL;
  static const int64_t ids[] = {3, 31};

  CHECK_OUTPUT(blockem_build_info, 0, build, blockem_build_info_get(&build.now));
  CHECK(build.now.version == blockem_version());
  CHECK(build.now.has_cuda == 0 || build.now.has_cuda == 1);
  CHECK(build.now.cpu_isa[0] != '\0');

  CHECK_OUTPUT(blockem_sae_info, 0, sae_info, blockem_sae_info_get(sae, &sae_info.now));
  CHECK(sae_info.now.d_in == SMALL_D && sae_info.now.d_sae == SMALL_F);
  CHECK(sae_info.now.layer == 3 && sae_info.now.k == 0 && sae_info.now.scale == 1.0);
  CHECK(sae_info.now.site == BLOCKEM_SITE_BLOCK_OUTPUT);
  CHECK(sae_info.now.activation_kind == BLOCKEM_ACTIVATION_KIND_RELU);
  CHECK(sae_info.now.dtype == BLOCKEM_DTYPE_F32 && sae_info.now.b_dec_subtracted == 0);

  CHECK_OUTPUT(blockem_latents_info, 0, latents_info,
               blockem_latents_info_get(latents, &latents_info.now));
  CHECK(latents_info.now.count == SMALL_K && latents_info.now.num_positive == 3);
  CHECK(latents_info.now.d_in == 0 && latents_info.now.d_sae == 0 && latents_info.now.layer == -1);

  CHECK_OUTPUT(blockem_plan_info, 208, plan_info, blockem_plan_info_get(plan, &plan_info.now));
  CHECK(plan_info.now.d_in == SMALL_D && plan_info.now.d_sae == SMALL_F);
  CHECK(plan_info.now.num_latents == SMALL_K && plan_info.now.num_positive == 3);
  CHECK(plan_info.now.layer == 3 && plan_info.now.num_threads == 1);
  CHECK(plan_info.now.backend == BLOCKEM_BACKEND_CPU);
  CHECK(strlen(plan_info.now.identity) == 64 && plan_info.now.numerics[0] != '\0');

  CHECK_OK(blockem_stats_create(sae, NULL, &stats));
  CHECK_OUTPUT(blockem_stats_info, 0, stats_info, blockem_stats_info_get(stats, &stats_info.now));
  CHECK(stats_info.now.d_in == SMALL_D && stats_info.now.d_sae == SMALL_F);
  CHECK(stats_info.now.layer == 3 && stats_info.now.num_threads >= 1);
  CHECK(stats_info.now.backend == BLOCKEM_BACKEND_CPU);
  CHECK(strlen(stats_info.now.identity) == 64);
  CHECK(strcmp(stats_info.now.identity, plan_info.now.identity) != 0);
  CHECK(strcmp(stats_info.now.numerics, plan_info.now.numerics) == 0);
  blockem_stats_free(stats);

  CHECK_OK(blockem_steering_create(sae, ids, 2, NULL, &steering));
  CHECK_OUTPUT(blockem_steering_info, 0, steering_info,
               blockem_steering_info_get(steering, &steering_info.now));
  CHECK(steering_info.now.d_in == SMALL_D && steering_info.now.num_latents == 2);
  CHECK(steering_info.now.layer == 3 && steering_info.now.num_threads >= 1);
  CHECK(steering_info.now.backend == BLOCKEM_BACKEND_CPU);
  CHECK(strlen(steering_info.now.identity) == 64);
  blockem_steering_free(steering);

  options.mode = BLOCKEM_CACHE_MODE_CREATE;
  options.base_model = "base";
  options.hidden_dtype = BLOCKEM_DTYPE_BF16;
  options.plan = plan;
  CHECK_OK(blockem_cache_open(path, &options, &cache));
  CHECK_OUTPUT(blockem_cache_info, 0, cache_info, blockem_cache_info_get(cache, &cache_info.now));
  CHECK(cache_info.now.num_examples == 0 && cache_info.now.num_columns == 0);
  CHECK(cache_info.now.layer == 3 && cache_info.now.hidden_dtype == BLOCKEM_DTYPE_BF16);
  CHECK(cache_info.now.site == BLOCKEM_SITE_BLOCK_OUTPUT);
  CHECK(strcmp(cache_info.now.base_model, "base") == 0);
  CHECK(strcmp(cache_info.now.numerics, plan_info.now.numerics) == 0);
  blockem_cache_free(cache);
  free(path);

  blockem_plan_free(plan);
  blockem_latents_free(latents);
  blockem_sae_free(sae);
}

static void version(void) {
  char text[32];
  uint32_t number = blockem_version();
  snprintf(text, sizeof text, "%u.%u.%u", (unsigned)(number >> 16), (unsigned)(number >> 8 & 255),
           (unsigned)(number & 255));
  CHECK(strcmp(text, blockem_version_string()) == 0);
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  version();
  inputs(argv[1]);
  outputs(argv[1]);
  return finish_checks("structs");
}
