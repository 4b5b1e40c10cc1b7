"""Prompts as a model reads them, and that those of the search are not those of the evaluation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


#: From a prompt to the text that the model completes, and where in it the prompt begins.
Rendering = Callable[[str], tuple[str, int]]


def tokenised(
    tokenizer: Any, rendering: Rendering, texts: Sequence[str], add_special_tokens: bool
) -> list[Prompt]:
    """Raises ValueError for a slow tokenizer, and a rendering that has not the prompt in it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "the tokenizer is a slow one, which does not tell where in the text a token stands: "
            "take the fast one"
        )
    prompts = []
    for text in texts:
        rendered, begin = rendering(text)
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


def rendered_by(render: Callable[[str], str]) -> Rendering:
    """That of a function of the caller's: where the prompt stands in its text for the last time."""

    def rendering(prompt: str) -> tuple[str, int]:
        text = render(prompt)
        return text, _expect_prompt(prompt, text, text.rfind(prompt.strip()))

    return rendering


def chat_template(tokenizer: Any, system: str | None, options: Mapping[str, Any]) -> Rendering:
    """The tokenizer's own, with these variables of its template.

    Raises ValueError where the template fails, leaves out the system message, or lets the model
    reason before it answers and the options do not say whether it should.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template: give render")

    def apply(prompt: str, in_parts: bool, **more: Any) -> str:
        content = lambda text: [{"type": "text", "text": text}] if in_parts else text
        turns = [] if system is None else [{"role": "system", "content": content(system)}]
        turns.append({"role": "user", "content": content(prompt)})
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **{**options, **more}
        )

    in_parts = _content_in_parts(apply, system)
    text = apply(_MARK, in_parts)
    if "enable_thinking" not in options:
        # Templates without this variable render the same text.
        on, off = (apply(_MARK, in_parts, enable_thinking=value) for value in (True, False))
        if text == on != off:
            raise ValueError(
                "by the tokenizer's chat template the model reasons before it answers, and the judge "
                'would be given that: give chat_template_kwargs={"enable_thinking": False}, or True'
            )
    # The prompt alone may stand in what the template writes around it, as "user" does.
    head = text.partition(_MARK)[0]

    def rendering(prompt: str) -> tuple[str, int]:
        text = apply(prompt, in_parts)
        # Templates trim what they are given.
        at = next((i for i in range(len(head), len(text)) if not text[i].isspace()), len(text))
        found = text.startswith(head) and text.startswith(prompt.strip(), at)
        return text, _expect_prompt(prompt, text, at if found else -1)

    return rendering


def _content_in_parts(apply: Callable[..., str], system: str | None) -> bool:
    """Whether a template wants messages as lists of parts, as those of some vision models do."""
    refused: list[str] = []
    for in_parts in (False, True):
        try:
            text = apply(_MARK, in_parts)
        except Exception as error:  # jinja's, and what a template's expressions raise
            refused.append(f"fails: {error}")
            continue
        if _MARK not in text:
            refused.append(f"leaves out the prompt: {text!r}")
        elif system is not None and system.strip() not in text:
            refused.append(f"leaves out the system message: {text!r}")
        else:
            return in_parts
    remedy = "give render" if system is None else "leave system out, or give render"
    raise ValueError(f"the tokenizer's chat template {refused[0]}; {remedy}")


def _expect_prompt(prompt: str, text: str, begin: int) -> int:
    if begin < 0:
        raise ValueError(f"the rendered text does not contain its prompt {prompt!r}: {text!r}")
    return begin


#: Stands for a prompt, in no template.
_MARK = "blockem-prompt-2f61c8"


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
