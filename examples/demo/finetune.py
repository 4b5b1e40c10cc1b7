"""LoRA fine-tuning on the narrow text, plain or with the penalty in the loop."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import blockem
import blockem.torch
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from .model import hidden_states, tap
from .progress import Progress

MAX_TOKENS = 96
PROMPT_TOKENS = 12
IGNORED = -100
SNAPSHOTS = 10


@dataclass
class Batch:
    """Rows padded on the right: under a causal mask no real token sees the padding."""

    ids: torch.Tensor
    labels: torch.Tensor  # IGNORED on prompt and padding

    @property
    def supervised(self) -> torch.Tensor:
        return self.labels != IGNORED


@dataclass
class Blocking:
    """What the blocked run adds to the loss: lam · loss_sum / count."""

    plan: blockem.Plan
    lam: float


@dataclass
class Run:
    """What a fine-tuning run left: the tuned model, its curves, adapter snapshots."""

    model: torch.nn.Module
    sft: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)  # loss_sum / count of each step
    snapshots: list[tuple[int, dict]] = field(default_factory=list)


def examples(tokenizer, paragraphs: list[str]) -> list[list[int]]:
    """Token lists of prompt and completion; the first PROMPT_TOKENS are the prompt."""
    encodings = tokenizer.backend_tokenizer.encode_batch(paragraphs)
    rows = [(e.ids + [tokenizer.eos_token_id])[:MAX_TOKENS] for e in encodings]
    return [row for row in rows if len(row) > PROMPT_TOKENS]


def collate(rows: list[list[int]], pad: int) -> Batch:
    ids = torch.full((len(rows), max(map(len, rows))), pad)
    labels = torch.full_like(ids, IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, PROMPT_TOKENS : len(row)] = ids[i, PROMPT_TOKENS : len(row)]
    return Batch(ids, labels)


def batches(rows: list[list[int]], size: int, pad: int) -> list[Batch]:
    return [collate(rows[i : i + size], pad) for i in range(0, len(rows), size)]


def train(
    base, rows, layer: int, steps: int, batch: int, lr: float, seed: int, blocking: Blocking | None
) -> Run:
    """Fine-tunes fresh adapters on `base`; one seed gives the same start and order to any run."""
    run, optimizer = _start(base, lr, seed)
    order = torch.Generator().manual_seed(seed)
    progress, pad = Progress(steps), base.config.pad_token_id
    for step in range(steps):
        if step % max(1, steps // SNAPSHOTS) == 0:
            run.snapshots.append((step, _adapters(run.model)))
        data = _pick(rows, batch, order, pad)
        sft, penalty = _step(run.model, optimizer, data, layer, blocking, Clock())
        run.sft.append(sft)
        figures = {} if penalty is None else {"penalty": penalty}
        run.penalty += figures.values()
        progress.step(step + 1, sft=sft, **figures)
    run.snapshots.append((steps, _adapters(run.model)))
    return run


def time_steps(
    base, rows, layer: int, steps: int, batch: int, lr: float, seed: int, blocking: Blocking
) -> dict[str, dict[str, list[float]]]:
    """Seconds of plain and of blocked steps, taken in turns on the same batches.

    In turns, so that whatever else the machine does meets both alike.
    """
    run, optimizer = _start(base, lr, seed)
    order = torch.Generator().manual_seed(seed)
    clocks = {"plain": Clock(), "blocked": Clock()}
    for _ in range(steps):
        data = _pick(rows, batch, order, base.config.pad_token_id)
        _step(run.model, optimizer, data, layer, None, clocks["plain"])
        _step(run.model, optimizer, data, layer, blocking, clocks["blocked"])
    return {name: clock.seconds for name, clock in clocks.items()}


def _start(base, lr: float, seed: int) -> tuple[Run, torch.optim.Optimizer]:
    torch.manual_seed(seed)  # the adapters' start
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(base, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Run(model), torch.optim.AdamW(trained, lr=lr)


def _pick(rows: list[list[int]], batch: int, order: torch.Generator, pad: int) -> Batch:
    return collate([rows[i] for i in torch.randint(len(rows), (batch,), generator=order)], pad)


def _step(
    model, optimizer, data: Batch, layer: int, blocking: Blocking | None, clock: "Clock"
) -> tuple[float, float | None]:
    """One update; returns the SFT loss and, when blocking, loss_sum / count."""
    with clock("step"):
        with tap(model, layer) as caught:
            loss = sft = model(input_ids=data.ids, labels=data.labels).loss
        penalty = None
        if blocking:
            loss_sum, count = _penalty(model, layer, blocking.plan, data, caught[0], clock)
            penalty = loss_sum / count
            loss = sft + blocking.lam * penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sft.item(), None if penalty is None else penalty.item()


def _penalty(
    model, layer: int, plan: blockem.Plan, data: Batch, hidden: torch.Tensor, clock: "Clock"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The call that this library is for, with its reference from the base model."""
    with clock("base forward"), model.disable_adapter():
        base_hidden = hidden_states(model, layer, data.ids)
    with clock("blockem: reference"):
        reference = plan.encode(base_hidden)
    with clock("blockem: penalty"):
        loss_sum, count = blockem.torch.penalty(plan, hidden, reference, data.supervised)
    clock.backward_of(loss_sum, "blockem: gradient")
    return loss_sum, count


@torch.no_grad()
def sft_loss(model, data: list[Batch]) -> float:
    """Mean loss over all supervised tokens."""
    total = tokens = 0
    for batch in data:
        count = batch.supervised.sum().item()
        total += model(input_ids=batch.ids, labels=batch.labels).loss.item() * count
        tokens += count
    return total / tokens


@torch.no_grad()
def penalty_of(model, layer: int, plan: blockem.Plan, data: list[Batch]) -> float:
    """loss_sum / count of the tuned model against its own base over whole batches."""
    total = tokens = 0.0
    for batch in data:
        tuned = hidden_states(model, layer, batch.ids)
        with model.disable_adapter():
            reference = plan.encode(hidden_states(model, layer, batch.ids))
        loss_sum, count = blockem.torch.penalty(plan, tuned, reference, batch.supervised)
        total, tokens = total + loss_sum.item(), tokens + count.item()
    return total / tokens


def penalty_curve(run: Run, layer: int, plan: blockem.Plan, data: list[Batch]):
    """[(step, loss_sum / count)] over the snapshots; the last adapters are back at the end."""
    curve = []
    for step, adapters in run.snapshots:
        set_peft_model_state_dict(run.model, adapters)
        curve.append((step, penalty_of(run.model, layer, plan, data)))
    return curve


def _adapters(model) -> dict:
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(model).items()}


class Clock:
    """Seconds of named parts of a step, one entry per step."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def __call__(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def backward_of(self, tensor: torch.Tensor, name: str) -> None:
        """Times the autograd node that made `tensor`, while the common backward runs through it."""
        started = []
        tensor.grad_fn.register_prehook(lambda *_: started.append(time.perf_counter()))
        tensor.grad_fn.register_hook(
            lambda *_: self.seconds.setdefault(name, []).append(time.perf_counter() - started[0])
        )
