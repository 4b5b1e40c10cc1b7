// BLOCK-EM's penalty for trainers in libtorch: a differentiable function of hidden states (CPU).
//
//     torch::Tensor reference = blockem_torch::encode(plan, base_hidden);
//     blockem_torch::Loss blocked = blockem_torch::penalty(plan, hidden, reference, mask);
//     (task_loss + lambda * blocked.sum / blocked.count).backward();
//
// Add sum and count up over micro-batches and ranks, then divide once.

#ifndef BLOCKEM_EXAMPLES_LIBTORCH_PENALTY_HPP
#define BLOCKEM_EXAMPLES_LIBTORCH_PENALTY_HPP

#include <blockem.hpp>
#include <torch/torch.h>

#include <cstdint>

namespace blockem_torch {

// Both are 0-d; sum is differentiable once.
struct Loss {
  torch::Tensor sum, count;
};

namespace detail {

inline std::int32_t dtype_of(const torch::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::kFloat: return BLOCKEM_DTYPE_F32;
    case torch::kHalf: return BLOCKEM_DTYPE_F16;
    case torch::kBFloat16: return BLOCKEM_DTYPE_BF16;
    case torch::kDouble: return BLOCKEM_DTYPE_F64;
    case torch::kBool: return BLOCKEM_DTYPE_BOOL;
    case torch::kByte: return BLOCKEM_DTYPE_U8;
    default: TORCH_CHECK(false, "libblockem has no ", tensor.scalar_type(), " tensors");
  }
}

// [..., n] as [T, n], in host memory without gaps.
inline torch::Tensor rows(const torch::Tensor& tensor) {
  TORCH_CHECK(tensor.is_cpu(), "this example computes on the CPU, not on ", tensor.device());
  TORCH_CHECK(tensor.dim() > 0, "hidden states and references are [..., n]");
  return tensor.detach().reshape({-1, tensor.size(-1)}).contiguous();
}

inline blockem::Tensor view(const torch::Tensor& tensor) {
  if (tensor.dim() == 2) {
    return blockem::tensor(tensor.data_ptr(), dtype_of(tensor), {tensor.size(0), tensor.size(1)});
  }
  return blockem::tensor(tensor.data_ptr(), dtype_of(tensor), {tensor.numel()});
}

// Forward keeps the coefficients [T, K], which are all that backward needs of most SAEs.
class Penalty : public torch::autograd::Function<Penalty> {
 public:
  static torch::autograd::tensor_list forward(torch::autograd::AutogradContext* context,
                                              const torch::Tensor& hidden,
                                              const torch::Tensor& reference,
                                              const torch::Tensor& mask, std::int64_t plan_address) {
    const blockem::Plan& plan = at(plan_address);
    const torch::Tensor h = rows(hidden), zref = rows(reference);
    const torch::Tensor m = mask.detach().reshape({-1}).contiguous();
    const bool wide = h.scalar_type() == torch::kDouble;
    const auto options = torch::dtype(wide ? torch::kDouble : torch::kFloat);
    torch::Tensor sum = torch::empty({}, options), count = torch::empty({}, options);
    const torch::Tensor coef = torch::empty(zref.sizes(), options);

    const blockem::Workspace workspace = plan.workspace(h.size(0));
    blockem::PenaltyArgs args;
    args.use(workspace);
    args.hidden = view(h);
    args.reference = view(zref);
    args.mask = view(m);
    args.coef = view(coef);
    args.loss_sum = view(sum);
    args.token_count = view(count);
    plan.forward(args);

    const bool needs_hidden = plan.info().backward_needs_hidden != 0;
    context->save_for_backward({coef, needs_hidden ? h : torch::Tensor()});
    context->saved_data["plan"] = plan_address;
    context->saved_data["shape"] = hidden.sizes().vec();
    context->saved_data["dtype"] = hidden.scalar_type();
    context->mark_non_differentiable({count});
    return {sum, count};
  }

  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               torch::autograd::tensor_list upstream) {
    const blockem::Plan& plan = at(context->saved_data["plan"].toInt());
    const auto saved = context->get_saved_variables();
    const torch::Tensor &coef = saved[0], &h = saved[1];
    const auto shape = context->saved_data["shape"].toIntVector();
    const torch::Tensor grad =
        torch::empty({coef.size(0), shape.back()}, context->saved_data["dtype"].toScalarType());

    const blockem::Workspace workspace = plan.workspace(h.defined() ? h.size(0) : 0);
    blockem::PenaltyArgs args;
    args.use(workspace);
    args.coef = view(coef);
    args.grad_hidden = view(grad);
    args.scale = upstream[0].item<double>();
    if (h.defined()) args.hidden = view(h);
    plan.backward(args);
    return {grad.reshape(shape), torch::Tensor(), torch::Tensor(), torch::Tensor()};
  }

 private:
  static const blockem::Plan& at(std::int64_t address) {
    return *reinterpret_cast<const blockem::Plan*>(address);
  }
};

}  // namespace detail

// z [..., K] of hidden [..., d]: a reference for penalty, detached.
inline torch::Tensor encode(const blockem::Plan& plan, const torch::Tensor& hidden) {
  const torch::Tensor h = detail::rows(hidden);
  const bool wide = h.scalar_type() == torch::kDouble;
  const torch::Tensor z = torch::empty({h.size(0), plan.info().num_latents},
                                       wide ? torch::kDouble : torch::kFloat);
  const blockem::Workspace workspace = plan.workspace(h.size(0));
  blockem_encode_args args = BLOCKEM_ENCODE_ARGS_INIT;
  args.hidden = detail::view(h);
  args.latents = detail::view(z);
  args.workspace = workspace.data();
  args.workspace_size = workspace.size();
  plan.encode(args);
  auto shape = hidden.sizes().vec();
  shape.back() = z.size(1);
  return z.reshape(shape);
}

// hidden [..., d]; reference [..., K] by encode on the base model's hidden states; mask [...] bool,
// uint8 or float32. The plan must outlive the backward pass.
inline Loss penalty(const blockem::Plan& plan, const torch::Tensor& hidden,
                    const torch::Tensor& reference, const torch::Tensor& mask) {
  const auto outputs = detail::Penalty::apply(hidden, reference, mask,
                                              reinterpret_cast<std::int64_t>(&plan));
  return {outputs[0], outputs[1]};
}

}  // namespace blockem_torch

#endif  // BLOCKEM_EXAMPLES_LIBTORCH_PENALTY_HPP
