"""The penalty and the encoder in JAX: functions for jit, grad, vmap and shard_map.

They are custom calls of libblockem's own XLA handlers, on the CPU and on CUDA, so that nothing
returns to Python. Needs jax 0.5 or newer.
"""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from . import _ffi
from ._core import Plan, expect
from ._library import check, fail, library

__all__ = ["Parts", "encode", "penalty", "sharded_penalty"]


class Parts(NamedTuple):
    """What ``penalty(..., per_latent=True)`` returns."""

    #: 0-d, differentiable: sum_t m_t sum_k w_k relu(s_k (z - reference))^2
    loss_sum: jax.Array
    #: 0-d: sum_t m_t
    count: jax.Array
    #: [K], without a gradient: the share of each latent in loss_sum
    latent_loss: jax.Array


def penalty(
    plan: Plan | Sequence[Plan],
    hidden: jax.Array,
    reference: jax.Array,
    mask: jax.Array | None = None,
    *,
    per_latent: bool = False,
) -> tuple[jax.Array, jax.Array] | Parts:
    """BLOCK-EM's penalty in two parts: minimise ``task_loss + lam * loss_sum / count``.

        loss_sum = sum_t m_t sum_k w_k relu(s_k (z[t,k] - reference[t,k]))^2
        count    = sum_t m_t

    Two parts, because a mean of means is wrong under gradient accumulation and data parallelism:
    add up loss_sum and count over micro-batches and devices (jax.lax.psum), and divide once.

    plan: on the devices that run the program. Keep it for as long as what was compiled with it. A
        program that runs on several CUDA devices of this process takes a list: the same plan on
        each.
    hidden: [..., d] float32, float16 or bfloat16 (float64 with backend="reference").
    reference: [..., K] float32, from :func:`encode` on the base model's hidden states; it gets no
        gradient.
    mask: [...] bool or uint8 (not 0 counts once), float32 (the token's share), or None. A token
        with mask 0 contributes nothing, even if its hidden is NaN.
    per_latent: returns :class:`Parts`, with the share of each latent too.

    Returns loss_sum, differentiable once in reverse mode with respect to hidden, and count: 0-d
    float32 (float64 for float64). The backward pass keeps [..., K] coefficients, not hidden (it
    keeps both where ``plan.backward_needs_hidden``); its gradient has hidden's dtype.

    vmap makes one call of the library for each index. Under plain jit, XLA gathers sharded arrays
    for a call that it does not know: use :func:`sharded_penalty`, or call this in a shard_map.

    Raises Error: SHAPE, DTYPE, DEVICE_MISMATCH, INVALID_ARGUMENT; TypeError for other objects. What
    only shows when the program runs is a JaxRuntimeError with the same text.
    """
    plan = _bound(plan)
    hidden = _hidden(plan, hidden)
    lead, tokens = hidden.shape[:-1], math.prod(hidden.shape[:-1])
    reference = _array(plan, "reference", reference, _value_dtypes(plan))
    _expect_shape("reference", reference, (*lead, plan.num_latents))
    if mask is not None:
        mask = _array(plan, "mask", mask, ("bool", "uint8", "float32"))
        _expect_shape("mask", mask, lead)
        mask = mask.reshape(tokens)
    parts = _penalty(
        _Call(plan, hidden.dtype.name, bool(per_latent)),
        hidden.reshape(tokens, plan.d_in),
        reference.reshape(tokens, plan.num_latents),
        mask,
    )
    return Parts(*parts) if per_latent else parts[:2]


def encode(plan: Plan | Sequence[Plan], hidden: jax.Array) -> jax.Array:
    """z[..., k] = act(W_k . h + b_k): references for later calls, without a gradient.

    hidden: [..., d] float32, float16 or bfloat16 (float64 with backend="reference").
    Returns [..., K] float32 (float64 for float64), with the bits of ``plan.encode``.

    Raises Error: SHAPE, DTYPE, DEVICE_MISMATCH, INVALID_ARGUMENT; TypeError for other objects.
    """
    plan = _bound(plan)
    hidden = jax.lax.stop_gradient(_hidden(plan, hidden))
    lead, tokens = hidden.shape[:-1], math.prod(hidden.shape[:-1])
    call = _Call(plan, hidden.dtype.name)
    outputs = (
        ((tokens, plan.num_latents), call.value_dtype),
        call.workspace(tokens if plan.encode_needs_workspace else None),
    )
    latents, _ = _run(plan, "encode", outputs, hidden.reshape(tokens, plan.d_in))
    return latents.reshape(*lead, plan.num_latents)


def sharded_penalty(
    plan: Plan | Sequence[Plan],
    hidden: jax.Array,
    reference: jax.Array,
    mask: jax.Array | None = None,
    *,
    mesh: Mesh,
    spec: PartitionSpec,
) -> tuple[jax.Array, jax.Array]:
    """:func:`penalty` of arrays whose tokens are spread over a mesh: loss_sum and count of all.

    Every device computes its own tokens, and the two sums are added up over the mesh: nothing else
    is exchanged, neither here nor in the backward pass.

    mesh: a jax.sharding.Mesh.
    spec: how the dimensions before the last one are split, as of a jax.sharding.PartitionSpec:
        P("data"), or P("data", "sequence") for [batch, tokens, d]. d and K are whole everywhere.

    Other arguments, results and errors: as :func:`penalty`.
    """
    expect("mesh", mesh, Mesh)
    expect("spec", spec, PartitionSpec)
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in spec if axis is not None]
    names = tuple(name for axis in axes for name in axis)
    arrays = [hidden, reference] if mask is None else [hidden, reference, mask]

    def local(*shards: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss_sum, count = penalty(plan, *shards)
        return jax.lax.psum(loss_sum, names), jax.lax.psum(count, names)

    sums = (PartitionSpec(), PartitionSpec())
    return _shard_map(local, mesh, (spec,) * len(arrays), sums)(*arrays)


# The custom calls. Their arrays are [T, ..]; vmap puts further dimensions before that, which the
# handlers loop over.

_HANDLERS = ("encode", "penalty_forward", "penalty_backward")


def _register() -> None:
    for name in _HANDLERS:
        for platform in ("cpu", "CUDA"):
            handler = getattr(library, f"blockem_xla_{name}_{platform.lower()}")
            capsule = jax.ffi.pycapsule(handler)
            jax.ffi.register_ffi_target(f"blockem_{name}", capsule, platform=platform)


@dataclass(frozen=True)
class _Call:
    """What is fixed when a call is traced."""

    plan: Plan
    #: of hidden and its gradient
    dtype: str
    per_latent: bool = False

    @property
    def value_dtype(self) -> str:
        return "float64" if self.dtype == "float64" else "float32"

    def workspace(self, tokens: int | None) -> tuple[tuple[int], str]:
        """Shape and dtype of the output that is the call's scratch memory."""
        # The handler begins at a multiple of 64.
        return ((0 if tokens is None else self.plan._workspace_size(tokens) + 64,), "uint8")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _run(plan: Plan, handler: str, outputs: tuple, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """A custom call with outputs of these shapes and dtypes."""
    results = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    call = jax.ffi.ffi_call(f"blockem_{handler}", results, vmap_method="broadcast_all")
    return _varying_as(inputs[0], tuple(call(*inputs, plan=_name(plan))))


@_run.defjvp
def _refuse_to_differentiate(plan: Plan, handler: str, outputs: tuple, *_: tuple) -> tuple:
    raise NotImplementedError("blockem.jax.penalty is differentiable once, not twice")


def _varying_as(x: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """In a shard_map, outputs differ over the axes of the mesh over which x does; JAX takes those
    of a custom call to be the same everywhere."""
    aval = jax.typeof(x) if hasattr(jax, "typeof") else None
    kind = getattr(aval, "manual_axis_type", None)
    axes = tuple(getattr(aval, "vma", ()) if kind is None else kind.varying)
    if not axes:
        return outputs
    if hasattr(jax.lax, "pcast"):
        return tuple(jax.lax.pcast(output, axes, to="varying") for output in outputs)
    return tuple(jax.lax.pvary(output, axes) for output in outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _penalty(
    call: _Call, hidden: jax.Array, reference: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _forward(call, hidden, reference, mask)[0]


def _forward(
    call: _Call, hidden: jax.Array, reference: jax.Array, mask: jax.Array | None
) -> tuple[tuple, tuple]:
    tokens, latents, dtype = hidden.shape[0], call.plan.num_latents, call.value_dtype
    outputs = (
        ((), dtype),
        ((), dtype),
        ((latents if call.per_latent else 0,), dtype),
        ((tokens, latents), dtype),
        call.workspace(tokens),
    )
    inputs = [hidden, reference] if mask is None else [hidden, reference, mask]
    loss_sum, count, latent_loss, coef, _ = _run(call.plan, "penalty_forward", outputs, *inputs)
    kept = hidden if call.plan.backward_needs_hidden else None
    return (loss_sum, count, latent_loss), (coef, kept)


def _backward(call: _Call, kept: tuple, upstream: tuple) -> tuple:
    coef, hidden = kept
    tokens = coef.shape[0]
    outputs = (
        ((tokens, call.plan.d_in), call.dtype),
        call.workspace(None if hidden is None else tokens),
    )
    inputs = [coef, upstream[0]] if hidden is None else [coef, upstream[0], hidden]
    grad, _ = _run(call.plan, "penalty_backward", outputs, *inputs)
    return grad, None, None


_penalty.defvjp(_forward, _backward)


# Plans in programs: by a name that the same plan has in every process, so that cached and exported
# programs find it.

_names: weakref.WeakKeyDictionary[Plan, str] = weakref.WeakKeyDictionary()


def _name(plan: Plan) -> str:
    """The plan's name in programs, to which it is bound."""
    name = _names.get(plan)
    if name is None:
        digest = hashlib.sha256(f"{plan.identity} {plan.numerics} {plan.num_threads} ".encode())
        digest.update(plan.latents.signs.tobytes() + plan.latents.weights.tobytes())
        name = digest.hexdigest()
        check(library.blockem_xla_bind(plan._handle.pointer, name.encode()))
        _names[plan] = name
    return name


def _bound(plans: Plan | Sequence[Plan]) -> Plan:
    """The plan, or the first of a list of the same plan on several devices."""
    several = [plans] if isinstance(plans, Plan) else plans
    if not isinstance(several, Sequence) or not several:
        raise TypeError(f"plan is a {type(plans).__name__}; expected a Plan, or a list of them")
    for plan in several:
        expect("plan", plan, Plan)
    if len({_name(plan) for plan in several}) > 1:
        fail(
            _ffi.STATUS_INVALID_ARGUMENT,
            "the plans of a list must be the same on several devices: one SAE, latent set and "
            f"activation, not {', '.join(map(repr, several))}",
        )
    return several[0]


# Arguments


def _hidden(plan: Plan, hidden: jax.Array) -> jax.Array:
    dtypes = ("float32", "float16", "bfloat16", "float64")
    hidden = _array(plan, "hidden", hidden, dtypes if plan.backend == "reference" else dtypes[:3])
    if hidden.ndim == 0 or hidden.shape[-1] != plan.d_in:
        found = list(hidden.shape)
        fail(_ffi.STATUS_SHAPE, f"hidden has the shape {found}; expected [..., {plan.d_in}]")
    return hidden


def _value_dtypes(plan: Plan) -> tuple[str, ...]:
    return ("float32", "float64") if plan.backend == "reference" else ("float32",)


def _array(plan: Plan, name: str, x: Any, dtypes: tuple[str, ...]) -> jax.Array:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a jax or numpy array")
    if x.dtype.name not in dtypes:
        fail(_ffi.STATUS_DTYPE, f"{name} is {x.dtype.name}; expected one of {', '.join(dtypes)}")
    array = jnp.asarray(x)
    if array.dtype != x.dtype:
        fail(
            _ffi.STATUS_DTYPE,
            f"{name} is {x.dtype.name}, which jax made {array.dtype.name}: set jax_enable_x64",
        )
    # Where a traced array will be is not known here: the handler looks.
    if not isinstance(array, jax.core.Tracer):
        platforms = {device.platform for device in array.devices()}
        if (platforms == {"cpu"}) != (plan.device == "cpu"):
            fail(
                _ffi.STATUS_DEVICE_MISMATCH,
                f"{name} is on {', '.join(platforms)}, the plan on {plan.device}",
            )
    return array


def _expect_shape(name: str, x: jax.Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        fail(_ffi.STATUS_SHAPE, f"{name} has the shape {list(x.shape)}; expected {list(shape)}")


def _shard_map(function: Any, mesh: Mesh, in_specs: tuple, out_specs: tuple) -> Any:
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    from jax.experimental.shard_map import shard_map

    # Its check knows no custom calls.
    return shard_map(function, mesh, in_specs, out_specs, check_rep=False)


_register()
