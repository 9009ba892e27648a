"""Orders of units: planted blocks, optimality against brute force, degenerate matrices, and what must not pass."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pytest
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform
from tests.models.planted import same_partition

from cipm_ir.errors import OptionError
from cipm_ir.passes.clustering import order as cluster_order
from cipm_ir.passes.clustering.leaf_order import optimal_leaf_order
from cipm_ir.passes.clustering.metrics import split
from cipm_ir.passes.clustering.order import (
    METHODS,
    checked,
    community_labels,
    distances,
    forwards,
    grouped_order,
    leaf_order,
    nearest_graph,
    order_units,
    path_length,
)

EVERY = pytest.mark.parametrize("method", sorted(METHODS))


def planted_matrix(n: int, modules: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An affinity with shuffled blocks, and the block of each unit."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.arange(n) * modules // n)
    made = noise * np.abs(rng.standard_normal((n, n))) / 2
    made += (label[:, None] == label) * rng.uniform(0.3, 0.9, (n, n))
    return checked(np.minimum((made + made.T) / 2, 1.0)), label


def random_affinity(n: int, seed: int) -> np.ndarray:
    return checked(np.random.default_rng(seed).random((n, n)))


@EVERY
@pytest.mark.parametrize(("n", "modules", "noise"), [(12, 3, 0.0), (30, 5, 0.1), (128, 8, 0.3), (512, 16, 0.5)])
def test_planted_blocks_become_contiguous(method: str, n: int, modules: int, noise: float) -> None:
    affinity, label = planted_matrix(n, modules, noise)
    order = order_units(affinity, method)
    assert np.array_equal(np.sort(order), np.arange(n))
    found = np.empty(n, np.int64)
    found[order] = split(affinity[np.ix_(order, order)])
    assert same_partition(found, label)


def test_the_check_of_partitions_can_fail() -> None:
    affinity, label = planted_matrix(30, 5, 0.1)
    found = split(affinity)  # as it came: shuffled
    assert not same_partition(found, label)
    assert not same_partition(np.zeros(30, int), label)
    assert same_partition(4 - label, label)


@EVERY
def test_order_does_not_depend_on_how_units_come(method: str) -> None:
    affinity = random_affinity(40, 3)
    perm = np.random.default_rng(1).permutation(40)
    one = order_units(affinity, method)
    two = perm[order_units(affinity[np.ix_(perm, perm)], method)]
    if method in ("leaf-order", "spectral"):
        assert np.array_equal(one, two) or np.array_equal(one, two[::-1])
    else:  # Louvain visits nodes as they come, and reversals start from an order or from its reverse
        assert path_length(affinity, one) == pytest.approx(path_length(affinity, two), rel=0.1)


@EVERY
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("kind", ["zeros", "ones", "nan", "two parts"])
def test_degenerate_matrices_give_an_order(method: str, n: int, kind: str) -> None:
    made = {
        "zeros": np.zeros((n, n)),
        "ones": np.ones((n, n)),
        "nan": np.full((n, n), np.nan),
        "two parts": np.kron(np.eye(2), np.ones((n, n)))[:n, :n],
    }[kind]
    order = order_units(made, method)
    assert np.array_equal(np.sort(order), np.arange(n))


def test_unknown_method_is_named() -> None:
    with pytest.raises(OptionError, match=r"no method 'magic'.*leaf-order"):
        order_units(np.eye(4), "magic")


def shortest(affinity: np.ndarray) -> float:
    return min(path_length(affinity, np.array(p)) for p in itertools.permutations(range(len(affinity))))


@pytest.mark.parametrize("seed", range(6))
def test_path_is_near_the_shortest(seed: int) -> None:
    affinity = random_affinity(7, seed)
    best = shortest(affinity)
    length = path_length(affinity, order_units(affinity, "path"))
    assert best - 1e-9 <= length <= 1.25 * best + 1e-9
    assert length <= path_length(affinity, leaf_order(affinity)) + 1e-9


def test_path_finds_a_line() -> None:
    rng = np.random.default_rng(0)
    place = rng.permutation(60) / 60
    affinity = 1 - np.abs(place[:, None] - place)
    ordered = place[order_units(affinity, "path")]
    assert np.all(np.diff(ordered) > 0) or np.all(np.diff(ordered) < 0)


def test_spectral_finds_a_band() -> None:
    rng = np.random.default_rng(0)
    place = rng.permutation(40)
    affinity = np.exp(-np.abs(place[:, None] - place) / 20.0)
    ordered = place[order_units(affinity, "spectral")]
    assert np.all(np.diff(ordered) > 0) or np.all(np.diff(ordered) < 0)


def test_wide_spaces_take_the_faster_leaf_order(monkeypatch: pytest.MonkeyPatch) -> None:
    affinity, label = planted_matrix(64, 8, 0.3)
    best = path_length(affinity, leaf_order(affinity))
    monkeypatch.setattr(cluster_order, "OPTIMAL_UP_TO", 8)
    order = leaf_order(affinity)
    assert np.array_equal(np.sort(order), np.arange(64))
    assert (np.diff(label[order]) != 0).sum() == 7
    assert best - 1e-9 <= path_length(affinity, order) < 1.3 * best


def test_iterative_eigenvectors_agree_with_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    affinity, label = planted_matrix(90, 6, 0.2)
    monkeypatch.setattr(cluster_order, "_DENSE_UP_TO", 20)
    order = order_units(affinity, "spectral")
    assert (np.diff(label[order]) != 0).sum() == 5


def test_forwards_turns_a_reversed_order() -> None:
    assert np.array_equal(forwards(np.arange(5)[::-1]), np.arange(5))
    assert np.array_equal(forwards(np.arange(5)), np.arange(5))


def test_communities_are_sparse_and_exact() -> None:
    affinity, label = planted_matrix(200, 4, 0.2)
    assert nearest_graph(affinity).number_of_edges() <= 24 * 200
    assert same_partition(community_labels(affinity), label)
    order = grouped_order(affinity, label)
    assert (np.diff(label[order]) != 0).sum() == 3


def allowed_orders(tree: np.ndarray, n: int) -> list[list[int]]:
    """Every order of the leaves of a tree in which each subtree is one stretch."""
    chains = {k: [[k]] for k in range(n)}
    for step, (one, two) in enumerate(tree[:, :2].astype(int).tolist()):
        pairs = list(itertools.product(chains[one], chains[two]))
        chains[n + step] = [a + b for a, b in pairs] + [b + a for a, b in pairs]
    return chains[2 * n - 2]


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
@pytest.mark.parametrize("linking", ["average", "single"])
def test_optimal_leaf_order_is_the_shortest_that_the_tree_allows(n: int, linking: Literal["average", "single"]) -> None:
    for seed in range(5):
        affinity = random_affinity(n, seed)
        far = distances(affinity)
        tree = linkage(squareform(far, checks=False), linking)
        every = allowed_orders(tree, n)
        found = optimal_leaf_order(tree, far)
        assert found.tolist() in every
        best = min(path_length(affinity, np.array(one)) for one in every)
        assert path_length(affinity, found) == pytest.approx(best)
