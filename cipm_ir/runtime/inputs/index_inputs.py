"""What an integer input of a model is for: it indexes a table of known size, or it is a mask."""

from __future__ import annotations

import onnx_ir as ir

# Operators that hand indices on unchanged from their first input, and those that do so from any.
_PASS_FIRST = {"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Slice"}
_PASS_FIRST |= {"Expand", "Split", "Tile", "Gather", "Clip"}
_PASS_ANY = {"Concat", "Where", "Min", "Max"}
# What a mask goes through before it meets the attention scores.
_MASKING = {"Cast", "Unsqueeze", "Equal", "Where", "Not", "And", "Or", "Greater", "Less"}
_MASKING |= {
    "GreaterOrEqual",
    "LessOrEqual",
    "Sub",
    "Mul",
    "Expand",
    "ReduceSum",
    "Shape",
    "Identity",
    "Slice",
    "Reshape",
}


def table_size(value: ir.Value) -> int | None:
    """Return the smallest axis that this integer value indexes downstream, None where none of known size was found."""
    found: list[int] = []
    seen: set[int] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        for node, index in current.uses():
            if index == 1 and node.op_type in ("Gather", "GatherElements"):
                axis = node.attributes.get_int("axis", 0)
                _note(found, node.inputs[0], axis)
            elif index == 0 and node.op_type == "OneHot":
                depth = node.inputs[1].const_value if node.inputs[1] is not None else None
                if depth is not None:
                    found.append(int(depth.numpy().reshape(-1)[0]))
            elif node.op_type in (_PASS_FIRST | _PASS_ANY if index == 0 else _PASS_ANY) and id(node) not in seen:
                seen.add(id(node))
                stack.extend(node.outputs)
    return min(found, default=None)


def _note(found: list[int], table: ir.Value | None, axis: int | None) -> None:
    shape = table.shape if table is not None else None
    if shape is not None and axis is not None and -len(shape) <= axis < len(shape):
        size = shape[axis]
        if isinstance(size, int):
            found.append(size)


def looks_like_mask(value: ir.Value) -> bool:
    """Return whether an input of two axes or more is consumed as a mask is, and by nothing else."""
    consumers = {node.op_type for node, _ in value.uses()}
    return value.shape is not None and len(value.shape) >= 2 and bool(consumers) and consumers <= _MASKING
