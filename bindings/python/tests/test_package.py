"""The package against the header and the library that it was built with."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from oracle import Case

import blockem
from blockem import _ffi, _library

HEADER = ROOT / "include" / "blockem.h"
STRUCTS = {
    "blockem_" + re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(): struct
    for name, struct in vars(_ffi).items()
    if isinstance(struct, type) and hasattr(struct, "_fields_")
}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_structs_have_the_layout_of_the_header(tmp_path: Path) -> None:
    lines = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            place = f"offsetof({name}, {field}), sizeof((({name} *)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    body = "\n".join(lines)
    source.write_text(
        f'#include <stdio.h>\n#include "blockem.h"\nint main(void) {{\n{body}\nreturn 0;\n}}\n'
    )
    subprocess.run(["cc", f"-I{HEADER.parent}", str(source), "-o", str(program)], check=True)
    out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout

    ours = []
    for name, struct in STRUCTS.items():
        ours.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            ours.append(f"{name}.{field} {at.offset} {at.size}")
    assert out.splitlines() == ours


def test_every_struct_function_and_number_of_the_header_is_declared() -> None:
    text = HEADER.read_text()
    assert set(re.findall(r"^typedef struct (\w+) \{", text, re.M)) == set(STRUCTS)
    assert set(re.findall(r"\b(blockem_\w+)\(", re.sub(r"/\*.*?\*/", "", text, flags=re.S))) == set(
        _ffi.FUNCTIONS
    )
    numbers = {
        name: int(value)
        for name, value in re.findall(r"^#define BLOCKEM_(\w+) (\d+)$", text, re.M)
    }
    for prefix, table in [
        ("DEVICE", _ffi.DEVICES),
        ("BACKEND", _ffi.BACKENDS),
        ("ACTIVATION", _ffi.ACTIVATIONS),
        ("ENCODER_LAYOUT", _ffi.ENCODER_LAYOUTS),
        ("CACHE_MODE", _ffi.CACHE_MODES),
        ("CLOSING", _ffi.CLOSINGS),
        ("BORDER", _ffi.BORDERS),
    ]:
        found = {n.removeprefix(f"{prefix}_").lower(): v for n, v in numbers.items()
                 if n.startswith(f"{prefix}_") and not n.startswith("ACTIVATION_KIND_")}
        assert found == table
    assert numbers["CACHE_KEY_SIZE"] == _ffi.CACHE_KEY_SIZE
    short = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64",
             "u8": "uint8", "bool": "bool", "i64": "int64"}
    for name, full in short.items():
        assert numbers[f"DTYPE_{name.upper()}"] == _ffi.DTYPES[full]
    for name, value in vars(_ffi).items():
        if name.startswith("STATUS_"):
            assert numbers[name] == value
    kinds = {"standard": "RELU", "jumprelu": "JUMPRELU", "gated": "GATED", "topk": "TOPK"}
    assert {a: numbers[f"ACTIVATION_KIND_{kind}"] for a, kind in kinds.items()} \
        == _ffi.ARCHITECTURES


def test_version_is_cargo_s() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    assert blockem.__version__ == blockem.build_info()["version"] == version


def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    path = _library.library_path
    with pytest.raises(ImportError, match="this package belongs to 9.9.9"):
        _library.load(path, "9.9.9")
    with pytest.raises(ImportError, match="is neither in"):
        _library.find(tmp_path / "a" / "b" / "blockem")
    original = _ffi.Sized.__init__
    try:
        _ffi.Sized.__init__ = lambda self: None
        with pytest.raises(ImportError, match="blockem_build_info of 48 bytes"):
            _library.load(path, blockem.__version__)
    finally:
        _ffi.Sized.__init__ = original


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_without_our_functions_is_refused(tmp_path: Path) -> None:
    source, built = tmp_path / "other.c", tmp_path / "libother.so"
    source.write_text("int other(void) { return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    with pytest.raises(ImportError, match="not the libblockem of this package"):
        _library.load(built, blockem.__version__)


def test_a_plan_outlives_its_parts_and_handles_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("standard", "native", 8, 3)
    sae, latents = case.sae, blockem.Latents(case.ids, case.signs)
    plan = blockem.Plan(sae, latents)
    want, freed = plan.encode(case.hidden(4)), []
    from blockem._core import Handle

    keep = Handle(ctypes.c_void_p(1), lambda pointer: freed.append(pointer.value))
    del case.sae, case.latents, sae, latents, keep
    gc.collect()
    assert freed == [1]
    np.testing.assert_array_equal(plan.encode(case.hidden(4)), want)


def test_attributes(sae_folder: Path) -> None:
    sae = blockem.load_sae(sae_folder)
    assert (sae.architecture, sae.d_in, sae.d_sae, sae.k) == ("jumprelu", 8, 32, None)
    assert (sae.layer, sae.hook, sae.dtype) == (2, "blocks.2.hook_resid_post", "float32")
    recipe = sae.describe()
    assert recipe["hidden_states_index"] == 3
    assert sae.site == recipe["site"] == "block_output"
    assert recipe["threshold"]["median"] == pytest.approx(0.1)
    latents = blockem.Latents([7, 3, 30], [1, -1, 1], [1, 2, 3])
    assert latents.ids.dtype == np.int64 and len(latents) == 3
    with pytest.raises(ValueError, match="read-only"):
        latents.ids[0] = 5
    plan = blockem.Plan(sae, latents, activation="preactivation", num_threads=1)
    assert (plan.d_in, plan.d_sae, plan.num_latents, plan.num_positive) == (8, 32, 3, 2)
    assert (plan.layer, plan.activation, plan.backend) == (2, "preactivation", "cpu")
    assert plan.site == "block_output"
    elsewhere = blockem.load_sae(sae_folder, recipe={"hook_name": "model.layers.5.mlp"})
    assert (elsewhere.site, elsewhere.layer) == ("mlp_output", 5)
    assert blockem.Plan(elsewhere, latents).identity != blockem.Plan(sae, latents).identity
    for name in blockem._ffi.SITES:
        layer = {} if name == "embedding" else {"layer": 2}
        stated = blockem.load_sae(sae_folder, recipe={"site": name, **layer})
        reported = "block_output" if name == "block_input" else name
        assert stated.site == stated.describe()["site"] == reported
    assert (plan.device, plan.num_threads) == ("cpu", 1)
    assert re.fullmatch("[0-9a-f]{64}", plan.identity) and plan.numerics
    for text in map(repr, (sae, latents, plan)):
        assert re.fullmatch(r"(Sae|Latents|Plan)\(.+\)", text)
