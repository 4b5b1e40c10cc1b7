"""Latents of a TopK SAE under its own rule, on the CPU: blockem and torch, side by side in one run.

    python benches/topk.py [--tokens T] [--width D] [--latents F] [--k K] [--rounds N]      (needs torch and bindings/python)

blockem compares every latent of the dictionary with each token's k-th largest and keeps 20 columns. torch does what a
straightforward port does: relu(h W' + b) of all F latents, topk, scatter, index; in blocks of tokens, since all of
[T, F] is large. Two threads each, in turns; prints medians, the ratio, and how far the two are apart.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import blockem

THREADS, BLOCKED, BLOCK = 2, 20, 512
RESULTS = Path(__file__).resolve().parent / "results" / "topk.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("width", 2048), ("latents", 32_768), ("k", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    weight = torch.randn(args.latents, args.width) / args.width**0.5
    bias = 0.1 * torch.randn(args.latents)
    hidden = torch.randn(args.tokens, args.width)
    ids = np.sort(np.random.default_rng(0).permutation(args.latents)[:BLOCKED])
    sae = blockem.Sae.from_tensors(encoder_weight=weight, encoder_bias=bias, architecture="topk", k=args.k)
    plan = blockem.Plan(sae, blockem.Latents(ids, np.ones(BLOCKED, int)), num_threads=THREADS)

    def dense() -> torch.Tensor:
        parts = []
        for part in hidden.split(BLOCK):
            z = torch.relu(torch.addmm(bias, part, weight.T))
            top = z.topk(args.k, dim=-1, sorted=False)
            parts.append(torch.zeros_like(z).scatter_(-1, top.indices, top.values)[:, ids])
        return torch.cat(parts)

    contestants = {"torch": dense, "blockem": lambda: plan.encode(hidden)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, work in contestants.items():
            time.sleep(0.02)  # torch's workers spin for a while after an operation
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    theirs, ours = dense(), plan.encode(hidden)
    same = ((theirs > 0) == (ours > 0)).float().mean().item()
    report = {"cpu_isa": blockem.build_info()["cpu_isa"], "tokens": args.tokens, "width": args.width, "latents": args.latents,
              "k": args.k, "milliseconds": medians, "ratio": medians["torch"] / medians["blockem"], "same_latents": same}
    print(f"T={args.tokens} d={args.width} F={args.latents} k={args.k}, {THREADS} threads")
    for name, ms in medians.items():
        print(f"  {name:10} {ms:9.1f} ms")
    print(f"  ratio {report['ratio']:.2f}; {100 * same:.3f} % of the latents are on in both or in neither")
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
