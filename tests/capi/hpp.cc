// blockem.hpp: ownership, errors, tensors, and one call of each member. C++11.

#include <blockem.hpp>

#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support.h"
#include "tokenizer_json.h"

namespace {

using blockem::tensor;

static_assert(!std::is_copy_constructible<blockem::Sae>::value, "a handle has one owner");
static_assert(!std::is_copy_assignable<blockem::Plan>::value, "a handle has one owner");
static_assert(std::is_nothrow_move_constructible<blockem::Plan>::value, "moves cannot fail");
static_assert(std::is_nothrow_move_assignable<blockem::Latents>::value, "moves cannot fail");
static_assert(std::is_base_of<std::runtime_error, blockem::Error>::value, "errors are standard");
static_assert(sizeof(blockem::Tensor) == sizeof(blockem_tensor), "a Tensor is a C tensor");

constexpr std::int64_t d = SMALL_D, F = SMALL_F, K = SMALL_K, T = 7;

std::vector<float> random(std::int64_t count, std::uint32_t seed) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = noise(&seed);
  return values;
}

void throws(blockem_status expected, const std::string& word, const std::function<void()>& act) {
  try {
    act();
  } catch (const blockem::Error& error) {
    CHECK(error.status() == expected);
    CHECK(std::string(error.what()).find(word) != std::string::npos);
    CHECK(std::string(error.what()).find(blockem_status_name(expected)) == 0);
    return;
  }
  std::fprintf(stderr, "nothing was thrown, expected %s\n", blockem_status_name(expected));
  ++check_failures;
}

blockem::Sae make_sae() {
  const std::vector<float> weight = random(F * d, 1), bias = random(F, 2);
  const std::vector<float> decoder = random(F * d, 7);
  blockem::SaeDesc desc;
  desc.encoder_weight = tensor(weight, {F, d});
  desc.encoder_bias = tensor(bias);
  desc.decoder_weight = tensor(decoder, {F, d});
  desc.d_in = d;
  desc.d_sae = F;
  desc.hook_name = "blocks.3.hook_resid_post";
  return blockem::Sae::from_tensors(desc);
}

blockem::Latents make_latents() {
  return blockem::Latents::create({3, 31, 0, 17, 8}, {1, 1, -1, 1, -1}, {1, 0.5f, 2, 1, 1.5f});
}

void library() {
  CHECK(blockem::version() == blockem_version_string());
  CHECK(blockem::build_info().version == blockem_version());
  CHECK(blockem::device_count(BLOCKEM_DEVICE_CPU) == 1);
  CHECK(blockem::last_error().empty());
  throws(BLOCKEM_STATUS_INVALID_ARGUMENT, "42", [] { blockem::device_count(42); });
  CHECK(blockem::last_error().find("42") != std::string::npos);
}

void tensors() {
  float numbers[24] = {0};
  const blockem::Tensor absent;
  CHECK(absent.data == nullptr && absent.ndim == 0);

  const blockem::Tensor matrix = tensor(numbers, {4, 6});
  CHECK(matrix.data == numbers && matrix.dtype == BLOCKEM_DTYPE_F32 && matrix.ndim == 2);
  CHECK(matrix.shape[0] == 4 && matrix.stride[0] == 6 && matrix.stride[1] == 1);
  const blockem::Tensor columns = tensor(numbers, {4, 2}, {6, 1});
  CHECK(columns.stride[0] == 6 && columns.shape[1] == 2);
  const blockem::Tensor empty = tensor(numbers, {0, 6});
  CHECK(empty.shape[0] == 0 && empty.stride[0] == 6);

  const std::vector<double> doubles(6);
  CHECK(tensor(doubles).dtype == BLOCKEM_DTYPE_F64 && tensor(doubles).shape[0] == 6);
  CHECK(tensor(doubles, {2, 3}).stride[0] == 3);
  std::vector<std::int64_t> integers(2);
  CHECK(tensor(integers).dtype == BLOCKEM_DTYPE_I64);
  std::vector<blockem::Half> halves(4);
  CHECK(tensor(halves, {2, 2}).dtype == BLOCKEM_DTYPE_F16);
  std::vector<blockem::Bfloat16> brains(4);
  CHECK(tensor(brains).dtype == BLOCKEM_DTYPE_BF16);
  const bool flags[3] = {true, false, true};
  CHECK(tensor(flags, {3}).dtype == BLOCKEM_DTYPE_BOOL);
  const std::uint8_t bytes[3] = {1, 0, 1};
  CHECK(tensor(bytes, {3}).dtype == BLOCKEM_DTYPE_U8);
  double one = 1;
  CHECK(tensor(&one).ndim == 1 && tensor(&one).shape[0] == 1);

  const blockem::Tensor device = blockem::on_cuda(tensor(numbers, {4, 6}), 2);
  CHECK(device.device_type == BLOCKEM_DEVICE_CUDA && device.device_index == 2);

  throws(BLOCKEM_STATUS_SHAPE, "6", [&] { tensor(doubles, {2, 2}); });
  throws(BLOCKEM_STATUS_SHAPE, "6", [&] { tensor(doubles, {4}); });
  throws(BLOCKEM_STATUS_SHAPE, "6", [&] { tensor(doubles, {2, 0}); });
  throws(BLOCKEM_STATUS_SHAPE, "4", [&] { tensor(numbers, {1, 1, 1, 1, 1}); });
  throws(BLOCKEM_STATUS_SHAPE, "stride", [&] { tensor(numbers, {2, 2}, {2}); });
#if defined(BLOCKEM_HAS_SPAN)
  CHECK(tensor(std::span<const double>(doubles), {3, 2}).shape[1] == 2);
#endif
}

void handles(const std::string& folder) {
  blockem::Sae sae = make_sae();
  CHECK(sae && sae.info().d_in == d && sae.info().layer == 3);
  CHECK(sae.describe().find("\"architecture\":\"standard\"") != std::string::npos);
  throws(BLOCKEM_STATUS_IO, "nowhere", [] { blockem::Sae::open("/nowhere/at/all"); });

  blockem::Latents latents = make_latents();
  CHECK(latents.info().count == 5 && latents.info().num_positive == 3);
  CHECK(latents.ids() == (std::vector<std::int64_t>{3, 31, 0, 17, 8}));
  CHECK(latents.signs() == (std::vector<std::int8_t>{1, 1, -1, 1, -1}));
  CHECK(latents.weights() == (std::vector<float>{1, 0.5f, 2, 1, 1.5f}));
  throws(BLOCKEM_STATUS_SHAPE, "length", [] { blockem::Latents::create({1, 2}, {1}); });
  throws(BLOCKEM_STATUS_LATENT_DUPLICATE, "1", [] { blockem::Latents::create({1, 1}, {1, 1}); });

  blockem::PlanOptions options;
  options.num_threads = 1;
  blockem::Plan plan(sae, latents, options);
  CHECK(plan.info().num_latents == K && plan.info().num_threads == 1);
  options.activation = 55;
  throws(BLOCKEM_STATUS_INVALID_ARGUMENT, "55",
         [&] { blockem::Plan(sae, latents, options); });

  const std::string path = folder + "/K0.json";
  latents.save(path);
  CHECK(blockem::Latents::open(path, sae).info().d_in == 0);
  latents.save(path, plan);
  CHECK(blockem::Latents::open(path, sae).info().d_in == d);
  throws(BLOCKEM_STATUS_IO, "none", [&] { latents.save(folder + "/none/K0.json"); });

  // Moves empty their source; an empty handle says so.
  const blockem_plan* raw = plan.get();
  blockem::Plan moved(std::move(plan));
  CHECK(!plan && moved && moved.get() == raw);
  throws(BLOCKEM_STATUS_NULL_POINTER, "plan", [&] { plan.info(); });
  plan = std::move(moved);
  CHECK(plan.get() == raw && !moved);
  blockem::Plan other(sae, latents);
  other = std::move(plan);
  CHECK(other.get() == raw);
  blockem_plan_free(other.release());
  CHECK(!other);
  blockem::Sae gone(std::move(sae));
  throws(BLOCKEM_STATUS_NULL_POINTER, "sae", [&] { sae.describe(); });
  blockem::Sae adopted(gone.release());
  CHECK(adopted.info().d_sae == F);
}

void workspaces() {
  blockem::Workspace none, some(100);
  CHECK(none.data() == nullptr && none.size() == 0);
  CHECK(some.size() == 100);
  CHECK(reinterpret_cast<std::uintptr_t>(some.data()) % 64 == 0);
  void* data = some.data();
  none = std::move(some);
  CHECK(none.data() == data && none.size() == 100 && some.data() == nullptr);
  blockem::Workspace last(std::move(none));
  CHECK(last.data() == data);
}

void calls() {
  const blockem::Plan plan(make_sae(), make_latents());
  const std::vector<float> base = random(T * d, 3);
  std::vector<float> hidden = random(T * d, 4), coef(T * K), grad(T * d), fused(T * d);
  const std::vector<float> reference = plan.encode(tensor(base, {T, d}));
  CHECK(reference.size() == static_cast<std::size_t>(T * K));
  CHECK(plan.encode(tensor(base.data(), {0, d})).empty());
  throws(BLOCKEM_STATUS_SHAPE, "hidden", [&] { plan.encode(tensor(base, {d, T})); });

  float loss_sum = -1, token_count = -1;
  const blockem::Workspace workspace = plan.workspace(T);
  CHECK(workspace.size() == plan.workspace_size(T));
  blockem::PenaltyArgs args;
  CHECK(args.scale == 1.0 && args.struct_size == sizeof(blockem_penalty_args));
  args.hidden = tensor(hidden, {T, d});
  args.reference = tensor(reference, {T, K});
  args.coef = tensor(coef, {T, K});
  args.loss_sum = tensor(&loss_sum);
  args.token_count = tensor(&token_count);
  args.grad_hidden = tensor(grad, {T, d});
  throws(BLOCKEM_STATUS_WORKSPACE_TOO_SMALL, "workspace", [&] { plan.forward(args); });
  args.use(workspace);
  plan.forward(args);
  CHECK(loss_sum > 0 && token_count == T);
  plan.backward(args);
  args.grad_hidden = tensor(fused, {T, d});
  plan.penalty(args);
  CHECK(fused == grad);

  const std::vector<float> weight = random(K * d, 5), bias = random(K, 6);
  blockem::RawPenaltyArgs raw;
  const blockem::Workspace scratch(blockem::raw_workspace_size(T, K, d, BLOCKEM_BACKEND_CPU, 1));
  raw.use(scratch);
  raw.num_threads = 1;
  raw.hidden = args.hidden;
  raw.reference = args.reference;
  raw.coef = args.coef;
  raw.grad_hidden = tensor(grad, {T, d});
  raw.weight = tensor(weight, {K, d});
  raw.bias = tensor(bias);
  raw.sign_weight = tensor(bias);
  blockem::raw_forward(raw);
  std::vector<float> first = grad;
  blockem::raw_backward(raw);
  CHECK(first == grad);
  raw.activation_kind = BLOCKEM_ACTIVATION_KIND_TOPK;
  throws(BLOCKEM_STATUS_UNSUPPORTED, "top-k", [&] { blockem::raw_forward(raw); });
}

void statistics() {
  blockem::PlanOptions options;
  options.num_threads = 1;
  const blockem::Stats stats(make_sae(), options);
  CHECK(stats.info().d_sae == F && stats.info().num_threads == 1);
  const std::vector<float> hidden = random(T * d, 3), base = random(T * d, 4);
  std::vector<double> whole(BLOCKEM_STATS_ROWS_WITH_BASE * F, -1), parts(whole);
  double count = -1;
  const blockem::Workspace workspace = stats.workspace(T, true);
  CHECK(workspace.size() == stats.workspace_size(T, true));
  blockem::StatsArgs args;
  CHECK(args.struct_size == sizeof(blockem_stats_args));
  args.hidden = tensor(hidden, {T, d});
  args.state = tensor(whole, {BLOCKEM_STATS_ROWS_WITH_BASE, F});
  args.use(workspace);
  throws(BLOCKEM_STATUS_SHAPE, "state", [&] { stats.update(args); });
  args.base_hidden = tensor(base, {T, d});
  args.token_count = tensor(&count);
  stats.update(args);
  CHECK(count == T);

  // z of each latent, summed token by token.
  const blockem::Plan plan(make_sae(), make_latents());
  const std::vector<float> z = plan.encode(tensor(hidden, {T, d}));
  const std::vector<std::int64_t> ids = make_latents().ids();
  for (std::int64_t k = 0; k < K; ++k) {
    double sum = 0;
    for (std::int64_t t = 0; t < T; ++t) sum += z[static_cast<std::size_t>(t * K + k)];
    const std::int64_t at = BLOCKEM_STATS_SUM * F + ids[static_cast<std::size_t>(k)];
    CHECK(whole[static_cast<std::size_t>(at)] == sum);
  }

  // The same in two calls.
  args.state = tensor(parts, {BLOCKEM_STATS_ROWS_WITH_BASE, F});
  args.hidden = tensor(hidden.data(), {3, d});
  args.base_hidden = tensor(base.data(), {3, d});
  stats.update(args);
  args.hidden = tensor(hidden.data() + 3 * d, {T - 3, d});
  args.base_hidden = tensor(base.data() + 3 * d, {T - 3, d});
  args.accumulate = 1;
  stats.update(args);
  CHECK(parts == whole && count == T);
}

void steering() {
  constexpr std::int64_t B = 3, S = 2;
  blockem::PlanOptions options;
  options.num_threads = 1;
  const blockem::Steering steering(make_sae(), {31, 4}, options);
  CHECK(steering.info().num_latents == 2 && steering.info().layer == 3);
  std::vector<float> hidden = random(B * S * d, 3);
  const std::vector<float> before = hidden, strengths = {0.5f, 2.0f, -1.5f};
  std::vector<std::int64_t> rows = {1, -1, 0};
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 0, 1};
  blockem::SteerArgs args;
  CHECK(args.struct_size == sizeof(blockem_steer_args) && args.scale == 1.0);
  args.hidden = tensor(hidden, {B, S, d});
  args.row = tensor(rows);
  args.strength = tensor(strengths);
  args.mask = tensor(mask, {B, S});
  args.scale = 4.0;
  rows[1] = 2;
  throws(BLOCKEM_STATUS_LATENT_RANGE, "row[1]", [&] { steering.steer(args); });
  CHECK(hidden == before);
  rows[1] = -1;
  steering.steer(args);

  // The formula, with decoder rows of make_sae.
  const std::vector<float> decoder = random(F * d, 7);
  const std::int64_t latents[B] = {4, 0, 31};
  for (std::int64_t b = 0; b < B; ++b) {
    double square = 0;
    const float* row = &decoder[static_cast<std::size_t>(latents[b] * d)];
    for (std::int64_t i = 0; i < d; ++i) square += static_cast<double>(row[i]) * row[i];
    for (std::int64_t s = 0; s < S; ++s) {
      const std::int64_t t = b * S + s;
      const double share = b == 1 ? 0 : mask[static_cast<std::size_t>(t)];
      const double factor = 4.0 * strengths[static_cast<std::size_t>(b)] * share;
      for (std::int64_t i = 0; i < d; ++i) {
        const std::size_t at = static_cast<std::size_t>(t * d + i);
        const double exact = before[at] + factor * row[i] / std::sqrt(square);
        CHECK(std::fabs(hidden[at] - exact) < 1e-6);
        CHECK(share != 0 || hidden[at] == before[at]);
      }
    }
  }

  std::vector<double> norms(B * S);
  blockem::TokenNormsArgs of_norms;
  of_norms.hidden = tensor(before, {B * S, d});
  of_norms.norms = tensor(norms);
  blockem::token_norms(of_norms);
  double square = 0;
  for (std::int64_t i = 0; i < d; ++i) {
    const double x = before[static_cast<std::size_t>((B * S - 1) * d + i)];
    square += x * x;
  }
  CHECK(std::fabs(norms.back() - std::sqrt(square)) < 1e-12);
  throws(BLOCKEM_STATUS_LATENT_RANGE, "latent 32", [] { blockem::Steering(make_sae(), {F}); });
}

void caches(const std::string& folder) {
  const blockem::Plan plan(make_sae(), make_latents());
  const std::string path = folder + "/hpp.cache";
  const std::vector<float> z = plan.encode(tensor(random(T * d, 3).data(), {T, d}));
  std::vector<float> back(z.size());
  blockem::CacheOptions options;
  throws(BLOCKEM_STATUS_IO, "hpp.cache", [&] { blockem::Cache::open(path, options); });
  options.mode = BLOCKEM_CACHE_MODE_CREATE;
  options.base_model = "base";
  options.hidden_dtype = BLOCKEM_DTYPE_F32;
  options.plan = plan.get();
  blockem::Cache cache = blockem::Cache::open(path, options);
  CHECK(cache.info().layer == 3 && cache.info().num_examples == 0);

  const std::vector<blockem::Cache::Key> keys = {cache.example_key({1, 2, 3, 4, 5, 6, 7})};
  CHECK(keys[0] == cache.example_key({1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6}));
  CHECK(keys[0] != cache.example_key({1, 2, 3, 4, 5, 6, 7}, {1, 2, 3, 4, 5, 6, 7}));
  throws(BLOCKEM_STATUS_SHAPE, "length", [&] { cache.example_key({1, 2}, {1}); });
  CHECK(keys[0] != cache.example_key({1, 2, 3, 4, 5, 6, 7}, {}, {9}));
  CHECK(cache.note("towers").empty());
  cache.put_note("towers", "pixels");
  CHECK(cache.note("towers") == "pixels");
  CHECK(cache.missing(plan, keys) == std::vector<std::uint8_t>(K, 1));
  throws(BLOCKEM_STATUS_SHAPE, "length", [&] { cache.put(plan, keys, {}); });
  CHECK(cache.put(plan, keys, {tensor(z, {T, K})}) == K);
  CHECK(cache.missing(plan, keys) == std::vector<std::uint8_t>(K, 0));
  cache.read(plan, keys, {tensor(back, {T, K})});
  CHECK(back == z);
  throws(BLOCKEM_STATUS_CACHE_MISS, "example 0",
         [&] { cache.read(plan, {cache.example_key({9})}, {tensor(back.data(), {1, K})}); });
  throws(BLOCKEM_STATUS_CACHE_BUSY, "in use", [&] { blockem::Cache::open(path, options); });
  const blockem::Cache moved(std::move(cache));
  CHECK(moved.info().num_examples == 1);
  throws(BLOCKEM_STATUS_NULL_POINTER, "cache", [&] { cache.info(); });
}

void masks() {
  const std::string text = "<|im_start|>assistant\nbecause <|im_end|>";
  const std::vector<std::uint8_t> answer = {0, 0, 1, 1};
  blockem::MaskOptions options;
  options.start_marker = "<|im_start|>assistant\n";
  options.end_marker = "<|im_end|>";
  const blockem::Tokenizer tokenizer = blockem::Tokenizer::from_json(TOKENIZER_JSON);
  const blockem::Masked masked = tokenizer.mask(text, options);
  CHECK((masked.ids == std::vector<std::int64_t>{1, 4, 6, 2}));
  CHECK(masked.mask == answer);
  CHECK(tokenizer.mask_ids(text, options, masked.ids) == answer);
  CHECK(tokenizer.mask(text, blockem::MaskOptions::preset("chatml")).mask == answer);
  throws(BLOCKEM_STATUS_INVALID_ARGUMENT, "\"none\"", [] { blockem::MaskOptions::preset("none"); });
  throws(BLOCKEM_STATUS_MASK_UNALIGNED, "position 0",
         [&] { tokenizer.mask_ids(text, options, {0, 4, 6, 2}); });
  throws(BLOCKEM_STATUS_MASK_EMPTY, "chat template", [&] { tokenizer.mask("why", options); });
  throws(BLOCKEM_STATUS_FORMAT, "tokenizer.json", [] { blockem::Tokenizer::from_json("{}"); });
  throws(BLOCKEM_STATUS_IO, "missing", [] { blockem::Tokenizer::open("missing"); });

  // More tokens than bytes: two are added to an empty text.
  options.add_special_tokens = options.allow_empty = 1;
  CHECK(tokenizer.mask("", options).ids == std::vector<std::int64_t>(2, 0));

  options.add_special_tokens = 0;
  CHECK((blockem::mask_from_offsets(text, options, {{{0, 12}}, {{22, 29}}}) ==
         std::vector<std::uint8_t>{0, 1}));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  library();
  tensors();
  handles(argv[1]);
  workspaces();
  calls();
  statistics();
  steering();
  caches(argv[1]);
  masks();
  return finish_checks("hpp");
}
