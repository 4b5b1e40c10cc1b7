// The frozen vectors through blockem.hpp: encode, forward and backward, both in one pass.

#include <blockem.hpp>

#include <cmath>
#include <cstdio>
#include <exception>
#include <vector>

#include "../vectors/vectors.h"

namespace {

int failures = 0;

void compare(const char* name, const char* field, const std::vector<float>& got,
             const double* want, double tolerance) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    const bool equal = std::isnan(want[i]) ? std::isnan(got[i])
                                           : std::fabs(got[i] - want[i]) <= tolerance;
    if (equal) continue;
    std::fprintf(stderr, "%s: %s[%zu] is %.9g, expected %.9g within %.3g\n", name, field, i,
                 static_cast<double>(got[i]), want[i], tolerance);
    ++failures;
    return;
  }
}

void compare(const char* name, const char* field, double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance) return;
  std::fprintf(stderr, "%s: %s is %.17g, expected %.17g\n", name, field, got, want);
  ++failures;
}

blockem::Tensor optional(const float* data, std::int64_t count) {
  return data != nullptr ? blockem::tensor(data, {count}) : blockem::Tensor();
}

blockem::Sae make_sae(const test_vector& v) {
  blockem::SaeDesc desc;
  desc.encoder_weight = blockem::tensor(v.encoder_weight, {v.d_sae, v.d_in});
  desc.encoder_layout = BLOCKEM_ENCODER_LAYOUT_F_D;
  desc.encoder_bias = optional(v.encoder_bias, v.d_sae);
  desc.threshold = optional(v.threshold, v.d_sae);
  desc.gate_bias = optional(v.gate_bias, v.d_sae);
  desc.magnitude_bias = optional(v.magnitude_bias, v.d_sae);
  desc.magnitude_log_scale = optional(v.magnitude_log_scale, v.d_sae);
  desc.decoder_bias = optional(v.decoder_bias, v.d_in);
  if (v.decoder_weight != nullptr) {
    desc.decoder_weight = blockem::tensor(v.decoder_weight, {v.d_sae, v.d_in});
  }
  desc.d_in = v.d_in;
  desc.d_sae = v.d_sae;
  desc.k = v.k;
  desc.activation_kind = v.activation_kind;
  desc.apply_b_dec_to_input = v.apply_b_dec_to_input;
  desc.rescale_acts_by_decoder_norm = v.rescale_acts_by_decoder_norm;
  desc.input_scale = v.input_scale;
  return blockem::Sae::from_tensors(desc);
}

blockem::Plan make_plan(const test_vector& v, std::int32_t backend) {
  const auto count = static_cast<std::size_t>(v.num_latents);
  const std::vector<std::int64_t> ids(v.ids, v.ids + count);
  const std::vector<std::int8_t> signs(v.signs, v.signs + count);
  std::vector<float> weights;
  if (v.weights != nullptr) weights.assign(v.weights, v.weights + count);
  blockem::PlanOptions options;
  options.backend = backend;
  options.activation = v.activation;
  options.num_threads = 1;
  return blockem::Plan(make_sae(v), blockem::Latents::create(ids, signs, weights), options);
}

void run(const test_vector& v, std::int32_t backend) {
  const blockem::Plan plan = make_plan(v, backend);
  const auto tokens = static_cast<std::size_t>(v.tokens);
  std::vector<float> coef(tokens * static_cast<std::size_t>(v.num_latents));
  std::vector<float> grad(tokens * static_cast<std::size_t>(v.d_in)), fused(grad.size());
  std::vector<float> latent_loss(static_cast<std::size_t>(v.num_latents));
  double loss_sum = -1, token_count = -1;

  const auto hidden = blockem::tensor(v.hidden, v.hidden_dtype, {v.tokens, v.d_in});
  compare(v.name, "latents", plan.encode(hidden), v.latents, v.f32.latents);

  const blockem::Workspace workspace = plan.workspace(v.tokens);
  blockem::PenaltyArgs args;
  args.use(workspace);
  args.hidden = hidden;
  args.reference = blockem::tensor(v.reference, {v.tokens, v.num_latents});
  if (v.mask != nullptr) args.mask = blockem::tensor(v.mask, v.mask_dtype, {v.tokens});
  args.coef = blockem::tensor(coef, {v.tokens, v.num_latents});
  args.loss_sum = blockem::tensor(&loss_sum);
  args.token_count = blockem::tensor(&token_count);
  args.latent_loss = blockem::tensor(latent_loss);
  args.grad_hidden = blockem::tensor(grad, {v.tokens, v.d_in});
  args.scale = v.scale;
  plan.forward(args);
  plan.backward(args);
  compare(v.name, "loss_sum", loss_sum, v.loss_sum, v.f32.loss_sum);
  compare(v.name, "token_count", token_count, v.token_count, 0);
  compare(v.name, "latent_loss", latent_loss, v.latent_loss, v.f32.latent_loss);
  compare(v.name, "coef", coef, v.coef, v.f32.coef);
  compare(v.name, "grad_hidden", grad, v.grad_hidden, v.f32.grad_hidden);

  args.grad_hidden = blockem::tensor(fused, {v.tokens, v.d_in});
  plan.penalty(args);
  compare(v.name, "loss_sum in one pass", loss_sum, v.loss_sum, v.f32.loss_sum);
  compare(v.name, "grad_hidden in one pass", fused, v.grad_hidden, v.f32.grad_hidden);
  // The reference backend keeps f64 coefficients within one pass; coef here is f32.
  if (backend == BLOCKEM_BACKEND_CPU && fused != grad) {
    std::fprintf(stderr, "%s: one pass gives another gradient than two\n", v.name);
    ++failures;
  }
}

}  // namespace

int main() {
  try {
    for (const test_vector& v : TEST_VECTORS) {
      run(v, BLOCKEM_BACKEND_CPU);
      run(v, BLOCKEM_BACKEND_REFERENCE);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  if (failures == 0) std::printf("vectors: ok\n");
  return failures == 0 ? 0 : 1;
}
