"""The penalty in a training loop: hooks, references, normalisation, lambda and logs."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import _ffi
from .._core import Latents, Plan, expect
from .._library import fail
from .._stats import Movers, Stats, movers
from ._compare import compare
from ._modes import evaluating, restored_modes
from ._observe import observe
from ._peft import without_parallel
from ._ranks import Ranks
from ._recorder import Forward, Recorder
from ._references import (
    AdaptersOff,
    Provided,
    Provider,
    References,
    Source,
    references_of,
)
from ._results import Calibration, Check, Term
from ._target import Target, expect_choice, targets_of
from .._site import BOUNDARIES
from ._spread import Held, gathered, group_of, held
from ._stack import Stack, find
from .lambdas import DualAscent, ratio_lambda

if TYPE_CHECKING:
    from .._cache import Cache
    from ._watch import Watch

__all__ = ["Handle", "attach"]

log = logging.getLogger("blockem")


def attach(
    model: nn.Module,
    plan: Plan | Sequence[Plan],
    *,
    layer: int | Sequence[int] | None = None,
    site: str | Sequence[str] | None = None,
    reference: str | nn.Module | Provider = "adapters_off",
    base_adapters: Sequence[str] | None = None,
    lam: float | DualAscent | Sequence[float | DualAscent],
    reduction: str = "sum",
    tokens: str = "labels",
    layers: str | None = None,
    process_group: Any = None,
    tensor_group: Any = None,
    gradients: str = "mean",
    tolerance: float = 0.0,
    diagnostics: bool = True,
) -> Handle:
    """Hooks the penalty onto a causal language model, where the SAE reads its hidden states.

        handle = blockem.torch.attach(model, plan, layer=19, lam=1e4)
        for batch in loader:
            handle.begin_step([batch])                # all micro-batches of the step
            loss = model(**batch).loss + handle.penalty(batch).loss
            loss.backward()
            optimizer.step()
            handle.end_step()

    model: a Hugging Face causal language model, also in a PeftModel, DistributedDataParallel or
        torch.compile. The hook is on the module itself: the output of the last block is read before
        the final norm.
    plan: one, or one for each place that is read, also several of one block.
    layer: 0-based decoder block in which the SAE's site lies, one for each plan; None takes what
        the SAE says. One that the SAE contradicts is an error.
    site: which place of the block is read, one for each plan; None takes what the SAE says
        (``Sae.site``), and of an SAE that says nothing the block's output. One that the SAE
        contradicts is an error. [B, T, d] of the SAE's d is read at:
        "block_output", "block_input": the residual stream after the block, or before it, which is
            the output of the block before, or the embedding.
        "embedding": the input of block 0; layer is None.
        "attention_output", "mlp_output": what the attention or the MLP adds to the residual stream:
            the output of the module, or of the norm after it, where the model has one (Gemma 2).
            The first pass of the base model compares the block's output with the sum.
        "attention_z": the heads' values, concatenated: the input of the attention's output
            projection.
        "mlp_input": the input of the MLP, after its norm.
        the dotted name of a module in Hugging Face's model, like "model.layers.5.mlp.output": its
            output, or with ".input" its input; for models in which the kinds above cannot be told.
    reference: where z of the base model comes from. The handle's repr and log say which it is.
        "adapters_off": the same model without its adapters (a PeftModel, or one of transformers
            after ``add_adapter``), without gradient and dropout, and stopped right after the last
            place that is read. Where other parts of the model compute what the decoder is given
            (embeddings and images of a multimodal model, an encoder) the pass begins with them,
            their adapters off too.
        "frozen_copy": a copy of the model's layers up to there and of what lies before them, made
            now, without adapters. Of a model that is about to be trained: for full fine-tuning, and
            where biases or other weights of the base are trained beside adapters.
        a module: a frozen model of the same class; the same pass on it. Needed where peft changed
            the base weights, so that the model without adapters is not its base: PiSSA, OLoRA,
            CorDA, LoftQ, LoRA-GA, KaSA. Their adapters give the base back up to rounding, and the
            self-check tells the difference: attach with a ``tolerance`` above it.
        a callable: ``reference(batch)`` gives [..., K] float32 (a sequence of them for several
            layers) for what :meth:`Handle.penalty` was given. Of ``cache.reference`` (also in a
            functools.partial) it is checked that the cache's plan has the same latents.
    base_adapters: names of adapters that belong to the base and stay on in its passes, such as that
        of an earlier training; they must be frozen. [] for none. Must be given where the model has
        several adapters.
    lam: lambda, or :class:`DualAscent`; one for all layers or one for each.
    reduction: over latents: "sum", the paper's formula, or "mean", which divides by K.
    tokens: which tokens count: "labels", those whose own label (unshifted) is not -100, or "all",
        those that attention_mask does not hide.
    layers: dotted name of the list of decoder layers, where it cannot be found.
    process_group: the ranks over which counts and sums are taken: those that have different tokens
        of a step (data and context parallelism). None is torch.distributed's default group where it
        is initialised. Ranks of tensor_group may be in it: they count once.
    tensor_group: the ranks that compute one batch together (tensor and sequence parallelism), and
        are given the same batches. Where a layer's output is a DTensor it need not be given. Each
        may have all of that output, its columns [..., d / ranks], or its tokens [B, T / ranks, d],
        cut like torch.chunk: DTensors say which, the shape of other tensors shows it.
    gradients: what the trainer does with the gradients of ranks that have different tokens: "mean"
        (DDP, FSDP) or "sum".
    tolerance: the greatest difference of z that the self-check (:meth:`Handle.check`) accepts. Only
        where tuned and base pass cannot run the same kernels, as under torch.compile, or where the
        base was given back up to rounding (see reference) must it be above 0.
    diagnostics: also measures which shares of the penalty are active and dead
        (:meth:`Handle.metrics`): one more read of the hidden states.

    Raises Error INVALID_ARGUMENT (also where the reference would not be the base model: the message
    says why and names what works), DEVICE_MISMATCH; SHAPE (the plan's d is not that of its site);
    UNSUPPORTED (the model does not show the SAE's site).
    """
    expect("model", model, nn.Module)
    targets = targets_of(plan, layer, site, lam, reduction)
    expect_choice("tokens", tokens, ("labels", "all"))
    expect_choice("gradients", gradients, ("mean", "sum"))
    stack = find(model, [target.site for target in targets], layers)
    if tensor_group is None:
        for target, place in zip(targets, stack.places, strict=True):
            place.expect_width("the plan", target.plan.d_in)
    source = references_of(reference, model, stack, layers, base_adapters)
    for target in targets:
        source.expect_latents(target.plan)
        if source.cache is not None:
            target.expect_cache(source.cache)
    ranks = Ranks(process_group, tensor_group, targets[0].plan.device)
    settings = _Settings(reduction, tokens, gradients, tolerance, diagnostics)
    return Handle(model, stack, targets, source, ranks, settings)


class Handle:
    """The penalty of one model: made by :func:`attach`.

    In each step: :meth:`begin_step`, then for each micro-batch the model's forward and
    :meth:`penalty`, then :meth:`end_step`. Forward passes in eval mode or without gradients, as in
    evaluation and generate, are left alone. Between steps :meth:`swap` changes the latents.
    :meth:`remove` takes the hooks away.
    """

    def __init__(
        self,
        model: nn.Module,
        stack: Stack,
        targets: list[Target],
        source: Source,
        ranks: Ranks,
        settings: _Settings,
    ) -> None:
        self._model, self._stack, self._targets = model, stack, targets
        self._source, self._ranks, self._settings = source, ranks, settings
        self._recorder = Recorder(stack, targets[0].plan.device)
        self._watches: list[Watch] = []
        # The step's count, and whether ranks that have the same tokens each added theirs.
        self._count: torch.Tensor | float | None = None
        self._counted_by_all = True
        # Optimizer steps, and penalties since the last of them.
        self._steps = self._micro = 0
        # That of the last training forward: (device, enabled, dtype).
        self._autocast: tuple | None = None
        self._empty_steps: torch.Tensor | int = 0
        #: The last :class:`Check` of any token; the first penalty that has one makes it.
        self.last_check: Check | None = None
        for target in targets:
            log.info("blockem: %s", self._place(target))
        log.info("blockem: %s", source.name)

    def begin_step(
        self, batches: Iterable[Any] | float, *, copies: int = 1, may_be_empty: bool = False
    ) -> None:
        """Counts the tokens of an optimizer step, by which all its penalties are divided.

        batches: every micro-batch of the step on this rank, as :meth:`penalty` will get them
            (mappings with labels, or masks); or the step's count: each token once, over all ranks.
        copies: how many ranks of process_group were given these same batches here, of which each
            gets other tokens later (context parallelism).
        may_be_empty: the whole step may have no counted token: then its penalty is 0, and an adaptive
            lambda stays as it is.

        A micro-batch may have no counted token. Raises Error INVALID_ARGUMENT where the whole step
        has none: at once for counts in host memory; for those of a device by :meth:`metrics` and
        :meth:`state_dict`, because nothing waits here (the penalty is 0 meanwhile).
        """
        # A step that was begun and not ended leaves nothing.
        self._micro = 0
        for target in self._targets:
            target.step_sum = torch.zeros_like(target.step_sum)
        self._counted_by_all = not isinstance(batches, (int, float))
        if isinstance(batches, (int, float)):
            count: torch.Tensor = torch.tensor(float(batches), dtype=torch.float64)
        else:
            masks = [self._mask(batch) for batch in batches]
            parts = [_share(mask).sum() for mask in masks]
            count = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
            count = self._ranks.all_reduce(count) / copies
        empty = count == 0
        if may_be_empty:
            for target in self._targets:
                # No penalty was measured: not finite, by which no lambda moves.
                at = empty.to(target.step_sum.device)
                target.step_sum = target.step_sum.masked_fill(at, math.nan)
        elif count.device.type != "cpu":
            self._empty_steps = self._empty_steps + empty.long()
        elif not count.item() > 0:
            fail(_ffi.STATUS_INVALID_ARGUMENT, _NO_TOKENS)
        count = torch.where(empty, 1.0, count)
        self._count = count.item() if count.device.type == "cpu" else count

    def penalty(self, batch: Any) -> Term:
        """The penalty of the last training forward, once: add its ``loss`` to the task loss.

        batch: the mapping that the model was given (labels, attention_mask, input_ids are looked
            at), or a mask [...] bool, uint8 or float32 of the tokens that count.

        The first call makes the self-check (:meth:`check`); where no rank has a counted token, the
        next one makes it again.

        Raises Error INVALID_ARGUMENT where no training forward came before, where a layer did not
        run exactly once in it, or where its output was changed in place afterwards; SHAPE, DTYPE.
        """
        forward = self._recorder.take()
        mask = self._mask(batch)
        for target, hidden in zip(self._targets, forward.hidden, strict=True):
            self._expect_gradient(target, hidden)
        held = self._held(forward.hidden, mask)
        references, base = self._references(forward, batch, mask)
        if self.last_check is None:
            self._check(forward, held, references, mask)
        if self._watches:
            group = self._ranks.tensor_group
            with torch.no_grad(), self._recorder.paused():
                observe(
                    self._watches, self._targets, self._source, forward, base, batch, mask, group
                )
        self._autocast = forward.call.autocast
        parts, total = [], None
        for target, one, reference in zip(self._targets, held, references, strict=True):
            at = mask.to(one.values.device)
            part = target.measure(one, reference, at, self._settings.diagnostics)
            parts.append(part)
            share = self._lambda(target, part.loss_sum) * part.loss_sum
            total = share if total is None else total + share.to(total.device)
        self._micro += 1
        return Term(total, tuple(parts), tuple(forward.hidden), tuple(held), self._factor())

    def end_step(self) -> None:
        """After the optimizer's step: closes the step's count and moves adaptive lambdas."""
        if self._count is None:
            fail(_ffi.STATUS_INVALID_ARGUMENT, "end_step without begin_step")
        for target in self._targets:
            if isinstance(target.lam, DualAscent):
                target.lam.update(self._ranks.all_reduce(target.step_sum) / self._count_of_all())
        self._count = None
        self._steps, self._micro = self._steps + 1, 0

    def swap(
        self,
        latents: Latents | Plan,
        layer: int | None = None,
        *,
        site: str | None = None,
        cache: Cache | None = None,
        batches: Iterable[Any] = (),
        packed: bool = False,
        progress: bool = True,
    ) -> None:
        """Blocks another set of latents from the next step on: more, fewer or others.

            handle.swap(old.union(found))
            handle.swap(old.union(found), cache=cache, batches=loader)

        Between two steps, on all ranks. What follows is, bit for bit, what a run started from this
        step's checkpoint with the new set would do. lambda keeps its value, and a
        :class:`DualAscent` its multiplier and settings: the penalty of a larger set is larger, and
        lambda moves on from there. Steps go on; metrics begin anew; the next penalty makes the
        self-check; ``latents_version`` (state_dict, metrics) is one more.

        latents: the set, of which a plan like the layer's is made; or the plan, of the same SAE,
            layer, activation, device and arithmetic.
        layer, site: which of several, as attach knows them.
        cache: what ``reference`` reads, to be filled with z of the new latents first, by a pass of
            the base model over those examples of batches that lack any (:meth:`Cache.extend`, whose
            rules for several ranks hold). The reference must give the new columns afterwards:
            ``cache.reference`` does.
        batches, packed, progress: of :meth:`Cache.extend`.

        Raises Error INVALID_ARGUMENT (within a step; another SAE, layer, activation or device; a
        reference from a cache that keeps other latents), SHAPE (another d), LATENT_RANGE, and what
        :meth:`Cache.extend` raises; nothing has changed then.
        """
        if self._count is not None:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "latents are swapped between steps: after end_step and before begin_step",
            )
        target = self._target(layer, site)
        plan = target.plan_for(latents)
        if cache is not self._source.cache:
            self._source.expect_latents(plan)
        if cache is not None:
            target.expect_cache(cache)
            self._source.of_model.expect()
            with self._as_trained():
                cache.extend(
                    plan,
                    without_parallel(self._model),
                    batches,
                    layers=self._stack.name,
                    packed=packed,
                    progress=progress,
                    base_adapters=self._source.of_model.chosen,
                    process_group=self._ranks.process_group,
                )
        target.swap(plan)
        self._swapped()
        for watch in self._watches:
            watch._swapped(target)
        log.info("blockem: %s", self._place(target))

    def discard(self) -> None:
        """Forgets a training forward whose penalty is not wanted: call it in an ``except`` around a
        step that goes on, as after one that ran out of memory."""
        self._recorder.discard()

    def remove(self) -> None:
        """Takes the hooks away."""
        self._recorder.remove()

    def metrics(self, *, per_latent: bool = False) -> dict[str, float]:
        """What was measured since the last call, over all ranks, which must all call it.

        penalty: loss_sum / count (with reduction "mean" over latents too, as all the others);
            penalty_pos, penalty_neg: its parts of K+ and K-; lambda; latents_version: how often the
            latents were swapped.
        With diagnostics: active: the share of counted (token, latent) pairs that pay; dead_neg: the
            share of K-'s penalty without a gradient, because the latent is off in the tuned model.
        per_latent: adds latent/<id>: the share of each latent.
        With a :class:`Watch`: what it found since its last report, as watch/<name>
            (:meth:`Watch.metrics`), where it has seen enough.
        Names have a prefix, blockem/, or where there are several blockem/layer<N>/ for the output
        of a block, blockem/layer<N>.<site>/ for another site of it, and blockem/embedding/.

        The one place that waits for the device. Raises Error INVALID_ARGUMENT where a step had no
        counted token.
        """
        self._expect_tokens()
        found: dict[str, float] = {}
        for target in self._targets:
            prefix = self._prefix(target)
            totals = self._ranks.all_reduce(target.totals)
            target_metrics = target.metrics(totals, self._mean_factor(target))
            found |= {prefix + name: value for name, value in target_metrics.items()
                      if per_latent or not name.startswith("latent/")}
            target.totals = torch.zeros_like(target.totals)
        for watch in self._watches:
            found |= {self._prefix(watch._target) + name: x for name, x in watch.metrics().items()}
        return found

    def check(self, batch: Mapping[str, Any]) -> Check:
        """Proves the wiring on a batch, without training on it; returns what was found.

        Runs the model in training mode as a trainer does and compares it with the reference. Where
        the tuned model still equals its base, z must be the same, bit for bit, so that the penalty
        is exactly 0. Where it no longer does, a pass of the model without adapters takes its place,
        where that is its base. Where nothing can, as in full fine-tuning, after the first step the
        difference is returned and no error. All ranks must call it.

        Raises Error INVALID_ARGUMENT: the hooks did not fire once, or z differs by more than
        ``tolerance``.
        """
        with restored_modes(self._model), torch.enable_grad():
            self._model.train()
            without_parallel(self._model)(**batch)
        forward, mask = self._recorder.take(), self._mask(batch)
        held = self._held([hidden.detach() for hidden in forward.hidden], mask)
        references, _ = self._references(forward, batch, mask)
        return self._check(forward, held, references, mask)

    def measure(self, batches: Iterable[Mapping[str, Any]]) -> Calibration:
        """The SFT loss of the tuned and of the base model and the penalty, over whole batches.

        In eval mode, without gradients and without effect on training or metrics. Needs
        ``reference="adapters_off"``: the batches are run with and without adapters.
        """
        if not isinstance(self._source, AdaptersOff):
            fail(_ffi.STATUS_INVALID_ARGUMENT, 'measure needs reference="adapters_off"')
        totals = dict.fromkeys(("tuned", "base", "items", "penalty", "count"), 0.0)
        with evaluating(self._model), torch.no_grad():
            for batch in batches:
                self._measure(without_parallel(self._model), batch, totals)
        if not totals["items"] or not totals["count"]:
            fail(_ffi.STATUS_INVALID_ARGUMENT, _NO_TOKENS)
        return Calibration(
            loss=totals["tuned"] / totals["items"],
            base_loss=totals["base"] / totals["items"],
            penalty=totals["penalty"] / totals["count"],
        )

    def calibrate(self, batches: Iterable[Mapping[str, Any]], ratio: float) -> float:
        """:func:`ratio_lambda` for a model whose adapters come from an unblocked run.

        batches: a sample of training rows (64 are enough), as the model is given them.
        """
        found = self.measure(batches)
        return ratio_lambda(ratio, found.base_loss - found.loss, found.penalty)

    def movers(
        self,
        batches: Iterable[Any],
        stats: Stats,
        count: int = 250,
        *,
        layer: int | None = None,
        site: str | None = None,
    ) -> Movers:
        """How far the model has moved each latent from its base, on the counted tokens of batches:
        with the adapters of an unblocked run, what the :class:`Watch` of a blocked one takes as
        ``known``.

        In eval mode, without gradients and without effect on training or metrics.

        batches: as for :meth:`calibrate`, the same on all ranks.
        stats: of the layer's SAE, with the plan's activation; its own sums stay as they are.
        count: up to so many that rose, and up to so many that fell.
        layer, site: which of several, if the SAE does not tell.

        Raises Error INVALID_ARGUMENT (no base model but its z alone; no counted token), NON_FINITE.
        """
        expect("stats", stats, Stats)
        if isinstance(self._source, Provided):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "the reference gives z of K alone, and movers are of the whole dictionary: attach with "
                'reference="adapters_off" or a model',
            )
        target = self._target_of(stats, layer, site)
        target.expect_dictionary(stats)
        sums, at = stats.fresh(), self._targets.index(target)
        with evaluating(self._model), torch.no_grad():
            for batch in batches:
                with self._recorder.forced():
                    without_parallel(self._model)(**batch)
                forward, mask = self._recorder.take(), self._mask(batch)
                self._held(forward.hidden, mask)
                _, base = self._references(forward, batch, mask)
                rows, group = range(len(mask)), self._ranks.tensor_group
                whole = [gathered(h, rows, mask.shape[:2], group, stats.d_in).to(sums.device)
                         for h in (forward.hidden[at], base[at])]  # fmt: skip
                sums.update(*whole, mask.to(sums.device))
        if not sums.token_count:
            fail(_ffi.STATUS_INVALID_ARGUMENT, _NO_TOKENS)
        return movers(sums.delta, count)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: lambdas, steps, and the identity of latents and layers. For
        JSON; a :class:`Watch` has a state of its own."""
        self._expect_tokens()
        return {
            "version": 1,
            "steps": self._steps,
            "reduction": self._settings.reduction,
            "sites": [target.state_dict() for target in self._targets],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a run of the same layers, SAEs, latents, reduction and kind of lambda. Where
        that run had swapped its latents, they are swapped here too, so that attach may be given the
        first set or the last (a cache must be told of them: :meth:`Cache.use`)."""
        if state.get("version") != 1:
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"unknown state version {state.get('version')!r}")
        mine = self.state_dict()
        if state["reduction"] != mine["reduction"] or len(state["sites"]) != len(self._targets):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"the state has reduction {state['reduction']} and {len(state['sites'])} layers, "
                f"the handle {mine['reduction']} and {len(self._targets)}",
            )
        plans = [target.plan_of(theirs) for target, theirs in zip(self._targets, state["sites"])]
        for target, theirs in zip(self._targets, state["sites"]):
            target.lam.load_state_dict(theirs["lambda"])
        for target, plan, theirs in zip(self._targets, plans, state["sites"]):
            if plan is not target.plan:
                target.swap(plan)
                self._swapped()
            target.version = theirs.get("latents_version", 0)
        self._steps, self._micro = state["steps"], 0

    @property
    def steps(self) -> int:
        """Optimizer steps that are done."""
        return self._steps

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plan of each layer, as it is now."""
        return tuple(target.plan for target in self._targets)

    def __repr__(self) -> str:
        return f"Handle({'; '.join(map(self._place, self._targets))}; {self._source.name})"

    def _prefix(self, target: Target) -> str:
        return "blockem/" if len(self._targets) == 1 else f"blockem/{target.site.label}/"

    def _target(self, layer: int | None, site: str | None = None) -> Target:
        """The one of this layer and site; None fits any."""
        found = [
            target
            for target in self._targets
            if layer in (None, target.layer) and site in (None, target.site.kind, target.site.hook)
        ]
        if len(found) != 1:
            own = ", ".join(target.site.label for target in self._targets)
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"layer is {layer}{'' if site is None else f', site {site!r}'}; expected one of {own}, "
                "attached once",
            )
        return found[0]

    def _target_of(self, stats: Stats, layer: int | None, site: str | None) -> Target:
        """The one of this layer and site; where there are several, of those of the statistics'
        SAE."""
        if layer is None and site is None and len(self._targets) > 1:
            says = stats._sae.describe()
            kind = None if says["site"] == "unknown" else says["site"]
            return self._target(says["layer"], kind)
        return self._target(layer, site)

    def _as_trained(self) -> contextlib.AbstractContextManager:
        """Autocast as in the last training forward."""
        if self._autocast is None:
            return contextlib.nullcontext()
        device, enabled, dtype = self._autocast
        return torch.autocast(device, dtype, enabled=enabled)

    def _swapped(self) -> None:
        """The new latents are checked as at the start of a run that goes on."""
        self.last_check = None

    def _place(self, target: Target) -> str:
        place = self._stack.places[self._targets.index(target)]
        module = f"{self._stack.name.rpartition('.')[0]}.{place.path}".lstrip(".")
        end = "input" if place.of_input else "output"
        return f"{target.plan.num_latents} latents on {target.site} (0-based), the {end} of {module}"

    def _mask(self, batch: Any) -> torch.Tensor:
        if isinstance(batch, torch.Tensor):
            return batch
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"batch is a {type(batch).__name__}; expected the mapping that the model is given, "
                "or a mask of the tokens that count"
            )
        if self._settings.tokens == "labels":
            if batch.get("labels") is None:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    'the batch has no labels; give a mask, or attach with tokens="all"',
                )
            return self._of_tokens("labels", batch) != -100
        if batch.get("attention_mask") is not None:
            if batch["attention_mask"].ndim != 2:
                fail(
                    _ffi.STATUS_SHAPE,
                    f"attention_mask has {batch['attention_mask'].ndim} dimensions and tells no "
                    "tokens; give a mask",
                )
            return self._of_tokens("attention_mask", batch) != 0
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)

    def _of_tokens(self, name: str, batch: Mapping[str, Any]) -> torch.Tensor:
        """Of a batch, what has a number for each of the decoder's tokens."""
        values, ids = batch[name], batch.get("input_ids")
        config = getattr(without_parallel(self._model), "config", None)
        of_encoder = getattr(config, "is_encoder_decoder", False)
        if ids is not None and values.shape != ids.shape and not of_encoder:
            fail(
                _ffi.STATUS_SHAPE,
                f"{name} has the shape {list(values.shape)}; expected {list(ids.shape)}, as input_ids",
            )
        return values

    def _held(self, hidden: Sequence[torch.Tensor], mask: torch.Tensor) -> list[Held]:
        for h in hidden:
            if self._ranks.tensor_group is None:
                self._ranks.tensor_group = group_of(h)
        pairs = zip(self._targets, hidden, strict=True)
        return [self._hold(target, h, mask) for target, h in pairs]

    def _hold(self, target: Target, hidden: torch.Tensor, mask: torch.Tensor) -> Held:
        return held(target.plan, hidden, mask.shape, self._ranks.tensor_group)

    def _references(self, forward: Forward, batch: Any, mask: torch.Tensor) -> References:
        hold = lambda target, hidden: self._hold(target, hidden, mask)
        with torch.no_grad(), self._recorder.paused():
            return self._source.references(forward, batch, self._targets, hold)

    def _check(
        self,
        forward: Forward,
        held: Sequence[Held],
        references: Sequence[torch.Tensor],
        mask: torch.Tensor,
    ) -> Check:
        bound, must_hold = self._settings.tolerance, self._source.checked
        found = compare(self._targets, held, references, mask, "tuned")
        # All ranks or none run another pass, now and with the next penalty: layers may be sharded.
        own = torch.tensor([float(found.difference > bound), float(found.tokens)])
        differs, tokens = self._ranks.all_reduce(own).tolist()
        if differs:
            with self._recorder.paused():
                stand_in = self._source.stand_in(forward)
            if stand_in is not None:
                held = self._held(stand_in, mask)
                found = compare(self._targets, held, references, mask, "adapters off")
            elif self._steps:
                # Trained weights differ from the copy's, and nothing can stand in for them.
                must_hold = False
        log.info("blockem: self-check: %s", found)
        if must_hold and found.difference > bound:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"the self-check failed: {found}; more than the tolerance of {bound:g}. "
                f"{self._source.remedy}",
            )
        if tokens:
            self.last_check = found
        return found

    def _measure(self, model: nn.Module, batch: Mapping[str, Any], totals: dict) -> None:
        items = (batch["labels"][..., 1:] != -100).sum().item()
        with self._recorder.forced():
            loss = model(**batch).loss
        forward = self._recorder.take()
        with self._recorder.paused(), self._source.adapters_off():
            base_loss = model(**batch).loss
        if items:
            totals["tuned"] += loss.item() * items
            totals["base"] += base_loss.item() * items
        totals["items"] += items
        mask = self._mask(batch)
        held = self._held(forward.hidden, mask)
        references, _ = self._references(forward, batch, mask)
        for i, (target, one, reference) in enumerate(
            zip(self._targets, held, references, strict=True)
        ):
            parts = target.parts(one, reference, mask)
            factor = self._mean_factor(target)
            totals["penalty"] += parts.loss_sum.item() * factor
            totals["count"] += parts.count.item() if i == 0 else 0.0

    def _lambda(self, target: Target, like: torch.Tensor) -> torch.Tensor | float:
        lam = target.lam.value
        if isinstance(lam, torch.Tensor):
            lam = lam.to(like.device, like.dtype)
        return lam * self._mean_factor(target)

    def _mean_factor(self, target: Target) -> float:
        return 1.0 / target.plan.num_latents if self._settings.reduction == "mean" else 1.0

    def _factor(self) -> torch.Tensor | float | None:
        """What a term is multiplied by; None before begin_step."""
        if self._count is None:
            return None
        averaged = self._ranks.world if self._settings.gradients == "mean" else self._ranks.copies()
        return averaged / self._count_of_all()

    def _count_of_all(self) -> torch.Tensor | float:
        """The step's count as the sum over process_group has it."""
        return self._count if self._counted_by_all else self._count * self._ranks.copies()

    def _expect_tokens(self) -> None:
        if int(self._empty_steps):
            self._empty_steps = 0
            fail(_ffi.STATUS_INVALID_ARGUMENT, _NO_TOKENS)

    def _expect_gradient(self, target: Target, hidden: torch.Tensor) -> None:
        if not hidden.requires_grad:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"{target.site} needs no gradient, so the penalty trains nothing: no trained "
                f"parameter lies at or below it, or {_REENTRANT[target.site.kind in BOUNDARIES]}",
            )


@dataclass
class _Settings:
    reduction: str
    tokens: str
    gradients: str
    tolerance: float
    diagnostics: bool


def _share(mask: torch.Tensor) -> torch.Tensor:
    """What each token counts, float64."""
    return mask.double() if mask.is_floating_point() else (mask != 0).double()


#: What gradient checkpointing must be told, by whether a boundary of blocks is read.
_REENTRANT = {
    True: "reentrant gradient checkpointing needs model.enable_input_require_grads()",
    False: "gradient checkpointing must not be reentrant: what is inside of a block has no gradient "
    'then (gradient_checkpointing_kwargs={"use_reentrant": False})',
}

_NO_TOKENS = (
    "no token of a whole step counts: every label is -100 or every token is hidden; look at the "
    "chat template's assistant mask, the truncation and the collator"
)
