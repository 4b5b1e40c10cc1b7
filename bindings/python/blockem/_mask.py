"""Masks of the assistant's tokens, from text."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _ffi
from ._arrays import Array
from ._core import Handle, Immutable, _code, _encode_path, _name, _whole_numbers
from ._library import check, fail, library

#: What HF trainers and :func:`blockem.torch.attach` take for a token that does not count.
IGNORED = -100


@dataclass(frozen=True)
class Markers:
    """How a chat template marks the assistant's turns.

        blockem.Markers.preset("chatml")                 # a common template's
        blockem.Markers("<|im_start|>assistant\\n", "<|im_end|>", turn="<|im_start|>")
        blockem.Markers("<|start|>assistant", ["<|end|>", "<|call|>", "<|return|>"])

    start: what comes before the assistant's text; several where the assistant also goes on after
        something else, such as a tool's reply. It is never marked.
    end: what comes after it; of several, the first that comes closes the turn. It may be what begins
        the next turn, as in GLM, whose model ends its turn by writing the next role's marker.
    turn: what the turns of other roles, or of every role, begin with. A turn that opens within
        another, as where a message holds a marker, is then an error. A message that holds an end
        marker too looks like any turn: for text that is not trusted, give spans. None derives it
        from `start`: "<|im_start|>" of "<|im_start|>assistant\\n"; "<|user|>", "<|tool|>", ... of
        "<|assistant|>". An empty list looks at the assistant's turns alone.
    injected: what the template itself puts before some answers, such as
        "<think>\\n\\n</think>\\n\\n"; of several, the longest that a turn begins with. It is not the
        assistant's.
    closing: "include" the end marker in the mask, so that the model learns to stop, or "exclude"
        it.
    allow_unclosed: the last turn may lack its end marker, and then goes up to the end of the text.
    other_turns: the turns of other roles are "closed" by an end marker, too, or "open": they end
        where the next turn begins, as in DeepSeek, GLM and Mistral, and an end marker in one is an
        error. "auto": closed where `turn` is what `start` begins with.

    Where several markers stand at one place, the longest counts.
    """

    start: str | Sequence[str]
    end: str | Sequence[str]
    turn: str | Sequence[str] | None = None
    injected: str | Sequence[str] | None = None
    closing: str = "include"
    allow_unclosed: bool = False
    other_turns: str = "auto"

    def __post_init__(self) -> None:
        for name in ("start", "end", "turn", "injected"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, str):
                # Hashable, and no longer the caller's list.
                object.__setattr__(self, name, tuple(given))

    @staticmethod
    def preset(name: str) -> Markers:
        """The markers of a common chat template.

        name: "chatml" (also "qwen": Qwen 2 to 3.8, LFM2, Nemotron 3), "harmony" (also "gpt-oss"),
            "llama3" (3 to 3.2), "deepseek" (V3, R1), "glm4" (4 to 4.5), "gemma" (1 to 3), "gemma4",
            "phi3" (also "phi": 3, 3.5), "mistral" or "cohere" (1 and 2).

        A tool's reply is never marked, thoughts and tool calls of the assistant are. A thinking
        block that the template itself writes is marked unless it is named:
        ``dataclasses.replace(Markers.preset("qwen"), injected="<think>\\n\\n</think>\\n\\n")``.
        "glm4" has allow_unclosed, because the template writes nothing after the last answer.

        Raises Error INVALID_ARGUMENT with the names that there are.
        """
        options = _ffi.MaskOptions()
        check(library.blockem_mask_preset(_text("name", name), byref(options)))
        markers = [
            tuple(pointer[i].decode() for i in range(count)) for pointer, count in (
                (options.start_markers, options.num_start_markers),
                (options.end_markers, options.num_end_markers),
                (options.turn_markers, options.num_turn_markers),
            )
        ]
        return Markers(
            *markers,
            closing=_name(options.closing, _ffi.CLOSINGS),
            allow_unclosed=bool(options.allow_unclosed),
            other_turns=_name(options.other_turns, _ffi.OTHER_TURNS),
        )


#: Markers, or (begin, end) of the assistant's text as indices of the text.
Where = Markers | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Masked:
    """The tokens of a text: ``ids`` int64 [T], ``mask`` bool [T], True where the assistant's."""

    ids: np.ndarray
    mask: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """int64 [T], unshifted: the id where the token is the assistant's, else -100."""
        return np.where(self.mask, self.ids, IGNORED)


class Tokenizer(Immutable):
    """Makes tokens of a text with the mask of the assistant's, by a tokenizer.json.

        tokenizer = blockem.Tokenizer("path/to/model")           # or a transformers fast tokenizer
        masked = tokenizer.mask(text, blockem.Markers("<|im_start|>assistant\\n", "<|im_end|>"))

    source: a tokenizer.json, a folder with one, a fast tokenizer of transformers, or a
        ``tokenizers.Tokenizer``. What these are when this object is made counts. Truncation and
        padding of its own are left aside.

    A token is marked where any of the text that it stands for is the assistant's. Any thread may
    use it, and a child of fork.

    Raises Error IO (also OSError), FORMAT, UNSUPPORTED (a library built without ``tokenizers``).
    """

    def __init__(self, source: str | os.PathLike[str] | Any) -> None:
        pointer = ctypes.c_void_p()
        if isinstance(source, (str, bytes, os.PathLike)):
            check(library.blockem_tokenizer_open(_encode_path(source), byref(pointer)))
        else:
            json = _json(source)
            check(library.blockem_tokenizer_from_json(json, len(json), byref(pointer)))
        self._handle = Handle(pointer, library.blockem_tokenizer_free)

    def mask(
        self,
        text: str | bytes,
        where: Where,
        *,
        ids: Sequence[int] | None = None,
        add_special_tokens: bool = False,
        max_tokens: int | None = None,
        border: str = "include",
        allow_empty: bool = False,
    ) -> Masked:
        """The tokens of a text and which are the assistant's.

        text: a rendered conversation, such as ``apply_chat_template(..., tokenize=False)`` gives.
        where: :class:`Markers`, or a list of (begin, end): indices of the text, so characters of a
            str and bytes of bytes.
        ids: the trainer's own tokens of the text, without padding, which must be those that the
            other arguments give; the mask is then for them.
        add_special_tokens: puts the tokenizer's own tokens around the text, such as BOS, which are
            never marked. A chat template writes its own.
        max_tokens: keeps so many tokens from the beginning, added ones among them.
        border: a token that lies partly in the assistant's text, as a word with its leading space,
            is marked ("include"), not marked ("exclude") or an error ("refuse").
        allow_empty: a mask without any token is an answer, not an error.

        Raises Error MASK_EMPTY, MASK_UNALIGNED (markers or ids do not fit the text),
        INVALID_ARGUMENT, FORMAT.
        """
        text, to_bytes = _utf8(text)
        options = _options(where, to_bytes, border, allow_empty)
        options.add_special_tokens = add_special_tokens
        options.max_tokens = _max_tokens(max_tokens)
        if ids is not None:
            given = np.array(_whole_numbers("ids", ids, np.int64))
            mask = np.empty(len(given), np.uint8)
            check(library.blockem_tokenizer_mask_ids(
                self._handle.pointer, text, len(text), byref(options), _int64(given), len(given),
                mask.ctypes.data,
            ))
            return Masked(given, mask.view(bool))
        # Seldom too few.
        made, mask, count = self._fill(text, options, len(text) + 1)
        if count > len(made):
            made, mask, count = self._fill(text, options, count)
        return Masked(made[:count].copy(), mask[:count].view(bool).copy())

    def batch(
        self,
        texts: Iterable[str | bytes],
        where: Where | Sequence[Where],
        *,
        pad_id: int,
        return_tensors: str = "pt",
        **options: Any,
    ) -> dict[str, Array]:
        """``input_ids``, ``attention_mask`` and ``labels``, int64 [B, T], padded on the right: what
        a model is given and :meth:`blockem.torch.Handle.penalty` takes.

        where: one for all texts if it is Markers, else one for each text.
        return_tensors: "pt" for tensors of torch, "np" for arrays.
        options: those of :meth:`mask`, but ids.
        """
        if return_tensors not in ("pt", "np"):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"return_tensors is {return_tensors!r}; expected 'pt' or 'np'",
            )
        texts = list(texts)
        each = [where] * len(texts) if isinstance(where, Markers) else list(where)
        if len(each) != len(texts):
            fail(_ffi.STATUS_SHAPE, f"{len(texts)} texts and {len(each)} lists of spans")
        rows = [self.mask(text, one, **options) for text, one in zip(texts, each)]
        shape = (len(rows), max((len(row.ids) for row in rows), default=0))
        batch = {
            "input_ids": np.full(shape, pad_id, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "labels": np.full(shape, IGNORED, np.int64),
        }
        for i, row in enumerate(rows):
            length = len(row.ids)
            batch["input_ids"][i, :length] = row.ids
            batch["attention_mask"][i, :length] = 1
            batch["labels"][i, :length] = row.labels
        if return_tensors == "np":
            return batch
        import torch

        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _fill(
        self, text: bytes, options: _ffi.MaskOptions, capacity: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The arrays and the number of tokens; if it is more than they hold, they are not filled."""
        ids, mask = np.empty(capacity, np.int64), np.empty(capacity, np.uint8)
        count = ctypes.c_size_t()
        arguments = self._handle.pointer, text, len(text), byref(options)
        status = library.blockem_tokenizer_mask(
            *arguments, _int64(ids), mask.ctypes.data, capacity, byref(count)
        )
        if status == _ffi.STATUS_SHAPE:
            status = library.blockem_tokenizer_mask(*arguments, None, None, 0, byref(count))
        check(status)
        return ids, mask, count.value


def mask_from_offsets(
    text: str | bytes,
    offsets: Sequence[tuple[int, int]],
    where: Where,
    *,
    border: str = "include",
    allow_empty: bool = False,
) -> np.ndarray:
    """The mask, bool [T], of tokens whose places in the text are known, from any tokenizer.

    offsets: (begin, end) of each token as indices of the text, such as ``offset_mapping`` of
        transformers; equal where a token stands for none of it. Offsets from which white space was
        trimmed leave tokens of white space unmarked, which :class:`Tokenizer` does not.
    where, border, allow_empty: as of :meth:`Tokenizer.mask`.

    Raises Error MASK_EMPTY, MASK_UNALIGNED, INVALID_ARGUMENT.
    """
    text, to_bytes = _utf8(text)
    places = to_bytes("offsets", offsets)
    mask = np.empty(len(places), np.uint8)
    options = _options(where, to_bytes, border, allow_empty)
    check(library.blockem_mask_from_offsets(
        text, len(text), byref(options), _int64(places), len(places), mask.ctypes.data
    ))
    return mask.view(bool)


def _json(source: Any) -> bytes:
    """The tokenizer.json of an object of transformers or tokenizers."""
    backend = getattr(source, "backend_tokenizer", source)
    if not callable(getattr(backend, "to_str", None)):
        raise TypeError(
            f"source is a {type(source).__name__}; expected a tokenizer.json, a fast tokenizer of "
            "transformers (is_fast is True) or a tokenizers.Tokenizer"
        )
    return backend.to_str().encode()


def _options(where: Where, to_bytes: Any, border: str, allow_empty: bool) -> _ffi.MaskOptions:
    """The struct keeps what it points to alive."""
    if isinstance(where, Markers):
        options = _ffi.MaskOptions(
            closing=_code("closing", where.closing, _ffi.CLOSINGS),
            allow_unclosed=where.allow_unclosed,
            other_turns=_code("other_turns", where.other_turns, _ffi.OTHER_TURNS),
        )
        options.start_markers, options.num_start_markers = _texts("start", where.start)
        options.end_markers, options.num_end_markers = _texts("end", where.end)
        if where.turn is not None:
            options.turn_markers, options.num_turn_markers = _texts("turn", where.turn)
        if where.injected is not None:
            injected = _texts("injected", where.injected)
            options.injected_texts, options.num_injected_texts = injected
    else:
        spans = to_bytes("where", where)
        options = _ffi.MaskOptions(spans=_int64(spans), num_spans=len(spans))
        options.owner = spans
    options.border = _code("border", border, _ffi.BORDERS)
    options.allow_empty = allow_empty
    return options


def _utf8(text: str | bytes) -> tuple[bytes, Any]:
    """The text in bytes, and what makes byte offsets of pairs of its indices."""
    if isinstance(text, (bytes, bytearray)):
        return bytes(text), _pairs
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; expected str or bytes")
    if text.isascii():
        return text.encode(), _pairs
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def to_bytes(name: str, pairs: Any) -> np.ndarray:
        pairs = _pairs(name, pairs)
        if pairs.size and not 0 <= pairs.min() <= pairs.max() <= len(text):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{name} has an index that is not in the text of {len(text)} characters",
            )
        return starts[pairs]

    return text.encode(), to_bytes


def _pairs(name: str, pairs: Any) -> np.ndarray:
    array = np.asarray(pairs if len(pairs) else np.empty((0, 2), np.int64))
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise TypeError(f"{name} is no list of (begin, end)")
    return np.ascontiguousarray(array, np.int64)


def _text(name: str, text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{name} has a {type(text).__name__}; expected str")
    if "\0" in text:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} holds a NUL character")
    return text.encode()


def _texts(name: str, texts: str | Sequence[str]) -> tuple[Any, int]:
    """An array of strings, not NULL for none, and its length."""
    encoded = [_text(name, text) for text in ([texts] if isinstance(texts, str) else texts)]
    return (ctypes.c_char_p * max(1, len(encoded)))(*encoded), len(encoded)


def _max_tokens(most: int | None) -> int:
    if most is not None and most < 1:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"max_tokens is {most}; expected at least 1, or None")
    return most or 0


def _int64(array: np.ndarray) -> ctypes.c_void_p:
    # Never NULL, which has a meaning of its own.
    return ctypes.c_void_p(array.ctypes.data or 8)
