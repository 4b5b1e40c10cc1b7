"""A plan at a place of the model: its penalty, its lambda, and the sums for logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import _ffi
from .._cache import Cache
from .._core import Latents, Plan, expect
from .._library import fail
from .._stats import Stats
from ._ops import Parts, encode, penalty
from .._site import Site, expect_same, site_of
from ._spread import Held
from .lambdas import DualAscent, Fixed, as_lambda


class Target:
    """A plan at a place of the model, its lambda and its sums."""

    def __init__(self, plan: Plan, site: Site, lam: Fixed | DualAscent) -> None:
        self.site, self.lam = site, lam
        #: how often the latents were swapped
        self.version = 0
        self._take(plan)

    @property
    def layer(self) -> int | None:
        return self.site.layer

    def swap(self, plan: Plan) -> None:
        """Takes another plan; the sums begin anew."""
        self._take(plan)
        self.version += 1

    def _take(self, plan: Plan) -> None:
        self.plan = plan
        signs, weights = plan.latents.signs, plan.latents.weights
        self.signs = torch.tensor(signs, dtype=torch.float32, device=plan.device)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=plan.device)
        # Of the step: loss_sum. Since the last metrics: each latent's share, then count, paying
        # pairs, dead loss of K-.
        self.step_sum = torch.zeros((), dtype=torch.float64, device=plan.device)
        self.totals = torch.zeros(plan.num_latents + 3, dtype=torch.float64, device=plan.device)

    def plan_for(self, latents: Latents | Plan) -> Plan:
        """The plan of another set of latents of the same SAE; of a plan, itself."""
        expect("latents", latents, (Latents, Plan))
        if isinstance(latents, Latents):
            return self.plan.with_latents(latents)
        plan, mine = latents, self.plan
        if plan.d_in != mine.d_in:
            fail(_ffi.STATUS_SHAPE, f"the plan has d {plan.d_in}, the one before {mine.d_in}")
        expect_same("the plan", plan, self.site)
        for name in ("device", "activation", "numerics", "d_sae"):
            if getattr(plan, name) != getattr(mine, name):
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the plan's {name} is {getattr(plan, name)}, that of the one before "
                    f"{getattr(mine, name)}: only the latents can be swapped",
                )
        if mine.with_latents(plan.latents).identity != plan.identity:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "the plan is of another SAE: its rows are not those of the one before",
            )
        return plan

    def expect_dictionary(self, stats: Stats) -> None:
        """That these statistics are of the plan's SAE, with its activation."""
        for name in ("d_in", "d_sae", "activation"):
            theirs, mine = getattr(stats, name), getattr(self.plan, name)
            if theirs != mine:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the statistics' {name} is {theirs}, the plan's {mine}: make blockem.Stats of "
                    "the plan's SAE with its activation",
                )
        expect_same("the statistics", stats, self.site)

    def expect_cache(self, cache: Cache) -> None:
        """That a cache holds z of the same place."""
        theirs, mine = cache._site, self.site
        if theirs.key != mine.key:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{cache.path}: the cache has z of {theirs}, the penalty is on {mine}",
            )

    def parts(self, held: Held, reference: torch.Tensor, mask: torch.Tensor | None) -> Parts:
        """The penalty of all the tokens that this rank's group holds together."""
        reference, mask = held.own(reference), held.own(mask)
        return held.whole(penalty(held.plan, held.values, reference, mask, per_latent=True))

    def measure(
        self, held: Held, reference: torch.Tensor, mask: torch.Tensor | None, diagnostics: bool
    ) -> Parts:
        """The penalty, added to the sums."""
        part = self.parts(held, reference, mask)
        with torch.no_grad():
            paying = dead = torch.zeros((), device=held.values.device)
            if diagnostics:
                paying, dead = self._diagnose(held, held.own(reference), held.own(mask))
            more = torch.stack([part.count, paying.to(part.count), dead.to(part.count)])
            self.totals += torch.cat([part.latent_loss, more])
            self.step_sum += part.loss_sum
        return part

    def _diagnose(
        self, held: Held, reference: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Counted pairs that pay, and what K- pays without a gradient."""
        values = held.values.detach()
        *_, coef = torch.ops.blockem.penalty_forward(
            held.plan._key, values, reference, mask, False
        )
        rise = (self.signs * (encode(held.plan, values) - reference)).relu()
        share = torch.ones(values.shape[:-1], device=values.device) if mask is None else mask
        share = share.to(rise.dtype) if share.is_floating_point() else (share != 0).to(rise.dtype)
        paying = (rise > 0) & (share != 0)[..., None]
        dead = paying & (coef == 0) & (self.signs < 0)
        cost = share[..., None] * self.weights * rise**2
        found = torch.stack([paying.sum().double(), torch.where(dead, cost, 0.0).sum().double()])
        # Where ranks hold columns, each of them found all.
        return tuple(found if held.tokens is None else held.summed(found))

    def metrics(self, totals: torch.Tensor, factor: float) -> dict[str, float]:
        *latents, count, paying, dead = totals.tolist()
        positive = [sign > 0 for sign in self.plan.latents.signs]
        pos = sum(x for x, plus in zip(latents, positive) if plus)
        neg = sum(x for x, plus in zip(latents, positive) if not plus)
        per_token = factor / count if count else math.nan
        lam = self.lam.value
        return {
            "penalty": (pos + neg) * per_token,
            "penalty_pos": pos * per_token,
            "penalty_neg": neg * per_token,
            "active": paying / (count * len(latents)) if count else math.nan,
            "dead_neg": dead / neg if neg else 0.0,
            "lambda": float(lam),
            "latents_version": float(self.version),
        } | {
            f"latent/{id}": x * per_token for id, x in zip(self.plan.latents.ids, latents)
        }

    def identity(self, plan: Plan) -> dict[str, Any]:
        latents = plan.latents
        return {
            "layer": self.layer,
            "site": self.site.kind,
            "plan": plan.identity,
            "activation": plan.activation,
            "ids": latents.ids.tolist(),
            "signs": latents.signs.tolist(),
            "weights": latents.weights.tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        own = {"lambda": self.lam.state_dict(), "latents_version": self.version}
        return self.identity(self.plan) | own

    def plan_of(self, state: Mapping[str, Any]) -> Plan:
        """The plan of a state: this one, or where the run had swapped its latents, one of those."""
        plan, columns = self.plan, ("ids", "signs", "weights")
        mine = self.identity(plan)
        if state.get("latents_version", 0) and any(state[name] != mine[name] for name in columns):
            plan = plan.with_latents(Latents(*(state[name] for name in columns)))
        # States of versions that knew no other site lack it.
        state = {"site": "block_output"} | dict(state)
        for name, mine in self.identity(plan).items():
            if state.get(name) != mine:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the state's {name} at {self.site} is {state.get(name)}, the handle's {mine}: "
                    "resume with the SAE and latents of the run",
                )
        return plan


def targets_of(
    plan: Plan | Sequence[Plan],
    layer: int | Sequence[int] | None,
    site: str | Sequence[str] | None,
    lam: float | DualAscent | Sequence[float | DualAscent],
    reduction: str,
) -> list[Target]:
    expect_choice("reduction", reduction, ("sum", "mean"))
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    for one in plans:
        expect("plan", one, Plan)
    layers = [layer] * len(plans) if layer is None or isinstance(layer, int) else list(layer)
    sites = [site] * len(plans) if site is None or isinstance(site, str) else list(site)
    single = isinstance(lam, (int, float, DualAscent))
    if isinstance(lam, DualAscent) and len(plans) > 1:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "several layers need a DualAscent each: give a list as lam",
        )
    lams = [lam] * len(plans) if single else list(lam)
    if not plans or not len(plans) == len(layers) == len(sites) == len(lams):
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{len(plans)} plans, {len(layers)} layers, {len(sites)} sites and {len(lams)} lambdas; "
            "expected one each",
        )
    return [
        Target(one, site_of(one, at, place), as_lambda(value))
        for one, at, place, value in zip(plans, layers, sites, lams)
    ]


def expect_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}",
        )
