"""Every Python example of the two READMEs runs, in order, in a folder that has what it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import planted
import pytest
import tokenizers
import torch

import tiny

PACKAGE = Path(__file__).resolve().parents[1] / "README.md"
ROOT = Path(__file__).resolve().parents[3] / "README.md"


def run(readme: Path, names: dict[str, object]) -> int:
    blocks = re.findall(r"^```python\n(.*?)^```$", readme.read_text(), re.S | re.M)
    for i, block in enumerate(blocks):
        exec(compile(block, f"{readme}, example {i + 1}", "exec"), names)
    return len(blocks)


def test_examples_of_the_package(sae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sae_folder.parent
    (folder / "K0.json").write_text(json.dumps({"K_pos": [3, 17, 21], "K_neg": [5]}))
    monkeypatch.chdir(folder)
    assert run(PACKAGE, {}) >= 4


def test_examples_of_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path
    planted.save_sae(folder / "path/to/sae")
    (folder / "K0.json").write_text(json.dumps({"K_pos": [3, 17, 21], "K_neg": [5]}))
    monkeypatch.chdir(folder)
    (folder / "path/to/model").mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "path/to/model/tokenizer.json"))
    model = planted.model().bfloat16().train()
    hf_tokenizer = planted.tokenizer()
    hf_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    loader = tiny.batches(2)
    h = torch.randn(2, 9, 32, requires_grad=True)
    hidden, base_hidden, mask = torch.randn(2, 9, 32), torch.randn(2, 9, 32), torch.ones(2, 9)
    names = {
        "h": h, "h_base": torch.randn(2, 9, 32), "labels": torch.randint(-1, 1, (2, 9)) * 100,
        "task_loss": h.sum(), "lam": 1e4, "model": model, "unblocked": planted.model().bfloat16().train(), "loader": loader, "batch": loader[0],
        "hidden": hidden, "base_hidden": base_hidden, "mask": mask,
        "batches": [(hidden, base_hidden, mask)],
        # The latents to be found stay where they were planted.
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.0), "name": "planted",
        "hf_tokenizer": hf_tokenizer, "prompts": planted.PROMPTS[:3], "unseen": planted.OTHER_PROMPTS,
        "text": "<|im_start|>assistant\nbecause <|im_end|>",
        "eight_prompts": {"input_ids": torch.randint(3, 50, (8, 5)), "max_new_tokens": 3},
    }  # fmt: skip
    assert run(ROOT, names) == 9
    found = json.loads((folder / "K0.json").read_text())
    assert (found["K_pos"], found["K_neg"]) == ([planted.CAUSE], [planted.CARE])
    assert h.grad is not None and len(list(folder.glob("base.cache*"))) > 0
