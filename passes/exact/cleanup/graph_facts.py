"""What is proven about the values of a graph: element types, shapes with symbols, entries of small vectors of sizes.

Everything follows from the declared shapes of the inputs, the parameters and the operators. Shapes that a file records
for inner values are not read: they may be left from a version of the model with other inputs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.ir.constants import attribute, evaluate
from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.parameters import is_parameter, parameter_tensor
from cipm_ir.ir.shapes import node_into

Dim: TypeAlias = int | str | None
"""A size, the symbol of an unknown one (equal symbols are equal sizes), or nothing known."""
Dims: TypeAlias = tuple[Dim, ...]

_SMALL = 64
_SIZES = {ir.DataType.INT64, ir.DataType.INT32}
_AS_DATA = {*_SIZES, ir.DataType.FLOAT, ir.DataType.BOOL}
# An unknown size stands in a vector of sizes as one of these numbers, which are only moved, never computed with.
_FIRST_SYMBOL = 1 << 40
# Their output sizes are quotients or products that are rounded, by ONNX's inference not always as by the runtime.
_ROUNDED = {"MaxPool", "AveragePool", "LpPool", "Conv", "ConvTranspose", "Resize", "Upsample"}
_MOVES = ("Identity", "Gather", "Squeeze", "Unsqueeze", "Slice", "Reshape", "Concat")


class GraphFacts:
    """Facts about the values of one model, learned node by node in topological order."""

    def __init__(self, model: ir.Model) -> None:
        self._types: dict[ir.Value, ir.DataType] = {}
        self._shapes: dict[ir.Value, Dims] = {}
        self._entries: dict[ir.Value, Array] = {}
        self._taken: dict[tuple[ir.Value, int], str] = {}
        self._numbers = itertools.count()
        for value in model.graph.inputs:
            if value.shape is not None and not is_parameter(value):
                # A symbol in a file is a hope: each unknown size gets one of its own.
                self._shapes[value] = tuple(d if isinstance(d, int) and d > 0 else self._symbol() for d in value.shape)

    # ------------------------------------------------------------ answers
    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """Return the element type of a tensor, None where it is not known."""
        if value is None:
            return None
        tensor = parameter_tensor(value)
        return tensor.dtype if tensor is not None else self._types.get(value, value.dtype)

    def shape(self, value: ir.Value | None) -> Dims | None:
        """Return the proven shape, None where not even the rank is known."""
        tensor = parameter_tensor(value)
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        return None if value is None else self._shapes.get(value)

    def entries(self, value: ir.Value | None) -> list[Dim] | None:
        """Return the entries of a small vector of sizes, of which some may be symbols."""
        found = self._coded(value)
        return None if found is None else [self._decoded(int(code)) for code in found.reshape(-1)]

    def constant_entries(self, value: ir.Value) -> Array | None:
        """Return a computed vector of sizes whose entries are all known numbers."""
        found = self._entries.get(value)
        return None if found is None or self._has_symbols(found) else found

    # ------------------------------------------------------------ learning
    def learn(self, node: ir.Node, version: int) -> None:
        """Derive what holds for the outputs of a node from what holds for its inputs."""
        if any(attr.is_ref() for attr in node.attributes.values()):
            return
        if (node.domain, node.op_type) == ("com.microsoft", "DynamicQuantizeLSTM"):
            self._learn_quantized_lstm(node)
        if node.domain or any(True for _ in subgraphs(node)) or node.op_type == "Constant":
            return
        if node.op_type in ("Shape", "Size"):
            self._types[node.outputs[0]] = ir.DataType.INT64  # whatever their input is
        self._infer(node, version)
        self._learn_entries(node, version)
        if node.op_type == "Reshape" and len(node.inputs) > 1:
            self._learn_reshape(node)
        if node.op_type == "Expand":
            self._learn_expand(node)

    def _infer(self, node: ir.Node, version: int) -> None:
        """ONNX's inference of one node; what it leaves open stays unknown."""
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for value in node.inputs:
            if value is None:
                continue
            dtype = self.dtype(value)
            if dtype is None or not (value.type is None or isinstance(value.type, ir.TensorType)):
                return
            types[value.name or ""] = onnx.helper.make_tensor_type_proto(int(dtype), self.shape(value))
            array = self._as_data(value, dtype)
            if array is not None:
                data[value.name or ""] = onnx.numpy_helper.from_array(array)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, "")
            proto = onnx.NodeProto()
            node_into(proto, node)
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", version)]
            )
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError):
            return
        for value in node.outputs:
            kind = found.get(value.name or "")
            if kind is None or not kind.HasField("tensor_type"):
                continue
            if kind.tensor_type.elem_type:
                self._types[value] = ir.DataType(kind.tensor_type.elem_type)
            if kind.tensor_type.HasField("shape"):
                dims = tuple(map(_dim, kind.tensor_type.shape.dim))
                known = dims if node.op_type not in _ROUNDED else self._without_rounded(node, dims)
                if known is not None:
                    self._shapes[value] = self._named(known)

    def _without_rounded(self, node: ir.Node, dims: Dims) -> Dims | None:
        """Forget the sizes of which ONNX's inference and the runtime may think differently."""
        if attribute(node, "output_shape"):
            return None  # ONNX forgets axes where it is smaller than the input
        if node.op_type not in ("Resize", "Upsample"):
            if attribute(node, "auto_pad", "NOTSET") != "NOTSET":
                return (*dims[:2], *(None for _ in dims[2:]))
            return self._without_rest(node, dims) if attribute(node, "ceil_mode", 0) else dims
        if node.op_type == "Resize" and attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
            return tuple(None for _ in dims)
        place = 1 if node.op_type == "Upsample" or len(node.inputs) == 2 else 2
        scales = parameter_tensor(node.inputs[place]) if len(node.inputs) > place else None
        if scales is None or not scales.size:
            return dims  # the sizes are given
        shape, axes = self.shape(node.inputs[0]), attribute(node, "axes")
        scale = dict(zip(range(len(dims)) if axes is None else axes, np.asarray(scales.numpy()), strict=False))
        return tuple(
            d if shape is not None and _exact_product(shape[k], scale.get(k, scale.get(k - len(dims), 1.0))) else None
            for k, d in enumerate(dims)
        )

    def _without_rest(self, node: ir.Node, dims: Dims) -> Dims:
        """Forget the sizes that a pool rounds up: all but those where its windows fill the padded input to the end."""
        shape, kernel = self.shape(node.inputs[0]), attribute(node, "kernel_shape")
        count = len(dims) - 2
        if shape is None or kernel is None or len(kernel) != count or len(shape) != len(dims):
            return (*dims[:2], *(None for _ in dims[2:]))
        pads = attribute(node, "pads") or [0] * (2 * count)
        strides, dilations = (attribute(node, key) or [1] * count for key in ("strides", "dilations"))
        made = list(dims)
        for k in range(count):
            size = shape[k + 2]
            window = dilations[k] * (kernel[k] - 1) + 1
            rest = (size + pads[k] + pads[k + count] - window) % strides[k] if isinstance(size, int) else None
            made[k + 2] = dims[k + 2] if rest == 0 else None
        return tuple(made)

    def _as_data(self, value: ir.Value, dtype: ir.DataType) -> Array | None:
        computed = self.constant_entries(value)
        tensor = parameter_tensor(value)
        if computed is not None or tensor is None or dtype not in _AS_DATA or tensor.size > _SMALL:
            return computed
        return np.asarray(tensor.numpy())

    def _learn_entries(self, node: ir.Node, version: int) -> None:
        if node.op_type in ("Shape", "Size"):
            shape = self.shape(node.inputs[0])
            if shape is None or (node.op_type == "Size" and not all(isinstance(d, int) for d in shape)):
                return
            coded = np.array([d if isinstance(d, int) else _code(d) for d in self._named(shape)], np.int64)
            if node.op_type == "Size":
                found: Array | None = np.asarray(coded.prod(), np.int64)
            else:
                found = coded[slice(attribute(node, "start", 0), attribute(node, "end"))]
        elif node.op_type == "Cast" and ir.DataType(attribute(node, "to")) in _SIZES:
            found = self._coded(node.inputs[0])  # no size is too large for 32 bits
            large = found is not None and (np.abs(found) >= 1 << 31)
            if found is None or (large & ~_are_symbols(found)).any():
                return
        elif node.op_type == "Mul":
            found = self._times_one(*node.inputs)
        elif node.op_type == "Equal":
            found = self._compared(*node.inputs)
        elif node.op_type == "Where":
            found = self._chosen(*node.inputs)
        elif node.op_type == "Gather" and self._coded(node.inputs[0]) is None:
            found = self._sizes_taken(node)
        elif node.op_type in _MOVES:
            args = [self._coded(value) for value in node.inputs]
            moved = args if node.op_type == "Concat" else args[:1]
            if any(a is None for a in moved) or any(a is not None and self._has_symbols(a) for a in args[len(moved) :]):
                return
            found = evaluate(node, args, None, version)
        else:
            return
        if found is not None and found.size <= _SMALL:
            self._entries[node.outputs[0]] = found

    def _times_one(self, left: ir.Value | None, right: ir.Value | None) -> Array | None:
        """Return a size times 1; other products of symbols are not followed."""
        a, b = self._coded(left), self._coded(right)
        if a is None or b is None or a.shape != b.shape:
            return None
        return a if (b == 1).all() else b if (a == 1).all() else None

    def _compared(self, left: ir.Value | None, right: ir.Value | None) -> Array | None:
        """Return which entries are equal, where that holds for every size; a size is never a negative number."""
        a, b = self._coded(left), self._coded(right)
        if a is None or b is None or not _broadcast(a, b):
            return None
        equal, symbols = a == b, _are_symbols(a) | _are_symbols(b)
        negative = ((a < 0) & ~_are_symbols(a)) | ((b < 0) & ~_are_symbols(b))
        return equal if (equal | negative | ~symbols).all() else None

    def _chosen(self, condition: ir.Value | None, left: ir.Value | None, right: ir.Value | None) -> Array | None:
        tensor = parameter_tensor(condition)
        proven = None if condition is None else self.constant_entries(condition)
        which = proven if tensor is None or tensor.size > _SMALL else np.asarray(tensor.numpy())
        a, b = self._coded(left), self._coded(right)
        if which is None or a is None or b is None or not _broadcast(which, a, b):
            return None
        return np.where(which, a, b)

    def _sizes_taken(self, node: ir.Node) -> Array | None:
        """Return symbols for what is taken of the sizes of a value whose rank is not known."""
        maker = None if node.inputs[0] is None else node.inputs[0].producer()
        tensor = parameter_tensor(node.inputs[1])
        if maker is None or (maker.op_type, maker.domain) != ("Shape", "") or _partial(maker):
            return None
        source = maker.inputs[0]
        if source is None or tensor is None or not 0 < tensor.size <= _SMALL or self.shape(source) is not None:
            return None
        indices = np.asarray(tensor.numpy())
        for index in indices.reshape(-1).tolist():
            self._taken.setdefault((source, index), self._symbol())
        codes = [_code(self._taken[source, index]) for index in indices.reshape(-1).tolist()]
        return np.array(codes, np.int64).reshape(indices.shape)

    def _learn_reshape(self, node: ir.Node) -> None:
        out, target = node.outputs[0], self.entries(node.inputs[1])
        known = self._shapes.get(out)
        if target is None or (known is not None and all(isinstance(d, int) for d in known)):
            return
        shape, keeps_zero = self.shape(node.inputs[0]), attribute(node, "allowzero", 0)
        made: list[Dim] = []
        for k, d in enumerate(target):
            if d == 0 and not keeps_zero:
                made.append(shape[k] if shape is not None and k < len(shape) else None)
            else:
                made.append(None if d == -1 else d)
        if known is not None and len(known) == len(made):
            made = [b if isinstance(b, int) else a for a, b in zip(made, known, strict=True)]
        if target.count(-1) == 1 and shape is not None and made[target.index(-1)] is None:
            made[target.index(-1)] = _left_over(shape, made)
        self._shapes[out] = self._named(tuple(made))

    def _learn_expand(self, node: ir.Node) -> None:
        out, target, shape = node.outputs[0], self.entries(node.inputs[1]), self.shape(node.inputs[0])
        known = self._shapes.get(out)
        if target is None or shape is None or (known is not None and all(isinstance(d, int) for d in known)):
            return
        rank = max(len(shape), len(target))
        a = [1] * (rank - len(shape)) + list(shape)
        b = [1] * (rank - len(target)) + target
        joined = tuple(y if x == 1 else x if y == 1 or x == y else None for x, y in zip(a, b, strict=True))
        self._shapes[out] = self._named(joined)

    def _learn_quantized_lstm(self, node: ir.Node) -> None:
        """Shapes of onnxruntime's quantized LSTM are those of LSTM."""
        shape = self.shape(node.inputs[0])
        if shape is None or len(shape) != 3:
            return
        ways, hidden = 1 + (attribute(node, "direction") == "bidirectional"), int(attribute(node, "hidden_size"))
        shapes: list[Dims] = [(shape[0], ways, shape[1], hidden), *2 * [(ways, shape[1], hidden)]]
        for value, known in zip(node.outputs, shapes, strict=False):
            self._types[value], self._shapes[value] = ir.DataType.FLOAT, known

    # ------------------------------------------------------------ symbols
    def _symbol(self) -> str:
        return f"s{next(self._numbers)}"

    def _named(self, dims: Dims) -> tuple[int | str, ...]:
        """Give each unknown size a symbol, so that it is the same wherever it is asked for."""
        return tuple(self._symbol() if d is None else d for d in dims)

    def _decoded(self, code: int) -> Dim:
        return f"s{-code - _FIRST_SYMBOL}" if -2 * _FIRST_SYMBOL < code <= -_FIRST_SYMBOL else code

    def _has_symbols(self, coded: Array) -> bool:
        return coded.dtype.kind == "i" and bool(_are_symbols(coded).any())

    def _coded(self, value: ir.Value | None) -> Array | None:
        if value is not None and value in self._entries:
            return self._entries[value]
        tensor = parameter_tensor(value)
        if tensor is None or tensor.dtype not in _SIZES or tensor.size > _SMALL:
            return None
        array = np.asarray(tensor.numpy()).astype(np.int64)
        return None if self._has_symbols(array) else array


def permutation(node: ir.Node, facts: GraphFacts) -> list[int] | None:
    """Return the permutation of a Transpose; the reversal that it is by default needs a known rank."""
    perm, shape = attribute(node, "perm"), facts.shape(node.inputs[0])
    if perm is not None:
        return list(perm)
    return None if shape is None else list(range(len(shape)))[::-1]


def slice_bounds(node: ir.Node, version: int) -> tuple[list[int], list[int], list[int], list[int]] | None:
    """Return starts, ends, axes and steps of a Slice; None where they are not all constant."""
    if version < 10:
        given = [attribute(node, key) for key in ("starts", "ends", "axes")]
        lists: list[list[int] | None] = [None if numbers is None else list(numbers) for numbers in given]
    else:
        tensors = [parameter_tensor(value) for value in node.inputs[1:]]
        if any(t is None and value is not None for t, value in zip(tensors, node.inputs[1:], strict=True)):
            return None
        lists = [None if t is None else np.asarray(t.numpy()).reshape(-1).tolist() for t in tensors]
    starts, ends, axes, steps = [*lists, None, None, None][:4]
    if starts is None or ends is None:
        return None
    return (
        starts,
        ends,
        list(range(len(starts))) if axes is None else axes,
        [1] * len(starts) if steps is None else steps,
    )


def _code(symbol: str) -> int:
    return -_FIRST_SYMBOL - int(symbol[1:])


def _are_symbols(coded: Array) -> Array:
    return (coded > -2 * _FIRST_SYMBOL) & (coded <= -_FIRST_SYMBOL)


def _partial(shape: ir.Node) -> bool:
    """Return whether a Shape gives only some of the sizes."""
    return attribute(shape, "start", 0) != 0 or attribute(shape, "end") is not None


def _broadcast(*arrays: Array) -> bool:
    try:
        np.broadcast_shapes(*(array.shape for array in arrays))
    except ValueError:
        return False
    return True


def _left_over(shape: Dims, made: list[Dim]) -> Dim:
    """Return the size that -1 stands for: the one symbol that is not among the others, where the numbers match."""
    others = [d for d in made if d is not None]
    names = Counter(d for d in shape if isinstance(d, str))
    names.subtract(d for d in others if isinstance(d, str))
    left = list((+names).elements())
    numbers = [math.prod(d for d in dims if isinstance(d, int)) for dims in (shape, others)]
    unclear = None in shape or len(others) != len(made) - 1 or (-names).total() or 0 in numbers
    if unclear or len(left) > 1 or (left and numbers[0] != numbers[1]) or numbers[0] % numbers[1]:
        return None
    return left[0] if left else numbers[0] // numbers[1]


def _exact_product(size: Dim, scale: float) -> bool:
    """Return whether a size times a scale is the same number in single and in double precision."""
    if not isinstance(size, int):
        return scale == 1
    return float(np.float32(size) * np.float32(scale)) == float(size) * float(scale)


def _dim(proto: onnx.TensorShapeProto.Dimension) -> Dim:
    if proto.WhichOneof("value") == "dim_value":
        return int(proto.dim_value)
    return proto.dim_param or None
