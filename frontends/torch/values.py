"""What lowering works with: tensors and numbers of the IR, and the context that adds ONNX nodes for one torch node."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import Array

OPAQUE = "pkg.torch"
"""Domain of the nodes that stand for torch operations without a rule."""

Dims = tuple[int | None, ...]
"""Sizes of a tensor; None where a size is dynamic."""

_DTYPES: dict[torch.dtype, ir.DataType] = {}


class Transparent(UnsupportedPattern):
    """Raised for an operation without a form in ONNX of which it is known how labels go through.

    ``attributes``: for `cipm_ir.ops.foreign`.
    """

    def __init__(self, reason: str, **attributes: Any) -> None:
        super().__init__(reason)
        self.attributes = attributes


_COMPLEX = {"Abs", "Add", "Sub", "Mul", "Div", "Neg", "MatMul", "Einsum"}
"""Operators whose labels go through alike for complex numbers, which ONNX does not have."""


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return element type of the IR; refused where ONNX has none."""
    found = _DTYPES.get(dtype)
    if found is None:
        try:
            found = _DTYPES[dtype] = tensor_adapters.from_torch_dtype(dtype)
        except TypeError as error:
            raise UnsupportedPattern(f"ONNX has no type for {dtype}") from error
    return found


@cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.zeros((), dtype)).dtype


@dataclass(eq=False, slots=True)
class Tensor:
    """A value of the IR with what torch knows of it; ``shape`` is None for some intermediate values."""

    value: ir.Value
    dtype: torch.dtype
    shape: Dims | None = None

    @property
    def dims(self) -> Dims:
        """The shape, which must be known."""
        if self.shape is None:
            raise UnsupportedPattern("the shape of an intermediate value is not known")
        return self.shape

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.dims)


@dataclass(eq=False)
class Number:
    """A Python number that the graph computes from sizes; ``hint`` is its value where that is static."""

    make: Callable[[], ir.Value]
    """Builds the scalar in the IR, when it is first needed."""
    hint: int | float | bool | None
    dtype: torch.dtype = torch.int64
    built: ir.Value | None = None

    @property
    def value(self) -> ir.Value:
        """The scalar in the IR."""
        if self.built is None:
            self.built = self.make()
        return self.built

    def known(self) -> int | float | bool:
        """Return the number; refused where it is dynamic."""
        if self.hint is None:
            raise UnsupportedPattern("a number that depends on a dynamic size")
        return self.hint


Operand = Tensor | Number | Array | int | float | bool | None


@dataclass
class Lowering:
    """Adds ONNX nodes to the IR graph; entries of the table call it.

    ``out`` is what torch says of the result: a tensor on no device (shape and type), or a structure of such.
    """

    graph: ir.Graph
    parameter: Callable[[str], Tensor]
    """The tensor of a dotted `state_dict` name."""
    name: str = ""
    out: Any = None
    count: int = 0
    made: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)

    # ------------------------------------------------------------ nodes
    def op(
        self,
        op_type: str,
        *inputs: Operand,
        shape: Sequence[int | None] | None = None,
        dtype: torch.dtype | None = None,
        **attributes: Any,
    ) -> Tensor:
        """Add a node with one output, of the type of the first tensor among the inputs unless ``dtype`` says."""
        return self.multi(op_type, inputs, [shape], dtype=dtype, **attributes)[0]

    def multi(
        self,
        op_type: str,
        inputs: Sequence[Operand],
        shapes: Sequence[Sequence[int | None] | None],
        *,
        dtype: torch.dtype | None = None,
        **attributes: Any,
    ) -> list[Tensor]:
        """Add a node with as many outputs as ``shapes`` has entries."""
        types = [x.dtype for x in inputs if isinstance(x, Tensor)]
        like = types[0] if types else None
        if any(kind.is_complex for kind in types) or (dtype is not None and dtype.is_complex):
            if op_type in _COMPLEX and not self.made and all(isinstance(x, Tensor) for x in inputs):
                raise Transparent("complex numbers", like=op_type, **attributes)
            raise UnsupportedPattern("complex numbers")
        values = [self.operand(x, like) for x in inputs]
        while values and values[-1] is None:
            values.pop()
        kind = dtype or like or torch.int64
        outputs = [self.fresh(op_type, kind, None if s is None else tuple(s)) for s in shapes]
        attrs = {k: attribute_of(k, v) for k, v in attributes.items() if v is not None}
        node = ir.Node("", op_type, values, attrs, outputs=[o.value for o in outputs], name=outputs[0].value.name)
        if op_type == "ConstantOfShape":
            outputs[0].value.meta["constant"] = True
        self.graph.append(node)
        self.made.append(node)
        return outputs

    def fresh(self, what: str, dtype: torch.dtype, shape: Dims | None) -> Tensor:
        """Return a value that the node being lowered computes."""
        self.count += 1
        value = ir.Value(name=f"{self.name}/{what}{self.count}", type=ir.TensorType(onnx_dtype(dtype)))
        if shape is not None:
            value.shape = ir.Shape(shape)
        return Tensor(value, dtype, shape)

    # ------------------------------------------------------------ operands
    def operand(self, x: Operand, like: torch.dtype | None = None) -> ir.Value | None:
        """Return the IR value of an operand; Python numbers become constants of type ``like``."""
        if x is None:
            return None
        if isinstance(x, Tensor | Number):
            return x.value
        if isinstance(x, np.ndarray):
            return self.const(x).value
        return self.const(x, like or torch.float32).value

    def const(self, array: Array | int | float | bool, dtype: torch.dtype | None = None) -> Tensor:
        """Return a constant; arrays keep their type unless ``dtype`` says."""
        self.count += 1
        name = f"{self.name}/const{self.count}"
        if dtype is None:
            data = np.asarray(array)
            tensor, kind = ir.Tensor(data, name=name), _torch_dtype(data.dtype)
        else:
            kind, data = dtype, np.asarray(array)
            tensor = ir.Tensor(data.astype(onnx_dtype(dtype).numpy()), dtype=onnx_dtype(dtype), name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tuple(tensor.shape.numpy()))
        )
        value.meta["constant"] = True
        self.graph.register_initializer(value)
        self.constants.append(value)
        return Tensor(value, kind, tuple(tensor.shape.numpy()))

    def ints(self, numbers: Sequence[int | Number]) -> Tensor:
        """Return a 1-D int64 tensor of sizes or positions; a constant where all are written in the program."""
        if all(not isinstance(n, Number) for n in numbers):
            return self.const(np.asarray(numbers, np.int64))
        parts: list[Operand] = []
        for n in numbers:
            if isinstance(n, Number):
                parts.append(self.op("Unsqueeze", n, np.zeros(1, np.int64), shape=(1,), dtype=torch.int64))
            else:
                parts.append(np.asarray([n], np.int64))
        return self.op("Concat", *parts, axis=0, shape=(len(parts),), dtype=torch.int64)

    def size(self, x: Tensor, axis: int) -> Number:
        """Return the size of an axis, as a number that follows the tensor."""
        axis = self.axis(x, axis)

        def make() -> ir.Value:
            shape = self.op("Shape", x, start=axis, end=axis + 1, shape=(1,), dtype=torch.int64)
            return self.op("Squeeze", shape, np.zeros(1, np.int64), shape=(), dtype=torch.int64).value

        return Number(make, x.dims[axis])

    def axis(self, x: Tensor | int, dim: int | Number) -> int:
        """Return a non-negative axis of a tensor (or of a rank)."""
        rank = x if isinstance(x, int) else x.rank
        number = int(known(dim))
        if not -max(rank, 1) <= number < max(rank, 1):
            raise UnsupportedPattern(f"axis {number} of a tensor with {rank} axes")
        return number % max(rank, 1)

    def axes(self, x: Tensor, dims: Any) -> list[int]:
        """Several axes; None or an empty list means all."""
        if dims is None or (isinstance(dims, list | tuple) and not dims):
            return list(range(x.rank))
        return [self.axis(x, d) for d in (dims if isinstance(dims, list | tuple) else [dims])]

    # ------------------------------------------------------------ frequent moves
    @property
    def shape(self) -> Dims:
        """Shape of the result."""
        return static_shape(self.out)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the result."""
        dtype: torch.dtype = self.out.dtype
        return dtype

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast where the type differs."""
        if x.dtype == dtype:
            return x
        return self.op("Cast", x, to=int(onnx_dtype(dtype)), dtype=dtype, shape=x.shape)

    def tensor(self, x: Operand, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor of an operand: numbers become scalars; cast to ``dtype`` where it is given."""
        if isinstance(x, Number):
            x = Tensor(x.value, x.dtype, ())
        if isinstance(x, Tensor):
            return x if dtype is None else self.cast(x, dtype)
        if x is None:
            raise UnsupportedPattern("an operand is missing")
        return self.const(x, dtype)

    def transpose(self, x: Tensor, perm: Sequence[int]) -> Tensor:
        """Permute axes."""
        if list(perm) == list(range(len(perm))):
            return x
        shape = None if x.shape is None else [x.shape[p] for p in perm]
        return self.op("Transpose", x, perm=list(perm), shape=shape)

    def reshape(self, x: Tensor, sizes: Sequence[int | Number]) -> Tensor:
        """Reshape to sizes of which one may be -1."""
        shape: list[int | None] = [n if not isinstance(n, Number) else _whole(n.hint) for n in sizes]
        if -1 in shape:
            known_sizes = [d for d in x.shape or (None,) if d is not None]
            fixed = [s for s in shape if s is not None and s != -1]
            rest = math.prod(fixed)
            static = x.shape is not None and len(known_sizes) == len(x.shape) and len(fixed) == len(shape) - 1
            missing = math.prod(known_sizes) // rest if static and rest else None
            shape = [missing if s == -1 else s for s in shape]
        return self.op("Reshape", x, self.ints(sizes), shape=shape, allowzero=None if 0 not in sizes else 1)


def _whole(hint: int | float | bool | None) -> int | None:
    return None if hint is None else int(hint)


def known(x: Any) -> Any:
    """Return a Python number; of a number computed from sizes its value, refused where that is dynamic."""
    return x.known() if isinstance(x, Number) else x


def static_shape(fake: torch.Tensor) -> Dims:
    """Return sizes of a tensor; None where they are symbolic."""
    return tuple([int(d) if type(d) is int else None for d in fake.shape])


def attribute_of(name: str, value: Any) -> ir.Attr:
    """Return an attribute of an ONNX node for a Python value."""
    if type(value) is list and all(type(v) is int for v in value):
        return ir.AttrInt64s(name, value)
    if isinstance(value, bool | int | np.integer):
        return ir.AttrInt64(name, int(value))
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, np.ndarray):
        return ir.AttrTensor(name, ir.tensor(value))
    if all(isinstance(v, int | np.integer) for v in value):
        return ir.AttrInt64s(name, [int(v) for v in value])
    if all(isinstance(v, str) for v in value):
        return ir.AttrStrings(name, list(value))
    return ir.AttrFloat32s(name, [float(v) for v in value])


def transposed(graph: ir.Graph, x: Tensor, perm: Sequence[int], name: str) -> Tensor:
    """Return a parameter with its axes permuted, under a name of its own."""
    shape = tuple(x.dims[p] for p in perm)
    value = ir.Value(name=f"{name}/view", type=x.value.type, shape=ir.Shape(shape))
    attrs = {"perm": ir.AttrInt64s("perm", list(perm))}
    graph.append(ir.Node("", "Transpose", [x.value], attrs, outputs=[value], name=value.name))
    return Tensor(value, x.dtype, shape)


def leaves(value: Any) -> list[Any]:
    """Return everything in a structure of arguments or results."""
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, tuple | list):
        return [leaf for v in value for leaf in leaves(v)]
    if isinstance(value, slice):
        return [value.start, value.stop, value.step]
    return [value]
