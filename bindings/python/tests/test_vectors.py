"""The frozen vectors of tests/vectors, which the Rust, C and C++ tests read too."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import blockem

FOLDER = ROOT / "tests" / "vectors"
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))


@dataclass
class Vector:
    arrays: dict[str, torch.Tensor]
    meta: dict[str, str]

    def limit(self, kind: str, name: str) -> float:
        return float(self.meta[f"tolerance.{kind}.{name}"])

    def plan(self, backend: str) -> blockem.Plan:
        names = ("encoder_weight", "encoder_bias", "threshold", "gate_bias", "magnitude_bias",
                 "magnitude_log_scale", "decoder_bias", "decoder_weight")
        sae = blockem.Sae.from_tensors(
            architecture=self.meta["architecture"],
            encoder_layout="f_d",
            k=int(self.meta["k"]),
            input_scale=float(self.meta["input_scale"]),
            apply_b_dec_to_input=self.meta["apply_b_dec_to_input"] == "1",
            rescale_acts_by_decoder_norm=self.meta["rescale_acts_by_decoder_norm"] == "1",
            **{name: self.arrays[name] for name in names if name in self.arrays},
        )
        a = self.arrays
        latents = blockem.Latents(a["ids"], a["signs"], a.get("weights"))
        return blockem.Plan(sae, latents, activation=self.meta["activation"], backend=backend)


def read(name: str) -> Vector:
    from safetensors.torch import load_file

    raw = (FOLDER / f"{name}.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return Vector(load_file(FOLDER / f"{name}.safetensors"), header["__metadata__"])


def assert_near(got: object, want: torch.Tensor, limit: float, relative: float = 0.0) -> None:
    got, want = np.asarray(got, np.float64), want.numpy()
    nan = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got), nan)
    assert (np.abs(got - want) <= limit + relative * np.abs(want))[~nan].all()


def test_there_are_vectors() -> None:
    assert len(NAMES) >= 10
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_cpu(name: str) -> None:
    vector = read(name)
    a, plan = vector.arrays, vector.plan("cpu")
    assert_near(plan.encode(a["hidden"]), a["latents"], vector.limit("f32", "latents"))
    reference = a["reference"]
    assert_near(plan.encode(a["base_hidden"]), reference.double(), vector.limit("f32", "latents"))

    scale = float(vector.meta["scale"])
    options = {"scale": scale, "per_latent": True, "coef": True}
    got = plan.penalty(a["hidden"], reference, a.get("mask"), **options)
    check_sums(vector, got, "f32")
    rounding = float(vector.meta["tolerance.rounding"])
    limit = vector.limit("f32", "grad_hidden")
    assert_near(got.grad_hidden.double(), a["grad_hidden"], limit, rounding)
    wide = torch.empty(a["hidden"].shape)
    plan.penalty(a["hidden"], reference, a.get("mask"), grad=wide, scale=scale)
    assert_near(wide, a["grad_hidden"], limit)

    hidden = a["hidden"].clone().requires_grad_()
    loss_sum, _ = blockem.torch.penalty(plan, hidden, reference, a.get("mask"))
    (scale * loss_sum).backward()
    assert_near(hidden.grad.double(), a["grad_hidden"], limit, rounding)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    vector = read(name)
    a, plan = vector.arrays, vector.plan("reference")
    # f64 of every input is exact, and f64 in gives f64 out.
    hidden, mask = a["hidden"].double(), a.get("mask")
    assert_near(plan.encode(hidden), a["latents"], vector.limit("f64", "latents"))
    options = {"scale": float(vector.meta["scale"]), "per_latent": True, "coef": True}
    got = plan.penalty(hidden, a["reference"], mask, **options)
    check_sums(vector, got, "f64")
    assert_near(got.grad_hidden, a["grad_hidden"], vector.limit("f64", "grad_hidden"))


def check_sums(vector: Vector, got: blockem.Penalty, kind: str) -> None:
    a = vector.arrays
    assert got.token_count == a["token_count"].item()
    assert math.isclose(
        got.loss_sum, a["loss_sum"].item(), rel_tol=0, abs_tol=vector.limit(kind, "loss_sum")
    )
    assert_near(got.latent_loss, a["latent_loss"], vector.limit(kind, "latent_loss"))
    assert_near(got.coef, a["coef"], vector.limit(kind, "coef"))


def test_regenerating_gives_the_same_bytes(tmp_path: Path) -> None:
    script = FOLDER / "generate.py"
    subprocess.run([sys.executable, str(script), "--out", str(tmp_path)], check=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {p.name: p.read_bytes() for p in FOLDER.iterdir() if p.suffix in (".h", ".safetensors")}
    assert made == kept
