"""The wheel: its tag, size and contents; what it imports and loads; that every Python runs it.

It is built once, as `make wheel` builds it, and installed into new virtual environments with
nothing but numpy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bindings" / "python" / "blockem"
SAE = ROOT / "tests" / "data" / "sae" / "standard"
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="manylinux tags are Linux's")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(ROOT / "packaging" / "wheel.sh", folder, env={"PYTHON": sys.executable})
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(*command: object, env: dict[str, str] | None = None, **options: object) -> str:
    """Standard output; a failure shows all that was printed."""
    done = subprocess.run(
        [str(part) for part in command], env={**os.environ, **(env or {})}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- The file ----------------------------------------------------------------------------------


def test_one_wheel_for_every_python(wheel: Path, unpacked: Path) -> None:
    found = re.fullmatch(rf"blockem-{re.escape(VERSION)}-py3-none-(\S+)\.whl", wheel.name)
    assert found, wheel.name
    tags = found[1].split(".")
    assert all(re.fullmatch(r"manylinux(_2_\d+|\d+)_x86_64", tag) for tag in tags), tags
    record = (unpacked / f"blockem-{VERSION}.dist-info" / "WHEEL").read_text()
    assert sorted(re.findall(r"^Tag: (.+)$", record, re.M)) == sorted(
        f"py3-none-{tag}" for tag in tags
    )
    assert "Root-Is-Purelib: false" in record


def test_the_tag_is_the_glibc_that_is_needed(wheel: Path, unpacked: Path) -> None:
    needed = {}
    for library in unpacked.rglob("*.so*"):
        versions = re.findall(r"GLIBC_2\.(\d+)", run("objdump", "-T", library))
        needed[library.name] = max(map(int, versions))
    promised = max(int(n) for n in re.findall(r"manylinux_2_(\d+)_", wheel.name))
    print(f"{wheel.name}, {wheel.stat().st_size} bytes; glibc 2.{needed}")
    assert promised == max(needed.values())


def test_size(wheel: Path) -> None:
    assert wheel.stat().st_size < 10_000_000


def test_contents(unpacked: Path) -> None:
    files = (path for path in unpacked.rglob("*") if path.is_file())
    names = {path.relative_to(unpacked).as_posix() for path in files}
    sources = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*") if path.suffix in {".py", ".pyi", ".typed"}
    }
    assert len(sources) > 10 and sources <= names
    assert "blockem/libblockem.so" in names
    ours = rf"blockem-{re.escape(VERSION)}\.dist-info/.+|blockem/\w+\.so"
    foreign = {name for name in names - sources if not re.fullmatch(ours, name)}
    assert not foreign, "neither sources nor our libraries"


def test_only_system_libraries_are_needed(unpacked: Path) -> None:
    # The C++ runtime is for XLA's handlers; manylinux counts it to the system.
    system = r"(libc|libm|libgcc_s|libstdc\+\+|libdl|libpthread|librt|ld-linux-x86-64)\.so\.\d+"
    for library in unpacked.rglob("*.so*"):
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library))
        foreign = [name for name in needed if not re.fullmatch(system, name)]
        assert needed and not foreign, f"{library.name} needs {foreign}"


# ---- What an import does -----------------------------------------------------------------------


def test_an_import_imports_no_framework(unpacked: Path) -> None:
    """In an environment that has them."""
    program = """
import sys, blockem
assert blockem.__file__.startswith(sys.argv[1]), blockem.__file__
print(*sorted({name.partition(".")[0] for name in sys.modules}))
import blockem.torch
assert "torch" in sys.modules
"""
    names = run(sys.executable, "-c", program, unpacked, env={"PYTHONPATH": str(unpacked)}).split()
    assert "numpy" in names
    assert not {"torch", "jax", "jaxlib", "transformers", "safetensors"} & set(names)


def test_an_import_opens_no_driver(unpacked: Path, tmp_path: Path) -> None:
    """The loader tells for which libraries it looked, found or not."""
    assert not cuda_libraries("import blockem", unpacked, tmp_path / "import")
    # It does when a device is named, so that this test could fail.
    program = """
import blockem
sae = blockem.load_sae({!r})
try:
    blockem.Plan(sae, blockem.Latents([0], [1]), device="cuda:0")
except blockem.Error:
    pass
""".format(str(SAE))
    assert "libcuda.so.1" in cuda_libraries(program, unpacked, tmp_path / "device")


def cuda_libraries(program: str, unpacked: Path, log: Path) -> set[str]:
    """Of NVIDIA, those for which the loader looked while a program ran."""
    env = {"PYTHONPATH": str(unpacked), "LD_DEBUG": "libs", "LD_DEBUG_OUTPUT": str(log)}
    run(sys.executable, "-c", program, env=env)
    text = "".join(path.read_text() for path in log.parent.glob(f"{log.name}.*"))
    names = set(re.findall(r"find library=(\S+)", text))
    assert any(name.startswith("libgcc_s") for name in names), "the loader told nothing"
    return {name for name in names if re.match(r"lib(cuda|cublas|nvidia|nvrtc)", name)}


# ---- Other Pythons -----------------------------------------------------------------------------


def pythons() -> dict[str, str]:
    """This one, and the newest other one of this machine, by version."""
    names = [f"python3.{minor}" for minor in range(10, 20)]
    found = [path for name in names if (path := shutil.which(name))]
    found += map(str, Path.home().glob(".pyenv/versions/*/bin/python"))
    program = "import sys, venv, ensurepip; print(*sys.version_info[:2], sys.executable)"
    others = {}
    for path in found:
        done = subprocess.run([path, "-c", program], capture_output=True, text=True)
        # A name without a Python behind it, or one without the module venv.
        if done.returncode == 0:
            major, minor, executable = done.stdout.split(maxsplit=2)
            others[int(major), int(minor)] = executable.strip()
    this = sys.version_info[:2]
    newest = max((v for v in others if v >= (3, 10) and v != this), default=this)
    return {
        ".".join(map(str, version)): others.get(version, sys.executable)
        for version in dict.fromkeys([this, newest])
    }


PROGRAM = """
import sys
import numpy as np
import blockem

assert blockem.__file__.startswith(sys.argv[1]), blockem.__file__
assert not {"torch", "jax"} & set(sys.modules)
sae = blockem.load_sae(sys.argv[2])
plan = blockem.Plan(sae, blockem.Latents([0, 3, 5], [1, -1, 1]), activation="preactivation")
base = np.random.RandomState(0).standard_normal((9, sae.d_in)).astype(np.float32)
reference = plan.encode(base)
same = plan.penalty(base, reference)
moved = plan.penalty(np.roll(base, 1, axis=0), reference)
assert (same.loss_sum, same.token_count) == (0.0, 9.0) and not same.grad_hidden.any()
assert moved.loss_sum > 0 and moved.grad_hidden.any()
try:
    import torch
except ImportError:
    print(sys.version.split()[0], np.__version__, moved.loss_sum)
else:
    raise SystemExit("this environment has torch")
"""


@pytest.mark.parametrize("version", pythons())
def test_a_new_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    run(pythons()[version], "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel)
    text = run(python, "-I", "-c", PROGRAM, tmp_path / "venv", SAE, cwd=tmp_path)
    assert text.startswith(f"{version}.")
    print(text.strip())
