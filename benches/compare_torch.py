"""The penalty and its gradient on the CPU: blockem and torch, side by side in one run.

    python benches/compare_torch.py [--tokens T] [--width D] [--rounds N] [--seconds S]
    python benches/compare_torch.py --every-isa          (both need torch and bindings/python)

Both compute sum(w relu(s (relu(h W' + b) - reference))^2) and its gradient by h, on two threads; hidden and
reference come from independent draws. The contestants take turns, so that a noisy machine is noisy for all;
medians are compared. memcpy is h copied by two threads, the floor. Prints every ratio that the project has a
target for and writes benches/results/cpu-<isa>.json.

A contestant takes turns until it has had N or its share of S seconds. --every-isa does the same once for each
instruction set of this processor, in S seconds together: blockem's by the library of `make target/isa/release`,
torch's by the variables of tests/isa.py. There torch.compile, which takes long and gains little, is left out.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import blockem

THREADS = 2
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benches" / "results"
EVERY_ISA = ROOT / "target" / "isa" / "release" / "libblockem.so"
# tests/isa.py runs this file with a set that it chose.
ISA_IS_CHOSEN = "BLOCKEM_TEST_ISA" in os.environ
# Without FMA instructions every product is a call: so many times fewer tokens.
FEWER = {"portable": 32}
# ctypes releases the GIL while it copies.
MEMCPY = ctypes.CDLL(None).memcpy
MEMCPY.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every-isa", action="store_true")
    args = parser.parse_args()
    if args.every_isa:
        sys.exit(every_isa(args))
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    isa = blockem.build_info()["cpu_isa"]
    print(f"torch {torch.__version__}, blockem {blockem.__version__} ({isa}), {THREADS} threads")
    tokens, seconds = args.tokens // FEWER.get(isa, 1), args.seconds / 2
    cases = [compare(isa, tokens, args.width, count, args.rounds, seconds) for count in (20, 256)]
    RESULTS.mkdir(exist_ok=True)
    report = {"isa": isa, "cpu": cpu_name(), "torch": torch.__version__, "threads": THREADS, "cases": cases}
    (RESULTS / f"cpu-{isa}.json").write_text(json.dumps(report, indent=2) + "\n")


def every_isa(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    import isa

    if not EVERY_ISA.is_file():
        sys.exit(f"{EVERY_ISA} is missing: `make target/isa/release/libblockem.so`")
    seconds = args.seconds / len(isa.available(EVERY_ISA))
    options = {"tokens": args.tokens, "width": args.width, "rounds": args.rounds, "seconds": seconds}
    return subprocess.run(
        [sys.executable, isa.__file__, "--library", EVERY_ISA, sys.executable, __file__]
        + [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ).returncode


def compare(isa: str, tokens: int, width: int, count: int, rounds: int, seconds: float) -> dict:
    case = Case(tokens, width, count)
    milliseconds = measure(case.contestants(), rounds, seconds)
    accuracy = case.accuracy()
    print(f"\nT={tokens} d={width} K={count}: {100 * case.violations:.0f}% of the pairs violate")
    for name, ms in milliseconds.items():
        print(f"  {name:34} {ms:8.2f} ms")
    for name, error in accuracy.items():
        print(f"  {'z error, ' + name:34} {error:8.1e}")
    chosen = {} if isa in FEWER else (TARGETS if isa.endswith("bf16") else TARGETS_WITHOUT_BF16)
    targets = [verdict(*target, milliseconds) for target in chosen.get(count, [])]
    return {
        "tokens": tokens,
        "width": width,
        "latents": count,
        "violations": case.violations,
        "milliseconds": milliseconds,
        "z_error": accuracy,
        "targets": targets,
    }


# What is compared, the limit, and the two sides: their quotient must reach it (>=) or stay below it (<=).
TARGETS = {
    20: [
        ("f32, torch / blockem", ">=", 5.0, ["torch eager f32", "torch compile f32"], ["blockem f32"]),
        ("f32, blockem / memcpy of h", "<=", 2.0, ["blockem f32"], ["memcpy f32"]),
        ("bf16, torch / blockem", ">=", 3.0, ["torch eager bf16", "torch compile bf16"], ["blockem bf16"]),
        ("f32, no violation: accumulate / encode", "<=", 1.5, ["blockem f32 idle"], ["blockem f32 encode"]),
        ("bf16, no violation: accumulate / encode", "<=", 1.5, ["blockem bf16 idle"], ["blockem bf16 encode"]),
    ],
    256: [
        ("f32, torch / blockem", ">=", 1.3, ["torch eager f32", "torch compile f32"], ["blockem f32"]),
        ("bf16, torch at f32 accuracy / blockem", ">=", 2.0, ["torch eager widened", "torch compile widened"], ["blockem bf16"]),
        ("bf16, blockem / torch", "<=", 1.5, ["blockem bf16"], ["torch eager bf16", "torch compile bf16"]),
        ("f32, no violation: accumulate / encode", "<=", 1.5, ["blockem f32 idle"], ["blockem f32 encode"]),
        ("bf16, no violation: accumulate / encode", "<=", 1.5, ["blockem bf16 idle"], ["blockem bf16 encode"]),
    ],
}  # fmt: skip

# Where the processor has no bf16 instructions, the best form of torch is at f32.
TORCH_BF16 = ["torch eager bf16", "torch compile bf16", "torch eager widened", "torch compile widened"]
WIDENED = "bf16, torch at f32 accuracy / blockem"
TARGETS_WITHOUT_BF16 = {
    count: [target for target in targets if target[0] not in ("bf16, torch / blockem", WIDENED, "bf16, blockem / torch")]
    + [("bf16, torch's best form / blockem", ">=", limit, TORCH_BF16, ["blockem bf16"])]
    for (count, targets), limit in zip(TARGETS.items(), (3.0, 1.3), strict=True)
}


def verdict(name: str, sense: str, limit: float, above: list[str], below: list[str], ms: dict) -> dict:
    """The better of several contestants stands for its side."""
    best = lambda sides: min(ms[side] for side in sides if side in ms)
    ratio = best(above) / best(below)
    met = ratio >= limit if sense == ">=" else ratio <= limit
    print(f"  {name:42} {ratio:5.2f}  ({sense} {limit}: {'met' if met else 'MISSED'})")
    return {"name": name, "ratio": ratio, "sense": sense, "limit": limit, "met": met}


class Case:
    """One shape in f32 and bf16."""

    def __init__(self, tokens: int, width: int, count: int) -> None:
        self.weight = torch.randn(count, width) / width**0.5
        self.bias = torch.zeros(count)
        self.sign = torch.ones(count)
        self.sign[1::2] = -1
        sae = blockem.Sae.from_tensors(
            encoder_weight=self.weight, encoder_bias=self.bias, encoder_layout="f_d"
        )
        latents = blockem.Latents(list(range(count)), self.sign.to(torch.int8).tolist())
        self.plan = blockem.Plan(sae, latents, num_threads=THREADS)
        self.reference = self.plan.encode(torch.randn(tokens, width))
        wide = torch.randn(tokens, width)
        self.hidden = {"f32": wide, "bf16": wide.bfloat16()}
        self.grad = {name: torch.zeros_like(hidden) for name, hidden in self.hidden.items()}
        coef = self.plan.penalty(wide, self.reference, grad=False, coef=True).coef
        self.violations = (coef != 0).float().mean().item()
        self.copiers = ThreadPoolExecutor(THREADS)

    def contestants(self) -> dict[str, Callable[[], None]]:
        runs: dict[str, Callable[[], None]] = {}
        forms = {"eager": penalty} if ISA_IS_CHOSEN else {"eager": penalty, "compile": torch.compile(penalty)}
        for name, hidden in self.hidden.items():
            runs |= {f"torch {form} {name}": self.torch_run(f, hidden, hidden.dtype) for form, f in forms.items()}
            runs |= {
                f"blockem {name}": lambda h=hidden, g=self.grad[name]: self.plan.penalty(h, self.reference, grad=g),
                f"blockem {name} encode": lambda h=hidden: self.plan.encode(h),
                f"blockem {name} idle": self.idle_run(hidden, self.grad[name]),
                f"memcpy {name}": lambda h=hidden, g=self.grad[name]: self.copy(h, g),
            }
        # What a user of bf16 writes to get z as accurate as ours.
        narrow = self.hidden["bf16"]
        return runs | {f"torch {form} widened": self.torch_run(f, narrow, torch.float32) for form, f in forms.items()}

    def torch_run(self, function: Callable, hidden: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        reference = self.reference.to(dtype)
        hidden = hidden.detach().requires_grad_()

        def run() -> None:
            hidden.grad = None
            function(hidden, weight, bias, reference, self.sign.to(dtype)).backward()

        return run

    def idle_run(self, hidden: torch.Tensor, grad: torch.Tensor) -> Callable[[], None]:
        """Accumulates into a gradient where no token violates."""
        own = self.plan.encode(hidden)
        return lambda: self.plan.penalty(hidden, own, grad=grad, accumulate=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        part = source.nbytes // THREADS

        def one(i: int) -> None:
            MEMCPY(target.data_ptr() + i * part, source.data_ptr() + i * part, part)

        list(self.copiers.map(one, range(THREADS)))

    def accuracy(self) -> dict[str, float]:
        """The largest error of z among 256 tokens, against float64."""
        errors = {}
        for name, hidden in self.hidden.items():
            some = hidden[:256]
            exact = torch.relu(some.double() @ self.weight.double().T)
            in_torch = torch.relu(some @ self.weight.to(some.dtype).T)
            errors[f"torch {name}"] = (in_torch - exact).abs().max().item()
            errors[f"blockem {name}"] = (self.plan.encode(some) - exact).abs().max().item()
        return errors


def penalty(hidden, weight, bias, reference, sign):
    z = torch.relu(hidden.to(weight.dtype) @ weight.T + bias)
    return torch.relu(sign * (z - reference)).square().sum()


def measure(runs: dict[str, Callable[[], None]], rounds: int, seconds: float) -> dict[str, float]:
    """Medians in milliseconds, of contestants that take turns until each has had its share of the time."""
    share = seconds / len(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = {}
    gc.disable()
    for name, run in runs.items():
        eager = name.replace("compile", "eager")
        # What takes that long is not the time between kernels, which compiling saves.
        if eager != name and spent[eager] > share:
            del times[name]
            continue
        spent[name] = timed(run)
        # A first call compiles and allocates, which only a short one feels; a long one has no time for more.
        if spent[name] > share and eager == name:
            times[name].append(spent[name])
    for _ in range(rounds):
        for name in times:
            if not times[name] or spent[name] < share:
                times[name].append(timed(runs[name]))
                spent[name] += times[name][-1]
    gc.enable()
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def timed(run: Callable[[], None]) -> float:
    # torch's idle workers spin for some milliseconds: nobody pays for the one before.
    time.sleep(0.02)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
