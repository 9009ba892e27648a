"""Clean-up keeps every output under its own name, type and shape, and what subgraphs and functions hand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.models.cleaning import Array, cleaned, model, node, operators, run, same_bits, value

from cipm_ir.api import load, optimize
from cipm_ir.passes.exact.cleanup.clean_up import CleanUp
from cipm_ir.passes.framework.base import Context
from cipm_ir.runtime.inputs.generate import random_inputs
from cipm_ir.runtime.session import Runner

I64, BOOL = TensorProto.INT64, TensorProto.BOOL
FEEDS: dict[str, Array] = {"x": np.array([[-1.5, 0.0, 2.0, 3.0]], np.float32)}
W = {"w": np.arange(4, dtype=np.float32)}
Parts: TypeAlias = tuple[list[onnx.NodeProto], dict[str, Array]]
Build: TypeAlias = Callable[[], Parts]
CASES: dict[str, tuple[list[str], Build]] = {}


def case(*outputs: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        CASES[build.__name__] = (list(outputs), build)
        return build

    return add


@case("y", "z")
def a_value_and_its_copy() -> Parts:
    return [node("Relu", ["x"], ["y"]), node("Identity", ["y"], ["z"])], {}


@case("z", "y")
def the_copy_first() -> Parts:
    return a_value_and_its_copy()


@case("y", "z", "u")
def three_copies() -> Parts:
    nodes = [node("Relu", ["x"], ["a"]), *(node("Identity", [s], [t]) for s, t in ("ay", "yz", "au"))]
    return nodes, {}


@case("y", "z")
def two_copies_of_an_inner_value() -> Parts:
    nodes = [node("Relu", ["x"], ["a"]), node("Identity", ["a"], ["y"]), node("Identity", ["a"], ["z"])]
    return nodes, {}


@case("y", "z")
def copies_of_the_input() -> Parts:
    return [node("Identity", ["x"], ["y"]), node("Identity", ["x"], ["z"])], {}


@case("y", "z")
def the_copy_is_consumed() -> Parts:
    return [node("Relu", ["x"], ["y"]), node("Identity", ["y"], ["b"]), node("Neg", ["b"], ["z"])], {}


@case("y", "z")
def an_output_is_consumed_after_its_copy() -> Parts:
    return [node("Relu", ["x"], ["a"]), node("Identity", ["a"], ["y"]), node("Neg", ["a"], ["z"])], {}


@case("y")
def a_copy_of_an_initializer() -> Parts:
    return [node("Identity", ["w"], ["y"])], W


@case("w", "y")
def an_initializer() -> Parts:
    return [node("Mul", ["x", "w"], ["y"])], W


@case("w", "y")
def an_initializer_and_its_copy() -> Parts:
    return [node("Identity", ["w"], ["y"])], W


@case("y", "z")
def dropouts() -> Parts:
    return [node("Dropout", ["x"], ["y"]), node("Dropout", ["y"], ["z"])], {}


@case("y", "z")
def casts_without_effect() -> Parts:
    return [node("Relu", ["x"], ["a"]), *(node("Cast", ["a"], [o], to=1) for o in "yz")], {}


@case("y", "z")
def equal_nodes() -> Parts:
    return [node("Relu", ["x"], ["y"]), node("Relu", ["x"], ["z"])], {}


@case("z", "y")
def equal_nodes_of_which_one_is_consumed() -> Parts:
    return [node("Relu", ["x"], ["a"]), node("Relu", ["x"], ["y"]), node("Neg", ["a"], ["z"])], {}


@case("y", "z")
def equal_constants() -> Parts:
    made = numpy_helper.from_array(W["w"])
    return [node("Constant", [], ["y"], value=made), node("Constant", [], ["z"], value=made)], {}


@case("y", "z")
def folded_constants() -> Parts:
    return [node("Add", ["w", "w"], ["y"]), node("Add", ["w", "w"], ["a"]), node("Mul", ["a", "y"], ["z"])], W


@case("y", "z", "u")
def folded_parts() -> Parts:
    return [node("Split", ["w"], ["y", "z"], axis=0, num_outputs=2), node("Concat", ["z", "y"], ["u"], axis=0)], W


@case("y", "z")
def zero_and_one() -> Parts:
    nodes = [node("Mul", ["x", "one"], ["y"]), node("Add", ["y", "zero"], ["z"])]
    return nodes, {"one": np.array(1, np.float32), "zero": np.array(-0.0, np.float32)}


@case("y", "z")
def transposed_there_and_back() -> Parts:
    nodes = [node("Relu", ["x"], ["y"]), node("Transpose", ["y"], ["a"], perm=[1, 0])]
    return [*nodes, node("Transpose", ["a"], ["z"], perm=[1, 0])], {}


def graph(name: str, nodes: list[onnx.NodeProto], outputs: list[str], **constants: Array) -> onnx.GraphProto:
    tensors = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    return helper.make_graph(nodes, name, [], [value(o, shape=None) for o in outputs], tensors)


def branches(then: onnx.GraphProto, other: onnx.GraphProto, outputs: list[str], condition: str = "c") -> onnx.NodeProto:
    return node("If", [condition], outputs, then_branch=then, else_branch=other)


def other_branch(count: int = 1) -> onnx.GraphProto:
    return graph("else", [node("Neg", ["x"], [f"e{k}"]) for k in range(count)], [f"e{k}" for k in range(count)])


@case("y")
def a_branch_hands_on_an_outer_value() -> Parts:
    then = graph("then", [node("Identity", ["p"], ["t"])], ["t"])
    return [node("Sigmoid", ["x"], ["p"]), branches(then, other_branch(), ["y"])], {}


@case("y", "p")
def a_branch_hands_on_an_output() -> Parts:
    return a_branch_hands_on_an_outer_value()


@case("y")
def a_branch_hands_on_the_input() -> Parts:
    return [branches(graph("then", [node("Dropout", ["x"], ["t"])], ["t"]), other_branch(), ["y"])], {}


@case("y")
def a_branch_hands_on_an_initializer() -> Parts:
    then = graph("then", [node("Identity", ["w"], ["t"])], ["t"])
    return [branches(then, graph("else", [node("Identity", ["v"], ["e"])], ["e"], v=W["w"] + 1), ["y"])], W


@case("y", "z")
def a_branch_hands_on_one_value_twice() -> Parts:
    nodes = [node("Relu", ["x"], ["t"]), node("Identity", ["t"], ["u"])]
    return [branches(graph("then", nodes, ["t", "u"]), other_branch(2), ["y", "z"])], {}


@case("y", "z")
def a_branch_in_a_branch() -> Parts:
    inner = branches(
        graph("then2", [node("Identity", ["q"], ["t2"])], ["t2"]),
        graph("else2", [node("Relu", ["q"], ["e2"])], ["e2"]),
        ["i"],
    )
    then = graph("then", [node("Sigmoid", ["x"], ["q"]), inner], ["i", "q"])
    return [branches(then, other_branch(2), ["y", "z"])], {}


@case("y", "p")
def equal_nodes_that_branches_consume() -> Parts:
    then = graph("then", [node("Add", ["p", "q"], ["t"])], ["t"])
    return [node("Exp", ["x"], ["p"]), node("Exp", ["x"], ["q"]), branches(then, other_branch(), ["y"])], {}


@case("y", "z")
def a_constant_condition() -> Parts:
    """Both branches and a third graph use one name; the branch that is taken hands on its own value and the input."""
    then = graph(
        "then",
        [node("Neg", ["x"], ["inner"]), node("Exp", ["inner"], ["t"]), node("Identity", ["x"], ["u"])],
        ["t", "u"],
    )
    other = graph(
        "else",
        [node("Abs", ["x"], ["inner"]), node("Log", ["inner"], ["e"]), node("Identity", ["x"], ["f"])],
        ["e", "f"],
    )
    third = graph("third", [node("Cos", ["x"], ["inner"]), node("Sin", ["inner"], ["g"])], ["g"])
    nodes = [
        branches(then, other, ["a", "z"], "yes"),
        branches(third, other_branch(), ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    return nodes, {"yes": np.array(True)}


@case("y", "z", "w")
def a_constant_condition_with_constants() -> Parts:
    then = graph("then", [node("Mul", ["x", "k"], ["t"]), node("Identity", ["w"], ["u"])], ["t", "u"], k=W["w"] + 3)
    other = graph("else", [node("Mul", ["x", "k"], ["e"]), node("Identity", ["k"], ["f"])], ["e", "f"], k=W["w"] + 5)
    nodes = [node("Not", ["no"], ["yes"]), branches(other, then, ["y", "z"], "no")]
    return nodes, {"no": np.array(False), **W}


@case("y", "z")
def a_loop_hands_on_an_outer_value() -> Parts:
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Identity", ["p"], ["v2"]), node("Identity", ["v"], ["s"])],
        "body",
        [value("i", I64, []), value("go", BOOL, []), value("v", shape=None)],
        [value("on", BOOL, []), value("v2", shape=None), value("s", shape=None)],
    )
    return [node("Sigmoid", ["x"], ["p"]), node("Loop", ["n", "", "x"], ["y", "z"], body=body)], {"n": np.array(3)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("condition", [True, False])
def test_outputs_keep_their_names(name: str, condition: bool) -> None:
    wanted, build = CASES[name]
    nodes, constants = build()
    conditional = any(n.op_type == "If" and n.input[0] == "c" for n in nodes)
    inputs = [value("x"), value("c", BOOL, [])] if conditional else [value("x")]
    proto = model(nodes, constants, inputs=inputs, outputs=[value(o, shape=None) for o in wanted])
    feeds = {**FEEDS, "c": np.array(condition)} if conditional else FEEDS
    for merge in (True, False):
        after = cleaned(proto, merge=merge)
        assert [o.SerializeToString() for o in after.graph.output] == [
            o.SerializeToString() for o in proto.graph.output
        ]
        assert [i.SerializeToString() for i in after.graph.input] == [i.SerializeToString() for i in proto.graph.input]
        assert same_bits(run(proto, feeds), run(after, feeds))
        assert operators(cleaned(after, merge=merge)) == operators(after)


@pytest.mark.parametrize("name", ["a_value_and_its_copy", "equal_nodes", "a_branch_in_a_branch"])
def test_the_default_passes(name: str) -> None:
    wanted, build = CASES[name]
    nodes, constants = build()
    inputs = [value("x"), value("c", BOOL, [])] if "branch" in name else [value("x")]
    result = optimize(model(nodes, constants, inputs=inputs, outputs=[value(o) for o in wanted]))
    assert [v.name for v in result.program.model.graph.outputs] == wanted


def test_what_is_removed_around_these() -> None:
    """The controls: these models do shrink where no name is in the way."""
    sizes = {}
    for name, (wanted, build) in CASES.items():
        nodes, constants = build()
        inputs = [value("x"), value("c", BOOL, [])]
        after = cleaned(model(nodes, constants, inputs=inputs, outputs=[value(o, shape=None) for o in wanted]))
        sizes[name] = len(nodes), len(after.graph.node)
    assert sizes["the_copy_is_consumed"] == (3, 2)
    assert sizes["an_output_is_consumed_after_its_copy"] == (3, 2)
    assert sizes["equal_nodes_of_which_one_is_consumed"] == (3, 2)
    assert sizes["equal_nodes_that_branches_consume"] == (3, 2)
    assert sizes["casts_without_effect"] == (3, 2)
    assert sizes["two_copies_of_an_inner_value"] == (3, 2)
    # Of two outputs that are one value, one is a copy; an If with a constant condition is gone.
    assert sizes["a_value_and_its_copy"] == (2, 2)
    assert sizes["a_constant_condition"] == (3, 5)


def test_functions_keep_their_signature() -> None:
    opsets = [helper.make_opsetid("", 20)]
    body = [
        node("Identity", ["a"], ["p"]),
        node("Relu", ["a"], ["q"]),
        node("Identity", ["q"], ["r"]),
        node("Mul", ["q", "one"], ["s"]),
    ]
    one = node("Constant", [], ["one"], value=numpy_helper.from_array(np.array(1, np.float32)))
    function = helper.make_function("own", "F", ["a"], ["p", "q", "r", "s"], [one, *body], opsets)
    outputs = [value(o, shape=None) for o in "tuvw"]
    proto = model([node("F", ["x"], list("tuvw"), domain="own")], outputs=outputs, functions=[function])
    after = cleaned(proto)
    assert list(after.functions[0].output) == ["p", "q", "r", "s"] and list(after.functions[0].input) == ["a"]
    assert same_bits(run(proto, FEEDS), run(after, FEEDS))


def test_constants_in_functions_stay_in_them() -> None:
    opsets = [helper.make_opsetid("", 20)]
    one = node("Constant", [], ["one"], value_float=1.5)
    body = [one, node("Exp", ["one"], ["e"]), node("Add", ["e", "one"], ["f"]), node("Mul", ["a", "f"], ["p"])]
    function = helper.make_function("own", "F", ["a"], ["p"], body, opsets)
    proto = model([node("F", ["x"], ["y"], domain="own")], functions=[function])
    after = cleaned(proto)
    assert [n.op_type for n in after.functions[0].node] == ["Constant", "Mul"]
    assert same_bits(run(proto, FEEDS), run(after, FEEDS))


def test_attributes_of_a_function_are_not_known() -> None:
    """What a call decides cannot be decided in the function."""
    opsets = [helper.make_opsetid("", 20)]
    turn = node("Transpose", ["a"], ["t"])
    turn.attribute.append(onnx.AttributeProto(name="perm", ref_attr_name="perm", type=onnx.AttributeProto.INTS))
    back = node("Transpose", ["t"], ["p"], perm=[0, 1])
    function = helper.make_function("own", "F", ["a"], ["p"], [turn, back], opsets, attributes=["perm"])
    proto = model([node("F", ["x"], ["y"], domain="own", perm=[1, 0])], functions=[function])
    after = cleaned(proto)
    assert [n.op_type for n in after.functions[0].node] == ["Transpose"]
    assert same_bits(run(proto, FEEDS), run(after, FEEDS))


@pytest.mark.parametrize("name", ["resnet_bottleneck", "llama_gqa", "vit", "bert", "efficientnet", "mobilenetv2"])
def test_real_graphs_are_equal_bit_for_bit(data_dir: Path, name: str) -> None:
    """Random and silent inputs; a second clean-up finds nothing."""
    program = load(data_dir / "graphs" / f"{name}.onnx")
    after = CleanUp().run(program, Context()).program
    assert not CleanUp().run(after, Context()).changed
    feeds = random_inputs(program.model, np.random.default_rng(0))
    silent = {key: array * 0 if array.dtype.kind == "f" else array for key, array in feeds.items()}
    with Runner(program.emit()) as old, Runner(after.emit()) as new:
        for given in (feeds, silent):
            before, now = old.run(given), new.run(given)
            assert before.keys() == now.keys() and same_bits(list(before.values()), list(now.values()))


def test_nothing_is_left_consumed_by_what_is_gone() -> None:
    """The branch that is not taken lets go of the values around it."""
    then = graph("then", [node("Neg", ["x"], ["t"])], ["t"])
    other = graph("else", [node("Mul", ["x", "p"], ["e"])], ["e"])
    nodes = [node("Exp", ["x"], ["p"]), branches(then, other, ["y"], "yes")]
    proto = model(nodes, {"yes": np.array(True)})
    assert operators(cleaned(proto)) == ["Neg"]
    program = CleanUp().run(load(proto), Context()).program
    assert all(isinstance(use.node.graph, ir.Graph) for v in program.model.graph.inputs for use in v.uses())
