"""The decoder layers of a model: where they are, and a pass that stops after what is read."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import _ffi
from .._library import fail
from .._site import Site
from ._modes import evaluating
from ._peft import base_of, without_parallel
from ._place import Place, SumCheck, block_of, place_of


@dataclass(frozen=True)
class Call:
    """A call of a decoder, or of a module around it, to be made again."""

    args: tuple
    kwargs: Mapping[str, Any]
    autocast: tuple[str, bool, torch.dtype] | None
    #: the layers were given a cache of keys and values
    cached: bool = False
    #: how many levels above the decoder the called module lies
    level: int = 0

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What it was called with, by name or place."""
        for name, value in (*enumerate(self.args), *self.kwargs.items()):
            yield from ((str(name), tensor) for tensor in _tensors_of(value))

    def of_rows(self, rows: Sequence[int], count: int) -> Call:
        """For some of the `count` rows of its batch."""
        args = tuple(rows_of(x, rows, count) for x in self.args)
        return replace(self, args=args, kwargs=rows_of(self.kwargs, rows, count))


class Stack:
    """A decoder, which owns the list of its layers, and the places where some sites are in it.

    around: the modules around the decoder, from its parent outwards, where other parts of them than
        the output head have weights: those compute what the decoder is given (embeddings of a
        multimodal model, an encoder).
    """

    def __init__(
        self,
        decoder: nn.Module,
        name: str,
        layers: nn.ModuleList,
        sites: Sequence[Site],
        around: Sequence[nn.Module] = (),
    ) -> None:
        self.decoder, self.name, self.layers = decoder, name, layers
        self.sites, self.around = tuple(sites), tuple(around)
        self.places = tuple(place_of(site, decoder, name, layers) for site in self.sites)
        #: what is not yet known to be what it is said to be
        self.unchecked = {p.path: SumCheck(p, decoder, layers[p.block])
                          for p in self.places if p.added}  # fmt: skip

    @property
    def indices(self) -> tuple[int, ...]:
        """Of each place, the block (0-based) up to which a pass must go."""
        last = len(self.layers) - 1
        return tuple(last if place.block is None else place.block for place in self.places)

    @property
    def outermost(self) -> nn.Module:
        """What is called where the decoder alone does not compute its embeddings."""
        return self.around[-1] if self.around else self.decoder

    def call(self, inputs: Mapping[str, Any]) -> Call:
        """The call of the outermost module with these inputs."""
        return Call((), inputs, autocast=None, level=len(self.around))

    def run(self, call: Call, *, training: bool = False) -> list[torch.Tensor]:
        """The hidden states at the places for a call that is given up right after the last of them.

        training: keeps training mode and gradients; else dropout is off and nothing is recorded.
        """
        called = self._called(call.level)
        # FSDP's root ends its pass in a hook of its own: it must come to its end.
        to_the_end = call.level > 0 and _is_sharded(called)
        outputs: dict[Place, torch.Tensor] = {}
        checks = [] if training else list(self.unchecked.values())
        # FSDP ends the pass of a block in a hook of its own: a block that was begun must end.
        ends = {block_of(p) for p in self.places if self._is_sharded_inside(p)}
        left: set[Place | SumCheck] = {*self.places, *ends, *checks}

        def reached(what: Place | SumCheck) -> None:
            left.discard(what)
            if not left and not to_the_end:
                raise _Stop

        def keep(place: Place, hidden: torch.Tensor) -> None:
            # What is inside of a block may be changed in place there.
            outputs[place] = hidden if place.is_boundary else hidden.clone()
            reached(place)

        def as_called(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if "use_cache" in kwargs or _accepts(self.decoder, "use_cache"):
                kwargs = kwargs | {"use_cache": call.cached and _may_be_packed(kwargs)}
            return args, kwargs

        with contextlib.ExitStack() as stack:
            for place in set(self.places):
                hook = place.read(self.decoder, lambda h, place=place: keep(place, h))
                stack.callback(hook.remove)
            hook = self.decoder.register_forward_pre_hook(as_called, with_kwargs=True)
            stack.callback(hook.remove)
            for end in ends:
                hook = end.read(self.decoder, lambda h, end=end: reached(end))
                stack.callback(hook.remove)
            for check in checks:
                stack.enter_context(check.hooked(lambda check=check: reached(check)))
            stack.enter_context(_eager())
            stack.enter_context(torch.set_grad_enabled(training))
            if not training:
                stack.enter_context(evaluating(called))
            if call.autocast is not None:
                device, enabled, dtype = call.autocast
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            try:
                called(*call.args, **call.kwargs)
            except _Stop:
                pass
        if left:
            missed = [str(place) for place in self.places if place not in outputs]
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"a forward of {type(called).__name__} did not reach {', '.join(missed)}",
            )
        for check in checks:
            del self.unchecked[check.place.path]
        return [outputs[place] for place in self.places]

    def _called(self, level: int) -> nn.Module:
        if level > len(self.around):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"the reference model ({type(self.outermost).__name__}) lacks what computes the "
                "inputs of the decoder in the trained model: give one of the same class",
            )
        return self.decoder if level == 0 else self.around[level - 1]

    def _is_sharded_inside(self, place: Place) -> bool:
        inside = place.block is not None and (not place.is_boundary or place.of_input)
        return inside and _is_sharded(self.layers[place.block])


class _Stop(BaseException):
    """Ends a pass. Not an Exception: code between the layer and the caller must not handle it."""


def find(model: nn.Module, sites: Sequence[Site], layers: str | None = None) -> Stack:
    """The decoder stack of a model, by its structure.

    layers: the dotted name of the layer list, where it cannot be found.
    """
    model = base_of(model)
    if layers is not None:
        return _named(model, layers, sites)
    count = _num_layers(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    }
    if count is not None:
        lists = {name: module for name, module in lists.items() if len(module) == count}
    # Experts, norms or adapters of a layer may be as many as the layers.
    outer = [name for name in lists if not any(name.startswith(f"{one}.") for one in lists)]
    if len(outer) == 1:
        return _named(model, outer[0], sites)
    found = ", ".join(f"{name} ({len(lists[name])})" for name in outer) or "none"
    fail(
        _ffi.STATUS_INVALID_ARGUMENT,
        f"the decoder layers of {type(model).__name__} cannot be told: candidates are {found}; "
        'name the list, like layers="model.layers"',
    )


def _tensors_of(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_of(part)


def rows_of(x: Any, rows: Sequence[int], count: int) -> Any:
    """Some rows of a tensor, or of the tensors of a mapping, that has the `count` rows of a batch.
    Others stay as they are: those of one row for all, and those of one dimension."""
    if isinstance(x, Mapping):
        return {name: rows_of(value, rows, count) for name, value in x.items()}
    if not isinstance(x, torch.Tensor) or x.ndim < 2 or x.shape[0] != count or len(rows) == count:
        return x
    # An index tensor would have to go to the device first, which waits.
    return torch.stack([x[row] for row in rows])


def _named(model: nn.Module, name: str, sites: Sequence[Site]) -> Stack:
    try:
        layers = model.get_submodule(name)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{name} of {type(model).__name__} is not a torch.nn.ModuleList of decoder layers",
        )
    names = name.split(".")[:-1]
    path = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1)]
    decoder, around = path[-1], path[-2::-1]
    around = around if _computes_inputs(model, decoder) else ()
    return Stack(decoder, name, layers, sites, around)


def _computes_inputs(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether other parts of the model than the decoder and the output head have weights."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    own = [part for part in (decoder, head) if part is not None]
    known = {id(p) for part in own for p in part.parameters()}
    return any(id(p) not in known for p in model.parameters())


def _num_layers(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    names = ("num_hidden_layers", "n_layer", "num_layers")
    return next((n for name in names if isinstance(n := getattr(config, name, None), int)), None)


def _may_be_packed(kwargs: Mapping[str, Any]) -> bool:
    """Whether transformers may read from position_ids that a row has several examples: it does so
    without a cache only, so that a pass with and one without would differ."""
    return kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None


def _is_sharded(module: nn.Module) -> bool:
    # Importing FSDPModule takes longer than importing this package.
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _accepts(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _eager() -> contextlib.AbstractContextManager:
    """Compiled layers run uncompiled: a pass that stops in the middle is no graph."""
    return torch.compiler.set_stance("force_eager")
