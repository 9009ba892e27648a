"""Wreath products: flattening is a homomorphism, the laws hold, orders are counted, blocks stay together."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cipm_ir.algebra import BlockElement, Element, Group, Wreath
from cipm_ir.errors import SymmetryError


@st.composite
def block_elements(draw: st.DrawFn, count: int = 1, exact: bool = False) -> list[BlockElement]:
    """`count` elements of one wreath product with up to two scale and sign directions."""
    inner = Group(draw(st.integers(1, 4)), scales=draw(st.integers(0, 2)), signs=draw(st.integers(0, 2)))
    wreath = Wreath(inner, draw(st.integers(1, 4)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [wreath.random(rng, power_of_two=exact) for _ in range(count)]


def neutral(g: BlockElement) -> BlockElement:
    return BlockElement.identity(g.m, g.n, g.scales, g.signs)


@given(block_elements(3))
def test_laws(gs: list[BlockElement]) -> None:
    a, b, c = gs
    assert ((a @ b) @ c).close(a @ (b @ c))
    assert neutral(a) @ a == a == a @ neutral(a)
    assert (a @ a.inverse()).close(neutral(a)) and (a.inverse() @ a).close(neutral(a))


@given(block_elements(2))
def test_flatten_is_a_homomorphism(gs: list[BlockElement]) -> None:
    g, h = gs
    assert (g @ h).flatten() == g.flatten() @ h.flatten()
    assert g.inverse().flatten() == g.flatten().inverse()
    assert g.dual().flatten() == g.flatten().dual()
    assert (g.dual() @ h.dual()).close((g @ h).dual())
    assert neutral(g).flatten().is_identity and neutral(g).is_identity


@given(block_elements(2, exact=True))
def test_action_is_an_exact_homomorphism(gs: list[BlockElement]) -> None:
    g, h = gs
    x = np.random.default_rng(0).standard_normal((2, g.m * g.n)).astype(np.float32)
    assert np.array_equal((g @ h).act(x, 1), g.act(h.act(x, 1), 1))
    assert np.array_equal(g.inverse().act(g.act(x, -1), -1), x)


@given(block_elements())
def test_merged_and_split_axes_agree(gs: list[BlockElement]) -> None:
    g = gs[0]
    x = np.random.default_rng(0).standard_normal((g.m, 3, g.n))
    merged = g.act(np.moveaxis(x, 1, 2).reshape(g.m * g.n, 3))
    assert np.array_equal(g.act(x, (0, -1)), np.moveaxis(merged.reshape(g.m, g.n, 3), 2, 1))
    assert np.array_equal(g.act(x.transpose(2, 1, 0), (2, 0)), g.act(x, (0, 2)).transpose(2, 1, 0))


def test_gather_form_by_hand() -> None:
    g = BlockElement.of([1, 0], [Element.of([1, 0], [2.0, 2.0], [1, -1]), Element.of([0, 1], [1.0, 4.0], [1, 1])])
    assert g.act(np.array([1.0, 2.0, 3.0, 4.0])).tolist() == [8.0, -6.0, 1.0, 8.0]
    assert g.act(np.array([1.0, 2.0, 3.0, 4.0]), 0, [0], [0]).tolist() == [4.0, 3.0, 1.0, 2.0]
    assert g.block(0) == Element.of([1, 0], [2.0, 2.0], [1, -1])


def test_composing_inner_parts_without_moving_blocks_is_refuted() -> None:
    """Control: the product of inner parts block by block, ignoring where the outer part sends them, is wrong."""
    g = BlockElement.of([1, 0], [Element.of([0, 1, 2]), Element.of([0, 1, 2])])
    h = BlockElement.of([0, 1], [Element.of([1, 2, 0]), Element.of([0, 1, 2])])
    x = np.arange(6.0)
    naive = BlockElement.of(h.outer[g.outer], [g.block(b) @ h.block(b) for b in range(2)])
    assert not np.array_equal(naive.act(x), g.act(h.act(x)))
    assert np.array_equal((g @ h).act(x), g.act(h.act(x)))


@pytest.mark.parametrize(("n", "m", "order"), [(2, 3, 48), (3, 2, 72), (2, 2, 8), (1, 4, 24), (4, 1, 24)])
def test_symmetric_wreath_enumerated(n: int, m: int, order: int) -> None:
    """S(n) wr S(m): order counted, closed, flattened faithfully onto exactly the permutations that keep blocks."""
    inner = [Element.of(p) for p in itertools.permutations(range(n))]
    outer = list(itertools.permutations(range(m)))
    group = {BlockElement.of(o, parts) for o in outer for parts in itertools.product(inner, repeat=m)}
    wreath = Wreath(Group.symmetric(n), m)
    assert len(group) == order == wreath.order
    assert all(g in wreath and g.inverse() in group for g in group)
    assert all(g @ h in group for g in group for h in group)
    keeps_blocks = {
        Element.of(p)
        for p in itertools.permutations(range(n * m))
        if all(len({unit // n for unit in p[b * n : b * n + n]}) == 1 for b in range(m))
    }
    assert {g.flatten() for g in group} == keeps_blocks


def test_signed_wreath_enumerated() -> None:
    """B(2) wr S(2): 8^2 * 2 elements, closed, flattened one to one."""
    flips = list(itertools.product((1, -1), repeat=2))
    inner = [Element.of(p, sign=s) for p in ([0, 1], [1, 0]) for s in flips]
    group = {BlockElement.of(o, parts) for o in ([0, 1], [1, 0]) for parts in itertools.product(inner, repeat=2)}
    wreath = Wreath(Group.hyperoctahedral(2), 2)
    assert len(group) == len({g.flatten() for g in group}) == wreath.order == 128
    generators = [wreath.random(np.random.default_rng(seed)) for seed in range(6)]
    assert {g @ h for g in generators for h in group} == group


@pytest.mark.parametrize(
    ("wreath", "name", "order"),
    [
        (Wreath(Group.symmetric(32), 12), "S(32) wr S(12)", math.factorial(32) ** 12 * math.factorial(12)),
        (Wreath(Group.positive(32), 12), "(R>0 wr S(32)) wr S(12)", math.inf),
        (Wreath(Group.general_linear(8), 200), "GL(8) wr S(200)", math.inf),
        (Wreath(Group.hyperoctahedral(2), 3), "B(2) wr S(3)", 8**3 * 6),
        (Wreath(Group.trivial(4), 3), "1 wr S(3)", 6),
        (Wreath(Group(4, permutes=False, signs=1), 2), "(±1^4) wr S(2)", 512),
        (Wreath(Group.positive(4), 0), "(R>0 wr S(4)) wr S(0)", 1),
    ],
)
def test_names_and_orders(wreath: Wreath, name: str, order: float) -> None:
    assert str(wreath) == wreath.name == name
    assert wreath.order == order


@pytest.mark.parametrize("inner", [Group.symmetric(3), Group.monomial(3), Group(3, permutes=False, signs=2)], ids=str)
def test_random_members(inner: Group) -> None:
    rng = np.random.default_rng(0)
    wreath = Wreath(inner, 5)
    g, h = wreath.random(rng), wreath.random(rng, power_of_two=True)
    assert g in wreath and g @ h in wreath and g.inverse() in wreath and g.dual() in wreath
    assert h.flatten().is_power_of_two
    assert all(g.block(b) in inner for b in range(5))


def test_random_reaches_every_element() -> None:
    rng = np.random.default_rng(0)
    assert len({Wreath(Group.symmetric(2), 3).random(rng) for _ in range(1000)}) == 48


def test_outsiders_are_not_members() -> None:
    wreath = Wreath(Group.symmetric(2), 2)
    scaled = BlockElement.of([0, 1], [Element.of([0, 1], [2.0, 1.0])] * 2)
    flipped = BlockElement.of([0, 1], [Element.of([0, 1], sign=[-1, 1])] * 2)
    for outsider in (scaled, flipped, BlockElement.identity(3, 2), BlockElement.identity(2, 3), "g"):
        assert outsider not in wreath
    assert BlockElement.of([0, 1], [Element.of([1, 0])] * 2) not in Wreath(Group.trivial(2), 2)
    assert BlockElement.identity(2, 2, scales=1) in wreath


def test_equality() -> None:
    g = BlockElement.of([1, 0], [Element.of([1, 0], [2.0, 3.0])] * 2)
    assert g == BlockElement(g.outer, g.perm, g.scale, g.sign) and hash(g) == hash(g.inverse().inverse())
    assert g != BlockElement.of([1, 0], [Element.of([1, 0], [2.0, 3.5])] * 2)
    assert g != BlockElement.identity(2, 2, scales=1) and g != "g"
    assert repr(g) == "BlockElement(m=2, n=2, scales=1, signs=0)"


def bad_block_elements() -> list[tuple[Any, str]]:
    ones, none, flat = np.ones((2, 1, 2)), np.zeros((2, 0, 2)), np.zeros((2, 0, 2), dtype=np.int8)
    rows = [[0, 1], [1, 0]]
    return [
        (lambda: BlockElement.of([0, 1], [Element.of([0, 1]), Element.of([0])]), "must share one"),
        (lambda: BlockElement.of([], []), "must share one"),
        (lambda: BlockElement.of([0, 1, 2], [Element.of([0])] * 2), "3 blocks need as many"),
        (lambda: BlockElement.of([0, 0], [Element.of([0])] * 2), "never holds 1"),
        (lambda: BlockElement(np.arange(2), np.array([[0, 1], [1, 1]]), none, flat), "never holds 0"),
        (lambda: BlockElement(np.arange(2), np.array([[0, 1], [0, 2]]), none, flat), "holds 2"),
        (lambda: BlockElement(np.arange(2), np.array(rows), -ones, flat), "positive and finite"),
        (lambda: BlockElement(np.arange(2), np.array(rows), np.ones((1, 1, 2)), flat), "real numbers"),
        (lambda: BlockElement(np.arange(2), np.array(rows), none, (2 * ones).astype(np.int8)), r"\+1 or -1"),
        (lambda: BlockElement.identity(2, 2) @ BlockElement.identity(2, 3), "cannot be composed"),
        (lambda: BlockElement.identity(2, 2).act(np.ones((2, 3)), (0, 1)), "have sizes"),
        (lambda: BlockElement.identity(2, 2).act(np.ones((2, 2)), (0, -2)), "pair of distinct axes"),
        (lambda: BlockElement.identity(2, 2).act(np.ones((2, 2)), (0, 2)), "pair of distinct axes"),
        (lambda: Wreath(Group.symmetric(2), -1), "use 0 or more"),
    ]


@pytest.mark.parametrize(("build", "message"), bad_block_elements())
def test_bad_block_elements_are_refused(build: Any, message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        build()


def test_memory_stays_linear() -> None:
    rng = np.random.default_rng(0)
    wreath = Wreath(Group.positive(100), 5000)
    g, h = wreath.random(rng), wreath.random(rng)
    x = np.ones(500_000, dtype=np.float32)
    tracemalloc.start()
    acted = (g @ h.inverse()).act(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert acted.shape == x.shape
    assert peak < 100e6
