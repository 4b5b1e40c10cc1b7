"""Steering: arrays against the formula, and models whose layers are steered."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch

import blockem
import blockem.torch

D, F, IDS = 24, 9, [4, 0, 8]


def draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sae_with_decoder(d: int = D, f: int = F, layer: int | None = 1) -> tuple[blockem.Sae, np.ndarray]:
    """A random SAE of scaled hidden states, and its unit decoder rows."""
    decoder = 3 * draw(f, d, seed=2)
    sae = blockem.Sae.from_tensors(
        encoder_weight=draw(f, d, seed=3), encoder_layout="f_d", encoder_bias=draw(f, seed=4),
        decoder_weight=decoder, input_scale=0.3,
        hook_name=None if layer is None else f"blocks.{layer}.hook_resid_post",
    )  # fmt: skip
    return sae, decoder / np.linalg.norm(decoder.astype(np.float64), axis=1, keepdims=True)


def pushes(unit: np.ndarray, latents: list[int], strengths: list[float], scale: float) -> torch.Tensor:
    """[B, 1, d] float64: what each row's positions get."""
    rows = [unit[k] * (k >= 0) for k in latents]
    factors = scale * np.asarray(strengths, np.float32).astype(np.float64)
    return torch.from_numpy(factors[:, None, None] * np.stack(rows)[:, None])


# ---- Arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "float32", "float16", "bfloat16", "float64"])
def test_hidden_states_are_pushed_in_place(kind: str) -> None:
    sae, unit = sae_with_decoder()
    backend = "reference" if kind == "float64" else "auto"
    steering = blockem.Steering(sae, IDS, backend=backend, num_threads=2)
    assert steering.ids.tolist() == IDS and (steering.d_in, steering.layer) == (D, 1)
    assert (steering.device, len(steering.identity), len(steering)) == ("cpu", 64, 3)
    assert steering.backend == ("cpu" if backend == "auto" else "reference")
    latents, strengths, scale = [8, -1, 0, 4], [0.7, 1.0, -0.4, 0.0], 11.5
    before = torch.from_numpy(20 * draw(4, 5, D))
    before = before if kind == "numpy" else before.to(getattr(torch, kind))
    expected = before.double() + pushes(unit, latents, strengths, scale)
    hidden = before.numpy().copy() if kind == "numpy" else before.clone()
    assert steering.steer(hidden, np.array(latents), strengths, scale=scale) is hidden
    found = torch.as_tensor(hidden)
    # The unit rows are float32.
    eps = max(torch.finfo(found.dtype).eps, 2.0**-23)
    assert torch.allclose(found.double(), expected, rtol=2 * eps, atol=4 * eps)
    for row in (1, 3):
        assert torch.equal(found[row], before[row])
    assert not torch.equal(found[0], before[0])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_masks_and_strides(dtype: str) -> None:
    sae, unit = sae_with_decoder()
    steering = blockem.Steering(sae, IDS)
    shares = np.random.default_rng(5).choice([0.0, 1.0, 0.5] if dtype == "float32" else [0.0, 1.0], (2, 6))
    mask = torch.from_numpy(shares).to(getattr(torch, dtype))
    memory = torch.from_numpy(draw(6, 2, D + 3))
    memory[torch.from_numpy(shares.T == 0)] = float("nan")
    before = memory.clone()
    # Positions first, and columns beside them.
    hidden = memory[:, :, :D].transpose(0, 1)
    steering.steer(hidden, torch.tensor([0, 4]), torch.tensor([0.3, -2.0]), mask.T.contiguous().T)
    push = pushes(unit, [0, 4], [0.3, -2.0], 1.0) * torch.from_numpy(shares)[..., None]
    expected = before[:, :, :D].transpose(0, 1).double() + push
    counted = torch.from_numpy(shares) != 0
    assert torch.allclose(hidden.double()[counted], expected[counted], atol=1e-6)
    assert hidden[~counted].isnan().all()
    assert torch.equal(memory[:, :, D:].nan_to_num(), before[:, :, D:].nan_to_num())


def test_what_is_wrong_is_told() -> None:
    sae, _ = sae_with_decoder()
    steering, hidden = blockem.Steering(sae, IDS), torch.zeros(2, 3, D)
    good = {"latents": [0, 4], "strengths": [1.0, 1.0]}
    for change, name, word in [
        ({"latents": [0, 5]}, "LATENT_RANGE", "latent 5"),
        ({"latents": [0, -2]}, "LATENT_RANGE", "latent -2"),
        ({"latents": [0]}, "SHAPE", "strengths"),
        ({"latents": [[0, 4]]}, "SHAPE", "latents"),
        ({"strengths": [1.0, float("nan")]}, "NON_FINITE", "strengths"),
        ({"hidden": hidden[0]}, "SHAPE", "hidden"),
        ({"hidden": torch.zeros(3, 3, D)}, "SHAPE", "hidden"),
        ({"hidden": hidden.long()}, "DTYPE", "hidden"),
        ({"hidden": hidden.expand(2, 3, D)[:1].expand(2, 3, D)}, "LAYOUT", "share memory"),
        ({"mask": torch.ones(3, 2)}, "SHAPE", "mask"),
        ({"mask": torch.ones(2, 3, dtype=torch.int64)}, "DTYPE", "mask"),
        ({"scale": float("inf")}, "INVALID_ARGUMENT", "scale"),
        ({"hidden": hidden.clone().requires_grad_()}, "INVALID_ARGUMENT", "requires grad"),
    ]:
        with pytest.raises(blockem.ArgumentError if name != "NON_FINITE" else blockem.DataError,
                           match=word) as caught:  # fmt: skip
            steering.steer(**{"hidden": hidden} | good | change)
        assert caught.value.name == name
    assert (hidden == 0).all()
    with pytest.raises(TypeError, match="whole numbers"):
        steering.steer(hidden, [0.5, 4], [1, 1])
    frozen = np.zeros((2, 3, D), np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        steering.steer(frozen, **good)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(steering)
    for ids, name in [([], "INVALID_ARGUMENT"), ([F], "LATENT_RANGE"), ([[0]], "SHAPE")]:
        with pytest.raises(blockem.ArgumentError) as caught:
            blockem.Steering(sae, np.array(ids, int))
        assert caught.value.name == name
    without = blockem.Sae.from_tensors(encoder_weight=draw(F, D), encoder_layout="f_d",
                                       encoder_bias=draw(F))  # fmt: skip
    with pytest.raises(blockem.DataError, match="decoder") as caught:
        blockem.Steering(without, [0])
    assert caught.value.name == "TENSOR_MISSING"


def test_a_push_in_place_is_seen_by_autograd() -> None:
    sae, _ = sae_with_decoder()
    steering, hidden = blockem.Steering(sae, IDS), torch.ones(1, 1, D)
    weight = torch.ones(D, requires_grad=True)
    loss = (hidden * weight).sum()
    steering.steer(hidden, [0], [1.0])
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    with torch.inference_mode():
        steering.steer(torch.ones(1, 1, D), [0], [1.0])


def test_activation_scale_is_the_median_norm() -> None:
    batches = [(5 * draw(3, 7, D), None), (torch.from_numpy(draw(2, 6, D, seed=2)).bfloat16(), None)]
    batches.append((draw(4, D, seed=3), np.array([1, 0, 1, 1], np.uint8)))
    wide = [torch.as_tensor(hidden).double().norm(dim=-1).flatten() for hidden, _ in batches]
    counted = torch.cat([wide[0], wide[1], wide[2][[0, 2, 3]]]).sort().values
    assert len(counted) == 36
    assert blockem.activation_scale(batches) == pytest.approx(float(counted[17:19].mean()), rel=1e-6)
    norms = blockem.token_norms(batches[1][0])
    assert norms.dtype == torch.float32 and norms.shape == (2, 6)
    assert torch.allclose(norms.double().flatten(), wide[1], rtol=1e-6)
    assert blockem.token_norms(np.ones((2, 9)), backend="reference").tolist() == [3.0, 3.0]
    # A token that does not count may be anything.
    hidden = draw(3, D)
    hidden[1] = np.nan
    mask = np.array([True, False, True])
    assert np.isfinite(blockem.activation_scale([(hidden, mask)]))
    with pytest.raises(blockem.DataError, match="finite"):
        blockem.activation_scale([(hidden, None)])
    for nothing in ([], [(hidden, np.zeros(3, bool))]):
        with pytest.raises(blockem.ArgumentError, match="no token"):
            blockem.activation_scale(nothing)
    with pytest.raises(blockem.ArgumentError, match="mask"):
        blockem.activation_scale([(hidden, np.ones(2, bool))])


FORMATS = Path(__file__).resolve().parents[3] / "tests/data/formats"


@pytest.mark.parametrize("name, tensor, transposed", [
    ("goodfire_llama", "decoder_linear.weight", True),
    ("goodfire_square", "decoder_linear.weight", True),
    ("llama_scope", "decoder.weight", True),
    ("gemma_scope_square", "W_dec", False),
    ("openmoss_glu", "W_D", False),
])  # fmt: skip
def test_directions_are_the_files_own(name: str, tensor: str, transposed: bool) -> None:
    """Whichever way the decoder lies, and whatever is folded into the encoder."""
    folder = FORMATS / name
    sae = blockem.load_sae(folder / json.loads((folder / "note.json").read_text())["path"])
    [file] = [
        file
        for file in folder.rglob("*")
        if file.suffix in (".pth", ".npz", ".safetensors") and "expected" not in file.name
    ]
    if file.suffix == ".pth":
        decoder = torch.load(file, weights_only=True)[tensor]
    elif file.suffix == ".npz":
        decoder = torch.from_numpy(np.load(file)[tensor])
    else:
        decoder = safetensors.torch.load_file(file)[tensor]
    rows = (decoder.T if transposed else decoder).double()
    ids = [2, 0, sae.d_sae - 1]
    hidden = torch.zeros(3, 1, sae.d_in)
    blockem.Steering(sae, ids).steer(hidden, ids, [1.0, -1.0, 1.0])
    expected = rows[ids] / rows[ids].norm(dim=1, keepdim=True) * torch.tensor([[1.0], [-1], [1]])
    assert torch.allclose(hidden[:, 0].double(), expected, atol=1e-7)


# ---- Models ------------------------------------------------------------------------------------

LATENTS, STRENGTHS, SCALE = [4, -1, 8], [0.9, 1.0, -0.6], 25.0


@pytest.fixture(scope="module")
def steering() -> blockem.Steering:
    return blockem.Steering(sae_with_decoder(tiny.WIDTH)[0], IDS, num_threads=1)


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny.llama().eval()


def by_hand(model: torch.nn.Module, layer: int = 1) -> torch.utils.hooks.RemovableHandle:
    """The same steering in torch's own operations."""
    push = pushes(sae_with_decoder(tiny.WIDTH)[1], LATENTS, STRENGTHS, SCALE).float()

    def hook(module: torch.nn.Module, args: tuple, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        pushed = hidden + push.to(hidden.dtype)
        return (pushed, *output[1:]) if isinstance(output, tuple) else pushed

    return model.model.layers[layer].register_forward_hook(hook)


def prompts() -> dict[str, torch.Tensor]:
    """Three rows, two of them padded on the left."""
    ids = torch.randint(3, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    shown = torch.arange(8) >= torch.tensor([[0], [3], [1]])
    return {"input_ids": ids * shown, "attention_mask": shown.long()}


def test_a_steered_forward_is_that_of_a_hook(model: torch.nn.Module, steering: blockem.Steering) -> None:
    batch = prompts()
    with torch.no_grad():
        plain = model(**batch).logits
        with blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=SCALE) as same:
            assert same is model
            found = model(**batch)
        hook = by_hand(model)
        expected = model(**batch)
        hook.remove()
        assert torch.allclose(found.logits, expected.logits, atol=1e-5)
        for layer, other in zip(found.past_key_values.layers, expected.past_key_values.layers):
            assert torch.allclose(layer.keys, other.keys, atol=1e-5)
        assert torch.equal(found.logits[1], plain[1])
        assert not torch.allclose(found.logits[0], plain[0], atol=1e-2)
        # Afterwards the model is what it was, also after an exception.
        assert torch.equal(model(**batch).logits, plain)
        with pytest.raises(ZeroDivisionError):
            with blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=SCALE):
                1 / 0
        assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("cached", [True, False])
def test_generated_tokens_are_steered_too(
    model: torch.nn.Module, steering: blockem.Steering, cached: bool
) -> None:
    batch = prompts()
    settings = {"max_new_tokens": 9, "do_sample": False, "use_cache": cached, "output_logits": True,
                "return_dict_in_generate": True, "eos_token_id": None}  # fmt: skip
    with blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=SCALE):
        found = model.generate(**batch, **settings)
    hook = by_hand(model)
    expected = model.generate(**batch, **settings)
    hook.remove()
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.logits, expected.logits):
        assert torch.allclose(one, other, atol=1e-4)
    plain = model.generate(**batch, **settings)
    assert not torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.sequences[1], plain.sequences[1])
    # Conditions of one batch are each what it is when all rows have it.
    for row, (latent, strength) in enumerate(zip(LATENTS, STRENGTHS)):
        with blockem.torch.steered(model, steering, [latent] * 3, [strength] * 3, scale=SCALE):
            alone = model.generate(**batch, **settings)
        assert torch.equal(alone.sequences[row], found.sequences[row])
        for one, other in zip(alone.logits, found.logits):
            assert torch.equal(one[row], other[row])


def test_masks_are_of_the_prompt(model: torch.nn.Module, steering: blockem.Steering) -> None:
    batch = prompts()
    nothing = torch.zeros(3, 8, dtype=torch.bool)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True,
                "return_dict_in_generate": True, "eos_token_id": None}  # fmt: skip
    plain = model.generate(**batch, **settings)
    with blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=SCALE, mask=nothing):
        found = model.generate(**batch, **settings)
        # The prompt is left alone, what follows is not.
        assert torch.equal(found.logits[0], plain.logits[0])
        assert not torch.allclose(found.logits[1][0], plain.logits[1][0], atol=1e-2)
        with pytest.raises(blockem.ArgumentError, match="7 positions"):
            model(**{name: x[:, :7] for name, x in batch.items()})


def test_the_last_layer_and_other_models(steering: blockem.Steering) -> None:
    batch = prompts()
    last = blockem.Steering(sae_with_decoder(tiny.WIDTH, layer=None)[0], IDS)
    model = tiny.with_lora(tiny.llama()).eval()
    with torch.no_grad():
        with blockem.torch.steered(model, last, LATENTS, STRENGTHS, scale=SCALE, layer=2):
            found = model(**batch).logits
        hook = by_hand(model.get_base_model(), layer=2)
        assert torch.allclose(found, model(**batch).logits, atol=1e-5)
        hook.remove()
    for wrong, word in [
        (lambda: blockem.torch.steered(model, last, LATENTS, STRENGTHS, scale=SCALE), "give layer"),
        (lambda: blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=1, layer=2), "block 1"),
        (lambda: blockem.torch.steered(model, last, LATENTS, STRENGTHS, scale=1, layer=3), "layer 3"),
        (lambda: blockem.torch.steered(model, steering, [5], [1.0], scale=1), "latent 5"),
    ]:
        with pytest.raises(blockem.ArgumentError, match=word):
            with wrong():
                pass


def test_rows_that_the_model_multiplies_are_refused(
    model: torch.nn.Module, steering: blockem.Steering
) -> None:
    with blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=SCALE):
        with pytest.raises(blockem.ArgumentError, match="num_return_sequences"):
            model.generate(**prompts(), max_new_tokens=2, do_sample=True, num_return_sequences=2)
        with pytest.raises(blockem.ArgumentError, match="beams"):
            model.generate(**prompts(), max_new_tokens=2, num_beams=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_pass_through(steering: blockem.Steering, checkpointing: bool) -> None:
    batch = prompts()
    gradients = []
    for hand in (False, True):
        model = tiny.llama().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if hand:
            by_hand(model)
            model(**batch, labels=batch["input_ids"]).loss.backward()
        else:
            with blockem.torch.steered(model, steering, LATENTS, STRENGTHS, scale=SCALE):
                model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name
    assert gradients[0]["model.layers.0.mlp.up_proj.weight"].abs().sum() > 0


def test_compiled_models_are_steered(model: torch.nn.Module, steering: blockem.Steering) -> None:
    batch = prompts()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain = compiled(**batch).logits
        with blockem.torch.steered(compiled, steering, LATENTS, STRENGTHS, scale=SCALE):
            found = compiled(**batch).logits
        hook = by_hand(model)
        expected = model(**batch).logits
        hook.remove()
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found[0], plain[0], atol=1e-2)
        assert torch.equal(compiled(**batch).logits, plain)
