"""QLoRA: base models that bitsandbytes quantised, on the CPU, through all that runs a model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from test_attach import moved, one_loss
from tiny import Dictionary

import blockem
from blockem.torch import attach, steered

WIDTH = 64
DICTIONARY = Dictionary(width=WIDTH)
KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    # 48 rows are no multiple of what evaluation kernels of 4 bits want.
    tiny.llama(hidden=WIDTH, kv_heads=4).save_pretrained(path)
    return path


def quantised(folder: Path, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=transformers.BitsAndBytesConfig(**KINDS[kind]))


def tuned(folder: Path, kind: str, dtype: torch.dtype, prepared: bool = False) -> peft.PeftModel:
    model = quantised(folder, kind, dtype)
    if prepared:
        model = peft.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = tiny.with_lora(model).train()
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__module__.startswith("bitsandbytes")
    return model


def stored(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if not p.is_floating_point()]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_quantised_base_is_its_own_reference(
    folder: Path, kind: str, dtype: torch.dtype, prepared: bool
) -> None:
    """The penalty of an untrained model is exactly 0; after a step it is that of autograd over the
    model as peft itself turns its adapters off, gradients included."""
    model = tuned(folder, kind, dtype, prepared)
    batch, = tiny.batches(1)
    before = stored(model)
    for reference in ("frozen_copy", "adapters_off"):
        handle = attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
        assert one_loss(handle, model, batch).item() == 0
        assert (handle.last_check.compared, handle.last_check.difference) == ("tuned", 0)
        assert handle.last_check.active > 0.2
        handle.remove()
    # Far: of latents that hardly move, their difference has lost the digits that gradients are compared by.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    handles = [attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
               for reference in ("frozen_copy", "adapters_off")]
    model(**batch).loss.backward()
    for handle in handles:
        handle.discard()
    optimizer.step()

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        optimizer.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for handle in handles:
        handle.begin_step([batch])
    model(**batch)
    losses = [handle.penalty(batch).loss for handle in handles]
    assert losses[0].item() == losses[1].item() > 0
    found = gradients(losses[1])
    for handle in handles:
        handle.remove()
    mask = batch["labels"] != -100
    with torch.no_grad(), model.disable_adapter():
        base = tiny.hidden_states(model, batch)
    want = DICTIONARY.loss_sum(tiny.hidden_states(model, batch), base, mask) / mask.sum()
    torch.testing.assert_close(losses[0].double(), want, rtol=1e-4, atol=0)
    wanted = gradients(want)
    assert len(found) == len(wanted) > 8 and max(g.abs().max() for g in wanted) > 0
    # Each gradient of hidden is rounded once to the dtype that hidden has.
    bound = 2e-2 if dtype is torch.bfloat16 and not prepared else 1e-3
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= bound * other.norm() + 1e-12
    for one, other in zip(before, stored(model), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_quantised_base_fills_a_cache(folder: Path, kind: str, tmp_path: Path) -> None:
    """In evaluation mode too, as from_pretrained gives it, with the bits of training."""
    base = quantised(folder, kind, torch.float32)
    assert not base.training
    batch, = tiny.batches(1, size=1)
    cache = blockem.Cache(tmp_path / "z.blockem", DICTIONARY.plan, mode="create", dtype="float32",
                          base_model=blockem.base_model_digest(base))
    with cache:
        before = stored(base)
        cache.fill(base, [batch], progress=False)
        assert all(map(torch.equal, before, stored(base))) and not base.training
        model = moved(tuned(folder, kind, torch.float32))
        assert blockem.base_model_digest(model) == cache.base_model
        handle = attach(model, DICTIONARY.plan, lam=1.0, reference=cache.reference)
        loss = one_loss(handle, model, batch)
        assert loss > 0 and handle.last_check.difference == 0
        handle.remove()
        assert loss.item() == one_loss(attach(model, DICTIONARY.plan, lam=1.0), model, batch).item()


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_quantised_model_is_steered_and_measured(folder: Path, kind: str) -> None:
    model = moved(tuned(folder, kind, torch.float32))
    batch, = tiny.batches(1)
    before = stored(model)
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    found = handle.measure([batch])
    assert found.penalty == pytest.approx(one_loss(handle, model, batch).item(), rel=1e-4)
    handle.remove()
    rows = torch.nn.functional.normalize(torch.randn(12, WIDTH), dim=1)
    sae = blockem.Sae.from_tensors(
        encoder_weight=rows, encoder_bias=torch.zeros(12), decoder_weight=rows,
        encoder_layout="f_d",
        hook_name=f"blocks.{tiny.LAYER}.hook_resid_post")
    steering = blockem.Steering(sae, [4, 7], num_threads=1)
    layer = model.get_base_model().model.layers[tiny.LAYER + 1]
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(**batch)
    with steered(model, steering, [7, 4], [0.5, -2.0], scale=3.0):
        model(**batch)
    hook.remove()
    push = 3.0 * torch.stack([0.5 * rows[7], -2.0 * rows[4]])[:, None]
    torch.testing.assert_close(seen[1], seen[0] + push, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, before, stored(model)))


def test_pissa_on_a_quantised_base_is_refused(folder: Path) -> None:
    """OLoRA quantises anew what it leaves; LoftQ by replace_lora_weights_loftq leaves no trace but
    its lora_B."""
    config = lambda **more: peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **more)
    model = peft.get_peft_model(quantised(folder, "int8", torch.float32),
                                config(init_lora_weights="olora"))
    with pytest.raises(blockem.ArgumentError, match="init_lora_weights='olora'"):
        attach(model, DICTIONARY.plan, lam=1.0)
    model = peft.get_peft_model(quantised(folder, "nf4", torch.float32), config())
    for module in model.modules():
        if hasattr(module, "lora_A"):
            left = torch.randn(module.out_features, module.in_features)
            u, s, v = torch.linalg.svd(left, full_matrices=False)
            module.lora_B["default"].weight.data = u[:, :4] * s[:4].sqrt()
            module.lora_A["default"].weight.data = s[:4].sqrt()[:, None] * v[:4]
    with pytest.raises(blockem.ArgumentError, match="columns of lora_B.*LoftQ"):
        attach(model, DICTIONARY.plan, lam=1.0)
