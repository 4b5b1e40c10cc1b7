"""The penalty in torch: differentiable functions that torch.compile keeps in its graph."""

from ._ops import Parts, encode, penalty

__all__ = ["Parts", "encode", "penalty"]
