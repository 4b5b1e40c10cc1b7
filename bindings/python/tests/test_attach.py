"""blockem.torch.attach: the right layer, tokens, reference and normalisation."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import accelerate
import peft
import pytest
import tiny
import torch
import transformers
from tiny import Dictionary

import blockem
from blockem.torch import DualAscent, attach, ratio_lambda
from blockem.torch._peft import adapters_off

DICTIONARY = Dictionary()
LAM = 0.05
SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1)


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model after some training: its adapters (or weights) are no longer those of the start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def one_loss(handle: blockem.torch.Handle, model: torch.nn.Module, batch: dict) -> torch.Tensor:
    handle.begin_step([batch])
    model(**batch)
    loss = handle.penalty(batch).loss
    handle.end_step()
    return loss


def formula(model: torch.nn.Module, base: torch.nn.Module, batch: dict, mask=None) -> torch.Tensor:
    with torch.no_grad():
        reference = tiny.hidden_states(base, batch)
    mask = batch["labels"] != -100 if mask is None else mask
    return DICTIONARY.loss_sum(tiny.hidden_states(model, batch), reference, mask)


# Training.


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_plain_loop_follows_autograd(checkpointing: bool | None, accumulation: int) -> None:
    """The penalty of every step equals an implementation by autograd, to rounding."""
    steps = [tiny.batches(accumulation, seed=i) for i in range(8)]
    want = tiny.reference_training(
        tiny.with_lora(tiny.llama()), DICTIONARY, steps, LAM, SGD
    )

    model = tiny.with_lora(tiny.llama()).train()
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    handle = attach(model, DICTIONARY.plan, lam=LAM)
    found = tiny.attached_training(model, handle, steps, SGD)
    assert want[0] == found[0] == 0.0 and max(want) > 1e-3
    assert found == pytest.approx(want, rel=2e-4, abs=1e-7)


@pytest.mark.parametrize("reference", ["frozen_copy", "module"])
def test_full_fine_tuning_against_a_copy(reference: str) -> None:
    model, base = tiny.llama().train(), tiny.llama()
    handle = attach(model, DICTIONARY.plan, lam=3.0,
                    reference=base if reference == "module" else reference)
    batch, = tiny.batches(1)
    assert one_loss(handle, model, batch).item() == 0.0  # which makes the self-check
    moved(model)
    loss = one_loss(handle, model, batch)
    count = (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss.double(), 3 * formula(model, base, batch) / count,
                               rtol=1e-4, atol=0)
    model.zero_grad()
    loss.backward()
    grads = [p.grad for p in model.model.layers[: tiny.LAYER + 1].parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in grads)
    assert model.model.layers[-1].mlp.up_proj.weight.grad is None


def test_a_copy_keeps_only_what_it_needs() -> None:
    handle = attach(tiny.llama(layers=5), DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    copied = handle._source.copied
    assert [type(layer).__name__ for layer in copied.layers] == (
        ["LlamaDecoderLayer"] * 2 + ["Identity"] * 3
    )
    assert not any(p.requires_grad for p in copied.decoder.parameters())
    assert isinstance(handle._stack.layers[-1], type(handle._stack.layers[0]))


def test_given_references() -> None:
    model = moved(tiny.with_lora(tiny.llama())).train()
    batch, = tiny.batches(1)
    with torch.no_grad(), model.disable_adapter():
        z = DICTIONARY.plan.encode(tiny.hidden_states(model.eval(), batch))
    model.train()
    asked = []
    first = attach(model, DICTIONARY.plan, lam=1.0)
    live = one_loss(first, model, batch)
    first.remove()
    handle = attach(model, DICTIONARY.plan, lam=1.0,
                    reference=lambda batch: asked.append(batch) or z)
    assert one_loss(handle, model, batch).item() == live.item() > 0
    assert asked[0] is batch and handle.last_check.difference == 0
    # What differs from the live base model is refused, up to a stated bound.
    wrong = z + 0.01
    handle.remove()
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference=lambda batch: wrong)
    with pytest.raises(ValueError, match="self-check failed.*z 0.01.*belongs to other tokens"):
        one_loss(handle, model, batch)
    handle.remove()
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference=lambda b: wrong, tolerance=0.011)
    one_loss(handle, model, batch)


def test_the_self_check_waits_for_a_token() -> None:
    """A micro-batch without one shows nothing, whatever the references are."""
    model = tiny.with_lora(tiny.llama()).train()
    batch, = tiny.batches(1)
    empty = dict(batch, labels=torch.full_like(batch["labels"], -100))
    wrong = torch.full((*batch["labels"].shape, 5), 3.0)
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference=lambda batch: wrong)
    handle.begin_step([empty, batch])
    model(**empty), handle.penalty(empty)
    assert handle.last_check is None
    model(**batch)
    with pytest.raises(ValueError, match="self-check failed"):
        handle.penalty(batch)


# The hook.


def neox() -> torch.nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64))


def gpt2() -> torch.nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


def qwen() -> torch.nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))


def gemma() -> torch.nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64))


@pytest.mark.parametrize("make", [tiny.llama, qwen, gemma, gpt2, neox])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_layer_s_own_output(make, layer: int) -> None:
    """Also of the last block, where hidden_states has what follows the final norm."""
    torch.manual_seed(0)
    model, seen = make().train(), []
    base = copy.deepcopy(model)
    plan = Dictionary(layer).plan
    handle = attach(model, plan, lam=1.0, reference=base)
    batch, = tiny.batches(1)
    handle.begin_step([batch])
    out = model(**batch, output_hidden_states=True)
    hidden, = handle.penalty(batch).hidden
    if layer < 2:
        assert torch.equal(hidden, out.hidden_states[layer + 1])
    else:
        assert not torch.allclose(hidden, out.hidden_states[-1])
        norm = [m for m in model.modules() if "Norm" in type(m).__name__][-1]
        torch.testing.assert_close(norm(hidden), out.hidden_states[-1])
    assert handle.last_check.difference == 0 and handle.last_check.active > 0.2
    where = f"the output of decoder block {layer} (0-based), the output of {handle._stack.name}.{layer}"
    assert where in repr(handle)


def test_wrapped_models() -> None:
    model = tiny.with_lora(tiny.llama()).train()
    batch, = tiny.batches(1)
    for wrapped in (model, torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        handle = attach(wrapped, DICTIONARY.plan, lam=1.0)
        one_loss(handle, wrapped, batch)
        assert handle._stack.layers is model.get_base_model().model.layers
        handle.remove()


@pytest.mark.parametrize("how", ["decoder", "layers", "outer"])
def test_compiled_models(how: str) -> None:
    torch._dynamo.reset()
    model = moved(tiny.with_lora(tiny.llama())).train()
    batch, other = tiny.batches(2)
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    want = [one_loss(handle, model, b) for b in (batch, other)]
    compiled = model
    if how == "decoder":  # in one graph, with the hooks
        model.get_base_model().model.compile(backend="aot_eager", fullgraph=True)
    elif how == "layers":
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="eager")
    for loss, b in zip(want, (batch, other)):
        model.zero_grad()
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        found = one_loss(handle, compiled, b)
        found.backward()
        torch.testing.assert_close(found, loss)
        assert max(g.abs().max() for g in grads.values()) > 1e-3
        for name, p in model.named_parameters():
            if p.grad is not None:
                g = grads.get(name, torch.zeros_like(p))
                torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


class Checkpointed(torch.nn.Module):
    """Layers that are checkpointed from outside, so that their hooks run again in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 32)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = torch.utils.checkpoint.checkpoint(
                block, hidden, use_reentrant=self.use_reentrant
            )
        return hidden


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_hooks_that_run_again_in_the_backward_pass(use_reentrant: bool) -> None:
    model = Checkpointed(use_reentrant).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference="frozen_copy", layers="blocks")
    ids = torch.arange(8).reshape(2, 4)
    mask, ran = torch.ones(2, 4, dtype=torch.bool), []
    model.blocks[1].register_forward_hook(lambda *_: ran.append(1))
    for i in range(2):
        handle.begin_step([mask])
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            out = model(input_ids=ids)
            out.mean().backward(retain_graph=True)
        loss = handle.penalty(mask).loss
        with torch.utils.checkpoint.set_checkpoint_early_stop(False):
            loss.backward()
        handle.end_step()
        moved(model) if i == 0 else None
    assert len(ran) >= 4 and loss > 0  # forward and recomputation
    grad = model.blocks[1].weight.grad.clone()
    # The same without checkpointing.
    plain, want = Checkpointed(use_reentrant).train(), None
    base = copy.deepcopy(plain)
    for i in range(2):
        hidden, states = plain.embed(ids), []
        for block in plain.blocks:
            states.append(hidden := block(hidden))
        with torch.no_grad():
            reference = base.blocks[1](base.blocks[0](base.embed(ids)))
        want = DICTIONARY.loss_sum(states[1], reference, mask) / 8
        (want + hidden.mean()).backward()
        moved(plain) if i == 0 else None
    torch.testing.assert_close(loss.double(), want)
    torch.testing.assert_close(grad, plain.blocks[1].weight.grad, rtol=1e-4, atol=1e-6)


def test_only_training_with_gradients() -> None:
    model = tiny.with_lora(tiny.llama())
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    model.eval()(**batch)
    model.train()
    with torch.no_grad():
        model(**batch)
    model.eval().generate(input_ids=batch["input_ids"], max_new_tokens=2)
    with pytest.raises(ValueError, match="no training forward"):
        handle.penalty(batch)
    model.train()(**batch)
    model.eval()(**batch)
    handle.begin_step([batch])
    with pytest.raises(ValueError, match="no training forward"):
        handle.penalty(batch), handle.penalty(batch)


def test_a_forward_whose_penalty_is_forgotten() -> None:
    model = tiny.with_lora(tiny.llama()).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    model(**batch)
    with pytest.raises(ValueError, match="before was not taken"):
        model(**batch)
    handle.discard()
    model(**batch)
    handle.remove()
    model(**batch), model(**batch)
    with pytest.raises(ValueError, match="no training forward"):
        handle.penalty(batch)


def test_a_layer_that_runs_twice() -> None:
    model = tiny.llama().train()
    model.model.layers[2] = model.model.layers[1]
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    batch, = tiny.batches(1)
    model(**batch, use_cache=False)
    with pytest.raises(ValueError, match="the output of decoder block 1 2 times"):
        handle.penalty(batch)


def test_output_changed_in_place() -> None:
    model = tiny.llama().train()
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    batch, = tiny.batches(1)
    model(**batch)
    with pytest.raises(ValueError, match="the output of decoder block 1 was changed in place"):
        handle.penalty(batch)


# References.


def test_the_base_pass_leaves_no_trace() -> None:
    model = moved(tiny.with_lora(tiny.llama(), dropout=0.5)).train()
    frozen = next(p for n, p in model.named_parameters() if "layers.2" in n and "lora_A" in n)
    frozen.requires_grad_(False)
    base = model.get_base_model()
    base.model.norm.eval()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    modes = [m.training for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    ran = []
    base.model.layers[1].register_forward_hook(lambda *_: ran.append(1))
    base.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    base.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    handle.begin_step([batch])
    model(**batch)
    state = torch.random.get_rng_state()
    handle.penalty(batch)  # with the self-check
    assert ran == [1, 2, "head", 1, 1]  # tuned; base; its stand-in for the check
    model(**batch)
    ran.clear(), handle.penalty(batch)
    assert ran == [1]
    assert modes == [m.training for m in model.modules()]
    assert trained == [p.requires_grad for p in model.parameters()]
    assert not base.model.layers[0].self_attn.q_proj.disable_adapters
    torch.random.set_rng_state(state)
    one = torch.rand(1)
    torch.random.set_rng_state(state)
    model(**batch)
    forward = handle._recorder.take()
    torch.random.set_rng_state(state)
    with torch.no_grad():
        handle._references(forward, batch, batch["labels"] != -100)
    assert torch.equal(torch.rand(1), one)


@pytest.mark.parametrize("kind", ["lora", "dora", "saved", "tokens", "bias", "ia3", "norms", "two",
                                  "again"])
def test_adapters_off_is_peft_s_own(kind: str) -> None:
    """The same hidden states, and every flag back, also where some adapters were off before."""
    lora = lambda **more: peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **more)
    config = {
        "lora": lora, "two": lora, "again": lora, "dora": lambda: lora(use_dora=True),
        "saved": lambda: lora(modules_to_save=["lm_head"]), "bias": lambda: lora(bias="lora_only"),
        "tokens": lambda: lora(trainable_token_indices=[1, 5]),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"],
                                      feedforward_modules=["down_proj"]),
        "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    }[kind]()
    model = moved(peft.get_peft_model(tiny.llama(), config)).train()
    batch, = tiny.batches(1)
    logits = lambda: model(**batch).logits
    with torch.no_grad(), adapters_off(model):
        logits()
    if kind == "two":
        # One more, in layers that had none.
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
        model.set_adapter("other")
        moved(model)
    if kind == "again":
        # Another of the same name, in layers that had none.
        model.add_adapter("other", lora())
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", peft.LoraConfig(r=2, target_modules=["o_proj"]))
        model.set_adapter("default")
        model.delete_adapter("other")
        moved(model)
    flags = lambda: ([p.requires_grad for p in model.parameters()],
                     [getattr(m, "disable_adapters", None) for m in model.modules()])
    before, trained = flags(), logits()
    with torch.no_grad():
        with model.disable_adapter():
            want = logits()
        with adapters_off(model):
            assert torch.equal(logits(), want) and not torch.equal(want, trained)
        assert flags() == before and torch.equal(logits(), trained)
        with pytest.raises(ZeroDivisionError), adapters_off(model):
            1 / 0
        assert flags() == before
        if kind in ("tokens", "bias", "norms"):
            return  # By peft's own context, which turns all of them on.
        with model.disable_adapter(), adapters_off(model):
            assert torch.equal(logits(), want)
        first = next(m for m in model.modules() if getattr(m, "disable_adapters", None) is False)
        first.enable_adapters(False)
        some = flags()
        with adapters_off(model):
            assert torch.equal(logits(), want)
        assert flags() == some != before


def test_an_error_in_the_base_pass_restores_the_model() -> None:
    model = moved(tiny.with_lora(tiny.llama())).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    model(**batch)
    broken = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        handle.penalty(batch)
    broken.remove()
    assert all(m.training for m in model.modules())
    assert not model.get_base_model().model.layers[0].self_attn.q_proj.disable_adapters
    one_loss(handle, model, batch)


def test_adapter_dropout_is_no_difference_but_base_dropout_is() -> None:
    batch, = tiny.batches(1)
    model = tiny.with_lora(tiny.llama(), dropout=0.5).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    assert one_loss(handle, model, batch).item() == 0
    model = tiny.with_lora(tiny.llama(attention_dropout=0.5)).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    with pytest.raises(ValueError, match="self-check failed: adapters off .*dropout"):
        one_loss(handle, model, batch)


def test_check_before_and_after_training() -> None:
    batch, = tiny.batches(1)
    model = tiny.with_lora(tiny.llama()).eval()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    found = handle.check(batch)
    tokens = (batch["labels"] != -100).sum().item()
    assert (found.compared, found.tokens, found.difference, found.penalty) == (
        "tuned", tokens, 0, 0
    )
    assert not model.training and found is handle.last_check
    assert handle.check(batch).active > 0.2
    moved(model)
    found = handle.check(batch)
    assert (found.compared, found.difference, found.penalty) == ("adapters off", 0, 0)
    # Full fine-tuning has nothing that could stand in for the weights that were trained.
    full = tiny.llama().train()
    handle = attach(full, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    one_loss(handle, full, batch)
    moved(full)
    found = handle.check(batch)
    assert found.compared == "tuned" and found.difference > 0 and found is handle.last_check
    # A copy with other weights is found out.
    handle = attach(tiny.llama(), DICTIONARY.plan, lam=1.0, reference=tiny.llama(seed=9))
    with pytest.raises(ValueError, match="self-check failed: tuned .* other weights"):
        handle.check(batch)


def test_what_cannot_be_its_own_base_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a peft.PeftModel"):
        attach(tiny.llama(), DICTIONARY.plan, lam=1.0)
    model = tiny.with_lora(tiny.llama())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="norm.weight is trained and no part of an adapter"):
        attach(model, DICTIONARY.plan, lam=1.0)
    same = tiny.llama()
    with pytest.raises(ValueError, match="is the model itself"):
        attach(same, DICTIONARY.plan, lam=1.0, reference=same)
    prompt = peft.get_peft_model(tiny.llama(), peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt learning"):
        attach(prompt, DICTIONARY.plan, lam=1.0)


def test_nothing_to_train_below_the_layer() -> None:
    model = tiny.with_lora(tiny.llama()).train()
    for name, parameter in model.named_parameters():
        if "layers.2" not in name:
            parameter.requires_grad_(False)
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    with pytest.raises(ValueError, match="block 1 needs no gradient"):
        one_loss(handle, model, batch)


def test_the_base_pass_has_no_dropout() -> None:
    model = moved(tiny.with_lora(tiny.llama(attention_dropout=0.5))).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0, tolerance=math.inf)
    batch, = tiny.batches(1)
    model(**batch)
    (found,), _ = handle._references(handle._recorder.take(), batch, batch["labels"] != -100)
    with torch.no_grad(), model.disable_adapter():
        want = DICTIONARY.plan.encode(tiny.hidden_states(model.eval(), batch))
    assert torch.equal(found, want)


def test_the_base_pass_has_the_autocast_of_the_forward() -> None:
    model = tiny.with_lora(tiny.llama()).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    handle.begin_step([batch])
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    handle.penalty(batch).loss.backward()
    assert (handle.last_check.compared, handle.last_check.difference) == ("tuned", 0)


# Tokens and normalisation.


def test_tokens() -> None:
    model = moved(tiny.with_lora(tiny.llama())).train()
    batch, = tiny.batches(1)
    assert (batch["attention_mask"] == 0).any()
    mask = torch.rand(batch["input_ids"].shape) > 0.5

    def loss_sum(tokens: str, given: object) -> float:
        handle = attach(model, DICTIONARY.plan, lam=1.0, tokens=tokens)
        model(**batch)
        term = handle.penalty(given)
        handle.remove()
        return term.loss_sum.item(), term.count.item()

    with torch.no_grad(), model.disable_adapter():
        base = tiny.hidden_states(model, batch)
    hidden = tiny.hidden_states(model, batch)
    no_mask = {"input_ids": batch["input_ids"]}
    for tokens, given, counted in [
        ("labels", batch, batch["labels"] != -100),
        ("all", batch, batch["attention_mask"] != 0),
        ("all", no_mask, torch.ones_like(mask)),
        ("labels", mask, mask),
    ]:
        found, count = loss_sum(tokens, given)
        want = DICTIONARY.loss_sum(hidden, base, counted).item()
        assert found == pytest.approx(want, rel=1e-4) and count == counted.sum()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    model(**batch)
    for given, error, text in [
        (no_mask, ValueError, "no labels"), ([1], TypeError, "batch is a list"),
        (None, TypeError, "batch is a NoneType"),
    ]:
        with pytest.raises(error, match=text):
            handle.begin_step([given])


def test_accumulation_is_one_batch() -> None:
    """Ragged micro-batches, one of them without a token, give the gradient of the whole batch."""
    whole, = tiny.batches(1, size=6)
    parts = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2, 4)]
    empty = dict(parts[0], labels=torch.full_like(parts[0]["labels"], -100))
    grads = []
    for step in ([whole], [*parts, empty]):
        model = moved(tiny.with_lora(tiny.llama())).train()
        handle = attach(model, DICTIONARY.plan, lam=2.0)
        handle.begin_step(step)
        for batch in step:
            model(**batch)
            handle.penalty(batch).loss.backward()
        handle.end_step()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert max(g.abs().max() for g in grads[0]) > 1e-3
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.fixture
def accelerator() -> Iterator[accelerate.Accelerator]:
    """Two micro-batches a step."""
    reset = accelerate.state.AcceleratorState._reset_state
    reset(True)
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    reset(True)
    accelerate.state.GradientState._reset_state()


def test_accumulation_with_accelerate_is_one_batch(accelerator: accelerate.Accelerator) -> None:
    """As the README has it: accelerator.backward divides by the number of micro-batches."""
    whole, = tiny.batches(1, size=4)
    parts = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    items, grads = (whole["labels"][:, 1:] != -100).sum(), []
    for step in ([whole], parts):
        model = moved(tiny.with_lora(tiny.llama())).train()
        handle = attach(model, DICTIONARY.plan, lam=2.0)
        if step is parts:
            model = accelerator.prepare(model)
        handle.begin_step(step)
        for batch in step:
            loss = model(**batch, num_items_in_batch=items).loss
            total = loss + handle.penalty(batch).loss
            if step is parts:
                with accelerator.accumulate(model):
                    accelerator.backward(total * accelerator.gradient_accumulation_steps)
            else:
                total.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert max(g.abs().max() for g in grads[0]) > 1e-3
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def packed(batch: dict) -> dict:
    """The rows of a padded batch in one, as TRL packs: position_ids tell them apart."""
    lengths = batch["attention_mask"].sum(1).tolist()
    join = lambda x: torch.cat([row[:n] for row, n in zip(x, lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": join(batch["input_ids"]), "labels": join(batch["labels"]),
            "position_ids": positions}


@pytest.mark.parametrize("reference", ["adapters_off", "cache"])
def test_packed_rows_are_rows(reference: str, tmp_path: Path) -> None:
    """The same penalty and gradient; the cache knows the examples from when they were apart."""
    rows, = tiny.batches(1, size=5)
    found = []
    for batch in (rows, packed(rows) | {"use_cache": False}):
        model = moved(tiny.with_lora(tiny.llama())).train()
        plan, file = DICTIONARY.plan, str(tmp_path / "base.cache")
        if reference == "cache":
            is_packed = "position_ids" in batch
            opened = dict(base_model="tiny", dtype="float32")
            if not is_packed:
                with blockem.Cache(file, plan, mode="create", **opened) as cache:
                    cache.fill(model, [rows], progress=False)
            cache = blockem.Cache(file, plan, **opened)
            handle = attach(model, plan, lam=2.0, tolerance=1e-5,
                            reference=lambda b: cache.reference(b, packed=is_packed))
        else:
            handle = attach(model, plan, lam=2.0)
        loss = one_loss(handle, model, batch)
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert found[0][0] > 0 and max(g.abs().max() for g in found[0][1:]) > 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_pass_packs_as_the_training_forward_does(
    use_cache: bool | None, checkpointing: bool
) -> None:
    """transformers keeps the examples of a row apart only without a cache."""
    model = tiny.with_lora(tiny.llama()).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = packed(tiny.batches(1, size=3)[0])
    batch |= {} if use_cache is None else {"use_cache": use_cache}
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    assert one_loss(handle, model, batch).item() == 0
    assert handle.last_check.compared == "tuned"
    # A cache of keys and values lets them see each other.
    apart, = tiny.batches(1, size=3)
    model.eval()
    both = [tiny.hidden_states(model, b) for b in (batch, apart)]
    first = int(apart["attention_mask"][0].sum())
    second = slice(first, first + int(apart["attention_mask"][1].sum()))
    kept = both[1][1, : second.stop - second.start]
    assert torch.allclose(both[0][0, second], kept, atol=1e-5) == (use_cache is False)


def test_counts() -> None:
    model = tiny.with_lora(tiny.llama()).train()
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    batch, = tiny.batches(1)
    model(**batch)
    term = handle.penalty(batch)
    with pytest.raises(ValueError, match="call begin_step"):
        term.loss
    with pytest.raises(ValueError, match="end_step without begin_step"):
        handle.end_step()
    empty = dict(batch, labels=torch.full_like(batch["labels"], -100))
    for nothing in ([empty, empty], [], 0):
        with pytest.raises(ValueError, match="no token of a whole step counts"):
            handle.begin_step(nothing)
    moved(model)
    for count in (10, 20):
        handle.begin_step(count)
        model(**batch)
        term = handle.penalty(batch)
        assert term.loss.item() == pytest.approx(term.loss_sum.item() / count)


class OnDevice(torch.Tensor):
    """A host tensor that passes for one of cuda:0."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


def test_a_step_without_tokens_on_a_device_is_found_later() -> None:
    handle = attach(tiny.with_lora(tiny.llama()), DICTIONARY.plan, lam=1.0)
    mask = torch.tensor([True, False]).as_subclass(OnDevice)
    handle.begin_step([mask, ~mask])
    assert handle._count == 2
    handle.metrics()
    handle.begin_step([mask & ~mask])
    assert handle._count == 1
    for late in (handle.metrics, handle.state_dict):
        handle.begin_step([mask & ~mask])
        with pytest.raises(ValueError, match="no token of a whole step counts"):
            late()
    handle.metrics()


def test_reduction_lambda_and_several_layers() -> None:
    batch, = tiny.batches(1)
    one, two = Dictionary(0, seed=4), Dictionary(2, seed=5)
    model = moved(tiny.with_lora(tiny.llama())).train()

    def terms(plan, **settings):
        handle = attach(model, plan, **settings)
        handle.begin_step([batch])
        model(**batch)
        term = handle.penalty(batch)
        handle.remove()
        return term, handle

    first, _ = terms(one.plan, lam=3.0)
    second, _ = terms(two.plan, lam=5.0)
    both, handle = terms([one.plan, two.plan], lam=[3.0, 5.0])
    torch.testing.assert_close(both.loss, first.loss + second.loss)
    assert first.loss > 0 and second.loss > 0
    same, _ = terms([one.plan, two.plan], lam=5.0)
    torch.testing.assert_close(same.loss, first.loss * 5 / 3 + second.loss)
    assert {"blockem/layer0/penalty", "blockem/layer2/penalty"} <= set(handle.metrics())
    mean, _ = terms(one.plan, lam=3.0, reduction="mean")
    torch.testing.assert_close(mean.loss, first.loss / 5)


# Lambda.


def test_ratio_lambda() -> None:
    assert ratio_lambda(100, 0.4, 2.0) == 20.0
    for arguments in [(0, 1, 1), (1, -0.1, 1), (1, 1, 0), (1, 1, math.nan)]:
        with pytest.raises(ValueError, match="expected a positive number"):
            ratio_lambda(*arguments)


def test_calibration() -> None:
    """An unblocked run's adapters: what they removed of the loss and would have paid."""
    sample = tiny.batches(4, seed=8)
    model = tiny.with_lora(tiny.llama())
    tiny.reference_training(model, DICTIONARY, [sample] * 12, 0.0, SGD)
    model.train()
    handle = attach(model, DICTIONARY.plan, lam=0.0)
    lam = handle.calibrate(sample, ratio=10)
    items = sum((b["labels"][:, 1:] != -100).sum() for b in sample)
    count = sum((b["labels"] != -100).sum() for b in sample)
    with torch.no_grad():
        loss = sum(tiny.task_loss_sum(model, b) for b in sample) / items
        with model.disable_adapter():
            before = sum(tiny.task_loss_sum(model, b) for b in sample) / items
        paid = 0.0
        for b in sample:
            with model.disable_adapter():
                base = tiny.hidden_states(model, b)
            paid += DICTIONARY.loss_sum(tiny.hidden_states(model, b), base, b["labels"] != -100)
    assert before > loss + 0.1
    assert lam == pytest.approx(10 * ((before - loss) / (paid / count)).item(), rel=1e-3)
    assert model.training
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert math.isnan(handle.metrics()["blockem/penalty"])  # nothing was added to the logs


def test_dual_ascent_reaches_its_target() -> None:
    """Unblocked, the penalty settles far above the target; lambda rises until it is met."""
    steps = [tiny.batches(1, seed=0, size=4)] * 150
    free = tiny.reference_training(
        tiny.with_lora(tiny.llama()), DICTIONARY, steps[:60], 0.0,
        lambda p: torch.optim.Adam(p, lr=3e-3),
    )
    target = 0.2 * free[-1]
    model = tiny.with_lora(tiny.llama()).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    lam = DualAscent(target, rate=1.0 / target)
    handle = attach(model, DICTIONARY.plan, lam=lam)
    found, lams = [], []
    for step in steps:
        handle.begin_step(step)
        for batch in step:
            (model(**batch).loss + handle.penalty(batch).loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = lam.value.item()
        handle.end_step()
        metrics = handle.metrics()
        found.append(metrics["blockem/penalty"])
        want = max(0.0, before + (found[-1] - target) / target)
        # lambda is f64, and the penalties on both sides are rounded to f32: before the target, and perhaps
        # lambda, is taken from them.
        rounded = 2**-23 * found[-1] / target
        assert lam.value.item() == pytest.approx(want, rel=1e-12, abs=rounded)
        lams.append(lam.value.item())
    assert lams[0] == 0.0 and max(lams) > 0
    assert sum(found[-20:]) / 20 < 1.3 * target < 0.5 * free[-1]


def test_a_step_that_was_not_ended_leaves_nothing() -> None:
    one, two = tiny.batches(2)
    found = []
    for given_up in ([], [one]):
        model = moved(tiny.with_lora(tiny.llama())).train()
        lam = DualAscent(0.0, rate=1.0)
        handle = attach(model, DICTIONARY.plan, lam=lam)
        for batch in given_up:
            handle.begin_step([batch])
            model(**batch), handle.penalty(batch)
        handle.begin_step([two])
        assert handle._micro == 0  # by which a watch draws
        model(**two), handle.penalty(two)
        handle.end_step()
        found.append(lam.value.item())
    assert found[0] == found[1] > 0


def test_a_penalty_that_is_not_finite_leaves_lambda_as_it_is() -> None:
    model = moved(tiny.with_lora(tiny.llama())).train()
    batch, = tiny.batches(1)
    for maximum in (math.inf, 50.0):
        lam = DualAscent(0.0, rate=1.0, initial=3.0, maximum=maximum)
        for wrong in (math.nan, math.inf):
            lam.update(torch.tensor(wrong))
            assert lam.value == 3
    handle = attach(model, DICTIONARY.plan, lam=lam)
    hook = handle._stack.layers[0].register_forward_hook(lambda module, args, out: out * math.nan)
    handle.last_check = handle  # no self-check
    assert one_loss(handle, model, batch).isnan() and lam.value == 3
    hook.remove()
    assert one_loss(handle, model, batch).isfinite() and 3 < lam.value < 50


def test_a_resumed_run_continues_exactly() -> None:
    steps = [tiny.batches(2, seed=i) for i in range(10)]

    def start():
        model = tiny.with_lora(tiny.llama()).train()
        lam = DualAscent(0.001, rate=0.5, initial=0.01)
        return model, attach(model, DICTIONARY.plan, lam=lam), SGD(
            [p for p in model.parameters() if p.requires_grad])

    def run(model, handle, optimizer, steps) -> list[dict]:
        found = []
        for step in steps:
            handle.begin_step(step)
            for batch in step:
                (0.5 * model(**batch).loss + handle.penalty(batch).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            handle.end_step()
            found.append(handle.metrics(per_latent=True))
        return found

    want = run(*start(), steps)
    model, handle, optimizer = start()
    begun = run(model, handle, optimizer, steps[:4])
    weights = peft.get_peft_model_state_dict(model)
    weights = {k: v.clone() for k, v in weights.items()}
    state = json.loads(json.dumps(handle.state_dict()))
    model, handle, optimizer = start()
    peft.set_peft_model_state_dict(model, weights)
    handle.load_state_dict(state)
    assert begun + run(model, handle, optimizer, steps[4:]) == want
    assert handle.state_dict()["steps"] == 10 and len({m["blockem/lambda"] for m in want}) > 5
    assert handle.last_check.compared == "adapters off"

    # Another run's state is refused, by name.
    for change, text in [
        ({"version": 2}, "version 2"),
        ({"reduction": "mean"}, "reduction mean"),
        ({"sites": []}, "0 layers"),
    ]:
        with pytest.raises(ValueError, match=text):
            handle.load_state_dict(state | change)
    site, = state["sites"]
    for change, text in [
        ({"plan": "0"}, "plan at the output of decoder block 1"),
        ({"signs": [1] * 5}, "signs at"),
        ({"layer": 2}, "layer at"),
        ({"lambda": {"kind": "fixed", "value": 1.0}}, "lambda's kind was fixed"),
        ({"lambda": site["lambda"] | {"target": 1.0}}, "lambda's target was 1.0"),
    ]:
        with pytest.raises(ValueError, match=text):
            handle.load_state_dict(state | {"sites": [site | change]})


# Logs.


def test_metrics() -> None:
    model = moved(tiny.with_lora(tiny.llama())).train()
    handle = attach(model, DICTIONARY.plan, lam=7.0)
    steps = [tiny.batches(2, seed=i) for i in range(3)]
    rises, zs, masks = [], [], []
    for step in steps:
        handle.begin_step(step)
        for batch in step:
            model(**batch)
            handle.penalty(batch)
            with torch.no_grad():
                with model.disable_adapter():
                    base = DICTIONARY.encode(tiny.hidden_states(model, batch))
                z = DICTIONARY.encode(tiny.hidden_states(model, batch))
            keep = batch["labels"] != -100
            rises.append((DICTIONARY.signs * (z - base)).relu()[keep]), zs.append(z[keep])
        handle.end_step()
    rise, z = torch.cat(rises), torch.cat(zs)
    cost, negative = DICTIONARY.weights * rise**2, DICTIONARY.signs < 0
    found = handle.metrics(per_latent=True)
    near = lambda x: pytest.approx(float(x), rel=1e-4)
    assert found["blockem/penalty"] == near(cost.sum() / len(cost))
    assert found["blockem/penalty_pos"] == near(cost[:, ~negative].sum() / len(cost))
    assert found["blockem/penalty_neg"] == near(cost[:, negative].sum() / len(cost))
    assert found["blockem/active"] == near((rise > 0).double().mean())
    dead = (cost * (z == 0))[:, negative].sum() / cost[:, negative].sum()
    assert found["blockem/dead_neg"] == near(dead) and 0 < dead < 1
    assert found["blockem/lambda"] == 7.0
    for i, id in enumerate(DICTIONARY.ids):
        assert found[f"blockem/latent/{id}"] == near(cost[:, i].sum() / len(cost))
    assert "blockem/latent/7" not in handle.metrics()
    assert math.isnan(handle.metrics()["blockem/penalty"])


def test_cosine() -> None:
    model = moved(tiny.with_lora(tiny.llama())).train()
    handle = attach(model, DICTIONARY.plan, lam=7.0)
    batch, = tiny.batches(1)
    handle.begin_step([batch])
    task = model(**batch).loss
    term = handle.penalty(batch)
    found = term.cosine(task)
    hidden, = term.hidden
    one, = torch.autograd.grad(term.loss, hidden, retain_graph=True)
    two, = torch.autograd.grad(task, hidden, retain_graph=True)
    want = torch.nn.functional.cosine_similarity(one.flatten(), two.flatten(), dim=0)
    assert found.item() == pytest.approx(want.item(), rel=1e-4) and abs(want) > 1e-3
    assert all(p.grad is None for p in model.parameters())
    (task + term.loss).backward()  # still there


# Arguments.


def test_arguments() -> None:
    model, plan = tiny.with_lora(tiny.llama()), DICTIONARY.plan
    unknown = Dictionary(layer=None).plan
    for error, text, call in [
        (ValueError, "layer is 2, but the SAE reads the output of decoder block 1", lambda: attach(
            model, plan, layer=2, lam=1.0)),
        (ValueError, "does not say which layer", lambda: attach(model, unknown, lam=1.0)),
        (ValueError, "layer 3 does not exist: model.layers has the blocks 0 to 2", lambda: attach(
            model, unknown, layer=3, lam=1.0)),
        (ValueError, "layer -1 does not exist", lambda: attach(model, unknown, layer=-1, lam=1.0)),
        (ValueError, "2 plans, 1 layers", lambda: attach(model, [plan] * 2, layer=[1], lam=1.0)),
        (ValueError, "lam is -1", lambda: attach(model, plan, lam=-1.0)),
        (ValueError, "lam is nan", lambda: attach(model, plan, lam=math.nan)),
        (ValueError, "tokens is 'some'", lambda: attach(model, plan, lam=1.0, tokens="some")),
        (ValueError, "reduction is 'max'", lambda: attach(model, plan, lam=1.0, reduction="max")),
        (ValueError, "gradients is 'x'", lambda: attach(model, plan, lam=1.0, gradients="x")),
        (ValueError, "reference is 'x'", lambda: attach(model, plan, lam=1.0, reference="x")),
        (ValueError, "a DualAscent each", lambda: attach(
            model, [plan] * 2, lam=DualAscent(1.0, 1.0))),
        (ValueError, "rate is -1", lambda: DualAscent(1.0, -1.0)),
        (TypeError, "plan is a str", lambda: attach(model, ["x"], lam=1.0)),
        (TypeError, "model is a str", lambda: attach("x", plan, lam=1.0)),
        (ValueError, "cannot be told: candidates are none", lambda: attach(
            torch.nn.Linear(2, 2), plan, lam=1.0, reference=tiny.llama())),
        (ValueError, "a.b of .* is not a", lambda: attach(model, plan, lam=1.0, layers="a.b")),
    ]:
        with pytest.raises(error, match=text):
            call()
    attach(model, unknown, layer=1, lam=1.0, layers="model.layers").remove()
    assert not any(m._forward_hooks for m in model.modules())
