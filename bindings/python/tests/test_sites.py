"""SAEs of other places than a block's output: read, pushed and trained on where they lie, in the
modules that these tests name for each family by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from tiny import Dictionary

import blockem
from blockem.torch import attach, steered

LAYER = 1
HOOKS = {
    "attention_output": "hook_attn_out", "mlp_output": "hook_mlp_out",
    "attention_z": "attn.hook_z", "mlp_input": "mlp.hook_in", "block_output": "hook_resid_post",
}  # fmt: skip
#: Of each kind, an SAE with latents of its own.
SAES = {kind: Dictionary(hook=f"blocks.{LAYER}.{hook}", seed=10 + i)
        for i, (kind, hook) in enumerate(HOOKS.items())}  # fmt: skip

BASE = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
GPT2 = dict(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=64)
#: How transformers knows a family, its configuration, and in its blocks: what the attention adds,
#: what the MLP adds, the projection that reads z, and what reads the MLP's input.
FAMILIES: dict[str, tuple[dict, str, tuple[str, str, str, str]]] = {
    "llama": (BASE, "model.layers", ("self_attn", "mlp", "self_attn.o_proj", "mlp")),
    "qwen3": (BASE, "model.layers", ("self_attn", "mlp", "self_attn.o_proj", "mlp")),
    "gemma2": (BASE, "model.layers", (
        "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj", "mlp")),
    "gemma3_text": (BASE, "model.layers", (
        "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj", "mlp")),
    "olmo2": (BASE, "model.layers", (
        "post_attention_layernorm", "post_feedforward_layernorm", "self_attn.o_proj", "mlp")),
    "glm4": (BASE | {"partial_rotary_factor": 0.5}, "model.layers", (
        "post_self_attn_layernorm", "post_mlp_layernorm", "self_attn.o_proj", "mlp")),
    "mixtral": (BASE | {"num_local_experts": 2}, "model.layers", (
        "self_attn", "mlp", "self_attn.o_proj", "mlp")),
    "phi": (BASE, "model.layers", ("self_attn", "mlp", "self_attn.dense", "mlp")),
    "gpt2": (GPT2, "transformer.h", ("attn", "mlp", "attn.c_proj", "mlp")),
    "gptj": (GPT2 | {"rotary_dim": 4}, "transformer.h", ("attn", "mlp", "attn.out_proj", "mlp")),
    "gpt_neox": (BASE, "gpt_neox.layers", ("attention", "mlp", "attention.dense", "mlp")),
    "falcon": (dict(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
               "transformer.h", ("self_attention", "mlp", "self_attention.dense", "mlp")),
    "bloom": (dict(vocab_size=50, hidden_size=32, n_layer=3, n_head=4), "transformer.h", (
        "self_attention.dense", "mlp.dense_4h_to_h", "self_attention.dense", "mlp")),
    "mpt": (dict(vocab_size=50, d_model=32, n_layers=3, n_heads=4), "transformer.blocks", (
        "attn", "ffn.down_proj", "attn.out_proj", "ffn")),
    "opt": (dict(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
                 num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=64),
            "model.decoder.layers", ("self_attn", "fc2", "self_attn.out_proj", "fc1")),
}  # fmt: skip


def family(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **FAMILIES[name][0])
    # With a cache GPT-J's keys lie otherwise in memory, and one product rounds otherwise.
    config.use_cache = False
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return transformers.AutoModelForCausalLM.from_config(config)


def lora(model: torch.nn.Module, **settings: object) -> peft.PeftModel:
    torch.manual_seed(1)
    settings = {"target_modules": "all-linear", "r": 4, "task_type": "CAUSAL_LM"} | settings
    return peft.get_peft_model(model, peft.LoraConfig(**settings)).train()


def moved(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def captured(model: torch.nn.Module, batch: dict, paths: dict[str, tuple[str, bool]]) -> dict:
    """[B, T, d] at each module, its input or output, in one forward of the model, by plain hooks."""
    core, found, hooks = getattr(model, "base_model", model), {}, []
    core = core.model if isinstance(model, peft.PeftModel) else model
    for key, (path, of_input) in paths.items():

        def output(module, args, kwargs, out, key=key) -> None:
            out = out[0] if isinstance(out, tuple) else out
            found[key] = out.clone().view(*batch["input_ids"].shape, -1)

        def given(module, args, kwargs, key=key) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            found[key] = x.view(*batch["input_ids"].shape, -1)

        module = core.get_submodule(path)
        hooks.append(module.register_forward_pre_hook(given, with_kwargs=True) if of_input
                     else module.register_forward_hook(output, with_kwargs=True))  # fmt: skip
    out = model(**batch, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return found | {"block_output": out.hidden_states[LAYER + 1], "block_input": out.hidden_states[LAYER]}


def places(name: str) -> dict[str, tuple[str, bool]]:
    _, layers, (attention, mlp, projection, reader) = FAMILIES[name]
    block = f"{layers}.{LAYER}"
    return {
        "attention_output": (f"{block}.{attention}", False),
        "mlp_output": (f"{block}.{mlp}", False),
        "attention_z": (f"{block}.{projection}", True),
        "mlp_input": (f"{block}.{reader}", True),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_a_block_is_read_where_it_lies(name: str) -> None:
    """Values and gradients of five SAEs of one block, in one attach, against torch's own operations
    on what plain hooks saw; and what is called an addition is what is added."""
    batch, = tiny.batches(1)
    mask = batch["labels"] != -100
    base = family(name)
    with torch.no_grad():
        reference = captured(base, batch, places(name))
    added = reference["attention_output"] + reference["mlp_output"]
    torch.testing.assert_close(reference["block_input"] + added, reference["block_output"])

    model = lora(family(name))
    model.config._attn_implementation = base.config._attn_implementation
    plans = [sae.plan for sae in SAES.values()]
    handle = attach(model, plans, lam=[1.0, 2.0, 3.0, 4.0, 5.0])
    handle.begin_step([batch])
    model(**batch)
    assert [part.loss_sum.item() for part in handle.penalty(batch).parts] == [0.0] * 5
    handle.end_step()

    moved(model)
    handle.begin_step([batch])
    model(**batch)
    term = handle.penalty(batch)
    term.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    handle.remove()

    tuned, want = captured(model, batch, places(name)), 0.0
    for lam, (kind, sae), part in zip(range(1, 6), SAES.items(), term.parts, strict=True):
        loss_sum = sae.loss_sum(tuned[kind], reference[kind], mask)
        assert part.loss_sum.item() == pytest.approx(loss_sum.item(), rel=1e-4), kind
        assert loss_sum > 0, kind
        want += lam * loss_sum / mask.sum()
    want.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, g in found.items() if g.any()} == {n for n, g in own.items() if g.any()}
    size = max(grad.abs().max() for grad in own.values()).item()
    for n, grad in own.items():
        torch.testing.assert_close(
            found.get(n, torch.zeros_like(grad)), grad, rtol=1e-3, atol=1e-4 * size
        )


def test_several_sites_have_logs_and_states_of_their_own() -> None:
    model, (batch,) = lora(tiny.llama()), tiny.batches(1)
    plans = [SAES[kind].plan for kind in ("block_output", "mlp_output")]
    handle = attach(model, plans, lam=1.0)
    handle.begin_step([batch])
    model(**batch), handle.penalty(batch)
    handle.end_step()
    found = handle.metrics()
    assert {"blockem/layer1/penalty", "blockem/layer1.mlp_output/penalty"} <= set(found)
    more = SAES["mlp_output"].latents.union(blockem.Latents([1], [1]))
    with pytest.raises(ValueError, match="layer is 1; expected one of layer1, layer1.mlp_output"):
        handle.swap(more, layer=1)
    handle.swap(more, layer=1, site="mlp_output")
    assert [len(plan.latents) for plan in handle.plans] == [5, 6]
    watch = blockem.torch.Watch(handle, blockem.Stats(SAES["mlp_output"].sae))
    assert (watch.layer, watch.site) == (1, "mlp_output") and "mlp_output of" in repr(watch)
    state = handle.state_dict()
    handle.remove()
    with pytest.raises(ValueError, match="the state's site at .* is mlp_output"):
        other = Dictionary(seed=11).plan
        attach(model, [plans[0], other], lam=1.0).load_state_dict(state)


def test_the_embedding_is_the_input_of_the_first_block() -> None:
    base, (batch,) = tiny.llama(), tiny.batches(1)
    sae = Dictionary(hook="blocks.0.hook_resid_pre")
    assert (sae.sae.site, sae.sae.layer) == ("embedding", None)
    model = lora(tiny.llama(), target_modules=["embed_tokens"])
    handle = attach(moved(model), sae.plan, lam=1.0)
    handle.begin_step([batch])
    model(**batch)
    found = handle.penalty(batch)
    with torch.no_grad():
        want = sae.loss_sum(*(tiny.hidden_states(m, batch, -1) for m in (model, base)),
                            batch["labels"] != -100)
    assert found.loss_sum.item() == pytest.approx(want.item(), rel=1e-4) and want > 0


def test_the_base_pass_stops_right_after_what_is_read() -> None:
    model, (batch,) = lora(tiny.llama(layers=4)), tiny.batches(1)
    plans = [SAES[kind].plan for kind in ("attention_output", "attention_z")]
    handle = attach(model, plans, lam=1.0)
    ran = []
    for i, block in enumerate(model.get_base_model().model.layers):
        for name in ("self_attn", "mlp"):
            block.get_submodule(name).register_forward_hook(
                lambda *_, at=(i, name): ran.append(at)
            )
    passes = []
    for _ in range(2):
        handle.begin_step([batch])
        model(**batch)
        ran.clear()
        handle.penalty(batch)
        handle.end_step()
        passes.append(list(ran))
    # The first pass looks at the whole block: whether its additions are that.
    assert passes[0] == [(0, "self_attn"), (0, "mlp"), (1, "self_attn"), (1, "mlp")]
    assert passes[1] == passes[0][:-1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_show_what_is_inside(reentrant: bool) -> None:
    """Reentrant checkpointing has no gradient inside of a block, and says so."""
    batch, = tiny.batches(1)
    plans = [SAES[kind].plan for kind in ("attention_z", "mlp_output")]
    gradients = []
    for checkpointing in (False, True):
        model = moved(lora(tiny.llama()))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        handle = attach(model, plans, lam=1.0)
        handle.begin_step([batch])
        loss = model(**batch).loss
        if checkpointing and reentrant:
            with pytest.raises(ValueError, match="must not be reentrant"):
                handle.penalty(batch)
            return
        (loss + handle.penalty(batch).loss).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_compiled_models_and_copies_are_read_inside_of_a_block() -> None:
    batch, = tiny.batches(1)
    sae, name = SAES["mlp_output"], {"mlp_output": places("llama")["mlp_output"]}
    model, base = tiny.llama(layers=2).train(), tiny.llama(layers=2)
    with torch.no_grad():
        reference = captured(base, batch, name)["mlp_output"]
    compiled = torch.compile(model, backend="eager")
    handle = attach(compiled, sae.plan, lam=1.0, reference="frozen_copy")
    for _ in range(2):
        handle.begin_step([batch])
        compiled(**batch)
        term = handle.penalty(batch)
        handle.end_step()
        with torch.no_grad():
            tuned = captured(model, batch, name)["mlp_output"]
        want = sae.loss_sum(tuned, reference, batch["labels"] != -100).item()
        assert term.loss_sum.item() == pytest.approx(want, rel=1e-4)
        handle.discard()
        moved(model)
    assert want > 0


def test_a_cosine_sees_both_losses_inside_of_a_block() -> None:
    """What is hooked lies on the way of the task's loss too."""
    batch, = tiny.batches(1)
    model = moved(lora(tiny.llama()))
    handle = attach(model, SAES["mlp_output"].plan, lam=1.0)
    handle.begin_step([batch])
    loss = model(**batch).loss
    term = handle.penalty(batch)
    hidden, = term.hidden
    one, two = (torch.autograd.grad(x, hidden, retain_graph=True)[0].double().flatten()
                for x in (term.weighted, loss))  # fmt: skip
    assert term.cosine(loss).item() == pytest.approx(torch.cosine_similarity(one, two, 0).item())


# ---- Steering, caches and studies --------------------------------------------------------------


def steering_of(kind: str) -> tuple[blockem.Steering, torch.Tensor]:
    sae, generator = SAES[kind], torch.Generator().manual_seed(9)
    decoder = torch.randn(12, 32, generator=generator)
    opened = blockem.Sae.from_tensors(
        encoder_weight=sae.weight, encoder_bias=sae.bias, encoder_layout="f_d",
        decoder_weight=decoder, hook_name=f"blocks.{LAYER}.{HOOKS[kind]}",
    )  # fmt: skip
    return blockem.Steering(opened, [3]), decoder[3] / decoder[3].norm()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "opt", "mpt"])
@pytest.mark.parametrize("kind", ["attention_output", "mlp_output", "attention_z", "mlp_input"])
def test_a_push_lands_where_the_sae_reads(name: str, kind: str) -> None:
    model, (batch,) = family(name).eval(), tiny.batches(1)
    steering, unit = steering_of(kind)
    path, of_input = places(name)[kind]

    def push(module, args, kwargs):
        if args:
            return (args[0] + 0.7 * 3 * unit, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] + 0.7 * 3 * unit}

    def push_output(module, args, out):
        if isinstance(out, tuple):
            return (out[0] + 0.7 * 3 * unit, *out[1:])
        return out + 0.7 * 3 * unit

    module = model.get_submodule(path)
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model(**inputs).logits
        hook = (module.register_forward_pre_hook(push, with_kwargs=True) if of_input
                else module.register_forward_hook(push_output))  # fmt: skip
        want = model(**inputs).logits
        hook.remove()
        with steered(model, steering, [3, 3], [0.7, 0.7], scale=3.0):
            found = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-4)


def test_generated_tokens_are_pushed_at_the_embedding_and_inside_of_a_block() -> None:
    """Also without a cache of keys and values, where every forward has all positions."""
    model = family("opt").eval()
    prompt = tiny.batches(1)[0]["input_ids"][:, :5].clamp(min=3)
    for hook in ("blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"):
        sae = Dictionary(hook=hook)
        opened = blockem.Sae.from_tensors(
            encoder_weight=sae.weight, encoder_bias=sae.bias, encoder_layout="f_d",
            decoder_weight=sae.weight, hook_name=hook,
        )  # fmt: skip
        steering, answers = blockem.Steering(opened, [3]), []
        for use_cache in (True, False):
            with steered(model, steering, [3, 3], [1.0, -1.0], scale=20.0):
                answers.append(model.generate(
                    prompt, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=49
                ))  # fmt: skip
        assert torch.equal(*answers)
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=49)
        assert not torch.equal(answers[0], plain)


def test_a_watch_sees_the_site() -> None:
    """Of OPT's MLP too, whose modules are given one row for each token."""
    base, model, (batch,) = family("opt").train(), moved(lora(family("opt"))), tiny.batches(1)
    sae = SAES["mlp_output"]
    handle = attach(model, sae.plan, lam=1.0)
    watch = blockem.torch.Watch(handle, blockem.Stats(sae.sae), share=1.0, min_tokens=1)
    handle.begin_step([batch])
    model(**batch)
    handle.penalty(batch)
    handle.end_step()
    found = watch.report()
    handle.remove()
    want = blockem.Stats(sae.sae)
    with torch.no_grad():
        hidden = [captured(m, batch, places("opt"))["mlp_output"].contiguous() for m in (model, base)]
    want.update(*hidden, batch["labels"] != -100)
    np.testing.assert_allclose(found.delta, want.delta, rtol=1e-4, atol=1e-6)
    assert np.abs(want.delta).max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_cache_holds_z_of_the_site(tmp_path: Path, name: str) -> None:
    base, (batch,) = family(name).eval(), tiny.batches(1)
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    plan = SAES["mlp_output"].plan
    with torch.no_grad():
        hidden = captured(base, batch, places(name))["mlp_output"]
    with blockem.Cache(tmp_path / "base.cache", plan, base_model="tiny", dtype="float32",
                       mode="create") as cache:  # fmt: skip
        cache.fill(base, [inputs], progress=False)
        found = cache.reference(inputs)
    want = plan.encode(hidden) * (batch["attention_mask"][..., None] != 0)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_cache_belongs_to_its_site(tmp_path: Path) -> None:
    """Where the SAE says it, and where the user does."""
    base, (batch,) = tiny.llama(), tiny.batches(1)
    inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
    embedding = Dictionary(hook="blocks.0.hook_resid_pre").plan
    how = {"base_model": "tiny", "dtype": "float32"}
    for name, plan, stated, layer, kind in [
        ("a", SAES["mlp_output"].plan, {}, 1, "mlp_output"),
        ("b", unknown(), {"layer": 1, "site": "attention_output"}, 1, "attention_output"),
        ("c", unknown(), {"layer": 1}, 1, "block_output"),
        ("d", embedding, {}, None, "embedding"),
        ("e", unknown(), {"site": "model.layers.1.mlp.output"}, 1, "module_output"),
    ]:
        with blockem.Cache(tmp_path / name, plan, mode="create", **how, **stated) as cache:
            cache.fill(base, [inputs], progress=False)
        again = blockem.Cache(tmp_path / name, plan)
        assert (again.layer, again.site) == (cache.layer, cache.site) == (layer, kind)
        model = lora(tiny.llama(), target_modules=["embed_tokens", "q_proj", "gate_proj"])
        given = {**stated, "reference": again.reference, "tolerance": 1e-5}
        handle = attach(model, plan, lam=1.0, **given)
        handle.begin_step([batch])
        model(**batch)
        assert handle.penalty(batch).loss_sum.item() < 1e-9
        handle.remove()
        again.close()
    for run, text in [
        (lambda: blockem.Cache(tmp_path / "b", unknown(), site="mlp_output"),
         "site 'attention_output', expected 'mlp_output'"),
        (lambda: blockem.Cache(tmp_path / "c", unknown(), site="mlp_output"),
         "site 'block_output', expected 'mlp_output'"),
        (lambda: blockem.Cache(tmp_path / "e", unknown(), site="model.layers.1.self_attn.output"),
         "site 'model.layers.1.mlp.output', expected 'model.layers.1.self_attn.output'"),
    ]:
        with pytest.raises(blockem.Error, match=text) as error:
            run()
        assert error.value.name == "CACHE_STALE"
    with pytest.raises(ValueError, match="z of attention_output of .*, the penalty is on the output"):
        attach(lora(tiny.llama()), unknown(), layer=1, lam=1.0,
               reference=blockem.Cache(tmp_path / "b", unknown()).reference)  # fmt: skip


# ---- What is stated, and what is refused ---------------------------------------------------------


def unknown() -> blockem.Plan:
    return Dictionary(None).plan


def test_a_site_is_stated_where_the_file_does_not_say() -> None:
    model = lora(tiny.llama())
    for site, place in [
        ("mlp_output", "mlp_output of decoder block 1 (0-based), the output of model.layers.1.mlp"),
        ("block_input", "the output of decoder block 0 (0-based), the output of model.layers.0"),
        ("block_output", "the output of decoder block 1"),
        ("model.layers.1.mlp.act_fn.input", "the input of model.layers.1.mlp.act_fn"),
        ("attention_z", "the input of model.layers.1.self_attn.o_proj"),
    ]:
        handle = attach(model, unknown(), layer=1, site=site, lam=1.0)
        assert place in repr(handle)
        handle.remove()


def odd(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return lora(transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **(BASE | settings))
    ))  # fmt: skip


def test_what_a_model_does_not_show_is_refused() -> None:
    model = lora(tiny.llama())
    at = lambda hook, **how: lambda: attach(model, Dictionary(hook=hook).plan, lam=1.0, **how)
    for kind, text, run in [
        ("UNSUPPORTED", "block_middle.*hook_resid_mid.*LlamaModel does not show.*self_attn, mlp.*site=",
         at("blocks.1.hook_resid_mid")),
        ("INVALID_ARGUMENT", "site is 'block_output', but the SAE reads mlp_output of decoder block 1",
         at("blocks.1.hook_mlp_out", site="block_output")),
        ("INVALID_ARGUMENT", "layer is 2, but the SAE reads mlp_output of decoder block 1",
         at("blocks.1.hook_mlp_out", layer=2)),
        ("INVALID_ARGUMENT", "site is 'mlp'; expected one of 'block_input'",
         lambda: attach(model, unknown(), layer=1, site="mlp", lam=1.0)),
        ("INVALID_ARGUMENT", "has no such module: it has self_attn, mlp",
         lambda: attach(model, unknown(), site="model.layers.1.ffn.output", lam=1.0)),
        ("INVALID_ARGUMENT", "of decoder block 1, and the layer is 2",
         lambda: attach(model, unknown(), layer=2, site="model.layers.1.mlp.output", lam=1.0)),
        ("INVALID_ARGUMENT", "site is 'model.layers.1.mlp.output', but the SAE reads the output of",
         at("blocks.1.hook_resid_post", site="model.layers.1.mlp.output")),
        ("SHAPE", "reads hidden states .*32.*the input of layers.1.mlp.down_proj has .*48",
         lambda: attach(model, unknown(), site="model.layers.1.mlp.down_proj.input", lam=1.0)),
        ("SHAPE", "the output of decoder block 1 has .*32",
         lambda: attach(model, Dictionary(width=16).plan, lam=1.0)),
        ("INVALID_ARGUMENT", "1 plans, 1 layers, 2 sites",
         lambda: attach(model, unknown(), site=["mlp_output", "embedding"], lam=1.0)),
        ("UNSUPPORTED", "attention_z.*BitNetModel does not show",
         lambda: attach(odd("bitnet"), SAES["attention_z"].plan, lam=1.0)),
        ("UNSUPPORTED", "hook_embed.*also wpe before",
         lambda: attach(lora(family("gpt2")), Dictionary(hook="hook_embed").plan, lam=1.0)),
    ]:  # fmt: skip
        with pytest.raises(blockem.Error, match=text) as error:
            run()
        assert error.value.name == kind, text


@pytest.mark.parametrize("name", ["granite", "lfm2"])
def test_an_addition_that_is_scaled_is_no_addition(name: str) -> None:
    """Granite multiplies what its MLP puts out; LFM2 does not, also where a block has a convolution
    in the place of attention."""
    extra = {"residual_multiplier": 0.5} if name == "granite" else {"full_attn_idxs": [2]}
    model, (batch,) = odd(name, **extra), tiny.batches(1)
    handle = attach(model, SAES["mlp_output"].plan, lam=1.0)
    handle.begin_step([batch])
    model(**batch)
    if name == "lfm2":
        assert handle.penalty(batch).loss_sum.item() == 0
        return
    with pytest.raises(blockem.Error, match='something else than the sum.*site="layers.1.mlp.out') as e:
        handle.penalty(batch)
    assert e.value.name == "UNSUPPORTED"
    handle.remove()
    stated = attach(model, SAES["mlp_output"].plan, site="model.layers.1.mlp.output", lam=1.0)
    stated.begin_step([batch])
    model(**batch)
    assert stated.penalty(batch).loss_sum.item() == 0
