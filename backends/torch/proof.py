"""Whether two graphs of the IR are the same program, value by value: the proof that an object is what was verified.

The object is read again the way the caller's was, which gives a second graph. Both are numbered: values that are
computed by the same operators, with the same attributes, from the same inputs and constants get the same number. Equal
numbers of the outputs, in their order, prove that the two compute the same. What differs in form alone is brought to
one form first: names, identities, attributes that say what is the default, small chains of constants and of sizes that
are fixed (a size that is used as a number must come out the same).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.errors import CipmError
from cipm_ir.ir.capture import Capture
from cipm_ir.ir.constants import attribute, constant_tensor, evaluate, slice_positions
from cipm_ir.ir.labels import Array

__all__ = ["first_difference", "unproven"]

_OPAQUE = "pkg.torch"
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
_SHOWN = 8
"""Constants of at most so many entries are shown in a reason."""


def unproven(capture: Capture, made: Any, model: ir.Model) -> str:
    """Return why a torch object is not proven to be the program of ``model``; empty where it is.

    Args:
        capture: how the caller's object was read.
        made: the object that would be handed back.
        model: the IR model after the passes.
    """
    if capture.read_again is None or capture.args is None:
        return "there are no example inputs to read it with"
    try:
        again = capture.read_again(made)
    except CipmError as error:
        return f"torch cannot read it again ({str(error).rstrip('.')})"
    return first_difference(model, again.model)


def first_difference(wanted: ir.Model, found: ir.Model) -> str:
    """Return where ``found`` computes something else than ``wanted``, in words; empty where it is the same program."""
    numbers = _Numbers(found.graph.opset_imports.get("", 1))
    if wanted.graph.opset_imports.get("", 1) != numbers.version:
        return "the two graphs use different versions of the operators"
    try:
        second = numbers.of(found, trusted=True)  # torch checked its shapes just now
        first = numbers.of(wanted, trusted=False)
    except KeyError as error:
        return f"value {error.args[0]!r} is used before it is computed"
    outputs = list(zip(wanted.graph.outputs, found.graph.outputs, strict=False))
    for a, b in outputs:
        if first[a] != second[b]:
            return _Explanation(first, second, numbers).of(a, b)
    if len(wanted.graph.outputs) != len(found.graph.outputs):
        return f"it has {len(found.graph.outputs)} outputs, the program {len(wanted.graph.outputs)}"
    if numbers.inputs(wanted) != numbers.inputs(found):
        return "its inputs are not those of the program"
    if _opaque(wanted, first) != _opaque(found, second):
        return "its operations without a rule are not those of the program"
    return ""


class _Numbers:
    """Numbers for the values of several graphs; equal ones are computed the same way."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.keys: dict[Any, int] = {}
        self.constants: dict[Any, list[tuple[Array, int]]] = {}
        self.held: dict[int, Array] = {}
        self.shapes: dict[int, tuple[int | None, ...]] = {}
        self.count = 0

    def of(self, model: ir.Model, trusted: bool) -> dict[ir.Value, int]:
        """Return the number of every value; ``trusted``: the shapes that the graph declares are true.

        Raises:
            KeyError: a node stands before one whose result it uses.
        """
        numbers: dict[ir.Value, int] = {}
        for k, value in enumerate(_true_inputs(model)):
            numbers[value] = self._keyed(("input", k, value.dtype))
            shape = _declared(value)
            if self.shapes.setdefault(numbers[value], shape or ()) != (shape or ()):
                numbers[value] = self._fresh()
        for value in model.graph.initializers.values():
            if value.const_value is not None:
                numbers[value] = self._constant(value.const_value.numpy())
        seen: Counter[Any] = Counter()
        for node in model.graph:
            self._node(node, numbers, seen)
            for value in node.outputs if trusted else ():
                shape = _declared(value)
                if shape is not None:
                    self.shapes.setdefault(numbers[value], shape)
        return numbers

    def inputs(self, model: ir.Model) -> list[Any]:
        """Return type and shape of every input."""
        return [(v.dtype, _declared(v)) for v in _true_inputs(model)]

    def _node(self, node: ir.Node, numbers: dict[ir.Value, int], seen: Counter[Any]) -> None:
        held = constant_tensor(node) if node.op_type == "Constant" and not node.domain else None
        if held is not None:
            numbers[node.outputs[0]] = self._constant(held.numpy())
            return
        given: list[int | None] = []
        for value in node.inputs:
            if value is not None and value not in numbers:
                raise KeyError(value.name)
            given.append(None if value is None else numbers[value])
        while given and given[-1] is None:
            given.pop()
        if node.op_type == "Identity" and not node.domain and given[0] is not None:
            numbers[node.outputs[0]] = given[0]
            return
        small = self._evaluated(node, given)
        if small is not None:
            numbers[node.outputs[0]] = self._constant(small)
            return
        if not node.domain:
            given = self._positions(node, given)
        key: Any = (node.domain, node.op_type, tuple(given), _attributes(node, self.version), len(node.outputs))
        if node.domain == _OPAQUE:
            key = (*key, node.metadata_props.get("call", ""))
        if node.domain == _OPAQUE or node.op_type in _RANDOM:  # two draws are two values
            seen[key] += 1
            key = (*key, seen[key])
        for k, value in enumerate(node.outputs):
            numbers[value] = self._keyed((key, k))

    def _positions(self, node: ir.Node, given: list[int | None]) -> list[int | None]:
        """Return the inputs of a Split or Slice along fixed sizes in one form: pieces, and positions from the front."""
        shape = None if not given or given[0] is None else self.shapes.get(given[0])
        if shape is None:
            return given
        found = None
        if node.op_type == "Split" and len(given) == 1:
            found = _pieces(shape[attribute(node, "axis", 0)], attribute(node, "num_outputs", len(node.outputs)))
        elif node.op_type == "Slice" and len(given) >= 3:
            held = [None if k is None else self.held.get(k) for k in given[1:]]
            if all(k is None or a is not None for k, a in zip(given[1:], held, strict=True)):
                found = _taken(shape, *held)
        return given if found is None else [given[0], self._constant(found)]

    def _evaluated(self, node: ir.Node, given: list[int | None]) -> Array | None:
        """Return what a node computes from small constants and fixed sizes; None where that is not known."""
        if node.op_type in ("Shape", "Size") and not node.domain:
            shape = None if given[0] is None else self.shapes.get(given[0])
            chosen = () if shape is None else shape[slice(attribute(node, "start", 0), attribute(node, "end"))]
            if shape is None or None in chosen or (node.op_type == "Size" and None in shape):
                return None
            sizes = np.asarray(chosen, np.int64)
            return sizes if node.op_type == "Shape" else np.asarray(np.prod(np.asarray(shape, np.int64)), np.int64)
        arrays = [None if k is None else self.held.get(k) for k in given]
        if not arrays or any(k is not None and a is None for k, a in zip(given, arrays, strict=True)):
            return None
        return evaluate(node, arrays, None, self.version)

    def _constant(self, array: Any) -> int:
        """Return the number of these very bits, in this type and shape."""
        data = np.ascontiguousarray(array).reshape(np.shape(array))
        flat = data.reshape(-1).view(np.uint8)
        bucket = (data.dtype.name, data.shape, flat[:: max(1, len(flat) // 61)].tobytes())
        same = self.constants.setdefault(bucket, [])
        for other, number in same:
            if other.__array_interface__["data"][0] == flat.__array_interface__["data"][0] or np.array_equal(
                other, flat
            ):
                return number
        number = self._fresh()
        same.append((flat, number))
        self.shapes[number] = data.shape
        if data.size <= 1 << 12:
            self.held[number] = data
        return number

    def _keyed(self, key: Any) -> int:
        if key not in self.keys:
            self.keys[key] = self._fresh()
        return self.keys[key]

    def _fresh(self) -> int:
        self.count += 1
        return self.count


def _pieces(size: int | None, count: int) -> Array | None:
    """Return the sizes of equal pieces, of which the last may be smaller."""
    if size is None:
        return None
    whole = -(-size // count)
    return np.asarray([min(whole, size - k * whole) for k in range(count)], np.int64)


def _taken(
    shape: tuple[int | None, ...],
    starts: Array | None,
    ends: Array | None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array | None:
    """Return the positions that a Slice takes, axis by axis, as bytes of a constant; None where a size is open."""
    if starts is None or ends is None:
        return None
    axes = np.arange(len(starts)) if axes is None else axes % len(shape)
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    taken = []
    for axis, start, end, step in zip(axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True):
        size = shape[axis]
        if size is None:
            return None
        taken.append((axis, slice_positions(size, start, end, step).tolist()))
    return np.frombuffer(repr(sorted(taken)).encode(), np.uint8)


class _Explanation:
    """Finds, from two values that differ, the first place where they do."""

    def __init__(self, first: dict[ir.Value, int], second: dict[ir.Value, int], numbers: _Numbers) -> None:
        self.first, self.second, self.held, self.version = first, second, numbers.held, numbers.version

    def of(self, a: ir.Value, b: ir.Value) -> str:
        """Go from the outputs towards the inputs, each time to the first pair of inputs that differs."""
        while True:
            a, b = _behind_identities(a), _behind_identities(b)
            one, other = _producer(a), _producer(b)
            if one is None or other is None:
                return f"{self._said(a, True)} where its forward has {self._said(b, False)}"
            if (one.domain, one.op_type) != (other.domain, other.op_type):
                return _other_operator(one, other)
            if len(one.inputs) > len(other.inputs):
                extra = next((v for v in one.inputs[len(other.inputs) :] if v is not None), None)
                name = "" if extra is None else f" tensor {extra.name!r}"
                return f"{_node(one)} of the program has an input{name} for which its forward has no place"
            pairs = zip(one.inputs, other.inputs, strict=False)
            apart = next((pair for pair in pairs if self._differ(*pair)), None)
            p, q = apart or (None, None)
            if p is None or q is None:
                return _other_attribute(one, other, self.version)
            a, b = p, q

    def _differ(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        if a is None or b is None:
            return a is not b
        return self.first[a] != self.second[b]

    def _said(self, value: ir.Value, wanted: bool) -> str:
        node, number = _producer(value), (self.first if wanted else self.second)[value]
        held: Array | None = self.held.get(number) if node is not None else _held(value)
        small = f" = {held.tolist()}" if held is not None and held.size <= _SHOWN else ""
        if node is not None:
            what = _node(node)
        elif held is None:
            what = f"input {value.name!r}"
        else:
            what = f"tensor {value.name!r} of shape {list(held.shape)}"
        return f"{'the program has ' if wanted else ''}{what}{small}"


def _other_operator(one: ir.Node, other: ir.Node) -> str:
    name, by = _name(one), _name(other)
    if name != by:
        return f"{_node(one)} of the program is {_node(other)} in its forward"
    return f"its forward computes {name!r} by {other.op_type}, the program by {one.op_type}"


def _other_attribute(one: ir.Node, other: ir.Node, version: int) -> str:
    """Return the first attribute that two nodes of one operator and with the same inputs do not share."""
    wanted, found = dict(_attributes(one, version)), dict(_attributes(other, version))
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            return f"{_node(one)} has {_stated(one, name)} in the program, {_stated(other, name)} in its forward"
    return f"{_node(one)} of the program has other inputs or outputs in its forward"


def _stated(node: ir.Node, name: str) -> str:
    held = node.attributes.get(name)
    if held is None:
        return f"the default of {name}"
    if held.type == ir.AttributeType.FLOAT:
        return f"{name}={held.as_float():.6g}"
    plain = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRING)
    return f"{name}={held.value}" if held.type in plain else f"a {name} of its own"


def _behind_identities(value: ir.Value) -> ir.Value:
    while True:
        node = value.producer()
        before = node.inputs[0] if node is not None and node.op_type == "Identity" and not node.domain else None
        if before is None:
            return value
        value = before


def _producer(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    return None if node is None or (node.op_type == "Constant" and not node.domain) else node


def _held(value: ir.Value) -> Array | None:
    node = value.producer()
    tensor = value.const_value if node is None else constant_tensor(node)
    return None if tensor is None else np.asarray(tensor.numpy())


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or node.name or ""


def _node(node: ir.Node) -> str:
    return f"node {_name(node)!r} ({node.op_type})"


def _true_inputs(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.inputs if v.const_value is None]


def _declared(value: ir.Value) -> tuple[int | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def _opaque(model: ir.Model, numbers: dict[ir.Value, int]) -> Counter[Any]:
    return Counter(numbers[v] for node in model.graph if node.domain == _OPAQUE for v in node.outputs)


def _attributes(node: ir.Node, version: int) -> tuple[Any, ...]:
    held = dict(_defaults(node.op_type, node.domain, version))
    held.update({name: _plain(attr) for name, attr in node.attributes.items()})
    if node.op_type == "Split" and not node.domain:
        held.pop("num_outputs", None)  # the outputs are counted, and their sizes are an input
    return tuple(sorted(held.items(), key=lambda pair: pair[0]))


@cache
def _defaults(op_type: str, domain: str, version: int) -> tuple[tuple[str, Any], ...]:
    """Return the attributes that an operator has where a node does not say them."""
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return ()
    stated = ((k, a.default_value) for k, a in schema.attributes.items() if a.default_value.type)
    return tuple((k, _plain(ir.from_proto(proto))) for k, proto in stated)


def _plain(attr: Any) -> Any:
    """Return something that can be compared and hashed; a subgraph is equal to itself alone."""
    if attr.type == ir.AttributeType.TENSOR:
        array = np.asarray(attr.as_tensor().numpy())
        return array.dtype.name, array.shape, np.ascontiguousarray(array).tobytes()
    if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return object()
    if attr.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return np.asarray(attr.value, np.float32).tobytes()
    value = attr.value
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else value
