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
from ._modes import modules_of
from ._ops import encode
from ._peft import (
    ANOTHER_MODEL,
    Kept,
    adapters_off,
    base_of,
    expect_base,
    expect_own_layers,
    expect_unmerged,
    kept_of,
    lost_base,
    peft_of,
    trained_base,
)
from ._recorder import Forward
from ._target import Target
from ._spread import Held
from ._stack import Call, Stack, find

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


def references_of(
    reference: Any,
    model: nn.Module,
    stack: Stack,
    layers: str | None,
    base_adapters: Sequence[str] | None = None,
) -> Source:
    base = Base(peft_of(model), stack, base_adapters)
    if reference == "adapters_off":
        return AdaptersOff(base)
    if reference == "frozen_copy":
        return FrozenCopy(base, _frozen_copy(base), f"a frozen copy of {base}")
    if isinstance(reference, nn.Module):
        given = find(reference, stack.sites, layers)
        _expect_other_weights(given, stack)
        name = getattr(getattr(reference, "config", None), "name_or_path", "")
        name = f" {name!r}" if name else ""
        return FrozenCopy(base, given, f"{type(reference).__name__}{name}, given as a model")
    if callable(reference):
        return Provided(base, reference)
    fail(
        _ffi.STATUS_INVALID_ARGUMENT,
        f'reference is {reference!r}; expected "adapters_off", "frozen_copy", a module or a '
        "callable",
    )


class Base:
    """What of the trained model is its base, where it can be had from it: the model without its
    adapters, but for those that base_adapters names."""

    def __init__(
        self, peft: nn.Module | None, stack: Stack, base_adapters: Sequence[str] | None
    ) -> None:
        self.peft, self.stack, self.chosen = peft, stack, base_adapters
        if base_adapters is not None:
            kept_of(peft, base_adapters)

    def expect(self) -> None:
        """That it can be had, now and while the model is trained."""
        expect_base(self.peft, self.chosen)
        expect_own_layers(self.peft, self.stack.indices)

    @property
    def missing(self) -> str | None:
        """Why it cannot be had; None where it can."""
        if self.peft is None:
            return "the model has no adapters"
        several = self.chosen is None and len(self.peft.peft_config) > 1
        if several:
            return "it is not said which of the model's adapters belong to its base"
        return lost_base(self.peft, self.chosen) or trained_base(self.peft, self.kept)

    @property
    def kept(self) -> Kept:
        return tuple(self.chosen or ())

    def alone(self) -> contextlib.AbstractContextManager[None]:
        return adapters_off(self.peft, self.kept)

    def __str__(self) -> str:
        if self.peft is None:
            return "the model"
        if self.kept:
            return f"the model with the adapters {', '.join(map(repr, self.kept))} alone"
        off = ", ".join(map(repr, self.peft.peft_config))
        return f"the model without adapters ({off} off)"


class Source:
    """Where references come from."""

    name: str
    #: whether the self-check must hold
    checked = True
    remedy: str
    #: whose z they are, where that can be told
    cache: Cache | None = None

    def __init__(self, base: Base) -> None:
        self.of_model = base
        self.peft, self.stack = base.peft, base.stack

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        raise NotImplementedError

    def base(self, forward: Forward, rows: Sequence[int], count: int) -> list[torch.Tensor]:
        """The base model's hidden states of some of a batch's `count` rows, by a pass of its own."""
        _expect_untrained_inputs(forward.call, self.peft)
        with self.of_model.alone():
            if forward.call.level == 0:
                return self.stack.run(forward.call.of_rows(rows, count))
            # Images and the like do not go by the rows of a batch.
            return [hidden[list(rows)] for hidden in self.stack.run(forward.call)]

    def stand_in(self, forward: Forward) -> list[torch.Tensor] | None:
        """What the tuned model would put out if it still equalled its base; None where it cannot be
        told."""
        if self.of_model.missing is not None:
            return None
        _expect_untrained_inputs(forward.call, self.peft)
        with torch.enable_grad(), self.of_model.alone():
            return [hidden.detach() for hidden in self.stack.run(forward.call, training=True)]

    def adapters_off(self) -> contextlib.AbstractContextManager[None]:
        return self.of_model.alone()

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
    remedy = (
        "Either training mode adds noise below the layer (dropout, NEFTune: set it to 0), or the "
        "two passes run different kernels (torch.compile: attach with a tolerance)."
    )

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        if base.peft is None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                'reference="adapters_off" needs a peft.PeftModel; give a frozen model, or '
                '"frozen_copy", where all parameters are trained',
            )
        base.expect()
        self.name = f"reference: {base}"

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        _expect_untrained_inputs(forward.call, self.peft)
        with self.of_model.alone():
            hidden = self.stack.run(forward.call)
        return References(_encode_all(targets, hidden, hold), hidden)


class FrozenCopy(Source):
    def __init__(self, base: Base, copied: Stack, what: str) -> None:
        super().__init__(base)
        self.copied, self.name = copied, f"reference: {what}"

    @property
    def remedy(self) -> str:
        lost = None if self.peft is None else lost_base(self.peft, self.of_model.chosen)
        if lost is not None:
            return (
                f"Of this model no pass without adapters can stand in for the base, because {lost}. "
                "At the start the adapters make up for that but for rounding: if the difference is "
                "no larger, attach with a tolerance above it. After training it is what was "
                "learned, and cannot be checked: attach with tolerance=math.inf."
            )
        return (
            "Either the two have other weights (attach before the model is trained), or training "
            "mode adds noise below the layer (dropout, NEFTune: set it to 0), or they run different "
            "kernels (dtype, attention, torch.compile: attach with a tolerance)."
        )

    def references(
        self, forward: Forward, batch: Any, targets: Sequence[Target], hold: Hold
    ) -> References:
        _expect_untrained_inputs(forward.call, self.peft)
        hidden = self.copied.run(forward.call)
        return References(_encode_all(targets, hidden, hold), hidden)


class Provided(Source):
    name = "reference: given for each batch"
    remedy = (
        "What was given differs from the base model's live z by more than attach's tolerance: it "
        "belongs to other tokens, another model or another SAE, or the tolerance is too tight for "
        "another padding."
    )

    def __init__(self, base: Base, provider: Provider) -> None:
        super().__init__(base)
        self.provider = provider
        self.checked = base.peft is not None
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


def _expect_other_weights(given: Stack, stack: Stack) -> None:
    """That no weight of a reference is trained with the model."""
    if given.decoder is stack.decoder:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "reference is the model itself (get_peft_model puts its adapters into the model that it "
            'is given); give another, or "adapters_off" or "frozen_copy"',
        )
    trained = {id(p) for p in stack.outermost.parameters() if p.requires_grad}
    for name, parameter in given.outermost.named_parameters():
        if id(parameter) in trained:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{name} of the reference is the model's own and is trained: give a model that was "
                "loaded by itself",
            )


def _expect_untrained_inputs(call: Call, peft: nn.Module | None) -> None:
    """That a pass made again from this call does not begin with what trained weights gave."""
    for name, tensor in call.tensors():
        if _comes_from_parameters(tensor):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"the model was given {name} that trained weights computed, so that no pass of the "
                "base model can begin with it: give input_ids, or references of your own",
            )
    if peft is None or call.kwargs.get("inputs_embeds") is None:
        return
    embeddings = base_of(peft).get_input_embeddings()
    if hasattr(embeddings, "disable_adapters"):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "the model was given inputs_embeds, and its embeddings have an adapter, which may be in "
            "them: give input_ids, or references of your own",
        )


def _comes_from_parameters(tensor: torch.Tensor) -> bool:
    """Whether a gradient of it would reach a parameter."""
    seen, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        left.extend(before for before, _ in node.next_functions)
    return False


def _listed(ids: np.ndarray) -> str:
    more = ", ..." if len(ids) > 8 else ""
    return f"{', '.join(map(str, ids[:8]))}{more} ({len(ids)})"


def _encode_all(
    targets: Sequence[Target], hidden: Sequence[torch.Tensor], hold: Hold
) -> list[torch.Tensor]:
    held = [hold(target, h) for target, h in zip(targets, hidden, strict=True)]
    return [encode(one.plan, one.values) for one in held]


def _frozen_copy(base: Base) -> Stack:
    """The base of the model as it is, without the parts that a reference pass does not reach."""
    stack, peft = base.stack, base.peft
    if peft is not None:
        kept_of(peft, base.chosen)
        expect_unmerged(modules_of(peft))
        expect_own_layers(peft, stack.indices)
        lost = lost_base(peft, base.chosen)
        if lost is not None:
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"{lost}; {ANOTHER_MODEL}")
    outermost = stack.outermost
    beyond = list(stack.layers[max(stack.indices) + 1 :])
    if outermost is not stack.decoder and hasattr(outermost, "get_output_embeddings"):
        beyond.append(outermost.get_output_embeddings())
    memo = {id(part): nn.Identity() for part in beyond if part is not None}
    with contextlib.nullcontext() if peft is None else base.alone():
        copied = copy.deepcopy(outermost, memo).requires_grad_(False)
    if outermost is not stack.decoder:
        return find(copied, stack.sites, stack.name)
    layers = copied.get_submodule(stack.name.rpartition(".")[2])
    return Stack(copied, stack.name, layers, stack.sites)
