"""Several gloo processes give the gradient, the logs and the lambda of one with the whole batch."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import oracle
import parallel
import pytest
import test_trainer
import tiny
import torch

import blockem

PROGRAM = Path(__file__).with_name("parallel.py")
STEPS = [case for case in parallel.CASES if case not in ("columns", "refused", "checks")]


@functools.cache
def run(cases: str, ranks: int) -> dict:
    """What rank 0 found, by case. One start of the processes serves many tests."""
    path = os.pathsep.join(filter(None, [str(Path(parallel.attach.__code__.co_filename).parents[2]),
                                         os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), cases, str(ranks), folder], capture_output=True,
            text=True, timeout=600, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return torch.load(Path(folder, "found.pt"), weights_only=False)


def found(case: str, ranks: int) -> dict:
    return run("; ".join(parallel.CASES), ranks)[case]


@functools.cache
def one_process(ranks: int, site: str = "") -> dict:
    """The micro-batches of all ranks, by one."""
    dictionary = parallel.OF_SITES.get(site, parallel.DICTIONARY)
    return parallel.train(parallel.step_of(ranks), parallel.model(), 1, parallel.items(ranks),
                          dictionary=dictionary)


def site_of(case: str) -> str:
    last = case.rpartition(", ")[2]
    return last if last in parallel.OF_SITES else ""


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", STEPS)
def test_ranks_are_one_process(case: str, ranks: int) -> None:
    own_rows = case.startswith(("ddp", "fsdp2"))
    many, want = found(case, ranks), one_process(ranks if own_rows else 2, site_of(case))
    grads = {n: g for n, g in want["grads"].items() if g.abs().max() > 0}
    assert len(grads) >= 10 and max(g.abs().max() for g in grads.values()) > 1e-3
    for name, grad in many["grads"].items():
        same = grads.get(name, torch.zeros_like(grad))
        largest = max(1.0, same.abs().max().item())
        torch.testing.assert_close(grad, same, rtol=1e-4, atol=1e-6 * largest, msg=name)
    assert set(grads) <= set(many["grads"])
    assert many["metrics"] == pytest.approx(want["metrics"], rel=1e-5)
    assert many["lambda"] == pytest.approx(want["lambda"], rel=1e-5) and want["lambda"] != 20.0
    assert many["checked"] == ("adapters off", 0)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", [case for case in STEPS if case.startswith("tensor")])
def test_ranks_that_share_rows_see_one_penalty(case: str, ranks: int) -> None:
    """The loss is counted once, whatever part of hidden a rank holds, and hidden is not gathered."""
    many, want = found(case, ranks), one_process(2, site_of(case))
    assert many["losses"] == pytest.approx(want["losses"], rel=1e-5) and max(want["losses"]) > 0
    assert many["cosine"] == pytest.approx(want["cosine"], rel=1e-3) and abs(want["cosine"]) > 1e-3
    operations = many["communication"]
    assert any("all_reduce" in name or "allreduce" in name for name in operations)
    assert not any("gather" in name for name in operations), operations


@pytest.mark.parametrize("ranks", [2, 4])
def test_columns_of_hidden(ranks: int) -> None:
    """Gates and dtypes, where d is no multiple of the ranks, against the oracle."""
    for (architecture, activation, dtype), many in found("columns", ranks).items():
        case = oracle.Case(architecture, activation, 45, 7, folds=True)
        mask = torch.arange(33) % 5 > 0
        base, tuned = (torch.tensor(case.hidden(33, seed=s)).to(getattr(torch, dtype))
                       for s in (1, 2))
        latent = case.latent(base.double().numpy())
        # Two terms of bf16 weights keep 2^-17 of a product.
        eps = 1e-6 if dtype == "float32" else 2e-5
        near = torch.tensor(latent.margin < eps * latent.size)
        z, want = many["reference"].double(), torch.tensor(latent.z)
        assert ((z - want).abs() <= eps * torch.tensor(latent.size)).logical_or(near).all()
        expected = case.penalty(
            tuned.double().numpy(), many["reference"].numpy(), mask.numpy().astype("float32"))
        assert many["count"] == mask.sum()
        assert many["loss_sum"] == pytest.approx(expected.loss_sum, rel=1e-3)
        grad = torch.tensor(3 * expected.grad_hidden)
        assert many["grad"].dtype == getattr(torch, dtype)
        rounding = 1e-3 if dtype == "float32" else 1e-2
        torch.testing.assert_close(
            many["grad"].double(), grad, rtol=rounding, atol=rounding * grad.abs().max().item())
        assert many["nothing"] == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_has_no_penalty_is_refused(ranks: int) -> None:
    said = found("refused", ranks)
    want = [r"UNSUPPORTED: hidden is a DTensor placed P\(sum\): have the layer put out Replicate",
            "SHAPE: hidden has the shape .* 5]; expected .* columns 0 to .* of 32",
            "SHAPE: hidden has the shape .*neither all"]
    if ranks > 2:
        want.append(r"UNSUPPORTED: hidden is a DTensor on the mesh \(2, 2\)")
    want += ["UNSUPPORTED: this SAE normalises every token .layer_norm",
             "UNSUPPORTED: the activation 'native' of a topk SAE",
             "SHAPE: hidden has the shape .4, 32.; expected"]
    assert len(said) == len(want)
    for text, pattern in zip(said, want):
        assert re.search(pattern, text), (pattern, text)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_make_the_self_check_together(ranks: int) -> None:
    """When any has a token, and then no more."""
    assert found("checks", ranks) == [[False, True, True]] * ranks


def test_parts_of_a_plan() -> None:
    plan = parallel.DICTIONARY.plan
    hidden = torch.randn(6, 32)
    dots = sum(plan.columns(a, b).encode(hidden[:, a:b]) for a, b in [(0, 7), (7, 32)])
    torch.testing.assert_close(plan.gate().encode(dots), plan.encode(hidden), rtol=1e-5, atol=1e-5)
    assert len({plan.identity, plan.gate().identity, plan.columns(0, 7).identity}) == 3
    with pytest.raises(blockem.Error, match="some columns of hidden have no penalty"):
        plan.columns(0, 7).penalty(hidden[:, :7], torch.zeros(6, 5))
    with pytest.raises(ValueError, match="the columns 7 to 33 are none of the SAE's"):
        plan.columns(7, 33)
    with pytest.raises(ValueError, match="saved with a whole plan"):
        parallel.DICTIONARY.latents.save("nowhere.json", plan.gate())


@pytest.mark.parametrize("case", parallel.TRAINERS)
def test_a_trainer_on_two_ranks_is_one_process(case: str, tmp_path: Path) -> None:
    """Accumulation, ragged or packed rows, num_items_in_batch."""
    together = [name for name in parallel.TRAINERS if name.startswith(("DPO", "GRPO"))]
    many = run("; ".join(together) if case in together else case, 2)[case]
    penalty, size = dict(plan=parallel.DICTIONARY.plan, lam=0.05), {"per_device_train_batch_size": 4}
    if case.startswith("SFT"):
        one = test_trainer.sft(
            test_trainer.BlockedSFTTrainer, tmp_path, args=size | parallel.BFD, penalty=penalty)
    elif case.endswith("tensor parallel"):
        one = test_trainer.trainer(
            test_trainer.BlockedTrainer, tmp_path, args=size, model=tiny.llama(kv_heads=4),
            penalty=penalty | {"reference": "frozen_copy"})
    elif case in together:
        one = parallel.trl_trainer(case.partition(",")[0], tmp_path, 1)
    else:
        one = test_trainer.trainer(
            test_trainer.BlockedTrainer, tmp_path, args=size, penalty=penalty)
    one.train()
    for name, values in many.items():
        assert values == pytest.approx(test_trainer.logged(one, name), rel=1e-3, abs=1e-8)
    assert max(many["blockem/penalty"]) > 1e-4
