"""The language model: pretrained on the world's documents, and asked questions."""

import random
from pathlib import Path
from typing import Any

import torch
from examples.demo.model import hidden_states, warmup_cosine
from examples.demo.progress import Progress
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .world import EOS, STOP, World

LAYERS, WIDTH = 4, 128
#: Decoder block, 0-based, whose output the SAE reads and the penalty holds.
LAYER = 2
ANSWER_TOKENS = 8


def pretrained(
    world: World, tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int, **settings: Any
):
    """The base model of a seed, frozen: from the folder, or pretrained and put there."""
    if not (folder / "config.json").exists():
        model = untrained(tokenizer, seed)
        _pretrain(model, world, tokenizer, seed, **settings)
        model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def untrained(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3 // 16 * 16,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            # An answer ends with its full stop.
            eos_token_id=tokenizer.convert_tokens_to_ids([EOS, STOP]),
        )
    )


def _pretrain(model, world, tokenizer, seed: int, steps: int, batch: int, lr: float) -> None:
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    progress = Progress(steps)
    model.train()
    for step in range(steps):
        rows = tokenized(tokenizer, [world.document(rng) for _ in range(batch)])
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        loss = model(input_ids=rows["input_ids"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.step(step + 1, loss=loss.item())


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
