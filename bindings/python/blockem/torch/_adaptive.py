"""Adaptive blocking: when the watch gives alarm, K grows by what was found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import _ffi
from .._cache import Cache
from .._core import Latents, expect
from .._library import fail
from .._stats import Movers
from ._attach import Handle
from ._rewind import Past
from ._watch import Alarm, Watch

__all__ = ["Adaptive", "Swap"]

log = logging.getLogger("blockem")


@dataclass(frozen=True)
class Swap:
    """One answer to an alarm."""

    #: 0-based decoder block; None for the embedding
    layer: int | None
    #: optimizer steps that were done
    step: int
    #: what K grew by, in the order of its new columns
    ids: tuple[int, ...]
    signs: tuple[int, ...]
    #: K's size since
    latents: int
    #: the alarm's
    reasons: tuple[str, ...]
    #: the step that the weights went back to, or None
    rewound_to: int | None = None
    #: of ``layer``: see ``Sae.site``
    site: str = "block_output"


class Adaptive:
    """Answers the alarms of watches: finds latents again, goes back if asked to, blocks the union
    of the old set and the new, fills caches, goes on.

        watch = blockem.torch.Watch(handle, stats, known=known)
        adaptive = blockem.torch.Adaptive(handle, watch, top=20, rewind=50, optimizer=optimizer)

    The answer comes within the report that gives the alarm (:meth:`Handle.metrics`,
    :meth:`Watch.report`), which must stand between two steps. Each layer has its own watch, K and
    answers.

    handle: of :func:`attach`.
    watches: one, or one for each of several layers.
    rediscover: "movers", the watch's own: the `top` largest movers outside K, blocked in the
        direction in which they moved; or a callable that is given the :class:`Alarm` and returns
        Latents or Movers (or None, for nothing), such as Stages 1 to 3 of BLOCK-EM on the model as it
        is. On several ranks it must return the same on all.
    top: how many movers.
    known_only: only those of the watch's `known`, with their sign.
    max_latents: K of a layer grows no further; of more that were found, the first are taken.
    cooldown: optimizer steps after a swap in which the layer's alarms are not answered: the penalty
        needs steps to pull the new latents back.
    rewind: an answer first puts what is trained back to where it was at least so many optimizer
        steps before, after a step on which all watches reported no reason for an alarm (or to the
        start, if there was none so long ago); the data and the schedule go on. 0: never. Without it
        the penalty starts on latents that have moved: a jump of the loss, whose gradients carry them
        beyond the base model's values, where a one-sided penalty does not hold them, and cost
        coherence. Two copies of the trained parameters and of the optimizer's state are kept, on
        their device.
    optimizer: a torch.optim.Optimizer of all that is trained, for rewind; or set the attribute
        ``optimizer`` before the first report. From then on copies are kept.
    conflicts: a callable found a latent of K with the opposite sign: "keep" the old sign, or
        "error".
    caches: what ``reference`` reads, for the layers that have one: filled for the new latents, as
        by :meth:`Handle.swap`.
    batches: with caches: all of the training data, iterated anew at each swap; packed: as for
        :meth:`Cache.reference`.
    on_swap: called with each :class:`Swap`, on every rank.

    Attributes ``swaps``: all of them; ``rewind``; ``optimizer``; ``past``: the copies, None without an
    optimizer. New latents have weight 1 unless the callable says else.

    Raises Error INVALID_ARGUMENT.
    """

    def __init__(
        self,
        handle: Handle,
        watches: Watch | Sequence[Watch],
        *,
        rediscover: str | Callable[[Alarm], Latents | Movers | None] = "movers",
        top: int = 20,
        known_only: bool = False,
        max_latents: int = 200,
        cooldown: int = 50,
        rewind: int = 0,
        optimizer: torch.optim.Optimizer | None = None,
        conflicts: str = "keep",
        caches: Sequence[Cache] = (),
        batches: Iterable[Any] | None = None,
        packed: bool = False,
        on_swap: Callable[[Swap], object] | None = None,
    ) -> None:
        expect("handle", handle, Handle)
        self._watches = [watches] if isinstance(watches, Watch) else list(watches)
        self._caches = {(cache.layer, cache.site): cache for cache in caches}
        for watch in self._watches:
            expect("watches", watch, Watch)
            if watch._handle is not handle:
                _refuse("a watch belongs to another handle")
            if known_only and watch.known is None:
                _refuse("known_only needs a watch with known movers")
        if not (callable(rediscover) or rediscover == "movers"):
            _refuse(f"rediscover is {rediscover!r}; expected 'movers' or a callable")
        for name, value, least in (
            ("top", top, 1), ("max_latents", max_latents, 1), ("cooldown", cooldown, 0),
            ("rewind", rewind, 0),
        ):  # fmt: skip
            if value < least:
                _refuse(f"{name} is {value}; expected at least {least}")
        if conflicts not in ("keep", "error"):
            _refuse(f"conflicts is {conflicts!r}; expected 'keep' or 'error'")
        if caches and batches is None:
            _refuse("caches are filled from batches: give all of the training data")
        if iter(batches or ()) is batches:
            _refuse("batches is an iterator, which gives them once; every swap needs them")
        self._handle, self._rediscover = handle, rediscover
        self._top, self._known_only, self._max_latents = top, known_only, max_latents
        self._cooldown, self._conflicts = cooldown, conflicts
        self._batches, self._packed, self._on_swap = batches, packed, on_swap
        self.rewind = rewind
        self.past: Past | None = None
        if optimizer is not None:
            self.optimizer = optimizer
        self.swaps: list[Swap] = []
        for watch in self._watches:
            watch._listeners.append(lambda alarm, watch=watch: self._answer(watch, alarm))
            watch._reported.append(self._keep)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What rewind puts back."""
        return None if self.past is None else self.past.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        expect("optimizer", optimizer, torch.optim.Optimizer)
        self.past = Past(optimizer, self.rewind)
        if self.rewind:
            self.past.keep(self._handle.steps)

    def state_dict(self) -> dict[str, Any]:
        """The swaps; for JSON. K itself is in the handle's state, and what rewind goes back to in
        ``past.state_dict()``, of tensors: without it a resumed run cannot go back beyond its start."""
        return {"version": 1, "swaps": [asdict(swap) for swap in self.swaps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a run, after the handle has loaded its state: caches use its plans."""
        if state.get("version") != 1:
            _refuse(f"unknown state version {state.get('version')!r}")
        self.swaps = [
            Swap(**{name: tuple(x) if isinstance(x, list) else x for name, x in swap.items()})
            for swap in state["swaps"]
        ]
        for target in self._handle._targets:
            cache = self._caches.get((target.layer, target.site.kind))
            if cache is not None:
                cache.use(target.plan)

    def _answer(self, watch: Watch, alarm: Alarm) -> None:
        where, step = (alarm.layer, alarm.site), self._handle.steps
        mine = [swap for swap in self.swaps if (swap.layer, swap.site) == where]
        last = mine[-1].step if mine else None
        if last is not None and step < last + self._cooldown:
            log.info("blockem: the alarm is not answered within %d steps", self._cooldown)
            return
        found = self._find(watch, alarm)
        if found is None:
            log.info("blockem: the alarm found no latent")
            return
        old = watch._target.plan.latents
        union = _first(old.union(found, conflicts=self._conflicts), self._max_latents, old)
        if len(union) == len(old):
            log.info("blockem: the alarm found no latent that K has room for")
            return
        self._expect_agreement(union)
        cache = self._caches.get(where)
        more = {} if cache is None else {"cache": cache, "batches": self._batches}
        self._expect_past()
        self._handle.swap(union, watch.layer, site=watch.site, packed=self._packed, **more)
        back = self._go_back() if self.rewind else None
        ids, signs = union.ids[len(old) :].tolist(), union.signs[len(old) :].tolist()
        swap = Swap(
            alarm.layer, step, tuple(ids), tuple(signs), len(union), alarm.reasons, back, alarm.site
        )
        self.swaps.append(swap)
        log.info("blockem: %s", swap)
        if self._on_swap is not None:
            self._on_swap(swap)

    def _keep(self) -> None:
        """After each report: the last watch's of a step tells whether all are quiet."""
        self._expect_past()
        step, last = self._handle.steps, [watch.last for watch in self._watches]
        quiet = all(one is not None and one.step == step and not one.reasons for one in last)
        if self.rewind and quiet:
            self.past.keep(step)

    def _go_back(self) -> int:
        for watch in self._watches:
            watch._forget()
        return self.past.back(self._handle.steps)

    def _expect_past(self) -> None:
        if self.rewind and self.past is None:
            _refuse("rewind needs the optimizer: give it, or set it before the first report")

    def _find(self, watch: Watch, alarm: Alarm) -> Latents | None:
        if callable(self._rediscover):
            found = self._rediscover(alarm)
            expect("what rediscover returned", found, Latents | Movers | None)
        else:
            found = alarm.drift.movers(self._top, watch.known if self._known_only else None)
        if isinstance(found, Movers):
            found = found.latents() if len(found) else None
        return found

    def _expect_agreement(self, latents: Latents) -> None:
        mine = (latents.ids.tolist(), latents.signs.tolist(), latents.weights.tolist())
        if any(theirs != mine for theirs in self._handle._ranks.gather_objects(mine)):
            _refuse("rediscover gave different latents on different ranks: seed what it draws")


def _first(union: Latents, count: int, old: Latents) -> Latents:
    """No more than `count` latents, but all of the old ones."""
    kept = max(count, len(old))
    return Latents(union.ids[:kept], union.signs[:kept], union.weights[:kept])


def _refuse(text: str) -> None:
    fail(_ffi.STATUS_INVALID_ARGUMENT, text)
