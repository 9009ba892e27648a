"""Gathers that give a value back as it is: how torch's exporter writes ``adaptive_avg_pool2d(x, 1)``.

It writes ``x.mean(...).as_strided(...)``, and that as a Gather from the flattened value; where the batch is dynamic the
positions are computed from its size. Units cannot be followed through a flattening with the batch, nor can they be
removed from a list of positions in it, so the detour is taken out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import evaluate
from cipm_ir.ir.labels import Array
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.ir.shapes import Shape
from cipm_ir.ir.stand_ins import infer_shapes

_LIMIT = 1 << 22
"""Positions computed at most."""


def has_detours(model: ir.Model) -> bool:
    """Return whether a Gather takes positions from a flattened value; whether they change anything is not looked at."""
    return any(_source(node) is not None for node in model.graph)


def remove_detours(model: ir.Model) -> int:
    """Let the readers of such a Gather read the value itself, where it has the same entries; gives their number.

    "The same": the positions are 0, 1, 2, ... in the shape of the value, under two assignments of numbers to the
    dynamic sizes (see `cipm_ir.ir.shapes`). The model is changed; values without uses are removed.
    """
    shapes = infer_shapes(model)
    removed = 0
    for node in list(model.graph):
        source, index, out = _source(node), node.inputs[1] if len(node.inputs) > 1 else None, node.outputs[0]
        if source is None or index is None or out.is_graph_output():
            continue
        if not all(
            _counts_up(index, known.get(source.name or ""), known, model) for known in (shapes.first, shapes.second)
        ):
            continue
        out.replace_all_uses_with(source)
        _drop(model.graph, node)
        removed += 1
    return removed


def _source(node: ir.Node) -> ir.Value | None:
    """Return what a Gather along axis 0 takes from, before it was flattened; None where it was not."""
    if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
        return None
    flat, index = node.inputs[0], node.inputs[1]
    made = None if flat is None else flat.producer()
    if made is None or made.op_type != "Reshape" or made.domain or index is None:
        return None
    target = made.inputs[1]
    tensor = parameter_tensor(target)
    return made.inputs[0] if tensor is not None and tensor.size == 1 else None


def _counts_up(index: ir.Value, shape: Shape | None, known: dict[str, Shape], model: ir.Model) -> bool:
    if shape is None or np.prod(shape) > _LIMIT:
        return False
    found = _number(index, known, model.opset_imports.get("", 1), {})
    return found is not None and found.shape == shape and bool((found.ravel() == np.arange(found.size)).all())


def _number(value: ir.Value, known: dict[str, Shape], version: int, seen: dict[str, Array | None]) -> Array | None:
    """Return a computed value, from constants and sizes."""
    name = value.name or ""
    if name in seen:
        return seen[name]
    made, tensor = value.producer(), parameter_tensor(value)
    seen[name] = None
    if tensor is not None:
        seen[name] = np.asarray(tensor.numpy()) if tensor.size <= _LIMIT else None
    elif made is not None:
        sized = made.op_type in ("Shape", "Size")
        args = [None if v is None or sized else _number(v, known, version, seen) for v in made.inputs]
        first = made.inputs[0] if made.inputs else None
        shape = known.get(first.name or "") if first is not None else None
        seen[name] = evaluate(made, args, shape, version, _LIMIT)
    return seen[name]


def _drop(graph: ir.Graph, node: ir.Node) -> None:
    """Take out a node that nothing reads, and what only it read."""
    inputs = {value for value in node.inputs if value is not None}
    graph.remove(node, safe=True)
    for value in inputs:
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        made = value.producer()
        if made is None:
            graph.initializers.pop(value.name or "", None)
        elif not any(out.uses() or out.is_graph_output() for out in made.outputs):
            _drop(graph, made)
