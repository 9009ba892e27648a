"""The index of consumers gives what a scan of all nodes, contractions and weights gives."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tests import zoo

import cipm_ir
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.consumers import Incidence, element_places

MODELS = [
    "residual_blocks", "attention_gqa", "attention_qkv_major_split", "channel_shuffle", "scan_rows", "if_capture",
    "siamese", "mlp_transposed_weight", "batch_norm_relu",
]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return cipm_ir.load(zoo.build(request.param)).analysis


def scanned_nodes(analysis: Analysis, inside: NDArray[np.bool_]) -> list[int]:
    walk, of, found = analysis.walk, analysis.classes.of, []
    for position, node in enumerate(walk.nodes):
        states = [walk.states.get(v.name or "") for v in node.inputs if v is not None]
        leaves = [walk.use_leaf[position, k] for k in range(len(node.inputs)) if (position, k) in walk.use_leaf]
        states += [walk.leaves[leaf].state for leaf in leaves]
        if any(inside[of[f.labels]].any() for s in states if s is not None for f in s.factors):
            found.append(position)
    return found


def test_lookups_equal_scans(analysis: Analysis) -> None:
    """For every space, and for a few single classes."""
    walk, classes, index = analysis.walk, analysis.classes, analysis.consumers
    asked = [raw.table.ravel() for raw in analysis.spaces] + [np.asarray([k]) for k in range(0, classes.count, 7)]
    for members in asked:
        inside = np.zeros(classes.count, bool)
        inside[members] = True
        assert index.nodes(members) == scanned_nodes(analysis, inside)
        summed = [c for c in walk.rec.contractions if inside[classes.of[c.a]].any()]
        assert [id(c) for c in index.contractions(members)] == [id(c) for c in summed]
        normal = any(inside[classes.of[labels]].any() for labels in walk.rec.normalized)
        assert bool(index.normalized[members].any()) == normal
    by_node = {k: [c for c in walk.rec.contractions if c.node == k] for k in range(len(walk.nodes))}
    assert index.contractions_at == {k: found for k, found in by_node.items() if found}
    for k in range(len(analysis.spaces)):
        element = analysis.elements_of(k)
        summed = [c for c in walk.rec.contractions if (element[classes.refined(c.a)] >= 0).any()]
        assert index.contractions(np.flatnonzero(element >= 0), refined=True) == summed


def test_owners_are_the_axes_that_hold_the_labels(analysis: Analysis) -> None:
    """Every whole axis is found by its labels; a part of one, or labels of two, are nobody's."""
    factors = [f for f in analysis.walk.leaf_factors if f.active]
    assert factors
    for f in factors:
        labels = np.arange(f.base, f.base + f.size)
        assert analysis.consumers.owner(labels) is f
        assert f.size < 2 or analysis.consumers.owner(labels[1:]) is None
        assert analysis.consumers.owner(labels + 1) is not f


def test_incidence_on_random_arrays() -> None:
    """Repeated classes, empty arrays, classes that no array holds, and none asked for."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 30, size=rng.integers(0, 9)) for _ in range(40)]
    index = Incidence.of(arrays)
    for asked in (rng.choice(50, size=n, replace=False) for n in (0, 1, 1, 1, 5, 20, 50)):
        wanted = [k for k, array in enumerate(arrays) if np.isin(array, asked).any()]
        assert index.holding(asked).tolist() == wanted


@pytest.mark.parametrize(
    ("owner", "places"),
    [
        ([1, 0, -1, 0, 1], [[1, 3], [0, 4]]),
        ([0, 1, 1], None),
        ([-1, 0], None),
        ([-1, -1], [[], []]),
    ],
)
def test_element_places(owner: list[int], places: list[list[int]] | None) -> None:
    """Two elements: each twice, unequally often, one missing, and none at all."""
    found = element_places(np.asarray(owner), 2)
    assert (found is None) == (places is None)
    assert found is None or found.tolist() == places
