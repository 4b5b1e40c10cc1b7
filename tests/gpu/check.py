"""Does the CUDA backend keep its promises on this machine's GPU?

    python tests/gpu/check.py [--device cuda:0] [--only SECTION ...] [--repeats 1000]

Needs torch and a built tree (target/release/libblockem.so), no cargo, no network. Sections: parity, masks, layouts,
statistics, steering, bits, streams, capture, context, delay, errors, sanitizer. Each prints a line; exit status 1 if one fails. With
`--device cpu` the sections that need no GPU run on the CPU backend, which is how this file itself is tested.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benches" / "gpu")]
if "BLOCKEM_TEST_ISA" not in os.environ:  # whose package is on PYTHONPATH: tests/isa.py
    sys.path.insert(0, str(ROOT / "bindings" / "python"))

import torch  # noqa: E402

import blockem  # noqa: E402
import blockem.torch  # noqa: E402
import calls  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Architectures, with what a topk SAE selects and what normalises tokens.
GATES = (
    ("standard", "native"),
    ("jumprelu", "native"),
    ("gated", "native"),
    ("gated", "dense_relu"),
    ("gated", "preactivation"),
    ("topk", "native"),
    ("topk magnitude", "native"),
    ("topk groups", "native"),
    ("jumprelu constant_norm_rescale", "native"),
    ("gated layer_norm", "native"),
    ("topk layer_norm", "native"),
)
SELECTIONS, NORMS = ("magnitude", "groups"), ("constant_norm_rescale", "layer_norm")
# (T, d, K): odd sizes, one of each tile, more than one of each, more tiles than run at a time, and what clusters of
# blocks share.
SHAPES = (
    (1, 1, 1),
    (17, 63, 3),
    (64, 64, 8),
    (65, 100, 20),
    (200, 520, 33),
    (90, 200, 40),
    (129, 1030, 70),
    (300, 2304, 130),
    (4500, 200, 20),
    (1000, 300, 260),
)
SECTIONS: dict[str, object] = {}
NEEDS_GPU = {"streams", "capture", "context", "delay", "errors", "sanitizer"}
# A short run for the sanitizer: every kernel, few shapes.
SANITIZED = ("parity", "masks", "layouts", "statistics", "steering")


def section(function):
    SECTIONS[function.__name__] = function
    return function


class Failure(AssertionError):
    pass


def expect(holds: bool, text: str) -> None:
    if not holds:
        raise Failure(text)


def refused(run, *names: str) -> None:
    try:
        run()
    except blockem.Error as error:
        expect(error.name in names, f"answers {error.name} ({error}), not {names}")
    else:
        raise Failure(f"{names} was not answered")


class Case:
    """A random SAE and set on a device, with the formulas in float64 torch as the oracle."""

    def __init__(self, o: Options, architecture: str, activation: str, width: int, count: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw)
        self.architecture, *options = architecture.split()
        self.selection = next((x for x in options if x in SELECTIONS), "largest")
        self.norm = next((x for x in options if x in NORMS), "none")
        self.activation, self.device = activation, o.device
        self.width, self.count = width, count
        # Blocked latents compete with others: in the second shape in more than one part.
        self.k = 1 + count // 2
        total = self.k * (5 + 2100 // self.k * (count == 3)) if self.architecture == "topk" else count
        self.weight = normal(total, width) / width**0.5
        self.bias = 0.2 * normal(total)
        self.threshold = 0.3 * torch.rand(count, generator=draw)
        self.gate_bias, self.r_mag = 0.2 * normal(count), 0.2 * normal(count)
        self.sign = torch.where(torch.rand(count, generator=draw) < 0.5, 1, -1).to(torch.int8)
        self.scale = 0.5 + torch.rand(count, generator=draw)
        arrays = {"encoder_bias": self.bias}
        if self.architecture == "jumprelu":
            arrays["threshold"] = self.threshold
        if self.architecture == "gated":
            arrays = {"gate_bias": self.gate_bias, "magnitude_bias": self.bias, "magnitude_log_scale": self.r_mag}
        if self.architecture == "topk":
            arrays |= {"k": self.k, "selection": self.selection}
        self.sae = blockem.Sae.from_tensors(
            encoder_weight=self.weight, encoder_layout="f_d", architecture=self.architecture, token_norm=self.norm, **arrays
        )
        self.plan = self.plan_of(range(count))

    def plan_of(self, ids) -> blockem.Plan:
        ids = list(ids)
        latents = blockem.Latents(ids, self.sign[ids].tolist(), self.scale[ids].tolist())
        return blockem.Plan(self.sae, latents, device=self.device, activation=self.activation)

    def hidden(self, tokens: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(tokens, self.width, generator=draw).to(dtype).to(self.device)

    def normalised(self, h: torch.Tensor) -> torch.Tensor:
        if self.norm == "constant_norm_rescale":
            return h * self.width**0.5 / h.norm(dim=1, keepdim=True)
        if self.norm == "layer_norm":
            return (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-5)
        return h

    def place(self, pre: torch.Tensor) -> torch.Tensor:
        """How far each latent is inside its group's k best, or outside where it is negative."""
        ranks = pre.abs() if self.selection == "magnitude" else pre
        groups, k = (self.k, 1) if self.selection == "groups" else (1, self.k)
        ranks = ranks.unflatten(1, (groups, -1))
        best = ranks.topk(min(k + 1, ranks.shape[2]), dim=2).values
        last = best[:, :, k - 1 : k]
        behind = best[:, :, k : k + 1] if ranks.shape[2] > k else torch.full_like(last, -torch.inf)
        return torch.where(ranks >= last, ranks - behind, ranks - last).flatten(1)

    def oracle(self, hidden, reference, mask, factor):
        """z, distance to the gate's edge, loss, per-latent loss, coefficients, gradient, in float64 on the CPU."""
        wide = lambda x: x.detach().cpu().double()
        w, h = wide(self.weight), wide(hidden)
        kept = (mask != 0).cpu()[:, None]
        # What stands for a token that does not count has a norm, too.
        h = torch.where(kept, h, torch.linspace(-1.0, 1.0, self.width).double()).requires_grad_()
        dots = self.normalised(h) @ w.T
        dot = dots.detach()[:, : self.count]
        slope = torch.exp(wide(self.r_mag)) if self.architecture == "gated" else torch.ones(self.count).double()
        pre = slope * dot + wide(self.bias)[: self.count]
        edges = [pre]
        if self.activation == "preactivation":
            edges = [torch.full_like(pre, torch.inf)]
        elif self.architecture == "jumprelu":
            edges = [pre - wide(self.threshold)]
        elif self.architecture == "gated" and self.activation == "native":
            edges = [pre, dot + wide(self.gate_bias)]
        elif self.architecture == "topk":
            place = self.place(dots.detach() + wide(self.bias))[:, : self.count]
            edges = [place] if self.selection == "magnitude" else [place, pre]
        off = torch.stack([edge <= 0 for edge in edges]).any(0)
        z = torch.where(off, 0.0, pre)
        sign, weight, m = wide(self.sign), wide(self.scale), wide(mask)[:, None]
        rise = torch.relu(sign * (z - torch.where(kept, wide(reference), 0.0)))
        losses = torch.where(kept, m * weight * rise**2, 0.0)
        coef = torch.where(kept & ~off, m * 2 * weight * sign * rise * slope, 0.0)
        margin = torch.stack([edge.abs() for edge in edges]).amin(0)
        grad = torch.autograd.grad((dots[:, : self.count] * coef).sum(), h)[0]
        return z, margin, losses.sum().item(), losses.sum(0), coef, factor * torch.where(kept, grad, 0.0)


class Options:
    def __init__(self, device: str, repeats: int, quick: bool) -> None:
        self.device, self.repeats, self.quick = device, repeats, quick
        self.on_gpu = device.startswith("cuda")

    def shapes(self):
        return SHAPES[2:5] if self.quick else SHAPES


def rounding(case: Case, dtype: torch.dtype) -> float:
    """How far z may be off, as a share of |W| |h|."""
    in_two_terms = case.plan.numerics.endswith("bf16dot") and dtype == torch.bfloat16
    return 2.0**-16 if in_two_terms else 2e-6


def close(found: torch.Tensor, exact: torch.Tensor, tolerance: float, what: str) -> None:
    error = (found.detach().cpu().double() - exact).abs().max().item() if exact.numel() else 0.0
    expect(error <= tolerance, f"{what}: off by {error:.2e}, may be {tolerance:.2e}")


def poisoned(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=like.device, dtype=dtype or like.dtype)


def compare(case: Case, hidden: torch.Tensor, mask: torch.Tensor | None, grad_dtype: torch.dtype, what: str) -> None:
    """Everything that the calls write against the oracle; where a latent is at its gate's edge, nothing is asked."""
    tokens = len(hidden)
    ones = torch.ones(tokens, device=hidden.device)
    m = ones if mask is None else mask.float()
    eps = rounding(case, hidden.dtype)
    norm = 1 + hidden.detach().cpu().double().norm(dim=1).max().item() if tokens else 1.0
    reference = torch.randn(tokens, case.count, generator=torch.Generator().manual_seed(7)).to(hidden.device)
    z, margin, *_ = case.oracle(hidden, reference, ones, 1.0)
    edge = margin <= 8 * eps * norm
    # Both sides of the edge are right: keep them out of the sums.
    reference[edge.to(hidden.device)] = 0
    reference += edge.to(hidden.device) * 1e3 * case.sign.to(hidden.device)
    latents = poisoned(tokens, case.count, like=hidden, dtype=torch.float32)
    calls.encode(case.plan, hidden, latents)()
    close(torch.where(edge, 0.0, latents.cpu()), torch.where(edge, 0.0, z), 3 * eps * norm, f"{what}: z")
    *_, loss, latent_loss, coef, grad = case.oracle(hidden, reference, m, 0.75 * 0.5)
    out = {
        "grad": poisoned(*hidden.shape, like=hidden, dtype=grad_dtype),
        "coef": poisoned(tokens, case.count, like=hidden, dtype=torch.float32),
        "sums": poisoned(2, like=hidden, dtype=torch.float64),
        "latent_loss": poisoned(case.count, like=hidden, dtype=torch.float32),
    }
    half = torch.full((1,), 0.5, device=hidden.device)
    run = calls.penalty("blockem_penalty", case.plan, hidden, reference, mask, scale_tensor=half, scale=0.75, **out)
    run()
    about = 40 * eps * norm * (1 + coef.abs().max().item() if coef.numel() else 1)
    close(out["sums"], torch.tensor([loss, m.double().sum().item()], dtype=torch.float64), about * (1 + loss), f"{what}: sums")
    close(out["latent_loss"], latent_loss, about * (1 + loss), f"{what}: latent_loss")
    close(out["coef"], coef, about, f"{what}: coef")
    narrow = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[grad_dtype]
    size = grad.abs().max().item() if grad.numel() else 0.0
    close(out["grad"], grad, about + narrow * size, f"{what}: grad")
    # Split in two calls, and added to what is there.
    coef2, sums2 = torch.full_like(out["coef"], float("nan")), torch.full_like(out["sums"], float("nan"))
    calls.penalty("blockem_penalty_forward", case.plan, hidden, reference, mask, coef=coef2, sums=sums2)()
    grad2 = torch.full_like(out["grad"], float("nan"))
    calls.penalty("blockem_penalty_backward", case.plan, hidden, reference, coef=coef2, grad=grad2,
                  scale_tensor=half, scale=0.75)()  # fmt: skip
    same(coef2, out["coef"], f"{what}: coef of forward")
    same(sums2, out["sums"], f"{what}: sums of forward")
    same(grad2, out["grad"], f"{what}: backward")
    before = torch.randn_like(hidden, dtype=torch.float32).to(grad_dtype)
    added = before.clone()
    calls.penalty("blockem_penalty", case.plan, hidden, reference, mask, scale_tensor=half, scale=0.75,
                  accumulate=True, grad=added)()  # fmt: skip
    close(added, before.cpu().double() + grad, about + narrow * (size + 8), f"{what}: accumulate")
    still = (coef2 == 0).all(1)
    same(added[still], before[still], f"{what}: rows without a coefficient")


def same(found: torch.Tensor, other: torch.Tensor, what: str) -> None:
    """Bit for bit."""
    view = lambda x: x.detach().contiguous().cpu().view(torch.uint8)
    expect(found.shape == other.shape and torch.equal(view(found), view(other)), f"{what}: bits differ")


@section
def parity(o: Options) -> str:
    count = 0
    for architecture, activation in GATES:
        for tokens, width, latents in o.shapes():
            if width < 8 and any(norm in architecture for norm in NORMS):
                continue  # nothing is left of a token of one number
            case = Case(o, architecture, activation, width, latents, seed=tokens)
            for dtype in DTYPES:
                for grad_dtype in {dtype, torch.float32}:
                    what = f"{architecture} {activation} T={tokens} d={width} K={latents} {dtype} {grad_dtype}"
                    compare(case, case.hidden(tokens, dtype), None, grad_dtype, what)
                    count += 1
    return f"{count} combinations of gate, shape and dtype agree with float64"


@section
def masks(o: Options) -> str:
    case = Case(o, "jumprelu", "native", 300, 20)
    for dtype in DTYPES:
        hidden = case.hidden(150, dtype)
        draw = torch.rand(150, generator=torch.Generator().manual_seed(3))
        for mask in (draw < 0.3, (draw < 0.3).to(torch.uint8) * 7, torch.where(draw < 0.3, draw, 0.0),
                     torch.zeros(150, dtype=torch.uint8)):  # fmt: skip
            mask = mask.to(hidden.device)
            exact = mask if mask.dtype == torch.float32 else mask != 0
            poison = hidden.clone()
            poison[exact == 0] = float("nan")
            compare_masked(case, hidden, poison, mask, f"{dtype} {mask.dtype}")
    return "u8, bool and f32 masks; NaN in masked tokens reaches nothing"


def compare_masked(case: Case, hidden: torch.Tensor, poison: torch.Tensor, mask: torch.Tensor, what: str) -> None:
    results = []
    for h in (hidden, poison):
        reference = torch.randn(len(h), case.count, generator=torch.Generator().manual_seed(5)).to(h.device)
        if h is poison:
            reference[torch.isnan(h).any(1)] = float("nan")
        grad, sums = poisoned(*h.shape, like=h), poisoned(2, like=h, dtype=torch.float64)
        calls.penalty("blockem_penalty", case.plan, h, reference, mask, grad=grad, sums=sums)()
        results.append((grad, sums, reference))
    same(results[0][0], results[1][0], f"{what}: gradient beside masked NaN")
    same(results[0][1], results[1][1], f"{what}: sums beside masked NaN")
    m = mask if mask.dtype == torch.float32 else (mask != 0).float()
    *_, loss, _, _, grad = case.oracle(hidden, results[0][2], m, 1.0)
    expect(abs(results[0][1][0].item() - loss) <= 1e-3 * (1 + loss), f"{what}: loss")
    close(results[0][0], grad, 2.0**-6 * (1 + grad.abs().max().item()), f"{what}: grad")


@section
def statistics(o: Options) -> str:
    """Sums of every latent are those of a plan's z in the order of the tokens, bit for bit."""
    for architecture, activation in GATES:
        case = Case(o, architecture, activation, 100, 20)
        stats = blockem.Stats(case.sae, device=o.device, activation=activation)
        ids = list(range(stats.d_sae))
        plan = blockem.Plan(case.sae, blockem.Latents(ids, [1] * len(ids)), device=o.device, activation=activation)
        for dtype in DTYPES:
            what = f"{architecture} {activation} {dtype}"
            hidden, base = case.hidden(150, dtype), case.hidden(150, dtype, seed=2)
            mask = torch.rand(150, generator=torch.Generator().manual_seed(3))
            mask = torch.where(mask < 0.3, 0.0, mask).to(hidden.device)
            whole, parts = stats.fresh(), stats.fresh()
            poisoned_hidden = torch.where((mask == 0)[:, None], float("nan"), hidden)
            whole.update(poisoned_hidden, base, mask)
            for part in (slice(0, 37), slice(37, 38), slice(38, 150)):
                parts.update(hidden[part], base[part], mask[part])
            state = torch.from_numpy(whole.state_dict()["state"])
            same(torch.from_numpy(parts.state_dict()["state"]), state, f"{what}: in parts")
            expected = torch.zeros_like(state)
            expected[[3, 7]] = -torch.inf
            z, before = (plan.encode(h).cpu() for h in (hidden, base))
            for t, m in enumerate(mask.double().tolist()):
                if m == 0:
                    continue
                rise, fall = (torch.relu(x[t] - y[t]).double() for x, y in ((z, before), (before, z)))
                for row, x in ((0, z[t].double()), (4, before[t].double())):
                    expected[row] += m * x
                    expected[row + 1] += m * (x * x)
                    expected[row + 2] += torch.where(x != 0, m, 0.0)
                    expected[row + 3] = torch.maximum(expected[row + 3], x)
                expected[8] += m * (rise * rise)
                expected[9] += m * (fall * fall)
            same(state, expected, f"{what}: sums of z")
    return f"{len(GATES)} gates in every dtype: the sums of a plan's z, however tokens are cut"


@section
def steering(o: Options) -> str:
    """The bits of the CPU, and of one fma in float32; NaN where a row is out of range; norms near float64."""
    for batch, positions, width in ((1, 1, 1), (5, 7, 43), (4, 1, 4096), (3, 33, 1030)):
        draw = torch.Generator().manual_seed(width)
        normal = lambda *shape: torch.randn(*shape, generator=draw)
        sae = blockem.Sae.from_tensors(encoder_weight=normal(9, width), encoder_layout="f_d", encoder_bias=normal(9),
                                       decoder_weight=normal(9, width))  # fmt: skip
        ours, host = blockem.Steering(sae, [3, 0, 8], device=o.device), blockem.Steering(sae, [3, 0, 8])
        latents = torch.tensor([3, -1, 0, 8])[torch.randint(4, (batch,), generator=draw)]
        strengths = torch.tensor([0.7, -2.5, 0.0])[torch.randint(3, (batch,), generator=draw)]
        for dtype, mask_dtype, gap in itertools.product(DTYPES, (None, torch.bool, torch.float32), (0, 3)):
            what = f"{batch} x {positions} x {width} {dtype} {mask_dtype}"
            mask = None if mask_dtype is None else torch.rand(batch, positions, generator=draw).round().to(mask_dtype)
            wide = (20 * normal(positions, batch, width + gap)).to(dtype)
            expected, found = wide[:, :, :width].transpose(0, 1), wide.to(o.device)[:, :, :width].transpose(0, 1)
            if mask is not None:
                expected[mask == 0] = found[mask.to(o.device) == 0] = float("nan")
            host.steer(expected, latents, strengths, mask, scale=3.0)
            ours.steer(found, latents, strengths, None if mask is None else mask.to(o.device), scale=3.0)
            counted = torch.ones(batch, positions, dtype=torch.bool) if mask is None else mask != 0
            same(found.cpu()[counted], expected[counted], what)
            norms = blockem.token_norms(found).cpu().double()
            exact = found.cpu().double().norm(dim=-1)
            close(norms[counted], exact[counted], 1e-6 * exact[counted].amax().item() if counted.any() else 0.0, what)
        if o.on_gpu:
            hidden, rows = torch.zeros(2, 3, width, device=o.device), torch.tensor([3, 0], device=o.device)
            beyond = blockem._steering.Conditions(rows, torch.ones(2, device=o.device))
            ours._run(hidden, beyond, None, 1.0)
            expect(bool(hidden[0].isnan().all() and hidden[1].isfinite().all()), "a row out of range is not NaN")
    return "the bits of the CPU in every dtype, mask and layout"


@section
def layouts(o: Options) -> str:
    """Strided rows, and rows that start between 16-byte boundaries, have the bits of dense ones."""
    for dtype in DTYPES:
        case = Case(o, "gated", "native", 200, 33)
        dense = case.hidden(90, dtype)
        reference = torch.randn(90, 33, generator=torch.Generator().manual_seed(2)).to(dense.device)
        results = []
        for offset, pitch in ((0, 200), (0, 208), (1, 203), (3, 401)):
            wide = torch.full((90 * pitch + 8,), float("nan"), device=dense.device, dtype=dtype)
            hidden = wide[offset : offset + 90 * pitch].view(90, pitch)[:, :200]
            hidden.copy_(dense)
            target = torch.full((90 * pitch + 8,), float("nan"), device=dense.device, dtype=dtype)
            grad = target[offset : offset + 90 * pitch].view(90, pitch)[:, :200]
            sums = torch.zeros(2, device=dense.device)
            latents = torch.empty(90, 33, device=dense.device)
            calls.encode(case.plan, hidden, latents)()
            calls.penalty("blockem_penalty", case.plan, hidden, reference, grad=grad, sums=sums)()
            around = target.isnan().sum().item()
            expect(around == 90 * (pitch - 200) + 8, f"{dtype}, pitch {pitch}: written outside of the rows")
            results.append((latents, grad.clone(), sums))
        for other in results[1:]:
            for x, y in zip(results[0], other):
                same(x, y, f"{dtype}: layouts")
    return "strided and misaligned rows give the bits of dense ones and nothing is written between them"


@section
def bits(o: Options) -> str:
    """A token's z is its own, and a call repeats itself."""
    for dtype, architecture in itertools.product(DTYPES, ("jumprelu", "topk layer_norm")):
        case = Case(o, architecture, "native", 1000, 150)
        hidden = case.hidden(300, dtype)
        every = case.plan.encode(hidden)
        for few in (range(0, 1), range(3, 11), range(0, 20), range(30, 63), range(20, 150)):
            same(case.plan_of(few).encode(hidden), every[:, few.start : few.stop].clone(), f"{dtype} {architecture}: latents {few}")
        for start, end in ((0, 1), (1, 2), (7, 140), (140, 300)):
            same(case.plan.encode(hidden[start:end].clone()), every[start:end].clone(), f"{dtype} {architecture}: tokens {start}-{end}")
        order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(hidden.device)
        same(case.plan.encode(hidden[order]), every[order], f"{dtype} {architecture}: another order")
        # The same hidden states as the base model's cost exactly nothing.
        sums, grad = poisoned(2, like=hidden, dtype=torch.float64), poisoned(*hidden.shape, like=hidden)
        calls.penalty("blockem_penalty", case.plan, hidden, every, sums=sums, grad=grad)()
        expect(sums[0].item() == 0 and not grad.any().item(), f"{dtype} {architecture}: hidden equal to base")
        reference = torch.randn(300, 150, generator=torch.Generator().manual_seed(4)).to(hidden.device)
        sums = torch.zeros(2, device=hidden.device)
        run = calls.penalty("blockem_penalty", case.plan, hidden, reference, sums=sums, grad=grad)
        run()
        first = (sums.clone(), grad.clone())
        whole, halves = grad.clone(), torch.empty_like(grad)
        for part in (slice(0, 111), slice(111, 300)):
            calls.penalty("blockem_penalty", case.plan, hidden[part], reference[part], grad=halves[part])()
        same(halves, whole, f"{dtype} {architecture}: the batch in two")
        for i in range(o.repeats):
            grad.fill_(float("nan"))
            run()
            if i % 50 == 0 or i == o.repeats - 1:
                same(sums, first[0], f"{dtype}: loss of run {i}")
                same(grad, first[1], f"{dtype}: gradient of run {i}")
            elif o.on_gpu:
                expect(torch.equal(grad, first[1]) and torch.equal(sums, first[0]), f"{dtype}: run {i}")
    return f"same bits in other batches, orders, latent sets and in {o.repeats} repeats"


@section
def streams(o: Options) -> str:
    case = Case(o, "standard", "native", 2304, 130)
    hidden = case.hidden(2000, torch.bfloat16)
    reference = torch.randn(2000, 130, device=hidden.device)
    results = []
    for stream in [torch.cuda.current_stream(), *(torch.cuda.Stream() for _ in range(8))]:
        grad, sums = poisoned(*hidden.shape, like=hidden), torch.zeros(2, device=hidden.device)
        run = calls.penalty("blockem_penalty", case.plan, hidden, reference, grad=grad, sums=sums)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        results.append((grad, sums, run))
    torch.cuda.synchronize()
    for grad, sums, _ in results[1:]:
        same(grad, results[0][0], "gradient on another stream")
        same(sums, results[0][1], "loss on another stream")
    return "nine streams at once, same bits"


@section
def capture(o: Options) -> str:
    for architecture in ("standard", "topk", "gated layer_norm"):
        case = Case(o, architecture, "native", 1024, 20)
        captured(case, architecture)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            case.plan_of(range(3))
    except blockem.Error as error:
        expect(error.name == "CAPTURE_UNSAFE", f"a plan made in a capture answers {error.name}")
    except RuntimeError:
        pass  # torch refused first
    torch.cuda.synchronize()
    return "captured, replayed with other hidden states and scale, same bits as a call"


def captured(case: Case, what: str) -> None:
    hidden = case.hidden(500, torch.bfloat16)
    reference = torch.randn(500, 20, device=hidden.device)
    grad, sums = poisoned(*hidden.shape, like=hidden), torch.zeros(2, device=hidden.device)
    scale = torch.ones(1, device=hidden.device)
    run = calls.penalty("blockem_penalty", case.plan, hidden, reference, grad=grad, sums=sums, scale_tensor=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed, factor in ((11, 1.0), (12, 0.25), (13, -3.0)):
        hidden.copy_(case.hidden(500, torch.bfloat16, seed))
        scale.fill_(factor)
        grad.fill_(float("nan"))
        graph.replay()
        replayed = (grad.clone(), sums.clone())
        run()
        same(replayed[0], grad, f"{what}: gradient of a replay")
        same(replayed[1], sums, f"{what}: loss of a replay")


@section
def context(o: Options) -> str:
    """The host's current context is what it was: the primary one, none, one of the host's own."""
    driver = ctypes.CDLL("libcuda.so.1")
    current = lambda: (lambda c: (driver.cuCtxGetCurrent(ctypes.byref(c)), c.value)[1])(ctypes.c_void_p())
    case = Case(o, "standard", "native", 300, 20)
    hidden = case.hidden(100, torch.float32)
    torch.cuda.synchronize()
    before = current()
    case.plan.encode(hidden)
    case.plan_of(range(5))
    expect(current() == before, "a call changed the current context")
    run = calls.encode(case.plan, hidden, torch.empty(100, 20, device=hidden.device))
    run.stream = lambda: None
    driver.cuCtxSetCurrent(ctypes.c_void_p(None))
    run()
    after = current()
    driver.cuCtxSetCurrent(ctypes.c_void_p(before))
    expect(after is None, "a call left a context behind where there was none")
    other = ctypes.c_void_p()
    device = ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    expect(driver.cuCtxCreate_v2(ctypes.byref(other), 0, device) == 0, "cuCtxCreate")
    foreign = case.plan_of(range(8))
    expect(current() == other.value, "a plan changed a context that is not the primary one")
    driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    driver.cuCtxSetCurrent(ctypes.c_void_p(before))
    refused(lambda: foreign.encode(hidden), "DEVICE_MISMATCH", "INVALID_ARGUMENT")
    del foreign
    gc.collect()
    expect(driver.cuCtxDestroy_v2(other) == 0, "cuCtxDestroy")
    return "unchanged by plans and calls"


@section
def delay(o: Options) -> str:
    """A long kernel on the legacy stream must not hold ours."""
    case = Case(o, "standard", "native", 1024, 20)
    hidden = case.hidden(500, torch.bfloat16)
    latents = torch.empty(500, 20, device=hidden.device)
    stream, run = torch.cuda.Stream(), calls.encode(case.plan, hidden, latents)
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    busy, done = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    with torch.cuda.stream(stream):
        run()
        done.record()
    start = time.monotonic()
    while not done.query() and time.monotonic() - start < 5:
        time.sleep(0.001)
    held = busy.query()
    torch.cuda.synchronize()
    expect(not held, "our work waited for the legacy stream")
    return "a busy legacy stream delays nothing"


@section
def errors(o: Options) -> str:
    case = Case(o, "standard", "native", 64, 8)
    hidden = case.hidden(32, torch.float32)
    reference = torch.zeros(32, 8, device=hidden.device)

    index = torch.cuda.device_count()
    refused(lambda: blockem.Plan(case.sae, blockem.Latents([0], [1]), device=f"cuda:{index}"), "INVALID_ARGUMENT")
    refused(lambda: case.plan.encode(hidden.cpu()), "DEVICE_MISMATCH")
    refused(lambda: blockem.torch.penalty(case.plan, hidden, reference.cpu()), "DEVICE_MISMATCH")
    # Host memory that says that it is the device's.
    lie = calls.encode(case.plan, hidden, torch.empty(32, 8, device=hidden.device))
    host = torch.empty(32, 64)
    lie.owners[1].hidden.data = host.data_ptr()
    refused(lie, "DEVICE_MISMATCH")
    free, _ = torch.cuda.mem_get_info()
    hoard = [torch.empty(max(free - (64 << 20), 0), dtype=torch.uint8, device=hidden.device)]
    big = blockem.Sae.from_tensors(encoder_weight=torch.ones(4096, 8192), encoder_layout="f_d",
                                   encoder_bias=torch.zeros(4096))  # fmt: skip
    latents = blockem.Latents(list(range(4096)), [1] * 4096)
    refused(lambda: blockem.Plan(big, latents, device=o.device), "OUT_OF_MEMORY")
    del hoard
    torch.cuda.empty_cache()
    case.plan.encode(hidden)
    return "invalid device, mixed devices, host pointers, no memory: a status and a message, and work goes on"


@section
def sanitizer(o: Options) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "skipped: compute-sanitizer is not on this machine"
    # The option's name differs from release to release; without it torch's kernels are checked too.
    options = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    flag = next((flag for flag in ("--kernel-name", "--kernel-regex") if flag in options), None)
    ours = [flag, "kernel_substring=blockem"] if flag else []
    for check in ("memcheck", "racecheck", "initcheck"):
        only = [x for name in SANITIZED for x in ("--only", name)]
        checked = [sys.executable, __file__, "--device", o.device, "--quick", *only]
        command = [tool, "--tool", check, "--error-exitcode", "9", *ours, *checked]
        done = subprocess.run(command, capture_output=True, text=True)
        expect(done.returncode == 0, f"{check}: {done.stdout[-2000:]}{done.stderr[-500:]}")
    return "memcheck, racecheck and initcheck find nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="few shapes and repeats, for the sanitizer")
    parser.add_argument("--output", type=Path, help="a JSON file of the lines that are printed")
    args = parser.parse_args()
    o = Options(args.device, 5 if args.quick else args.repeats, args.quick)
    if o.on_gpu and not torch.cuda.is_available():
        print("skipped: this machine has no GPU that torch can use")
        return
    lines, failed = {}, False
    for name, run in SECTIONS.items():
        if args.only and name not in args.only or not o.on_gpu and name in NEEDS_GPU:
            continue
        start = time.monotonic()
        try:
            lines[name], mark = run(o), "ok"
        except Exception as error:
            if not isinstance(error, Failure):
                traceback.print_exc()
            lines[name], mark, failed = f"FAILED: {error}", "FAILED", True
        print(f"{name:10} {mark:6} {time.monotonic() - start:6.1f} s  {lines[name]}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(lines, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
