"""The penalty in torch: differentiable functions that torch.compile keeps in its graph, and hooks
that put it into a training loop."""

from ._adaptive import Adaptive, Swap
from ._attach import Handle, attach
from ._freeze import Frozen, freeze_above
from ._ops import Parts, encode, penalty
from ._steer import steered
from ._results import Calibration, Check, Term
from ._watch import Alarm, AlarmRule, Drift, Watch
from .lambdas import DualAscent, ratio_lambda

__all__ = [
    "Adaptive",
    "Alarm",
    "AlarmRule",
    "Calibration",
    "Check",
    "Drift",
    "DualAscent",
    "Frozen",
    "Handle",
    "Parts",
    "Swap",
    "Term",
    "Watch",
    "attach",
    "encode",
    "freeze_above",
    "penalty",
    "ratio_lambda",
    "steered",
]
