"""The analysis finds as much symmetry as there is: counts per model, and an oracle that tries every exchange.

The oracle knows nothing of labels: it takes two units of one axis of a tiny model, and searches for an exchange of
positions in all other tensors that restores the function.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tests import zoo
from tests.symmetry.test_soundness import acted, largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.algebra import Element
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

NAMES = zoo.names(without=("constant",))
SPACES = {"densenet121": 120, "resnet50": 37, "vgg19": 18, "inception_v1": 55, "squeezenet": 25}


def units(program: Program) -> int:
    return sum(space.size for space in program.spaces if space.kind == "units")


def shapes_of(program: Program) -> Counter[tuple[str, str]]:
    return Counter((space.kind, str(space.group)) for space in program.spaces)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SPACES else n for n in NAMES])
def test_free_units(name: str) -> None:
    program, entry = program_of(zoo.build_or_skip(name)), zoo.entry(name)
    found = units(program)
    if entry.expected_units is not None:
        assert found == entry.expected_units
    assert found >= entry.at_least
    if name in SPACES:
        assert sum(space.kind == "units" for space in program.spaces) == SPACES[name]


@pytest.mark.parametrize("name", ["bvlc_alexnet", "resnet50", "squeezenet"])
def test_light_originals_have_the_same_spaces(name: str) -> None:
    """Weights made by ConstantOfShape (ir_version 3, initializers that are also inputs) are weights."""
    original, refilled = program_of(zoo.build(f"{name}_constant")), program_of(zoo.build(name))
    assert units(original) == units(refilled)
    assert shapes_of(original) == shapes_of(refilled)


@pytest.mark.parametrize(("name", "hidden"), [("vgg19", 2), ("zfnet512", 1)])
def test_originals_that_are_refilled_narrower(name: str, hidden: int) -> None:
    """As many spaces, and in every hidden layer that was narrowed 4096 units rather than 1024."""
    original, refilled = program_of(zoo.build(f"{name}_constant")), program_of(zoo.build(name))
    assert [space.kind for space in original.spaces] == [space.kind for space in refilled.spaces]
    assert units(original) == units(refilled) + hidden * (4096 - 1024)


def test_rotary_planes_are_one_space() -> None:
    """RoPE tables are shared by all heads and layers, so their 8 planes move everywhere at once."""
    program = program_of(zoo.build_or_skip("llama_gqa"))
    planes = [s for s in program.spaces if s.kind == "units" and s.size == 8]
    assert len(planes) == 1
    heads = [(s.size, None if s.parent is None else s.parent[1]) for s in program.spaces if s.kind == "blocks"]
    assert sorted(heads, key=str) == sorted([(2, None), (4, 0), (4, 1)] * 2, key=str), "two layers, four queries a key"
    touched = {member.rpartition("[")[0] for member in planes[0].members}
    layers = [{m.rpartition("[")[0] for m in s.members} for s in program.spaces if s.kind == "cells"]
    assert len(layers) == 2 and all(layer <= touched for layer in layers)


def test_shared_biases_tie_nothing() -> None:
    """A zero vector that the exporter stored once is one bias per layer: the spaces are those of the plain export."""
    plain, shared = (program_of(zoo.build_or_skip(name)) for name in ("bert", "bert_shared_bias"))
    assert shapes_of(plain) == shapes_of(shared)
    assert sorted(s.size for s in plain.spaces) == sorted(s.size for s in shared.spaces)


def test_padded_shortcuts_tie_the_stages() -> None:
    """Zero-padded shortcuts of CIFAR ResNets tie the channels of one stage to some of the next."""
    program = program_of(zoo.build_or_skip("resnet20"))
    sizes = Counter(s.size for s in program.spaces)
    assert units(program) == 400
    assert sum(size * count for size, count in sizes.items()) == 400


# ---------------------------------------------------------------- the oracle
TINY = (
    "mlp_relu",
    "mlp_tanh",
    "gated_mlp",
    "split_two_roles",
    "concat_relu",
    "roll_add",
    "maxout_slices",
    "gather_repeated",
    "conv_flatten_gemm",
    "depthwise",
    "hidden_output",
    "cumsum_hidden",
    "siamese",
    "layer_norm",
)


def exchanged(space: Space, i: int, j: int) -> Element:
    perm = np.arange(space.size)
    perm[[i, j]] = j, i
    return Element(perm, np.ones((space.group.scales, space.size)), np.ones((space.group.signs, space.size), np.int8))


@pytest.mark.parametrize("name", TINY)
def test_every_transposition_is_an_involution_that_keeps_the_function(name: str) -> None:
    model = zoo.build(name)
    program, inputs = program_of(model), zoo.feeds(name, model)
    before = zoo.run(model, inputs)
    for space in program.spaces:
        for i in range(1, space.size):
            swap = {space: exchanged(space, 0, i)}
            once = program.act(swap)
            assert largest_change(before, zoo.run(ir.to_proto(once.emit()), inputs)) <= 1e-5
            assert weights(ir.to_proto(once.act(swap).emit())) == weights(model)


def weights(model: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}


def axes_of(model: onnx.ModelProto) -> list[tuple[str, int, int]]:
    """(tensor, axis, size) of all floating-point initializers of more than one entry along the axis."""
    return [
        (t.name, axis, size)
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT
        for axis, size in enumerate(t.dims)
        if size > 1
    ]


def swapped(model: onnx.ModelProto, moves: list[tuple[str, int, int, int]]) -> onnx.ModelProto:
    """Exchange positions i and j of some axes."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    tensors = {t.name: t for t in out.graph.initializer}
    for name, axis, i, j in moves:
        array = numpy_helper.to_array(tensors[name]).copy()
        array[(slice(None),) * axis + ([i, j],)] = array[(slice(None),) * axis + ([j, i],)]
        tensors[name].CopyFrom(numpy_helper.from_array(array, name))
    return out


def candidate_moves(
    model: onnx.ModelProto, name: str, axis: int, i: int, j: int
) -> Iterator[list[tuple[str, int, int, int]]]:
    """The exchange of i and j in this axis and in every subset of the other axes that are long enough."""
    others = [(n, a) for n, a, size in axes_of(model) if size > max(i, j) and (n, a) != (name, axis)]
    for k in range(len(others) + 1):
        for chosen in itertools.combinations(others, k):
            yield [(name, axis, i, j), *((n, a, i, j) for n, a in chosen)]


def tiny(kind: str) -> onnx.ModelProto:
    """One hidden layer of 4 units; ``kind`` says what ties or breaks them."""
    net = Net(f"tiny_{kind}")
    x = net.input("x", ["N", 2])
    h = net.op("MatMul", x, net.weight((2, 4), 2))
    if kind == "tied":
        h = net.op("Add", h, net.op("MatMul", x, net.weight((2, 4), 2)))
    h = net.op("Tanh", h)  # Relu might leave a unit at zero on all samples
    if kind == "ordered":
        h = net.op("CumSum", h, net.const(1))
    if kind == "table":
        h = net.op("Mul", h, net.bias(4))
    net.output(net.op("MatMul", h, net.weight((4, 2), 4)), ["N", 2])
    return net.model()


@pytest.mark.parametrize(("kind", "free"), [("plain", True), ("tied", True), ("table", True), ("ordered", False)])
def test_against_all_exchanges(kind: str, free: bool) -> None:
    """Two units are in one space exactly when some exchange of positions restores the function."""
    model = tiny(kind)
    program = program_of(model)
    inputs = {"x": np.random.default_rng(1).standard_normal((3, 2)).astype(np.float32)}
    before = zoo.run(model, inputs)
    together = {member: space for space in program.spaces for member in space.members}
    for name, axis, size in axes_of(model):
        for i, j in itertools.combinations(range(size), 2):
            works = any(
                largest_change(before, zoo.run(swapped(model, moves), inputs)) < 1e-5
                for moves in candidate_moves(model, name, axis, i, j)
            )
            assert works == (f"{name}[{axis}]" in together), f"{i} and {j} of {name}[{axis}]"
    assert bool(program.spaces) == free


@pytest.mark.parametrize("name", ["split_two_roles", "attention_separate", "grouped_conv", "channel_shuffle"])
def test_spaces_are_not_split_needlessly(name: str) -> None:
    """Exchanging units of two different spaces, in all the positions that they have, changes the output."""
    model = zoo.build(name)
    program, inputs = program_of(model), zoo.feeds(name, model)
    before = zoo.run(model, inputs)
    analysis = program.analysis
    flat = [(k, s) for k, s in enumerate(analysis.spaces) if s.kind == "units" and s.table.shape[1] == 1]
    compared = 0
    for (k, one), (m, other) in itertools.combinations(flat, 2):
        a, b = (np.flatnonzero(analysis.classes.of == s.table[0, 0]) for s in (one, other))
        if len(a) != len(b):
            continue
        after = merged_exchange(model, program, a, b)
        if after is not None:
            compared += 1
            assert largest_change(before, zoo.run(after, inputs)) > 1e-4, f"{program.spaces[k]} and {program.spaces[m]}"
    assert compared


def merged_exchange(model: onnx.ModelProto, program: Program, a: Any, b: Any) -> onnx.ModelProto | None:
    """Exchange two classes atom by atom, in order, where these lie in the same axes; None where they do not."""
    moves = []
    for one, other in zip(a.tolist(), b.tolist(), strict=True):
        for f in program.analysis.walk.leaf_factors:
            inside = [f.base <= atom < f.base + f.size for atom in (one, other)]
            if any(inside) and (not all(inside) or f.groups):
                return None
            if all(inside) and f.active:
                moves.append((program.analysis.walk.leaves[f.leaf].name, f.axes[0], one - f.base, other - f.base))
    return swapped(model, moves)


def test_a_split_space_would_be_seen() -> None:
    """Negative control: the same comparison between two units of one space finds nothing to tell them apart."""
    model = zoo.build("mlp_relu")
    program, inputs = program_of(model), zoo.feeds("mlp_relu", model)
    of, table = program.analysis.classes.of, program.analysis.spaces[0].table[:, 0]
    after = merged_exchange(model, program, *(np.flatnonzero(of == c) for c in table[:2]))
    assert after is not None
    assert largest_change(zoo.run(model, inputs), zoo.run(after, inputs)) <= 1e-5
    assert (
        acted(program, {program.spaces[0]: exchanged(program.spaces[0], 0, 1)}).graph.initializer[0]
        == after.graph.initializer[0]
    )
