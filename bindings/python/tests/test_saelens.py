"""Folders that the real sae-lens writes: encode equals its own, to f32 rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import blockem

sae_lens = pytest.importorskip("sae_lens")
SAEMetadata = pytest.importorskip("sae_lens.saes.sae").SAEMetadata

D, F, K = 24, 40, 12
KINDS = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
}


def make(kind: str, folder: Path, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    make_sae, make_config = KINDS[kind]
    metadata = SAEMetadata(hook_name="blocks.5.hook_resid_post", model_name="toy")
    sae = make_sae(make_config(d_in=D, d_sae=F, metadata=metadata, **options))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
            if name == "threshold":
                parameter.abs_()
    sae.save_model(str(folder))
    return sae


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated"])
def test_native(kind: str, apply_b_dec: bool, dtype: str, tmp_path: Path) -> None:
    make(kind, tmp_path, apply_b_dec_to_input=apply_b_dec, dtype=dtype)
    # In float32 it computes what the file's numbers say, whatever their dtype.
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), device="cpu", dtype="float32")
    ours = blockem.load_sae(tmp_path)
    assert (ours.architecture, ours.d_in, ours.d_sae, ours.layer) == (kind, D, F, 5)
    assert ours.dtype == dtype and ours.hook == "blocks.5.hook_resid_post"
    ids = np.random.default_rng(0).permutation(F)[:K]
    plan = blockem.Plan(ours, blockem.Latents(ids, np.ones(K, int)))
    hidden = torch.randn(3, 50, D)
    with torch.no_grad():
        want = theirs.encode(hidden)[..., ids]
    torch.testing.assert_close(plan.encode(hidden), want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_norms_and_topk(kind: str, norm: str, tmp_path: Path) -> None:
    """z, and the gradient through the norm and the selected latents, are sae-lens' own."""
    options = {"k": 6} if kind == "topk" else {}
    make(kind, tmp_path, normalize_activations=norm, apply_b_dec_to_input=True, **options)
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), device="cpu", dtype="float32")
    ours = blockem.load_sae(tmp_path)
    assert ours.describe()["normalization"] == norm
    ids = np.random.default_rng(1).permutation(F)[:K]
    plan = blockem.Plan(ours, blockem.Latents(ids, np.ones(K, int)))
    hidden = (3 * torch.randn(2, 60, D) + 0.5).requires_grad_()
    want = theirs.encode(hidden)
    want = (want.to_dense() if want.is_sparse else want)[..., ids]
    torch.testing.assert_close(plan.encode(hidden), want, rtol=4e-6, atol=2e-5)
    reference = torch.zeros_like(want)
    (wanted,) = torch.autograd.grad((want.relu() ** 2).sum(), hidden)
    found = plan.penalty(hidden.detach(), reference).grad_hidden
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("rescale", [False, True])
def test_topk_through_dense_relu(rescale: bool, tmp_path: Path) -> None:
    theirs = make("topk", tmp_path, k=6, rescale_acts_by_decoder_norm=rescale)
    ours = blockem.load_sae(tmp_path)
    assert (ours.architecture, ours.k) == ("topk", 6)
    plan = blockem.Plan(ours, blockem.Latents(range(F), [1] * F), activation="dense_relu")
    hidden = torch.randn(100, D)
    with torch.no_grad():
        native = theirs.encode(hidden)
        native = native.to_dense() if native.is_sparse else native
        dense = (hidden - theirs.b_dec * theirs.cfg.apply_b_dec_to_input) @ theirs.W_enc
        dense = dense + theirs.b_enc
        dense = (dense * theirs.W_dec.norm(dim=-1) if rescale else dense).relu()
    own = blockem.Plan(ours, blockem.Latents(range(F), [1] * F)).encode(hidden)
    torch.testing.assert_close(own, native, rtol=2e-6, atol=4e-6)
    z = plan.encode(hidden)
    torch.testing.assert_close(z, dense, rtol=2e-6, atol=4e-6)
    on = native > 0
    assert on.any()
    torch.testing.assert_close(z[on], native[on], rtol=2e-6, atol=4e-6)
