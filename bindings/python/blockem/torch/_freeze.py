"""Training only what lies at or below the block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import _ffi
from .._library import fail
from .._site import block_output
from ._stack import find

__all__ = ["Frozen", "freeze_above"]


@dataclass(frozen=True)
class Frozen:
    """What :func:`freeze_above` froze."""

    #: names of the parameters
    names: tuple[str, ...]
    #: how many trained numbers are left
    trainable: int
    parameters: tuple[nn.Parameter, ...] = field(repr=False)
    _hooks: tuple[RemovableHandle, ...] = field(repr=False)

    def undo(self) -> None:
        """Trains them again."""
        for parameter, hook in zip(self.parameters, self._hooks, strict=True):
            hook.remove()
            parameter.requires_grad_(True)

    def __str__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters)
        return (
            f"{len(self.names)} parameters of the layers above frozen ({count} numbers; "
            f"{self.trainable} are trained on)"
        )


def freeze_above(model: nn.Module, layer: int, *, layers: str | None = None) -> Frozen:
    """Stops training the decoder layers above a block: `layer + 1` to the last.

    What lies above the blocked layer cannot be seen by its latents, so misalignment can be learned
    there around them; BLOCK-EM's authors have runs with adapters up to the block only.

    model: a Hugging Face causal language model, PeftModel or not, before DistributedDataParallel
        or FSDP wraps it: their reducers count the trained parameters.
    layer: 0-based decoder block whose output the SAE reads.
    layers: dotted name of the list of decoder layers, where it cannot be found.

    Embeddings, final norm and output head stay as they are. What is frozen loses its gradient, so
    that an optimizer leaves it alone at once, and gets no other until ``undo``: neither where peft's
    ``disable_adapter()`` sets requires_grad of all active adapters.

    Raises Error INVALID_ARGUMENT: nothing above is trained, or nothing would be left to train.
    """
    stack = find(model, [block_output(layer)], layers)
    above = [p for block in stack.layers[layer + 1 :] for p in block.parameters()]
    above = {id(p) for p in above if p.requires_grad}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = tuple(name for name, p in trained if id(p) in above)
    left = sum(p.numel() for _, p in trained if id(p) not in above)
    if not names:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"no parameter above decoder block {layer} is trained: there is nothing to freeze",
        )
    if not left:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"all that is trained lies above decoder block {layer}: nothing would be left to train",
        )
    parameters = tuple(p for _, p in trained if id(p) in above)
    # A hook can be given only to what requires a gradient.
    hooks = tuple(p.register_post_accumulate_grad_hook(_drop_gradient) for p in parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    return Frozen(names, left, parameters, hooks)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None
