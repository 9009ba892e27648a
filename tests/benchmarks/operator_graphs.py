"""Random graphs over every operator of an opset, drawn from ONNX's own schemas: few make sense, all are well formed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Generator = np.random.Generator
_SHAPES: tuple[tuple[int, ...], ...] = ((2, 6), (2, 3, 8, 8), (2, 5, 6), (6,), (2, 6, 6))
_WORDS = ("linear", "nearest", "constant", "reflect", "SAME_UPPER", "VALID", "none", "ij,jk->ik")
_LEFT_OUT = {"If", "Loop", "Scan", "SequenceMap", "Constant"}


def operator_graph(rng: Generator, opset: int) -> onnx.ModelProto:
    """Draw a graph: a product with a weight, random operators on what there is, a product at the end.

    Three quarters of the nodes pass ONNX's inference on their own; the others are taken as they come.
    """
    schemas = [
        onnx.defs.get_schema(name, opset, "")
        for name in sorted({s.name for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""} - _LEFT_OUT)
        if onnx.defs.has(name, opset, "")
    ]
    shape = _SHAPES[int(rng.integers(len(_SHAPES)))]
    draw = _Draw(rng, opset)
    draw.types["x"] = helper.make_tensor_type_proto(TensorProto.FLOAT, shape)
    if len(shape) > 1:
        draw.add("MatMul", ["x", draw.weight((shape[-1], 6))], {})
    else:
        draw.add("Relu", ["x"], {})
    wanted = int(rng.integers(2, 6))
    for _ in range(120):
        if len(draw.nodes) > wanted:
            break
        draw.random_node(schemas[int(rng.integers(len(schemas)))], loose=rng.random() < 0.02)
    last = draw.nodes[-1].output[0]
    kind = draw.types.get(last)
    outputs = [onnx.ValueInfoProto(name=last, type=kind) if kind is not None else onnx.ValueInfoProto(name=last)]
    first: int | str = "N" if rng.random() < 0.5 else shape[0]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [first, *shape[1:]])]
    graph = helper.make_graph(draw.nodes, "operators", inputs, outputs, draw.tensors)
    ir_version = min(onnx.IR_VERSION, max(3, 3 + (opset - 7) // 2))
    if ir_version < 4:
        graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in draw.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


class _Draw:
    """A graph that grows; ``types`` of its values as far as they are known."""

    def __init__(self, rng: Generator, opset: int) -> None:
        self.rng, self.opset = rng, opset
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.types: dict[str, onnx.TypeProto] = {}

    def weight(self, shape: tuple[int, ...], kind: str = "f4") -> str:
        name = f"w{len(self.tensors)}"
        array = self.rng.standard_normal(shape) if kind.startswith("f") else self.rng.integers(0, 3, shape)
        self.tensors.append(numpy_helper.from_array(np.asarray(array, kind), name))
        self.types[name] = helper.make_tensor_type_proto(self.tensors[-1].data_type, shape)
        return name

    def random_node(self, schema: Any, loose: bool) -> None:
        """A node of an operator on recent values, new weights and small integers; dropped if it makes no sense."""
        least, most = schema.min_input, min(schema.max_input, schema.min_input + 2, 6)
        count = int(self.rng.integers(least, most + 1)) if most > least else least
        before = len(self.tensors)
        given = [self._argument(schema, k) for k in range(count)]
        chosen = [a for a in schema.attributes.values() if a.required or self.rng.random() < 0.3]
        attributes = {a.name: value for a in chosen if (value := self._value(a)) is not None}
        if not self.add(schema.name, given, attributes, schema, loose):
            for tensor in self.tensors[before:]:
                del self.types[tensor.name]
            del self.tensors[before:]

    def _argument(self, schema: Any, k: int) -> str:
        formal = schema.inputs[min(k, len(schema.inputs) - 1)]
        floats = any("float" in str(t) for t in formal.types)
        made = [name for node in self.nodes for name in node.output if name in self.types]
        if k == 0 or (floats and self.rng.random() < 0.4):
            return str(self.rng.choice(made[-4:]))
        if floats:
            shapes = [(6,), (6, 6), (4, 3, 3, 3), (1,), (), (3,), (2, 6)]
            return self.weight(shapes[int(self.rng.integers(len(shapes)))])
        kind = "?" if "tensor(bool)" in formal.types else "u1" if "tensor(int64)" not in formal.types else "i8"
        return self.weight(((1,), (2,), (), (4,))[int(self.rng.integers(4))], kind)

    def _value(self, attribute: Any) -> Any:
        kind, kinds = attribute.type, onnx.defs.OpSchema.AttrType
        if kind == kinds.INT:
            return int(self.rng.choice([0, 1, -1, 2, 3]))
        if kind == kinds.INTS:
            return [int(k) for k in self.rng.integers(0, 3, size=int(self.rng.integers(1, 5)))]
        if kind == kinds.FLOAT:
            return float(self.rng.choice([0.0, 0.5, 1.0, -1.0, 1e-5]))
        if kind == kinds.STRING:
            return str(self.rng.choice(_WORDS))
        return None

    def add(
        self, op: str, inputs: list[str], attributes: dict[str, Any], schema: Any = None, loose: bool = True
    ) -> bool:
        """Append a node; False where ONNX's inference refuses it and it is not to be taken as it comes."""
        number = len(self.nodes)
        outputs = [f"v{number}"] + [f"v{number}.{k}" for k in range(1, max(1, schema.min_output if schema else 1))]
        try:
            node = helper.make_node(op, inputs, outputs, **attributes)
            schema = schema or onnx.defs.get_schema(op, self.opset, "")
            data = {t.name: t for t in self.tensors if t.name in inputs}
            types = {name: self.types[name] for name in inputs}
            found = onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9
            )
        except Exception:
            if not loose:
                return False
            node = helper.make_node(op, inputs, outputs, **attributes)
            found = {}
        self.nodes.append(node)
        for name, kind in found.items():
            if kind.HasField("tensor_type") and kind.tensor_type.HasField("shape"):
                self.types[name] = kind
        return bool(found) or loose
