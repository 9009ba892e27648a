"""Operations of torch that ONNX cannot express, of which it is known how labels go through.

A frontend gives such a node of the domain ``pkg.torch`` one of three attributes. ``axes``: it treats every index of its
other axes alike and is linear (Fourier transforms, parts of complex numbers), so that only these axes are fixed.
``like``: it is that ONNX operator on types that ONNX lacks (complex numbers). ``stacked``: rows of the first input are
multiplied by the matrices (experts, inputs, outputs) of the second, each row by the one of its expert. A node without
any of them pins all that reaches it, with the reason that it carries.
"""

from __future__ import annotations

from dataclasses import replace

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.contraction import contract
from cipm_ir.ops.registry import lookup, operator


@operator(domain="pkg.torch")
def foreign(op: OpContext) -> None:
    """See the head of this file."""
    like, axes = op.attr("like"), op.attr("axes")
    if like is not None:
        entry = lookup("", str(like))
        if entry is None:
            raise UnsupportedPattern(f"complex numbers in {like}")
        op.elementwise = entry.elementwise
        entry.labels(op)
    elif op.attr("stacked") is not None:
        _stacked(op)
    elif axes is not None:
        state = op.pin_axes(op.state(0), [int(a) for a in axes], f"axis that {op.node.op_type} mixes")
        op.set(0, state.factors)
    else:
        raise UnsupportedPattern(op.node.metadata_props.get("reason") or "no rule for this operation")


def _stacked(op: OpContext) -> None:
    """Rows times the matrix of their expert: all experts share the order of inputs and of outputs."""
    rows, weight = op.pin_axes(op.state(0), (0,), "rows of experts"), op.state(1)
    for state in op.inputs[2:]:
        op.pin(state, "rows of experts")
    for f in weight.factors:
        if 0 in f.axes:
            op.pin(replace(weight, factors=(f,)), "experts that are chosen by number")
    inner = replace(weight, factors=tuple(f for f in weight.factors if 0 not in f.axes))
    made = contract(op, [rows, inner], [("t", "k"), (None, "k", "n")], ("t", "n"))
    op.set(0, made.factors)
