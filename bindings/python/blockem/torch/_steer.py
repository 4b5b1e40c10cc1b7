"""Steering the hidden states at an SAE's site, in every forward of a model for a while."""

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
from .._site import site_of
from ._place import input_of
from ._spread import is_dtensor, of_tokens
from ._stack import _eager, find


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
    site: str | None = None,
    layers: str | None = None,
) -> Iterator[nn.Module]:
    """Every forward of a causal language model inside of it has its hidden states pushed along decoder
    directions, at the place that the SAE reads: each row of the batch along its own.

        with blockem.torch.steered(model, steering, [17, 4], [0.7, -0.4], scale=scale):
            answers = model.generate(**two_prompts)

    The paper's steering: every position, those of the prompt and each one that is generated, with a
    cache of keys and values or without. What follows and the cache see the pushed states; the
    module's own output is not changed in place. Gradients pass through as they are. What is compiled
    runs uncompiled meanwhile.

    model: as for :func:`attach`, also a PeftModel. The hook is on the module itself: before the final
        norm, also at the last block.
    steering: on the model's device.
    latents, strengths: [B], as of :meth:`Steering.steer`. A forward of another batch size is an error:
        with num_return_sequences or beams repeat them for every row that the model sees.
    scale: multiplies every strength; see :func:`blockem.activation_scale`.
    mask: [B, S], as of :meth:`Steering.steer`, for forwards of S positions. One new position, as when
        generating with a cache, is pushed in full; any other length is an error.
    layer, site: where, as of :func:`attach`; None takes what the SAE says. At a module's input, such
        as "attention_z", the module is given the pushed states.
    layers: dotted name of the list of decoder layers, where it cannot be found.

    Raises Error: what :meth:`Steering.steer` raises, INVALID_ARGUMENT, UNSUPPORTED (the model does
    not show the SAE's site); TypeError.
    """
    expect("model", model, nn.Module)
    expect("steering", steering, Steering)
    where = site_of(steering, layer, site)
    if where.kind == "block_middle":
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"the SAE reads {where}: what is pushed there does not reach the residual stream",
        )
    stack = find(model, [where], layers)
    (place,) = stack.places
    place.expect_width("the steering", steering.d_in)
    conditions = steering._conditions(latents, strengths)
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != len(conditions.rows)):
        fail(
            _ffi.STATUS_SHAPE,
            f"mask has the shape {list(mask.shape)}; expected [{len(conditions.rows)}, S], a row for "
            "each of latents and strengths",
        )
    rows = _Rows()

    def push(hidden: torch.Tensor) -> torch.Tensor:
        whole = rows.of(hidden)
        share = _share_of(whole, mask)
        _expect_rows(whole, conditions)
        return _Push.apply(whole, steering, conditions, share, scale).view(hidden.shape)

    with contextlib.ExitStack() as hooks, contextlib.ExitStack() as checks:
        if place.block is not None and not place.is_boundary:
            hooks.callback(input_of(place).read(stack.decoder, rows.see).remove)
        hooks.callback(place.change(stack.decoder, push).remove)
        for check in stack.unchecked.values():
            # The first forward tells.
            checks.enter_context(check.hooked(checks.close))
        # A compiled model would not see a hook that came after it was compiled.
        hooks.enter_context(_eager())
        yield model


class _Rows:
    """How many rows a forward has, which some modules inside of a block are not told."""

    def __init__(self) -> None:
        self.lead: tuple[int, ...] | None = None

    def see(self, hidden: torch.Tensor) -> None:
        self.lead = tuple(hidden.shape[:-1])

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, d]"""
        if self.lead is not None and len(self.lead) == 2 and not is_dtensor(hidden):
            return of_tokens(hidden, self.lead)
        if hidden.ndim != 3:
            found = list(hidden.shape)
            fail(_ffi.STATUS_SHAPE, f"hidden has the shape {found}; expected [B, S, d]")
        return hidden


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
        fail(_ffi.STATUS_UNSUPPORTED, "the hidden states are a DTensor: steer the whole of them")
    if hidden.shape[0] != len(conditions.rows):
        fail(
            _ffi.STATUS_SHAPE,
            f"a forward has {hidden.shape[0]} rows, latents and strengths {len(conditions.rows)}: "
            "give one for each row, also those that num_return_sequences or beams add",
        )
