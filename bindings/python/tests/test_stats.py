"""Statistics of whole dictionaries, and Stage 1 on top of them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from oracle import Case

import blockem

T, D, K = 60, 24, 37


@pytest.fixture(scope="module")
def case() -> Case:
    return Case("jumprelu", "native", D, K)


def sae_plan(case: Case) -> blockem.Plan:
    """A plan of all latents, in the dictionary's order."""
    ids = np.arange(case.sae.d_sae)
    return blockem.Plan(case.sae, blockem.Latents(ids, np.ones(len(ids), int)))


def draw(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(stats: blockem.Stats, z: np.ndarray, base: np.ndarray, m: np.ndarray) -> None:
    """The readable means against float64 numpy on z [T, F] and shares [T]."""
    z, base, m = z.astype(np.float64), base.astype(np.float64), m.astype(np.float64)
    mean = lambda x: m @ x / m.sum()
    kept = m != 0
    assert stats.token_count == pytest.approx(m.sum())
    for found, expected in [
        (stats.mean, mean(z)),
        (stats.mean_square, mean(z**2)),
        (stats.rate, mean(z != 0)),
        (stats.max, z[kept].max(0)),
        (stats.base_mean, mean(base)),
        (stats.base_mean_square, mean(base**2)),
        (stats.base_rate, mean(base != 0)),
        (stats.base_max, base[kept].max(0)),
        (stats.delta, mean(z - base)),
        (stats.rise, mean(np.maximum(z - base, 0) ** 2)),
        (stats.fall, mean(np.maximum(base - z, 0) ** 2)),
    ]:
        assert found.dtype == np.float64 and found.shape == (stats.d_sae,)
        # Differences are rounded to float32, as in the penalty.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "float32", "float16", "bfloat16"])
def test_means(case: Case, kind: str) -> None:
    stats, plan = blockem.Stats(case.sae), sae_plan(case)
    assert stats.identity == plan.identity and stats.numerics == plan.numerics
    assert stats.d_sae == case.sae.d_sae and stats.token_count == 0
    hidden, base = draw(4, 15, D), draw(4, 15, D, seed=2)
    shares = np.random.default_rng(3).choice([0, 1, 0.25], (4, 15)).astype(np.float32)
    if kind != "numpy":
        hidden, base = (torch.from_numpy(x).to(getattr(torch, kind)) for x in (hidden, base))
    stats.update(hidden, base, shares)
    z, z_base = (np.asarray(plan.encode(x)).reshape(60, -1) for x in (hidden, base))
    check(stats, z, z_base, shares.ravel())


def test_updates_add_up_and_merge(case: Case) -> None:
    hidden, base = draw(T, D), draw(T, D, seed=2)
    mask = np.random.default_rng(3).integers(0, 2, T).astype(bool)
    whole, parts = blockem.Stats(case.sae, num_threads=1), blockem.Stats(case.sae, num_threads=2)
    whole.update(hidden, base, mask)
    halves = [parts.fresh(), parts.fresh()]
    for i, (start, end) in enumerate([(0, 7), (7, 31), (31, T)]):
        parts.update(hidden[start:end], base[start:end], mask[start:end])
        halves[i // 2].update(hidden[start:end], base[start:end], mask[start:end])
    # The same bits in one call and in three.
    np.testing.assert_array_equal(parts.state_dict()["state"], whole.state_dict()["state"])
    assert parts.token_count == whole.token_count
    # Sums of different processes.
    merged = parts.fresh()
    for half in halves:
        merged.merge(pickle.loads(pickle.dumps(half.state_dict())))
    merged.merge(parts.fresh())
    np.testing.assert_allclose(merged.state_dict()["state"], whole.state_dict()["state"], rtol=1e-13)
    np.testing.assert_array_equal(merged.max, whole.max)
    assert merged.token_count == whole.token_count
    # A merged one goes on, and the other does not change.
    before = halves[1].state_dict()["state"]
    merged.update(hidden, base, mask)
    assert merged.token_count == 2 * whole.token_count
    np.testing.assert_array_equal(halves[1].state_dict()["state"], before)
    again = whole.fresh()
    again.load_state_dict(whole.state_dict())
    np.testing.assert_array_equal(again.mean, whole.mean)
    again.reset()
    assert again.token_count == 0 and again.state_dict()["state"] is None


def test_nan_under_the_mask_contributes_nothing(case: Case) -> None:
    hidden = draw(T, D)
    mask = np.ones(T, bool)
    mask[[3, 40]] = False
    clean, dirty = blockem.Stats(case.sae), blockem.Stats(case.sae)
    clean.update(hidden, mask=mask)
    hidden[[3, 40]] = np.nan
    dirty.update(hidden, mask=mask)
    np.testing.assert_array_equal(dirty.state_dict()["state"], clean.state_dict()["state"])
    dirty.update(hidden)
    assert np.isnan(dirty.mean).all() and np.isnan(dirty.max).all()


def test_topk_counts_k_latents_of_each_token() -> None:
    weight = draw(64, D) / np.float32(D**0.5)
    sae = blockem.Sae.from_tensors(encoder_weight=weight, encoder_layout="f_d", architecture="topk",
                                   encoder_bias=np.ones(64, np.float32), k=5)  # fmt: skip
    stats = blockem.Stats(sae)
    stats.update(draw(T, D))
    assert stats.rate.sum() == pytest.approx(5)
    dense = blockem.Stats(sae, activation="dense_relu")
    dense.update(draw(T, D))
    assert dense.rate.sum() > 20


def test_what_is_wrong_is_told(case: Case) -> None:
    stats, hidden = blockem.Stats(case.sae), draw(T, D)
    for read in (lambda: stats.mean, lambda: stats.max):
        with pytest.raises(blockem.ArgumentError):
            read()
    stats.update(hidden, mask=np.zeros(T, bool))
    with pytest.raises(blockem.ArgumentError, match="no token"):
        stats.mean
    stats.update(hidden)
    with pytest.raises(blockem.ArgumentError, match="base_hidden"):
        stats.delta
    with pytest.raises(blockem.ArgumentError, match="base_hidden"):
        stats.update(hidden, hidden)
    with pytest.raises(blockem.ArgumentError, match="shape"):
        stats.update(hidden[:, 1:])
    with pytest.raises(blockem.ArgumentError, match="mask"):
        stats.update(hidden, mask=np.ones(T - 1, bool))
    both = stats.fresh()
    both.update(hidden, hidden)
    with pytest.raises(blockem.ArgumentError, match="base model"):
        stats.merge(both)
    other = blockem.Stats(case.sae, activation="dense_relu")
    other.update(hidden)
    with pytest.raises(blockem.DataError, match="identity") as told:
        stats.merge(other)
    assert told.value.name == "PROVENANCE_MISMATCH"
    before = stats.state_dict()
    with pytest.raises(blockem.ArgumentError, match="state"):
        stats.merge({**before, "state": before["state"][:, 1:]})
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(stats)
    with pytest.raises(TypeError):
        copy.deepcopy(stats)
    np.testing.assert_array_equal(stats.state_dict()["state"], before["state"])


def test_prompts_count_once_whatever_their_length(case: Case) -> None:
    plan, stats = sae_plan(case), blockem.Stats(case.sae)
    hidden, base = draw(5, 12, D), draw(5, 12, D, seed=2)
    lengths = np.array([12, 1, 7, 3, 10])
    mask = np.arange(12) < lengths[:, None]
    hidden[~mask] = np.nan
    batches = [(hidden[:2], base[:2], mask[:2]), (hidden[2:], base[2:], mask[2:])]
    pool, sums = blockem.stage1(stats, batches, count=6)
    z, z_base = (plan.encode(np.nan_to_num(x)).astype(np.float64) for x in (hidden, base))
    of_prompts = np.stack([(z - z_base)[i, :n].mean(0) for i, n in enumerate(lengths)])
    expected = of_prompts.mean(0)
    np.testing.assert_allclose(sums.delta, expected, rtol=1e-6, atol=1e-7)
    assert sums.token_count == pytest.approx(5) and stats.token_count == 0
    # The farthest of either side, in their order.
    rose, fell = np.argsort(-expected)[:6], np.argsort(expected)[:6]
    np.testing.assert_array_equal(pool.ids, np.concatenate([rose, fell]))
    np.testing.assert_array_equal(pool.signs, np.repeat([1, -1], 6))
    np.testing.assert_array_equal(pool.deltas, sums.delta[pool.ids])
    assert len(pool) == 12 and len(pool.latents()) == 12
    tensors = [tuple(torch.from_numpy(x) for x in batch) for batch in batches]
    same, _ = blockem.stage1(stats, tensors, count=6)
    np.testing.assert_array_equal(same.deltas, pool.deltas)


def test_movers_are_told_by_their_sign() -> None:
    delta = np.array([0.0, 3, -1, 3, 0.5, -2, -0.0])
    pool = blockem.movers(delta, 3)
    assert pool.ids.tolist() == [1, 3, 4, 5, 2]
    assert pool.signs.tolist() == [1, 1, 1, -1, -1]
    assert blockem.movers(delta, 1).ids.tolist() == [1, 5]
    with pytest.raises(blockem.DataError, match="latent 2"):
        blockem.movers(np.array([1, 2, np.nan]))
    with pytest.raises(blockem.ArgumentError):
        blockem.movers(delta, 0)
    with pytest.raises(blockem.ArgumentError, match="prompt 1"):
        blockem.prompt_shares(np.array([[1, 0], [0, 0]]))
    shares = blockem.prompt_shares(torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0]]))
    assert shares.dtype == torch.float32 and shares.sum(1).tolist() == [1, 1]
