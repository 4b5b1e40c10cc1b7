"""The machine code of the CPU's hot loops: compiled for their instruction set, without calls.

A function that the compiler leaves out of line inside ``Lanes::enter`` has the baseline's instructions, and
every intrinsic in it is a call: the numbers are right, and take many times as long. So the loaded library is
disassembled, and whatever its hot functions refer to must be on a short list.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

import blockem

pytestmark = [
    pytest.mark.skipif(
        platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads ELF files of x86-64"
    ),
    pytest.mark.skipif("BLOCKEM_TEST_ISA" in os.environ, reason="tests/isa.py's library is optimised less"),
]

# `Lanes::enter` of each set ends in a function of that set's instructions, into which the work is inlined.
HOT = re.compile(r"lanes::x86::(Avx2|Avx512) as .*::(enter(?:_bf16)?)::root$")
SETS = {("Avx2", "enter"), ("Avx512", "enter"), ("Avx512", "enter_bf16")}
# Panics, the ends of rows, tables of jumps, and the list of a top-k, which is selected once in a while.
ALLOWED = re.compile(
    r"^core::(panicking|slice::index|option)::|^(memcpy|memmove|memset)$|^blockem::backend::kth_largest$"
    r"|^\.rodata$"
)


def objdump(*options: str) -> list[str]:
    command = ["objdump", "--demangle", *options, str(blockem.build_info()["path"])]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def plain(symbol: str) -> str:
    """Without the compiler's hash, a symbol's version and an offset into it."""
    return re.sub(r"(::h[0-9a-f]{16})?(@+[\w.]+)?(\+0x[0-9a-f]+)?$", "", symbol)


def slots() -> dict[int, str]:
    """What each slot of the global offset table holds: a function of another library, or one of this."""
    functions = {}
    for line in objdump("--syms"):
        if found := re.match(r"([0-9a-f]{16}) .{7} \.text\s+[0-9a-f]+\s+(?:\.hidden )?(.+)$", line):
            functions[int(found[1], 16)] = plain(found[2])
    held = {}
    for line in objdump("--dynamic-reloc"):
        if found := re.match(r"([0-9a-f]+) R_X86_64_RELATIVE\s+\*ABS\*\+0x([0-9a-f]+)", line):
            held[int(found[1], 16)] = functions.get(int(found[2], 16), "data")
        elif found := re.match(r"([0-9a-f]+) R_X86_64_(?:GLOB_DAT|JUMP_SLOT)\s+(\S+)", line):
            held[int(found[1], 16)] = plain(found[2])
    return held


def references() -> dict[tuple[str, str], dict[str, int]]:
    """How often the hot functions of each instruction set refer to which other function."""
    held = slots()
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    function, hot = "", None
    for line in objdump("--disassemble", "--no-show-raw-insn"):
        if heading := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = plain(heading[1])
            hot = HOT.search(function)
        elif hot:
            isa = hot.groups()
            found[isa]["instructions"] += 1
            # Directly, or by way of the table, whose slot may be read long before it is called.
            if direct := re.search(r"\t(?:call|j\w+)\s+[0-9a-f]+ <(.+)>$", line):
                if plain(direct[1]) != function:
                    found[isa][plain(direct[1])] += 1
            elif slot := re.search(r"\t(?:call|jmp|mov)\s.*# ([0-9a-f]+) <", line):
                if int(slot[1], 16) in held:
                    found[isa][held[int(slot[1], 16)]] += 1
    return found


def test_hot_loops_call_nothing() -> None:
    found = references()
    assert set(found) == SETS, "the hot functions have other names now"
    calls = {
        isa: {name: count for name, count in called.items() if not ALLOWED.match(name)}
        for isa, called in found.items()
    }
    for isa, called in calls.items():
        # They hold all of the arithmetic.
        assert called.pop("instructions") > 2000, isa
        assert not called, f"{isa}: left out of line, so without its instructions: {called}"


def test_the_library_has_no_setter_for_tests() -> None:
    assert not hasattr(blockem._library.library, "blockem_test_use_isa")
    assert b"BLOCKEM_TEST_ISA" not in Path(blockem.build_info()["path"]).read_bytes()
