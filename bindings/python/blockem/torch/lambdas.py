"""How strong the penalty is: a fixed lambda, the ratio rule, dual ascent towards a target."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import _ffi
from .._library import fail

__all__ = ["DualAscent", "ratio_lambda"]


def ratio_lambda(ratio: float, loss_removed: float, penalty: float) -> float:
    """lambda = ratio * loss_removed / penalty: in units of what the fine-tuning itself is worth.

    ratio: r; how many times the SFT loss removed an unblocked run's penalty shall cost.
    loss_removed: mean SFT loss per token of the base model minus that of an unblocked run, on a
        sample of training rows.
    penalty: loss_sum / count that the unblocked run pays on the same rows.
        :meth:`blockem.torch.Handle.calibrate` measures both.

    Raises Error INVALID_ARGUMENT where one of them is not a positive number: then the unblocked run
    has learned nothing, or moves none of the blocked latents, and no lambda follows.
    """
    for name, value in {"ratio": ratio, "loss_removed": loss_removed, "penalty": penalty}.items():
        if not (value > 0 and math.isfinite(value)):
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} is {value}; expected a positive number")
    return ratio * loss_removed / penalty


class DualAscent:
    """lambda as the multiplier of the constraint penalty <= target.

    After every step: lambda = min(max(lambda + rate * (penalty - target), 0), maximum), where
    penalty is loss_sum / count of the whole step, over all micro-batches and ranks. Where that is not
    finite lambda stays as it is. It stays on the device.

    target: the penalty that is allowed, in units of loss_sum / count.
    rate: step size; a rate of r changes lambda by r for each unit by which the target is missed.
    """

    def __init__(
        self, target: float, rate: float, initial: float = 0.0, maximum: float = math.inf
    ) -> None:
        bounds = {"target": target, "rate": rate, "initial": initial, "maximum": maximum}
        for name, value in bounds.items():
            if not value >= 0 or name != "maximum" and not math.isfinite(value):
                fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} is {value}; expected 0 or more")
        self.target, self.rate, self.maximum = float(target), float(rate), float(maximum)
        self.value = torch.tensor(float(initial), dtype=torch.float64)

    def update(self, penalty: torch.Tensor) -> None:
        """penalty: 0-d, of the step that is over."""
        before = self.value.to(penalty.device)
        raised = before + self.rate * (penalty.double() - self.target)
        self.value = torch.where(raised.isfinite(), raised.clamp(0.0, self.maximum), before)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "dual_ascent", "target": self.target, "rate": self.rate,
                "maximum": self.maximum, "value": self.value.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = self.state_dict()
        for name in ("kind", "target", "rate", "maximum"):
            if state.get(name) != mine[name]:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"lambda's {name} was {state.get(name)} and is {mine[name]}: resume with the "
                    "settings of the run",
                )
        self.value = torch.tensor(state["value"], dtype=torch.float64)


class Fixed:
    """The same lambda at every step."""

    def __init__(self, value: float) -> None:
        if not (value >= 0 and math.isfinite(value)):
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"lam is {value}; expected 0 or more")
        self.value = float(value)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "fixed", "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.state_dict():
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"lambda was {state} and is {self.state_dict()}: resume with the lambda of the run",
            )


def as_lambda(value: float | DualAscent) -> Fixed | DualAscent:
    return value if isinstance(value, DualAscent) else Fixed(value)
