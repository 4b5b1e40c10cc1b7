"""The penalty in torch: differentiable functions that torch.compile keeps in its graph, and hooks
that put it into a training loop."""

from ._attach import Calibration, Check, Handle, Term, attach
from ._ops import Parts, encode, penalty
from ._steer import steered
from .lambdas import DualAscent, ratio_lambda

__all__ = [
    "Calibration",
    "Check",
    "DualAscent",
    "Handle",
    "Parts",
    "Term",
    "attach",
    "encode",
    "penalty",
    "ratio_lambda",
    "steered",
]
