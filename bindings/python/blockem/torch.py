"""The penalty as a differentiable torch function."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch

from . import _arrays, _ffi
from ._core import Plan, _Inputs, expect
from ._library import check, library

__all__ = ["penalty"]


def penalty(
    plan: Plan,
    hidden: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """BLOCK-EM's penalty in two parts: minimise ``task_loss + lam * loss_sum / count``.

        loss_sum = sum_t m_t sum_k w_k relu(s_k (z[t,k] - reference[t,k]))^2
        count    = sum_t m_t

    Two parts, because a mean of means is wrong under gradient accumulation and data parallelism:
    add up loss_sum and count over micro-batches and ranks, and divide once.

    hidden: [..., d] float32, float16 or bfloat16 (float64 with backend="reference"), on the
        plan's device. Views are read in place where their leading dimensions flatten.
    reference: [..., K] float32, from ``plan.encode`` on the base model's hidden states; it gets no
        gradient.
    mask: [...] bool or uint8 (not 0 counts once), float32 (the token's share), or None. A token
        with mask 0 contributes nothing, even if its hidden is NaN.

    Returns loss_sum, differentiable once with respect to hidden, and count: 0-d float32 tensors
    (float64 for float64) on hidden's device. The backward pass keeps [T, K] coefficients, not
    hidden; its gradient has hidden's dtype. On CUDA the work is put on torch's current stream and
    nothing waits for it, so a training step can be captured into a graph.

    Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH; TypeError for other objects.
    """
    if torch.compiler.is_compiling():
        # A call into a C library is no part of a graph: torch.compile breaks the graph here.
        return torch.compiler.disable(_penalty)(plan, hidden, reference, mask)
    return _penalty(plan, hidden, reference, mask)


def _penalty(
    plan: Plan, hidden: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    expect("plan", plan, Plan)
    given = {"hidden": hidden, "reference": reference} | ({} if mask is None else {"mask": mask})
    for name, tensor in given.items():
        expect(name, tensor, torch.Tensor)
    inputs = plan._inputs(hidden, reference, mask)
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _Penalty.apply(plan, inputs, hidden)
    return _forward(plan, inputs, hidden, None)


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, inputs: _Inputs, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (inputs.hidden.tensor.shape[0], plan.num_latents)
        coef = torch.empty(shape, dtype=_sum_dtype(hidden), device=hidden.device)
        loss_sum, count = _forward(plan, inputs, hidden, coef)
        ctx.plan, ctx.shape, ctx.dtype = plan, hidden.shape, hidden.dtype
        ctx.save_for_backward(coef)
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        return loss_sum, count

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor | None, _: None) -> tuple:
        if upstream is None:
            return None, None, None
        (coef,) = ctx.saved_tensors
        grad = torch.empty(ctx.shape, dtype=ctx.dtype, device=coef.device)
        args = _ffi.PenaltyArgs(
            coef=_arrays.rows("coef", coef).tensor,
            grad_hidden=_arrays.rows("grad_hidden", grad).tensor,
            scale=1.0,
        )
        if upstream.dtype == torch.float32:
            # It stays a tensor: reading it here would wait for the device.
            args.scale_tensor = _one("scale_tensor", upstream)
        else:
            # float64 belongs to the reference backend, which runs on the CPU.
            args.scale = upstream.item()
        # Autograd runs this on the stream of the forward pass.
        stream = ctx.plan._stream(coef)
        check(library.blockem_penalty_backward(ctx.plan._handle.pointer, byref(args), stream))
        if torch.is_grad_enabled():
            # Under create_graph=True a plain tensor would pass for a constant.
            grad = _NoSecondDerivative.apply(grad.requires_grad_())
        return None, None, grad


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple:
        raise NotImplementedError("blockem.torch.penalty is differentiable once, not twice")


def _forward(
    plan: Plan, inputs: _Inputs, hidden: torch.Tensor, coef: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    loss_sum = torch.empty((), dtype=_sum_dtype(hidden), device=hidden.device)
    count = torch.empty_like(loss_sum)
    args = inputs.args(
        loss_sum=_one("loss_sum", loss_sum), token_count=_one("token_count", count)
    )
    if coef is not None:
        args.coef = _arrays.rows("coef", coef).tensor
    stream = plan._stream(hidden)
    check(library.blockem_penalty_forward(plan._handle.pointer, byref(args), stream))
    return loss_sum, count


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _one(name: str, scalar: torch.Tensor) -> _ffi.Tensor:
    return _arrays.tensor(name, scalar, (1,), (1,))
