"""Ways to damage an ONNX file: names, types, shapes, attributes, edges, versions, raw bytes and external data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Generator: TypeAlias = np.random.Generator
_BIG, _HUGE = 1 << 30, (1 << 62) + 5


Damage: TypeAlias = Callable[[onnx.ModelProto, Generator], None]


def _some(rng: Generator, field: Any) -> Any:
    """Any of them; an IndexError where there is none."""
    if not len(field):
        raise IndexError
    return field[int(rng.integers(len(field)))]


def _dims(rng: Generator, model: onnx.ModelProto) -> Any:
    infos = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    shapes = [info.type.tensor_type.shape for info in infos if info.type.tensor_type.shape.dim]
    return _some(rng, _some(rng, shapes).dim)


def _rename(model: onnx.ModelProto, rng: Generator) -> None:
    node = _some(rng, model.graph.node)
    field = node.input if len(node.input) and rng.random() < 0.5 else node.output
    field[int(rng.integers(len(field)))] = str(rng.choice(["ghost", "", "x", field[0]]))


def _dtype(model: onnx.ModelProto, rng: Generator) -> None:
    _some(rng, model.graph.initializer).data_type = int(rng.choice([0, 2, 6, 7, 10, 11, 16, 17, 22, 77]))


def _other_dtype(model: onnx.ModelProto, rng: Generator) -> None:
    tensor = _some(rng, model.graph.initializer)
    kind = rng.choice(np.array(["f2", "f8", "i8", "u1", "?"]))
    array = np.nan_to_num(numpy_helper.to_array(tensor).astype(np.float64))
    tensor.CopyFrom(numpy_helper.from_array(array.astype(kind), tensor.name))


def _input_dtype(model: onnx.ModelProto, rng: Generator) -> None:
    info = _some(rng, [*model.graph.input, *model.graph.output])
    info.type.tensor_type.elem_type = int(rng.choice([0, 2, 7, 8, 9, 10, 11, 14, 16, 99]))


def _tensor_shape(model: onnx.ModelProto, rng: Generator) -> None:
    tensor = _some(rng, model.graph.initializer)
    dims = list(tensor.dims)
    choices: list[list[int]] = [dims[::-1], [*dims, 1], dims[1:], [1, *dims], [int(np.prod(dims, dtype=np.int64))]]
    choices += [[-1, *dims[1:]], [_BIG, *dims[1:]], [_HUGE], [0, *dims[1:]], [k + 1 for k in dims]]
    del tensor.dims[:]
    tensor.dims.extend(choices[int(rng.integers(len(choices)))])


def _other_shape(model: onnx.ModelProto, rng: Generator) -> None:
    """Another shape with the entries for it, so that only the graph contradicts it."""
    tensor = _some(rng, model.graph.initializer)
    shape = [max(0, int(d) + int(rng.integers(-1, 2))) for d in tensor.dims] + [2] * int(rng.random() < 0.2)
    dtype = numpy_helper.to_array(tensor).dtype
    if dtype.kind in "fiub":
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, dtype), tensor.name))


def _cycle(model: onnx.ModelProto, rng: Generator) -> None:
    first, last = sorted(rng.integers(len(model.graph.node), size=2))
    node = model.graph.node[int(first)]
    if len(node.input):
        node.input[int(rng.integers(len(node.input)))] = model.graph.node[int(last)].output[0]


def _shuffle(model: onnx.ModelProto, rng: Generator) -> None:
    nodes = [model.graph.node[int(k)] for k in rng.permutation(len(model.graph.node))]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _attribute(model: onnx.ModelProto, rng: Generator) -> None:
    with_any = [node for node in model.graph.node if node.attribute] or list(model.graph.node)
    node = _some(rng, with_any)
    values: list[Any] = [-7, 0, _BIG, 1e30, float("nan"), [0, 0], [-1, _BIG], [1.5], "nonsense", b"\xff\xfe", [3] * 9]
    value = values[int(rng.integers(len(values)))]
    name = _some(rng, node.attribute).name if node.attribute and rng.random() < 0.8 else "axis"
    kept = [a for a in node.attribute if a.name != name]
    made = helper.make_attribute(name, value)
    del node.attribute[:]
    node.attribute.extend([*kept, made])


def _no_attribute(model: onnx.ModelProto, rng: Generator) -> None:
    with_any = [node for node in model.graph.node if node.attribute]
    if with_any:
        del _some(rng, with_any).attribute[:]


def _attribute_kind(model: onnx.ModelProto, rng: Generator) -> None:
    with_any = [node for node in model.graph.node if node.attribute]
    if with_any:
        _some(rng, _some(rng, with_any).attribute).type = int(rng.integers(0, 15))


def _field(model: onnx.ModelProto, rng: Generator) -> None:
    """Clear a field of something, whatever it is."""
    graph = model.graph
    places = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info]
    places += [attribute for node in graph.node for attribute in node.attribute]
    place = _some(rng, places)
    fields = [field for field, _ in place.ListFields()]
    if fields:
        place.ClearField(_some(rng, fields).name)


def _remove_inputs(model: onnx.ModelProto, rng: Generator) -> None:
    node = _some(rng, model.graph.node)
    if len(node.input):
        del node.input[int(rng.integers(len(node.input))) :]


def _more_inputs(model: onnx.ModelProto, rng: Generator) -> None:
    node, other = _some(rng, model.graph.node), _some(rng, model.graph.node)
    node.input.extend([*other.input, ""][: int(rng.integers(1, 3))])


def _other_operator(model: onnx.ModelProto, rng: Generator) -> None:
    names = [
        "Conv",
        "MatMul",
        "Gemm",
        "Softmax",
        "Reshape",
        "If",
        "Loop",
        "LSTM",
        "Split",
        "Gather",
        "Constant",
        "Nope",
    ]
    _some(rng, model.graph.node).op_type = str(rng.choice([*names, *(node.op_type for node in model.graph.node)]))


def _opset(model: onnx.ModelProto, rng: Generator) -> None:
    version = int(rng.choice([-3, 0, 1, 5, 6, 7, 8, 9, 11, 12, 13, 16, 18, 21, 25, 28, 29, 1000]))
    _some(rng, model.opset_import).version = version


def _domain(model: onnx.ModelProto, rng: Generator) -> None:
    _some(rng, model.graph.node).domain = str(rng.choice(["com.nobody", "com.microsoft", "ai.onnx", "ai.onnx.ml", "ß"]))


def _value_info(model: onnx.ModelProto, rng: Generator) -> None:
    """A wrong note on the shape of an inner value."""
    node = _some(rng, model.graph.node)
    shape = [int(k) for k in rng.integers(-1, 7, size=int(rng.integers(0, 5)))]
    kind = TensorProto.FLOAT if rng.random() < 0.8 else TensorProto.INT64
    model.graph.value_info.append(helper.make_tensor_value_info(_some(rng, node.output), kind, shape))


def _dimension(model: onnx.ModelProto, rng: Generator) -> None:
    dim = _dims(rng, model)
    if rng.random() < 0.3:
        dim.dim_param = str(rng.choice(["", "N", "a+b", "-", "ü", "N*0"]))
    else:
        dim.dim_value = int(rng.choice([-1, 0, 1, 2, 3, 1000, _BIG, -_HUGE]))


def _rank(model: onnx.ModelProto, rng: Generator) -> None:
    info = _some(rng, [*model.graph.input, *model.graph.output])
    info.type.tensor_type.shape.dim.add(dim_value=int(rng.integers(0, 4)))


def _drop_initializer(model: onnx.ModelProto, rng: Generator) -> None:
    del model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]


def _drop_node(model: onnx.ModelProto, rng: Generator) -> None:
    del model.graph.node[int(rng.integers(len(model.graph.node)))]


def _twice(model: onnx.ModelProto, rng: Generator) -> None:
    graph = model.graph
    field = _some(rng, [f for f in (graph.node, graph.initializer, graph.input, graph.output) if len(f)])
    field.append(_some(rng, field))


def _as_constant(model: onnx.ModelProto, rng: Generator) -> None:
    """All weights in Constant nodes, somewhere among the nodes."""
    for tensor in list(model.graph.initializer):
        node = helper.make_node("Constant", [], [tensor.name], value=tensor)
        model.graph.node.insert(int(rng.integers(len(model.graph.node) + 1)), node)
    del model.graph.initializer[:]


def _special_values(model: onnx.ModelProto, rng: Generator) -> None:
    tensor = _some(rng, model.graph.initializer)
    array = np.array(numpy_helper.to_array(tensor))
    if array.size and array.dtype.kind == "f":
        array.reshape(-1)[int(rng.integers(array.size))] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 1e-45])
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _versions(model: onnx.ModelProto, rng: Generator) -> None:
    model.ir_version = int(rng.choice([-1, 0, 1, 3, 4, 8, 13, 14, 15, 10**6]))


def _output(model: onnx.ModelProto, rng: Generator) -> None:
    names = ["ghost", *(info.name for info in model.graph.input)]
    names += [name for node in model.graph.node for name in node.output]
    names += [tensor.name for tensor in model.graph.initializer]
    model.graph.output.append(onnx.ValueInfoProto(name=str(rng.choice(names))))


def _nested(model: onnx.ModelProto, rng: Generator) -> None:
    """A node becomes an If whose branches hold it."""
    k = int(rng.integers(len(model.graph.node)))
    node = onnx.NodeProto.FromString(model.graph.node[k].SerializeToString())
    branches = []
    for name in ("then", "else"):
        inner = onnx.NodeProto.FromString(node.SerializeToString())
        inner.output[:] = [f"{name}.{out}" if out else "" for out in node.output]
        outputs = [onnx.ValueInfoProto(name=out) for out in inner.output if out]
        for info in outputs:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
        branches.append(helper.make_graph([inner], name, [], outputs))
    model.graph.initializer.append(numpy_helper.from_array(np.array(bool(rng.random() < 0.5)), "flag"))
    made = helper.make_node("If", ["flag"], list(node.output), then_branch=branches[0], else_branch=branches[1])
    model.graph.node[k].CopyFrom(made)


DAMAGES: dict[str, Damage] = {
    function.__name__.removeprefix("_").replace("_", " "): function
    for function in (
        _rename, _dtype, _other_dtype, _input_dtype, _tensor_shape, _other_shape, _cycle, _shuffle, _attribute,
        _no_attribute, _attribute_kind, _field, _remove_inputs, _more_inputs, _other_operator, _opset, _domain,
        _value_info, _dimension, _rank, _drop_initializer, _drop_node, _twice, _as_constant, _special_values, _versions,
        _output, _nested,
    )
}  # fmt: skip


def damaged_bytes(content: bytes, rng: Generator) -> bytes:
    """Flipped, cut out or repeated bytes, or an end that is missing."""
    data = bytearray(content)
    choice = rng.integers(4)
    start, stop = sorted(int(k) for k in rng.integers(len(data), size=2))
    if choice == 0:
        del data[start:]
    elif choice == 1:
        for _ in range(int(rng.integers(1, 6))):
            # Half of them among the last bytes, where the graph's inputs, outputs and opsets are.
            low = 0 if rng.random() < 0.5 else max(0, len(data) - 400)
            data[int(rng.integers(low, len(data)))] ^= 1 << int(rng.integers(8))
    elif choice == 2:
        del data[start : start + int(rng.integers(1, 64))]
    else:
        data[stop:stop] = data[start : start + 32]
    return bytes(data)


def damaged_external(model: onnx.ModelProto, rng: Generator, name: str) -> tuple[bytes, bytes | None]:
    """Weights beside the file, with a wrong place, a wrong length, or without the file."""
    data = bytearray()
    for tensor in model.graph.initializer:
        content = numpy_helper.to_array(tensor).tobytes()
        if numpy_helper.to_array(tensor).dtype == object:
            continue
        offset = len(data)
        data += content + bytes(int(rng.integers(0, 9)))
        tensor.ClearField("raw_data")
        for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", f"{name}.data"), ("offset", str(offset)), ("length", str(len(content)))):
            tensor.external_data.add(key=key, value=value)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    if entries and rng.random() < 0.7:
        entry = _some(rng, entries)
        entry.value = str(rng.choice(["/etc/hostname", "../m.data", "", "-1", "99999999", "1e3", "none.data", "0"]))
    return model.SerializeToString(), None if rng.random() < 0.2 else bytes(data)
