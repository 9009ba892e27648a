"""onnxruntime's operators on few bits (domain com.microsoft): labels pass, what describes an axis moves with it.

Scales and zero points of whole tensors are single numbers; nothing on integers is ever scaled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import ZERO, Factor, State
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.contraction import add_bias, contract, gemm_letters, matmul_letters
from cipm_ir.ops.convolution import convolve
from cipm_ir.ops.elementwise import broadcast
from cipm_ir.ops.indexing import joined
from cipm_ir.ops.quantized import per_axis, resize_quantized_group, single_numbers
from cipm_ir.ops.registry import lookup, operator
from cipm_ir.ops.resize import Resize
from cipm_ir.ops.runtime_attention import attend_packed, resize_packed
from cipm_ir.ops.runtime_fused import RUNTIME, convolve_last
from cipm_ir.ops.shaping import reshaped
from cipm_ir.ops.steps import plain, step


def _frozen(op: OpContext, index: int) -> State:
    """Return the state of an input that is never scaled."""
    op.freeze(op.state(index))
    return State(op.state(index).shape, tuple(fixed(f) for f in op.state(index).factors), op.state(index).uniform)


# ---------------------------------------------------------------- entry by entry
@operator("QLinearAdd", "QLinearMul", domain=RUNTIME, free=True)
def quantized_binary(op: OpContext) -> None:
    """The real-valued sum or product of two tensors, quantized again."""
    states = [_frozen(op, 0), _frozen(op, 3)]
    single_numbers(op, 1, 2, 4, 5, 6, 7)
    made = broadcast(op, states, op.node.op_type, (0, 3))
    op.set(0, made.factors, made.uniform)


@operator("QLinearLeakyRelu", "QLinearSigmoid", domain=RUNTIME, free=True)
def quantized_unary(op: OpContext) -> None:
    """A function of one entry."""
    x = _frozen(op, 0)
    single_numbers(op, 1, 2, 3, 4)
    op.set(0, x.factors, x.uniform)


@operator("QLinearSoftmax", domain=RUNTIME, free=True)
def quantized_softmax(op: OpContext) -> None:
    """Softmax over one axis, over all axes from it on before opset 13."""
    x = _frozen(op, 0)
    single_numbers(op, 1, 2, 3, 4)
    axis = int(op.attr("axis", 0)) % x.rank
    op.normalizes(x, [axis] if int(op.attr("opset", 1)) >= 13 else range(axis, x.rank))
    op.set(0, x.factors, x.uniform)


@operator("QLinearConcat", domain=RUNTIME, free=True)
def quantized_concat(op: OpContext) -> None:
    """Parts with a scale and a zero point each."""
    places = range(2, len(op.node.inputs), 3)
    states = [plain(_frozen(op, k)) for k in places]
    single_numbers(op, 0, 1, *(k + j for k in places for j in (1, 2)))
    made = joined(op, states, int(op.attr("axis", 0)) % states[0].rank, op.shape())
    op.set(0, made.factors)


# ---------------------------------------------------------------- pools and convolutions
@operator("QLinearAveragePool", "QLinearGlobalAveragePool", domain=RUNTIME, free=True)
def quantized_pool(op: OpContext) -> None:
    """Averages over space; channels are axis 1, or the last."""
    x = _frozen(op, 0)
    single_numbers(op, 1, 2, 3, 4)
    channel = x.rank - 1 if op.attr("channels_last", 0) else 1
    space = list(range(2, x.rank) if channel == 1 else range(1, channel))
    if "Global" in op.node.op_type:
        made = step(op, "ReduceMean", [x], op.shape(), axes=space)
    else:
        made = op.pin_axes(x, space, f"spatial position of {op.node.op_type}")
    op.set(0, (fixed(f) for f in made.factors), made.uniform)


def _resize_quantized_conv(r: Resize) -> None:
    if not r.attr("channels_last", 0):
        resize_quantized_group(r)
    elif r.attr("group", 1) != 1 and r.old(0)[-1] != r.new(0)[-1]:
        r.set_attr("group", r.new(0)[-1] // r.new(3)[1])


@operator("QLinearConv", domain=RUNTIME, resize=_resize_quantized_conv)
def quantized_conv(op: OpContext) -> None:
    """As the ONNX operator; channels may be the last axis of the data."""
    x, w = _frozen(op, 0), _frozen(op, 3)
    op.freeze(op.optional(8))
    single_numbers(op, 1, 2, 6, 7)
    last = bool(op.attr("channels_last", 0))
    bias = 8 if op.has(8) else None
    (convolve_last if last else convolve)(op, x, w, 3, bias)
    out = op.outputs[0]
    if out is not None:
        axis = out.rank - 1 if last else 1
        op.set(0, (fixed(f) for f in out.factors), out.uniform - {axis})
        per_axis(op, out, axis, 4, 5)


# ---------------------------------------------------------------- products
def _product(op: OpContext, a: State, b: State, inputs: tuple[int, int]) -> State:
    left, right, out = matmul_letters(a, b, len(op.shape()))
    return contract(op, [a, b], [left, right], out, inputs)


def _columns(op: OpContext, out: State, *indices: int) -> State:
    """Tie scales and zero points of the second operand's columns to the last axis; without scales from here on."""
    for f in out.factors:
        op.freeze_factor(f)
    per_axis(op, out, out.rank - 1, *indices)
    return State(out.shape, tuple(fixed(f) for f in out.factors), out.uniform - {out.rank - 1})


@operator("DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain=RUNTIME)
def quantized_matmul(op: OpContext) -> None:
    """A real-valued A with a quantized B, or both quantized; the result is real, with a bias.

    A is quantized by its extrema: units can change places, none can go without a trace, none is scaled.
    """
    a, b = _frozen(op, 0), _frozen(op, 1)
    if op.node.op_type == "DynamicQuantizeMatMul":
        columns, bias = (2, 3), 4
        for f in a.factors:
            op.rec.normalizes(f.labels)
    else:
        columns, bias = (3, 5), 6
        single_numbers(op, 2, 4)
    if b.rank != 2:
        single_numbers(op, *columns)
    out = _real_columns(op, _product(op, a, b, (0, 1)), *columns)
    given = op.optional(bias)
    made = out if given is None else add_bias(op, out, given, bias)
    op.set(0, made.factors, made.uniform - {out.rank - 1})


def _real_columns(op: OpContext, out: State, scale: int, zero: int) -> State:
    """As `_columns`, of a result in real numbers: scales of columns take up a scaling of it. Their signs stay."""
    last = out.rank - 1
    along, vector = out.factor_of(last), op.state(scale).factor_of(op.state(scale).rank - 1)
    if along is None or along.axes != (last,) or vector is None or vector.axes != (0,):
        return _columns(op, out, scale, zero)
    per_axis(op, out, last, zero)
    op.vector(scale, along)
    op.freeze_factor(vector, scale=False)
    factors = [Factor(f.axes, f.labels, vector.scale_var if f is along else ZERO, f.repeats) for f in out.factors]
    return State(out.shape, tuple(factors), out.uniform - {last})


@operator("QGemm", domain=RUNTIME)
def quantized_gemm(op: OpContext) -> None:
    """alpha A B + C of quantized operands; scale and zero point of B may be per column."""
    a, b = _frozen(op, 0), _frozen(op, 3)
    single_numbers(op, 1, 2, 7, 8)
    *letters, summed_to = gemm_letters(op.node)
    out = _columns(op, contract(op, [a, b], letters, summed_to, (0, 3)), 4, 5)
    given = op.optional(6)
    if given is not None:
        op.freeze(given)
        out = add_bias(op, out, State(given.shape, tuple(map(fixed, given.factors)), given.uniform), 6)
    op.set(0, (fixed(f) for f in out.factors), out.uniform - {1})


def _resize_packed_matmul(r: Resize) -> None:
    r.set_attr("N", r.new(1)[0])


@operator("MatMulNBits", domain=RUNTIME, resize=_resize_packed_matmul)
def packed_matmul(op: OpContext) -> None:
    """A (.., K) times a weight (N, blocks of K, bytes): rows of the weight are units, entries in its blocks are packed.

    Scales (N, blocks) or (N blocks,) move with the rows. The summed axis is pinned: units of it lie several to a byte.
    """
    a, packed, shape = op.state(0), op.state(1), op.shape()
    count, blocks = packed.shape[:2]
    if op.attr("weight_prepacked", 0):
        raise UnsupportedPattern("a weight in the layout of one processor")
    op.freeze(a)
    rest = op.pin_axes(a, [a.rank - 1], "summed with a weight of several units to a byte")
    op.pin(op.optional(4), "which block each entry belongs to")
    rows = op.pin_axes(packed, (1, 2), "a weight of several units to a byte").factor_of(0)
    if rows is not None:
        op.freeze_factor(rows)
        for k in (2, 3):
            _block_numbers(op, k, rows, count, blocks)
        op.vector(5, rows)
        op.freeze(op.optional(5))
    else:
        for k in (2, 3, 5):
            op.pin(op.optional(k), "MatMulNBits with a fixed weight")
    last = len(shape) - 1
    factors = [fixed(f) for f in rest.factors]
    op.set(0, [*factors, *([Factor((last,), rows.labels)] if rows is not None else [])], rest.uniform - {last})


def _block_numbers(op: OpContext, index: int, rows: Factor, count: int, blocks: int) -> None:
    """Tie scales or zero points of the blocks to the rows of the weight."""
    state = op.optional(index)
    if state is None:
        return
    op.freeze(state)
    size = math.prod(state.shape)
    if size % count:
        raise UnsupportedPattern("scales that do not belong to rows")
    grid = reshaped(op, plain(state), (count, size // count)) if state.rank == 1 else plain(state)
    grid = op.pin_axes(grid, (1,), "scales of the blocks of a row") if state.rank > 1 else grid
    f = grid.factor_of(0)
    if f is None:
        op.rec.pin(rows.labels, "MatMulNBits with fixed scales")
        return
    op.rec.unify(op.rec.marginal(f, (0,)).labels, rows.labels)
    if f.axes != (0,) and blocks > 1:  # blocks of a row stay in their order
        op.rec.pin(op.rec.marginal(f, (1,)).labels, "blocks of a row of MatMulNBits")


# ---------------------------------------------------------------- attention and recurrence
@operator("QAttention", domain=RUNTIME, resize=resize_packed)
def quantized_attention(op: OpContext) -> None:
    """Attention with a quantized input and weight; its scales may be per column of the weight."""
    if op.has(8) or any(v.name for v in op.node.outputs[1:]):
        raise UnsupportedPattern("past or present keys and values in one tensor")
    if op.attr("do_rotary", 0):
        raise UnsupportedPattern("rotary positions inside it")
    op.pin(op.optional(5), "mask of QAttention")
    x, weight = _frozen(op, 0), _frozen(op, 1)
    single_numbers(op, 3, 6)
    local = replace(op, shapes=[(*x.shape[:2], weight.shape[1])])
    out = contract(local, [x, weight], [("b", "s", "k"), ("k", "n")], ("b", "s", "n"), (0, 1))
    out = _columns(op, out, 4, 7)
    given = op.optional(2)
    if given is not None:
        op.freeze(given)
        out = add_bias(op, out, State(given.shape, tuple(map(fixed, given.factors)), given.uniform), 2)
    attend_packed(op, out, mask=None)


def _resize_lstm(r: Resize) -> None:
    if r.attr("hidden_size") is not None:
        r.set_attr("hidden_size", r.new(2)[1])


@operator("DynamicQuantizeLSTM", domain=RUNTIME, resize=_resize_lstm)
def quantized_lstm(op: OpContext) -> None:
    """An LSTM whose quantized weights lie the other way round: the gates are the last axis."""
    entry = lookup("", "LSTM")
    if entry is None:
        raise UnsupportedPattern("no rule for LSTM inside it")
    for k in range(8, 12):
        numbers = op.optional(k)
        if numbers is not None and math.prod(numbers.shape) > op.state(1).shape[0]:
            raise UnsupportedPattern("scales of each gate")
    turned = [
        _turned(_by_direction(op, 1, _frozen(op, 1), (2,))),
        _turned(_by_direction(op, 2, _frozen(op, 2), (1, 2))),
    ]
    rest = [
        _by_direction(op, k, op.optional(k), axes)
        for k, axes in zip(range(3, 8), ((1,), (), (2,), (2,), (1,)), strict=True)
    ]
    for k in range(8, 12):
        numbers = op.optional(k)
        op.pin(numbers, "a scale of each direction")
    x = op.state(0)
    op.freeze(x)
    op.normalizes(x, range(x.rank))  # quantized by the extrema
    states = [op.state(0), *turned, *rest]
    values = [None if s is None else ir.Value(name=f"step_{k}") for k, s in enumerate(states)]
    outputs = [ir.Value(name=v.name) for v in op.node.outputs]
    node = ir.Node("", "LSTM", values, list(op.node.attributes.values()), outputs=outputs)
    local = replace(op, node=node, version=22, inputs=states, literals=[None] * len(states), seeds=None, outputs=[])
    entry.labels(local)
    op.outputs = local.outputs


@overload
def _by_direction(op: OpContext, index: int, state: State, axes: Sequence[int]) -> State: ...
@overload
def _by_direction(op: OpContext, index: int, state: State | None, axes: Sequence[int]) -> State | None: ...
def _by_direction(op: OpContext, index: int, state: State | None, axes: Sequence[int]) -> State | None:
    """Return the state of a parameter whose axes have an order of units for each direction.

    As far as it can have one.
    """
    if state is None or state.shape[0] == 1:
        return state
    op.pin(State(state.shape, tuple(f for f in state.factors if f.axes == (0,))), f"direction of {op.node.op_type}")
    for axis in axes:
        joint = op.grouped(index, axis, state.shape[0])
        if joint is not None:
            op.freeze_factor(joint)
            others = tuple(f for f in state.factors if f.axes != (axis,))
            state = State(state.shape, (*others, fixed(joint)), state.uniform)
    return state


def _turned(state: State) -> State:
    """Return the last two of three axes change places."""
    place = {0: 0, 1: 2, 2: 1}
    shape = (state.shape[0], state.shape[2], state.shape[1])
    return State(shape, tuple(f.moved(place) for f in state.factors))
