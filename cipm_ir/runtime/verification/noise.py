"""The rounding noise of a model: how far its outputs move when nothing but rounding changes.

Two programs of the same function round differently, and how much that shows depends on the model: not at all behind a
plain product, a lot behind a cancellation, absolutely instead of relatively behind a saturated sigmoid. So the noise is
measured, on the model itself and for each channel of each output, in two ways: the same model in other kernels, and
Monte Carlo arithmetic (Parker, "Monte Carlo Arithmetic", 1997), in which every weight and input moves by at most one
unit in the last place and every sum of products is taken in another order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.nested import graphs_within
from cipm_ir.ir.parameters import is_parameter
from cipm_ir.runtime.graphs import all_graphs

Array: TypeAlias = npt.NDArray[Any]

DRAWS = 3
"""How many times weights and inputs are moved at random."""

MORE_DRAWS = 12
"""How many times more, where a difference is not much larger than the noise so far."""

MULTIPLE = 4.0
"""Allowed is this multiple of the largest noise that was seen in a channel ..."""

ULPS = 4.0
"""... plus so many units in the last place of the largest value of the channel."""

_CHUNK = 1 << 22
_FEW = 4
_SAMPLE = 4096
# From which input on an operator makes sizes of what it is given.
_SIZING = {"Resize": 1, "Upsample": 1, "Range": 0}
# Bits of a type by name: the integers to view it as, and the low bits that only a rounded number needs.
_BITS: dict[str, tuple[Any, int]] = {
    "float64": (np.int64, 29),
    "float32": (np.int32, 12),
    "float16": (np.int16, 5),
    "bfloat16": (np.int16, 3),
}


def is_float(array: Array) -> bool:
    """Return whether the entries are floating-point or complex numbers, those of ml_dtypes included."""
    return array.dtype.name.startswith(("float", "bfloat", "complex"))


def resolution(array: Array) -> float:
    """Return the distance from 1 to the next number of the array's type."""
    if array.dtype.kind == "c":
        return float(np.finfo(array.dtype).eps)
    return float(_limits(array).eps)


def _limits(array: Array) -> Any:
    return ml_dtypes.finfo(array.dtype)  # type: ignore[no-untyped-call]


def nudged(array: Array, rng: np.random.Generator) -> Array:
    """Return a copy in which every entry moved by -1, 0 or 1 units in its last place, at random.

    Zeros, infinities and NaN stay, and so do masks and other exact constants: arrays of at most four different short
    numbers (1, 0.5, -10000), on whose exact value formulas such as ``(1 - mask) * -1e9`` rely.
    """
    kind = _BITS.get(array.dtype.name)
    if kind is None or not array.size or _exact(array, kind):
        return array
    moved = np.array(array, copy=True, order="C")
    bits, values = moved.reshape(-1).view(kind[0]), moved.reshape(-1)
    for start in range(0, bits.size, _CHUNK):
        piece, numbers = bits[start : start + _CHUNK], values[start : start + _CHUNK]
        largest = _limits(array).max
        still = (numbers == 0) | ~(np.abs(numbers) < largest)
        steps = rng.integers(0, 4, piece.size, dtype=np.int8)
        change = (steps == 1).astype(np.int8) - (steps == 2)
        change[still] = 0
        piece += change
    return moved


def _exact(array: Array, kind: tuple[Any, int]) -> bool:
    """Return whether an array holds a few short numbers only."""

    def few(entries: Array) -> bool:
        found = np.unique(entries)
        short = (found.view(kind[0]) & ((1 << kind[1]) - 1)) == 0
        return len(found) <= _FEW and bool((short | ~np.isfinite(found)).all())

    flat = np.ascontiguousarray(array).reshape(-1)
    stride = max(1, flat.size // _SAMPLE)
    return few(np.ascontiguousarray(flat[::stride])) and (stride == 1 or few(flat))


def nudged_model(model: ir.Model, seed: tuple[int, ...]) -> ir.Model:
    """Return a copy that differs by rounding.

    Its floating-point weights are moved as in `nudged`, each when it is needed, and its contractions sum in another
    order. Constants that sizes are computed from stay: another size is no rounding.
    """
    copy = model.clone()
    still = _size_makers(copy)
    _shuffle_sums(copy, np.random.default_rng(seed))
    position = 0
    for graph in all_graphs(copy):
        for value in graph.initializers.values():
            position += 1
            if value.const_value is not None and value not in still:
                value.const_value = _lazy(value.const_value, value.name or "", (*seed, position))
        for node in graph:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and not attribute.is_ref() and node.outputs[0] not in still:
                position += 1
                tensor = attribute.as_tensor()
                node.attributes["value"] = ir.AttrTensor("value", _lazy(tensor, tensor.name or "", (*seed, position)))
    return copy


def _size_makers(model: ir.Model) -> set[ir.Value]:
    """Return the values that a Resize, Upsample or Range makes sizes of, and what they are computed from."""
    found: set[ir.Value] = set()
    for graph in all_graphs(model):
        for node in graph:
            first = _SIZING.get(node.op_type) if not node.domain else None
            waiting = [] if first is None else list(node.inputs[first:])
            while waiting:
                value = waiting.pop()
                if value is not None and value not in found:
                    found.add(value)
                    maker = value.producer()
                    waiting += [] if maker is None else maker.inputs
    return found


def _shuffle_sums(model: ir.Model, rng: np.random.Generator) -> None:
    """Permute both operands of each contraction along the axis that it sums over, in place.

    A weight of one node is permuted when it is read, since onnxruntime may compute the Gathers of all weights first.
    """
    for graph in graphs_within(model.graph):
        for node in list(graph):
            axes = _summed_axes(node)
            if axes is None:
                continue
            size = next(size for size in _sizes(node, axes) if isinstance(size, int))
            permutation = rng.permutation(size)
            order = ir.node("Constant", [], {"value": ir.tensor(permutation)})
            order.outputs[0].name = f"{node.outputs[0].name}.order"
            graph.insert_before(node, order)
            for place, axis in enumerate(axes):
                operand = node.inputs[place]
                if operand is not None and _is_weight_of_one(operand):
                    operand.const_value = _taken(operand.const_value, permutation, axis)
                    continue
                gather = ir.node("Gather", [node.inputs[place], order.outputs[0]], {"axis": axis})
                gather.outputs[0].name = f"{node.outputs[0].name}.ordered_{place}"
                graph.insert_before(node, gather)
                node.replace_input_with(place, gather.outputs[0])


def _is_weight_of_one(value: ir.Value) -> bool:
    """Return whether a value is an initializer that exactly one node reads."""
    return is_parameter(value) and len(value.uses()) == 1 and not value.is_graph_output()


def _taken(tensor: ir.TensorProtocol | None, order: Array, axis: int) -> ir.TensorProtocol:
    """Return a tensor with its entries along an axis in another order, made when it is read."""
    assert tensor is not None

    def take() -> ir.TensorProtocol:
        return ir.Tensor(np.take(tensor.numpy(), order, axis=axis), dtype=tensor.dtype, name=tensor.name)

    return ir.LazyTensor(take, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _summed_axes(node: ir.Node) -> tuple[int, int] | None:
    """Return the axes of both operands that a contraction sums over.

    None for other nodes, and where sizes are not known.
    """
    if node.domain or len(node.inputs) < 2:
        return None
    second = _dims(node.inputs[1])
    flag = node.attributes.get_int
    if node.op_type == "MatMul" and len(second) > 1:
        axes = -1, len(second) - 2
    elif node.op_type == "Gemm" and len(second) == 2:
        axes = (0 if flag("transA", 0) else 1), (1 if flag("transB", 0) else 0)
    elif node.op_type in ("Conv", "ConvTranspose") and flag("group", 1) == 1 and len(second) > 1:
        axes = 1, (1 if node.op_type == "Conv" else 0)
    else:
        return None
    known = [size for size in _sizes(node, axes) if isinstance(size, int)]
    return axes if known and known[0] > 1 else None


def _sizes(node: ir.Node, axes: tuple[int, int]) -> list[Any]:
    """Return what is known of the size of the axis that is summed over, from the second operand first."""
    found = [(_dims(node.inputs[place]), axes[place]) for place in (1, 0)]
    return [dims[axis] for dims, axis in found if dims]


def _dims(value: ir.Value | None) -> tuple[Any, ...]:
    return () if value is None or value.shape is None else tuple(value.shape)


def _lazy(tensor: ir.TensorProtocol, name: str, seed: tuple[int, ...]) -> ir.TensorProtocol:
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 16:
        return tensor

    def move() -> ir.TensorProtocol:
        array = tensor.numpy()
        return ir.Tensor(nudged(array, np.random.default_rng(seed)), dtype=tensor.dtype, name=name)

    return ir.LazyTensor(move, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=name)


@dataclass
class Yardstick:
    """What one output of a model was on one input, and how far rounding moves it, per channel.

    A channel is an index of axis 1 or of the last axis; both are looked at, so that an entry is judged by the finer of
    the two.

    Attributes:
        expected: the output.
        noise: by axis (None: all in one), the largest |change| seen in each channel.
        scale: by axis, the largest finite |entry| of each channel.
        unstable: entries that rounding alone turns into NaN or infinity, or back; None where there are none.
        unit: the least size that units in the last place are taken of: 1 behind a sigmoid, which is a difference of
            numbers of this size to its kernel.
        flips: for integers: the largest number of entries that rounding alone changed.
    """

    expected: Array
    noise: dict[int | None, Array] = field(default_factory=dict)
    scale: dict[int | None, Array] = field(default_factory=dict)
    unstable: Array | None = None
    flips: int = 0
    unit: float = 0.0

    def __post_init__(self) -> None:
        if is_float(self.expected):
            size = np.abs(_finite(self.expected))
            for axis in channel_axes(self.expected.ndim):
                self.scale[axis] = by_channel(size, axis)
                self.noise[axis] = np.zeros_like(self.scale[axis])

    def add(self, other: Array) -> None:
        """Take in what the same model gave where only rounding was different."""
        if other.shape != self.expected.shape or other.dtype != self.expected.dtype:
            return
        if not is_float(other):
            self.flips = max(self.flips, int(np.count_nonzero(other != self.expected)))
            return
        change, apart = difference(self.expected, other)
        if apart.any():
            self.unstable = apart if self.unstable is None else self.unstable | apart
        for axis, noise in self.noise.items():
            np.maximum(noise, by_channel(change, axis), out=noise)

    def allowed(self, axis: int | None) -> Array:
        """Return how far each channel of an axis may move."""
        size = np.maximum(self.scale[axis], self.unit)
        return np.asarray(MULTIPLE * self.noise[axis] + ULPS * resolution(self.expected) * size)


def settle(sticks: list[Yardstick]) -> None:
    """Raise the noise of each channel to what is typical of it, for one output on several inputs.

    A channel of few entries can look quieter on one input than it is, and be near zero there. Relative to its usual
    size, its noise counts at least as much as its median over all inputs.
    """
    for axis in {axis for stick in sticks for axis in stick.noise}:
        alike: dict[int, list[Yardstick]] = {}
        for stick in sticks:
            if axis in stick.noise and stick.noise[axis].size:
                alike.setdefault(stick.noise[axis].size, []).append(stick)
        for group in alike.values():
            noise = np.stack([stick.noise[axis] for stick in group])
            scale = np.stack([stick.scale[axis] for stick in group])
            largest = scale.max(axis=1, keepdims=True)
            usual = np.maximum(scale, np.median(_ratio(scale, largest), axis=0) * largest)
            typical = np.median(_ratio(noise, usual), axis=0) * usual
            for stick, least in zip(group, typical, strict=True):
                np.maximum(stick.noise[axis], least, out=stick.noise[axis])


def _ratio(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def channel_axes(ndim: int) -> tuple[int | None, ...]:
    """Return the axes whose indices are channels; (None,) for a single number."""
    return (None,) if ndim == 0 else tuple({min(1, ndim - 1), ndim - 1})


def by_channel(size: Array, axis: int | None) -> Array:
    """Return the largest entry of each channel, 0 for an empty one."""
    others = tuple(k for k in range(size.ndim) if k != axis)
    return np.asarray(np.max(size, axis=others, initial=0.0)).reshape(-1)


def difference(a: Array, b: Array) -> tuple[Array, Array]:
    """Return |a - b| in double precision, 0 where either is not finite, and where only one is, or they differ there."""
    x, y = widened(a), widened(b)
    finite = np.isfinite(x) & np.isfinite(y)
    same = finite | (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(finite, np.abs(x - y), 0.0), ~same


def widened(array: Array) -> Array:
    """Return the array in double precision."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _finite(array: Array) -> Array:
    wide = widened(array)
    return np.where(np.isfinite(wide), wide, 0.0)
