"""Every Python example of README.md runs, in order, in a folder that has what it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def test_examples(sae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sae_folder.parent
    (folder / "K0.json").write_text(json.dumps({"K_pos": [3, 17, 21], "K_neg": [5]}))
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.S | re.M)
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for i, block in enumerate(blocks):
        exec(compile(block, f"README.md, example {i + 1}", "exec"), names)
