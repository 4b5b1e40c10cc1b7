"""TRL's trainers of preferences and rewards with the penalty, against autograd in the same trainer."""

from __future__ import annotations

import gc
import math
from pathlib import Path

import datasets
import peft
import pytest
import test_trainer
import tiny
import torch
import transformers
import trl
from tiny import Dictionary
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from blockem.torch import DualAscent
from blockem.torch.trainer import PenaltyMixin

DICTIONARY = Dictionary()
LAM = 0.05
EOS = 2
# Prompts and completions have words of their own, by which a mask is made without the trainer's.
PROMPT, COMPLETION = range(5, 25), range(25, 50)
# Trainers collect garbage when they begin; what was imported is none.
gc.freeze()


def lora(task: str = "CAUSAL_LM", fresh: bool = False) -> peft.LoraConfig:
    """Adapters that have moved the model already, or have not."""
    return peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=fresh, task_type=task,
                           target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"w{i:02}": i for i in range(50)}
    made = Tokenizer(models.WordLevel(words, unk_token="w03"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w00", bos_token="w01", eos_token="w02",
        chat_template=CHAT)


def text(words: range, low: int, high: int, generator: torch.Generator) -> str:
    length = torch.randint(low, high, (), generator=generator)
    ids = torch.randint(words.start, words.stop, (length,), generator=generator)
    return "".join(f"w{i:02} " for i in ids.tolist())


def rows(*columns: str, count: int = 24) -> datasets.Dataset:
    generator, found = torch.Generator().manual_seed(4), []
    for row in range(count):
        texts = {"prompt": text(PROMPT, 2, 6, generator)}
        for column in columns:
            texts[column] = text(COMPLETION, 2, 9, generator)
        # Runs of one kind: steps and micro-batches without a chosen completion.
        found.append(texts | ({"label": row % 3 == 0} if "completion" in columns else {}))
    return datasets.Dataset.from_list(found)


def conversations() -> datasets.Dataset:
    """Two turns each."""
    generator, found = torch.Generator().manual_seed(4), []
    for _ in range(24):
        turns = [{"role": role, "content": text(words, 2, 6, generator)}
                 for role, words in [("user", PROMPT), ("assistant", COMPLETION)] * 2]
        found.append({"messages": turns})
    return datasets.Dataset.from_list(found)


CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] | trim }}{% endgeneration %} {% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def is_completion(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """bool [B, T], of rows without generated tokens: their words, and what ends them."""
    ids, shown = batch["input_ids"], batch["attention_mask"] != 0
    return ((ids >= COMPLETION.start) | (ids == EOS)) & shown


class Reference(transformers.TrainerCallback):
    """Adds the penalty's gradients before the optimizer's step, when the step's count is known."""

    def __init__(self, trainer: Autograd) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        count = max(trainer.count, 1)
        for parameter, grad in zip(trainer.trained(), trainer.penalty_grads):
            parameter.grad += trainer.lam * grad / count
        trainer.trajectory.append(trainer.loss_sum / count)
        trainer.forget()


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.found: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


class Autograd:
    """The penalty by autograd, on hidden states of a forward of its own: sums over micro-batches."""

    def __init__(self, *args: object, lam: float, chosen: bool = False, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.lam, self.chosen, self.trajectory = lam, chosen, []
        self.forget()
        self.add_callback(Reference(self))

    def forget(self) -> None:
        self.loss_sum, self.count = 0.0, 0
        self.penalty_grads = [torch.zeros_like(p) for p in self.trained()]

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(
            model, dict(inputs), return_outputs=return_outputs,
            num_items_in_batch=num_items_in_batch)
        if model.training:
            batch, mask = self.seen(inputs)
            with torch.no_grad(), model.disable_adapter():
                base = self.hidden(model, batch)
            loss_sum = DICTIONARY.loss_sum(self.hidden(model, batch), base, mask)
            grads = torch.autograd.grad(loss_sum, self.trained(), allow_unused=True)
            for total, grad in zip(self.penalty_grads, grads, strict=True):
                total += 0 if grad is None else grad
            self.loss_sum, self.count = self.loss_sum + loss_sum.item(), self.count + mask.sum().item()
        return loss

    def hidden(self, model: torch.nn.Module, batch: dict) -> torch.Tensor:
        found = model.get_base_model().model(**batch, output_hidden_states=True, use_cache=False)
        return found.hidden_states[tiny.LAYER + 1]

    def seen(self, inputs: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """What the model is given, and the tokens that count."""
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        mask = is_completion(batch)
        if self.chosen:
            first = torch.arange(len(mask)) < len(mask) // 2
            mask = mask & torch.as_tensor(inputs.get("label", first)).bool()[:, None]
        return batch, mask


class AutogradConcatenated(Autograd):
    def seen(self, inputs: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        parts = {"input_ids": [], "attention_mask": []}
        for name, found in parts.items():
            for kind in ("chosen", "rejected"):
                found += list(inputs[f"{kind}_{name}"])
        pad = torch.nn.utils.rnn.pad_sequence
        return super().seen({k: pad(v, batch_first=True) for k, v in parts.items()} | inputs)


class AutogradGenerated(Autograd):
    def seen(self, inputs: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        width = inputs["prompt_ids"].shape[1]
        made, is_end = torch.arange(ids.shape[1]) >= width, ids == EOS
        # Of what was made, all up to its end; of prompts, all but the padding on the left.
        ended = (is_end & made).cumsum(1) - (is_end & made).long() > 0
        cut = (made & ~is_end).sum(1) == ids.shape[1] - width
        if getattr(self.args, "mask_truncated_completions", False):
            ended = ended | (made & cut[:, None])
        mask = made & ~ended
        shown = mask | (~made & (ids != 0))
        return {"input_ids": ids, "attention_mask": shown.long()}, mask


class AutogradReward(Autograd):
    def seen(self, inputs: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return batch, batch["attention_mask"] != 0


def late(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """A reward for words late in the vocabulary."""
    return [sum(ids) / len(ids) for ids in completion_ids]


PAIRS, GENERATION = ("chosen", "rejected"), {
    "num_generations": 2, "max_completion_length": 6, "temperature": 1.0}
KINDS: dict[str, dict] = {
    "SFT": dict(trainer=trl.SFTTrainer, config=trl.SFTConfig,
                rows=lambda: rows("completion").remove_columns("label")),
    "SFT, chat": dict(trainer=trl.SFTTrainer, config=trl.SFTConfig, rows=conversations,
                      args={"assistant_only_loss": True}),
    "DPO": dict(trainer=trl.DPOTrainer, config=trl.DPOConfig, columns=PAIRS),
    "KTO": dict(trainer=trl.KTOTrainer, config=trl.KTOConfig, columns=("completion",)),
    "CPO": dict(trainer=CPOTrainer, config=CPOConfig, columns=PAIRS,
                autograd=AutogradConcatenated),
    "ORPO": dict(trainer=ORPOTrainer, config=ORPOConfig, columns=PAIRS,
                 autograd=AutogradConcatenated),
    "GRPO": dict(trainer=trl.GRPOTrainer, config=trl.GRPOConfig, args=GENERATION,
                 autograd=AutogradGenerated, more={"reward_funcs": late}),
    "GMPO": dict(trainer=GMPOTrainer, config=GMPOConfig, args=GENERATION,
                 autograd=AutogradGenerated, more={"reward_funcs": late}),
    "RLOO": dict(trainer=trl.RLOOTrainer, config=trl.RLOOConfig, args=GENERATION,
                 autograd=AutogradGenerated, more={"reward_funcs": late}),
    "Distillation": dict(trainer=trl.DistillationTrainer, config=trl.DistillationConfig,
                         args={"max_completion_length": 6}, autograd=AutogradGenerated),
    "Reward": dict(trainer=trl.RewardTrainer, config=trl.RewardConfig, columns=PAIRS,
                   autograd=AutogradReward, task="SEQ_CLS"),
}


def made(
    name: str, blocked: bool, folder: Path, args: dict, fresh: bool = False, wrapped: bool = False,
    **more: object,
):
    kind = KINDS[name]
    base = kind["trainer"]
    before = PenaltyMixin if blocked else kind.get("autograd", Autograd)
    own = type("Own", (before, base), {})
    settings = test_trainer.settings(
        folder, bf16=False, max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, gradient_checkpointing=False) | kind.get("args", {}) | args
    task = kind.get("task", "CAUSAL_LM")
    model = tiny.llama()
    if task == "SEQ_CLS":
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**model.config.to_dict() | {"num_labels": 1}))
    if name == "Distillation":
        more["teacher_model"] = tiny.llama(seed=5)
    torch.manual_seed(1)
    adapters = {"peft_config": lora(task, fresh)}
    if wrapped:
        model, adapters = peft.get_peft_model(model, lora(task, fresh)), {}
    return own(
        model, args=kind["config"](**settings), processing_class=tokenizer(),
        train_dataset=kind["rows"]() if "rows" in kind else rows(*kind.get("columns", ())),
        **adapters, **kind.get("more", {}), **more)


def compare(
    name: str, folder: Path, args: dict, chosen: bool = False, wrapped: bool = False,
    **penalty: object,
) -> None:
    """Losses, penalties, gradients of every step and the weights after them."""
    # Reentrant checkpointing gives no gradients to autograd.grad.
    plain = {key: value for key, value in args.items() if "checkpointing" not in key}
    reference = made(name, False, folder, plain, lam=LAM, chosen=chosen, wrapped=wrapped)
    options = {"completions": "chosen"} if chosen else {}
    blocked = made(name, True, folder, args, wrapped=wrapped,
                   penalty=dict(plan=DICTIONARY.plan, lam=LAM, **penalty), **options)
    gradients = Gradients(), Gradients()
    for one, keeps in zip((reference, blocked), gradients):
        one.add_callback(keeps)
        # For what they sample.
        torch.manual_seed(6)
        one.train()
    want, found = reference.trajectory, test_trainer.logged(blocked, "blockem/penalty")
    assert len(want) == len(found) == blocked.state.max_steps and min(want) > 1e-3
    assert found == pytest.approx(want, rel=2e-4)
    losses = [test_trainer.logged(one, "loss") for one in (reference, blocked)]
    assert losses[1] == pytest.approx(
        [task + LAM * penalty for task, penalty in zip(losses[0], want)], rel=1e-3, abs=2e-4)
    for step in zip(gradients[0].found, gradients[1].found, strict=True):
        for one, other in zip(*step, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
    weights = [dict(one.model.named_parameters()) for one in (reference, blocked)]
    for parameter, one in weights[0].items():
        torch.testing.assert_close(
            weights[1][parameter], one, rtol=1e-3, atol=1e-5, msg=lambda m: f"{parameter}: {m}")


@pytest.mark.parametrize("name, args", [
    ("SFT", {}),
    ("SFT, chat", {}),
    ("DPO", {}),
    ("DPO", {"precompute_ref_log_probs": True, "gradient_checkpointing": True,
             "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "ld_alpha": 0.5}),
    ("KTO", {}),
    ("CPO", {}),
    ("ORPO", {}),
    # DAPO's loss is divided by the tokens of a step, the others' by its micro-batches.
    ("GRPO", {"loss_type": "dapo"}),
    ("GRPO", {"loss_type": "grpo", "beta": 0.1, "gradient_checkpointing": True,
              "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("GRPO", {"loss_type": "bnpo", "num_iterations": 2, "steps_per_generation": 3,
              "max_steps": 4}),
    ("GRPO", {"loss_type": "dr_grpo", "steps_per_generation": 1, "gradient_accumulation_steps": 3}),
    ("RLOO", {"beta": 0.1}),
    ("GMPO", {}),
    ("Distillation", {}),
])
def test_a_trainer_of_completions_follows_autograd(tmp_path: Path, name: str, args: dict) -> None:
    compare(name, tmp_path, args)


@pytest.mark.parametrize("name, args", [("DPO", {}), ("KTO", {}), ("GRPO", {"beta": 0.1})])
def test_the_reference_of_the_penalty_is_not_the_policys(
    tmp_path: Path, name: str, args: dict
) -> None:
    """Of a PeftModel that it is given TRL keeps the adapters in a second one, for its own reference;
    the penalty's is the model without any, or with those, as it is told."""
    compare(name, tmp_path, args, wrapped=True, base_adapters=[])
    penalty = dict(plan=DICTIONARY.plan, lam=LAM)
    blocked = made(name, True, tmp_path, args, wrapped=True,
                   penalty=penalty | {"base_adapters": ["ref"]})
    blocked.train()
    found = test_trainer.logged(blocked, "blockem/penalty")
    assert found[0] == 0 < found[1]
    with pytest.raises(ValueError, match="say which belong to its base"):
        made(name, True, tmp_path, args, wrapped=True, penalty=penalty)


@pytest.mark.parametrize("name", ["DPO", "KTO", "CPO", "ORPO"])
def test_the_chosen_completions_alone_may_count(tmp_path: Path, name: str) -> None:
    compare(name, tmp_path, {}, chosen=True)


def test_a_reward_model_has_the_penalty_on_all_its_tokens(tmp_path: Path) -> None:
    compare("Reward", tmp_path, {}, tokens="all")
    with pytest.raises(ValueError, match='RewardTrainer.*tokens="all"'):
        made("Reward", True, tmp_path, {}, penalty=dict(plan=DICTIONARY.plan, lam=LAM))


def test_truncated_completions_that_are_masked_do_not_count(tmp_path: Path) -> None:
    compare("GRPO", tmp_path, {"mask_truncated_completions": True, "max_completion_length": 12})


def test_a_step_without_a_completion_pays_nothing_and_moves_no_lambda(tmp_path: Path) -> None:
    """Every completion of two words is truncated, and masked."""
    lam = DualAscent(1e-4, rate=20.0, initial=0.25)
    args = {"mask_truncated_completions": True, "max_completion_length": 2}
    blocked = made("GRPO", True, tmp_path, args, penalty=dict(plan=DICTIONARY.plan, lam=lam))
    blocked.train()
    assert test_trainer.logged(blocked, "loss") == [0, 0]
    assert test_trainer.logged(blocked, "blockem/lambda") == [0.25] * 2
    assert all(math.isnan(x) for x in test_trainer.logged(blocked, "blockem/penalty"))


def test_the_penalty_of_a_fresh_adapter_is_nothing_in_every_trainer(tmp_path: Path) -> None:
    for name in ("DPO", "KTO", "GRPO"):
        blocked = made(name, True, tmp_path, {}, fresh=True,
                       penalty=dict(plan=DICTIONARY.plan, lam=LAM))
        blocked.train()
        found = test_trainer.logged(blocked, "blockem/penalty")
        assert found[0] == 0 < found[1], name
        assert blocked.penalty.last_check.compared == "tuned"


def test_what_a_trainer_does_not_have_is_refused(tmp_path: Path) -> None:
    penalty = dict(plan=DICTIONARY.plan, lam=LAM)
    with pytest.raises(ValueError, match="GRPOTrainer has no rejected completions"):
        made("GRPO", True, tmp_path, {}, penalty=penalty, completions="chosen")
    with pytest.raises(ValueError, match="completions is 'rejected'; expected one of 'all', 'chos"):
        made("DPO", True, tmp_path, {}, penalty=penalty, completions="rejected")
    with pytest.raises(ValueError, match="which tokens OnlineDPOTrainer trains; it knows TRL's CPO"):
        type("Own", (PenaltyMixin, OnlineDPOTrainer), {})(penalty=penalty)


def test_a_trainer_whose_batches_change_after_they_were_counted_is_refused(tmp_path: Path) -> None:
    """Its penalties would be divided by the wrong count."""
    class Changing(PenaltyMixin, transformers.Trainer):
        def training_step(self, model, inputs, *args):
            inputs["labels"][:, -1] = -100
            return super().training_step(model, inputs, *args)

    class Silent(PenaltyMixin, transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return transformers.Trainer.compute_loss(self, model, inputs, *args, **kwargs)

    class Own(PenaltyMixin, transformers.Trainer):
        def training_step(self, model, inputs, *args):
            loss = model(**inputs).loss
            loss.backward()
            self.penalty.discard()
            return loss.detach()

    for kind in (Changing, Own):
        blocked = test_trainer.trainer(kind, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM))
        with pytest.raises(ValueError, match=f"whose penalty {kind.__name__} took are not those"):
            blocked.train()
    # A second forward without the first one's penalty.
    blocked = test_trainer.trainer(Silent, tmp_path, penalty=dict(plan=DICTIONARY.plan, lam=LAM))
    with pytest.raises(ValueError, match="the penalty of the training forward before was not taken"):
        blocked.train()
