"""Hidden states that the ranks of a group hold together: some columns each (tensor parallelism) or
some tokens each (sequence parallelism)."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import _ffi
from .._core import Plan
from .._library import fail
from ._columns import chunk, over_columns
from ._ops import Parts
from ._stack import rows_of


@dataclass(frozen=True)
class Held:
    """What this rank has of a layer's hidden states, as a plan reads it."""

    plan: Plan
    #: [..., d]; where ranks hold columns, [..., K]: W . h of all of them, for the plan's gate
    values: torch.Tensor
    #: whose ranks have the rest; None where this rank has all
    group: Any = None
    #: which tokens these are, where ranks hold tokens
    tokens: Tokens | None = None

    def own(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """Of an array of the batch's tokens, what belongs to this rank's."""
        return x if x is None or self.tokens is None else self.tokens.of(x)

    def whole(self, part: Parts) -> Parts:
        """A penalty of this rank's tokens with the sums of all ranks; the gradient stays its own."""
        if self.tokens is None:
            return part
        mine = torch.cat([part.loss_sum.detach()[None], part.count[None], part.latent_loss])
        loss_sum, count, *_ = total = self.summed(mine)
        rest = loss_sum - mine[0]
        return Parts(part.loss_sum + rest, count.clone(), total[2:])

    def detached(self) -> Held:
        return replace(self, values=self.values.detach())

    def greatest(self, x: torch.Tensor) -> float:
        """The greatest of the ranks' numbers."""
        if self.group is not None:
            torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX, group=self.group)
        return x.item()

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks that have different parts."""
        if self.group is None:
            return x
        x = x.detach().clone()
        torch.distributed.all_reduce(x, group=self.group)
        return x

    def localize(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A gradient of the hidden states, as this rank holds them."""
        if is_dtensor(x):
            return x.redistribute(like.device_mesh, like.placements).to_local()
        return x


@dataclass(frozen=True)
class Tokens:
    """A range along one dimension of a batch's tokens."""

    dim: int
    begin: int
    end: int
    total: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        length = x.shape[self.dim] if x.ndim > self.dim else 0
        if length == self.end - self.begin:
            return x
        if length != self.total:
            fail(
                _ffi.STATUS_SHAPE,
                f"an array of tokens has the shape {list(x.shape)}; expected {self.total} in "
                f"dimension {self.dim}, or this rank's {self.end - self.begin}",
            )
        return x.narrow(self.dim, self.begin, self.end - self.begin)


def held(plan: Plan, hidden: torch.Tensor, lead: Sequence[int], group: Any) -> Held:
    """How a layer's output lies on the ranks: a DTensor says it, the shape of a tensor shows it.

    lead: the shape of the batch's tokens. group: the ranks that have them together, or None.
    """
    if is_dtensor(hidden):
        return _of_dtensor(plan, hidden, lead)
    if group is None or torch.distributed.get_world_size(group) == 1:
        return Held(plan, of_tokens(hidden, lead))
    if hidden.shape[-1] != plan.d_in:
        gate, dots = over_columns(plan, of_tokens(hidden, lead), group)
        return Held(gate, dots, group)
    found = list(hidden.shape[:-1])
    if found == list(lead):
        return Held(plan, hidden)
    if len(found) == len(lead):
        for dim, total in enumerate(lead):
            begin, end = chunk(total, group)
            if found == [*lead[:dim], end - begin, *lead[dim + 1 :]]:
                return Held(plan, hidden, group, Tokens(dim, begin, end, total))
    fail(
        _ffi.STATUS_SHAPE,
        f"hidden has the shape {list(hidden.shape)}, the batch's tokens {list(lead)}: neither all "
        f"of them nor one of {torch.distributed.get_world_size(group)} equal parts of a dimension",
    )


def of_tokens(hidden: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    """[*lead, d]: hidden states of a batch's tokens, of which some modules make one row each."""
    found, lead = list(hidden.shape[:-1]), list(lead)
    if found == lead:
        return hidden
    if found == [math.prod(lead)]:
        return hidden.view(*lead, hidden.shape[-1])
    several = (
        f": {found[0]} residual streams, of which no one is the SAE's"
        if found[1:] == lead
        else ": labels, masks and attention_mask are of the model's own tokens"
    )
    fail(
        _ffi.STATUS_SHAPE,
        f"hidden has the shape {list(hidden.shape)}, the batch's tokens {lead}{several}",
    )


def gathered(
    hidden: torch.Tensor, rows: Sequence[int], lead: Sequence[int], group: Any, width: int
) -> torch.Tensor:
    """[n, T, d]: some rows of a layer's output as a whole, on every rank of the group.

    lead, group: as for :func:`held`. width: d.
    """
    if is_dtensor(hidden):
        dim = _mesh_dim(hidden)
        local = hidden.to_local()
        placement = None if dim is None else hidden.placements[dim]
        if placement is None or placement.is_replicate():
            return rows_of(local, rows, lead[0])
        # held has refused what is no Shard.
        at, group = placement.dim % hidden.ndim, hidden.device_mesh.get_group(dim)
    else:
        # Some modules make one row of each token.
        hidden = local = of_tokens(hidden, lead) if hidden.ndim == len(lead) else hidden
        shape = [*lead, width]
        parts = [i for i, (n, whole) in enumerate(zip(hidden.shape, shape)) if n != whole]
        if group is None or not parts:
            return rows_of(hidden, rows, lead[0])
        (at,) = parts
    total = [*lead, width][at]
    if at != 0:
        local = rows_of(local, rows, lead[0])
    # Collectives want equal parts.
    each = -(-total // torch.distributed.get_world_size(group))
    shape = list(local.shape)
    shape[at] = each
    padded = local.new_zeros(shape)
    padded.narrow(at, 0, local.shape[at]).copy_(local)
    parts = [torch.empty_like(padded) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, padded, group=group)
    whole = torch.cat(parts, dim=at).narrow(at, 0, total)
    return rows_of(whole, rows, lead[0]) if at == 0 else whole


def group_of(hidden: torch.Tensor) -> Any:
    """The ranks over which a DTensor lies; None for other tensors, and for one rank."""
    if not is_dtensor(hidden):
        return None
    dim = _mesh_dim(hidden)
    return None if dim is None else hidden.device_mesh.get_group(dim)


def _of_dtensor(plan: Plan, hidden: Any, lead: Sequence[int]) -> Held:
    dim = _mesh_dim(hidden)
    local = hidden.to_local()
    placement = None if dim is None else hidden.placements[dim]
    if placement is None or placement.is_replicate():
        return Held(plan, of_tokens(local, lead))
    if type(placement) is not sys.modules["torch.distributed.tensor"].Shard:
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"hidden is a DTensor placed {placement}: have the layer put out Replicate or Shard "
            "(a Partial is a sum that was not taken yet)",
        )
    group, last = hidden.device_mesh.get_group(dim), hidden.ndim - 1
    if placement.dim in (last, -1):
        gate, dots = over_columns(plan, of_tokens(local, lead), group)
        return Held(gate, dots, group)
    at = placement.dim % hidden.ndim
    begin, end = chunk(hidden.shape[at], group)
    return Held(plan, local, group, Tokens(at, begin, end, hidden.shape[at]))


def _mesh_dim(hidden: Any) -> int | None:
    """The dimension of a DTensor's mesh that has ranks."""
    mesh = hidden.device_mesh
    dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1]
    if len(dims) > 1:
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"hidden is a DTensor on the mesh {tuple(mesh.shape)}: the penalty knows those on one "
            "dimension, the tensor-parallel one (mesh['tp'])",
        )
    return dims[0] if dims else None


def is_dtensor(x: torch.Tensor) -> bool:
    # Where nothing imported the module there is no DTensor, and its import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)
