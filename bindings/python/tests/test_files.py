"""Files as other libraries and trainers leave them: wrapped, sharded, pickled, with a mark in front."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import blockem

DATA = Path(__file__).resolve().parents[3] / "tests" / "data"
D, F, K = 12, 20, 4
TRAINER = {"dict_class": "BatchTopKSAE", "layer": 3, "submodule_name": "resid_post_layer_3", "k": K}


class Dictionary(torch.nn.Module):
    """The tensors of dictionary_learning's BatchTopKSAE, and its encode."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.encoder, self.decoder = torch.nn.Linear(D, F), torch.nn.Linear(F, D, bias=False)
        self.b_dec = torch.nn.Parameter(torch.empty(D))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        self.register_buffer("k", torch.tensor(K, dtype=torch.int32))
        self.register_buffer("threshold", torch.tensor(0.25))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (self.encoder(x - self.b_dec)).relu()
        return z * (z > self.threshold)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"trainer": TRAINER}))
    return tmp_path


def is_the_dictionary(path: Path) -> None:
    hidden = torch.randn(30, D, generator=torch.Generator().manual_seed(1))
    sae = blockem.load_sae(path)
    z = blockem.Plan(sae, blockem.Latents(range(F), [1] * F)).encode(hidden)
    torch.testing.assert_close(z, Dictionary()(hidden).detach(), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, None])
@pytest.mark.parametrize("below", [None, "state_dict", "model_state_dict"])
def test_a_wrapped_model_is_the_model(run: Path, wrap: object, below: str | None) -> None:
    model = Dictionary()
    trained = wrap(model) if wrap else torch.nn.DataParallel(torch.compile(model))
    state = trained.state_dict()
    assert not set(state) & set(model.state_dict())
    if below:
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(3, D)).sum().backward()
        optimizer.step()
        model.load_state_dict(Dictionary().state_dict())
        state = {below: state, "optimizer": optimizer.state_dict(), "step": 3}
    torch.save(state, run / "ae.pt")
    is_the_dictionary(run)


def test_numbers_of_numpy_are_numbers(run: Path) -> None:
    beside = {"loss": np.float64(0.5), "step": np.int64(3), "best": np.bool_(True), "lr": np.float32(1e-3)}
    torch.save({**Dictionary().state_dict(), **beside}, run / "ae.pt")
    is_the_dictionary(run)
    # The owner's number of latents, as the trainer's numpy left it.
    config = {"trainer": {**TRAINER, "dict_class": "AutoEncoderTopK"}}
    (run / "config.json").write_text(json.dumps(config))
    state = Dictionary().state_dict()
    for k in (np.int64(5), 5.0, torch.tensor(5.0), torch.tensor([5])):
        torch.save({**state, "k": k}, run / "ae.pt")
        assert blockem.load_sae(run).k == 5
    torch.save({**state, "k": torch.tensor(2.5)}, run / "ae.pt")
    with pytest.raises(blockem.Error, match=r"k is 2\.5"):
        blockem.load_sae(run)


@pytest.mark.parametrize("how", ["nested", "mixed", "module", "legacy"])
def test_the_remedy_of_an_unsafe_pickle_runs(
    run: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, unsafe = Dictionary().state_dict(), {"random": np.random.default_rng(0)}
    saved = {
        "nested": {"state_dict": state, "trainer": unsafe, "step": np.int64(1)},
        "mixed": {**state, **unsafe, "lr": 0.1},
        "module": torch.nn.ModuleDict({"module": Dictionary()}),
        "legacy": {**state, "loss": np.float32(0.5)},
    }[how]
    path = run / "ae.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(blockem.Error) as raised:
        blockem.load_sae(run)
    assert raised.value.name == "UNSAFE_PICKLE"
    found = re.search(r'python (-c ".*") OLD NEW', str(raised.value), re.DOTALL)
    assert found, raised.value
    command = [*shlex.split(found[1]), str(path), str(run / "new.pt")]
    if how == "nested":
        subprocess.run([sys.executable, *command], check=True)
    else:  # The same line without a start of torch.
        monkeypatch.setattr(sys, "argv", ["-c", *command[2:]])
        exec(command[1], {})
    (run / "new.pt").replace(path)
    is_the_dictionary(run)


@pytest.mark.parametrize("given", ["folder", "file"])
@pytest.mark.parametrize(
    "name", ["dl_jumprelu", "dl_matryoshka", "dl_batch_topk", "dl_autoencoder_new", "dl_gated"]
)
def test_a_converted_dictionary_is_read_by_its_own_rule(
    name: str, given: str, tmp_path: Path
) -> None:
    """The class is told by config.json, whatever the container."""
    run = DATA / "formats" / name / "resid_post_layer_15" / "trainer_0"
    state = torch.load(run / "ae.pt", weights_only=True)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    own = blockem.load_sae(run)
    other = blockem.load_sae(tmp_path if given == "folder" else tmp_path / "ae.safetensors")
    hidden = torch.randn(9, own.d_in, generator=torch.Generator().manual_seed(2))
    latents = blockem.Latents(range(own.d_sae), [1] * own.d_sae)
    z, same = (blockem.Plan(sae, latents).encode(hidden) for sae in (own, other))
    assert torch.equal(z, same) and z.any()
    wrong = json.loads((run / "config.json").read_text())
    wrong["trainer"]["dict_class"] = "AutoEncoder"
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(blockem.Error, match="dict_class is AutoEncoder, but the tensors"):
        blockem.load_sae(tmp_path)


def test_shards_of_the_hub_are_one_model(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_state_dict(Dictionary().state_dict(), run, max_shard_size=F * D * 4)
    assert len(list(run.glob("*.safetensors"))) > 1
    is_the_dictionary(run)
    is_the_dictionary(run / "model.safetensors.index.json")
    lost = sorted(run.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(blockem.Error, match=lost.name):
        blockem.load_sae(run)


def test_a_byte_order_mark_is_no_content(run: Path) -> None:
    torch.save(Dictionary().state_dict(), run / "ae.pt")
    config = run / "config.json"
    config.write_text("\ufeff" + config.read_text(), encoding="utf-8")
    is_the_dictionary(run)
    sae = blockem.load_sae(run)
    path = run / "K0.json"
    path.write_text('\ufeff{"K_pos": [3], "K_neg": [5]}', encoding="utf-8")
    assert blockem.load_latents(path, sae).ids.tolist() == [3, 5]
    path.write_text(json.dumps({"K_pos": [3], "K_neg": [], "score": float("nan")}))
    with pytest.raises(blockem.Error, match=r"K0\.json.*the key score holds NaN"):
        blockem.load_latents(path, sae)
    path.write_text('{"K_pos": [3], "K_neg": []}', encoding="utf-16")
    with pytest.raises(blockem.Error, match=r"K0\.json.*UTF-8"):
        blockem.load_latents(path, sae)


def test_a_folder_without_a_tokenizer_json_says_how_to_write_one(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    text = "one two three, four five: a b c d e f g h i j k l m n o p q r s t u v w x y z\n" * 20
    (tmp_path / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60,
        model_type="bpe", byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(blockem.Error, match=r"tokenizer\.json is missing; tokenizer\.model"):
        blockem.Tokenizer(tmp_path)
    with pytest.raises(blockem.Error, match="save_pretrained"):
        blockem.Tokenizer(tmp_path / "tokenizer.model")
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    blockem.Tokenizer(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tekken.json").write_text('{"config": {}, "vocab": []}')
    with pytest.raises(blockem.Error, match=r"tekken\.json.*tokenizer\.json.*save_pretrained"):
        blockem.Tokenizer(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="holds nothing"):
        blockem.Tokenizer(tmp_path / "empty")
