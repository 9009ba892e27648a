"""LSTM, GRU and RNN of one layer, through torch's own kernels.

ONNX orders the gates i o f c and z r h, torch i f c o and r z n: the blocks of the weights are put in order on every
call, so that the parameters keep their shape and their names. A GRU that resets before the product has no kernel in
torch: `reset_first_gru` runs it step by step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.ir.constants import attribute

__all__ = ["reset_first_gru"]

_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""For each gate of torch, the block of ONNX."""
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_KERNELS: dict[str, Callable[..., Any]] = {
    "LSTM": torch.ops.aten.lstm.input,
    "GRU": torch.ops.aten.gru.input,
    "Tanh": torch.ops.aten.rnn_tanh.input,
    "Relu": torch.ops.aten.rnn_relu.input,
}


@dataclass(frozen=True)
class _Layer:
    """One recurrent layer: time first; weights per direction as (input, state, input bias, state bias)."""

    x: fx.Node
    directions: int
    hidden: int
    batch: Int
    batch_first: bool
    weights: list[list[fx.Node]]


def reset_first_gru(x: torch.Tensor, start: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """GRU whose reset gate acts on the state before the product (ONNX `linear_before_reset=0`), step by step.

    x: (T, N, inputs); start: (directions, N, hidden); weights: per direction, in torch's layout and order of gates.
    The second direction runs backwards. Returns (T, N, directions · hidden) and the last states.
    """
    runs, last = [], []
    for d in range(start.shape[0]):
        w, r, b, c = weights[4 * d : 4 * d + 4]
        size = r.shape[1]
        gates = F.linear(x.flip(0) if d else x, w, b)
        state, states = start[d], []
        for step in gates.unbind(0):
            both = torch.sigmoid(step[:, : 2 * size] + F.linear(state, r[: 2 * size], c[: 2 * size]))
            reset, update = both.chunk(2, dim=1)
            new = torch.tanh(step[:, 2 * size :] + F.linear(reset * state, r[2 * size :], c[2 * size :]))
            state = update * state + (1 - update) * new
            states.append(state)
        run = torch.stack(states)
        runs.append(run.flip(0) if d else run)
        last.append(state)
    return torch.cat(runs, dim=2), torch.stack(last)


def _layer(e: Emitter, node: ir.Node) -> _Layer:
    kind, v = node.op_type, node.inputs[0]
    assert v is not None
    direction = attribute(node, "direction", "forward")
    directions = 2 if direction == "bidirectional" else 1
    batch_first = bool(attribute(node, "layout", 0))
    shape = e.shape(node.inputs[2])
    hidden = attribute(node, "hidden_size") or (None if shape is None else shape[-1])
    if hidden is None:
        raise refuse(node, "its hidden size is unknown; set the attribute hidden_size")
    _check(e, node, directions)
    x = first(e, node)
    if batch_first:
        x = e.call(torch.transpose, x, 0, 1)
    if direction == "reverse":
        x = e.call(torch.flip, x, [0])
    weights = [_weights(e, node, kind, d, hidden) for d in range(directions)]
    return _Layer(x, directions, hidden, e.size(v, 0 if batch_first else 1), batch_first, weights)


def _check(e: Emitter, node: ir.Node, directions: int) -> None:
    usual = _ACTIVATIONS[node.op_type] * directions
    names = [n if isinstance(n, str) else n.decode() for n in attribute(node, "activations", usual)]
    if names != usual and not (node.op_type == "RNN" and set(names) == {"Relu"}):
        raise refuse(node, f"torch has no kernel with the activations {names}; unroll the layer")
    if arg(node, 4) is not None:
        raise refuse(node, "it takes the length of each sequence; drop sequence_lens and mask the padding")
    if attribute(node, "clip") is not None or attribute(node, "input_forget", 0) or arg(node, 7) is not None:
        raise refuse(node, "torch has no clipped, coupled or peephole cells; unroll the layer")


def _weights(e: Emitter, node: ir.Node, kind: str, d: int, hidden: int) -> list[fx.Node]:
    """Weights and biases of one direction with torch's order of gates; no biases where none are given."""
    parts = [e.call(torch.select, e.optional(node.inputs[k]), 0, d) for k in (1, 2)]
    if arg(node, 3) is not None:
        both = e.call(torch.chunk, e.call(torch.select, e.optional(node.inputs[3]), 0, d), 2)
        parts += [e.call(operator.getitem, both, k) for k in (0, 1)]
    return [_ordered(e, part, _ORDER[kind], hidden) for part in parts]


def _ordered(e: Emitter, part: fx.Node, order: tuple[int, ...], hidden: int) -> fx.Node:
    if order == (0,):
        return part
    blocks = e.call(torch.split, part, hidden)
    return e.call(torch.cat, [e.call(operator.getitem, blocks, k) for k in order])


def _start(e: Emitter, node: ir.Node, layer: _Layer, k: int) -> fx.Node:
    """An initial state (directions, N, hidden): the input, or zeros."""
    given = e.optional(arg(node, k))
    if given is None:
        return e.method("new_zeros", layer.x, (layer.directions, layer.batch, layer.hidden))
    return e.call(torch.transpose, given, 0, 1) if layer.batch_first else given


def _results(e: Emitter, node: ir.Node, layer: _Layer, run: fx.Node, states: list[fx.Node]) -> list[fx.Node]:
    """(T, N, directions · hidden) as ONNX's (T, directions, N, hidden), or batch first; and the last states."""
    if attribute(node, "direction", "forward") == "reverse":
        run = e.call(torch.flip, run, [0])
    run = e.call(torch.unflatten, run, 2, [layer.directions, layer.hidden])
    if layer.batch_first:
        run = e.call(torch.transpose, run, 0, 1)
        return [run, *(e.call(torch.transpose, s, 0, 1) for s in states)]
    return [e.call(torch.transpose, run, 1, 2), *states]


def _run(e: Emitter, node: ir.Node, kernel: Callable[..., Any], layer: _Layer, start: Any) -> fx.Node:
    """The call of a kernel, told to train: without dropout that changes nothing, and cuDNN wants it for gradients."""
    flat = [w for direction in layer.weights for w in direction]
    biased, both = arg(node, 3) is not None, layer.directions == 2
    return e.call(kernel, layer.x, start, flat, biased, 1, 0.0, True, both, False)


@emits("LSTM")
def _lstm(e: Emitter, node: ir.Node) -> list[fx.Node]:
    layer = _layer(e, node)
    start = [_start(e, node, layer, k) for k in (5, 6)]
    out = _run(e, node, _KERNELS["LSTM"], layer, start)
    run, *states = (e.call(operator.getitem, out, k) for k in range(3))
    return _results(e, node, layer, run, states)


@emits("GRU", "RNN")
def _gru(e: Emitter, node: ir.Node) -> list[fx.Node]:
    layer = _layer(e, node)
    start = _start(e, node, layer, 5)
    if node.op_type == "RNN":
        first_name = attribute(node, "activations", ["Tanh"])[0]
        name = first_name if isinstance(first_name, str) else first_name.decode()
        out = _run(e, node, _KERNELS[name], layer, start)
    elif attribute(node, "linear_before_reset", 0):
        out = _run(e, node, _KERNELS["GRU"], layer, start)
    else:
        out = e.call(reset_first_gru, layer.x, start, *_with_biases(e, layer))
    run, state = (e.call(operator.getitem, out, k) for k in range(2))
    return _results(e, node, layer, run, [state])


def _with_biases(e: Emitter, layer: _Layer) -> list[fx.Node]:
    flat = []
    for direction in layer.weights:
        flat += direction
        if len(direction) == 2:
            flat += [e.method("new_zeros", layer.x, (3 * layer.hidden,)) for _ in range(2)]
    return flat
