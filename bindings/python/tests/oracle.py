"""The formulas in float64 numpy, written from their definition: shares nothing with the library."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

import blockem

ARCHITECTURES = ("standard", "jumprelu", "gated")
ACTIVATIONS = ("native", "dense_relu", "preactivation")


@dataclass
class Latent:
    """[T, K] arrays: z, act'(pre), distance to the nearest edge of a gate, size of its sum."""

    z: np.ndarray
    slope: np.ndarray
    margin: np.ndarray
    size: np.ndarray


@dataclass
class Case:
    """A random SAE and latent set with the oracle's view of them."""

    architecture: str
    activation: str
    d_in: int
    num_latents: int
    seed: int = 0
    folds: bool = False
    arrays: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        d, f = self.d_in, self.num_latents + 3
        uniform = lambda low, high, *shape: rng.uniform(low, high, shape).astype(np.float32)
        a = {"encoder_weight": uniform(-1, 1, f, d) / np.float32(np.sqrt(d))}
        if self.architecture == "gated":
            a["gate_bias"] = uniform(-0.5, 0.5, f)
            a["magnitude_bias"] = uniform(-0.2, 0.5, f)
            a["magnitude_log_scale"] = uniform(-0.5, 0.5, f)
        else:
            a["encoder_bias"] = uniform(-0.2, 0.5, f)
        if self.architecture == "jumprelu":
            a["threshold"] = uniform(0, 0.5, f)
        if self.folds:
            a["decoder_bias"] = uniform(-0.5, 0.5, d)
        self.arrays = a
        self.ids = rng.permutation(f)[: self.num_latents]
        self.signs = rng.choice([1, -1], self.num_latents)
        self.weights = uniform(0.25, 2, self.num_latents)
        self.input_scale = 0.7 if self.folds else 1.0
        self.sae = blockem.Sae.from_tensors(
            architecture=self.architecture,
            encoder_layout="f_d",
            apply_b_dec_to_input=self.folds,
            input_scale=self.input_scale,
            **a,
        )
        self.latents = blockem.Latents(self.ids, self.signs, self.weights)

    def plan(self, **options: object) -> blockem.Plan:
        return blockem.Plan(self.sae, self.latents, activation=self.activation, **options)

    def hidden(self, tokens: int, seed: int = 1) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((tokens, self.d_in)).astype(np.float32)

    def rows(self) -> np.ndarray:
        """[K, d]: dz/dh where the latent is on, but for act'."""
        return self.input_scale * self.arrays["encoder_weight"].astype(np.float64)[self.ids]

    def latent(self, hidden: np.ndarray) -> Latent:
        a = {name: x.astype(np.float64) for name, x in self.arrays.items()}
        x = self.input_scale * hidden.astype(np.float64)
        if self.folds:
            x = x - a["decoder_bias"]
        w = a["encoder_weight"][self.ids]
        g, slope = x @ w.T, np.ones(self.num_latents)
        if self.architecture == "gated":
            slope = np.exp(a["magnitude_log_scale"][self.ids])
            pre = slope * g + a["magnitude_bias"][self.ids]
        else:
            pre = g + a["encoder_bias"][self.ids]
        edges = [pre]
        if self.activation == "preactivation":
            edges = [np.full_like(pre, np.inf)]
        elif self.activation == "native" and self.architecture == "jumprelu":
            edges = [pre - a["threshold"][self.ids]]
        elif self.activation == "native" and self.architecture == "gated":
            edges = [pre, g + a["gate_bias"][self.ids]]
        off = np.any([edge <= 0 for edge in edges], axis=0)
        return Latent(
            z=np.where(off, 0, pre),
            slope=np.where(off, 0, slope),
            margin=np.min(np.abs(edges), axis=0),
            size=slope * (np.abs(x) @ np.abs(w.T) + 1),
        )

    def penalty(self, hidden: np.ndarray, reference: np.ndarray, mask: np.ndarray) -> Expected:
        latent = self.latent(hidden)
        kept = mask != 0
        z, slope = np.where(kept[:, None], latent.z, 0), np.where(kept[:, None], latent.slope, 0)
        gap = self.signs * (z - np.where(kept[:, None], reference.astype(np.float64), 0))
        rise = np.where(gap <= 0, 0, gap)
        m, w = mask[:, None].astype(np.float64), self.weights.astype(np.float64)
        losses = m * w * rise**2
        coef = m * 2 * w * self.signs * rise * slope
        return Expected(losses.sum(), mask.sum(dtype=np.float64), losses.sum(0), coef,
                        coef @ self.rows())


@dataclass
class Expected:
    loss_sum: float
    token_count: float
    latent_loss: np.ndarray
    coef: np.ndarray
    grad_hidden: np.ndarray
