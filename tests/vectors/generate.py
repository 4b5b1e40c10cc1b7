#!/usr/bin/env python3
"""Writes the frozen test vectors: *.safetensors and their C twin vectors.h, beside this file.

    python tests/vectors/generate.py [--out FOLDER]

An implementation of the formulas in f64 that shares no code with the library. Sums are exactly
rounded (math.fsum) and random numbers are scaled integers of numpy's frozen RandomState, so every
machine writes the same bytes; a test compares them.

Each file is one case. Symbols: T tokens, d inputs, F latents of the dictionary, K blocked latents.

  inputs
    encoder_weight [F, d] f32       one row per latent
    encoder_bias [F] f32            all gates but gated
    threshold [F] f32               jumprelu
    gate_bias, magnitude_bias, magnitude_log_scale [F] f32     gated
    decoder_bias [d] f32            subtracted from the scaled hidden where apply_b_dec_to_input = 1
    decoder_weight [F, d] f32       where rescale_acts_by_decoder_norm = 1: the norms of its rows
    ids [K] i64, signs [K] i8, weights [K] f32 (absent: 1 for each)
    hidden, base_hidden [T, d] f32, f16 or bf16     a masked-out token of hidden may be NaN
    mask [T] u8 (not 0 counts once) or f32 (the token's share); absent: 1 for each
    reference [T, K] f32            z of base_hidden, rounded to f32: also what encode must give
  expected, f64
    latents [T, K]                  z of hidden; a token whose hidden is NaN has NaN
    loss_sum [1], token_count [1], latent_loss [K]
    coef [T, K]                     m_t 2 w_k s_k relu(s_k (z - reference)) act'(pre)
    grad_hidden [T, d]              scale * sum_k coef[t,k] W_k
  __metadata__, all strings
    name, architecture, activation, k (0: none), input_scale, apply_b_dec_to_input,
    rescale_acts_by_decoder_norm, scale (of the gradient)
    tolerance.<set>.<field>         largest absolute error; set is f32 (every production backend)
                                    or f64 (the reference backend with f64 outputs); fields are
                                    latents, loss_sum, latent_loss, coef, grad_hidden. reference
                                    has the tolerance of latents, token_count is exact.
    tolerance.rounding              relative error more of grad_hidden in hidden's dtype
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import numpy as np

ARCHITECTURES = {"standard": 0, "jumprelu": 1, "gated": 2, "topk": 3}
ACTIVATIONS = {"native": 0, "dense_relu": 1, "preactivation": 2}
DTYPES = {"f32": 0, "f16": 1, "bf16": 2, "u8": 4}


@dataclass(frozen=True)
class Case:
    name: str
    architecture: str
    activation: str
    dtype: str
    mask: str | None
    tokens: int
    d_in: int
    d_sae: int
    num_latents: int
    weights: bool = False
    nan_token: bool = False
    k: int = 0
    input_scale: float = 1.0
    apply_b_dec_to_input: bool = False
    rescale_acts_by_decoder_norm: bool = False
    scale: float = 1.0


CASES = [
    Case("relu_f32", "standard", "native", "f32", None, 5, 7, 11, 4),
    Case("relu_bf16_folds", "standard", "native", "bf16", None, 6, 20, 9, 5, scale=0.375,
         input_scale=0.6875, apply_b_dec_to_input=True),
    Case("jumprelu_f16_mask_u8", "jumprelu", "native", "f16", "u8", 9, 33, 14, 5, weights=True),
    Case("jumprelu_f32_mask_f32_nan", "jumprelu", "native", "f32", "f32", 18, 35, 20, 17,
         weights=True, nan_token=True, scale=2.5),
    Case("gated_bf16_mask_f32", "gated", "native", "bf16", "f32", 7, 24, 13, 6, weights=True),
    Case("gated_f32_dense_relu", "gated", "dense_relu", "f32", "u8", 6, 16, 8, 3),
    Case("preactivation_f32", "jumprelu", "preactivation", "f32", "u8", 8, 17, 10, 7,
         nan_token=True),
    Case("preactivation_gated_f16", "gated", "preactivation", "f16", None, 4, 12, 6, 2),
    Case("dense_relu_topk_bf16", "topk", "dense_relu", "bf16", "u8", 10, 32, 16, 9, weights=True,
         k=4, rescale_acts_by_decoder_norm=True, scale=-1.25),
    Case("dense_relu_jumprelu_f16", "jumprelu", "dense_relu", "f16", "f32", 3, 65, 5, 1),
]


@dataclass
class Array:
    """Numbers as they are stored, and as the f64 values that they stand for."""

    dtype: str
    stored: np.ndarray
    value: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        bf16 = self.dtype == "bf16"
        widened = (self.stored.astype("<u4") << 16).view("<f4") if bf16 else self.stored
        self.value = widened.astype(np.int64 if self.dtype in ("i64", "i8") else np.float64)


def array(dtype: str, values: np.ndarray | list) -> Array:
    values = np.asarray(values)
    if dtype != "bf16":
        return Array(dtype, values.astype("<" + {"f": "f", "u": "u", "i": "i"}[dtype[0]]
                                          + str(int(dtype[1:]) // 8)))
    nan = np.isnan(values)
    bits = np.where(nan, 0, values).astype("<f4").view("<u4").astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return Array(dtype, np.where(nan, 0x7FC0, rounded).astype("<u2"))


class Numbers:
    """Reproducible numbers: integers of a frozen generator, divided by a power of two."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        unit = self.state.randint(0, 2**24, size=shape) / 2**24
        return low + (high - low) * unit


def exp(x: float) -> float:
    """e^x, correctly rounded on every machine."""
    return float(Decimal(float(x)).exp())


def dot(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b))


def norm(a: np.ndarray) -> float:
    return math.sqrt(dot(a, a))


def make_inputs(case: Case, seed: int) -> dict[str, Array]:
    n = Numbers(seed)
    t, d, f, k = case.tokens, case.d_in, case.d_sae, case.num_latents
    out = {"encoder_weight": array("f32", n.uniform(-1, 1, f, d) / 2)}
    if case.architecture == "gated":
        out["gate_bias"] = array("f32", n.uniform(-1, 1, f))
        out["magnitude_bias"] = array("f32", n.uniform(-0.5, 1, f))
        out["magnitude_log_scale"] = array("f32", n.uniform(-0.5, 0.5, f))
    else:
        out["encoder_bias"] = array("f32", n.uniform(-0.5, 1, f))
    if case.architecture == "jumprelu":
        out["threshold"] = array("f32", n.uniform(0, 1, f))
    if case.apply_b_dec_to_input:
        out["decoder_bias"] = array("f32", n.uniform(-1, 1, d))
    if case.rescale_acts_by_decoder_norm:
        out["decoder_weight"] = array("f32", n.uniform(-1, 1, f, d) / 2)
    out["ids"] = array("i64", n.state.permutation(f)[:k])
    out["signs"] = array("i8", np.where(np.arange(k) % 3 == 1, -1, 1))
    if case.weights:
        out["weights"] = array("f32", n.uniform(0.25, 2, k))
    base = n.uniform(-2, 2, t, d)
    hidden = base + n.uniform(-0.5, 0.5, t, d)
    if case.mask:
        # Token 1 is masked out, token 2 has an unusual share. Any way to add them up is exact.
        mask = np.round(n.uniform(16, 128, t)) / 64 if case.mask == "f32" else np.ones(t)
        mask[1], mask[2] = 0, 0.5 if case.mask == "f32" else 3
        out["mask"] = array(case.mask, mask)
    if case.nan_token:
        hidden[1, d // 2] = math.nan
    out["hidden"] = array(case.dtype, hidden)
    out["base_hidden"] = array(case.dtype, base)
    return out


@dataclass
class Latent:
    """One latent at one token: z, act'(pre), its row in hidden's units, and what rounding sees."""

    z: float
    slope: float
    row: np.ndarray
    margin: float
    size: float


def latent(case: Case, arrays: dict[str, Array], i: int, hidden: np.ndarray) -> Latent:
    """z of dictionary latent i as the formulas say, without any fold."""
    def at(name: str) -> float:
        return float(arrays[name].value[i])

    weight = arrays["encoder_weight"].value[i]
    x = case.input_scale * hidden
    if case.apply_b_dec_to_input:
        x = x - arrays["decoder_bias"].value
    lift = norm(arrays["decoder_weight"].value[i]) if case.rescale_acts_by_decoder_norm else 1.0
    g, slope = dot(weight, x), 1.0
    if case.architecture == "gated":
        slope = exp(at("magnitude_log_scale"))
        pre = slope * g + at("magnitude_bias")
    else:
        pre = lift * (g + at("encoder_bias"))
    # Distances that must be above 0 for the latent to be on.
    if case.activation == "preactivation":
        edges = []
    elif case.activation == "native" and case.architecture == "jumprelu":
        edges = [pre - at("threshold")]
    elif case.activation == "native" and case.architecture == "gated":
        edges = [g + at("gate_bias"), pre]
    else:
        edges = [pre]
    off = any(edge <= 0 for edge in edges)
    terms = [abs(float(w) * float(v)) for w, v in zip(weight, x)]
    return Latent(
        z=0.0 if off else pre,
        slope=0.0 if off else slope,
        row=case.input_scale * lift * weight,
        margin=min((abs(edge) for edge in edges), default=math.inf),
        size=max(slope, lift) * (math.fsum(terms) + 1.0),
    )


Result = tuple[dict[str, Array], dict[str, float]]


def compute(case: Case, arrays: dict[str, Array]) -> Result | None:
    """Expected values and tolerances; None when a latent is too close to its gate to be a test."""
    t_all, d, ids = range(case.tokens), case.d_in, arrays["ids"].value
    k_all = range(len(ids))
    signs = arrays["signs"].value
    weights = arrays["weights"].value if case.weights else np.ones(len(ids))
    mask = arrays["mask"].value if case.mask else np.ones(case.tokens)
    if case.mask == "u8":
        mask = (mask != 0).astype(np.float64)

    hidden, base = arrays["hidden"].value, arrays["base_hidden"].value
    now = [[latent(case, arrays, i, hidden[t]) for i in ids] for t in t_all]
    before = [[latent(case, arrays, i, base[t]) for i in ids] for t in t_all]
    seen = [x for row in now + before for x in row if not math.isnan(x.z)]
    if any(x.margin < 2**-13 * x.size for x in seen):
        return None

    reference = array("f32", [[x.z for x in row] for row in before])
    coef = np.zeros((case.tokens, len(ids)))
    losses: list[list[float]] = [[] for _ in k_all]
    grad = np.zeros((case.tokens, d))
    for t in t_all:
        if mask[t] == 0:
            continue
        for k in k_all:
            rise = signs[k] * (now[t][k].z - reference.value[t, k])
            rise = 0.0 if rise <= 0 else rise
            losses[k].append(mask[t] * weights[k] * rise * rise)
            coef[t, k] = mask[t] * 2 * weights[k] * signs[k] * rise * now[t][k].slope
        rows = np.array([x.row for x in now[t]])
        grad[t] = [case.scale * dot(coef[t], rows[:, i]) for i in range(d)]
    latent_loss = np.array([math.fsum(terms) for terms in losses])
    values = {
        "reference": reference,
        "latents": array("f64", [[x.z for x in row] for row in now]),
        "loss_sum": array("f64", [math.fsum(latent_loss)]),
        "token_count": array("f64", [math.fsum(mask)]),
        "latent_loss": array("f64", latent_loss),
        "coef": array("f64", coef),
        "grad_hidden": array("f64", grad),
    }

    folded = case.apply_b_dec_to_input or case.input_scale != 1 or case.architecture == "gated" \
        or case.rescale_acts_by_decoder_norm
    # Rows are kept in f32; bf16 hidden may meet rows in two bf16 terms (16 bits and the signs).
    relative = {"f32": 2.0**-17 if case.dtype == "bf16" else 2.0**-20,
                "f64": 2.0**-22 if folded else 2.0**-46}
    tolerance = {}
    for kind, eps in relative.items():
        own = 2.0**-22 if kind == "f32" else 2.0**-48
        dz = eps * max(x.size for x in seen)
        dc = 2 * float(max(mask) * max(weights)) * max(x.slope for x in seen) * dz
        dl = [math.fsum(abs(c) for c in coef[:, k]) * dz + case.tokens * dc * dz + own * loss
              for k, loss in enumerate(latent_loss)]
        most = max(abs(x) for x in coef.flat)
        widest = max(math.fsum(abs(x.row[i]) for x in now[0]) for i in range(d))
        dc += (own + eps) * most
        tolerance |= {
            f"{kind}.latents": dz,
            f"{kind}.loss_sum": math.fsum(dl) + own * math.fsum(latent_loss),
            f"{kind}.latent_loss": max(dl),
            f"{kind}.coef": dc,
            # f16 has no finer step than 2^-24 near 0.
            f"{kind}.grad_hidden": abs(case.scale) * (dc + own * most) * widest
            + (2.0**-25 if case.dtype == "f16" and kind == "f32" else 0.0),
        }
    tolerance["rounding"] = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}[case.dtype]
    # Three digits, rounded up, are enough for a limit.
    return values, {name: float(f"{1.01 * value:.2e}") for name, value in tolerance.items()}


def build(case: Case) -> Result:
    """The first seed of the case that keeps every latent clear of its gate."""
    first = 1000 * CASES.index(case)
    for seed in range(first, first + 1000):
        arrays = make_inputs(case, seed)
        if (result := compute(case, arrays)) is not None:
            expected, tolerance = result
            share = np.mean(expected["coef"].value != 0)
            if 0.15 < share < 0.6:
                return arrays | expected, tolerance
    raise RuntimeError(f"{case.name}: no seed gives a usable case")


def metadata(case: Case, tolerance: dict[str, float]) -> dict[str, str]:
    return {
        "name": case.name,
        "architecture": case.architecture,
        "activation": case.activation,
        "k": str(case.k),
        "input_scale": repr(case.input_scale),
        "apply_b_dec_to_input": str(int(case.apply_b_dec_to_input)),
        "rescale_acts_by_decoder_norm": str(int(case.rescale_acts_by_decoder_norm)),
        "scale": repr(case.scale),
    } | {f"tolerance.{name}": repr(value) for name, value in tolerance.items()}


def safetensors_bytes(arrays: dict[str, Array], meta: dict[str, str]) -> bytes:
    """By hand, because the library of that name orders metadata by chance."""
    header: dict[str, object] = {"__metadata__": meta}
    data = b""
    # Wide elements first: then every tensor is aligned.
    for name in sorted(arrays, key=lambda n: (-arrays[n].stored.itemsize, n)):
        a = arrays[name]
        raw = a.stored.tobytes()
        header[name] = {"dtype": a.dtype.upper(), "shape": list(a.stored.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


C_TYPES = {"f32": "float", "f64": "double", "i64": "int64_t", "i8": "int8_t", "u8": "uint8_t",
           "f16": "uint16_t", "bf16": "uint16_t"}


def c_number(dtype: str, x: object) -> str:
    if dtype in ("f16", "bf16"):
        return f"0x{int(x):04x}"
    if dtype[0] in "iu":
        return str(int(x))
    value = float(x)
    if math.isnan(value):
        return "NAN"
    digits = f"{value:.9g}" if dtype == "f32" else f"{value:.17g}"
    digits += "" if any(c in digits for c in ".e") else ".0"
    return digits + ("f" if dtype == "f32" else "")


def c_array(case: Case, name: str, a: Array) -> str:
    stored = a.stored.view("<u2") if a.dtype in ("f16", "bf16") else a.stored
    numbers = [c_number(a.dtype, x) for x in stored.flat]
    lines, line = [], " "
    for number in numbers:
        if len(line) + len(number) > 98:
            lines, line = lines + [line], " "
        line += f" {number},"
    body = "\n".join(lines + [line])
    return f"static const {C_TYPES[a.dtype]} {case.name}_{name}[{len(numbers)}] = {{\n{body}\n}};\n"


C_HEAD = """\
/* Generated by tests/vectors/generate.py, which says what every field means: do not edit. */
#ifndef BLOCKEM_TEST_VECTORS_H
#define BLOCKEM_TEST_VECTORS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* Largest absolute errors; reference has the tolerance of latents, token_count is exact. */
typedef struct vector_tolerance {
  double latents, loss_sum, latent_loss, coef, grad_hidden;
} vector_tolerance;

/* One case. Pointers to inputs that a case does not have are NULL. */
typedef struct test_vector {
  const char *name;
  int32_t activation_kind; /* BLOCKEM_ACTIVATION_KIND_... of the SAE */
  int32_t activation;      /* BLOCKEM_ACTIVATION_... of the plan */
  int32_t hidden_dtype;    /* BLOCKEM_DTYPE_...; F16 and BF16 are stored as uint16_t */
  int32_t mask_dtype;      /* BLOCKEM_DTYPE_...; -1 without a mask */
  int32_t apply_b_dec_to_input, rescale_acts_by_decoder_norm;
  int64_t tokens, d_in, d_sae, num_latents, k;
  double input_scale, scale;
  const float *encoder_weight; /* [d_sae, d_in] */
  const float *encoder_bias, *threshold, *gate_bias, *magnitude_bias, *magnitude_log_scale;
  const float *decoder_bias, *decoder_weight;
  const int64_t *ids;
  const int8_t *signs;
  const float *weights;
  const void *hidden, *base_hidden, *mask;
  const float *reference;
  double loss_sum, token_count;
  const double *latents, *latent_loss, *coef, *grad_hidden;
  vector_tolerance f32, f64; /* of production backends; of the reference backend */
  double rounding;           /* relative error more of grad_hidden in hidden's dtype */
} test_vector;
"""

C_POINTERS = ["encoder_weight", "encoder_bias", "threshold", "gate_bias", "magnitude_bias",
              "magnitude_log_scale", "decoder_bias", "decoder_weight", "ids", "signs", "weights",
              "hidden", "base_hidden", "mask", "reference"]


def c_entry(case: Case, arrays: dict[str, Array], tolerance: dict[str, float]) -> str:
    def pointer(name: str) -> str:
        return f"{case.name}_{name}" if name in arrays else "NULL"

    def limits(kind: str) -> str:
        fields = ("latents", "loss_sum", "latent_loss", "coef", "grad_hidden")
        return "{ " + ", ".join(repr(tolerance[f"{kind}.{f}"]) for f in fields) + " }"

    numbers = [ARCHITECTURES[case.architecture], ACTIVATIONS[case.activation], DTYPES[case.dtype],
               DTYPES[case.mask] if case.mask else -1, int(case.apply_b_dec_to_input),
               int(case.rescale_acts_by_decoder_norm), case.tokens, case.d_in, case.d_sae,
               case.num_latents, case.k]
    rows = [
        f'"{case.name}", ' + ", ".join(map(str, numbers)),
        f"{c_number('f64', case.input_scale)}, {c_number('f64', case.scale)}",
        *(", ".join(pointer(n) for n in C_POINTERS[i:i + 2]) for i in range(0, 15, 2)),
        ", ".join(c_number("f64", arrays[n].value[0]) for n in ("loss_sum", "token_count")),
        ", ".join(pointer(n) for n in ("latents", "latent_loss")),
        ", ".join(pointer(n) for n in ("coef", "grad_hidden")),
        limits("f32"),
        limits("f64"),
        repr(tolerance["rounding"]),
    ]
    return "  {\n    " + ",\n    ".join(rows) + "\n  },\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write to")
    out = parser.parse_args().out
    texts, entries = [C_HEAD], []
    for case in CASES:
        arrays, tolerance = build(case)
        path = out / f"{case.name}.safetensors"
        path.write_bytes(safetensors_bytes(arrays, metadata(case, tolerance)))
        in_table = ("loss_sum", "token_count")
        texts += [c_array(case, n, a) for n, a in arrays.items() if n not in in_table]
        entries.append(c_entry(case, arrays, tolerance))
    table = f"static const test_vector TEST_VECTORS[{len(CASES)}] = {{\n{''.join(entries)}}};\n"
    count = f"enum {{ TEST_VECTOR_COUNT = {len(CASES)} }};\n"
    header = "\n".join([*texts, table, count, "#endif /* BLOCKEM_TEST_VECTORS_H */\n"])
    (out / "vectors.h").write_bytes(header.encode())


if __name__ == "__main__":
    main()
