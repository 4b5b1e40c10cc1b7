"""Runs a command once for each instruction set of this machine's processor that the CPU backend knows.

    python tests/isa.py [--others] [--library FILE] COMMAND ...

--others leaves out the newest, which a command uses by itself. The library has the cargo feature test-isa
(`make target/isa/...`; FILE is another than that of the Rust tests): BLOCKEM_TEST_ISA tells it which set to
use, in every process that the command starts. Python gets the package with that library by PYTHONPATH, and
torch the same set by the variables of ATen, oneDNN and MKL. Every set runs, whatever becomes of the others; the exit status is
1 if one failed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "target" / "isa" / "debug" / "deps" / "libblockem.so"
# As blockem_build_info.cpu_isa names them, from the oldest on, with what torch's libraries call the like.
TORCH = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
SETS = {
    "portable": ("default", "SSE41", "SSE4_2"),
    "neon": ("default", "DEFAULT", "DEFAULT"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512-bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--others", action="store_true")
    parser.add_argument("--library", type=Path, default=LIBRARY)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    found = available(args.library)
    missing = [name for name in SETS if name not in found]
    print(f"instruction sets of this machine: {', '.join(found)}; not seen: {', '.join(missing)}", flush=True)
    package(args.library, ROOT / "target" / "isa" / "python")
    results = {}
    for isa in found[: -1 if args.others else None]:
        print(f"== {isa}: {' '.join(args.command)}", flush=True)
        start = time.monotonic()
        done = subprocess.run(args.command, env=os.environ | environment(isa, ROOT / "target" / "isa" / "python"))
        results[isa] = done.returncode
        print(f"== {isa}: exit status {done.returncode} after {time.monotonic() - start:.0f} s", flush=True)
    failed = [isa for isa, status in results.items() if status]
    print(f"instruction sets: {len(results) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
    return 1 if failed else 0


def available(library: Path) -> list[str]:
    """The sets that this machine has, the newest last."""
    use = ctypes.CDLL(str(library)).blockem_test_use_isa
    return [name for name in SETS if use(name.encode())]


def package(library: Path, folder: Path) -> None:
    """The Python package as it is installed, beside this library."""
    shutil.rmtree(folder, ignore_errors=True)
    source = ROOT / "bindings" / "python" / "blockem"
    shutil.copytree(source, folder / "blockem", ignore=shutil.ignore_patterns("__pycache__", "libblockem.*"))
    shutil.copy(library, folder / "blockem" / "libblockem.so")


def environment(isa: str, packages: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    return {"BLOCKEM_TEST_ISA": isa, "PYTHONPATH": path} | dict(zip(TORCH, SETS[isa], strict=True))


if __name__ == "__main__":
    sys.exit(main())
