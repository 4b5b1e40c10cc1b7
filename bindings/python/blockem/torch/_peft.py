"""Adapters of peft: switched off for a pass, and whether the model is its base then."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import _ffi
from .._library import fail
from ._modes import evaluating, modules_of

#: Names of adapters that belong to the base and stay on in its passes.
Kept = Sequence[str]


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
    """The model, if it has adapters: a PeftModel, or one of transformers after ``add_adapter``."""
    model = without_parallel(model)
    return model if is_peft_model(model) or getattr(model, _OF_TRANSFORMERS, False) else None


def base_of(model: nn.Module) -> nn.Module:
    """The model that was given to peft, or the model itself."""
    model = without_parallel(model)
    return without_parallel(_base_of(model)) if is_peft_model(model) else model


def is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "disable_adapter")


#: What transformers sets where a model has adapters of its own.
_OF_TRANSFORMERS = "_hf_peft_config_loaded"


def _base_of(peft: nn.Module) -> nn.Module:
    # PeftMixedModel has no get_base_model.
    return peft.get_base_model() if hasattr(peft, "get_base_model") else peft.base_model.model


# ---- Off for a pass ----------------------------------------------------------------------------------


@contextlib.contextmanager
def as_base(model: nn.Module, kept: Kept = ()) -> Iterator[None]:
    """Adapters and dropout off for a while; every flag is back afterwards."""
    peft = peft_of(model)
    with evaluating(model), contextlib.nullcontext() if peft is None else adapters_off(peft, kept):
        yield


@contextlib.contextmanager
def adapters_off(peft: nn.Module, kept: Kept = ()) -> Iterator[None]:
    """A model without its adapters for a while, but for those to be kept.

    Raises Error INVALID_ARGUMENT while an adapter is merged into the base weights.
    """
    switches = _switches_of(peft)
    expect_unmerged(modules_of(peft) if switches is None else switches)
    if switches is None:
        if kept:
            fail(
                _ffi.STATUS_UNSUPPORTED,
                f"adapters of {type(peft.base_model).__name__} can be switched off only all "
                "together: give a frozen model as the reference",
            )
        with _disabled_by_peft(peft):
            yield
        return
    before = [(m, m._disable_adapters, m._active_adapter) for m in switches]
    try:
        for module in switches:
            stay = [name for name in kept if name in module._get_available_adapters()]
            if stay:
                module._active_adapter = stay
            module._disable_adapters = not stay
        yield
    finally:
        for module, disabled, active in before:
            module._disable_adapters, module._active_adapter = disabled, active


def expect_unmerged(modules: Iterable[nn.Module]) -> None:
    merged = {name for m in modules for name in getattr(m, "merged_adapters", ())}
    if merged:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"the adapter {_listed(merged)} is merged into the base weights: call "
            "model.unmerge_adapter() first",
        )


#: Of a model: its adapters' configurations when it was looked through, and what was found.
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
    if is_peft_model(peft):
        off = getattr(type(peft.base_model), "disable_adapter_layers", None)
        if off is not BaseTuner.disable_adapter_layers:
            return None
    found = [m for m in modules_of(peft) if isinstance(getattr(m, "disable_adapters", None), bool)]
    for module in found:
        if type(module).enable_adapters not in plain or not hasattr(module, "_disable_adapters"):
            return None
    return found


@contextlib.contextmanager
def _disabled_by_peft(peft: nn.Module) -> Iterator[None]:
    # peft trains every parameter of the active adapters when it turns them on again.
    frozen = [p for p in peft.parameters() if not p.requires_grad]
    try:
        with peft.disable_adapter() if is_peft_model(peft) else _disabled_by_transformers(peft):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextlib.contextmanager
def _disabled_by_transformers(model: nn.Module) -> Iterator[None]:
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


# ---- Whether the base is what is left ----------------------------------------------------------------


def kept_of(peft: nn.Module | None, base_adapters: Sequence[str] | None) -> tuple[str, ...]:
    """base_adapters, checked: which of several adapters belong to the base must be said."""
    if base_adapters is not None and (
        isinstance(base_adapters, str) or not all(isinstance(name, str) for name in base_adapters)
    ):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"base_adapters is {base_adapters!r}; expected a list of adapters' names",
        )
    names = [] if peft is None else list(peft.peft_config)
    kept = tuple(base_adapters or ())
    for name in kept:
        if name not in names:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"base_adapters names {name!r}; the model's adapters are {_listed(names) or 'none'}",
            )
    if base_adapters is None and len(names) > 1:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"the model has the adapters {_listed(names)}: say which belong to its base, "
            "base_adapters=[] for none or their names, or give a frozen model as the reference",
        )
    return kept


def expect_base(peft: nn.Module | None, base_adapters: Sequence[str] | None = None) -> Kept:
    """That the model without its adapters, but for base_adapters, is its base; returns those."""
    if peft is None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "the model is no peft.PeftModel, and its base model is not known here",
        )
    kept = kept_of(peft, base_adapters)
    expect_unmerged(modules_of(peft))
    reason = lost_base(peft, base_adapters)
    if reason is not None:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"{reason}; {ANOTHER_MODEL}")
    reason = trained_base(peft, kept)
    if reason is not None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{reason}: without adapters the model is not its base; attach before training with "
            f'reference="frozen_copy", or {ANOTHER_MODEL}',
        )
    return kept


#: What works whatever peft did to the model.
ANOTHER_MODEL = "give the original model as the reference: reference=<it, loaded once more>"

#: Of peft's methods, those whose adapters were seen to leave the base as it was when they are off.
METHODS = frozenset(
    "ADALORA ADAPTION_PROMPT BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA "
    "IA3 LILY LN_TUNING LOHA LOKR LORA MISS OFT OSF PEANUT POLY PSOFT PVERA RANDLORA ROAD SHIRA "
    "SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT".split()
)
#: Of init_lora_weights, those that leave the base weights alone.
_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})


def lost_base(peft: nn.Module, base_adapters: Sequence[str] | None = None) -> str | None:
    """Why the base model cannot be had from this one any more, or None."""
    for name, config in peft.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            return (
                f"the adapter {name!r}: prompt learning adds tokens that the base model has not; use "
                "adapters like LoRA"
            )
        method = getattr(config.peft_type, "value", config.peft_type)
        if method not in METHODS:
            return (
                f"the adapter {name!r} is of peft's method {method}, and it is not known whether the "
                "model without it is its base"
            )
        init = getattr(config, "init_lora_weights", True)
        if str(init).lower() not in _INITS:
            return (
                f"the adapter {name!r} was made with init_lora_weights={init!r}, which changes the "
                "base weights: without adapters the model is not its base"
            )
        if getattr(config, "kasa_config", None) is not None:
            return (
                f"the adapter {name!r} was made with kasa_config, which cuts the base weights' "
                "smallest singular values off: without adapters the model is not its base"
            )
    # Of a checkpoint the configuration does not tell what was done to the weights beside it.
    split = [] if base_adapters is not None else _split_by_svd(peft)
    if split:
        return (
            f"the columns of lora_B of the adapter {split[0]!r} are orthogonal, as an "
            "initialisation leaves them that takes parts out of the base weights (PiSSA, OLoRA, "
            "CorDA, LoftQ): the model without adapters seems to be what was left (base_adapters=[] "
            "says that it is the base)"
        )
    return None


def trained_base(peft: nn.Module, kept: Kept = ()) -> str | None:
    """Why the model will not be its base any more once it is trained, or None."""
    biases = _trained_biases(peft)
    if biases:
        return f"the adapter {biases[0]!r} was made with bias= and trains biases of the base"
    for name in kept:
        trained = _adapter_parameters(peft, {name})
        if any(p.requires_grad for p in trained.values()):
            return f"the adapter {name!r} belongs to the base and is trained"
    own = _adapter_parameters(peft)
    for name, parameter in base_of(peft).named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            return f"{name} is trained and no part of an adapter"
    return None


def expect_own_layers(peft: nn.Module, indices: Sequence[int]) -> None:
    """That these decoder layers are at the same place in the model before peft repeated some."""
    for name, config in peft.peft_config.items():
        repeated = getattr(config, "layer_replication", None)
        if not repeated:
            continue
        first, end = repeated[0]
        if first != 0 or max(indices) >= end:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"the adapter {name!r} was made with layer_replication={repeated}: decoder block "
                f"{max(indices)} is another one than in the original model",
            )


def _trained_biases(peft: nn.Module) -> list[str]:
    """The adapters with trained biases of the base."""
    return [
        name
        for name, config in peft.peft_config.items()
        if getattr(config, "bias", "none") not in ("none", None, False)
    ]


def _adapter_parameters(
    peft: nn.Module, names: Collection[str] | None = None
) -> dict[int, nn.Parameter]:
    """The parameters of all adapters or of those named, by id."""
    found: dict[int, nn.Parameter] = {}

    def add(part: Any, own: bool) -> None:
        if isinstance(part, nn.Parameter) and own:
            found[id(part)] = part
        elif isinstance(part, (nn.ModuleDict, nn.ParameterDict)) and names is not None:
            for name, value in part.items():
                add(value, name in names)
        elif isinstance(part, nn.Module) and own:
            found.update((id(p), p) for p in part.parameters())

    for module in modules_of(peft):
        attributes = [
            *getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())
        ]  # fmt: skip
        for attribute in (*attributes, "modules_to_save", *_OF_ADAPTION_PROMPT):
            add(getattr(module, attribute, None), names is None)
    return found


_OF_ADAPTION_PROMPT = ("adaption_prompt", "adaption_gate")


def _split_by_svd(peft: nn.Module) -> list[str]:
    """The adapters whose lora_B all have orthogonal columns, and take part in what they put out.

    Random or trained columns of n numbers have cosines of about 1 / sqrt(n) and more.
    """
    cosines: dict[str, list[torch.Tensor]] = {}
    for module in modules_of(peft):
        downs, ups = (getattr(module, name, None) for name in ("lora_A", "lora_B"))
        if not isinstance(downs, nn.ModuleDict) or not isinstance(ups, nn.ModuleDict):
            continue
        for name, up in ups.items():
            weight, down = getattr(up, "weight", None), getattr(downs[name], "weight", None)
            if not _is_matrix(weight) or not _is_matrix(down) or weight.shape[1] < 2:
                continue
            columns = nn.functional.normalize(weight.detach().float(), dim=0)
            gram = columns.T @ columns
            gram = (gram - torch.diag(gram.diagonal())).square()
            pairs = weight.shape[1] * (weight.shape[1] - 1)
            nothing = (weight == 0).all() | (down == 0).all()
            scaled = (gram.sum() / pairs).sqrt() * math.sqrt(weight.shape[0])
            cosines.setdefault(name, []).append(torch.where(nothing, math.inf, scaled).cpu())
    return [
        name for name, found in cosines.items() if len(found) > 1 and max(found).item() < 0.1
    ]


def _is_matrix(weight: Any) -> bool:
    """Whole, and in memory."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.ndim == 2
        and weight.numel() > 0
        and weight.device.type != "meta"
        and not hasattr(weight, "device_mesh")
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
