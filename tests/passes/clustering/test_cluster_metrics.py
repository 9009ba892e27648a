"""Numbers on ordered matrices: against brute force, networkx and eigenvalues, and on matrices that hold nothing."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest

from cipm_ir.passes.clustering.metrics import (
    bandwidth,
    block_mass,
    effective_dimension,
    equal_blocks,
    modularity,
    split,
    starts_of,
)


def affinity(n: int, seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).random((n, n))
    return (made + made.T) / 2


def blocks(sizes: list[int], inside: float = 1.0, outside: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    label = np.repeat(np.arange(len(sizes)), sizes)
    return np.where(label[:, None] == label, inside, outside), label


def test_block_mass() -> None:
    matrix, label = blocks([3, 5, 4])
    assert block_mass(matrix, label) == 1.0
    shuffled = np.random.default_rng(0).permutation(12)
    assert block_mass(matrix[np.ix_(shuffled, shuffled)], label) < 0.6
    flat = np.ones((12, 12))
    assert block_mass(flat, label) == pytest.approx((3 * 2 + 5 * 4 + 4 * 3) / (12 * 11))
    assert block_mass(np.eye(12), label) == block_mass(flat, label)  # no affinity at all counts as none preferred
    assert block_mass(np.eye(1), np.zeros(1, int)) == 1.0


def test_bandwidth() -> None:
    assert bandwidth(np.ones((9, 9))) == pytest.approx(1.0)
    assert bandwidth(np.eye(9)) == pytest.approx(1.0)
    place = np.arange(9)
    band = (np.abs(place[:, None] - place) == 1).astype(float)
    assert bandwidth(band) == pytest.approx(1 / (10 / 3))
    assert bandwidth(1 - band) > 1.0
    assert bandwidth(np.eye(1)) == 1.0


@pytest.mark.parametrize("resolution", [0.5, 1.0, 2.0])
def test_modularity_is_that_of_networkx(resolution: float) -> None:
    matrix, label = affinity(10, 0), np.array([0, 0, 1, 1, 1, 2, 2, 0, 2, 1])
    graph = nx.from_numpy_array(matrix - np.diag(np.diag(matrix)))
    groups = [set(np.flatnonzero(label == k).tolist()) for k in range(3)]
    expected = nx.community.modularity(graph, groups, weight="weight", resolution=resolution)
    assert modularity(matrix, label, resolution) == pytest.approx(expected)
    assert modularity(matrix, np.zeros(10, int)) == pytest.approx(0.0)
    assert modularity(np.eye(10), label) == 0.0


def test_effective_dimension_is_the_participation_ratio() -> None:
    rng = np.random.default_rng(0)
    matrix = np.asarray(np.corrcoef(rng.standard_normal((7, 4)) @ rng.standard_normal((4, 30))))
    values = np.linalg.eigvalsh(matrix)
    assert effective_dimension(matrix) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert effective_dimension(np.eye(7)) == pytest.approx(7.0)
    assert effective_dimension(np.ones((7, 7))) == pytest.approx(1.0)
    assert effective_dimension(np.zeros((7, 7))) == 0.0


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("resolution", [1.0, 1.6])
def test_split_is_the_best_of_all_cuts(seed: int, resolution: float) -> None:
    matrix = affinity(8, seed) ** 3
    every = []
    for cuts in itertools.product([0, 1], repeat=7):
        label = np.r_[0, np.cumsum(cuts)]
        every.append(modularity(matrix, label, resolution))
    found = split(matrix, resolution)
    assert modularity(matrix, found, resolution) == pytest.approx(max(every))
    assert max(every) - min(every) > 0.01  # the choice matters


def test_split_finds_blocks() -> None:
    matrix, label = blocks([4, 7, 2, 5], 0.8, 0.1)
    assert np.array_equal(split(matrix), label)
    assert starts_of(label) == [4, 11, 13]
    assert np.array_equal(split(np.eye(5)), np.zeros(5))
    assert np.array_equal(split(np.ones((1, 1))), [0])


def test_equal_blocks() -> None:
    assert np.bincount(equal_blocks(10, 4)).tolist() == [3, 2, 3, 2]
    assert equal_blocks(3, 8).tolist() == [0, 1, 2]
