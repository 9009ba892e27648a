"""Small models whose multiply-accumulates are known by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import cipm_ir
from cipm_ir.symmetry.counting import Count


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, list[Any]],
    outputs: Mapping[str, list[Any] | None],
    parameters: Mapping[str, np.ndarray],
    opset: int = 20,
    **domains: int,
) -> onnx.ModelProto:
    def value(name: str, shape: list[Any] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes, "g",
        [value(*pair) for pair in inputs.items()], [value(*pair) for pair in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in parameters.items()],
    )  # fmt: skip
    imports = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(d.replace("_", "."), v) for d, v in domains.items()),
    ]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def count(made: onnx.ModelProto, sizes: Mapping[str, int] | None = None) -> Count:
    return cipm_ir.load(made).count(sizes)


def sequence(*shape: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"]),
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "t"], ["s"]),
        helper.make_node("MatMul", ["s", "x"], ["a"]),
        helper.make_node("MatMul", ["a", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    parameters = {"wq": weights(16, 16), "w1": weights(16, 64), "w2": weights(64, 16)}
    return model(nodes, {"x": list(shape)}, {"y": list(shape)}, parameters)
