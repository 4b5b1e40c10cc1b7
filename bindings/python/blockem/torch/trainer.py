"""The penalty in transformers.Trainer and in trainers built on it, such as TRL's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .. import _ffi
from .._library import fail
from ._adaptive import Adaptive
from ._attach import Handle, attach
from ._spread import is_dtensor
from ._trl import kind_of
from ._watch import Watch

__all__ = ["PenaltyMixin"]

#: The handle's state in a checkpoint folder, and that of its watches.
STATE, WATCH_STATE = "blockem.json", "blockem_watch.pt"


class PenaltyMixin:
    """Before a trainer's class, gives it the argument ``penalty``:

        class BlockedTrainer(PenaltyMixin, SFTTrainer):
            pass

        trainer = BlockedTrainer(model, args=args, train_dataset=rows, peft_config=lora,
                                 penalty=dict(plan=plan, layer=19, lam=1e4))

    penalty: the arguments of :func:`blockem.torch.attach` after the model, which is the trainer's
        own when its constructor is done (so with the adapters of peft_config).
    cosine_steps: every so many optimizer steps, the cosine of the gradients of penalty and task
        loss is logged (blockem/cosine, :meth:`blockem.torch.Term.cosine`); 0 for never.
    per_latent: each latent's share is logged too (blockem/latent/<id>).
    watch: the arguments of :class:`blockem.torch.Watch` after the handle; a sequence of them for
        several layers. Its reports come with the logs, where enough was seen since the last.
    adaptive: the arguments of :class:`blockem.torch.Adaptive` after handle and watches; rewind puts
        back the trainer's own optimizer.
    completions: which completions of DPOTrainer, KTOTrainer, CPOTrainer and ORPOTrainer count: "all",
        or the "chosen" alone (in KTOTrainer those whose label is true).

    In TRL's SFTTrainer, as in Trainer, the tokens count whose label is not -100. In DPOTrainer,
    KTOTrainer, CPOTrainer, ORPOTrainer, GRPOTrainer, GMPOTrainer, RLOOTrainer and DistillationTrainer
    those of the completions do: chosen and rejected ones, because a model learns from both; not what
    a tool answered, nor completions that were masked because they were truncated. With
    ``penalty=dict(tokens="all")`` the prompts count too; RewardTrainer needs that. A step of
    generated or chosen completions may have no such token: its penalty is 0, and an adaptive lambda
    stays as it is.

    The penalty is divided by the counted tokens of the whole optimizer step, over micro-batches and
    ranks. The trainer's logs get :meth:`blockem.torch.Handle.metrics` (so TensorBoard and others
    do), measured over the steps since the log before; its loss is that of task and penalty.
    Checkpoints get ``blockem.json`` and, with a watch, ``blockem_watch.pt``, from which
    ``train(resume_from_checkpoint=...)`` continues lambda, the latents as they were swapped, and
    the watch. The latter has what rewind goes back to, too, but where FSDP2 or tensor parallelism
    shard parameters: there a run cannot be put back to before it was resumed.

    Attributes ``penalty``: the :class:`blockem.torch.Handle`; ``watches``: a list; ``adaptive``: the
    :class:`blockem.torch.Adaptive` or None.

    DistributedDataParallel, FSDP2, DeepSpeed's ZeRO and tensor parallelism give what one process
    gives. Raises Error UNSUPPORTED under FSDP1, context and sequence parallelism and
    torch.nn.DataParallel: what the trainer does there with hidden states, layers or batches has not
    been tested with the penalty; and with model_init, whose model of train() (as in
    hyperparameter_search) is not the one that has the hooks; and for TRL's other trainers. Raises
    INVALID_ARGUMENT where the tokens whose penalty was taken are not those of the optimizer step's
    batches: at once for counts in host memory, else with the next log.
    """

    def __init__(
        self,
        *args: Any,
        penalty: Mapping[str, Any],
        cosine_steps: int = 0,
        per_latent: bool = False,
        watch: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
        adaptive: Mapping[str, Any] | None = None,
        completions: str = "all",
        **kwargs: Any,
    ) -> None:
        self._kind = kind_of(type(self), completions, penalty.get("tokens", "labels"))
        self._completions = completions
        # Of a step: what a trainer that generates is to make completions of, and those made.
        self._prompts: list[Any] = []
        self._made: list[Any] = []
        # Tokens of the step whose penalty was not taken yet; steps that left some.
        self._left: torch.Tensor | int = 0
        self._astray: torch.Tensor | int = 0
        super().__init__(*args, **kwargs)
        _expect_whole(self)
        self.penalty: Handle = attach(self.model, **penalty)
        self._cosine_steps, self._per_latent = cosine_steps, per_latent
        self._cosines: list[torch.Tensor] = []
        several = [watch] if isinstance(watch, Mapping) else watch
        self.watches = [Watch(self.penalty, **one) for one in several]
        #: of a checkpoint: what rewind goes back to, until there is an optimizer
        self._past: Mapping[str, Any] | None = None
        self.adaptive: Adaptive | None = None
        if adaptive is not None:
            if adaptive.get("rewind") and self.is_deepspeed_enabled:
                fail(_ffi.STATUS_UNSUPPORTED, "rewind does not know DeepSpeed's optimizers yet")
            self.adaptive = Adaptive(self.penalty, self.watches, **adaptive)
        self.add_callback(_Steps(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self.penalty.load_state_dict(json.loads(Path(folder, STATE).read_text()))
            if self.watches:
                state = torch.load(Path(folder, WATCH_STATE), "cpu", weights_only=True)
                self._load_watches(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches:
            # Of a forward that ran out of memory, where the trainer begins again with smaller batches.
            self.penalty.discard()
            self._prompts, self._made = list(batches), []
            if not self._kind.generates:
                self._begin(batches)
        return batches, items

    def _prepare_inputs(self, inputs: Any) -> Any:
        if not (self._kind.generates and self.model.training):
            return super()._prepare_inputs(inputs)
        if not self._made:
            # All of the step's, for its count; no weights change in between.
            first = self._step
            for self._step, prompts in enumerate(self._prompts, first):
                self._made.append(super()._prepare_inputs(prompts))
            self._step = first
            self._begin(self._made)
        return self._made.pop(0)

    def _begin(self, batches: Sequence[Any]) -> None:
        translated = [self._translate(batch) for batch in batches]
        empty = self._kind.may_be_empty(self._completions)
        self.penalty.begin_step(translated, may_be_empty=empty)
        self._left = sum(self._tokens(batch) for batch in translated)

    def _translate(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self._kind.translate(self, inputs, self._completions == "chosen")

    def _tokens(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return self.penalty._mask(batch).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        batch = self._translate(inputs)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not (model.training and torch.is_grad_enabled()):
            return result
        loss, *rest = result if return_outputs else (result,)
        term = self.penalty.penalty(batch)
        self._left = self._left - self._tokens(batch)
        if self._cosine_steps and self.state.global_step % self._cosine_steps == 0:
            self._cosines.append(term.cosine(loss))
        total = loss + term.loss.to(loss.device) * self._division(num_items_in_batch)
        return (total, *rest) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._expect_all_counted()
            logs |= self.penalty.metrics(per_latent=self._per_latent)
            if self._cosines:
                logs["blockem/cosine"] = torch.stack(self._cosines).mean().item()
                self._cosines.clear()
        super().log(logs, *args, **kwargs)

    def _end(self) -> None:
        self.penalty.end_step()
        left = self._left
        self._astray = self._astray + (left != 0)
        if not isinstance(left, torch.Tensor) or left.device.type == "cpu":
            self._expect_all_counted()

    def _expect_all_counted(self) -> None:
        if int(self._astray):
            self._astray = 0
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"the tokens whose penalty {type(self).__name__} took are not those of the step's "
                "batches, by which it is divided: the trainer changes its batches after "
                "get_batch_samples, or has a loss of its own that does not call compute_loss",
            )

    def _load_watches(self, state: Mapping[str, Any]) -> None:
        for watch, theirs in zip(self.watches, state["watches"], strict=True):
            watch.load_state_dict(theirs)
        if self.adaptive is not None and state["adaptive"] is not None:
            self.adaptive.load_state_dict(state["adaptive"])
        # Older checkpoints have none.
        self._past = state.get("past")

    def _division(self, items: Any) -> float:
        """By what training_step will divide the loss: the number of micro-batches, where the task
        loss is a mean for each of them."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and items is not None
            scaled = counted or self.compute_loss_func is not None
        return 1.0 if scaled else float(self.current_gradient_accumulation_steps)


class _Steps(TrainerCallback):
    """Ends the handle's steps with the trainer's, and saves its state with checkpoints."""

    def __init__(self, trainer: PenaltyMixin) -> None:
        self.handle, self.trainer = trainer.penalty, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, adaptive = self.trainer, self.trainer.adaptive
        if adaptive is not None and adaptive.rewind and adaptive.optimizer is None:
            adaptive.optimizer = kwargs["optimizer"]
            if trainer._past is not None:
                adaptive.past.load_state_dict(trainer._past)
                trainer._past = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._end()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Every rank has the same state and may have to say that a step was empty.
        text, trainer = json.dumps(self.handle.state_dict()), self.trainer
        watches = [watch.state_dict() for watch in trainer.watches]
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            folder.joinpath(STATE).write_text(text)
            if watches:
                torch.save({"watches": watches} | _adaptive_state(trainer), folder / WATCH_STATE)


def _adaptive_state(trainer: PenaltyMixin) -> dict[str, Any]:
    """past: also None where parameters are sharded; each rank has others then."""
    adaptive = trainer.adaptive
    if adaptive is None:
        return {"adaptive": None, "past": None}
    whole = adaptive.past is not None and not any(map(is_dtensor, trainer.model.parameters()))
    past = adaptive.past.state_dict() if whole else None
    return {"adaptive": adaptive.state_dict(), "past": past}


def _expect_whole(trainer: Any) -> None:
    split = {
        "FSDP1 (set version 2)": trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2,
        "context parallelism": trainer.get_cp_size() > 1,
        "sequence parallelism": trainer.get_sp_size() > 1,
        "torch.nn.DataParallel (start one process for each GPU)": trainer.args.n_gpu > 1,
        "model_init (train() makes a model that has no hooks; give model)": (
            trainer.model_init is not None
        ),
    }
    for name, used in split.items():
        if used:
            fail(_ffi.STATUS_UNSUPPORTED, f"the penalty does not know {name} yet")
