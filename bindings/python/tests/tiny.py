"""Small random language models with an SAE of one of their layers, and the penalty in torch's own
operations, which shares nothing with the library."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
import transformers

import blockem

WIDTH, LAYER = 32, 1
# Several threads make models of this size slower.
torch.set_num_threads(1)


def llama(
    layers: int = 3, seed: int = 0, hidden: int = WIDTH, heads: int = 4, kv_heads: int = 2,
    **settings: object,
) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    ))


def with_lora(model: torch.nn.Module, seed: int = 1, dropout: float = 0.0) -> peft.PeftModel:
    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(
        r=4, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    ))


class Dictionary:
    """A random SAE, of the residual stream unless hook says else, with three latents in K+ and two in K-."""

    def __init__(
        self, layer: int | None = LAYER, width: int = WIDTH, seed: int = 2, hook: str | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(12, width, generator=generator)
        self.bias = 0.5 * torch.rand(12, generator=generator)
        self.ids, self.signs = [7, 0, 3, 5, 11], torch.tensor([1.0, 1, 1, -1, -1])
        self.weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.5])
        self.sae = blockem.Sae.from_tensors(
            encoder_weight=self.weight, encoder_bias=self.bias, encoder_layout="f_d",
            hook_name=hook or (None if layer is None else f"blocks.{layer}.hook_resid_post"),
        )
        self.latents = blockem.Latents(self.ids, self.signs.int().numpy(), self.weights.numpy())
        self.plan = blockem.Plan(self.sae, self.latents, num_threads=1)

    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, bias = self.weight[self.ids].double(), self.bias[self.ids].double()
        return (hidden.double() @ rows.T + bias).relu()

    def loss_sum(
        self, hidden: torch.Tensor, base: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        rise = (self.signs * (self.encode(hidden) - self.encode(base))).relu()
        return (mask[..., None] * self.weights * rise**2).sum()


def batches(count: int, seed: int = 3, size: int = 2) -> list[dict[str, torch.Tensor]]:
    """Ragged, right-padded rows with a prompt that has no labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        lengths = torch.randint(6, 13, (size,), generator=generator)
        ids = torch.randint(3, 50, (size, int(lengths.max())), generator=generator)
        shown = torch.arange(ids.shape[1]) < lengths[:, None]
        ids = ids * shown
        supervised = shown & (torch.arange(ids.shape[1]) >= lengths[:, None] // 3)
        found.append({
            "input_ids": ids,
            "attention_mask": shown.long(),
            "labels": torch.where(supervised, ids, -100),
        })
    return found


def hidden_states(model: torch.nn.Module, batch: dict, layer: int = LAYER) -> torch.Tensor:
    """By transformers' own account."""
    return model(**batch, output_hidden_states=True).hidden_states[layer + 1]


def task_loss_sum(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(),
        ignore_index=-100, reduction="sum",
    )


def reference_training(
    model: peft.PeftModel,
    dictionary: Dictionary,
    steps: list[list[dict]],
    lam: float,
    optimizer: Callable,
) -> list[float]:
    """Plain LoRA training with the penalty by autograd: loss_sum / count of each step."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    trajectory = []
    for step in steps:
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        count = sum((batch["labels"] != -100).sum() for batch in step)
        total = 0.0
        for batch in step:
            with torch.no_grad(), model.disable_adapter():
                base = hidden_states(model, batch)
            loss_sum = dictionary.loss_sum(
                hidden_states(model, batch), base, batch["labels"] != -100
            )
            (task_loss_sum(model, batch) / items + lam * loss_sum / count).backward()
            total += loss_sum.item()
        optimizer.step()
        optimizer.zero_grad()
        trajectory.append(total / count.item())
    return trajectory


def attached_training(
    model: torch.nn.Module,
    handle: blockem.torch.Handle,
    steps: list[list[dict]],
    optimizer: Callable,
) -> list[float]:
    """The same with a handle of blockem.torch.attach."""
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    trajectory = []
    for step in steps:
        handle.begin_step(step)
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        for batch in step:
            loss = model(**batch, num_items_in_batch=items).loss
            (loss + handle.penalty(batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.end_step()
        trajectory.append(handle.metrics()["blockem/penalty"])
    return trajectory
