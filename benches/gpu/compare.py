"""The penalty and its gradient on a GPU: blockem beside torch, Triton and a dense encode, in one run.

    python benches/gpu/compare.py [--part I/N | --quick]      (needs a GPU, torch with triton, a built tree)

Every time is the median of device times between events, the second-level cache flushed before each call; contestants
take turns. `copy` is the device's own copy bandwidth, `product` the rate of a plain bf16 product, both in this run.
Torch runs eager and compiled, in hidden's dtype and widened to float32 (what a user writes to get z as accurate as
ours); `dense` encodes all 65,536 latents and indexes. Prints a table and every ratio that the project has a target
for, and writes benches/results/gpu-<device>-<part>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bindings" / "python"), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402

import blockem  # noqa: E402
import calls  # noqa: E402
import triton_penalty  # noqa: E402
from blockem._library import library  # noqa: E402

RESULTS = ROOT / "benches" / "results"
DICTIONARY = 65536
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
# bf16 products that z needs at f32 accuracy, by what hidden is; half of the pairs (i, j) of three terms each for f32.
TERMS = {"bf16": 3, "f32": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="the I-th of N parts")
    parser.add_argument("--quick", action="store_true", help="T=8192, d=4096, K=20 and 128, bf16")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: this machine has no GPU that torch can use; nothing is measured")
        return
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.config.cache_size_limit = 1024
    device = torch.cuda.get_device_name()
    machine = Machine()
    print(f"{device}, torch {torch.__version__}, blockem {blockem.__version__}")
    print(f"copy {machine.copy / 1e12:.2f} TB/s   bf16 product {machine.product / 1e12:.0f} TFLOP/s   "
          f"empty call {machine.call_overhead * 1e6:.2f} us")  # fmt: skip
    results = [measure(machine, *shape, args.rounds) for shape in shapes(args.part, args.quick)]
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    part = "quick" if args.quick else args.part.replace("/", "of")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"gpu-{name}-{part}.json"
    report = {
        "device": device,
        "torch": torch.__version__,
        "blockem": blockem.__version__,
        "copy_bytes_per_second": machine.copy,
        "product_flops": machine.product,
        "host_overhead_us": machine.call_overhead * 1e6,
        "cases": results,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path.relative_to(ROOT)}")


def shapes(part: str, quick: bool) -> list[tuple[int, int, int, str, float]]:
    """(T, d, K, dtype, share of tokens that count) of one part; parts take turns, so that each has small and large."""
    if quick:
        return [(8192, 4096, count, "bf16", share) for count in (20, 128) for share in (1.0, 0.3)]
    index, parts = map(int, part.split("/"))
    every = itertools.product((2048, 8192, 32768), (2304, 4096, 8192), (20, 128, 1024, 4096), DTYPES, (1.0, 0.3))
    return [shape for i, shape in enumerate(every) if i % parts == index - 1]


class Machine:
    """What this device reaches in this run."""

    def __init__(self) -> None:
        self.flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self.copy = 2 * source.nbytes / self.time({"copy": lambda: target.copy_(source)}, 15)["copy"]
        del source, target
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.product = 2 * 8192**3 / self.time({"product": lambda: a @ b}, 15)["product"]
        self.call_overhead = self.host_cost(lambda: library.blockem_version())

    def time(self, runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Median device seconds of contestants that take turns."""
        for run in runs.values():
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        events: dict[str, list] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # Long enough on the device that the host is ahead when the call's work begins.
                self.flush.zero_()
                start.record()
                run()
                end.record()
                events[name].append((start, end))
            torch.cuda.synchronize()
        return {
            name: statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3
            for name, pairs in events.items()
        }

    def host_cost(self, run: Callable[[], object], repeats: int = 50) -> float:
        """Seconds of the calling thread per call, of so few that the driver's queue never fills: the host
        would wait for the device."""
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            best = min(best, (time.perf_counter() - start) / repeats)
        torch.cuda.synchronize()
        return best


class Case:
    """One shape. hidden and reference come from independent draws, so that a part of the pairs violate."""

    def __init__(self, tokens: int, width: int, count: int, dtype: str, share: float) -> None:
        cuda = {"device": "cuda"}
        self.dtype, self.share = dtype, share
        self.weight = torch.randn(count, width, **cuda) / width**0.5
        self.bias = torch.zeros(count, **cuda)
        self.sign = torch.ones(count, **cuda)
        self.sign[1::2] = -1
        sae = blockem.Sae.from_tensors(
            encoder_weight=self.weight.cpu(), encoder_bias=self.bias.cpu(), encoder_layout="f_d"
        )
        latents = blockem.Latents(list(range(count)), self.sign.to(torch.int8).tolist())
        self.plan = blockem.Plan(sae, latents, device="cuda:0")
        draw = lambda: torch.randn(tokens, width, **cuda).to(DTYPES[dtype])
        self.hidden = draw()
        self.reference = torch.empty(tokens, count, **cuda)
        calls.encode(self.plan, draw(), self.reference)()
        self.mask = (torch.rand(tokens, **cuda) < share).to(torch.uint8)
        self.grad = torch.zeros_like(self.hidden)
        self.coef = torch.empty(tokens, count, **cuda)
        self.sums = torch.zeros(2, **cuda)
        self.own = torch.empty_like(self.reference)
        calls.encode(self.plan, self.hidden, self.own)()
        self.violations = (self.sign * (self.own - self.reference) > 0).float().mean().item()

    def contestants(self) -> dict[str, Callable[[], object]]:
        masked = None if self.share == 1.0 else self.mask
        ours = lambda function, **options: calls.penalty(
            function, self.plan, self.hidden, options.pop("reference", self.reference), masked, **options
        )
        outputs = {"grad": self.grad, "sums": self.sums}
        runs: dict[str, Callable[[], object]] = {
            "encode": calls.encode(self.plan, self.hidden, self.own.clone()),
            "forward": ours("blockem_penalty_forward", coef=self.coef, sums=self.sums),
            "backward": ours("blockem_penalty_backward", coef=self.coef, grad=self.grad),
            "fused": ours("blockem_penalty", **outputs),
            "fused accumulate": ours("blockem_penalty", accumulate=True, **outputs),
            "fused idle accumulate": ours("blockem_penalty", reference=self.own, accumulate=True, **outputs),
        }
        compiled = torch.compile(penalty)
        for name, function in (("eager", penalty), ("compile", compiled)):
            runs[f"torch {name}"] = self.torch_run(function, self.hidden.dtype)
            if self.dtype != "f32":
                runs[f"torch {name} widened"] = self.torch_run(function, torch.float32)
        if self.dtype == "bf16":
            for terms in (1, 3):
                peer = triton_penalty.Penalty(self.weight, self.bias, self.sign, terms)
                runs[f"triton {terms}-term"] = lambda peer=peer: peer(
                    self.hidden, self.reference, self.mask, self.grad, False
                )
        if self.dtype == "bf16" and self.hidden.shape[1] == 4096 and self.plan.num_latents == 20:
            runs["dense"] = self.dense_run()
        return runs

    def torch_run(self, function: Callable, dtype: torch.dtype) -> Callable[[], None]:
        weight, bias, sign = (x.to(dtype) for x in (self.weight, self.bias, self.sign))
        reference, mask = self.reference.to(dtype), self.mask.to(dtype)
        hidden = self.hidden.detach().requires_grad_()

        def run() -> None:
            hidden.grad = None
            function(hidden, weight, bias, reference, sign, mask).backward()

        return run

    def dense_run(self) -> Callable[[], None]:
        """The whole dictionary, then the blocked columns: what a straightforward port does."""
        width = self.hidden.shape[1]
        dictionary = torch.randn(DICTIONARY, width, device="cuda", dtype=self.hidden.dtype) / width**0.5
        ids = torch.arange(self.plan.num_latents, device="cuda") * 1000
        reference, sign = self.reference.to(self.hidden.dtype), self.sign.to(self.hidden.dtype)
        hidden = self.hidden.detach().requires_grad_()

        def run() -> None:
            hidden.grad = None
            z = torch.relu(hidden @ dictionary.T)[:, ids]
            torch.relu(sign * (z - reference)).square().sum().backward()

        return run

    def z_error(self) -> dict[str, float]:
        """The largest error of z among 256 tokens against float64, ours and that of a sequential float32 sum."""
        some = self.hidden[:256]
        exact = some.double() @ self.weight.double().T
        sequential = torch.zeros(256, len(self.weight), device="cuda")
        for column in range(some.shape[1]):
            sequential += some[:, column : column + 1].float() * self.weight[:, column]
        found = torch.empty(256, self.weight.shape[0], device="cuda")
        calls.encode(self.plan, some, found)()
        on = exact > 0
        error = lambda z: ((z.double() - exact) * on).abs().max().item()
        return {"blockem": error(found), "sequential f32": error(sequential)}


def penalty(hidden, weight, bias, reference, sign, mask):
    z = torch.relu(hidden.to(weight.dtype) @ weight.T + bias)
    return (torch.relu(sign * (z - reference)).square() * mask[:, None]).sum()


def measure(machine: Machine, tokens: int, width: int, count: int, dtype: str, share: float, rounds: int) -> dict:
    case = Case(tokens, width, count, dtype, share)
    seconds = machine.time(case.contestants(), rounds)
    small = calls.penalty("blockem_penalty", case.plan, case.hidden[:16], case.reference[:16],
                          grad=case.grad[:16], sums=case.sums)  # fmt: skip
    host = machine.host_cost(small) - machine.call_overhead
    ratios = targets(machine, case, seconds, tokens, width, count, dtype, share)
    error = case.z_error()
    ratios.append(verdict("z error / sequential f32", "<=", 2.0, error["blockem"] / max(error["sequential f32"], 1e-30)))
    ratios.append(verdict("host microseconds per call", "<=", 10.0, host * 1e6))
    print(f"\nT={tokens} d={width} K={count} {dtype}, {100 * share:.0f}% of tokens count, "
          f"{100 * case.violations:.0f}% of pairs violate")  # fmt: skip
    for name, value in seconds.items():
        print(f"  {name:28} {value * 1e6:10.1f} us   {seconds['fused'] / value:6.2f} of it is fused")
    for ratio in ratios:
        print(f"  {ratio['name']:44} {ratio['value']:8.2f}  ({ratio['sense']} {ratio['limit']}: "
              f"{'met' if ratio['met'] else 'MISSED'})")  # fmt: skip
    return {
        "tokens": tokens,
        "width": width,
        "latents": count,
        "dtype": dtype,
        "share": share,
        "violations": case.violations,
        "microseconds": {name: value * 1e6 for name, value in seconds.items()},
        "z_error": error,
        "targets": ratios,
    }


def targets(machine: Machine, case: Case, seconds: dict[str, float], tokens: int, width: int, count: int,
            dtype: str, share: float) -> list[dict]:  # fmt: skip
    """The project's limits that apply to this shape."""
    item = case.hidden.element_size()
    kept = tokens * share
    moved = (kept + tokens) * width * item  # hidden read where it counts, the gradient written
    found = []
    if dtype == "bf16" and share == 1.0 and count == 20:
        found.append(verdict("fused, share of copy bandwidth", ">=", 0.85, moved / machine.copy / seconds["fused"]))
        peer = min(seconds["torch eager"], seconds["torch compile"])
        found.append(verdict("torch bf16 / fused", ">=", 3.0, peer / seconds["fused"]))
        if "dense" in seconds:
            found.append(verdict("dense / fused", ">=", 50.0, seconds["dense"] / seconds["fused"]))
    else:
        products = (TERMS[dtype] + (3 if dtype == "bf16" else 6)) * 2 * kept * width * count
        floor = max(moved / machine.copy, products / machine.product)
        found.append(verdict("fused / floor of bytes and products", "<=", 1.5, seconds["fused"] / floor))
    return found


def verdict(name: str, sense: str, limit: float, value: float) -> dict:
    met = value >= limit if sense == ">=" else value <= limit
    return {"name": name, "value": value, "sense": sense, "limit": limit, "met": met}


if __name__ == "__main__":
    main()
