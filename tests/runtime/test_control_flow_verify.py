"""Verification of models with bodies: weights in a branch that no input takes are compared, or said not to be."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.models.control_flow_models import MODELS, every_way, feeds

from cipm_ir.runtime.verification.branches import EntryCounter, forced
from cipm_ir.runtime.verification.verify import verify_models


def planted(proto: onnx.ModelProto, weight: int, factor: float) -> ir.Model:
    """A copy in which one matrix of a body, counted over all bodies in order, is another."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    number = -1

    def visit(graph: onnx.GraphProto, inside: bool) -> None:
        nonlocal number
        tensors = list(graph.initializer) + [n.attribute[0].t for n in graph.node if n.op_type == "Constant"]
        for tensor in tensors if inside else ():
            if len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT:
                number += 1
                if number == weight:
                    array = onnx.numpy_helper.to_array(tensor)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(array * np.float32(factor), tensor.name))
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    visit(attribute.g, True)

    visit(copy.graph, False)
    assert number >= weight
    return ir.from_proto(copy)


@pytest.mark.parametrize("name", ["branches", "branches in Constants", "looped", "scanned"])
def test_a_wrong_weight_in_a_body_is_found_whatever_the_data_takes(name: str) -> None:
    """One per mille, in each matrix of each body, with data that takes one branch only."""
    proto = MODELS[name]()
    model = ir.from_proto(proto)
    data = [feeds(proto, yes=True)]
    assert verify_models(model, model, data=data).ok
    for weight in range(3):
        found = verify_models(model, planted(proto, weight, 1.001), data=data)
        assert found.ok is False, (weight, str(found))


def test_the_same_without_data_and_within_nested_branches() -> None:
    proto = MODELS["nested"]()
    model = ir.from_proto(proto)
    assert verify_models(model, model).ok and not verify_models(model, model).unrun
    for weight in range(7):
        assert verify_models(model, planted(proto, weight, 1.001)).ok is False


def never() -> onnx.ModelProto:
    """An If whose second branch cannot run: the width does not fit. In the file, its body is the first."""
    parts = []
    for size, out in ((4, "a"), (5, "b")):
        unit = onnx.numpy_helper.from_array(np.asarray(np.identity(size), np.float32), f"w{size}")
        product = onnx.helper.make_node("MatMul", ["x", unit.name], [out])
        shown = onnx.helper.make_tensor_value_info(out, 1, ["N", size])
        parts.append(onnx.helper.make_graph([product], out, [], [shown], [unit]))
    then, other = parts
    node = onnx.helper.make_node("If", ["c"], ["y"], name="If_0", then_branch=then, else_branch=other)
    total = onnx.helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0)
    less = onnx.helper.make_node("Less", ["s", "big"], ["c"])
    big = onnx.numpy_helper.from_array(np.array(1e30, np.float32), "big")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([total, less, node], "g", [info("x", 1, ["N", "C"])], [info("y", 1, None)], [big])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)


def test_a_branch_that_no_input_can_enter_is_said() -> None:
    proto = never()
    model = ir.from_proto(proto)
    data = {"x": np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)}
    same = verify_models(model, model, data=data)
    assert same.ok and same.unrun == ("If_0.else",) and "If_0.else" in str(same)
    wrong = verify_models(model, planted(proto, 0, 1.5), data=data)
    assert wrong.ok is None and "If_0.else" in wrong.reason and not wrong
    assert verify_models(model, planted(proto, 1, 1.5), data=data).ok is False


def entered(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> dict[str, int]:
    """How often each body ran, over all inputs together."""
    with EntryCounter(model, None) as count:
        found = [count(one) for one in feeds]
        return {path: sum(one[path] for one in found) for path in count.paths}


def test_how_often_bodies_run() -> None:
    counts = entered(ir.from_proto(MODELS["looped"]()), [feeds(MODELS["looped"](), yes=True)] * 2)
    assert counts == {"loop": 6}
    proto = MODELS["nested"]()
    model, ways = ir.from_proto(proto), every_way(proto)
    counts = entered(model, ways)
    assert counts["z_If.then"] + counts["z_If.else"] == len(ways) and counts["z_If.then"] == len(ways) // 2
    inner = [counts[f"z_If.then/out_If.{k}"] for k in ("then", "else")]
    assert sum(inner) == counts["z_If.then"] and all(inner)
    always = forced(model, "z_If.then")
    assert always is not None and entered(always, ways)["z_If.then"] == len(ways)
    assert forced(model, "z_If.none") is None
