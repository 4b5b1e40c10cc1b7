"""Builds libblockem with cargo and puts it into the package.

The wheel serves every Python of its platform (py3-none-<platform>): the package speaks to the
library through ctypes. An editable install leaves the library in the checkout's target/release.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def cargo_version() -> str:
    manifest = ROOT / "Cargo.toml"
    text = manifest.read_text() if manifest.is_file() else ""
    if not re.search(r'^name = "blockem"$', text, re.M):
        raise SetupError(
            f"{ROOT} is not libblockem's repository: install from a checkout "
            "(pip install ./bindings/python) or from a wheel"
        )
    return re.search(r'^version = "(.+)"$', text, re.M)[1]


def cargo_build(*options: str) -> Path:
    """Builds the shared library and returns its path, wherever cargo's settings put it."""
    command = ["cargo", "build", "--release", "--lib", "--no-default-features",
               "--features=tokenizers", "--message-format=json-render-diagnostics", *options]
    if shutil.which("cargo") is None:
        raise SetupError("cargo is not on PATH: libblockem is in Rust; see https://rustup.rs")
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SetupError(f"`{' '.join(command)}` failed in {ROOT}: its messages are above")
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if message["reason"] == "compiler-artifact" and "cdylib" in message["target"]["kind"]:
            for name in message["filenames"]:
                if name.endswith((".so", ".dylib", ".dll")):
                    return Path(name)
    raise SetupError("cargo built no shared library")


class BuildPy(build_py):
    def run(self) -> None:
        if self.editable_mode:
            # The package looks there, whatever CARGO_TARGET_DIR says.
            cargo_build("--target-dir", str(ROOT / "target"))
            return super().run()
        super().run()
        folder = Path(self.build_lib, "blockem")
        shutil.copy2(cargo_build(), folder)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        names = {"darwin": "libblockem.dylib", "win32": "blockem.dll"}
        library = Path(self.build_lib, "blockem", names.get(sys.platform, "libblockem.so"))
        return outputs if self.editable_mode else [*outputs, str(library)]


class BdistWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    version=cargo_version(),
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    distclass=PlatformDistribution,
)
