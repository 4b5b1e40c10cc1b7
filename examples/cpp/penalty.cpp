// The BLOCK-EM penalty from C++: hold latents of a sparse autoencoder where the base model had
// them.
//
//     penalty                    on a small SAE made here
//     penalty SAE [K0.json]      on an SAE of yours (a SAELens folder or a safetensors file), with
//                                the latents of K0.json or with its first four
//
// "Training" is gradient descent on the hidden states themselves: they start where a fine-tuned
// model has drifted to, and the printed penalty falls to nothing. A real trainer adds grad_hidden
// to the gradient that arrives at the layer's output. C++17; build lines in examples/README.md.

#include <blockem.hpp>

#include <cstdio>
#include <exception>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t tokens = 96;
constexpr int steps = 8;

// Uniform in [-1, 1), the same on every machine.
float noise() {
  static std::mt19937 bits(12345);
  return static_cast<float>(bits() >> 8) / 8388608.0f - 1.0f;
}

std::vector<float> noise(std::int64_t count, float size) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = size * noise();
  return values;
}

// An SAE of random rows: z = relu(W . h + b) with W [F, d].
blockem::Sae make_sae() {
  constexpr std::int64_t d_in = 64, d_sae = 256;
  const std::vector<float> weight = noise(d_sae * d_in, 0.25f);
  const std::vector<float> bias = noise(d_sae, 0.1f);
  blockem::SaeDesc desc;
  desc.encoder_weight = blockem::tensor(weight, {d_sae, d_in});
  desc.encoder_bias = blockem::tensor(bias);
  desc.d_in = d_in;
  desc.d_sae = d_sae;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_RELU;
  return blockem::Sae::from_tensors(desc);  // keeps copies
}

// Blocks a rise of latents 0 and 1 and a fall of 2 and 3, or what K0.json says.
blockem::Latents register_latents(const blockem::Sae& sae, const std::optional<std::string>& path) {
  if (path) return blockem::Latents::open(*path, sae);
  return blockem::Latents::create({0, 1, 2, 3}, {1, 1, -1, -1});
}

blockem::Plan make_plan(const std::optional<std::string>& sae_path,
                        const std::optional<std::string>& latents_path) {
  const blockem::Sae sae = sae_path ? blockem::Sae::open(*sae_path) : make_sae();
  const blockem::Latents latents = register_latents(sae, latents_path);
  std::printf("SAE: %s\n", sae.describe().c_str());
  blockem::PlanOptions options;
  // Without the gate a latent that has fallen below its threshold still has a gradient.
  options.activation = BLOCKEM_ACTIVATION_PREACTIVATION;
  return blockem::Plan(sae, latents, options);  // outlives both
}

// Gradient descent on hidden [T, d]; true when the penalty fell.
bool descend(const blockem::Plan& plan, std::vector<float>& hidden,
             const std::vector<float>& reference) {
  const auto info = plan.info();
  std::vector<float> grad(hidden.size());
  double loss_sum = 0, token_count = 0, first = 0;

  const blockem::Workspace workspace = plan.workspace(tokens);
  blockem::PenaltyArgs args;
  args.use(workspace);
  args.hidden = blockem::tensor(hidden, {tokens, info.d_in});
  args.reference = blockem::tensor(reference, {tokens, info.num_latents});
  args.loss_sum = blockem::tensor(&loss_sum);
  args.token_count = blockem::tensor(&token_count);
  args.grad_hidden = blockem::tensor(grad, {tokens, info.d_in});

  for (int step = 0; step <= steps; ++step) {
    plan.penalty(args);
    std::printf("step %d  loss %.6f  (sum %.4f over %.0f tokens)\n", step, loss_sum / token_count,
                loss_sum, token_count);
    if (step == 0) first = loss_sum;
    const double squares = std::inner_product(grad.begin(), grad.end(), grad.begin(), 0.0);
    if (step == steps || squares == 0) break;
    // Polyak's step, loss / |gradient|^2, needs no learning rate.
    const float rate = static_cast<float>(loss_sum / squares);
    for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] -= rate * grad[i];
  }

  if (first == 0) std::printf("nothing to block: no latent moved\n");
  return first > 0 && loss_sum < 0.1 * first;
}

bool run(const std::optional<std::string>& sae_path,
         const std::optional<std::string>& latents_path) {
  const blockem::Plan plan = make_plan(sae_path, latents_path);
  const auto info = plan.info();
  std::printf("plan: d %lld, K %lld, %s\n", static_cast<long long>(info.d_in),
              static_cast<long long>(info.num_latents), info.numerics);

  // The base model's hidden states give the reference, and fine-tuning has moved them.
  std::vector<float> hidden = noise(tokens * info.d_in, 1.0f);
  const std::vector<float> reference = plan.encode(blockem::tensor(hidden, {tokens, info.d_in}));
  for (float& value : hidden) value += 0.5f * noise();
  return descend(plan, hidden, reference);
}

std::optional<std::string> argument(int argc, char** argv, int index) {
  return index < argc ? std::optional<std::string>(argv[index]) : std::nullopt;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::printf("libblockem %s\n", blockem::version().c_str());
    return run(argument(argc, argv, 1), argument(argc, argv, 2)) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
