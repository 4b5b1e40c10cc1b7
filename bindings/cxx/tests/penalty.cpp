// A C++ program on the bridge: argv[1] is an SAE's folder, argv[2] a K0.json that does not exist.
// Prints what tests/program.rs compares.

#include "blockem-cxx/src/lib.rs.h"
#include "rust/cxx.h"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace be = blockem::bridge;

// What a call reads, and what it writes: bytes with a dtype beside them, or numbers.
template <class T>
rust::Slice<const std::uint8_t> bytes(const std::vector<T>& values) {
  return {reinterpret_cast<const std::uint8_t*>(values.data()), values.size() * sizeof(T)};
}

template <class T>
rust::Slice<std::uint8_t> bytes_out(std::vector<T>& values) {
  return {reinterpret_cast<std::uint8_t*>(values.data()), values.size() * sizeof(T)};
}

template <class T>
rust::Slice<const T> numbers(const std::vector<T>& values) {
  return {values.data(), values.size()};
}

template <class T>
rust::Slice<T> numbers_out(std::vector<T>& values) {
  return {values.data(), values.size()};
}

template <class Work>
void refused(Work work) {
  try {
    work();
    std::puts("not refused");
  } catch (const rust::Error& error) {
    std::printf("refused %s\n", error.what());
  }
}

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto sae = be::open_sae(argv[1]);
  const std::vector<std::int64_t> ids{3, 0, 5};
  const std::vector<std::int8_t> signs{1, -1, 1};
  const auto latents = be::make_latents(numbers(ids), numbers(signs), {});
  const auto plan = be::make_plan(*sae, *latents, be::Activation::DenseRelu, 1);
  const std::size_t tokens = 9, d = plan->d_in(), k = plan->num_latents();

  std::vector<float> base(tokens * d), hidden(tokens * d);
  for (std::size_t i = 0; i < base.size(); ++i) {
    base[i] = static_cast<float>(static_cast<int>(i * 37 % 19) - 9) / 8.0f;
    hidden[i] = base[i] + static_cast<float>(static_cast<int>(i * 11 % 7) - 3) / 8.0f;
  }
  std::vector<float> reference(tokens * k), coef(tokens * k), grad(tokens * d), split(tokens * d);
  plan->encode(bytes(base), be::Dtype::F32, numbers_out(reference));
  be::Batch batch{bytes(hidden), be::Dtype::F32, numbers(reference), {}};
  const auto fused = plan->penalty(batch, bytes_out(grad), be::Dtype::F32, 0.5, false);
  const auto forward = plan->forward(batch, numbers_out(coef));
  plan->backward(numbers_out(coef), bytes_out(split), be::Dtype::F32, 0.5, false);
  std::printf("loss %.17g count %.17g\n", fused.sum, fused.count);
  std::printf("split %d\n", fused == forward &&
              std::memcmp(grad.data(), split.data(), grad.size() * sizeof(float)) == 0);
  double size = 0;
  for (float g : grad) size += static_cast<double>(g) * g;
  std::printf("grad %.17g\n", size);

  // These numbers are bf16 already: their upper halves are all of them.
  std::vector<std::uint16_t> narrow(tokens * d), narrow_grad(tokens * d);
  for (std::size_t i = 0; i < narrow.size(); ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &hidden[i], sizeof bits);
    narrow[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  be::Batch half{bytes(narrow), be::Dtype::BF16, numbers(reference), {}};
  const auto wide = plan->penalty(half, bytes_out(narrow_grad), be::Dtype::BF16, 0.5, false);
  std::printf("bf16 %.17g\n", wide.sum);

  std::vector<float> same(tokens * d);
  be::Batch unmoved{bytes(base), be::Dtype::F32, numbers(reference), {}};
  std::printf("unmoved %g\n", plan->penalty(unmoved, bytes_out(same), be::Dtype::F32, 1, false).sum);

  refused([&] { be::open_sae("no-such-folder"); });
  refused([&] { be::open_latents(argv[2], *sae); });
  std::vector<float> few(2);
  refused([&] { plan->encode(bytes(base), be::Dtype::F32, numbers_out(few)); });
  return 0;
}
