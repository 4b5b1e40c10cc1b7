"""Reference caches."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ctypes import byref
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _arrays, _ffi
from ._arrays import Array
from ._core import Plan, _code, _encode_path, _name, _whole_numbers, expect
from ._library import Error, check, fail, library
from ._site import Site, site_of

if TYPE_CHECKING:
    import torch


#: The note of a cache that is of a module which was stated by name.
_MODULE = "module"


class Cache:
    """z of the base model at a plan's latents, per example, in one file.

        with blockem.Cache("base.cache", plan, base_model=name, dtype="bfloat16", mode="create") as cache:
            cache.fill(model, loader)                  # the base model runs once for each example
        cache = blockem.Cache("base.cache", plan, base_model=name, dtype="bfloat16")
        reference = cache.reference(batch)             # [B, T, K], no forward pass

    An example is known by all that the base model sees of it: token ids, positions, and the rest of
    its batch, such as images, audio and token types (:meth:`reference` has the rules). What no key
    covers is refused. Each latent is a column of its own: plans that share latents share columns, and
    a larger set adds only what is new. The file belongs to one base model, site (with its layer), dtype
    of hidden and numerics; another one is CACHE_STALE.

    What was stored survives a process that is killed at any moment. One process writes, or any
    number read (CACHE_BUSY otherwise). Threads may share a Cache; processes each open their own,
    after a fork too.

    plan: gives the latents and the numerics.
    base_model: names the weights in 1 to 255 bytes, by name and revision or by
        :func:`blockem.base_model_digest`. None, when reading or writing an existing file, compares
        nothing.
    site: where hidden states are read, in the words of :class:`Sae`'s ``site``, or the name of a module
        as of :func:`blockem.torch.attach`; None takes the plan's.
    layer: 0-based decoder block in which the site lies; None takes the plan's. Of an SAE that says
        nothing, the block whose output is encoded.
    dtype: of the hidden states that are encoded ("float32", "float16", "bfloat16"); None, for an
        existing file, compares nothing.
    mode: "read", "write" (the file is there) or "create" (it is made if it is not).
    ignore: names of a batch's items that the model is not given.
    context: names of other inputs of the model, and of whom their rows are: "row" ([B, ...]), "token"
        ([B, T, ...]), or "batch" (all of it belongs to every example of the batch).

    Attributes: ``plan``, ``base_model``, ``site``, ``layer`` (None for "embedding"), ``dtype``,
    ``numerics``, ``ignore``, ``context``.

    Raises Error: CACHE_STALE, CACHE_BUSY, IO (also OSError), FORMAT, INVALID_ARGUMENT, DTYPE,
    UNSUPPORTED.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        plan: Plan,
        *,
        base_model: str | None = None,
        site: str | None = None,
        layer: int | None = None,
        dtype: object = None,
        mode: str = "read",
        ignore: Iterable[str] = (),
        context: Mapping[str, str] | None = None,
    ) -> None:
        expect("plan", plan, Plan)
        self.ignore, self.context = _names(ignore), dict(context or {})
        for name, belongs in self.context.items():
            if belongs not in ("row", "token", "batch"):
                fail(
                    _ffi.STATUS_INVALID_ARGUMENT,
                    f'context has {name}: {belongs!r}; expected "row", "token" or "batch"',
                )
        dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        module = None
        if site is not None and ("." in site or site == "block_input"):
            stated = site_of(plan, layer, site)
            site, layer, module = stated.kind, stated.layer, stated.hook if stated.exact else None
        options = _ffi.CacheOptions(
            mode=_code("mode", mode, _ffi.CACHE_MODES),
            hidden_dtype=-1 if dtype is None else _code("dtype", dtype, _ffi.DTYPES),
            layer=-1 if layer is None else layer,
            base_model=None if base_model is None else base_model.encode(),
            plan=plan._handle.pointer,
            site=0 if site is None else _code("site", site, _ffi.SITES),
        )
        if base_model is not None and "\0" in base_model:
            fail(_ffi.STATUS_INVALID_ARGUMENT, "base_model holds a NUL character")
        # Of each medium, the token that stands for it, when they were read.
        self._placeholders: dict[str, int] | None = None
        self._options, self._gate, self._running = options, threading.Lock(), 0
        self.path = os.fspath(path)
        # The options point to the first plan; another may be used later.
        self.plan = self._first_plan = plan
        self._open(options.mode)
        try:
            info = self._info()
            module = self._agreed_module(module)
        except Error:
            # The exception may keep this object for long, and with it the file's lock.
            self.close()
            raise
        self.base_model: str = info.base_model.decode()
        self.site: str = _name(info.site, _ffi.SITES)
        self.layer: int | None = None if info.layer == -1 else info.layer
        exact = module is not None
        self._site = Site(self.site, self.layer, module if exact else plan._sae.hook, exact)
        self.dtype: str = _name(info.hidden_dtype, _ffi.DTYPES)
        self.numerics: str = info.numerics.decode()

    def _agreed_module(self, module: str | None) -> str | None:
        """The module that hidden states are of, which must be the file's, where one was stated."""
        noted = self.note(_MODULE)
        if module in (None, noted):
            return noted
        if self._mode == "read" or len(self):
            fail(
                _ffi.STATUS_CACHE_STALE,
                f"{self.path}: stale: it holds z for the site '{noted or 'of the plan'}', expected "
                f"{module!r}; open the cache that was made for it, or make a new file",
            )
        self.put_note(_MODULE, module)
        return module

    def _open(self, mode: int) -> None:
        self._closed, self._options.mode = True, mode
        pointer = ctypes.c_void_p()
        path = _encode_path(self.path)
        check(library.blockem_cache_open(path, byref(self._options), byref(pointer)))
        self._pointer = pointer
        self._free = weakref.finalize(self, library.blockem_cache_free, pointer)
        # At exit the operating system closes; a daemon thread may still be in a call.
        self._free.atexit = False
        self._closed = False

    def close(self) -> None:
        """Lets other processes have the file, when calls in other threads are done. Nothing is lost
        without it."""
        with self._gate:
            self._closed = True
            if self._running == 0:
                self._free()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Examples of which any z is stored."""
        return self._info().num_examples

    def key(
        self,
        token_ids: Array | Sequence[int],
        positions: Any = None,
        *,
        context: bytes = b"",
    ) -> bytes:
        """Digest of an example: token ids (without padding), and their positions as the model gets
        them, which are 0, 1, 2, ... by default.

        context: all else that the model sees of the example, or a digest of it: pixels, audio, token
            types. :meth:`fill` and :meth:`reference` make it of the items of a batch.

        Raises Error: INVALID_ARGUMENT, SHAPE, FORKED.
        """
        ids = _whole_numbers("token_ids", token_ids, np.int64)
        places = None if positions is None else _whole_numbers("positions", positions, np.int64)
        if ids.ndim != 1 or (places is not None and places.shape != ids.shape):
            fail(_ffi.STATUS_SHAPE, "token_ids and positions of an example must be [n]")
        example = _ffi.CacheExample(
            token_ids=ids.ctypes.data,
            positions=None if places is None else places.ctypes.data,
            num_tokens=len(ids),
            context=context,
            context_size=len(context),
        )
        key = ctypes.create_string_buffer(_ffi.CACHE_KEY_SIZE)
        self._call(library.blockem_cache_key, byref(example), key)
        return key.raw

    def note(self, name: str) -> str | None:
        """The text that :meth:`put_note` stored; None where there is none.

        Raises Error: IO, FORMAT, FORKED.
        """
        length = ctypes.c_size_t()
        self._call(library.blockem_cache_get_note, name.encode(), None, 0, byref(length))
        text = ctypes.create_string_buffer(length.value + 1)
        self._call(library.blockem_cache_get_note, name.encode(), text, len(text), byref(length))
        return text.value.decode() or None

    def put_note(self, name: str, text: str) -> None:
        """Keeps a short text (up to 64 KiB) beside the examples. It is written once: the same again
        changes nothing. :meth:`fill` keeps the model's placeholder tokens so.

        Raises Error: CACHE_STALE (there is another of this name), INVALID_ARGUMENT, IO, FORMAT, FORKED.
        """
        if "\0" in name + text:
            fail(_ffi.STATUS_INVALID_ARGUMENT, f"the note {name!r} holds a NUL character")
        self._call(library.blockem_cache_put_note, name.encode(), text.encode())

    def missing(self, keys: Sequence[bytes]) -> np.ndarray:
        """[n, K] bool: where z of a latent is not stored for an example.

        Raises Error: IO, FORMAT, FORKED.
        """
        missing = np.empty((len(keys), self.plan.num_latents), np.uint8)
        plan = self.plan._handle.pointer
        self._call(
            library.blockem_cache_missing, plan, _joined(keys), len(keys), missing.ctypes.data
        )
        return missing.astype(bool)

    def put(self, keys: Sequence[bytes], latents: Sequence[Array]) -> int:
        """Stores z of examples, all of them or none; on the disk when it returns. What is there
        stays. Returns how many columns were new.

        latents: [T_i, K] float32 on the host for each key, from ``plan.encode``.

        Raises Error: SHAPE, DTYPE, DEVICE_MISMATCH, NON_FINITE, INVALID_ARGUMENT (opened for
        reading), IO, FORMAT, FORKED.
        """
        written, plan = ctypes.c_uint64(), self.plan._handle.pointer
        views = _views(keys, latents)
        self._call(
            library.blockem_cache_put, plan, _joined(keys), views, len(keys), byref(written)
        )
        return written.value

    def get(self, keys: Sequence[bytes], out: Sequence[Array]) -> None:
        """Reads z of examples into arrays [T_i, K] float32 on the host: the bits that were stored.
        Nothing is written unless all are there.

        Raises Error: CACHE_MISS, CACHE_STALE, SHAPE, DTYPE, DEVICE_MISMATCH, IO, FORMAT, FORKED.
        """
        for i, array in enumerate(out):
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                raise ValueError(f"out[{i}] is read-only")
        views, plan = _views(keys, out), self.plan._handle.pointer
        self._call(library.blockem_cache_get, plan, _joined(keys), views, len(keys))

    def fill(
        self,
        model: torch.nn.Module,
        batches: Iterable[Any],
        *,
        layers: str | None = None,
        packed: bool = False,
        progress: bool = True,
        base_adapters: Sequence[str] | None = None,
    ) -> int:
        """Runs the base model on the examples that are not complete, and stores their z. Returns how
        many it stored. Stopped at any moment, it goes on where it was.

        model: a Hugging Face causal language model, with its vision or audio towers where it has any;
            of a PeftModel, the base (adapters off). It runs in eval mode without gradients and stops
            after the layer. Use the autocast and attention of the training run: z carries their
            rounding.
        batches: mappings such as a DataLoader of the training set gives, with all that the model is
            given: ``input_ids`` [B, T], ``attention_mask``, ``position_ids``, ``pixel_values`` and so
            on; see :meth:`reference`.
        layers: dotted name of the list of decoder layers, where it cannot be found.
        packed: see :meth:`reference`.
        progress: shows a bar of tqdm on standard error, where tqdm is installed.
        base_adapters: of a PeftModel, the names of adapters that belong to the base and stay on; must
            be given where the model has several.

        Raises Error: CACHE_STALE (hidden has another dtype, or the file was filled from a model with
        other placeholder tokens or base_adapters), NON_FINITE, INVALID_ARGUMENT (also: a batch has an item that no key
        covers; a PeftModel without its adapters is not its base, as with PiSSA), SHAPE, UNSUPPORTED (a
        model with an encoder), IO.
        """
        from . import _torch_cache

        return _torch_cache.fill(
            self, model, batches,
            layers=layers, packed=packed, progress=progress, base_adapters=base_adapters,
        )  # fmt: skip

    def use(self, plan: Plan) -> None:
        """From now on the latents are those of another plan, of the same site and numerics. What is
        stored of them is found; the file does not change.

        Raises Error: CACHE_STALE, FORKED.
        """
        expect("plan", plan, Plan)
        before, self.plan = self.plan, plan
        try:
            self.missing([])
        except Error:
            self.plan = before
            raise

    def extend(
        self,
        plan: Plan,
        model: torch.nn.Module,
        batches: Iterable[Any],
        *,
        layers: str | None = None,
        packed: bool = False,
        progress: bool = True,
        base_adapters: Sequence[str] | None = None,
        process_group: Any = None,
    ) -> int:
        """:meth:`use` and :meth:`fill`: stores what the new plan's latents lack, of those examples
        alone, and returns of how many. For a set of latents that grows while a run goes on. A cache
        that was opened for reading is written to meanwhile, and reads again afterwards; then nobody
        else may have it open. If it fails, the cache has the latents that it had.

        On several ranks all must call it, each with a cache opened for reading: the first fills it,
        so batches must be all of the data there, and the model whole (UNSUPPORTED under FSDP and
        ZeRO-3: stop, fill, resume).

        process_group: those ranks; None is torch.distributed's default group where it is
            initialised.
        The rest is that of :meth:`fill`.

        Raises Error: CACHE_BUSY, INVALID_ARGUMENT (another thread is in a call), UNSUPPORTED, and
        what :meth:`fill` raises.
        """
        from . import _torch_cache

        expect("plan", plan, Plan)
        return _torch_cache.extend(
            self, plan, model, batches,
            layers=layers, packed=packed, progress=progress, base_adapters=base_adapters,
            process_group=process_group,
        )  # fmt: skip

    def reference(self, batch: Any, *, packed: bool = False) -> torch.Tensor:
        """[B, T, K] float32 on the device of ``input_ids``: z of the base model at each token, and 0
        at padding. For ``blockem.torch``, whose references may be a callable.

        batch: a mapping with ``input_ids`` [B, T]; ``attention_mask`` [B, T] of 0 and 1 tells padding,
            ``position_ids`` the positions ([B, T], or [n, B, T] for positions in n dimensions), which
            otherwise are those in the row. On the host it costs no wait for the device.

            Token types and the like [B, T, ...] count at the example's tokens. Images, videos and
            audio belong to the examples whose placeholder tokens they fill, also where patches of
            all images lie in one tensor with a grid (``image_grid_thw``); where that cannot be told,
            it is an error that says what to do. Labels, return flags and text change nothing. Every
            other item is an error: name it in ``ignore`` or ``context`` of the cache. What counts
            does so bit for bit, floating point in the dtype that it has (whole numbers by value), so
            give batches as the data collator makes them, and pad features of audio to one length.
        packed: a row holds several examples, and one begins where positions fall back, as in
            padding-free training. The model must keep them apart; else z of an example would depend
            on its neighbours.

        Raises Error: CACHE_MISS (names the example), CACHE_STALE, INVALID_ARGUMENT (an item that no
        key covers), SHAPE, IO, FORMAT, FORKED.
        """
        from . import _torch_cache

        return _torch_cache.reference(self, batch, packed=packed)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self)} examples"
        place = self.site if self.layer is None else f"{self.site} of layer {self.layer}"
        return f"Cache({self.path!r}, {state}, {self.base_model!r}, {place}, {self.dtype})"

    def __reduce__(self) -> Any:
        raise TypeError("a Cache cannot be pickled: open it in each process")

    def _info(self) -> _ffi.CacheInfo:
        info = _ffi.CacheInfo()
        self._call(library.blockem_cache_info_get, byref(info))
        return info

    @property
    def _mode(self) -> str:
        return _name(self._options.mode, _ffi.CACHE_MODES)

    @contextlib.contextmanager
    def _released(self) -> Iterator[None]:
        """The file is closed for a while, and opened as it was."""
        with self._gate:
            if self._closed or self._running:
                why = "the cache is closed" if self._closed else "another thread is in a call"
                fail(_ffi.STATUS_INVALID_ARGUMENT, f"{self.path}: {why}")
            mode = self._options.mode
            self._closed = True
            self._free()
        try:
            yield
        finally:
            with self._gate:
                self._open(mode)

    def _call(self, function: Any, *arguments: Any) -> None:
        """Calls the library with the handle, which is not freed meanwhile."""
        with self._gate:
            if self._closed:
                fail(_ffi.STATUS_INVALID_ARGUMENT, f"{self.path}: the cache is closed")
            self._running += 1
        try:
            check(function(self._pointer, *arguments))
        finally:
            with self._gate:
                self._running -= 1
                if self._closed and self._running == 0:
                    self._free()


def _names(names: Iterable[str]) -> frozenset[str]:
    if isinstance(names, str):
        raise TypeError(f"ignore is the text {names!r}; expected names, like ({names!r},)")
    return frozenset(names)


def _joined(keys: Sequence[bytes]) -> bytes:
    for i, key in enumerate(keys):
        if not isinstance(key, bytes) or len(key) != _ffi.CACHE_KEY_SIZE:
            raise TypeError(f"keys[{i}] is no key: Cache.key makes them")
    return b"".join(keys)


def _views(keys: Sequence[bytes], latents: Sequence[Array]) -> ctypes.Array:
    """A tensor for each array, which stays the caller's."""
    if len(keys) != len(latents):
        fail(_ffi.STATUS_SHAPE, f"{len(keys)} keys and {len(latents)} arrays")
    views = (_ffi.Tensor * len(latents))()
    for i, array in enumerate(latents):
        name = f"latents[{i}]"
        stride = _arrays.strides(_arrays.expect_array(name, array))
        if stride is None or array.ndim > 4:
            fail(_ffi.STATUS_LAYOUT, f"{name} has strides that are negative or no whole elements")
        views[i] = _arrays.tensor(name, array, tuple(array.shape), stride)
    return views
