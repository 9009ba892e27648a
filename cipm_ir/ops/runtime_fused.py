"""onnxruntime's fused products, activations and normalizations (domain com.microsoft).

Each is the rule of the ONNX operator, followed by those of what was fused behind it.
"""

from __future__ import annotations

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import State
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.contraction import Letters, by_expert, contract, gemm, matmul_letters
from cipm_ir.ops.convolution import convolve, resize_group
from cipm_ir.ops.elementwise import broadcast
from cipm_ir.ops.normalization import normalized
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize
from cipm_ir.ops.steps import activated, summed

RUNTIME = "com.microsoft"


def text(op: OpContext, name: str) -> str:
    """Return the value of an attribute that is a text, "" where it is absent."""
    value = op.attr(name, "")
    return value.decode() if isinstance(value, bytes) else str(value)


def _made(op: OpContext) -> State:
    """Return what a rule that ran before has set."""
    state = op.outputs[0]
    if state is None:
        raise UnsupportedPattern("the shape of the output is not known")
    return state


# ---------------------------------------------------------------- products
@operator("FusedConv", domain=RUNTIME, resize=resize_group)
def fused_conv(op: OpContext) -> None:
    """A convolution, a sum with input 3 where there is one, and an activation."""
    convolve(op, op.state(0), op.state(1), 1, 2 if op.has(2) else None)
    made, other = _made(op), op.optional(3)
    if other is not None:
        made = summed(op, [made, other], made.shape)
    if name := text(op, "activation"):
        made = activated(op, made, name, op.attr("activation_params", ()))
    op.set(0, made.factors, made.uniform)


def _channels_second(state: State) -> State:
    """(N, channels, positions) from (N, positions, channels)."""
    place = {0: 0, state.rank - 1: 1, **{a: a + 1 for a in range(1, state.rank - 1)}}
    shape = (state.shape[0], state.shape[-1], *state.shape[1:-1])
    return State(shape, tuple(f.moved(place) for f in state.factors))


def resize_last_channels(r: Resize) -> None:
    """`resize_group` where channels are the last axis of the data."""
    group = int(r.attr("group", 1))
    if group > 1:
        last = len(r.old(0)) - 1
        for index, axis in ((0, last), (1, 0)):
            r.rows(index, axis, group)
        if r.old(0)[last] != r.new(0)[last]:
            r.set_attr("group", r.new(0)[last] // r.new(1)[1])


def convolve_last(op: OpContext, x: State, w: State, weight: int, bias: int | None) -> None:
    """`convolve` of data whose channels are the last axis."""
    x = _channels_second(x)
    out = op.shape()
    turned = (out[0], out[-1], *out[1:-1])
    shapes = op.shapes
    op.shapes = [turned]
    try:
        convolve(op, x, w, weight, bias)
    finally:
        op.shapes = shapes
    made = _made(op)
    place = {0: 0, 1: len(out) - 1, **{a: a - 1 for a in range(2, len(out))}}
    op.set(0, (f.moved(place) for f in made.factors))


@operator("FusedGemm", domain=RUNTIME)
def fused_gemm(op: OpContext) -> None:
    """A Gemm and an activation."""
    gemm(op)
    made = _made(op)
    if name := text(op, "activation"):
        numbers = [op.attr(f"activation_{x}") for x in ("alpha", "beta", "gamma")]
        made = activated(op, made, name, [n for n in numbers if n is not None])
    op.set(0, made.factors, made.uniform)


def _turned(state: State, *, last: bool, batch: bool) -> tuple[tuple[int, ...], State]:
    """Return which axis of an operand each axis of a plain matrix product is, and the operand's shape in that order."""
    order = list(range(state.rank))
    if batch and state.rank > 2:  # (batch, rows, columns) from (rows, batch, columns)
        order = [*order[1:-1], order[0], order[-1]]
    if last and state.rank > 1:
        order[-2:] = order[:-3:-1]
    return tuple(order), State(tuple(state.shape[a] for a in order), (), frozenset())


@operator("FusedMatMul", "TransposeMatMul", domain=RUNTIME)
def fused_matmul(op: OpContext) -> None:
    """alpha A B, with transposes of the last two axes, or of the first with the batch axes."""
    a, b = op.state(0), op.state(1)
    orders, turned = [], []
    for state, side in ((a, "A"), (b, "B")):
        turns = (bool(op.attr(f"{name}{side}", 0)) for name in ("trans", "transBatch"))
        order, view = _turned(state, last=next(turns), batch=next(turns))
        orders.append(order)
        turned.append(view)
    left, right, out = matmul_letters(turned[0], turned[1], len(op.shape()))
    letters: list[Letters] = []
    for names, order in ((left, orders[0]), (right, orders[1])):
        own: list[str | None] = [None] * len(names)
        for x, axis in zip(names, order, strict=True):
            own[axis] = x
        letters.append(tuple(own))
    made = contract(op, by_expert(op, [a, b], letters, out), letters, out)
    op.set(0, made.factors, made.uniform)


# ---------------------------------------------------------------- activations
@operator("Gelu", "QuickGelu", "FastGelu", "BiasGelu", domain=RUNTIME, elementwise=True)
def gelus(op: OpContext) -> None:
    """Gelu (or x sigmoid(a x)) of a value, or of its sum with a bias: permutations only."""
    states = [op.state(k) for k in range(len(op.node.inputs)) if op.has(k)]
    for state in states:
        op.freeze(state)
    op.like(0, broadcast(op, states, op.node.op_type))


# ---------------------------------------------------------------- normalizations
def _no_statistics(op: OpContext, *outputs: int) -> None:
    for k in outputs:
        if k < len(op.node.outputs) and op.node.outputs[k].name:
            raise UnsupportedPattern("its statistics are asked for")


@operator("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=RUNTIME, free=True)
def skip_layer_normalization(op: OpContext) -> None:
    """A layer normalization (a root mean square one) of input + skip + bias; output 3 is that sum."""
    _no_statistics(op, 1, 2)
    simplified = op.node.op_type.startswith("SkipSimplified")
    bias = op.optional(3 if simplified else 4)
    terms = [op.state(0), op.state(1), *([] if bias is None else [bias])]
    total = summed(op, terms, op.shape())
    params = [2] if simplified else [2, 3]
    made = normalized(op, total, [k for k in params if op.has(k)], total.rank - 1, signs=simplified)
    op.set(0, made.factors)
    if len(op.node.outputs) > 3 and op.node.outputs[3].name:
        op.set(3, total.factors, shape=op.shape())


@operator("EmbedLayerNormalization", domain=RUNTIME, free=True)
def embed_layer_normalization(op: OpContext) -> None:
    """Rows of tables for words, positions and segments, chosen by indices; their sum is normalized."""
    for k in (0, 1, 7, 8):
        op.pin(op.optional(k), "indices")
    shape = op.shape()
    terms = []
    for k in (2, 3, 4):
        table = op.optional(k)
        if table is not None:
            rest = op.pin_axes(table, (0,), "rows of an embedding chosen at run time")
            terms.append(State(shape, tuple(f.moved({1: 2}) for f in rest.factors)))
    total = summed(op, terms, shape)
    made = normalized(op, total, [k for k in (5, 6) if op.has(k)], 2, signs=False)
    op.set(0, made.factors)
    for k, value in enumerate(op.node.outputs[1:], start=1):
        if value.name and (k == 2 or op.shapes[k] is not None):
            op.set(k, total.factors if k == 2 else (), shape=shape if k == 2 else None)
