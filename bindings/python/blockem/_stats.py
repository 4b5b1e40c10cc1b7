"""Statistics of whole dictionaries, and what moved most between two models."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Mapping
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _arrays, _ffi
from ._arrays import Array, Rows
from ._core import Handle, Latents, Sae, _device_name, _expect_shape, _name, _plan_options, expect
from ._library import check, fail, library


class Stats:
    """Sums over tokens for every latent of an SAE, without an array [tokens, F].

        stats = blockem.Stats(sae)
        for batch in loader:
            stats.update(hidden(batch), base_hidden(batch), mask(batch))
        stats.delta                            # [F]: how far each latent's mean moved

    Sums are in float64, one chain for each latent in the order of the tokens: the same bits however
    the tokens are cut into updates, on any number of threads. z is that of :class:`Plan`.

    sae: the whole dictionary, not a partial file; every row of it is kept on the device.
    device, activation, backend, num_threads: as of :class:`Plan`.

    Attributes: ``d_in``, ``d_sae`` (F), ``site`` and ``layer`` (those of the SAE), ``identity`` (that
    of a plan of all latents), ``numerics``, ``activation``, ``backend``, ``device``, ``num_threads``.

    Raises Error: UNSUPPORTED (a partial file, the native activation of a topk SAE that chooses over a
    batch), and what :class:`Plan` raises.
    """

    def __init__(
        self,
        sae: Sae,
        device: object = "cpu",
        activation: str = "native",
        backend: str = "auto",
        num_threads: int = 0,
    ) -> None:
        expect("sae", sae, Sae)
        options = _plan_options(device, activation, backend, num_threads)
        pointer = ctypes.c_void_p()
        check(library.blockem_stats_create(sae._handle.pointer, byref(options), byref(pointer)))
        self._adopt(Handle(pointer, library.blockem_stats_free), sae)

    def _adopt(self, handle: Handle, sae: Sae) -> None:
        self._handle, self._sae = handle, sae
        self.site: str = sae.site
        info = _ffi.StatsInfo()
        check(library.blockem_stats_info_get(handle.pointer, byref(info)))
        self.d_in: int = info.d_in
        self.d_sae: int = info.d_sae
        self.layer: int | None = None if info.layer < 0 else info.layer
        self.identity: str = info.identity.decode()
        self.numerics: str = info.numerics.decode()
        self.activation: str = _name(info.activation, _ffi.ACTIVATIONS)
        self.backend: str = _name(info.backend, _ffi.BACKENDS)
        self.device: str = _device_name(info)
        self.num_threads: int = info.num_threads
        self._turn = threading.Lock()
        self.reset()

    def fresh(self) -> Stats:
        """Another one without sums, which shares the rows."""
        other = Stats.__new__(Stats)
        other._adopt(self._handle, self._sae)
        return other

    def reset(self) -> None:
        """Forgets all sums."""
        self._state: Array | None = None
        self._count: Array | None = None

    def update(
        self, hidden: Array, base_hidden: Array | None = None, mask: Array | None = None
    ) -> None:
        """Adds tokens. Either every update has base_hidden or none has.

        hidden: [..., d] float32, float16 or bfloat16 (numpy or torch; float64 with
            backend="reference"). On CUDA tensors of the device, on torch's current stream, without
            waiting.
        base_hidden: [..., d], the base model's hidden states of the same tokens.
        mask: [...] bool or uint8 (not 0 counts once), float32 (the token's share) or None; see
            :func:`prompt_shares`. What it leaves out contributes nothing, even NaN.

        Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH, INVALID_ARGUMENT; TypeError.
        """
        rows = self._rows("hidden", hidden)
        shape = tuple(hidden.shape)
        base = None
        if base_hidden is not None:
            _expect_shape("base_hidden", base_hidden, shape)
            base = self._rows("base_hidden", base_hidden)
        if mask is not None:
            _expect_shape("mask", mask, shape[:-1])
        shares = None if mask is None else _arrays.rows("mask", mask, tail=0)
        with self._turn:
            self._run(rows, base, shares)

    def _run(self, hidden: Rows, base: Rows | None, mask: Rows | None) -> None:
        height = _ffi.STATS_ROWS if base is None else _ffi.STATS_ROWS_WITH_BASE
        state, count = self._state, self._count
        if state is None:
            state, count = (
                _arrays.empty(hidden.owner, shape, "float64")
                for shape in ((height, self.d_sae), (1,))
            )
        elif state.shape[0] != height:
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                "base_hidden must come with every update or with none: the sums of this one would "
                "be of other tokens; see Stats.fresh",
            )
        tokens, size = hidden.tensor.shape[0], ctypes.c_size_t()
        pointer, has_base = self._handle.pointer, int(base is not None)
        check(library.blockem_stats_workspace_size(pointer, tokens, has_base, byref(size)))
        workspace, owner = _arrays.workspace(size.value, hidden.owner)
        args = _ffi.StatsArgs(
            hidden=hidden.tensor,
            base_hidden=_ffi.Tensor() if base is None else base.tensor,
            mask=_ffi.Tensor() if mask is None else mask.tensor,
            state=_arrays.rows("state", state, in_place=True).tensor,
            token_count=_arrays.rows("token_count", count, tail=0, in_place=True).tensor,
            accumulate=self._state is not None,
            workspace=workspace,
            workspace_size=size.value,
        )
        stream = None if self.device == "cpu" else _arrays.stream(hidden.owner)
        check(library.blockem_stats_update(pointer, byref(args), stream))
        del owner
        self._state, self._count = state, count

    def _rows(self, name: str, hidden: Array) -> Rows:
        _arrays.expect_array(name, hidden)
        if hidden.ndim == 0 or hidden.shape[-1] != self.d_in:
            found = list(hidden.shape)
            fail(_ffi.STATUS_SHAPE, f"{name} has the shape {found}; expected [..., {self.d_in}]")
        return _arrays.rows(name, hidden)

    # ---- What was counted ----------------------------------------------------------------------

    @property
    def token_count(self) -> float:
        """The sum of all shares."""
        return 0.0 if self._count is None else float(self._count[0])

    @property
    def mean(self) -> np.ndarray:
        """[F] float64, as all that follow: the mean of z."""
        return self._mean("sum")

    @property
    def mean_square(self) -> np.ndarray:
        """The mean of z^2."""
        return self._mean("square_sum")

    @property
    def rate(self) -> np.ndarray:
        """On which share of the tokens z is not 0."""
        return self._mean("active")

    @property
    def max(self) -> np.ndarray:
        """The largest z."""
        return self._row("max").copy()

    @property
    def base_mean(self) -> np.ndarray:
        """The mean of the base model's z."""
        return self._mean("base_sum")

    @property
    def base_mean_square(self) -> np.ndarray:
        """The mean of the base model's z^2."""
        return self._mean("base_square_sum")

    @property
    def base_rate(self) -> np.ndarray:
        """On which share of the tokens the base model's z is not 0."""
        return self._mean("base_active")

    @property
    def base_max(self) -> np.ndarray:
        """The base model's largest z."""
        return self._row("base_max").copy()

    @property
    def delta(self) -> np.ndarray:
        """mean - base_mean. With :func:`prompt_shares` as masks it is Stage 1's Delta: the mean over
        prompts of the mean over the prompt's tokens."""
        return (self._row("sum") - self._row("base_sum")) / self._tokens()

    @property
    def rise(self) -> np.ndarray:
        """The mean of relu(z - base)^2: what each latent would pay in K+."""
        return self._mean("rise_square_sum")

    @property
    def fall(self) -> np.ndarray:
        """The mean of relu(base - z)^2: and in K-."""
        return self._mean("fall_square_sum")

    def _mean(self, name: str) -> np.ndarray:
        return self._row(name) / self._tokens()

    def _tokens(self) -> float:
        count = self.token_count
        if count == 0:
            fail(_ffi.STATUS_INVALID_ARGUMENT, "there is no mean: no token has been counted")
        return count

    def _row(self, name: str) -> np.ndarray:
        state, row = _host(self._state), _ffi.STATS_STATE[name]
        if state is None:
            fail(_ffi.STATUS_INVALID_ARGUMENT, "there are no sums yet: call update")
        if row >= len(state):
            fail(_ffi.STATUS_INVALID_ARGUMENT, "the updates came without base_hidden")
        return state[row]

    # ---- Sums from elsewhere -------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The sums on the host, and what they are of: for files, and for :meth:`merge` elsewhere.

        ``state`` is [4 or 10, F] float64 with the rows of BLOCKEM_STATS_... in the C header (None
        before the first update), ``token_count`` a float; ``identity``, ``numerics``.
        """
        state = _host(self._state)
        return {
            "identity": self.identity,
            "numerics": self.numerics,
            "token_count": self.token_count,
            "state": None if state is None else state.copy(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from sums that :meth:`state_dict` gave.

        Raises Error: PROVENANCE_MISMATCH (of another dictionary or arithmetic), SHAPE.
        """
        state = self._checked(state_dict)
        with self._turn:
            if state is None:
                return self.reset()
            count = np.array([state_dict["token_count"]])
            self._state, self._count = self._placed(state.copy()), self._placed(count)

    def merge(self, other: Stats | Mapping[str, Any]) -> None:
        """Adds the sums of other tokens: another one's, or what its :meth:`state_dict` gave. The
        maxima become the larger ones.

        Raises Error: PROVENANCE_MISMATCH (of another dictionary or arithmetic), SHAPE,
        INVALID_ARGUMENT (one has base_hidden and the other has not).
        """
        given = other.state_dict() if isinstance(other, Stats) else other
        theirs, own = self._checked(given), self.state_dict()
        if theirs is None:
            return
        if own["state"] is not None:
            if own["state"].shape != theirs.shape:
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    "one of the two has sums of a base model, the other has not",
                )
            merged = own["state"] + theirs
            for row in (_ffi.STATS_STATE["max"], _ffi.STATS_STATE["base_max"]):
                if row < len(merged):
                    merged[row] = np.maximum(own["state"][row], theirs[row])
            given = {
                **given,
                "state": merged,
                "token_count": own["token_count"] + given["token_count"],
            }
        self.load_state_dict(given)

    def _checked(self, state_dict: Mapping[str, Any]) -> np.ndarray | None:
        """The sums of a state, if they are of this dictionary."""
        for key in ("identity", "numerics"):
            if state_dict[key] != getattr(self, key):
                fail(
                    _ffi.STATUS_PROVENANCE_MISMATCH,
                    f"the sums have the {key} {state_dict[key]}, these have "
                    f"{getattr(self, key)}: use the same SAE, activation and kind of device",
                )
        state = state_dict["state"]
        if state is None:
            return None
        state = np.asarray(state, np.float64)
        heights = (_ffi.STATS_ROWS, _ffi.STATS_ROWS_WITH_BASE)
        if state.ndim != 2 or state.shape[0] not in heights or state.shape[1] != self.d_sae:
            found = list(state.shape)
            fail(_ffi.STATUS_SHAPE, f"state is {found}; expected [4 or 10, {self.d_sae}]")
        return state

    def _placed(self, array: np.ndarray) -> Array:
        """A host array on the device."""
        if self.device == "cpu":
            return array
        import torch

        return torch.from_numpy(array).to(self.device)

    def __reduce__(self) -> Any:
        raise TypeError("Stats cannot be pickled: take its state_dict, create one in each process")

    def __repr__(self) -> str:
        return (
            f"Stats({self.d_sae} latents, d_in={self.d_in}, layer={self.layer}, {self.activation}, "
            f"{self.device}, {self.backend}, {self.token_count:g} tokens)"
        )


def _host(x: Array | None) -> np.ndarray | None:
    return x.cpu().numpy() if _arrays.is_torch(x) else x


def prompt_shares(mask: Array) -> Array:
    """[B, S] float32: for each row, a prompt, every counted token's share of it. As a mask of
    :meth:`Stats.update` they make every prompt count once, however long it is.

    mask: [B, S], tokens that count are not 0.

    Raises Error: SHAPE, INVALID_ARGUMENT (a prompt without a token).
    """
    _arrays.expect_array("mask", mask)
    if mask.ndim != 2:
        fail(_ffi.STATUS_SHAPE, f"mask has the shape {list(mask.shape)}; expected [B, S]")
    counted = mask != 0
    lengths = counted.sum(-1)
    empty = [row for row, length in enumerate(lengths.tolist()) if length == 0]
    if empty:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"prompt {empty[0]} of the batch has no token")
    shares = counted / lengths[:, None]
    return shares.float() if _arrays.is_torch(mask) else shares.astype(np.float32)


@dataclass(frozen=True)
class Movers:
    """The latents that moved most: those that rose, the farthest first, then those that fell."""

    #: [n] int64
    ids: np.ndarray
    #: [n] int8: +1 where the latent rose (K+), -1 where it fell (K-)
    signs: np.ndarray
    #: [n] float64: how far
    deltas: np.ndarray

    def latents(self) -> Latents:
        """The set with these ids and signs."""
        return Latents(self.ids, self.signs)

    def __len__(self) -> int:
        return len(self.ids)


def movers(delta: np.ndarray, count: int = 250) -> Movers:
    """The pool of BLOCK-EM's Stage 1, aware of the sign: up to `count` latents that rose and up to
    `count` that fell, the farthest first, equals by their id.

    delta: [F], such as :attr:`Stats.delta`.

    Raises Error: NON_FINITE, SHAPE, INVALID_ARGUMENT.
    """
    delta = np.asarray(delta, np.float64)
    if delta.ndim != 1:
        fail(_ffi.STATUS_SHAPE, f"delta has the shape {list(delta.shape)}; expected [F]")
    if count < 1:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"count is {count}; expected at least 1")
    wrong = np.flatnonzero(~np.isfinite(delta))
    if len(wrong):
        fail(_ffi.STATUS_NON_FINITE, f"delta of latent {wrong[0]} is {delta[wrong[0]]}")
    rising, falling = (
        order[sign * delta[order] > 0][:count]
        for sign in (1, -1)
        for order in [np.argsort(-sign * delta, kind="stable")]
    )
    ids = np.concatenate([rising, falling])
    signs = np.repeat(np.array([1, -1], np.int8), [len(rising), len(falling)])
    return Movers(ids, signs, delta[ids])


def stage1(
    stats: Stats, batches: Iterable[tuple[Array, Array, Array]], count: int = 250
) -> tuple[Movers, Stats]:
    """BLOCK-EM's Stage 1: how far each latent's activation moves from the base model to the
    misaligned one, and the pool of candidates.

        Delta_k = mean over prompts of (mean over its tokens of z_k - the same of the base model)

    stats: gives the dictionary; its own sums stay as they are.
    batches: (hidden [B, S, d], base_hidden [B, S, d], mask [B, S]) of both models on the same
        prompts, one in each row; the mask marks the tokens that count.
    count: candidates of either sign.

    Returns the pool and the statistics over prompts.
    """
    expect("stats", stats, Stats)
    sums = stats.fresh()
    for hidden, base_hidden, mask in batches:
        sums.update(hidden, base_hidden, prompt_shares(mask))
    return movers(sums.delta, count), sums
