"""SAEs, latent sets and plans."""

from __future__ import annotations

import ctypes
import itertools
import json
import operator
import os
import weakref
from collections.abc import Mapping, Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _arrays, _ffi
from ._arrays import Array, Rows
from ._library import check, fail, last_error, library


class Handle:
    """Owns an object of the library, which is freed with the last Python object that needs it."""

    def __init__(self, pointer: ctypes.c_void_p, free: Any) -> None:
        self.pointer = pointer
        # At exit the operating system frees; a daemon thread may still be in a call.
        weakref.finalize(self, free, pointer).atexit = False


class Immutable:
    """Copies of an immutable object are the object; it belongs to its process."""

    _handle: Handle

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} cannot be pickled: create it in each process")


def _encode_path(path: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"the path {path!r} holds a NUL character")
    return encoded


def _code(name: str, value: str, codes: Mapping[str, int]) -> int:
    if value not in codes:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            f"{name} is {value!r}; expected one of {', '.join(map(repr, codes))}",
        )
    return codes[value]


def _name(code: int, codes: Mapping[str, int]) -> str:
    return next(name for name, number in codes.items() if number == code)


def _int32(name: str, value: int) -> int:
    # ctypes would wrap a larger number silently.
    number = operator.index(value)
    if not -(2**31) <= number < 2**31:
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} is {number}; expected 32 bits at most")
    return number


def expect(name: str, value: object, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is a {type(value).__name__}; expected {kind}")


class Sae(Immutable):
    """An opened sparse autoencoder: headers are read, rows are not. Any thread may use it.

    Made by :func:`load_sae` or :meth:`from_tensors`.

    Attributes: ``d_in`` (columns of hidden), ``d_sae`` (latents of the dictionary), ``k`` (active
    latents per token of a topk SAE, else None), ``architecture`` ("standard", "jumprelu",
    "gated", "topk"), ``site`` (the place of the model that it reads), ``layer`` (0-based decoder block
    in which the site lies; None when unknown, and for "embedding"), ``dtype`` (of the encoder, such
    as "float32").

    Sites: "block_output" (the residual stream that leaves the block; what enters block l leaves block
    l - 1), "embedding" (the input of block 0), "attention_output" and "mlp_output" (what they add to
    the residual stream), "attention_z" (the heads' values, before the output projection),
    "block_middle" (the residual stream between attention and MLP), "mlp_input" and "attention_input"
    (after their norms), "norm_output" (before the norm's own weight), "keys", "values",
    "linear_input", "module_output" (of a module that ``hook`` names), "block_input" (of a block that
    is not known) or "unknown" (nothing says it, or says it in words that are not known: give
    ``recipe={"site": ..., "layer": ...}`` to :func:`load_sae`).
    """

    def __init__(self, pointer: ctypes.c_void_p) -> None:
        self._handle = Handle(pointer, library.blockem_sae_free)
        info = _ffi.SaeInfo()
        check(library.blockem_sae_info_get(pointer, byref(info)))
        self.d_in: int = info.d_in
        self.d_sae: int = info.d_sae
        self.k: int | None = info.k or None
        self.site: str = _name(info.site, _ffi.SITES)
        self.layer: int | None = None if info.layer < 0 else info.layer
        self.architecture: str = _name(info.activation_kind, _ffi.ARCHITECTURES)
        self.dtype: str = _name(info.dtype, _ffi.DTYPES)

    @staticmethod
    def from_tensors(
        *,
        encoder_weight: Array,
        encoder_bias: Array | None = None,
        decoder_bias: Array | None = None,
        decoder_weight: Array | None = None,
        threshold: Array | None = None,
        gate_bias: Array | None = None,
        magnitude_bias: Array | None = None,
        magnitude_log_scale: Array | None = None,
        architecture: str = "standard",
        k: int = 0,
        encoder_layout: str = "auto",
        apply_b_dec_to_input: bool = False,
        rescale_acts_by_decoder_norm: bool = False,
        input_scale: float = 1.0,
        hook_name: str | None = None,
        selection: str = "largest",
        token_norm: str = "none",
        center_input: bool = False,
    ) -> Sae:
        """An SAE from arrays in host memory (numpy or torch; float32, float16, bfloat16 or
        float64, any strides), which are copied. d is d_in, F is d_sae.

        encoder_weight: [d, F] or [F, d].
        encoder_bias: [F]; all architectures but "gated".
        threshold: [F]; "jumprelu".
        gate_bias, magnitude_bias, magnitude_log_scale: [F] b_gate, b_mag, r_mag; "gated".
        decoder_bias: [d]; with ``apply_b_dec_to_input`` it is subtracted from hidden.
        decoder_weight: [F, d]; :class:`Steering` needs it, and with
            ``rescale_acts_by_decoder_norm`` ("topk") its rows' norms scale the pre-activations.
        k: active latents per token; "topk".
        encoder_layout: "d_f", "f_d", or "auto" to tell from the shape, which needs d != F.
        input_scale: hidden is multiplied by it before encoding.
        hook_name: where hidden is read: a name of TransformerLens ("blocks.19.hook_resid_post"), of a
            Hugging Face module ("model.layers.19.mlp.output") or of sparsify ("layers.19.mlp").
        selection: which k a "topk" SAE keeps of a token: the "largest" above 0, the k largest in
            "magnitude" with their signs, or the largest above 0 of each of k equal "groups";
            "batch" (k T of a batch of T tokens) is described, but no plan computes it natively.
        token_norm: every token is normalised before encoding: "constant_norm_rescale"
            (h sqrt(d) / norm) or "layer_norm" ((h - mean) / (deviation + 1e-5), the deviation
            unbiased); excludes input_scale and center_input.
        center_input: the mean over d of every token is subtracted from hidden before anything
            else, as in TransformerLens' models with ``center_writing_weights``.

        Raises Error: SHAPE, DTYPE, INVALID_ARGUMENT, TENSOR_MISSING, RECIPE_INCOMPLETE,
        NON_FINITE, DEVICE_MISMATCH.
        """
        arrays = {
            "encoder_weight": encoder_weight,
            "encoder_bias": encoder_bias,
            "decoder_bias": decoder_bias,
            "decoder_weight": decoder_weight,
            "threshold": threshold,
            "gate_bias": gate_bias,
            "magnitude_bias": magnitude_bias,
            "magnitude_log_scale": magnitude_log_scale,
        }
        # `owners` lives until the library has copied.
        owners = [_host_view(name, x) for name, x in arrays.items() if x is not None]
        d_in, d_sae = _encoder_shape(encoder_weight, encoder_bias, magnitude_bias, encoder_layout)
        desc = _ffi.SaeDesc(
            **{owner.name: owner.tensor for owner in owners},
            d_in=d_in,
            d_sae=d_sae,
            k=operator.index(k),
            activation_kind=_code("architecture", architecture, _ffi.ARCHITECTURES),
            encoder_layout=_code("encoder_layout", encoder_layout, _ffi.ENCODER_LAYOUTS),
            apply_b_dec_to_input=bool(apply_b_dec_to_input),
            rescale_acts_by_decoder_norm=bool(rescale_acts_by_decoder_norm),
            input_scale=input_scale,
            hook_name=None if hook_name is None else hook_name.encode(),
            selection=_code("selection", selection, _ffi.SELECTIONS),
            token_norm=_code("token_norm", token_norm, _ffi.TOKEN_NORMS),
            center_input=bool(center_input),
        )
        pointer = ctypes.c_void_p()
        check(library.blockem_sae_from_tensors(byref(desc), byref(pointer)))
        return Sae(pointer)

    @property
    def hook(self) -> str | None:
        """Where hidden is read, as the checkpoint names it."""
        return self.describe()["hook"]

    def describe(self) -> dict[str, Any]:
        """The resolved recipe: everything that changes a latent's value, and where it was found.

        Keys: format, architecture, d_in, d_sae, k, dtype, activation, b_dec_subtracted,
        normalization, center_input, scale, threshold {min, median, max}, hook, site, layer,
        hidden_states_index, ...
        """
        length = library.blockem_sae_describe(self._handle.pointer, None, 0)
        buffer = ctypes.create_string_buffer(length + 1)
        if not library.blockem_sae_describe(self._handle.pointer, buffer, length + 1):
            fail(_ffi.STATUS_IO, last_error())
        return json.loads(buffer.value)

    def __repr__(self) -> str:
        return f"Sae({self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}, layer={self.layer})"


@dataclass
class _HostView:
    name: str
    tensor: _ffi.Tensor
    owner: Array


def _host_view(name: str, x: Array) -> _HostView:
    x = _arrays.expect_array(name, x)
    if _arrays.strides(x) is None:
        x = _arrays.contiguous(x)
    if x.ndim > 4:
        fail(_ffi.STATUS_SHAPE, f"{name} has {x.ndim} dimensions; expected 1 or 2")
    return _HostView(name, _arrays.tensor(name, x, tuple(x.shape), _arrays.strides(x)), x)


def _encoder_shape(
    weight: Array, bias: Array | None, magnitude_bias: Array | None, layout: str
) -> tuple[int, int]:
    """d and F: the bias tells which side of the encoder is F."""
    if weight.ndim != 2:
        found = list(weight.shape)
        fail(_ffi.STATUS_SHAPE, f"encoder_weight has the shape {found}; expected [d, F] or [F, d]")
    a, b = weight.shape
    if layout in ("d_f", "f_d"):
        return (a, b) if layout == "d_f" else (b, a)
    one = magnitude_bias if bias is None else bias
    return (a, b) if one is not None and tuple(one.shape) == (b,) else (b, a)


def load_sae(
    path: str | os.PathLike[str],
    *,
    recipe: Mapping[str, Any] | None = None,
    input_scale: float | None = None,
) -> Sae:
    """Opens a checkpoint: the file or folder that its owner publishes (SAELens, Gemma Scope, Llama
    Scope, Goodfire, sparsify, dictionary_learning and others: the README has the table), or a
    safetensors file that states its recipe, also in shards (``model.safetensors.index.json``). PyTorch's ``.pt`` and ``.pth`` are read as data: nothing
    in them runs. Tensors and shapes tell the format.

    Reads headers only; rows are read when a :class:`Plan` is made.

    recipe: configuration keys by their SAELens names that complete or override the file's own,
        such as ``{"architecture": "jumprelu"}``; ``"format"`` names the format of tensors that fit
        several, ``"center_input"`` says whether the SAE reads hidden less its mean over d; ``"site"``
        and ``"layer"``, or ``"hook_name"``, say where it reads.
    input_scale: sqrt(d) / mean norm of hidden, for a file that needs a scale and does not hold it.

    Raises Error: IO (also OSError), FORMAT, TENSOR_MISSING, RECIPE_INCOMPLETE, UNSAFE_PICKLE,
    UNSUPPORTED, NON_FINITE.
    """
    options = _ffi.SaeOptions(
        recipe_json=None if recipe is None else json.dumps(dict(recipe)).encode(),
        input_scale=0.0 if input_scale is None else input_scale,
    )
    pointer = ctypes.c_void_p()
    check(library.blockem_sae_open(_encode_path(path), byref(options), byref(pointer)))
    return Sae(pointer)


class Latents(Immutable):
    """A set of K blocked latents. Their order is the order of every [..., K] array.

    ids: [K] whole numbers, ids in the dictionary.
    signs: [K] +1 blocks a rise of the latent (K+), -1 a fall (K-).
    weights: [K] numbers, finite and not negative; None means 1 for each.

    Raises Error: INVALID_ARGUMENT (empty, a bad sign or weight), SHAPE, LATENT_RANGE,
    LATENT_DUPLICATE.
    """

    def __init__(
        self,
        ids: Sequence[int] | Array,
        signs: Sequence[int] | Array,
        weights: Sequence[float] | Array | None = None,
    ) -> None:
        columns = {
            "ids": (_whole_numbers("ids", ids, np.int64), ctypes.c_int64),
            "signs": (_whole_numbers("signs", signs, np.int8), ctypes.c_int8),
        }
        if weights is not None:
            columns["weights"] = (np.ascontiguousarray(weights, np.float32), ctypes.c_float)
        count = len(columns["ids"][0])
        for name, (column, _) in columns.items():
            if column.shape != (count,):
                fail(
                    _ffi.STATUS_SHAPE,
                    f"{name} has the shape {list(column.shape)}; expected [{count}], as ids",
                )
        desc = _ffi.LatentsDesc(
            n=count,
            **{
                name: column.ctypes.data_as(ctypes.POINTER(kind))
                for name, (column, kind) in columns.items()
            },
        )
        pointer = ctypes.c_void_p()
        check(library.blockem_latents_create(byref(desc), byref(pointer)))
        self._adopt(pointer)

    def _adopt(self, pointer: ctypes.c_void_p) -> None:
        self._handle = Handle(pointer, library.blockem_latents_free)
        info = _ffi.LatentsInfo()
        check(library.blockem_latents_info_get(pointer, byref(info)))
        self._num_positive: int = info.num_positive
        self._ids = np.empty(info.count, np.int64)
        self._signs = np.empty(info.count, np.int8)
        self._weights = np.empty(info.count, np.float32)
        check(
            library.blockem_latents_get(
                pointer,
                self._ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)),
                self._signs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
                self._weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
                info.count,
            )
        )
        for column in (self._ids, self._signs, self._weights):
            column.flags.writeable = False

    def union(self, other: Latents, *, conflicts: str = "error") -> Latents:
        """This set, in its order and with its weights, then what only `other` has, with other's.

        conflicts: what is done with latents that are in both with opposite signs: "error", or
            "keep" this set's sign.

        Raises Error INVALID_ARGUMENT.
        """
        expect("other", other, Latents)
        if conflicts not in ("error", "keep"):
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"conflicts is {conflicts!r}; expected 'error' or 'keep'",
            )
        signs = dict(zip(self.ids.tolist(), self.signs.tolist()))
        opposed = [id for id, sign in zip(other.ids.tolist(), other.signs.tolist())
                   if signs.get(id, sign) != sign]
        if opposed and conflicts == "error":
            fail(
                _ffi.STATUS_INVALID_ARGUMENT,
                f"latent {opposed[0]} is in both sets with opposite signs ({len(opposed)} are): "
                'take it out of one, or give conflicts="keep"',
            )
        new = [i for i, id in enumerate(other.ids.tolist()) if id not in signs]
        return Latents(*(
            np.concatenate([mine, theirs[new]])
            for mine, theirs in zip(
                (self.ids, self.signs, self.weights), (other.ids, other.signs, other.weights)
            )
        ))

    @property
    def ids(self) -> np.ndarray:
        """[K] int64, read-only."""
        return self._ids

    @property
    def signs(self) -> np.ndarray:
        """[K] int8, +1 or -1, read-only."""
        return self._signs

    @property
    def weights(self) -> np.ndarray:
        """[K] float32, read-only."""
        return self._weights

    def save(
        self, path: str | os.PathLike[str], plan: Plan | None = None, sae: Sae | None = None
    ) -> None:
        """Writes K0.json, whole or not at all, with the keys that the set was read with.

        plan: records d, F, identity, activation and layer, so that another SAE is refused later.
        sae: records the sha256 of its weights file too, which reads the whole file; needs plan.

        Raises Error: IO (also OSError), INVALID_ARGUMENT.
        """
        expect("plan", plan, Plan | None)
        expect("sae", sae, Sae | None)
        options = _ffi.LatentsSaveOptions(
            plan=None if plan is None else plan._handle.pointer,
            sae=None if sae is None else sae._handle.pointer,
        )
        file = _encode_path(path)
        check(library.blockem_latents_save(self._handle.pointer, file, byref(options)))

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"Latents({self._num_positive} in K+, {len(self) - self._num_positive} in K-)"


def _whole_numbers(name: str, values: object, kind: type) -> np.ndarray:
    given = np.asarray(values)
    if given.size and given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be whole numbers, not {given.dtype}")
    numbers = np.ascontiguousarray(given, kind)
    if not np.array_equal(numbers, given):
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"{name} has numbers that {numbers.dtype} cannot hold")
    return numbers


def load_latents(path: str | os.PathLike[str], sae: Sae) -> Latents:
    """Reads the authors' K0.json: ``{"K_pos": [ids], "K_neg": [ids]}``, optionally
    ``"weights": {"<id>": w}``. Columns are K_pos then K_neg, in the file's order.

    Raises Error: IO (also OSError), FORMAT, LATENT_RANGE, LATENT_DUPLICATE, PROVENANCE_MISMATCH.
    """
    expect("sae", sae, Sae)
    pointer = ctypes.c_void_p()
    path = _encode_path(path)
    check(library.blockem_latents_open(path, sae._handle.pointer, byref(pointer)))
    latents = Latents.__new__(Latents)
    latents._adopt(pointer)
    return latents


@dataclass(frozen=True)
class Penalty:
    """What :meth:`Plan.penalty` computed. The penalty is ``loss_sum / token_count``."""

    #: sum_t m_t sum_k w_k relu(s_k (z - reference))^2
    loss_sum: float
    #: sum_t m_t
    token_count: float
    #: [K] float64, the share of each latent in loss_sum; with ``per_latent``
    latent_loss: Array | None
    #: [..., d], the gradient of scale * loss_sum; unless ``grad`` is False
    grad_hidden: Array | None
    #: [..., K], m_t 2 w_k s_k relu(s_k (z - reference)) act'(pre); with ``coef``
    coef: Array | None


#: The living plans by `Plan._key`: operators of torch cannot take a Python object. The identity in
#: a key keeps graphs apart that were compiled for another plan, in another process too.
plans: weakref.WeakValueDictionary[str, Plan] = weakref.WeakValueDictionary()
_serials = itertools.count()


class Plan(Immutable):
    """SAE x latent set x device: the blocked rows, gathered and folded.

    Immutable: any number of threads may use one plan. Calls release the GIL.

    device: "cpu" or "cuda:N" (also a torch.device).
    activation: "native" (the file's own rule), "dense_relu" (relu, no threshold, no top-k: what
        BLOCK-EM's authors use) or "preactivation" (no gate).
    backend: "auto", "cpu", "cuda", or "reference", the slow float64 oracle, which also takes
        float64 arrays.
    num_threads: CPU threads of a call; 0 means one for each core. Values do not depend on it.

    A CUDA plan takes torch tensors of its device and works on torch's current stream, without
    waiting for it; its calls may be captured into a graph. Make it before the capture.

    Attributes: ``d_in`` (d), ``d_sae``, ``num_latents`` (K), ``num_positive``, ``site`` and ``layer``
    (those of the SAE), ``identity`` (sha256 of all that z depends on), ``numerics`` (names the arithmetic: plans with
    equal identity and numerics give the same z, bit for bit), ``activation``, ``backend``,
    ``device``, ``num_threads``, ``latents``, ``backward_needs_hidden`` (the SAE normalises every
    token or has a GLU encoder, so that the gradient needs hidden too).

    The native activation of a topk SAE compares every latent of the dictionary: the plan keeps
    them all, and a call takes as long as encoding them.

    Raises Error: INVALID_ARGUMENT, LATENT_RANGE, UNSUPPORTED (native activation of a topk SAE that
    is partial or chooses over a batch),
    NON_FINITE, PROVENANCE_MISMATCH, IO, FORMAT; CUDA_UNAVAILABLE, CUDA_DRIVER, NO_KERNEL_IMAGE,
    DRIVER_TOO_OLD, OUT_OF_MEMORY, CAPTURE_UNSAFE, FORKED.
    """

    def __init__(
        self,
        sae: Sae,
        latents: Latents,
        device: object = "cpu",
        activation: str = "native",
        backend: str = "auto",
        num_threads: int = 0,
    ) -> None:
        expect("sae", sae, Sae)
        expect("latents", latents, Latents)
        options = _plan_options(device, activation, backend, num_threads)
        self._create(sae, latents, options)

    def _create(self, sae: Sae, latents: Latents, options: _ffi.PlanOptions) -> None:
        pointer = ctypes.c_void_p()
        check(
            library.blockem_plan_create(
                sae._handle.pointer, latents._handle.pointer, byref(options), byref(pointer)
            )
        )
        self._handle = Handle(pointer, library.blockem_plan_free)
        info = _ffi.PlanInfo()
        check(library.blockem_plan_info_get(pointer, byref(info)))
        self.d_in: int = info.d_in
        self.d_sae: int = info.d_sae
        self.num_latents: int = info.num_latents
        self.num_positive: int = info.num_positive
        self.site: str = sae.site
        self.layer: int | None = None if info.layer < 0 else info.layer
        self.identity: str = info.identity.decode()
        self.numerics: str = info.numerics.decode()
        self.activation: str = _name(info.activation, _ffi.ACTIVATIONS)
        self.backend: str = _name(info.backend, _ffi.BACKENDS)
        self.device: str = _device_name(info)
        self.num_threads: int = info.num_threads
        self.encode_needs_workspace: bool = bool(info.encode_needs_workspace)
        self.backward_needs_hidden: bool = bool(info.backward_needs_hidden)
        self.latents: Latents = latents
        # Parts are made from these.
        self._sae, self._options = sae, options
        self._key = f"{next(_serials)}-{self.identity[:16]}"
        plans[self._key] = self

    def _workspace_size(self, tokens: int) -> int:
        """Bytes of workspace that a call for so many tokens needs, if it needs any."""
        size = ctypes.c_size_t()
        check(library.blockem_plan_workspace_size(self._handle.pointer, tokens, byref(size)))
        return size.value

    def with_latents(self, latents: Latents) -> Plan:
        """A plan of other latents of the same SAE, with the same device and options.

        Raises Error: what a plan's creation raises.
        """
        expect("latents", latents, Latents)
        plan = Plan.__new__(Plan)
        plan._create(self._sae, latents, self._options)
        return plan

    def columns(self, begin: int, end: int) -> Plan:
        """A plan of W . h over the columns begin to end of hidden, without bias and gate: with
        :meth:`gate`, what a rank needs that holds [..., begin:end] of hidden (tensor parallelism).
        Its ``encode`` gives the columns' share [..., K] of W . h; the ranks add theirs up.
        ``blockem.torch.penalty(tensor_group=...)`` does all of it.

        Raises Error INVALID_ARGUMENT; UNSUPPORTED for SAEs that normalise every token, for GLU
        encoders and for native topk.
        """
        return self._part("columns", begin, end)

    def gate(self) -> Plan:
        """A plan that takes W . h [..., K] in the place of hidden: bias, gate and penalty. The
        gradient that it gives is that of W . h. See :meth:`columns`.

        Raises Error UNSUPPORTED, as there.
        """
        return self._part("gate", 0, 0)

    def _part(self, part: str, begin: int, end: int) -> Plan:
        options = _ffi.PlanOptions.from_buffer_copy(self._options)
        options.part = _ffi.PARTS[part]
        options.column_begin, options.column_end = begin, end
        plan = Plan.__new__(Plan)
        plan._create(self._sae, self.latents, options)
        return plan

    def _workspace(self, hidden: Rows) -> tuple[int, int, Array]:
        """The address and size of this thread's workspace for a call, and its owner."""
        size = self._workspace_size(hidden.tensor.shape[0])
        address, owner = _arrays.workspace(size, hidden.owner)
        return address, size, owner

    def encode(self, hidden: Array) -> Array:
        """z[..., k] = act(W_k . h + b_k): references for later calls.

        hidden: [..., d] float32, float16 or bfloat16 (numpy or torch; float64 with
            backend="reference"). Views are read in place where their leading dimensions flatten.
        Returns [..., K] float32 (float64 for float64), a tensor for a tensor, an array for an
        array; detached. A token's z has the same bits whatever else is in the batch.

        Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH; TypeError for other objects.
        """
        rows = self._hidden(hidden)
        dtype = "float64" if _arrays.dtype_name(hidden) == "float64" else "float32"
        latents = _arrays.empty(hidden, (*hidden.shape[:-1], self.num_latents), dtype)
        args = _ffi.EncodeArgs(hidden=rows.tensor, latents=_arrays.rows("latents", latents).tensor)
        if self.encode_needs_workspace:
            args.workspace, args.workspace_size, owner = self._workspace(rows)
        stream = self._stream(hidden)
        check(library.blockem_encode(self._handle.pointer, byref(args), stream))
        return latents

    def penalty(
        self,
        hidden: Array,
        reference: Array,
        mask: Array | None = None,
        *,
        grad: bool | Array = True,
        accumulate: bool = False,
        scale: float = 1.0,
        coef: bool = False,
        per_latent: bool = False,
    ) -> Penalty:
        """The penalty and its gradient, without autograd (see blockem.torch.penalty for that).
        Its two sums are numbers, so on CUDA it waits for the device; blockem.torch.penalty does not.

        hidden: [..., d] float32, float16 or bfloat16 (float64 with backend="reference").
        reference: [..., K] float32, from :meth:`encode` on the base model's hidden states.
        mask: [...] bool or uint8 (not 0 counts once), float32 (the token's share), or None.
        grad: True returns a new gradient in hidden's dtype, False none; an array [..., d] of
            float32 or hidden's dtype is written to.
        accumulate: adds to the array given as grad: reads, adds in float32, rounds once.
        scale: multiplies the gradient, not loss_sum.
        coef, per_latent: return these too.

        Raises Error: SHAPE, DTYPE, LAYOUT, DEVICE_MISMATCH, OVERLAP; TypeError, ValueError.
        """
        inputs = self._inputs(hidden, reference, mask)
        lead, wide = hidden.shape[:-1], _arrays.dtype_name(hidden) == "float64"
        sums = _arrays.empty(hidden, (2,), "float64")
        args = inputs.args(
            loss_sum=_arrays.rows("loss_sum", sums[:1], tail=0).tensor,
            token_count=_arrays.rows("token_count", sums[1:], tail=0).tensor,
            accumulate=bool(accumulate),
            scale=scale,
        )
        latent_loss = _arrays.empty(hidden, (self.num_latents,), "float64") if per_latent else None
        if latent_loss is not None:
            args.latent_loss = _arrays.rows("latent_loss", latent_loss, tail=0).tensor
        coefs = None
        if coef:
            dtype = "float64" if wide else "float32"
            coefs = _arrays.empty(hidden, (*lead, self.num_latents), dtype)
            args.coef = _arrays.rows("coef", coefs).tensor
        target = self._gradient(hidden, grad, accumulate)
        if target is not None:
            args.grad_hidden = _arrays.rows("grad", target, in_place=True).tensor
        run = library.blockem_penalty_forward if target is None else library.blockem_penalty
        check(run(self._handle.pointer, byref(args), self._stream(hidden)))
        loss_sum, token_count = sums.tolist()
        return Penalty(loss_sum, token_count, latent_loss, target, coefs)

    def __repr__(self) -> str:
        return (
            f"Plan({self.num_latents} latents, d_in={self.d_in}, layer={self.layer}, "
            f"{self.activation}, {self.device}, {self.backend})"
        )

    def _stream(self, x: Array) -> int | None:
        """Where a call on x puts its work; the library refuses an x that is not on the device."""
        return None if self.device == "cpu" else _arrays.stream(x)

    def _hidden(self, hidden: Array) -> Rows:
        _arrays.expect_array("hidden", hidden)
        if hidden.ndim == 0 or hidden.shape[-1] != self.d_in:
            found = list(hidden.shape)
            fail(_ffi.STATUS_SHAPE, f"hidden has the shape {found}; expected [..., {self.d_in}]")
        return _arrays.rows("hidden", hidden)

    def _inputs(self, hidden: Array, reference: Array, mask: Array | None) -> _Inputs:
        """Checks the inputs of a penalty against each other."""
        rows = self._hidden(hidden)
        lead = tuple(hidden.shape[:-1])
        _expect_shape("reference", reference, (*lead, self.num_latents))
        if mask is not None:
            _expect_shape("mask", mask, lead)
        return _Inputs(
            self,
            rows,
            _arrays.rows("reference", reference),
            None if mask is None else _arrays.rows("mask", mask, tail=0),
        )

    def _gradient(self, hidden: Array, grad: bool | Array, accumulate: bool) -> Array | None:
        """The array that receives the gradient."""
        if isinstance(grad, bool):
            if accumulate:
                raise ValueError("accumulate adds to an array: give one as grad")
            shape, dtype = tuple(hidden.shape), _arrays.dtype_name(hidden)
            return _arrays.empty(hidden, shape, dtype) if grad else None
        _expect_shape("grad", grad, tuple(hidden.shape))
        if isinstance(grad, np.ndarray) and not grad.flags.writeable:
            raise ValueError("grad is read-only")
        return grad


def _plan_options(
    device: object, activation: str, backend: str, num_threads: int
) -> _ffi.PlanOptions:
    kind, _, index = str(device).partition(":")
    if index and not index.isdecimal():
        fail(_ffi.STATUS_INVALID_ARGUMENT, f"device is {str(device)!r}; expected like 'cuda:0'")
    return _ffi.PlanOptions(
        device_type=_code("device", kind, _ffi.DEVICES),
        device_index=_int32("the device index", int(index or 0)),
        backend=_code("backend", backend, _ffi.BACKENDS),
        activation=_code("activation", activation, _ffi.ACTIVATIONS),
        num_threads=_int32("num_threads", num_threads),
    )


def _device_name(info: Any) -> str:
    kind = _name(info.device_type, _ffi.DEVICES)
    return kind if kind == "cpu" else f"{kind}:{info.device_index}"


@dataclass
class _Inputs:
    """The inputs of a penalty call, and what keeps their memory alive."""

    plan: Plan
    hidden: Rows
    reference: Rows
    mask: Rows | None

    def args(self, **outputs: object) -> _ffi.PenaltyArgs:
        """Arguments with inputs and this thread's workspace: for one call, on this thread."""
        workspace, size, owner = self.plan._workspace(self.hidden)
        args = _ffi.PenaltyArgs(
            hidden=self.hidden.tensor,
            reference=self.reference.tensor,
            mask=_ffi.Tensor() if self.mask is None else self.mask.tensor,
            workspace=workspace,
            workspace_size=size,
            **outputs,
        )
        args.workspace_owner = owner
        return args


def _expect_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    _arrays.expect_array(name, x)
    if tuple(x.shape) != shape:
        fail(_ffi.STATUS_SHAPE, f"{name} has the shape {list(x.shape)}; expected {list(shape)}")
