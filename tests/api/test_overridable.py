"""Initializers that are graph inputs too: inputs with a default from IR version 4 on, parameters before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tests import zoo
from tests.models.cleaning import Array, cleaned, model, node, operators, run, same_bits, value
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.errors import SymmetryError
from cipm_ir.ir.parameters import is_overridable, is_parameter, parameter_tensor
from cipm_ir.symmetry.program import Program

I64 = TensorProto.INT64
RNG = np.random.default_rng(0)
EXACT = ["clean-up", "fold-batch-norm", "expose", "canonicalize", "canonicalize-signs", "equalize"]
EXACT += ["remove-dead", "absorb-bias", "recover-names", "rotate"]


def listed(proto: onnx.ModelProto, *names: str, default: bool = True) -> onnx.ModelProto:
    """A copy in which initializers are inputs too; without ``default``, inputs only."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.ir_version = max(copy.ir_version, 8)
    for name in names:
        (tensor,) = [t for t in copy.graph.initializer if t.name == name]
        copy.graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        if not default:
            copy.graph.initializer.remove(tensor)
    return copy


def program_of(proto: onnx.ModelProto) -> Program:
    return Program.of(ir.from_proto(proto))


def analysed(proto: onnx.ModelProto) -> Any:
    """What the analysis finds, but for the names of parameters; costs are counted at the default."""
    program = program_of(proto)
    spaces = [(s.name, s.kind, s.size, str(s.group), s.members, s.exact) for s in program.spaces]
    return spaces, [(o.op, o.reason, o.inputs) for o in program.opaque]


def network() -> onnx.ModelProto:
    """A product, a scaled activation, a normalized stream with a skip, a classifying product."""
    net = Net("overridable", 20)
    x = net.input("x", ["N", 6])
    h = net.relu(net.op("Gemm", x, "w1", "b1", transB=1))
    k = net.op("BatchNormalization", net.op("Gemm", h, "w2", "b2", transB=1), *("scale", "shift", "mean", "var"))
    h = net.op("Add", h, net.op("Mul", net.op("Clip", k, "low", "high"), "gain"))
    h = net.op("LayerNormalization", net.op("Reshape", h, "size"), "gamma", "beta", axis=-1)
    net.output(net.op("Gemm", net.relu(net.op("Gemm", h, "w3", "b3", transB=1)), "w4"), ["N", 3])
    made = net.model()
    sizes: dict[str, tuple[int, ...]] = {"w1": (8, 6), "w2": (8, 8), "w3": (10, 8), "w4": (10, 3), "b3": (10,)}
    sizes |= {name: (8,) for name in ("b1", "b2", "scale", "shift", "mean", "var", "gain", "gamma", "beta")}
    arrays: dict[str, Array] = {name: RNG.standard_normal(shape).astype("float32") for name, shape in sizes.items()}
    arrays["var"] = np.abs(arrays["var"]) + np.float32(0.5)
    arrays |= {"low": np.array(0, np.float32), "high": np.array(2, np.float32), "size": np.array([-1, 8])}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.checker.check_model(made)
    return made


NET = network()
OTHER: dict[str, Array] = {
    t.name: np.abs(RNG.standard_normal(tuple(t.dims)).astype("float32")) + np.float32(0.3)
    for t in NET.graph.initializer
}
OTHER |= {"low": np.array(-1, np.float32), "high": np.array(0.5, np.float32), "size": np.array([-1, 8])}
FLOATS = [name for name in OTHER if name != "size"]
FEEDS = {"x": RNG.standard_normal((5, 6)).astype("float32")}


def signature(proto: onnx.ModelProto) -> list[bytes]:
    return [info.SerializeToString() for info in (*proto.graph.input, *proto.graph.output)]


def close(a: list[Array], b: list[Array]) -> bool:
    return all(np.abs(x - y).max() <= 2e-5 * max(1.0, np.abs(x).max()) for x, y in zip(a, b, strict=True))


def optimized(proto: onnx.ModelProto, *passes: str, **options: Any) -> onnx.ModelProto:
    result = cipm_ir.optimize(proto, list(passes), verify=False, **options)
    return result.model  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FLOATS)
def test_every_exact_pass_leaves_what_the_caller_gives_its_meaning(name: str) -> None:
    proto = listed(NET, name)
    after = optimized(proto, *EXACT)
    assert signature(after)[: len(signature(proto))] == signature(proto)
    for feeds in (FEEDS, {**FEEDS, name: OTHER[name]}):
        assert close(run(proto, feeds), run(after, feeds))
    default = {t.name: t for t in after.graph.initializer}[name]
    assert np.array_equal(
        onnx.numpy_helper.to_array(default),
        onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name)),
    )


def test_the_control_of_the_test_above() -> None:
    """Values of the caller do change what is computed, and one pass alone moves each of these, were they parameters."""
    assert not close(run(listed(NET, "w3"), FEEDS), run(listed(NET, "w3"), {**FEEDS, "w3": OTHER["w3"]}))
    after = optimized(NET, "canonicalize")
    moved = [t for t in after.graph.initializer if t.name == "w3"]
    assert not np.array_equal(
        onnx.numpy_helper.to_array(moved[0]),
        onnx.numpy_helper.to_array(next(t for t in NET.graph.initializer if t.name == "w3")),
    )


def test_all_at_once() -> None:
    """Nothing is free, and no pass does anything."""
    proto = listed(NET, *FLOATS)
    program = program_of(proto)
    assert program.spaces == () and program.parameters == 0
    assert set(program.overridable) == set(FLOATS)
    feeds = {**FEEDS, **{name: OTHER[name] for name in FLOATS}}
    assert same_bits(run(proto, feeds), run(optimized(proto, *EXACT), feeds))


@pytest.mark.parametrize("passes", [["prune{macs=0.7}"], ["prune{macs=0.7, compensate=true}"], ["fold{ratio=0.3}"]])
@pytest.mark.parametrize("name", ["w1", "w3", "b3", "gamma", "scale"])
def test_approximate_passes_keep_its_shape_and_its_default(passes: list[str], name: str) -> None:
    proto = listed(NET, name)
    data = {"x": RNG.standard_normal((64, 6)).astype("float32")}
    try:
        after = optimized(proto, *passes, data=data)
    except cipm_ir.errors.CipmError as error:
        assert "reach" in str(error) or "space" in str(error) or "unit" in str(error)
        return
    assert signature(after)[: len(signature(proto))] == signature(proto)
    (given,) = [t for t in after.graph.initializer if t.name == name]
    (old,) = [t for t in proto.graph.initializer if t.name == name]
    assert given.SerializeToString() == old.SerializeToString()
    assert all(np.isfinite(y).all() for y in run(after, {**FEEDS, name: OTHER[name]}))


def test_an_explicit_change_is_refused() -> None:
    program = program_of(listed(NET, "w3"))
    with pytest.raises(SymmetryError, match="input with a default"):
        program.refit({"w3": OTHER["w3"]})
    program_of(NET).refit({"w3": OTHER["w3"]})


SMALL = [
    n for n in zoo.names(without=("large", "light", "minilm", "constant")) if not zoo.entry(n).note.startswith("export")
]


@pytest.mark.parametrize("name", [*SMALL[::4], "if_capture", "local_function_twice", "reshape_computed_channels"])
def test_it_is_analysed_as_an_input_is(name: str) -> None:
    """The default makes no difference: the analysis finds what it finds where there is none."""
    proto = zoo.build_or_skip(name)
    del proto.graph.value_info[:]  # recorded shapes are believed of what no caller can change only
    chosen = [t.name for t in proto.graph.initializer if t.name not in {v.name for v in proto.graph.input}][:12]
    for parameter in chosen:
        assert analysed(listed(proto, parameter)) == analysed(listed(proto, parameter, default=False)), parameter


def test_recorded_shapes_hold_for_the_default_only() -> None:
    """A Reshape whose target the caller may replace: what the file says of its result is not believed."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Reshape", ["a", "t"], ["r"]), node("Relu", ["r"], ["h"])]
    nodes += [node("MatMul", ["h", "v"], ["y"])]
    constants = {"w": np.ones((4, 6), "float32"), "t": np.array([2, 6]), "v": np.ones((6, 2), "float32")}
    inner = [value("a", shape=(2, 6)), value("r", shape=(2, 6)), value("h", shape=(2, 6))]
    proto = model(nodes, constants, inputs=[value("x", shape=(2, 4))], outputs=[value("y", shape=(2, 2))], inner=inner)
    assert program_of(proto).spaces
    program = program_of(listed(proto, "t"))
    assert not program.spaces and any(o.op == "Reshape" for o in program.opaque)


HOT = [node("ArgMax", ["h"], ["m"]), node("OneHot", ["m", "six", "k"], ["r"])]
CHAIN = [node("Concat", ["k", "six"], ["t"], axis=0), node("Reshape", ["h", "t"], ["r"])]
LITERALS: dict[str, tuple[list[onnx.NodeProto], str, Array, Array]] = {
    "Reshape": ([node("Reshape", ["h", "k"], ["r"])], "k", np.array([0, 6]), np.array([-1, 3])),
    "Slice": ([node("Slice", ["h", "k", "ends", "axes"], ["r"])], "k", np.array([0]), np.array([2])),
    "Clip": ([node("Clip", ["h", "k"], ["r"])], "k", np.array(0.0, np.float32), np.array(0.7, np.float32)),
    "Gather": ([node("Gather", ["h", "k"], ["r"], axis=1)], "k", np.array([0, 1, 2]), np.array([5, 0, 0])),
    "ReduceSum": ([node("ReduceSum", ["h", "k"], ["r"], keepdims=1)], "k", np.array([0]), np.array([1])),
    "Expand": ([node("Expand", ["h", "k"], ["r"])], "k", np.array([1, 1, 1]), np.array([2, 1, 6])),
    "CumSum": ([node("CumSum", ["h", "k"], ["r"])], "k", np.array(0), np.array(1)),
    "Pad": ([node("Pad", ["h", "k"], ["r"])], "k", np.array([0, 0, 0, 0]), np.array([0, 1, 0, 2])),
    "Tile": ([node("Tile", ["h", "k"], ["r"])], "k", np.array([1, 1]), np.array([1, 2])),
    "Split": ([node("Split", ["h", "k"], ["r", "rest"], axis=1)], "k", np.array([3, 3]), np.array([1, 5])),
    "Unsqueeze": ([node("Unsqueeze", ["h", "k"], ["r"])], "k", np.array([0]), np.array([2])),
    "Add": ([node("Add", ["h", "k"], ["r"])], "k", np.array(0.0, np.float32), np.array(2.0, np.float32)),
    "Mul": ([node("Mul", ["h", "k"], ["r"])], "k", np.array(1.0, np.float32), np.array(-3.0, np.float32)),
    "Pow": ([node("Pow", ["h", "k"], ["r"])], "k", np.array(1.0, np.float32), np.array(2.0, np.float32)),
    "TopK": ([node("TopK", ["h", "k"], ["r", "rest"], axis=1)], "k", np.array([6]), np.array([2])),
    "OneHot": (HOT, "k", np.array([0, 1], np.float32), np.array([-1, 3], np.float32)),
    "chain": (CHAIN, "k", np.array([-1]), np.array([6])),
    "condition": ([node("Where", ["k", "h", "x6"], ["r"])], "k", np.array(True), np.array(False)),
}


def literal(name: str) -> tuple[onnx.ModelProto, str, Array]:
    nodes, key, default, other = LITERALS[name]
    constants: dict[str, Array] = {"w": RNG.standard_normal((4, 6)).astype("float32"), key: default}
    constants |= {"ends": np.array([9]), "axes": np.array([1]), "six": np.array([6]), "x6": np.zeros(6, np.float32)}
    proto = model(
        [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["h"]), *nodes, node("Neg", ["r"], ["y"])], constants
    )
    return listed(proto, key), key, other


@pytest.mark.parametrize("name", LITERALS)
def test_a_literal_that_the_caller_may_replace_is_no_constant(name: str) -> None:
    proto, key, other = literal(name)
    rows = 6 if name == "chain" else 2
    feeds = {"x": RNG.standard_normal((rows, 4)).astype("float32")}
    after = optimized(proto, *EXACT)
    for given in (feeds, {**feeds, key: other}):
        assert close(run(proto, given), run(after, given))
    alone = cleaned(proto)
    assert operators(alone) == operators(proto) and signature(alone) == signature(proto)
    program = program_of(proto)
    assert analysed(proto) == analysed(listed(model_without(proto, key), default=False))
    elements = {space: space.random(np.random.default_rng(3)) for space in program.spaces}
    moved = ir.to_proto(program.act(elements).emit()) if elements else proto
    assert close(run(proto, {**feeds, key: other}), run(moved, {**feeds, key: other}))


def model_without(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with an input only, where there was an input with a default."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.initializer.remove(next(t for t in copy.graph.initializer if t.name == name))
    return copy


def test_a_branch_consumes_it() -> None:
    """A weight that a branch captures; the same weight as a parameter is pinned too, but folded with."""
    then = helper.make_graph([node("MatMul", ["h", "w2"], ["t"])], "then", [], [value("t", shape=None)])
    other = helper.make_graph(
        [node("Add", ["w3", "w3"], ["s"]), node("MatMul", ["h", "s"], ["e"])], "else", [], [value("e", shape=None)]
    )
    nodes = [
        node("MatMul", ["x", "w1"], ["a"]),
        node("Relu", ["a"], ["h"]),
        node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    constants = {
        k: RNG.standard_normal(s).astype("float32") for k, s in (("w1", (4, 6)), ("w2", (6, 2)), ("w3", (6, 2)))
    }
    inputs = [value("x"), value("c", TensorProto.BOOL, [])]
    proto = listed(model(nodes, constants, inputs=inputs), "w2", "w3")
    after = optimized(proto, *EXACT)
    assert signature(after) == signature(proto)
    given = {"w2": np.ones((6, 2), np.float32), "w3": np.full((6, 2), 2, np.float32)}
    for condition in (True, False):
        feeds = {"x": RNG.standard_normal((3, 4)).astype("float32"), "c": np.array(condition), **given}
        assert close(run(proto, feeds), run(after, feeds))
    body = cleaned(model(nodes, constants, inputs=inputs)).graph.node[2].attribute
    assert any([n.op_type for n in a.g.node] == ["MatMul"] for a in body if a.name == "else_branch")


def test_a_function_is_called_with_it() -> None:
    opsets = [helper.make_opsetid("", 20)]
    body = [node("MatMul", ["u", "v"], ["m"]), node("Relu", ["m"], ["p"])]
    function = helper.make_function("own", "F", ["u", "v"], ["p"], body, opsets)
    nodes = [
        node("F", ["x", "w1"], ["h"], domain="own"),
        node("F", ["h", "w2"], ["g"], domain="own"),
        node("MatMul", ["g", "w3"], ["y"]),
    ]
    shapes = {"w1": (4, 6), "w2": (6, 5), "w3": (5, 2)}
    constants = {k: RNG.standard_normal(s).astype("float32") for k, s in shapes.items()}
    plain = model(nodes, constants, functions=[function])
    assert len(program_of(plain).spaces) == 2
    proto = listed(plain, "w2")
    assert program_of(proto).spaces == ()
    after = optimized(proto, *EXACT)
    feeds = {"x": RNG.standard_normal((3, 4)).astype("float32"), "w2": RNG.standard_normal((6, 5)).astype("float32")}
    assert signature(after) == signature(proto) and close(run(proto, feeds), run(after, feeds))


def test_unused_and_shown_ones_stay_inputs() -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Identity", ["v"], ["z"])]
    constants = {k: np.ones((4, 2), np.float32) for k in ("w", "v", "idle")}
    outputs = [value("y", shape=None), value("z", shape=None), value("w", shape=(4, 2))]
    proto = listed(model(nodes, constants, outputs=outputs), "w", "v", "idle")
    after = optimized(proto, *EXACT)
    assert signature(after) == signature(proto)
    assert {t.name for t in after.graph.initializer} == {"w", "v", "idle"}
    feeds = {"x": np.ones((3, 4), np.float32), "w": np.zeros((4, 2), np.float32), "v": np.full((4, 2), 3, np.float32)}
    assert same_bits(run(proto, feeds), run(after, feeds))


def test_before_ir_version_4_they_are_parameters() -> None:
    """The control: there every initializer had to be listed, and nothing could be replaced by a caller."""
    names = [t.name for t in NET.graph.initializer]
    proto = listed(NET, *names)
    proto.ir_version = 3
    old, new = program_of(proto), program_of(NET)
    assert analysed(proto) == analysed(NET) and old.spaces and old.overridable == ()
    assert cipm_ir.fingerprint(proto) == cipm_ir.fingerprint(NET)
    values = list(old.model.graph.inputs)
    assert [is_parameter(v) for v in values] == [v.is_initializer() for v in values]
    assert not any(map(is_overridable, values))
    folded = optimized(proto, "fold-batch-norm")
    assert [v.name for v in folded.graph.input] == ["x"] and folded.ir_version >= 4
    assert all(is_overridable(v) == v.is_initializer() for v in program_of(listed(NET, *names)).model.graph.inputs)
    assert new.overridable == ()


def test_the_default_belongs_to_the_fingerprint() -> None:
    """Not so the order of units behind it, which a pass may still choose where they are free."""
    proto = listed(NET, "b2")
    (default,) = [t for t in proto.graph.initializer if t.name == "b2"]
    changed = listed(NET, "b2")
    (other,) = [t for t in changed.graph.initializer if t.name == "b2"]
    other.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(default) * 2, "b2"))
    prints = [cipm_ir.fingerprint(m) for m in (proto, changed, NET, model_without(proto, "b2"), listed(NET, "b2"))]
    assert len(set(prints[:4])) == 4 and prints[4] == prints[0]
    program = program_of(proto)
    moved = program.act({s: s.random(np.random.default_rng(1), power_of_two=True) for s in program.spaces})
    assert program.spaces and cipm_ir.fingerprint(ir.to_proto(moved.emit())) == prints[0]


def test_the_dump_says_so() -> None:
    program = program_of(listed(NET, "w3", "size"))
    lines = [line for line in str(program).splitlines() if line.startswith(("input", "param"))]
    assert "input %w3 : f32[10, 8]  // has a default, which the caller may replace: pinned" in lines
    assert not any(line.startswith("param %w3") for line in lines)
    assert program.overridable == ("w3", "size")


def test_an_overridable_value_is_no_tensor_of_the_program() -> None:
    program = program_of(listed(NET, "w3"))
    found = program.model.graph.initializers
    assert parameter_tensor(found["w3"]) is None and parameter_tensor(found["w4"]) is not None


def test_a_shape_that_the_caller_may_choose() -> None:
    """Symbols in the declared shape of an input with a default are dynamic, whatever the default's shape is."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["h"]), node("ReduceSum", ["h", "axes"], ["y"])]
    constants = {"w": np.ones((4, 6), np.float32), "axes": np.array([1])}
    proto = model(
        nodes, constants, inputs=[value("x"), value("w", shape=(4, "M"))], outputs=[value("y", shape=("N", 1))]
    )
    shapes = program_of(proto).analysis.walk.shapes
    assert shapes.first["h"] != shapes.second["h"] and shapes.first["h"][1] != 6
    sized = [node("Shape", ["w"], ["s"]), node("Cast", ["s"], ["f"], to=1), node("Add", ["f", "f"], ["y"])]
    proto = model(sized, constants, inputs=[value("x"), value("w", shape=(4, "M"))])
    assert operators(cleaned(proto)) == ["Shape", "Cast", "Add"]
