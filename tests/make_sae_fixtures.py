"""Writes tests/data/sae: small SAEs saved by the real sae-lens, with the values it computes for them.

    python tests/make_sae_fixtures.py        (needs sae-lens; made with 6.54.12)

Each folder holds what SAELens writes (cfg.json, sae_weights.safetensors; here and there edited to
what older versions wrote) and expected.safetensors: x [T, d_in] f32 and z [T, d_sae] f64, which is
sae.encode(x) with the weights of the file in float64, so that only our own rounding is measured.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

HERE = Path(__file__).parent / "data" / "sae"
TOKENS = 9
CLASSES = {
    "standard": (StandardSAE, StandardSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
}
# Where gates decide: no pre-activation may lie this close to its threshold.
MARGIN = 1e-4


def randomise(sae: SAE, generator: torch.Generator) -> None:
    """Draws every parameter; thresholds of both signs, decoder norms from 0 to about 2."""
    for name, p in sae.named_parameters():
        draw = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if name == "W_dec":
            draw *= torch.rand(p.shape[0], 1, generator=generator, dtype=torch.float64) * 0.4
            draw[3] = 0
        elif name == "threshold":
            draw = draw.abs() * 0.3
            draw[5] = -0.2
        else:
            draw *= 0.3
        p.data.copy_(draw)


def save(name: str, architecture: str, d_in: int, d_sae: int, seed: int, edit=None, scale=None, **config) -> None:
    generator = torch.Generator().manual_seed(seed)
    cls, cfg_cls = CLASSES[architecture]
    metadata = SAEMetadata(model_name="tiny-llama", hook_name=config.pop("hook", "blocks.19.hook_resid_post"))
    sae = cls(cfg_cls(d_in=d_in, d_sae=d_sae, metadata=metadata, **config))
    randomise(sae, generator)
    folder = fresh(name)
    sae.save_model(folder)
    if edit:
        path = folder / "cfg.json"
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    if scale:
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    expect(folder, generator, scale)


def fresh(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def expect(folder: Path, generator: torch.Generator, scale: float | None) -> None:
    """What the owner's library computes from the files of the folder."""
    sae = SAE.load_from_disk(folder, dtype="float64")
    if scale:
        sae.fold_activation_norm_scaling_factor(scale)
    for _ in range(1000):
        x = torch.randn(TOKENS, sae.cfg.d_in, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            z = sae.encode(x.double())
        if margin(sae, x.double(), z) > MARGIN:
            break
    else:
        raise SystemExit(f"{folder.name}: no draw keeps its distance from the gates")
    assert (z > 0).any() and (z == 0).any()
    save_file({"x": x, "z": z.contiguous()}, folder / "expected.safetensors")


@torch.no_grad()
def margin(sae: SAE, x: torch.Tensor, z: torch.Tensor) -> float:
    """The least distance between a pre-activation and the gate that decides it."""
    u = sae.process_sae_in(x) @ sae.W_enc
    kind = sae.cfg.architecture()
    if kind == "gated":
        magnitude = u * sae.r_mag.exp() + sae.b_mag
        return min((u + sae.b_gate).abs().min().item(), magnitude.abs().min().item())
    u = u + sae.b_enc
    if kind == "jumprelu":
        return (u - sae.threshold.clamp(min=0)).abs().min().item()
    if kind == "topk":
        if sae.cfg.rescale_acts_by_decoder_norm:
            u = u * sae.W_dec.norm(dim=-1)
        best = u.sort(dim=-1, descending=True).values
        return (best[:, sae.cfg.k - 1] - best[:, sae.cfg.k]).min().item()
    return u.abs().min().item()


def before_6(**changes):
    """A configuration as SAELens 3 to 5 wrote it: flat, with the old names."""

    def edit(cfg: dict) -> dict:
        metadata = cfg.pop("metadata")
        for key in ("reshape_activations", "architecture"):
            cfg.pop(key)
        cfg["hook_point"] = metadata["hook_name"]
        cfg["model_name"] = metadata["model_name"]
        cfg["activation_fn_str"] = "relu"
        cfg["dtype"] = "torch." + cfg["dtype"]
        cfg.update(changes)
        return {key: value for key, value in cfg.items() if value != "absent"}

    return edit


def batchtopk() -> None:
    """Trained as batchtopk, saved by SAELens as jumprelu with one threshold for all."""
    generator = torch.Generator().manual_seed(90)
    cfg = BatchTopKTrainingSAEConfig(d_in=14, d_sae=44, k=6, rescale_acts_by_decoder_norm=True)
    sae = BatchTopKTrainingSAE(cfg)
    randomise(sae, generator)
    sae.topk_threshold.fill_(0.4)
    folder = fresh("batchtopk")
    sae.save_inference_model(folder)
    expect(folder, generator, None)


def main() -> None:
    torch.manual_seed(0)
    save("standard", "standard", 16, 40, 1)
    save("standard_plain", "standard", 12, 48, 2, apply_b_dec_to_input=False, hook="blocks.4.hook_resid_pre")
    save("standard_square", "standard", 20, 20, 3)
    save("jumprelu", "jumprelu", 24, 64, 10, apply_b_dec_to_input=False)
    save("jumprelu_b_dec", "jumprelu", 16, 40, 11, hook="blocks.2.hook_mlp_out")
    save("gated", "gated", 16, 56, 20)
    save("gated_plain", "gated", 20, 44, 21, apply_b_dec_to_input=False)
    save("topk", "topk", 16, 64, 30, k=7)
    save("topk_rescaled", "topk", 12, 60, 31, k=5, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)

    average = {"normalize_activations": "expected_average_only_in"}
    save("standard_scaled", "standard", 16, 40, 40, scale=0.37, **average)
    save("gated_scaled", "gated", 16, 40, 41, scale=1.9, **average)
    save("topk_scaled", "topk", 16, 40, 42, scale=0.37, k=6, rescale_acts_by_decoder_norm=True, **average)

    for dtype, seed in (("bfloat16", 50), ("float16", 51), ("float64", 52)):
        save(f"jumprelu_{dtype}", "jumprelu", 20, 40, seed, dtype=dtype)
    save("topk_bfloat16", "topk", 16, 40, 53, k=6, rescale_acts_by_decoder_norm=True, dtype="bfloat16")

    save("old_standard", "standard", 16, 40, 60, edit=before_6(apply_b_dec_to_input="absent", normalize_activations=False))
    old_topk = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}, "k": "absent"}
    save("old_topk", "topk", 16, 40, 61, k=6, edit=before_6(sae_lens_version="5.10.1", **old_topk))
    save("old_jumprelu", "jumprelu", 16, 40, 62, edit=before_6(architecture="jumprelu", normalize_activations=None, apply_b_dec_to_input=False))
    save("old_scaled", "standard", 16, 40, 63, scale=2.5, edit=before_6(normalize_activations=True))
    batchtopk()

    for folder in sorted(HERE.iterdir()):
        z = load_file(folder / "expected.safetensors")["z"]
        print(f"{folder.name:18} z {tuple(z.shape)}  on {(z > 0).float().mean():.2f}")


if __name__ == "__main__":
    main()
