"""List the nodes that clean-up may remove: each returns an input unchanged, in every entry, shape and type.

This table is all that clean-up removes. Nothing is compared by a tolerance, and a condition that is not proven
(`GraphFacts`) does not hold. "Constant" means a parameter or a Constant node, not an overridable initializer.

| node | removed if |
|---|---|
| Identity | always |
| x + 0, 0 + x, x - 0 | the constant is one entry, exactly zero, and does not add axes; see below for the sign of zero |
| x · 1, 1 · x, x / 1 | the constant is one entry, exactly one, and does not add axes |
| Cast, CastLike | the type is the input's already |
| Dropout | its mask is not used, and it is not training: by version, by a constant, or because its ratio is zero |
| Expand | each entry of the target is 1 or the size that is there, and there are no new axes |
| Reshape | each entry of the target keeps its axis: the same size or symbol, 0 without allowzero, one -1 |
| Transpose | the permutation is 0, 1, 2, ... |
| Concat, Max, Min, Sum | of a single input |
| Split | into a single part, whose size, if it is given, is proven to be all there is |
| Slice | from 0 in steps of 1 to the end: the size, or 2^31 - 1, by which ONNX says "to the end" |
| Pad | all amounts are 0 |
| Flatten, Squeeze, Unsqueeze, Transpose | as Reshape, where the shape stays and the entries keep their order |
| SequenceAt | of a SequenceConstruct at a constant position: that element |

The sign of zero: x - 0 and x + (-0) return x bit for bit. x + 0 and x - (-0) turn -0 into 0. The two are equal, but a
division tells them apart: for floats, these are removed only if no division, power or unknown operator follows.

Why onnxscript's rules are not used: they compare with 0 and 1 by a tolerance, trust recorded shapes of inner values,
and skip a rounding step (Cast from double to half by way of float).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.passes.exact.cleanup.graph_facts import Dims, GraphFacts, permutation, slice_bounds
from cipm_ir.passes.exact.cleanup.reshapes import keeps_order

_Rule = Callable[[ir.Node, GraphFacts, int], "ir.Value | None"]
_TO_THE_END = 2**31 - 1
# Operators to which 0 and -0 are not the same: 1/0 is inf, 1/-0 is -inf.
_SIGN_OF_ZERO = {"Div", "Reciprocal", "Pow", "BitCast"}


def copied_input(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    """Return the value that the first output of a node always equals, None where there is none; see the table above."""
    if node.domain or any(a.is_ref() for a in node.attributes.values()):
        return None
    rule = _RULES.get(node.op_type)
    same = None if rule is None else rule(node, facts, version)
    if same is None and keeps_order(node, facts):
        shape = facts.shape(node.inputs[0])
        known = shape is not None and None not in shape
        same = node.inputs[0] if known and shape == facts.shape(node.outputs[0]) else None
    return same


def _first(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    return node.inputs[0]


def _neutral(constant: float, *, either_side: bool) -> _Rule:
    def rule(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
        if version < 7:  # broadcasting by attributes
            return None
        left, right = node.inputs
        for x, c in ((left, right), (right, left))[: 2 if either_side else 1]:
            if x is not None and c is not None and _is_neutral(node, x, c, constant, facts):
                return x
        return None

    return rule


def _is_neutral(node: ir.Node, x: ir.Value, c: ir.Value, constant: float, facts: GraphFacts) -> bool:
    tensor = parameter_tensor(c)
    if tensor is None or tensor.size != 1 or not (tensor.dtype.is_floating_point() or tensor.dtype.is_integer()):
        return False
    entry = np.asarray(tensor.numpy()).reshape(())
    if entry != constant or not _keeps_shape(facts.shape(x), tuple(tensor.shape.numpy())):
        return False
    if constant or not tensor.dtype.is_floating_point():
        return True
    exact = bool(np.signbit(entry)) == (node.op_type == "Add")
    return exact or not _meets_division(node.outputs[0])


def _keeps_shape(shape: Dims | None, other: Dims) -> bool:
    """Return whether broadcasting with another shape leaves a shape as it is."""
    if shape is None:
        return not other
    tail = shape[len(shape) - len(other) :] if len(other) <= len(shape) else None
    return tail is not None and all(d == 1 or (d is not None and d == s) for s, d in zip(tail, other, strict=True))


def _meets_division(value: ir.Value) -> bool:
    """Return whether an operator that tells 0 from -0, or an unknown one.

    Computes with a value or with what comes from it.
    """
    waiting, seen = [value], {value}
    while waiting:
        for use in waiting.pop().uses():
            node = use.node
            to_text = node.op_type == "Cast" and attribute(node, "to") == int(ir.DataType.STRING)
            to_text |= node.op_type == "CastLike"  # of a type that may be text
            if node.domain or node.op_type in _SIGN_OF_ZERO or to_text or any(subgraphs(node)):
                return True
            if node.graph is not value.graph:
                return True
            new = [v for v in node.outputs if v not in seen]
            seen.update(new)
            waiting.extend(new)
    return False


def _cast(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    dtype = facts.dtype(node.inputs[0])
    return node.inputs[0] if dtype is not None and attribute(node, "to") == int(dtype) else None


def _cast_like(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    dtype = facts.dtype(node.inputs[0])
    return node.inputs[0] if dtype is not None and facts.dtype(node.inputs[1]) == dtype else None


def _dropout(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    if version < 12:
        inference = version >= 7 or bool(attribute(node, "is_test", 0))
        return node.inputs[0] if inference else None
    ratio, training = [*node.inputs[1:], None, None][:2]
    never = training is None or _is_scalar(training, 0)
    return node.inputs[0] if never or _is_scalar(ratio, 0) else None


def _is_scalar(value: ir.Value | None, number: float) -> bool:
    tensor = parameter_tensor(value)
    return tensor is not None and tensor.size == 1 and bool(np.asarray(tensor.numpy()).reshape(()) == number)


def _expand(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    target = facts.entries(node.inputs[1])
    return node.inputs[0] if target is not None and _keeps_shape(facts.shape(node.inputs[0]), tuple(target)) else None


def _reshape(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    if len(node.inputs) < 2:
        return None
    shape, target = facts.shape(node.inputs[0]), facts.entries(node.inputs[1])
    if shape is None or target is None or len(shape) != len(target):
        return None
    copies = not attribute(node, "allowzero", 0)
    same = [d is not None and (d == s or (d == 0 and copies)) for s, d in zip(shape, target, strict=True)]
    if target.count(-1) == 1 and 0 not in shape:
        same[target.index(-1)] = True
    return node.inputs[0] if all(same) else None


def _transpose(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    perm = permutation(node, facts)
    return node.inputs[0] if perm is not None and perm == list(range(len(perm))) else None


def _single(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _split(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    if len(node.outputs) != 1:
        return None
    if version == 1 or version >= 13:
        given = node.inputs[1] if len(node.inputs) > 1 else None
        tensor = parameter_tensor(given)
        sizes = None if tensor is None else np.asarray(tensor.numpy()).reshape(-1).tolist()
        if given is not None and sizes is None:
            return None
    if version < 13 and "split" in node.attributes:
        sizes = list(attribute(node, "split"))
    elif version < 13 and version != 1:
        sizes = None
    if sizes is None:
        return node.inputs[0]
    shape, axis = facts.shape(node.inputs[0]), int(attribute(node, "axis", 0))
    return node.inputs[0] if shape is not None and sizes == [shape[axis]] else None


def _slice(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    bounds, shape = slice_bounds(node, version), facts.shape(node.inputs[0])
    if bounds is None:
        return None
    for start, end, axis, step in zip(*bounds, strict=True):
        size = None if shape is None else shape[axis]
        to_the_end = end >= _TO_THE_END or (isinstance(size, int) and end >= size)
        if start != 0 or not to_the_end or step != 1:
            return None
    return node.inputs[0]


def _pad(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    if version < 11:
        amounts = attribute(node, "pads", attribute(node, "paddings"))
    else:
        tensor = parameter_tensor(node.inputs[1])
        amounts = None if tensor is None else np.asarray(tensor.numpy()).reshape(-1).tolist()
    return node.inputs[0] if amounts is not None and not any(amounts) else None


def _sequence_at(node: ir.Node, facts: GraphFacts, version: int) -> ir.Value | None:
    sequence, tensor = node.inputs[0], parameter_tensor(node.inputs[1])
    maker = None if sequence is None else sequence.producer()
    if maker is None or maker.op_type != "SequenceConstruct" or maker.domain or tensor is None:
        return None
    position = int(np.asarray(tensor.numpy()).reshape(()))
    return maker.inputs[position] if -len(maker.inputs) <= position < len(maker.inputs) else None


_RULES: dict[str, _Rule] = {
    "Identity": _first,
    "Add": _neutral(0, either_side=True),
    "Sub": _neutral(0, either_side=False),
    "Mul": _neutral(1, either_side=True),
    "Div": _neutral(1, either_side=False),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Dropout": _dropout,
    "Expand": _expand,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": _single,
    "Max": _single,
    "Min": _single,
    "Sum": _single,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "SequenceAt": _sequence_at,
}
