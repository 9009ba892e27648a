"""onnxruntime's attention operators (domain com.microsoft), by the products of `cipm_ir.ops.attention`.

Projections that are packed into one axis are cut apart first. Past keys and values are joined in front along the axis
of positions: what is fixed there pins the heads and positions of the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import State
from cipm_ir.ops.attention import attend, in_heads, merged, rotate
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.contraction import add_bias, contract
from cipm_ir.ops.indexing import joined, select
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize
from cipm_ir.ops.runtime_fused import RUNTIME
from cipm_ir.ops.steps import plain, summed


def _cut(op: OpContext, state: State, sizes: Sequence[int]) -> list[State]:
    """Consecutive runs along the last axis."""
    last, ends = state.rank - 1, np.cumsum(sizes)
    if ends[-1] != state.shape[last]:
        raise UnsupportedPattern(f"its packed axis has {state.shape[last]} entries, not {ends[-1]}")
    return [
        select(op, state, last, np.arange(end - size, end), (*state.shape[:last], size))
        for end, size in zip(ends.tolist(), sizes, strict=True)
    ]


def _has_output(op: OpContext, index: int) -> bool:
    return index < len(op.node.outputs) and bool(op.node.outputs[index].name)


def _explicit_scale(r: Resize, before: int, after: int) -> None:
    """1 / sqrt(d) becomes explicit where d shrinks; 0 stands for the default."""
    if before != after and not r.attr("scale", 0.0):
        r.set_attr("scale", 1.0 / math.sqrt(before))


def _rows(kept: np.ndarray, start: int, size: int, heads: int) -> tuple[int, int]:
    """Heads, and positions per head, that stay of a run of an axis. Raises: `UnsupportedPattern` where heads differ."""
    flags = np.zeros(start + size, bool)
    flags[kept[kept < start + size]] = True
    width = flags[start:].reshape(heads, -1).sum(axis=1)
    width = width[width > 0]
    if not width.size or (width != width[0]).any():
        raise UnsupportedPattern(f"the {heads} heads of a packed axis must keep equally many positions each")
    return len(width), int(width[0])


# ---------------------------------------------------------------- Attention: projections inside
def _packed_sizes(attr: object, width: int) -> list[int]:
    sizes = [int(n) for n in attr] if isinstance(attr, Sequence) else []
    return sizes or [width // 3] * 3


def resize_packed(r: Resize) -> None:
    """Heads and the sizes of the three projections follow the columns of the weight."""
    before, after = r.old(1)[1], r.new(1)[1]
    if before == after:
        return
    sizes, heads, kept = _packed_sizes(r.attr("qkv_hidden_sizes"), before), int(r.attr("num_heads")), r.kept(1, 1)
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    parts = [_rows(kept, start, size, heads) for start, size in zip(starts, sizes, strict=True)]
    if len({count for count, _ in parts}) > 1:
        raise UnsupportedPattern("queries, keys and values keep different numbers of heads")
    r.set_attr("num_heads", parts[0][0])
    new = [count * width for count, width in parts]
    if len(set(new)) > 1 or r.attr("qkv_hidden_sizes"):
        r.set_attr("qkv_hidden_sizes", new)
    _explicit_scale(r, sizes[0] // heads, parts[0][1])


@operator("Attention", domain=RUNTIME, resize=resize_packed)
def packed_attention(op: OpContext) -> None:
    """One product gives queries, keys and values next to each other; no projection of the output."""
    if op.has(4) or op.has(6) or _has_output(op, 1):
        raise UnsupportedPattern("past or present keys and values in one tensor")
    if op.attr("do_rotary", 0):
        raise UnsupportedPattern("rotary positions inside it")
    op.pin(op.optional(3), "mask of Attention")
    x, weight = op.state(0), op.state(1)
    attend_packed(op, _projected(op, x, weight, 2), mask=5)


def _projected(op: OpContext, x: State, weight: State, bias: int) -> State:
    shape = (*x.shape[:2], weight.shape[1])
    out = contract(replace(op, shapes=[shape]), [x, weight], [("b", "s", "k"), ("k", "n")], ("b", "s", "n"), (0, 1))
    given = op.optional(bias)
    return out if given is None else add_bias(op, out, given, bias)


def attend_packed(op: OpContext, packed: State, mask: int | None) -> None:
    """Cut queries, keys and values apart and set the output; ``mask``: the input that is added to scores."""
    heads = int(op.attr("num_heads"))
    parts = _cut(op, plain(packed), _packed_sizes(op.attr("qkv_hidden_sizes"), packed.shape[2]))
    q, k, v = (in_heads(op, part, heads) for part in parts)
    y, _ = attend(op, q, k, v, mask=mask)
    op.set(0, merged(op, y, op.shape()).factors)


# ---------------------------------------------------------------- MultiHeadAttention
def _resize_multi_head(r: Resize) -> None:
    heads = int(r.attr("num_heads"))
    count = r.rows(0, 2, heads)
    if len(r.old(1)) == 3:
        for k in (1, 2):
            if r.rows(k, 2, heads) != count:
                raise UnsupportedPattern("queries, keys and values keep different numbers of heads")
    elif r.new(1) != r.new(2):
        raise UnsupportedPattern("keys and values in heads of different sizes, which the kernel does not take")
    r.set_attr("num_heads", count)
    _explicit_scale(r, r.old(0)[2] // heads, r.new(0)[2] // count)


@operator("MultiHeadAttention", domain=RUNTIME, resize=_resize_multi_head)
def multi_head_attention(op: OpContext) -> None:
    """Queries, keys and values of (batch, positions, heads d); keys and values may be (batch, heads, positions, d)."""
    if op.has(8) or op.has(9) or _has_output(op, 3):
        raise UnsupportedPattern("a buffer of keys and values, or its scores are asked for")
    if not op.has(1) or not op.has(2) or op.state(0).rank != 3 or op.state(1).rank > 4:
        raise UnsupportedPattern("packed queries, keys and values")
    op.pin(op.optional(4), "mask of MultiHeadAttention")
    states = [plain(op.state(k)) for k in range(3)]
    if op.has(3):
        pieces = _cut(op, plain(op.state(3)), [s.shape[-1] if s.rank == 3 else s.shape[1] * s.shape[3] for s in states])
        for index, (state, piece) in enumerate(zip(states, pieces, strict=True)):
            if state.rank == 3:
                states[index] = summed(op, [state, piece], state.shape)
            else:
                op.pin(piece, "the bias of keys and values that are cut into heads")
    heads = int(op.attr("num_heads"))
    q, k, v = (in_heads(op, s, heads) for s in states)
    k, v = _with_past(op, k, 6), _with_past(op, v, 7)
    y, _ = attend(op, q, k, v, mask=5)
    op.set(0, merged(op, y, op.shape()).factors)
    _give_present(op, k, v)


def _with_past(op: OpContext, state: State, index: int) -> State:
    """Return positions of a past in front; where it lies in a buffer that the present shares, this is what pins."""
    past = op.optional(index)
    if past is None or not past.shape[2]:
        return state
    past = op.pin_axes(plain(past), (0, 2), f"batch or position of {op.node.op_type}")
    shape = (*state.shape[:2], past.shape[2] + state.shape[2], state.shape[3])
    return joined(op, [past, state], 2, shape)


def _give_present(op: OpContext, k: State, v: State) -> None:
    for index, state in ((1, k), (2, v)):
        if _has_output(op, index):
            op.set(index, state.factors, shape=op.shapes[index] or state.shape)


# ---------------------------------------------------------------- GroupQueryAttention
def _resize_group_query(r: Resize) -> None:
    heads, few = int(r.attr("num_heads")), int(r.attr("kv_num_heads"))
    before = r.old(0)[2] // heads
    if r.node.inputs[1] is None:
        before = r.old(0)[2] // (heads + 2 * few)
        kept = r.kept(0, 2)
        runs = ((0, heads), (heads, few), (heads + few, few))
        parts = [_rows(kept, start * before, count * before, count) for start, count in runs]
    else:
        parts = [(n := r.rows(k, 2, count), r.new(k)[2] // n) for k, count in ((0, heads), (1, few), (2, few))]
    widths = {width for _, width in parts}
    if parts[1][0] != parts[2][0] or len(widths) > 1:
        raise UnsupportedPattern("queries, keys and values keep heads of different sizes")
    after = widths.pop()
    if after != before and after % 8:
        raise UnsupportedPattern(f"heads of size {after}, which is no multiple of 8")
    r.set_attr("num_heads", parts[0][0])
    r.set_attr("kv_num_heads", parts[1][0])
    _explicit_scale(r, before, after)


@operator("GroupQueryAttention", domain=RUNTIME, resize=_resize_group_query)
def group_query_attention(op: OpContext) -> None:
    """Each key head serves a run of query heads; rotary positions inside; all heads have one size."""
    if any(op.has(k) for k in range(11, 16)) or _has_output(op, 3):
        raise UnsupportedPattern("sinks, quantized keys or normalized heads inside it, or its scores are asked for")
    for index in (5, 6, 9):
        op.pin(op.optional(index), "lengths or positions")
    heads, few = int(op.attr("num_heads")), int(op.attr("kv_num_heads"))
    query = plain(op.state(0))
    if op.has(1):
        parts = [query, plain(op.state(1)), plain(op.state(2))]
    else:
        size = query.shape[2] // (heads + 2 * few)
        parts = _cut(op, query, [heads * size, few * size, few * size])
    q, k, v = (in_heads(op, s, n) for s, n in zip(parts, (heads, few, few), strict=True))
    if op.attr("do_rotary", 0):
        for grid in (q, k):
            rotate(op, grid, (7, 8), 2 * op.state(7).shape[1], interleaved=bool(op.attr("rotary_interleaved", 0)))
    k, v = _with_past(op, k, 3), _with_past(op, v, 4)
    y, _ = attend(op, q, k, v, mask=10)
    op.set(0, merged(op, y, op.shape()).factors)
    _give_present(op, k, v)


# ---------------------------------------------------------------- RotaryEmbedding
def _resize_rotary(r: Resize) -> None:
    """Planes go as pairs, in every head alike."""
    if r.attr("num_heads", 0) and len(r.old(0)) == 3:
        r.set_attr("num_heads", r.rows(0, 2, int(r.attr("num_heads"))))
    if r.attr("rotary_embedding_dim", 0):
        r.set_attr("rotary_embedding_dim", 2 * r.new(2)[-1])


@operator("RotaryEmbedding", domain=RUNTIME, resize=_resize_rotary, positionwise=True, free=True)
def rotary_embedding(op: OpContext) -> None:
    """As the ONNX operator, with positions as input 1; without a number of heads, the tables give their size."""
    x, table = op.state(0), op.state(2)
    op.pin(op.optional(1), "positions")
    width = int(op.attr("rotary_embedding_dim", 0)) or 2 * table.shape[-1]
    heads = int(op.attr("num_heads", 0)) or x.shape[-1] // width
    grid = in_heads(op, plain(x), heads)
    rotate(op, grid, (2, 3), width, interleaved=bool(op.attr("interleaved", 0)))
    op.set(0, x.factors if x.rank == 3 else grid.factors)
