"""Centring of the streams that layer normalizations read, which turns these into RMS normalizations.

LayerNorm(x) = RMSNorm(x - mean(x)), and the mean over the units of a sum is the sum of the means: where every writer of
the stream loses its own mean, nothing is left to subtract (Ashkboos et al., SliceGPT, 2024, section 3.2).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Array
from cipm_ir.passes.exact.expose.forms import Norm, find_norms
from cipm_ir.passes.exact.expose.gain import free_parameters
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter, Weight, Write
from cipm_ir.passes.exact.expose.stream import Stream, stream_of
from cipm_ir.symmetry.program import Program

RMS_OPSET = 23
"""From here on ONNX has RMSNormalization."""
_REDUCED = ("ReduceMean", "Add", "Sqrt")
_Step = tuple[str, list[ir.Value | None], dict[str, Any]]
"""Operator, inputs and attributes of a node to be made; None stands for the result of the step before, first for x."""


@dataclass
class Centred:
    """How many streams were centred, how many normalizations changed, and why others stayed."""

    streams: int = 0
    norms: int = 0
    kept: Counter[str] = field(default_factory=Counter)


def centre_streams(draft: GraphRewriter) -> Centred:
    """Centre every stream that only layer normalizations read and whose units get signs by it."""
    done = Centred()
    good = _gaining(draft)
    for stream, changes in _streams(draft, done.kept):
        if _name(stream) not in good:
            done.kept["no sign would be free"] += len(stream.norms)
            continue
        _carry_out(draft, stream, changes)
        done.streams += 1
        done.norms += len(stream.norms)
    return done


def _gaining(draft: GraphRewriter) -> set[str]:
    """Return the streams whose writers may change sign once all streams are centred."""
    model = draft.model.clone()
    trial = GraphRewriter(model, draft.split)
    written = {_name(stream): _carry_out(trial, stream, changes) for stream, changes in _streams(trial, Counter())}
    trial.sweep()
    signed = free_parameters(Program.of(model), "sign") if written else set()
    return {name for name, weights in written.items() if weights & signed}


def _streams(draft: GraphRewriter, kept: Counter[str]) -> list[tuple[Stream, list[Write]]]:
    """Return the streams that can be centred, with the changes of their writers.

    Why others cannot, by normalization.
    """
    norms = [norm for norm in find_norms(draft) if norm.centred]
    found: list[tuple[Stream, list[Write]]] = []
    for norm in norms:
        if any(norm in stream.norms for stream, _ in found):
            continue
        try:
            stream = stream_of(draft, norm, norms)
            writers = stream.writers.values()
            found.append((stream, [_centring(draft, weight, axis) for weight, axis in writers]))
        except UnsupportedPattern as reason:
            kept[str(reason)] += 1
    return found


def _name(stream: Stream) -> str:
    return stream.norms[0].output.name or ""


def _carry_out(draft: GraphRewriter, stream: Stream, changes: list[Write]) -> set[str]:
    """Write what was decided; gives the names that the writers' constants then have."""
    for change in changes:
        draft.write(change)
    for norm in stream.norms:
        to_rms(draft, norm)
    written = (draft.weight(node, index) for node, index in stream.writers)
    return {weight.name for weight in written if weight is not None}


def _centring(draft: GraphRewriter, weight: Weight, axis: int) -> Write:
    return draft.change(weight, lambda array: centred(array, axis))


def centred(array: Array, axis: int) -> Array:
    """Return an array minus its mean along one axis."""
    return np.asarray(array - array.mean(axis=axis, keepdims=True))


def to_rms(draft: GraphRewriter, norm: Norm) -> None:
    """Replace a layer normalization by an RMS normalization of the same input, which must have mean zero.

    From opset 23 on by RMSNormalization; before, spelled out in the way that onnxruntime fuses into one kernel.
    """
    # read again: folding may have changed it
    beta = None if norm.beta is None else draft.weight(norm.beta.node, norm.beta.index)
    if norm.centre is not None:
        norm.centre.outputs[0].replace_all_uses_with(norm.source)
        if beta is not None and not beta.array.any() and not norm.output.is_graph_output():
            before = beta.node.inputs[1 - beta.index]
            if before is not None:
                norm.output.replace_all_uses_with(before)
        return
    steps = _operator(norm) if draft.version >= RMS_OPSET else _spelled(draft, norm)
    if beta is not None and beta.array.any():
        steps.append(("Add", [None, norm.node.inputs[2]], {}))
    _replace(draft, norm, steps)


def _operator(norm: Norm) -> list[_Step]:
    stash = int(attribute(norm.node, "stash_type", 1))
    attributes = {"axis": -1, "epsilon": norm.epsilon, "stash_type": stash}
    return [("RMSNormalization", [None, norm.node.inputs[1]], attributes)]


def _spelled(draft: GraphRewriter, norm: Norm) -> list[_Step]:
    x, name = norm.source, norm.node.outputs[0].name
    dtype = draft.dtype(x) or ir.DataType.FLOAT
    two = draft.initializer(f"{name}_two", np.asarray(2.0), dtype)
    epsilon = draft.initializer(f"{name}_epsilon", np.asarray(norm.epsilon), dtype)
    mean: _Step = ("ReduceMean", [None], {"axes": [-1], "keepdims": 1})
    if draft.version >= 18:
        axes = draft.initializer(f"{name}_axes", np.asarray([-1]), ir.DataType.INT64)
        mean = ("ReduceMean", [None, axes], {"keepdims": 1})
    return [
        ("Pow", [None, two], {}),
        mean,
        ("Add", [None, epsilon], {}),
        ("Sqrt", [None], {}),
        ("Div", [x, None], {}),
        ("Mul", [None, norm.node.inputs[1]], {}),
    ]


def _replace(draft: GraphRewriter, norm: Norm, steps: list[_Step]) -> None:
    """Put a chain of nodes in the place of one."""
    node, value = norm.node, norm.source
    out = draft.take_over(node.outputs[0], f"{node.outputs[0].name}_layer")
    for number, (op, inputs, attributes) in enumerate(steps, start=1):
        made = out if number == len(steps) else draft.twin(norm.source, f"{out.name}_{op.lower()}")
        if op in _REDUCED and made is not out:
            made.shape = norm.source.shape and ir.Shape([*list(norm.source.shape)[:-1], 1])
        given = [value if one is None else one for one in inputs]
        name = node.name if made is out else None
        draft.graph.insert_before(node, draft.new_node(node, op, given, made, name, **attributes))
        value = made
    draft.graph.remove(node, safe=True)
