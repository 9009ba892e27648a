"""Output shapes of single nodes: ONNX's inference, and what it does not know of onnxruntime's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array
from cipm_ir.ir.probed_shapes import probed_shapes
from cipm_ir.ir.shapes import Shape, infer_node

Inputs = Sequence[Shape | None]

_LIKE_FIRST = """
BiasAdd BiasDropout BiasGelu BiasSoftmax FastGelu Gelu GroupNorm QuickGelu QLinearLeakyRelu QLinearSigmoid
QLinearSoftmax QuantizeLinear DequantizeLinear RotaryEmbedding SkipGroupNorm SkipLayerNormalization
SkipSimplifiedLayerNormalization Trilu
"""
_NORMALIZATIONS = """
BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LpNormalization
MeanVarianceNormalization RMSNormalization RotaryEmbedding SimplifiedLayerNormalization Celu Gelu HardSwish Mish
Swish
"""
"""Operators of ONNX with the shape of their first input, the bodies of which inference may fail on."""
_BROADCAST = {"QLinearAdd": (0, 3), "QLinearMul": (0, 3)}
_AS_ONNX: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "FusedConv": ("Conv", 22, (0, 1)),
    "FusedGemm": ("Gemm", 13, (0, 1)),
    "QLinearConv": ("Conv", 22, (0, 3)),
    "QLinearAveragePool": ("AveragePool", 22, (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", 22, (0,)),
    "DynamicQuantizeMatMul": ("MatMul", 13, (0, 1)),
    "MatMulIntegerToFloat": ("MatMul", 13, (0, 1)),
    "MatMulInteger16": ("MatMul", 13, (0, 1)),
    "GemmFastGelu": ("MatMul", 13, (0, 1)),
}
"""Operators with the shapes of an ONNX operator of some opset on some of their inputs; same attributes."""


def fused_shapes(node: ir.Node, inputs: Inputs) -> list[Shape | None] | None:
    """Return shapes of the outputs, None where the operator or a shape is not known; ``inputs``: concrete shapes."""
    name = node.op_type
    if node.domain != "com.microsoft":
        return [inputs[0], *[None] * (len(node.outputs) - 1)] if name in _NORMALIZATIONS.split() else None
    if name in _AS_ONNX:
        if attribute(node, "channels_last", 0):
            return None
        return _as_onnx(node, inputs)
    if name in _LIKE_FIRST.split():
        return [inputs[0], *[None] * (len(node.outputs) - 1)]
    if name in _BROADCAST:
        a, b = (inputs[k] for k in _BROADCAST[name])
        return None if a is None or b is None else [np.broadcast_shapes(a, b)]
    rule = _RULES.get(name)
    try:
        return None if rule is None else [rule(node, inputs), *[None] * (len(node.outputs) - 1)]
    except (TypeError, IndexError, ValueError):  # a shape that is not known, or does not fit
        return None


def node_shapes(
    node: ir.Node,
    inputs: Sequence[Shape | None],
    version: int,
    types: dict[str, ir.DataType],
    numbers: Sequence[Array | None],
) -> list[Shape | None]:
    """Return the shapes of a node's outputs: from the tables here, by ONNX's inference, or by running the node.

    Args:
        node: a node without subgraphs.
        inputs: concrete shapes.
        version: of the operator set.
        types: element types by name of value; types that are found are added.
        numbers: inputs that are known as numbers.
    """
    own = node.domain in ("", "com.microsoft")
    found = (fused_shapes(node, inputs) if own else None) or []
    first = node.inputs[0] if node.inputs else None
    if found and node.domain != "com.microsoft" and first is not None:  # normalizations, which keep the type
        kind = first.dtype or types.get(first.name or "")
        if kind is not None:
            types.setdefault(node.outputs[0].name or "", kind)
    found = [*found, *[None] * (len(node.outputs) - len(found))]
    if any(s is None and v.name for s, v in zip(found, node.outputs, strict=False)):
        inferred = infer_node(node, list(inputs), version, types, list(numbers))
        found = [b if a is None else a for a, b in zip(found, inferred, strict=False)]
    if all(s is None for s in found):
        kinds = [None if v is None else v.dtype or types.get(v.name or "") for v in node.inputs]
        found = probed_shapes(node, inputs, version, kinds, numbers) or found
    return found


def _as_onnx(node: ir.Node, inputs: Inputs) -> list[Shape | None] | None:
    op_type, version, places = _AS_ONNX[node.op_type]
    shapes = [inputs[k] for k in places]
    if any(s is None for s in shapes):
        return None
    own = set(_ATTRIBUTES[op_type])
    operands = [ir.Value(name=f"i{k}", type=ir.TensorType(ir.DataType.FLOAT)) for k in range(len(places))]
    attributes = [a for a in node.attributes.values() if a.name in own]
    made = ir.Node("", op_type, operands, attributes, outputs=[ir.Value(name="o")])
    return [*infer_node(made, shapes, version), *[None] * (len(node.outputs) - 1)]


_ATTRIBUTES = {
    "Conv": ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides"),
    "Gemm": ("transA", "transB"),
    "AveragePool": ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides"),
    "GlobalAveragePool": (),
    "MatMul": (),
}


def _fused_matmul(node: ir.Node, inputs: Inputs) -> Shape | None:
    a, b = _known(inputs, 0), _known(inputs, 1)
    if min(len(a), len(b)) < 2:
        return None
    if attribute(node, "transBatchA", 0):
        a = (*a[1:-1], a[0], a[-1])
    if attribute(node, "transBatchB", 0):
        b = (*b[1:-1], b[0], b[-1])
    rows = a[-1] if attribute(node, "transA", 0) else a[-2]
    columns = b[-2] if attribute(node, "transB", 0) else b[-1]
    return (*np.broadcast_shapes(a[:-2], b[:-2]), rows, columns)


def _packed(node: ir.Node, inputs: Inputs) -> Shape:
    return (*_known(inputs, 0)[:-1], int(attribute(node, "N")))


def _attention(node: ir.Node, inputs: Inputs) -> Shape:
    sizes = attribute(node, "qkv_hidden_sizes", ())
    batch, length, _ = _known(inputs, 0)
    return (batch, length, int(sizes[2]) if sizes else _known(inputs, 1)[-1] // 3)


def _multi_head(node: ir.Node, inputs: Inputs) -> Shape:
    query = _known(inputs, 0)
    if len(query) == 5:
        return (*query[:2], query[2] * query[4])
    value = inputs[2] if len(inputs) > 2 else None
    if value is None:
        return query
    return (*query[:2], value[-1] if len(value) == 3 else value[1] * value[3])


def _group_query(node: ir.Node, inputs: Inputs) -> Shape:
    batch, length, width = _known(inputs, 0)
    if len(inputs) > 1 and inputs[1] is not None:
        return (batch, length, width)
    heads, kv = int(attribute(node, "num_heads")), int(attribute(node, "kv_num_heads"))
    return (batch, length, width * heads // (heads + 2 * kv))


def _recurrent(node: ir.Node, inputs: Inputs) -> Shape:
    steps, batch, _ = _known(inputs, 0)
    return (steps, _known(inputs, 2)[0], batch, _known(inputs, 2)[1])


def _embedded(node: ir.Node, inputs: Inputs) -> Shape:
    return (*_known(inputs, 0), _known(inputs, 2)[-1])


def _known(inputs: Inputs, index: int) -> Shape:
    shape = inputs[index]
    if shape is None:
        raise ValueError("a shape is not known")
    return shape


_RULES: dict[str, Callable[[ir.Node, Inputs], Shape | None]] = {
    "FusedMatMul": _fused_matmul,
    "TransposeMatMul": _fused_matmul,
    "FusedMatMulActivation": _fused_matmul,
    "MatMulNBits": _packed,
    "MatMulBnb4": _packed,
    "Attention": _attention,
    "QAttention": _attention,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _group_query,
    "EmbedLayerNormalization": _embedded,
    "DynamicQuantizeLSTM": _recurrent,
    "CDist": lambda n, i: (_known(i, 0)[0], _known(i, 1)[0]),
    "Inverse": lambda n, i: _known(i, 0),
}
