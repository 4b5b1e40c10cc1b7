"""The comparison that the self-check makes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _ffi
from .._library import fail
from ._ops import encode
from ._results import Check
from ._target import Target
from ._spread import Held


def compare(
    targets: Sequence[Target],
    held: Sequence[Held],
    references: Sequence[torch.Tensor],
    mask: torch.Tensor,
    compared: str,
) -> Check:
    """z of the hidden states against the references. A difference of infinity stands for NaN."""
    worst = penalty = active = tokens = 0.0
    for target, one, reference in zip(targets, held, references, strict=True):
        mask = mask.to(one.values.device)
        kept = one.own(mask) != 0
        z, base = encode(one.plan, one.values.detach()), one.own(reference)
        if base.shape != z.shape:
            fail(
                _ffi.STATUS_SHAPE,
                f"the reference has the shape {list(base.shape)}; expected {list(z.shape)}, z of the "
                "batch's tokens",
            )
        z, base = z[kept], base[kept]
        distance = (z - base).abs().flatten()
        distance = torch.where(distance.isnan(), math.inf, distance)
        worst = max(worst, one.greatest(torch.cat([distance, distance.new_zeros(1)]).max()))
        active += (z != 0).sum().item() / max(z.numel(), 1) / len(targets)
        parts = target.parts(one.detached(), reference, mask != 0)
        penalty, tokens = penalty + parts.loss_sum.item(), max(tokens, parts.count.item())
    return Check(compared, int(tokens), penalty, worst, active)
