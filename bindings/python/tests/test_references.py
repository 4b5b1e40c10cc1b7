"""References are of the base model: whatever peft does to a model, z of the original, or an error
whose remedy works."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from test_attach import moved, one_loss
from tiny import Dictionary

import blockem
from blockem.torch import attach
from blockem.torch._peft import METHODS

DICTIONARY = Dictionary()


def lora(**settings: object) -> peft.LoraConfig:
    settings = {"r": 4, "target_modules": ["q_proj", "up_proj"]} | settings
    return peft.LoraConfig(task_type="CAUSAL_LM", **settings)


def with_adapter(config: peft.PeftConfig, model: torch.nn.Module | None = None) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(tiny.llama() if model is None else model, config).train()


def layer_output(model: torch.nn.Module, batch: dict, layers: str = "model.layers") -> torch.Tensor:
    """By a hook of its own, in a pass of the whole model."""
    seen = []
    layer = model.get_submodule(layers)[tiny.LAYER]
    hook = layer.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    return seen[0]


def reference_of(handle: blockem.torch.Handle, model: torch.nn.Module, batch: dict) -> torch.Tensor:
    model(**batch)
    forward = handle._recorder.take()
    (z,), _ = handle._references(forward, batch, batch["labels"] != -100)
    return z


def expect_reference(
    model: torch.nn.Module, original: torch.nn.Module, batch: dict, layers: str = "model.layers",
    **settings: object,
) -> None:
    """After training too, bit for bit."""
    want = DICTIONARY.plan.encode(layer_output(original, batch, layers))
    handle = attach(model, DICTIONARY.plan, lam=1.0, **settings)
    for _ in range(2):
        assert torch.equal(reference_of(handle, model, batch), want)
        moved(model)
    handle.remove()


# What peft's methods leave of the base.

#: What each method needs beside target_modules.
SETTINGS = {
    "ADALORA": {"total_step": 10}, "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 2},
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 16}, "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["up_proj"]}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LORA": {"r": 4}, "MISS": {"r": 4}, "OFT": {"oft_block_size": 4}, "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [4, 5, 6]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8}, "WAVEFT": {"n_frequency": 10},
    "CARTRIDGE": {"num_virtual_tokens": 2}, "CPT": {"cpt_token_ids": [1, 2]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 2, "num_tasks": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 2}, "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "P_TUNING": {"num_virtual_tokens": 2},
    "XLORA": {"hidden_size": 32, "adapters": {}},
}
REFUSED = {
    "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING",
    "SHADOW", "XLORA",
}
#: It needs scikit-learn, which is not among the tests' packages: nobody has seen what it leaves.
NOT_SEEN = "ADAMSS"


@pytest.mark.parametrize("method", [m.value for m in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_method_of_peft_is_right_or_refused(method: str) -> None:
    if method == NOT_SEEN:
        assert method not in METHODS
        return
    make = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    settings = SETTINGS.get(method, {})
    if hasattr(make, "target_modules") or "target_modules" in make.__dataclass_fields__:
        settings = {"target_modules": ["q_proj", "up_proj"]} | settings
    if method == "ADAPTION_PROMPT":
        settings.pop("target_modules", None)
    config = make(task_type="CAUSAL_LM", **settings)
    batch, = tiny.batches(1)
    if method == "XLORA":
        # Its experts come from folders; what is refused is the method.
        model = with_adapter(lora())
        model.peft_config["default"] = config
    else:
        model = with_adapter(config)
    if method in REFUSED:
        with pytest.raises(blockem.ArgumentError, match="prompt learning|not known whether"):
            attach(model, DICTIONARY.plan, lam=1.0)
        return
    if method == "POLY":
        # Its layers are told the task; without adapters they do not ask.
        batch["task_ids"] = torch.zeros(len(batch["labels"]), dtype=torch.long)
    original = {k: v for k, v in batch.items() if k != "task_ids"}
    want = DICTIONARY.plan.encode(layer_output(tiny.llama(), original))
    handle = attach(moved(model), DICTIONARY.plan, lam=1.0, tolerance=math.inf)
    assert torch.equal(reference_of(handle, model, batch), want)


@pytest.mark.parametrize("settings", [
    {"init_lora_weights": init} for init in (False, "gaussian", "eva", "orthogonal", "mica")
] + [
    {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"trainable_token_indices": {"embed_tokens": [4, 5, 6]}},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
    {"layer_replication": [[0, 2], [1, 3]]},
], ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()))
@pytest.mark.parametrize("reference", ["adapters_off", "frozen_copy"])
def test_settings_of_lora_that_leave_the_base_alone(settings: dict, reference: str) -> None:
    batch, = tiny.batches(1)
    expect_reference(with_adapter(lora(**settings)), tiny.llama(), batch, reference=reference)


def splitting(kind: str) -> peft.PeftModel:
    """A model whose base weights its adapter's initialisation has changed."""
    if kind == "kasa":
        return with_adapter(lora(kasa_config=peft.KasaConfig()))
    if kind in ("loftq", "corda", "lora_ga"):
        # They need a GPU or data; what tells is the configuration.
        model = with_adapter(lora())
        model.peft_config["default"].init_lora_weights = kind
        return model
    return with_adapter(lora(init_lora_weights=kind))


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga",
                                  "kasa"])
def test_initialisations_that_change_the_base_are_refused(kind: str, tmp_path: Path) -> None:
    model, name = splitting(kind), "kasa_config" if kind == "kasa" else f"init_lora_weights='{kind}'"
    remedy = f"{name}.*not its base; give the original model as the reference"
    for reference in ("adapters_off", "frozen_copy"):
        with pytest.raises(blockem.ArgumentError, match=remedy):
            attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
    cache = blockem.Cache(tmp_path / "z.blockem", DICTIONARY.plan, base_model="0" * 64,
                          dtype="float32", mode="create")
    with cache, pytest.raises(blockem.ArgumentError, match=remedy):
        cache.fill(model, tiny.batches(1), progress=False)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_the_original_model_is_the_reference_of_pissa(kind: str) -> None:
    """The check says how far the two are apart and why, and takes a tolerance; the value is that of
    the formula."""
    model, original = splitting(kind), tiny.llama()
    batch, = tiny.batches(1)
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference=original)
    with pytest.raises(blockem.ArgumentError) as told:
        one_loss(handle, model, batch)
    text = str(told.value)
    assert f"init_lora_weights='{kind}'" in text and "tolerance" in text and "dropout" not in text
    difference = float(text.split("greatest difference of z ")[1].split(",")[0])
    assert 0 < difference < 1e-5
    handle.remove()
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference=original, tolerance=1e-5)
    assert one_loss(handle, model, batch) < 1e-10
    moved(model)
    mask = batch["labels"] != -100
    hidden, base = (layer_output(m, batch, name) for m, name in (
        (model, "base_model.model.model.layers"), (original, "model.layers")))
    want = DICTIONARY.loss_sum(hidden, base, mask) / mask.sum()
    torch.testing.assert_close(one_loss(handle, model, batch).double(), want, rtol=1e-4, atol=0)


def test_a_residual_that_was_loaded_as_a_model_is_noticed(tmp_path: Path) -> None:
    """As peft's guide to PiSSA keeps it: the residual as the base, the adapter with
    init_lora_weights=True, so that no configuration tells."""
    model = splitting("pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "residual")
    load = lambda: peft.PeftModel.from_pretrained(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "residual"),
        tmp_path / "adapter", is_trainable=True,
    )
    with pytest.raises(blockem.ArgumentError, match="columns of lora_B of the adapter 'default'"):
        attach(load(), DICTIONARY.plan, lam=1.0)
    # Who says that the residual is the base is believed.
    attach(load(), DICTIONARY.plan, lam=1.0, base_adapters=[])
    # Adapters that were trained or drawn at random are none of these.
    for seed in range(20):
        torch.manual_seed(seed)
        attach(peft.get_peft_model(tiny.llama(layers=2), lora(r=2, init_lora_weights=False)),
               DICTIONARY.plan, lam=1.0)
    attach(moved(with_adapter(lora(r=2))), DICTIONARY.plan, lam=1.0)


@pytest.mark.parametrize("repeated, right", [([[0, 2], [1, 3]], True), ([[0, 1], [0, 3]], False),
                                             ([[1, 3], [0, 3]], False)])
def test_repeated_layers_must_lie_above(repeated: list, right: bool) -> None:
    model = with_adapter(lora(layer_replication=repeated))
    if right:
        attach(model, DICTIONARY.plan, lam=1.0)
        return
    for reference in ("adapters_off", "frozen_copy"):
        with pytest.raises(blockem.ArgumentError, match="layer_replication.*another one"):
            attach(model, DICTIONARY.plan, lam=1.0, reference=reference)


# Biases and other weights of the base that are trained.


@pytest.mark.parametrize("bias", ["lora_only", "all", "norm"])
def test_trained_biases_have_a_copy_as_their_reference(bias: str) -> None:
    """The remedy that the error names, with the value of the formula."""

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64))

    tuned = with_adapter(lora(bias="none" if bias == "norm" else bias), model())
    if bias == "norm":
        tuned.get_base_model().model.layers[0].input_layernorm.weight.requires_grad_(True)
    with pytest.raises(blockem.ArgumentError, match='reference="frozen_copy"'):
        attach(tuned, DICTIONARY.plan, lam=1.0)
    resumed = moved(copy.deepcopy(tuned))
    batch, = tiny.batches(1)
    original = model()
    expect_reference(copy.deepcopy(tuned), original, batch, reference="frozen_copy")
    expect_reference(copy.deepcopy(tuned), original, batch, reference=original)
    handle = attach(tuned, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    assert one_loss(handle, tuned, batch).item() == 0
    moved(tuned)
    mask = batch["labels"] != -100
    hidden = layer_output(tuned, batch, "base_model.model.model.layers")
    want = DICTIONARY.loss_sum(hidden, layer_output(original, batch), mask) / mask.sum()
    torch.testing.assert_close(one_loss(handle, tuned, batch).double(), want, rtol=1e-4, atol=0)
    # A copy of what was trained before is noticed: nothing stands in for its base.
    handle = attach(resumed, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    with pytest.raises(blockem.ArgumentError, match="attach before the model is trained"):
        one_loss(handle, resumed, batch)


def test_a_copy_of_adapters_that_were_trained_is_without_them() -> None:
    batch, = tiny.batches(1)
    model = moved(with_adapter(lora()))
    expect_reference(model, tiny.llama(), batch, reference="frozen_copy")
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference="frozen_copy")
    assert one_loss(handle, model, batch) > 0
    assert (handle.last_check.compared, handle.last_check.difference) == ("adapters off", 0)


def test_adapters_of_transformers_itself() -> None:
    """add_adapter makes no PeftModel."""
    batch, = tiny.batches(1)
    for reference in ("adapters_off", "frozen_copy"):
        model = tiny.llama()
        torch.manual_seed(1)
        model.add_adapter(lora())
        expect_reference(model.train(), tiny.llama(), batch, reference=reference)
    model = tiny.llama()
    model.add_adapter(lora(init_lora_weights="olora"))
    with pytest.raises(blockem.ArgumentError, match="init_lora_weights='olora'"):
        attach(model, DICTIONARY.plan, lam=1.0, reference="frozen_copy")


def test_a_reference_that_is_trained_with_the_model_is_refused() -> None:
    base = tiny.llama()
    model = with_adapter(lora(), base)
    with pytest.raises(blockem.ArgumentError, match="is the model itself .get_peft_model"):
        attach(model, DICTIONARY.plan, lam=1.0, reference=base)
    model, other = tiny.llama(), tiny.llama()
    other.model.layers[0] = model.model.layers[0]
    with pytest.raises(blockem.ArgumentError, match="layers.0.*of the reference is the model's own"):
        attach(model, DICTIONARY.plan, lam=1.0, reference=other)


# Several adapters.


def two_adapters() -> peft.PeftModel:
    """One of an earlier training, frozen, and another to be trained on top; both are active."""
    model = moved(with_adapter(lora()))
    model.add_adapter("new", lora(target_modules=["v_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "new"])
    for name, parameter in model.named_parameters():
        if ".default" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("reference", ["adapters_off", "frozen_copy"])
def test_which_of_several_adapters_belong_to_the_base_must_be_said(
    reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch, = tiny.batches(1)
    model = two_adapters()
    with pytest.raises(blockem.ArgumentError, match="'default', 'new': say which belong to its base"):
        attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
    expect_reference(copy.deepcopy(model), tiny.llama(), batch, reference=reference, base_adapters=[])
    first = moved(with_adapter(lora())).merge_and_unload()
    want = DICTIONARY.plan.encode(layer_output(first, batch))
    with caplog.at_level(logging.INFO, "blockem"):
        handle = attach(model, DICTIONARY.plan, lam=1.0, reference=reference,
                        base_adapters=["default"])
    if reference == "adapters_off":
        for text in (caplog.text, repr(handle)):
            assert "reference: the model with the adapters 'default' alone" in text
    assert one_loss(handle, model, batch).item() == 0  # the new one is 0 yet
    moved(model)
    found = reference_of(handle, model, batch)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    bare = DICTIONARY.plan.encode(layer_output(tiny.llama(), batch))
    assert (found - bare).abs().max() > 1e-2
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.active_adapters == ["default", "new"] and not layer.disable_adapters


def test_adapters_of_the_base_are_named_and_frozen() -> None:
    model = two_adapters()
    for given, text in [
        (["x"], "base_adapters names 'x'; the model's adapters are 'default', 'new'"),
        ("default", "expected a list"),
        (["new"], "'new' belongs to the base and is trained"),
    ]:
        with pytest.raises(blockem.ArgumentError, match=text):
            attach(model, DICTIONARY.plan, lam=1.0, base_adapters=given)


def test_merged_adapters_are_refused_at_the_start_and_later() -> None:
    batch, = tiny.batches(1)
    model = moved(with_adapter(lora()))
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    one_loss(handle, model, batch)
    model.merge_adapter()
    model.get_base_model().model.embed_tokens.register_forward_hook(
        lambda module, args, out: out.requires_grad_())
    with pytest.raises(blockem.ArgumentError, match="'default' is merged.*unmerge_adapter"):
        one_loss(handle, model, batch)
    for reference in ("adapters_off", "frozen_copy"):
        with pytest.raises(blockem.ArgumentError, match="'default' is merged.*unmerge_adapter"):
            attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
    model.unmerge_adapter()
    attach(model, DICTIONARY.plan, lam=1.0)


# What lies outside the decoder.

TEXT = {"vocab_size": 64, "hidden_size": tiny.WIDTH, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2}
IMAGE_TOKEN = 60


def gemma3() -> torch.nn.Module:
    torch.manual_seed(0)
    text = TEXT | {"head_dim": 8, "sliding_window": 8, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=IMAGE_TOKEN, boi_token_index=61, eoi_token_index=62))
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model


def llava() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), image_token_index=IMAGE_TOKEN,
        vision_config=transformers.CLIPVisionConfig(**vision)))


def qwen() -> torch.nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={
            "hidden_size": 16, "out_hidden_size": tiny.WIDTH, "intermediate_size": 32, "depth": 1,
            "num_heads": 2, "patch_size": 14, "fullatt_block_indexes": [0]},
        image_token_id=IMAGE_TOKEN, video_token_id=59, vision_start_token_id=61,
        vision_end_token_id=62))


def with_images(make) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 50, (2, 12), generator=generator)
    ids[:, 2:8] = torch.tensor([61, *[IMAGE_TOKEN] * 4, 62])
    labels = ids.clone()
    labels[:, :8] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if make is qwen:
        patches = torch.randn(2 * 16, 3 * 2 * 14 * 14, generator=generator)
        batch |= {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
                  "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    else:
        batch["pixel_values"] = torch.randn(2, 3, 28, 28, generator=generator)
    if make is gemma3:
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return batch


OUTSIDE = {
    "language alone": {"target_modules": r".*language_model.*(q_proj|v_proj)"},
    "all": {"target_modules": "all-linear"},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "projector saved": {"modules_to_save": ["multi_modal_projector"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": list(range(3, 30))}},
}


@pytest.mark.parametrize("make, outside", [
    (make, outside) for make in (gemma3, llava, qwen) for outside in OUTSIDE
    if not (make is qwen and outside == "projector saved")
], ids=lambda x: getattr(x, "__name__", x))
def test_adapters_outside_the_decoder_are_off(make, outside: str) -> None:
    """With an image, against a pass of the model as it was before peft."""
    settings = {"target_modules": r".*language_model.*(q_proj|v_proj)"} | OUTSIDE[outside]
    model, original = with_adapter(lora(**settings), make()), make().train()
    batch = with_images(make)
    layers = "model.language_model.layers"
    expect_reference(model, original, batch, layers)
    # Of the check too: nothing but the adapters can differ.
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    assert one_loss(handle, model, batch) > 0
    assert (handle.last_check.compared, handle.last_check.difference) == ("adapters off", 0)


@pytest.mark.parametrize("reference", ["frozen_copy", "module"])
def test_full_fine_tuning_of_a_vision_language_model(reference: str) -> None:
    """Its embeddings, projector and vision tower are trained too."""
    model, original = llava().train(), llava().train()
    batch = with_images(llava)
    given = llava() if reference == "module" else reference
    expect_reference(model, original, batch, "model.language_model.layers", reference=given)


def test_a_cache_of_a_multimodal_model_is_filled_by_the_whole_of_it(tmp_path: Path) -> None:
    """Gemma 3's own mask is made by the wrapper."""
    model = moved(with_adapter(lora(**OUTSIDE["tokens"], target_modules=r".*language_model.*q_proj"),
                               gemma3())).eval()
    batch, = tiny.batches(1)
    want = DICTIONARY.plan.encode(
        layer_output(gemma3().eval(), batch, "model.language_model.layers"))
    cache = blockem.Cache(tmp_path / "z.blockem", DICTIONARY.plan, base_model="0" * 64,
                          dtype="float32", mode="create")
    with cache:
        cache.fill(model, [batch], progress=False)
        shown = batch["attention_mask"] != 0
        assert torch.equal(cache.reference(batch)[shown], want[shown])


def test_embeddings_that_trained_weights_computed_are_refused() -> None:
    """No pass of the base can begin with them."""
    batch, = tiny.batches(1)
    ids = batch.pop("input_ids")
    text = "given inputs_embeds that trained weights computed.*give input_ids"
    for reference in ("adapters_off", "frozen_copy"):
        model = with_adapter(lora(modules_to_save=["embed_tokens"]))
        handle = attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
        model(inputs_embeds=model.get_input_embeddings()(ids), **batch)
        with pytest.raises(blockem.ArgumentError, match=text):
            handle.penalty(batch)
        # In a module that no handle knows.
        model, projector = with_adapter(lora()), torch.nn.Linear(tiny.WIDTH, tiny.WIDTH)
        handle = attach(model, DICTIONARY.plan, lam=1.0, reference=reference)
        embedded = model.get_input_embeddings()(ids)
        model(inputs_embeds=projector(embedded), **batch)
        with pytest.raises(blockem.ArgumentError, match=text):
            handle.penalty(batch)
        # Frozen ones are as good as ids, also where they were made to take a gradient.
        model(inputs_embeds=embedded.detach().requires_grad_(), **batch)
        handle.penalty(batch)
        assert handle.last_check.difference == 0
    # An adapter that is no longer trained may have computed them without a trace.
    model = moved(with_adapter(lora(target_modules=["q_proj", "embed_tokens"])))
    handle = attach(model, DICTIONARY.plan, lam=1.0)
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
    model(inputs_embeds=embedded, **batch)
    with pytest.raises(blockem.ArgumentError, match="embeddings have an adapter"):
        handle.penalty(batch)


def test_a_reference_that_lacks_what_the_model_has_around_its_decoder() -> None:
    model, decoder = llava().train(), llava().model.language_model
    handle = attach(model, DICTIONARY.plan, lam=1.0, reference=decoder)
    model(**with_images(llava))
    with pytest.raises(blockem.ArgumentError, match="LlamaModel.*give one of the same class"):
        handle.penalty(with_images(llava))


def test_the_handle_says_what_the_reference_is(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny.llama()
    base.config.name_or_path = "tiny/llama"
    for reference, text in [
        ("adapters_off", "the model without adapters ('default' off)"),
        ("frozen_copy", "a frozen copy of the model without adapters ('default' off)"),
        (base, "LlamaForCausalLM 'tiny/llama', given as a model"),
        (lambda batch: None, "given for each batch"),
    ]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "blockem"):
            handle = attach(with_adapter(lora()), DICTIONARY.plan, lam=1.0, reference=reference)
        assert f"reference: {text}" in repr(handle) and f"reference: {text}" in caplog.text
