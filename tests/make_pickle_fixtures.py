"""Writes tests/data/pickles: torch.save files at the edges of the format, and hostile ones by hand.

    python tests/make_pickle_fixtures.py     (also run by make_format_fixtures.py; made with torch 2.15.0)

note.json says for each file what must happen:
    loads     `tensors` {name: [dtype, shape]} and, beside the file, a .safetensors twin with the same
              values; nested names are joined with "."; `others` are values that are no tensors
              (those in `optional` may be left out)
    refused   `why`: an error, never a crash, a hang or a large allocation
    bounded   either of the two, in little time and memory
`torch` is what torch.load(weights_only=True) does with it ("not asked" where that is unwise).
Nothing here runs code when it is read as data; the payloads are `true` and `1+1`.
"""

import collections
import json
import pickle
import re
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "data" / "pickles"
NOTES: dict[str, dict] = {}
DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.int16: "I16",
    torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def flat(value, prefix="") -> tuple[dict, dict]:
    """The tensors of a nested dict, and the rest of it as text."""
    tensors, others = {}, {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, torch.Tensor):
            tensors[name] = item.detach()
        elif isinstance(item, dict):
            inner = flat(item, f"{name}.")
            tensors |= inner[0]
            others |= inner[1]
        else:
            others[name] = repr(item)
    return tensors, others


def asked(path: Path, **how) -> tuple[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "loads", torch.load(path, weights_only=True, **how)
        except Exception as error:
            return f"refuses: {type(error).__name__}", None


def loads(name: str, about: str, value: dict | None = None, ask=True, **how) -> None:
    """A file that must load; value: what is in it (None: whatever torch reads)."""
    verdict, got = asked(HERE / name, **how) if ask else ("not asked", value)
    if got is None:  # our own file, a moment old
        got = torch.load(HERE / name, weights_only=False, **how)
    assert got is not None, (name, verdict)
    tensors, others = flat(got)
    if value is not None:
        want = flat(value)[0]
        assert want.keys() == tensors.keys() and all(torch.equal(want[k], tensors[k]) for k in want), name
    stem = HERE / Path(name).with_suffix(".safetensors")
    assert not stem.exists(), stem
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, stem)
    NOTES[name] = {
        "must": "loads", "about": about, "tensors": {k: [DTYPES[v.dtype], list(v.shape)] for k, v in tensors.items()},
        **({"others": others} if others else {}), "torch": verdict,
    }  # fmt: skip


def refused(name: str, why: str, ask=True, must="refused") -> None:
    NOTES[name] = {"must": must, "why": why, "torch": asked(HERE / name)[0] if ask else "not asked"}


def state(seed: int) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {"encoder.weight": torch.randn(5, 3, generator=g), "encoder.bias": torch.randn(5, generator=g)}


def save(name: str, value, **how) -> Path:
    torch.save(value, HERE / name, **how)
    return HERE / name


def rezip(source: Path, name: str, drop=(), compress=(), edit=None, zip64=False) -> None:
    """The same members again, some left out, deflated or changed."""
    limit = 0 if zip64 else zipfile.ZIP64_LIMIT
    with zipfile.ZipFile(source) as old, mock.patch.object(zipfile, "ZIP64_LIMIT", limit), zipfile.ZipFile(HERE / name, "w") as new:
        for info in old.infolist():
            entry = info.filename.split("/", 1)[1]
            if entry in drop:
                continue
            data = old.read(info)
            if edit and entry in edit:
                data = edit[entry](data)
            member = zipfile.ZipInfo(info.filename)
            member.compress_type = zipfile.ZIP_DEFLATED if entry in compress else zipfile.ZIP_STORED
            with new.open(member, "w", force_zip64=zip64) as out:
                out.write(data)


# ---------------------------------------------------------------- files that load


def benign() -> None:
    s = state(1)
    save("plain.pt", s)
    loads("plain.pt", "a dict of two tensors, as torch writes it today", s)
    # Storages are named and sorted by address: one storage, renamed here, for the same bytes each run.
    one = torch.arange(20.0)
    one = {"encoder.weight": one[:15].reshape(5, 3), "encoder.bias": one[15:]}
    legacy, keys = save("legacy.pt", one, _use_new_zipfile_serialization=False), {}
    address = re.compile(rb"X(.)\0\0\0(\d{9,})(?=q|X|\x85|e)", re.S)
    legacy.write_bytes(address.sub(lambda m: text(str(keys.setdefault(m[2], 100 + len(keys)))), legacy.read_bytes()))
    assert len(keys) == 1 and flat(torch.load(legacy, weights_only=True))[0].keys() == s.keys()
    refused("legacy.pt", "the format before torch 1.6 (no zip): name it and tell how to convert")
    for protocol in (3, 4, 5):
        save(f"protocol{protocol}.pt", s, pickle_protocol=protocol)
        loads(f"protocol{protocol}.pt", f"pickle protocol {protocol}; protocol 2 is plain.pt", s)
    ordered = torch.nn.Linear(3, 5).state_dict()
    ordered["weight"], ordered["bias"] = s["encoder.weight"], s["encoder.bias"]
    assert hasattr(ordered, "_metadata")
    save("ordered_metadata.pt", ordered)
    loads("ordered_metadata.pt", "OrderedDict with _metadata (BUILD), as Module.state_dict()", ordered)
    save("ordered.pt", collections.OrderedDict(s))
    loads("ordered.pt", "OrderedDict without _metadata", s)
    save("ordered_protocol4.pt", ordered, pickle_protocol=4)
    loads("ordered_protocol4.pt", "the same in protocol 4: FRAME, MEMOIZE, STACK_GLOBAL", ordered)

    views = {"transposed": s["encoder.weight"].T, "strided": torch.arange(24.0).reshape(4, 6)[1:4:2, 1:6:2]}
    views["expanded"] = torch.tensor([1.5, -2.0]).unsqueeze(1).expand(2, 3)
    views["column"] = torch.arange(12.0).reshape(4, 3)[:, 1]
    save("strided.pt", views)
    loads("strided.pt", "transposed, stepped, stride 0 and column views: strides must be followed", views)
    base = torch.arange(40.0)
    shared = {"head": base[:10], "tail": base[30:].reshape(2, 5), "middle": base[7:31].reshape(4, 6), "again": base[:10]}
    save("shared_storage.pt", shared)
    loads("shared_storage.pt", "four tensors in one storage at offsets 0, 30, 7 and 0, overlapping", shared)
    twice = s["encoder.bias"]
    save("same_tensor.pt", {"a": twice, "b": twice, "c": {"d": twice}})
    loads("same_tensor.pt", "one tensor object three times (memo)")

    g = torch.Generator().manual_seed(2)
    dtypes = {str(t)[6:]: torch.randn(2, 3, generator=g).to(t) for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
    for t in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        info = torch.iinfo(t)
        dtypes[str(t)[6:]] = torch.tensor([info.min, 0, 1, info.max], dtype=t)
    dtypes["bool"] = torch.tensor([True, False, True])
    save("dtypes.pt", dtypes)
    loads("dtypes.pt", "every storage type a loader may meet", dtypes)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45])
    save("shapes.pt", {"scalar": torch.tensor(3.5), "k": torch.tensor(64, dtype=torch.int32), "empty": torch.empty(0, 4), "one": torch.ones(1, 1, 1, 1), "odd": odd})
    loads("shapes.pt", "0-d, empty and 4-d tensors; nan, inf, -0.0 and a subnormal")
    save("parameters.pt", {"w": torch.nn.Parameter(s["encoder.weight"]), "b": torch.nn.Parameter(s["encoder.bias"], requires_grad=False)})
    loads("parameters.pt", "nn.Parameter values (_rebuild_parameter)", {"w": s["encoder.weight"], "b": s["encoder.bias"]})
    grad = s["encoder.weight"].clone().requires_grad_()
    save("requires_grad.pt", {"w": grad})
    loads("requires_grad.pt", "requires_grad=True on a plain tensor", {"w": s["encoder.weight"]})
    save("torch_size.pt", {**s, "shape": torch.Size([5, 3]), "dtype": torch.float32})
    loads("torch_size.pt", "a torch.Size and a torch.dtype beside the tensors")
    nested = {
        "step": 3, "big": 2**40, "negative": -7, "huge": -(2**63), "loss": 0.25, "flag": True, "none": None, "name": "gpt2-small é ☃ \U0001f642",
        "list": [1, "two", 3.0, None], "tuple": (1, 2), "triple": (1, 2, 3), "quad": (1, 2, 3, 4), "long": "x" * 300,
        "empty": {}, "sae": {"W": s["encoder.weight"], "cfg": {"k": 32, "postact_fn": "ReLU"}, "state": collections.OrderedDict(b=s["encoder.bias"])},
    }  # fmt: skip
    save("nested.pt", nested)
    loads("nested.pt", "nested dicts with strings, ints, floats, None, lists, tuples; LONG1 of up to 8 bytes")
    save("tensors_in_list.pt", {"w": s["encoder.weight"], "history": [s["encoder.bias"], s["encoder.bias"] * 2]})
    loads("tensors_in_list.pt", "tensors inside a list: no name, so only `w` is listed")
    save("int_keys.pt", {0: s["encoder.weight"], "b": s["encoder.bias"]})
    loads("int_keys.pt", "an int key beside a string key: name it 0 or skip it, but keep b")
    NOTES["int_keys.pt"]["optional"] = ["0"]
    save("bare_tensor.pt", s["encoder.weight"])
    refused("bare_tensor.pt", "no dict: one tensor without a name")

    rezip(HERE / "plain.pt", "no_byteorder.pt", drop=("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"))
    loads("no_byteorder.pt", "as torch before 2.1 wrote it: data.pkl, data/*, version", s)
    rezip(HERE / "plain.pt", "no_version.pt", drop=("byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id"))
    loads("no_version.pt", "only data.pkl and data/*; torch wants `version`", s, ask=False)
    rezip(HERE / "plain.pt", "zip64.pt", zip64=True)
    loads("zip64.pt", "zip64 records everywhere, as in files over 4 GiB", s)
    cuda = {"data.pkl": lambda p: p.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")}
    rezip(HERE / "plain.pt", "cuda.pt", edit=cuda)
    loads("cuda.pt", "saved on a GPU: the storages' location is cuda:0", s, map_location="cpu")


def numpy_values() -> None:
    """Numbers and small arrays of NumPy beside tensors, by either protocol."""
    s = state(4)
    numbers = {
        "f8": np.float64(0.5), "f4": np.float32(1e-3), "f2": np.float16(-2.5), "i8": np.int64(-(2**40)), "i4": np.int32(-7),
        "i2": np.int16(-300), "u1": np.uint8(200), "u8": np.uint64(2**40), "no": np.bool_(False), "yes": np.bool_(True),
        "big": np.array(1.25, ">f8")[()], "text": np.str_("abc"), "day": np.datetime64("2026-01-01"),
    }  # fmt: skip
    save("numpy_scalar.pt", {**s, "loss": np.float64(0.5)})
    loads("numpy_scalar.pt", "a number of NumPy beside the tensors", s)
    rezip(HERE / "numpy_scalar.pt", "numpy_1.pt", edit={"data.pkl": lambda p: p.replace(b"numpy._core", b"numpy.core")})
    loads("numpy_1.pt", "as NumPy 1 names it", s)
    arrays = {"line": np.arange(3.0), "square": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.arange(4, dtype=np.int32),
              "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "none": np.zeros((0, 2)), "on": np.array([True, False]),
              "words": np.array(["a", "b"])}  # fmt: skip
    for protocol in (2, 4):
        name = f"numpy_values_{protocol}.pt"
        save(name, {"state_dict": s, "numbers": numbers, "arrays": arrays}, pickle_protocol=protocol)
        twins = {k: torch.tensor(v).contiguous() for k, v in arrays.items() if k != "words"}
        save_file(
            {**{f"state_dict.{k}": v for k, v in s.items()}, **{f"arrays.{k}": v for k, v in twins.items()}},
            (HERE / name).with_suffix(".safetensors"),
        )
        values = {f"numbers.{k}": v.item() for k, v in numbers.items() if k not in ("text", "day")}
        NOTES[name] = {
            "must": "loads", "about": f"numbers and arrays of NumPy, pickled by protocol {protocol}", "values": values,
            "tensors": {**{f"state_dict.{k}": [DTYPES[v.dtype], list(v.shape)] for k, v in s.items()},
                        **{f"arrays.{k}": [DTYPES[v.dtype], list(v.shape)] for k, v in twins.items()}},
            "torch": asked(HERE / name)[0],
        }  # fmt: skip


# ---------------------------------------------------------------- files to refuse, by torch


def unwelcome() -> None:
    s = state(3)
    big = {"byteorder": lambda _: b"big"}
    rezip(HERE / "plain.pt", "big_endian.pt", edit=big)
    refused("big_endian.pt", "byteorder is big: torch swaps the bytes, we refuse")
    save("module.pt", torch.nn.Linear(3, 2))
    refused("module.pt", "a whole module: global torch.nn.modules.linear.Linear")
    save("numpy_objects.pt", {**s, "names": np.array(["a", None], dtype=object), "maker": np.random.default_rng(0)})
    refused("numpy_objects.pt", "a generator of NumPy beside an array of Python objects")
    save("numpy_wide.pt", {"w": np.zeros(2**16, np.float64)})
    refused("numpy_wide.pt", "an array of NumPy of 512 KiB, within the pickle")
    save("float8.pt", {"w": torch.ones(4).to(torch.float8_e4m3fn)})
    NOTES["float8.pt"] = {"must": "refused", "why": "float8 storage: not one of the allowed dtypes", "torch": asked(HERE / "float8.pt")[0]}
    save("complex.pt", {"w": torch.ones(2, dtype=torch.complex64)})
    NOTES["complex.pt"] = {"must": "refused", "why": "torch.ComplexFloatStorage", "torch": asked(HERE / "complex.pt")[0]}
    save("sparse.pt", {"w": torch.eye(3).to_sparse()})
    NOTES["sparse.pt"] = {"must": "refused", "why": "_rebuild_sparse_tensor", "torch": asked(HERE / "sparse.pt")[0]}


# ---------------------------------------------------------------- files to refuse, by hand


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def ints(values) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def pid(key="0", numel=6, kind="ctorch\nFloatStorage\n", location="cpu") -> bytes:
    return b"(" + text("storage") + kind.encode() + text(key) + text(location) + integer(numel) + b"tQ"


def tensor(offset=0, size=(2, 3), stride=(3, 1), storage: bytes | None = None, args: bytes | None = None) -> bytes:
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    inner = args if args is not None else (storage or pid()) + integer(offset) + ints(size) + ints(stride) + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + inner + b"tR"


def pickled(value: bytes, name="w") -> bytes:
    return b"\x80\x02}" + text(name) + value + b"s."


DATA = np.arange(6, dtype=np.float32).tobytes()


def record(name: bytes, data: bytes, stored: bytes | None = None, claimed: int | None = None) -> tuple[bytes, bytes]:
    """A local header with its data, and the central record but for the offset."""
    method, body = (0, data) if stored is None else (8, stored)
    size = len(data) if claimed is None else claimed
    common = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0x21, zlib.crc32(data), len(body), size, len(name), 0)
    return b"PK\3\4" + common + name + body, b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<HHHI", 0, 0, 0, 0)


def archive(name: str, pkl: bytes, members=(("data/0", DATA),), deflate=(), root="archive", overlap=False) -> None:
    """A zip by hand: nothing is checked. overlap: the last central record points into the one before."""
    entries = [("data.pkl", pkl), *members, ("version", b"3\n")]
    out, central, at = b"", b"", []
    for entry, data in entries:
        full = entry[1:] if entry.startswith("=") else f"{root}/{entry}"
        squeezed = zlib.compress(data)[2:-4] if entry in deflate else None
        local, record_ = record(full.encode(), data, squeezed)
        at.append(len(out))
        where = at[-1] if not (overlap and entry == "data/1") else at[-2]
        central += record_ + struct.pack("<I", where) + full.encode()
        out += local
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(central), len(out), 0)
    (HERE / name).write_bytes(out + central + b"PK\5\6" + end)


def hostile() -> None:
    good = pickled(tensor())
    archive("by_hand.pt", good)
    loads("by_hand.pt", "the valid file that the hostile ones are changed from", {"w": torch.arange(6.0).reshape(2, 3)})

    def case(name, value, why, members=(("data/0", DATA),), ask=False, must="refused", **how):
        archive(name, value if isinstance(value, bytes) else pickled(*value), members, **how)
        refused(name, why, ask, must)

    # Code.
    case("global_os_system.pt", (b"cos\nsystem\n(" + text("true") + b"tR",), "GLOBAL os.system", ask=True)
    stack = b"\x80\x04" + b"}" + text("w") + b"\x8c\x02os\x8c\x06system\x93" + b"\x8c\x04true\x85R" + b"s."
    case("stack_global_os_system.pt", stack, "STACK_GLOBAL os.system", ask=True)
    case("stack_global_built.pt", b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94}" + text("w") + b"h\x00h\x01\x93" + text("true") + b"\x85Rs.", "STACK_GLOBAL with names from the memo", ask=True)
    case("global_eval.pt", (b"c__builtin__\neval\n(" + text("1+1") + b"tR",), "GLOBAL __builtin__.eval", ask=True)
    case("global_getattr.pt", (b"c__builtin__\ngetattr\n(ctorch\nload\n" + text("__globals__") + b"tR",), "GLOBAL getattr", ask=True)
    case("global_dotted.pt", b"\x80\x04}" + text("w") + b"\x8c\x05torch\x8c\x0fserialization.os\x93s.", "STACK_GLOBAL with a dotted name", ask=True)
    case("inst_os_system.pt", b"\x80\x02}" + text("w") + b"(" + text("true") + b"ios\nsystem\ns.", "INST", ask=True)
    case("obj_os_system.pt", b"\x80\x02}" + text("w") + b"(cos\nsystem\n" + text("true") + b"os.", "OBJ", ask=True)
    case("newobj.pt", (b"ccollections\nOrderedDict\n)\x81",), "NEWOBJ", must="bounded", ask=True)
    case("ext1.pt", (b"\x82\x01",), "EXT1: the extension registry", ask=True)
    case("persid_text.pt", (b"Pstorage\n",), "PERSID", ask=True)
    case("build_on_tensor.pt", (tensor() + b"}" + text("__class__") + integer(1) + b"sb",), "BUILD on a tensor", ask=False)
    case("reduce_string.pt", (text("os.system") + b")R",), "REDUCE on a string", ask=True)
    case("global_as_value.pt", (b"ctorch._utils\n_rebuild_tensor_v2\n",), "an allowed function as a value, never called", must="bounded", ask=True)

    # NumPy.
    f8 = b"cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR(" + integer(3) + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    scalar = b"cnumpy._core.multiarray\nscalar\n"
    half = b"c_codecs\nencode\n(" + text("\0\0\0\0\0\0\xe0?") + text("latin1") + b"tR"
    empty = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
    whole = "an array's state says more than there is"
    both = b"}" + text("w") + tensor() + b"s" + text("x")
    case("numpy_scalar_short.pt", b"\x80\x02" + both + scalar + b"(" + f8 + b"C\x04\0\0\0\0tRs.", "a float64 of four bytes")
    case("numpy_scalar_wide.pt", b"\x80\x02" + both + scalar + b"(" + f8 + half.replace(b"\xc3\xa0", b"\xc4\x80") + b"tRs.", "bytes as text with a character above 255")
    case("numpy_scalar_codec.pt", b"\x80\x02" + both + scalar + b"(" + f8 + half.replace(b"latin1", b"rot_13") + b"tRs.", "bytes by another codec")
    case("numpy_array_claims.pt", b"\x80\x02" + both + empty + b"(" + integer(1) + ints((2**20, 2**20)) + f8 + b"\x89C\x08\0\0\0\0\0\0\0\0tbs.", whole)
    case("numpy_array_huge.pt", b"\x80\x02" + both + empty + b"(" + integer(1) + ints((2**62, 2**62)) + f8 + b"\x89C\x08\0\0\0\0\0\0\0\0tbs.", whole)
    case("numpy_array_own_state.pt", b"\x80\x02" + both + empty + b"q\x00(" + integer(1) + ints((1,)) + f8 + b"\x89h\x00tbs.", "an array whose bytes are itself", must="bounded")
    line = empty + b"(" + integer(1) + ints((4096,)) + f8 + b"\x89B\x00\x80\x00\x00" + bytes(32768) + b"tbq\x01"
    many = b"".join(text(f"a{i}") + b"h\x01" for i in range(3000))
    case("numpy_array_again.pt", b"\x80\x02}(" + text("w") + tensor() + text("x") + line + many + b"u.", "one array of 32 KiB under 3,000 keys")

    # Size.
    bomb = b"]q\x00(K\x01K\x02e0"
    for i in range(60):
        bomb += b"]q" + bytes([i + 1]) + b"(h" + bytes([i]) + b"h" + bytes([i]) + b"e0"
    case("memo_bomb_lists.pt", b"\x80\x02" + bomb + b"}(" + text("w") + tensor() + text("x") + b"h\x3cu.", "61 lists, each twice in the next: 2^60 leaves if copied or walked", must="bounded")
    bomb = b")q\x000"
    for i in range(100):
        bomb += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) + b"0"
    case("memo_bomb_tuples.pt", b"\x80\x02" + bomb + b"}(" + text("w") + tensor() + text("x") + b"h\x64u.", "100 tuples, each twice in the next", must="bounded")
    bomb = b"}q\x000"
    for i in range(60):
        bomb += b"}q" + bytes([i + 1]) + b"(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"u0"
    case("memo_bomb_dicts.pt", b"\x80\x02" + bomb + b"}(" + text("w") + tensor() + text("x") + b"h\x3cu.", "60 dicts, each twice in the next", must="bounded")
    inner = b"}q\x01(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(9_000)) + b"u0" + text("k" * 4_000) + b"q\x000"
    for i in range(6):
        inner += b"}q" + bytes([i + 2]) + b"h\x00h" + bytes([i + 1]) + b"s0"
    case("memo_bomb_keys.pt", b"\x80\x02" + inner + b"}(" + text("w") + tensor() + text("x") + b"h\x07u.", "9,000 values below 6 dicts whose one key has 4,000 letters: 200 MB of joined keys")
    inner = b"ctorch._utils\n_rebuild_tensor_v2\nq\x000(" + pid("0" * 4_000) + integer(0) + ints((2, 3)) + ints((3, 1)) + b"\x89Ntq\x010"
    case("memo_bomb_tensors.pt", b"\x80\x02" + inner + b"h\x00h\x01R0" * 20_000 + b"}" + text("w") + b"h\x00h\x01Rs.", "20,000 tensors in 6 bytes each, of a storage whose key has 4,000 letters")
    case("self_list.pt", b"\x80\x02}(" + text("w") + tensor() + text("x") + b"]q\x00h\x00au.", "a list that holds itself", must="bounded")
    case("self_dict.pt", b"\x80\x02}q\x00(" + text("w") + tensor() + text("x") + b"h\x00u.", "the dict holds itself", must="bounded")
    case("deep_tuples.pt", b"\x80\x02}(" + text("w") + tensor() + text("x") + b")" + b"\x85" * 100_000 + b"u.", "100,000 nested tuples: no stack may grow with them", must="bounded")
    case("deep_marks.pt", b"\x80\x02" + b"(" * 30_000 + b".", "30,000 open marks", ask=False)
    case("deep_dicts.pt", b"\x80\x02" + (b"}" + text("a")) * 5_000 + b"N" + b"s" * 5_000 + b".", "5,000 nested dicts", must="bounded")
    case("long1_255.pt", (b"\x8a\xff" + b"\x7f" * 255,), "LONG1 of 255 bytes", must="bounded", ask=True)
    case("long1_short.pt", b"\x80\x02}" + text("w") + b"\x8a\xff\x01\x02s.", "LONG1 of 255 bytes, 4 there", ask=True)
    case("long4_huge.pt", (b"\x8b\xff\xff\xff\x7f\x01",), "LONG4 of 2 GiB, 1 byte there", ask=True)
    case("long4_negative.pt", (b"\x8b\xff\xff\xff\xff\x01",), "LONG4 of -1 bytes", ask=True)
    case("unicode_huge.pt", b"\x80\x02}X\xff\xff\xff\x7fabc.", "a string of 2 GiB, 4 bytes there", ask=True)
    case("unicode8_huge.pt", b"\x80\x04}\x8d" + b"\xff" * 8 + b"abc.", "BINUNICODE8 of 2^64-1", ask=True)
    case("unicode_invalid.pt", b"\x80\x02}X\x02\x00\x00\x00\xff\xfe" + tensor() + b"s.", "a key that is not UTF-8", ask=True)
    case("long_binput.pt", b"\x80\x02}r\xff\xff\xff\x7f" + text("w") + tensor() + b"s.", "memo index 2^31-1: no table of that length", must="bounded", ask=False)
    case("frame_lie.pt", b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f}" + text("w") + tensor() + b"s.", "FRAME longer than the file", must="bounded", ask=False)

    # Tensors that are not there.
    huge = 2**40
    case("huge_storage.pt", (tensor(size=(huge,), stride=(1,), storage=pid(numel=huge)),), "2^40 elements claimed, 24 bytes there")
    case("huge_size.pt", (tensor(size=(huge,), stride=(1,)),), "a size of 2^40 in a storage of 6")
    case("huge_expanded.pt", (tensor(size=(2**20, 2**20), stride=(0, 0)),), "2^40 elements by stride 0: within the storage, 4 TB when copied")
    case("overflow.pt", (tensor(size=(2**33, 2**33), stride=(2**33, 1)),), "size * stride over 2^63")
    case("overflow_numel.pt", (tensor(size=(2**32, 2**32, 2), stride=(0, 0, 0)),), "an element count over 2^64")
    case("overflow_bytes.pt", (tensor(size=(2**62,), stride=(1,), storage=pid(numel=2**62)),), "2^62 elements: the bytes overflow 64 bits")
    case("size_long.pt", (tensor(size=(2**70,), stride=(1,)),), "a size over 64 bits")
    case("offset_outside.pt", (tensor(offset=4),), "offset 4 and 6 elements in a storage of 6", ask=True)
    case("offset_far.pt", (tensor(offset=2**40),), "offset 2^40", ask=True)
    case("offset_negative.pt", (tensor(offset=-1, size=(1,), stride=(1,)),), "offset -1", ask=True)
    case("stride_outside.pt", (tensor(stride=(4, 1)),), "stride (4, 1) reaches past the storage", ask=True)
    case("stride_negative.pt", (tensor(offset=5, size=(6,), stride=(-1,)),), "stride -1", ask=True)
    case("size_negative.pt", (tensor(size=(-2, 3)),), "size -2", ask=True)
    case("rank_mismatch.pt", (tensor(size=(2, 3), stride=(1,)),), "two sizes, one stride", ask=True)
    case("empty_far.pt", (tensor(offset=100, size=(0,), stride=(1,)),), "no elements, at offset 100 of 6", must="bounded")
    case("args_short.pt", (tensor(args=pid() + integer(0)),), "_rebuild_tensor_v2 with 2 arguments", ask=True)
    case("args_none.pt", (tensor(args=b""),), "_rebuild_tensor_v2 without arguments", ask=True)
    case("args_types.pt", (tensor(args=text("a") * 6),), "_rebuild_tensor_v2 with strings", ask=True)
    case("parameter_of_string.pt", (b"ctorch._utils\n_rebuild_parameter\n(" + text("a") + b"\x88}tR",), "_rebuild_parameter of a string", ask=True)
    case("storage_missing.pt", (tensor(storage=pid("7")),), "no member data/7", ask=True)
    case("storage_short.pt", good, "24 bytes claimed, 20 there", members=(("data/0", DATA[:20]),), ask=True)
    case("storage_empty.pt", good, "24 bytes claimed, none there", members=(("data/0", b""),))
    case("storage_long.pt", good, "24 bytes claimed, 32 there", members=(("data/0", DATA + b"\0" * 8),), must="bounded")
    case("storage_type.pt", (tensor(storage=pid(kind="ctorch\nQInt8Storage\n")),), "torch.QInt8Storage", ask=True)
    case("storage_types_differ.pt", b"\x80\x02}(" + text("w") + tensor() + text("x") + tensor(storage=pid(kind="ctorch\nDoubleStorage\n", numel=3), size=(3,), stride=(1,)) + b"u.", "one storage as 6 floats and as 3 doubles", must="bounded")
    case("storage_key_path.pt", (tensor(storage=pid("../data/0")),), "storage key ../data/0", ask=True)
    case("storage_negative.pt", (tensor(size=(0,), stride=(1,), storage=pid(numel=-6)),), "a storage of -6 elements")
    case("pid_short.pt", (b"(" + text("storage") + b"tQ",), "a persistent id of one part", ask=True)
    case("pid_kind.pt", (b"(" + text("module") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(6) + b"tQ",), "a persistent id that is no storage", ask=True)

    # The machine.
    for name, data, why in (
        ("stack_empty.pt", b"\x80\x02}s.", "SETITEM on an empty stack"),
        ("no_mark.pt", b"\x80\x02}K\x01K\x02u.", "SETITEMS without a mark"),
        ("odd_setitems.pt", b"\x80\x02}(" + text("w") + b"u.", "a key without a value"),
        ("memo_missing.pt", b"\x80\x02h\x05.", "memo slot 5, never set"),
        ("no_stop.pt", good[:-1], "no STOP"),
        ("cut_pickle.pt", good[:40], "the pickle ends inside a tensor"),
        ("empty_pickle.pt", b"", "an empty data.pkl"),
        ("stop_only.pt", b"\x80\x02.", "STOP on an empty stack"),
        ("unknown_opcode.pt", b"\x80\x02}\xfes.", "opcode 0xfe"),
        ("buffer5.pt", b"\x80\x05}" + text("w") + b"\x97s.", "NEXT_BUFFER: no buffers here"),
        ("set_as_key.pt", b"\x80\x02}]" + tensor() + b"s.", "a list as a key"),
        ("number_bytes.pt", b"\x80\x02I1\n.", "protocol 0's INT and no dict"),
    ):
        case(name, data, why, ask=True)
    case("protocol_9.pt", b"\x80\x09" + good[2:], "protocol 9: none is known yet", must="bounded", ask=True)
    case("after_stop.pt", good + b"cos\nsystem\n", "bytes after STOP: never read", must="bounded", ask=True)
    case("duplicate_key.pt", b"\x80\x02}(" + text("w") + tensor() + text("w") + tensor(offset=3, size=(3,), stride=(1,)) + b"u.", "the key w twice: readers differ in which of them they take")
    case("joined_key_twice.pt", b"\x80\x02}(" + text("a.b") + tensor() + text("a") + b"}" + text("b") + tensor(offset=3, size=(3,), stride=(1,)) + b"su.", "a.b, and b in a: the same key when joined")

    # The zip.
    case("deflated_pickle.pt", good, "data.pkl is deflated (torch stores)", deflate=("data.pkl",), ask=True)
    case("deflated_storage.pt", good, "data/0 is deflated (torch stores)", deflate=("data/0",), ask=True)
    case("zip_bomb.pt", good, "data/0 is 4 MiB of zeros in 4 KiB", members=(("data/0", bytes(1 << 22)),), deflate=("data/0",))
    case("overlapping.pt", b"\x80\x02}(" + text("w") + tensor() + text("x") + tensor(storage=pid("1")) + b"u.", "data/1 lies on data/0", members=(("data/0", DATA), ("data/1", DATA)), overlap=True)
    case("duplicate_member.pt", good, "data/0 twice", members=(("data/0", DATA), ("data/0", DATA[::-1])))
    case("two_pickles.pt", good, "data.pkl twice", members=(("data.pkl", pickled(tensor(), "other")), ("data/0", DATA)))
    case("two_roots.pt", good, "two archives in one: archive/data.pkl and other/data.pkl", members=(("data/0", DATA), ("=other/data.pkl", good)), must="bounded")
    case("dotdot_member.pt", good, "a member ../evil: nothing is ever written, so it may also be ignored", members=(("data/0", DATA), ("=../evil", b"x")), must="bounded")
    case("dotdot_root.pt", good, "the archive's root is ..", root="..", must="bounded")
    case("absolute_root.pt", good, "the archive's root is /tmp", root="/tmp", must="bounded")
    whole = (HERE / "plain.pt").read_bytes()
    for name, data, why in (
        ("cut_tail.pt", whole[:-30], "the last 30 bytes are missing: no end record"),
        ("cut_half.pt", whole[: len(whole) // 2], "the second half is missing"),
        ("cut_header.pt", whole[:20], "20 bytes"),
        ("empty.pt", b"", "an empty file"),
        ("garbage.pt", bytes(range(256)) * 4, "no zip and no pickle"),
        ("safetensors.pt", (HERE / "plain.safetensors").read_bytes(), "a safetensors file by the wrong name"),
        ("bare_pickle.pt", pickle.dumps({"w": [1.0, 2.0]}, 2), "a bare pickle without tensors"),
    ):
        (HERE / name).write_bytes(data)
        # Containers are told apart by their bytes, not by their names.
        refused(name, why, must="bounded" if name == "safetensors.pt" else "refused")
    # From the file by hand: torch's own have zip64 end records, which outrank the fields changed here.
    whole = (HERE / "by_hand.pt").read_bytes()
    end, first, local = whole.rindex(b"PK\5\6"), whole.index(b"PK\1\2"), whole.index(b"data.pkl")

    def changed(name, at, value, why, must="refused"):
        (HERE / name).write_bytes(whole[:at] + value + whole[at + len(value) :])
        refused(name, why, must == "refused", must)

    changed("central_outside.pt", end + 16, b"\xff\xff\xff\x7f", "the end record points outside the file")
    changed("central_count.pt", end + 8, b"\xfe\xff\xfe\xff", "65,534 members claimed")
    changed("central_size.pt", end + 12, b"\xff\xff\xff\x7f", "a central directory of 2 GiB claimed")
    changed("member_huge.pt", first + 20, b"\xf0\xff\xff\x7f" * 2, "data.pkl of 2 GiB claimed")
    changed("member_outside.pt", first + 42, b"\xf0\xff\xff\x7f", "the local header of data.pkl lies outside the file")
    changed("member_no_header.pt", first + 42, b"\x05\0\0\0", "no local header where data.pkl should start")
    changed("local_name.pt", local, b"DATA.PKL", "local and central header name the member differently", "bounded")
    changed("local_size.pt", local - len("archive/") - 12, b"\x01\0\0\0" * 2, "local and central header give different sizes", "bounded")
    changed("crc.pt", first + 16, b"\0\0\0\0", "data.pkl's checksum does not fit", "bounded")
    changed("encrypted.pt", first + 8, b"\x01\0", "data.pkl is marked as encrypted", "bounded")


def hostile_arrays() -> None:
    """Archives of deflated arrays, a few bytes that claim many."""

    def case(name: str, shape: str, elements: int, why: str, body=bytes(64)) -> None:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape}), }}\n".encode()
        data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
        squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
        stream = squeezed.compress(data + body) + squeezed.flush()
        local, central = record(b"threshold.npy", data + body, stream, len(data) + 4 * elements)
        central += struct.pack("<I", 0) + b"threshold.npy"
        end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
        (HERE / name).write_bytes(local + central + b"PK\5\6" + end)
        refused(name, why, ask=False)

    case("deflated_wide.npz", f"{2**21},", 2**21, "2^21 thresholds in 8 KiB: each takes 12 bytes when they are described", bytes(2**23))
    case("deflated_bomb.npz", f"{2**14}, {2**14}", 2**28, "1 GiB claimed, 64 bytes there")
    case("deflated_dimensions.npz", "0," * 1_500, 0, "1,500 dimensions: 12 KiB of sizes in 100 bytes", b"")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir(parents=True)
    NOTES.clear()
    torch.manual_seed(0)
    with mock.patch("time.localtime", return_value=time.gmtime(315532800)):
        benign()
        numpy_values()
        unwelcome()
    hostile()
    hostile_arrays()
    (HERE / "note.json").write_text(json.dumps(NOTES, indent=1, ensure_ascii=False) + "\n")
    for name, entry in sorted(NOTES.items()):
        print(f"{name:28} {entry['must']:8} torch {entry['torch']:30} {entry.get('why', entry.get('about'))}")


if __name__ == "__main__":
    sys.exit(main())
