"""Dense elements: laws of the algebra, what is refused, Hadamard matrices; edits round once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cipm_ir.algebra import DenseElement, Element, Group
from cipm_ir.algebra.hadamard import hadamard_matrix
from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.primitives.edits import Edit


def drawn(n: int, seed: int) -> list[DenseElement]:
    rng = np.random.default_rng(seed)
    return [
        DenseElement.orthogonal(n, rng),
        DenseElement.invertible(n, rng),
        DenseElement.hadamard(n, rng),
        DenseElement.of(Element.of(rng.permutation(n), np.exp(rng.standard_normal(n)), rng.choice([-1, 1], n))),
    ]


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_laws(n: int) -> None:
    x = np.random.default_rng(1).standard_normal((3, n))
    for g in drawn(n, 2):
        assert (g @ g.inverse()).close(DenseElement.identity(n))
        for h in drawn(n, 3):
            np.testing.assert_allclose((g @ h).act(x, 1), g.act(h.act(x, 1), 1), rtol=1e-9, atol=1e-9)
            y = h.act(x, 1)
            paired = (g.act(x, 1) * g.dual().act(y, 1)).sum(axis=1)
            np.testing.assert_allclose(paired, (x * y).sum(axis=1), rtol=1e-8, atol=1e-8)


def test_a_monomial_element_is_a_matrix() -> None:
    rng = np.random.default_rng(4)
    element = Element.of(rng.permutation(6), np.exp(rng.standard_normal(6)), rng.choice([-1, 1], 6))
    x = rng.standard_normal((6, 2))
    np.testing.assert_allclose(DenseElement.of(element).act(x), element.act(x))
    other = DenseElement.orthogonal(6, rng)
    np.testing.assert_allclose((other @ element).act(x), other.act(element.act(x)))
    np.testing.assert_allclose((DenseElement.of(element) @ other).act(x), element.act(other.act(x)))


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (np.ones((2, 3)), "square"),
        (np.ones((3, 3)), "condition number"),
        (np.diag([1.0, 1e-9]), "condition number"),
        (np.array([[np.nan]]), "not finite"),
        (np.array([["a"]]), "real"),
    ],
)
def test_what_is_no_element(matrix: Any, said: str) -> None:
    with pytest.raises(SymmetryError, match=said):
        DenseElement(matrix)


def test_wrong_axes_and_types_are_refused() -> None:
    g = DenseElement.identity(3)
    for array, axis in ((np.ones((2, 4)), 1), (np.ones(3), 1), (np.ones(3, np.int8), 0)):
        with pytest.raises(SymmetryError):
            g.act(array, axis)
    with pytest.raises(SymmetryError, match="cannot be composed"):
        g @ DenseElement.identity(2)


def test_groups_hold_their_elements() -> None:
    rng = np.random.default_rng(5)
    rotation, stretch = DenseElement.orthogonal(4, rng), DenseElement.invertible(4, rng)
    assert rotation in Group.orthogonal(4) and rotation in Group.general_linear(4)
    assert stretch in Group.general_linear(4) and stretch not in Group.orthogonal(4)
    assert rotation not in Group.orthogonal(5)
    assert all(rotation not in group for group in (Group.monomial(4), Group.hyperoctahedral(4), Group.trivial(4)))
    assert DenseElement(rotation.matrix + 1e-4) not in Group.orthogonal(4)


def test_elements_are_values() -> None:
    matrix = np.eye(3)
    g = DenseElement(matrix)
    matrix[0, 0] = 7.0
    assert g.is_identity and g == DenseElement.identity(3) and hash(g) == hash(DenseElement.identity(3))
    with pytest.raises(ValueError, match="read-only"):
        g.matrix[0, 0] = 2.0


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 60, 68, 76, 96, 128, 384, 768])
def test_hadamard_matrices(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert matrix is not None and set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, n * np.eye(n))


@pytest.mark.parametrize("n", [0, 3, 6, 10, 52, 92])
def test_orders_without_a_known_hadamard_matrix(n: int) -> None:
    assert hadamard_matrix(n) is None


@pytest.mark.parametrize("n", [1, 3, 6, 40, 52, 92])
def test_every_size_has_a_randomized_rotation(n: int) -> None:
    one, two = (DenseElement.hadamard(n, np.random.default_rng(seed)) for seed in (0, 1))
    assert one.is_orthogonal and two.is_orthogonal
    assert n == 1 or one != two


def test_an_outlier_is_spread_evenly() -> None:
    x = np.zeros(64)
    x[17] = 8.0
    np.testing.assert_allclose(np.abs(DenseElement.hadamard(64, np.random.default_rng(0)).act(x)), 1.0)


# ---------------------------------------------------------------- edits
def places(*positions: int) -> NDArray[np.int64]:
    return np.asarray(positions)[:, None]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_mixings_of_several_axes_round_once(dtype: str) -> None:
    rng = np.random.default_rng(6)
    array = rng.standard_normal((6, 5)).astype(dtype)
    a, b, c = rng.standard_normal((3, 3)), rng.standard_normal((2, 2)), rng.standard_normal((5, 5))
    edit = Edit(mix={0: [(places(0, 2, 4), a), (places(5, 1), b)], 1: [(places(0, 1, 2, 3, 4), c)]})
    expected = array.astype(np.float64)
    expected[[0, 2, 4]] = a.T @ expected[[0, 2, 4]]
    expected[[5, 1]] = b.T @ expected[[5, 1]]
    expected = expected @ c
    found = edit.apply(array)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, expected.astype(dtype))


def test_a_mixing_comes_before_a_gather_of_the_same_axis() -> None:
    rng = np.random.default_rng(8)
    array, matrix = rng.standard_normal((3, 4)), rng.standard_normal((2, 2))
    for axis in (0, 1):
        order = rng.permutation(array.shape[axis])
        mixed = Edit(mix={axis: [(places(0, 1), matrix)]}).apply(array)
        both = Edit(mix={axis: [(places(0, 1), matrix)]}, take={axis: order}).apply(array)
        np.testing.assert_array_equal(both, mixed.take(order, axis=axis))


def test_occurrences_are_mixed_one_by_one() -> None:
    rng = np.random.default_rng(9)
    array, matrix = rng.standard_normal((2, 6)), rng.standard_normal((2, 2))
    found = Edit(mix={1: [(np.array([[0, 1, 2], [5, 4, 3]]), matrix)]}).apply(array)
    for k in range(3):
        np.testing.assert_allclose(found[:, [k, 5 - k]], array[:, [k, 5 - k]] @ matrix)


def test_an_overflow_is_an_error() -> None:
    edit = Edit(mix={0: [(places(0, 1), 1e5 * np.eye(2))]})
    with pytest.raises(SymmetryError, match="overflows"):
        edit.apply(np.ones((2, 2), np.float16))
    assert np.isfinite(edit.apply(np.ones((2, 2), np.float32))).all()
