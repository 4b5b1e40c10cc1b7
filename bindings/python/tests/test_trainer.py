"""transformers.Trainer and SFTTrainer with the penalty, against autograd in the same trainer."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import peft
import pytest
import tiny
import torch
import transformers
import trl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import Dictionary
from tokenizers import Tokenizer, models, pre_tokenizers

from blockem.torch import DualAscent
from blockem.torch.trainer import PenaltyMixin

DICTIONARY = Dictionary()
LAM = 0.05
LORA = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


class BlockedTrainer(PenaltyMixin, transformers.Trainer):
    pass


class BlockedSFTTrainer(PenaltyMixin, trl.SFTTrainer):
    pass


class Autograd:
    """The penalty by autograd in a trainer: sums per micro-batch, the step's count beforehand."""

    def __init__(self, *args: object, lam: float, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.lam, self.sums, self.count, self.trajectory = lam, [], 0, []

    def get_batch_samples(self, *args: object) -> tuple:
        found, items = super().get_batch_samples(*args)
        if self.count:
            self.trajectory.append(sum(self.sums) / self.count)
        self.sums, self.count = [], sum((b["labels"] != -100).sum().item() for b in found)
        return found, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # SFTTrainer runs the model so; with packed rows a cache would change attention.
        batch = {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False}
        mask = inputs["labels"] != -100
        loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        with torch.no_grad(), model.disable_adapter():
            base = tiny.hidden_states(model, batch)
        loss_sum = DICTIONARY.loss_sum(tiny.hidden_states(model, batch), base, mask)
        self.sums.append(loss_sum.item())
        share = 1 if self.model_accepts_loss_kwargs else self.args.gradient_accumulation_steps
        return loss + share * self.lam * loss_sum / self.count


class AutogradTrainer(Autograd, transformers.Trainer):
    pass


class AutogradSFTTrainer(Autograd, trl.SFTTrainer):
    pass


def rows(count: int = 24, seed: int = 7) -> datasets.Dataset:
    """Ragged rows with a prompt, as token ids."""
    found = []
    for batch in tiny.batches(count, seed=seed, size=1):
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        found.append({"input_ids": ids, "labels": labels})
    return datasets.Dataset.from_list(found)


def collate(found: list[dict]) -> dict[str, torch.Tensor]:
    pad = lambda key, value: torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row[key]) for row in found], batch_first=True, padding_value=value)
    ids = pad("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": pad("labels", -100)}


def settings(folder: Path, **more: object) -> dict:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3, "max_steps": 6, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "seed": 3, "optim": "sgd", "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant", "learning_rate": 0.1, "disable_tqdm": True,
    } | more


def trainer(
    kind: type, folder: Path, args: dict | None = None, model: torch.nn.Module | None = None,
    **more: object,
):
    return kind(
        model or tiny.with_lora(tiny.llama()), train_dataset=rows(), data_collator=collate,
        args=transformers.TrainingArguments(**settings(folder, **(args or {}))), **more)


def logged(trainer: transformers.Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry and name in entry]


@pytest.mark.parametrize("mean_of_means", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_follows_autograd(tmp_path: Path, checkpointing: bool, mean_of_means: bool) -> None:
    """Also where the trainer divides by the number of micro-batches, as for models that take no
    num_items_in_batch."""
    args = {"gradient_checkpointing": checkpointing}
    reference = trainer(AutogradTrainer, tmp_path, args=args, lam=LAM)
    penalty = dict(plan=DICTIONARY.plan, lam=LAM)
    blocked = trainer(BlockedTrainer, tmp_path, args=args, penalty=penalty)
    for one in (reference, blocked):
        one.model_accepts_loss_kwargs = not mean_of_means
        one.train()
    want, found = reference.trajectory, logged(blocked, "blockem/penalty")
    assert found[0] == 0 and max(want) > 1e-4 and len(found) == 6
    assert found[: len(want)] == pytest.approx(want, rel=2e-4, abs=1e-8)
    assert logged(blocked, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-4)
    for (name, one), other in zip(reference.model.named_parameters(), blocked.model.parameters()):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5, msg=name)
    assert blocked.penalty.last_check.compared == "tuned"
    assert {"blockem/penalty_pos", "blockem/active", "blockem/dead_neg", "blockem/lambda"} <= set(
        blocked.state.log_history[0])


def sft(kind: type, folder: Path, args: dict | None = None, **more: object):
    torch.manual_seed(1)
    words = {f"w{i}": i for i in range(50)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2")
    text = [{"prompt": " ".join(f"w{i}" for i in row["input_ids"][:4]) + " ",
             "completion": " ".join(f"w{i}" for i in row["input_ids"][4:])} for row in rows()]
    # Its default, bfloat16, has too few bits for a comparison.
    config = settings(folder, max_length=32, bf16=False) | (args or {})
    return kind(
        tiny.llama(), args=trl.SFTConfig(**config),
        train_dataset=datasets.Dataset.from_list(text), peft_config=LORA,
        processing_class=tokenizer, **more)


@pytest.mark.parametrize("args", [
    {},
    {"packing": True, "packing_strategy": "wrapped"},
    {"packing": True, "packing_strategy": "bfd"},
    {"padding_free": True, "max_length": None},
])
def test_sft_trainer_follows_autograd(tmp_path: Path, args: dict) -> None:
    """With the adapters that SFTTrainer makes, its loss without logits, its collator; packed."""
    reference = sft(AutogradSFTTrainer, tmp_path, args, lam=LAM)
    blocked = sft(BlockedSFTTrainer, tmp_path, args, penalty=dict(plan=DICTIONARY.plan, lam=LAM))
    reference.train(), blocked.train()
    want, found = reference.trajectory, logged(blocked, "blockem/penalty")
    assert found[0] == 0 and max(want) > 1e-4 and len(want) >= 4
    assert found[: len(want)] == pytest.approx(want, rel=2e-4, abs=1e-8)


def test_a_resumed_trainer_continues_exactly(tmp_path: Path) -> None:
    def make(folder: Path):
        lam = DualAscent(1e-4, rate=20.0, initial=0.01)
        return trainer(BlockedTrainer, folder, penalty=dict(plan=DICTIONARY.plan, lam=lam),
                       args={"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"})

    whole, folder = make(tmp_path / "a"), tmp_path / "a" / "checkpoint-3"
    whole.train()
    resumed = make(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(folder))
    for name in ("blockem/penalty", "blockem/lambda", "loss"):
        assert logged(whole, name) == logged(resumed, name)
    assert len(set(logged(whole, "blockem/lambda"))) == 6
    assert json.loads((folder / "blockem.json").read_text())["steps"] == 3
    (folder / "blockem.json").unlink()
    with pytest.raises(FileNotFoundError, match="blockem.json"):
        make(tmp_path / "a").train(resume_from_checkpoint=str(folder))


def test_evaluation_and_cosine(tmp_path: Path) -> None:
    blocked = trainer(
        BlockedTrainer, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM), cosine_steps=2,
        args={"eval_strategy": "steps", "eval_steps": 2}, eval_dataset=rows(4, seed=1))
    blocked.train()
    cosines = logged(blocked, "blockem/cosine")
    assert len(cosines) == 3 and cosines[0] == 0 and all(0 < abs(c) <= 1 for c in cosines[1:])
    evaluated = [e for e in blocked.state.log_history if "eval_loss" in e]
    assert len(evaluated) == 3 and not any("blockem" in k for e in evaluated for k in e)


def test_callbacks_get_the_metrics(tmp_path: Path) -> None:
    seen = []

    class Board(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            seen.append(dict(logs))

    blocked = trainer(BlockedTrainer, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM),
                      callbacks=[Board()], args={"logging_steps": 3})
    blocked.train()
    assert ["blockem/penalty" in logs for logs in seen] == [True, True, False]


def test_tensorboard(tmp_path: Path) -> None:
    """A real event file has what the trainer logged, every latent on request."""
    blocked = trainer(
        BlockedTrainer, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM), cosine_steps=1,
        per_latent=True, args={"report_to": ["tensorboard"], "max_steps": 3})
    blocked.train()
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(files[0].parent)).Reload()
    names = ["penalty", "penalty_pos", "penalty_neg", "active", "dead_neg", "lambda", "cosine",
             *(f"latent/{id}" for id in DICTIONARY.ids)]
    for name in names:
        values = [event.value for event in events.Scalars(f"train/blockem/{name}")]
        assert values == pytest.approx(logged(blocked, f"blockem/{name}"), rel=1e-6)
        assert len(values) == 3
    latents = [sum(logged(blocked, f"blockem/latent/{id}")) for id in DICTIONARY.ids]
    assert sum(latents) == pytest.approx(sum(logged(blocked, "blockem/penalty"))) and min(latents) >= 0


def test_what_splits_the_model_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transformers.Trainer, "get_cp_size", lambda self: 2)
    with pytest.raises(ValueError, match="does not know context parallelism"):
        trainer(BlockedTrainer, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM))


def test_a_model_that_train_makes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not know model_init"):
        BlockedTrainer(
            model_init=lambda: tiny.with_lora(tiny.llama()), train_dataset=rows(),
            args=transformers.TrainingArguments(**settings(tmp_path)),
            penalty=dict(plan=DICTIONARY.plan, lam=LAM))


def test_a_forward_that_ran_out_of_memory_is_forgotten(tmp_path: Path) -> None:
    """auto_find_batch_size begins again with smaller batches."""
    model, sizes = tiny.with_lora(tiny.llama()), []

    def head(module: torch.nn.Module, args: tuple) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    model.get_base_model().lm_head.register_forward_pre_hook(head)
    blocked = trainer(
        BlockedTrainer, tmp_path, model=model, penalty=dict(plan=DICTIONARY.plan, lam=LAM),
        args={"auto_find_batch_size": True, "gradient_accumulation_steps": 1})
    blocked.train()
    assert sizes == [2, *[1] * 6] and len(logged(blocked, "blockem/penalty")) == 6


def test_a_step_without_tokens(tmp_path: Path) -> None:
    blocked = trainer(BlockedTrainer, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM))
    blocked.data_collator = lambda found: (batch := collate(found)) | {
        "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match="no token of a whole step counts"):
        blocked.train()
