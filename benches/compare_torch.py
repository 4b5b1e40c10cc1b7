"""The penalty and its gradient on the CPU: blockem and torch, side by side in one run.

    python benches/compare_torch.py [--tokens T] [--width D] [--rounds N]      (needs torch and bindings/python)

Both compute sum(w relu(s (relu(h W' + b) - reference))^2) and its gradient by h, on two threads; hidden and
reference come from independent draws. The contestants take turns, so that a noisy machine is noisy for all;
medians are compared. memcpy is h copied by two threads, the floor. Prints every ratio that the project has a
target for and writes benches/results/cpu-<isa>.json.
"""

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import blockem

THREADS = 2
RESULTS = Path(__file__).resolve().parent / "results"
# ctypes releases the GIL while it copies.
MEMCPY = ctypes.CDLL(None).memcpy
MEMCPY.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    isa = blockem.build_info()["cpu_isa"]
    print(f"torch {torch.__version__}, blockem {blockem.__version__} ({isa}), {THREADS} threads")
    cases = [compare(args.tokens, args.width, count, args.rounds) for count in (20, 256)]
    RESULTS.mkdir(exist_ok=True)
    report = {"isa": isa, "cpu": cpu_name(), "torch": torch.__version__, "threads": THREADS, "cases": cases}
    (RESULTS / f"cpu-{isa}.json").write_text(json.dumps(report, indent=2) + "\n")


def compare(tokens: int, width: int, count: int, rounds: int) -> dict:
    case = Case(tokens, width, count)
    milliseconds = measure(case.contestants(), rounds)
    accuracy = case.accuracy()
    print(f"\nT={tokens} d={width} K={count}: {100 * case.violations:.0f}% of the pairs violate")
    for name, ms in milliseconds.items():
        print(f"  {name:34} {ms:8.2f} ms")
    for name, error in accuracy.items():
        print(f"  {'z error, ' + name:34} {error:8.1e}")
    targets = [verdict(*target, milliseconds) for target in TARGETS[count]]
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


def verdict(name: str, sense: str, limit: float, above: list[str], below: list[str], ms: dict) -> dict:
    """The better of several contestants stands for its side."""
    ratio = min(ms[side] for side in above) / min(ms[side] for side in below)
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
        compiled = torch.compile(penalty)
        for name, hidden in self.hidden.items():
            runs |= {
                f"torch eager {name}": self.torch_run(penalty, hidden, hidden.dtype),
                f"torch compile {name}": self.torch_run(compiled, hidden, hidden.dtype),
                f"blockem {name}": lambda h=hidden, g=self.grad[name]: self.plan.penalty(h, self.reference, grad=g),
                f"blockem {name} encode": lambda h=hidden: self.plan.encode(h),
                f"blockem {name} idle": self.idle_run(hidden, self.grad[name]),
                f"memcpy {name}": lambda h=hidden, g=self.grad[name]: self.copy(h, g),
            }
        # What a user of bf16 writes to get z as accurate as ours.
        narrow = self.hidden["bf16"]
        runs["torch eager widened"] = self.torch_run(penalty, narrow, torch.float32)
        runs["torch compile widened"] = self.torch_run(compiled, narrow, torch.float32)
        return runs

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


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Medians in milliseconds, of contestants that take turns."""
    for run in runs.values():
        run()
        run()
    gc.disable()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            # torch's idle workers spin for some milliseconds: nobody pays for the one before.
            time.sleep(0.02)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
