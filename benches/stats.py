"""Statistics of a whole dictionary on the CPU against the plain product that they contain, in one run.

    python benches/stats.py [--tokens T] [--width D] [--latents F] [--rounds N]      (needs torch and bindings/python)

blockem.Stats.update sums z, its square, how often it is on, and its largest, of all F latents; torch.matmul multiplies
[T, d] by [d, F] and keeps nothing but the product, in blocks of tokens. With a base model there are two products. Two
threads each, in turns; prints medians, and the rate of the statistics as a share of the product's (target: 0.70).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

import blockem

THREADS, BLOCK, TARGET = 2, 512, 0.70
RESULTS = Path(__file__).resolve().parent / "results" / "stats.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("width", 2048), ("latents", 16_384), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    weight = torch.randn(args.latents, args.width) / args.width**0.5
    hidden, base = torch.randn(args.tokens, args.width), torch.randn(args.tokens, args.width)
    sae = blockem.Sae.from_tensors(encoder_weight=weight, encoder_bias=torch.zeros(args.latents), encoder_layout="f_d")
    one = blockem.Stats(sae, num_threads=THREADS)
    two = one.fresh()
    out = torch.empty(BLOCK, args.latents)

    def product() -> None:
        for part in hidden.split(BLOCK):
            torch.matmul(part, weight.T, out=out[: len(part)])

    contestants = {"product": product, "one model": lambda: one.update(hidden), "two models": lambda: two.update(hidden, base)}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    load = os.getloadavg()[0]
    for work in contestants.values():
        work()
    for _ in range(args.rounds):
        for name, work in contestants.items():
            time.sleep(0.02)  # torch's workers spin for a while after an operation
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in times.items()}
    shares = {"one model": medians["product"] / medians["one model"], "two models": 2 * medians["product"] / medians["two models"]}
    print(f"T={args.tokens} d={args.width} F={args.latents}, {THREADS} threads, load {load:.1f} before the run")
    gigaflop = 2e-9 * args.tokens * args.width * args.latents
    for name, ms in medians.items():
        print(f"  {name:11} {ms:9.1f} ms  {(1 + (name == 'two models')) * gigaflop / ms * 1e3:7.1f} GFLOP/s")
    for name, share in shares.items():
        print(f"  {name:11} {share:.2f} of the product's rate (>= {TARGET:.2f}: {'met' if share >= TARGET else 'MISSED'})")
    report = {"cpu_isa": blockem.build_info()["cpu_isa"], "load": load, "tokens": args.tokens, "width": args.width,
              "latents": args.latents, "milliseconds": medians, "shares": shares}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
