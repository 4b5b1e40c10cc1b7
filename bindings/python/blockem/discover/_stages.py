"""What the stages find: plain data, and the rules that choose from it. Nothing runs a model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._core import Latents, Plan, Sae, load_latents
from .._stats import Movers, movers

log = logging.getLogger("blockem")


@dataclass(frozen=True, eq=False)
class Shifts:
    """Stage 1 (appendix A.2)."""

    #: [F] float64: mean over prompts of the mean of z over their tokens, tuned less base model
    delta: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def pool(self, count: int = 250) -> Movers:
        """Stage 2's candidates: up to `count` latents that rose and as many that fell."""
        return movers(self.delta, count)

    def select(self, n: int = 20) -> Selection:
        """The n latents that moved farthest, risen or fallen: K by Stage 1 alone."""
        pool = movers(self.delta, n)
        order = np.argsort(-np.abs(pool.deltas), kind="stable")[:n]
        evidence = [{"delta": float(delta)} for delta in pool.deltas[order]]
        provenance = {**self.provenance, **_counts("top_delta", n, len(pool), len(self.delta))}
        return _selection(pool.ids[order], pool.signs[order], evidence, provenance)


@dataclass(frozen=True)
class Rates:
    """Shares of the answers to a set of prompts, between 0 and 1."""

    misaligned: float
    incoherent: float
    #: how many answers
    answers: int


@dataclass(frozen=True)
class Screened:
    """Stage 2 of one latent. A gain is 0 where steering made the answers incoherent instead."""

    latent: int
    sign: int
    delta: float
    #: the base model, steered to where the latent moved
    induced: Rates
    #: the tuned model, steered back
    repaired: Rates
    induce_gain: float
    repair_gain: float

    @property
    def score(self) -> float:
        """Eq. 7: by how much steering raises misalignment in the base model and lowers it in the
        tuned one."""
        return self.induce_gain + self.repair_gain


@dataclass(frozen=True)
class Screening:
    """Stage 2 (appendix A.3): both models unsteered, and each latent, the best score first."""

    base: Rates
    tuned: Rates
    latents: list[Screened]

    def shortlist(self, per_sign: int = 40, min_score: float | None = None) -> Movers:
        """Stage 3's candidates: the best of either sign.

        min_score: leaves out latents below it, such as those without any gain.
        """
        if per_sign < 1:
            raise ValueError(f"per_sign is {per_sign}; expected at least 1")
        good = [s for s in self.latents if min_score is None or s.score >= min_score]
        sides = [[s for s in good if s.sign == sign][:per_sign] for sign in (1, -1)]
        return _as_movers([s for side in sides for s in side])


@dataclass(frozen=True)
class Sweep:
    """Stage 3 of one latent: rates by strength, which is in activation scales and has no sign."""

    latent: int
    sign: int
    delta: float
    induced: dict[float, Rates]
    repaired: dict[float, Rates]
    #: alpha*_ind and alpha*_rep, the strongest within the incoherence budget; None if none is
    induce_strength: float | None
    repair_strength: float | None
    #: at these strengths; 0 where there is none
    induce_gain: float
    repair_gain: float

    @property
    def score(self) -> float:
        """Eq. 9: the sum of both gains."""
        return self.induce_gain + self.repair_gain

    @property
    def valid(self) -> bool:
        """Eq. 13's pre-filter: it both induces and repairs."""
        return self.induce_gain > 0 and self.repair_gain > 0


#: A score that ranks latents, None for one that is out.
Rule = Callable[[Sweep], float | None]

RULES: dict[str, Rule] = {
    "repair": lambda s: s.repair_gain if s.valid else None,
    "combined": lambda s: s.score if s.score > 0 else None,
}


@dataclass(frozen=True)
class Swept:
    """Stage 3 (appendix A.4): both models unsteered, and each latent, in the order it was given."""

    base: Rates
    tuned: Rates
    latents: list[Sweep]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def select(self, n: int = 20, *, rule: str | Rule = "repair") -> Selection:
        """The final K with its signs, the best first; of equals the one that moved farther.

        rule: "repair": of latents that both induce and repair, those that repair most (eq. 13);
            "combined": those with the largest sum of gains above 0 (eq. 9); or a function from a
            :class:`Sweep` to its score, None to leave it out.

        Fewer than n if fewer qualify, which the selection and a line of the log say. Raises
        ValueError if none does.
        """
        if isinstance(rule, str) and rule not in RULES:
            raise ValueError(f"rule is {rule!r}; expected 'repair', 'combined' or a function")
        name, score = (rule, RULES[rule]) if isinstance(rule, str) else (_name_of(rule), rule)
        scored = [(value, s) for s in self.latents if (value := score(s)) is not None]
        ranked = sorted(scored, key=lambda pair: (-pair[0], -abs(pair[1].delta), pair[1].latent))
        chosen = [s for _, s in ranked[:n]]
        provenance = {**self.provenance, **_counts(name, n, len(ranked), len(self.latents))}
        return _selection(
            [s.latent for s in chosen],
            [s.sign for s in chosen],
            [_evidence(s) for s in chosen],
            provenance,
        )


@dataclass(frozen=True, eq=False)
class Selection:
    """K, the best latent first, with its evidence and how it was found."""

    #: [K] int64
    ids: np.ndarray
    #: [K] int8: +1 in K+, -1 in K-
    signs: np.ndarray
    #: of each latent
    evidence: Sequence[Mapping[str, Any]]
    provenance: Mapping[str, Any]

    def latents(self) -> Latents:
        """The set with these ids and signs."""
        return Latents(self.ids, self.signs)

    def save(
        self, path: str | os.PathLike[str], sae: Sae | None = None, activation: str = "native"
    ) -> None:
        """Writes K0.json, whole or not at all, as :func:`blockem.load_latents` and BLOCK-EM's
        scripts read it: K_pos and K_neg, the evidence in selected_latents, the provenance in
        discovery.

        sae: records d, F and the identity of K's rows under `activation` too, so that another SAE
            is refused later.
        """
        sides = {1: "K_pos", -1: "K_neg"}
        value = {
            **{side: self.ids[self.signs == sign].tolist() for sign, side in sides.items()},
            "selected_latents": [
                {"latent": int(k), "sign_group": sides[int(s)], **evidence}
                for k, s, evidence in zip(self.ids, self.signs, self.evidence, strict=True)
            ],
            "discovery": dict(self.provenance),
        }
        path = Path(path)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
            if sae is not None:
                latents = load_latents(partial, sae)
                latents.save(partial, Plan(sae, latents, activation=activation))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def only(self, sign: int) -> Selection:
        """A control: K+ alone (sign +1) or K- alone (-1)."""
        if sign not in (1, -1):
            raise ValueError(f"sign is {sign}; expected +1 or -1")
        kept = np.flatnonzero(self.signs == sign)
        if not len(kept):
            raise ValueError(f"no latent of the selection has the sign {sign:+}")
        evidence = [self.evidence[i] for i in kept]
        return self._control(self.ids[kept], self.signs[kept], evidence, control="only", sign=sign)

    def shuffled_signs(self, seed: int) -> Selection:
        """A control: the same latents, their signs dealt out anew, not as they were."""
        if len(set(self.signs.tolist())) < 2:
            raise ValueError("all latents have one sign: there is nothing to shuffle")
        rng = np.random.default_rng(seed)
        signs = self.signs
        while np.array_equal(signs, self.signs):
            signs = rng.permutation(self.signs)
        return self._control(self.ids, signs, self.evidence, control="shuffled_signs", seed=seed)

    def flipped_signs(self) -> Selection:
        """A control: the same latents, each with the other sign. Of signs that are dealt out anew
        many stay as they were, most where one side is much the larger; here none does."""
        return self._control(self.ids, -self.signs, self.evidence, control="flipped_signs")

    def random(self, among: int | Sequence[int] | np.ndarray, seed: int) -> Selection:
        """A control: as many latents of either sign, drawn from others than these.

        among: their ids, or how many the dictionary has (``sae.d_sae``).
        """
        candidates = np.arange(among) if isinstance(among, (int, np.integer)) else np.unique(among)
        others = np.setdiff1d(candidates, self.ids)
        if len(others) < len(self.ids):
            raise ValueError(f"{len(self.ids)} latents cannot be drawn from {len(others)} others")
        ids = np.random.default_rng(seed).choice(others, len(self.ids), replace=False)
        return self._control(ids, self.signs, [{} for _ in ids], control="random", seed=seed)

    def _control(
        self, ids: np.ndarray, signs: np.ndarray, evidence: Sequence[Mapping[str, Any]], **how: Any
    ) -> Selection:
        return Selection(
            ids.astype(np.int64), signs.astype(np.int8), evidence, {**self.provenance, **how}
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        positive = int((self.signs > 0).sum())
        statement = self.provenance.get("statement")
        return (
            f"Selection({positive} in K+, {len(self) - positive} in K-"
            f"{'' if statement is None else f'; {statement}'})"
        )


def _name_of(rule: Rule) -> str:
    return getattr(rule, "__qualname__", type(rule).__qualname__)


def _counts(rule: str, n: int, qualified: int, candidates: int) -> dict[str, Any]:
    """What a selection says of itself."""
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1")
    if not qualified:
        raise ValueError(
            f"none of {candidates} latents qualifies under the rule {rule!r}: look at the gains; "
            "take more candidates, other strengths or a larger incoherence budget"
        )
    counts = {"rule": rule, "candidates": candidates, "qualified": qualified, "requested": n}
    if qualified < n:
        fewer = f"{qualified} of {candidates} qualify under the rule {rule!r}"
        statement = f"{n} latents were asked for, {fewer}"
        log.warning("%s", statement)
        counts["statement"] = statement
    return counts


def _selection(
    ids: Sequence[int] | np.ndarray,
    signs: Sequence[int] | np.ndarray,
    evidence: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> Selection:
    return Selection(np.array(ids, np.int64), np.array(signs, np.int8), evidence, provenance)


def _evidence(sweep: Sweep) -> dict[str, Any]:
    return {
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


def _as_movers(latents: Sequence[Screened]) -> Movers:
    return Movers(
        np.array([s.latent for s in latents], np.int64),
        np.array([s.sign for s in latents], np.int8),
        np.array([s.delta for s in latents], np.float64),
    )


def screened(
    latent: int, sign: int, delta: float, induced: Rates, repaired: Rates,
    base: Rates, tuned: Rates, allowance: float,
) -> Screened:  # fmt: skip
    """Gains over the unsteered models, unless more than a share `allowance` became incoherent."""

    def gain(value: float, steered: Rates, unsteered: Rates) -> float:
        return value if _within(steered, unsteered.incoherent + allowance) else 0.0

    return Screened(
        latent, sign, delta, induced, repaired,
        gain(induced.misaligned - base.misaligned, induced, base),
        gain(tuned.misaligned - repaired.misaligned, repaired, tuned),
    )  # fmt: skip


def swept(
    latent: int, sign: int, delta: float, induced: dict[float, Rates], repaired: dict[float, Rates],
    base: Rates, tuned: Rates, budget: float,
) -> Sweep:  # fmt: skip
    """Gains at the strongest steering that leaves at most a share `budget` incoherent."""

    def strongest(rates: dict[float, Rates]) -> float | None:
        return max((a for a, r in rates.items() if _within(r, budget)), default=None)

    induce, repair = strongest(induced), strongest(repaired)
    return Sweep(
        latent, sign, delta, induced, repaired, induce, repair,
        0.0 if induce is None else induced[induce].misaligned - base.misaligned,
        0.0 if repair is None else tuned.misaligned - repaired[repair].misaligned,
    )  # fmt: skip


def _within(rates: Rates, share: float) -> bool:
    # Shares are quotients, and sums of them: 0.7 + 0.1 is below 0.8.
    return rates.incoherent <= share + 1e-9
