"""Filling a reference cache from a model's hidden states, and references for a batch."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from . import _ffi
from ._cache import Cache
from ._core import Plan
from ._library import fail
from ._torch_context import MEDIA, PACKING, TEXT, Example, Inputs, examples_of
from .torch._peft import as_base, base_of, expect_base, expect_own_layers, peft_of
from .torch._ranks import Ranks
from .torch._spread import is_dtensor, of_tokens
from .torch._stack import Stack, find

__all__ = ["base_model_digest", "extend", "fill", "reference"]


def reference(cache: Cache, batch: Mapping[str, Any], *, packed: bool) -> torch.Tensor:
    """See :meth:`Cache.reference`."""
    found = _examples(cache, batch, packed)
    ids, keys = batch["input_ids"], [_key(cache, e) for e in found]
    # torch.zeros would wake torch's threads for a few kilobytes.
    z = torch.from_numpy(np.zeros((*ids.shape, cache.plan.num_latents), np.float32))
    if ids.device.type == "cuda":
        z = z.pin_memory()
    places = [_place(z, e) for e in found]
    parts = [
        torch.empty(len(e.columns), z.shape[-1]) if place is None else place
        for e, place in zip(found, places, strict=True)
    ]
    cache.get(keys, parts)
    for e, place, part in zip(found, places, parts, strict=True):
        if place is None:
            z[e.row, e.columns] = part
    return z.to(ids.device, non_blocking=True)


def _place(z: torch.Tensor, example: Example) -> torch.Tensor | None:
    """z of an example in place, unless padding parts its tokens."""
    first, count = int(example.columns[0]), len(example.columns)
    if int(example.columns[-1]) - first == count - 1:
        return z[example.row, first : first + count]
    return None


def fill(
    cache: Cache,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: str | None,
    packed: bool,
    progress: bool,
    base_adapters: Sequence[str] | None,
) -> int:
    """See :meth:`Cache.fill`."""
    stored, base = 0, base_of(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"{type(base).__name__} has an encoder, whose input no key covers: use a reference by a "
            'pass, like attach(reference="adapters_off")',
        )
    stack = find(model, [cache._site], layers)
    kept = ()
    if peft_of(model) is not None:
        kept = expect_base(peft_of(model), base_adapters)
        expect_own_layers(peft_of(model), stack.indices)
    _keep_placeholders(cache, base)
    _keep_adapters(cache, base, kept)
    with as_base(model, kept), torch.no_grad():
        for batch in _shown(batches, progress):
            found = _examples(cache, batch, packed)
            keys = [_key(cache, e) for e in found]
            absent = cache.missing(keys).any(axis=1)
            wanted = [pair for pair, is_absent in zip(zip(found, keys), absent) if is_absent]
            if not wanted:
                continue
            rows = sorted({e.row for e, _ in wanted})
            hidden = _hidden_after(cache, stack, batch, rows)
            z = [
                cache.plan.encode(
                    hidden[rows.index(e.row), e.columns.to(hidden.device)].to(cache.plan.device)
                ).cpu()
                for e, _ in wanted
            ]
            cache.put([key for _, key in wanted], z)
            stored += len({key for _, key in wanted})
    return stored


def extend(
    cache: Cache,
    plan: Plan,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    process_group: Any,
    **how: Any,
) -> int:
    """See :meth:`Cache.extend`."""
    ranks = Ranks(process_group, None, plan.device)
    if ranks.world > 1:
        return _extend_together(cache, plan, model, batches, ranks, how)
    before = cache.plan
    cache.use(plan)
    try:
        if cache._mode != "read":
            return fill(cache, model, batches, **how)
        with cache._released():
            with _writer(cache, plan) as writer:
                return fill(writer, model, batches, **how)
    except BaseException:
        cache.plan = before
        raise


def _writer(cache: Cache, plan: Plan) -> Cache:
    return Cache(
        cache.path, plan, base_model=cache.base_model, site=cache.site, layer=cache.layer,
        dtype=cache.dtype, mode="write", ignore=cache.ignore, context=cache.context,
    )  # fmt: skip


def _extend_together(
    cache: Cache,
    plan: Plan,
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ranks: Ranks,
    how: Mapping[str, Any],
) -> int:
    """The first rank fills while the others wait; what it could not do, all say."""
    if cache._mode != "read":
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{cache.path}: several ranks share the cache; let each open it for reading",
        )
    sharded = [n for n, p in model.named_parameters() if is_dtensor(p) or hasattr(p, "ds_id")]
    if sharded:
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"{sharded[0]} is sharded over ranks, and one rank alone cannot run the model: stop, "
            "fill the cache with the new latents, and resume",
        )
    before, stored, failure = cache.plan, 0, None
    cache.use(plan)
    with cache._released():
        ranks.gather_objects(None)
        if ranks.first:
            try:
                with _writer(cache, plan) as writer:
                    stored = fill(writer, model, batches, **how)
            except Exception as error:  # raised below, when the others know
                failure = error
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        stored, said = ranks.gather_objects((stored, said))[0]
    if said is not None:
        cache.plan = before
        if failure is not None:
            raise failure
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"the first rank could not fill the cache: {said}")
    return stored


def base_model_digest(model: nn.Module, *, base_adapters: Sequence[str] = ()) -> str:
    """sha256 of a model's parameters and persistent buffers, their names, dtypes and shapes, for
    ``Cache(base_model=...)``. Adapters of peft do not count: a PeftModel has its base's digest.

    base_adapters: names of those that count, as they belong to the base (:meth:`Cache.fill`).

    Reads every weight once: seconds for each 10 GB.

    Raises Error INVALID_ARGUMENT for weights that are not loaded (on the meta device).
    """
    of_base, of_adapters = _weights(base_of(model), base_adapters)
    return _digest(b"blockem base model 1", of_base | of_adapters)


def _digest(head: bytes, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(head)
    for name, tensor in sorted(tensors.items()):
        if tensor.device.type == "meta":
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} is not loaded: it is on the meta device")
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(
    base: nn.Module, base_adapters: Iterable[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Those of the model without adapters by the names that they have there, and of these adapters."""
    prefixes, of_base, of_adapters = _adapter_prefixes(base), {}, {}
    for name, tensor in base.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            of_base[_base_name(name)] = tensor
        elif name.removeprefix(prefix).split(".")[0] in base_adapters:
            of_adapters[name] = tensor
    return of_base, of_adapters


def _keep_adapters(cache: Cache, base: nn.Module, kept: Iterable[str]) -> None:
    """One file is of one base, whatever its user calls it."""
    digest = _digest(b"blockem base adapters 2", _weights(base, kept)[1]) if kept else "none"
    cache.put_note("base_adapters", digest)


def _examples(cache: Cache, batch: Mapping[str, Any], packed: bool) -> list[Example]:
    """The examples of a batch, without their padding."""
    inputs = _inputs(cache)
    media = set(inputs.of(batch).values()).intersection(MEDIA)
    return examples_of(batch, inputs, _placeholders(cache) if media else {}, packed=packed)


def _inputs(cache: Cache) -> Inputs:
    return Inputs(cache.ignore, cache.context)


def _key(cache: Cache, example: Example) -> bytes:
    ids, positions = example.token_ids.numpy(), example.positions.numpy()
    return cache.key(ids, positions, context=example.context)


#: The note of a cache that has, of each medium, the token that stands for it.
_PLACEHOLDERS = "placeholders"


def _placeholders(cache: Cache) -> dict[str, int]:
    if cache._placeholders is None:
        cache._placeholders = json.loads(cache.note(_PLACEHOLDERS) or "null")
    return cache._placeholders or {}


def _keep_placeholders(cache: Cache, base: nn.Module) -> None:
    """Whoever reads the cache has no model, whose configuration says them."""
    config, found = getattr(base, "config", None), {}
    for medium in MEDIA:
        names = (f"{medium}_token_id", f"{medium}_token_index")
        token = next((t for n in names if isinstance(t := getattr(config, n, None), int)), None)
        if token is not None:
            found[medium] = token
    if found:
        cache.put_note(_PLACEHOLDERS, json.dumps(found))


def _hidden_after(
    cache: Cache, stack: Stack, batch: Mapping[str, Any], rows: Sequence[int]
) -> torch.Tensor:
    """Hidden states of these rows after the layer, where the pass ends."""
    shape, context = batch["input_ids"].shape, _inputs(cache).of(batch)
    # The rows of other inputs need not be those of the batch.
    alone = not context and all(batch.get(name) is None for name in PACKING)
    accepted = inspect.signature(stack.outermost.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    device, inputs = next(stack.outermost.parameters()).device, {}
    for name in (*TEXT, *PACKING, *context):
        value = batch.get(name)
        if value is None or not (takes_all or name in accepted):
            continue
        if isinstance(value, torch.Tensor):
            value = value.to(device)
            if alone:
                value = value[..., rows, :]
        inputs[name] = value
    (hidden,) = stack.run(stack.call(inputs))
    hidden = of_tokens(hidden, (len(rows) if alone else shape[0], shape[1]))
    if str(hidden.dtype) != f"torch.{cache.dtype}":
        fail(
            _ffi.STATUS_CACHE_STALE,
            f"{cache.path}: the layer puts out {hidden.dtype}, the cache holds z of {cache.dtype}: "
            "run the model as in training, or make a cache with that dtype",
        )
    return hidden if alone else hidden[list(rows)]


def _adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Where peft keeps the parameters of adapters."""
    prefixes = []
    for at, module in model.named_modules():
        parts = [*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ())]
        if hasattr(module, "original_module"):
            parts.append("modules_to_save")
        prefixes += [f"{at}.{part}." for part in parts]
    return tuple(prefixes)


def _base_name(name: str) -> str:
    """The name of a weight in a model without adapters."""
    return re.sub(r"\.(base_layer|original_module)(?=\.|$)", "", name)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """The batches, with a bar of tqdm where that is installed."""
    if not progress:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="reference cache", unit="batch")
