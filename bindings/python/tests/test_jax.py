"""blockem.jax: values, gradients and manners of a JAX function, on the CPU."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from oracle import ACTIVATIONS, ARCHITECTURES, Case

import blockem
import blockem.jax

EPS = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2, "float64": 1e-9}


def formula(case: Case, hidden: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
    """The penalty's sum in JAX's own operations."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    a = {name: jnp.asarray(x, wide) for name, x in case.arrays.items()}
    g = jnp.matmul(hidden.astype(wide), a["encoder_weight"][case.ids].T, precision="highest")
    if case.architecture == "gated":
        pre = jnp.exp(a["magnitude_log_scale"][case.ids]) * g + a["magnitude_bias"][case.ids]
    else:
        pre = g + a["encoder_bias"][case.ids]
    if case.activation == "preactivation":
        z = pre
    elif case.activation == "native" and case.architecture == "jumprelu":
        z = pre * (pre > a["threshold"][case.ids])
    elif case.activation == "native" and case.architecture == "gated":
        z = jax.nn.relu(pre) * (g + a["gate_bias"][case.ids] > 0)
    else:
        z = jax.nn.relu(pre)
    rise = jax.nn.relu(jnp.asarray(case.signs, wide) * (z - reference))
    return (mask[..., None] * jnp.asarray(case.weights, wide) * rise**2).sum()


def arrays(case: Case, lead: tuple[int, ...], dtype: str = "float32") -> tuple:
    """hidden, reference and a ragged float mask."""
    tokens = int(np.prod(lead))
    hidden = jnp.asarray(case.hidden(tokens)).reshape(*lead, case.d_in).astype(dtype)
    z = case.latent(case.hidden(tokens, seed=8)).z
    reference = jnp.asarray(z.reshape(*lead, case.num_latents), jnp.float32)
    rng = np.random.default_rng(5)
    mask = rng.random(lead) * (rng.random(lead) > 0.3)
    return hidden, reference, jnp.asarray(mask, jnp.float32)


def same_bits(found: object, want: object) -> None:
    found, want = jax.tree.leaves(found), jax.tree.leaves(want)
    assert len(found) == len(want)
    for x, y in zip(found, want):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.fixture
def small() -> tuple[Case, blockem.Plan, tuple]:
    case = Case("jumprelu", "native", 24, 6)
    return case, case.plan(), arrays(case, (4, 5))


# ---- Values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_against_autograd_and_the_oracle(architecture: str, activation: str, dtype: str) -> None:
    case = Case(architecture, activation, 45, 8)
    plan = case.plan()
    hidden, reference, mask = arrays(case, (5, 6), dtype)

    def loss(hidden: jax.Array) -> jax.Array:
        loss_sum, count = blockem.jax.penalty(plan, hidden, reference, mask)
        return 0.3 * loss_sum / count

    found, grad = jax.jit(jax.value_and_grad(loss))(hidden)
    assert found.shape == () and found.dtype == jnp.float32 and grad.dtype == hidden.dtype

    exact = np.asarray(hidden, np.float64).reshape(30, 45)
    flat = np.asarray(reference).reshape(30, 8), np.asarray(mask).reshape(30)
    want = case.penalty(exact, *flat)
    assert found == pytest.approx(0.3 * want.loss_sum / want.token_count, rel=1e-5)
    scale = 0.3 / want.token_count
    top = np.abs(want.grad_hidden).max() * scale
    np.testing.assert_allclose(
        np.asarray(grad, np.float64).reshape(30, 45), scale * want.grad_hidden,
        rtol=EPS[dtype], atol=top * EPS[dtype],
    )
    independent = jax.grad(lambda h: 0.3 * formula(case, h, reference, mask) / mask.sum())(hidden)
    np.testing.assert_allclose(
        np.asarray(grad, np.float64), np.asarray(independent, np.float64),
        rtol=2 * EPS[dtype], atol=2 * top * EPS[dtype],
    )


@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 0), (3, 1, 5), (130,)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (64, 17)])
def test_odd_shapes(lead: tuple[int, ...], shape: tuple[int, int]) -> None:
    case = Case("gated", "native", *shape)
    plan = case.plan()
    hidden, reference, mask = arrays(case, lead)
    grad = jax.grad(lambda h: blockem.jax.penalty(plan, h, reference, mask)[0])(hidden)
    loss_sum, count = blockem.jax.penalty(plan, hidden, reference, mask)
    want = plan.penalty(*map(np.asarray, (hidden, reference, mask)))
    same_bits(grad, want.grad_hidden)
    same_bits((loss_sum, count), tuple(map(np.float32, (want.loss_sum, want.token_count))))
    z = blockem.jax.encode(plan, hidden)
    same_bits(z, plan.encode(np.asarray(hidden)))


def test_float64(small) -> None:
    """In a process of its own: jax_enable_x64 is for all of it."""
    run_script(
        """
        jax.config.update("jax_enable_x64", True)
        for architecture in oracle.ARCHITECTURES:
            case = oracle.Case(architecture, "native", 6, 4)
            plan = case.plan(backend="reference")
            hidden = jnp.asarray(case.hidden(5), "float64")
            reference = jnp.asarray(case.latent(case.hidden(5, seed=3)).z)
            mask = jnp.asarray([1, 0.5, 0, 2, 1], "float32")
            loss = lambda h: blockem.jax.penalty(plan, h, reference, mask)[0]
            assert loss(hidden).dtype == blockem.jax.encode(plan, hidden).dtype == jnp.float64
            jax.test_util.check_grads(loss, (hidden,), order=1, modes=["rev"])
            found = jax.grad(lambda h: 3 * loss(h))(hidden)
            want = jax.grad(lambda h: 3 * test_jax.formula(case, h, reference, mask))(hidden)
            # The library folds exp(r_mag) of a gated SAE in float32.
            near = 1e-6 if architecture == "gated" else 1e-12
            np.testing.assert_allclose(found, want, rtol=near, atol=near)
        """
    )


def test_masks() -> None:
    case = Case("standard", "native", 24, 6)
    plan = case.plan()
    hidden, reference, _ = arrays(case, (4, 5))
    kept = np.random.default_rng(0).random((4, 5)) > 0.4
    poisoned = jnp.where(kept[..., None], hidden, jnp.nan)

    def run(h: jax.Array, *mask: jax.Array) -> tuple:
        loss = lambda h: blockem.jax.penalty(plan, h, reference, *mask)
        return jax.value_and_grad(loss, has_aux=True)(h)

    want = run(hidden, jnp.asarray(kept))
    assert want[0][0] > 0 and want[0][1] == kept.sum()
    for mask in (kept, kept.astype(np.uint8) * 3, kept.astype(np.float32)):
        same_bits(run(poisoned, jnp.asarray(mask)), want)
        same_bits(run(np.asarray(poisoned), mask), want)
    assert not np.asarray(want[1])[~kept].any()
    same_bits(run(hidden), run(hidden, jnp.ones((4, 5), bool)))
    (loss_sum, count), grad = run(poisoned * jnp.nan, jnp.zeros((4, 5), bool))
    assert loss_sum == count == 0 and not np.asarray(grad).any()
    assert np.isnan(run(poisoned)[0][0])


def test_the_penalty_of_the_base_is_exactly_zero(small) -> None:
    _, plan, (hidden, _, mask) = small
    half = hidden.astype(jnp.bfloat16)
    loss = jax.jit(lambda h: blockem.jax.penalty(plan, h, blockem.jax.encode(plan, h), mask)[0])
    for x in (hidden, half):
        assert loss(x) == 0 and not np.asarray(jax.grad(loss)(x), np.float32).any()


def test_per_latent_shares(small) -> None:
    _, plan, inputs = small
    parts = jax.jit(lambda *x: blockem.jax.penalty(plan, *x, per_latent=True))(*inputs)
    want = plan.penalty(*map(np.asarray, inputs), per_latent=True)
    same_bits(parts[:2], blockem.jax.penalty(plan, *inputs))
    same_bits(parts.latent_loss, want.latent_loss.astype(np.float32))
    assert parts.loss_sum > 0
    assert parts.latent_loss.sum() == pytest.approx(float(parts.loss_sum), rel=1e-5)


@pytest.mark.parametrize("norm", ["constant_norm_rescale", "layer_norm"])
def test_the_gradient_goes_through_a_norm_and_the_latents_that_win(norm: str) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((40, 16)), 0.1 * rng.standard_normal(40)
    sae = blockem.Sae.from_tensors(
        encoder_weight=weight.astype(np.float32), encoder_bias=bias.astype(np.float32),
        encoder_layout="f_d", architecture="topk", k=9, token_norm=norm,
    )
    ids = np.array([3, 0, 21, 39])
    plan = blockem.Plan(sae, blockem.Latents(ids, [1, 1, 1, 1]))
    assert plan.encode_needs_workspace and plan.backward_needs_hidden
    hidden = jnp.asarray(rng.standard_normal((2, 30, 16)) + 0.4, jnp.float32)
    zero = jnp.zeros((2, 30, 4))

    def formula(x: jax.Array) -> jax.Array:
        if norm == "layer_norm":
            x = x - x.mean(-1, keepdims=True)
            x = x / (x.std(-1, ddof=1, keepdims=True) + 1e-5)
        else:
            x = x * 4 / jnp.linalg.norm(x, axis=-1, keepdims=True)
        pre = jnp.matmul(x, jnp.asarray(weight.T, x.dtype), precision="highest") + bias
        kth = jnp.sort(pre, -1)[..., -9:-8]
        return jnp.where(pre >= kth, jax.nn.relu(pre), 0)[..., ids]

    loss = lambda h: 2.5 * blockem.jax.penalty(plan, h, zero)[0]
    found, grad = jax.jit(jax.value_and_grad(loss))(hidden)
    want, expected = jax.value_and_grad(lambda h: 2.5 * (formula(h) ** 2).sum())(hidden)
    assert found == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5 * jnp.abs(expected).max())
    z = blockem.jax.encode(plan, hidden)
    np.testing.assert_allclose(z, formula(hidden), rtol=1e-4, atol=1e-5)
    # vmap: a workspace for each index.
    each = jax.vmap(jax.grad(lambda h: 2.5 * blockem.jax.penalty(plan, h, zero[0])[0]))(hidden)
    same_bits(each, grad)
    same_bits(jax.vmap(lambda h: blockem.jax.encode(plan, h))(hidden), z)


# ---- Transformations -----------------------------------------------------------------------------


def test_jit_gives_the_same_bits(small) -> None:
    _, plan, inputs = small

    def both(hidden: jax.Array, reference: jax.Array, mask: jax.Array) -> tuple:
        loss = lambda h: blockem.jax.penalty(plan, h, reference, mask)
        return jax.value_and_grad(loss, has_aux=True)(hidden), blockem.jax.encode(plan, hidden)

    same_bits(jax.jit(both)(*inputs), both(*inputs))


def test_scaled_and_shared_gradients(small) -> None:
    """The upstream gradient is a factor, lambda may be traced, and two uses add up."""
    _, plan, inputs = small
    loss = lambda h, lam: lam * blockem.jax.penalty(plan, h, *inputs[1:])[0]
    one = jax.grad(loss)(inputs[0], 1.0)
    same_bits(jax.jit(jax.grad(loss))(inputs[0], jnp.float32(4.0)), 4 * one)
    twice = jax.grad(lambda h: loss(h, 1.0) + loss(h, 3.0))(inputs[0])
    np.testing.assert_allclose(twice, 4 * one, rtol=1e-6)


def test_reference_and_mask_get_no_gradient(small) -> None:
    _, plan, (hidden, reference, mask) = small
    loss = lambda r, m: blockem.jax.penalty(plan, hidden, r, m)[0]
    for grad in jax.grad(loss, argnums=(0, 1))(reference, mask):
        assert not np.asarray(grad).any()
    assert not np.asarray(jax.grad(lambda h: blockem.jax.encode(plan, h).sum())(hidden)).any()


def test_vmap(small) -> None:
    _, plan, (hidden, reference, mask) = small
    loss = lambda h, r, m: blockem.jax.penalty(plan, h, r, m)
    grad = jax.grad(lambda *x: 2 * loss(*x)[0])
    each = [loss(*one) for one in zip(hidden, reference, mask)]
    same_bits(jax.vmap(loss)(hidden, reference, mask), jax.tree.map(lambda *x: jnp.stack(x), *each))
    whole = grad(hidden, reference, mask)
    same_bits(jax.vmap(grad)(hidden, reference, mask), whole)
    same_bits(jax.jit(jax.vmap(jax.vmap(grad)))(hidden, reference, mask), whole)
    # One mask and one reference for all; another axis.
    shared = jax.vmap(loss, (1, None, None))(hidden[:, :3], reference[:, 0], mask[:, 0])
    for i in range(3):
        one = loss(hidden[:, i], reference[:, 0], mask[:, 0])
        same_bits([x[i] for x in shared], list(one))
    z = jax.vmap(lambda h: blockem.jax.encode(plan, h), 1)(hidden)
    same_bits(jnp.swapaxes(z, 0, 1), blockem.jax.encode(plan, hidden))
    none = jax.vmap(loss)(hidden[:0], reference[:0], mask[:0])
    assert [x.shape for x in none] == [(0,), (0,)]


def test_reverse_mode_once(small) -> None:
    _, plan, (hidden, reference, mask) = small
    loss = lambda h: blockem.jax.penalty(plan, h, reference, mask)[0]
    same_bits(jax.jacrev(loss)(hidden), jax.grad(loss)(hidden))
    each = jax.vmap(lambda h, r, m: blockem.jax.penalty(plan, h, r, m)[0])
    jacobian = jax.jacrev(lambda h: each(h, reference, mask))(hidden)
    whole = jax.grad(loss)(hidden)
    for i in range(4):
        same_bits(jacobian[i, i], whole[i])
        assert not np.asarray(jacobian[i].at[i].set(0)).any()
    for second in (jax.grad(lambda h: jax.grad(loss)(h).sum()), jax.hessian(loss),
                   jax.grad(lambda h: jax.grad(lambda x: loss(x) ** 2)(h).sum())):
        with pytest.raises((NotImplementedError, TypeError), match="once, not twice|custom_vjp"):
            second(hidden)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (hidden,), (hidden,))


def test_scan_and_checkpoint(small) -> None:
    """Gradient accumulation in a scan, with rematerialisation."""
    _, plan, inputs = small

    @jax.checkpoint
    def part(w: jax.Array, x: tuple) -> jax.Array:
        return blockem.jax.penalty(plan, x[0] * w, *x[1:])[0]

    def accumulated(w: jax.Array) -> jax.Array:
        add = lambda total, x: (total + part(w, x), None)
        return jax.lax.scan(add, jnp.zeros(()), inputs)[0]

    one = jnp.ones(24)
    want = jax.grad(lambda w: blockem.jax.penalty(plan, inputs[0] * w, *inputs[1:])[0])(one)
    np.testing.assert_allclose(jax.jit(jax.grad(accumulated))(one), want, rtol=1e-5, atol=1e-6)


def test_programs_for_cuda_are_lowered(small) -> None:
    """Without a device they cannot be compiled; tests/capi/xla.c calls their handlers."""
    _, plan, inputs = small
    loss = lambda *x: blockem.jax.penalty(plan, *x)[0]
    lowered = jax.jit(jax.grad(loss)).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "@blockem_penalty_forward" in lowered and "@blockem_penalty_backward" in lowered


# ---- Many devices --------------------------------------------------------------------------------


def sharded_case() -> tuple:
    assert len(jax.devices()) == 4, "conftest.py asks XLA for four host devices"
    case = Case("jumprelu", "native", 24, 6)
    plan, (hidden, reference, mask) = case.plan(), arrays(case, (8, 6))
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((24, 24)) / 5, jnp.float32)
    return plan, weight, (hidden, reference, mask > 0)


@pytest.mark.parametrize("axes, spec", [((4,), P("data")), ((2, 2), P("data", "sequence")),
                                        ((2, 2), P(("data", "sequence"))), ((2, 2), P("data"))])
def test_sharded_gradients_gather_nothing(axes: tuple[int, ...], spec: P) -> None:
    plan, weight, inputs = sharded_case()
    mesh = Mesh(np.array(jax.devices()).reshape(axes), ("data", "sequence")[: len(axes)])
    spread = [jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs]
    weight = jax.device_put(weight, NamedSharding(mesh, P()))

    def step(penalty: object, weight: jax.Array, x: jax.Array, *rest: jax.Array) -> tuple:
        def loss(weight: jax.Array, x: jax.Array) -> tuple:
            loss_sum, count = penalty(x @ weight, *rest)
            return loss_sum / count, (loss_sum, count)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weight, x)

    alone = jax.jit(functools.partial(step, functools.partial(blockem.jax.penalty, plan)))
    together = jax.jit(functools.partial(
        step, functools.partial(blockem.jax.sharded_penalty, plan, mesh=mesh, spec=spec)
    ))
    program = together.lower(weight, *spread).compile().as_text()
    exchanges = collectives(program)
    assert set(exchanges) == {"all-reduce"}, exchanges
    # The two sums, and the gradient of the weight, which every device has whole.
    allowed = {"f32[]", "f32[24,24]"}
    if not hasattr(jax, "shard_map") and len(axes) == 2 and spec == P("data"):
        # Older versions add up copies of x's gradient over the axis that does not split it.
        allowed.add("f32[4,6,24]")
    assert set(exchanges["all-reduce"]) <= allowed, exchanges
    # XLA's own way with a custom call that nobody mapped: the check above can fail.
    assert "all-gather" in collectives(alone.lower(weight, *spread).compile().as_text())

    (value, sums), (dw, dx) = together(weight, *spread)
    one = jax.devices()[0]
    here = [jax.device_put(np.asarray(x), one) for x in (weight, *inputs)]
    (want, expected), (dw1, dx1) = alone(*here)
    assert dx.sharding.is_equivalent_to(spread[0].sharding, 3)
    sums, expected, dx, dx1, dw, dw1 = jax.tree.map(np.asarray, (sums, expected, dx, dx1, dw, dw1))
    assert sums[1] == expected[1] and sums[0] == pytest.approx(float(expected[0]), rel=1e-6)
    assert value == pytest.approx(float(want), rel=1e-6) and expected[0] > 0
    top = np.abs(dx1).max()
    np.testing.assert_allclose(dx, dx1, rtol=1e-5, atol=1e-6 * top)
    np.testing.assert_allclose(dw, dw1, rtol=1e-5, atol=1e-5 * np.abs(dw1).max())


def collectives(program: str) -> dict[str, list[str]]:
    """The shapes that a compiled program exchanges, by kind."""
    found: dict[str, list[str]] = {}
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-(?:permute|broadcast)"
    for shapes, kind in re.findall(rf"= (.+?) ({kinds})(?:-start)?\(", program):
        found.setdefault(kind, []).extend(re.findall(r"\w+\[[\d,]*\]", shapes))
    return found


def test_sharded_without_a_mask_and_in_a_shard_map_of_the_caller() -> None:
    plan, _, (hidden, reference, mask) = sharded_case()
    mesh = Mesh(np.array(jax.devices()), ("data",))
    found = blockem.jax.sharded_penalty(plan, hidden, reference, mesh=mesh, spec=P("data"))
    want = blockem.jax.penalty(plan, hidden, reference)
    assert found[1] == want[1] == 48 and found[0] == pytest.approx(float(want[0]), rel=1e-6)

    def local(hidden: jax.Array, reference: jax.Array, mask: jax.Array) -> jax.Array:
        def loss(hidden: jax.Array) -> jax.Array:
            return blockem.jax.penalty(plan, hidden, reference, mask)[0]

        return jax.grad(loss)(hidden)

    spread = blockem.jax._shard_map(local, mesh, (P("data"),) * 3, P("data"))
    one = jax.grad(lambda h: blockem.jax.penalty(plan, h, reference, mask)[0])(hidden)
    same_bits(jax.jit(spread)(hidden, reference, mask), one)


# ---- Training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora() -> object:
    sys.path.insert(0, str(ROOT / "examples" / "jax"))
    try:
        import lora
    finally:
        sys.path.pop(0)
    return lora


def test_training_is_that_of_autograd(lora: object) -> None:
    """LoRA fine-tuning with the library and with the formula: the same losses and penalties."""
    a = lora.dictionary()
    ids, signs = np.arange(10), np.repeat([1, -1], 5)
    sae = blockem.Sae.from_tensors(**a, encoder_layout="f_d")
    plan = blockem.Plan(sae, blockem.Latents(ids, signs))
    base = lora.Model(jax.random.key(0))
    batches = lora.sentences(4, factor=5, shift=2, steps=25)

    def z(hidden: jax.Array) -> jax.Array:
        rows = jnp.asarray(a["encoder_weight"][ids].T)
        return jax.nn.relu(jnp.matmul(hidden, rows, precision="highest") + a["encoder_bias"][ids])

    def formula(hidden: jax.Array, reference: jax.Array, mask: jax.Array) -> tuple:
        rise = jax.nn.relu(signs * (z(hidden) - reference))
        return (mask[..., None] * rise**2).sum(), mask.sum()

    encode = lambda hidden: blockem.jax.encode(plan, hidden)
    penalty = lambda *arrays: blockem.jax.penalty(plan, *arrays)
    found = lora.finetune(base, batches, encode, penalty, 1.0)
    want = lora.finetune(base, batches, z, formula, 1.0)
    assert found.penalties[0] == 0 and found.penalties.max() > 1e-3
    np.testing.assert_allclose(found.losses, want.losses, rtol=1e-5)
    np.testing.assert_allclose(found.penalties, want.penalties, rtol=1e-5, atol=1e-9)
    # It is not the trajectory of a run without the penalty.
    plain = lora.finetune(base, batches, z, formula, 0.0)
    assert plain.penalties[-1] > 5 * found.penalties[-1]


def test_the_example(capsys: pytest.CaptureFixture, lora: object) -> None:
    lora.main()
    text = capsys.readouterr().out
    rows = {line.split()[0]: [float(x) for x in re.findall(r"\d+\.\d+", line)]
            for line in text.splitlines() if line.startswith(("plain", "blocked"))}
    (_, _, _, moved), (first, last, zero, held) = rows["plain"], rows["blocked"]
    assert zero == 0 and held < 0.2 * moved, text
    assert last < 0.6 * first, text


# ---- Plans, processes, errors --------------------------------------------------------------------


def test_errors_name_the_argument(small) -> None:
    case, plan, (hidden, reference, mask) = small
    call = blockem.jax.penalty
    for args, error, text in [
        ((plan, hidden[..., :-1], reference), ValueError, r"hidden.*\[4, 5, 23\].*\[\.\.\., 24\]"),
        ((plan, hidden, reference[:-1]), ValueError, r"reference.*\[3, 5, 6\].*\[4, 5, 6\]"),
        ((plan, hidden, reference, mask[0]), ValueError, r"mask.*\[5\].*\[4, 5\]"),
        ((plan, hidden.astype(int), reference), ValueError, "hidden is int32"),
        ((plan, np.float64(hidden), reference), ValueError, "hidden is float64"),
        ((plan, hidden.astype(complex), reference), ValueError, "hidden is complex64"),
        ((plan, hidden, reference.astype("float16")), ValueError, "reference is float16"),
        ((plan, hidden, reference, mask.astype(int)), ValueError, "mask is int32"),
        ((plan, [1.0], reference), TypeError, "hidden is a list"),
        ((plan, hidden, reference, [1]), TypeError, "mask is a list"),
        ((hidden, plan, reference), TypeError, "plan is a"),
        (([], hidden, reference), TypeError, "plan is a list"),
        (([plan, hidden], hidden, reference), TypeError, "plan is a"),
        (([plan, Case("jumprelu", "dense_relu", 24, 6).plan()], hidden, reference), ValueError,
         "must be the same on several devices"),
        ((case.plan(backend="reference"), np.float64(hidden), reference), ValueError,
         "jax_enable_x64"),
    ]:
        with pytest.raises(error, match=text):
            call(*args)
        if text.startswith(("hidden", "plan")):
            with pytest.raises(error, match=text):
                blockem.jax.encode(*args[:2])
    with pytest.raises(blockem.Error) as caught:
        jax.jit(lambda h: call(plan, h, reference))(hidden[..., :-1])
    assert caught.value.name == "SHAPE"
    with pytest.raises(TypeError, match="mesh is a NoneType"):
        blockem.jax.sharded_penalty(plan, hidden, reference, mesh=None, spec=P())


def test_what_the_handlers_refuse(small) -> None:
    """Programs that did not come from this module, or whose plan is gone."""
    _, plan, (hidden, reference, mask) = small
    hidden = hidden.reshape(20, 24)
    blockem.jax.encode(plan, hidden)
    name = blockem.jax._name(plan)

    def encode(x: jax.Array, columns: int = 6, **attributes: str) -> jax.Array:
        outputs = [jax.ShapeDtypeStruct((*x.shape[:-1], columns), jnp.float32),
                   jax.ShapeDtypeStruct((0,), jnp.uint8)]
        return jax.ffi.ffi_call("blockem_encode", outputs)(x, **attributes)[0]

    same_bits(encode(hidden, plan=name), blockem.jax.encode(plan, hidden))
    for call, text in [
        (lambda: encode(hidden, plan="gone"), "INVALID_ARGUMENT: this process has no plan gone"),
        (lambda: encode(hidden), 'lacks its string attribute "plan"'),
        (lambda: encode(hidden, 5, plan=name), "SHAPE: latents must be"),
        (lambda: encode(hidden[:, :8], plan=name), "SHAPE: hidden must be"),
        (lambda: encode(hidden[0], plan=name), "SHAPE: hidden must have 2 dimensions"),
        (lambda: encode(hidden.astype(int), plan=name), "DTYPE: hidden has XLA's element type 4"),
    ]:
        with pytest.raises(Exception, match=text):
            jax.block_until_ready(call())


def test_equal_plans_share_a_name_and_others_do_not(small) -> None:
    case, plan, _ = small
    name = blockem.jax._name(plan)
    assert blockem.jax._name(case.plan()) == name
    flipped = blockem.Latents(case.ids, -case.signs, case.weights)
    heavier = blockem.Latents(case.ids, case.signs, 2 * case.weights)
    for other in (blockem.Plan(case.sae, flipped), blockem.Plan(case.sae, heavier),
                  case.plan(num_threads=1 + plan.num_threads), case.plan(backend="reference"),
                  blockem.Plan(case.sae, case.latents, activation="dense_relu")):
        assert blockem.jax._name(other) != name


def test_cached_and_exported_programs_in_another_process(tmp_path: Path) -> None:
    """XLA's persistent cache and jax.export: the second process runs what the first compiled."""
    script = """
        folder, first = sys.argv[1], sys.argv[2] == "first"
        jax.config.update("jax_compilation_cache_dir", folder + "/cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        # The second process has made another plan before, so that addresses and order differ.
        other = None if first else oracle.Case("gated", "native", 9, 2).plan()
        case = oracle.Case("standard", "native", 16, 3)
        plan = case.plan(num_threads=1)
        hidden, zero = jnp.asarray(case.hidden(10)), jnp.zeros((10, 3))
        grad = jax.jit(jax.grad(lambda h: blockem.jax.penalty(plan, h, zero)[0]))
        print(np.asarray(grad(hidden)).tobytes().hex())
        want = plan.penalty(np.asarray(hidden), np.asarray(zero)).grad_hidden
        assert (np.asarray(grad(hidden)) == want).all()
        encode = jax.jit(lambda h: blockem.jax.encode(plan, h))
        path = pathlib.Path(folder, "program")
        if first:
            safe = jax.export.DisabledSafetyCheck.custom_call("blockem_encode")
            path.write_bytes(jax.export.export(encode, disabled_checks=[safe])(hidden).serialize())
        else:
            program = jax.export.deserialize(bytearray(path.read_bytes()))
            blockem.jax.encode(plan, hidden)
            assert (program.call(hidden) == encode(hidden)).all()
        """
    one = run_script(script, str(tmp_path), "first")
    entries = {path.name for path in (tmp_path / "cache").iterdir() if path.name.endswith("-cache")}
    assert entries
    two = run_script(script, str(tmp_path), "second")
    assert one == two and len(one) > 100


def test_the_package_imports_without_jax() -> None:
    code = ("import sys; sys.modules['jax'] = None; import blockem; "
            "assert not any(name.startswith('jax.') for name in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def run_script(code: str, *arguments: str) -> str:
    """Runs Python in a process of its own; returns what it printed."""
    head = ("import pathlib, sys, numpy as np, jax, jax.numpy as jnp, jax.export, jax.test_util\n"
            "import blockem, blockem.jax, conftest, oracle, test_jax\n")
    lines = code.split("\n")
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    text = head + "\n".join(line[indent:] for line in lines)
    done = subprocess.run([sys.executable, "-c", text, *arguments], env=environment(),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parent), str(Path(blockem.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
