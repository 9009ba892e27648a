"""Nodes in a row that clean-up may write as fewer, each with the condition that makes it exact.

| pair | becomes | where |
|---|---|---|
| Transpose, Transpose | one Transpose, or nothing | both permutations are known |
| two that keep the order of all entries, see `reshapes` | one Reshape | the sizes are proven but for one |
| Reshape that merges axes, Transpose, Reshape | Transpose, Reshape | see `reshapes.turn_before_merging` |
| a node that only a Shape consumes | the Shape of its input | all entries that are taken of it are proven the same |
| Pad, Conv | Conv | zeros, constant amounts that are not negative, of the axes that the Conv slides over; see below |
| Concat of Concats | one Concat | along the same axis |
| Unsqueeze, Unsqueeze | one Unsqueeze | the axes are constant, not negative unless the rank is known (opset 13 on) |
| Gather, Unsqueeze | Gather | a single constant index, and the axis that it took away |
| Slice, Slice | one Slice | constants, of different axes |
| Cast, Cast | the second | the first loses nothing, and the second rounds or wraps the same way from either type |
| ConcatFromSequence of a SequenceConstruct | Concat | along an existing axis |

The value between may have no other consumer, unless the pair becomes nothing, or all consumers are a Conv that pads
itself. Pairs with a Shape come last, after all other pairs are rewritten.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.passes.exact.cleanup.graph_facts import GraphFacts, permutation, slice_bounds
from cipm_ir.passes.exact.cleanup.replace_values import constant_before
from cipm_ir.passes.exact.cleanup.reshapes import join_reshapes, turn_before_merging


def join_pair(node: ir.Node, facts: GraphFacts, version: int, name: Callable[[str], str]) -> ir.Value | None:
    """Rewrite a node in place to take the input of the node before it; see the table above.

    Args:
        node: the second of the pair.
        facts: about the values of the model.
        version: of the operator set.
        name: gives an unused name for a new value.

    Returns:
        What the pair always equals, where that is a value which exists; the node is not changed then.
    """
    if node.op_type == "Concat" and version >= 4:
        _concats(node)
    value = node.inputs[0] if node.inputs else None
    before = None if value is None else value.producer()
    if value is None or before is None or before.graph is not node.graph:
        return None
    if before.domain or node.domain:
        return None
    if any(a.is_ref() for n in (before, node) for a in n.attributes.values()):
        return None
    pair = (before.op_type, node.op_type)
    if pair == ("Transpose", "Transpose"):
        return _transposes(before, node, facts)
    reshaped = join_reshapes(before, node, facts, version, name)
    if reshaped is not None or node.inputs[0] is not value:
        return reshaped
    turn_before_merging(node, facts, version, name)
    turn = node.inputs[0].producer() if node.inputs[0] is not value and node.inputs[0] is not None else None
    earlier = None if turn is None or turn.inputs[0] is None else turn.inputs[0].producer()
    if turn is not None and earlier is not None and earlier.op_type == "Transpose" and earlier.graph is turn.graph:
        same = _transposes(earlier, turn, facts)
        if same is not None:
            node.replace_input_with(0, same)
    if pair == ("Gather", "Unsqueeze"):
        return _gathered(before, node, version, name)
    if value.is_graph_output():
        return None
    if pair == ("Pad", "Conv") and all(_can_pad(use.node, use.idx, before) for use in value.uses()):
        _padded(before, node, version)
    if len(value.uses()) != 1:
        return None
    if pair == ("Unsqueeze", "Unsqueeze") and version >= 13:
        _unsqueezes(before, node, facts, name)
    elif pair == ("Slice", "Slice"):
        _slices(before, node, facts, version, name)
    elif pair == ("Cast", "Cast") and _same_rounding(before, node, facts):
        node.replace_input_with(0, before.inputs[0])
    elif pair == ("SequenceConstruct", "ConcatFromSequence") and not attribute(node, "new_axis", 0):
        return _concatenated(before, node, name("joined"))
    return None


def shape_of_input(node: ir.Node, facts: GraphFacts) -> None:
    """Let a Shape take the sizes of what its input is computed from, where nothing else needs that input."""
    if node.op_type != "Shape" or node.domain:
        return
    value = node.inputs[0]
    before = None if value is None else value.producer()
    if value is None or before is None or before.graph is not node.graph or node.attributes:
        return
    taken, shape = _taken(node.outputs[0]), facts.shape(value)
    if taken is None or shape is None or len(value.uses()) != 1 or value.is_graph_output():
        return
    for source in before.inputs:
        other = facts.shape(source)
        if other is None or any(k >= min(len(shape), len(other)) or shape[k] is None for k in taken):
            continue
        if all(shape[k] == other[k] for k in taken):
            node.replace_input_with(0, source)
            return


def _taken(sizes: ir.Value) -> set[int] | None:
    """Return the entries of a vector of sizes that are used, where each use is a Gather at constant places."""
    found: set[int] = set()
    for use in sizes.uses():
        node = use.node
        index = parameter_tensor(node.inputs[1]) if node.op_type == "Gather" and use.idx == 0 else None
        if index is None or node.domain or not index.size:
            return None
        found.update(np.asarray(index.numpy()).reshape(-1).tolist())
    return found if found and not sizes.is_graph_output() and min(found) >= 0 else None


def _transposes(before: ir.Node, node: ir.Node, facts: GraphFacts) -> ir.Value | None:
    first, second = permutation(before, facts), permutation(node, facts)
    if first is None or second is None or len(first) != len(second):
        return None
    joined = [first[k] for k in second]
    if joined == list(range(len(joined))):
        return before.inputs[0]
    between = before.outputs[0]
    if len(between.uses()) == 1 and not between.is_graph_output():
        node.attributes["perm"] = ir.AttrInt64s("perm", joined)
        node.replace_input_with(0, before.inputs[0])
    return None


def _unsqueezes(before: ir.Node, node: ir.Node, facts: GraphFacts, name: Callable[[str], str]) -> None:
    inner, outer = (parameter_tensor(n.inputs[1]) for n in (before, node))
    if inner is None or outer is None:
        return
    first, second = np.array(inner.numpy()).reshape(-1), np.array(outer.numpy()).reshape(-1)
    shape = facts.shape(before.inputs[0])
    if shape is not None:
        first = first % (len(shape) + len(first))
        second = second % (len(shape) + len(first) + len(second))
    if (first < 0).any() or (second < 0).any():
        return
    old = np.setdiff1d(np.arange(max(*first, *second) + len(first) + len(second) + 1), second)
    axes = np.sort(np.concatenate([second, old[first]])).astype(np.int64)
    node.replace_input_with(1, constant_before(node, axes, name("axes")))
    node.replace_input_with(0, before.inputs[0])


def _can_pad(node: ir.Node, index: int, pad: ir.Node) -> bool:
    """Return whether what takes the result of a Pad at some input is a Conv of its graph that could do the padding."""
    plain = node.op_type == "Conv" and not node.domain and index == 0 and node.graph is pad.graph
    explicit = not any(a.is_ref() for a in node.attributes.values()) and attribute(node, "auto_pad", "NOTSET")
    return plain and explicit == "NOTSET"


def _padded(before: ir.Node, node: ir.Node, version: int) -> None:
    """Let a Conv, which pads by zeros too, do what a Pad does before it."""
    if attribute(before, "mode", "constant") != "constant":
        return
    if version < 11:
        amounts, fill = attribute(before, "pads"), attribute(before, "value", 0.0)
    else:
        given = [*before.inputs[1:], None, None, None][:3]
        tensors = [parameter_tensor(value) for value in given]
        if any(tensor is None and value is not None for tensor, value in zip(tensors, given, strict=True)):
            return
        if tensors[0] is None or tensors[2] is not None:  # amounts of some axes only
            return
        amounts = np.asarray(tensors[0].numpy()).reshape(-1).tolist()
        fill = 0.0 if tensors[1] is None else np.asarray(tensors[1].numpy()).reshape(-1)[0]
    rank = len(amounts or ()) // 2
    if rank < 3 or fill != 0 or min(amounts) < 0 or any(amounts[k] or amounts[rank + k] for k in (0, 1)):
        return
    own = list(attribute(node, "pads") or [0] * (2 * (rank - 2)))
    node.attributes["pads"] = ir.AttrInt64s(
        "pads", [a + b for a, b in zip(own, [*amounts[2:rank], *amounts[rank + 2 :]], strict=True)]
    )
    node.replace_input_with(0, before.inputs[0])


def _slices(before: ir.Node, node: ir.Node, facts: GraphFacts, version: int, name: Callable[[str], str]) -> None:
    first, second = (slice_bounds(n, version) for n in (before, node))
    if first is None or second is None:
        return
    shape = facts.shape(before.inputs[0])
    axes = [*first[2], *second[2]]
    if shape is not None:
        axes = [axis % len(shape) for axis in axes]
    if len(set(axes)) != len(axes) or (min(axes) < 0 <= max(axes)):
        return
    starts, ends, _, steps = ([*a, *b] for a, b in zip(first, second, strict=True))
    node.replace_input_with(0, before.inputs[0])
    if version < 10:
        for key, numbers in (("starts", starts), ("ends", ends), ("axes", axes)):
            node.attributes[key] = ir.AttrInt64s(key, numbers)
        return
    node.resize_inputs(5)
    lists = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    for index, (key, numbers) in enumerate(lists.items(), 1):
        node.replace_input_with(index, constant_before(node, np.array(numbers, np.int64), name(key)))


def _concats(node: ir.Node) -> None:
    """Take the inputs of a Concat along the same axis, which nothing else consumes, instead of its result."""
    made: list[ir.Value | None] = []
    for value in node.inputs:
        made.extend(value.producer().inputs if _joins(value, node) else [value])  # type: ignore[union-attr]
    if len(made) > len(node.inputs):
        node.resize_inputs(len(made))
        for index, value in enumerate(made):
            node.replace_input_with(index, value)


def _joins(value: ir.Value | None, node: ir.Node) -> bool:
    before = None if value is None else value.producer()
    if value is None or before is None or before.graph is not node.graph or len(value.uses()) != 1:
        return False
    equal = (before.op_type, before.domain, attribute(before, "axis")) == (
        "Concat",
        node.domain,
        attribute(node, "axis"),
    )
    return equal and not node.domain and not value.is_graph_output()


def _gathered(before: ir.Node, node: ir.Node, version: int, name: Callable[[str], str]) -> ir.Value | None:
    """Return one entry along an axis, then that axis again: a Gather with a list of one index."""
    indices, axis = parameter_tensor(before.inputs[1]), int(attribute(before, "axis", 0))
    if version < 13:
        axes = list(attribute(node, "axes"))
    else:
        tensor = parameter_tensor(node.inputs[1])
        axes = [] if tensor is None else np.asarray(tensor.numpy()).reshape(-1).tolist()
    if indices is None or len(indices.shape) or axis < 0 or axes != [axis] or node.graph is None:
        return None
    one = constant_before(node, np.asarray(indices.numpy()).reshape(1), name("index"))
    out = ir.Value(name=name("gathered"), type=node.outputs[0].type, shape=node.outputs[0].shape)
    attributes = [ir.AttrInt64("axis", axis)]
    node.graph.insert_before(node, ir.Node("", "Gather", [before.inputs[0], one], attributes, outputs=[out]))
    return out


def _concatenated(before: ir.Node, node: ir.Node, name: str) -> ir.Value:
    assert node.graph is not None
    out = ir.Value(name=name, type=node.outputs[0].type, shape=node.outputs[0].shape)
    attributes = [ir.AttrInt64("axis", attribute(node, "axis"))]
    node.graph.insert_before(node, ir.Node("", "Concat", list(before.inputs), attributes, outputs=[out]))
    return out


# Bits of precision, and how far the exponent goes down and up: a type holds another that has no more of any of them.
_FLOATS = {
    ir.DataType.FLOAT16: (11, 24, 16),
    ir.DataType.BFLOAT16: (8, 133, 128),
    ir.DataType.FLOAT: (24, 149, 128),
    ir.DataType.DOUBLE: (53, 1074, 1024),
}
_INTEGERS = {ir.DataType[f"{kind}{bits}"]: (kind, bits) for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)}


def _same_rounding(before: ir.Node, node: ir.Node, facts: GraphFacts) -> bool:
    source, between, target = facts.dtype(before.inputs[0]), ir.DataType(attribute(before, "to")), attribute(node, "to")
    target = ir.DataType(target)
    if source is None or not _holds(between, source):
        return False
    if target in _FLOATS:
        return True  # one rounding, of the same number
    if target in _INTEGERS and between in _INTEGERS:
        return True  # both wrap the same number
    # From a float: what does not fit has no defined result, so all that the source holds must fit.
    return target in _INTEGERS and source in (*_INTEGERS, ir.DataType.BOOL) and _holds(target, source)


def _holds(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Return whether each number of one type is a number of the other."""
    if narrow == ir.DataType.BOOL:
        return wide in _FLOATS or wide in _INTEGERS
    if narrow in _FLOATS and wide in _FLOATS:
        return all(a >= b for a, b in zip(_FLOATS[wide], _FLOATS[narrow], strict=True))
    if narrow in _INTEGERS and wide in _FLOATS:
        kind, bits = _INTEGERS[narrow]
        return bits - (kind == "INT") <= _FLOATS[wide][0]
    if narrow in _INTEGERS and wide in _INTEGERS:
        (kind, bits), (other, more) = _INTEGERS[narrow], _INTEGERS[wide]
        return (kind == other and more >= bits) or (kind == "UINT" and other == "INT" and more > bits)
    return False
