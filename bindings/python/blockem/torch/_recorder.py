"""The hidden states at the hooked places in a training forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .. import _ffi
from .._library import fail
from ._place import Place
from ._stack import Call, Stack


@dataclass
class Forward:
    """A training forward: how the decoder was called, and the hidden states at its places."""

    call: Call
    hidden: list[torch.Tensor]


class Pause:
    on = False


class Recorder:
    """Hooks that keep the hidden states of a training forward, until they are taken.

    Their bodies are plain enough for torch.compile, which traces hooks. Between the end of a
    forward and the next they are closed: gradient checkpointing runs layers again in the backward
    pass.
    """

    def __init__(self, stack: Stack, device: str) -> None:
        self.stack = stack
        self.open = self.finished = self.force = self.cached = False
        # Shared by all recorders of a decoder: a base pass for one is no forward for another.
        self.pause = stack.decoder.__dict__.setdefault("_blockem_pause", Pause())
        self.device_type = torch.device(device).type
        self.call: Call | None = None
        #: of the modules around the decoder that run now, by their level
        self.around: dict[int, tuple[tuple, dict]] = {}
        self.outputs: dict[Place, list[tuple[torch.Tensor, int | None]]] | None = None
        decoder = stack.decoder
        self.hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end),
        ]
        for level, module in enumerate(stack.around, 1):
            self.hooks += self._watch_around(level, module)
        for index in sorted(set(stack.indices)):
            layer = stack.layers[index]
            self.hooks.append(layer.register_forward_pre_hook(self._in_layer, with_kwargs=True))
        for place in dict.fromkeys(stack.places):
            # The model may go on in place inside of a block.
            apart = not place.is_boundary
            self.hooks.append(place.read(decoder, self._keeper(place), apart=apart))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.pause.on:
            return
        self.open = self.force or (module.training and torch.is_grad_enabled())
        if not self.open:
            return
        if not torch.compiler.is_compiling() and self.finished:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "the penalty of the training forward before was not taken: call "
                "handle.penalty(batch) after each, or handle.discard()",
            )
        device = self.device_type
        autocast = (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        level = max(self.around, default=0)
        args, kwargs = self.around.get(level, (args, kwargs))
        self.call, self.finished = Call(args, kwargs, autocast, level=level), False
        self.outputs = {place: [] for place in self.stack.places}

    def _watch_around(self, level: int, module: nn.Module) -> list[RemovableHandle]:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.pause.on:
                self.around[level] = args, kwargs

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if not self.pause.on:
                self.around.pop(level, None)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]

    def _in_layer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.open and not self.pause.on:
            self.cached = kwargs.get("past_key_values") is not None

    def _keeper(self, place: Place) -> Callable[[torch.Tensor], None]:
        def keep(hidden: torch.Tensor) -> None:
            if self.open and not self.pause.on:
                version = None if torch.compiler.is_compiling() else hidden._version
                self.outputs[place].append((hidden, version))

        return keep

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.open and not self.pause.on:
            self.open, self.finished = False, True

    def take(self) -> Forward:
        call, outputs, cached = self.call, self.outputs, self.cached
        self.discard()
        if outputs is None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "there was no training forward: the model must run in training mode with gradients "
                "before each penalty",
            )
        hidden = []
        for place in self.stack.places:
            fired = outputs[place]
            if len(fired) != 1:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the model computed {place} {len(fired)} times in one forward; expected once",
                )
            tensor, version = fired[0]
            if version is not None and version != tensor._version:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"{place} was changed in place after it was read",
                )
            hidden.append(tensor)
        return Forward(replace(call, cached=cached), hidden)

    def discard(self) -> None:
        self.call = self.outputs = None
        self.open = self.finished = False

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.discard()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause.on = True
        try:
            yield
        finally:
            self.pause.on = False

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        self.force = True
        try:
            yield
        finally:
            self.force = False
