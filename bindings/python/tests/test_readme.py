"""Every Python example of the two READMEs runs, in order, in a folder that has what it names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

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


def test_examples_of_the_project(sae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sae_folder.parent
    shutil.copytree(sae_folder, folder / "path/to/sae")
    (folder / "K0.json").write_text(json.dumps({"K_pos": [3, 17, 21], "K_neg": [5]}))
    monkeypatch.chdir(folder)
    (folder / "path/to/model").mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "path/to/model/tokenizer.json"))
    model = tiny.with_lora(tiny.llama(hidden=8, heads=2)).bfloat16().train()
    loader = tiny.batches(2)
    h = torch.randn(2, 9, 8, requires_grad=True)
    hidden, base_hidden, mask = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.ones(2, 9)
    names = {
        "h": h, "h_base": torch.randn(2, 9, 8), "labels": torch.randint(-1, 1, (2, 9)) * 100,
        "task_loss": h.sum(), "lam": 1e4, "model": model, "loader": loader, "batch": loader[0],
        "hidden": hidden, "base_hidden": base_hidden, "mask": mask,
        "batches": [(hidden, base_hidden, mask)],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "name": "tiny llama, seed 0",
        "text": "<|im_start|>assistant\nbecause <|im_end|>",
        "eight_prompts": {"input_ids": torch.randint(3, 50, (8, 5)), "max_new_tokens": 3},
    }  # fmt: skip
    assert run(ROOT, names) == 7
    assert h.grad is not None and len(list(folder.glob("base.cache*"))) > 0
