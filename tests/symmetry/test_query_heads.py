"""Query heads that share a key head are exchanged among themselves, dropped in equal numbers, ordered and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.symmetry.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.exact.canonicalize.canonicalize import Canonicalize, undo
from cipm_ir.passes.exact.canonicalize.fingerprint import fingerprint_program
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]
DIM, WIDTH, TIME = 4, 6, 5


def grouped(
    net: Net, heads: int, few: int, repeat: Callable[[Net, str], str], mask: str = "", *, past: int = 0
) -> None:
    """Attention over ``few`` key heads that ``repeat`` copies for ``heads`` query heads, behind some from a cache."""

    def split(x: str, n: int) -> str:
        return net.op("Transpose", net.op("Reshape", x, net.const([0, 0, n, DIM])), perm=[0, 2, 1, 3])

    x = net.input("x", [2, TIME, WIDTH])
    q = split(net.op("MatMul", x, net.weight((WIDTH, heads * DIM), WIDTH, "wq")), heads)
    made = []
    for n in "kv":
        heads_of = split(net.op("MatMul", x, net.weight((WIDTH, few * DIM), WIDTH, f"w{n}")), few)
        if past:
            heads_of = net.op("Concat", net.input(f"past_{n}", [2, few, past, DIM]), heads_of, axis=2)
        made.append(repeat(net, heads_of))
    k, v = made
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.op("Add", scores, mask) if mask else scores
    y = net.op("Transpose", net.op("MatMul", net.op("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    y = net.op("Reshape", y, net.const([0, 0, heads * DIM]))
    net.output(net.op("MatMul", y, net.weight((heads * DIM, WIDTH), heads * DIM, "wo")), [2, TIME, WIDTH])


def expanded(times: int, few: int) -> Callable[[Net, str], str]:
    """Each key head ``times`` times, one copy after the other (``repeat_kv``)."""

    def repeat(net: Net, x: str) -> str:
        wide = net.op("Expand", net.op("Unsqueeze", x, net.const([2])), net.const([1, 1, times, 1, 1]))
        return net.op("Reshape", wide, net.const([0, few * times, -1, DIM]))

    return repeat


def gathered(net: Net, x: str) -> str:
    """The same by an index (``repeat_interleave``)."""
    return net.op("Gather", x, net.const([0, 0, 0, 1, 1, 1]), axis=1)


def cached() -> onnx.ModelProto:
    net = Net("cached")
    grouped(net, 6, 2, expanded(3, 2), past=4)
    return net.model()


def outside() -> onnx.ModelProto:
    """The operator with keys and values that are inputs."""
    net = Net("outside", opset=23)
    x = net.input("x", [2, TIME, WIDTH])
    q = net.op("MatMul", x, net.weight((WIDTH, 6 * DIM), WIDTH, "wq"))
    k, v = (net.input(name, [2, 7, 2 * DIM]) for name in "kv")
    y = net.op("Attention", q, k, v, q_num_heads=6, kv_num_heads=2)
    net.output(net.op("MatMul", y, net.weight((6 * DIM, WIDTH), 6 * DIM, "wo")), [2, TIME, WIDTH])
    return net.model()


def indexed() -> onnx.ModelProto:
    net = Net("indexed")
    grouped(net, 6, 2, gathered)
    return net.model()


def built(name: str, times: int = 3, few: int = 2, mask: Array | None = None, outside: bool = False) -> onnx.ModelProto:
    net = Net(name)
    given = "" if mask is None else net.input("mask", list(mask.shape)) if outside else net.const(mask, "m", np.float32)
    grouped(net, times * few, few, expanded(times, few), given)
    return net.model()


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], list[int]]] = {
    "expand": (lambda: built("expand"), [3, 3]),
    "mask of each query head": (lambda: built("mask", mask=np.linspace(-1, 1, 150).reshape(1, 6, 5, 5)), [3, 3]),
    "one mask": (lambda: built("shared", mask=np.zeros((1, 1, 5, 5)), outside=True), [3, 3]),
    "gather": (indexed, [3, 3]),
    "cache": (cached, [3, 3]),
    "keys from outside": (outside, [3, 3]),
    "zoo": (lambda: zoo.build("attention_gqa"), [2, 2]),
    "operator": (lambda: zoo.build("attention_op_3d_gqa"), [2, 2]),
}


@pytest.fixture(params=CASES)
def program(request: pytest.FixtureRequest) -> Program:
    return program_of(CASES[request.param][0]())


def queries(program: Program) -> list[Space]:
    return [space for space in program.spaces if space.name.partition("#")[0].endswith(".queries")]


def outputs(program: Program) -> list[Array]:
    model, rng = ir.to_proto(program.emit()), np.random.default_rng(1)
    shapes = {v.name: [d.dim_value or 2 for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return zoo.run(model, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def weights(program: Program) -> dict[str, Array]:
    found = program.model.graph.initializers.items()
    return {name: np.array(v.const_value.numpy()) for name, v in found if v.const_value is not None}


def silenced(program: Program, space: Space, gone: Array) -> Program:
    """With zeros in all matrices of some query heads, which then add nothing to the output."""
    analysis, arrays = program.analysis, weights(program)
    element, changed = analysis.elements_of(program.index(space)), dict[str, Array]()
    for f in analysis.walk.leaf_factors:
        name, here = analysis.walk.leaves[f.leaf].name, slice(f.base, f.base + f.size)
        hit = np.isin(element[analysis.classes.refined(here)], gone)
        if hit.any() and arrays[name].squeeze().ndim == 2:
            np.moveaxis(arrays[name], f.axes[0], 0)[hit] = 0
            changed[name] = arrays[name]
    assert len(changed) == 2, "rows of the queries' projection and of the output's"
    return program.refit(changed)


@pytest.mark.parametrize("name", CASES)
def test_every_key_head_has_a_space_of_its_query_heads(name: str) -> None:
    program = program_of(CASES[name][0]())
    found = queries(program)
    assert [space.size for space in found] == CASES[name][1]
    assert all(space.kind == "blocks" for space in found)
    held = [space.parent[1] for space in found if space.parent is not None]
    assert held == ([] if name in ("cache", "keys from outside") else [0, 1])  # key heads that may be exchanged
    assert not [space for space in program.spaces if space.size == 1], "entries of fixed heads are no units"


def test_random_elements_change_nothing(program: Program) -> None:
    rng, before, start = np.random.default_rng(2), outputs(program), weights(program)
    moved = program.act({space: space.random(rng) for space in queries(program)})
    assert any(not np.array_equal(start[name], array) for name, array in weights(moved).items())
    assert largest_change(before, outputs(moved)) <= 1e-6
    both = moved.act({space: space.random(rng) for space in moved.spaces})
    assert largest_change(before, outputs(both)) <= 1e-5


def swapped(program: Program, a: int, b: int) -> Program:
    """Two query heads of a model of this file exchanged by hand, in both their matrices."""
    order = np.arange(6)
    order[[a, b]] = b, a
    index = (order[:, None] * DIM + np.arange(DIM)).ravel()
    arrays = weights(program)
    q, o = (next(name for name in arrays if name.startswith(stem)) for stem in ("wq", "wo"))
    return program.refit({q: arrays[q][:, index], o: arrays[o][index]})


@pytest.mark.parametrize(("a", "b", "allowed"), [(0, 1, True), (3, 5, True), (0, 3, False), (2, 3, False)])
def test_heads_of_different_keys_are_not_exchanged(a: int, b: int, allowed: bool) -> None:
    """The control: an exchange across key heads whose keys stay moves the output, and the fingerprint."""
    program = program_of(built("expand"))
    other = swapped(program, a, b)
    assert (largest_change(outputs(program), outputs(other)) < 1e-6) == allowed
    assert (fingerprint_program(program) == fingerprint_program(other)) == allowed


def test_one_canonical_form(program: Program) -> None:
    rng, name = np.random.default_rng(3), fingerprint_program(program)
    for _ in range(2):
        moved = program.act({space: space.random(rng, power_of_two=True) for space in program.spaces})
        assert fingerprint_program(moved) == name
        made = Canonicalize().run(moved, Context())
        assert not Canonicalize().run(made.program, Context()).changed
        back = weights(undo(made.program, made.witness))
        assert all(np.array_equal(array, back[key]) for key, array in weights(moved).items())


def test_equal_numbers_go(program: Program) -> None:
    """Silent heads are dropped without a change, and cost what was predicted; other heads in each group."""
    keep, quiet = {}, program
    for k, space in enumerate(queries(program)):
        keep[space.name] = np.asarray([k % space.size])
        quiet = silenced(quiet, quiet.space(space.name), np.setdiff1d(np.arange(space.size), keep[space.name]))
    before = outputs(quiet)
    assert largest_change(outputs(program), before) > 1e-2
    chosen = {quiet.space(name): index for name, index in keep.items()}
    small = quiet.restrict(chosen)
    assert largest_change(before, outputs(small)) <= 1e-6
    costs, stays = CostModel(quiet), quiet.kept_classes(chosen)
    assert (costs.macs(stays), costs.params(stays)) == (small.macs, small.parameters)
    assert small.parameters < quiet.parameters
    assert [node.op_type for node in small.model.graph] == [node.op_type for node in quiet.model.graph]


def test_uneven_numbers_are_refused(program: Program) -> None:
    for space in queries(program):
        with pytest.raises(SymmetryError, match="same number of query heads for every key head"):
            program.restrict({space: np.arange(space.size - 1)})


def test_a_key_head_goes_with_its_query_heads() -> None:
    program = program_of(built("expand"))
    key_heads = next(space for space in program.spaces if space.kind == "blocks" and space.parent is None)
    small = program.restrict({key_heads: np.asarray([1])})
    q = next(name for name in weights(program) if name.startswith("wq"))
    assert np.array_equal(weights(small)[q], weights(program)[q][:, 3 * DIM :])


def test_key_heads_and_query_heads_go_together() -> None:
    program = program_of(built("expand"))
    key_heads = next(space for space in program.spaces if space.kind == "blocks" and space.parent is None)
    keep = {
        queries(program)[0]: np.asarray([0, 1]),
        queries(program)[1]: np.asarray([0, 2]),
        key_heads: np.asarray([1]),
    }
    small, old = weights(program.restrict(keep)), weights(program)
    for stem, axis in (("wq", 1), ("wo", 0)):
        name = next(name for name in old if name.startswith(stem))
        heads = np.moveaxis(old[name], axis, 0).reshape(6, DIM, -1)[[3, 5]].reshape(2 * DIM, -1)
        assert np.array_equal(np.moveaxis(small[name], axis, 0), heads)
    assert np.isfinite(outputs(program.restrict(keep))[0]).all()


def test_prune_drops_equal_numbers() -> None:
    """The smallest query heads of each key head, by the weights that go with them."""
    program = program_of(built("expand", times=4))
    arrays = weights(program)
    q, o = (next(name for name in arrays if name.startswith(stem)) for stem in ("wq", "wo"))
    factor = np.repeat([1, 9, 2, 8, 7, 1, 1, 9], DIM).astype(np.float32)
    program = program.refit({q: arrays[q] * factor, o: arrays[o] * factor[:, None]})
    others = tuple(space.name for space in program.spaces if space not in queries(program))
    result = Prune(params=0.75, exclude=others, min_keep=1).run(program, Context())
    assert [space.size for space in queries(result.program)] == [2, 2]
    columns = arrays[q].reshape(WIDTH, 8, DIM)[:, [1, 3, 4, 7]] * np.asarray([9, 8, 7, 9], np.float32)[:, None]
    assert np.array_equal(weights(result.program)[q], columns.reshape(WIDTH, -1))
    assert np.isfinite(outputs(result.program)[0]).all()


def test_what_tells_query_heads_apart_holds_them() -> None:
    """A mask from outside for each query head; copies in another order, which no rule follows, tell nothing."""
    assert not queries(program_of(built("outside", mask=np.zeros((1, 6, 5, 5)), outside=True)))
    net = Net("tiled")
    grouped(net, 6, 2, lambda net, x: net.op("Tile", x, net.const([1, 3, 1, 1])))
    program = program_of(net.model())
    assert not queries(program)
    moved = program.act({space: space.random(np.random.default_rng(0)) for space in program.spaces})
    assert largest_change(outputs(program), outputs(moved)) <= 1e-5
