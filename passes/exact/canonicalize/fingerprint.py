"""A hash of a model that is the same on its whole orbit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import constant_tensor
from cipm_ir.ir.labels import Array
from cipm_ir.ir.opsets import standard_name
from cipm_ir.ir.parameters import free_inputs, parameter_tensor
from cipm_ir.passes.exact.canonicalize.canonicalize import canonical_elements
from cipm_ir.passes.exact.canonicalize.members import fill_of
from cipm_ir.symmetry.program import Program

_LISTS = (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS)
_SLICE = 1 << 22


def fingerprint_program(program: Program) -> str:
    """Return a hash (BLAKE2b, 128 bits, hexadecimal) of the canonical form: structure and weights, not names.

    Programs that differ by permutations, signs and power-of-two scales of hidden units agree, and equal hashes mean
    equal outputs. A changed bit of a weight, operator, attribute, type, shape, opset or connection makes another hash.
    The order of inputs, outputs and nodes counts; their names, and all other metadata, do not. A weight counts where it
    is used, so that it does not matter whether equal tensors are stored once or twice; an initializer that is also a
    graph input (IR 4 and later) is an input with a default: both count, that it can be overridden and its value.
    """
    elements = canonical_elements(program)
    canonical = program.act(elements) if elements else program
    filled = {leaf.name: leaf.shape for leaf in canonical.analysis.walk.leaves if leaf.filled}
    return _Hasher(filled).model(canonical.model)


class _Hasher:
    """Hashes graphs with values numbered in order of appearance; each tensor is evaluated once and not kept.

    ``filled``: shapes of the ConstantOfShape outputs that are parameters; they count by content, like any other.
    """

    def __init__(self, filled: dict[str, tuple[int, ...]]) -> None:
        self._filled = filled
        self._number: dict[ir.Value, int] = {}
        self._tensors: dict[int, tuple[Any, bytes]] = {}
        self._dims: dict[str, int] = {}

    def model(self, model: ir.Model) -> str:
        digest = hashlib.blake2b(digest_size=16)
        opsets = {standard_name(k): v for k, v in model.opset_imports.items()}
        _feed(digest, "opsets", *(f"{k}:{v}" for k, v in sorted(opsets.items())))
        digest.update(self.graph(model.graph))
        return digest.hexdigest()

    def graph(self, graph: ir.Graph) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for value in free_inputs(graph):
            self._number[value] = len(self._number)
            _feed(digest, "input", self._type(value))
            if value.const_value is not None:  # what it is unless the caller replaces it
                _feed(digest, "default", self._tensor(value.const_value))
        for node in graph:
            if not self._is_constant(node):
                self._node(digest, node)
        for value in graph.outputs:
            _feed(digest, "output", self._source(value), self._type(value))
        return digest.digest()

    def _node(self, digest: Any, node: ir.Node) -> None:
        _feed(digest, "node", node.domain, node.op_type, node.overload, len(node.inputs), len(node.outputs))
        _feed(
            digest, *(int(bool(value.name)) for value in node.outputs)
        )  # BatchNormalization trains where asked for more
        for value in node.inputs:
            _feed(digest, self._source(value))
        for name, attribute in sorted(node.attributes.items()):
            _feed(digest, name, attribute.type.name, *self._attribute(attribute))
        for value in node.outputs:
            self._number[value] = len(self._number)

    def _attribute(self, attribute: ir.Attr) -> Iterable[bytes | str]:
        if attribute.is_ref():
            return [f"ref {attribute.ref_attr_name}"]
        if attribute.type == ir.AttributeType.GRAPH:
            return [self.graph(attribute.as_graph())]
        if attribute.type == ir.AttributeType.GRAPHS:
            return [self.graph(g) for g in attribute.as_graphs()]
        if attribute.type == ir.AttributeType.TENSOR:
            return [self._tensor(attribute.as_tensor())]
        if attribute.type == ir.AttributeType.TENSORS:
            return [self._tensor(t) for t in attribute.as_tensors()]
        if attribute.type in _LISTS:
            return [repr([x.item() if isinstance(x, np.generic) else x for x in attribute.value])]
        return [repr(attribute.value)]

    def _source(self, value: ir.Value | None) -> bytes | str:
        """Return what a value is: a number, or the content of a constant."""
        if value is None:
            return "nothing"
        if value in self._number:
            return f"value {self._number[value]}"
        producer = value.producer()
        shape = self._filled.get(value.name or "")
        if producer is not None and shape is not None and producer.op_type == "ConstantOfShape":
            fill = fill_of(producer)
            return _content(fill.dtype, shape, np.broadcast_to(fill.numpy().reshape(()), shape))
        tensor = parameter_tensor(value)
        if tensor is not None:
            return self._tensor(tensor)
        if producer is None:
            raise ValueError(f"value {value.name} is used before it is made")
        raise ValueError(f"value {value.name} is used before {producer.op_type} makes it")

    def _tensor(self, tensor: ir.TensorProtocol) -> bytes:
        known = self._tensors.get(id(tensor))
        if known is not None:
            return known[1]
        shape = tuple(int(d) for d in tensor.shape)  # type: ignore[arg-type]
        found = _content(tensor.dtype, shape, np.asarray(tensor.numpy()))
        self._tensors[id(tensor)] = tensor, found  # holding the tensor keeps its id its own
        return found

    def _is_constant(self, node: ir.Node) -> bool:
        if node.domain:
            return False
        filled = node.op_type == "ConstantOfShape" and node.outputs[0].name in self._filled
        return filled or (node.op_type == "Constant" and constant_tensor(node) is not None)

    def _type(self, value: ir.Value) -> str:
        dims = []
        for dim in value.shape if value.shape is not None else ():
            if isinstance(dim, int):
                dims.append(str(dim))
            elif dim.value is None:
                dims.append("?")
            else:  # a symbol is a name: only where it is repeated matters
                dims.append(f"d{self._dims.setdefault(dim.value, len(self._dims))}")
        ranked = "unranked" if value.shape is None else ",".join(dims)
        return f"{value.type} [{ranked}]"


def _content(dtype: ir.DataType, shape: tuple[int, ...], array: Array) -> bytes:
    """Hash of type, shape and entries, little endian, a slice of axis 0 at a time."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, dtype.name, *shape)
    if dtype == ir.DataType.STRING:
        _feed(digest, *(s if isinstance(s, bytes) else str(s) for s in array.ravel()))
        return digest.digest()
    rows = array.reshape(1, -1) if array.ndim < 2 else array
    step = max(1, _SLICE // max(1, rows[:1].nbytes))
    for lo in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[lo : lo + step])
        if part.dtype.byteorder == ">":
            part = part.astype(part.dtype.newbyteorder("<"))
        digest.update(part.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _feed(digest: Any, *parts: bytes | str | int) -> None:
    """Add parts with their lengths, so that no two lists of parts look alike."""
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
