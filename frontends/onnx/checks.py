"""What is wrong with an ONNX model, in one sentence that names the node, value or tensor.

All checks of structure are linear in the number of nodes. onnx_ir repairs or drops some defects silently (undefined
names, unnamed or sparse initializers, training info); the checks on the proto see them before that happens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.opsets import standard_name, standard_version
from cipm_ir.runtime.graphs import describe_node
from cipm_ir.runtime.inputs.data import capital

_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")

# --- the proto ------------------------------------------------------------------------------------


def check_proto(proto: onnx.ModelProto) -> None:
    """Refuse what onnx_ir would drop or misread.

    Raises:
        InputError: no graph, outputs, ir_version or opset imports; a name defined twice; a tensor whose data contradict
            its shape.
        UnsupportedError: training info, sparse tensors, map types.
    """
    if not proto.HasField("graph"):
        raise InputError("The model holds no graph; the file is truncated or not an ONNX model.")
    if not proto.graph.output:
        raise InputError("The graph has no outputs; the file is truncated or not an ONNX model.")
    if proto.ir_version < 1:
        raise InputError("The model has no ir_version; the file is truncated or not an ONNX model.")
    if proto.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(
            f"The model has IR version {proto.ir_version}, and the newest that onnx {onnx.__version__} knows is "
            f"{onnx.IR_VERSION}; upgrade onnx, or export the model for an older one."
        )
    if not proto.opset_import:
        raise InputError("The model has no opset imports, so the meaning of its operators is unknown.")
    for entry in proto.opset_import:
        _check_opset(entry)
    if proto.training_info:
        raise UnsupportedError("The model holds training_info, which would be lost; remove it first.")
    texts = (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
    _check_text((*texts, *(entry.domain for entry in proto.opset_import)), "the header of the model")
    _check_graph(proto.graph, _versions(proto.opset_import))
    for function in proto.functions:
        _check_unique(function.input, "input", f"function {function.name!r}")
        _check_nodes(function.node, set(function.input), _versions(function.opset_import))


def _versions(imports: Iterable[onnx.OperatorSetIdProto]) -> Mapping[str, int]:
    """Return the opset versions by domain; both names of ONNX's own domain are known."""
    found = {entry.domain: entry.version for entry in imports}
    own = standard_version(found)
    return {**found, "": own, "ai.onnx": own}


def _check_opset(entry: onnx.OperatorSetIdProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    if standard_name(entry.domain) or 1 <= entry.version <= newest:
        return
    if entry.version < 1:
        raise InputError(f"The model imports opset {entry.version} of ONNX, and the first is 1; the model is damaged.")
    raise UnsupportedError(
        f"The model imports opset {entry.version} of ONNX, and the newest that onnx {onnx.__version__} knows is "
        f"{newest}; upgrade onnx, or export the model for an older one."
    )


def _check_graph(graph: onnx.GraphProto, versions: Mapping[str, int]) -> None:
    where = f"graph {graph.name!r}"
    names = [tensor.name for tensor in graph.initializer]
    infos = (*graph.input, *graph.output, *graph.value_info)
    _check_text((graph.name, graph.doc_string, *names, *(info.name for info in infos)), where)
    inputs = [info.name for info in graph.input]
    _check_unique(names, "initializer", where)
    _check_unique(inputs, "input", where)
    for tensor in graph.initializer:
        check_tensor(tensor, f"Initializer {tensor.name!r}")
    for info in (*graph.input, *graph.output):
        if _has_map(info.type):
            raise UnsupportedError(
                f"Value {info.name!r} is a map, which the graph IR cannot hold; remove the ZipMap node."
            )
    _check_nodes(graph.node, {*names, *inputs}, versions)


def _check_nodes(nodes: Iterable[onnx.NodeProto], defined: set[str], versions: Mapping[str, int]) -> None:
    for node in nodes:
        texts = (node.name, node.op_type, node.domain, node.overload, node.doc_string, *node.input, *node.output)
        _check_text(texts, f"a {node.op_type} node")
        for name in node.output:
            if name and name in defined:
                raise InputError(f"Value {name!r} is defined twice, the second time by {describe_node(node)}.")
            defined.add(name)
        kinds = _attribute_kinds(node.domain, node.op_type, versions.get(node.domain, 0)) if node.attribute else None
        for attribute in node.attribute:
            _check_attribute(attribute, node, versions)
            if kinds is not None and kinds.get(attribute.name) != attribute.type:
                raise _wrong_kind(attribute, node, kinds, versions)
        if kinds is not None and node.op_type.startswith("Random"):
            _check_distribution(node)
        if kinds is not None and {"axis", "broadcast"} <= {attribute.name for attribute in node.attribute}:
            raise UnsupportedError(
                f"{capital(describe_node(node))} broadcasts along an axis, as ONNX did before opset 7; convert it "
                "with onnx.version_converter first."
            )


def _check_distribution(node: onnx.NodeProto) -> None:
    """Refuse what ends the process in onnxruntime: an empty range, a width that is not positive."""
    given = {attribute.name: attribute.f for attribute in node.attribute}
    if node.op_type.startswith("RandomUniform") and not given.get("low", 0.0) <= given.get("high", 1.0):
        raise InputError(f"{capital(describe_node(node))} draws from an empty range; its low is above its high.")
    if node.op_type.startswith("RandomNormal") and not given.get("scale", 1.0) > 0.0:
        raise InputError(f"{capital(describe_node(node))} has the scale {given['scale']:g}, which is not positive.")


@functools.cache
def _attribute_kinds(domain: str, op: str, version: int) -> Mapping[str, int] | None:
    """Return the types of the attributes that an operator of ONNX has in an opset; None for an operator of others."""
    domain = standard_name(domain)
    if version < 1 or not onnx.defs.has(op, version, domain):
        return None
    schema = onnx.defs.get_schema(op, version, domain)
    return {name: int(a.type.value) for name, a in schema.attributes.items()}  # type: ignore[attr-defined]


def _wrong_kind(
    attribute: onnx.AttributeProto, node: onnx.NodeProto, kinds: Mapping[str, int], versions: Mapping[str, int]
) -> InputError:
    label = f"Attribute {attribute.name!r} of {describe_node(node)}"
    if attribute.name not in kinds:
        known = ", ".join(map(repr, kinds)) or "none"
        return InputError(
            f"{label} is not one that {node.op_type} has in opset {versions[node.domain]} ({known}); the model is "
            "damaged or names the wrong opset."
        )
    found, needed = (onnx.AttributeProto.AttributeType.Name(k) for k in (attribute.type, kinds[attribute.name]))
    return InputError(f"{label} is of type {found}, and {needed} is needed; the model is damaged.")


def _check_attribute(attribute: onnx.AttributeProto, node: onnx.NodeProto, versions: Mapping[str, int]) -> None:
    _check_text((attribute.name, attribute.ref_attr_name, attribute.doc_string), describe_node(node))
    if attribute.type == onnx.AttributeProto.UNDEFINED:
        raise InputError(f"Attribute {attribute.name!r} of {describe_node(node)} has no type.")
    if attribute.HasField("g"):
        _check_graph(attribute.g, versions)
    elif attribute.HasField("t"):
        check_tensor(attribute.t, f"Attribute {attribute.name!r} of {describe_node(node)}")
    elif attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
        raise UnsupportedError(
            f"Attribute {attribute.name!r} of {describe_node(node)} is a sparse tensor; make it dense."
        )
    else:
        for graph in attribute.graphs:
            _check_graph(graph, versions)
        for tensor in attribute.tensors:
            check_tensor(tensor, f"Attribute {attribute.name!r} of {describe_node(node)}")


def _check_text(texts: Iterable[str | bytes], where: str) -> None:
    # Protobuf hands a string that is not UTF-8 out as bytes, and then refuses to write it.
    for text in texts:
        if isinstance(text, bytes):
            raise InputError(f"The name {text!r} in {where} is not valid text (UTF-8); the model is damaged.")


def _check_unique(names: Sequence[str], kind: str, where: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise InputError(f"The {kind} {twice!r} of {where} is defined twice.")


def _has_map(kind: onnx.TypeProto) -> bool:
    while kind.HasField("sequence_type") or kind.HasField("optional_type"):
        kind = (kind.sequence_type if kind.HasField("sequence_type") else kind.optional_type).elem_type
    return bool(kind.HasField("map_type"))


def check_tensor(tensor: onnx.TensorProto, label: str) -> None:
    """Refuse a tensor of unknown type or whose stored size contradicts its dims (external data: see DataFolder).

    Raises:
        InputError: with `label` as its subject.
    """
    dims = list(tensor.dims)
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise InputError(f"{label} has the unknown data type {tensor.data_type}.") from None
    if dtype == ir.DataType.UNDEFINED:
        raise InputError(f"{label} has no data type.")
    if any(dim < 0 for dim in dims):
        raise InputError(f"{label} has a negative dimension: {dims}.")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external_entry(tensor, label)
        return
    size = int(np.prod(dims, dtype=np.int64))
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        found, needed, unit = len(tensor.raw_data), -(-size * dtype.bitwidth // 8), "bytes"
    else:
        found, needed, unit = sum(len(getattr(tensor, field)) for field in _FIELDS), _entries(dtype, size), "entries"
    if found != needed:
        raise InputError(f"{label} has shape {dims} of {dtype.name}, which takes {needed} {unit}, but holds {found}.")


def _entries(dtype: ir.DataType, size: int) -> int:
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return 2 * size
    # The two- and four-bit types are packed, one byte to an int32; the six-bit ones are not.
    packed = dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4)
    return -(-size * dtype.bitwidth // 8) if packed else size


def _check_external_entry(tensor: onnx.TensorProto, label: str) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries.get("location"):
        raise InputError(f"{label} is marked as external data, but names no file.")
    for key in ("offset", "length"):
        if not entries.get(key, "0").isdigit():
            raise InputError(f"{label} has the external data {key} {entries[key]!r}, which is not a whole number.")


# --- order ----------------------------------------------------------------------------------------


def sort_nodes(model: ir.Model) -> None:
    """Put the nodes of each graph in an order in which every value is made before it is read, in place.

    Graphs that are in such an order already stay as they are.

    Raises:
        InputError: a value that nothing defines, or a cycle, naming the node and the value.
    """
    if is_sorted(model):
        return
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        with contextlib.suppress(ValueError):  # a cycle, which the check below names
            graph.sort()
        if (found := _out_of_order(graph, set())) is not None:
            raise _order_error(*found)


def is_sorted(model: ir.Model) -> bool:
    """Return whether every value is made before it is read.

    Raises:
        InputError: a graph without outputs, an output that nothing makes, no opset imports.
    """
    if not model.graph.outputs:
        raise InputError("The graph has no outputs.")
    if not model.opset_imports:
        raise InputError("The model has no opset imports, so the meaning of its operators is unknown.")
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    return all([_out_of_order(graph, set()) is None for graph in graphs])


def _out_of_order(graph: ir.Graph, defined: set[int]) -> tuple[ir.Node, ir.Value] | None:
    """Return the first node that reads a value before it is made, with that value; subgraphs are searched too.

    `defined` holds ids of values: names may be shadowed in subgraphs.
    """
    found: tuple[ir.Node, ir.Value] | None = None
    here = [id(value) for value in (*graph.inputs, *graph.initializers.values())]
    defined.update(here)
    for node in graph:
        late = next((value for value in node.inputs if value is not None and id(value) not in defined), None)
        if late is not None:
            found = found or (node, late)
        for subgraph in subgraphs(node):
            found = _out_of_order(subgraph, defined) or found
        outputs = [id(value) for value in node.outputs]
        defined.update(outputs)
        here += outputs
    for value in graph.outputs:
        if id(value) not in defined:
            raise InputError(f"Output {value.name!r} of graph {graph.name!r} is made by no node of that graph.")
    defined.difference_update(here)
    return found


def _order_error(node: ir.Node, value: ir.Value) -> InputError:
    producer = value.producer()
    reader = describe_node(node)
    if producer is None:
        return InputError(f"{capital(reader)} reads {value.name!r}, which no node, input or initializer defines.")
    if producer is node:
        return InputError(f"The graph has a cycle: {reader} reads its own output {value.name!r}.")
    if any(above is node for above in _ancestors(producer)):
        return InputError(
            f"The graph has a cycle: {reader} reads {value.name!r}, whose producer, {describe_node(producer)}, depends "
            "on that node."
        )
    return InputError(
        f"{capital(reader)} reads {value.name!r}, which {describe_node(producer)} makes in another graph."
    )


def _ancestors(node: ir.Node) -> Iterator[ir.Node]:
    seen: set[int] = set()
    stack = [node]
    while stack:
        for above in stack.pop().predecessors():
            if id(above) not in seen:
                seen.add(id(above))
                stack.append(above)
                yield above
