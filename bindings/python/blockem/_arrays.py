"""numpy arrays and torch tensors as blockem_tensor, without importing torch."""

from __future__ import annotations

import math
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _ffi
from ._library import fail

#: A numpy array or a torch tensor.
Array = Any


def is_torch(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def dtype_name(x: Array) -> str:
    """The name that numpy, torch and the header share, such as "bfloat16"."""
    return str(x.dtype).removeprefix("torch.")


def strides(x: Array) -> tuple[int, ...] | None:
    """Elements from one index to the next along each dimension, if whole and not negative."""
    if is_torch(x):
        return tuple(x.stride())
    if any(s < 0 or s % x.itemsize for s in x.strides):
        return None
    return tuple(s // x.itemsize for s in x.strides)


def contiguous(x: Array) -> Array:
    return x.contiguous() if is_torch(x) else np.ascontiguousarray(x)


def address(x: Array) -> int:
    return x.data_ptr() if is_torch(x) else x.__array_interface__["data"][0]


def tensor(name: str, x: Array, shape: tuple[int, ...], stride: tuple[int, ...]) -> _ffi.Tensor:
    """A blockem_tensor over the memory of x, which must outlive it."""
    device, index = (x.device.type, x.device.index or 0) if is_torch(x) else ("cpu", 0)
    if device not in _ffi.DEVICES:
        fail(_ffi.STATUS_DEVICE_MISMATCH, f"{name} is on {x.device}; expected cpu or cuda")
    return _ffi.Tensor(
        data=address(x),
        dtype=_ffi.DTYPES[dtype_name(x)],
        device_type=_ffi.DEVICES[device],
        device_index=index,
        ndim=len(shape),
        shape=shape,
        stride=stride,
    )


def expect_array(name: str, x: object) -> Array:
    """x, if it is a dense array with an element type of the header."""
    if not isinstance(x, np.ndarray) and not is_torch(x):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a numpy array or torch tensor")
    if not is_torch(x) and not x.dtype.isnative or dtype_name(x) not in _ffi.DTYPES:
        fail(_ffi.STATUS_DTYPE, f"{name} is {x.dtype}; expected one of {', '.join(_ffi.DTYPES)}")
    return x


@dataclass
class Rows:
    """[..., n] as [T, n], or [...] as [T]; `owner` keeps the memory alive."""

    tensor: _ffi.Tensor
    owner: Array


def rows(name: str, x: Array, *, tail: int = 1, in_place: bool = False) -> Rows:
    """Flattens all but the last `tail` dimensions: without a copy where strides allow it.

    in_place: x is written to, so a copy is an error.
    """
    row = tuple(x.shape[x.ndim - tail :])
    step = flat_stride(x, tail)
    if step is None and in_place:
        fail(
            _ffi.STATUS_LAYOUT,
            f"{name} is written in place: its rows must be dense and its leading dimensions "
            "must flatten without a copy",
        )
    if step is None:
        x, step = contiguous(x), math.prod(row)
    tokens = math.prod(x.shape[: x.ndim - tail])
    return Rows(tensor(name, x, (tokens, *row), (step, *(1,) * tail)), x)


def flat_stride(x: Array, tail: int) -> int | None:
    """Elements from row to row when the leading dimensions are one; None if they cannot be."""
    step = strides(x)
    row = x.shape[x.ndim - tail :]
    if 0 in x.shape:
        return math.prod(row)
    if step is None or any(n > 1 and s != 1 for n, s in zip(row, step[x.ndim - tail :])):
        return None
    lead = [(n, s) for n, s in zip(x.shape[: x.ndim - tail], step) if n > 1]
    if any(outer != n * inner for (_, outer), (n, inner) in zip(lead, lead[1:])):
        return None
    return lead[-1][1] if lead else math.prod(row)


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An array of the kind and on the device of `like`, with a dtype by name."""
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    # numpy knows bfloat16 only as the dtype object of an array that has it.
    return np.empty(shape, dtype=like.dtype if dtype == dtype_name(like) else dtype)


class _Scratch(threading.local):
    memory = np.empty(0, np.uint8)


_scratch = _Scratch()
ALIGNMENT = 64


def workspace(size: int, like: Array) -> tuple[int, Array]:
    """The address of at least `size` bytes on the device of `like`, and their owner.

    On the CPU they belong to this thread until its next call; on CUDA to the current stream, which
    may have them back when the call has put its work there.
    """
    if on_cuda(like):
        torch = sys.modules["torch"]
        memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=like.device)
    else:
        if _scratch.memory.size < size + ALIGNMENT:
            _scratch.memory = np.empty(size + ALIGNMENT, np.uint8)
        memory = _scratch.memory
    start = address(memory)
    return start + -start % ALIGNMENT, memory


def on_cuda(x: Array) -> bool:
    return is_torch(x) and x.device.type == "cuda"


def stream(x: Array) -> int | None:
    """The stream on which work on x is put: torch's current one of its device."""
    if not on_cuda(x):
        return None
    return sys.modules["torch"].cuda.current_stream(x.device).cuda_stream
