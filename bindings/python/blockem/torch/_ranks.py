"""The ranks over which counts and sums are taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


class Ranks:
    """Those that have different tokens of a step, and among them those that share their tokens."""

    def __init__(self, process_group: Any, tensor_group: Any, device: str) -> None:
        self.process_group, self.tensor_group, self._device = process_group, tensor_group, device

    @property
    def world(self) -> int:
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.process_group)

    @property
    def first(self) -> bool:
        return self.world == 1 or distributed.get_rank(self.process_group) == 0

    def copies(self) -> int:
        """How many ranks of process_group have the same tokens."""
        if self.tensor_group is None or self.world == 1:
            return 1
        ranks = distributed.get_process_group_ranks
        both = set(ranks(self.process_group)) & set(ranks(self.tensor_group))
        return max(len(both), 1)

    def all_reduce(self, x: torch.Tensor, *, greatest: bool = False) -> torch.Tensor:
        """The sum over ranks, float64; or the greatest."""
        if self.world == 1:
            return x
        x = x.detach().to(self._device, torch.float64, copy=True)
        operation = distributed.ReduceOp.MAX if greatest else distributed.ReduceOp.SUM
        distributed.all_reduce(x, operation, group=self.process_group)
        return x

    def gather_objects(self, x: Any) -> list[Any]:
        """Every rank's, in their order."""
        if self.world == 1:
            return [x]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, x, group=self.process_group)
        return found
