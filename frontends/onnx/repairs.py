"""Make of a file what onnxruntime makes of it: weights defined twice, weights without a name, sparse weights, names.

Files that need nothing are handed on as they are. Otherwise a copy is changed, or the message itself where no one else
holds it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from cipm_ir.errors import InputError
from cipm_ir.ir.opsets import standard_name

_MOST_DENSE = 1 << 31
"""A sparse tensor is not written out beyond so many bytes: a damaged shape must not fill the memory."""


def repaired(proto: onnx.ModelProto, *, own: bool) -> onnx.ModelProto:
    """Return a model in which every weight is dense, has a name, and is defined once.

    Of several definitions of one shape and type the one that onnxruntime takes is kept: the last of the sparse ones,
    else the last of the Constant nodes, else the last initializer. Nodes of equal names are numbered, since
    onnxruntime refuses them and a node's name means nothing.

    Args:
        proto: the model.
        own: no one else holds `proto`, so it may be changed.

    Raises:
        InputError: two definitions of one name differ in shape or type; a sparse tensor is damaged.
    """
    if not any(_needs_repair(graph) for graph in _graphs(proto)):
        return proto
    if not own:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        proto = copy
    for graph in list(_graphs(proto)):
        if isinstance(graph, onnx.GraphProto):
            _repair_weights(graph)
        else:
            _densify_constants(graph.node)
        _number_names(graph.node)
    return proto


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def _needs_repair(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    if _repeated(node.name for node in graph.node):
        return True
    constants = [node for node in graph.node if _is_constant(node)]
    if any(attribute.HasField("sparse_tensor") for node in constants for attribute in node.attribute):
        return True
    if isinstance(graph, onnx.FunctionProto):
        return False
    names = [*(tensor.name for tensor in graph.initializer), *(node.output[0] for node in constants)]
    return bool(graph.sparse_initializer) or len(set(names)) < len(names) or "" in names


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and not standard_name(node.domain) and len(node.output) == 1


def _repeated(names: Iterable[str]) -> bool:
    return any(number > 1 for name, number in Counter(names).items() if name)


def _repair_weights(graph: onnx.GraphProto) -> None:
    _densify_constants(graph.node)
    dense = list(range(len(graph.initializer)))
    graph.initializer.extend(
        _dense(sparse, f"Initializer {sparse.values.name!r}") for sparse in graph.sparse_initializer
    )
    del graph.sparse_initializer[:]
    constants = [k for k, node in enumerate(graph.node) if _is_constant(node) and node.output[0]]
    # In the order in which onnxruntime reads them; a later definition takes the place of an earlier one.
    kept: dict[str, tuple[bool, int]] = {}
    kinds: dict[str, object] = {}
    order = [(True, k) for k in dense] + [(False, k) for k in constants]
    order += [(True, k) for k in range(len(dense), len(graph.initializer))]
    for is_initializer, k in order:
        tensor = graph.initializer[k] if is_initializer else _held(graph.node[k])
        name = graph.initializer[k].name if is_initializer else graph.node[k].output[0]
        kind = None if tensor is None else (tensor.data_type, *tensor.dims)
        if kinds.setdefault(name, kind) != kind and name:
            raise InputError(
                f"The weight {name!r} of graph {graph.name!r} is defined twice, with different shapes or types; "
                "remove one of them."
            )
        kept[name] = is_initializer, k
    places = {place for name, place in kept.items() if name}
    for k in reversed(range(len(graph.initializer))):
        if (True, k) not in places:
            del graph.initializer[k]
    for k in reversed(constants):
        if (False, k) not in places:
            del graph.node[k]


def _held(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return the tensor of a Constant node; None for its other forms."""
    return next((attribute.t for attribute in node.attribute if attribute.HasField("t")), None)


def _densify_constants(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in filter(_is_constant, nodes):
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor"):
                dense = _dense(attribute.sparse_tensor, f"The Constant node that makes {node.output[0]!r}")
                attribute.ClearField("sparse_tensor")
                attribute.name, attribute.type = "value", onnx.AttributeProto.TENSOR
                attribute.t.CopyFrom(dense)


def _dense(sparse: onnx.SparseTensorProto, label: str) -> onnx.TensorProto:
    """Return the tensor with its zeros.

    Indices are places in the flat tensor, or one row of coordinates for each value.
    """
    shape = tuple(sparse.dims)
    try:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        if min(shape, default=1) < 0 or math.prod(shape) * values.itemsize > _MOST_DENSE:
            raise ValueError(f"its shape is {list(shape)}")
        if indices.ndim == 2 and indices.shape[1] == len(shape):
            indices = np.ravel_multi_index(tuple(indices.T), shape)
        if indices.ndim != 1 or values.ndim != 1 or len(indices) != len(values):
            raise ValueError(f"it has {values.size} values and indices of shape {list(indices.shape)}")
        if indices.size and (indices.min() < 0 or indices.max() >= math.prod(shape)):
            raise ValueError("an index lies outside of it")
        array = np.zeros(math.prod(shape), values.dtype)
        array[indices] = values
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{label} is a sparse tensor that cannot be read: {str(error).rstrip('.')}.") from error
    made = numpy_helper.from_array(array.reshape(shape), sparse.values.name)
    made.doc_string = sparse.values.doc_string
    return made


def _number_names(nodes: Iterable[onnx.NodeProto]) -> None:
    taken = {node.name for node in nodes}
    seen: set[str] = set()
    for node in nodes:
        if node.name and node.name in seen:
            numbers = (f"{node.name}_{k}" for k in itertools.count(1))
            node.name = next(name for name in numbers if name not in taken)
            taken.add(node.name)
        seen.add(node.name)
