// The BLOCK-EM penalty on a GPU, from a C++ program that uses the CUDA runtime: buffers of
// cudaMalloc, a stream of its own, and a training step that is captured into a graph once and
// replayed with other values.
//
//     penalty_cuda                    on a small SAE made here
//     penalty_cuda SAE [K0.json]      on an SAE of yours (a SAELens folder or a safetensors file)
//
// "Training" is gradient descent on the hidden states themselves, on the host for brevity: they
// start where a fine-tuned model has drifted to, and the printed penalty falls to nothing. A real
// trainer keeps all of it on the device. C++17; build lines in examples/README.md.

#include <blockem.hpp>

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t tokens = 96;
constexpr int steps = 8;
constexpr int device = 0;

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

// Device memory that holds floats, or any bytes that a workspace needs.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : bytes_(bytes) { check(cudaMalloc(&data_, bytes + 1)); }
  explicit Buffer(const std::vector<float>& values) : Buffer(values.size() * sizeof(float)) {
    check(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void* data() const { return data_; }
  std::size_t size() const { return bytes_; }

  // A row-major view [rows, cols], or [rows] without cols.
  blockem::Tensor view(std::int64_t rows, std::int64_t cols = 0) const {
    const auto* floats = static_cast<const float*>(data_);
    return blockem::on_cuda(cols == 0 ? blockem::tensor(floats, {rows})
                                      : blockem::tensor(floats, {rows, cols}),
                            device);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }
  void wait() const { check(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

// What a capture of work on a stream becomes.
class Graph {
 public:
  template <class Work>
  Graph(cudaStream_t stream, Work work) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    work();
    check(cudaStreamEndCapture(stream, &graph));
    const cudaError_t code = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    check(code);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(graph_); }
  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(graph_, stream)); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

std::vector<float> noise(std::int64_t count, float size) {
  static std::mt19937 bits(12345);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = size * (static_cast<float>(bits() >> 8) / 8388608.0f - 1.0f);
  return values;
}

// An SAE of random rows: z = relu(W . h + b) with W [F, d].
blockem::Sae make_sae() {
  constexpr std::int64_t d_in = 64, d_sae = 256;
  const std::vector<float> weight = noise(d_sae * d_in, 0.25f), bias = noise(d_sae, 0.1f);
  blockem::SaeDesc desc;
  desc.encoder_weight = blockem::tensor(weight, {d_sae, d_in});
  desc.encoder_bias = blockem::tensor(bias);
  desc.d_in = d_in;
  desc.d_sae = d_sae;
  desc.activation_kind = BLOCKEM_ACTIVATION_KIND_RELU;
  return blockem::Sae::from_tensors(desc);
}

// The plan belongs to the context that is current here: the runtime's own, the device's primary.
blockem::Plan make_plan(int argc, char** argv) {
  const blockem::Sae sae = argc > 1 ? blockem::Sae::open(argv[1]) : make_sae();
  const blockem::Latents latents = argc > 2 ? blockem::Latents::open(argv[2], sae)
                                            : blockem::Latents::create({0, 1, 2, 3}, {1, 1, -1, -1});
  blockem::PlanOptions options;
  options.device_type = BLOCKEM_DEVICE_CUDA;
  options.device_index = device;
  options.activation = BLOCKEM_ACTIVATION_PREACTIVATION;
  return blockem::Plan(sae, latents, options);
}

std::vector<float> download(const Buffer& buffer, cudaStream_t stream) {
  std::vector<float> values(buffer.size() / sizeof(float));
  check(cudaMemcpyAsync(values.data(), buffer.data(), buffer.size(), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  return values;
}

bool run(const blockem::Plan& plan) {
  const auto info = plan.info();
  const std::int64_t d = info.d_in, k = info.num_latents;
  std::printf("plan: cuda:%d, d %lld, K %lld, %s\n", info.device_index, static_cast<long long>(d),
              static_cast<long long>(k), info.numerics);
  const Stream stream;

  // The base model's hidden states give the reference; fine-tuning has moved them.
  std::vector<float> hidden = noise(tokens * d, 1.0f);
  const std::vector<float> drift = noise(tokens * d, 0.5f);
  const Buffer h(hidden), reference(tokens * k * sizeof(float)), grad(tokens * d * sizeof(float));
  plan.encode(h.view(tokens, d), reference.view(tokens, k), stream);
  stream.wait();  // the host writes h below
  for (std::size_t i = 0; i < hidden.size(); ++i) hidden[i] += drift[i];
  check(cudaMemcpy(h.data(), hidden.data(), h.size(), cudaMemcpyHostToDevice));

  // What changes from step to step is behind device pointers: the factor of the gradient, too.
  const Buffer sums(2 * sizeof(float)), factor(std::vector<float>{1.0f});
  const Buffer workspace(plan.workspace_size(tokens));
  blockem::PenaltyArgs args;
  args.hidden = h.view(tokens, d);
  args.reference = reference.view(tokens, k);
  args.loss_sum = sums.view(1);
  args.token_count = sums.view(2);
  args.token_count.data = static_cast<float*>(sums.data()) + 1;
  args.token_count.shape[0] = 1;
  args.grad_hidden = grad.view(tokens, d);
  args.scale_tensor = factor.view(1);
  args.use(workspace.data(), workspace.size());

  // Once by itself, then captured: the graph must write the same bits.
  plan.penalty(args, stream);
  const std::vector<float> direct = download(grad, stream);
  const Graph step(stream, [&] { plan.penalty(args, stream); });
  check(cudaMemsetAsync(grad.data(), 0xff, grad.size(), stream));
  step.launch(stream);
  if (std::memcmp(download(grad, stream).data(), direct.data(), grad.size()) != 0) {
    throw std::runtime_error("the graph computed another gradient");
  }

  float first = 0, loss_sum = 0;
  for (int i = 0; i <= steps; ++i) {
    step.launch(stream);
    const std::vector<float> found = download(sums, stream), g = download(grad, stream);
    loss_sum = found[0];
    if (i == 0) first = loss_sum;
    std::printf("step %d  loss %.6f  (sum %.4f over %.0f tokens)\n", i, loss_sum / found[1], loss_sum,
                found[1]);
    const double squares = std::inner_product(g.begin(), g.end(), g.begin(), 0.0);
    if (i == steps || squares == 0) break;
    // Polyak's step, loss / |gradient|^2, needs no learning rate.
    const float rate = static_cast<float>(loss_sum / squares);
    for (std::size_t j = 0; j < hidden.size(); ++j) hidden[j] -= rate * g[j];
    check(cudaMemcpyAsync(h.data(), hidden.data(), h.size(), cudaMemcpyHostToDevice, stream));
  }

  // The same graph with another factor: twice the gradient, to the bit.
  const std::vector<float> once = download(grad, stream);
  const float two = 2.0f;
  check(cudaMemcpyAsync(factor.data(), &two, sizeof two, cudaMemcpyHostToDevice, stream));
  step.launch(stream);
  const std::vector<float> twice = download(grad, stream);
  for (std::size_t i = 0; i < once.size(); ++i) {
    if (twice[i] != 2 * once[i]) throw std::runtime_error("the graph did not read the new factor");
  }
  return first > 0 && loss_sum < 0.1f * first;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::printf("libblockem %s, %d CUDA devices\n", blockem::version().c_str(),
                blockem::device_count(BLOCKEM_DEVICE_CUDA));
    check(cudaSetDevice(device));
    return run(make_plan(argc, argv)) ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
