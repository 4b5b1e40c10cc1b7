"""Folders that the real sae-lens writes: encode equals its own, to f32 rounding."""

from __future__ import annotations

import json
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


COMMON = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}


def trained(name: str, **options: object) -> torch.nn.Module:
    """One of sae-lens' own classes, with weights as a training leaves them."""
    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name="blocks.5.hook_resid_post", model_name="toy")
    config = getattr(sae_lens, f"{name}Config")(**COMMON, **options, metadata=metadata)
    sae = getattr(sae_lens, name)(config)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
            if "threshold" in parameter_name:
                parameter.abs_()
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.35)
    return sae


def all_latents(ours: blockem.Sae, hidden: torch.Tensor) -> torch.Tensor:
    return blockem.Plan(ours, blockem.Latents(range(F), [1] * F)).encode(hidden)


def equal(found: torch.Tensor, want: torch.Tensor) -> None:
    assert (want != 0).any() and (want == 0).any()
    torch.testing.assert_close(found, want, rtol=2e-6, atol=8e-6)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BatchTopKTrainingSAE", {"k": 5}),
        ("BatchTopKTrainingSAE", {"k": 2.5}),
        ("MatryoshkaBatchTopKTrainingSAE", {"k": 5, "matryoshka_widths": [8, 16, F]}),
        ("TopKTrainingSAE", {"k": 5}),
        ("AbsTopKTrainingSAE", {"k": 5}),
    ],
)
def test_a_training_checkpoint_is_what_it_becomes_for_inference(
    name: str, options: dict[str, object], rescale: bool, tmp_path: Path
) -> None:
    sae = trained(name, **options, rescale_acts_by_decoder_norm=rescale)
    sae.save_model(str(tmp_path / "checkpoint"))
    sae.save_inference_model(str(tmp_path / "inference"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "inference"), dtype="float32")
    hidden = torch.randn(40, D)
    with torch.no_grad():
        want = theirs.encode(hidden)
    want = want.to_dense() if want.is_sparse else want
    for folder in ("checkpoint", "inference"):
        equal(all_latents(blockem.load_sae(tmp_path / folder), hidden), want)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_running_threshold_is_scaled_as_the_library_folds_it(
    rescale: bool, tmp_path: Path
) -> None:
    """A checkpoint whose scale lies beside it, against the finished SAE."""
    scale = 2.5
    sae = trained(
        "BatchTopKTrainingSAE", k=5, rescale_acts_by_decoder_norm=rescale,
        normalize_activations="expected_average_only_in",
    )  # fmt: skip
    sae.save_model(str(tmp_path / "checkpoint"))
    scaler = json.dumps({"scaling_factor": scale})
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text(scaler)
    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(str(tmp_path / "inference"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "inference"), dtype="float32")
    hidden = torch.randn(40, D)
    with torch.no_grad():
        equal(all_latents(blockem.load_sae(tmp_path / "checkpoint"), hidden), theirs.encode(hidden))


def test_a_threshold_that_was_never_calibrated_is_refused(tmp_path: Path) -> None:
    sae = trained("BatchTopKTrainingSAE", k=5)
    sae.topk_threshold.fill_(0.0)
    sae.save_model(str(tmp_path))
    with pytest.raises(blockem.Error, match=r"topk_threshold is 0.*calibrated"):
        blockem.load_sae(tmp_path)


@pytest.mark.parametrize("d_out", [D, D + 3])
@pytest.mark.parametrize(
    "name", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"]
)
def test_a_transcoder_is_its_encoder(name: str, d_out: int, tmp_path: Path) -> None:
    sae = trained(name, d_out=d_out, apply_b_dec_to_input=False)
    sae.save_model(str(tmp_path))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path), dtype="float32")
    ours = blockem.load_sae(tmp_path)
    assert ours.describe()["b_dec_subtracted"] is False
    hidden = torch.randn(40, D)
    with torch.no_grad():
        equal(all_latents(ours, hidden), theirs.encode(hidden))


def test_an_old_checkpoint_has_the_logarithm_of_its_threshold(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sae = trained("JumpReLUTrainingSAE")
    sae.save_model(str(tmp_path))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, tmp_path / "sae_weights.safetensors")
    theirs = sae_lens.JumpReLUTrainingSAE.load_from_disk(str(tmp_path))
    hidden = torch.randn(40, D)
    with torch.no_grad():
        equal(all_latents(blockem.load_sae(tmp_path), hidden), theirs.encode(hidden))


def test_every_architecture_of_the_library_is_read_or_named(tmp_path: Path) -> None:
    """What sae-lens registers, and no more, is known: a new one shows up here."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    trained("StandardSAE").save_model(str(tmp_path))
    config = json.loads((tmp_path / "cfg.json").read_text())
    refused = set()
    for name in {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}:
        (tmp_path / "cfg.json").write_text(json.dumps({**config, "architecture": name}))
        try:
            blockem.load_sae(tmp_path)
        except blockem.Error as error:
            if error.name == "UNSUPPORTED":
                refused.add(name)
                assert name in str(error)
    assert refused == {"matching_pursuit", "temporal"}


def transformer(center: bool) -> torch.nn.Module:
    """A small GPT-2 by TransformerLens, whose biases and embeddings have a mean over d."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=16, d_head=8, n_heads=3, d_vocab=30, act_fn="gelu_new",
        normalization_type="LN", seed=0,
    )  # fmt: skip
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(x.shape, generator=generator) * 0.2 + 0.1 if x.is_floating_point() else x
        for name, x in model.state_dict().items()
    }
    model.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=center, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return model


@pytest.mark.parametrize(
    ("hook", "site"),
    [("hook_resid_post", "resid"), ("hook_mlp_out", "mlp"), ("attn.hook_z", "inside")],
)
def test_centred_hidden_states_are_encoded_from_plain_ones(
    hook: str, site: str, tmp_path: Path
) -> None:
    """z of sae-lens on a TransformerLens model with centred weights is ours on one without."""
    hook = f"blocks.1.{hook}"
    sae = trained("StandardSAE")
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.model_name = "gpt2-small"
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    sae.save_model(str(tmp_path))
    ids = torch.arange(14).reshape(1, 14)
    with torch.no_grad():
        seen, plain = (transformer(c).run_with_cache(ids)[1][hook] for c in (True, False))
        seen, plain = seen.reshape(14, D), plain.reshape(14, D)
        want = sae.encode(seen)
    ours = blockem.load_sae(tmp_path)
    assert ours.describe()["center_input"] is (site != "inside")
    if site != "inside":
        assert (seen - plain).abs().max() > 0.05
    torch.testing.assert_close(all_latents(ours, plain), want, rtol=1e-5, atol=2e-5)
    weights = {"encoder_weight": sae.W_enc.data, "encoder_bias": sae.b_enc.data}
    stated = blockem.Sae.from_tensors(
        **weights, decoder_bias=sae.b_dec.data, apply_b_dec_to_input=True,
        center_input=site != "inside",
    )  # fmt: skip
    assert torch.equal(all_latents(stated, plain), all_latents(ours, plain))
    other = blockem.load_sae(tmp_path, recipe={"center_input": site == "inside"})
    assert not torch.equal(all_latents(other, plain), all_latents(ours, plain))
