"""A model that imports the standard operators under their long name is the same model."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import cipm_ir
from cipm_ir.ir.opsets import standard_name, standard_version
from cipm_ir.passes.pruning.compress.divergence import Divergence


def classifier(domain: str, functions: bool = False) -> onnx.ModelProto:
    """Two products, a Relu and a Softmax over the last of three axes; of opset 17, in which that is its default."""
    rng = np.random.default_rng(0)
    relu = helper.make_node("Relu", ["a"], ["r"])
    if functions:
        relu = helper.make_node("Half", ["a"], ["r"], domain="local")
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        relu,
        helper.make_node("MatMul", ["r", "w1"], ["l"]),
        helper.make_node("Softmax", ["l"], ["p"]),
    ]
    weights = [
        numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        for name, shape in (("w0", (8, 16)), ("w1", (16, 6)))
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 5, k]) for n, k in (("x", 8), ("p", 6))]
    graph = helper.make_graph(nodes, "classifier", ends[:1], ends[1:], weights)
    opsets = [helper.make_opsetid(domain, 17)]
    body = [helper.make_function("local", "Half", ["i"], ["o"], [helper.make_node("Relu", ["i"], ["o"])], opsets)]
    if functions:
        opsets.append(helper.make_opsetid("local", 1))
    return helper.make_model(graph, opset_imports=opsets, functions=body if functions else [], ir_version=8)


@pytest.mark.parametrize("functions", [False, True])
def test_the_long_name_of_the_domain_changes_nothing(functions: bool) -> None:
    """Spaces, the version that is imported, and how outputs are measured."""
    short, long = (cipm_ir.load(classifier(domain, functions)) for domain in ("", "ai.onnx"))
    assert [(s.name, s.size) for s in short.spaces] == [(s.name, s.size) for s in long.spaces] != []
    outputs = {"p": np.full((2, 5, 6), 1 / 6, np.float32)}
    measures = [Divergence.of(p.model, outputs).measures["p"] for p in (short, long)]
    assert measures == ["probabilities", "probabilities"]
    for one in (long.model, long.emit()):
        assert one.opset_imports[""] == 17 and "ai.onnx" not in one.opset_imports


def test_a_softmax_of_an_early_opset_is_none_over_the_last_axis() -> None:
    """A control: the version is what tells them apart."""
    model = cipm_ir.load(classifier("")).emit()
    model.graph.opset_imports[""] = 11
    for node in model.graph:
        node.version = None
    outputs = {"p": np.full((2, 5, 6), 1 / 6, np.float32)}
    assert Divergence.of(model, outputs).measures["p"] == "error"


def test_a_node_has_the_short_name_and_what_a_file_says_is_made_short() -> None:
    """Every rule compares with the short name alone, so nodes must have it however they were made."""
    node = ir.Node("ai.onnx", "Relu", [ir.Value(name="x")])
    assert node.domain == standard_name("ai.onnx") == standard_name("") == ""
    node.domain = "ai.onnx"
    assert node.domain == ""
    assert standard_name("ai.onnx.ml") == "ai.onnx.ml"
    assert [standard_version(found) for found in ({"": 17}, {"ai.onnx": 13}, {"ai.onnx.ml": 3})] == [17, 13, 0]
