"""The parts of `fold`: clusters, the correction of the variance, moments from weights, the search for duplicates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models.dead_units import program_of
from tests.models.fold_planted import array_of

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.exact.canonicalize.members import Members
from cipm_ir.passes.merging.clusters import by_correlation, cosine, k_means, leaders, variance_gain
from cipm_ir.passes.merging.equal_units import _solve_signs, find_duplicates
from cipm_ir.passes.merging.merge import Merge, merge_spaces
from cipm_ir.passes.merging.moments import Moments, estimated_moments
from cipm_ir.passes.merging.plan import least_squares
from cipm_ir.passes.merging.rows import by_position, from_positions, unit_rows
from cipm_ir.symmetry.program import Program


# ---------------------------------------------------------------- clusters
def test_planted_clusters_are_found(rng: np.random.Generator) -> None:
    truth = rng.integers(0, 5, 60)
    truth[:5] = np.arange(5)
    rows = 4 * rng.standard_normal((5, 12))[truth] + 0.1 * rng.standard_normal((60, 12))
    for labels in (k_means(rows, 5), by_correlation(cosine(rows), 5)):
        assert len({(a, b) for a, b in zip(truth, labels, strict=True)}) == 5


@given(st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_exactly_as_many_clusters_as_asked_for(n: int, count: int, equal: bool) -> None:
    count = min(n, count)
    rows = np.ones((n, 3)) if equal else np.random.default_rng(n).standard_normal((n, 3)).round()
    for labels in (k_means(rows, count), by_correlation(cosine(rows), count)):
        assert sorted(set(labels.tolist())) == list(range(count))


def test_leaders_have_the_largest_scores() -> None:
    kept, cluster = leaders(np.array([1, 0, 1, 0, 2]), np.array([3.0, 1.0, 5.0, 2.0, 0.0]))
    assert kept.tolist() == [2, 3, 4]
    assert cluster.tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_variance_gain_is_the_formula(n: int, c: float) -> None:
    similarity = np.where(np.eye(n) == 1, 1.0, c)
    assert variance_gain(similarity, np.zeros(n, int)) == pytest.approx([n / np.sqrt(n + (n * n - n) * c)])


def test_variance_gain_restores_the_variance(rng: np.random.Generator) -> None:
    """Of the mean of equally large rows on white inputs; without it the variance is too small."""
    rows = rng.standard_normal((4, 50)) + rng.standard_normal(50)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mean = rows.mean(axis=0)
    assert (mean**2).sum() < 0.7
    assert ((variance_gain(cosine(rows), np.zeros(4, int))[0] * mean) ** 2).sum() == pytest.approx(1.0)


# ---------------------------------------------------------------- moments
def sampled(program: Program, samples: int = 400_000) -> tuple[np.ndarray, np.ndarray]:
    """Moments of max(0, W x + b z) with normal x and z."""
    full = np.concatenate([array_of(program, "w_1"), array_of(program, "b_2")[:, None]], axis=1).astype(np.float64)
    h = np.maximum(np.random.default_rng(0).standard_normal((samples, full.shape[1])) @ full.T, 0.0)
    return h.T @ h / samples, h.mean(axis=0)


def test_estimated_moments_are_those_of_normal_inputs() -> None:
    program = program_of("mlp_relu")
    found = estimated_moments(Members(program, exact=False), _rows(program, "w_1"))
    second, mean = sampled(program)
    assert np.abs(found.second - second).max() < 0.01 * np.diag(second).max()
    assert np.abs(found.mean - mean).max() < 0.01 * mean.max()
    other = program.refit({"b_2": -array_of(program, "b_2"), "w_1": 1.1 * array_of(program, "w_1")})
    assert np.abs(found.second - sampled(other)[0]).max() > 0.05 * np.diag(second).max()


def test_arc_cosine_kernel() -> None:
    """Of Relu in closed form (Cho and Saul 2009)."""
    program = program_of("mlp_relu")
    found = estimated_moments(Members(program, exact=False), _rows(program, "w_1")).second
    full = np.concatenate([array_of(program, "w_1"), array_of(program, "b_2")[:, None]], axis=1).astype(np.float64)
    size = np.linalg.norm(full, axis=1)
    angle = np.arccos(cosine(full))
    exact = np.outer(size, size) / (2 * np.pi) * (np.sin(angle) + (np.pi - angle) * np.cos(angle))
    assert np.abs(found - exact).max() < 1e-3 * exact.max()


def test_batch_norm_tells_mean_and_variance() -> None:
    program = program_of("batch_norm_linear")
    rows = _rows(program, program.spaces[0].name)
    norm = next(n for n in program.model.graph if n.op_type == "BatchNormalization")
    scale, shift = (array_of(program, v.name or "").astype(np.float64) for v in norm.inputs[1:3] if v is not None)
    found = estimated_moments(Members(program, exact=False), rows)
    assert np.allclose(found.mean, shift, atol=1e-5)
    assert np.allclose(np.diag(found.covariance), scale**2, rtol=1e-3)


@pytest.mark.parametrize("name", ["unet_concat_skip", "repvgg_branches", "lstm"])
def test_moments_of_what_is_not_one_product_are_refused(name: str) -> None:
    program = program_of(name)
    members = Members(program, exact=False)
    with pytest.raises(SymmetryError):
        for space in program.spaces:
            estimated_moments(members, unit_rows(members, program.index(space)))


def test_least_squares_mixing(rng: np.random.Generator) -> None:
    """A unit that is the sum of two kept ones is replaced by their sum."""
    h = rng.standard_normal((500, 3))
    h = np.concatenate([h, h[:, :1] + h[:, 1:2]], axis=1)
    merge = least_squares(Moments(h.T @ h / 500, h.mean(axis=0)), np.arange(3), rng.standard_normal((4, 5)), False)
    assert np.allclose(merge.mixing, [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], atol=1e-3)


# ---------------------------------------------------------------- rows and duplicates
def _rows(program: Program, name: str):  # type: ignore[no-untyped-def]
    return unit_rows(Members(program, exact=False), program.index(program.space(name)))


@pytest.mark.parametrize("name", ["grouped_conv", "depthwise_multiplier_two", "channel_shuffle", "batch_norm_relu"])
def test_positions_come_back(name: str) -> None:
    members = Members(program_of(name), exact=False)
    assert members.all
    for m in members.all:
        array = members.array(m.factor.leaf).astype(np.float64)
        flat = by_position(array, m)
        assert len(flat) == len(m.classes)
        assert np.array_equal(from_positions(flat, m), array)


@given(st.integers(0, 2**12 - 1), st.integers(0, 7))
def test_signs_are_solved_over_two_elements(code: int, truth: int) -> None:
    """Consistent projections become positive; which flips do it is decided up to what no row sees."""
    parities = np.array([(code >> k) & 1 for k in range(12)]).reshape(4, 3)
    flips = np.array([(truth >> k) & 1 for k in range(3)])
    negative = (parities @ flips % 2).astype(bool)[None]
    found = _solve_signs(parities, negative)
    assert np.array_equal(parities @ found[0] % 2, negative[0])


def test_many_duplicates_have_one_leader() -> None:
    program = program_of("mlp_relu")
    first = {
        name: np.broadcast_to(array_of(program, name)[:1], array_of(program, name).shape) for name in ("w_1", "b_2")
    }
    found = find_duplicates(_rows(program.refit(first), "w_1"), 1e-6)
    assert (found.leader == 0).all() and len(found.extra) == 7
    assert not len(find_duplicates(_rows(program, "w_1"), 1e-6).extra)


def test_units_without_weights_are_equal() -> None:
    program = program_of("mlp_relu")
    zero = {
        name: np.where(
            np.arange(8).reshape(-1, *(1,) * (array_of(program, name).ndim - 1)) < 3, 0, array_of(program, name)
        )
        for name in ("w_1", "b_2")
    }
    found = find_duplicates(_rows(program.refit(zero), "w_1"), 1e-6)
    assert found.leader.tolist() == [0, 0, 0, 3, 4, 5, 6, 7]


def test_integers_have_no_mean() -> None:
    program = program_of("dynamic_quantization")
    members = Members(program, exact=False)
    tried = 0
    for k, space in enumerate(program.spaces):
        try:
            unit_rows(members, k)
        except SymmetryError:
            continue
        kept, cluster = np.arange(space.size - 1), np.minimum(np.arange(space.size), space.size - 2)
        with pytest.raises(SymmetryError, match="int8 numbers, which have no mean"):
            merge_spaces(program, {k: Merge(kept, np.eye(space.size)[:, kept], cluster)})
        tried += 1
    assert tried
