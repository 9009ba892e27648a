"""Lowering of recurrent layers (one ONNX node per layer) and of their cells, which are written out.

Torch and ONNX order the gates differently: the rows of every weight are split into gates and put together in the order
of ONNX, so that the parameters stay the tensors of the `state_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Dims, Lowering, Tensor, known

_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Place in torch of each gate of ONNX: input, output, forget, cell of torch's i f g o; update, reset, new of r z n."""
_TIME, _UNITS = np.zeros(1, np.int64), np.array([0, 0, -1], np.int64)
_SECOND = np.ones(1, np.int64)


# ---------------------------------------------------------------- layers
@computes(modules=(nn.LSTM,), inputs=2)
def lstm_module(b: Lowering, input: Tensor, hx: Any = None, *, module: Any, path: str) -> Any:
    y, h, c = _module(b, "LSTM", input, hx, module, path)
    return y, (h, c)


@computes(modules=(nn.GRU,), inputs=2)
def gru_module(b: Lowering, input: Tensor, hx: Any = None, *, module: Any, path: str) -> Any:
    y, h = _module(b, "GRU", input, None if hx is None else [hx], module, path)
    return y, h


@computes(modules=(nn.RNN,), inputs=2)
def rnn_module(b: Lowering, input: Tensor, hx: Any = None, *, module: Any, path: str) -> Any:
    y, h = _module(b, "RNN", input, None if hx is None else [hx], module, path, module.nonlinearity)
    return y, h


@computes("lstm")
def lstm(b: Lowering, input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: Any, dropout: Any, train: Any,
         bidirectional: Any, batch_first: Any) -> Any:  # fmt: skip
    states = list(hx) if isinstance(hx, tuple | list) else None
    return _layers(b, "LSTM", input, states, params, num_layers, dropout, bidirectional, batch_first)


@computes("gru")
def gru(b: Lowering, input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: Any, dropout: Any, train: Any,
        bidirectional: Any, batch_first: Any) -> Any:  # fmt: skip
    return _layers(b, "GRU", input, [hx], params, num_layers, dropout, bidirectional, batch_first)


@computes("rnn_tanh")
def rnn_tanh(b: Lowering, input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: Any, dropout: Any,
             train: Any, bidirectional: Any, batch_first: Any) -> Any:  # fmt: skip
    return _layers(b, "RNN", input, [hx], params, num_layers, dropout, bidirectional, batch_first, "tanh")


@computes("rnn_relu")
def rnn_relu(b: Lowering, input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: Any, dropout: Any,
             train: Any, bidirectional: Any, batch_first: Any) -> Any:  # fmt: skip
    return _layers(b, "RNN", input, [hx], params, num_layers, dropout, bidirectional, batch_first, "relu")


def _module(
    b: Lowering, kind: str, input: Any, hx: Any, module: Any, path: str, nonlinearity: str = "tanh"
) -> tuple[Tensor, ...]:
    if not isinstance(input, Tensor):
        raise UnsupportedPattern("a packed sequence")
    width = getattr(module, "proj_size", 0) or module.hidden_size
    if any(p.shape[1] != width for k, p in module.named_parameters() if k.startswith("weight_hh")):
        raise UnsupportedPattern("layers of different hidden sizes, which torch starts from one state")
    names = [name for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)]
    params = [b.parameter(f"{path}.{name}") for name in names]
    alone = input.rank == 2
    if alone:
        input = b.op("Unsqueeze", input, _SECOND, shape=(input.dims[0], 1, input.dims[1]))
        hx = None if hx is None else [b.op("Unsqueeze", s, _SECOND, shape=(s.dims[0], 1, s.dims[1])) for s in hx]
    made = _layers(b, kind, input, hx, params, module.num_layers, module.dropout, module.bidirectional,
                   module.batch_first and not alone, nonlinearity)  # fmt: skip
    return tuple(b.op("Squeeze", m, _SECOND, shape=(m.dims[0], m.dims[2])) for m in made) if alone else made


def _layers(
    b: Lowering, kind: str, x: Tensor, states: list[Any] | None, params: Any, layers: int, dropout: float,
    bidirectional: bool, batch_first: bool, nonlinearity: str = "tanh",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output, last hidden state and (LSTM) last cell state; the states are (layers * directions, batch, hidden)."""
    directions = 2 if bidirectional else 1
    if states and all(_is_zero(s) for s in states):
        states = None
    if not isinstance(params, tuple | list) or not isinstance(x, Tensor) or x.rank != 3:
        raise UnsupportedPattern("a packed sequence")
    if states is None and kind == "LSTM" and len(params) == 0:
        raise UnsupportedPattern("no weights")
    each = len(params) // (layers * directions)
    if each not in (2, 3, 4, 5) or len(params) != each * layers * directions:
        raise UnsupportedPattern("weights other than two matrices, two biases and a projection per layer and direction")
    if each % 2 and states is not None:
        raise UnsupportedPattern(
            "an LSTM with projections that starts from given states: its product of weights needs zeros"
        )
    parts = [_per_layer(b, s, layers, directions) for s in states or ()]
    if batch_first:
        x = b.transpose(x, (1, 0, 2))
    ends: list[list[Tensor]] = []
    for layer in range(layers):
        start = layer * directions * each
        weights = [params[start + d * each : start + (d + 1) * each] for d in range(directions)]
        x, *last = _layer(b, kind, x, weights, [p[layer] for p in parts], nonlinearity)
        ends.append(last)
        if dropout and layer < layers - 1:
            x = b.op("Dropout", x, shape=x.shape)
    if batch_first:
        x = b.transpose(x, (1, 0, 2))
    return (x, *(_stacked(b, list(column)) for column in zip(*ends, strict=True)))


def _is_zero(state: Any) -> bool:
    """Zeros made for the layers: each layer starts from its own, which is the same as none."""
    producer = state.value.producer() if isinstance(state, Tensor) else None
    if producer is None or producer.op_type != "ConstantOfShape":
        return False
    fill = producer.attributes.get("value")
    return fill is None or not np.asarray(fill.as_tensor().numpy()).any()


def _per_layer(b: Lowering, state: Tensor, layers: int, directions: int) -> list[Tensor]:
    """Initial state (directions, batch, hidden) of every layer."""
    if not isinstance(state, Tensor) or state.rank != 3:
        raise UnsupportedPattern("initial states that are no tensors of three axes")
    if layers == 1:
        return [state]
    shape = (directions, *state.dims[1:])
    return b.multi("Split", [state], [shape] * layers, axis=0, num_outputs=layers)


def _layer(
    b: Lowering, kind: str, x: Tensor, weights: list[Any], states: list[Tensor], nonlinearity: str
) -> tuple[Tensor, ...]:
    """One layer: (time, batch, features) to (time, batch, directions * hidden) and the last states."""
    projections = [w[-1] for w in weights] if len(weights[0]) % 2 else []
    hidden, directions, gates = (projections or [weights[0][1]])[0].dims[1], len(weights), len(_ORDER[kind])
    width = projections[0].dims[0] if projections else hidden
    if any(w[1].dims != (gates * hidden, width) for w in weights) or any(
        p.dims != (width, hidden) for p in projections
    ):
        raise UnsupportedPattern("recurrent weights of another shape")
    first, again = (_stacked(b, [_gates(b, kind, w[k], projections[d : d + k]) for d, w in enumerate(weights)])
                    for k in (0, 1))  # fmt: skip
    bias = None
    if len(weights[0]) >= 4:
        shape = (1, 2 * gates * hidden)
        both = [b.op("Concat", _gates(b, kind, w[2]), _gates(b, kind, w[3]), axis=1, shape=shape) for w in weights]
        bias = _stacked(b, both)
    time, batch = x.dims[:2]
    ends = [(directions, batch, hidden)] * (2 if kind == "LSTM" else 1)
    made = b.multi(
        kind, [x, first, again, bias, None, *states], [(time, directions, batch, hidden), *ends], hidden_size=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        linear_before_reset=1 if kind == "GRU" else None,
        activations=[nonlinearity.capitalize()] * directions if kind == "RNN" else None,
    )  # fmt: skip
    if projections:
        made = [*(_projected(b, y, projections, axis) for y, axis in zip(made[:2], (1, 0), strict=True)), made[2]]
    return _side_by_side(b, made[0]), *made[1:]


def _projected(b: Lowering, y: Tensor, projections: list[Tensor], axis: int) -> Tensor:
    """Outputs of the cells, times the projection of their direction."""
    shape = (*y.dims[:axis], 1, *y.dims[axis + 1 :])
    parts = [y]
    if len(projections) > 1:
        parts = b.multi("Split", [y], [shape] * len(projections), axis=axis, num_outputs=len(projections))
    made = [
        b.op("MatMul", part, b.transpose(p, (1, 0)), shape=(*shape[:-1], p.dims[0]))
        for part, p in zip(parts, projections, strict=True)
    ]
    whole = (*y.dims[:-1], projections[0].dims[0])
    return made[0] if len(made) == 1 else b.op("Concat", *made, axis=axis, shape=whole)


def _gates(b: Lowering, kind: str, weight: Tensor, projection: Sequence[Tensor] = ()) -> Tensor:
    """The rows in the order of ONNX's gates, with a first axis for the direction.

    ONNX has no projection P of the state: what it multiplies, U, is multiplied by it instead: U (P h) = (U P) h.
    """
    order = _ORDER[kind]
    made = weight
    if len(order) > 1:
        rows = weight.dims[0]
        shape = (None if rows is None else rows // len(order), *weight.dims[1:])
        parts = b.multi("Split", [weight], [shape] * len(order), axis=0, num_outputs=len(order))
        made = b.op("Concat", *[parts[k] for k in order], axis=0, shape=weight.dims)
    for p in projection:
        made = b.op("MatMul", made, p, shape=(weight.dims[0], p.dims[1]))
    return b.op("Unsqueeze", made, _TIME, shape=(1, *made.dims))


def _stacked(b: Lowering, parts: Sequence[Tensor]) -> Tensor:
    """Along the first axis."""
    if len(parts) == 1:
        return parts[0]
    total = sum(p.dims[0] or 0 for p in parts)
    return b.op("Concat", *parts, axis=0, shape=(total, *parts[0].dims[1:]))


def _side_by_side(b: Lowering, y: Tensor) -> Tensor:
    """(time, directions, batch, hidden) to (time, batch, directions * hidden)."""
    time, directions, batch, hidden = y.dims
    if directions == 1:
        return b.op("Squeeze", y, _SECOND, shape=(time, batch, hidden))
    assert directions is not None and hidden is not None
    return b.op("Reshape", b.transpose(y, (0, 2, 1, 3)), _UNITS, shape=(time, batch, directions * hidden))


# ---------------------------------------------------------------- cells
@computes("lstm_cell", modules=(nn.LSTMCell,), inputs=2)
def lstm_cell(
    b: Lowering, input: Tensor, hx: Any = None, weight_ih: Any = None, weight_hh: Any = None, bias_ih: Any = None,
    bias_hh: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """c' = f c + i g, h' = o tanh(c')."""
    h, c = (_zero(b, input, weight_hh),) * 2 if hx is None else hx
    shape = _state_shape(input, weight_hh)
    total = b.op("Add", _affine(b, input, weight_ih, bias_ih), _affine(b, h, weight_hh, bias_hh),
                 shape=_state_shape(input, weight_hh, 4))  # fmt: skip
    i, f, g, o = b.multi("Split", [total], [shape] * 4, axis=-1, num_outputs=4)
    i, f, o = (b.op("Sigmoid", gate, shape=shape) for gate in (i, f, o))
    new = b.op("Mul", i, b.op("Tanh", g, shape=shape), shape=shape)
    cell = b.op("Add", b.op("Mul", f, c, shape=shape), new, shape=shape)
    return b.op("Mul", o, b.op("Tanh", cell, shape=shape), shape=shape), cell


@computes("gru_cell", modules=(nn.GRUCell,), inputs=2)
def gru_cell(
    b: Lowering, input: Tensor, hx: Any = None, weight_ih: Any = None, weight_hh: Any = None, bias_ih: Any = None,
    bias_hh: Any = None,
) -> Tensor:  # fmt: skip
    """h' = n + z (h - n) with n = tanh(W x + r (U h + b))."""
    h = _zero(b, input, weight_hh) if hx is None else hx
    shape = _state_shape(input, weight_hh)
    own = b.multi("Split", [_affine(b, input, weight_ih, bias_ih)], [shape] * 3, axis=-1, num_outputs=3)
    old = _state_shape(h, weight_hh)
    back = b.multi("Split", [_affine(b, h, weight_hh, bias_hh)], [old] * 3, axis=-1, num_outputs=3)
    reset, update = (b.op("Sigmoid", b.op("Add", own[k], back[k], shape=shape), shape=shape) for k in (0, 1))
    again = b.op("Mul", reset, back[2], shape=shape)
    new = b.op("Tanh", b.op("Add", own[2], again, shape=shape), shape=shape)
    step = b.op("Mul", update, b.op("Sub", h, new, shape=shape), shape=shape)
    return b.op("Add", new, step, shape=shape)


@computes("rnn_tanh_cell")
def rnn_tanh_cell(
    b: Lowering, input: Tensor, hx: Any, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Any = None, bias_hh: Any = None
) -> Tensor:
    return _rnn_cell(b, "Tanh", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


@computes("rnn_relu_cell")
def rnn_relu_cell(
    b: Lowering, input: Tensor, hx: Any, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Any = None, bias_hh: Any = None
) -> Tensor:
    return _rnn_cell(b, "Relu", input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


@computes(modules=(nn.RNNCell,), inputs=2)
def rnn_cell(
    b: Lowering, input: Tensor, hx: Any = None, weight_ih: Any = None, weight_hh: Any = None, bias_ih: Any = None,
    bias_hh: Any = None, nonlinearity: str = "tanh",
) -> Tensor:  # fmt: skip
    return _rnn_cell(b, nonlinearity.capitalize(), input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def _rnn_cell(
    b: Lowering, op_type: str, input: Tensor, hx: Any, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Any, bias_hh: Any
) -> Tensor:
    h = _zero(b, input, weight_hh) if hx is None else hx
    shape = _state_shape(input, weight_hh)
    total = b.op("Add", _affine(b, input, weight_ih, bias_ih), _affine(b, h, weight_hh, bias_hh), shape=shape)
    return b.op(op_type, total, shape=shape)


def _state_shape(x: Tensor, weight_hh: Tensor, gates: int = 1) -> Dims:
    hidden = weight_hh.dims[1]
    return (*x.dims[:-1], None if hidden is None else gates * hidden)


def _affine(b: Lowering, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (*x.dims[:-1], weight.dims[0])
    if x.rank == 2:
        return b.op("Gemm", x, weight, bias, transB=1, shape=shape)
    made = b.op("MatMul", x, b.transpose(weight, (1, 0)), shape=shape)
    return made if bias is None else b.op("Add", made, bias, shape=shape)


def _zero(b: Lowering, x: Tensor, weight_hh: Tensor) -> Tensor:
    """The state that a cell starts from: zeros with an axis for the units, so that it shrinks with them."""
    return b.const(np.zeros((*[1] * (x.rank - 1), int(known(weight_hh.dims[1])))), x.dtype)
