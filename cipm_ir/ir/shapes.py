"""Concrete shapes for every value of a graph.

Labels live on index positions, so the analysis needs numbers where a model has symbols. `cipm_ir.ir.stand_ins` chooses
them, two for each dynamic size; this module infers what follows from a choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.parameters import is_parameter, overridable_inputs, parameters

Shape = tuple[int, ...]

_UNKNOWN = (1009, 1013)
_STRIP_BYTES = 4096
SUGGESTED = "suggested sizes"
"""Key in the `meta` of an input for the sizes that the user suggests for it."""


@dataclass(frozen=True)
class Shapes:
    """Two concrete shapes per value name; equal objects where the model is static.

    Attributes:
        first, second: shapes at the two choices of the dynamic sizes.
        symbols: the dynamic sizes of the first choice, by name.
        types: element types, as far as they could be inferred.
        others: shapes at further choices. What differs there is no constant, either.
        only: dynamic sizes that are the same in both choices, since shapes contradict each other at all others tried.
    """

    first: dict[str, Shape]
    second: dict[str, Shape]
    symbols: dict[str, int] = field(default_factory=dict)
    types: dict[str, ir.DataType] = field(default_factory=dict)
    others: tuple[dict[str, Shape], ...] = ()
    only: dict[str, int] = field(default_factory=dict)

    @property
    def static(self) -> bool:
        """Whether no dimension is dynamic."""
        return self.first is self.second


def _declared(value: ir.Value) -> Shape | None:
    dims = None if value.shape is None else value.shape.dims
    return None if dims is None or any(type(d) is not int for d in dims) else dims  # type: ignore[return-value]


def forget_impossible_sizes(graph: ir.Graph) -> None:
    """Make sizes of -1, 0 or "?" unknown, as files of some exporters mean them; in subgraphs too.

    A negative size is none. A size of 0 is one where a tensor is known to be empty (an initializer, a Constant); of an
    input it says that the exporter had nothing to write.
    """
    inner = {g for node in graph for g in subgraphs(node)}
    for value in [*graph.inputs, *(v for node in graph for v in node.outputs)]:
        if value.shape is None or value.const_value is not None:
            continue
        made = value.producer()
        least = 0 if made is not None and (made.op_type == "Constant" or not made.inputs) else 1
        impossible = [d < least if isinstance(d, int) else d.value == "?" for d in value.shape]
        if any(impossible):
            value.shape = ir.Shape([None if bad else d for bad, d in zip(impossible, value.shape, strict=True)])
    for one in inner:
        forget_impossible_sizes(one)


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    values = list(graph.inputs) + list(graph.initializers.values())
    for node in graph:
        values.extend(v for v in node.outputs if v.name)
    return values


def annotated(model: ir.Model, replaceable: set[ir.Value]) -> tuple[dict[str, Shape], dict[str, ir.DataType], bool]:
    """Return shapes and types of the main graph's values that the model states.

    And whether all shapes are among them.
    """
    known: dict[str, Shape] = {}
    types: dict[str, ir.DataType] = {}
    complete = True
    for value in _all_values(model.graph):
        shape = _declared(value)
        if value.dtype is not None:
            types[value.name or ""] = value.dtype
        if shape is None and is_parameter(value) and value.const_value is not None:
            shape = tuple(value.const_value.shape.numpy())
        if shape is None or value in replaceable:
            complete = False
        else:
            known[value.name or ""] = shape
    return known, types, complete


def suggestion(value: ir.Value) -> tuple[int | None, ...]:
    """Return sizes that the user suggested for an input (`cipm_ir.ir.input_shapes`), None for an axis without.

    Or nothing.
    """
    found: tuple[int | None, ...] = value.meta.get(SUGGESTED) or ()
    return found


def recorded_shape(value: ir.Value, sizes: Mapping[str, int]) -> Shape | None:
    """Return the shape that a file records of a value, its symbols replaced by sizes; None where one has no size."""
    if value.shape is None:
        return None
    found = [d if isinstance(d, int) else sizes.get(d.value or "") for d in value.shape]
    return None if None in found else tuple(n for n in found if n is not None)


def dynamic_sizes(graph: ir.Graph) -> dict[str, list[tuple[ir.Value, int]]]:
    """Return the dynamic dimensions of the inputs by name, with where each stands; ``x[1]`` where it has no name."""
    found: dict[str, list[tuple[ir.Value, int]]] = {}
    for value in graph.inputs:
        if value.const_value is not None or value.shape is None:
            continue
        for axis, d in enumerate(value.shape):
            if not isinstance(d, int):
                found.setdefault(d.value or own_name(value.name or "", axis), []).append((value, axis))
    return found


def own_name(name: str, axis: int) -> str:
    """Return the name of a dimension that has none in the file."""
    return f"{name}[{axis}]"


def replaceable_values(model: ir.Model) -> set[ir.Value]:
    """Inner values that depend on an overridable initializer: recorded shapes of theirs hold for its default.

    They are inferred again, from its shape alone.
    """
    found: set[ir.Value] = set(overridable_inputs(model))
    for node in model.graph if found else ():
        nested = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if nested or any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found - set(model.graph.inputs)


def stripped(model: ir.Model, replaceable: set[ir.Value], *, recorded: bool) -> onnx.ModelProto:
    """Return a proto of the main graph in which large weights are inputs, so that inference never copies them.

    Recorded shapes of ``replaceable`` values are left out, and the defaults of inputs; without ``recorded`` those of
    all inner values.
    """
    proto = onnx.ModelProto(ir_version=max(model.ir_version, 8))
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    graph = proto.graph
    graph.name = "shapes"
    listed = {v.name for v in model.graph.inputs}
    for value in model.graph.inputs:
        _value_into(graph.input.add(), value)
    for name, value in parameters(model.graph).items():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.nbytes <= _STRIP_BYTES and tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT):
            array = np.asarray(tensor.numpy())
            graph.initializer.add(name=name, dims=array.shape, data_type=int(tensor.dtype), raw_data=array.tobytes())
        elif name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(name, int(tensor.dtype), tensor.shape.numpy()))
    for node in model.graph:
        node_into(graph.node.add(), node)
        for value in node.outputs if recorded else ():
            if value.shape is not None and value.name and not value.is_graph_output() and value not in replaceable:
                _value_into(graph.value_info.add(), value)
    for value in model.graph.outputs:
        _value_into(graph.output.add(), value)
    return proto


def _value_into(proto: onnx.ValueInfoProto, value: ir.Value) -> None:
    """Name, type and shape; values that are not tensors the general way."""
    if not isinstance(value.type, ir.TensorType):
        ir.serde.serialize_value_into(proto, value)
        return
    proto.name = value.name or ""
    tensor = proto.type.tensor_type
    tensor.elem_type = int(value.type.dtype)
    if value.shape is not None:
        tensor.shape.SetInParent()
        for d in value.shape:
            dim = tensor.shape.dim.add()
            if isinstance(d, int):
                dim.dim_value = d
            elif d.value:
                dim.dim_param = d.value


def node_into(proto: onnx.NodeProto, node: ir.Node) -> None:
    """Fill in a node, several times faster than `ir.to_proto`, which checks protocols."""
    proto.op_type, proto.domain, proto.name = node.op_type, node.domain, node.name or ""
    proto.input.extend([v.name or "" if v is not None else "" for v in node.inputs])
    proto.output.extend([v.name or "" for v in node.outputs])
    for attr in node.attributes.values():
        _attribute_into(proto.attribute.add(), attr)


def _attribute_into(proto: onnx.AttributeProto, attr: ir.Attr) -> None:
    """The common kinds by hand: several times faster than the general way, which checks protocols."""
    proto.name = attr.name
    kind = attr.type
    if kind == ir.AttributeType.INT:
        proto.type, proto.i = onnx.AttributeProto.INT, attr.value
    elif kind == ir.AttributeType.INTS:
        proto.type = onnx.AttributeProto.INTS
        proto.ints.extend(attr.value)
    elif kind == ir.AttributeType.FLOAT:
        proto.type, proto.f = onnx.AttributeProto.FLOAT, attr.value
    else:
        ir.serde.serialize_attribute_into(proto, attr)


def infer_sized(
    proto: onnx.ModelProto, size: Callable[[str, str, int], int], types: dict[str, ir.DataType]
) -> dict[str, Shape]:
    """Return shapes that ONNX infers where the inputs have given sizes; element types are added to ``types``.

    Args:
        proto: the model, see `stripped`.
        size: of a dynamic dimension: its symbol ("" where it has none), the name of the input, the axis.
        types: element types by value.

    Raises: `InputError` when ONNX's shape inference finds the model inconsistent.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph, symbols = copy.graph, dict[str, int]()
    for info in graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            if dim.WhichOneof("value") != "dim_value":
                symbol = dim.dim_param
                dim.dim_value = size(symbol, info.name, axis)
                if symbol:
                    symbols[symbol] = dim.dim_value
    for info in list(graph.output):
        info.type.tensor_type.ClearField("shape")
    kept = [info for info in graph.value_info if _substitute(info, symbols)]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        raise InputError(f"The model is inconsistent; ONNX shape inference says: {str(error).strip()}") from error
    shapes: dict[str, Shape] = {}
    for info in [*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output]:
        tensor = info.type.tensor_type
        if tensor.elem_type:
            types.setdefault(info.name, ir.DataType(tensor.elem_type))
        if tensor.HasField("shape") and all(d.WhichOneof("value") == "dim_value" for d in tensor.shape.dim):
            shapes[info.name] = tuple(int(d.dim_value) for d in tensor.shape.dim)
    for initializer in inferred.graph.initializer:
        shapes[initializer.name] = tuple(int(d) for d in initializer.dims)
    return shapes


def _substitute(info: onnx.ValueInfoProto, symbols: dict[str, int]) -> bool:
    """Put the numbers in; False where a symbol is not one of the inputs'."""
    tensor = info.type.tensor_type
    if not tensor.HasField("shape"):
        return False
    for dim in tensor.shape.dim:
        if dim.WhichOneof("value") == "dim_value":
            continue
        if dim.dim_param not in symbols:
            return False
        dim.dim_value = symbols[dim.dim_param]
    return True


def infer_node(
    node: ir.Node,
    inputs: list[Shape | None],
    version: int,
    element_types: dict[str, ir.DataType] | None = None,
    numbers: list[Array | None] | None = None,
) -> list[Shape | None]:
    """Output shapes of one node from those of its inputs, where the whole-graph inference gave up.

    ``numbers``: inputs that are known as numbers (sizes, axes).
    """
    none: list[Shape | None] = [None] * len(node.outputs)
    if any(v is not None and s is None for v, s in zip(node.inputs, inputs, strict=True)):
        return none
    try:
        found = _inferred_outputs(node, inputs, version, element_types or {}, numbers or [None] * len(inputs))
    except _NOT_INFERRED:
        return none
    out: list[Shape | None] = []
    for value in node.outputs:
        proto = found.get(value.name or "")
        if element_types is not None and proto is not None and proto.tensor_type.elem_type:
            element_types.setdefault(value.name or "", ir.DataType(proto.tensor_type.elem_type))
        dims = proto.tensor_type.shape.dim if proto is not None and proto.tensor_type.HasField("shape") else None
        known = dims is not None and all(d.WhichOneof("value") == "dim_value" for d in dims)
        out.append(tuple(int(d.dim_value) for d in dims) if known and dims is not None else None)
    return out


def contradicts(
    node: ir.Node,
    inputs: list[Shape | None],
    version: int,
    element_types: dict[str, ir.DataType],
    numbers: list[Array | None],
) -> bool:
    """Return whether ONNX says of a node, all of whose input shapes are known, that they do not fit each other."""
    try:
        _inferred_outputs(node, inputs, version, element_types, numbers)
    except onnx.shape_inference.InferenceError:
        return True
    except _NOT_INFERRED:
        return False
    return False


_NOT_INFERRED = (
    onnx.defs.SchemaError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    RuntimeError,
)


def _inferred_outputs(
    node: ir.Node,
    inputs: list[Shape | None],
    version: int,
    element_types: dict[str, ir.DataType],
    numbers: list[Array | None],
) -> dict[str, onnx.TypeProto]:
    types = {}
    data = {}
    dtypes = [None if v is None else v.dtype or element_types.get(v.name or "") for v in node.inputs]
    guess = next((t for t in dtypes if t is not None and t.is_floating_point()), ir.DataType.FLOAT)
    for value, shape, known_dtype, number in zip(node.inputs, inputs, dtypes, numbers, strict=True):
        if value is not None:
            dtype = guess if known_dtype is None else known_dtype
            if number is not None and number.size <= 64:
                dtype = ir.DataType.from_numpy(number.dtype)
                data[value.name or ""] = onnx.numpy_helper.from_array(np.asarray(number))
            types[value.name or ""] = onnx.helper.make_tensor_type_proto(int(dtype), shape)
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    proto = onnx.NodeProto()
    node_into(proto, node)
    found: dict[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
        schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid(node.domain, version)]
    )
    return found


def implied_shape(node: ir.Node, weight: Shape, which: int) -> Shape | None:
    """Return the shape of a first operand that nothing tells, from a second one: rank and contracted size.

    The rest is dynamic.
    """
    unknown = _UNKNOWN[which]
    if node.op_type == "Gemm" and not node.domain:
        transposed = [(name in node.attributes and node.attributes[name].value) for name in ("transA", "transB")]
        size = weight[1 if transposed[1] else 0]
        return (size, unknown) if transposed[0] else (unknown, size)
    if node.op_type == "Conv" and not node.domain:
        group = node.attributes["group"].value if "group" in node.attributes else 1
        return (unknown, weight[1] * group, *[unknown] * (len(weight) - 2))
    return None
