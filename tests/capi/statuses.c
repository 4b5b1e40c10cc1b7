/*
 * Every status that a caller or a file can provoke, each by what it is for (those of CUDA are in
 * cuda.c); the names of all; the last error's text. Prints "reached N" for each, which the driver compares with the header.
 */

#include "support.h"

#include <pthread.h>

static const char *scratch;

/* ---- 1xx: the caller ------------------------------------------------------------------------- */

/* Runs encode on a tensor for hidden and another for latents. */
static blockem_status encode(const blockem_plan *plan, blockem_tensor hidden,
                             blockem_tensor latents) {
  blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
  args.hidden = hidden;
  args.latents = latents;
  return blockem_encode(plan, &args, NULL);
}

static void call_statuses(void) {
  enum { T = 3 };
  float *memory = random_floats(T * SMALL_D + T * SMALL_K + 1, 9);
  float *latents = memory + T * SMALL_D;
  blockem_plan *plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  blockem_tensor h = f32_2(memory, T, SMALL_D), z = f32_2(latents, T, SMALL_K), odd;

  CHECK_OK(encode(plan, h, z));

  odd = h;
  odd.data = NULL;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_NULL_POINTER);
  CHECK(message_has("hidden"));

  odd = h;
  odd.shape[1] = SMALL_D - 1;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_SHAPE);
  CHECK(message_has("hidden") && message_has("40"));

  odd = h;
  odd.dtype = BLOCKEM_DTYPE_I64;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_DTYPE);
  odd.dtype = 99;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_DTYPE);

  odd = h;
  odd.data = (char *)h.data + 2;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_LAYOUT);

  odd = h;
  odd.device_type = BLOCKEM_DEVICE_CUDA;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_DEVICE_MISMATCH);
  odd.device_type = 7;
  CHECK_STATUS(encode(plan, odd, z), BLOCKEM_STATUS_INVALID_ARGUMENT);

  odd = z;
  odd.data = (char *)h.data + 4 * SMALL_D;
  CHECK_STATUS(encode(plan, h, odd), BLOCKEM_STATUS_OVERLAP);
  CHECK(message_has("latents") && message_has("hidden"));

  {
    blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
    args.hidden = h;
    args.latents = z;
    CHECK_STATUS(blockem_encode(plan, &args, memory), BLOCKEM_STATUS_INVALID_ARGUMENT);
    args.struct_size = 0;
    CHECK_STATUS(blockem_encode(plan, &args, NULL), BLOCKEM_STATUS_STRUCT_SIZE);
  }
  {
    blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
    size_t needed = 0;
    double loss = 0;
    args.hidden = h;
    args.reference = z;
    args.loss_sum = f64_1(&loss, 1);
    CHECK_OK(blockem_plan_workspace_size(plan, T, &needed));
    CHECK(needed > 0);
    CHECK_STATUS(blockem_penalty_forward(plan, &args, NULL), BLOCKEM_STATUS_WORKSPACE_TOO_SMALL);
    CHECK(message_has("workspace"));
  }

  blockem_plan_free(plan);
  free(memory);
}

static blockem_status create_latents(const int64_t *ids, const int8_t *signs, size_t n,
                                     blockem_latents **out) {
  blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
  desc.ids = ids;
  desc.signs = signs;
  desc.n = n;
  return blockem_latents_create(&desc, out);
}

static void set_statuses(void) {
  static const int64_t twice[] = {4, 4}, negative[] = {-1}, high[] = {SMALL_F};
  static const int8_t plus[] = {1, 1}, both[] = {1, -1}, zero[] = {0};
  static const float bad_weights[] = {-1.0f};
  blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
  blockem_latents *latents = NULL;
  blockem_plan *plan = NULL;
  blockem_sae *sae = small_sae();
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;

  CHECK_STATUS(create_latents(twice, plus, 2, &latents), BLOCKEM_STATUS_LATENT_DUPLICATE);
  CHECK_STATUS(create_latents(twice, both, 2, &latents), BLOCKEM_STATUS_LATENT_DUPLICATE);
  CHECK_STATUS(create_latents(negative, plus, 1, &latents), BLOCKEM_STATUS_LATENT_RANGE);
  CHECK_STATUS(create_latents(high, zero, 1, &latents), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK_STATUS(create_latents(high, plus, 0, &latents), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc.ids = high;
  desc.signs = plus;
  desc.weights = bad_weights;
  desc.n = 1;
  CHECK_STATUS(blockem_latents_create(&desc, &latents), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(latents == NULL);

  /* An id that only the SAE can refuse. */
  CHECK_OK(create_latents(high, plus, 1, &latents));
  CHECK_STATUS(blockem_plan_create(sae, latents, NULL, &plan), BLOCKEM_STATUS_LATENT_RANGE);
  CHECK(message_has("32"));
  CHECK(plan == NULL);
  {
    int64_t ids[1];
    CHECK_STATUS(blockem_latents_get(latents, ids, NULL, NULL, 0), BLOCKEM_STATUS_SHAPE);
  }
  blockem_latents_free(latents);

  latents = small_latents();
  options.activation = 77;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.activation = BLOCKEM_ACTIVATION_NATIVE;
  options.num_threads = -1;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.num_threads = 0;
  options.reserved = 1;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.reserved = 0;
  options.backend = 9;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.backend = BLOCKEM_BACKEND_AUTO;
  options.part = 3;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.part = BLOCKEM_PART_GATE;
  options.column_end = 8;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("do not fit the part"));
  options.part = BLOCKEM_PART_COLUMNS;
  options.column_begin = -1;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.column_begin = 0;
  options.reserved2 = 1;
  CHECK_STATUS(blockem_plan_create(sae, latents, &options, &plan), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(plan == NULL);
  blockem_latents_free(latents);
  blockem_sae_free(sae);
}

/* The encoder of small_sae with one thing changed. */
static void tensor_statuses(void) {
  /* Room for the same shape in 8-byte elements. */
  float *weight = random_floats(2 * SMALL_F * SMALL_D, 1), *bias = random_floats(SMALL_F, 2);
  blockem_sae_desc good = BLOCKEM_SAE_DESC_INIT, desc;
  blockem_sae *sae = NULL;
  blockem_latents *latents = small_latents();
  blockem_plan *plan = NULL;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  good.encoder_weight = f32_2(weight, SMALL_F, SMALL_D);
  good.encoder_bias = f32_1(bias, SMALL_F);
  good.d_in = SMALL_D;
  good.d_sae = SMALL_F;

  desc = good;
  desc.encoder_weight.shape[0] = SMALL_F - 1;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_SHAPE);
  desc = good;
  desc.encoder_weight.ndim = 5;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_SHAPE);
  desc = good;
  desc.encoder_weight.dtype = BLOCKEM_DTYPE_I64;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_DTYPE);
  desc = good;
  desc.encoder_weight.device_type = BLOCKEM_DEVICE_CUDA;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_DEVICE_MISMATCH);
  desc = good;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_PREACTIVATION;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.encoder_layout = 3;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.input_scale = -1;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.d_in = -SMALL_D;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.hook_name = "\xff\xfe";
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  weight[77] = NAN;
  CHECK_STATUS(blockem_sae_from_tensors(&good, &sae), BLOCKEM_STATUS_NON_FINITE);
  weight[77] = INFINITY;
  CHECK_STATUS(blockem_sae_from_tensors(&good, &sae), BLOCKEM_STATUS_NON_FINITE);
  weight[77] = 0;
  CHECK(sae == NULL);

  desc = good;
  desc.selection = 4;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.selection = BLOCKEM_SELECTION_GROUPS;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.token_norm = -1;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  desc = good;
  desc.token_norm = BLOCKEM_TOKEN_NORM_LAYER;
  desc.input_scale = 2;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);

  desc.input_scale = 0;
  desc.center_input = 1;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("center_input"));
  desc = good;
  desc.reserved = 1;
  CHECK_STATUS(blockem_sae_from_tensors(&desc, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);

  /* The k T largest of a batch would make a token's latents depend on the others. */
  desc = good;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_TOPK;
  desc.k = 4;
  desc.selection = BLOCKEM_SELECTION_BATCH;
  if (CHECK_OK(blockem_sae_from_tensors(&desc, &sae))) {
    CHECK_STATUS(blockem_plan_create(sae, latents, NULL, &plan), BLOCKEM_STATUS_UNSUPPORTED);
    CHECK(message_has("dense_relu"));
    options.activation = BLOCKEM_ACTIVATION_DENSE_RELU;
    CHECK_OK(blockem_plan_create(sae, latents, &options, &plan));
    blockem_plan_free(plan);
    blockem_sae_free(sae);
  }
  blockem_latents_free(latents);
  free(bias);
  free(weight);
}

/* ---- 2xx: data ------------------------------------------------------------------------------- */

static const char CONFIG[] =
    "{\"architecture\": \"standard\", \"d_in\": 40, \"d_sae\": 32, \"dtype\": \"float32\","
    " \"apply_b_dec_to_input\": false, \"normalize_activations\": \"none\","
    " \"hook_name\": \"blocks.3.hook_resid_post\"}";

static char *in_scratch(const char *name) { return join_path(scratch, name); }

/* What opening a path answers; the handle, if any, is freed. */
static blockem_status open_sae(const char *path) {
  blockem_sae *sae = NULL;
  blockem_status status = blockem_sae_open(path, NULL, &sae);
  CHECK((sae != NULL) == (status == BLOCKEM_STATUS_OK));
  blockem_sae_free(sae); /* keeps the last error: it is no fallible call */
  return status;
}

static void file_statuses(void) {
  float *weight = random_floats(SMALL_F * SMALL_D, 1), *bias = random_floats(SMALL_F, 2);
  file_tensor tensors[] = {{"W_enc", SMALL_D, SMALL_F, NULL}, {"b_enc", SMALL_F, 0, NULL}};
  char *missing = in_scratch("missing"), *garbage = in_scratch("garbage.safetensors");
  char *bare = in_scratch("bare.safetensors"), *pickle = in_scratch("sae.pt");
  char *zip = in_scratch("zip.pth"), *lacking = in_scratch("lacking.safetensors");
  char *truncated = in_scratch("truncated.safetensors"), *infinite = in_scratch("inf.safetensors");
  char metadata[512];
  blockem_sae *sae = NULL;
  tensors[0].data = weight;
  tensors[1].data = bias;
  snprintf(metadata, sizeof metadata,
           "{\"architecture\": \"standard\", \"d_in\": \"40\", \"d_sae\": \"32\","
           " \"apply_b_dec_to_input\": \"False\", \"normalize_activations\": \"none\"}");

  CHECK_STATUS(open_sae(missing), BLOCKEM_STATUS_IO);
  CHECK(message_has(missing));

  write_text(garbage, "this is not a safetensors file at all, whatever its name says");
  CHECK_STATUS(open_sae(garbage), BLOCKEM_STATUS_FORMAT);
  CHECK(message_has(garbage));
  write_text(truncated, "\x20");
  CHECK_STATUS(open_sae(truncated), BLOCKEM_STATUS_FORMAT);

  write_safetensors(bare, metadata, tensors, 2);
  CHECK_OK(open_sae(bare));
  write_safetensors(lacking, metadata, tensors, 1);
  CHECK_STATUS(open_sae(lacking), BLOCKEM_STATUS_TENSOR_MISSING);
  CHECK(message_has("b_enc"));
  write_safetensors(bare, NULL, tensors, 2);
  CHECK_STATUS(open_sae(bare), BLOCKEM_STATUS_RECIPE_INCOMPLETE);
  CHECK(message_has("architecture"));
  {
    /* The caller may say what the file does not; nonsense is refused. */
    blockem_sae_options options = BLOCKEM_SAE_OPTIONS_INIT;
    options.recipe_json = CONFIG;
    CHECK_OK(blockem_sae_open(bare, &options, &sae));
    blockem_sae_free(sae);
    sae = NULL;
    options.recipe_json = "[1]";
    CHECK_STATUS(blockem_sae_open(bare, &options, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
    options.recipe_json = "{";
    CHECK_STATUS(blockem_sae_open(bare, &options, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
    options.recipe_json = "\xff";
    CHECK_STATUS(blockem_sae_open(bare, &options, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
    options.recipe_json = NULL;
    options.input_scale = -2;
    CHECK_STATUS(blockem_sae_open(bare, &options, &sae), BLOCKEM_STATUS_INVALID_ARGUMENT);
    CHECK(sae == NULL);
  }

  write_file(pickle, "\x80\x02}q\x00(X\x01\x00\x00\x00", 12);
  CHECK_STATUS(open_sae(pickle), BLOCKEM_STATUS_UNSAFE_PICKLE);
  write_file(zip, "PK\x03\x04\x14\x00\x00\x00\x00\x00\x00\x00", 12);
  CHECK_STATUS(open_sae(zip), BLOCKEM_STATUS_FORMAT);

  /* Rows are read when a plan is made, so at the latest there a NaN is found. */
  weight[0] = NAN;
  write_safetensors(infinite, metadata, tensors, 2);
  if (CHECK_OK(blockem_sae_open(infinite, NULL, &sae))) {
    blockem_latents *latents = small_latents();
    blockem_plan *plan = NULL;
    CHECK_STATUS(blockem_plan_create(sae, latents, NULL, &plan), BLOCKEM_STATUS_NON_FINITE);
    CHECK(message_has(infinite) && message_has("W_enc"));
    CHECK(plan == NULL);
    blockem_latents_free(latents);
    blockem_sae_free(sae);
  }

  free(infinite);
  free(truncated);
  free(lacking);
  free(zip);
  free(pickle);
  free(bare);
  free(garbage);
  free(missing);
  free(bias);
  free(weight);
}

static void latents_file_statuses(void) {
  char *saved = in_scratch("K0.json"), *other = in_scratch("other.json");
  char *nowhere = in_scratch("no-such-folder/K0.json");
  blockem_plan *plan = small_plan(BLOCKEM_BACKEND_CPU, 1), *wrong = NULL;
  blockem_latents *latents = small_latents(), *opened = NULL;
  blockem_sae *sae = small_sae(), *stranger = NULL;
  blockem_latents_save_options record = BLOCKEM_LATENTS_SAVE_OPTIONS_INIT;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  float *weight = random_floats(SMALL_F * SMALL_D, 77), *bias = random_floats(SMALL_F, 78);
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;

  CHECK_STATUS(blockem_latents_save(latents, nowhere, NULL), BLOCKEM_STATUS_IO);
  record.sae = sae;
  CHECK_STATUS(blockem_latents_save(latents, saved, &record), BLOCKEM_STATUS_INVALID_ARGUMENT);
  record.sae = NULL;
  record.plan = plan;
  CHECK_OK(blockem_latents_save(latents, saved, &record));
  CHECK_OK(blockem_latents_open(saved, sae, &opened));

  /* Another rule, another SAE of the same size, another size. */
  options.activation = BLOCKEM_ACTIVATION_PREACTIVATION;
  CHECK_STATUS(blockem_plan_create(sae, opened, &options, &wrong),
               BLOCKEM_STATUS_PROVENANCE_MISMATCH);
  desc.encoder_weight = f32_2(weight, SMALL_F, SMALL_D);
  desc.encoder_bias = f32_1(bias, SMALL_F);
  desc.d_in = SMALL_D;
  desc.d_sae = SMALL_F;
  CHECK_OK(blockem_sae_from_tensors(&desc, &stranger));
  CHECK_STATUS(blockem_plan_create(stranger, opened, NULL, &wrong),
               BLOCKEM_STATUS_PROVENANCE_MISMATCH);
  blockem_sae_free(stranger);
  blockem_latents_free(opened);
  opened = NULL;
  stranger = NULL;
  desc.encoder_weight = f32_2(weight, SMALL_F - 1, SMALL_D);
  desc.encoder_bias = f32_1(bias, SMALL_F - 1);
  desc.d_sae = SMALL_F - 1;
  CHECK_OK(blockem_sae_from_tensors(&desc, &stranger));
  CHECK_STATUS(blockem_latents_open(saved, stranger, &opened), BLOCKEM_STATUS_PROVENANCE_MISMATCH);
  record.sae = stranger;
  CHECK_STATUS(blockem_latents_save(latents, other, &record), BLOCKEM_STATUS_INVALID_ARGUMENT);
  blockem_sae_free(stranger);

  CHECK_STATUS(blockem_latents_open(nowhere, sae, &opened), BLOCKEM_STATUS_IO);
  write_text(other, "{\"K_pos\": [1], ");
  CHECK_STATUS(blockem_latents_open(other, sae, &opened), BLOCKEM_STATUS_FORMAT);
  write_text(other, "{\"K_pos\": [1]}");
  CHECK_STATUS(blockem_latents_open(other, sae, &opened), BLOCKEM_STATUS_FORMAT);
  CHECK(message_has("K_neg"));
  write_text(other, "{\"K_pos\": [32], \"K_neg\": []}");
  CHECK_STATUS(blockem_latents_open(other, sae, &opened), BLOCKEM_STATUS_LATENT_RANGE);
  write_text(other, "{\"K_pos\": [3], \"K_neg\": [3]}");
  CHECK_STATUS(blockem_latents_open(other, sae, &opened), BLOCKEM_STATUS_LATENT_DUPLICATE);
  CHECK(opened == NULL);

  free(bias);
  free(weight);
  blockem_sae_free(sae);
  blockem_latents_free(latents);
  blockem_plan_free(plan);
  free(nowhere);
  free(other);
  free(saved);
}

static void cache_statuses(void) {
  enum { T = 2 };
  float *z = random_floats(T * SMALL_K, 4);
  static const uint8_t key[BLOCKEM_CACHE_KEY_SIZE] = {1};
  char *path = join_path(scratch, "status.cache");
  blockem_plan *plan = small_plan(BLOCKEM_BACKEND_CPU, 1);
  blockem_plan *oracle = small_plan(BLOCKEM_BACKEND_REFERENCE, 1);
  blockem_tensor latents = f32_2(z, T, SMALL_K), odd;
  blockem_cache_options options = BLOCKEM_CACHE_OPTIONS_INIT, other;
  blockem_cache *cache = NULL, *refused = NULL;

  options.mode = 3;
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.mode = BLOCKEM_CACHE_MODE_READ;
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_IO);
  CHECK(message_has("status.cache"));
  options.mode = BLOCKEM_CACHE_MODE_CREATE;
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_INVALID_ARGUMENT);
  options.base_model = "base, revision 1";
  options.hidden_dtype = 42;
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_DTYPE);
  options.hidden_dtype = BLOCKEM_DTYPE_F16;
  options.plan = plan;
  options.site = 99;
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("BLOCKEM_SITE_"));
  options.site = BLOCKEM_SITE_UNKNOWN;
  CHECK_OK(blockem_cache_open(path, &options, &cache));
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_CACHE_BUSY);

  CHECK_STATUS(blockem_cache_get(cache, plan, key, &latents, 1), BLOCKEM_STATUS_CACHE_MISS);
  CHECK_OK(blockem_cache_put(cache, plan, key, &latents, 1, NULL));
  CHECK_OK(blockem_cache_get(cache, plan, key, &latents, 1));
  CHECK_STATUS(blockem_cache_get(cache, oracle, key, &latents, 1), BLOCKEM_STATUS_CACHE_STALE);
  CHECK(message_has("reference-1"));
  {
    static const uint8_t absent[BLOCKEM_CACHE_KEY_SIZE] = {2};
    CHECK_STATUS(blockem_cache_get(cache, plan, absent, &latents, 1), BLOCKEM_STATUS_CACHE_MISS);
    CHECK(message_has("example 0 (key 0200") && message_has("status.cache"));
    z[3] = NAN;
    CHECK_STATUS(blockem_cache_put(cache, plan, absent, &latents, 1, NULL),
                 BLOCKEM_STATUS_NON_FINITE);
    z[3] = 0.0f;
  }
  odd = latents;
  odd.dtype = BLOCKEM_DTYPE_F16;
  CHECK_STATUS(blockem_cache_get(cache, plan, key, &odd, 1), BLOCKEM_STATUS_DTYPE);
  odd = latents;
  odd.shape[0] = T + 1;
  CHECK_STATUS(blockem_cache_get(cache, plan, key, &odd, 1), BLOCKEM_STATUS_SHAPE);
  odd = latents;
  odd.device_type = BLOCKEM_DEVICE_CUDA;
  CHECK_STATUS(blockem_cache_put(cache, plan, key, &odd, 1, NULL), BLOCKEM_STATUS_DEVICE_MISMATCH);
  blockem_cache_free(cache);

  other = options;
  other.base_model = "base, revision 2";
  CHECK_STATUS(blockem_cache_open(path, &other, &refused), BLOCKEM_STATUS_CACHE_STALE);
  CHECK(message_has("'base, revision 1'") && message_has("'base, revision 2'"));
  options.mode = BLOCKEM_CACHE_MODE_READ;
  CHECK_OK(blockem_cache_open(path, &options, &cache));
  CHECK_STATUS(blockem_cache_put(cache, plan, key, &latents, 1, NULL),
               BLOCKEM_STATUS_INVALID_ARGUMENT);
  blockem_cache_free(cache);
  write_text(path, "no cache");
  CHECK_STATUS(blockem_cache_open(path, &options, &refused), BLOCKEM_STATUS_FORMAT);
  CHECK(refused == NULL);

  blockem_plan_free(oracle);
  blockem_plan_free(plan);
  free(path);
  free(z);
}

static blockem_status mask_of(const char *text, const blockem_mask_options *options) {
  static const int64_t offsets[] = {0, 1};
  uint8_t mask[1] = {7};
  blockem_status status =
      blockem_mask_from_offsets(text, strlen(text), options, offsets, 1, mask);
  CHECK(mask[0] == (status == BLOCKEM_STATUS_OK ? 1 : 7));
  return status;
}

static void mask_statuses(void) {
  blockem_mask_options options = BLOCKEM_MASK_OPTIONS_INIT;
  options.end_marker = "]";
  CHECK_STATUS(mask_of("[a]", &options), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(message_has("give spans"));
  options.start_marker = "[";
  CHECK_STATUS(mask_of("[a]", &options), BLOCKEM_STATUS_MASK_EMPTY);
  CHECK_STATUS(mask_of("none", &options), BLOCKEM_STATUS_MASK_EMPTY);
  CHECK(message_has("\"[\""));
  CHECK_STATUS(mask_of("[a", &options), BLOCKEM_STATUS_MASK_UNALIGNED);
  CHECK(message_has("byte 0"));
  CHECK_STATUS(mask_of("[a[b]", &options), BLOCKEM_STATUS_MASK_UNALIGNED);
  CHECK(message_has("byte 2"));
  options.start_marker = options.end_marker = NULL;
  {
    static const int64_t span[] = {0, 1};
    options.spans = span;
    options.num_spans = 1;
    CHECK_OK(mask_of("[a]", &options));
  }
}

/* ---- Names and messages ---------------------------------------------------------------------- */

static void names(void) {
  static const struct {
    blockem_status status;
    const char *name;
  } known[] = {
      {BLOCKEM_STATUS_OK, "OK"},
      {BLOCKEM_STATUS_INVALID_ARGUMENT, "INVALID_ARGUMENT"},
      {BLOCKEM_STATUS_NULL_POINTER, "NULL_POINTER"},
      {BLOCKEM_STATUS_STRUCT_SIZE, "STRUCT_SIZE"},
      {BLOCKEM_STATUS_SHAPE, "SHAPE"},
      {BLOCKEM_STATUS_DTYPE, "DTYPE"},
      {BLOCKEM_STATUS_LAYOUT, "LAYOUT"},
      {BLOCKEM_STATUS_DEVICE_MISMATCH, "DEVICE_MISMATCH"},
      {BLOCKEM_STATUS_WORKSPACE_TOO_SMALL, "WORKSPACE_TOO_SMALL"},
      {BLOCKEM_STATUS_LATENT_RANGE, "LATENT_RANGE"},
      {BLOCKEM_STATUS_UNSUPPORTED, "UNSUPPORTED"},
      {BLOCKEM_STATUS_LATENT_DUPLICATE, "LATENT_DUPLICATE"},
      {BLOCKEM_STATUS_OVERLAP, "OVERLAP"},
      {BLOCKEM_STATUS_IO, "IO"},
      {BLOCKEM_STATUS_FORMAT, "FORMAT"},
      {BLOCKEM_STATUS_TENSOR_MISSING, "TENSOR_MISSING"},
      {BLOCKEM_STATUS_RECIPE_INCOMPLETE, "RECIPE_INCOMPLETE"},
      {BLOCKEM_STATUS_UNSAFE_PICKLE, "UNSAFE_PICKLE"},
      {BLOCKEM_STATUS_NON_FINITE, "NON_FINITE"},
      {BLOCKEM_STATUS_CACHE_STALE, "CACHE_STALE"},
      {BLOCKEM_STATUS_MASK_EMPTY, "MASK_EMPTY"},
      {BLOCKEM_STATUS_PROVENANCE_MISMATCH, "PROVENANCE_MISMATCH"},
      {BLOCKEM_STATUS_CACHE_MISS, "CACHE_MISS"},
      {BLOCKEM_STATUS_CACHE_BUSY, "CACHE_BUSY"},
      {BLOCKEM_STATUS_MASK_UNALIGNED, "MASK_UNALIGNED"},
      {BLOCKEM_STATUS_CUDA_UNAVAILABLE, "CUDA_UNAVAILABLE"},
      {BLOCKEM_STATUS_CUDA_DRIVER, "CUDA_DRIVER"},
      {BLOCKEM_STATUS_NO_KERNEL_IMAGE, "NO_KERNEL_IMAGE"},
      {BLOCKEM_STATUS_DRIVER_TOO_OLD, "DRIVER_TOO_OLD"},
      {BLOCKEM_STATUS_OUT_OF_MEMORY, "OUT_OF_MEMORY"},
      {BLOCKEM_STATUS_CAPTURE_UNSAFE, "CAPTURE_UNSAFE"},
      {BLOCKEM_STATUS_FORKED, "FORKED"},
      {BLOCKEM_STATUS_PANIC, "PANIC"},
      {BLOCKEM_STATUS_INTERNAL, "INTERNAL"},
  };
  size_t i;
  for (i = 0; i < sizeof known / sizeof *known; i++) {
    CHECK(strcmp(blockem_status_name(known[i].status), known[i].name) == 0);
    printf("named %d %s\n", (int)known[i].status, blockem_status_name(known[i].status));
  }
  CHECK(strcmp(blockem_status_name(99), "UNKNOWN") == 0);
  CHECK(strcmp(blockem_status_name(-1), "UNKNOWN") == 0);
  CHECK(strcmp(blockem_status_name(INT32_MAX), "UNKNOWN") == 0);
}

static void *other_thread(void *unused) {
  int32_t count;
  (void)unused;
  CHECK(blockem_last_error(NULL, 0) == 0);
  CHECK_STATUS(blockem_device_count(42, &count), BLOCKEM_STATUS_INVALID_ARGUMENT);
  return NULL;
}

static void last_error(void) {
  char whole[512], part[512];
  size_t length;
  int32_t count = 7;
  pthread_t thread;

  CHECK_OK(blockem_device_count(BLOCKEM_DEVICE_CPU, &count));
  CHECK(count == 1);
  CHECK_OK(blockem_device_count(BLOCKEM_DEVICE_CUDA, &count));
  CHECK(count == 0);

  CHECK_STATUS(blockem_device_count(99, &count), BLOCKEM_STATUS_INVALID_ARGUMENT);
  CHECK(count == 0);
  CHECK(message_has("99"));
  length = blockem_last_error(whole, sizeof whole);
  CHECK(length > 8 && strlen(whole) == length);
  CHECK(blockem_last_error(NULL, 0) == length);
  CHECK(blockem_last_error(NULL, 100) == length);

  /* Cut to what fits, ended, and nothing beyond it touched. */
  memset(part, 'x', sizeof part);
  CHECK(blockem_last_error(part, 0) == length);
  CHECK(part[0] == 'x');
  CHECK(blockem_last_error(part, 1) == length);
  CHECK(part[0] == '\0' && part[1] == 'x');
  CHECK(blockem_last_error(part, 6) == length);
  CHECK(strlen(part) == 5 && memcmp(part, whole, 5) == 0 && part[6] == 'x');
  CHECK(blockem_last_error(part, length + 1) == length);
  CHECK(strcmp(part, whole) == 0 && part[length + 1] == 'x');

  /* Each thread has its own. */
  CHECK(pthread_create(&thread, NULL, other_thread, NULL) == 0);
  CHECK(pthread_join(thread, NULL) == 0);
  blockem_last_error(part, sizeof part);
  CHECK(strcmp(part, whole) == 0);

  /* A call that succeeds clears it; status_name is none. */
  blockem_status_name(100);
  CHECK(blockem_last_error(NULL, 0) == length);
  CHECK_OK(blockem_device_count(BLOCKEM_DEVICE_CPU, &count));
  CHECK(blockem_last_error(NULL, 0) == 0);
  blockem_last_error(part, sizeof part);
  CHECK(part[0] == '\0');
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  scratch = argv[1];
  names();
  last_error();
  call_statuses();
  set_statuses();
  tensor_statuses();
  file_statuses();
  latents_file_statuses();
  cache_statuses();
  mask_statuses();
  return finish_checks("statuses");
}
