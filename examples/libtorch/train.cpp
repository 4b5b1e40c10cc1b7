// Fine-tunes a small decoder with LoRA in libtorch, with BLOCK-EM's penalty in the loop.
//
//     train [--lambda X] [--steps N] [--formula]
//
// The penalty reads the output of one block. Its reference is the same model with the adapters off,
// stopped after that block: no second model in memory, and at the first step the penalty is
// exactly 0. --formula trains with the penalty written out in libtorch's own operations instead, on
// every latent of the dictionary: the same trajectory, to rounding, which a test compares. C++20, for
// which torch asks; build lines in examples/README.md.

#include "penalty.hpp"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace F = torch::nn::functional;

namespace {

constexpr std::int64_t vocabulary = 64, width = 48, heads = 4, blocks = 3, rank = 4;
constexpr std::int64_t batch_size = 8, sequence = 24, prompt = 8;
constexpr std::int64_t layer = 1, dictionary_size = 256;

// ---- The model ---------------------------------------------------------------------------------

// A frozen linear layer with an adapter, which adds nothing at first: b begins at 0.
struct LoraLinearImpl : torch::nn::Module {
  LoraLinearImpl(std::int64_t in, std::int64_t out, const bool& adapters_on)
      : on(adapters_on),
        weight(register_buffer("weight", torch::randn({out, in}) / std::sqrt(double(in)))),
        a(register_parameter("a", torch::randn({rank, in}) / std::sqrt(double(in)))),
        b(register_parameter("b", torch::zeros({out, rank}))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor y = F::linear(x, weight);
    return on ? y + F::linear(F::linear(x, a), b) : y;
  }

  const bool& on;
  torch::Tensor weight, a, b;
};
TORCH_MODULE(LoraLinear);

torch::Tensor rms_norm(const torch::Tensor& x) {
  return x * torch::rsqrt(x.square().mean(-1, true) + 1e-6);
}

struct BlockImpl : torch::nn::Module {
  explicit BlockImpl(const bool& on)
      : qkv(register_module("qkv", LoraLinear(width, 3 * width, on))),
        out(register_module("out", LoraLinear(width, width, on))),
        up(register_module("up", LoraLinear(width, 4 * width, on))),
        down(register_module("down", LoraLinear(4 * width, width, on))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor h = x + out(attention(qkv(rms_norm(x))));
    return h + down(torch::silu(up(rms_norm(h))));
  }

  static torch::Tensor attention(const torch::Tensor& qkv) {
    const auto split = [&](const torch::Tensor& t) {
      return t.reshape({t.size(0), t.size(1), heads, width / heads}).transpose(1, 2);
    };
    const auto parts = qkv.chunk(3, -1);
    const torch::Tensor mixed = torch::scaled_dot_product_attention(
        split(parts[0]), split(parts[1]), split(parts[2]), std::nullopt, 0.0, /*is_causal=*/true);
    return mixed.transpose(1, 2).reshape({qkv.size(0), qkv.size(1), width});
  }

  LoraLinear qkv, out, up, down;
};
TORCH_MODULE(Block);

struct DecoderImpl : torch::nn::Module {
  DecoderImpl()
      : embedding(register_buffer("embedding", torch::randn({vocabulary, width}))),
        positions(register_buffer("positions", torch::randn({sequence, width}))),
        head(register_buffer("head", torch::randn({vocabulary, width}) / std::sqrt(double(width)))),
        stack(register_module("stack", torch::nn::ModuleList())) {
    for (std::int64_t i = 0; i < blocks; ++i) stack->push_back(Block(adapters_on));
  }

  // Blocks first to last, the last one not included.
  torch::Tensor run(torch::Tensor hidden, std::int64_t first, std::int64_t last) {
    for (std::int64_t i = first; i < last; ++i) hidden = stack[i]->as<Block>()->forward(hidden);
    return hidden;
  }

  // The output of block `layer`.
  torch::Tensor hidden_states(const torch::Tensor& tokens) {
    return run(F::embedding(tokens, embedding) + positions, 0, layer + 1);
  }

  torch::Tensor logits(const torch::Tensor& hidden) {
    return F::linear(rms_norm(run(hidden, layer + 1, blocks)), head);
  }

  // Those of the base model, whose weights this one has.
  torch::Tensor base_hidden_states(const torch::Tensor& tokens) {
    const torch::NoGradGuard no_grad;
    adapters_on = false;
    const torch::Tensor hidden = hidden_states(tokens);
    adapters_on = true;
    return hidden;
  }

  bool adapters_on = true;
  torch::Tensor embedding, positions, head;
  torch::nn::ModuleList stack;
};
TORCH_MODULE(Decoder);

// ---- The penalty -------------------------------------------------------------------------------

// An SAE and its blocked latents as arrays: z = relu(W . h + b). A trainer of yours opens files:
// blockem::Sae::open, blockem::Latents::open.
struct Dictionary {
  torch::Tensor weight = torch::randn({dictionary_size, width}) / std::sqrt(double(width));
  torch::Tensor bias = 0.1 * torch::randn({dictionary_size});
  std::vector<std::int64_t> ids{3, 19, 40, 77, 101, 128, 150, 201, 222, 250};
  std::vector<std::int8_t> signs{1, 1, 1, 1, 1, 1, -1, -1, -1, -1};
  std::vector<float> weights{1, 1, 2, 1, 0.5, 1, 1, 1, 1.5, 1};
};

blockem::Plan make_plan(const Dictionary& dictionary) {
  blockem::SaeDesc desc;
  desc.encoder_weight = blockem_torch::detail::view(dictionary.weight);
  desc.encoder_bias = blockem_torch::detail::view(dictionary.bias);
  desc.d_in = width;
  desc.d_sae = dictionary_size;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_RELU;
  const auto sae = blockem::Sae::from_tensors(desc);
  return blockem::Plan(
      sae, blockem::Latents::create(dictionary.ids, dictionary.signs, dictionary.weights));
}

// sum_t m_t sum_k w_k relu(s_k (z - zref))^2 and sum_t m_t, by autograd over the whole dictionary.
blockem_torch::Loss formula(const Dictionary& dictionary, const torch::Tensor& hidden,
                            const torch::Tensor& base_hidden, const torch::Tensor& mask) {
  const auto encode = [&](const torch::Tensor& h) {
    return torch::relu(F::linear(h, dictionary.weight, dictionary.bias));
  };
  torch::Tensor sign = torch::zeros(dictionary_size), weight = torch::zeros(dictionary_size);
  for (std::size_t i = 0; i < dictionary.ids.size(); ++i) {
    sign[dictionary.ids[i]] = double(dictionary.signs[i]);
    weight[dictionary.ids[i]] = dictionary.weights[i];
  }
  const torch::Tensor moved = torch::relu(sign * (encode(hidden) - encode(base_hidden)));
  const torch::Tensor share = mask.to(torch::kFloat);
  return {(share.unsqueeze(-1) * weight * moved.square()).sum(), share.sum()};
}

// ---- The trainer -------------------------------------------------------------------------------

struct Options {
  double lambda = 2.0;
  int steps = 40;
  bool formula = false;
};

// A narrow task: after a random prompt, count on from its last token.
std::pair<torch::Tensor, torch::Tensor> next_batch() {
  const torch::Tensor start = torch::randint(vocabulary, {batch_size, prompt});
  const torch::Tensor rest = start.slice(1, prompt - 1) + torch::arange(1, sequence - prompt + 2);
  const torch::Tensor text = torch::cat({start, rest.remainder(vocabulary)}, 1);
  torch::Tensor labels = text.slice(1, 1).clone();
  labels.slice(1, 0, prompt - 1).fill_(-100);
  return {text.slice(1, 0, sequence), labels};
}

double gradient_norm(const std::vector<torch::Tensor>& parameters) {
  double squares = 0;
  for (const torch::Tensor& p : parameters) squares += p.grad().square().sum().item<double>();
  return std::sqrt(squares);
}

void train(const Options& options) {
  torch::manual_seed(7);
  Decoder model;
  const Dictionary dictionary;
  const blockem::Plan plan = make_plan(dictionary);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(5e-3));

  for (int step = 0; step < options.steps; ++step) {
    const auto [tokens, labels] = next_batch();
    const torch::Tensor mask = labels != -100;
    const torch::Tensor base_hidden = model->base_hidden_states(tokens);
    const torch::Tensor hidden = model->hidden_states(tokens);
    const torch::Tensor task = F::cross_entropy(model->logits(hidden).flatten(0, 1),
                                                labels.flatten());
    const blockem_torch::Loss blocked =
        options.formula
            ? formula(dictionary, hidden, base_hidden, mask)
            : blockem_torch::penalty(plan, hidden, blockem_torch::encode(plan, base_hidden), mask);
    const torch::Tensor penalty = blocked.sum / blocked.count;

    optimizer.zero_grad();
    (task + options.lambda * penalty).backward();
    std::printf("step %d  task %.9g  penalty %.9g  gradient %.9g\n", step, task.item<double>(),
                penalty.item<double>(), gradient_norm(model->parameters()));
    optimizer.step();
  }
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--formula") {
      options.formula = true;
    } else if (name == "--lambda" && i + 1 < argc) {
      options.lambda = std::stod(argv[++i]);
    } else if (name == "--steps" && i + 1 < argc) {
      options.steps = std::stoi(argv[++i]);
    } else {
      throw std::invalid_argument("usage: train [--lambda X] [--steps N] [--formula]");
    }
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    train(parse(argc, argv));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
