"""Files as exporters write them: what onnxruntime takes is taken, and computes the same; what it refuses is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import cipm_ir
from cipm_ir.frontends.onnx.load import load_onnx

FLOAT = TensorProto.FLOAT
X = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)
PASSES = ["clean-up", "fold-batch-norm", "remove-dead", "canonicalize", "expose", "equalize"]


def net(opset: int = 15) -> onnx.ModelProto:
    """y = relu(x @ w1) @ w2, sizes 4, 6, 3."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    arrays = {"w1": rng.standard_normal((4, 6)), "w2": rng.standard_normal((6, 3))}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", FLOAT, ["n", 3])],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ran(model: onnx.ModelProto) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(made.run(None, {"x": X}))


def weight(name: str, value: float = 1.0, shape: tuple[int, ...] = (6, 3)) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(shape, value, np.float32), name)


def constant(name: str, value: float) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=weight(name, value))


def thin(name: str, *, coordinates: bool) -> onnx.SparseTensorProto:
    places = np.array([[0, 0], [1, 2], [5, 1]]) if coordinates else np.array([0, 5, 16])
    values = numpy_helper.from_array(np.array([1, 2, 3], np.float32), name)
    return helper.make_sparse_tensor(values, numpy_helper.from_array(places, f"{name}.i"), [6, 3])


# --- taken ----------------------------------------------------------------------------------------


def reversed_nodes(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def unsorted_around_a_subgraph(model: onnx.ModelProto) -> None:
    """An If in front of what its branches read, one branch in reversed order."""
    shape = helper.make_tensor_value_info("o", FLOAT, None)
    branches = {
        "then_branch": [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Neg", ["t"], ["o"])],
        "else_branch": [helper.make_node("Tanh", ["a"], ["o"])],
    }
    made = {k: helper.make_graph(nodes, k, [], [copy.deepcopy(shape)]) for k, nodes in branches.items()}
    del model.graph.node[1]
    model.graph.node.insert(0, helper.make_node("If", ["flag"], ["r"], **made))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))


def weight_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(weight("w2", 2.0))


def constant_over_initializer(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, constant("w2", 3.0))


def constant_twice(model: onnx.ModelProto) -> None:
    del model.graph.initializer[1]
    for value in (1.0, 2.0):
        model.graph.node.insert(int(value) - 1, constant("w2", value))


def sparse_over_dense(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.append(thin("w2", coordinates=False))


def sparse_weight(model: onnx.ModelProto) -> None:
    del model.graph.initializer[1]
    model.graph.sparse_initializer.append(thin("w2", coordinates=False))


def sparse_constant(model: onnx.ModelProto) -> None:
    del model.graph.initializer[1]
    node = helper.make_node("Constant", [], ["w2"], sparse_value=thin("w2", coordinates=True))
    model.graph.node.insert(0, node)


def nameless_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(weight(""))


def recorded_shape(*shape: int, name: str = "a") -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, shape))


def fixed_and_recorded_wrong(model: onnx.ModelProto) -> None:
    """All shapes are stated, so that nothing asks for inference: a has one axis too many."""
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = 3
    for name, shape in (("a", (3, 1, 6)), ("r", (3, 6))):
        model.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, shape))


def wrong_inside(model: onnx.ModelProto) -> None:
    unsorted_around_a_subgraph(model)
    branch = next(attribute.g for attribute in model.graph.node[0].attribute if attribute.name == "then_branch")
    branch.value_info.append(helper.make_tensor_value_info("t", FLOAT, [3, 7, 1]))


def output_shape(*shape: int) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, shape))


TAKEN: dict[str, Callable[[onnx.ModelProto], None]] = {
    "reversed nodes": reversed_nodes,
    "unsorted around a subgraph": unsorted_around_a_subgraph,
    "a weight twice": weight_twice,
    "a Constant over an initializer": constant_over_initializer,
    "a Constant twice": constant_twice,
    "a sparse over a dense weight": sparse_over_dense,
    "a sparse weight": sparse_weight,
    "a sparse Constant": sparse_constant,
    "a weight without a name": nameless_weight,
    "a recorded shape of wrong size": recorded_shape(3, 5),
    "a recorded shape of wrong rank": recorded_shape(3, 1, 6),
    "a recorded shape of an inner graph": wrong_inside,
    "all shapes recorded, one wrong": fixed_and_recorded_wrong,
    "an output of wrong size": output_shape(7, 9),
    "an output of wrong rank": output_shape(7, 9, 2),
    "a negative size": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", -1),
}
"""What onnxruntime runs."""


@pytest.mark.parametrize("kind", TAKEN)
def test_what_onnxruntime_takes_computes_the_same(kind: str) -> None:
    model = net()
    TAKEN[kind](model)
    before = model.SerializeToString()
    (wanted,) = ran(model)
    for passes in ([], PASSES):
        result = cipm_ir.optimize(model, passes, on_failure="raise")
        (found,) = ran(result.model)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    space = max(cipm_ir.load(model).spaces, key=lambda s: s.size, default=None)
    assert (space is not None and space.size == 6) or kind in (
        "unsorted around a subgraph",
        "a recorded shape of an inner graph",
    )
    assert model.SerializeToString() == before


def test_the_comparison_sees_the_other_definition() -> None:
    """Control: the first of two definitions gives other outputs than the last."""
    model = net()
    weight_twice(model)
    assert np.abs(ran(model)[0] - ran(net())[0]).max() > 0.1


def test_equal_names_of_nodes_are_numbered() -> None:
    model = net()
    for node in model.graph.node:
        node.name = "k"
    model.graph.node[2].name = "k_1"
    with pytest.raises(Exception, match="same node name"):
        ran(model)
    made = cipm_ir.optimize(model, ["canonicalize"]).model
    assert [node.name for node in made.graph.node] == ["k", "k_2", "k_1"]
    np.testing.assert_allclose(ran(made)[0], ran(net())[0], rtol=1e-5, atol=1e-5)


def test_a_given_ir_model_is_sorted_in_a_copy() -> None:
    model = net()
    reversed_nodes(model)
    source = ir.from_proto(model)
    made = cipm_ir.optimize(source, ["canonicalize"]).model
    assert isinstance(made, ir.Model) and [n.name for n in made.graph] == ["first", "act", "second"]
    assert [n.name for n in source.graph] == ["second", "act", "first"]


def test_right_notes_are_kept_and_wrong_ones_dropped() -> None:
    model = net()
    for name, size in (("a", 5), ("r", 6)):
        model.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, ["n", size]))
    emitted = cipm_ir.optimize(model, []).model
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in emitted.graph.value_info
    }
    assert shapes == {"a": [], "r": [0, 6]}


def test_names_and_notes_survive() -> None:
    """A pass that changes values alone leaves every text of the file as it was."""
    model = net()
    model.doc_string, model.graph.doc_string, model.producer_name, model.ir_version = "d", "gd", "p", 7
    model.graph.node[0].doc_string = "nd"
    model.metadata_props.add(key="k", value="v")
    model.opset_import.append(helper.make_opsetid("com.other", 2))
    made = cipm_ir.optimize(model, ["canonicalize"]).model
    for field in ("doc_string", "producer_name", "ir_version", "metadata_props", "opset_import"):
        assert getattr(made, field) == getattr(model, field), field
    assert made.graph.doc_string == "gd" and list(made.graph.node) == list(model.graph.node)


# --- refused --------------------------------------------------------------------------------------


def clash(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(weight("w2", shape=(6, 2)))


def made_twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "a"


def index_outside(model: onnx.ModelProto) -> None:
    sparse_weight(model)
    model.graph.sparse_initializer[0].indices.CopyFrom(numpy_helper.from_array(np.array([0, 5, 18]), "i"))


REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "two shapes": (
        clash,
        "The weight 'w2' of graph 'g' is defined twice, with different shapes or types; remove one of them.",
    ),
    "a value made twice": (made_twice, "Value 'a' is defined twice, the second time by node 'act' (Relu)."),
    "a weight made by a node": (
        lambda m: m.graph.initializer.append(weight("a")),
        "Value 'a' is defined twice, the second time by node 'first' (MatMul).",
    ),
    "an output without a name": (
        lambda m: m.graph.output.append(helper.make_tensor_value_info("", FLOAT, None)),
        "Output '' of graph 'g' is made by no node of that graph.",
    ),
    "a sparse index outside": (
        index_outside,
        "Initializer 'w2' is a sparse tensor that cannot be read: an index lies outside of it.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_onnxruntime_refuses_is_refused(kind: str) -> None:
    edit, text = REFUSED[kind]
    model = net()
    edit(model)
    with pytest.raises(Exception, match=r"ONNXRuntimeError|."):
        ran(model)
    with pytest.raises(cipm_ir.InputError) as caught:
        load_onnx(model)
    assert str(caught.value) == text


# --- external data --------------------------------------------------------------------------------


def test_weights_in_several_files_at_offsets(tmp_path: Path) -> None:
    """One weight in a folder below, one behind an offset, one inside a Constant node."""
    model = net()
    (wanted,) = ran(model)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w2"], value=model.graph.initializer.pop()))
    (tmp_path / "below").mkdir()
    places = {"w1": ("below/a.bin", 0), "w2": ("b.bin", 64)}
    for tensor in (model.graph.initializer[0], model.graph.node[0].attribute[0].t):
        location, offset = places[tensor.name]
        (tmp_path / location).write_bytes(bytes(offset) + tensor.raw_data + bytes(7))
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(len(tensor.raw_data)))):
            tensor.external_data.add(key=key, value=value)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    for passes in ([], ["canonicalize"], ["prune{ratio=0.6}"]):
        result = cipm_ir.optimize(tmp_path / "m.onnx", passes, output=tmp_path / "out.onnx")
        made = onnx.load(tmp_path / "out.onnx")
        if not passes or passes == ["canonicalize"]:
            np.testing.assert_allclose(ran(made)[0], wanted, rtol=1e-5, atol=1e-5)
        assert result.report.before.parameters == 42
    (tmp_path / "b.bin").unlink()
    with pytest.raises(cipm_ir.InputError, match=r"b\.bin' of tensor 'w2' is missing; put it beside the model"):
        load_onnx(tmp_path / "m.onnx")


# --- old opsets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 9, 10, 11, 28])
def test_a_computed_size_is_patched_with_what_the_opset_has(opset: int) -> None:
    """The model gives out the shape of its hidden layer, which stays what it was when units are removed."""
    model = net(min(opset, 17))
    model.opset_import[0].version = opset
    model.ir_version = 3 + (opset > 8) * 1 + (opset > 20) * 10
    model.graph.node.append(helper.make_node("Shape", ["r"], ["size"]))
    model.graph.output.append(helper.make_tensor_value_info("size", TensorProto.INT64, [2]))
    if model.ir_version == 3:
        model.graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
        )
    made = cipm_ir.optimize(model, ["prune{ratio=0.6}"]).model
    onnx.checker.check_model(made, full_check=True)
    assert made.graph.initializer[0].dims[1] < 6
    if opset < 28:
        assert ran(made)[1].tolist() == [3, 6]
