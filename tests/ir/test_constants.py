"""The small evaluator of sizes and indices against ONNX's reference, with attributes that change the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from cipm_ir.ir.constants import evaluate

OPSET = 18
GRID = np.arange(12, dtype=np.int64).reshape(3, 4)
SIGNED = np.array([-7, -3, 3, 7], np.int64)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


CASES: dict[str, tuple[str, list[NDArray[Any]], dict[str, Any]]] = {
    "Transpose": ("Transpose", [GRID.reshape(3, 2, 2)], {"perm": [2, 0, 1]}),
    "Transpose without perm": ("Transpose", [GRID.reshape(3, 2, 2)], {}),
    "Mod": ("Mod", [SIGNED, ints(4, -4, 4, -4)], {}),
    "Mod of C": ("Mod", [SIGNED, ints(4, -4, 4, -4)], {"fmod": 1}),
    "Div": ("Div", [SIGNED, ints(2, 2, 2, -2)], {}),
    "ReduceSum": ("ReduceSum", [GRID, ints(-1)], {"keepdims": 0}),
    "ReduceSum of int32": ("ReduceSum", [GRID.astype(np.int32), ints(0)], {}),
    "ReduceSum of all": ("ReduceSum", [GRID], {}),
    "ReduceSum over no axes is of all": ("ReduceSum", [GRID, ints()], {"keepdims": 0}),
    "ReduceSum over no axes is none": ("ReduceSum", [GRID, ints()], {"noop_with_empty_axes": 1}),
    "ReduceProd of int32": ("ReduceProd", [GRID.astype(np.int32) + 1, ints(1)], {}),
    "Reshape that copies": ("Reshape", [GRID, ints(0, 2, -1)], {}),
    "Reshape to nothing": ("Reshape", [GRID[:0], ints(4, 0)], {"allowzero": 1}),
    "Slice backwards": ("Slice", [GRID, ints(-1), ints(np.iinfo(np.int64).min + 1), ints(0), ints(-1)], {}),
    "Gather from behind": ("Gather", [GRID, ints(-1, 0)], {"axis": 1}),
    "Range": ("Range", [np.array(7), np.array(0), np.array(-3)], {}),
    "ScatterElements": ("ScatterElements", [ints(1, 2, 3, 4), ints(2, -1), ints(9, 8)], {}),
    "ScatterElements on rows": ("ScatterElements", [GRID, GRID[:2] % 3, -GRID[:2]], {}),
    "ScatterElements on columns": ("ScatterElements", [GRID, ints(1, -1)[None], ints(9, 8)[None]], {"axis": 1}),
    "Unsqueeze": ("Unsqueeze", [SIGNED, ints(0, -1)], {}),
    "Squeeze": ("Squeeze", [SIGNED.reshape(1, 4, 1), ints(-1)], {}),
    "Expand": ("Expand", [SIGNED.reshape(4, 1), ints(2, 1, 3)], {}),
}


def node_of(op: str, arrays: list[NDArray[Any]], attributes: dict[str, Any]) -> onnx.NodeProto:
    return helper.make_node(op, [f"x{k}" for k in range(len(arrays))], ["y"], **attributes)


@pytest.mark.parametrize("name", CASES)
def test_the_evaluator_computes_what_onnx_does(name: str) -> None:
    op, arrays, attributes = CASES[name]
    proto = node_of(op, arrays, attributes)
    inputs = [
        helper.make_tensor_value_info(f"x{k}", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for k, a in enumerate(arrays)
    ]
    graph = helper.make_graph([proto], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    outputs: Any = ReferenceEvaluator(model).run(None, {f"x{k}": a for k, a in enumerate(arrays)})
    wanted = outputs[0]
    found = evaluate(ir.serde.deserialize_node(proto), list(arrays), None, OPSET)
    assert found is not None
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    assert np.array_equal(found, wanted)


def test_what_it_does_not_follow_is_no_constant() -> None:
    proto = node_of("ScatterElements", [SIGNED, ints(0, 0), ints(1, 1)], {"reduction": "add"})
    assert evaluate(ir.serde.deserialize_node(proto), [SIGNED, ints(0, 0), ints(1, 1)], None, OPSET) is None
