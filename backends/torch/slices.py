"""Which torch nodes a change of the IR touches: each node's slice of the IR, before and after, compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.capture import Capture
from cipm_ir.ir.constants import constant_tensor

# Attributes that the module which computes the node holds too, so that it can take over the new value.
HELD = {
    ("Conv", "group"): "groups",
    ("ConvTranspose", "group"): "groups",
    ("GroupNormalization", "num_groups"): "num_groups",
    ("LSTM", "hidden_size"): "hidden_size",
    ("GRU", "hidden_size"): "hidden_size",
    ("RNN", "hidden_size"): "hidden_size",
}


@dataclass
class Difference:
    """What differs in the slice of one torch node.

    Attributes:
        same: nothing that the node itself must know.
        held: attributes that differ and that a module holds, with the new value.
        literals: (old, new) of every integer that differs.
    """

    same: bool = True
    held: dict[str, Any] = field(default_factory=dict)
    literals: list[tuple[int, int]] = field(default_factory=list)


class Slices:
    """Compares the slices of torch nodes in the IR model as captured and as it is now."""

    def __init__(self, capture: Capture, model: ir.Model) -> None:
        self.definer = {name: node for node, made in capture.results.items() for name in made.own}
        self.parameters = set(capture.parameters.values())
        self.before, self.after = _by_name(capture.model), _by_name(model)

    def difference(self, names: Iterable[str]) -> Difference:
        """Of the node that computes the values with these names."""
        found = Difference()
        live = [name for name in names if name in self.before]  # what nothing reads was not captured
        if not any(name in self.after for name in live):
            return found  # nothing in the IR reads it any more: whoever needs it in torch gets it as it was
        for name in live:
            new = self.after.get(name)
            if new is None:
                found.same = False
            else:
                self._compare(self.before[name], new, found)
        return found

    def boundary(self, names: Iterable[str]) -> set[str]:
        """Return names of the values of other torch nodes that the values with these names are now computed from."""
        found: set[str] = set()
        pending = [self.after[n] for n in names if n in self.after]
        roots, seen = {id(v) for v in pending}, set()
        while pending:
            value = pending.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if value.name in self.definer and id(value) not in roots:
                found.add(value.name)
                continue
            producer = value.producer()
            if producer is not None:
                pending.extend(v for v in producer.inputs if v is not None)
        return found

    def _compare(self, old: ir.Value, new: ir.Value, found: Difference) -> None:
        pending: list[tuple[ir.Value | None, ir.Value | None]] = [(old, new)]
        roots = (old, new)
        seen: set[tuple[int, int]] = set()
        while pending:
            a, b = pending.pop()
            if a is None or b is None:
                found.same &= a is b
                continue
            if (id(a), id(b)) in seen:
                continue
            seen.add((id(a), id(b)))
            inner = not (a is roots[0] and b is roots[1])
            if inner and (a.name in self.definer or b.name in self.definer):
                found.same &= a.name == b.name
                continue
            first, second = a.producer(), b.producer()
            if first is None or second is None or first.op_type == "Constant" or second.op_type == "Constant":
                self._compare_constants(a, b, found)
                continue
            self._compare_nodes(first, second, found)
            if len(first.inputs) != len(second.inputs) or a.index() != b.index():
                found.same = False
            else:
                pending.extend(zip(first.inputs, second.inputs, strict=True))

    def _compare_constants(self, a: ir.Value, b: ir.Value, found: Difference) -> None:
        if a.name in self.parameters or b.name in self.parameters:
            found.same &= a.name == b.name
            return
        x, y = _constant(a), _constant(b)
        if x is None or y is None:
            found.same &= a.name == b.name and x is y
            return
        if x.shape != y.shape or x.dtype != y.dtype or not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
            found.same = False
            if x.shape == y.shape and x.dtype.kind in "iu" and x.size <= 16:
                pairs = zip(x.ravel().tolist(), y.ravel().tolist(), strict=True)
                found.literals.extend((p, q) for p, q in pairs if p != q)

    def _compare_nodes(self, a: ir.Node, b: ir.Node, found: Difference) -> None:
        if (a.domain, a.op_type) != (b.domain, b.op_type):
            found.same = False
            return
        for name in {*a.attributes, *b.attributes}:
            x, y = (n.attributes.get(name) for n in (a, b))
            old, new = (None if v is None else _plain(v) for v in (x, y))
            if _equal(old, new):
                continue
            if isinstance(old, int) and isinstance(new, int):
                found.literals.append((old, new))
            if (a.op_type, name) in HELD:
                found.held[HELD[a.op_type, name]] = new
            else:
                found.same = False


def _by_name(model: ir.Model) -> Mapping[str, ir.Value]:
    values = {v.name or "": v for v in model.graph.inputs}
    for node in model.graph:
        values.update({v.name or "": v for v in node.outputs})
    return values


def _constant(value: ir.Value) -> np.ndarray | None:
    producer = value.producer()
    tensor = value.const_value if producer is None else constant_tensor(producer)
    return None if tensor is None else np.asarray(tensor.numpy())


def _plain(attribute: ir.Attr) -> Any:
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().numpy()
    return attribute.value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return list(a) == list(b)
    return bool(a == b)
