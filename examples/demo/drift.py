"""How far tuning moved the latents of the whole dictionary, read by sae-lens."""

from dataclasses import dataclass

import torch
from .finetune import Batch
from .model import hidden_states


@dataclass
class Drift:
    """Tuned against base over the supervised tokens of one set of texts."""

    shift: torch.Tensor  # [F] mean over tokens of z − z_base
    toward: torch.Tensor  # [F] mean over tokens of relu(z − z_base)²
    away: torch.Tensor  # [F] mean over tokens of relu(z_base − z)²
    tokens: int

    def blocked(self, ids: torch.Tensor, signs: torch.Tensor) -> dict[str, float]:
        """The blocked latents: what the penalty measures, and their mean shift by direction.

        The penalty is one-sided: what a latent does against its sign is free.
        """
        signed = signs * self.shift[ids]
        bad = torch.where(signs > 0, self.toward[ids], self.away[ids])
        return {
            "penalty": bad.sum().item(),
            "signed_shift": signed.mean().item(),
            "bad_l2": signed.relu().norm().item(),
            "free_l2": (-signed).relu().norm().item(),
        }

    def outside(self, ids: torch.Tensor) -> torch.Tensor:
        """The shift with the blocked latents taken out."""
        rest = self.shift.clone()
        rest[ids] = 0
        return rest


@torch.no_grad()
def measure(model, layer: int, sae, data: list[Batch]) -> Drift:
    sums, tokens = torch.zeros(3, sae.cfg.d_sae, dtype=torch.float64), 0
    for batch in data:
        with model.disable_adapter():
            base = sae.encode(hidden_states(model, layer, batch.ids)[batch.supervised])
        delta = sae.encode(hidden_states(model, layer, batch.ids)[batch.supervised]) - base
        sums[0] += delta.sum(0)
        sums[1] += delta.relu().square().sum(0)
        sums[2] += (-delta).relu().square().sum(0)
        tokens += len(delta)
    shift, toward, away = (sums / tokens).float()
    return Drift(shift, toward, away, tokens)


def top_movers(drift: Drift, count: int) -> tuple[list[int], list[int]]:
    """(ids, signs) of the largest absolute mean shifts, K_pos before K_neg as in K0.json."""
    ids = drift.shift.abs().topk(count).indices
    up = drift.shift[ids] > 0
    return torch.cat([ids[up], ids[~up]]).tolist(), [1] * int(up.sum()) + [-1] * int((~up).sum())
