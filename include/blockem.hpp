/*
 * libblockem for C++: header-only RAII over blockem.h. C++11 and later.
 *
 *     blockem::Sae sae = blockem::Sae::open("my_sae");
 *     blockem::Latents latents = blockem::Latents::open("K0.json", sae);
 *     blockem::Plan plan(sae, latents);
 *
 *     plan.encode(blockem::tensor(base_hidden, {T, d}), blockem::tensor(reference, {T, K}));
 *
 *     blockem::Workspace workspace = plan.workspace(T);
 *     blockem::PenaltyArgs args;
 *     args.hidden = blockem::tensor(hidden, {T, d});
 *     args.reference = blockem::tensor(reference, {T, K});
 *     args.loss_sum = blockem::tensor(&loss_sum);
 *     args.grad_hidden = blockem::tensor(grad, {T, d});
 *     args.scale = lambda / T;
 *     args.use(workspace);
 *     plan.penalty(args);
 *
 * Shapes, dtypes and formulas are those of blockem.h. T tokens, d columns of hidden, K latents.
 * Ownership: Sae, Latents, Plan, Stats, Steering, Cache and Tokenizer own their handle and are move-only;
 *   a Plan outlives the Sae and the Latents that it was made from. Tensors are views: the caller owns their
 *   memory.
 * Threads: handles are immutable, so const members may be called from any number of threads at
 *   once; calls that run at the same time need their own outputs and their own Workspace.
 * Errors: every failure throws blockem::Error with the status and the library's message. A moved-
 *   from handle is empty; using it throws NULL_POINTER.
 */

#ifndef BLOCKEM_HPP
#define BLOCKEM_HPP

#include "blockem.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_include)
#if __cplusplus >= 202002L && __has_include(<span>)
#include <span>
#define BLOCKEM_HAS_SPAN 1
#endif
#endif

namespace blockem {

// ---------------------------------------------------------------------------------------------
// Errors

/// A failed call: what() is the library's message, status() the BLOCKEM_STATUS_... number.
class Error : public std::runtime_error {
 public:
  Error(blockem_status status, const std::string& message)
      : std::runtime_error(std::string(blockem_status_name(status)) + ": " + message),
        status_(status) {}

  blockem_status status() const noexcept { return status_; }

 private:
  blockem_status status_;
};

/// The message of this thread's last failed call; empty after a call that succeeded.
inline std::string last_error() {
  std::string text(blockem_last_error(nullptr, 0) + 1, '\0');
  text.resize(blockem_last_error(&text[0], text.size()));
  return text;
}

/// Throws unless the status is OK.
inline void check(blockem_status status) {
  if (status != BLOCKEM_STATUS_OK) throw Error(status, last_error());
}

// ---------------------------------------------------------------------------------------------
// The library

inline std::string version() { return blockem_version_string(); }

inline blockem_build_info build_info() {
  blockem_build_info info = BLOCKEM_BUILD_INFO_INIT;
  check(blockem_build_info_get(&info));
  return info;
}

/// How many devices of a type this library can use: 0 without a driver, which is not an error.
inline int32_t device_count(int32_t device_type) {
  int32_t count = 0;
  check(blockem_device_count(device_type, &count));
  return count;
}

// ---------------------------------------------------------------------------------------------
// Tensors

/// A view of memory that the caller owns. Default-made it is absent.
struct Tensor : blockem_tensor {
  Tensor() : blockem_tensor BLOCKEM_TENSOR_INIT {}
  // NOLINTNEXTLINE(google-explicit-constructor): a C tensor is one.
  Tensor(const blockem_tensor& plain) : blockem_tensor(plain) {}
};

/// The bits of an IEEE half.
struct Half {
  std::uint16_t bits;
};

/// The bits of a bfloat16.
struct Bfloat16 {
  std::uint16_t bits;
};

/// BLOCKEM_DTYPE_... of a C++ type; specialise it for your own 16-bit floats.
template <class T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr std::int32_t value = BLOCKEM_DTYPE_F32;
};
template <>
struct DtypeOf<double> {
  static constexpr std::int32_t value = BLOCKEM_DTYPE_F64;
};
template <>
struct DtypeOf<Half> {
  static constexpr std::int32_t value = BLOCKEM_DTYPE_F16;
};
template <>
struct DtypeOf<Bfloat16> {
  static constexpr std::int32_t value = BLOCKEM_DTYPE_BF16;
};
template <>
struct DtypeOf<std::uint8_t> {
  static constexpr std::int32_t value = BLOCKEM_DTYPE_U8;
};
template <>
struct DtypeOf<bool> {
  static_assert(sizeof(bool) == 1, "BLOCKEM_DTYPE_BOOL is one byte");
  static constexpr std::int32_t value = BLOCKEM_DTYPE_BOOL;
};
template <>
struct DtypeOf<std::int64_t> {
  static constexpr std::int32_t value = BLOCKEM_DTYPE_I64;
};

/// A dimension or stride list.
using Dims = std::initializer_list<std::int64_t>;

/// A strided view; strides count elements. data may be const when the tensor is only read.
inline Tensor tensor(const void* data, std::int32_t dtype, Dims shape, Dims stride) {
  if (shape.size() > 4 || shape.size() != stride.size()) {
    throw Error(BLOCKEM_STATUS_SHAPE, "a tensor has at most 4 dimensions, one stride for each");
  }
  Tensor view;
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.ndim = static_cast<std::int32_t>(shape.size());
  std::size_t i = 0;
  for (std::int64_t n : shape) view.shape[i++] = n;
  i = 0;
  for (std::int64_t n : stride) view.stride[i++] = n;
  return view;
}

/// A row-major view.
inline Tensor tensor(const void* data, std::int32_t dtype, Dims shape) {
  if (shape.size() > 4) throw Error(BLOCKEM_STATUS_SHAPE, "a tensor has at most 4 dimensions");
  Tensor view;
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.ndim = static_cast<std::int32_t>(shape.size());
  std::size_t i = 0;
  for (std::int64_t n : shape) view.shape[i++] = n;
  std::uint64_t stride = 1;  // Unsigned: a shape that overflows is the library's to refuse.
  while (i-- > 0) {
    view.stride[i] = static_cast<std::int64_t>(stride);
    if (view.shape[i] > 1) stride *= static_cast<std::uint64_t>(view.shape[i]);
  }
  return view;
}

/// One number.
template <class T>
Tensor tensor(T* data) {
  return tensor(data, DtypeOf<typename std::remove_cv<T>::type>::value, {1}, {1});
}

/// A row-major view.
template <class T>
Tensor tensor(T* data, Dims shape) {
  return tensor(data, DtypeOf<typename std::remove_cv<T>::type>::value, shape);
}

/// A strided view; strides count elements.
template <class T>
Tensor tensor(T* data, Dims shape, Dims stride) {
  return tensor(data, DtypeOf<typename std::remove_cv<T>::type>::value, shape, stride);
}

namespace detail {

/// A row-major view of a container whose size is the shape's.
template <class T>
Tensor filled(T* data, std::size_t size, Dims shape) {
  std::size_t left = size;
  bool empty = false;
  for (std::int64_t n : shape) {
    if (n == 0) empty = true;
    if (n > 0) left = left % static_cast<std::size_t>(n) ? 0 : left / static_cast<std::size_t>(n);
  }
  if (empty ? size != 0 : left != 1) {
    throw Error(BLOCKEM_STATUS_SHAPE,
                "the shape does not hold " + std::to_string(size) + " elements");
  }
  return tensor(data, shape);
}

}  // namespace detail

/// The elements of a vector, [n] or of a shape that holds as many.
template <class T, class A>
Tensor tensor(std::vector<T, A>& data) {
  return tensor(data.data(), {static_cast<std::int64_t>(data.size())});
}
template <class T, class A>
Tensor tensor(const std::vector<T, A>& data) {
  return tensor(data.data(), {static_cast<std::int64_t>(data.size())});
}
template <class T, class A>
Tensor tensor(std::vector<T, A>& data, Dims shape) {
  return detail::filled(data.data(), data.size(), shape);
}
template <class T, class A>
Tensor tensor(const std::vector<T, A>& data, Dims shape) {
  return detail::filled(data.data(), data.size(), shape);
}
// A view of a temporary would dangle; vector<bool> holds bits.
template <class T, class A>
Tensor tensor(std::vector<T, A>&&) = delete;
template <class T, class A>
Tensor tensor(std::vector<T, A>&&, Dims) = delete;
template <class A>
Tensor tensor(const std::vector<bool, A>&) = delete;

#if defined(BLOCKEM_HAS_SPAN)
template <class T, std::size_t N>
Tensor tensor(std::span<T, N> data) {
  return tensor(data.data(), {static_cast<std::int64_t>(data.size())});
}
template <class T, std::size_t N>
Tensor tensor(std::span<T, N> data, Dims shape) {
  return detail::filled(data.data(), data.size(), shape);
}
#endif

/// The same view of memory on a CUDA device.
inline Tensor on_cuda(Tensor view, std::int32_t device_index) {
  view.device_type = BLOCKEM_DEVICE_CUDA;
  view.device_index = device_index;
  return view;
}

// ---------------------------------------------------------------------------------------------
// Structs that begin at their defaults

struct SaeOptions : blockem_sae_options {
  SaeOptions() : blockem_sae_options BLOCKEM_SAE_OPTIONS_INIT {}
};
struct SaeDesc : blockem_sae_desc {
  SaeDesc() : blockem_sae_desc BLOCKEM_SAE_DESC_INIT {}
};
struct PlanOptions : blockem_plan_options {
  PlanOptions() : blockem_plan_options BLOCKEM_PLAN_OPTIONS_INIT {}
};

/// Scratch memory on the host, aligned as the run calls need it.
class Workspace {
 public:
  static constexpr std::size_t alignment = 64;

  Workspace() = default;
  explicit Workspace(std::size_t bytes) : size_(bytes) {
    if (bytes == 0) return;
    memory_.reset(new unsigned char[bytes + alignment - 1]);
    const std::size_t past = reinterpret_cast<std::uintptr_t>(memory_.get()) % alignment;
    data_ = memory_.get() + (past == 0 ? 0 : alignment - past);
  }
  Workspace(Workspace&& other) noexcept { swap(other); }
  Workspace& operator=(Workspace&& other) noexcept {
    Workspace(std::move(other)).swap(*this);
    return *this;
  }

  void* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

  void swap(Workspace& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

 private:
  std::unique_ptr<unsigned char[]> memory_;
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Arguments of Plan::forward, Plan::backward and Plan::penalty.
struct PenaltyArgs : blockem_penalty_args {
  PenaltyArgs() : blockem_penalty_args BLOCKEM_PENALTY_ARGS_INIT {}
  /// Memory of the plan's device that the caller owns, until the call's work is done.
  void use(void* scratch, std::size_t bytes) noexcept {
    workspace = scratch;
    workspace_size = bytes;
  }
  /// The workspace must live until the call returns and serve no other call meanwhile.
  void use(const Workspace& scratch) noexcept {
    workspace = scratch.data();
    workspace_size = scratch.size();
  }
};

/// Arguments of Stats::update.
struct StatsArgs : blockem_stats_args {
  StatsArgs() : blockem_stats_args BLOCKEM_STATS_ARGS_INIT {}
  /// Memory of the statistics' device that the caller owns, until the call's work is done.
  void use(void* scratch, std::size_t bytes) noexcept {
    workspace = scratch;
    workspace_size = bytes;
  }
  /// The workspace must live until the call returns and serve no other call meanwhile.
  void use(const Workspace& scratch) noexcept {
    workspace = scratch.data();
    workspace_size = scratch.size();
  }
};

/// Arguments of Steering::steer.
struct SteerArgs : blockem_steer_args {
  SteerArgs() : blockem_steer_args BLOCKEM_STEER_ARGS_INIT {}
};

/// Arguments of token_norms.
struct TokenNormsArgs : blockem_token_norms_args {
  TokenNormsArgs() : blockem_token_norms_args BLOCKEM_TOKEN_NORMS_ARGS_INIT {}
};

/// Arguments of raw_forward and raw_backward.
struct RawPenaltyArgs : blockem_raw_penalty_args {
  RawPenaltyArgs() : blockem_raw_penalty_args BLOCKEM_RAW_PENALTY_ARGS_INIT {}
  /// Memory of the call's device that the caller owns, until the call's work is done.
  void use(void* scratch, std::size_t bytes) noexcept {
    workspace = scratch;
    workspace_size = bytes;
  }
  /// Without one, a CPU call allocates its own.
  void use(const Workspace& scratch) noexcept {
    workspace = scratch.data();
    workspace_size = scratch.size();
  }
};

// ---------------------------------------------------------------------------------------------
// Handles

namespace detail {

/// Sole owner of a C handle.
template <class T, void (*Free)(T*)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T* owned) noexcept : handle_(owned) {}
  Handle(Handle&& other) noexcept : handle_(other.release()) {}
  Handle& operator=(Handle&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  ~Handle() { Free(handle_); }

  /// The C handle, still owned by this object.
  T* get() const noexcept { return handle_; }
  /// Whether there is one: not after a move.
  explicit operator bool() const noexcept { return handle_ != nullptr; }
  /// Gives the C handle to the caller, who frees it.
  T* release() noexcept {
    T* handle = handle_;
    handle_ = nullptr;
    return handle;
  }

 private:
  void reset(T* owned) noexcept {
    Free(handle_);
    handle_ = owned;
  }

  T* handle_ = nullptr;
};

}  // namespace detail

/// An opened sparse autoencoder.
class Sae : public detail::Handle<blockem_sae, blockem_sae_free> {
 public:
  using Handle::Handle;

  /// A SAELens folder, or a safetensors file that states its recipe.
  static Sae open(const std::string& path, const SaeOptions& options = SaeOptions()) {
    blockem_sae* sae = nullptr;
    check(blockem_sae_open(path.c_str(), &options, &sae));
    return Sae(sae);
  }

  /// Arrays on the host, which are copied.
  static Sae from_tensors(const blockem_sae_desc& desc) {
    blockem_sae* sae = nullptr;
    check(blockem_sae_from_tensors(&desc, &sae));
    return Sae(sae);
  }

  blockem_sae_info info() const {
    blockem_sae_info info = BLOCKEM_SAE_INFO_INIT;
    check(blockem_sae_info_get(get(), &info));
    return info;
  }

  /// The resolved recipe as JSON.
  std::string describe() const {
    std::string text(blockem_sae_describe(get(), nullptr, 0) + 1, '\0');
    if (text.size() == 1) throw Error(describe_status(), last_error());
    text.resize(blockem_sae_describe(get(), &text[0], text.size()));
    return text;
  }

 private:
  // blockem_sae_describe answers a length, so what failed is told from the handle.
  blockem_status describe_status() const noexcept {
    return get() == nullptr ? BLOCKEM_STATUS_NULL_POINTER : BLOCKEM_STATUS_FORMAT;
  }
};

class Plan;

/// A set of blocked latents.
class Latents : public detail::Handle<blockem_latents, blockem_latents_free> {
 public:
  using Handle::Handle;

  /// Signs +1 block a rise (K+), -1 a fall (K-); weights empty means 1 for each.
  static Latents create(const std::vector<std::int64_t>& ids,
                        const std::vector<std::int8_t>& signs,
                        const std::vector<float>& weights = std::vector<float>()) {
    if (signs.size() != ids.size() || (!weights.empty() && weights.size() != ids.size())) {
      throw Error(BLOCKEM_STATUS_SHAPE, "ids, signs and weights must have one length");
    }
    blockem_latents_desc desc = BLOCKEM_LATENTS_DESC_INIT;
    desc.ids = ids.data();
    desc.signs = signs.data();
    desc.weights = weights.empty() ? nullptr : weights.data();
    desc.n = ids.size();
    blockem_latents* latents = nullptr;
    check(blockem_latents_create(&desc, &latents));
    return Latents(latents);
  }

  /// The authors' K0.json.
  static Latents open(const std::string& path, const Sae& sae) {
    blockem_latents* latents = nullptr;
    check(blockem_latents_open(path.c_str(), sae.get(), &latents));
    return Latents(latents);
  }

  /// Writes K0.json; records the plan's identity, and with sae the sha256 of its file.
  inline void save(const std::string& path) const;
  inline void save(const std::string& path, const Plan& plan) const;
  inline void save(const std::string& path, const Plan& plan, const Sae& sae) const;

  blockem_latents_info info() const {
    blockem_latents_info info = BLOCKEM_LATENTS_INFO_INIT;
    check(blockem_latents_info_get(get(), &info));
    return info;
  }

  /// In the order of the columns of every [T, K] array.
  std::vector<std::int64_t> ids() const {
    std::vector<std::int64_t> ids(info().count);
    check(blockem_latents_get(get(), ids.data(), nullptr, nullptr, ids.size()));
    return ids;
  }
  std::vector<std::int8_t> signs() const {
    std::vector<std::int8_t> signs(info().count);
    check(blockem_latents_get(get(), nullptr, signs.data(), nullptr, signs.size()));
    return signs;
  }
  std::vector<float> weights() const {
    std::vector<float> weights(info().count);
    check(blockem_latents_get(get(), nullptr, nullptr, weights.data(), weights.size()));
    return weights;
  }
};

/// SAE x latent set x device: the blocked rows, gathered and folded.
class Plan : public detail::Handle<blockem_plan, blockem_plan_free> {
 public:
  using Handle::Handle;

  Plan(const Sae& sae, const Latents& latents, const PlanOptions& options = PlanOptions())
      : Handle(create(sae, latents, options)) {}

  blockem_plan_info info() const {
    blockem_plan_info info = BLOCKEM_PLAN_INFO_INIT;
    check(blockem_plan_info_get(get(), &info));
    return info;
  }

  /// Bytes that forward and penalty need for so many tokens, and the other calls where info() says
  /// that they need any.
  std::size_t workspace_size(std::int64_t tokens) const {
    std::size_t bytes = 0;
    check(blockem_plan_workspace_size(get(), tokens, &bytes));
    return bytes;
  }

  /// Host memory for calls on up to so many tokens (CPU plans).
  Workspace workspace(std::int64_t tokens) const { return Workspace(workspace_size(tokens)); }

  /// z of hidden [T, d] into latents [T, K] F32: references for later calls. Where
  /// info().encode_needs_workspace is 1, encode(args) takes one.
  void encode(const Tensor& hidden, const Tensor& latents, void* stream = nullptr) const {
    blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
    args.hidden = hidden;
    args.latents = latents;
    encode(args, stream);
  }

  void encode(const blockem_encode_args& args, void* stream = nullptr) const {
    check(blockem_encode(get(), &args, stream));
  }

  /// z of hidden [T, d] as a new row-major [T, K] array (CPU plans).
  std::vector<float> encode(const Tensor& hidden) const {
    const std::int64_t tokens = hidden.ndim > 0 && hidden.shape[0] > 0 ? hidden.shape[0] : 0;
    const std::int64_t count = info().num_latents;
    std::vector<float> latents(static_cast<std::size_t>(tokens) * static_cast<std::size_t>(count));
    const Workspace scratch = workspace(tokens);
    blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
    args.hidden = hidden;
    args.latents = tensor(latents.data(), {tokens, count});
    args.workspace = scratch.data();
    args.workspace_size = scratch.size();
    encode(args);
    return latents;
  }

  /// loss_sum, token_count, and the coefficients that backward needs.
  void forward(const blockem_penalty_args& args, void* stream = nullptr) const {
    check(blockem_penalty_forward(get(), &args, stream));
  }

  /// grad_hidden from the coefficients.
  void backward(const blockem_penalty_args& args, void* stream = nullptr) const {
    check(blockem_penalty_backward(get(), &args, stream));
  }

  /// Forward and backward in one pass over hidden: same bits as the two calls.
  void penalty(const blockem_penalty_args& args, void* stream = nullptr) const {
    check(blockem_penalty(get(), &args, stream));
  }

 private:
  static blockem_plan* create(const Sae& sae, const Latents& latents, const PlanOptions& options) {
    blockem_plan* plan = nullptr;
    check(blockem_plan_create(sae.get(), latents.get(), &options, &plan));
    return plan;
  }
};

inline void Latents::save(const std::string& path) const {
  check(blockem_latents_save(get(), path.c_str(), nullptr));
}

inline void Latents::save(const std::string& path, const Plan& plan) const {
  blockem_latents_save_options options = BLOCKEM_LATENTS_SAVE_OPTIONS_INIT;
  options.plan = plan.get();
  check(blockem_latents_save(get(), path.c_str(), &options));
}

inline void Latents::save(const std::string& path, const Plan& plan, const Sae& sae) const {
  blockem_latents_save_options options = BLOCKEM_LATENTS_SAVE_OPTIONS_INIT;
  options.plan = plan.get();
  options.sae = sae.get();
  check(blockem_latents_save(get(), path.c_str(), &options));
}

/// All latents of an SAE on a device, for sums over tokens of each.
class Stats : public detail::Handle<blockem_stats, blockem_stats_free> {
 public:
  using Handle::Handle;

  explicit Stats(const Sae& sae, const PlanOptions& options = PlanOptions())
      : Handle(create(sae, options)) {}

  blockem_stats_info info() const {
    blockem_stats_info info = BLOCKEM_STATS_INFO_INIT;
    check(blockem_stats_info_get(get(), &info));
    return info;
  }

  /// Bytes that update needs for so many tokens.
  std::size_t workspace_size(std::int64_t tokens, bool has_base) const {
    std::size_t bytes = 0;
    check(blockem_stats_workspace_size(get(), tokens, has_base ? 1 : 0, &bytes));
    return bytes;
  }

  /// Host memory for updates of up to so many tokens (CPU).
  Workspace workspace(std::int64_t tokens, bool has_base) const {
    return Workspace(workspace_size(tokens, has_base));
  }

  /// Sums over more tokens, into args.state.
  void update(const blockem_stats_args& args, void* stream = nullptr) const {
    check(blockem_stats_update(get(), &args, stream));
  }

 private:
  static blockem_stats* create(const Sae& sae, const PlanOptions& options) {
    blockem_stats* stats = nullptr;
    check(blockem_stats_create(sae.get(), &options, &stats));
    return stats;
  }
};

/// Unit decoder rows of some latents on a device, to push hidden states along.
class Steering : public detail::Handle<blockem_steering, blockem_steering_free> {
 public:
  using Handle::Handle;

  /// The rows of a call count these ids from 0.
  Steering(const Sae& sae, const std::vector<std::int64_t>& ids,
           const PlanOptions& options = PlanOptions())
      : Handle(create(sae, ids, options)) {}

  blockem_steering_info info() const {
    blockem_steering_info info = BLOCKEM_STEERING_INFO_INIT;
    check(blockem_steering_info_get(get(), &info));
    return info;
  }

  /// h += strength * scale * unit decoder row, in place.
  void steer(const blockem_steer_args& args, void* stream = nullptr) const {
    check(blockem_steer(get(), &args, stream));
  }

 private:
  static blockem_steering* create(const Sae& sae, const std::vector<std::int64_t>& ids,
                                  const PlanOptions& options) {
    blockem_steering* steering = nullptr;
    check(blockem_steering_create(sae.get(), ids.data(), ids.size(), &options, &steering));
    return steering;
  }
};

/// The norm of every token, into args.norms.
inline void token_norms(const blockem_token_norms_args& args, void* stream = nullptr) {
  check(blockem_token_norms(&args, stream));
}

struct CacheOptions : blockem_cache_options {
  CacheOptions() : blockem_cache_options BLOCKEM_CACHE_OPTIONS_INIT {}
};

/// z of the base model at blocked latents, per example, in one file: one process writes it, or
/// several read it.
class Cache : public detail::Handle<blockem_cache, blockem_cache_free> {
 public:
  using Handle::Handle;

  /// What an example is known by.
  using Key = std::array<std::uint8_t, BLOCKEM_CACHE_KEY_SIZE>;

  static Cache open(const std::string& path, const CacheOptions& options = CacheOptions()) {
    blockem_cache* cache = nullptr;
    check(blockem_cache_open(path.c_str(), &options, &cache));
    return Cache(cache);
  }

  blockem_cache_info info() const {
    blockem_cache_info info = BLOCKEM_CACHE_INFO_INIT;
    check(blockem_cache_info_get(get(), &info));
    return info;
  }

  /// The key of an example; positions empty means 0, 1, 2, ...
  /// context: all else that the model sees of the example, or a digest of it; see
  /// blockem_cache_example.
  Key example_key(const std::vector<std::int64_t>& token_ids,
                  const std::vector<std::int64_t>& positions = std::vector<std::int64_t>(),
                  const std::vector<std::uint8_t>& context = std::vector<std::uint8_t>()) const {
    if (!positions.empty() && positions.size() != token_ids.size()) {
      throw Error(BLOCKEM_STATUS_SHAPE, "token_ids and positions must have one length");
    }
    blockem_cache_example example = BLOCKEM_CACHE_EXAMPLE_INIT;
    example.token_ids = token_ids.data();
    example.positions = positions.empty() ? nullptr : positions.data();
    example.num_tokens = token_ids.size();
    example.context = context.empty() ? nullptr : context.data();
    example.context_size = context.size();
    Key key;
    check(blockem_cache_key(get(), &example, key.data()));
    return key;
  }

  /// Keeps a short text beside the examples; it is written once.
  void put_note(const std::string& name, const std::string& text) const {
    check(blockem_cache_put_note(get(), name.c_str(), text.c_str()));
  }

  /// The text that put_note stored; empty where there is none.
  std::string note(const std::string& name) const {
    std::size_t length = 0;
    check(blockem_cache_get_note(get(), name.c_str(), nullptr, 0, &length));
    std::vector<char> text(length + 1);
    check(blockem_cache_get_note(get(), name.c_str(), text.data(), text.size(), &length));
    return std::string(text.data(), length);
  }

  /// [n, K] row-major: 1 where z of a latent is not stored for an example.
  std::vector<std::uint8_t> missing(const Plan& plan, const std::vector<Key>& keys) const {
    const std::size_t count = static_cast<std::size_t>(plan.info().num_latents);
    std::vector<std::uint8_t> missing(keys.size() * count);
    check(blockem_cache_missing(get(), plan.get(), bytes(keys), keys.size(), missing.data()));
    return missing;
  }

  /// Stores z [T_i, K] F32 of each example, all or none; returns how many columns were new.
  std::uint64_t put(const Plan& plan, const std::vector<Key>& keys,
                    const std::vector<Tensor>& latents) const {
    std::uint64_t written = 0;
    check(blockem_cache_put(get(), plan.get(), bytes(keys), one_each(keys, latents), keys.size(),
                            &written));
    return written;
  }

  /// Reads z of each example into latents [T_i, K] F32: the bits that were stored.
  void read(const Plan& plan, const std::vector<Key>& keys,
            const std::vector<Tensor>& latents) const {
    check(blockem_cache_get(get(), plan.get(), bytes(keys), one_each(keys, latents), keys.size()));
  }

 private:
  static_assert(sizeof(Key) == BLOCKEM_CACHE_KEY_SIZE, "keys follow each other without gaps");

  static const std::uint8_t* bytes(const std::vector<Key>& keys) {
    return keys.empty() ? nullptr : keys.front().data();
  }

  static const blockem_tensor* one_each(const std::vector<Key>& keys,
                                        const std::vector<Tensor>& latents) {
    if (keys.size() != latents.size()) {
      throw Error(BLOCKEM_STATUS_SHAPE, "keys and latents must have one length");
    }
    return latents.data();
  }
};

/// Where the assistant's text is. What its pointers say must live until the call returns.
struct MaskOptions : blockem_mask_options {
  MaskOptions() : blockem_mask_options BLOCKEM_MASK_OPTIONS_INIT {}

  /// The markers of a common chat template, such as "chatml": see blockem_mask_preset.
  static MaskOptions preset(const std::string& name) {
    MaskOptions options;
    check(blockem_mask_preset(name.c_str(), &options));
    return options;
  }
};

/// Begin and end (excluded) in bytes of a text.
using TextSpan = std::array<std::int64_t, 2>;

/// Tokens with the mask of the assistant's: 1 for each of these, 0 for the others.
struct Masked {
  std::vector<std::int64_t> ids;
  std::vector<std::uint8_t> mask;
};

/// Text to tokens and the mask of the assistant's, by a tokenizer.json.
class Tokenizer : public detail::Handle<blockem_tokenizer, blockem_tokenizer_free> {
 public:
  using Handle::Handle;

  /// A tokenizer.json, or a folder with one.
  static Tokenizer open(const std::string& path) {
    blockem_tokenizer* tokenizer = nullptr;
    check(blockem_tokenizer_open(path.c_str(), &tokenizer));
    return Tokenizer(tokenizer);
  }

  static Tokenizer from_json(const std::string& json) {
    blockem_tokenizer* tokenizer = nullptr;
    check(blockem_tokenizer_from_json(json.data(), json.size(), &tokenizer));
    return Tokenizer(tokenizer);
  }

  Masked mask(const std::string& text, const blockem_mask_options& options) const {
    Masked masked;
    // Seldom too few, and never none: NULL arrays would not be filled.
    std::size_t count = text.size() + 1;
    blockem_status status = fill(text, options, masked, count);
    if (status == BLOCKEM_STATUS_SHAPE) {
      check(blockem_tokenizer_mask(get(), text.data(), text.size(), &options, nullptr, nullptr, 0,
                                   &count));
      status = fill(text, options, masked, count);
    }
    check(status);
    return masked;
  }

  /// For a trainer's own tokens of the text, which must be those of mask().
  std::vector<std::uint8_t> mask_ids(const std::string& text, const blockem_mask_options& options,
                                     const std::vector<std::int64_t>& ids) const {
    std::vector<std::uint8_t> mask(ids.size());
    check(blockem_tokenizer_mask_ids(get(), text.data(), text.size(), &options, ids.data(),
                                     ids.size(), mask.data()));
    return mask;
  }

 private:
  blockem_status fill(const std::string& text, const blockem_mask_options& options, Masked& masked,
                      std::size_t count) const {
    masked.ids.resize(count);
    masked.mask.resize(count);
    const blockem_status status =
        blockem_tokenizer_mask(get(), text.data(), text.size(), &options, masked.ids.data(),
                               masked.mask.data(), count, &count);
    masked.ids.resize(count);
    masked.mask.resize(count);
    return status;
  }
};

/// The mask of tokens whose places in the text are known, from any tokenizer.
inline std::vector<std::uint8_t> mask_from_offsets(const std::string& text,
                                                   const blockem_mask_options& options,
                                                   const std::vector<TextSpan>& offsets) {
  static_assert(sizeof(TextSpan) == 2 * sizeof(std::int64_t), "spans follow each other");
  std::vector<std::uint8_t> mask(offsets.size());
  check(blockem_mask_from_offsets(text.data(), text.size(), &options,
                                  offsets.empty() ? nullptr : offsets.front().data(),
                                  offsets.size(), mask.data()));
  return mask;
}

// ---------------------------------------------------------------------------------------------
// Handle-free calls: every array is an argument

/// With grad_hidden it also writes the gradient, in one pass.
inline void raw_forward(const blockem_raw_penalty_args& args, void* stream = nullptr) {
  check(blockem_raw_penalty_forward(&args, stream));
}

inline void raw_backward(const blockem_raw_penalty_args& args, void* stream = nullptr) {
  check(blockem_raw_penalty_backward(&args, stream));
}

inline std::size_t raw_workspace_size(std::int64_t tokens, std::int64_t num_latents,
                                      std::int64_t d_in,
                                      std::int32_t backend = BLOCKEM_BACKEND_AUTO,
                                      std::int32_t num_threads = 0) {
  std::size_t bytes = 0;
  check(blockem_raw_penalty_workspace_size(tokens, num_latents, d_in, backend, num_threads, &bytes));
  return bytes;
}

}  // namespace blockem

#endif  // BLOCKEM_HPP
