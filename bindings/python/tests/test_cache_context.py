"""Keys of a reference cache cover what the base model saw: images, audio, token types, masks. True z
is of transformers' own forward pass with all inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cache import D, LAYER, llama, make_plan, open_cache, padded, raises
from torch import nn

import blockem
from blockem._torch_context import Inputs, examples_of

IMAGE, VIDEO, AUDIO = 60, 59, 58
PLAN = make_plan([3, 17, 40])

Batch = dict[str, torch.Tensor]


def gemma3() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(Gemma3Config(
        text_config={
            "vocab_size": 64, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=61, eoi_token_index=62,
    ))  # fmt: skip
    with torch.no_grad():
        # Zeros in a new model, so that images would change nothing.
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model.eval()


def qwen() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": D,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [1],
            "in_channels": 3, "temporal_patch_size": 2,
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=61, vision_end_token_id=62,
    )).eval()  # fmt: skip


def qwen_audio() -> nn.Module:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    torch.manual_seed(0)
    return Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(
        text_config={
            "model_type": "qwen2", "vocab_size": 64, "hidden_size": D, "intermediate_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 1,
            "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "num_mel_bins": 8,
            "max_source_positions": 8,
        },
        audio_token_index=AUDIO,
    )).eval()  # fmt: skip


def decoder_of(model: nn.Module) -> nn.Module:
    inner = model.model if hasattr(model, "model") else model
    inner = getattr(inner, "language_model", inner)
    return getattr(inner, "model", inner)


def true_z(model: nn.Module, batch: Batch) -> torch.Tensor:
    """z of a whole forward pass with everything that the batch holds."""
    found = {}

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        found["hidden"] = output[0] if isinstance(output, tuple) else output

    hook = decoder_of(model).layers[LAYER].register_forward_hook(keep)
    with torch.no_grad():
        model.eval()(**{name: x for name, x in batch.items() if name != "labels"})
    hook.remove()
    return PLAN.encode(found["hidden"])


def filled(folder: Path, model: nn.Module, *batches: Batch, **how: object) -> blockem.Cache:
    """A cache that was filled, opened again to read: whoever reads has no model."""
    with open_cache(folder, PLAN, **how) as cache:
        cache.fill(model, batches, progress=False)
    return open_cache(folder, PLAN, "read", **how)


def row_of(batch: Batch, row: int, **media: torch.Tensor) -> Batch:
    return {name: x[row : row + 1] for name, x in batch.items() if name not in media} | media


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_images(counts: list[int], each: Callable[[int, int], int], width: int = 24) -> Batch:
    """Token ids, the same in all rows but for so many runs of placeholders, with their types."""
    ids = torch.randint(1, 50, (1, width), generator=torch.Generator().manual_seed(1))
    ids = ids.repeat(len(counts), 1)
    for row, count in enumerate(counts):
        at = 1
        for i in range(count):
            run = each(row, i)
            ids[row, at], ids[row, at + 1 : at + 1 + run], ids[row, at + 1 + run] = 61, IMAGE, 62
            at += run + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gemma_batch(counts: list[int], seed: int = 0) -> Batch:
    batch = with_images(counts, lambda row, i: 4)
    types = (batch["input_ids"] == IMAGE).long()
    return batch | {"token_type_ids": types, "pixel_values": normal(sum(counts), 3, 28, 28, seed=seed)}


def test_examples_of_the_same_tokens_and_other_images_are_apart(tmp_path: Path) -> None:
    model, batch = gemma3(), gemma_batch([1, 1])
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    expected = true_z(model, batch)
    assert (expected[0] - expected[1]).abs().max() > 0.1, "the images change nothing"
    cache = filled(tmp_path, model, batch)
    assert len(cache) == 2 and torch.equal(cache.reference(batch), expected)
    # The same image is found again, in another batch and order.
    turned = {name: x[[1, 0]] for name, x in batch.items()}
    assert torch.equal(cache.reference(turned), expected[[1, 0]])
    assert torch.equal(cache.reference(row_of(batch, 1)), expected[[1]])
    changed = batch | {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1, 2, 27, 27] += 1e-3
    with raises("CACHE_MISS", "example 1.*another context"):
        cache.reference(changed)
    with raises("CACHE_MISS", "another context"):
        cache.reference({name: x for name, x in batch.items() if name != "pixel_values"})


def test_images_belong_to_the_rows_whose_placeholders_they_fill(tmp_path: Path) -> None:
    """As many images as rows, though not one each."""
    model, batch = gemma3(), gemma_batch([2, 0, 1])
    expected = true_z(model, batch)
    cache = filled(tmp_path, model, batch)
    assert torch.equal(cache.reference(batch), expected)
    images = batch["pixel_values"]
    for row, own in enumerate([images[:2], None, images[2:]]):
        one = row_of(batch, row, **({} if own is None else {"pixel_values": own}))
        if own is None:
            del one["pixel_values"]
        assert torch.equal(cache.reference(one)[0], expected[row])
    # Another second image is another first example and leaves the others alone.
    other = batch | {"pixel_values": torch.cat([images[:1], images[:1], images[2:]])}
    with raises("CACHE_MISS", "example 0 .*; 1 of the 3"):
        cache.reference(other)


def test_token_types_count(tmp_path: Path) -> None:
    """Gemma 3 lets tokens of an image see each other in both directions."""
    model, batch = gemma3(), gemma_batch([1])
    other = batch | {"token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert not torch.equal(true_z(model, batch), true_z(model, other))
    cache = filled(tmp_path, model, batch, other)
    assert len(cache) == 2
    for one in (batch, other):
        assert torch.equal(cache.reference(one), true_z(model, one))
    narrow = {torch.int32: batch["token_type_ids"].int(), torch.bool: batch["token_type_ids"].bool()}
    for types in narrow.values():
        cache.reference(batch | {"token_type_ids": types})
    with raises("CACHE_MISS", "another context"):
        cache.reference(batch | {"pixel_values": batch["pixel_values"].bfloat16()})


def qwen_batch() -> Batch:
    """Images of 2x2 and 2x4 merged patches: of two in the first row, none in the second, one in the
    third. Their patches lie one after the other."""
    grids = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 4, 8]])
    batch = with_images([2, 0, 1], lambda row, i: 4 if (row, i) == (0, 0) else 8)
    types = (batch["input_ids"] == IMAGE).int()
    patches = normal(int(grids.prod(dim=1).sum()), 3 * 2 * 4 * 4)
    return batch | {"mm_token_type_ids": types, "pixel_values": patches, "image_grid_thw": grids}


def test_flattened_patches_belong_to_the_rows_of_their_images(tmp_path: Path) -> None:
    model, batch = qwen(), qwen_batch()
    expected = true_z(model, batch)
    cache = filled(tmp_path, model, batch)
    assert len(cache) == 3 and torch.equal(cache.reference(batch), expected)
    patches, grids = batch["pixel_values"], batch["image_grid_thw"]
    first = row_of(batch, 0, pixel_values=patches[:48], image_grid_thw=grids[:2])
    last = row_of(batch, 2, pixel_values=patches[48:], image_grid_thw=grids[2:])
    assert torch.equal(cache.reference(first)[0], expected[0])
    assert torch.equal(cache.reference(last)[0], expected[2])
    assert (true_z(model, last)[0] - expected[2]).abs().max() < 1e-4
    changed = patches.clone()
    changed[47, 0] += 1
    with raises("CACHE_MISS", "example 0 .*another context.*; 1 of the 3"):
        cache.reference(batch | {"pixel_values": changed})
    with raises("CACHE_MISS", "; 1 of the 3"):
        cache.reference(batch | {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4]])})
    with raises("INVALID_ARGUMENT", "cannot be divided.*batches of one"):
        cache.reference(batch | {"image_grid_thw": torch.tensor([[1, 4, 8], [1, 4, 8], [1, 4, 4]])})


def test_positions_of_several_dimensions_count(tmp_path: Path) -> None:
    model, batch = qwen(), qwen_batch()
    del batch["pixel_values"], batch["image_grid_thw"]
    flat = torch.arange(24).expand(3, 24)
    positions = torch.stack([flat, flat, flat])
    bent = positions.clone()
    bent[1, :, 5:] += 3
    one, other = batch | {"position_ids": positions}, batch | {"position_ids": bent}
    assert not torch.equal(true_z(model, one), true_z(model, other))
    cache = filled(tmp_path, model, one, other)
    assert len(cache) == 6
    assert torch.equal(cache.reference(one), true_z(model, one))
    assert torch.equal(cache.reference(other), true_z(model, other))
    with raises("SHAPE", r"position_ids has the shape \[3, 3, 20\]"):
        cache.reference(batch | {"position_ids": positions[:, :, :20]})


def audio_batch(rows: int) -> Batch:
    ids = torch.randint(1, 50, (1, 12), generator=torch.Generator().manual_seed(2)).repeat(rows, 1)
    ids[:, 2:6] = AUDIO
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": normal(rows, 8, 16),
        "feature_attention_mask": torch.ones(rows, 16, dtype=torch.long),
    }


def test_examples_of_the_same_tokens_and_other_audio_are_apart(tmp_path: Path) -> None:
    model, batch = qwen_audio(), audio_batch(2)
    expected = true_z(model, batch)
    assert (expected[0] - expected[1]).abs().max() > 0.01, "the audio changes nothing"
    cache = filled(tmp_path, model, batch)
    assert len(cache) == 2 and torch.equal(cache.reference(batch), expected)
    assert torch.equal(cache.reference(row_of(batch, 1))[0], expected[1])
    turned = batch | {"input_features": batch["input_features"][[1, 0]]}
    assert torch.equal(cache.reference(turned), expected[[1, 0]])
    with raises("CACHE_MISS", "another context"):
        cache.reference(batch | {"input_features": batch["input_features"] + 1e-3})
    heard = batch["feature_attention_mask"].clone()
    heard[0, 15] = 0
    with raises("CACHE_MISS", "example 0 "):
        cache.reference(batch | {"feature_attention_mask": heard})


def test_images_without_a_known_placeholder_are_refused_with_a_way_on(tmp_path: Path) -> None:
    batch = gemma_batch([1, 1])
    with open_cache(tmp_path, PLAN) as cache:
        with raises("INVALID_ARGUMENT", "pixel_values.*image_token_id.*'?\"row\""):
            cache.reference(batch)
        with raises("CACHE_MISS", "not in the cache"):
            cache.reference(row_of(batch, 0))
    by_row = open_cache(tmp_path, PLAN, context={"pixel_values": "row"})
    model = gemma3()
    assert by_row.fill(model, [batch], progress=False) == 2
    assert torch.equal(by_row.reference(batch), true_z(model, batch))
    with raises("SHAPE", r"pixel_values begins with the dimensions \[1\]"):
        by_row.reference(batch | {"pixel_values": batch["pixel_values"][:1]})


def division(counts: list[int], **media: torch.Tensor) -> list[bytes]:
    """The contexts of rows with so many placeholders."""
    ids = torch.zeros(len(counts), max(counts) + 1, dtype=torch.long)
    for row, count in enumerate(counts):
        ids[row, :count] = IMAGE
    batch = {"input_ids": ids, **media}
    inputs = Inputs(frozenset(), {})
    return [e.context for e in examples_of(batch, inputs, {"image": IMAGE}, packed=False)]


def test_images_are_divided_only_where_it_is_certain() -> None:
    four = normal(4, 3, 2, 2)
    # One each, whatever the sizes; none of text alone; equal ones by their tokens.
    assert division([5, 0, 9, 1, 1], pixel_values=four, image_sizes=torch.arange(8).view(4, 2))[1] == b""
    contexts = division([6, 2, 0], pixel_values=four)
    assert contexts[0] == division([6], pixel_values=four[:3])[0]
    assert contexts[1] == division([2], pixel_values=four[3:])[0] and contexts[2] == b""
    uncertain = [
        # Sizes tell that images may have other numbers of tokens.
        ([6, 2], {"pixel_values": four, "image_sizes": torch.ones(4, 2)}),
        # [B, n, ...] with padding.
        ([6, 2, 0], {"pixel_values": normal(3, 2, 3, 2, 2)}),
        ([6, 3], {"pixel_values": four}),
        ([3, 5], {"pixel_values": four}),
        ([0, 0], {"pixel_values": four}),
        ([4, 4], {"pixel_values": normal(5, 6), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 2]])}),
        ([4, 1], {"pixel_values": four, "image_sizes": torch.ones(2, 2)}),
    ]
    for counts, media in uncertain:
        with raises("INVALID_ARGUMENT", "cannot be divided among the examples"):
            division(counts, **media)


def test_gaps_in_the_mask_count(tmp_path: Path) -> None:
    """A window of attention counts places, not positions."""
    model = mistral()
    gaps = padded([8, 8])
    gaps["attention_mask"][:, 3:5] = 0
    kept = [0, 1, 2, 5, 6, 7]
    close = {"input_ids": gaps["input_ids"][:, kept], "position_ids": torch.tensor([kept, kept])}
    expected, other = true_z(model, gaps)[:, kept], true_z(model, close)
    assert not torch.allclose(expected, other, atol=1e-3), "the window holds everything"
    cache = filled(tmp_path, model, gaps)
    assert torch.equal(cache.reference(gaps)[:, kept], expected)
    with raises("CACHE_MISS", "another context"):
        cache.reference(close)


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(
        vocab_size=50, hidden_size=D, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=3,
    )).eval()  # fmt: skip


def test_masks_that_say_more_than_padding_are_refused(tmp_path: Path) -> None:
    batch = padded([6, 4])
    with open_cache(tmp_path, PLAN) as cache:
        for refused in (torch.ones(2, 1, 6, 6), {"full_attention": torch.ones(2, 1, 6, 6)}):
            with raises("SHAPE", "attention_mask is .*covers a mask of padding alone"):
                cache.fill(llama(), [batch | {"attention_mask": refused}], progress=False)
        segments = batch["attention_mask"] * torch.tensor([[1, 1, 2, 2, 2, 2]])
        for refused in (segments, torch.where(segments == 0, -torch.inf, 0.0)):
            with raises("INVALID_ARGUMENT", "other values than 0 and 1"):
                cache.fill(llama(), [batch | {"attention_mask": refused}], progress=False)
        assert cache.fill(llama(), [batch], progress=False) == 2
        for same in (batch["attention_mask"].bool(), batch["attention_mask"].float()):
            cache.reference(batch | {"attention_mask": same})


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("inputs_embeds", torch.ones(2, 6, D), "give input_ids"),
        ("past_key_values", ((torch.ones(1),),), "whole examples"),
        ("encoder_hidden_states", torch.ones(2, 3, D), "encoder"),
        ("decoder_input_ids", torch.ones(2, 6), "encoder"),
        ("adapter_names", ["a", "b"], "every adapter off.*ignore"),
        ("alora_offsets", [1, 2], "every adapter off.*ignore"),
        ("speaker", torch.ones(2, 4), "ignore=.*context="),
        ("scale", 2.0, "ignore=.*context="),
        ("cu_seq_lens_q", torch.tensor([0, 12]), "packed=True"),
        ("seq_idx", torch.zeros(2, 6), "packed=True"),
    ],
)
def test_what_no_key_covers_is_refused(tmp_path: Path, name: str, value: object, text: str) -> None:
    batch = padded([6, 4])
    with open_cache(tmp_path, PLAN) as cache:
        with raises("INVALID_ARGUMENT", f"{name}.*{text}"):
            cache.fill(llama(), [batch | {name: value}], progress=False)
        assert len(cache) == 0
        cache.fill(llama(), [batch], progress=False)
        with raises("INVALID_ARGUMENT", name):
            cache.reference(batch | {name: value})
    if "ignore" in text:
        with open_cache(tmp_path, PLAN, ignore=[name]) as cache:
            cache.reference(batch | {name: value})


def test_what_changes_nothing_is_left_out(tmp_path: Path) -> None:
    batch = padded([6, 4])
    more = batch | {
        "num_items_in_batch": torch.tensor(7), "completion_mask": batch["attention_mask"],
        "prompt": ["one", "two"], "special_tokens_mask": None, "return_dict": True, "scale": None,
    }  # fmt: skip
    cache = filled(tmp_path, llama(), more)
    assert torch.equal(cache.reference(batch), cache.reference(more))
    with pytest.raises(TypeError, match="ignore is the text"):
        open_cache(tmp_path, PLAN, "read", ignore="labels")
    with raises("INVALID_ARGUMENT", "context has labels: 'column'"):
        open_cache(tmp_path, PLAN, "read", context={"labels": "column"})


class Speaker(nn.Module):
    """A model with an input that this package does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.voice = llama(), nn.Linear(4, D)
        self.config = self.inner.config

    def forward(self, input_ids: torch.Tensor, speaker: torch.Tensor, **rest: object) -> object:
        embeds = self.inner.model.embed_tokens(input_ids) + self.voice(speaker)[:, None]
        return self.inner(inputs_embeds=embeds, **rest)


def test_an_input_that_the_caller_names_is_given_to_the_model_and_counts(tmp_path: Path) -> None:
    model = Speaker()
    model.model = model.inner.model  # where true_z looks
    batch = {"input_ids": padded([6])["input_ids"].repeat(2, 1), "speaker": normal(2, 4)}
    cache = filled(tmp_path, model, batch, context={"speaker": "row"})
    assert torch.equal(cache.reference(batch), true_z(model, batch)) and len(cache) == 2
    assert not torch.equal(*cache.reference(batch))
    with raises("CACHE_MISS", "another context"):
        cache.reference(batch | {"speaker": normal(2, 4, seed=1)})
    whole = open_cache(tmp_path, PLAN, "read", context={"speaker": "batch"})
    with raises("CACHE_MISS", "another context"):
        whole.reference(batch)


def test_packed_rows_must_be_told_apart_alike(tmp_path: Path) -> None:
    model, apart = llama(), padded([4, 2])
    ids = torch.cat([apart["input_ids"][0, :4], apart["input_ids"][1, :2]])[None]
    packed = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32),
        "cu_seq_lens_k": torch.tensor([0, 4, 6], dtype=torch.int32),
        "max_length_q": 4,
        "max_length_k": 4,
        "seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1]], dtype=torch.int32),
    }
    cache = filled(tmp_path, model, apart)
    z = cache.reference(packed, packed=True)
    assert torch.equal(z[0, :4], cache.reference(apart)[0])
    for name, value in {"cu_seq_lens_k": [0, 3, 6], "seq_idx": [[0, 0, 0, 1, 1, 1]]}.items():
        with raises("INVALID_ARGUMENT", f"{name} and position_ids"):
            cache.reference(packed | {name: torch.tensor(value)}, packed=True)
    typed = packed | {"token_type_ids": torch.tensor([[0, 0, 0, 0, 1, 1]])}
    with raises("CACHE_MISS", "2 of the 2"):
        cache.reference(typed, packed=True)
    # Of several examples in a row, an input of the row cannot be told apart.
    by_row = open_cache(tmp_path, PLAN, "read", context={"speaker": "row"})
    with raises("INVALID_ARGUMENT", "row 0 holds several examples"):
        by_row.reference(packed | {"speaker": normal(1, 4)}, packed=True)


def test_images_of_packed_rows_belong_to_their_examples(tmp_path: Path) -> None:
    model, apart = gemma3(), gemma_batch([1, 1])
    cache = filled(tmp_path, model, apart)
    packed = {
        "input_ids": apart["input_ids"].reshape(1, -1),
        "token_type_ids": apart["token_type_ids"].reshape(1, -1),
        "position_ids": torch.arange(24).repeat(2)[None],
        "pixel_values": apart["pixel_values"],
    }
    z = cache.reference(packed, packed=True)
    assert torch.equal(z.view(2, 24, -1), cache.reference(apart))
    turned = packed | {"pixel_values": apart["pixel_values"][[1, 0]]}
    assert torch.equal(cache.reference(turned, packed=True).view(2, 24, -1)[0], cache.reference(apart)[1])


def test_a_model_with_an_encoder_has_no_cache(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(
        vocab_size=50, d_model=D, d_kv=8, d_ff=16, num_layers=3, num_heads=2, decoder_start_token_id=0,
    ))  # fmt: skip
    with open_cache(tmp_path, PLAN) as cache, raises("UNSUPPORTED", "T5.*encoder"):
        cache.fill(model, [padded([6])], layers="decoder.block", progress=False)


def test_a_file_keeps_one_models_placeholders(tmp_path: Path) -> None:
    model = gemma3()
    with open_cache(tmp_path, PLAN) as cache:
        cache.fill(model, [gemma_batch([1])], progress=False)
        assert cache.note("placeholders") == '{"image": 60}' and cache.note("other") is None
        model.config.image_token_index = 59
        model.config.image_token_id = 59
        with raises("CACHE_STALE", "placeholders"):
            cache.fill(model, [gemma_batch([1])], progress=False)


def test_a_file_is_filled_from_one_set_of_base_adapters(tmp_path: Path) -> None:
    """Two adapters, one of which belongs to the base and stays on."""
    from peft import LoraConfig, get_peft_model

    batch = padded([6, 4])
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(llama(), config, adapter_name="sft")
    model.add_adapter("new", config)
    model.set_adapter("new")
    digests = [blockem.base_model_digest(model, base_adapters=names) for names in ([], ["sft"])]
    with open_cache(tmp_path, PLAN) as cache:
        cache.fill(model, [batch], progress=False, base_adapters=["sft"])
        z = cache.reference(batch)
        with raises("CACHE_STALE", "base_adapters"):
            cache.fill(model, [batch], progress=False, base_adapters=[])
        cache.fill(model, [batch], progress=False, base_adapters=["sft"])
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["sft"].weight.add_(1e-3)
    with open_cache(tmp_path, PLAN, "write") as cache, raises("CACHE_STALE", "base_adapters"):
        cache.fill(model, [batch], progress=False, base_adapters=["sft"])
    # What belongs to the base has another digest: by it, other files are told.
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["sft"].weight.sub_(1e-3)
    assert digests[0] == blockem.base_model_digest(llama()) != digests[1]
    model.set_adapter("sft")
    merged = model.merge_and_unload(adapter_names=["sft"])
    expected = true_z(merged, batch)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(z[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_a_cache_of_the_first_format_says_what_to_do(tmp_path: Path) -> None:
    import gzip

    data = Path(__file__).parents[3] / "tests/data/caches/format-1.cache.gz"
    path = tmp_path / "base.cache"
    path.write_bytes(gzip.decompress(data.read_bytes()))
    for mode in ("read", "write", "create"):
        with raises("UNSUPPORTED", "base.cache.*format 1.*reads format 2.*make a new file"):
            open_cache(tmp_path, PLAN, mode, base_model=None, dtype=None)
