"""Whole training steps with and without the penalty: side by side in one run, on the CPU.

    python benches/train_step.py [--width D] [--layers N] [--tokens T] [--latents F] [--rounds N]
                                                     (needs torch, transformers, peft and bindings/python)

A LoRA fine-tuning step (forward, backward, SGD) of a Llama of random weights, in float32 on two threads:

    plain            no penalty
    cache            the penalty with references from a blockem.Cache
    adapters off     references from the same model without adapters, in a pass that ends at the layer
    frozen copy      what a straightforward port does: a second model, all of its layers, and a dense encode of every
                     latent in both, of which the blocked columns are taken

Each is a process of its own, and they take turns; medians of the step, the overhead over plain, and peak resident
memory. Writes benches/results/train-step.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "train-step.json"
WAYS = ("plain", "cache", "adapters off", "frozen copy")
THREADS, BLOCKED, VOCABULARY, BATCHES = 2, 20, 1000, 4
# What a cached reference may add to a step.
CACHE_OVERHEAD = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 2048), ("layers", 2), ("tokens", 512), ("latents", 16_384), ("rounds", 3), ("steps", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        return print(json.dumps(run(args)))
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, runs in found.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
            runs.append(json.loads(out.splitlines()[-1]))
    report = {way: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for way, runs in found.items()}
    plain = report["plain"]["milliseconds"]
    print(f"{args.layers} layers, d={args.width}, {args.tokens} tokens, F={args.latents}, {THREADS} threads")
    for way, row in report.items():
        row["overhead"] = row["milliseconds"] / plain - 1
        print(f"  {way:14} {row['milliseconds']:9.1f} ms  {100 * row['overhead']:+7.1f} %  {row['peak_mib']:7.0f} MiB")
    met = "met" if report["cache"]["overhead"] <= CACHE_OVERHEAD else "MISSED"
    print(f"  wanted: cache at most {100 * CACHE_OVERHEAD:.0f} % over plain: {met}")
    RESULTS.write_text(json.dumps({**vars(args), "threads": THREADS, "ways": report}, indent=2) + "\n")


def run(args: argparse.Namespace) -> dict:
    """One way's median step in milliseconds, and the peak memory of its process."""
    import peft
    import torch
    import transformers

    import blockem
    import blockem.torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=16, num_key_value_heads=4,
    )
    base = transformers.LlamaForCausalLM(config)
    layer = args.layers // 2
    weight = torch.randn(args.latents, args.width) / args.width**0.5
    bias = 0.1 * torch.randn(args.latents)
    ids = list(range(0, args.latents, args.latents // BLOCKED))[:BLOCKED]
    batches = []
    for _ in range(BATCHES):
        tokens = torch.randint(VOCABULARY, (2, args.tokens // 2))
        batches.append({"input_ids": tokens, "labels": tokens.clone()})
    with tempfile.TemporaryDirectory() as folder:
        step = make_step(args.way, base, layer, (weight, bias, ids), batches, Path(folder))
        times = []
        for i in range(1 + args.steps):
            start = time.perf_counter()
            step(batches[i % BATCHES])
            times.append(1e3 * (time.perf_counter() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"milliseconds": statistics.median(times[1:]), "peak_mib": peak}


def make_step(way: str, base, layer: int, dictionary: tuple, batches: list, folder: Path):
    import copy

    import peft
    import torch

    import blockem

    weight, bias, ids = dictionary
    lora = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    if way == "frozen copy":
        frozen = copy.deepcopy(base).requires_grad_(False)
    if way in ("cache", "adapters off"):
        sae = blockem.Sae.from_tensors(
            encoder_weight=weight, encoder_bias=bias, encoder_layout="f_d", hook_name=f"blocks.{layer}.hook_resid_post"
        )
        plan = blockem.Plan(sae, blockem.Latents(ids, [1] * len(ids)), num_threads=THREADS)
    reference = "adapters_off"
    if way == "cache":
        cache = blockem.Cache(folder / "base.cache", plan, base_model="random", dtype="float32", mode="create")
        cache.fill(base, batches, progress=False)
        reference = cache.reference
    model = peft.get_peft_model(base, lora).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    handle = None
    if way in ("cache", "adapters off"):
        handle = blockem.torch.attach(model, plan, layer=layer, lam=1.0, reference=reference, tolerance=1e-4)

    def dense_penalty(batch: dict) -> torch.Tensor:
        """As a port writes it: every latent of both models, then the blocked columns."""
        with torch.no_grad():
            known = frozen(batch["input_ids"], output_hidden_states=True).hidden_states[layer + 1]
            reference = torch.relu(known @ weight.T + bias)[..., ids]
        z = torch.relu(kept.pop() @ weight.T + bias)[..., ids]
        return (torch.relu(z - reference) ** 2).sum() / batch["labels"].numel()

    kept: list = []
    if way == "frozen copy":
        target = model.get_base_model().model.layers[layer]
        target.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))

    def step(batch: dict) -> None:
        if handle is not None:
            handle.begin_step([batch])
        loss = model(**batch).loss
        if handle is not None:
            loss = loss + handle.penalty(batch).loss
        if way == "frozen copy":
            loss = loss + dense_penalty(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.end_step()

    return step


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
    main()
