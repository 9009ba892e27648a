"""Values in front of the last activations of a model, where a comparison sees what a saturated output hides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.bodies import bodies

Array: TypeAlias = npt.NDArray[Any]

# Different inputs give different outputs, if only in exact arithmetic, so that equal programs agree in front of them.
_INJECTIVE = {"Sigmoid", "Tanh", "Softsign", "Softplus", "Erf", "Exp", "Atan", "Log", "Selu", "Elu", "Celu"}
_SOFTMAX = {"Softmax", "LogSoftmax"}
# Several inputs give the same output: what stands in front is compared only where the same operator made it.
_LOSSY = {"Clip", "HardSigmoid", "Relu", "ThresholdedRelu", "ArgMax", "ArgMin", "TopK", "Hardmax", "Sign", "Round"}
_LOSSY |= {"Floor", "Ceil", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"}
# Their kernels subtract numbers of size 1, so that small results are not better than those.
_BOUNDED = {"Sigmoid", "Tanh", "Erf", "Softsign", "HardSigmoid", "Softmax", "LSTM", "GRU", "RNN"}
_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Slice", "Split", "Gather"}
_COPIES = {"Identity", "Dropout"}
_MOST = 16


@dataclass(frozen=True)
class Ending:
    """A value in front of the last activations of an output.

    Attributes:
        name: the output and the operators between, the same in two models with the same endings.
        value: its name in the graph.
        maker: the operator that made it.
        lossy: some operator between makes different values equal.
        softmax: the first axis of the softmax behind it, and whether only that axis; None without one.
    """

    name: str
    value: str
    maker: str
    lossy: bool
    softmax: tuple[int, bool] | None

    def shown(self, array: Array) -> Array:
        """Return the part of the value that the output depends on: softmax forgets a common shift."""
        if self.softmax is None or not array.ndim:
            return array
        axis, alone = self.softmax[0] % array.ndim, self.softmax[1]
        axes = axis if alone else tuple(range(axis, array.ndim))
        largest = np.max(array, axis=axes, keepdims=True, initial=-np.inf)
        return np.asarray(array - np.where(np.isfinite(largest), largest, 0).astype(array.dtype))


def common_endings(a: Sequence[Ending], b: Sequence[Ending]) -> list[tuple[Ending, Ending]]:
    """Return the endings that two models share and in which equal programs must agree."""
    others = {ending.name: ending for ending in b}
    pairs = [(one, others[one.name]) for one in a if one.name in others]
    return [(x, y) for x, y in pairs if not x.lossy or (x.maker == y.maker and x.maker not in _LOSSY)]


def endings(model: ir.Model, names: Sequence[str] | None = None) -> list[Ending]:
    """Return the values in front of each activation at the end of a model, the last activation first.

    Args:
        model: whose outputs to look behind.
        names: what to call its outputs; their own names by default.
    """
    names = names or [output.name or "" for output in model.graph.outputs]
    outputs = zip(model.graph.outputs, names, strict=True)
    return list(
        itertools.islice((ending for output, name in outputs for ending in _before(model, output, name)), _MOST)
    )


def softmax_units(found: Sequence[Ending]) -> dict[str, float]:
    """Return 1 for each value in front of a softmax, which resolves differences of its inputs on that scale."""
    return {ending.name: 1.0 for ending in found if ending.softmax is not None}


def output_units(model: ir.Model) -> dict[str, float]:
    """Return 1 for each output that a sigmoid or the like makes: the size of the numbers that its kernel rounds.

    And for what stands in front of a softmax, which resolves differences of its inputs on that scale.
    """
    found = softmax_units(endings(model))
    for output in model.graph.outputs:
        if any(node.op_type in _BOUNDED for node in _makers(output)):
            found[output.name or ""] = 1.0
    return found


def _makers(value: ir.Value | None) -> Iterator[ir.Node]:
    """Yield the nodes that compute a value, through moves, copies, joins, and the branches of an If."""
    node = None if value is None else value.producer()
    if node is None or value is None:
        return
    if node.op_type == "If":
        place = node.outputs.index(value)
        for _, body in bodies(node):
            yield from _makers(body.outputs[place])
    elif node.op_type in _MOVES | _COPIES | {"Concat"}:
        for source in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
            yield from _makers(source)
    elif node.op_type == "Mul" and all(
        (makers := list(_makers(source))) and all(one.op_type in _BOUNDED for one in makers) for source in node.inputs
    ):  # as the output of a recurrent cell: a gate times a squashed state
        yield from _makers(node.inputs[0])
    else:
        yield node


def _before(
    model: ir.Model, value: ir.Value, path: str, lossy: bool = False, softmax: tuple[int, bool] | None = None
) -> Iterator[Ending]:
    node = value.producer()
    if node is None or node.domain or node.graph is not model.graph:
        return
    for index, source in enumerate(node.inputs if node.op_type == "Concat" else node.inputs[:1]):
        if source is None:
            continue
        op = node.op_type
        if op in _COPIES:
            yield from _before(model, source, path, lossy, softmax)
        elif op in _MOVES or op == "Concat":
            place = node.outputs.index(value) if op == "Split" else index
            # A shift that is common along an axis can be told no more once the axes were moved.
            if softmax is None:
                yield from _before(model, source, f"{path} < {op} {place}", lossy)
        elif op in _INJECTIVE | _SOFTMAX | _LOSSY and softmax is None:
            hides = _softmax_axis(model, node) if op in _SOFTMAX else None
            step = f"{path} < {op}"
            maker = source.producer()
            if maker is not None and source.name:
                yield Ending(step, source.name, maker.op_type, lossy or op in _LOSSY, hides)
            yield from _before(model, source, step, lossy or op in _LOSSY, hides)


def _softmax_axis(model: ir.Model, node: ir.Node) -> tuple[int, bool]:
    version = node.version or model.opset_imports.get("", 13)
    alone = version >= 13
    return node.attributes.get_int("axis", -1 if alone else 1) or 0, alone
