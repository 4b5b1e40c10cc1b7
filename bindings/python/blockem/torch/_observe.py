"""What the watches of a handle are shown of a training forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ._recorder import Forward
from ._references import Source
from ._target import Target
from ._spread import gathered
from ._stack import rows_of

if TYPE_CHECKING:
    from ._watch import Watch


def observe(
    watches: Sequence[Watch],
    targets: Sequence[Target],
    source: Source,
    forward: Forward,
    base: Sequence[torch.Tensor] | None,
    batch: Any,
    mask: torch.Tensor,
    tensor_group: Any,
) -> None:
    """Gives the watches the rows that they draw; mostly there are none, and nothing is done.

    base: the base model's hidden states of all rows, for each target, where the references came
        from them; else one pass serves all watches.
    """
    wanted = [(watch, watch._rows(mask)) for watch in watches]
    drawn = sorted({row for _, mine in wanted for row in mine})
    if not drawn:
        return
    count, length = mask.shape[:2]
    of_base = list(range(count))
    if base is None and any(watch.base is None for watch in watches):
        base, of_base = source.base(forward, drawn, count), drawn
    for watch, mine in wanted:
        if not mine:
            continue
        at = targets.index(watch._target)
        whole = lambda hidden, rows, count: gathered(
            hidden, rows, (count, length), tensor_group, watch.stats.d_in
        )
        hidden = whole(forward.hidden[at], mine, count)
        if watch.base is None:
            reference = whole(base[at], [of_base.index(row) for row in mine], len(of_base))
        else:
            reference = watch.base(rows_of(batch, mine, count))
        watch._add(hidden, reference, rows_of(mask, mine, count))
