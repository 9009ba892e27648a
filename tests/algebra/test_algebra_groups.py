"""The lattice of groups: meets on all pairs, orders by enumeration, names, random members, membership both ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cipm_ir.algebra import Element, Group
from cipm_ir.errors import SymmetryError

N = 4
MONOMIAL = [
    Group(N, permutes=permutes, scales=scales, signs=signs)
    for permutes in (False, True)
    for scales in range(3)
    for signs in range(3)
]
LATTICE = [*MONOMIAL, Group.orthogonal(N), Group.general_linear(N)]


def members(group: Group) -> Iterator[Element]:
    """Every element of a finite group without scales."""
    identity = [tuple(range(group.n))]
    perms = itertools.permutations(range(group.n)) if group.permutes else identity
    for perm in perms:
        for flips in itertools.product((1, -1), repeat=group.signs * group.n):
            yield Element(np.array(perm, int), np.ones((0, group.n)), np.reshape(flips, (group.signs, group.n)))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("signs", [0, 1, 2])
@pytest.mark.parametrize("permutes", [False, True])
def test_finite_groups_enumerated(n: int, signs: int, permutes: bool) -> None:
    """Order counted, closure and inverses checked element by element."""
    group = Group(n, permutes=permutes, signs=signs)
    everything = set(members(group))
    assert len(everything) == group.order
    assert all(g in group and g.inverse() in everything for g in everything)
    few = sorted(everything, key=lambda g: (tuple(g.perm), g.sign.tobytes()))[:48]
    assert all(g @ h in everything for g in few for h in everything)


@pytest.mark.parametrize(
    ("group", "order"),
    [
        (Group.symmetric(5), 120),
        (Group.hyperoctahedral(5), 3840),
        (Group.trivial(5), 1),
        (Group(5, permutes=False, signs=1), 32),
        (Group(3, signs=2), 384),
        (Group.positive(5), math.inf),
        (Group(5, permutes=False, scales=1), math.inf),
        (Group.monomial(5), math.inf),
        (Group.orthogonal(1), 2),
        (Group.orthogonal(2), math.inf),
        (Group.general_linear(1), math.inf),
        (Group.general_linear(0), 1),
        (Group.symmetric(200), math.factorial(200)),
    ],
)
def test_order(group: Group, order: float) -> None:
    assert group.order == order


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (Group.trivial(16), "1"),
        (Group.symmetric(16), "S(16)"),
        (Group.positive(64), "R>0 wr S(64)"),
        (Group.hyperoctahedral(16), "B(16)"),
        (Group.monomial(16), "R* wr S(16)"),
        (Group.orthogonal(16), "O(16)"),
        (Group.general_linear(16), "GL(16)"),
        (Group(16, permutes=False, scales=1), "R>0^16"),
        (Group(16, permutes=False, signs=1), "±1^16"),
        (Group(16, permutes=False, scales=1, signs=1), "R*^16"),
        (Group(16, scales=2), "(R>0^2) wr S(16)"),
        (Group(16, signs=2), "(±1^2) wr S(16)"),
        (Group(16, scales=2, signs=1), "(R>0^2 x ±1) wr S(16)"),
        (Group(16, scales=1, signs=2), "(R>0 x ±1^2) wr S(16)"),
        (Group(16, permutes=False, scales=2), "(R>0^2)^16"),
    ],
)
def test_names(group: Group, name: str) -> None:
    assert str(group) == group.name == name


def test_names_tell_all_groups_apart() -> None:
    assert len({group.name for group in LATTICE}) == len(LATTICE) == len(set(LATTICE))


def test_meet_is_commutative_idempotent_and_a_greatest_lower_bound() -> None:
    """On all pairs; greatest: every listed group below both lies below the meet, by enumeration."""
    for a, b in itertools.product(LATTICE, repeat=2):
        meet = a.meet(b)
        assert meet in LATTICE
        assert meet == b.meet(a)
        assert meet <= a and meet <= b
        assert all(lower <= meet for lower in LATTICE if lower <= a and lower <= b)
    assert all(a.meet(a) == a for a in LATTICE)


def test_meet_is_associative() -> None:
    for a, b, c in itertools.product(LATTICE, repeat=3):
        assert a.meet(b).meet(c) == a.meet(b.meet(c))


def test_the_order_is_partial() -> None:
    """Reflexive, antisymmetric, transitive; and not total (control)."""
    for a, b in itertools.product(LATTICE, repeat=2):
        assert (a <= b and b <= a) == (a == b)
        assert (a < b) == (a <= b and a != b)
        assert all(a <= c for c in LATTICE if a <= b and b <= c)
    assert not Group.positive(N) <= Group.hyperoctahedral(N)
    assert not Group.hyperoctahedral(N) <= Group.positive(N)


def test_the_lattice_of_the_design() -> None:
    one, s, positive = Group.trivial(N), Group.symmetric(N), Group.positive(N)
    b, monomial, o, gl = Group.hyperoctahedral(N), Group.monomial(N), Group.orthogonal(N), Group.general_linear(N)
    chains = [(one, s, positive, monomial, gl), (one, s, b, monomial, gl), (one, s, b, o, gl)]
    for chain in chains:
        assert all(low < high for low, high in itertools.pairwise(chain))
    assert positive.meet(b) == s == o.meet(positive)
    assert o.meet(monomial) == b
    assert o.meet(gl) == o
    assert not o <= monomial and not monomial <= o
    assert gl.meet(Group(N, permutes=False, scales=1, signs=1)).name == "R*^4"


def test_order_agrees_with_inclusion_of_members() -> None:
    """`a <= b` exactly when the members drawn from a lie in b, for groups without dense part."""
    for a, b in itertools.product(MONOMIAL, repeat=2):
        rng = np.random.default_rng(0)
        inside = all(a.random(rng) in b for _ in range(20))
        assert inside == (a <= b), (str(a), str(b))


@pytest.mark.parametrize("group", LATTICE, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_random_members(group: Group, power_of_two: bool) -> None:
    rng = np.random.default_rng(3)
    g, h = (group.random(rng, power_of_two=power_of_two) for _ in range(2))
    assert (g.n, g.scales, g.signs) == (group.n, group.scales, group.signs)
    assert g in group and g @ h in group and g.inverse() in group and g.dual() in group
    assert g in group.monomial_part
    if power_of_two:
        assert g.is_power_of_two and np.all(np.abs(np.log2(g.scale)) <= 3)


def test_random_permutations_and_signs_are_uniform() -> None:
    """All 48 elements of B(3) occur about equally often: chi-squared over 47 degrees of freedom below 100."""
    rng = np.random.default_rng(5)
    counts: dict[Element, int] = {}
    for _ in range(4800):
        g = Group.hyperoctahedral(3).random(rng)
        counts[g] = counts.get(g, 0) + 1
    assert len(counts) == 48
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 100


def test_random_scales_are_log_normal() -> None:
    logs = np.log(Group.positive(20_000).random(np.random.default_rng(0)).scale)
    assert abs(logs.mean()) < 0.05 and abs(logs.std() - 1) < 0.05


@pytest.mark.parametrize(
    ("group", "outsider"),
    [
        (Group.trivial(2), Element.of([1, 0])),
        (Group.symmetric(2), Element.of([1, 0], scale=[2.0, 1.0])),
        (Group.symmetric(2), Element.of([1, 0], sign=[-1, 1])),
        (Group.hyperoctahedral(2), Element.of([1, 0], scale=[2.0, 1.0], sign=[-1, 1])),
        (Group.positive(2), Element.of([1, 0], scale=[2.0, 1.0], sign=[-1, 1])),
        (Group.positive(2), Element.of([1, 0], scale=[[2.0, 1.0], [1.0, 2.0]])),
        (Group.orthogonal(2), Element.of([1, 0], scale=[2.0, 1.0])),
        (Group(2, permutes=False, scales=1), Element.of([1, 0])),
        (Group.monomial(3), Element.of([1, 0])),
    ],
)
def test_outsiders_are_not_members(group: Group, outsider: Element) -> None:
    assert outsider not in group


def test_neutral_directions_do_not_matter_for_membership() -> None:
    assert Element.identity(2, scales=2, signs=2) in Group.trivial(2)
    assert Element.of([1, 0]) in Group.monomial(2)
    assert "g" not in Group.symmetric(2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": -1}, "use 0 or more"),
        ({"n": 2, "scales": -1}, "use 0 or more"),
        ({"n": 2, "dense": "SU"}, "Unknown dense group"),
    ],
)
def test_bad_groups_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SymmetryError, match=message):
        Group(**fields)


def test_groups_on_different_sizes_are_not_compared() -> None:
    with pytest.raises(SymmetryError, match="cannot be compared"):
        Group.symmetric(2).meet(Group.symmetric(3))
