"""What a trainer gives its model: the ids, and as labels the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import _ffi
from .._library import fail
from ._target import expect_choice

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """How a trainer's batches become those of a language model."""

    #: (trainer, its batch, chosen completions alone) to input_ids, attention_mask, labels and more
    translate: Callable[[Any, Batch, bool], dict[str, Any]]
    #: whether the completions are made in _prepare_inputs, from a data set of prompts
    generates: bool = False
    #: whether it has chosen and rejected completions
    prefers: bool = False
    #: whether each row is either of them
    unpaired: bool = False
    #: whether its batches tell which tokens are a completion's
    labelled: bool = True

    def may_be_empty(self, completions: str) -> bool:
        """Whether a step without a counted token is no fault of the data: all completions were
        masked as truncated, or none of the rows was chosen."""
        return self.generates or (self.unpaired and completions == "chosen")


def kind_of(trainer: type, completions: str, tokens: str) -> Kind:
    """That of a trainer's class, by the TRL trainer that it is or extends.

    Raises Error UNSUPPORTED for TRL's other trainers, INVALID_ARGUMENT for options that the trainer
    does not have.
    """
    expect_choice("completions", completions, ("all", "chosen"))
    name = next((c.__name__ for c in trainer.__mro__ if c.__module__.split(".")[0] == "trl"), None)
    kind = _LABELLED if name is None else _KINDS.get(name)
    if kind is None:
        fail(
            _ffi.STATUS_UNSUPPORTED,
            f"the penalty does not know which tokens {name} trains; it knows TRL's "
            f"{', '.join(sorted(_KINDS))}, and transformers.Trainer",
        )
    if completions == "chosen" and not kind.prefers:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f'completions="chosen" is for trainers of preferences; {name or "Trainer"} has no '
            "rejected completions: leave it out",
        )
    if not kind.labelled and tokens != "all":
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{name}'s batches do not tell which tokens are a completion's: give "
            'penalty=dict(..., tokens="all")',
        )
    return kind


def _labelled(trainer: Any, inputs: Batch, chosen: bool) -> dict[str, Any]:
    # Trainers take labels out of inputs.
    return dict(inputs)


def _pairs(trainer: Any, inputs: Batch, chosen: bool) -> dict[str, Any]:
    """The first half of the rows are the chosen completions, then those rejected come."""
    mask = inputs["completion_mask"] != 0
    if chosen:
        mask = mask & _first_half(mask)
    return _with_labels(_without(inputs, "completion_mask", "ref_"), mask)


def _unpaired(trainer: Any, inputs: Batch, chosen: bool) -> dict[str, Any]:
    mask = inputs["completion_mask"] != 0
    if chosen:
        mask = mask & torch.as_tensor(inputs["label"], device=mask.device).bool()[:, None]
    # KL_...: completions of other prompts, which KTOTrainer runs without gradients.
    return _with_labels(_without(inputs, "completion_mask", "label", "ref_", "KL_"), mask)


def _concatenated(trainer: Any, inputs: Batch, chosen: bool) -> dict[str, Any]:
    pad = trainer.padding_value if hasattr(trainer, "padding_value") else trainer.pad_token_id
    whole = trainer.concatenated_inputs(inputs, padding_value=pad)
    labels = whole["concatenated_labels"]
    if chosen:
        labels = torch.where(_first_half(labels), labels, -100)
    return {
        "input_ids": whole["concatenated_input_ids"],
        "attention_mask": whole["concatenated_attention_mask"],
        "labels": labels,
    }


def _generated(trainer: Any, inputs: Batch, chosen: bool) -> dict[str, Any]:
    """Prompts are padded on the left, completions on the right."""
    mask = inputs["completion_mask"] != 0
    if "tool_mask" in inputs:
        mask = mask & (inputs["tool_mask"] != 0)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    shown = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    mask = torch.cat([torch.zeros_like(inputs["prompt_ids"], dtype=torch.bool), mask], dim=1)
    more = {name: inputs[name] for name in _MULTIMODAL if name in inputs}
    return _with_labels({"input_ids": ids, "attention_mask": shown} | more, mask)


def _with_labels(batch: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    return batch | {"labels": batch["input_ids"].masked_fill(~mask, -100)}


def _without(inputs: Batch, *prefixes: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.startswith(prefixes)}


def _first_half(rows: torch.Tensor) -> torch.Tensor:
    """bool [B, 1]"""
    return torch.arange(len(rows), device=rows.device)[:, None] < len(rows) // 2


_MULTIMODAL = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip

_LABELLED = Kind(_labelled)
_PAIRS = Kind(_pairs, prefers=True)
_CONCATENATED = Kind(_concatenated, prefers=True)
_GENERATED = Kind(_generated, generates=True)

_KINDS = {
    "SFTTrainer": _LABELLED,
    "RewardTrainer": Kind(_labelled, labelled=False),
    "DPOTrainer": _PAIRS,
    "KTOTrainer": Kind(_unpaired, prefers=True, unpaired=True),
    "CPOTrainer": _CONCATENATED,
    "ORPOTrainer": _CONCATENATED,
    "GRPOTrainer": _GENERATED,
    "GMPOTrainer": _GENERATED,
    "RLOOTrainer": _GENERATED,
    "DistillationTrainer": _GENERATED,
}
