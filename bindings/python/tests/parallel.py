"""What test_parallel.py runs: python parallel.py CASE RANKS FOLDER. Rank 0 saves what it found."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import tiny
import torch
from tiny import Dictionary
from torch.distributed.fsdp import fully_shard

from blockem.torch import DualAscent, attach

DICTIONARY = Dictionary()


def model() -> torch.nn.Module:
    """LoRA adapters that have moved."""
    found = tiny.with_lora(tiny.llama()).train()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return found


def shards(ranks: int) -> list[list[dict[str, torch.Tensor]]]:
    """For each rank its micro-batches of one step: ragged, and one without a token."""
    whole, = tiny.batches(1, size=3 * ranks)
    rows = [{k: v[i : i + 1] for k, v in whole.items()} for i in range(3 * ranks)]
    join = lambda *parts: {k: torch.cat([p[k] for p in parts]) for k in whole}
    found = [[join(*rows[3 * r : 3 * r + 2]), rows[3 * r + 2]] for r in range(ranks)]
    found[-1][1]["labels"] = torch.full_like(found[-1][1]["labels"], -100)
    return found


def items(ranks: int) -> int:
    return sum((b["labels"][:, 1:] != -100).sum().item() for mine in shards(ranks) for b in mine)


def train(mine: list[dict], net: torch.nn.Module, ranks: int, items: int) -> dict:
    """Two steps of gradients over this rank's micro-batches, without an optimizer."""
    lam = DualAscent(0.001, rate=1000.0, initial=20.0)
    handle = attach(net, DICTIONARY.plan, lam=lam)
    for _ in range(2):
        net.zero_grad()
        handle.begin_step(mine)
        for i, batch in enumerate(mine):
            parallel = isinstance(net, torch.nn.parallel.DistributedDataParallel)
            with net.no_sync() if parallel and i < len(mine) - 1 else torch.enable_grad():
                task = ranks * net(**batch, num_items_in_batch=items).loss
                (task + handle.penalty(batch).loss).backward()
        handle.end_step()
    return {
        "grads": {
            name.removeprefix("module."): getattr(p.grad, "full_tensor", lambda: p.grad)()
            for name, p in net.named_parameters() if p.grad is not None
        },
        "metrics": handle.metrics(per_latent=True),
        "lambda": lam.value.item(),
    }


def ddp(rank: int, ranks: int, folder: Path) -> dict:
    net = torch.nn.parallel.DistributedDataParallel(model())
    return train(shards(ranks)[rank], net, ranks, items(ranks))


def fsdp2(rank: int, ranks: int, folder: Path) -> dict:
    """Every layer and the rest sharded: the base pass stops between them."""
    net, mesh = model(), torch.distributed.init_device_mesh("cpu", (ranks,))
    for layer in net.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return train(shards(ranks)[rank], fully_shard(net, mesh=mesh), ranks, items(ranks))


def hugging_face(rank: int, ranks: int, folder: Path) -> dict:
    import test_trainer

    found = test_trainer.trainer(
        test_trainer.BlockedTrainer, folder, penalty=dict(plan=DICTIONARY.plan, lam=0.05),
        args={"per_device_train_batch_size": 4 // ranks, "ddp_backend": "gloo"})
    assert found.args.world_size == ranks
    found.train()
    return {name: test_trainer.logged(found, name) for name in ("blockem/penalty", "loss")}


def work(case: str, rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if case != "hugging_face":
        torch.distributed.init_process_group("gloo")
    cases = {"ddp": ddp, "fsdp2": fsdp2, "hugging_face": hugging_face}
    found = cases[case](rank, ranks, folder)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def main(case: str, ranks: int, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(case, rank, ranks, port, folder))
               for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode) for worker in workers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
