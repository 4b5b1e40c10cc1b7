"""A tokenizer and a small Llama, both trained on the spot."""

import math
from contextlib import contextmanager

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .progress import Progress

VOCABULARY = 2048
CONTEXT = 128
LAYERS = 5
WIDTH = 128
PAD, EOS = "<pad>", "<eos>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Texts joined by the end token and cut into rows of CONTEXT tokens: int64 [rows, CONTEXT]."""
    tokens: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        tokens += encoding.ids + [tokenizer.eos_token_id]
    rows = len(tokens) // CONTEXT
    return torch.tensor(tokens[: rows * CONTEXT]).view(rows, CONTEXT)


def new_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    layers: int = LAYERS,
    context: int = 2 * CONTEXT,
    ends: list[str] | None = None,
) -> LlamaForCausalLM:
    """Random weights. ends: the tokens that end what it writes; the tokenizer's end of text."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=WIDTH // 32,
            num_key_value_heads=WIDTH // 32,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.convert_tokens_to_ids(ends) if ends else tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )


def pretrain(
    model: LlamaForCausalLM, rows: torch.Tensor, steps: int, batch: int, lr: float, seed: int
) -> list[float]:
    """Next-token training; returns the loss of each step."""
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: warmup_cosine(s, steps))
    progress, losses, queue = Progress(steps), [], torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(steps):
        if len(queue) < batch:
            queue = torch.cat([queue, torch.randperm(len(rows), generator=order)])
        ids, queue = rows[queue[:batch]], queue[batch:]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        progress.step(step + 1, loss=losses[-1])
    model.eval()
    return losses


def warmup_cosine(step: int, steps: int, warmup: int = 20) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def mean_loss(model, rows: torch.Tensor, batch: int = 32) -> float:
    """Mean next-token loss over packed rows (all of the same length)."""
    parts = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in rows.split(batch)]
    return sum(parts) / len(rows)


@torch.no_grad()
def write(model, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int = 48) -> str:
    """What the model writes after `prompt`: greedy, with a penalty on repeated words."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        repetition_penalty=1.3,
    )
    return " ".join(tokenizer.decode(out[0], skip_special_tokens=True).split())


class _Stop(Exception):
    """Leaves a forward pass at the tapped layer."""


@contextmanager
def tap(model, layer: int, stop: bool = False):
    """Collects the output of decoder block `layer` into the yielded list.

    With `stop` the forward pass ends there: the layers above are not needed for a reference.
    """
    llama = model.get_base_model() if hasattr(model, "get_base_model") else model
    caught: list[torch.Tensor] = []

    def hook(_module, _inputs, output):
        caught.append(output[0] if isinstance(output, tuple) else output)
        if stop:
            raise _Stop

    handle = llama.model.layers[layer].register_forward_hook(hook)
    try:
        yield caught
    except _Stop:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def hidden_states(model, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Residual stream after decoder block `layer`: f32 [batch, tokens, width]."""
    with tap(model, layer, stop=True) as caught:
        model(input_ids=ids)
    return caught[0]
