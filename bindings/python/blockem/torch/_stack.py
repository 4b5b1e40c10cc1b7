"""The decoder layers of a model: where they are, and a pass that stops after one of them."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import _ffi
from .._library import fail


@dataclass(frozen=True)
class Call:
    """A call of a decoder, to be made again."""

    args: tuple
    kwargs: Mapping[str, Any]
    autocast: tuple[str, bool, torch.dtype] | None
    #: the layers were given a cache of keys and values
    cached: bool = False
    #: of the outermost module, which computes what the decoder is given
    whole: bool = False

    def of_rows(self, rows: Sequence[int], count: int) -> Call:
        """For some of the `count` rows of its batch."""
        args = tuple(rows_of(x, rows, count) for x in self.args)
        return replace(self, args=args, kwargs=rows_of(self.kwargs, rows, count))


class Stack:
    """A decoder, which owns the list of its layers, and the indices of some of them (0-based)."""

    def __init__(
        self,
        decoder: nn.Module,
        name: str,
        layers: nn.ModuleList,
        indices: Sequence[int],
        outermost: nn.Module | None = None,
    ) -> None:
        self.decoder, self.name, self.layers = decoder, name, layers
        #: the model, which may have vision and audio towers
        self.outermost = outermost or decoder
        self.indices = tuple(indices)
        for index in self.indices:
            if not 0 <= index < len(layers):
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"layer {index} does not exist: {name} has the blocks 0 to {len(layers) - 1} "
                    "(0-based; the output of block N is hidden_states[N + 1])",
                )

    def call(self, inputs: Mapping[str, Any]) -> Call:
        """The call of the outermost module with these inputs."""
        return Call((), inputs, autocast=None, whole=True)

    def run(self, call: Call, *, training: bool = False) -> list[torch.Tensor]:
        """The outputs of the layers for a call that is given up right after the last of them.

        training: keeps training mode and gradients; else dropout is off and nothing is recorded.
        """
        outputs: dict[int, torch.Tensor] = {}
        last = max(self.indices)

        def keep(index: int, output: Any) -> None:
            outputs[index] = hidden_of(output)
            if index == last:
                raise _Stop

        with contextlib.ExitStack() as stack:
            for index in set(self.indices):
                hook = self.layers[index].register_forward_hook(
                    lambda module, args, output, index=index: keep(index, output)
                )
                stack.callback(hook.remove)
            stack.enter_context(_eager())
            stack.enter_context(torch.set_grad_enabled(training))
            if not training:
                stack.enter_context(evaluating(self.decoder))
            if call.autocast is not None:
                device, enabled, dtype = call.autocast
                stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            kwargs = dict(call.kwargs)
            if "use_cache" in kwargs or _accepts(self.decoder, "use_cache"):
                kwargs["use_cache"] = call.cached and _may_be_packed(kwargs)
            called = self.outermost if call.whole else self.decoder
            try:
                called(*call.args, **kwargs)
            except _Stop:
                return [outputs[index] for index in self.indices]
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{self.name}.{last} was not reached by a forward of {type(self.decoder).__name__}",
        )


class _Stop(BaseException):
    """Ends a pass. Not an Exception: code between the layer and the caller must not handle it."""


def find(model: nn.Module, indices: Sequence[int], layers: str | None = None) -> Stack:
    """The decoder stack of a model, by its structure.

    layers: the dotted name of the layer list, where it cannot be found.
    """
    model = without_parallel(model)
    model = model if peft_of(model) is None else without_parallel(model.get_base_model())
    if layers is not None:
        return _named(model, layers, indices)
    count = _num_layers(model)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    if count is not None:
        lists = [(name, module) for name, module in lists if len(module) == count]
        # Experts, norms or adapters of a layer may be as many as the layers: these lie deeper.
        depth = min((name.count(".") for name, _ in lists), default=0)
        lists = [(name, module) for name, module in lists if name.count(".") == depth]
    if len(lists) == 1:
        return _named(model, lists[0][0], indices)
    found = ", ".join(f"{name} ({len(module)})" for name, module in lists) or "none"
    fail(
        _ffi.STATUS_INVALID_ARGUMENT,
        f"the decoder layers of {type(model).__name__} cannot be told: candidates are {found}; "
        'name the list, like layers="model.layers"',
    )


def without_parallel(model: nn.Module) -> nn.Module:
    """The model below DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def peft_of(model: nn.Module) -> nn.Module | None:
    """The model, if it is a PeftModel."""
    model = without_parallel(model)
    return model if hasattr(model, "disable_adapter") else None


@contextlib.contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Each submodule has its own training flag again afterwards."""
    flags = [(m, m.training) for m in _modules_of(module)]
    try:
        yield
    finally:
        for m, training in flags:
            _set_training(m, training)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Training mode off for a while, dropout with it.

    The flags are set without `train()`, whose overrides merge weights and the like.
    """
    training = [m for m in _modules_of(module) if m.training]
    try:
        for m in training:
            _set_training(m, False)
        yield
    finally:
        for m in training:
            _set_training(m, True)


def _modules_of(module: nn.Module) -> list[nn.Module]:
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


@contextlib.contextmanager
def adapters_off(peft: nn.Module) -> Iterator[None]:
    """A PeftModel without its adapters for a while."""
    switches = _switches_of(peft)
    if switches is None:
        with _disabled_by_peft(peft):
            yield
        return
    on = [module for module in switches if not module.disable_adapters]
    try:
        for module in on:
            module._disable_adapters = True
        yield
    finally:
        for module in on:
            module._disable_adapters = False


#: Of a PeftModel: its adapters' configurations when it was looked through, and what was found.
_looked_through: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def _switches_of(peft: nn.Module) -> list[nn.Module] | None:
    """The modules whose flag is all that turns the adapters off; None where it takes more.

    peft's disable_adapter asks every adapter in every layer for its state and goes through all
    parameters: in a model of 32 layers that keeps the processor longer than launching the pass.
    """
    configs = list(peft.peft_config.values())
    seen, found = _looked_through.get(peft, ([], None))
    # By identity: another adapter may have the name of one that was deleted.
    if list(map(id, seen)) != list(map(id, configs)):
        found = _find_switches(peft)
        _looked_through[peft] = configs, found
    return found


def _find_switches(peft: nn.Module) -> list[nn.Module] | None:
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    plain = {BaseTunerLayer.enable_adapters, ModulesToSaveWrapper.enable_adapters}
    off = getattr(type(peft.base_model), "disable_adapter_layers", None)
    biases = any(getattr(config, "bias", "none") != "none" for config in peft.peft_config.values())
    if off is not BaseTuner.disable_adapter_layers or biases:
        return None
    found = [m for m in _modules_of(peft) if isinstance(getattr(m, "disable_adapters", None), bool)]
    for module in found:
        if type(module).enable_adapters not in plain or not hasattr(module, "_disable_adapters"):
            return None
    return found


@contextlib.contextmanager
def _disabled_by_peft(peft: nn.Module) -> Iterator[None]:
    # peft trains every parameter of the active adapters when it turns them on again.
    frozen = [p for p in peft.parameters() if not p.requires_grad]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Adapters and dropout off for a while; every flag is back afterwards."""
    peft = peft_of(model)
    with evaluating(model), contextlib.nullcontext() if peft is None else adapters_off(peft):
        yield


def rows_of(x: Any, rows: Sequence[int], count: int) -> Any:
    """Some rows of a tensor, or of the tensors of a mapping, that has the `count` rows of a batch.
    Others stay as they are: those of one row for all, and those of one dimension."""
    if isinstance(x, Mapping):
        return {name: rows_of(value, rows, count) for name, value in x.items()}
    if not isinstance(x, torch.Tensor) or x.ndim < 2 or x.shape[0] != count or len(rows) == count:
        return x
    # An index tensor would have to go to the device first, which waits.
    return torch.stack([x[row] for row in rows])


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a layer's output: itself, or the first of a tuple."""
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(hidden, torch.Tensor):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"a decoder layer put out a {type(output).__name__}; expected a tensor or a tuple that "
            "begins with one",
        )
    return hidden


def _named(model: nn.Module, name: str, indices: Sequence[int]) -> Stack:
    try:
        layers = model.get_submodule(name)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{name} of {type(model).__name__} is not a torch.nn.ModuleList of decoder layers",
        )
    return Stack(model.get_submodule(name.rpartition(".")[0]), name, layers, indices, model)


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


def _accepts(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def _eager() -> contextlib.AbstractContextManager:
    """Compiled layers run uncompiled: a pass that stops in the middle is no graph."""
    return torch.compiler.set_stance("force_eager")
