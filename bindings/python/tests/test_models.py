"""Models of many kinds, and batches that do not fit them: the right penalty, or an error that names
what is wrong."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
import transformers
from tiny import Dictionary

import blockem
from blockem.torch import attach, steered

BASE = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
DICTIONARY = Dictionary()
#: Configuration, and which modules have adapters: of kinds of blocks that differ.
MODELS: dict[str, tuple[dict, str | list[str]]] = {
    "rwkv": (dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32,
                  intermediate_size=48, rescale_every=1), "all-linear"),
    "mamba": (dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, state_size=4, expand=2),
              ["in_proj", "x_proj"]),
    "llama4_text": (BASE | dict(intermediate_size_mlp=48, num_local_experts=2,
                                interleave_moe_layer_step=1), ["q_proj", "v_proj"]),
    "gpt_oss": (BASE | dict(num_local_experts=2, num_experts_per_tok=1), "all-linear"),
    "deepseek_v3": ({k: v for k, v in BASE.items() if k != "head_dim"} | dict(
        num_key_value_heads=4,
        moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1), "all-linear"),
    "recurrent_gemma": (BASE | dict(lru_width=32, block_types=["recurrent", "attention"],
                                    attention_window_size=8), "all-linear"),
    "gemma4_text": (BASE | dict(
        vocab_size_per_layer_input=50, hidden_size_per_layer_input=8, global_head_dim=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"]), "all-linear"),
    "lfm2": (BASE | dict(full_attn_idxs=[1]), "all-linear"),
}  # fmt: skip
GEMMA_3N = BASE | dict(
    num_hidden_layers=5, vocab_size_per_layer_input=50, hidden_size_per_layer_input=8,
    num_kv_shared_layers=0, altup_num_inputs=4, laurel_rank=4, activation_sparsity_pattern=[0.0] * 5,
    layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
)  # fmt: skip


def model_of(name: str, config: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **config)
    )


def lora(model: torch.nn.Module, modules: str | list[str] = "all-linear") -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=modules)).train()


def output_of(model: torch.nn.Module, batch: dict, path: str) -> torch.Tensor:
    found = []
    keep = lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out)
    hook = model.get_submodule(path).register_forward_hook(keep)
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_is_that_of_the_block_s_output(name: str) -> None:
    config, modules = MODELS[name]
    base, model, (batch,) = model_of(name, config), lora(model_of(name, config), modules), (
        tiny.batches(1)
    )
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        handle.begin_step([batch])
        (model(**batch).loss + handle.penalty(batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        handle.end_step()
    handle.begin_step([batch])
    model(**batch)
    found = handle.penalty(batch).loss_sum.item()
    handle.remove()
    path = f"{handle._stack.name}.1"
    assert f"the output of {path};" in repr(handle)
    tuned = output_of(model.train(), batch, f"base_model.model.{path}")
    want = DICTIONARY.loss_sum(tuned, output_of(base.train(), batch, path), batch["labels"] != -100)
    assert found == pytest.approx(want.item(), rel=1e-4) and want > 0


def test_several_residual_streams_are_refused() -> None:
    model, (batch,) = lora(model_of("gemma3n_text", GEMMA_3N)), tiny.batches(1)
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    handle.begin_step([batch])
    model(**batch)
    size = list(batch["input_ids"].shape)
    shown = ", ".join(map(str, size))
    with pytest.raises(blockem.Error, match=rf"\[4, {shown}, 32\].*\[{shown}\]: 4 residual streams") as e:
        handle.penalty(batch)
    assert e.value.name == "SHAPE"


def test_arrays_of_other_tokens_are_refused() -> None:
    model, (batch,) = lora(tiny.llama()), tiny.batches(1)
    rows, length = batch["input_ids"].shape
    other = torch.ones(rows, length - 1, dtype=torch.bool)
    short = batch | {"labels": batch["labels"][:, 1:]}
    hidden = rf"\[{rows}, {length}, 32\].*\[{rows}, {length - 1}\]"

    def penalised(given: object, **how: object) -> None:
        handle = attach(model, DICTIONARY.plan, lam=1.0, **how)
        try:
            if isinstance(given, dict):
                handle.begin_step(1.0)
            model(**batch)
            handle.penalty(given)
        finally:
            handle.remove()

    def watched() -> None:
        handle = attach(model, DICTIONARY.plan, lam=1.0)
        blockem.torch.Watch(handle, blockem.Stats(DICTIONARY.sae), share=1.0)
        try:
            model(**batch)
            handle.penalty(other)
        finally:
            handle.remove()

    def begun() -> None:
        handle = attach(model, DICTIONARY.plan, lam=1.0)
        try:
            handle.begin_step([short])
        finally:
            handle.remove()

    z = torch.zeros(rows, length - 1, 5)
    sae = blockem.Sae.from_tensors(
        encoder_weight=DICTIONARY.weight, encoder_bias=DICTIONARY.bias, encoder_layout="f_d",
        decoder_weight=DICTIONARY.weight, hook_name="blocks.1.hook_resid_post",
    )  # fmt: skip

    def pushed(mask: torch.Tensor) -> None:
        steering = blockem.Steering(sae, [3])
        with steered(model, steering, [3] * rows, [1.0] * rows, scale=1.0, mask=mask):
            model(**batch)

    for text, run in [
        (hidden, lambda: penalised(other)),
        (rf"labels.*\[{rows}, {length - 1}\].*\[{rows}, {length}\], as input_ids",
         lambda: penalised(short)),
        (rf"labels.*\[{rows}, {length - 1}\]", begun),
        (rf"attention_mask.*\[{rows}, {length - 1}\]", lambda: penalised(
            batch | {"attention_mask": other}, tokens="all")),
        (hidden, watched),
        (rf"the reference.*\[{rows}, {length - 1}, 5\]; expected \[{rows}, {length}, 5\]",
         lambda: penalised(batch, reference=lambda batch: z)),
        (rf"mask has the shape \[{length}\]", lambda: pushed(torch.ones(length))),
        (rf"mask has the shape \[1, {length}\]", lambda: pushed(torch.ones(1, length))),
        (rf"a forward has {length} positions, the mask {length - 1}", lambda: pushed(other)),
    ]:  # fmt: skip
        with pytest.raises(blockem.Error, match=text) as error:
            run()
        assert error.value.name == "SHAPE", text


def t5(**settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, **settings,
    ))  # fmt: skip


def test_of_two_stacks_of_one_length_the_user_chooses() -> None:
    """The decoder's tokens are those of the labels, however many the encoder has."""
    model, base = lora(t5(), ["q", "v"]), t5().train()
    with pytest.raises(ValueError, match=r"candidates are encoder.block \(3\), decoder.block \(3\)"):
        attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    batch = batch | {"labels": batch["labels"][:, :5].abs() % 50}
    handle = attach(model, DICTIONARY.plan, lam=1.0, layers="decoder.block")
    handle.begin_step([batch])
    (model(**batch).loss + handle.penalty(batch).loss).backward()
    handle.end_step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "decoder" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    handle.begin_step([batch])
    model(**batch)
    found = handle.penalty(batch).loss_sum.item()
    handle.remove()
    tuned = output_of(model, batch, "base_model.model.decoder.block.1")
    want = DICTIONARY.loss_sum(tuned, output_of(base, batch, "decoder.block.1"),
                               torch.ones_like(batch["labels"]))  # fmt: skip
    assert found == pytest.approx(want.item(), rel=1e-4) and want > 0


class Towers(torch.nn.Module):
    """A vision tower that lies less deep than the language model, and has as many layers."""

    def __init__(self) -> None:
        super().__init__()
        self.language = tiny.llama()
        self.config = self.language.config
        self.tower = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(
            torch.nn.Linear(32, 32) for _ in range(3)
        )})

    def forward(self, **batch: torch.Tensor) -> object:
        return self.language(**batch)


def test_a_tower_of_as_many_layers_is_not_taken_for_the_decoder() -> None:
    towers = Towers()
    with pytest.raises(ValueError, match=r"language.model.layers \(3\), tower.layers \(3\)"):
        attach(towers, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    handle = attach(towers, DICTIONARY.plan, lam=1.0, reference="frozen_copy",
                    layers="language.model.layers")  # fmt: skip
    assert "language.model.layers.1" in repr(handle)
