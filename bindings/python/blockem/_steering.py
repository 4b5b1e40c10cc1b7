"""Steering along decoder directions, and the norms of hidden states that say how far."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from ctypes import byref
from dataclasses import dataclass

import numpy as np

from . import _arrays, _ffi
from ._arrays import Array
from ._core import (
    Handle,
    Immutable,
    Sae,
    _code,
    _device_name,
    _expect_shape,
    _int32,
    _name,
    _plan_options,
    _whole_numbers,
    expect,
)
from ._library import check, fail, library


class Steering(Immutable):
    """Unit decoder rows of some latents on a device, to push hidden states along: a latent and a
    strength for each row of a batch, so that one forward pass tries many.

        steering = blockem.Steering(sae, [4, 17, 99])
        steering.steer(hidden, latents=[17, 4, -1], strengths=[0.7, -0.4, 0.0], scale=scale)

        h[b,s,:] += strengths[b] * scale * mask[b,s] * D_k / |D_k|      k = latents[b], D its decoder row

    which is BLOCK-EM's ``h <- h + alpha * scale * unit decoder column``; see
    :func:`activation_scale`. ``blockem.torch.steered`` does it inside of a model.

    Immutable: any number of threads may use one. Calls release the GIL.

    sae: with a decoder; a partial file must have these latents.
    ids: [n] whole numbers, ids in the dictionary.
    device, backend, num_threads: as of :class:`Plan`.

    Attributes: ``ids`` ([n] int64), ``d_in``, ``site`` and ``layer`` (those of the SAE), ``identity`` (sha256 of ids and directions),
    ``device``, ``backend``, ``num_threads``.

    Raises Error: TENSOR_MISSING (no decoder), LATENT_RANGE, INVALID_ARGUMENT (no ids, a decoder row of
    zeros), NON_FINITE, IO, FORMAT; those of devices as :class:`Plan`.
    """

    def __init__(
        self,
        sae: Sae,
        ids: Sequence[int] | Array,
        device: object = "cpu",
        backend: str = "auto",
        num_threads: int = 0,
    ) -> None:
        expect("sae", sae, Sae)
        column = _whole_numbers("ids", _host(ids), np.int64)
        if column.ndim != 1:
            fail(_ffi.STATUS_SHAPE, f"ids has the shape {list(column.shape)}; expected [n]")
        options = _plan_options(device, "native", backend, num_threads)
        pointer = ctypes.c_void_p()
        numbers = column.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
        check(
            library.blockem_steering_create(
                sae._handle.pointer, numbers, len(column), byref(options), byref(pointer)
            )
        )
        self._handle, self._sae = Handle(pointer, library.blockem_steering_free), sae
        info = _ffi.SteeringInfo()
        check(library.blockem_steering_info_get(pointer, byref(info)))
        self.ids: np.ndarray = column.copy()
        self.ids.flags.writeable = False
        self.d_in: int = info.d_in
        self.site: str = sae.site
        self.layer: int | None = None if info.layer < 0 else info.layer
        self.identity: str = info.identity.decode()
        self.device: str = _device_name(info)
        self.backend: str = _name(info.backend, _ffi.BACKENDS)
        self.num_threads: int = info.num_threads
        self._places = {id: place for place, id in enumerate(column.tolist())} | {-1: -1}

    def steer(
        self,
        hidden: Array,
        latents: Sequence[int] | Array,
        strengths: Sequence[float] | Array,
        mask: Array | None = None,
        scale: float = 1.0,
    ) -> Array:
        """Pushes hidden states in place, and returns them.

        hidden: [B, S, d] float32, float16 or bfloat16 (numpy or torch; float64 with
            backend="reference"), adjacent in the last dimension. On CUDA tensors of the device, on
            torch's current stream, without waiting.
        latents: [B] ids in the dictionary, of those the steering was made with; -1 leaves a row of
            the batch as it is.
        strengths: [B] numbers; their sign is the direction's. 0 leaves a row as it is.
        mask: [B, S] bool or uint8 (not 0 counts), float32 (multiplies) or None. Where it is 0 no bit
            changes, even of NaN.
        scale: multiplies every strength; see :func:`activation_scale`.

        The sum is in float32 (fma) and rounded once more to a narrower dtype: the same bits on the CPU
        and on CUDA, for any batch. In-place changes have no gradient: hidden must not require one
        (``blockem.torch.steered`` steers while training).

        Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH, OVERLAP, LATENT_RANGE, NON_FINITE,
        INVALID_ARGUMENT; TypeError for other objects.
        """
        return self._run(hidden, self._conditions(latents, strengths), mask, scale)

    def _conditions(
        self, latents: Sequence[int] | Array, strengths: Sequence[float] | Array
    ) -> Conditions:
        """Latents and strengths of a batch, checked, on the device."""
        ids = _whole_numbers("latents", _host(latents), np.int64)
        numbers = np.ascontiguousarray(_host(strengths), np.float32)
        for name, column in (("latents", ids), ("strengths", numbers)):
            if column.ndim != 1 or len(column) != len(ids):
                expected = "[B]" if name == "latents" else f"[{len(ids)}], as latents"
                found = list(column.shape)
                fail(_ffi.STATUS_SHAPE, f"{name} has the shape {found}; expected {expected}")
        if not np.isfinite(numbers).all():
            fail(_ffi.STATUS_NON_FINITE, "strengths has a number that is not finite")
        unknown = [id for id in ids.tolist() if id not in self._places]
        if unknown:
            fail(
                _ffi.STATUS_LATENT_RANGE,
                f"latent {unknown[0]} is not one of the {len(self.ids)} that this steering was made "
                "with; -1 leaves a row as it is",
            )
        places = np.array([self._places[id] for id in ids.tolist()], np.int64)
        return Conditions(self._placed(places), self._placed(numbers))

    def _run(
        self, hidden: Array, conditions: Conditions, mask: Array | None, scale: float
    ) -> Array:
        _arrays.expect_array("hidden", hidden)
        batch = len(conditions.rows)
        if hidden.ndim != 3 or hidden.shape[0] != batch or hidden.shape[2] != self.d_in:
            found, expected = list(hidden.shape), f"[{batch}, S, {self.d_in}]"
            fail(_ffi.STATUS_SHAPE, f"hidden has the shape {found}; expected {expected}")
        _expect_writable(hidden)
        if mask is not None:
            _expect_shape("mask", mask, tuple(hidden.shape[:2]))
            mask = mask if _arrays.strides(mask) is not None else _arrays.contiguous(mask)
        args = _ffi.SteerArgs(
            hidden=_view("hidden", hidden),
            row=_view("row", conditions.rows),
            strength=_view("strength", conditions.strengths),
            mask=_ffi.Tensor() if mask is None else _view("mask", mask),
            scale=scale,
        )
        stream = None if self.device == "cpu" else _arrays.stream(hidden)
        check(library.blockem_steer(self._handle.pointer, byref(args), stream))
        if _arrays.is_torch(hidden) and not hidden.is_inference():
            # Whoever saved hidden for a backward pass is told by autograd.
            sys.modules["torch"].autograd.graph.increment_version(hidden)
        return hidden

    def _placed(self, array: np.ndarray) -> Array:
        """A host array on the device."""
        if self.device == "cpu":
            return array
        import torch

        return torch.from_numpy(array).to(self.device)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f"Steering({len(self)} latents, d_in={self.d_in}, layer={self.layer}, {self.device}, "
            f"{self.backend})"
        )


@dataclass(frozen=True)
class Conditions:
    """What each row of a batch is steered along, and how far."""

    #: [B] int64: places among the steering's latents, or -1
    rows: Array
    #: [B] float32
    strengths: Array


def token_norms(hidden: Array, *, backend: str = "auto", num_threads: int = 0) -> Array:
    """[...] float32 (float64 for float64): the Euclidean norm of each token, summed in float64.

    hidden: [..., d] float32, float16 or bfloat16 (numpy or torch; float64 with backend="reference").
        On CUDA the work is put on torch's current stream, without waiting.
    backend, num_threads: as of :class:`Plan`.

    Raises Error: SHAPE, DTYPE, LAYOUT, and those of devices as :class:`Plan`; TypeError.
    """
    _arrays.expect_array("hidden", hidden)
    if hidden.ndim == 0:
        fail(_ffi.STATUS_SHAPE, "hidden has the shape []; expected [..., d]")
    rows = _arrays.rows("hidden", hidden)
    dtype = "float64" if _arrays.dtype_name(hidden) == "float64" else "float32"
    norms = _arrays.empty(hidden, tuple(hidden.shape[:-1]), dtype)
    args = _ffi.TokenNormsArgs(
        hidden=rows.tensor,
        norms=_arrays.rows("norms", norms, tail=0).tensor,
        backend=_code("backend", backend, _ffi.BACKENDS),
        num_threads=_int32("num_threads", num_threads),
    )
    check(library.blockem_token_norms(byref(args), _arrays.stream(rows.owner)))
    return norms


def activation_scale(batches: Iterable[tuple[Array, Array | None]]) -> float:
    """The scale of strengths: the median over all counted tokens of the norm of the residual stream,
    in BLOCK-EM at the SAE's layer of the base model, without the tokens of system messages. Exact: of
    an even number of tokens the mean of the two in the middle.

    batches: (hidden [..., d], mask [...] or None), as :func:`token_norms` takes hidden; tokens whose
        mask is not 0 count.

    Raises Error: INVALID_ARGUMENT (no token counts), NON_FINITE (one that counts has no finite norm),
    SHAPE, and what :func:`token_norms` raises.
    """
    counted = [np.empty(0)]
    for hidden, mask in batches:
        norms = np.asarray(_host(token_norms(hidden)), np.float64)
        if mask is not None:
            _expect_shape("mask", mask, tuple(hidden.shape[:-1]))
            norms = norms[np.asarray(_host(mask)) != 0]
        counted.append(norms.ravel())
    norms = np.concatenate(counted)
    if not len(norms):
        fail(_ffi.STATUS_INVALID_ARGUMENT, "there is no median: no token has been counted")
    if not np.isfinite(norms).all():
        fail(_ffi.STATUS_NON_FINITE, "the hidden states of a counted token are not finite")
    return float(np.median(norms))


def _view(name: str, x: Array) -> _ffi.Tensor:
    """x as it lies in memory."""
    stride = _arrays.strides(x)
    if stride is None:
        fail(_ffi.STATUS_LAYOUT, f"{name} has strides that are negative or no whole elements")
    return _arrays.tensor(name, x, tuple(x.shape), stride)


def _expect_writable(hidden: Array) -> None:
    if not _arrays.is_torch(hidden):
        if not hidden.flags.writeable:
            raise ValueError("hidden is read-only")
    elif hidden.requires_grad and sys.modules["torch"].is_grad_enabled():
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "hidden requires grad, and what changes it in place has none: steer a clone, or use "
            "blockem.torch.steered",
        )


def _host(x: object) -> object:
    return x.detach().cpu().numpy() if _arrays.is_torch(x) else x
