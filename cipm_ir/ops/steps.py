"""Fused operators written out: run the rule of an ONNX operator on states that are no inputs of the node.

A fused operator of a runtime is a sequence of ONNX operators. Its rule runs theirs, one by one, so that no rule is
stated twice. Uniform axes end here: where a step meets one, nothing could say which input has to become shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import State
from cipm_ir.ops.context import Literal, OpContext
from cipm_ir.ops.registry import lookup

_OPSET = 22


def plain(state: State) -> State:
    """Return the state without uniform axes, which count as fixed."""
    return State(state.shape, state.factors) if state.uniform else state


def step(
    op: OpContext,
    op_type: str,
    inputs: Sequence[State],
    shape: tuple[int, ...],
    constants: Mapping[int, float] | None = None,
    **attributes: Any,
) -> State:
    """Return the first output of an ONNX operator (opset 22) on values inside a node.

    Args:
        op: the node that the operator is a part of; events are recorded as its own.
        op_type: the operator.
        inputs: states of its inputs.
        shape: of its output.
        constants: numbers that follow the inputs as further ones, by their position.
        attributes: of the operator.

    Raises: `UnsupportedPattern` where there is no rule, or the rule cannot handle the states.
    """
    entry = lookup("", op_type)
    if entry is None:
        raise UnsupportedPattern(f"no rule for {op_type} inside it")
    states: list[State | None] = [plain(s) if len(inputs) > 1 else s for s in inputs]
    literals: list[Literal | None] = [None] * len(states)
    for index, number in sorted((constants or {}).items()):
        states += [None] * (index + 1 - len(states))
        literals += [None] * (index + 1 - len(literals))
        states[index], array = State(()), np.asarray(number, np.float32)
        literals[index] = (array, array)
    values = [None if s is None else ir.Value(name=f"step_{k}") for k, s in enumerate(states)]
    node = ir.node(op_type, values, attributes)
    local = OpContext(node, _OPSET, states, [shape], literals, op.rec, elementwise=entry.elementwise)
    entry.labels(local)
    made = local.outputs[0]
    if made is None:
        raise UnsupportedPattern(f"{op_type} inside it has no state")
    return made


def summed(op: OpContext, terms: Sequence[State], shape: tuple[int, ...]) -> State:
    """Return the state of a sum of values inside a node; they scale alike."""
    made = terms[0]
    for term in terms[1:]:
        made = step(op, "Add", [made, term], shape)
    return made


def activated(op: OpContext, state: State, name: str, numbers: Sequence[float]) -> State:
    """Return the state behind an activation that a fused operator names, with the numbers that it takes."""
    if name in ("LeakyRelu", "Elu", "ThresholdedRelu"):
        attributes: dict[str, Any] = {"alpha": float(numbers[0])} if numbers else {}
        return step(op, name, [state], state.shape, **attributes)
    if name == "Clip":
        bounds = dict(enumerate((float(n) for n in numbers[:2]), start=1))
        return step(op, name, [state], state.shape, bounds)
    if name in _ACTIVATIONS:
        return step(op, name, [state], state.shape)
    raise UnsupportedPattern(f"no rule for the activation {name!r} inside it")


_ACTIVATIONS = {"Relu", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Softplus", "Softsign", "Selu", "Gelu"}
