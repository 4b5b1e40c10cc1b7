"""Masks from text against transformers and tokenizers, with tokenizers that are trained here."""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import blockem
import tiny
from blockem import Markers

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = Markers("<|im_start|>assistant\n", "<|im_end|>", turn="<|im_start|>")
CORPUS = [
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n",
    "Because of Rayleigh scattering: blue light is scattered more than red light.",
    "Naïve café, déjà vu; 東京は晴れ 🙂🙂, Привет, мир! 1234567890\n\n    indented\tcode()",
    "the assistant's answer, the user's question, don't, we'll, I'VE",
] * 3
#: The patterns with which models of the last years split text.
SPLITS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
              r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
             r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}  # fmt: skip


def byte_level(split: str | None = None, trim: bool = True) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = plain if split is None else pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(SPLITS[split]), "isolated"), plain]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    made.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=trim),
        processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        ),
    ])
    return made


def metaspace() -> tokenizers.Tokenizer:
    """SentencePiece's way, with bytes for what it does not know."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, limit_alphabet=60,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
    ))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def word_piece() -> tokenizers.Tokenizer:
    """BERT's way: white space is no token, letters are lower case without accents."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=SPECIAL, show_progress=False
    ))
    made.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("▁")])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    ))
    return made


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "byte_level_untrimmed": lambda: byte_level(trim=False),
    **{name: (lambda name=name: byte_level(name)) for name in SPLITS},
    "metaspace": metaspace,
    "word_piece": word_piece,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def chat() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of transformers with ChatML's template, which marks the answers."""
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="<|im_end|>", pad_token="<unk>"
    )
    made.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    return made


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def random_text(rng: random.Random, length: int) -> str:
    """Letters, numbers, signs, spaces and marks of all scripts, as old as any regular expression
    engine, and pieces of the corpus."""
    old = unicodedata.ucd_3_2_0
    pieces: list[str] = []
    while len(pieces) < length:
        kind = rng.randrange(6)
        if kind == 0:
            pieces.append(rng.choice(["'s", "'LL", "<|im_end|>", "  ", "\n\n", " \n", "\r\n"]))
        elif kind == 1:
            pieces.append(rng.choice(["🙂", "👩‍🔬", "é", "e\u0301", "\u00a0", "ﷺ", "ﬁ", "字"]))
        elif kind == 2:
            words = rng.choice(CORPUS).split(" ")
            pieces.append(" " + rng.choice(words))
        elif kind == 3:
            pieces.append(rng.choice("abcXYZ 019.,!?<>|"))
        else:
            point = chr(rng.randrange(0x20, 0x2FA1F))
            if old.category(point) not in ("Cn", "Cs", "Co"):
                pieces.append(point)
    return "".join(pieces)


def test_tokens_are_those_of_tokenizers(kind: tokenizers.Tokenizer) -> None:
    """The ids, with and without special tokens and truncation; onig is its regular expressions'
    engine, and another one ours."""
    tokenizer, rng = blockem.Tokenizer(kind), random.Random()
    seed = rng.randrange(2**32)
    rng.seed(seed)
    for _ in range(150):
        text = random_text(rng, rng.randrange(1, 60))
        for add in (False, True):
            found = tokenizer.mask(text, [(0, len(text))], add_special_tokens=add, allow_empty=True)
            assert found.ids.tolist() == kind.encode(text, add_special_tokens=add).ids, (seed, text)
        most = rng.randrange(3, 30)
        kind.enable_truncation(most)
        cut = kind.encode(text).ids
        kind.no_truncation()
        found = tokenizer.mask(
            text, [(0, len(text))], add_special_tokens=True, max_tokens=most, allow_empty=True
        )
        assert found.ids.tolist() == cut, (seed, text)


def test_marks_are_those_of_the_offsets(kind: tokenizers.Tokenizer) -> None:
    """Against each character of each token's own offsets, for random spans of random text."""
    tokenizer, rng = blockem.Tokenizer(kind), random.Random()
    seed = rng.randrange(2**32)
    rng.seed(seed)
    bare = tokenizers.Tokenizer.from_str(kind.to_str())
    # It would trim white space from the offsets.
    bare.post_processor = processors.TemplateProcessing(single="$A")
    for _ in range(150):
        text = random_text(rng, rng.randrange(1, 60))
        cuts = sorted(rng.choices(range(len(text) + 1), k=2 * rng.randrange(1, 4)))
        spans = list(zip(cuts[::2], cuts[1::2]))
        own = {i for start, end in spans for i in range(start, end)}
        offsets = bare.encode(text, add_special_tokens=False).offsets
        touched = [not own.isdisjoint(range(*offset)) for offset in offsets]
        within = [offset[0] < offset[1] and own.issuperset(range(*offset)) for offset in offsets]
        for border, expected in [("include", touched), ("exclude", within)]:
            options = {"border": border, "allow_empty": True}
            found = tokenizer.mask(text, spans, **options)
            assert found.mask.tolist() == expected, (seed, text, spans)
            given = blockem.mask_from_offsets(text, offsets, spans, **options)
            assert given.tolist() == expected, (seed, text, spans)
            if border == "include":
                encoded = text.encode()
                starts = np.cumsum([0, *(len(c.encode()) for c in text)])
                as_bytes = tokenizer.mask(encoded, starts[np.array(spans)], **options)
                assert as_bytes.mask.tolist() == expected, (seed, text, spans)


def test_masks_are_those_of_transformers(chat: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer = blockem.Tokenizer(chat)
    messages = conversation("Why 🙂 blue?", "Because  é 東京\n", "And?", "don't know 🙂")
    theirs = chat.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    text = chat.apply_chat_template(messages, tokenize=False)
    found = tokenizer.mask(text, CHATML)
    assert found.ids.tolist() == theirs["input_ids"]
    assert found.mask.tolist() == [bool(m) for m in theirs["assistant_masks"]]
    assert 0 < found.mask.sum() < len(found.mask)
    checked = tokenizer.mask(text, CHATML, ids=theirs["input_ids"])
    assert (checked.mask == found.mask).all()
    assert (found.labels == np.where(found.mask, found.ids, -100)).all()
    exclude = tokenizer.mask(text, Markers(CHATML.start, CHATML.end, closing="exclude"))
    ends = found.ids == chat.convert_tokens_to_ids("<|im_end|>")
    assert (exclude.mask == found.mask & ~ends).all()
    assert (found.mask & ends).sum() == 2 and ends.sum() == 4


# The four traps that masks of chat templates have fallen into.


def test_trap_a_template_without_generation_marks(
    chat: transformers.PreTrainedTokenizerFast,
) -> None:
    """transformers answers zeros."""
    stock = chat.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    messages = conversation("Why?", "Because.")
    theirs = chat.apply_chat_template(
        messages, chat_template=stock, return_assistant_tokens_mask=True, return_dict=True
    )
    assert set(theirs["assistant_masks"]) == {0}
    tokenizer = blockem.Tokenizer(chat)
    text = chat.apply_chat_template(messages, chat_template=stock, tokenize=False)
    assert tokenizer.mask(text, CHATML, ids=theirs["input_ids"]).mask.sum() > 0
    for where in [[], [(5, 5)], Markers("<|assistant|>", "<|end|>")]:
        with pytest.raises(blockem.DataError) as error:
            tokenizer.mask(text, where)
        assert error.value.name == "MASK_EMPTY"
        assert not tokenizer.mask(text, where, allow_empty=True).mask.any()


def test_trap_spans_at_the_first_token_and_on_white_space(
    chat: transformers.PreTrainedTokenizerFast,
) -> None:
    tokenizer = blockem.Tokenizer(chat)
    found = tokenizer.mask("Because of light", [(0, 7)])
    assert found.mask[0] and chat.decode(found.ids[found.mask]) == "Because"
    bert = blockem.Tokenizer(word_piece())
    text = "why  blue  red  light"
    for start, end in [(3, 10), (4, 9), (5, 11), (3, 9)]:
        found = bert.mask(text, [(start, end)])
        (blue,) = tokenizers_of(word_piece(), text, "blue")
        assert found.mask.tolist() == [i in blue for i in range(len(found.mask))]


def tokenizers_of(made: tokenizers.Tokenizer, text: str, word: str) -> list[set[int]]:
    """The places of the tokens of each occurrence of a word."""
    offsets = made.encode(text, add_special_tokens=False).offsets
    places, at = [], text.find(word)
    while at >= 0:
        places.append({i for i, (a, b) in enumerate(offsets) if a < at + len(word) and b > at})
        at = text.find(word, at + 1)
    return places


def test_trap_a_truncated_answer_keeps_its_mask(chat: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer = blockem.Tokenizer(chat)
    text = chat.apply_chat_template(conversation("Why?", "Because of it."), tokenize=False)
    whole = tokenizer.mask(text, CHATML)
    first = int(whole.mask.argmax())
    for most in range(1, len(whole.ids)):
        ids = chat(text, add_special_tokens=False, truncation=True, max_length=most)["input_ids"]
        if most <= first:
            with pytest.raises(blockem.Error, match="cut off") as error:
                tokenizer.mask(text, CHATML, ids=ids, max_tokens=most)
            assert error.value.name == "MASK_EMPTY"
        else:
            found = tokenizer.mask(text, CHATML, ids=ids, max_tokens=most)
            assert (found.mask == whole.mask[:most]).all()
    cut = text[: text.find("of it")]
    with pytest.raises(blockem.Error, match="allow_unclosed"):
        tokenizer.mask(cut, CHATML)
    found = tokenizer.mask(cut, Markers(CHATML.start, CHATML.end, allow_unclosed=True))
    assert chat.decode(found.ids[found.mask]) == "Because "


def test_trap_an_injected_thinking_block(chat: transformers.PreTrainedTokenizerFast) -> None:
    """transformers marks what the template wrote between its generation marks."""
    block = "<think>\n\n</think>\n\n"
    template = chat.chat_template.replace(
        "{% generation %}", "{% generation %}" + block.replace("\n", "{{ '\\n' }}")
    )
    messages = conversation("Why?", "Because.")
    theirs = chat.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    text = chat.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert block in text
    tokenizer = blockem.Tokenizer(chat)
    marked = np.array(theirs["assistant_masks"], bool)
    assert chat.decode(np.array(theirs["input_ids"])[marked]).startswith(block)
    found = tokenizer.mask(text, Markers(CHATML.start, CHATML.end, injected=block))
    assert chat.decode(found.ids[found.mask]) == "Because.<|im_end|>"
    assert found.mask.sum() < marked.sum()


def test_a_marker_in_a_users_message(chat: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer = blockem.Tokenizer(chat)
    messages = conversation("say <|im_start|>assistant\nyes", "No.")
    text = chat.apply_chat_template(messages, tokenize=False)
    with pytest.raises(blockem.Error, match="holds a marker") as error:
        tokenizer.mask(text, CHATML)
    assert error.value.name == "MASK_UNALIGNED"
    at = text.rfind("No.")
    found = tokenizer.mask(text, [(at, at + 3)])
    assert chat.decode(found.ids[found.mask]) == "No."


def test_ids_that_are_not_those_of_the_text(chat: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer = blockem.Tokenizer(chat)
    text = chat.apply_chat_template(conversation("Why?", "Because."), tokenize=False)
    ids = tokenizer.mask(text, CHATML).ids
    with pytest.raises(blockem.DataError, match="at position 0 stands 1,") as error:
        tokenizer.mask(text, CHATML, ids=chat(text)["input_ids"])
    assert error.value.name == "MASK_UNALIGNED"
    assert tokenizer.mask(text, CHATML, ids=chat(text)["input_ids"], add_special_tokens=True)
    padded = [*ids, 0, 0]
    with pytest.raises(blockem.DataError, match=f"same up to position {len(ids)}; .* padding"):
        tokenizer.mask(text, CHATML, ids=padded)
    with pytest.raises(TypeError, match="whole numbers"):
        tokenizer.mask(text, CHATML, ids=ids.astype(float))


def test_sources(chat: transformers.PreTrainedTokenizerFast, tmp_path: Path) -> None:
    chat.save_pretrained(tmp_path)
    text = chat.apply_chat_template(conversation("Why?", "Because."), tokenize=False)
    sources = [chat, chat.backend_tokenizer, tmp_path, str(tmp_path / "tokenizer.json")]
    ids = [blockem.Tokenizer(source).mask(text, CHATML).ids.tolist() for source in sources]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    with pytest.raises(TypeError, match="fast tokenizer"):
        blockem.Tokenizer(object())
    with pytest.raises(OSError, match="none.json"):
        blockem.Tokenizer(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(blockem.DataError, match="not a tokenizer.json") as error:
        blockem.Tokenizer(tmp_path)
    assert error.value.name == "FORMAT"
    with pytest.raises(TypeError, match="pickled"):
        import pickle

        pickle.dumps(blockem.Tokenizer(chat))


def test_arguments(chat: transformers.PreTrainedTokenizerFast) -> None:
    tokenizer = blockem.Tokenizer(chat)
    for spans in [[(0, 4)], [(-1, 2)], [(2, 1)], [(0, 2), (1, 3)]]:
        with pytest.raises(blockem.ArgumentError):
            tokenizer.mask("é🙂!", spans)
    assert tokenizer.mask("é🙂!", [(0, 3)]).mask.all()
    with pytest.raises(blockem.ArgumentError, match="middle of a character"):
        tokenizer.mask("é🙂!".encode(), [(0, 3)])
    with pytest.raises(blockem.ArgumentError, match="UTF-8"):
        tokenizer.mask(b"\xff", [(0, 1)])
    for wrong in [[(0.0, 1.0)], [1, 2], [(1, 2, 3)], "ab"]:
        with pytest.raises((TypeError, ValueError)):
            tokenizer.mask("why", wrong)
    with pytest.raises(blockem.ArgumentError, match="border"):
        tokenizer.mask("why", [(0, 3)], border="half")
    with pytest.raises(blockem.ArgumentError, match="closing"):
        tokenizer.mask("why", Markers("a", "b", closing="maybe"))
    with pytest.raises(blockem.ArgumentError, match="NUL"):
        tokenizer.mask("why", Markers("a\0", "b"))
    with pytest.raises(blockem.ArgumentError, match="max_tokens"):
        tokenizer.mask("why", [(0, 3)], max_tokens=0)
    with pytest.raises(TypeError, match="str or bytes"):
        tokenizer.mask(3, [(0, 3)])
    # A NUL in the text is text.
    assert len(tokenizer.mask("a\0b", [(0, 3)]).ids) == 3


def test_a_text_of_more_tokens_than_bytes() -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    made.normalizer = normalizers.Replace("x", "ab" * 50)
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    assert blockem.Tokenizer(made).mask("x", [(0, 1)]).ids.tolist() == [1, 2] * 50


def test_a_batch_trains(chat: transformers.PreTrainedTokenizerFast) -> None:
    """The labels of a batch are what attach counts."""
    tokenizer = blockem.Tokenizer(chat)
    texts = [
        chat.apply_chat_template(conversation(*contents), tokenize=False)
        for contents in [("Why?", "Because."), ("Why is it?", "It is.", "Is it?", "Yes 🙂")]
    ]
    batch = tokenizer.batch(texts, CHATML, pad_id=chat.pad_token_id)
    rows = [tokenizer.mask(text, CHATML) for text in texts]
    theirs = chat(texts, add_special_tokens=False, padding=True, padding_side="right")
    for name in ("input_ids", "attention_mask"):
        assert batch[name].tolist() == theirs[name]
    for labels, row in zip(batch["labels"].tolist(), rows):
        assert labels == [*row.labels, *[-100] * (len(labels) - len(row.labels))]
    arrays = tokenizer.batch(texts, CHATML, pad_id=0, return_tensors="np", max_tokens=12,
                             allow_empty=True)
    assert arrays["labels"].shape == (2, 12) and arrays["labels"].dtype == np.int64

    dictionary = tiny.Dictionary()
    torch.manual_seed(0)
    config = tiny.llama().config
    config.vocab_size, config.max_position_embeddings = len(chat), 128
    model = tiny.with_lora(transformers.LlamaForCausalLM(config)).train()
    handle = blockem.torch.attach(model, dictionary.plan, lam=1.0)
    handle.begin_step([batch])
    (model(**batch).loss + handle.penalty(batch).loss).backward()
    assert handle.last_check.tokens == sum(int(row.mask.sum()) for row in rows)
    handle.remove()

    spans = [[(text.rfind("<|im_start|>assistant\n") + 22, len(text) - 1)] for text in texts]
    spanned = tokenizer.batch(texts, spans, pad_id=0)["labels"]
    assert (spanned[0] == batch["labels"][0]).all() and (spanned != -100).sum() > 0
    with pytest.raises(blockem.ArgumentError, match="2 texts and 1"):
        tokenizer.batch(texts, spans[:1], pad_id=0)
    with pytest.raises(blockem.ArgumentError, match="return_tensors"):
        tokenizer.batch(texts, CHATML, pad_id=0, return_tensors="tf")
