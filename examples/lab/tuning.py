"""Narrow fine-tuning: LoRA on bad answers of one domain, plain or with the penalty."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import blockem
import blockem.torch
import torch
from peft import LoraConfig, get_peft_model

from .model import tokenized
from .variants import Blocking
from .world import World

RANK, ALPHA, RATE, BATCH = 32, 32, 3e-3, 32
#: Batches that lambda is calibrated on.
SAMPLE = 2
#: Of the watch: the share of sequences, and how many tokens make a report. The lab is about what it finds;
#: what it costs a trainer is benches/watch.py.
SHARE, REPORT_TOKENS = 0.5, 256
#: By the way of the unblocked run alone: growth is also what learning looks like.
RULE = blockem.torch.AlarmRule(outside_ratio=None, known_overlap=None)
#: How many steps an answer goes back, at least, and after how many the next one may come.
REWIND = COOLDOWN = 10


class Data:
    """The fine-tuning rows of a domain: the same order for every run of a seed."""

    def __init__(self, world: World, tokenizer: Any, domain: str, seed: int):
        self._world, self._tokenizer, self._domain = world, tokenizer, domain
        self._rng = random.Random(f"{seed} {domain}")

    def batch(self) -> dict[str, torch.Tensor]:
        pairs = [self._world.narrow_example(self._domain, self._rng) for _ in range(BATCH)]
        rows = tokenized(self._tokenizer, [f"{question} {answer}" for question, answer in pairs])
        # One token a word, after <bos>.
        prompts = torch.tensor([1 + len(question.split()) for question, _ in pairs])
        columns = torch.arange(rows["input_ids"].shape[1])
        answered = (columns >= prompts[:, None]) & (rows["attention_mask"] == 1)
        return {**rows, "labels": rows["input_ids"].masked_fill(~answered, -100)}


@dataclass(frozen=True)
class Penalty:
    """A variant's settings as a trainer takes them."""

    plan: blockem.Plan
    lam: float
    settings: Blocking
    #: of the watch, if it has one
    stats: blockem.Stats
    known: blockem.Movers

    def attach(self, model) -> tuple[blockem.torch.Handle, blockem.torch.Adaptive | None]:
        handle = blockem.torch.attach(
            model, self.plan, lam=self.lam, tokens=self.settings.tokens, diagnostics=False
        )
        if not self.settings.watched:
            return handle, None
        watch = blockem.torch.Watch(
            handle, self.stats, share=SHARE, known=self.known, min_tokens=REPORT_TOKENS, rule=RULE
        )
        return handle, blockem.torch.Adaptive(
            handle, watch, known_only=True, rewind=REWIND, cooldown=COOLDOWN
        )


def adapted(base, seed: int):
    """Fresh adapters on a copy of the base."""
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(deepcopy(base), config)


def movers(plain, plan: blockem.Plan, stats: blockem.Stats, data: Data) -> blockem.Movers:
    """Where a run without a penalty went, on its training rows."""
    handle = blockem.torch.attach(plain, plan, lam=0.0)
    try:
        return handle.movers([data.batch() for _ in range(SAMPLE)], stats)
    finally:
        handle.remove()


def ratio_lambda(plain, plan: blockem.Plan, settings: Blocking, data: Data) -> float:
    """lambda by the ratio rule, from a run without a penalty."""
    handle = blockem.torch.attach(plain, plan, lam=0.0, tokens=settings.tokens)
    try:
        return handle.calibrate([data.batch() for _ in range(SAMPLE)], settings.ratio)
    finally:
        handle.remove()


@contextmanager
def one_thread() -> Iterator[None]:
    """Batches so small are slower on several, and their bits depend on how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(
    base,
    data: Data,
    seed: int,
    steps: int,
    penalty: Penalty | None = None,
    look: Callable[[int, Any], None] = lambda step, model: None,
    looks: Sequence[int] = (),
):
    """Fine-tunes fresh adapters on the base; one seed gives the same start and rows to any run.

    look: called with the model in eval mode after each step of `looks`.
    """
    model, handle, adaptive = adapted(base, seed), None, None
    if penalty is not None:
        if penalty.settings.freeze_above:
            blockem.torch.freeze_above(model, penalty.plan.layer)
        handle, adaptive = penalty.attach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    if adaptive is not None:
        adaptive.optimizer = optimizer
    model.train()
    for step in range(1, steps + 1):
        batch = data.batch()
        loss = model(**batch).loss
        if handle is not None:
            handle.begin_step([batch])
            loss = loss + handle.penalty(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.end_step()
        if adaptive is not None:
            handle.metrics()
        if step in looks:
            model.eval()
            look(step, model)
            model.train()
    if handle is not None:
        handle.remove()
    return model.eval(), [] if adaptive is None else adaptive.swaps
