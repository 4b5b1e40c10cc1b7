"""What is trained, as it was some steps ago."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


class Past:
    """Up to two copies of an optimizer's parameters and state, made at least `steps` apart: the
    older is always at least so old."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.optimizer, self._steps = optimizer, steps
        self._kept: list[_Moment] = []

    def keep(self, step: int) -> None:
        """Copies what is there after this step, if the last copy is old enough."""
        if self._kept and step < self._kept[-1].step + self._steps:
            return
        state = copy.deepcopy(self.optimizer.state_dict()["state"])
        self._kept.append(_Moment(step, [p.detach().clone() for p in self._parameters], state))
        del self._kept[:-2]

    def back(self, step: int) -> int:
        """Puts back the newest copy that is old enough at this step, or else the oldest; returns
        the step that it is of. Learning rates and other settings of the optimizer stay."""
        old = [moment for moment in self._kept if moment.step <= step - self._steps]
        moment = old[-1] if old else self._kept[0]
        with torch.no_grad():
            for parameter, value in zip(self._parameters, moment.values, strict=True):
                parameter.copy_(value)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": copy.deepcopy(moment.state), "param_groups": groups}
        )
        del self._kept[self._kept.index(moment) + 1 :]
        return moment.step

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, for torch.save. Of parameters that are sharded over ranks, this
        rank's shards."""
        return {"kept": [dict(vars(moment)) for moment in self._kept]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the copies of a run that goes on with the same parameters."""
        self._kept = [_Moment(**moment) for moment in state["kept"]]

    @property
    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True, eq=False)
class _Moment:
    step: int
    values: list[torch.Tensor]
    state: dict[Any, Any]
