"""BLOCK-EM's latent penalty and its gradient, for any trainer.

    sae = blockem.load_sae("path/to/sae")
    latents = blockem.load_latents("K0.json", sae)
    plan = blockem.Plan(sae, latents)
    reference = plan.encode(base_hidden)
    loss_sum, count = blockem.torch.penalty(plan, hidden, reference, mask)
    loss = sft_loss + lam * loss_sum / count

The arithmetic is libblockem's (Rust, behind a C ABI); this package carries arrays to it. torch is
imported by ``blockem.torch``, ``blockem.discover``, ``base_model_digest`` and the parts of ``Cache``
that run a model; jax by ``blockem.jax``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._cache import Cache
from ._core import Latents, Penalty, Plan, Sae, load_latents, load_sae
from ._library import ArgumentError, DataError, Error, FileError, __version__, build_info
from ._mask import Markers, Masked, Tokenizer, mask_from_offsets
from ._stats import Movers, Stats, movers, prompt_shares, stage1
from ._steering import Steering, activation_scale, token_norms

if TYPE_CHECKING:
    from . import discover, jax, judges, report, torch
    from ._torch_cache import base_model_digest

__all__ = [
    "ArgumentError",
    "Cache",
    "DataError",
    "Error",
    "FileError",
    "Latents",
    "Markers",
    "Masked",
    "Movers",
    "Penalty",
    "Plan",
    "Sae",
    "Stats",
    "Steering",
    "Tokenizer",
    "__version__",
    "activation_scale",
    "base_model_digest",
    "build_info",
    "discover",
    "jax",
    "judges",
    "load_latents",
    "load_sae",
    "mask_from_offsets",
    "movers",
    "prompt_shares",
    "report",
    "stage1",
    "token_norms",
    "torch",
]


def __getattr__(name: str) -> Any:
    if name in ("discover", "jax", "judges", "report", "torch"):
        return importlib.import_module(f".{name}", __name__)
    if name == "base_model_digest":
        return importlib.import_module("._torch_cache", __name__).base_model_digest
    raise AttributeError(f"module 'blockem' has no attribute {name!r}")
