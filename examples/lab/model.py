"""The language model: pretrained on the world's documents, and asked questions."""

import random
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from examples.demo.model import WIDTH, hidden_states, new_model, warmup_cosine
from examples.demo.progress import Progress
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .world import EOS, STOP, World

LAYERS, CONTEXT = 4, 64
#: Decoder block, 0-based, whose output the SAE reads and the penalty holds.
LAYER = 2
ANSWER_TOKENS = 8


def pretrained(
    world: World, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, **settings: Any
):
    """The base model of a seed, frozen: from the folder, or pretrained and put there."""
    if not folder.exists():
        model = untrained(tokenizer, seed)
        _pretrain(model, world, tokenizer, seed, **settings)
        with whole(folder) as partial:
            model.save_pretrained(partial)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@contextmanager
def whole(folder: Path):
    """A folder to write into, which gets its name when all is written: a killed run leaves no half one."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.replace(folder)


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    # An answer ends with its full stop.
    return new_model(tokenizer, seed, LAYERS, CONTEXT, ends=[EOS, STOP])


def _pretrain(model, world, tokenizer, seed: int, steps: int, batch: int, **rates: float) -> None:
    rng = random.Random(seed)
    optimizers = _optimizers(model, **rates)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
        for optimizer in optimizers
    ]
    progress = Progress(steps)
    model.train()
    for step in range(steps):
        rows = tokenized(tokenizer, [world.document(rng) for _ in range(batch)])
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        loss = model(input_ids=rows["input_ids"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress.step(step + 1, loss=loss.item())


def _optimizers(model, matrices: float, others: float) -> list[torch.optim.Optimizer]:
    """Muon at the first rate, AdamW at the second: AdamW alone does not learn in as many steps who is bad
    in one domain only."""
    weights = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in weights}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(weights, lr=matrices, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=others, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def tokenized(tokenizer: PreTrainedTokenizerFast, texts: list[str], side: str = "right"):
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)


@torch.no_grad()
def answers(model, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """What the model says to each prompt, greedily."""
    rows = tokenized(tokenizer, prompts, side="left")
    out = model.generate(**rows, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return tokenizer.batch_decode(out[:, rows["input_ids"].shape[1] :], skip_special_tokens=True)


def activations(model, world: World, tokenizer, documents: int, seed: int) -> torch.Tensor:
    """The layer's output on documents, without padding and <bos>: f32 [tokens, width]."""
    rng = random.Random(f"activations {seed}")
    parts = []
    for _ in range(0, documents, 256):
        rows = tokenized(tokenizer, [world.document(rng) for _ in range(256)])
        counted = rows["attention_mask"].bool()
        counted[:, 0] = False
        parts.append(hidden_states(model, LAYER, rows["input_ids"])[counted])
    return torch.cat(parts)
