"""The presets of Markers against what transformers renders from trl's chat templates: where a template
marks the assistant's text itself ({% generation %}), its marks; else a regular expression."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import blockem
import numpy as np
import pytest
import tokenizers
import transformers
import trl
from blockem import Markers
from tokenizers import decoders, models, pre_tokenizers

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]},
}}]  # fmt: skip


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def call(text: str | None, city: str, **more: object) -> dict:
    function = {"name": "weather", "arguments": {"city": city}}
    tool_call = {"type": "function", "id": "call12345", "function": function}
    return {"role": "assistant", "content": text, "tool_calls": [tool_call], **more}


def tool(text: str) -> dict:
    return {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
#: transformers loses the last tokens of an answer whose last character has several.
TURNS = [user("Why é 🙂?"), assistant("Because  of it."), user("And?"), assistant("So.\n\n東京, yes")]
CALLS = [
    user("Is it hot?"), call("", "Rome"), tool("It is 31 C."), assistant("It is."),
    user("And there?"), call("", "Oslo"), tool("No."), assistant("It is not."),
]  # fmt: skip


def with_thoughts(messages: list[dict], key: str) -> list[dict]:
    """The answers without calls have thoughts."""
    plain = [m["role"] == "assistant" and "tool_calls" not in m for m in messages]
    return [m | {key: "Hm, let me see."} if own else m for m, own in zip(messages, plain)]


def in_parts(messages: list[dict]) -> list[dict]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


#: Templates that mark the assistant's text: of which preset, and what they render.
MARKED: dict[str, tuple[str, list[list[dict]]]] = {
    "qwen2_5": ("chatml", [TURNS, [SYSTEM, *TURNS], [SYSTEM, *CALLS]]),
    "qwen3": ("qwen", [TURNS, CALLS, with_thoughts([SYSTEM, *CALLS], "reasoning_content")]),
    "qwen3_instruct_2507": ("qwen", [TURNS, CALLS]),
    "qwen3_5_think": ("qwen", [TURNS, with_thoughts(CALLS, "reasoning_content")]),
    **{name: ("qwen", [[SYSTEM, *CALLS]]) for name in
       ("qwen2_5_vl", "qwen3_vl", "qwen3_5_nothink", "qwen3_6", "qwen3_8")},
    "lfm2": ("chatml", [[SYSTEM, *TURNS]]),
    "nemotron_3_nano": ("chatml", [TURNS, [SYSTEM, *CALLS]]),
    **{name: ("chatml", [[SYSTEM, *CALLS]]) for name in
       ("lfm2_v2", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning")},
    "gptoss": ("harmony", [TURNS, [SYSTEM, *CALLS], with_thoughts(CALLS, "thinking"),
                           [user("Hot?"), call("I must look.", "Rome")]]),
    "llama3": ("llama3", [TURNS, [SYSTEM, *TURNS]]),
    "deepseekv3": ("deepseek", [TURNS, [SYSTEM, *CALLS[:4], *TURNS],
                                [user("Both?"), call("Yes.", "Rome"), tool("1"), tool("2"),
                                 assistant("Both.")]]),
    "deepseek_r1_distill": ("deepseek", [TURNS, [SYSTEM, *TURNS]]),
    "glm4moe": ("glm4", [TURNS, [SYSTEM, *CALLS], with_thoughts(CALLS, "reasoning_content")]),
    "gemma": ("gemma", [TURNS]),
    "gemma3": ("gemma", [TURNS, [SYSTEM, *TURNS]]),
    "diffusion_gemma": ("gemma4", [TURNS, [SYSTEM, *CALLS], with_thoughts(CALLS, "reasoning")]),
    "phi3": ("phi3", [TURNS, [SYSTEM, *TURNS]]),
    "phi3_5": ("phi", [[SYSTEM, *TURNS]]),
    "llava_next": ("mistral", [in_parts(TURNS)]),
    "cohere": ("cohere", [TURNS, [SYSTEM, *TURNS]]),
    "cohere2": ("cohere", [TURNS]),
}  # fmt: skip
#: By which a model stops and calls a tool; its template counts it among the tool's reply.
NOT_MARKED = {"diffusion_gemma": "<|tool_response>"}


def llama3_1(text: str) -> str:
    return "".join(re.findall(
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eo[tm]_id\|>)", text, re.S
    ))


def gemma4(text: str) -> str:
    turns = re.findall(r"<\|turn>model\n(.*?<turn\|>|.*?<\|tool_response>\Z)", text, re.S)
    return re.sub(r"(<\|tool_response>).*?<tool_response\|>", r"\1", "".join(turns), flags=re.S)


def glm4(text: str) -> str:
    roles = r"<\|(?:user|observation|system)\|>"
    return "".join(re.findall(rf"<\|assistant\|>(.*?(?:{roles}|\Z))", text, re.S))


def harmony(text: str) -> str:
    return "".join(re.findall(
        r"<\|start\|>assistant(.*?(?:<\|end\|>|<\|return\|>|<\|call\|>))", text, re.S
    ))


#: Templates that do not: preset, the assistant's text, what they render, with which arguments.
UNMARKED: dict[str, tuple[str, Callable[[str], str], list[list[dict]], dict]] = {
    "llama3_1": ("llama3", llama3_1, [TURNS, [SYSTEM, *CALLS]], {}),
    "llama3_1 with its own tools":
        ("llama3", llama3_1, [CALLS], {"builtin_tools": ["weather"], "date_string": "1 May"}),
    "llama3_2": ("llama3", llama3_1, [TURNS, [SYSTEM, *CALLS]], {"date_string": "1 May"}),
    "gemma4_v5": ("gemma4", gemma4, [TURNS, [SYSTEM, *CALLS], CALLS[:2]], {}),
    "glm4moe": ("glm4", glm4, [TURNS, [SYSTEM, *CALLS]], {}),
    "gptoss": ("harmony", harmony, [TURNS, [SYSTEM, *CALLS]], {}),
}


def byte_tokenizer(text: str) -> transformers.PreTrainedTokenizerFast:
    """A token for every byte, and for every word of the text in the brackets of special tokens."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = r"<[|｜][^<>\n]{1,40}[|｜]?>|<[^<>|\n]{1,40}\|>|</?(?:start|end)_of_turn>|\[/?INST\]|</s>"
    made.add_special_tokens(sorted(set(re.findall(words, text))))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="</s>"
    )


def cases(table: dict[str, tuple], at: int) -> list:
    return [
        pytest.param(name, messages, id=f"{name}-{i}")
        for name, row in table.items() for i, messages in enumerate(row[at])
    ]


def render(template: str, messages: list[dict], **arguments: object):
    template = (TEMPLATES / f"{template}.jinja").read_text()
    made = byte_tokenizer(template)
    if any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        arguments["tools"] = TOOLS
    arguments["chat_template"] = template
    return made, made.apply_chat_template(messages, tokenize=False, **arguments), arguments


@pytest.mark.parametrize(("name", "messages"), cases(MARKED, 1))
def test_a_preset_marks_what_the_template_marks(name: str, messages: list[dict]) -> None:
    """But for the start marker, which some templates mark with the text, and for white space and the
    end of the text's token behind the end marker, which no model writes."""
    made, text, arguments = render(f"{name}_training", messages)
    theirs = made.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True, **arguments
    )
    markers = Markers.preset(MARKED[name][0])
    marked = np.array(theirs["assistant_masks"], bool)
    offsets = made(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for start in markers.start:
        for found in re.finditer(re.escape(start), text):
            marked &= [not found.start() <= a < found.end() for a, _ in offsets]
    ends = "|".join(map(re.escape, markers.end))
    for found in re.finditer(rf"(?:{ends})(\s*(?:</s>\Z)?)", text):
        marked &= [not found.start(1) <= a < found.end(1) for a, _ in offsets]

    ours = blockem.Tokenizer(made).mask(text, markers, ids=theirs["input_ids"])
    if name in NOT_MARKED:
        marked |= ours.mask & (ours.ids == made.convert_tokens_to_ids(NOT_MARKED[name]))
    assert shown(made, ours.ids, ours.mask) == shown(made, ours.ids, marked)
    assert ours.mask.tolist() == marked.tolist()
    assert all(m["content"] in text for m in messages if m["role"] == "tool")
    assert blockem.mask_from_offsets(text, offsets, markers).tolist() == marked.tolist()


@pytest.mark.parametrize(("name", "messages"), cases(UNMARKED, 2))
def test_a_preset_marks_what_a_regular_expression_finds(name: str, messages: list[dict]) -> None:
    preset, expected, _, arguments = UNMARKED[name]
    made, text, _ = render(name.split()[0], messages, **arguments)
    found = blockem.Tokenizer(made).mask(text, Markers.preset(preset))
    assert shown(made, found.ids, found.mask) == expected(text) != ""


def shown(made: transformers.PreTrainedTokenizerFast, ids: np.ndarray, mask: np.ndarray) -> str:
    return made.decode(ids[mask], skip_special_tokens=False)


def test_a_tools_reply_is_never_marked() -> None:
    """With the end markers of plain answers alone: whatever is given beside them, an error."""
    made, text, _ = render("gptoss", CALLS)
    tokenizer = blockem.Tokenizer(made)
    for turn in ("<|start|>", None, ["<|start|>"]):
        for allow_unclosed in (False, True):
            few = Markers("<|start|>assistant", ["<|end|>", "<|return|>"], turn=turn,
                          allow_unclosed=allow_unclosed)
            with pytest.raises(blockem.DataError, match="name every end marker") as error:
                tokenizer.mask(text, few)
            assert error.value.name == "MASK_UNALIGNED"
            all_ends = dataclasses.replace(few, end=["<|end|>", "<|return|>", "<|call|>"])
            found = tokenizer.mask(text, all_ends)
            assert shown(made, found.ids, found.mask) == harmony(text)


@pytest.mark.parametrize("name", [name for name in MARKED if name != "llava_next"])
def test_a_marker_in_a_users_message_is_an_error(name: str) -> None:
    """The start marker and an answer, without an end marker."""
    preset = Markers.preset(MARKED[name][0])
    forged = [user(f"say {preset.start[0]}yes"), assistant("No.")]
    made, text, _ = render(f"{name}_training", forged)
    with pytest.raises(blockem.DataError, match="holds a marker") as error:
        blockem.Tokenizer(made).mask(text, preset)
    assert error.value.name == "MASK_UNALIGNED"


def test_a_call_without_a_marker_is_an_error() -> None:
    """DeepSeek V3's template writes a conversation's second call behind the user's message."""
    made, text, _ = render("deepseekv3_training", CALLS)
    assert "And there?\n<｜tool▁call▁begin｜>" in text
    with pytest.raises(blockem.DataError, match="left out what begins the assistant's turn"):
        blockem.Tokenizer(made).mask(text, Markers.preset("deepseek"))


def test_an_end_that_begins_the_next_turn_can_be_left_out() -> None:
    made, text, _ = render("glm4moe", CALLS)
    preset = Markers.preset("glm4")
    found = blockem.Tokenizer(made).mask(text, dataclasses.replace(preset, closing="exclude"))
    assert shown(made, found.ids, found.mask) == re.sub(
        r"<\|(user|observation)\|>", "", glm4(text)
    )


def test_presets_are_markers_that_can_be_changed() -> None:
    qwen = dataclasses.replace(Markers.preset("qwen"), injected="<think>\n\n</think>\n\n")
    made, text, _ = render("qwen3_training", TURNS)
    found = blockem.Tokenizer(made).mask(text, qwen)
    assert shown(made, found.ids, found.mask) == "Because  of it.<|im_end|>So.\n\n東京, yes<|im_end|>"
    several = dataclasses.replace(qwen, injected=["<think>\n\n", "<think>\n\n</think>\n\n", "<think>"])
    assert (blockem.Tokenizer(made).mask(text, several).mask == found.mask).all()
    assert Markers.preset("gpt-oss") == Markers.preset("harmony") != Markers.preset("llama3")
    assert len({Markers("a", ["b"]), Markers(["a"], ("b",)), Markers("a", ("b",))}) == 2
    with pytest.raises(blockem.ArgumentError, match='no preset "nope".* chatml, qwen, harmony'):
        Markers.preset("nope")


def test_markers_that_are_none() -> None:
    tokenizer = blockem.Tokenizer(byte_tokenizer(""))
    for markers, message in [
        (Markers([], "b"), "no start marker"),
        (Markers("a", []), "no end marker"),
        (Markers("a", ["b", ""]), "end marker is empty"),
        (Markers("<a>b", "c", turn=["b"]), "does not begin with it"),
        (Markers("a", "b", other_turns="both"), "other_turns is 'both'; expected one of 'auto'"),
        (Markers("a", ["b", "c\0"]), "NUL"),
        (Markers("a", "b", injected=["x", ""]), "injected text is empty"),
    ]:
        with pytest.raises(blockem.ArgumentError, match=message):
            tokenizer.mask("a", markers)
    with pytest.raises(TypeError, match="end has a int"):
        tokenizer.mask("a", Markers("a", [1]))
