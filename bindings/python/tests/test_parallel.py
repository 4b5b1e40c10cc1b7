"""Several gloo processes give the gradient, the logs and the lambda of one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import parallel
import pytest
import test_trainer
import torch

PROGRAM = Path(__file__).with_name("parallel.py")


def run(case: str, ranks: int, folder: Path) -> dict:
    path = os.pathsep.join(filter(None, [str(Path(parallel.attach.__code__.co_filename).parents[2]),
                                         os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), case, str(ranks), str(folder)], capture_output=True,
        text=True, timeout=600, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_ranks_are_one_process(case: str, ranks: int, tmp_path: Path) -> None:
    found = run(case, ranks, tmp_path)
    batches = [batch for mine in parallel.shards(ranks) for batch in mine]
    want = parallel.train(batches, parallel.model(), 1, parallel.items(ranks))
    grads = {n: g for n, g in want["grads"].items() if g.abs().max() > 0}
    assert len(grads) >= 10 and max(g.abs().max() for g in grads.values()) > 1e-3
    for name, grad in found["grads"].items():
        torch.testing.assert_close(
            grad, grads.get(name, torch.zeros_like(grad)), rtol=1e-4, atol=1e-6, msg=name)
    assert set(grads) <= set(found["grads"])
    assert found["metrics"] == pytest.approx(want["metrics"], rel=1e-5)
    assert found["lambda"] == pytest.approx(want["lambda"], rel=1e-5) and want["lambda"] != 20.0


def test_trainer_on_two_ranks_is_one_process(tmp_path: Path) -> None:
    found = run("hugging_face", 2, tmp_path)
    one = test_trainer.trainer(
        test_trainer.BlockedTrainer, tmp_path,
        penalty=dict(plan=parallel.DICTIONARY.plan, lam=0.05),
        args={"per_device_train_batch_size": 4})
    one.train()
    for name, values in found.items():
        assert values == pytest.approx(test_trainer.logged(one, name), rel=1e-3, abs=1e-8)
    assert max(found["blockem/penalty"]) > 1e-4
