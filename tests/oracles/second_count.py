"""A second count of multiply-accumulates: a run in onnxruntime, whose profile tells the shapes of every kernel call.

It shares nothing with the package: shapes are those of the run, subgraphs count as often as they ran, and the formulas
start from the weights (each entry is used once per position) where the package starts from the outputs.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

Shape = tuple[int, ...]


def second_count(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> Counter[str]:
    """Products by operator in one run of a model without local functions."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = {}
    for number, node in enumerate(_nodes(copy.graph)):
        node.name = f"n{number}"
        nodes[node.name] = node
    found: Counter[str] = Counter()
    for name, inputs, outputs in _calls(copy, feeds):
        if name in nodes:
            found[nodes[name].op_type] += _products(nodes[name], inputs, outputs)
    return +found


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _calls(model: onnx.ModelProto, feeds: Mapping[str, Any]) -> Iterator[tuple[str, list[Shape], list[Shape]]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # what is packed is not in the profile
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            sides = [
                [tuple(next(iter(one.values()))) for one in event["args"].get(side, [])]
                for side in ("input_type_shape", "output_type_shape")
            ]
            yield event["name"].removesuffix("_kernel_time"), sides[0], sides[1]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _products(node: onnx.NodeProto, inputs: list[Shape], outputs: list[Shape]) -> int:
    """Missing optional inputs are not in the profile, so only those before the first of them count by place."""
    given, size = _attributes(node), math.prod
    op = node.op_type
    if op in ("Conv", "ConvInteger", "FusedConv", "NhwcFusedConv"):
        x, weight = inputs[0], inputs[1]
        return x[0] * size(outputs[0][2:]) * size(weight)
    if op == "QLinearConv":
        return inputs[0][0] * size(outputs[0][2:]) * size(inputs[3])
    if op == "ConvTranspose":
        return inputs[0][0] * size(inputs[0][2:]) * size(inputs[1])
    if op in ("MatMul", "MatMulInteger", "FusedMatMul", "DynamicQuantizeMatMul", "QLinearMatMul"):
        a, b = inputs[0], inputs[3 if op == "QLinearMatMul" else 1]
        length = a[-2] if given.get("transA") else a[-1]
        batch = np.broadcast_shapes(a[:-2], b[:-2])
        rows, columns = size(a[-2:]) // length, size(b[-2:]) // length
        return size(batch) * rows * columns * length
    if op in ("Gemm", "FusedGemm"):
        columns = inputs[1][0 if given.get("transB") else 1]
        return size(inputs[0]) * columns
    if op in ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"):
        gates = {"GRU": 3, "RNN": 1}.get(op, 4)
        steps, items, width = inputs[0]
        directions, hidden = inputs[2][0], max(inputs[2][1:]) // gates
        return steps * items * directions * gates * hidden * (width + hidden)
    if op == "Einsum":
        return _einsum(given["equation"].decode(), inputs)
    if op == "Attention" and node.domain in ("", "ai.onnx"):
        q, k, v = inputs[:3]
        if len(q) == 3:
            heads, groups = given["q_num_heads"], given["kv_num_heads"]
            q, k, v = ((s[0], n, s[1], s[2] // n) for s, n in zip((q, k, v), (heads, groups, groups), strict=True))
        return q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])
    if op in ("DFT", "STFT", "GridSample", "DeformConv"):
        raise NotImplementedError(op)
    return 0


def _einsum(equation: str, shapes: list[Shape]) -> int:
    """Two operands: all letters that both have or that are kept; brute force over sets of index tuples is the same."""
    left, arrow, kept = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    kept = kept if arrow else "".join(x for x in set(left) if left.count(x) == 1)
    if "." in equation or len(terms) != 2:
        raise NotImplementedError(equation)
    sizes = {x: n for term, shape in zip(terms, shapes, strict=True) for x, n in zip(term, shape, strict=True)}
    return math.prod(n for x, n in sizes.items() if x in kept or (x in terms[0] and x in terms[1]))
