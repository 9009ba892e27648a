"""Laws of monomial elements: hypothesis for the laws, enumeration for small groups, controls that must fail."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cipm_ir.algebra import Element
from cipm_ir.errors import SymmetryError

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


@st.composite
def elements(draw: st.DrawFn, count: int = 1, exact: bool = False) -> list[Element]:
    """`count` elements of one common kind; with `exact`, scales are powers of two."""
    n, k, j = draw(st.integers(1, 7)), draw(st.integers(0, 2)), draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    exponent = rng.integers(-3, 4, (count, k, n)) if exact else rng.standard_normal((count, k, n))
    sign = rng.choice([-1, 1], (count, j, n))
    return [Element(draw(st.permutations(range(n))), 2.0**e, s) for e, s in zip(exponent, sign, strict=True)]  # type: ignore[arg-type]


def tensor_for(g: Element, dtype: Any = np.float64) -> NDArray[Any]:
    return np.random.default_rng(g.n).standard_normal((3, g.n, 2)).astype(dtype)


def same_bits(left: NDArray[Any], right: NDArray[Any]) -> bool:
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


@given(elements(3))
def test_composition_is_associative(gs: list[Element]) -> None:
    a, b, c = gs
    assert ((a @ b) @ c).close(a @ (b @ c))


@given(elements())
def test_identity_and_inverse(gs: list[Element]) -> None:
    g = gs[0]
    e = Element.identity(g.n, g.scales, g.signs)
    assert e @ g == g == g @ e
    assert e.is_identity
    assert (g @ g.inverse()).close(e) and (g.inverse() @ g).close(e)


@given(elements(2))
def test_action_is_a_homomorphism(gs: list[Element]) -> None:
    g, h = gs
    x = tensor_for(g)
    np.testing.assert_allclose((g @ h).act(x, 1), g.act(h.act(x, 1), 1), rtol=1e-13)


@given(elements(2, exact=True), st.sampled_from(DTYPES))
def test_power_of_two_action_is_exact(gs: list[Element], dtype: Any) -> None:
    g, h = gs
    x = tensor_for(g, dtype)
    assert g.is_power_of_two
    assert same_bits((g @ h).act(x, 1), g.act(h.act(x, 1), 1))
    assert same_bits(g.inverse().act(g.act(x, 1), 1), x)
    assert same_bits(g.act(x, 1), (g.act(x.astype(np.float64), 1)).astype(dtype))
    assert g @ g.inverse() == Element.identity(g.n, g.scales, g.signs)


@given(elements())
def test_dual_preserves_contraction(gs: list[Element]) -> None:
    g = gs[0]
    x, w = np.random.default_rng(0).standard_normal((2, g.n))
    np.testing.assert_allclose(g.act(x) @ g.dual().act(w), x @ w, rtol=1e-11, atol=1e-12)
    inverse_scale = [-1] * g.scales
    np.testing.assert_allclose(g.act(w, 0, inverse_scale, [-1] * g.signs), g.dual().act(w), rtol=1e-13)


@given(elements(2))
def test_dual_is_a_homomorphism_and_an_involution(gs: list[Element]) -> None:
    g, h = gs
    assert (g @ h).dual().close(g.dual() @ h.dual())
    assert g.dual().dual().close(g)


@given(elements(exact=True), st.integers(-5, 5))
def test_power_is_repeated_composition(gs: list[Element], exponent: int) -> None:
    g = gs[0]
    step = g if exponent >= 0 else g.inverse()
    expected = Element.identity(g.n, g.scales, g.signs)
    for _ in range(abs(exponent)):
        expected = expected @ step
    assert g.power(exponent) == expected


def test_wrong_composition_order_is_refuted() -> None:
    """Control: p_g[p_h] instead of p_h[p_g] breaks the homomorphism law, so the law tests can fail."""
    g, h = Element.of([1, 2, 0]), Element.of([1, 0, 2])
    x = np.arange(3.0)
    wrong = Element.of(g.perm[h.perm])
    assert not np.array_equal(wrong.act(x), g.act(h.act(x)))
    assert np.array_equal((g @ h).act(x), g.act(h.act(x)))


def test_wrong_dual_is_refuted() -> None:
    """Control: acting on the partner axis with g itself changes the contraction."""
    g = Element.of([1, 0], scale=[2.0, 4.0])
    x, w = np.array([1.0, 2.0]), np.array([3.0, 5.0])
    assert g.act(x) @ g.dual().act(w) == x @ w
    assert g.act(x) @ g.act(w) != x @ w


def test_gather_form_by_hand() -> None:
    g = Element.of([2, 0, 1], scale=[2.0, 0.5, 4.0], sign=[1, -1, 1])
    assert g.act(np.array([10.0, 20.0, 30.0])).tolist() == [60.0, -5.0, 80.0]
    assert g.factor().tolist() == [2.0, -0.5, 4.0]


def test_exponents_select_directions() -> None:
    g = Element.of([0, 1], scale=[[2.0, 4.0], [3.0, 5.0]], sign=[[-1, 1], [1, -1]])
    x = np.ones(2)
    assert g.act(x, 0, [0, 0], [0, 0]).tolist() == [1.0, 1.0]
    assert g.act(x, 0, [2, 0], [1, 0]).tolist() == [-4.0, 16.0]
    assert g.act(x, 0, [-1, 1], [0, 3]).tolist() == [1.5, -1.25]


@pytest.mark.parametrize("n", range(6))
def test_permutations_enumerated(n: int) -> None:
    """All of S(n): closed, n! distinct elements, inverses inside, orders as counted by repeated composition."""
    group = {Element.of(p) for p in itertools.permutations(range(n))} if n else {Element.identity(0)}
    assert len(group) == math.factorial(n)
    assert all(g.inverse() in group for g in group)
    if n <= 4:
        assert {g @ h for g in group for h in group} == group
    for g in group:
        reached, count = g, 1
        while not reached.is_identity:
            reached, count = reached @ g, count + 1
        assert g.order == count


@pytest.mark.parametrize("lengths", [(64, 1), (2, 3, 5, 7, 11), (1,), (97, 89)])
def test_order_is_the_lcm_of_cycle_lengths(lengths: tuple[int, ...]) -> None:
    starts = np.cumsum((0, *lengths[:-1]))
    cycles = [start + np.roll(np.arange(size), 1) for start, size in zip(starts, lengths, strict=True)]
    hidden = Element.of(np.random.default_rng(1).permutation(sum(lengths)))
    g = hidden @ Element.of(np.concatenate(cycles)) @ hidden.inverse()
    assert g.order == math.lcm(*lengths)
    assert g.power(g.order).is_identity


@pytest.mark.parametrize("dtype", DTYPES)
def test_general_scales_round_once(dtype: Any) -> None:
    g = Element.of(np.arange(50), scale=np.exp(np.random.default_rng(0).standard_normal(50)))
    x = np.random.default_rng(1).standard_normal((4, 50)).astype(dtype)
    expected = (x.astype(np.float64) * g.scale).astype(dtype)
    acted = g.act(x, -1)
    assert acted.dtype == np.dtype(dtype) and same_bits(acted, expected)


def test_action_leaves_its_input_alone_and_copies() -> None:
    x = np.arange(4.0)
    y = Element.identity(4).act(x)
    y[0] = 9.0
    assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
    perm = np.array([1, 0])
    g = Element.of(perm)
    perm[0] = 0
    assert g.perm.tolist() == [1, 0] and not g.perm.flags.writeable


def test_integer_tensors_are_permuted_but_not_scaled() -> None:
    x = np.array([1, 2, 3], dtype=np.int8)
    assert Element.of([2, 0, 1]).act(x).tolist() == [3, 1, 2]
    assert Element.of([2, 0, 1], sign=[1, 1, 1]).act(x).tolist() == [3, 1, 2]
    packed = x.astype(ml_dtypes.int4)
    for refused in (x, packed, x.astype(bool)):
        with pytest.raises(SymmetryError, match="permuted but not scaled"):
            Element.of([2, 0, 1], sign=[1, -1, 1]).act(refused)
    with pytest.raises(SymmetryError, match="no range"):
        Element.of([0], scale=[2.0]).act(np.ones(1, ml_dtypes.float8_e4m3fn))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [4.0, 4.1])
def test_overflow_is_refused(dtype: Any, scale: float) -> None:
    top = np.asarray([float(ml_dtypes.finfo(dtype).max)]).astype(dtype)  # type: ignore[no-untyped-call]
    with pytest.raises(SymmetryError, match="overflows"):
        Element.of([0], scale=[scale]).act(top)


def test_composed_scales_that_overflow_are_refused() -> None:
    g = Element.of([0], scale=[1e200])
    with pytest.raises(SymmetryError, match="positive and finite"):
        g @ g
    with pytest.raises(SymmetryError, match="positive and finite"):
        g.act(np.ones(1), 0, [2])
    with pytest.raises(SymmetryError, match="positive and finite"):
        Element.of([0], scale=[5e-324]).inverse()


@pytest.mark.parametrize(
    ("perm", "scale", "sign", "message"),
    [
        ([0, 0], None, None, "never holds 1"),
        ([0, 2], None, None, "holds 2"),
        ([0, -1], None, None, "holds -1"),
        ([0.0, 1.0], None, None, "integer array"),
        ([[0, 1]], None, None, "integer array"),
        ([0, 1], [1.0, 0.0], None, "positive and finite"),
        ([0, 1], [1.0, -1.0], None, "positive and finite"),
        ([0, 1], [1.0, np.nan], None, "positive and finite"),
        ([0, 1], [1.0, np.inf], None, "positive and finite"),
        ([0, 1], [1.0, 1.0, 1.0], None, "real numbers"),
        ([0, 1], ["a", "b"], None, "real numbers"),
        ([0, 1], None, [1, 0], r"\+1 or -1"),
        ([0, 1], None, [1, 257], r"\+1 or -1"),
        ([0, 1], None, [1.0, -0.5], r"\+1 or -1"),
    ],
)
def test_bad_elements_are_refused(perm: Any, scale: Any, sign: Any, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        Element.of(perm, scale, sign)


def test_bad_uses_are_refused() -> None:
    g = Element.of([1, 0], scale=[2.0, 2.0])
    with pytest.raises(SymmetryError, match="cannot be composed"):
        g @ Element.of([1, 0])
    with pytest.raises(SymmetryError, match="has size 3"):
        g.act(np.ones((2, 3)), 1)
    with pytest.raises(SymmetryError, match="does not exist"):
        g.act(np.ones(2), 1)
    with pytest.raises(SymmetryError, match="one per direction"):
        g.act(np.ones(2), 0, [1, 1])
    with pytest.raises(SymmetryError, match="one per direction"):
        g.act(np.ones(2), 0, [0.5])
    with pytest.raises(SymmetryError, match="one per direction"):
        Element.of([1, 0]).act(np.ones(2), 0, None, [1])


def test_equality_and_hash() -> None:
    g = Element.of([1, 0], scale=[2.0, 3.0], sign=[1, -1])
    assert g == Element.of([1, 0], [[2.0, 3.0]], [[1.0, -1.0]])
    assert hash(g) == hash(Element.of([1, 0], [[2.0, 3.0]], [[1.0, -1.0]]))
    for other in (Element.of([0, 1], [2.0, 3.0], [1, -1]), Element.of([1, 0], [2.0, 3.5], [1, -1]), Element.of([1, 0])):
        assert g != other and not g.close(other)
    assert not g.is_power_of_two and g != "g"
    assert repr(g) == "Element(n=2, scales=1, signs=1, order=2)"


def test_memory_stays_linear() -> None:
    """A dense matrix on a million classes would need terabytes; everything here stays within 100 MB."""
    n = 1_000_000
    rng = np.random.default_rng(0)
    g, h = (Element.of(rng.permutation(n), scale=2.0 ** rng.integers(-3, 4, n)) for _ in range(2))
    x = np.ones(n, dtype=np.float32)
    tracemalloc.start()
    acted = (g @ h.inverse()).act(x)
    order = g.dual().order
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert acted.dtype == np.float32 and order >= 1
    assert peak < 100e6


def test_scaling_needs_no_wide_copy() -> None:
    """General scales on a float32 tensor allocate the result only, not a float64 tensor beside it."""
    x = np.ones((512, 8192), dtype=np.float32)
    g = Element.of(np.arange(512), scale=np.linspace(0.1, 2.0, 512))
    tracemalloc.start()
    g.act(x, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * x.nbytes
