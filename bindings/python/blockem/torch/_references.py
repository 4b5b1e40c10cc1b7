"""Where z of the base model comes from: adapters off, a frozen copy, or the caller."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .. import _ffi
from .._cache import Cache
from .._core import Plan
from .._library import fail
from ._ops import encode
from ._recorder import Forward
from ._target import Target
from ._spread import Held
from ._stack import Stack, adapters_off, find, peft_of

#: How a layer's output lies on the ranks.
Hold = Callable[[Target, torch.Tensor], Held]

#: Given a batch, z of the base model for each target.
Provider = Callable[[Any], torch.Tensor | Sequence[torch.Tensor]]


class References(NamedTuple):
    """Of the base model, for each target."""

    #: z: of this rank's tokens, or of all
    latents: list[torch.Tensor]
    #: the hidden states that z came from, where there was a pass
    hidden: list[torch.Tensor] | None


def references_of(reference: Any, model: nn.Module, stack: Stack, layers: str | None) -> Source:
    peft = peft_of(model)
    if reference == "adapters_off":
        return AdaptersOff(peft, stack)
    if reference == "frozen_copy":
        if peft is not None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                'a PeftModel needs no copy: attach with reference="adapters_off"',
            )
        return FrozenCopy(peft, stack, _frozen_copy(stack))
    if isinstance(reference, nn.Module):
        copied = find(reference, stack.indices, layers)
        if copied.decoder is stack.decoder:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                'reference is the model itself; give another, or "adapters_off" or "frozen_copy"',
            )
        return FrozenCopy(peft, stack, copied)
    if callable(reference):
        return Provided(peft, stack, reference)
    fail(
        _ffi.STATUS_INVALID_ARGUMENT,
        f'reference is {reference!r}; expected "adapters_off", "frozen_copy", a module or a '
        "callable",
    )


class Source:
    """Where references come from."""

    name: str
    #: whether the self-check must hold
    checked = True
    remedy: str
    #: whose z they are, where that can be told
    cache: Cache | None = None

    def __init__(self, peft: nn.Module | None, stack: Stack) -> None:
        self.peft, self.stack = peft, stack

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        raise NotImplementedError

    def base(self, forward: Forward, rows: Sequence[int], count: int) -> list[torch.Tensor]:
        """The base model's hidden states of some of a batch's `count` rows, by a pass of its own."""
        with self.adapters_off():
            return self.stack.run(forward.call.of_rows(rows, count))

    def stand_in(self, forward: Forward) -> list[torch.Tensor] | None:
        """What the tuned model would put out if it still equalled its base."""
        if self.peft is None:
            return None
        with torch.enable_grad(), self.adapters_off():
            return [hidden.detach() for hidden in self.stack.run(forward.call, training=True)]

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        return adapters_off(self.peft)

    def expect_latents(self, plan: Plan) -> None:
        """That references are of this plan's latents; z does not depend on signs and weights."""
        if self.cache is None:
            return
        theirs, mine = self.cache.plan.latents.ids, plan.latents.ids
        if not np.array_equal(theirs, mine):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{self.cache.path}: the cache gives z of the latents {_listed(theirs)}, the penalty "
                f"is on {_listed(mine)}: swap with cache=, or give the cache their plan (Cache.use)",
            )


class AdaptersOff(Source):
    name = "reference: the same model, adapters off"
    remedy = (
        "Either training mode adds noise below the layer (dropout, NEFTune: set it to 0), or the "
        "two passes run different kernels (torch.compile: attach with a tolerance)."
    )

    def __init__(self, peft: nn.Module | None, stack: Stack) -> None:
        super().__init__(peft, stack)
        if peft is None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                'reference="adapters_off" needs a peft.PeftModel; give a frozen model, or '
                '"frozen_copy", where all parameters are trained',
            )
        expect_adapters_only(peft)

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        with self.adapters_off():
            hidden = self.stack.run(forward.call)
        return References(_encode_all(targets, hidden, hold), hidden)


class FrozenCopy(Source):
    name = "reference: a frozen copy"
    remedy = (
        "Either the copy has other weights, or training mode adds noise below the layer (dropout, "
        "NEFTune: set it to 0), or the two run different kernels (dtype, attention, torch.compile)."
    )

    def __init__(self, peft: nn.Module | None, stack: Stack, copied: Stack) -> None:
        super().__init__(peft, stack)
        self.copied = copied

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        hidden = self.copied.run(forward.call)
        return References(_encode_all(targets, hidden, hold), hidden)


class Provided(Source):
    name = "reference: given for each batch"
    remedy = (
        "What was given differs from the base model's live z by more than attach's tolerance: it "
        "belongs to other tokens, another model or another SAE, or the tolerance is too tight for "
        "another padding."
    )

    def __init__(self, peft: nn.Module | None, stack: Stack, provider: Provider) -> None:
        super().__init__(peft, stack)
        self.provider = provider
        self.checked = peft is not None
        method = provider.func if isinstance(provider, functools.partial) else provider
        owner = getattr(method, "__self__", None)
        self.cache = owner if isinstance(owner, Cache) else None

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        for target in targets:
            # A cache may have been given another plan meanwhile.
            self.expect_latents(target.plan)
        given = self.provider(batch)
        given = [given] if isinstance(given, torch.Tensor) else list(given)
        if len(given) != len(targets):
            fail(
                _ffi.STATUS_SHAPE,
                f"reference gave {len(given)} tensors for {len(targets)} layers",
            )
        latents = [z.to(h.device, non_blocking=True) for z, h in zip(given, forward.hidden)]
        return References(latents, None)


def expect_adapters_only(peft: nn.Module | None) -> None:
    """Without adapters the model is its base."""
    if peft is None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "the model is no peft.PeftModel, and its base model is not known here",
        )
    if any(config.is_prompt_learning for config in peft.peft_config.values()):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "prompt learning adds tokens that the base model has not; use adapters like LoRA",
        )
    marks = (peft.base_model.prefix, "modules_to_save", "trainable_tokens", "token_adapter")
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad and not any(mark in name for mark in marks):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{name} is trained and no part of an adapter: without adapters the model is "
                'not its base; freeze it or attach with reference="frozen_copy"',
            )


def _listed(ids: np.ndarray) -> str:
    more = ", ..." if len(ids) > 8 else ""
    return f"{', '.join(map(str, ids[:8]))}{more} ({len(ids)})"


def _encode_all(
    targets: Sequence[Target], hidden: Sequence[torch.Tensor], hold: Hold
) -> list[torch.Tensor]:
    held = [hold(target, h) for target, h in zip(targets, hidden, strict=True)]
    return [encode(one.plan, one.values) for one in held]


def _frozen_copy(stack: Stack) -> Stack:
    """The decoder as it is, without the layers that a reference pass does not reach."""
    beyond = stack.layers[max(stack.indices) + 1 :]
    memo = {id(layer): nn.Identity() for layer in beyond}
    decoder = copy.deepcopy(stack.decoder, memo).requires_grad_(False)
    layers = decoder.get_submodule(stack.name.rpartition(".")[2])
    return Stack(decoder, stack.name, layers, stack.indices)
