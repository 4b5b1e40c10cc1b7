"""Prompts as a model reads them, and that those of the search are not those of the evaluation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Prompt:
    """A prompt, rendered and tokenised."""

    #: as it was given, and as the judge sees it
    text: str
    ids: tuple[int, ...]
    #: its first token: those before it are the system message's or the template's
    start: int
    #: digest of ids
    key: str


def check_disjoint(prompts: Iterable[str], evaluation_prompts: Iterable[str]) -> None:
    """Raises ValueError if a prompt is among both or twice among either. White space, case and the
    ways in which Unicode writes the same character do not tell two prompts apart."""
    seen = [_distinct(prompts, "prompts"), _distinct(evaluation_prompts, "evaluation_prompts")]
    both = seen[0] & seen[1]
    if both:
        raise ValueError(
            f"{len(both)} of the evaluation prompts are also prompts of the search, like "
            f"{min(both)!r}: what K is chosen on cannot show that it works"
        )


def _distinct(texts: Iterable[str], name: str) -> set[str]:
    seen: set[str] = set()
    for text in texts:
        plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        if not plain:
            raise ValueError(f"{name} has an empty prompt")
        if plain in seen:
            raise ValueError(f"{name} has the prompt {text!r} twice")
        seen.add(plain)
    return seen


def tokenised(
    tokenizer: Any, render: Callable[[str], str], texts: Sequence[str], add_special_tokens: bool
) -> list[Prompt]:
    """Raises ValueError for a slow tokenizer, and a rendering that has not the prompt in it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "the tokenizer is a slow one, which does not tell where in the text a token stands: "
            "take the fast one"
        )
    prompts = []
    for text in texts:
        rendered = render(text)
        # Templates trim what they are given.
        begin = rendered.rfind(text.strip())
        if begin < 0:
            raise ValueError(
                f"the rendered text does not contain its prompt {text!r}: {rendered!r}"
            )
        encoded = tokenizer(
            rendered, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
        ids = tuple(encoded["input_ids"])
        start = next(
            (i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > begin), None
        )
        if start is None:
            raise ValueError(f"the prompt {text!r} has no token of its own in {rendered!r}")
        prompts.append(Prompt(text, ids, start, hashlib.sha256(repr(ids).encode()).hexdigest()))
    return prompts


def chat_template(tokenizer: Any, system: str | None) -> Callable[[str], str]:
    """The tokenizer's own rendering."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template: give render")

    def render(prompt: str) -> str:
        turns = [] if system is None else [{"role": "system", "content": system}]
        turns.append({"role": "user", "content": prompt})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    return render


def padded(
    prompts: Sequence[Prompt], pad: int, side: str, device: torch.device
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, int64 [B, S]."""
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad)
    shown = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        size = len(prompt.ids)
        place = slice(length - size, length) if side == "left" else slice(0, size)
        ids[row, place] = torch.tensor(prompt.ids)
        shown[row, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": shown.to(device)}


def counted(prompts: Sequence[Prompt], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [B, S], of right-padded rows: the tokens from a prompt's first on."""
    shown = inputs["attention_mask"]
    starts = torch.tensor([prompt.start for prompt in prompts], device=shown.device)
    return (shown != 0) & (torch.arange(shown.shape[1], device=shown.device) >= starts[:, None])


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[i : i + size] for i in range(0, len(items), size))
