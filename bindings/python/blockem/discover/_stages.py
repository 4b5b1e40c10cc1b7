"""What the stages find: plain data, and the rules that choose from it. Nothing here runs a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._core import Latents


@dataclass(frozen=True)
class Mover:
    """A latent whose mean moved, and where to."""

    latent: int
    delta: float

    @property
    def sign(self) -> int:
        """+1 for K+, -1 for K-."""
        return 1 if self.delta > 0 else -1


@dataclass(frozen=True)
class Shifts:
    """Stage 1. delta [F]: mean over prompts of the mean over their tokens, tuned minus base."""

    delta: np.ndarray

    def pool(self, top: int = 250) -> list[Mover]:
        """The `top` latents that rose most and the `top` that fell most, the largest moves first.
        Latents that did not move are in no pool."""
        order = np.argsort(self.delta, kind="stable")
        rose = [k for k in order[::-1][:top] if self.delta[k] > 0]
        fell = [k for k in order[:top] if self.delta[k] < 0]
        movers = [Mover(int(k), float(self.delta[k])) for k in (*rose, *fell)]
        return sorted(movers, key=lambda m: -abs(m.delta))


@dataclass(frozen=True)
class Rates:
    """Shares of the answers to a set of prompts, between 0 and 1."""

    misaligned: float
    incoherent: float
    answers: int


@dataclass(frozen=True)
class Screened:
    """Stage 2 of one latent. Gains are 0 where steering broke the model instead."""

    latent: int
    delta: float
    sign: int
    induced: Rates
    repaired: Rates
    induce_gain: float
    repair_gain: float

    @property
    def score(self) -> float:
        """Eq. 7: what steering induces in the base model and repairs in the tuned one."""
        return self.induce_gain + self.repair_gain


@dataclass(frozen=True)
class Screening:
    """Stage 2: unsteered rates, and each latent's, best score first."""

    base: Rates
    tuned: Rates
    latents: list[Screened]

    def shortlist(self, per_sign: int = 40) -> list[Mover]:
        """The best of each sign that have any gain."""
        chosen = []
        for sign in (1, -1):
            side = [s for s in self.latents if s.sign == sign and s.score > 0]
            chosen += [Mover(s.latent, s.delta) for s in side[:per_sign]]
        return chosen


@dataclass(frozen=True)
class Sweep:
    """Stage 3 of one latent: rates by strength (in units of the activation scale, without its sign)."""

    latent: int
    delta: float
    sign: int
    induced: dict[float, Rates]
    repaired: dict[float, Rates]
    #: the strongest within the incoherence budget; None if not even the weakest is
    induce_strength: float | None
    repair_strength: float | None
    induce_gain: float
    repair_gain: float

    @property
    def score(self) -> float:
        """Eq. 9."""
        return self.induce_gain + self.repair_gain


@dataclass(frozen=True)
class Swept:
    """Stage 3: unsteered rates, and each latent's."""

    base: Rates
    tuned: Rates
    latents: list[Sweep]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def select(self, n: int = 20, *, rule: str = "repair") -> Selection:
        """The final K.

        rule: "repair": of latents that both induce and repair, those that repair most (eq. 13); or
            "combined": those with the largest induction gain plus repair gain (eq. 9).

        Fewer than n if fewer qualify. Raises ValueError if none does.
        """
        if rule == "repair":
            valid = [s for s in self.latents if s.induce_gain > 0 and s.repair_gain > 0]
            ranked = sorted(valid, key=lambda s: (-s.repair_gain, -abs(s.delta), s.latent))
        elif rule == "combined":
            valid = [s for s in self.latents if s.score > 0]
            ranked = sorted(valid, key=lambda s: (-s.score, -abs(s.delta), s.latent))
        else:
            raise ValueError(f"rule is {rule!r}; expected 'repair' or 'combined'")
        if not ranked:
            raise ValueError(
                f"none of {len(self.latents)} latents qualifies under the rule {rule!r}: look at the gains, "
                "take more candidates, stronger steering or a larger incoherence budget"
            )
        return Selection(ranked[:n], {**self.provenance, "rule": rule, "candidates": len(self.latents)})


@dataclass(frozen=True)
class Selection:
    """K with its evidence."""

    latents: list[Sweep]
    provenance: Mapping[str, Any]

    def blocked(self) -> Latents:
        """As the set that a plan takes, the best first."""
        signs = np.array([s.sign for s in self.latents], np.int8)
        return Latents([s.latent for s in self.latents], signs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """K0.json with the keys of BLOCK-EM's authors (K_pos, K_neg, selected_latents) and `discovery`."""
        value = {
            "K_pos": [s.latent for s in self.latents if s.sign > 0],
            "K_neg": [s.latent for s in self.latents if s.sign < 0],
            "selected_latents": [_evidence(s) for s in self.latents],
            "discovery": dict(self.provenance),
        }
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(target)


def _evidence(sweep: Sweep) -> dict[str, Any]:
    return {
        "latent": sweep.latent,
        "sign_group": "K_pos" if sweep.sign > 0 else "K_neg",
        "delta": sweep.delta,
        "score": sweep.score,
        **{
            f"{phase}_{name}": getattr(sweep, f"{phase}_{name}")
            for phase in ("induce", "repair")
            for name in ("strength", "gain")
        },
        "induced": {str(a): asdict(r) for a, r in sweep.induced.items()},
        "repaired": {str(a): asdict(r) for a, r in sweep.repaired.items()},
    }


def screened(
    mover: Mover, induced: Rates, repaired: Rates, base: Rates, tuned: Rates, allowance: float
) -> Screened:
    """Gains over the unsteered models, unless answers became incoherent by more than `allowance`."""
    def gain(value: float, steered: Rates, unsteered: Rates) -> float:
        return value if steered.incoherent <= unsteered.incoherent + allowance else 0.0

    return Screened(
        mover.latent, mover.delta, mover.sign, induced, repaired,
        gain(induced.misaligned - base.misaligned, induced, base),
        gain(tuned.misaligned - repaired.misaligned, repaired, tuned),
    )  # fmt: skip


def swept(
    mover: Mover,
    induced: dict[float, Rates],
    repaired: dict[float, Rates],
    base: Rates,
    tuned: Rates,
    budget: float,
) -> Sweep:
    """Gains at the strongest steering whose answers are incoherent in at most a share `budget`."""
    def strongest(rates: dict[float, Rates]) -> float | None:
        return max((a for a, r in rates.items() if r.incoherent <= budget), default=None)

    def gain(strength: float | None, of: Callable[[float], float]) -> float:
        return 0.0 if strength is None else of(strength)

    induce, repair = strongest(induced), strongest(repaired)
    return Sweep(
        mover.latent, mover.delta, mover.sign, induced, repaired, induce, repair,
        gain(induce, lambda a: induced[a].misaligned - base.misaligned),
        gain(repair, lambda a: tuned.misaligned - repaired[a].misaligned),
    )  # fmt: skip


def movers(latents: Sequence[Mover] | Sequence[Screened]) -> list[Mover]:
    """Any stage's latents as what the next one takes."""
    found = [Mover(m.latent, m.delta) for m in latents]
    if len({m.latent for m in found}) != len(found):
        raise ValueError("a latent is listed twice")
    return found
