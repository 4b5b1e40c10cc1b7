"""The penalty and the encoder as operators of torch: ``torch.ops.blockem``."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref
from typing import Any, NamedTuple

import torch

from .. import _arrays, _ffi
from .._core import Plan, _expect_shape, expect, plans
from .._library import check, fail, library
from ._columns import over_columns

__all__ = ["Parts", "encode", "penalty"]


class Parts(NamedTuple):
    """What ``penalty(..., per_latent=True)`` returns."""

    #: 0-d, differentiable: sum_t m_t sum_k w_k relu(s_k (z - reference))^2
    loss_sum: torch.Tensor
    #: 0-d: sum_t m_t
    count: torch.Tensor
    #: [K], detached: the share of each latent in loss_sum
    latent_loss: torch.Tensor


def penalty(
    plan: Plan,
    hidden: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    per_latent: bool = False,
    tensor_group: Any = None,
) -> tuple[torch.Tensor, torch.Tensor] | Parts:
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
    per_latent: returns :class:`Parts`, with the share of each latent too; nothing waits.
    tensor_group: the process group whose ranks hold hidden's columns, in its order and cut like
        torch.chunk: hidden is [..., d / ranks], reference and mask are of all ranks' tokens. One
        all-reduce of [..., K]; every rank gets the whole loss_sum, and the gradient of its columns.
        Not for SAEs that normalise every token, nor native topk (UNSUPPORTED).

    Returns loss_sum, differentiable once with respect to hidden, and count: 0-d float32 tensors
    (float64 for float64) on hidden's device. The backward pass keeps [..., K] coefficients, not
    hidden (it keeps both where ``plan.backward_needs_hidden``: the SAE normalises every token or
    has a GLU encoder); its gradient has hidden's dtype. On CUDA the work is put on torch's current
    stream and nothing waits for it, so a training step can be captured into a graph.

    One operator of torch does it, ``torch.ops.blockem.penalty_forward``: torch.compile keeps it in
    its graph, with fullgraph=True and dynamic=True too, and torch.vmap loops over it;
    torch.func.grad refuses torch's custom operators. Autocast leaves it alone: hidden is read in
    the dtype that it has. A compiled function must not outlive its plan.

    Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH; TypeError for other objects.
    """
    expect("plan", plan, Plan)
    expect("hidden", hidden, torch.Tensor)
    expect("reference", reference, torch.Tensor)
    if mask is not None:
        expect("mask", mask, torch.Tensor)
    if tensor_group is not None:
        plan, hidden = over_columns(plan, hidden, tensor_group)
    loss_sum, count, latent_loss, _ = torch.ops.blockem.penalty_forward(
        plan._key, hidden, reference, mask, per_latent
    )
    return Parts(loss_sum, count, latent_loss) if per_latent else (loss_sum, count)


def encode(plan: Plan, hidden: torch.Tensor, *, tensor_group: Any = None) -> torch.Tensor:
    """``plan.encode`` as an operator of torch, for compiled functions: z[..., k] of hidden.

    hidden: [..., d] float32, float16 or bfloat16 (float64 with backend="reference"), on the
        plan's device.
    tensor_group: as for :func:`penalty`.
    Returns [..., K] float32 (float64 for float64), detached, with the bits of ``plan.encode``
    (with tensor_group, those of the group's sum).

    Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH; TypeError for other objects.
    """
    expect("plan", plan, Plan)
    expect("hidden", hidden, torch.Tensor)
    if tensor_group is not None:
        plan, hidden = over_columns(plan, hidden.detach(), tensor_group)
    return torch.ops.blockem.encode(plan._key, hidden)


# The operators. A plan travels as its key: a string is part of the graph, as the plan's rows are.


@torch.library.custom_op(
    "blockem::penalty_forward",
    mutates_args=(),
    schema="(str plan, Tensor hidden, Tensor reference, Tensor? mask, bool per_latent)"
    " -> (Tensor loss_sum, Tensor count, Tensor latent_loss, Tensor coef)",
)
def _forward(
    key: str,
    hidden: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor | None,
    per_latent: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = _plan(key)
    inputs = plan._inputs(hidden, reference, mask)
    loss_sum, count, latent_loss, coef = outputs = _empty_outputs(plan, hidden, per_latent)
    args = inputs.args(
        loss_sum=_one("loss_sum", loss_sum),
        token_count=_one("token_count", count),
        coef=_arrays.rows("coef", coef).tensor,
    )
    if per_latent:
        args.latent_loss = _arrays.rows("latent_loss", latent_loss, tail=0).tensor
    stream = plan._stream(hidden)
    check(library.blockem_penalty_forward(plan._handle.pointer, byref(args), stream))
    return outputs


@_forward.register_fake
def _(key, hidden, reference, mask, per_latent):
    plan = _plan(key)
    _expect_on_device(plan, hidden)
    _expect_width(plan, hidden)
    _expect_shape("reference", reference, (*hidden.shape[:-1], plan.num_latents))
    if mask is not None:
        _expect_shape("mask", mask, tuple(hidden.shape[:-1]))
    return _empty_outputs(plan, hidden, per_latent)


def _setup_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    key, hidden, *_ = inputs
    loss_sum, count, latent_loss, coef = output
    # The plan is kept alive for the backward pass, which finds it by its key.
    ctx.key, ctx.plan, ctx.dtype = key, _plan(key), hidden.dtype
    ctx.save_for_backward(coef, loss_sum, hidden if ctx.plan.backward_needs_hidden else None)
    ctx.mark_non_differentiable(count, latent_loss, coef)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, upstream: torch.Tensor | None, *_: None) -> tuple:
    if upstream is None:
        return None, None, None, None, None
    coef, loss_sum, hidden = ctx.saved_tensors
    grad = torch.ops.blockem.penalty_backward(ctx.key, coef, upstream, loss_sum, hidden, ctx.dtype)
    return None, grad, None, None, None


_forward.register_autograd(_backward_of_forward, setup_context=_setup_forward)


@torch.library.custom_op(
    "blockem::penalty_backward",
    mutates_args=(),
    schema="(str plan, Tensor coef, Tensor upstream, Tensor loss_sum, Tensor? hidden,"
    " ScalarType dtype) -> Tensor",
)
def _backward(
    key: str,
    coef: torch.Tensor,
    upstream: torch.Tensor,
    loss_sum: torch.Tensor,
    hidden: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """hidden is that of the forward call, where the plan needs it. loss_sum is not read: it makes a
    second derivative depend on this operator, which refuses."""
    plan = _plan(key)
    grad = torch.empty((*coef.shape[:-1], plan.d_in), dtype=dtype, device=coef.device)
    args = _ffi.PenaltyArgs(
        coef=_arrays.rows("coef", coef).tensor,
        grad_hidden=_arrays.rows("grad_hidden", grad).tensor,
        scale=1.0,
    )
    if hidden is not None:
        rows = plan._hidden(hidden)
        args.hidden = rows.tensor
        args.workspace, args.workspace_size, owner = plan._workspace(rows)
    if upstream.dtype == torch.float32:
        # It stays a tensor: reading it here would wait for the device.
        args.scale_tensor = _one("scale_tensor", upstream)
    else:
        # float64 belongs to the reference backend, which runs on the CPU.
        args.scale = upstream.item()
    # Autograd runs this on the stream of the forward pass.
    stream = plan._stream(coef)
    check(library.blockem_penalty_backward(plan._handle.pointer, byref(args), stream))
    return grad


@_backward.register_fake
def _(key, coef, upstream, loss_sum, hidden, dtype):
    return coef.new_empty((*coef.shape[:-1], _plan(key).d_in), dtype=dtype)


def _refuse_second_derivative(ctx: Any, _: torch.Tensor) -> tuple:
    raise NotImplementedError("blockem.torch.penalty is differentiable once, not twice")


_backward.register_autograd(_refuse_second_derivative)


@torch.library.custom_op(
    "blockem::encode", mutates_args=(), schema="(str plan, Tensor hidden) -> Tensor"
)
def _encode(key: str, hidden: torch.Tensor) -> torch.Tensor:
    return _plan(key).encode(hidden)


@_encode.register_fake
def _(key, hidden):
    plan = _plan(key)
    _expect_on_device(plan, hidden)
    _expect_width(plan, hidden)
    return hidden.new_empty((*hidden.shape[:-1], plan.num_latents), dtype=_sum_dtype(hidden))


_encode.register_autograd(
    lambda ctx, _: (None, None),
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
)


def _loop(operator: Any) -> Callable:
    """vmap by one call for each index: the library has no batch of batches."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        calls = []
        for i in range(info.batch_size):
            at = [x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims)]
            calls.append(operator(*at))
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls))), (0,) * len(calls[0])

    return rule


for _operator in (_forward, _backward, _encode):
    _operator.register_vmap(_loop(_operator))


def _plan(key: str) -> Plan:
    plan = plans.get(key)
    if plan is None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"plan {key} is no more: keep the Plan for as long as what was compiled with it",
        )
    return plan


def _empty_outputs(plan: Plan, hidden: torch.Tensor, per_latent: bool) -> tuple:
    dtype, device = _sum_dtype(hidden), hidden.device
    shares = plan.num_latents if per_latent else 0
    return (
        torch.empty((), dtype=dtype, device=device),
        torch.empty((), dtype=dtype, device=device),
        torch.empty(shares, dtype=dtype, device=device),
        torch.empty((*hidden.shape[:-1], plan.num_latents), dtype=dtype, device=device),
    )


def _expect_on_device(plan: Plan, hidden: torch.Tensor) -> None:
    # Tensors on meta come here too; those of torch's tracers say where they belong.
    if str(hidden.device) != plan.device:
        fail(
            _ffi.STATUS_DEVICE_MISMATCH, f"hidden is on {hidden.device}, the plan on {plan.device}"
        )


def _expect_width(plan: Plan, hidden: torch.Tensor) -> None:
    if hidden.ndim == 0 or hidden.shape[-1] != plan.d_in:
        found = list(hidden.shape)
        fail(_ffi.STATUS_SHAPE, f"hidden has the shape {found}; expected [..., {plan.d_in}]")


def _sum_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _one(name: str, scalar: torch.Tensor) -> _ffi.Tensor:
    return _arrays.tensor(name, scalar, (1,), (1,))
