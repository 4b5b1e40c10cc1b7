"""What the penalty of a forward, the self-check and the calibration give."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .. import _ffi
from .._library import fail
from ._ops import Parts
from ._spread import Held


@dataclass(frozen=True)
class Term:
    """The penalty of one forward: add ``loss`` to the task loss."""

    weighted: torch.Tensor
    #: for each layer
    parts: tuple[Parts, ...]
    #: what the layers put out
    hidden: tuple[torch.Tensor, ...] = field(repr=False)
    held: tuple[Held, ...] = field(repr=False)
    factor: torch.Tensor | float | None = field(repr=False)

    @property
    def loss(self) -> torch.Tensor:
        """0-d, differentiable: lambda * loss_sum / count of the step, summed over layers; times the
        number of ranks where the trainer takes the mean of their gradients."""
        if self.factor is None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "the step's count is not known: call begin_step with all its micro-batches first",
            )
        factor = self.factor
        if isinstance(factor, torch.Tensor):
            factor = factor.to(self.weighted.device, self.weighted.dtype)
        return self.weighted * factor

    @property
    def loss_sum(self) -> torch.Tensor:
        """0-d, differentiable: the sum over tokens and latents, of the one layer."""
        (part,) = self.parts
        return part.loss_sum

    @property
    def count(self) -> torch.Tensor:
        """0-d: this forward's counted tokens."""
        return self.parts[0].count

    def cosine(self, task_loss: torch.Tensor) -> torch.Tensor:
        """The cosine of the two losses' gradients at the hooked hidden states, before backward.

        One more backward pass through the layers above: for a step now and then. 0 where one of
        them vanishes. Returns a 0-d tensor; nothing waits. Not under reentrant checkpointing.
        """
        one = torch.autograd.grad(self.weighted, self.hidden, retain_graph=True)
        two = torch.autograd.grad(task_loss, self.hidden, retain_graph=True, allow_unused=True)
        sums = []
        for hidden, held, a, b in zip(self.hidden, self.held, one, two, strict=True):
            a = held.localize(a, hidden).double()
            b = torch.zeros_like(a) if b is None else held.localize(b, hidden).double()
            products = torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
            sums.append(held.summed(products).to(self.weighted.device))
        dot, left, right = sum(sums)
        size = (left * right).sqrt()
        return torch.where(size == 0, 0.0, dot / size)


@dataclass(frozen=True)
class Check:
    """What the self-check found."""

    #: "tuned": the training forward itself; "adapters off": a pass that stood in for it
    compared: str
    tokens: int
    #: loss_sum; 0 where z is the same
    penalty: float
    #: greatest difference of z at the counted tokens
    difference: float
    #: share of z that is not 0: where it is 0 the check shows little
    active: float

    def __str__(self) -> str:
        return (
            f"{self.compared} model against the reference on {self.tokens} tokens: penalty "
            f"{self.penalty:g}, greatest difference of z {self.difference:g}, "
            f"{100 * self.active:.1f} % of the latents on"
        )


@dataclass(frozen=True)
class Calibration:
    """Means per token of the tuned model, its base, and the penalty between them."""

    loss: float
    base_loss: float
    penalty: float
