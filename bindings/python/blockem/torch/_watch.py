"""The watch for rerouting: how the dictionary drifts from the base model while K is blocked."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from .. import _ffi
from .._core import Latents, expect
from .._library import fail
from .._stats import Movers, Stats
from ._attach import Handle
from ._references import Provided
from .._site import Site
from ._target import Target

__all__ = ["Alarm", "AlarmRule", "Drift", "Watch"]

log = logging.getLogger("blockem")

#: Rows of a statistics' state that are no sums.
MAXIMA = (_ffi.STATS_STATE["max"], _ffi.STATS_STATE["base_max"])


@dataclass(frozen=True)
class AlarmRule:
    """When a drift is an alarm.

    A report speaks for an alarm when ``relative >= least`` (:attr:`Drift.relative`) and one of
    these holds; `patience` such reports in a row are one, and each `patience` more another.

        growth      outside >= outside_ratio * the baseline's outside
        overlap     known >= known_overlap                 (of a watch that was given `known`)
        rerouting   retraced >= way                        (of one whose `known` has deltas)

    The baseline is the `baseline`-th report since the start or the last swap of the latents, or the
    one that :meth:`Watch.set_baseline` was given; growth is not judged before.

    Growth alone cannot tell rerouting from learning: a task that is learned drifts too. What an
    unblocked run did can: in an independent port of BLOCK-EM to Qwen2.5-7B, 28 of the 40 largest
    movers outside K were those of plain LoRA, while K stayed at its base level. The way, which
    weighs movers by how far they went, tells more than their number. The defaults are starting
    points: the first reports of a healthy run show what is normal for an SAE.

    outside_ratio: None for no such rule; more than 1.
    known_overlap: None for no such rule; in (0, 1].
    way: None for no such rule; above 0.
    least: drifts below this share of the base model's mean square are noise.
    baseline: at least 1.
    patience: at least 1.
    """

    outside_ratio: float | None = 4.0
    known_overlap: float | None = 0.5
    way: float | None = 0.25
    least: float = 1e-4
    baseline: int = 5
    patience: int = 2

    def __post_init__(self) -> None:
        ratio, overlap, way = self.outside_ratio, self.known_overlap, self.way
        for name, wrong, expected in (
            ("outside_ratio", ratio is not None and not 1 < ratio < math.inf, "more than 1"),
            ("known_overlap", overlap is not None and not 0 < overlap <= 1, "in (0, 1]"),
            ("way", way is not None and not 0 < way < math.inf, "above 0"),
            ("least", not 0 <= self.least < math.inf, "0 or more"),
            ("baseline", self.baseline < 1, "at least 1"),
            ("patience", self.patience < 1, "at least 1"),
        ):
            if wrong:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"{name} is {getattr(self, name)}; expected {expected}",
                )

    def reasons(self, drift: Drift, baseline: float | None) -> tuple[str, ...]:
        """What speaks for an alarm, with the numbers."""
        found = []
        if not drift.relative >= self.least:
            return ()
        judged = self.outside_ratio is not None and baseline is not None
        if judged and drift.outside >= self.outside_ratio * baseline:
            found.append(
                f"the drift outside K is {drift.outside:.4g}, at least {self.outside_ratio:g} times "
                f"the baseline's {baseline:.4g}"
            )
        overlaps = self.known_overlap is not None and drift.known is not None
        if overlaps and drift.known >= self.known_overlap:
            found.append(
                f"{round(drift.known * len(drift.top))} of the {len(drift.top)} largest movers "
                f"outside K are known ones; {self.known_overlap:g} of them are an alarm"
            )
        gone = self.way is not None and drift.retraced is not None
        if gone and drift.retraced >= self.way:
            found.append(
                f"outside K the model has gone {drift.retraced:.2f} of the known movers' way; "
                f"{self.way:g} of it is an alarm"
            )
        return tuple(found)


@dataclass(frozen=True)
class Drift:
    """How far each latent of the dictionary is from the base model's, over the watched tokens of
    all ranks. z and base are of the same tokens; E is their mean.

        delta_k    = E(z_k - base_k)
        rise_k     = E relu(z_k - base_k)^2        fall_k = E relu(base_k - z_k)^2
        drift_k    = rise_k + fall_k = E(z_k - base_k)^2

        inside     = sum over k in K of drift_k
        blocked    = sum over K+ of rise_k + sum over K- of fall_k      what K pays, with weights 1
        outside    = sum over k not in K of drift_k
        relative   = outside / sum over k not in K of E base_k^2
        known      = share of the `top` movers that are in the list of known ones, with their sign
        retraced   = sum of delta_k D_k / sum of D_k^2      over the known k not in K, D_k theirs:
                     how much of their way was gone, 0 as the base model, 1 as the run they are of

    Masses are in units of the penalty, loss_sum / count.
    """

    #: 0-based decoder block; None for the embedding
    layer: int | None
    #: optimizer steps that were done
    step: int
    #: how many tokens weigh in (earlier reports by memory), float
    tokens: float
    #: K as it was
    latents: Latents
    #: [F] float64, as the others
    delta: np.ndarray = field(repr=False)
    rise: np.ndarray = field(repr=False)
    fall: np.ndarray = field(repr=False)
    #: E base_k^2
    base_mean_square: np.ndarray = field(repr=False)
    #: for Stats.load_state_dict, which gives rates, maxima (since the last report) and the like
    sums: Mapping[str, Any] = field(repr=False)
    #: outside K, the largest |delta| first
    top: Movers = field(repr=False)
    known: float | None
    retraced: float | None
    #: what speaks for an alarm, before patience
    reasons: tuple[str, ...] = ()

    @property
    def inside(self) -> float:
        ids = self.latents.ids
        return float((self.rise + self.fall)[ids].sum())

    @property
    def blocked(self) -> float:
        ids, positive = self.latents.ids, self.latents.signs > 0
        return float(np.where(positive, self.rise[ids], self.fall[ids]).sum())

    @property
    def outside(self) -> float:
        return float((self.rise + self.fall)[self._outside].sum())

    @property
    def relative(self) -> float:
        size, drift = float(self.base_mean_square[self._outside].sum()), self.outside
        return drift / size if size else math.inf if drift else 0.0

    def movers(self, count: int, among: Movers | Latents | None = None) -> Movers:
        """Up to `count` latents outside K that moved, the farthest first, equals by their id.

        among: only latents of this list, and only where they moved by its sign.
        """
        return _movers(self.delta, self._outside, count, among)

    @property
    def _outside(self) -> np.ndarray:
        return outside_of(self.latents, len(self.delta))


@dataclass(frozen=True)
class Alarm:
    """Rerouting is likely: why, and the report that was the last reason."""

    layer: int | None
    step: int
    reasons: tuple[str, ...]
    drift: Drift = field(repr=False)
    #: of ``layer``: see ``Sae.site``
    site: str = "block_output"

    def __str__(self) -> str:
        where = Site(self.site, self.layer)
        return f"{where}, step {self.step}: {'; '.join(self.reasons)}"


class Watch:
    """Watches the whole dictionary of a layer on a share of the training sequences.

        watch = blockem.torch.Watch(handle, blockem.Stats(sae), known=pool, on_alarm=print)
        ...                                       # the loop as before
        handle.metrics()                          # has watch/..., and makes the report
        watch.last                                # a Drift: movers, masses, [F] arrays

    In a sampled sequence's forward the statistics read what the hooks have anyway; the base model's
    hidden states are those of the reference pass, or where references come from a cache, of a pass
    over the sampled sequences alone that ends at the layer. In all other steps nothing is done.
    Nothing waits for the device but :meth:`report`, :meth:`metrics` and :meth:`state_dict`, which
    all ranks must call; at the first forward several ranks agree on the batch size.

    handle: of :func:`attach`. One watch for each layer.
    stats: gives the dictionary, of the layer's SAE with the plan's activation, on any device (the
        whole encoder is kept there); its own sums stay as they are.
    layer, site: which of the handle's, if it has several and the SAE does not tell.
    share: of the sequences (rows of a batch), on average. Draws depend on seed, step, micro-batch
        and row alone: all ranks watch in the same steps (so the others are not slowed), and those
        that compute rows together the same rows. A packed row is one sequence.
    together: how many rows of a micro-batch are drawn at once, if it has so many: a pass of several
        costs little more than one of a single row. The more, the fewer steps have any. (For every
        `together` rows that the first micro-batch had there is one draw.)
    seed: of the draws.
    known: bad movers, those of an unblocked run. Best are those on training rows
        (:meth:`Handle.movers`): their deltas are of such tokens as the watch sees, and give
        :attr:`Drift.retraced`. The pool of Stage 1 and the shortlist of Stage 2 are of prompts,
        and a set of latents has no deltas: of these only the ids and signs are to be trusted.
    top: how many movers outside K a report has.
    memory: what of the earlier reports' sums (and token counts) stays in the next: each report
        multiplies them by it. 0: only what was seen since the last report; 1: everything.
    min_tokens: a report waits until so many tokens were seen since the last one, on all ranks.
    rule: :class:`AlarmRule`.
    on_alarm: called with each :class:`Alarm`, by the report, on every rank.
    base: the base model's hidden states [n, T, d] of this layer for some rows of a batch (the
        mapping that ``penalty`` was given, cut to them), where neither adapters can be turned off
        nor a copy exists.

    Tokens are those that the penalty counts. Attributes: ``layer``, ``site``, ``stats`` (sums of this
    rank since the last report), ``last`` (:class:`Drift` or None), ``alarm`` (the last :class:`Alarm` or
    None), ``reports``.

    Raises Error INVALID_ARGUMENT, SHAPE.
    """

    def __init__(
        self,
        handle: Handle,
        stats: Stats,
        *,
        layer: int | None = None,
        site: str | None = None,
        share: float = 0.01,
        together: int = 4,
        seed: int = 0,
        known: Movers | Latents | None = None,
        top: int = 40,
        memory: float = 0.5,
        min_tokens: int = 512,
        rule: AlarmRule = AlarmRule(),
        on_alarm: Callable[[Alarm], object] | None = None,
        base: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        for name, value, kind in (
            ("handle", handle, Handle), ("stats", stats, Stats), ("rule", rule, AlarmRule),
            ("known", known, Movers | Latents | None),
        ):
            expect(name, value, kind)
        for name, value, right, expected in (
            ("share", share, 0 < share <= 1, "in (0, 1]"),
            ("together", together, together >= 1, "at least 1"),
            ("memory", memory, 0 <= memory <= 1, "between 0 and 1"),
            ("top", top, top >= 1, "at least 1"),
            ("min_tokens", min_tokens, min_tokens >= 1, "at least 1"),
        ):
            if not right:
                fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} is {value}; expected {expected}")
        self._handle, self._target = handle, handle._target_of(stats, layer, site)
        self._target.expect_dictionary(stats)
        if any(watch._target is self._target for watch in handle._watches):
            at = self._target.site
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"{at} has a watch already")
        if base is None and isinstance(handle._source, Provided):
            # A cache has z of K alone: the base model runs for the sampled rows.
            _expect_base(handle._source)
        if known is not None:
            _expect_ids(known, stats.d_sae)
        self.stats, self.base = stats.fresh(), base
        self.layer, self.site = self._target.layer, self._target.site.kind
        self.share, self.together, self.seed, self.known = share, together, seed, known
        self.top, self.memory, self.min_tokens, self.rule = top, memory, min_tokens, rule
        self._listeners = [on_alarm] if on_alarm is not None else []
        #: called after each report
        self._reported: list[Callable[[], object]] = []
        self.last: Drift | None = None
        self.alarm: Alarm | None = None
        self.reports = 0
        self._batch: int | None = None
        # Over all ranks: since the last report, and what memory keeps of those before.
        self._window, self._kept = _Sums(), _Sums()
        self._since_swap = self._streak = 0
        self._baseline: float | None = None
        handle._watches.append(self)

    def report(self) -> Drift | None:
        """The drift since the last report, with what memory keeps of those before; None while fewer
        than ``min_tokens`` tokens were seen since. Judges it: calls on_alarm.

        Raises Error NON_FINITE where a watched z was not finite; the next report forgets it.
        """
        self._window = self._window.plus(self._seen())
        self.stats.reset()
        if self._window.count < self.min_tokens:
            return None
        kept = self._kept.faded(self.memory).plus(self._window)
        self._window = _Sums()
        drift = self._drift(kept)
        self._kept = kept
        self.reports += 1
        self._since_swap += 1
        if self._baseline is None and self._since_swap >= self.rule.baseline:
            self._baseline = drift.outside
        self.last = drift = replace(drift, reasons=self.rule.reasons(drift, self._baseline))
        self._streak = self._streak + 1 if drift.reasons else 0
        if self._streak and self._streak % self.rule.patience == 0:
            self.alarm = Alarm(self.layer, drift.step, drift.reasons, drift, self.site)
            log.warning("blockem: alarm: %s", self.alarm)
            for listener in self._listeners:
                listener(self.alarm)
        for listener in self._reported:
            listener()
        return drift

    def metrics(self) -> dict[str, float]:
        """:meth:`report` in numbers; empty where there is none.

        watch/inside, watch/blocked, watch/outside, watch/relative, watch/known and watch/retraced
            (with known movers): of :class:`Drift`; watch/tokens; watch/alarm: 1 where the report
            was an alarm, else 0.
        """
        before, drift = self.alarm, self.report()
        if drift is None:
            return {}
        names = ("inside", "blocked", "outside", "relative", "tokens")
        found = {f"watch/{name}": float(getattr(drift, name)) for name in names}
        for name in ("known", "retraced"):
            if getattr(drift, name) is not None:
                found[f"watch/{name}"] = getattr(drift, name)
        return found | {"watch/alarm": float(self.alarm is not before)}

    def set_baseline(self, drift: Drift | None = None) -> None:
        """Until the next swap, growth is judged against this report (None: the last): one of a time
        when the model was known to be good."""
        drift = self.last if drift is None else drift
        if drift is None:
            fail(_ffi.STATUS_INVALID_ARGUMENT, "there was no report yet that could be the baseline")
        self._baseline = drift.outside

    def remove(self) -> None:
        """Watches no longer."""
        self._handle._watches.remove(self)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue exactly: tensors, numbers and strings, the same on
        all ranks. Any number of ranks can go on from it (to the rounding of float64 sums, where
        there are several)."""
        return self._settings() | {
            "batch": self._batch,
            "reports": self.reports,
            "since_swap": self._since_swap,
            "streak": self._streak,
            "baseline": self._baseline,
            "seen": self._seen().state_dict(),
            "window": self._window.state_dict(),
            "kept": self._kept.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a run with the same dictionary, layer and draws. ``last`` and ``alarm`` begin
        anew."""
        # States of versions that knew no other site lack it.
        state = {"site": "block_output"} | dict(state)
        for name, mine in self._settings().items():
            if state.get(name) != mine:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f"the watch's {name} was {state.get(name)} and is {mine}: resume with the "
                    "settings of the run",
                )
        self._load_seen(_Sums.of(state["seen"]))
        self._batch, self.reports = state["batch"], state["reports"]
        self._since_swap, self._streak = state["since_swap"], state["streak"]
        self._baseline = state["baseline"]
        self._window, self._kept = _Sums.of(state["window"]), _Sums.of(state["kept"])

    def _settings(self) -> dict[str, Any]:
        return {
            "version": 1,
            "layer": self.layer,
            "site": self.site,
            "identity": self.stats.identity,
            "numerics": self.stats.numerics,
            "share": self.share,
            "together": self.together,
            "seed": self.seed,
        }

    def __repr__(self) -> str:
        return (
            f"Watch({self.stats.d_sae} latents at {self._target.site}, "
            f"{100 * self.share:g} % of the sequences, {self.reports} reports)"
        )

    # What the handle calls.

    def _rows(self, mask: torch.Tensor) -> list[int]:
        """Which rows of this micro-batch are watched."""
        if mask.ndim < 2:
            fail(
                _ffi.STATUS_SHAPE,
                f"the tokens have the shape {list(mask.shape)}; a watch draws rows of [B, T]",
            )
        if self._batch is None:
            rows = torch.tensor(float(len(mask)), dtype=torch.float64)
            self._batch = int(self._handle._ranks.all_reduce(rows, greatest=True))
        if self.share == 1:
            return list(range(len(mask)))
        at = (self.seed, self._handle._steps, self._handle._micro)
        together = min(self.together, self._batch)
        groups = -(-self._batch // together)
        # So that share * batch rows are drawn on average, also where the groups have more.
        chance = self.share * self._batch / (groups * together)
        drawn = together * sum(_draw(*at, "group", i) < chance for i in range(groups))
        if not drawn:
            return []
        order = sorted(range(len(mask)), key=lambda row: _draw(*at, "row", row))
        return sorted(order[:drawn])

    def _add(self, hidden: torch.Tensor, base: torch.Tensor, mask: torch.Tensor) -> None:
        place = lambda x: x.detach().to(self.stats.device, non_blocking=True)
        self.stats.update(place(hidden), place(base), place(mask))

    def _swapped(self, target: Target) -> None:
        """Another K has another outside: its baseline is taken anew."""
        if target is self._target:
            self._since_swap = self._streak = 0
            self._baseline = None

    def _forget(self) -> None:
        """The model is another: what was seen of it counts no longer."""
        self.stats.reset()
        self._window, self._kept = _Sums(), _Sums()
        self._streak = 0

    # Reports.

    def _seen(self) -> _Sums:
        """The statistics of all ranks."""
        own, ranks = self.stats.state_dict(), self._handle._ranks
        copies = ranks.copies()
        count = torch.tensor(own["token_count"], dtype=torch.float64)
        count = ranks.all_reduce(count).item() / copies
        if not count:
            return _Sums()
        state = own["state"]
        if state is None:
            state = np.zeros((_ffi.STATS_ROWS_WITH_BASE, self.stats.d_sae))
            state[list(MAXIMA)] = -np.inf
        state = torch.from_numpy(state)
        maxima = ranks.all_reduce(state[list(MAXIMA)], greatest=True)
        state = ranks.all_reduce(state) / copies
        state[list(MAXIMA)] = maxima
        return _Sums(count, state.cpu().numpy())

    def _load_seen(self, sums: _Sums) -> None:
        """Gives the first rank what all had seen."""
        ranks = self._handle._ranks
        self.stats.reset()
        if sums.state is not None and ranks.first:
            # What ranks share is divided by their number.
            whole = sums.times(ranks.copies())
            self.stats.load_state_dict(self._state_of(whole))

    def _state_of(self, sums: _Sums) -> dict[str, Any]:
        return {
            "identity": self.stats.identity,
            "numerics": self.stats.numerics,
            "token_count": sums.count,
            "state": sums.state,
        }

    def _drift(self, sums: _Sums) -> Drift:
        latents = self._target.plan.latents
        row = lambda name: sums.state[_ffi.STATS_STATE[name]] / sums.count
        delta = row("sum") - row("base_sum")
        wrong = np.flatnonzero(~np.isfinite(delta))
        if len(wrong):
            fail(
                _ffi.STATUS_NON_FINITE,
                f"latent {wrong[0]} at {self._target.site} was not finite in a watched "
                f"sequence ({len(wrong)} latents were not)",
            )
        outside = outside_of(latents, len(delta))
        top = _movers(delta, outside, self.top, None)
        return Drift(
            layer=self.layer,
            step=self._handle.steps,
            tokens=sums.count,
            latents=latents,
            delta=delta,
            rise=row("rise_square_sum"),
            fall=row("fall_square_sum"),
            base_mean_square=row("base_square_sum"),
            sums=self._state_of(sums),
            top=top,
            known=None if self.known is None else _overlap(top, self.known),
            retraced=_retraced(delta, outside, self.known),
        )


@dataclass(frozen=True)
class _Sums:
    """Sums over tokens: a statistics' state [10, F] on the host, None without a token."""

    count: float = 0.0
    state: np.ndarray | None = None

    def plus(self, other: _Sums) -> _Sums:
        """The maxima are those of the other, the later one, if it has any token."""
        if self.state is None or other.state is None:
            return self if other.state is None else other
        state = self.state + other.state
        state[list(MAXIMA)] = np.maximum(self.state[list(MAXIMA)], other.state[list(MAXIMA)])
        return _Sums(self.count + other.count, state)

    def times(self, factor: float) -> _Sums:
        """As if every token counted so often."""
        state = self.state * factor
        state[list(MAXIMA)] = self.state[list(MAXIMA)]
        return _Sums(self.count * factor, state)

    def faded(self, memory: float) -> _Sums:
        """Maxima do not fade: less than all of the past has none."""
        if self.state is None or memory == 0:
            return _Sums()
        found = self.times(memory)
        if memory < 1:
            found.state[list(MAXIMA)] = -np.inf
        return found

    def state_dict(self) -> dict[str, Any]:
        state = None if self.state is None else torch.from_numpy(self.state.copy())
        return {"count": self.count, "state": state}

    @staticmethod
    def of(state: Mapping[str, Any]) -> _Sums:
        rows = state["state"]
        return _Sums(state["count"], None if rows is None else rows.cpu().numpy().copy())


def outside_of(latents: Latents, count: int) -> np.ndarray:
    """[F] bool: not in K."""
    outside = np.ones(count, bool)
    outside[latents.ids] = False
    return outside


def _movers(
    delta: np.ndarray, kept: np.ndarray, count: int, among: Movers | Latents | None
) -> Movers:
    if among is not None:
        signs = np.zeros(len(delta))
        signs[among.ids] = among.signs
        kept = kept & (signs * delta > 0)
    order = np.argsort(-np.abs(delta), kind="stable")
    ids = order[kept[order] & (delta[order] != 0)][:count]
    return Movers(ids, np.sign(delta[ids]).astype(np.int8), delta[ids])


def _overlap(top: Movers, known: Movers | Latents) -> float:
    """The share of the movers that are known, with their sign; 0 where nothing moved."""
    pairs = set(zip(known.ids.tolist(), known.signs.tolist()))
    shared = sum(pair in pairs for pair in zip(top.ids.tolist(), top.signs.tolist()))
    return shared / len(top) if len(top) else 0.0


def _retraced(
    delta: np.ndarray, outside: np.ndarray, known: Movers | Latents | None
) -> float | None:
    """None where the known movers have no deltas, or none of them is outside K."""
    if not isinstance(known, Movers):
        return None
    mine = outside[known.ids]
    way = known.deltas[mine]
    length = float(way @ way)
    return float(delta[known.ids[mine]] @ way) / length if length else None


def _draw(*at: object) -> float:
    """A number in [0, 1) that depends on nothing but the place where it is drawn."""
    digest = hashlib.blake2b(repr(at).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _expect_base(source: Provided) -> None:
    if source.peft is None:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "the reference gives z of K alone and the model has no adapters to turn off: give base, "
            "which gives the base model's hidden states of sampled rows",
        )
    source.of_model.expect()


def _expect_ids(known: Movers | Latents, count: int) -> None:
    wrong: Sequence[int] = [id for id in known.ids.tolist() if not 0 <= id < count]
    if wrong:
        fail(
            _ffi.STATUS_LATENT_RANGE, f"known has latent {wrong[0]}; the dictionary has {count}"
        )
