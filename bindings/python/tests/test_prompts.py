"""The prompts of a study, rendered by the chat templates that TRL carries, against transformers' own
token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import transformers
import trl

from blockem.discover._prompts import Prompt, chat_template, rendered_by, tokenised

TEMPLATES = sorted(Path(trl.__file__).with_name("chat_templates").glob("*.jinja"))
# Those around which templates write the same words, and what they trim.
TEXTS = ["Why is it so?", "user", "model", " assistant\n", "<|im_start|>", "Be brief."]
SYSTEM = "Be brief."
# As Mistral 7B Instruct v0.1 and Gemma 1 do.
NO_SYSTEM = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
)


def tokenizer(template: str) -> transformers.PreTrainedTokenizerFast:
    """A token for each byte."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(letters)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=template, bos_token="<s>", eos_token="</s>")


def prompts(
    made: transformers.PreTrainedTokenizerFast, system: str | None, **options: object
) -> list[Prompt]:
    return tokenised(made, chat_template(made, system, options), TEXTS, False)


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_prompts_are_rendered_as_transformers_renders_them(system: str | None) -> None:
    """Also those of templates that fold the system message into the first turn, or want parts."""
    rendered, refused = 0, set()
    for path in TEMPLATES:
        made = tokenizer(path.read_text())
        try:
            found = prompts(made, system, enable_thinking=False)
        except ValueError as error:
            refused.add(path.stem)
            assert "leave system out, or give render" in str(error), path.stem
            continue
        rendered += 1
        in_parts = any(name in path.stem for name in ("idefics", "llava", "smolvlm"))
        content = lambda text: [{"type": "text", "text": text}] if in_parts else text
        for prompt in found:
            turns = [{"role": "system", "content": content(system)}] if system else []
            want = made.apply_chat_template(
                [*turns, {"role": "user", "content": content(prompt.text)}],
                add_generation_prompt=True, enable_thinking=False)
            assert list(prompt.ids) == want["input_ids"], path.stem
            # The turn's own text is what the prompt's changes, from its first letter on.
            other = made.apply_chat_template(
                [*turns, {"role": "user", "content": content("\N{SNOWMAN}")}], tokenize=False,
                add_generation_prompt=True, enable_thinking=False)
            head = other.partition("\N{SNOWMAN}")[0]
            begin = len(made(head, add_special_tokens=False)["input_ids"])
            decoded = made.decode(prompt.ids[prompt.start :])
            assert decoded.startswith(prompt.text.strip()), path.stem
            assert begin <= prompt.start <= begin + 1, path.stem
    assert rendered >= 60
    assert refused == ({"gemma", "gemma_training"} if system else set())


def test_a_template_without_a_system_role_names_the_option() -> None:
    made = tokenizer(NO_SYSTEM)
    assert len(prompts(made, None)) == len(TEXTS)
    with pytest.raises(ValueError, match="fails: Conversation roles must .*leave system out"):
        prompts(made, SYSTEM)
    # A message that would be lost without a word.
    silent = tokenizer("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="leaves out the system message.*leave system out"):
        prompts(silent, SYSTEM)


def test_whether_a_model_reasons_must_be_said_where_the_template_lets_it() -> None:
    asked = set()
    for path in TEMPLATES:
        made = tokenizer(path.read_text())
        try:
            prompts(made, None)
        except ValueError as error:
            assert 'chat_template_kwargs={"enable_thinking": False}' in str(error), path.stem
            asked.add(path.stem)
            on, off = (prompts(made, None, enable_thinking=value) for value in (True, False))
            assert on[0].ids != off[0].ids
    assert {"qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"} <= asked
    assert not {"qwen2_5", "gemma3", "gemma4", "qwen3_5_nothink", "deepseekv3", "llama3"} & asked


def test_a_rendering_of_the_callers_own_begins_where_the_prompt_stands_last() -> None:
    made = tokenizer("")
    (found,) = tokenised(made, rendered_by(lambda text: f"Q: {text} A:"), ["why"], False)
    assert made.decode(found.ids[found.start :]) == "why A:"
    with pytest.raises(ValueError, match="does not contain its prompt 'why'"):
        tokenised(made, rendered_by(str.upper), ["why"], False)
