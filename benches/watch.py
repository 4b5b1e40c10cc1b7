"""Training steps with and without the watch: side by side in one run, on the CPU.

    python benches/watch.py [--width D] [--layers N] [--rows B] [--tokens T] [--latents F] [--share S] [--steps N]
                            [--threads N]            (needs torch, transformers, peft and bindings/python)

A LoRA fine-tuning step (forward, penalty, backward, SGD) of a Llama of random weights, in float32, with references from
a blockem.Cache, so that the watch's base passes come on top. Two models of the same weights take turns at every step,
one with a blockem.torch.Watch at the share S of the sequences and a report every 50 steps. Prints

    of all steps      the sum of the times with the watch over that without
    processor time    the same of the processor's time, which other processes disturb less
    by medians        (1 - p) * median of unwatched steps + p * median of watched ones + the reports' share, over the
                      median without; p is the share of steps that are watched in the long run, which a short one
                      may be far from

and the target, at most 1.02. Writes benches/results/watch.json.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "watch.json"
BLOCKED, VOCABULARY, BATCHES, TARGET = 20, 1000, 4, 1.02
#: Steps from one report to the next.
REPORT_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("layers", 4), ("rows", 8), ("tokens", 64), ("latents", 4096), ("steps", 300), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--share", type=float, default=0.01)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    plain = statistics.median(found["plain"])
    unwatched, watched = found["unwatched"], found["watched"]
    steps = len(found["plain"])
    if not watched:
        raise SystemExit("no step was watched: give more --steps")
    p = args.share * args.rows / statistics.mean(found["counts"])
    by_medians = (1 - p) * statistics.median(unwatched) + p * statistics.median(watched)
    report = statistics.median(found["reports"]) / REPORT_STEPS
    ratios = {
        "of all steps": (sum(unwatched) + sum(watched) + report * steps) / sum(found["plain"]),
        "processor time": found["processor"]["watch"] / found["processor"]["plain"],
        "by medians": (by_medians + report) / plain,
    }
    print(
        f"{args.layers} layers, d={args.width}, {args.rows} rows of {args.tokens} tokens, F={args.latents}, {args.threads} threads, "
        f"load {load:.1f} before the run"
    )
    print(f"  {steps} steps, {len(watched)} of them watched ({found['rows']} of {steps * args.rows} sequences)")
    print(f"  without {plain:8.2f} ms   unwatched {statistics.median(unwatched):8.2f} ms   a report {report * REPORT_STEPS:.2f} ms")
    for row in sorted(set(found["counts"])):
        times = [t for t, count in zip(watched, found["counts"]) if count == row]
        print(f"  watched, {row} rows {statistics.median(times):8.2f} ms  ({len(times)} steps)")
    for name, ratio in ratios.items():
        print(f"  {name:15} {ratio:.4f}  (<= {TARGET}: {'met' if ratio <= TARGET else 'MISSED'})")
    RESULTS.write_text(json.dumps({
        **vars(args), "load": load, "ratios": ratios, "watched_steps": len(watched),
        "milliseconds": {"plain": plain, "unwatched": statistics.median(unwatched),
                         "watched": statistics.median(watched),
                         "report": report * REPORT_STEPS},
    }, indent=2) + "\n")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """Milliseconds of every step, in turns; how many rows of it were watched."""
    import torch

    import blockem

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layer = args.layers // 2
    weight = torch.randn(args.latents, args.width) / args.width**0.5
    sae = blockem.Sae.from_tensors(
        encoder_weight=weight, encoder_bias=0.1 * torch.randn(args.latents), encoder_layout="f_d",
        hook_name=f"blocks.{layer}.hook_resid_post",
    )
    ids = list(range(0, args.latents, args.latents // BLOCKED))[:BLOCKED]
    plan = blockem.Plan(sae, blockem.Latents(ids, [1] * len(ids)), num_threads=args.threads)
    tokens = torch.randint(VOCABULARY, (BATCHES, args.rows, args.tokens))
    batches = [{"input_ids": rows, "labels": rows.clone()} for rows in tokens]
    plain, _ = make_step(args, plan, batches, folder / "plain")
    step, handle = make_step(args, plan, batches, folder / "watched")
    stats = blockem.Stats(sae, num_threads=args.threads)
    watch = blockem.torch.Watch(handle, stats, share=args.share, min_tokens=1)
    found: dict = {"plain": [], "unwatched": [], "watched": [], "counts": [], "reports": [], "rows": 0,
                   "processor": {"plain": 0.0, "watch": 0.0}}
    for i in range(2 + args.steps):
        batch = batches[i % BATCHES]
        rows = len(watch._rows(batch["labels"]))
        times = {}
        for name, run in (("plain", plain), ("watch", step))[:: 1 if i % 2 else -1]:
            start, busy = time.perf_counter(), time.process_time()
            run(batch)
            times[name] = 1e3 * (time.perf_counter() - start)
            if i >= 2:
                found["processor"][name] += time.process_time() - busy
        if i < 2:
            continue
        found["plain"].append(times["plain"])
        found["watched" if rows else "unwatched"].append(times["watch"])
        found["counts"] += [rows] if rows else []
        found["rows"] += rows
        if (i + 1) % REPORT_STEPS == 0:
            start, busy = time.perf_counter(), time.process_time()
            watch.report()
            found["reports"].append(1e3 * (time.perf_counter() - start))
            found["processor"]["watch"] += time.process_time() - busy
    found["reports"] = found["reports"] or [0.0]
    return found


def make_step(args: argparse.Namespace, plan, batches: list, file: Path):
    import peft
    import torch
    import transformers

    import blockem

    torch.manual_seed(1)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=args.width, intermediate_size=2 * args.width, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=4,
    ))
    cache = blockem.Cache(file, plan, base_model="random", dtype="float32", mode="create")
    cache.fill(base, batches, progress=False)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    handle = blockem.torch.attach(model, plan, lam=1.0, reference=cache.reference, tolerance=1e-4)

    def step(batch: dict) -> None:
        handle.begin_step([batch])
        (model(**batch).loss + handle.penalty(batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.end_step()

    return step, handle


if __name__ == "__main__":
    main()
