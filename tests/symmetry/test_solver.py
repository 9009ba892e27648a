"""The solver's parts, each against an independent computation: components, blocks, null spaces, ranks, walk."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, cast

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import zoo
from tests.symmetry.test_soundness import program_of
from tests.zoo.net import INT64, Net

from cipm_ir.ir.labels import Factor, State, mix, occurrence_rank, reshape_groups, simplified
from cipm_ir.ops.events import Recorder
from cipm_ir.symmetry.classes import Classes, components, find_classes, scatter_sum
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.linear import Term, nullspace, nullspace_f2
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.spaces import find_spaces
from cipm_ir.symmetry.walk import Walk

# ---------------------------------------------------------------- components and classes


def test_components_agree_with_networkx(rng: np.random.Generator) -> None:
    for _ in range(20):
        n = int(rng.integers(2, 40))
        pairs = [(rng.integers(0, n, 4), rng.integers(0, n, 4)) for _ in range(int(rng.integers(0, 5)))]
        graph: nx.Graph[int] = nx.Graph()
        graph.add_nodes_from(range(n))
        graph.add_edges_from((int(a), int(b)) for p in pairs for a, b in zip(*p, strict=True))
        count, of = components(n, pairs)
        assert count == nx.number_connected_components(graph)
        assert all(len(set(of[list(part)])) == 1 for part in nx.connected_components(graph))


def test_sums_of_hashes_do_not_depend_on_order(rng: np.random.Generator) -> None:
    index, values = rng.integers(0, 5, 1000), mix(rng.integers(0, 1 << 40, 1000))
    order = rng.permutation(1000)
    assert np.array_equal(scatter_sum(index, values, 5), scatter_sum(index[order], values[order], 5))
    other = values.copy()
    other[17] += np.uint64(1)
    assert (scatter_sum(index, values, 5) != scatter_sum(index, other, 5)).sum() == 1


def classes_of(rec: Recorder, factors: list[LeafFactor]) -> Classes:
    leaves = [SimpleNamespace(constant=False)] * (1 + max((f.leaf for f in factors), default=0))
    return find_classes(cast(Walk, SimpleNamespace(rec=rec, leaf_factors=factors, leaves=leaves)))


def leaf(rec: Recorder, size: int, number: int) -> tuple[Any, LeafFactor]:
    labels = rec.allocate(size)
    return labels, LeafFactor(number, (0,), int(labels[0]), (size,), rec.variable())


def test_pins_and_marks_tell_classes_apart() -> None:
    rec = Recorder()
    (a, fa), (b, fb) = leaf(rec, 6, 0), leaf(rec, 6, 1)
    rec.unify(a, b)
    rec.pin(b[:1], "test")
    rec.distinguish(a[4:])
    spaces = find_spaces(classes_of(rec, [fa, fb]))
    assert [s.table[:, 0].tolist() for s in spaces] == [[1, 2, 3], [4, 5]]


def test_equal_small_numbers_do_not_collide() -> None:
    """Many small leaves: a hash of (class, factor) that is symmetric in the two would split spaces at random."""
    rec = Recorder()
    leaves = [leaf(rec, 64, k) for k in range(6)]
    for (a, _), (b, _) in itertools.pairwise(leaves):
        rec.unify(a, b)
    spaces = find_spaces(classes_of(rec, [f for _, f in leaves]))
    assert [len(s.table) for s in spaces] == [64]


def test_blocks_close_to_a_fixpoint() -> None:
    """Tying the children of two grids ties their rows, and tying rows that share a child merges them."""
    rec = Recorder()
    (a, fa), (b, fb) = leaf(rec, 6, 0), leaf(rec, 6, 1)
    rows_a = rec.marginal(Factor((0, 1), a.reshape(3, 2)), (0,))
    rows_b = rec.marginal(Factor((0, 1), b.reshape(3, 2)), (0,))
    rec.unify(a, b)
    rec.unify(a[:1], a[2:3])  # the first unit of row 0 is that of row 1
    classes = classes_of(rec, [fa, fb])
    assert np.array_equal(classes.of[rows_a.labels], classes.of[rows_b.labels])
    assert len(set(classes.of[rows_a.labels].tolist())) == 2
    assert classes.block[classes.of[rows_a.labels]].all() and not classes.block[classes.of[a]].any()


# ---------------------------------------------------------------- null spaces
terms = st.lists(st.tuples(st.integers(1, 7), st.sampled_from([-2, -1, -1, 1, 1, 2, 3])), min_size=1, max_size=4)


@given(st.lists(terms, max_size=8), st.sets(st.integers(1, 7), min_size=1))
def test_integer_null_space_against_singular_values(system: list[list[Term]], wanted: set[int]) -> None:
    variables, unknowns = sorted(wanted), list(range(1, 8))
    matrix = np.zeros((len(system) + 1, 7))
    for row, equation in enumerate(system):
        for v, c in equation:
            matrix[row, v - 1] += c
    _, values, right = np.linalg.svd(matrix)
    rank = int((np.r_[values, np.zeros(7 - min(7, len(values)))] > 1e-9).sum())
    null = right[rank:]
    columns = [v - 1 for v in variables]
    expected = int(np.linalg.matrix_rank(null[:, columns], tol=1e-9)) if len(null) else 0
    count, exponents = nullspace(system, variables, unknowns)
    assert count == expected
    table = np.array([exponents.get(v, (0,) * count) for v in unknowns], float).reshape(7, count)
    assert np.array_equal(table, np.round(table))
    assert np.abs(matrix @ table).max(initial=0.0) == 0.0, "a direction that does not solve the system"
    assert np.linalg.matrix_rank(table[columns]) == count if count else True


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=8), st.sets(st.integers(1, 9), min_size=1)
)
def test_sign_null_space_against_all_vectors(system: list[list[int]], wanted: set[int]) -> None:
    variables = sorted(wanted)
    solutions = {
        tuple(x[v - 1] for v in variables)
        for x in itertools.product((0, 1), repeat=9)
        if all(sum(x[v - 1] for v in equation) % 2 == 0 for equation in system)
    }
    count, exponents = nullspace_f2(system, variables)
    spanned = {
        tuple(sum(c * e for c, e in zip(choice, exponents.get(v, (0,) * count), strict=True)) % 2 for v in variables)
        for choice in itertools.product((0, 1), repeat=count)
    }
    assert spanned == solutions
    assert len(solutions) == 2**count


# ---------------------------------------------------------------- labels
@given(st.lists(st.integers(0, 5), max_size=30))
def test_occurrence_ranks(flat: list[int]) -> None:
    ranks = occurrence_rank(np.asarray(flat, np.int64))
    assert ranks.tolist() == [flat[:k].count(x) for k, x in enumerate(flat)]


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ((2, 3, 4), (2, 12), [((0,), (0,)), ((1, 2), (1,))]),
        ((2, 12), (2, 3, 4), [((0,), (0,)), ((1,), (1, 2))]),
        ((6, 4), (4, 6), [((0, 1), (0, 1))]),
        ((5,), (1, 5, 1), [((0,), (0, 1)), ((), (2,))]),
        ((2, 3), (7,), None),
        ((0, 3), (3, 0), None),
    ],
)
def test_reshape_groups(old: Any, new: Any, groups: Any) -> None:
    found = reshape_groups(old, new)
    if groups is None:
        assert found is None
        return
    assert found is not None
    assert sorted(a for o, _ in found for a in o) == list(range(len(old)))
    assert sorted(b for _, n in found for b in n) == list(range(len(new)))
    for o, n in found:
        assert np.prod([old[a] for a in o]) == np.prod([new[b] for b in n])
    if 1 not in new:
        assert [(tuple(o), tuple(n)) for o, n in found] == groups


def test_factors_follow_their_axes() -> None:
    labels = np.arange(6).reshape(2, 3)
    factor = Factor((1, 3), labels, scale_var=4)
    moved = factor.moved({1: 2, 3: 0})
    assert moved.axes == (0, 2) and np.array_equal(moved.labels, labels.T) and moved.scale_var == 4
    assert np.array_equal(factor.on((3, 1)), labels.T)
    assert np.array_equal(factor.along(3), labels.T)
    state = State((7, 2, 1, 3), (factor,), frozenset({0}))
    assert state.factor_of(3) is factor and state.factor_of(0) is None
    assert [state.broadcasts(a) for a in range(4)] == [True, False, True, False]


def test_axes_without_change_are_dropped() -> None:
    labels = np.broadcast_to(np.arange(4)[:, None], (4, 3))
    factor = simplified((4, 3), labels, (0, 1), 1, True)
    assert factor is not None and factor.axes == (0,) and factor.labels.tolist() == [0, 1, 2, 3]
    assert simplified((1, 3), np.zeros((1, 3), np.int64), (0, 1), 1, False) is None


# ---------------------------------------------------------------- the walk
def finished(net: Net, h: str, width: int) -> Program:
    net.output(net.gemm(h, width, 3), ["N", 3])
    return program_of(net.model())


def first(net: Net, width: int = 8) -> str:
    return net.relu(net.gemm(net.input("x", ["N", 5]), 5, width))


def test_opaque_nodes_say_why() -> None:
    net = Net("opaque")
    net.domains["acme"] = 1
    program = finished(net, net.op("Mystery", first(net), domain="acme"), 8)
    (node,) = [o for o in program.opaque if o.op == "Mystery"]
    assert "no rule" in node.reason and node.inputs and "Mystery" in str(node)
    assert not program.spaces


def test_order_dependent_operators_pin() -> None:
    net = Net("ordered")
    program = finished(net, net.op("CumSum", first(net), net.const(1)), 8)
    assert not program.spaces
    assert any("CumSum" in pin.reason for pin in program.analysis.walk.rec.pins)


def test_a_bound_that_depends_on_a_dynamic_size_pins() -> None:
    """Slice(h, 0, N) cuts as many units as there are samples: no unit may move."""
    net = Net("dynamic_slice")
    h = first(net)
    end = net.op("Shape", h, start=0, end=1)
    cut = net.op("Slice", h, net.const([0]), end, net.const([1]))
    net.output(net.op("ReduceSum", cut, net.const([1])), ["N", 1])
    assert not program_of(net.model()).spaces
    fixed = Net("fixed_slice")
    cut = fixed.op("Slice", first(fixed), fixed.const([0]), fixed.const([4]), fixed.const([1]))
    fixed.output(fixed.op("ReduceSum", cut, fixed.const([1])), ["N", 1])
    spaces = program_of(fixed.model()).spaces  # the four that are read, and the four that are not
    assert [s.size for s in spaces] == [4, 4]


def test_a_grouping_that_depends_on_a_dynamic_size_pins() -> None:
    """(N, 8) -> (8, N) mixes samples and units; (N, 8) -> (N, 2, 4) does not."""
    net = Net("dynamic_reshape")
    mixed = net.op("Reshape", first(net), net.const([8, -1]))
    net.output(net.op("Relu", mixed), [8, "N"])
    assert not program_of(net.model()).spaces
    net = Net("fixed_reshape")
    back = net.op("Reshape", net.relu(net.op("Reshape", first(net), net.const([0, 2, 4]))), net.const([0, 8]))
    assert sum(s.size for s in finished(net, back, 8).spaces if s.kind == "units") == 8


def test_many_symbolic_dimensions_are_all_dynamic() -> None:
    """More symbols than there are stand-in primes: each must still differ between the two assignments."""
    net = Net("many_symbols")
    for k in range(14):
        name = net.input(f"x{k}", [f"D{k}", 4] if k % 2 else [1, 1, f"D{k}", f"E{k}"])
        net.output(net.relu(name), [f"D{k}", 4] if k % 2 else [1, 1, f"D{k}", f"E{k}"])
    shapes = program_of(net.model()).analysis.walk.shapes
    for k in range(14):
        a, b = shapes.first[f"x{k}"], shapes.second[f"x{k}"]
        symbolic = [0] if k % 2 else [2, 3]
        assert all(a[axis] != b[axis] for axis in symbolic)
    assert len(set(shapes.symbols.values())) == len(shapes.symbols)


def test_equal_vectors_are_forked_and_matrices_are_tied() -> None:
    program = program_of(zoo.build("shared_zero_bias"))
    zero = [leaf for leaf in program.analysis.walk.leaves if leaf.name.startswith("zero")]
    assert len(zero) == 3 and all(len(leaf.uses) == 1 for leaf in zero)
    program = program_of(zoo.build("tied_embedding"))
    table = [leaf for leaf in program.analysis.walk.leaves if leaf.name.startswith("embedding")]
    assert len(table) == 1 and len(table[0].uses) == 2


def test_a_graph_output_is_never_moved() -> None:
    net = Net("weight_output")
    x, w = net.input("x", ["N", 5]), net.weight((5, 8), 5)
    h = net.relu(net.op("MatMul", x, w))
    net.output(net.gemm(h, 8, 3), ["N", 3])
    assert program_of(net.model()).spaces
    net.output(w, [5, 8])
    assert not program_of(net.model()).spaces


def test_indices_from_outside_pin_the_rows_of_a_table() -> None:
    net = Net("lookup")
    ids = net.input("ids", ["N"], INT64)
    h = net.op("Gather", net.weight((7, 6), 6, "table"), ids)
    program = finished(net, net.relu(h), 6)
    assert [(s.size, s.members[0]) for s in program.spaces] == [(6, "table_1[1]")]
