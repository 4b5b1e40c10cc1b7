"""Every status that Python can reach, with the right exception and the argument's name."""

from __future__ import annotations

import ctypes
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Case

import blockem
from blockem import _ffi
from blockem._library import check, library


@pytest.fixture
def case() -> Case:
    return Case("standard", "native", 8, 3)


@contextmanager
def raises(name: str, status: int, text: str, kind: type = ValueError) -> Iterator[None]:
    """Expects an Error of that name; its message must match text."""
    with pytest.raises(blockem.Error, match=text) as info:
        yield
    assert (info.value.name, info.value.status) == (name, status)
    assert isinstance(info.value, kind)


def test_invalid_argument(case: Case) -> None:
    bad = lambda text: raises("INVALID_ARGUMENT", 100, text)
    with bad("activation is 'topk'.*'dense_relu'"):
        blockem.Plan(case.sae, case.latents, activation="topk")
    with bad("backend"):
        case.plan(backend="gpu")
    with bad("device"):
        case.plan(device="tpu")
    with bad("device is 'cuda:x'"):
        case.plan(device="cuda:x")
    with bad("num_threads"):
        case.plan(num_threads=-1)
    with bad("num_threads"):
        case.plan(num_threads=2**32)
    with bad("at least one latent"):
        blockem.Latents([], [])
    with bad("sign"):
        blockem.Latents([1], [2])
    with bad("signs has numbers"):
        blockem.Latents([1], [257])
    with bad("weight"):
        blockem.Latents([1], [1], [np.nan])
    with bad("NUL"):
        blockem.load_sae("a\0b")
    with bad("input_scale"):
        blockem.load_sae("nowhere", input_scale=-1.0)
    with bad("square|layout"):
        blockem.Sae.from_tensors(encoder_weight=np.eye(4), encoder_bias=np.zeros(4))
    with bad("architecture"):
        blockem.Sae.from_tensors(encoder_weight=np.ones((4, 2)), architecture="transcoder")


def test_shape(case: Case) -> None:
    plan, hidden = case.plan(), case.hidden(4)
    bad = lambda text: raises("SHAPE", 103, text)
    reference = np.zeros((4, 3), np.float32)
    with bad(r"hidden has the shape \[4, 7\]; expected \[\.\.\., 8\]"):
        plan.encode(hidden[:, :7])
    with bad(r"hidden has the shape \[\]"):
        plan.encode(np.zeros((), np.float32))
    with bad(r"reference has the shape \[3, 3\]; expected \[4, 3\]"):
        plan.penalty(hidden, reference[:3])
    with bad(r"mask has the shape \[4, 1\]; expected \[4\]"):
        plan.penalty(hidden, reference, np.ones((4, 1), bool))
    with bad("grad has the shape"):
        plan.penalty(hidden, reference, grad=np.zeros((4, 9), np.float32))
    with bad("signs has the shape"):
        blockem.Latents([1, 2], [1])
    with bad("encoder_weight"):
        blockem.Sae.from_tensors(encoder_weight=np.ones(3), encoder_bias=np.ones(3))
    with bad("encoder_bias|b_enc"):
        blockem.Sae.from_tensors(
            encoder_weight=np.ones((3, 2)), encoder_bias=np.ones(5), encoder_layout="f_d"
        )


def test_dtype(case: Case) -> None:
    plan, hidden = case.plan(), case.hidden(4)
    bad = lambda text: raises("DTYPE", 104, text)
    reference = np.zeros((4, 3), np.float32)
    with bad("hidden is float64"):
        plan.encode(hidden.astype(np.float64))
    with bad("hidden is int64"):
        plan.encode(hidden.astype(np.int64))
    with bad("hidden is complex64; expected one of float32"):
        plan.encode(hidden.astype(np.complex64))
    with bad("hidden is >f4"):
        plan.encode(hidden.astype(">f4"))
    with bad("reference is float16"):
        plan.penalty(hidden, reference.astype(np.float16))
    with bad("mask is int64"):
        plan.penalty(hidden, reference, np.ones(4, np.int64))
    with bad("grad_hidden is float16"):
        plan.penalty(hidden, reference, grad=np.zeros((4, 8), np.float16))
    with bad("encoder"):
        blockem.Sae.from_tensors(
            encoder_weight=np.ones((3, 2), np.int64), encoder_bias=np.ones(3, np.float32)
        )


def test_layout(case: Case) -> None:
    plan, hidden = case.plan(), case.hidden(4)
    bad = lambda text: raises("LAYOUT", 105, text)
    odd = np.frombuffer(b"\0" + hidden.tobytes(), np.uint8)[1:].view(np.float32).reshape(4, 8)
    with bad("hidden is not aligned"):
        plan.encode(odd)
    reference = np.zeros((4, 3), np.float32)
    with bad("grad is written in place"):
        plan.penalty(hidden, reference, grad=np.zeros((4, 16), np.float32)[:, ::2])
    with bad("overlap"):
        once = np.lib.stride_tricks.as_strided(np.zeros(8, np.float32), (4, 8), (0, 4))
        plan.penalty(hidden, reference, grad=once)


def test_device_mismatch(case: Case) -> None:
    with raises("DEVICE_MISMATCH", 106, "hidden is on meta; expected cpu"):
        case.plan().encode(torch.zeros(4, 8, device="meta"))


def test_latents(case: Case, tmp_path: Path) -> None:
    with raises("LATENT_RANGE", 108, "latent 99"):
        blockem.Plan(case.sae, blockem.Latents([99], [1]))
    with raises("LATENT_RANGE", 108, "negative"):
        blockem.Latents([-1], [1])
    with raises("LATENT_DUPLICATE", 110, "latent 5"):
        blockem.Latents([5, 5], [1, 1])
    with raises("LATENT_DUPLICATE", 110, "both"):
        blockem.Latents([5, 5], [1, -1])
    with pytest.raises(TypeError, match="whole numbers"):
        blockem.Latents([1.5], [1])


def test_unsupported() -> None:
    sae = blockem.Sae.from_tensors(
        encoder_weight=np.ones((6, 4)),
        encoder_bias=np.zeros(6),
        architecture="topk",
        k=2,
        selection="batch",
    )
    assert sae.k == 2
    latents = blockem.Latents([1], [1])
    with raises("UNSUPPORTED", 109, "dense_relu"):
        blockem.Plan(sae, latents)
    assert blockem.Plan(sae, latents, activation="dense_relu").activation == "dense_relu"


def test_overlap(case: Case) -> None:
    hidden = case.hidden(4)
    with raises("OVERLAP", 111, "grad_hidden shares memory with hidden"):
        case.plan().penalty(hidden, np.zeros((4, 3), np.float32), grad=hidden)


def test_io(case: Case, tmp_path: Path) -> None:
    with raises("IO", 200, "nowhere", OSError):
        blockem.load_sae(tmp_path / "nowhere")
    with raises("IO", 200, "nowhere.json", OSError):
        blockem.load_latents(tmp_path / "nowhere.json", case.sae)
    with raises("IO", 200, "no-folder", OSError):
        case.latents.save(tmp_path / "no-folder" / "K0.json")


def test_format(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "K0.json"
    for text in ("{", "[]", '{"K_pos": [1]}', '{"K_pos": ["a"], "K_neg": []}'):
        path.write_text(text)
        with raises("FORMAT", 201, "K0.json"):
            blockem.load_latents(path, case.sae)


def test_tensor_missing(sae_folder: Path) -> None:
    with raises("TENSOR_MISSING", 202, "gate_bias|b_gate"):
        blockem.Sae.from_tensors(
            architecture="gated",
            encoder_weight=np.ones((6, 4)),
            magnitude_bias=np.zeros(6),
            magnitude_log_scale=np.zeros(6),
        )
    rewrite(sae_folder, drop="threshold")
    with raises("TENSOR_MISSING", 202, "threshold"):
        blockem.load_sae(sae_folder)


def rewrite(folder: Path, drop: str) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / "sae_weights.safetensors"
    tensors = {name: x.copy() for name, x in load_file(path).items() if name != drop}
    save_file(tensors, path)


def test_recipe_incomplete(sae_folder: Path) -> None:
    bare = sae_folder.parent / "bare.safetensors"
    (sae_folder / "sae_weights.safetensors").rename(bare)
    with raises("RECIPE_INCOMPLETE", 203, "bare.safetensors"):
        blockem.load_sae(bare)
    config = json.loads((sae_folder / "cfg.json").read_text())
    sae = blockem.load_sae(bare, recipe=config)
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.layer) == ("jumprelu", 8, 32, 2)
    config["normalize_activations"] = "expected_average_only_in"
    with raises("RECIPE_INCOMPLETE", 203, "scale"):
        blockem.load_sae(bare, recipe=config)
    scaled = blockem.load_sae(bare, recipe=config, input_scale=0.5)
    assert scaled.describe()["scale"] == 0.5


def test_unsafe_pickle(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "sae.pt")
    with raises("UNSAFE_PICKLE", 204, "torch.nn.modules.linear.Linear"):
        blockem.load_sae(tmp_path / "sae.pt")


def test_a_state_dict_is_read_as_data(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    state = {"encoder_linear.weight": weight, "encoder_linear.bias": torch.zeros(6)}
    torch.save(state, tmp_path / "tiny-l3.pth")
    sae = blockem.load_sae(tmp_path / "tiny-l3.pth")
    assert (sae.d_in, sae.d_sae, sae.layer, sae.describe()["format"]) == (4, 6, 3, "goodfire")
    hidden = torch.randn(5, 4)
    plan = blockem.Plan(sae, blockem.Latents([5, 1], [1, -1]))
    torch.testing.assert_close(plan.encode(hidden), torch.relu(hidden @ weight.T)[:, [5, 1]])


def test_non_finite() -> None:
    weight = np.ones((6, 4), np.float32)
    weight[2, 1] = np.inf
    with raises("NON_FINITE", 205, "encoder"):
        blockem.Sae.from_tensors(encoder_weight=weight, encoder_bias=np.zeros(6))


def test_provenance_mismatch(case: Case, tmp_path: Path) -> None:
    path, latents = tmp_path / "K0.json", blockem.Latents([4, 1, 2], [1, 1, -1], [1, 0.5, 2])
    latents.save(path, plan=blockem.Plan(case.sae, latents))
    again = blockem.load_latents(path, case.sae)
    np.testing.assert_array_equal(again.ids, [4, 1, 2])
    np.testing.assert_array_equal(again.signs, [1, 1, -1])
    np.testing.assert_array_equal(again.weights, np.float32([1, 0.5, 2]))
    blockem.Plan(case.sae, again)
    other = Case("standard", "native", 8, 3, seed=1)
    with raises("PROVENANCE_MISMATCH", 208, "identity"):
        blockem.Plan(other.sae, blockem.load_latents(path, other.sae))
    with raises("PROVENANCE_MISMATCH", 208, "activation"):
        blockem.Plan(case.sae, again, activation="preactivation")
    with raises("PROVENANCE_MISMATCH", 208, "d = 8"):
        blockem.load_latents(path, Case("standard", "native", 9, 3).sae)


def test_a_saved_set_with_mixed_signs_belongs_to_its_plan(case: Case, tmp_path: Path) -> None:
    latents = blockem.Latents([4, 1, 2], [-1, 1, -1])
    latents.save(tmp_path / "K0.json", plan=blockem.Plan(case.sae, latents))
    blockem.Plan(case.sae, blockem.load_latents(tmp_path / "K0.json", case.sae))


def test_cuda_unavailable(case: Case) -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with CUDA")
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with raises("CUDA_UNAVAILABLE", 300, "CUDA", blockem.Error):
            case.plan(device=device)


def test_null_pointer_struct_size_and_workspace(case: Case) -> None:
    """Mistakes that the package cannot make, through its own declarations."""
    with raises("NULL_POINTER", 101, "plan is NULL"):
        check(library.blockem_encode(None, ctypes.byref(_ffi.EncodeArgs()), None))
    args = _ffi.EncodeArgs()
    args.struct_size = 3
    with raises("STRUCT_SIZE", 102, "struct_size 3"):
        check(library.blockem_encode(case.plan()._handle.pointer, ctypes.byref(args), None))
    plan, hidden = case.plan(num_threads=2), case.hidden(5000)
    inputs = plan._inputs(hidden, np.zeros((5000, 3), np.float32), None)
    args = inputs.args()
    if args.workspace_size:
        args.workspace_size -= 1
        with raises("WORKSPACE_TOO_SMALL", 107, "workspace"):
            run = library.blockem_penalty_forward
            check(run(plan._handle.pointer, ctypes.byref(args), None))


def test_wrong_python_types(case: Case) -> None:
    plan, hidden = case.plan(), case.hidden(4)
    reference = np.zeros((4, 3), np.float32)
    for call in [
        lambda: plan.encode([[1.0] * 8]),
        lambda: plan.penalty(hidden, reference.tolist()),
        lambda: blockem.Plan(case.latents, case.sae),
        lambda: blockem.load_latents("K0.json", plan),
        lambda: case.latents.save("K0.json", plan=case.sae),
        lambda: pickle.dumps(plan),
    ]:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="accumulate"):
        plan.penalty(hidden, reference, accumulate=True)
    grad = np.zeros((4, 8), np.float32)
    grad.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        plan.penalty(hidden, reference, grad=grad)


def test_errors_travel_between_processes(case: Case) -> None:
    with pytest.raises(blockem.Error) as info:
        case.plan().encode(np.zeros((2, 3), np.float32))
    copy = pickle.loads(pickle.dumps(info.value))
    assert (type(copy), copy.status, str(copy)) == (
        blockem.ArgumentError, 103, str(info.value)
    )


def test_messages_belong_to_their_thread(case: Case) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def fail_with(i: int) -> bool:
        try:
            blockem.Latents([i, i], [1, 1])
        except blockem.Error as error:
            return f"latent {i} " in str(error)
        return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fail_with, range(500)))


def test_import_needs_no_torch_and_reads_no_environment() -> None:
    code = "import sys, blockem; assert 'torch' not in sys.modules; print(blockem.__version__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == blockem.__version__
