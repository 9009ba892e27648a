"""Float64 copies of float32 models, to tell rounding from an error: a symmetry that is exact stays exact at 1e-10."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from tests.zoo.feeds import Feeds, run

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
_STATE = ort.capi.onnxruntime_pybind11_state
_REFUSALS = (_STATE.NotImplemented, _STATE.InvalidGraph, _STATE.Fail, _STATE.InvalidArgument, _STATE.RuntimeException)
_STASHES = {"GroupNormalization"}
_TYPE_ATTRIBUTES = {"to", "dtype", "softmax_precision"}


class NoKernelError(RuntimeError):
    """Neither onnxruntime nor the reference evaluator runs this model in float64."""


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every float32 (tensors, constants, casts, value types, subgraphs, functions) made float64."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _graph(wide.graph)
    for function in wide.functions:
        _nodes(function.node)
        for info in function.value_info:
            _value(info)
    return wide


def widened_feeds(feeds: Feeds) -> Feeds:
    """Inputs for `widened`: the same numbers."""
    return {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in feeds.items()}


def run_widened(model: onnx.ModelProto, feeds: Feeds) -> list[NDArray[np.generic]]:
    """Outputs in float64, by onnxruntime where it has the kernels, else by the reference evaluator.

    Raises NoKernelError where neither can.
    """
    try:
        return run(model, feeds)
    except _REFUSALS:
        pass
    try:
        return run(model, feeds, reference=True)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, ValueError) as error:
        raise NoKernelError(f"no float64 kernels: {error}") from error


def _graph(graph: onnx.GraphProto) -> None:
    scales = {name for node in graph.node if node.op_type == "Resize" for name in node.input[2:3]}
    for tensor in graph.initializer:
        if tensor.name not in scales:  # these stay float32 by the specification
            _tensor(tensor)
    for info in (*graph.input, *graph.output, *graph.value_info):
        _value(info)
    _nodes(graph.node)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attr in node.attribute:
            _attribute(attr)
        if node.op_type in _STASHES and not any(attr.name == "stash_type" for attr in node.attribute):
            node.attribute.append(helper.make_attribute("stash_type", DOUBLE))  # else the statistics are float32


def _attribute(attr: AttributeProto) -> None:
    if attr.type == AttributeProto.GRAPH:
        _graph(attr.g)
    elif attr.type == AttributeProto.GRAPHS:
        for graph in attr.graphs:
            _graph(graph)
    elif attr.type == AttributeProto.TENSOR:
        _tensor(attr.t)
    elif attr.name in _TYPE_ATTRIBUTES and attr.type == AttributeProto.INT and attr.i == FLOAT:
        attr.i = DOUBLE
    elif attr.name in ("value_float", "value_floats"):
        values = attr.f if attr.name == "value_float" else list(attr.floats)
        attr.CopyFrom(
            helper.make_attribute("value", numpy_helper.from_array(np.asarray(values, np.float32).astype(np.float64)))
        )


def _tensor(tensor: TensorProto) -> None:
    if tensor.data_type == FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def _value(info: onnx.ValueInfoProto) -> None:
    if info.type.tensor_type.elem_type == FLOAT:
        info.type.tensor_type.elem_type = DOUBLE
