"""Shapes of the outputs of an operator that no table knows: the node alone is run by onnxruntime, on made-up inputs.

Two runs on different numbers must agree: where sizes depend on content, none is known. The caller asks at each of its
two choices of dynamic sizes, so that dynamic results are told from constant ones as everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.labels import Array

Shape = tuple[int, ...]
_MOST = 1 << 24
"""Entries of all inputs together above which a node is not run."""
_NOT_RUN = ("", "ai.onnx.ml", "pkg.torch")


def probed_shapes(
    node: ir.Node,
    inputs: Sequence[Shape | None],
    version: int,
    types: Sequence[ir.DataType | None],
    numbers: Sequence[Array | None],
) -> list[Shape | None] | None:
    """Return the shapes of the outputs, or None where the node cannot be run or they depend on its numbers.

    Args:
        node: of a domain other than ONNX's own, which inference covers.
        inputs: concrete shapes.
        version: of the operator set.
        types: element types of the inputs; float where unknown.
        numbers: inputs that are known as numbers.
    """
    known = [s for s in inputs if s is not None]
    missing = any(v is not None and s is None for v, s in zip(node.inputs, inputs, strict=True))
    nested = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
    if node.domain in _NOT_RUN or missing or nested or sum(math.prod(s) for s in known) > _MOST:
        return None
    kinds = [t or ir.DataType.FLOAT for t in types]
    feeds: list[dict[str, Array]] = [{}, {}]
    places: list[ir.Value | None] = []
    for k, (value, shape) in enumerate(zip(node.inputs, inputs, strict=True)):
        if value is None or shape is None:
            places.append(None)
            continue
        name, number = f"x{k}", numbers[k] if k < len(numbers) else None
        for draw, feed in enumerate(feeds):
            feed[name] = _drawn(shape, kinds[k], draw) if number is None else np.asarray(number)
        kind = kinds[k] if number is None else ir.DataType.from_numpy(feeds[0][name].dtype)
        places.append(ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape)))
    shapes = _run(node, places, version, feeds)
    return shapes if shapes is None or len(shapes) == len(node.outputs) else None


def _drawn(shape: Shape, kind: ir.DataType, draw: int) -> Array:
    """Zeros, and small numbers of both signs."""
    if draw == 0:
        return np.zeros(shape, kind.numpy())
    numbers = np.random.default_rng(draw).integers(0 if kind.numpy().kind in "ub" else -2, 3, shape)
    return numbers.astype(kind.numpy())


def _run(
    node: ir.Node, inputs: Sequence[ir.Value | None], version: int, feeds: Sequence[dict[str, Array]]
) -> list[Shape | None] | None:
    import onnxruntime as ort

    named = [bool(v.name) for v in node.outputs]
    outputs = [ir.Value(name=f"y{k}" if there else "") for k, there in enumerate(named)]
    alone = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs)
    given = [v for v in inputs if v is not None]
    graph = ir.Graph(
        given, [v for v in outputs if v.name], nodes=[alone], opset_imports={"": 17, node.domain: version}, name="probe"
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        proto = ir.to_proto(ir.Model(graph, ir_version=8))
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        made = [[np.shape(y) for y in session.run(None, feed)] for feed in feeds]
    except Exception:  # onnxruntime raises classes of its own, and any is a reason not to know
        return None
    if made[0] != made[1]:
        return None
    shapes = iter(made[0])
    return [next(shapes) if there else None for there in named]
