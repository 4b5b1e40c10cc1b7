"""What the base model sees of each example in a batch, for the keys of a reference cache.

The rule is a list of what is allowed. An item of a batch is in the key, or known not to change hidden
states, or named by the caller as such; any other is an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch

from . import _ffi
from ._library import fail

__all__ = ["CONTEXT", "Example", "Inputs", "examples_of"]

#: Items that change no hidden state: for losses, for outputs, of collators and of trainers.
WITHOUT_EFFECT = frozenset(
    """
    labels shift_labels label_ids num_items_in_batch return_loss loss_weights
    logits_to_keep num_logits_to_keep return_dict output_attentions output_hidden_states
    output_router_logits use_cache
    special_tokens_mask length seq_lengths assistant_masks completion_mask prompt_mask loss_mask
    ref_chosen_logps ref_rejected_logps ref_per_token_logps old_per_token_logps advantages
    """.split()
)

#: How the rows of an input belong to examples: "token" [B, T, ...]; "row" [B, ...]; "batch" is all of
#: every example; of the media the model's placeholder tokens tell.
CONTEXT = {
    "token_type_ids": "token",
    "mm_token_type_ids": "token",
    "moe_mm_token_type_ids": "token",
    "cross_attention_mask": "token",
    "per_layer_inputs": "token",
    "visual_pos_masks": "token",
    "pixel_values": "image",
    "pixel_attention_mask": "image",
    "pixel_mask": "image",
    "image_grid_thw": "image",
    "image_sizes": "image",
    "image_position_ids": "image",
    "spatial_shapes": "image",
    "aspect_ratio_ids": "image",
    "aspect_ratio_mask": "image",
    "pixel_values_videos": "video",
    "video_grid_thw": "video",
    "second_per_grid_ts": "video",
    "video_second_per_grid": "video",
    "video_position_ids": "video",
    "input_features": "audio",
    "input_features_mask": "audio",
    "feature_attention_mask": "audio",
    "audio_feature_lengths": "audio",
    "input_values": "audio",
    "interpolate_pos_encoding": "batch",
    "use_audio_in_video": "batch",
    "vision_feature_layer": "batch",
    "vision_feature_select_strategy": "batch",
}

MEDIA = ("image", "video", "audio")

#: Inputs that no key covers, and what to do.
REFUSED = {
    "inputs_embeds": "an example is known by its token ids: give input_ids instead",
    "past_key_values": "give whole examples, not what follows a prefix",
    "cache_params": "give whole examples, not what follows a prefix",
    "encoder_outputs": "models with an encoder have no reference cache",
    "encoder_hidden_states": "models with an encoder have no reference cache",
    "encoder_attention_mask": "models with an encoder have no reference cache",
    "decoder_input_ids": "models with an encoder have no reference cache",
    "decoder_attention_mask": "models with an encoder have no reference cache",
    "decoder_inputs_embeds": "models with an encoder have no reference cache",
    "cross_attention_states": "give pixel_values instead",
    "mm_encoder_outputs": "give pixel_values or input_features instead",
    "adapter_names": "the cache is of the model with every adapter off: if that is each row's "
    'reference, open the cache with ignore=("adapter_names",)',
    "alora_offsets": "the cache is of the model with every adapter off: if that is each row's "
    'reference, open the cache with ignore=("alora_offsets",)',
}

#: Where a packed row's examples begin, told to attention and to state-space layers.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

#: Read before the rest.
TEXT = ("input_ids", "attention_mask", "position_ids")


@dataclass
class Example:
    """The tokens of an example and what else the model sees of it."""

    row: int
    #: [n] where its tokens stand in the row
    columns: torch.Tensor
    #: [n]
    token_ids: torch.Tensor
    #: [n] as the model gets them
    positions: torch.Tensor
    #: a digest; empty when the model sees token ids and positions alone
    context: bytes = b""


@dataclass(frozen=True)
class Inputs:
    """The items of batches, as :class:`blockem.Cache` was told."""

    ignore: frozenset[str]
    #: over :data:`CONTEXT`
    context: Mapping[str, str]

    def of(self, batch: Mapping[str, Any]) -> dict[str, str]:
        """The names of the inputs that belong to the context, and how their rows belong to examples.

        Raises Error INVALID_ARGUMENT for an item that no key covers.
        """
        found = {}
        for name, value in batch.items():
            if name in TEXT or name in PACKING or name in self.ignore or value is None:
                continue
            if name in self.context:
                found[name] = self.context[name]
            elif name in REFUSED:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the batch has {name}, which no key of a cache covers: {REFUSED[name]}",
                )
            elif name in CONTEXT:
                found[name] = CONTEXT[name]
            elif name not in WITHOUT_EFFECT and not _is_text(value):
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the batch has {name}, of which the cache does not know whether it changes "
                    f'hidden states: open the cache with ignore=("{name}",) if the model is not '
                    f'given it, or with context={{"{name}": "row"}} ("token", "batch") if its rows '
                    "are those of the batch",
                )
        return found


def examples_of(
    batch: Mapping[str, Any],
    inputs: Inputs,
    placeholders: Mapping[str, int],
    *,
    packed: bool,
) -> list[Example]:
    """The examples of a batch, without their padding.

    placeholders: of each medium, the token that stands for it.
    packed: see :meth:`blockem.Cache.reference`.
    """
    context = inputs.of(batch)
    text = _Text(batch)
    if packed and text.positions is None:
        fail(_ffi.STATUS_INVALID_ARGUMENT, "packed rows are told apart by position_ids: give them")
    found = []
    for row in range(text.shape[0]):
        kept = torch.arange(text.shape[1])
        if text.mask is not None:
            kept = kept[text.mask[row]]
        places = kept if text.positions is None else text.positions[row, kept]
        starts = (places.diff() <= 0).nonzero().flatten() + 1 if packed else kept[:0]
        for columns, at in zip(kept.tensor_split(starts), places.tensor_split(starts), strict=True):
            if len(columns):
                found.append(Example(row, columns, text.ids[row, columns], at))
    _expect_packing(batch, found, text.shape, packed)
    digests = [_Digest() for _ in found]
    for example, digest in zip(found, digests, strict=True):
        gaps = example.columns - example.columns[0]
        if len(gaps) != int(gaps[-1]) + 1:
            # Not only positions count there: windows of attention and convolutions count places.
            digest.add("attention_mask", gaps)
        if text.planes is not None:
            digest.add("position_ids", text.planes[:, example.row, example.columns])
    media: dict[str, dict[str, Any]] = {}
    for name, belongs in sorted(context.items()):
        if belongs in MEDIA:
            media.setdefault(belongs, {})[name] = batch[name]
        else:
            _add(digests, found, name, belongs, batch[name], text.shape)
    for medium, items in media.items():
        _add_media(digests, found, medium, items, placeholders)
    for example, digest in zip(found, digests, strict=True):
        example.context = digest.value()
    return found


class _Text:
    """Token ids [B, T], and of them the mask and positions, on the host."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        if batch.get("input_ids") is None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "the batch has no input_ids, by which a cache knows its examples",
            )
        ids = batch["input_ids"]
        self.shape = ids.shape
        if ids.ndim != 2:
            fail(_ffi.STATUS_SHAPE, f"input_ids has the shape {list(ids.shape)}; expected [B, T]")
        self.ids = ids.cpu()
        self.mask = self._mask(batch.get("attention_mask"))
        self.positions, self.planes = self._positions(batch.get("position_ids"))

    def _mask(self, mask: Any) -> torch.Tensor | None:
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.shape != self.shape:
            what = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
            fail(
                _ffi.STATUS_SHAPE,
                f"attention_mask is {what}; a key covers a mask of padding alone: expected "
                f"{list(self.shape)}, as input_ids (tell packed examples apart by position_ids)",
            )
        mask = mask.cpu()
        if not ((mask == 0) | (mask == 1)).all():
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "attention_mask has other values than 0 and 1, which no key covers: tell packed "
                "examples apart by position_ids",
            )
        return mask != 0

    def _positions(self, positions: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """[B, T], and [n, B, T] where positions have several dimensions, of which the first counts
        the tokens."""
        if positions is None:
            return None, None
        if positions.shape[-2:] != self.shape or positions.ndim not in (2, 3):
            fail(
                _ffi.STATUS_SHAPE,
                f"position_ids has the shape {list(positions.shape)}; expected {list(self.shape)}, "
                "as input_ids, or so for each dimension of positions",
            )
        positions = positions.cpu()
        return (positions, None) if positions.ndim == 2 else (positions[0], positions)


class _Digest:
    """sha256 of names, dtypes, shapes and elements; whole numbers count by value, whatever their
    dtype, others by their bits."""

    def __init__(self) -> None:
        self._hash: Any = None

    def add(self, name: str, value: torch.Tensor) -> None:
        if self._hash is None:
            self._hash = hashlib.sha256(b"blockem context 2\n")
        value = value.detach()
        if not value.is_floating_point() and not value.is_complex():
            value = value.long()
        head = f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n"
        self._hash.update(head.encode())
        self._hash.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def value(self) -> bytes:
        return b"" if self._hash is None else self._hash.digest()


def _add(
    digests: Sequence[_Digest],
    found: Sequence[Example],
    name: str,
    belongs: str,
    value: Any,
    shape: torch.Size,
) -> None:
    """Of an input whose rows are the batch's."""
    if belongs == "batch":
        whole = _bytes_of(value) if isinstance(value, str) else _tensor(name, value)
        for digest in digests:
            digest.add(name, whole)
        return
    rows = value if isinstance(value, (list, tuple)) else _tensor(name, value)
    expected = shape if belongs == "token" else shape[:1]
    given = rows.shape[: len(expected)] if isinstance(rows, torch.Tensor) else (len(rows),)
    if tuple(given) != tuple(expected):
        fail(
            _ffi.STATUS_SHAPE,
            f"{name} begins with the dimensions {list(given)}; expected {list(expected)}, as "
            "input_ids",
        )
    shared = [e.row for e in found]
    for example, digest in zip(found, digests, strict=True):
        if belongs == "token":
            digest.add(name, rows[example.row, example.columns.to(rows.device)])
            continue
        if shared.count(example.row) > 1:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"row {example.row} holds several examples, and its {name} cannot be divided "
                "among them: do not pack such rows",
            )
        digest.add(name, _tensor(name, rows[example.row]))


def _add_media(
    digests: Sequence[_Digest],
    found: Sequence[Example],
    medium: str,
    items: Mapping[str, Any],
    placeholders: Mapping[str, int],
) -> None:
    """Of the inputs of images, videos or audio, whose rows follow the order of the examples."""
    tensors = {name: _stacked(name, value) for name, value in items.items()}
    if len(found) == 1:
        for name, value in tensors.items():
            digests[0].add(name, value)
        return
    grid = next((x for name, x in tensors.items() if name.endswith("_grid_thw")), None)
    patches = None if grid is None else grid.long().cpu().prod(dim=-1)
    count = len(next(iter(tensors.values()))) if grid is None else len(grid)
    lengths = {len(x) for x in tensors.values()} - {count}
    if lengths and (patches is None or lengths != {int(patches.sum())}):
        _cannot_share(medium, tensors, f"their lengths are {sorted(lengths | {count})}")
    if medium not in placeholders:
        _cannot_share(medium, tensors, f"no {medium} token is known")
    places = [int((e.token_ids == placeholders[medium]).sum()) for e in found]
    shares = _shares(medium, tensors, places, count, patches, _packs(found))
    # Where the patches of an item begin, and where all end.
    edges = None if patches is None else [0, *patches.cumsum(0).tolist()]
    for (first, last), digest in zip(shares, digests, strict=True):
        if first == last:
            continue
        for name, value in tensors.items():
            by_item = len(value) == count or edges is None
            digest.add(name, value[first:last] if by_item else value[edges[first] : edges[last]])


def _shares(
    medium: str,
    tensors: Mapping[str, torch.Tensor],
    places: Sequence[int],
    count: int,
    patches: torch.Tensor | None,
    packs: bool,
) -> list[tuple[int, int]]:
    """Which of `count` images (videos, audios) are each example's, by its placeholder tokens."""
    owners, total = sum(n > 0 for n in places), sum(places)
    if owners == count and not (packs and any(x.ndim > 4 for x in tensors.values())):
        # Each example that has any has one at least.
        return _by_counts([int(n > 0) for n in places])
    each = None
    if patches is not None:
        # A token stands for so many patches.
        merged, rest = divmod(int(patches.sum()), max(total, 1))
        if merged > 0 and rest == 0 and not (patches % merged).any():
            each = (patches // merged).tolist()
    elif len(tensors) == 1 and count > 0 and total % count == 0:
        # Items of one size have as many tokens each; of [B, n, ...], some may be padding.
        (only,) = tensors.values()
        if only.ndim == (3 if medium == "audio" else 4):
            each = [total // count] * count
    shares = None if each is None else _by_tokens(each, places)
    if shares is None:
        _cannot_share(
            medium, tensors, f"{count} are for {total} tokens in {owners} of {len(places)} examples"
        )
    return shares


def _by_counts(counts: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(counts).tolist()
    return [(end - n, end) for n, end in zip(counts, ends, strict=True)]


def _by_tokens(each: Sequence[int], places: Sequence[int]) -> list[tuple[int, int]] | None:
    """None where an example would end within an item."""
    shares, at = [], 0
    for wanted in places:
        first = at
        while wanted > 0 and at < len(each):
            wanted -= each[at]
            at += 1
        if wanted != 0:
            return None
        shares.append((first, at))
    return shares if at == len(each) else None


def _cannot_share(medium: str, tensors: Mapping[str, Any], why: str) -> NoReturn:
    names = " and ".join(sorted(tensors))
    name = min(tensors)
    fail(
        _ffi.STATUS_INVALID_ARGUMENT,
        f"{names} cannot be divided among the examples of the batch ({why}): give batches of one "
        f"example, or fill the cache from a model whose config names its {medium}_token_id, or open "
        f'the cache with context={{"{name}": "row"}} if row i of the input is of row i of the batch',
    )


def _packs(found: Sequence[Example]) -> bool:
    return len({e.row for e in found}) < len(found)


def _expect_packing(
    batch: Mapping[str, Any], found: Sequence[Example], shape: torch.Size, packed: bool
) -> None:
    """That what else tells the examples of a row apart says the same as their positions."""
    told = [name for name in PACKING if batch.get(name) is not None]
    if not told:
        return
    if not packed:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"the batch has {told[0]}, which tells the examples of a packed row apart: give "
            "packed=True",
        )
    starts = {e.row * shape[1] + int(e.columns[0]) for e in found}
    for name in told:
        if name.startswith("cu_seq_lens"):
            same = set(batch[name].flatten().tolist()) == starts | {math.prod(shape)}
        elif name == "seq_idx":
            changes = torch.ones(shape, dtype=torch.bool)
            changes[:, 1:] = (batch[name].cpu().diff(dim=-1) != 0).reshape(shape[0], -1)
            same = set(changes.flatten().nonzero().flatten().tolist()) == starts
        else:
            same = True
        if not same:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{name} and position_ids tell the examples of the packed rows apart differently",
            )


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{name} is a {type(value).__name__} that is no array of numbers, which no key covers",
        )


def _stacked(name: str, value: Any) -> torch.Tensor:
    tensor = _tensor(name, value)
    if tensor.ndim == 0:
        fail(_ffi.STATUS_SHAPE, f"{name} is a number; expected one row for each item")
    return tensor


def _bytes_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)


def _is_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_text(x) for x in value)
    return isinstance(value, str)
