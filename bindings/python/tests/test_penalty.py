"""encode and penalty against the oracle, on arrays of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import ACTIVATIONS, ARCHITECTURES, Case

SHAPES = [(1, 1, 1), (3, 5, 2), (17, 33, 7), (64, 128, 16), (5, 300, 65), (131, 64, 3), (0, 9, 4)]
# Relative to the sum of |products|; bf16 may meet rows in two bf16 terms.
EPSILON = {"float32": 2**-20, "float16": 2**-20, "bfloat16": 2**-16}
ROUNDING = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}


def cast(hidden: np.ndarray, dtype: str) -> tuple[torch.Tensor, np.ndarray]:
    """A tensor of that dtype, and its values."""
    tensor = torch.from_numpy(hidden).to(getattr(torch, dtype))
    return tensor, tensor.double().numpy()


def check_penalty(case: Case, tokens: int, dtype: str, mask_kind: str | None) -> None:
    plan, eps = case.plan(), EPSILON[dtype]
    base, _ = cast(case.hidden(tokens, seed=2), dtype)
    hidden, values = cast(case.hidden(tokens, seed=3) * 0.5 + base.float().numpy(), dtype)
    expected = case.latent(values)
    near = (expected.margin < 2 * eps * expected.size).any(axis=1)

    z = plan.encode(hidden)
    assert z.dtype == torch.float32 and z.shape == (tokens, case.num_latents)
    error = np.abs(z.numpy() - expected.z)
    assert (error <= eps * expected.size)[~near].all()

    reference = plan.encode(base)
    mask = np.random.default_rng(4).integers(0, 3, tokens) * ~near
    kinds = {"bool": torch.bool, "uint8": torch.uint8, "float32": torch.float32}
    given = None if mask_kind is None else torch.from_numpy(mask).to(kinds[mask_kind])
    share = mask / 1.0 if mask_kind == "float32" else (mask != 0) / 1.0
    if mask_kind is None:
        given = torch.from_numpy(~near)
        share = (~near) / 1.0
    want = case.penalty(values, reference.numpy(), share)
    got = plan.penalty(hidden, reference, given, per_latent=True, coef=True, scale=0.75)

    dz = eps * expected.size.max(initial=0)
    top = 2 * share.max(initial=0) * case.weights.max() * expected.slope.max(initial=0)
    dl = np.abs(want.coef).sum() * dz + tokens * top * dz * dz + 2**-22 * want.loss_sum
    dc = top * dz + 2**-21 * np.abs(want.coef).max(initial=0)
    dg = dc * np.abs(case.rows()).sum(0).max() + 2**-24
    assert got.token_count == want.token_count
    assert abs(got.loss_sum - want.loss_sum) <= dl
    assert np.abs(got.latent_loss.numpy() - want.latent_loss).max() <= dl
    assert np.abs(got.coef.numpy() - want.coef).max(initial=0) <= dc
    assert got.grad_hidden.dtype == hidden.dtype
    grad = 0.75 * want.grad_hidden
    slack = dg + ROUNDING[dtype] * np.abs(grad)
    assert (np.abs(got.grad_hidden.double().numpy() - grad) <= slack).all()


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("tokens, d_in, num_latents", SHAPES)
def test_shapes(tokens: int, d_in: int, num_latents: int, dtype: str) -> None:
    check_penalty(Case("standard", "native", d_in, num_latents), tokens, dtype, None)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gates(architecture: str, activation: str, dtype: str) -> None:
    check_penalty(Case(architecture, activation, 48, 9), 40, dtype, None)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mask", ["bool", "uint8", "float32"])
def test_masks(mask: str, architecture: str) -> None:
    check_penalty(Case(architecture, "native", 20, 6, folds=True), 50, "float32", mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reference_backend_is_the_formula(architecture: str, dtype: str) -> None:
    case = Case(architecture, "native", 21, 5)
    plan = case.plan(backend="reference")
    hidden, values = cast(case.hidden(13), dtype)
    wide = torch.from_numpy(values)
    z = plan.encode(wide)
    assert z.dtype == torch.float64
    # Only e^r_mag is rounded, to f32, when rows are gathered.
    near = 1e-6 if architecture == "gated" else 1e-13
    np.testing.assert_allclose(z.numpy(), case.latent(values).z, rtol=near, atol=near)
    reference = np.zeros((13, 5))
    want = case.penalty(values, reference, np.ones(13))
    got = plan.penalty(wide, torch.from_numpy(reference), coef=True)
    assert got.loss_sum == pytest.approx(want.loss_sum, rel=near)
    np.testing.assert_allclose(got.coef.numpy(), want.coef, rtol=near, atol=near)
    np.testing.assert_allclose(got.grad_hidden.numpy(), want.grad_hidden, rtol=near, atol=near)
    narrow = plan.encode(hidden)
    assert narrow.dtype == torch.float32
    np.testing.assert_array_equal(narrow.numpy(), z.numpy().astype(np.float32))


def test_nan_under_mask_zero_contributes_nothing() -> None:
    case = Case("jumprelu", "native", 40, 6)
    plan, mask = case.plan(), np.array([1, 0, 1, 1, 0], np.float32)
    clean, base = case.hidden(5), case.hidden(5, seed=9)
    reference = plan.encode(base)
    dirty = clean.copy()
    dirty[1, 3], dirty[4] = np.nan, np.inf
    want = plan.penalty(clean, reference, mask, coef=True, per_latent=True)
    got = plan.penalty(dirty, reference, mask, coef=True, per_latent=True)
    assert (got.loss_sum, got.token_count) == (want.loss_sum, want.token_count)
    np.testing.assert_array_equal(got.coef, want.coef)
    np.testing.assert_array_equal(got.latent_loss, want.latent_loss)
    np.testing.assert_array_equal(got.grad_hidden, want.grad_hidden)
    assert not want.grad_hidden[[1, 4]].any()


def test_nan_of_a_counted_token_reaches_the_loss() -> None:
    for architecture in ARCHITECTURES:
        case = Case(architecture, "native", 24, 4)
        plan, hidden = case.plan(), case.hidden(3)
        reference = plan.encode(hidden)
        hidden[1, 7] = np.nan
        assert np.isnan(plan.penalty(hidden, reference).loss_sum)
        assert np.isnan(plan.encode(hidden)[1]).all()
        reference[1, 0], hidden[1, 7] = np.nan, 0
        assert np.isnan(plan.penalty(hidden, reference).loss_sum)


@pytest.mark.parametrize("tokens", [0, 6])
def test_mask_of_zeros_is_legal(tokens: int) -> None:
    case = Case("standard", "native", 12, 3)
    plan, hidden = case.plan(), case.hidden(tokens)
    got = plan.penalty(hidden, plan.encode(hidden) - 1, np.zeros(tokens, bool), per_latent=True)
    assert (got.loss_sum, got.token_count) == (0, 0)
    assert not got.latent_loss.any() and not got.grad_hidden.any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numpy_and_torch_agree(dtype: str) -> None:
    case = Case("gated", "native", 30, 5)
    plan = case.plan()
    hidden = case.hidden(24).reshape(2, 3, 4, 30).astype(dtype)
    reference = plan.encode(case.hidden(24, seed=5).reshape(2, 3, 4, 30))
    assert isinstance(reference, np.ndarray) and reference.shape == (2, 3, 4, 5)
    ours = plan.penalty(hidden, reference)
    theirs = plan.penalty(torch.from_numpy(hidden), torch.from_numpy(reference))
    assert ours.loss_sum == theirs.loss_sum
    assert ours.grad_hidden.dtype == hidden.dtype
    np.testing.assert_array_equal(ours.grad_hidden, theirs.grad_hidden.numpy())
    tensor = torch.from_numpy(hidden).requires_grad_()
    z = plan.encode(tensor)
    assert not z.requires_grad
    np.testing.assert_array_equal(plan.encode(hidden), z.numpy())


def test_numpy_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    case = Case("standard", "native", 30, 5)
    plan, hidden = case.plan(), case.hidden(7)
    array, tensor = hidden.astype(ml_dtypes.bfloat16), torch.from_numpy(hidden).bfloat16()
    np.testing.assert_array_equal(plan.encode(array), plan.encode(tensor).numpy())
    got = plan.penalty(array, np.zeros((7, 5), np.float32)).grad_hidden
    want = plan.penalty(tensor, torch.zeros(7, 5)).grad_hidden
    assert got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())


def test_one_token_without_a_batch_dimension() -> None:
    case = Case("standard", "native", 10, 4)
    plan, hidden = case.plan(), case.hidden(1)
    z = plan.encode(hidden[0])
    assert z.shape == (4,)
    np.testing.assert_array_equal(z, plan.encode(hidden)[0])
    assert plan.penalty(hidden[0], z, np.array(True)).token_count == 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gradient_into_a_given_array(dtype: str) -> None:
    case = Case("standard", "native", 19, 5)
    plan, hidden = case.plan(), case.hidden(8).astype(dtype)
    reference = np.zeros((8, 5), np.float32)
    grad = plan.penalty(hidden, reference, grad=True).grad_hidden
    wide = np.full((8, 19), 7, np.float32)
    got = plan.penalty(hidden, reference, grad=wide)
    assert got.grad_hidden is wide
    np.testing.assert_array_equal(wide.astype(dtype), grad)
    # Columns of a larger matrix are written in place.
    big = np.ones((8, 40), np.float32)
    plan.penalty(hidden, reference, grad=big[:, 10:29], accumulate=True)
    np.testing.assert_array_equal(big[:, 10:29], 1 + wide)
    assert (big[:, :10] == 1).all() and (big[:, 29:] == 1).all()
    assert plan.penalty(hidden, reference, grad=False).grad_hidden is None


def test_accumulating_rounds_once() -> None:
    case = Case("standard", "native", 33, 5)
    plan, hidden = case.plan(), torch.from_numpy(case.hidden(8)).bfloat16()
    reference = torch.zeros(8, 5)
    wide = plan.penalty(hidden, reference, grad=torch.empty(8, 33)).grad_hidden
    old = torch.randn(8, 33).bfloat16()
    got = plan.penalty(hidden, reference, grad=old.clone(), accumulate=True).grad_hidden
    assert torch.equal(got, (old.float() + wide).bfloat16())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:, ::2],
        lambda x: x[::-1],
        lambda x: x.transpose(1, 0, 2),
        lambda x: np.asfortranarray(x),
        lambda x: np.broadcast_to(x[:1, :1], x.shape),
        lambda x: x.view(x.dtype.newbyteorder("=")),
    ],
)
def test_strided_numpy(make: object) -> None:
    case = Case("jumprelu", "native", 16, 5)
    plan, hidden = case.plan(), make(case.hidden(24).reshape(4, 6, 16))
    reference = np.zeros((*hidden.shape[:-1], 5), np.float32)
    dense = np.ascontiguousarray(hidden)
    np.testing.assert_array_equal(plan.encode(hidden), plan.encode(dense))
    got, want = plan.penalty(hidden, reference), plan.penalty(dense, reference)
    assert got.loss_sum == want.loss_sum
    np.testing.assert_array_equal(got.grad_hidden, want.grad_hidden)
