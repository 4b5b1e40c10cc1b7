"""A sparse autoencoder trained and saved by sae-lens: BatchTopK training, saved as JumpReLU."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

from .model import CONTEXT, hidden_states, warmup_cosine
from .progress import Progress

LATENTS = 512
ACTIVE = 16
DEAD_AFTER_STEPS = 100


@dataclass
class SaeReport:
    l0: float
    explained_variance: float
    alive: float  # share of the latents that fire at least once on these tokens


def collect(model, layer: int, rows: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Residual stream of the packed rows, first token of each row left out: f32 [tokens, width].

    The first position attends to itself alone and has an outlying norm.
    """
    parts = [hidden_states(model, layer, ids)[:, 1:].flatten(0, 1) for ids in rows.split(batch)]
    return torch.cat(parts)


def train_and_save(
    activations: torch.Tensor,
    layer: int,
    folder: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    latents: int = LATENTS,
    active: int = ACTIVE,
) -> SAE:
    """Trains on the activations, saves to `folder` and loads the inference SAE back from there."""
    torch.manual_seed(seed)
    width = activations.shape[1]
    config = BatchTopKTrainingSAEConfig(
        d_in=width,
        d_sae=latents,
        k=active,
        metadata=SAEMetadata(
            model_name="libblockem-demo-llama",
            hook_name=f"blocks.{layer}.hook_resid_post",
            hf_hook_name=f"model.layers.{layer}",
            context_size=CONTEXT,
            prepend_bos=False,
        ),
    )
    sae = BatchTopKTrainingSAE(config)
    # sae-lens' trainer scales inputs to a mean norm of sqrt(d) and folds the factor at the end.
    scale = math.sqrt(width) / activations.norm(dim=1).mean().item()
    with torch.no_grad():
        sae.b_dec.copy_(activations.mean(0) * scale)

    optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: warmup_cosine(s, steps))
    idle = torch.zeros(latents, dtype=torch.long)  # steps since a latent last fired
    progress = Progress(steps)
    for step in range(steps):
        sample = activations[torch.randint(len(activations), (batch,))] * scale
        out = sae.training_forward_pass(
            TrainStepInput(
                sae_in=sample,
                coefficients={},
                dead_neuron_mask=idle > DEAD_AFTER_STEPS,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        idle = torch.where((out.feature_acts > 0).any(0), 0, idle + 1)
        variance = sample.var(0).sum().item()
        progress.step(step + 1, unexplained=out.losses["mse_loss"].item() / variance)

    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


@torch.no_grad()
def evaluate(sae: SAE, activations: torch.Tensor) -> SaeReport:
    latents = sae.encode(activations)
    residual = activations - sae.decode(latents)
    variance = (activations - activations.mean(0)).square().sum()
    return SaeReport(
        l0=(latents > 0).sum(1).float().mean().item(),
        explained_variance=1 - (residual.square().sum() / variance).item(),
        alive=(latents > 0).any(0).float().mean().item(),
    )
