"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo processes train as one process does, in a plain loop and
in a Trainer: run by `make test-deepspeed`, which installs DeepSpeed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import parallel
import pytest
import test_trainer
import torch

from blockem.torch import Handle, attach

LAM = 0.05


def optimizer_of(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)


def trajectory(handle: Handle, mine: list[dict], step: Callable[[dict], None]) -> list[float]:
    """The penalty of three optimizer steps."""
    found = []
    for _ in range(3):
        handle.begin_step(mine)
        for batch in mine:
            step(batch)
        handle.end_step()
        found.append(handle.metrics()["blockem/penalty"])
    return found


def loop(stage: int) -> Callable:
    def case(rank: int, ranks: int, folder: Path) -> list[float]:
        import deepspeed

        deepspeed.init_distributed("gloo")
        mine, net = parallel.shards(ranks)[rank], parallel.model()
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer_of(net), config={
            "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": len(mine)} | zero(stage))
        handle = attach(engine.module, parallel.DICTIONARY.plan, lam=LAM)

        def step(batch: dict) -> None:
            task = ranks * engine(**batch, num_items_in_batch=parallel.items(ranks)).loss
            # The step's counts are in both losses already.
            engine.backward(task + handle.penalty(batch).loss, scale_wrt_gas=False)
            engine.step()

        return trajectory(handle, mine, step)

    return case


def loop_of_one(ranks: int) -> list[float]:
    net = parallel.model()
    handle, optimizer = attach(net, parallel.DICTIONARY.plan, lam=LAM), optimizer_of(net)
    step_of_all = parallel.step_of(ranks)

    def step(batch: dict) -> None:
        task = net(**batch, num_items_in_batch=parallel.items(ranks)).loss
        (task + handle.penalty(batch).loss).backward()
        if batch is step_of_all[-1]:
            optimizer.step()
            optimizer.zero_grad()

    return trajectory(handle, step_of_all, step)


def zero(stage: int) -> dict:
    """Every parameter is shared out in stage 3, however small."""
    return {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    auto = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
    for stage in (2, 3):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCH_EXTENSIONS_DIR"] = os.environ.get("TORCH_EXTENSIONS_DIR", folder)
            parallel.TRAINERS |= {
                "loop": loop(stage),
                "trainer": parallel.trainer_case(
                    "trainer", "BlockedTrainer", deepspeed=auto | zero(stage), **parallel.GLOO)}
            found = {}
            for case in ("loop", "trainer"):
                parallel.run([case], 2, Path(folder))
                found |= torch.load(Path(folder, "found.pt"), weights_only=False)
            one = test_trainer.trainer(
                test_trainer.BlockedTrainer, Path(folder), penalty=dict(
                    plan=parallel.DICTIONARY.plan, lam=LAM), args={"per_device_train_batch_size": 4})
            one.train()
            assert found["loop"] == pytest.approx(loop_of_one(2), rel=1e-4)
            assert found["loop"][0] != found["loop"][-1] > 1e-3
            for name, values in found["trainer"].items():
                want = test_trainer.logged(one, name)
                assert values == pytest.approx(want, rel=1e-3, abs=1e-8), (name, values, want)
        print(f"ZeRO-{stage} on two processes is one process: {found}")


if __name__ == "__main__":
    main()
