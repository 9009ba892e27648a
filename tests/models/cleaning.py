"""Small models for the tests of clean-up: built, cleaned, and compared bit for bit on awkward numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cipm_ir.passes.exact.cleanup.clean_up import CleanUp
from cipm_ir.passes.framework.base import Context
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
AWKWARD = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 3.4e38, 1.0, -2.5, 1e-10, 7.0], np.float32)
"""Zeros of both signs, infinities, no number, subnormal, large and ordinary ones."""


def value(name: str, elem: int = TensorProto.FLOAT, shape: Sequence[Any] | None = ("N", 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, shape)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Array] | None = None,
    *,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    opset: int = 20,
    ir_version: int = 8,
    inner: Sequence[onnx.ValueInfoProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model from x (N, 4) to y, unless other inputs and outputs are given."""
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x")] if inputs is None else inputs,
        [value("y", shape=None)] if outputs is None else outputs,
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
        value_info=inner,
    )
    opsets = [
        helper.make_opsetid("", opset),
        *({f.domain: helper.make_opsetid(f.domain, 1) for f in functions}).values(),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=functions)


def cleaned(proto: onnx.ModelProto, **options: Any) -> onnx.ModelProto:
    """The model after clean-up alone, which must be valid."""
    program = Program.of(ir.from_proto(proto))
    result = ir.to_proto(CleanUp(**options).run(program, Context()).program.emit())
    _check(result)
    return result


def _check(proto: onnx.ModelProto) -> None:
    """ONNX's checker, which asks inputs and outputs for shapes, also where these are not known."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(copy)


def operators(proto: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in proto.graph.node]


def run(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """All outputs in onnxruntime, with its own optimizations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, dict(feeds))  # type: ignore[no-any-return]


def same_bits(a: Sequence[Array], b: Sequence[Array]) -> bool:
    """Whether arrays are equal bit for bit, but for the payloads of what is no number."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        and (x.dtype.kind != "f" or bool((np.signbit(x) == np.signbit(y))[~np.isnan(x)].all()))
        for x, y in zip(a, b, strict=True)
    )


def stays(proto: onnx.ModelProto, **options: Any) -> bool:
    """Whether clean-up leaves all nodes."""
    return operators(cleaned(proto, **options)) == operators(proto)


def scalar(number: Any, dtype: str = "float32") -> Array:
    """An array without axes."""
    return np.array(number, dtype)
