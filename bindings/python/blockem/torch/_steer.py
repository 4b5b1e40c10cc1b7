"""Steering the output of a decoder layer, in every forward of a model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import _ffi
from .._arrays import Array
from .._core import expect
from .._library import fail
from .._steering import Conditions, Steering
from ._target import layer_of
from ._spread import is_dtensor
from ._stack import _eager, find, hidden_of


@contextlib.contextmanager
def steered(
    model: nn.Module,
    steering: Steering,
    latents: Sequence[int] | Array,
    strengths: Sequence[float] | Array,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    layer: int | None = None,
    layers: str | None = None,
) -> Iterator[nn.Module]:
    """Every forward of a causal language model inside of it has the output of a decoder layer pushed
    along decoder directions: each row of the batch along its own.

        with blockem.torch.steered(model, steering, [17, 4], [0.7, -0.4], scale=scale):
            answers = model.generate(**two_prompts)

    The paper's steering: every position, those of the prompt and each one that is generated, with a
    cache of keys and values or without. Layers above and the cache see the pushed states; the layer's
    own output is not changed in place. Gradients pass through as they are. What is compiled runs
    uncompiled meanwhile.

    model: as for :func:`attach`, also a PeftModel. The hook is on the layer itself: before the final
        norm, also at the last layer.
    steering: on the model's device.
    latents, strengths: [B], as of :meth:`Steering.steer`. A forward of another batch size is an error:
        with num_return_sequences or beams repeat them for every row that the model sees.
    scale: multiplies every strength; see :func:`blockem.activation_scale`.
    mask: [B, S], as of :meth:`Steering.steer`, for forwards of S positions. One new position, as when
        generating with a cache, is pushed in full; any other length is an error.
    layer: 0-based decoder block; None takes ``steering.layer``. One that the SAE contradicts is an
        error.
    layers: dotted name of the list of decoder layers, where it cannot be found.

    Raises Error: what :meth:`Steering.steer` raises, INVALID_ARGUMENT; TypeError.
    """
    expect("model", model, nn.Module)
    expect("steering", steering, Steering)
    index = layer_of(steering, layer)
    module = find(model, [index], layers).layers[index]
    conditions = steering._conditions(latents, strengths)

    def push(module: nn.Module, args: tuple, output: Any) -> Any:
        hidden = hidden_of(output)
        share = _share_of(hidden, mask)
        _expect_rows(hidden, conditions)
        pushed = _Push.apply(hidden, steering, conditions, share, scale)
        return pushed if output is hidden else type(output)((pushed, *output[1:]))

    hook = module.register_forward_hook(push)
    try:
        # A compiled model would not see a hook that came after it was compiled.
        with _eager():
            yield model
    finally:
        hook.remove()


class _Push(torch.autograd.Function):
    """hidden + push, whose gradient with respect to hidden is its own."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        steering: Steering,
        conditions: Conditions,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        pushed = hidden.detach().clone(memory_format=torch.contiguous_format)
        return steering._run(pushed, conditions, mask, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, None, None, None, None


def _share_of(hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """The mask of a forward's positions."""
    if mask is None or hidden.shape[1] == 1 != mask.shape[1]:
        return None
    if hidden.shape[1] != mask.shape[1]:
        fail(
            _ffi.STATUS_SHAPE,
            f"a forward has {hidden.shape[1]} positions, the mask {mask.shape[1]}: with a mask "
            "generate with a cache, and without cutting the prompt into parts",
        )
    return mask.to(hidden.device)


def _expect_rows(hidden: torch.Tensor, conditions: Conditions) -> None:
    if is_dtensor(hidden):
        fail(_ffi.STATUS_UNSUPPORTED, "the layer's output is a DTensor: steer the whole of it")
    if hidden.shape[0] != len(conditions.rows):
        fail(
            _ffi.STATUS_SHAPE,
            f"a forward has {hidden.shape[0]} rows, latents and strengths {len(conditions.rows)}: "
            "give one for each row, also those that num_return_sequences or beams add",
        )
