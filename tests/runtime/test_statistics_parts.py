"""The sums behind the statistics: they add up, they lose no digits, and the sketch keeps the bound that it states."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cipm_ir.errors import InputError
from cipm_ir.runtime.statistics.lagged import Lagged
from cipm_ir.runtime.statistics.moments import Cofiring, Marginals, Moments
from cipm_ir.runtime.statistics.rows import RowSample
from cipm_ir.runtime.statistics.sketch import Pairs, Sketch, unordered

Rng = np.random.Generator


def correlated(rng: Rng, rows: int, size: int) -> np.ndarray[Any, Any]:
    mixing = rng.standard_normal((size, size)) * (rng.random((size, size)) < 0.3) + np.eye(size)
    return (rng.standard_normal((rows, size)) @ mixing + rng.standard_normal(size) * 3).astype(np.float32)


def cut(rng: Rng, rows: np.ndarray[Any, Any], pieces: int) -> list[np.ndarray[Any, Any]]:
    return np.split(rows, np.sort(rng.integers(0, len(rows) + 1, pieces - 1)))


def made(kind: Any, rows: Any, *arguments: Any) -> Any:
    part = kind.zero(rows.shape[1], *arguments)
    part.update(rows)
    return part


# ------------------------------------------------------------ moments
@given(seed=st.integers(0, 10**6), size=st.integers(1, 7), rows=st.integers(0, 60), pieces=st.integers(1, 5))
def test_moments_equal_the_textbook_and_any_grouping_of_shards(seed: int, size: int, rows: int, pieces: int) -> None:
    rng = np.random.default_rng(seed)
    x = correlated(rng, rows, size)
    shards = [made(Moments, piece) for piece in cut(rng, x, pieces)]
    left, right = reduce(add, shards), reduce(lambda a, b: b + a, shards[::-1])
    streamed = Moments.zero(size)
    for piece in cut(rng, x, pieces):
        streamed.update(piece)
    for got in (made(Moments, x), left, right, streamed):
        assert got.count == rows
        if rows:
            wide = x.astype(np.float64)
            scale = np.abs(wide).max() ** 2 + 1e-9
            np.testing.assert_allclose(got.mean, wide.mean(0), atol=3e-7 * scale**0.5)
            np.testing.assert_allclose(got.covariance, np.cov(wide.T, bias=True).reshape(size, size), atol=1e-6 * scale)
            np.testing.assert_allclose(got.second, wide.T @ wide / rows, atol=1e-6 * scale)


def test_float64_rows_stay_exact(rng: Rng) -> None:
    x = rng.standard_normal((500, 6)) + 1e6
    got = made(Moments, x[:123]) + made(Moments, x[123:])
    np.testing.assert_allclose(got.covariance, np.cov(x.T, bias=True), rtol=1e-8, atol=1e-10)


def test_a_large_mean_costs_no_digits(rng: Rng) -> None:
    """Sums of squares would: 10^8 + 1 is 10^8 in float32. (The negative control below shows that they do.)"""
    x = (rng.standard_normal((40_000, 4)) + 1e4).astype(np.float32)
    wide = x.astype(np.float64)
    got = reduce(add, (made(Moments, piece) for piece in np.split(x, 8)))
    np.testing.assert_allclose(got.variance, wide.var(0), rtol=1e-5)
    np.testing.assert_allclose(got.mean, wide.mean(0), rtol=1e-9)
    naive = (x * x).mean(0) - x.mean(0) ** 2
    assert np.abs(naive / wide.var(0) - 1).max() > 0.01


def test_diagonal_moments_agree_with_full_ones(rng: Rng) -> None:
    x = correlated(rng, 300, 5)
    slim = Moments.zero(5, full=False)
    slim.update(x[:99])
    rest = Moments.zero(5, full=False)
    rest.update(x[99:])
    np.testing.assert_allclose((slim + rest).variance, made(Moments, x).variance, rtol=1e-6)
    with pytest.raises(InputError, match="cannot be added"):
        slim + made(Moments, x)
    with pytest.raises(InputError, match="of 5 and of 4 units"):
        slim + Moments.zero(4, full=False)


def test_bordered_is_the_gram_matrix_with_a_one_appended(rng: Rng) -> None:
    x = correlated(rng, 200, 4)
    u = np.c_[x, np.ones(200)].astype(np.float64)
    np.testing.assert_allclose(made(Moments, x).bordered, u.T @ u / 200, rtol=1e-5, atol=1e-5)


def test_marginals_and_cofiring_count(rng: Rng) -> None:
    x = np.maximum(correlated(rng, 400, 5), 0)
    x[:, 4] = 7.0
    both = made(Marginals, x[:150]) + made(Marginals, x[150:])
    np.testing.assert_array_equal(both.positive, (x > 0).sum(0))
    np.testing.assert_array_equal(both.minimum, x.min(0))
    np.testing.assert_array_equal(both.maximum, x.max(0))
    fires = (x > 0).astype(float)
    phi = (made(Cofiring, x[:150]) + made(Cofiring, x[150:])).phi
    np.testing.assert_allclose(phi[:4, :4], np.corrcoef(fires[:, :4].T), atol=1e-12)
    assert not phi[4].any()


# ------------------------------------------------------------ lags
def lagged_by_hand(x: np.ndarray[Any, Any], lag: int) -> np.ndarray[Any, Any]:
    size = x.shape[1]
    return np.asarray(np.corrcoef(x[:-lag].T, x[lag:].T))[:size, size:]


@given(seed=st.integers(0, 10**6), lag=st.integers(1, 4), pieces=st.integers(1, 8), rows=st.integers(12, 40))
def test_a_stream_in_pieces_has_the_pairs_across_the_seams(seed: int, lag: int, pieces: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.standard_normal((rows, 3)), axis=0)
    shards = []
    for piece in cut(rng, x, pieces):  # pieces may be shorter than the lag, or empty
        shard = Lagged.zero(3, lag)
        for row in np.array_split(piece, 2):
            shard.extend(row)
        shards.append(shard)
    middle = len(shards) // 2
    for total in (reduce(add, shards), reduce(add, [*shards[:middle], reduce(add, shards[middle:])])):
        assert total.count == rows - lag
        assert total.length == rows
        np.testing.assert_allclose(total.correlation, lagged_by_hand(x, lag), atol=1e-9)


def test_sequences_are_not_joined(rng: Rng) -> None:
    x = rng.standard_normal((6, 9, 3))
    part = Lagged.zero(3, 2)
    part.update(x[:4])
    more = Lagged.zero(3, 2)
    more.update(x[4:])
    early, late = x[:, :-2].reshape(-1, 3), x[:, 2:].reshape(-1, 3)
    np.testing.assert_allclose((part + more).correlation, np.asarray(np.corrcoef(early.T, late.T))[:3, 3:], atol=1e-10)
    part.update(x[:, :2])  # shorter than the lag: no pair
    assert part.count == 4 * 7


# ------------------------------------------------------------ sketch
def test_sketch_keeps_its_bound_and_a_third_of_it_does_not_hold(rng: Rng) -> None:
    x = correlated(rng, 4000, 80)
    truth = np.corrcoef(x.T)
    moments = made(Moments, x)
    errors = []
    for trial in range(4):
        sketch = Sketch.zero(80, 256)
        sketch.update(x, np.arange(4000, dtype=np.uint64) + np.uint64(trial << 40))
        estimate = sketch.correlation(moments.mean, moments.variance)
        np.testing.assert_array_equal(np.diagonal(estimate), 1)
        errors.append((estimate - truth)[np.triu_indices(80, 1)])
    spread = float(np.sqrt(np.mean(np.square(errors))))
    assert spread < sketch.standard_error
    assert (np.abs(errors) > sketch.bound(0.05)).mean() < 0.05
    # negative control: the bound is not so loose that anything would pass, and the estimate is unbiased
    assert spread > 0.4 * sketch.standard_error
    assert abs(np.mean(errors)) < 0.3 * spread


def test_sketches_of_shards_add_up(rng: Rng) -> None:
    x = correlated(rng, 900, 12)
    number = np.arange(900, dtype=np.uint64)
    whole, parts = Sketch.zero(12, 64), [Sketch.zero(12, 64) for _ in range(3)]
    whole.update(x, number)
    for k, part in enumerate(parts):
        part.update(x[k * 300 : k * 300 + 300], number[k * 300 : k * 300 + 300])
    total = reduce(add, parts[::-1])
    np.testing.assert_allclose(total.sums, whole.sums, atol=1e-4)
    np.testing.assert_array_equal(total.signs, whole.signs)
    with pytest.raises(InputError, match="cannot be added"):
        whole + Sketch.zero(12, 32)


def test_strongest_finds_planted_pairs(rng: Rng) -> None:
    x = rng.standard_normal((5000, 200)).astype(np.float32) + 5
    x[:, 100:] = 0.8 * x[:, :100] + 0.6 * x[:, 100:]
    sketch = Sketch.zero(200)
    sketch.update(x, np.arange(5000, dtype=np.uint64))
    moments = made(Moments, x)
    pairs = sketch.strongest(moments.mean, moments.variance, 2)
    planted = {(k, k + 100) for k in range(100)}
    assert planted <= set(map(tuple, pairs.tolist()))
    assert len(pairs) <= 400
    exact = made(Pairs, x[:2000], pairs) + made(Pairs, x[2000:], pairs)
    np.testing.assert_allclose(exact.correlation, np.asarray(np.corrcoef(x.T))[pairs[:, 0], pairs[:, 1]], atol=1e-5)


def test_pairs_are_checked() -> None:
    np.testing.assert_array_equal(unordered([(2, 1), (1, 2), (3, 3), (0, 1)]), [(0, 1), (1, 2)])
    with pytest.raises(InputError, match=r"0\.\.3"):
        Pairs.zero(4, [(1, 4)])


def test_pairs_that_both_followed_are_added(rng: Rng) -> None:
    x = correlated(rng, 80, 5)
    total = made(Pairs, x[:30], [(0, 1), (1, 2), (3, 4)]) + made(Pairs, x[30:], [(0, 2), (1, 2), (4, 3)])
    np.testing.assert_array_equal(total.pairs, [(1, 2), (3, 4)])
    truth = np.asarray(np.corrcoef(x.T))
    np.testing.assert_allclose(total.correlation, [truth[1, 2], truth[3, 4]], atol=1e-5)


# ------------------------------------------------------------ rows
def test_row_sample_does_not_depend_on_the_cut_and_is_uniform(rng: Rng) -> None:
    x = np.arange(5000, dtype=np.float32)[:, None]
    number = np.arange(5000, dtype=np.uint64)
    whole = RowSample.zero(1, 400)
    whole.update(x, number)
    parts = []
    for lo, hi in ((0, 10), (10, 3000), (3000, 5000)):
        part = RowSample.zero(1, 400)
        for at in range(lo, hi, 700):
            part.update(x[at : min(at + 700, hi)], number[at : min(at + 700, hi)])
        parts.append(part)
    total = parts[2] + (parts[0] + parts[1])
    np.testing.assert_array_equal(total.rows, whole.rows)
    assert total.seen == 5000
    assert len(total.rows) == 400
    assert abs(total.rows.mean() - 2500) < 4 * 5000 / np.sqrt(12 * 400)


def test_rank_measures(rng: Rng) -> None:
    a, b = rng.standard_normal((2, 2000))
    x = np.stack([a, np.exp(a), a + b, b, a * a, np.zeros(2000)], 1)
    part = RowSample.zero(6, 2000)
    part.update(x, np.arange(2000, dtype=np.uint64))
    spearman = part.spearman
    np.testing.assert_allclose(spearman[:5, :5], spearmanr(x[:, :5]).statistic, atol=1e-6)
    assert not spearman[5].any()
    information = part.information()
    assert information[0, 1] > 0.97  # monotone
    assert information[0, 4] > 0.8  # a function, though uncorrelated
    assert abs(spearman[0, 4]) < 0.1
    assert information[0, 3] < 0.15  # independent
    assert abs(information[0, 2] - np.sqrt(0.5)) < 0.06  # a Gaussian pair: its correlation
    assert not information[5].any()


# ------------------------------------------------------------ states
def test_every_part_comes_back_from_its_state(rng: Rng) -> None:
    x, number = correlated(rng, 50, 4), np.arange(50, dtype=np.uint64)
    parts = [made(Moments, x), made(Marginals, x), made(Cofiring, x), made(Pairs, x, [(0, 1)])]
    lagged, sketch, rows = Lagged.zero(4, 2), Sketch.zero(4, 8), RowSample.zero(4, 16)
    lagged.extend(x)
    sketch.update(x, number)
    rows.update(x, number)
    for part in (*parts, lagged, sketch, rows):
        state = part.state()
        again = type(part).restore(state).state()
        assert state.keys() == again.keys()
        for name, array in state.items():
            np.testing.assert_array_equal(array, again[name])


def test_equal_rows_have_no_variance_at_all() -> None:
    """Not even by rounding, whatever the number is: scores of constant units must be equal."""
    rows = np.repeat(np.random.default_rng(3).standard_normal((1, 50)) / 3, 37, axis=0)
    for full in (True, False):
        part = Moments.zero(50, full=full)
        for piece in (rows[:5], rows[5:6], rows[6:]):
            part.update(piece.copy())
        assert part.count == 37 and not part.spread.any() and np.array_equal(part.mean, rows[0])
