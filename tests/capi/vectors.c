/*
 * The frozen vectors through the C ABI: CPU and reference backends; encode, forward, backward, both
 * in one pass, and handle-free.
 */

#include "support.h"

#include "../vectors/vectors.h"

/* ---- Numbers --------------------------------------------------------------------------------- */

static double half_value(uint16_t bits) {
  int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? (double)NAN : sign * (double)INFINITY;
  if (exponent == 0) return sign * ldexp(fraction, -24);
  return sign * ldexp(1024 + fraction, exponent - 25);
}

static double bfloat16_value(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

static double element(const void *data, int32_t dtype, size_t i) {
  switch (dtype) {
    case BLOCKEM_DTYPE_F16:
      return half_value(((const uint16_t *)data)[i]);
    case BLOCKEM_DTYPE_BF16:
      return bfloat16_value(((const uint16_t *)data)[i]);
    case BLOCKEM_DTYPE_F64:
      return ((const double *)data)[i];
    default:
      return ((const float *)data)[i];
  }
}

/* Which case and call a comparison belongs to. */
static const char *place_case, *place_call;

/* |got - want| <= tolerance + relative |want|, NaN where NaN is wanted. */
static void compare(const char *field, const void *got, int32_t dtype, const double *want,
                    size_t count, double tolerance, double relative) {
  size_t i, bad = 0;
  for (i = 0; i < count; i++) {
    double g = element(got, dtype, i), w = want[i];
    int equal = isnan(w) ? isnan(g) : fabs(g - w) <= tolerance + relative * fabs(w);
    if (!equal && bad++ < 3) {
      fprintf(stderr, "%s, %s: %s[%zu] is %.9g, expected %.9g within %.3g\n", place_case,
              place_call, field, i, g, w, tolerance + relative * fabs(w));
    }
  }
  if (bad > 0) check_failures++;
}

/* ---- One case -------------------------------------------------------------------------------- */

static blockem_tensor rows_of(const void *data, int32_t dtype, const test_vector *v) {
  return tensor2(data, dtype, v->tokens, v->d_in);
}

static blockem_tensor optional1(const float *data, int64_t n) {
  blockem_tensor absent = BLOCKEM_TENSOR_INIT;
  return data != NULL ? f32_1(data, n) : absent;
}

static blockem_sae *make_sae(const test_vector *v) {
  blockem_sae_desc desc = BLOCKEM_SAE_DESC_INIT;
  blockem_sae *sae = NULL;
  desc.encoder_weight = f32_2(v->encoder_weight, v->d_sae, v->d_in);
  desc.encoder_layout = BLOCKEM_ENCODER_LAYOUT_F_D;
  desc.encoder_bias = optional1(v->encoder_bias, v->d_sae);
  desc.threshold = optional1(v->threshold, v->d_sae);
  desc.gate_bias = optional1(v->gate_bias, v->d_sae);
  desc.magnitude_bias = optional1(v->magnitude_bias, v->d_sae);
  desc.magnitude_log_scale = optional1(v->magnitude_log_scale, v->d_sae);
  desc.decoder_bias = optional1(v->decoder_bias, v->d_in);
  if (v->decoder_weight != NULL) {
    desc.decoder_weight = f32_2(v->decoder_weight, v->d_sae, v->d_in);
  }
  desc.d_in = v->d_in;
  desc.d_sae = v->d_sae;
  desc.k = v->k;
  desc.activation_kind = v->activation_kind;
  desc.apply_b_dec_to_input = v->apply_b_dec_to_input;
  desc.rescale_acts_by_decoder_norm = v->rescale_acts_by_decoder_norm;
  desc.input_scale = v->input_scale;
  CHECK_OK(blockem_sae_from_tensors(&desc, &sae));
  return sae;
}

static blockem_plan *make_plan(const test_vector *v, int32_t backend, int32_t num_threads) {
  blockem_sae *sae = make_sae(v);
  blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
  blockem_latents *latents = NULL;
  blockem_plan_options options = BLOCKEM_PLAN_OPTIONS_INIT;
  blockem_plan *plan = NULL;
  desc.ids = v->ids;
  desc.signs = v->signs;
  desc.weights = v->weights;
  desc.n = (size_t)v->num_latents;
  CHECK_OK(blockem_latents_create(&desc, &latents));
  options.backend = backend;
  options.activation = v->activation;
  options.num_threads = num_threads;
  CHECK_OK(blockem_plan_create(sae, latents, &options, &plan));
  blockem_latents_free(latents);
  blockem_sae_free(sae);
  return plan;
}

/* Outputs of one call, of the widest type that the backend writes. */
typedef struct {
  int32_t dtype;
  double loss_sum, token_count, *latent_loss;
  void *coef, *grad;
} outputs;

static outputs new_outputs(const test_vector *v, int32_t dtype) {
  size_t tk = (size_t)(v->tokens * v->num_latents), td = (size_t)(v->tokens * v->d_in);
  outputs out = {0, -1.0, -1.0, NULL, NULL, NULL};
  out.dtype = dtype;
  out.latent_loss = (double *)allocate((size_t)v->num_latents * sizeof(double));
  out.coef = allocate(tk * sizeof(double));
  out.grad = allocate(td * sizeof(double));
  return out;
}

static void free_outputs(outputs *out) {
  free(out->grad);
  free(out->coef);
  free(out->latent_loss);
}

static void set_args(const test_vector *v, const void *hidden, int32_t hidden_dtype,
                     const outputs *out, blockem_penalty_args *args) {
  args->hidden = rows_of(hidden, hidden_dtype, v);
  args->reference = f32_2(v->reference, v->tokens, v->num_latents);
  if (v->mask != NULL) args->mask = tensor1(v->mask, v->mask_dtype, v->tokens);
  args->coef = tensor2(out->coef, out->dtype, v->tokens, v->num_latents);
  args->loss_sum = f64_1(&out->loss_sum, 1);
  args->token_count = f64_1(&out->token_count, 1);
  args->latent_loss = f64_1(out->latent_loss, v->num_latents);
  args->grad_hidden = rows_of(out->grad, out->dtype, v);
  args->scale = v->scale;
}

static void compare_outputs(const test_vector *v, const outputs *out,
                            const vector_tolerance *tolerance) {
  size_t k = (size_t)v->num_latents, t = (size_t)v->tokens, d = (size_t)v->d_in;
  compare("loss_sum", &out->loss_sum, BLOCKEM_DTYPE_F64, &v->loss_sum, 1, tolerance->loss_sum, 0);
  compare("token_count", &out->token_count, BLOCKEM_DTYPE_F64, &v->token_count, 1, 0, 0);
  compare("latent_loss", out->latent_loss, BLOCKEM_DTYPE_F64, v->latent_loss, k,
          tolerance->latent_loss, 0);
  compare("coef", out->coef, out->dtype, v->coef, t * k, tolerance->coef, 0);
  compare("grad_hidden", out->grad, out->dtype, v->grad_hidden, t * d, tolerance->grad_hidden, 0);
}

/* ---- Calls on a plan ------------------------------------------------------------------------- */

static void encode_case(const test_vector *v, const blockem_plan *plan, const void *hidden,
                        int32_t hidden_dtype, int32_t out_dtype,
                        const vector_tolerance *tolerance) {
  size_t count = (size_t)(v->tokens * v->num_latents), i;
  double *reference = (double *)allocate(count * sizeof(double));
  void *latents = allocate(count * sizeof(double));
  blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
  for (i = 0; i < count; i++) reference[i] = v->reference[i];
  args.latents = tensor2(latents, out_dtype, v->tokens, v->num_latents);

  place_call = "encode";
  args.hidden = rows_of(hidden, hidden_dtype, v);
  CHECK_OK(blockem_encode(plan, &args, NULL));
  compare("latents", latents, out_dtype, v->latents, count, tolerance->latents, 0);
  args.hidden = rows_of(v->base_hidden, v->hidden_dtype, v);
  CHECK_OK(blockem_encode(plan, &args, NULL));
  compare("reference", latents, out_dtype, reference, count, tolerance->latents, 6e-8);

  free(latents);
  free(reference);
}

/* Forward then backward, both in one pass, and accumulating: one set of numbers. */
static void penalty_case(const test_vector *v, const blockem_plan *plan, const void *hidden,
                         int32_t hidden_dtype, int32_t out_dtype,
                         const vector_tolerance *tolerance) {
  size_t elements = (size_t)(v->tokens * v->d_in), i, doubled = 0;
  size_t bytes = elements * (out_dtype == BLOCKEM_DTYPE_F64 ? 8 : 4);
  outputs two = new_outputs(v, out_dtype), one = new_outputs(v, out_dtype);
  blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
  size_t workspace_size = 0;
  void *block;

  CHECK_OK(blockem_plan_workspace_size(plan, v->tokens, &workspace_size));
  args.workspace = aligned64(workspace_size, &block);
  args.workspace_size = workspace_size;

  set_args(v, hidden, hidden_dtype, &two, &args);
  place_call = "forward, backward";
  CHECK_OK(blockem_penalty_forward(plan, &args, NULL));
  CHECK_OK(blockem_penalty_backward(plan, &args, NULL));
  compare_outputs(v, &two, tolerance);

  set_args(v, hidden, hidden_dtype, &one, &args);
  place_call = "penalty";
  CHECK_OK(blockem_penalty(plan, &args, NULL));
  compare_outputs(v, &one, tolerance);
  CHECK(memcmp(&one.loss_sum, &two.loss_sum, 8) == 0);
  CHECK(memcmp(one.grad, two.grad, bytes) == 0);

  place_call = "penalty, accumulate";
  args.accumulate = 1;
  CHECK_OK(blockem_penalty(plan, &args, NULL));
  for (i = 0; i < elements; i++) {
    doubled += element(one.grad, out_dtype, i) == 2 * element(two.grad, out_dtype, i);
  }
  CHECK(doubled == elements);

  free(block);
  free_outputs(&one);
  free_outputs(&two);
}

/* The gradient in hidden's own dtype, with the scale on the device. */
static void own_dtype_case(const test_vector *v, const blockem_plan *plan) {
  size_t elements = (size_t)(v->tokens * v->d_in), workspace_size = 0;
  void *grad = allocate(elements * 4), *block;
  float scale = (float)v->scale;
  blockem_penalty_args args = BLOCKEM_PENALTY_ARGS_INIT;
  CHECK_OK(blockem_plan_workspace_size(plan, v->tokens, &workspace_size));
  args.workspace = aligned64(workspace_size, &block);
  args.workspace_size = workspace_size;
  args.hidden = rows_of(v->hidden, v->hidden_dtype, v);
  args.reference = f32_2(v->reference, v->tokens, v->num_latents);
  if (v->mask != NULL) args.mask = tensor1(v->mask, v->mask_dtype, v->tokens);
  args.grad_hidden = rows_of(grad, v->hidden_dtype, v);
  args.scale_tensor = f32_1(&scale, 1);
  place_call = "penalty, hidden's dtype";
  CHECK_OK(blockem_penalty(plan, &args, NULL));
  compare("grad_hidden", grad, v->hidden_dtype, v->grad_hidden, elements, v->f32.grad_hidden,
          v->rounding);
  free(block);
  free(grad);
}

/* ---- Handle-free ----------------------------------------------------------------------------- */

/* The rows of a case as a raw call takes them: folded in f64, rounded once. */
typedef struct {
  float *weight, *bias, *threshold, *gate_bias, *gate_scale, *sign_weight;
} raw_rows;

static raw_rows fold(const test_vector *v) {
  size_t k, i, K = (size_t)v->num_latents, d = (size_t)v->d_in;
  raw_rows rows = {floats(K * d), floats(K), floats(K), floats(K), floats(K), floats(K)};
  for (k = 0; k < K; k++) {
    size_t id = (size_t)v->ids[k];
    const float *row = v->encoder_weight + id * d;
    double norm = 1, bias = v->gate_bias != NULL ? v->magnitude_bias[id] : v->encoder_bias[id];
    if (v->rescale_acts_by_decoder_norm) {
      norm = 0;
      for (i = 0; i < d; i++) norm += pow(v->decoder_weight[id * d + i], 2);
      norm = sqrt(norm);
    }
    for (i = 0; i < d; i++) {
      if (v->apply_b_dec_to_input) bias -= (double)row[i] * v->decoder_bias[i];
      rows.weight[k * d + i] = (float)(norm * v->input_scale * row[i]);
    }
    rows.bias[k] = (float)(norm * bias);
    rows.threshold[k] = v->threshold != NULL ? v->threshold[id] : 0;
    rows.gate_bias[k] = v->gate_bias != NULL ? v->gate_bias[id] : 0;
    rows.gate_scale[k] =
        v->magnitude_log_scale != NULL ? (float)exp(v->magnitude_log_scale[id]) : 1;
    rows.sign_weight[k] = (float)v->signs[k] * (v->weights != NULL ? v->weights[k] : 1);
  }
  return rows;
}

static void free_rows(raw_rows *rows) {
  free(rows->weight);
  free(rows->bias);
  free(rows->threshold);
  free(rows->gate_bias);
  free(rows->gate_scale);
  free(rows->sign_weight);
}

static void set_rows(const test_vector *v, const raw_rows *rows, blockem_raw_penalty_args *args) {
  int64_t k = v->num_latents;
  args->weight = f32_2(rows->weight, k, v->d_in);
  args->bias = f32_1(rows->bias, k);
  args->sign_weight = f32_1(rows->sign_weight, k);
  if (v->gate_bias != NULL) args->gate_scale = f32_1(rows->gate_scale, k);
  if (v->activation == BLOCKEM_ACTIVATION_PREACTIVATION) {
    args->activation_kind = BLOCKEM_ACTIVATION_KIND_PREACTIVATION;
  } else if (v->activation == BLOCKEM_ACTIVATION_DENSE_RELU) {
    args->activation_kind = BLOCKEM_ACTIVATION_KIND_RELU;
  } else {
    args->activation_kind = v->activation_kind;
    if (v->threshold != NULL) args->threshold = f32_1(rows->threshold, k);
    if (v->gate_bias != NULL) args->gate_bias = f32_1(rows->gate_bias, k);
  }
}

/* The two structs begin with the same fields; copied by name as a caller would. */
static void set_common(const blockem_penalty_args *from, blockem_raw_penalty_args *to) {
  to->hidden = from->hidden;
  to->reference = from->reference;
  to->mask = from->mask;
  to->coef = from->coef;
  to->loss_sum = from->loss_sum;
  to->token_count = from->token_count;
  to->latent_loss = from->latent_loss;
  to->grad_hidden = from->grad_hidden;
  to->scale = from->scale;
}

static void raw_case(const test_vector *v, const void *hidden, int32_t hidden_dtype,
                     int32_t out_dtype, int32_t backend, const vector_tolerance *tolerance) {
  raw_rows rows = fold(v);
  outputs out = new_outputs(v, out_dtype);
  blockem_penalty_args plain = BLOCKEM_PENALTY_ARGS_INIT;
  blockem_raw_penalty_args args = BLOCKEM_RAW_PENALTY_ARGS_INIT;
  blockem_tensor absent = BLOCKEM_TENSOR_INIT, grad;
  size_t workspace_size = 0;
  void *block;
  set_args(v, hidden, hidden_dtype, &out, &plain);
  set_common(&plain, &args);
  set_rows(v, &rows, &args);
  args.backend = backend;
  args.num_threads = 1;

  place_call = "raw forward with gradient, own workspace";
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  compare_outputs(v, &out, tolerance);

  place_call = "raw forward, backward";
  CHECK_OK(blockem_raw_penalty_workspace_size(v->tokens, v->num_latents, v->d_in, backend, 1,
                                              &workspace_size));
  args.workspace = aligned64(workspace_size, &block);
  args.workspace_size = workspace_size;
  grad = args.grad_hidden;
  args.grad_hidden = absent;
  memset(out.coef, 0xa5, (size_t)(v->tokens * v->num_latents) * 8);
  memset(out.grad, 0xa5, (size_t)(v->tokens * v->d_in) * 8);
  CHECK_OK(blockem_raw_penalty_forward(&args, NULL));
  args.grad_hidden = grad;
  CHECK_OK(blockem_raw_penalty_backward(&args, NULL));
  compare_outputs(v, &out, tolerance);

  free(block);
  free_outputs(&out);
  free_rows(&rows);
}

/* ---- All of them ----------------------------------------------------------------------------- */

static void cpu_case(const test_vector *v, int32_t num_threads) {
  blockem_plan *plan = make_plan(v, BLOCKEM_BACKEND_CPU, num_threads);
  if (plan == NULL) return;
  encode_case(v, plan, v->hidden, v->hidden_dtype, BLOCKEM_DTYPE_F32, &v->f32);
  penalty_case(v, plan, v->hidden, v->hidden_dtype, BLOCKEM_DTYPE_F32, &v->f32);
  own_dtype_case(v, plan);
  raw_case(v, v->hidden, v->hidden_dtype, BLOCKEM_DTYPE_F32, BLOCKEM_BACKEND_CPU, &v->f32);
  blockem_plan_free(plan);
}

/* The oracle takes hidden in f64 and answers in f64. */
static void reference_case(const test_vector *v) {
  size_t count = (size_t)(v->tokens * v->d_in), i;
  double *hidden = (double *)allocate(count * sizeof(double));
  blockem_plan *plan = make_plan(v, BLOCKEM_BACKEND_REFERENCE, 1);
  if (plan == NULL) exit(1);
  for (i = 0; i < count; i++) hidden[i] = element(v->hidden, v->hidden_dtype, i);
  encode_case(v, plan, hidden, BLOCKEM_DTYPE_F64, BLOCKEM_DTYPE_F64, &v->f64);
  penalty_case(v, plan, hidden, BLOCKEM_DTYPE_F64, BLOCKEM_DTYPE_F64, &v->f64);
  raw_case(v, hidden, BLOCKEM_DTYPE_F64, BLOCKEM_DTYPE_F64, BLOCKEM_BACKEND_REFERENCE, &v->f64);
  blockem_plan_free(plan);
  free(hidden);
}

int main(void) {
  int i;
  for (i = 0; i < TEST_VECTOR_COUNT; i++) {
    const test_vector *v = &TEST_VECTORS[i];
    char name[128];
    snprintf(name, sizeof name, "%s, cpu", v->name);
    place_case = name;
    cpu_case(v, 1);
    cpu_case(v, 2);
    snprintf(name, sizeof name, "%s, reference", v->name);
    reference_case(v);
  }
  printf("%d vectors\n", (int)TEST_VECTOR_COUNT);
  return finish_checks("vectors");
}
