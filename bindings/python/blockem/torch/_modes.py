"""Training mode of a model's modules, set for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Each submodule has its own training flag again afterwards."""
    flags = [(m, m.training) for m in modules_of(module)]
    try:
        yield
    finally:
        for m, training in flags:
            _set_training(m, training)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Training mode off for a while, dropout with it, but for modules that compute something else in
    evaluation mode (and rewrite their weights for it), so that the pass would not be that of training:
    quantised layers of bitsandbytes have other kernels, RWKV's model scales hidden states down.

    The flags are set without `train()`, whose overrides merge weights and the like.
    """
    changed = [m for m in modules_of(module) if m.training is not _stays_training(m)]
    try:
        for m in changed:
            _set_training(m, not m.training)
        yield
    finally:
        for m in changed:
            _set_training(m, not m.training)


def _stays_training(module: nn.Module) -> bool:
    quantised = any(base.__module__.startswith("bitsandbytes.") for base in type(module).__mro__)
    return quantised or hasattr(module, "layers_are_rescaled")


def modules_of(module: nn.Module) -> list[nn.Module]:
    """The module and all below it, each once. modules() takes several times as long, and large models
    have thousands."""
    seen: set[int] = set()
    found, left = [], [module]
    while left:
        m = left.pop()
        if m is not None and id(m) not in seen:
            seen.add(id(m))
            found.append(m)
            left.extend(m._modules.values())
    return found


def _set_training(module: nn.Module, training: bool) -> None:
    # nn.Module looks for a parameter of that name first, which takes much longer.
    object.__setattr__(module, "training", training)
