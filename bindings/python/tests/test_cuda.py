"""CUDA plans without a device: on the stub driver of tests/stub_cuda, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import blockem

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("cuda_on_stub.py")


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a libcuda.so.1 that records launches."""
    if sys.platform != "linux":
        pytest.skip("the stub driver is for Linux")
    compiler = os.environ.get("CC") or shutil.which("cc")
    assert compiler, "no C compiler: the stub driver cannot be built"
    assert blockem.build_info()["has_cuda"], (
        "this build has no CUDA kernels: pip install -r requirements.txt into .venv, touch "
        "build.rs, and build again"
    )
    library = tmp_path_factory.mktemp("stub") / "libcuda.so.1"
    source = ROOT / "tests/stub_cuda/stub.c"
    flags = ["-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-lpthread"]
    subprocess.run([compiler, *flags, "-o", library, source], check=True)
    return library.parent


def run(stub: Path, case: str, **settings: str) -> None:
    env = {**os.environ, "LD_LIBRARY_PATH": str(stub), **settings}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), case], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("capability", ["80", "90"])
def test_plans_and_calls(stub: Path, capability: str) -> None:
    run(stub, "calls", STUB_CUDA_CAPABILITY=capability)


@pytest.mark.parametrize(
    ("name", "status", "settings"),
    [
        ("CUDA_UNAVAILABLE", 300, {"STUB_CUDA_DEVICES": "0"}),
        ("CUDA_DRIVER", 301, {"STUB_CUDA_FAIL": "cuCtxPushCurrent=201"}),
        ("NO_KERNEL_IMAGE", 302, {"STUB_CUDA_FAIL": "cuModuleLoadData=209"}),
        ("DRIVER_TOO_OLD", 303, {"STUB_CUDA_VERSION": "11080"}),
        ("OUT_OF_MEMORY", 304, {"STUB_CUDA_FAIL": "cuMemAlloc=2"}),
        ("CAPTURE_UNSAFE", 305, {"STUB_CUDA_FAIL": "cuMemAlloc=900"}),
        ("FORKED", 306, {"STUB_CUDA_INIT": "3"}),
    ],
)
def test_statuses(stub: Path, name: str, status: int, settings: dict[str, str]) -> None:
    run(stub, f"{name}={status}", **settings)
