"""W . h where every rank holds some columns of hidden (tensor parallelism)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .. import _ffi
from .._core import Plan
from .._library import fail


def over_columns(plan: Plan, hidden: torch.Tensor, group: Any) -> tuple[Plan, torch.Tensor]:
    """From this rank's columns of hidden: the plan of the gate, and W . h of all columns, [..., K]
    float32 and differentiable."""
    begin, end = chunk(plan.d_in, group)
    if hidden.ndim == 0 or hidden.shape[-1] != end - begin:
        fail(
            _ffi.STATUS_SHAPE,
            f"hidden has the shape {list(hidden.shape)}; expected [..., {end - begin}], the columns "
            f"{begin} to {end} of {plan.d_in} that this rank of the tensor-parallel group holds",
        )
    columns, gate = _parts(plan, begin, end)
    return gate, _Dots.apply(hidden, columns, group)


def chunk(total: int, group: Any) -> tuple[int, int]:
    """This rank's range, as torch.chunk and DTensor cut."""
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    each = -(-total // size)
    return min(rank * each, total), min((rank + 1) * each, total)


class _Dots(torch.autograd.Function):
    """W . h: every rank's columns, then the sum over ranks. No rank needs another's for dH."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, columns: Plan, group: Any) -> torch.Tensor:
        ctx.columns, ctx.dtype = columns, hidden.dtype
        dots = torch.ops.blockem.encode(columns._key, hidden)
        torch.distributed.all_reduce(dots, group=group)
        return dots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        one = grad.new_ones(())
        grad = torch.ops.blockem.penalty_backward(
            ctx.columns._key, grad.contiguous(), one, one, None, ctx.dtype
        )
        return grad, None, None


#: Two plans for each range of columns that a plan was asked for.
_made: weakref.WeakKeyDictionary[Plan, dict] = weakref.WeakKeyDictionary()


def _parts(plan: Plan, begin: int, end: int) -> tuple[Plan, Plan]:
    made = _made.setdefault(plan, {})
    if (begin, end) not in made:
        made[begin, end] = plan.columns(begin, end), plan.gate()
    return made[begin, end]
