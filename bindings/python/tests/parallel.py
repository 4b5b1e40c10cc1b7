"""What test_parallel.py runs: python parallel.py CASES RANKS FOLDER. Rank 0 saves what it found."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import accelerate
import numpy as np
import tiny
import torch
import transformers
from tiny import Dictionary
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from transformers.distributed import DistributedConfig

import blockem
from blockem.torch import DualAscent, Watch, attach

DICTIONARY = Dictionary()
#: SAEs of other places of the block, by what stands in the name of a case.
OF_SITES = {"z": Dictionary(hook="blocks.1.attn.hook_z"), "MLP": Dictionary(hook="blocks.1.hook_mlp_out")}


def model() -> torch.nn.Module:
    """LoRA adapters that have moved. Its heads can be shared out to four ranks."""
    found = tiny.with_lora(tiny.llama(kv_heads=4)).train()
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


def padded(batch: dict[str, torch.Tensor], ranks: int) -> dict[str, torch.Tensor]:
    """With as many tokens as the ranks can share."""
    missing = -batch["input_ids"].shape[1] % ranks
    fill = {"labels": -100}
    return {name: torch.nn.functional.pad(x, (0, missing), value=fill.get(name, 0))
            for name, x in batch.items()}


def step_of(ranks: int) -> list[dict[str, torch.Tensor]]:
    """The micro-batches of all ranks."""
    return [batch for mine in shards(ranks) for batch in mine]


def items(ranks: int) -> int:
    return sum((b["labels"][:, 1:] != -100).sum().item() for b in step_of(ranks))


def train(
    mine: list[dict],
    net: torch.nn.Module,
    ranks: int,
    items: int,
    *,
    copies: int = 1,
    local: Callable[[dict], dict] = lambda batch: batch,
    together: Callable[[torch.Tensor], None] = lambda grad: None,
    dictionary: Dictionary = DICTIONARY,
    **settings: object,
) -> dict:
    """Two steps of gradients over this rank's micro-batches, without an optimizer.

    local: what of a batch the rank computes; together: makes its gradient that of all.
    """
    lam = DualAscent(0.001, rate=1000.0, initial=20.0)
    handle = attach(net, dictionary.plan, lam=lam, **settings)
    losses = []
    for _ in range(2):
        net.zero_grad()
        handle.begin_step(mine, copies=copies)
        for i, batch in enumerate(map(local, mine)):
            parallel = isinstance(net, torch.nn.parallel.DistributedDataParallel)
            with net.no_sync() if parallel and i < len(mine) - 1 else torch.enable_grad():
                task = ranks * net(**batch, num_items_in_batch=items).loss
                with CommDebugMode() as communication:
                    term = handle.penalty(batch)
                losses.append(term.loss.item())
                if not losses[1:]:
                    cosine = term.cosine(task).item()
                (task + term.loss).backward()
        handle.end_step()
    grads = {}
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            together(whole)
            grads[name.removeprefix("module.")] = whole
    return {
        "grads": grads,
        "losses": losses,
        "cosine": cosine,
        "metrics": handle.metrics(per_latent=True),
        "lambda": lam.value.item(),
        "checked": (handle.last_check.compared, handle.last_check.difference),
        "communication": {str(op): n for op, n in communication.get_comm_counts().items()},
    }


# Ranks that have different rows.


def ddp(rank: int, ranks: int) -> dict:
    net = torch.nn.parallel.DistributedDataParallel(model())
    return train(shards(ranks)[rank], net, ranks, items(ranks))


def fsdp2(rank: int, ranks: int, **settings) -> dict:
    """Every layer and the rest sharded: the base pass stops between them."""
    net, mesh = model(), distributed.init_device_mesh("cpu", (ranks,))
    for layer in net.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    net = fully_shard(net, mesh=mesh)
    return train(shards(ranks)[rank], net, ranks, items(ranks), **settings)


def fsdp2_inside(rank: int, ranks: int) -> dict:
    return fsdp2(rank, ranks, dictionary=OF_SITES["MLP"])


# Ranks that compute the same rows together.


def tensor_parallel(mesh: object, *between: tuple[str, object]) -> torch.nn.Module:
    """Attention heads and the inside of the MLPs on different ranks, with their adapters.

    between: for the output of the hooked layer and the input of the next, how they are placed.
    """
    net = model()
    wide = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
            "mlp.up_proj"]
    plan = {}
    for name in wide:
        plan |= {f"layers.*.{name}.base_layer": ColwiseParallel(),
                 f"layers.*.{name}.lora_B.default": ColwiseParallel()}
    for name in ["self_attn.o_proj", "mlp.down_proj"]:
        plan |= {f"layers.*.{name}.base_layer": RowwiseParallel(),
                 f"layers.*.{name}.lora_A.default": RowwiseParallel()}
    parallelize_module(net.get_base_model().model, mesh, plan)
    parallelize_module(net.get_base_model().model, mesh, dict(between))
    return net


def placed(placement: object, *, as_dtensor: bool) -> tuple[tuple[str, object], ...]:
    """Where the residual stream lies between the hooked layer and the next."""
    after = PrepareModuleOutput(
        output_layouts=Replicate(), desired_output_layouts=placement,
        use_local_output=not as_dtensor)
    before = PrepareModuleInput(
        input_layouts=placement, desired_input_layouts=Replicate(), use_local_output=True)
    return (f"layers.{tiny.LAYER}", after), (f"layers.{tiny.LAYER + 1}", before)


def tensor_case(placement: object, *, as_dtensor: bool, told: bool = False, **settings) -> Callable:
    """told: attach is given the group."""

    def case(rank: int, ranks: int) -> dict:
        mesh = distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        between = () if placement is None else placed(placement, as_dtensor=as_dtensor)
        group = {"tensor_group": mesh.get_group()} if told else {}
        net = tensor_parallel(mesh, *between)
        # torch takes plain parts of a tensor to be equal.
        local = (lambda batch: padded(batch, ranks)) if told else lambda batch: batch
        return train(step_of(2), net, 1, items(2), local=local, **group, **settings)

    return case


def data_and_tensor_parallel(only_data: bool, gradients: str) -> Callable:
    """Two groups of ranks with different rows, columns within them."""

    def case(rank: int, ranks: int) -> dict:
        mesh = distributed.init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
        net = tensor_parallel(mesh["tp"], *placed(Shard(-1), as_dtensor=False))
        data, tensor = mesh.get_group("dp"), mesh.get_group("tp")

        def together(grad: torch.Tensor) -> None:
            distributed.all_reduce(grad, group=data)
            if gradients == "mean":
                grad /= 2

        step, at = step_of(2), distributed.get_rank(data)
        scale = 2 if gradients == "mean" else 1
        return train(
            step[at::2], net, scale, items(2), together=together, gradients=gradients,
            tensor_group=tensor, process_group=data if only_data else None)

    return case


class GatheredKeys(torch.autograd.Function):
    """The keys or values [B, H, T / ranks, D] of all ranks, along their tokens."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size(), dim=2)[distributed.get_rank()]


def attention_over_ranks(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention of this rank's queries to the keys of all."""
    key, value = GatheredKeys.apply(key), GatheredKeys.apply(value)
    rows, columns = query.shape[2], key.shape[2]
    first = distributed.get_rank() * rows
    seen = torch.arange(columns) <= first + torch.arange(rows)[:, None]
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def context_parallel(gradients: str) -> Callable:
    """Every rank has its tokens of each row, with their labels; one may have no label."""

    def case(rank: int, ranks: int) -> dict:
        transformers.AttentionInterface.register("over_ranks", attention_over_ranks)
        net = model()
        net.get_base_model().config._attn_implementation = "over_ranks"

        def local(batch: dict) -> dict:
            whole = padded(batch, ranks)
            ids = whole["input_ids"]
            whole = {
                "input_ids": ids, "labels": whole["labels"],
                "shift_labels": torch.nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=-100),
                "position_ids": torch.arange(ids.shape[1]).expand(len(ids), -1),
            }
            return {name: x.chunk(ranks, dim=1)[rank].contiguous() for name, x in whole.items()}

        def together(grad: torch.Tensor) -> None:
            distributed.all_reduce(grad)
            if gradients == "mean":
                grad /= ranks

        scale = ranks if gradients == "mean" else 1
        return train(step_of(2), net, scale, items(2), copies=ranks, local=local,
                     together=together, gradients=gradients)

    return case


# The functions, and what is refused.


def columns_of_hidden(rank: int, ranks: int) -> dict:
    """blockem.torch.penalty and encode on this rank's columns: of every gate and dtype."""
    import oracle

    group, found = distributed.group.WORLD, {}
    for architecture in oracle.ARCHITECTURES:
        for activation in oracle.ACTIVATIONS:
            for dtype in ("float32", "bfloat16"):
                case = oracle.Case(architecture, activation, 45, 7, folds=True)
                plan = case.plan(num_threads=1)
                base, tuned = (torch.tensor(case.hidden(33, seed=s)).to(getattr(torch, dtype))
                               for s in (1, 2))
                mask = torch.arange(33) % 5 > 0
                mine = [x.chunk(ranks, dim=-1)[rank].clone() for x in (base, tuned)]
                hidden = mine[1].requires_grad_()
                reference = blockem.torch.encode(plan, mine[0], tensor_group=group)
                loss_sum, count = blockem.torch.penalty(
                    plan, hidden, reference, mask, tensor_group=group)
                (3 * loss_sum).backward()
                distributed.all_gather_object(gathered := [None] * ranks, hidden.grad)
                nothing, _ = blockem.torch.penalty(
                    plan, mine[0], reference, mask, tensor_group=group)
                found[architecture, activation, dtype] = {
                    "reference": reference, "loss_sum": loss_sum.item(), "count": count.item(),
                    "grad": torch.cat(gathered, dim=-1), "nothing": nothing.item()}
    return found


def refused(rank: int, ranks: int) -> list[str]:
    """What is said about arrangements that give no penalty."""
    mesh, said = distributed.init_device_mesh("cpu", (ranks,)), []
    world = distributed.group.WORLD
    plan = DICTIONARY.plan

    def call(work: Callable) -> None:
        try:
            work()
            said.append("nothing")
        except blockem.Error as error:
            said.append(f"{error.name}: {error}")

    batch, = tiny.batches(1)

    def with_output(change: Callable, **settings: object) -> None:
        net = model()
        net.get_base_model().model.layers[1].register_forward_hook(
            lambda module, args, output: change(output))
        net.get_base_model().model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
        handle = attach(net, plan, lam=1.0, **settings)
        handle.begin_step([batch])
        # The layers above could not read it.
        with contextlib.suppress(ZeroDivisionError):
            net(**batch)
        handle.penalty(batch)

    call(lambda: with_output(lambda h: DTensor.from_local(h, mesh, [Partial()])))
    call(lambda: with_output(lambda h: h[..., :5], tensor_group=world))
    call(lambda: with_output(lambda h: h[:, :1], tensor_group=world))
    square = distributed.init_device_mesh("cpu", (2, ranks // 2)) if ranks > 2 else None
    if square is not None:
        call(lambda: with_output(
            lambda h: DTensor.from_local(h, square, [Replicate(), Replicate()])))
    hidden, z = torch.randn(4, 32 // ranks), torch.zeros(4, 5)
    for token_norm, architecture in [("layer_norm", "standard"), ("none", "topk")]:
        sae = blockem.Sae.from_tensors(
            encoder_weight=DICTIONARY.weight, encoder_bias=DICTIONARY.bias, encoder_layout="f_d",
            architecture=architecture, k=3 if architecture == "topk" else 0, token_norm=token_norm)
        normed = blockem.Plan(sae, DICTIONARY.latents, num_threads=1)
        call(lambda: blockem.torch.penalty(normed, hidden, z, tensor_group=world))
    call(lambda: blockem.torch.encode(plan, torch.randn(4, 32), tensor_group=world))
    return said


def checks(rank: int, ranks: int) -> list:
    """Whether each rank has made the self-check, after micro-batches of which none, the first rank's
    and all have tokens."""
    handle, batch = attach(net := model(), DICTIONARY.plan, lam=1.0), tiny.batches(1)[0]
    empty = dict(batch, labels=torch.full_like(batch["labels"], -100))
    mine, made = [empty, empty if rank else batch, batch], []
    handle.begin_step(mine)
    for micro in mine:
        net(**micro), handle.penalty(micro)
        made.append(handle.last_check)
    return distributed_list([id(check) == id(made[-1]) for check in made])


#: Those that compute rows together take the micro-batches of two ranks, however many they are.
CASES: dict[str, Callable] = {
    "ddp": ddp,
    "fsdp2": fsdp2,
    "fsdp2, MLP": fsdp2_inside,
    "tensor, plain": tensor_case(None, as_dtensor=False),
    "tensor, plain, sum": tensor_case(None, as_dtensor=False, told=True, gradients="sum"),
    "tensor, Replicate": tensor_case(Replicate(), as_dtensor=True, gradients="sum"),
    "tensor, Shard(-1)": tensor_case(Shard(-1), as_dtensor=True, gradients="sum"),
    "tensor, columns": tensor_case(Shard(-1), as_dtensor=False, told=True),
    "tensor, Shard(1)": tensor_case(Shard(1), as_dtensor=True, gradients="sum"),
    "tensor, tokens": tensor_case(Shard(1), as_dtensor=False, told=True),
    "tensor, z": tensor_case(None, as_dtensor=False, told=True, dictionary=OF_SITES["z"]),
    "tensor, MLP": tensor_case(None, as_dtensor=False, dictionary=OF_SITES["MLP"]),
    "data and tensor, world": data_and_tensor_parallel(False, "mean"),
    "data and tensor, data group": data_and_tensor_parallel(True, "mean"),
    "data and tensor, world, sum": data_and_tensor_parallel(False, "sum"),
    "context, mean": context_parallel("mean"),
    "context, sum": context_parallel("sum"),
    "columns": columns_of_hidden,
    "refused": refused,
    "checks": checks,
}


# The watch.


def watched(
    mine: list[dict], net: torch.nn.Module, share: float,
    *, copies: int = 1, local: Callable[[dict], dict] = lambda batch: batch, **settings: object,
) -> Watch:
    """Three steps of forwards over this rank's micro-batches."""
    handle = attach(net, DICTIONARY.plan, lam=1.0, **settings)
    stats = blockem.Stats(DICTIONARY.sae, num_threads=1)
    watch = Watch(handle, stats, share=share, together=1, seed=1, min_tokens=1)
    for _ in range(3):
        handle.begin_step(mine, copies=copies)
        for batch in map(local, mine):
            net(**batch)
            handle.penalty(batch)
        handle.end_step()
    return watch


def of_report(watch: Watch) -> dict:
    """What it says, and what another process that goes on from its state would."""
    state = watch.state_dict()
    drift = watch.report()
    watch.load_state_dict(state)
    again = watch.report()
    watch._handle.remove()
    return {name: (getattr(drift, name), getattr(again, name))
            for name in ("tokens", "delta", "rise", "fall", "sums")}


def moved_by(watch: Watch, batches: Iterable[dict]) -> np.ndarray:
    """By how much the model has moved each latent, as Handle.movers tells it."""
    found = watch._handle.movers(batches, watch.stats)
    delta = np.zeros(watch.stats.d_sae)
    delta[found.ids] = found.deltas
    return delta


def watch_rows(rank: int, ranks: int) -> dict:
    """Ranks with different rows; then all of them swap, with a cache that they share."""
    net, mine = model(), shards(ranks)[rank]
    found = {share: of_report(watched(mine, net, share)) for share in (1.0, 0.5)}
    folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    file, opened = f"{folder[0]}/base.cache", dict(base_model="tiny", dtype="float32")
    if rank == 0:
        with blockem.Cache(file, DICTIONARY.plan, mode="create", **opened) as cache:
            cache.fill(net, step_of(ranks), progress=False)
    distributed.barrier()
    cache = blockem.Cache(file, DICTIONARY.plan, **opened)
    handle = attach(net, DICTIONARY.plan, lam=1.0, reference=cache.reference, tolerance=1e-4)
    union = DICTIONARY.latents.union(blockem.Latents([2, 9], [1, -1]))
    try:
        handle.swap(union, cache=cache, batches=[{}], progress=False)
    except blockem.Error as error:
        found["said"] = distributed_list(f"{type(error).__name__}: {error}")
    handle.swap(union, cache=cache, batches=step_of(ranks), progress=False)
    handle.begin_step(mine)
    for batch in mine:
        net(**batch)
        handle.penalty(batch)
    handle.end_step()
    return found | {"metrics": handle.metrics(per_latent=True)}


def distributed_list(x: object) -> list:
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, x)
    return found


def watch_together(placement: object, *, as_dtensor: bool, given: bool = False) -> Callable:
    """Ranks that compute the same rows. given: with z of the base model from elsewhere, so that only
    the sampled rows have a base pass."""

    def case(rank: int, ranks: int) -> dict:
        mesh = distributed.init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
        net = tensor_parallel(mesh, *placed(placement, as_dtensor=as_dtensor))
        group = {} if as_dtensor else {"tensor_group": mesh.get_group()}
        local = lambda batch: padded(batch, ranks)
        whole = model()

        def z(batch: dict) -> torch.Tensor:
            with torch.no_grad(), whole.disable_adapter():
                return DICTIONARY.plan.encode(tiny.hidden_states(whole, batch))

        more = group | ({"reference": z, "tolerance": 1e-3} if given else {})
        watch = watched(step_of(2), net, 0.5, local=local, **more)
        moved = {} if given else {"moved": moved_by(watch, map(local, step_of(2)))}
        return moved | of_report(watch)

    return case


WATCHES: dict[str, Callable] = {
    "watch, rows": watch_rows,
    "watch, columns": watch_together(Shard(-1), as_dtensor=False),
    "watch, columns, given": watch_together(Shard(-1), as_dtensor=False, given=True),
    "watch, Shard(-1)": watch_together(Shard(-1), as_dtensor=True),
    "watch, Shard(1), given": watch_together(Shard(1), as_dtensor=True, given=True),
    "watch, tokens": watch_together(Shard(1), as_dtensor=False),
}


# The trainers make their own process group, and need a folder.


def trainer_case(make: str, kind: str, **args: object) -> Callable:
    """A trainer of test_trainer.py, each rank with its share of the rows of a batch of four."""

    def case(rank: int, ranks: int, folder: Path) -> dict:
        import test_trainer

        found = getattr(test_trainer, make)(
            getattr(test_trainer, kind), folder / kind,
            penalty=dict(plan=DICTIONARY.plan, lam=0.05),
            args={"per_device_train_batch_size": 4 // ranks} | args)
        assert found.args.world_size == ranks
        found.train()
        return {name: test_trainer.logged(found, name) for name in ("blockem/penalty", "loss")}

    return case


def trl_case(name: str) -> Callable:
    """The same of test_trl.py."""

    def case(rank: int, ranks: int, folder: Path) -> dict:
        import test_trl

        found = trl_trainer(name, folder, ranks, **GLOO)
        assert found.args.world_size == ranks
        found.train()
        return {key: test_trl.test_trainer.logged(found, key) for key in ("blockem/penalty", "loss")}

    return case


def trl_trainer(name: str, folder: Path, ranks: int, **args: object):
    """Greedy where it generates: ranks have random numbers of their own."""
    import test_trl

    greedy = {"top_k": 1, "beta": 0.1} if name == "GRPO" else {}
    return test_trl.made(
        name, True, folder, {"per_device_train_batch_size": 4 // ranks} | greedy | args,
        penalty=dict(plan=DICTIONARY.plan, lam=0.05))


def tensor_parallel_trainer(rank: int, ranks: int, folder: Path) -> dict:
    """transformers' own tensor parallelism, of all weights; the reference is split too."""
    import test_trainer

    # accelerate wants GPUs for it, and needs none.
    accelerate.ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    distributed.init_process_group("gloo")
    if rank == 0:
        tiny.llama(kv_heads=4).save_pretrained(folder / "llama")
    distributed.barrier()
    tuned, base = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder / "llama", distributed_config=DistributedConfig(tp_size=ranks))
        for _ in range(2))
    assert sum(isinstance(p, DTensor) for p in tuned.parameters()) > 10
    found = test_trainer.trainer(
        test_trainer.BlockedTrainer, folder, model=tuned,
        penalty=dict(plan=DICTIONARY.plan, lam=0.05, reference=base),
        args={"per_device_train_batch_size": 4} | GLOO)
    found.train()
    return {name: test_trainer.logged(found, name) for name in ("blockem/penalty", "loss")}


GLOO = {"ddp_backend": "gloo"}
BFD = {"packing": True, "packing_strategy": "bfd", "max_length": 16}
FSDP2 = {"fsdp": True, "fsdp_config": {
    "version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
TRAINERS: dict[str, Callable] = {
    "Trainer, ddp": trainer_case("trainer", "BlockedTrainer", **GLOO),
    "SFTTrainer, packed, ddp": trainer_case("sft", "BlockedSFTTrainer", **BFD, **GLOO),
    "Trainer, fsdp2": trainer_case("trainer", "BlockedTrainer", **FSDP2, **GLOO),
    "Trainer, tensor parallel": tensor_parallel_trainer,
    "DPO, ddp": trl_case("DPO"),
    "GRPO, ddp": trl_case("GRPO"),
}


def work(cases: list[str], rank: int, ranks: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if set(cases) <= set(CASES | WATCHES):
        distributed.init_process_group("gloo")
        found = {}
        for case in cases:
            print(f"rank {rank}: {case}", file=sys.stderr, flush=True)
            found[case] = (CASES | WATCHES)[case](rank, ranks)
    else:
        found = {case: TRAINERS[case](rank, ranks, folder) for case in cases}
    if rank == 0:
        torch.save(found, folder / "found.pt")
    distributed.destroy_process_group()


def run(cases: list[str], ranks: int, folder: Path) -> None:
    """Starts the processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(cases, rank, ranks, port, folder))
               for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit(f"{cases} failed on {ranks} ranks")


if __name__ == "__main__":
    run(sys.argv[1].split("; "), int(sys.argv[2]), Path(sys.argv[3]))
