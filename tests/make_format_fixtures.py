"""Writes tests/data/formats and tests/data/pickles: small SAEs in every public layout.

    python tests/make_format_fixtures.py

Needs requirements.txt and, with `pip install --no-deps`, eai-sparsify 1.3.3, dictionary-learning
0.1.0, llamascopium 2.0.0b34 and circuit-tracer 0.5.0 (with natsort, zstandard and einops; what else
they import is stubbed). Owners without a package are asked as well if FORMAT_OWNERS names a folder with

    openai/       openai/sparse_autoencoder        4965b941e9eb590b00b253a2c406db1e1b193942
    openmoss/     OpenMOSS/Language-Model-SAEs     4ec6f0aa
    goodfire-r1/  goodfire-ai/r1-interpretability  3e312b54e2193ed069c6019d45bf9a8dd9bef715

The bytes written do not depend on it. Each folder of tests/data/formats holds
    the owner's tree, from the root of the owner's repository down (note.json: `path`),
    expected.safetensors   x [T, d] f32, z [T, F] f64: the owner's encode in float64 on the file's values,
    note.json              owner, formula, reader (what computed z), path, must ("loads" or "refused").
Every z is checked against the formula, written a second time in `Rule`, and no draw of x comes near
a gate, so only our own rounding is measured.
"""

import json
import math
import os
import shutil
import sys
import time
import types
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
HERE = DATA / "formats"
OWNERS = Path(os.environ.get("FORMAT_OWNERS", "/nonexistent"))
TOKENS = 7
MARGIN = 1e-4
HAND = "torch or safetensors, in the layout that the owner publishes"


class Stubs:
    """Empty modules for what the owners import beside torch and this script never calls."""

    NAMES = {"schedulefree", "nnsight", "wandb", "bson", "pymongo", "gridfs", "more_itertools"}

    def find_spec(self, name, path, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.NAMES else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: type(name, (), {}) if name[0] != "_" else (_ for _ in ()).throw(AttributeError(name))
        return module

    def exec_module(self, module):
        pass


def bare_package(name: str, folder: Path) -> None:
    """Makes the modules of a package importable without running its __init__."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


Stubs.NAMES = {n for n in Stubs.NAMES if find_spec(n) is None or n == "wandb"}
sys.meta_path.insert(0, Stubs())
bare_package("llamascopium", Path(find_spec("llamascopium").submodule_search_locations[0]))

import dictionary_learning.dictionary as dl  # noqa: E402
import make_pickle_fixtures  # noqa: E402
import sae_lens.loading.pretrained_sae_loaders as lens  # noqa: E402
from circuit_tracer.transcoder import single_layer_transcoder as ct  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402
from dictionary_learning.utils import load_dictionary  # noqa: E402
from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: E402
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # noqa: E402
from llamascopium.models.sparse_dictionary import SparseDictionary  # noqa: E402
from sae_lens import SAE  # noqa: E402
from sparsify import Sae, SparseCoderConfig  # noqa: E402

LENS = f"sae-lens {version('sae-lens')}"
TRACER = f"circuit-tracer {version('circuit-tracer')}"
SPARSIFY = f"eai-sparsify {version('eai-sparsify')}"
LEARNING = f"dictionary-learning {version('dictionary-learning')}"
SCOPIUM = f"llamascopium {version('llamascopium')}"


# ---------------------------------------------------------------- formulas


@dataclass
class Rule:
    """One encode, in float64 numpy; W [d, F]. kind: jump, topk, signed, groupmax, batch or gated."""

    W: np.ndarray
    b: np.ndarray | float = 0.0
    kind: str = "jump"
    th: np.ndarray | float = 0.0
    k: int = 0
    centre: np.ndarray | float = 0.0
    scale: float = 1.0
    token_norm: bool = False
    layer_norm: bool = False
    gain: np.ndarray | float = 1.0
    back: bool = False
    glu: tuple | None = None
    gate: np.ndarray | float = 0.0
    r_mag: np.ndarray | float = 0.0
    mag: np.ndarray | float = 0.0

    def __call__(self, x: torch.Tensor) -> tuple[np.ndarray, float]:
        x = x.double().numpy()
        if self.layer_norm:
            x = x - x.mean(1, keepdims=True)
            x = x / (x.std(1, keepdims=True, ddof=1) + 1e-5)
        if self.token_norm:
            x = x * math.sqrt(x.shape[1]) / np.linalg.norm(x, axis=1, keepdims=True)
        x = x * self.scale - f64(self.centre)
        h = x @ f64(self.W) + f64(self.b)
        if self.glu:
            h = h / (1 + np.exp(-(x @ f64(self.glu[0]) + f64(self.glu[1]))))
        h = h * self.gain
        z, margin = getattr(self, self.kind)(h)
        if self.back:
            z = z / self.gain
        return z, margin

    def jump(self, h):
        th = np.maximum(f64(self.th), 0)
        return np.where(h > th, h, 0), np.abs(h - th).min()

    def topk(self, h):
        best = -np.sort(-h, axis=1)
        last = best[:, self.k - 1 : self.k]
        gaps = np.where(last > 0, last - best[:, self.k : self.k + 1], 1)
        return np.where((h >= last) & (h > 0), h, 0), min(gaps.min(), np.abs(h).min())

    def signed(self, h):
        best = -np.sort(-np.abs(h), axis=1)
        last = best[:, self.k - 1 : self.k]
        return np.where(np.abs(h) >= last, h, 0), (last[:, 0] - best[:, self.k]).min()

    def groupmax(self, h):
        groups = h.reshape(len(h), self.k, -1)
        best = -np.sort(-groups, axis=2)
        gaps = np.where(best[..., 0] > 0, best[..., 0] - best[..., 1], 1)
        z = np.where((groups == best[..., :1]) & (groups > 0), groups, 0)
        return z.reshape(h.shape), min(gaps.min(), np.abs(h).min())

    def batch(self, h):
        flat = Rule(self.W, k=self.k * len(h)).topk(h.reshape(1, -1))
        return flat[0].reshape(h.shape), flat[1]

    def gated(self, h):
        open_, size = h + f64(self.gate), h * np.exp(f64(self.r_mag)) + f64(self.mag)
        return np.where((open_ > 0) & (size > 0), size, 0), min(np.abs(open_).min(), np.abs(size).min())


def f64(value) -> np.ndarray:
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else np.asarray(value, np.float64)


# ---------------------------------------------------------------- helpers


class Draw:
    """Seeded weights in the ranges of a real SAE: decoder norms from 0.2 to 2."""

    def __init__(self, seed: int, d: int, F: int):
        self.g = torch.Generator().manual_seed(seed)
        self.d, self.F = d, F

    def randn(self, *shape, scale=0.3):
        return torch.randn(shape, generator=self.g) * scale

    def rand(self, *shape):
        return torch.rand(shape, generator=self.g)

    def enc(self):  # [d, F]
        return self.randn(self.d, self.F)

    def dec(self):  # [F, d]
        rows = self.randn(self.F, self.d, scale=1.0)
        return rows / rows.norm(dim=1, keepdim=True) * (0.2 + 1.8 * self.rand(self.F, 1))

    def b_enc(self):
        return self.randn(self.F)

    def b_dec(self):
        return self.randn(self.d)

    def th(self):
        return self.rand(self.F) * 0.8

    def fill(self, module: torch.nn.Module) -> None:
        """Draws every parameter of a module, decoders with unequal norms."""
        for name, p in module.named_parameters():
            if "threshold" in name:
                value = self.rand(*p.shape).log() if "log" in name else self.rand(*p.shape) * 0.8
            elif p.dim() == 2 and p.shape in ((self.F, self.d), (self.d, self.F)) and ("dec" in name or name == "W_D"):
                value = self.dec() if p.shape == (self.F, self.d) else self.dec().T
            else:
                value = self.randn(*p.shape)
            p.data.copy_(value)  # keeps strides: dictionary_learning saves transposed views


def fresh(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def note(folder: Path, path: str, owner: str, formula: str, reader: str = "", **more) -> None:
    must = {"must": "refused" if "why" in more else "loads"}
    text = {"owner": owner, "formula": formula, "reader": reader, "path": path, **must, **more}
    (folder / "note.json").write_text(json.dumps(text, indent=1) + "\n")


@torch.no_grad()
def expect(folder: Path, seed: int, rule: Rule, owner=None, more: dict | None = None, offset=None, check=None) -> None:
    """Draws x away from every gate; z is the owner's where there is one.

    more: further readings; check: an owner who must agree, but whose bits are not written.
    """
    generator = torch.Generator().manual_seed(seed + 10_000)
    readings = {"expected": (rule, owner), **(more or {})}
    d = rule.W.shape[0]
    for _ in range(3000):
        x = torch.randn(TOKENS, d, generator=generator)
        if offset is not None:
            x = x + offset
        if min(r(x)[1] for r, _ in readings.values()) > MARGIN:
            break
    else:
        raise SystemExit(f"{folder.name}: no draw keeps its distance from the gates")
    for name, (r, encode) in readings.items():
        z, _ = r(x)
        for ask in filter(None, (encode, check if name == "expected" else None)):
            theirs = ask(x.double())
            assert theirs.dtype == torch.float64, (folder.name, theirs.dtype)
            np.testing.assert_allclose(theirs.numpy(), z, rtol=1e-9, atol=1e-12, err_msg=f"{folder.name} {name}")
            z = theirs.numpy() if ask is encode else z
        assert (z != 0).any() and (z == 0).any(), (folder.name, name)
        save_file({"x": x, "z": torch.tensor(z).contiguous()}, folder / f"{name}.safetensors")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4))


def torch_save(value, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)


def st_save(tensors: dict, path: Path, metadata=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


@contextmanager
def fixed_time():
    """zipfile stamps members with the clock."""
    with mock.patch("time.localtime", return_value=time.gmtime(315532800)):
        yield


def saelens(root: Path, loader, repo: str, name: str, scale: float | None = None, **overrides):
    """The encode of sae-lens' own loader, offline: the hub is the folder `root`, the dtype float64."""

    def download(repo_id=None, filename=None, subfolder=None, **_):
        path = root / (subfolder or "") / filename
        if not path.exists():
            raise LocalEntryNotFoundError(str(path))
        return str(path)

    def shapes(_, filename):
        with safe_open(root / filename, "pt") as f:
            return {k: f.get_slice(k).get_shape() for k in f.keys()}

    overrides["dtype"] = "float64"
    with mock.patch.object(lens, "hf_hub_download", download), mock.patch.object(lens, "get_safetensors_tensor_shapes", shapes):
        cfg, state, _ = loader(repo, name, "cpu", False, overrides)
    cfg = lens.handle_config_defaulting({**cfg, **overrides, "device": "cpu"})
    config = SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg)
    sae = SAE.get_sae_class_for_architecture(config.architecture())(config)
    state = {k: v.double() for k, v in state.items()}
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state, assign=True)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae.double().encode


# ---------------------------------------------------------------- Goodfire


def goodfire(name, file, repo, d, F, seed):
    w, folder = Draw(seed, d, F), fresh(name)
    state = torch.nn.Module()
    state.encoder_linear, state.decoder_linear = torch.nn.Linear(d, F), torch.nn.Linear(F, d)
    w.fill(state)
    state = state.state_dict()
    torch_save(state, folder / file)
    (folder / "config.yaml").write_text(yaml.safe_dump({"d_in": d, "d_hidden": F, "note": "not the owner's text; no reader needs this file"}))
    note(
        folder, file, f"Goodfire; file by {HAND}, config.yaml invented", "z = relu(x @ encoder_linear.weight.T + encoder_linear.bias)",
        f"{LENS} get_goodfire_huggingface_loader, StandardSAE.encode",
    )
    encode = saelens(folder, lens.get_goodfire_huggingface_loader, repo, file, d_in=d, d_sae=F)
    expect(folder, seed, Rule(state["encoder_linear.weight"].T, state["encoder_linear.bias"]), encode)


def goodfire_r1(name, part, d, dtype, k, seed):
    w, folder = Draw(seed, d, 4 * d), fresh(name)
    state = {"W": w.enc().to(dtype), "b_enc": w.b_enc().to(dtype), "b_dec": w.b_dec().to(dtype)}
    file = f"{part}/DeepSeek-R1-SAE-l37.pt"
    torch_save(dict(state), folder / file)
    write_json(folder / part / "config.json", {"d_in": d, "expansion_factor": 4, "k": k})
    owner = None
    if (OWNERS / "goodfire-r1").exists():
        sys.path.insert(0, str(OWNERS / "goodfire-r1"))
        import sae as r1

        model = r1.BatchTopKTiedSAE(d, 4 * d, k, "cpu", torch.float64)
        model.load_state_dict(state)
        owner = model.encode
    note(
        folder, file, f"Goodfire DeepSeek-R1; file by {HAND}",
        f"z = the {k}*T largest of relu(x @ W + b_enc) over all T tokens given; expected_relu: before that selection",
        "formula, checked equal to goodfire-ai/r1-interpretability 3e312b54 BatchTopKTiedSAE.encode", k=k,
    )
    rule = Rule(state["W"], state["b_enc"], "batch", k=k)
    expect(folder, seed, rule, None, {"expected_relu": (Rule(state["W"], state["b_enc"]), None)}, check=owner)


# ---------------------------------------------------------------- Llama Scope and OpenMOSS


def authors_of_llama_scope():
    """SparseAutoEncoder of the release commit, where its source is at hand."""
    source = OWNERS / "openmoss" / "src"
    if not source.exists():
        return None
    if "lm_saes" not in sys.modules:
        sys.path.insert(0, str(source))
        bare_package("lm_saes", source / "lm_saes")
        bare_package("lm_saes.activation", source / "lm_saes" / "activation")
        store = types.ModuleType("lm_saes.activation.activation_store")
        store.ActivationStore = object
        sys.modules[store.__name__] = store
    from lm_saes.sae import SparseAutoEncoder as Old

    return Old


def llama_scope(name, sub, d, times, seed, theta, norms, hooks, repo):
    F = d * times
    w, folder = Draw(seed, d, F), fresh(name)
    D = w.dec().T
    if "TC" in sub:
        D[:, 3] = 0
    state = {"encoder.weight": w.enc().T, "encoder.bias": w.b_enc(), "decoder.weight": D, "decoder.bias": w.b_dec()}
    state = {k: v.bfloat16() for k, v in state.items()}
    st_save(state, folder / sub / "checkpoints" / "final.safetensors")
    hyper = {
        "device": "cpu", "seed": 42, "dtype": "torch.bfloat16", "hook_point_in": hooks[0], "hook_point_out": hooks[1],
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": times, "d_model": d, "d_sae": F,
        "bias_init_method": "all_zero", "act_fn": "jumprelu", "jump_relu_threshold": theta, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norms[0], "out": norms[1]}, "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "init_decoder_norm": None, "init_encoder_norm": None,
        "init_encoder_with_decoder_transpose": True, "lp": 1, "l1_coefficient": 8e-05, "l1_coefficient_warmup_steps": 0.1,
        "top_k": 50, "k_warmup_steps": 0.1, "use_batch_norm_mse": True, "use_ghost_grads": False, "tp_size": 1, "ddp_size": 1,
    }  # fmt: skip
    write_json(folder / sub / "hyperparams.json", hyper)
    lm = {"device": "cpu", "seed": 42, "dtype": "torch.bfloat16", "model_name": "meta-llama/Llama-3.1-8B", "model_from_pretrained_path": None,
          "use_flash_attn": False, "cache_dir": None, "d_model": d, "local_files_only": False}  # fmt: skip
    write_json(folder / sub / "lm_config.json", lm)

    s_in, s_out = math.sqrt(d) / norms[0], math.sqrt(d) / norms[1]
    E, b = state["encoder.weight"].T, state["encoder.bias"]
    gain = np.linalg.norm(f64(state["decoder.weight"]), axis=0) / s_out
    rule = Rule(E, b, th=theta, scale=s_in, gain=gain)
    owner, Old = None, authors_of_llama_scope()
    if Old:
        from lm_saes.config import SAEConfig as OldConfig

        path = folder / sub
        with mock.patch("safetensors.torch.load_file", lambda *a, **_: {k: v.double() for k, v in load_file(a[0]).items()}):
            config = OldConfig.from_dict({**hyper, "dtype": "torch.float64", "sae_pretrained_name_or_path": str(path)})
            owner = Old.from_config(config).encode
    theirs = saelens(folder, lens.llama_scope_sae_huggingface_loader, repo, sub, scale=s_in)
    lens_rule = Rule(E, b, th=theta * s_in, scale=s_in)
    note(
        folder, sub, f"OpenMOSS, Llama Scope; files by {HAND}",
        "u = s_in*(x @ E.T) + b_e; h = u*||D[:,j]||/s_out; z = h if h > theta else 0; s = sqrt(d)/average norm",
        "formula, checked equal to OpenMOSS/Language-Model-SAEs 4ec6f0aa SparseAutoEncoder.encode; "
        f"expected_saelens (z = u where u > theta*s_in): {LENS} llama_scope_sae_huggingface_loader, "
        "fold_activation_norm_scaling_factor, JumpReLUSAE.encode",
    )  # fmt: skip
    expect(folder, seed, rule, None, {"expected_saelens": (lens_rule, theirs)}, check=owner)


def r1_distill(name, with_norm, d, times, seed):
    F, average, hook = d * times, 17.5, "blocks.15.hook_resid_post"
    w, folder = Draw(seed, d, F), fresh(name)
    sub = "400M-Slimpajama-400M-OpenR1-Math-220k/L15R"
    state = {"encoder.weight": w.enc().T, "encoder.bias": w.b_enc(), "decoder.weight": w.dec().T, "decoder.bias": w.b_dec()}
    state["log_jumprelu_threshold"] = w.th().log()
    if with_norm:
        state[f"dataset_average_activation_norm.{hook}"] = torch.tensor(average)
    st_save(state, folder / sub / "sae_weights.safetensors", {"version": "0.1.0"})
    config = {
        "sae_type": "sae", "hook_point_in": hook, "hook_point_out": hook, "use_decoder_bias": True, "expansion_factor": times, "d_model": d,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.0, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False,
        "force_unit_decoder_norm": False, "use_glu_encoder": False, "top_k": 50, "dtype": "torch.float32", "device": "cuda",
    }  # fmt: skip
    write_json(folder / sub / "config.json", config)
    s = math.sqrt(d) / average
    encode = saelens(folder, lens.llama_scope_r1_distill_sae_huggingface_loader, "fnlp/Llama-Scope-R1-Distill", sub, scale=s)
    needs = {} if with_norm else {"needs": {"scale": s}}
    note(
        folder, sub, f"OpenMOSS, Llama Scope R1-Distill; files by {HAND}",
        "u = s*(x @ E.T) + b_e; z = u where u > exp(log_jumprelu_threshold); s = sqrt(d)/average norm",
        f"{LENS} llama_scope_r1_distill_sae_huggingface_loader with that s, JumpReLUSAE.encode", **needs,
    )  # fmt: skip
    expect(folder, seed, Rule(state["encoder.weight"].T, state["encoder.bias"], th=state["log_jumprelu_threshold"].double().exp(), scale=s), encode)


def openmoss(name, d, times, seed, act, norm="dataset-wise", gain=True, glu=False, k=6, suffix="safetensors", hooks=None, average=6.25, **refuse):
    F = d * times
    w, folder = Draw(seed, d, F), fresh(name)
    hook_in, hook_out = hooks or ("blocks.3.hook_resid_post",) * 2
    cfg = SAEConfig(
        hook_point_in=hook_in, hook_point_out=hook_out, d_model=d, expansion_factor=times, act_fn=act, norm_activation=norm,
        sparsity_include_decoder_norm=gain, top_k=k, use_glu_encoder=glu,
    )  # fmt: skip
    sae = SparseAutoEncoder(cfg)
    w.fill(sae)
    if norm == "dataset-wise" and average:
        sae.set_dataset_average_activation_norm({hook_in: average} | {hook_out: 9.5 if hook_in != hook_out else average})
    folder.mkdir(exist_ok=True)
    # The owner writes uninitialised memory where no norm was set: NaN here, for the same bytes each run.
    torch.use_deterministic_algorithms(True)
    sae.save_checkpoint(folder / f"sae_weights.{suffix}")
    torch.use_deterministic_algorithms(False)
    cfg.save_hyperparameters(folder)

    model = SparseDictionary.from_pretrained(str(folder), dtype="float64")

    def encode(x):
        return model.encode(model.normalize_activations({hook_in: x})[hook_in])

    p = {k: v for k, v in sae.named_parameters()}
    rule = Rule(
        p["W_E"], p["b_E"], {"topk": "topk", "batchtopk": "batch"}.get(act, "jump"), k=k, back=gain,
        scale=math.sqrt(d) / average if norm == "dataset-wise" and average else 1.0, token_norm=norm == "token-wise",
        gain=np.linalg.norm(f64(p["W_D"]), axis=1) if gain else 1.0,
        th=p["activation_function.log_jumprelu_threshold"].double().exp() if act == "jumprelu" else 0.0,
        glu=(p["W_E_glu"], p["b_E_glu"]) if glu else None,
    )  # fmt: skip
    note(
        folder, "", SCOPIUM,
        f"u = {'(norm(x) @ W_E + b_E) * sigmoid(norm(x) @ W_E_glu + b_E_glu)' if glu else 'norm(x) @ W_E + b_E'}; "
        f"{act}{' (k*T largest of all T tokens given)' if act == 'batchtopk' else ''} of {'u*||W_D[j]||, divided back' if gain else 'u'}; norm {norm}",
        "SparseDictionary.from_pretrained(dtype=float64), normalize_activations, SparseAutoEncoder.encode; saved by save_checkpoint", **refuse,
    )  # fmt: skip
    if not refuse:
        expect(folder, seed, rule, encode)


# ---------------------------------------------------------------- Gemma Scope


def npz(path: Path, arrays: dict, deflate=False, zip64=False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with fixed_time():
        if not zip64:
            return (np.savez_compressed if deflate else np.savez)(path, **arrays)
        # A limit of 0 makes zipfile write zip64 central records and the zip64 end records as well.
        with mock.patch.object(zipfile, "ZIP64_LIMIT", 0), zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
            for key, array in arrays.items():
                with z.open(f"{key}.npy", "w", force_zip64=True) as out:
                    np.lib.format.write_array(out, array)


def gemma_arrays(w: Draw) -> dict:
    arrays = {"W_dec": w.dec(), "W_enc": w.enc(), "b_dec": w.b_dec(), "b_enc": w.b_enc(), "threshold": w.th()}
    return {k: v.numpy() for k, v in arrays.items()}


JUMP = "h = x @ W_enc + b_enc; z = relu(h) where h > threshold"


def gemma_scope(name, sub, repo, d, F, seed, fortran=False, **how):
    w, folder = Draw(seed, d, F), fresh(name)
    arrays = gemma_arrays(w)
    npz(folder / sub / "params.npz", {k: np.asfortranarray(v) for k, v in arrays.items()} if fortran else arrays, **how)
    encode = saelens(folder, lens.gemma_2_sae_huggingface_loader, repo, sub, d_in=d, d_sae=F, reshape_activations="none")
    embedding = "embedding" in sub
    formula = JUMP + (" with W_enc/sqrt(d): x is the embedding after the model's own sqrt(d) factor" if embedding else "")
    with zipfile.ZipFile(folder / sub / "params.npz") as z:
        how = {"members": "deflated" if z.infolist()[0].compress_type else "stored"}
    note(folder, sub, f"Google, Gemma Scope; file by numpy {np.__version__}", formula, f"{LENS} gemma_2_sae_huggingface_loader, JumpReLUSAE.encode", **how)
    factor = math.sqrt(d) if embedding else 1.0
    expect(folder, seed, Rule((arrays["W_enc"] / np.float32(factor)), arrays["b_enc"], th=arrays["threshold"]), encode)


def gemma_transcoder(name, d, F, seed):
    w, folder = Draw(seed, d, F), fresh(name)
    arrays, sub = gemma_arrays(w), "layer_5/width_16k/average_l0_41"
    npz(folder / sub / "params.npz", arrays)
    model = ct.load_gemma_scope_transcoder(str(folder / sub / "params.npz"), 5, dtype=torch.float64)
    note(
        folder, sub, f"Google, Gemma Scope transcoders; file by numpy {np.__version__}", JUMP,
        f"{TRACER} load_gemma_scope_transcoder, SingleLayerTranscoder.encode",
    )  # fmt: skip
    expect(folder, seed, Rule(arrays["W_enc"], arrays["b_enc"], th=arrays["threshold"]), model.encode)


def gemma_scope_2(name, sub, repo, d, F, seed, config=True, affine=False):
    w, folder = Draw(seed, d, F), fresh(name)
    state = {k.lower() if k[0] == "W" else k: torch.tensor(v) for k, v in gemma_arrays(w).items()}
    if affine:
        state["affine_skip_connection"] = w.randn(d, d)
    st_save(state, folder / sub / "params.safetensors")
    if config:
        text = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "hf_hook_point_in": "model.layers.5.output"}
        if affine:
            text |= {
                "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
                "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
                "affine_connection": True,
            }
        write_json(folder / sub / "config.json", text)
    encode = saelens(folder, lens.gemma_3_sae_huggingface_loader, repo, sub)
    note(
        folder, sub, "Google, Gemma Scope 2; files by safetensors", JUMP.replace("W_", "w_"),
        f"{LENS} gemma_3_sae_huggingface_loader, encode",
    )  # fmt: skip
    expect(folder, seed, Rule(state["w_enc"], state["b_enc"], th=state["threshold"]), encode)
    if affine:
        tracer = ct.load_gemma_scope_2_transcoder(str(folder / sub / "params.safetensors"), 5, dtype=torch.float64)
        got = load_file(folder / "expected.safetensors")
        torch.testing.assert_close(tracer.encode(got["x"].double()).detach(), got["z"])


# ---------------------------------------------------------------- sparsify


def sparsify(name, hook, d, F, seed, k=5, dtype=torch.float32, run_config=False, signed=False, **cfg):
    w, folder = Draw(seed, d, F), fresh(name)
    sizes = {"num_latents": F} if "expansion_factor" not in cfg else {}
    sae = Sae(d, SparseCoderConfig(k=k, **sizes, **cfg), dtype=dtype)
    w.fill(sae)
    path = folder / hook
    sae.save_to_disk(path)
    if run_config:
        write_json(folder / "config.json", {"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "EleutherAI/fineweb-edu-dedup-10b", "ctx_len": 2048})
    rule = Rule(
        sae.encoder.weight.T, sae.encoder.bias, cfg.get("activation", "topk"), k=k, centre=0.0 if cfg.get("transcode") else sae.b_dec
    )
    owner, reader = SPARSIFY, "Sae.load_from_disk(..).double().encode, top_acts scattered over F; saved by save_to_disk"
    encode = None
    if signed:
        text = json.loads((path / "cfg.json").read_text())
        text.pop("activation")
        (path / "cfg.json").write_text(json.dumps(text | {"signed": True}))
        rule.kind = "signed"
        owner, reader = f"{SPARSIFY}, cfg.json edited: eai-sparsify 0.0.1, 1.0.0 and 1.3.3 know no `signed`", "formula"
    else:
        model = Sae.load_from_disk(path).double()

        def encode(x):
            out = model.encode(x)
            return torch.zeros(len(x), model.num_latents, dtype=x.dtype).scatter(1, out.top_indices, out.top_acts)

    how = {"signed": "k largest by |h|, signs kept (no relu)", "groupmax": "the largest of each of k groups of relu(h)"}
    inner = "x" if cfg.get("transcode") else "(x - b_dec)"
    note(folder, hook, owner, f"h = {inner} @ encoder.weight.T + encoder.bias; {how.get(rule.kind, 'k largest of relu(h)')}", reader, k=k)
    expect(folder, seed, rule, encode)


# ---------------------------------------------------------------- dictionary_learning


class Buffer:
    """Stands where the library's ActivationBuffer stands: an iterator of activations with a config."""

    def __init__(self, seed, d):
        self.g = torch.Generator().manual_seed(seed)
        self.mean = torch.randn(d, generator=self.g) * 0.3
        self.config = {"d_submodule": d, "io": "out", "n_ctxs": 250, "ctx_len": 1024, "refresh_batch_size": 512, "out_batch_size": 4096, "device": "cpu"}

    def __iter__(self):
        while True:
            yield torch.randn(64, self.mean.numel(), generator=self.g) + self.mean


DL_RULES = {
    "AutoEncoder": "relu((x - bias) @ E.T + b), rows of E and b times the decoder norms (from_pretrained's normalize_decoder, unless all are 1 to 1e-5); expected_raw: without",
    "AutoEncoderNew": "relu(x @ E.T + b)",
    "GatedAutoEncoder": "e = (x - decoder_bias) @ E.T; relu(exp(r_mag)*e + mag_bias) where e + gate_bias > 0",
    "AutoEncoderTopK": "k largest of relu((x - b_dec) @ E.T + b)",
    "BatchTopKSAE": "h = relu((x - b_dec) @ E.T + b); z = h where h > threshold",
    "MatryoshkaBatchTopKSAE": "h = relu((x - b_dec) @ W_enc + b_enc); z = h where h > threshold",
    "JumpReluAutoEncoder": "h = x @ W_enc + b_enc; z = relu(h) where h > threshold",
}


def dl_rule(kind: str, s: dict, k: int, norms=1.0) -> Rule:
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        return Rule(s["W_enc"], s["b_enc"], th=s["threshold"], centre=0.0 if kind[0] == "J" else s["b_dec"])
    W = s["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        return Rule(W, 0.0, "gated", centre=s["decoder_bias"], gate=s["gate_bias"], r_mag=s["r_mag"], mag=s["mag_bias"])
    if kind == "AutoEncoder":
        return Rule(W, s["encoder.bias"], centre=s["bias"], gain=norms)
    if kind == "AutoEncoderNew":
        return Rule(W, s["encoder.bias"])
    if kind == "AutoEncoderTopK":
        return Rule(W, s["encoder.bias"], "topk", k=k, centre=s["b_dec"])
    return Rule(W, s["encoder.bias"], th=s["threshold"], centre=s["b_dec"])


@contextmanager
def doubles():
    """Modules are built in float64, so that loading casts the file's values exactly."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def learning(name, trainer, kind, d, F, seed, edit=None, normalize=False, why=None, k=6, owner=LEARNING, encode=True, **more):
    w, folder = Draw(seed, d, F), fresh(name)
    run = "resid_post_layer_15"

    def made(**config):
        made = trainer(**config)
        made.ae.cpu()
        w.fill(made.ae)
        return made

    topk = {"k": k} if "TopK" in kind else {"sparsity_warmup_steps": 1}
    config = {
        "trainer": made, "steps": 3, "activation_dim": d, "dict_size": F, "layer": 15, "lm_name": "meta-llama/Llama-3.1-8B-Instruct",
        "device": "cpu", "seed": 0, "warmup_steps": 0, "wandb_name": kind, "submodule_name": "resid_post_layer_15", **topk, **more,
    }  # fmt: skip
    torch.manual_seed(seed)
    buffer = Buffer(seed, d)
    with open(os.devnull, "w") as quiet, mock.patch("sys.stdout", quiet), mock.patch("sys.stderr", quiet):
        trainSAE(buffer, [config], 3, save_dir=str(folder / run), normalize_activations=normalize, device="cpu")
    path = folder / run / "trainer_0"
    if edit:
        edit(path)
    refuse = {"why": why} if why else {}
    reader = f"{kind}.from_pretrained with float64 modules, encode; trained for 3 steps and saved by trainSAE"
    note(folder, f"{run}/trainer_0", owner, DL_RULES[kind], reader if not why else "", **refuse)
    if why:
        return
    state = torch.load(path / "ae.pt", weights_only=True)
    norms = f64(state["decoder.weight"].double().norm(dim=0)) if kind == "AutoEncoder" else 1.0
    if np.allclose(norms, 1):  # the library leaves these alone
        norms = 1.0
    rule, extra = dl_rule(kind, state, k, norms), {}
    with doubles(), open(os.devnull, "w") as quiet, mock.patch("sys.stdout", quiet):
        if encode == "lenient":  # the class of today with the keys of yesterday
            ae = AutoEncoderTopK(d, F, json.loads((path / "config.json").read_text())["trainer"]["k"])
            ae.load_state_dict(state, strict=False)
        else:
            if kind == "JumpReluAutoEncoder":  # casts to float32 unless told otherwise
                ae = dl.JumpReluAutoEncoder.from_pretrained(path / "ae.pt", dtype=torch.float64)
            else:
                ae, _ = load_dictionary(str(path), None)
            for key, value in ae.state_dict().items():
                assert value.dtype in (torch.float64, torch.int32, torch.int64) or key == "threshold", (key, value.dtype)
        if kind == "AutoEncoder":
            raw = dl.AutoEncoder.from_pretrained(path / "ae.pt", normalize_decoder=False)
            extra = {"expected_raw": (dl_rule(kind, state, k), raw.encode)}
    expect(folder, seed, rule, ae.encode, extra, offset=buffer.mean)


def without(*keys):
    """Edits ae.pt to what an older version of the library wrote."""

    def edit(path: Path) -> None:
        state = torch.load(path / "ae.pt", weights_only=True)
        torch.save({k: v for k, v in state.items() if k not in keys}, path / "ae.pt")

    return edit


def backup(path: Path) -> None:
    """What newer versions leave in ae.pt while training."""
    state = torch.load(path / "ae.pt", weights_only=True)
    params = [torch.nn.Parameter(v.clone()) for v in state.values() if v.is_floating_point() and v.dim()]
    adam = torch.optim.Adam(params, lr=1e-4)
    sum(p.square().sum() for p in params[1:2]).backward()
    adam.step()
    config = json.loads((path / "config.json").read_text())["trainer"]
    torch.save({"step": 1000, "ae": state, "optimizer": adam.state_dict(), "config": config, "norm_factor": 3.25}, path / "ae.pt")


def new_class(path: Path) -> None:
    """The trainer writes "AutoEncoder" whatever its dict_class is."""
    text = json.loads((path / "config.json").read_text())
    assert text["trainer"]["dict_class"] == "AutoEncoder"
    text["trainer"]["dict_class"] = "AutoEncoderNew"
    (path / "config.json").write_text(json.dumps(text, indent=4))


def dictionary_learning() -> None:
    learning("dl_autoencoder", StandardTrainer, "AutoEncoder", 16, 40, 500)
    learning("dl_autoencoder_april", StandardTrainerAprilUpdate, "AutoEncoder", 16, 40, 512)
    learning("dl_autoencoder_new", StandardTrainerAprilUpdate, "AutoEncoderNew", 14, 44, 501, edit=new_class, dict_class=dl.AutoEncoderNew,
             owner=f"{LEARNING}; config.json edited: StandardTrainerAprilUpdate writes dict_class AutoEncoder for an AutoEncoderNew")  # fmt: skip
    learning("dl_gated", GatedSAETrainer, "GatedAutoEncoder", 16, 48, 502)
    learning("dl_topk", TopKTrainer, "AutoEncoderTopK", 16, 40, 503, threshold_start_step=0)
    learning("dl_batch_topk", BatchTopKTrainer, "BatchTopKSAE", 20, 48, 504, threshold_start_step=0)
    learning("dl_batch_topk_square", BatchTopKTrainer, "BatchTopKSAE", 24, 24, 505, threshold_start_step=0, k=4)
    learning("dl_batch_topk_normed", BatchTopKTrainer, "BatchTopKSAE", 16, 40, 506, threshold_start_step=0, normalize=True)
    learning("dl_matryoshka", MatryoshkaBatchTopKTrainer, "MatryoshkaBatchTopKSAE", 16, 48, 507, threshold_start_step=0,
             group_fractions=[0.25, 0.25, 0.5])  # fmt: skip
    learning("dl_jumprelu", JumpReluTrainer, "JumpReluAutoEncoder", 16, 40, 508)
    learning("dl_jumprelu_square", JumpReluTrainer, "JumpReluAutoEncoder", 20, 20, 509)
    learning("dl_topk_uncalibrated", TopKTrainer, "AutoEncoderTopK", 16, 40, 510)
    learning("dl_topk_old", TopKTrainer, "AutoEncoderTopK", 16, 40, 511, edit=without("threshold", "k"), encode="lenient",
             owner=f"{LEARNING}; k and threshold taken out of ae.pt, as before they were saved (k is in config.json)")  # fmt: skip

    negative = "threshold -1: never calibrated, so BatchTopK has no gate of its own"
    learning("dl_batch_topk_uncalibrated", BatchTopKTrainer, "BatchTopKSAE", 16, 40, 520, why=negative)
    learning("dl_matryoshka_uncalibrated", MatryoshkaBatchTopKTrainer, "MatryoshkaBatchTopKSAE", 16, 48, 521, why=negative,
             group_fractions=[0.5, 0.5])  # fmt: skip
    learning("dl_batch_topk_old", BatchTopKTrainer, "BatchTopKSAE", 16, 40, 522, edit=without("threshold", "k"), threshold_start_step=0,
             owner=f"{LEARNING}; k and threshold taken out of ae.pt", why="BatchTopK without a stored threshold")  # fmt: skip
    learning("dl_backup", BatchTopKTrainer, "BatchTopKSAE", 16, 40, 523, edit=backup, threshold_start_step=0,
             owner=f"{LEARNING}; ae.pt rewritten by torch as the backup dict of newer versions",
             why="a training backup {step, ae, optimizer, config, norm_factor}: its weights are not scaled back")  # fmt: skip


# ---------------------------------------------------------------- the rest


def openai(name, sub, d, F, seed, k):
    w, folder = Draw(seed, d, F), fresh(name)
    module = torch.nn.Module()
    module.pre_bias, module.latent_bias = torch.nn.Parameter(w.b_dec()), torch.nn.Parameter(w.b_enc())
    module.encoder, module.decoder = torch.nn.Linear(d, F, bias=False), torch.nn.Linear(F, d, bias=False)
    w.fill(module)
    module.register_buffer("stats_last_nonzero", torch.arange(F))
    module.register_buffer("latents_activation_frequency", w.rand(F))
    module.register_buffer("latents_mean_square", w.rand(F))
    state = module.state_dict()
    inner = torch.nn.ReLU().state_dict()
    if k:
        inner.update({"k": k, "postact_fn": "ReLU"})
    state["activation"], state["activation_state_dict"] = "TopK" if k else "ReLU", inner
    torch_save(state, folder / sub)
    owner = None
    if (OWNERS / "openai").exists():
        sys.path.insert(0, str(OWNERS / "openai"))
        from sparse_autoencoder.model import Autoencoder

        model = Autoencoder.from_state_dict(torch.load(folder / sub, weights_only=True)).double()
        owner = lambda x: model.encode(x)[0]  # noqa: E731
    rule = Rule(state["encoder.weight"].T, state["latent_bias"], "topk" if k else "jump", k=k, centre=state["pre_bias"], layer_norm=bool(k))
    note(
        folder, sub, "OpenAI GPT-2; file by torch, keys as Autoencoder.state_dict of openai/sparse_autoencoder",
        "h = (LN(x) - pre_bias) @ encoder.weight.T + latent_bias, LN with unbiased std and eps 1e-5 outside the root; z = relu of the k largest"
        if k else "z = relu((x - pre_bias) @ encoder.weight.T + latent_bias)",
        "formula, checked equal to openai/sparse_autoencoder 4965b941 Autoencoder.encode",
    )  # fmt: skip
    expect(folder, seed, rule, check=owner)


def qwen_scope(name, d, F, seed, k, dtype):
    w, folder = Draw(seed, d, F), fresh(name)
    repo, file = f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{k}", "layer3.sae.pt"
    state = {"W_enc": w.enc().T, "W_dec": w.dec().T, "b_enc": w.b_enc(), "b_dec": w.b_dec()}
    state = {key: v.contiguous().to(dtype) for key, v in state.items()}
    torch_save(state, folder / repo / file)
    encode = saelens(
        folder / repo, lens.qwen_scope_sae_huggingface_loader, f"Qwen/{repo}", file, d_in=d, d_sae=F, activation_fn_kwargs={"k": k}
    )
    note(
        folder, f"{repo}/{file}", f"Qwen-Scope; file by {HAND}. k is only in the repository's name; the width there (32K) is not this file's",
        "z = relu of the k largest of x @ W_enc.T + b_enc", f"{LENS} qwen_scope_sae_huggingface_loader, TopKSAE.encode", k=k, needs={"k": k},
    )  # fmt: skip
    expect(folder, seed, Rule(state["W_enc"].T, state["b_enc"], "topk", k=k), encode)


def qresearch(name, d, F, seed):
    w, folder = Draw(seed, d, F), fresh(name)
    file = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    module = torch.nn.Module()
    module.encoder, module.decoder = torch.nn.Linear(d, F), torch.nn.Linear(F, d)
    w.fill(module)
    state = module.bfloat16().state_dict()
    torch_save(state, folder / file)
    encode = saelens(folder, lens.deepseek_r1_sae_huggingface_loader, "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", file, d_in=d, d_sae=F)
    note(folder, file, f"qresearch; file by {HAND}, bf16", "z = relu(x @ encoder.weight.T + encoder.bias)",
         f"{LENS} deepseek_r1_sae_huggingface_loader, StandardSAE.encode")  # fmt: skip
    expect(folder, seed, Rule(state["encoder.weight"].T, state["encoder.bias"]), encode)


def ckkissane(name, d, F, seed):
    w, folder = Draw(seed, d, F), fresh(name)
    file = "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_ds49152_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9.pt"
    module = torch.nn.Module()
    for key, value in {"W_enc": w.enc(), "W_dec": w.dec(), "b_enc": w.b_enc(), "b_dec": w.b_dec()}.items():
        setattr(module, key, torch.nn.Parameter(value))
    state = module.state_dict()
    torch_save(state, folder / file)
    config = {
        "seed": 49, "batch_size": 4096, "lr": 0.0012, "l1_coeff": 1.0, "beta1": 0.9, "beta2": 0.99, "dict_mult": F // d, "seq_len": 128,
        "enc_dtype": "fp32", "model_name": "gpt2-small", "site": "z", "layer": 5, "device": "cuda:0", "act_name": "blocks.5.attn.hook_z",
        "act_size": d, "dict_size": F, "model_batch_size": 512, "concat_heads": True, "name": file[:-3],
    }  # fmt: skip
    write_json(folder / (file[:-3] + "_cfg.json"), config)
    loader = lens.connor_rob_hook_z_huggingface_loader
    encode = saelens(folder, loader, "ckkissane/attn-saes-gpt2-small-all-layers", file, reshape_activations="none")
    note(folder, file, f"ckkissane; files by {HAND}", "z = relu((x - b_dec) @ W_enc + b_enc), x = hook_z with the heads laid side by side",
         f"{LENS} connor_rob_hook_z_huggingface_loader, StandardSAE.encode on flat x")  # fmt: skip
    expect(folder, seed, Rule(state["W_enc"], state["b_enc"], centre=state["b_dec"]), encode)


def mwhanna(name, wandb_name, d, F, seed):
    w, folder = Draw(seed, d, F), fresh(name)
    state = {"W_enc": w.enc().T, "W_dec": w.dec(), "b_enc": w.b_enc(), "b_dec": w.b_dec()}
    st_save(state, folder / "layer_3.safetensors")
    config = {"model_name": "Qwen/Qwen3-0.6B", "model_kind": "transcoder_set", "scan": "mwhanna/qwen3-0.6b-transcoders-lowl0",
              "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / wandb_name).write_text(yaml.safe_dump({"d_model": {"value": d}, "d_feature": {"value": F}, "batch_size": {"value": 4096}}))
    model = ct.load_relu_transcoder(str(folder / "layer_3.safetensors"), 3, dtype=torch.float64, lazy_encoder=False, lazy_decoder=False)
    lens_encode = saelens(folder, lens.mwhanna_transcoder_huggingface_loader, "mwhanna/qwen3-0.6b-transcoders-lowl0", "layer_3.safetensors")
    note(folder, "layer_3.safetensors", f"mwhanna; files by {HAND}", "z = relu(x @ W_enc.T + b_enc)",
         f"{TRACER} load_relu_transcoder, SingleLayerTranscoder.encode (equal to {LENS})")  # fmt: skip
    expect(folder, seed, Rule(state["W_enc"].T, state["b_enc"]), model.encode)
    got = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(lens_encode(got["x"].double()), got["z"])


def main() -> None:
    for name in ("goodfire-r1", "openai", "openmoss"):
        if not (OWNERS / name).exists():
            print(f"FORMAT_OWNERS has no {name}: its values are the formula's, unchecked in this run")
    llama8, llama70 = "Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.3-70B-Instruct-SAE-l50"
    goodfire("goodfire_llama", f"{llama8}.pth", f"Goodfire/{llama8}", 16, 56, 100)
    goodfire("goodfire_llama_70b", f"{llama70}.pt", f"Goodfire/{llama70}", 12, 40, 101)
    goodfire("goodfire_square", f"{llama8}.pth", f"Goodfire/{llama8}", 20, 20, 102)
    goodfire_r1("goodfire_r1_math", "math", 12, torch.bfloat16, 8, 103)
    goodfire_r1("goodfire_r1_logic", "logic", 14, torch.float32, 6, 104)

    resid = ("blocks.15.hook_resid_post",) * 2
    llama_scope("llama_scope", "Llama3_1-8B-Base-L15R-8x", 16, 3, 200, 2.5, (10.8125, 10.8125), resid, "fnlp/Llama3_1-8B-Base-LXR-8x")
    transcoder = ("blocks.19.ln2.hook_normalized", "blocks.19.hook_mlp_out")
    llama_scope("llama_scope_tc", "Llama3_1-8B-Base-L19TC-8x", 12, 4, 201, 0.75, (4.5, 6.09375), transcoder, "fnlp/Llama3_1-8B-Base-LXTC-8x")
    r1_distill("llama_scope_r1_distill", False, 16, 3, 210)
    r1_distill("llama_scope_r1_distill_norm", True, 12, 4, 211)

    openmoss("openmoss_relu", 16, 3, 220, "relu", hooks=transcoder)
    openmoss("openmoss_jumprelu", 16, 3, 221, "jumprelu")
    openmoss("openmoss_jumprelu_plain", 12, 4, 222, "jumprelu", gain=False)
    openmoss("openmoss_jumprelu_inference", 16, 3, 223, "jumprelu", norm="inference")
    openmoss("openmoss_jumprelu_square", 20, 1, 224, "jumprelu")
    openmoss("openmoss_topk", 16, 3, 225, "topk")
    openmoss("openmoss_topk_token", 12, 4, 226, "topk", norm="token-wise", gain=False)
    openmoss("openmoss_batchtopk", 16, 3, 227, "batchtopk")
    openmoss("openmoss_glu", 12, 4, 228, "jumprelu", glu=True)
    openmoss("openmoss_glu_relu", 20, 1, 232, "relu", norm="token-wise", gain=False, glu=True)
    openmoss("openmoss_glu_topk", 12, 4, 233, "topk", glu=True)
    openmoss("openmoss_glu_batchtopk", 12, 4, 234, "batchtopk", glu=True)
    openmoss("openmoss_pt", 16, 3, 229, "jumprelu", suffix="pt")
    openmoss("openmoss_batch_norm", 16, 3, 230, "relu", norm="batch-wise", why="the input scale depends on the batch")
    openmoss("openmoss_no_norm", 16, 3, 231, "relu", average=None, why="dataset-wise, but the stored average norm is not a number (the owner wrote uninitialised memory)")

    res = "google/gemma-scope-2b-pt-res"
    gemma_scope("gemma_scope", "layer_12/width_16k/average_l0_82", res, 16, 48, 300)
    gemma_scope("gemma_scope_deflated", "layer_20/width_65k/canonical", res, 16, 48, 301, deflate=True)
    gemma_scope("gemma_scope_zip64", "layer_5/width_1m/average_l0_58", "google/gemma-scope-9b-pt-mlp", 12, 40, 302, zip64=True)
    gemma_scope("gemma_scope_fortran", "layer_7/width_16k/average_l0_69", "google/gemma-scope-2b-pt-att", 16, 40, 303, fortran=True)
    gemma_scope("gemma_scope_square", "layer_12/width_16k/average_l0_22", res, 20, 20, 304)
    gemma_scope("gemma_scope_embedding", "embedding/width_4k/average_l0_6", res, 16, 48, 305)
    gemma_transcoder("gemma_scope_transcoder", 16, 48, 306)
    two = "google/gemma-scope-2-270m-pt"
    gemma_scope_2("gemma_scope_2", "resid_post/layer_5_width_16k_l0_medium", two, 16, 48, 310)
    gemma_scope_2("gemma_scope_2_no_config", "resid_post_all/layer_5_width_16k_l0_small", two, 14, 40, 311, config=False)
    gemma_scope_2("gemma_scope_2_affine", "transcoder_all/layer_5_width_16k_l0_small_affine", two, 16, 40, 312, affine=True)

    sparsify("sparsify_topk", "layers.12", 16, 48, 400)
    sparsify("sparsify_expansion", "layers.3.mlp", 16, 48, 401, run_config=True, expansion_factor=3)
    sparsify("sparsify_groupmax", "layers.5", 16, 48, 402, k=6, activation="groupmax")
    sparsify("sparsify_transcode", "layers.7.mlp", 16, 40, 403, transcode=True, skip_connection=True)
    sparsify("sparsify_bf16", "layers.23", 16, 56, 404, dtype=torch.bfloat16)
    sparsify("sparsify_signed", "layers.9", 16, 48, 405, signed=True)
    sparsify("sparsify_square", "embed_tokens", 20, 20, 406)

    dictionary_learning()

    openai("openai_relu", "gpt2-small/resid_delta_mlp_v4/autoencoders/6.pt", 16, 48, 600, 0)
    openai("openai_topk", "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt", 16, 48, 601, 7)
    qwen_scope("qwen_scope", 16, 48, 610, 6, torch.float32)
    qwen_scope("qwen_scope_bf16", 12, 40, 611, 5, torch.bfloat16)
    qresearch("qresearch", 16, 48, 620)
    ckkissane("ckkissane", 16, 48, 630)
    mwhanna("mwhanna", "wandb-config.yaml", 16, 48, 640)
    mwhanna("mwhanna_typo", "wanb-config.yaml", 12, 40, 641)

    for folder in sorted(HERE.iterdir()):
        if (folder / "expected.safetensors").exists():
            z = load_file(folder / "expected.safetensors")["z"]
            print(f"{folder.name:28} z {tuple(z.shape)}  on {(z != 0).float().mean():.2f}")
        else:
            print(f"{folder.name:28} {json.loads((folder / 'note.json').read_text())['must']}")

    make_pickle_fixtures.main()


if __name__ == "__main__":
    main()
