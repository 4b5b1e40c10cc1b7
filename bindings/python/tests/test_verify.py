"""`blockem verify` and `inspect` against what the real sae-lens computes on the same states."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from test_saelens import D, F, make

BINARY = Path(__file__).resolve().parents[3] / "target" / "release" / "blockem"


def run(command: str, *arguments: object) -> dict:
    done = subprocess.run(
        [BINARY, command, *map(str, arguments), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_numbers_are_sae_lens_own(kind: str, norm: str, tmp_path: Path) -> None:
    options = {"k": 6, "rescale_acts_by_decoder_norm": norm == "none"} if kind == "topk" else {}
    sae = make(kind, tmp_path / "sae", normalize_activations=norm, **options)
    hidden = 2 * torch.randn(3, 50, D) + 0.3
    mask = torch.rand(3, 50) > 0.2
    save_file({"hidden": hidden, "mask": mask.to(torch.uint8)}, tmp_path / "h.safetensors")
    report = run("verify", tmp_path / "sae", "--hidden", tmp_path / "h.safetensors")
    with torch.no_grad():
        z = sae.encode(hidden)
        z = z.to_dense() if z.is_sparse else z
        decoded = sae(hidden)
    without = mask.clone()
    without[:, 0] = False
    for name, chosen in (("with_first_token", mask), ("without_first_token", without)):
        x, error = hidden[chosen].double(), (hidden - decoded)[chosen].double()
        explained = 1 - (error**2).sum() / ((x - x.mean(0)) ** 2).sum()
        found = report[name]
        assert found["tokens"] == int(chosen.sum())
        assert found["mean_l0"] == pytest.approx((z[chosen] != 0).sum(-1).double().mean().item())
        assert found["explained_variance"] == pytest.approx(explained.item(), abs=2e-4)
    fires = (z[mask] != 0).sum(0)
    assert report["dead_latents"] == int((fires == 0).sum())
    assert report["dense_latents"] == int((fires > 0.1 * mask.sum()).sum())
    norms = sae.W_dec.norm(dim=-1)
    for found in (report["decoder_norms"], run("inspect", tmp_path / "sae")["decoder_norms"]):
        assert found["min"] == pytest.approx(norms.min().item(), rel=1e-6)
        assert found["max"] == pytest.approx(norms.max().item(), rel=1e-6)
        assert found["zero"] == 0


def test_strict_fails_where_something_is_flagged(tmp_path: Path) -> None:
    make("standard", tmp_path / "sae")
    save_file({"hidden": torch.randn(64, D)}, tmp_path / "h.safetensors")
    command = [BINARY, "verify", tmp_path / "sae", "--hidden", tmp_path / "h.safetensors"]
    done = subprocess.run([*command, "--strict"], capture_output=True, text=True)
    assert done.returncode == 1 and "not_sparse" in done.stderr and "flag: not_sparse" in done.stdout
    assert f"of {F} latents" in done.stdout
    assert subprocess.run(command, capture_output=True).returncode == 0
