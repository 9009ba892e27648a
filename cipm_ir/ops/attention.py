"""Attention and RotaryEmbedding (opset 23 on): written out as the contractions that they stand for.

Heads are an axis of a joint factor (head, position in the head). Query heads that share a key head move with it as a
block, in which they have an order of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import ZERO, Factor, State
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.contraction import contract
from cipm_ir.ops.elementwise import broadcast
from cipm_ir.ops.registry import operator
from cipm_ir.ops.resize import Resize
from cipm_ir.ops.shaping import reshaped

_SWAP = {0: 0, 1: 2, 2: 1, 3: 3}


def _swapped(state: State) -> State:
    """(batch, sequence, heads, d) from (batch, heads, sequence, d), or back."""
    shape = tuple(state.shape[a] for a in (0, 2, 1, 3))
    factors = tuple(f.moved(_SWAP) for f in state.factors)
    return State(shape, factors, frozenset(_SWAP[a] for a in state.uniform))


def in_heads(op: OpContext, state: State, count: int | None) -> State:
    """(batch, heads, sequence, d); batch and sequence fixed.

    Heads that lie after each other in one uniform axis count as fixed: it cannot follow heads or positions that are
    removed.
    """
    uniform = state.uniform & {1, 3}
    if state.rank == 3:
        uniform = frozenset()
        if not count:
            raise UnsupportedPattern("the number of heads is not given")
        batch, length, size = state.shape
        state = _swapped(reshaped(op, state, (batch, length, count, size // count)))
    state = op.pin_axes(state, (0, 2), f"batch or position of {op.node.op_type}")
    return State(state.shape, state.factors, uniform)


def _repeated(op: OpContext, state: State, heads: int) -> State:
    """Copy each key head for the run of query heads that it serves."""
    own = state.shape[1]
    if own == heads:
        return state
    if heads % own:
        raise UnsupportedPattern(f"{heads} query heads over {own} key heads")
    shape = (state.shape[0], heads, *state.shape[2:])
    factors = []
    if own > 1 and state.factor_of(1) is None and 1 not in state.uniform:
        copies = op.rec.copied_fixed((own, 1), (own, heads // own), "key heads that are fixed")
        factors.append(Factor((1,), copies.ravel()))
    for f in state.factors:
        if 1 in f.axes:
            labels = np.repeat(f.labels, heads // own, axis=f.axes.index(1))
            f = (
                Factor(f.axes, labels, f.scale_var, True)
                if f.repeats
                else Factor(f.axes, op.rec.copied(labels), f.scale_var)
            )
        factors.append(f)
    return State(shape, tuple(factors), frozenset({1} if own == 1 else ()))


def _masked(op: OpContext, scores: State, index: int) -> State:
    """Return scores plus a mask, which may tell heads apart."""
    mask = op.optional(index)
    if mask is None:
        return scores
    op.freeze(mask)
    if mask.rank and mask.shape[-1] not in (1, scores.shape[-1]):  # a short mask is padded (opset 24)
        last = mask.rank - 1
        mask = op.pin_axes(mask, (last,), "mask of Attention")
        mask = State((*mask.shape[:-1], scores.shape[-1]), mask.factors, mask.uniform - {last})
    return broadcast(replace(op, shapes=[scores.shape]), [scores, mask], "Attention mask", (None, index))


def _resize_attention(r: Resize) -> None:
    """Numbers of heads follow; the default 1 / sqrt(d) becomes explicit where d shrinks."""
    if len(r.old(0)) == 3:
        heads = {"q_num_heads": (0,), "kv_num_heads": (1, 2)}
        rows = {}
        for name, inputs in heads.items():
            counts = {r.rows(k, 2, int(r.attr(name))) for k in inputs}
            if len(counts) != 1:
                raise UnsupportedPattern("keys and values keep different numbers of heads")
            rows[name] = counts.pop()
        before, after = r.old(0)[2] // int(r.attr("q_num_heads")), r.new(0)[2] // rows["q_num_heads"]
        for name, count in rows.items():
            r.set_attr(name, count)
    else:
        before = r.old(0)[3]
        after = min(r.new(0)[3], r.new(1)[3])  # one of them may be uniform, and is cut to the other's length
        for name, k in (("q_num_heads", 0), ("kv_num_heads", 1)):
            if r.attr(name) is not None:
                r.set_attr(name, r.new(k)[1])
    if before != after and r.attr("scale") is None:
        r.set_attr("scale", 1.0 / math.sqrt(before))


def attend(
    op: OpContext, q: State, k: State, v: State, inputs: Sequence[int | None] = (None, None, None), mask: int | None = 3
) -> tuple[State, State]:
    """softmax(Q K' scale + mask) V per head, of (batch, heads, positions, d) each; the output and the scores.

    Args:
        op: the node.
        q, k, v: queries, keys and values; each key head serves a run of query heads.
        inputs: which inputs of the node they are, with the same axes; None for what was computed inside the node.
        mask: the input of the node that is added to the scores, None where there is none.
    """
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    scores = contract(
        replace(op, shapes=[(batch, heads, length, keys)]),
        [q, _repeated(op, k, heads)], [("b", "h", "s", "d"), ("b", "h", "t", "d")], ("b", "h", "s", "t"), inputs[:2],
    )  # fmt: skip
    op.freeze(scores)
    scores = State(scores.shape, tuple(fixed(f) for f in scores.factors), scores.uniform)
    scores = scores if mask is None else _masked(op, scores, mask)
    y = contract(
        replace(op, shapes=[(batch, heads, length, v.shape[3])]),
        [scores, _repeated(op, v, heads)], [("b", "h", "s", "t"), ("b", "h", "t", "e")], ("b", "h", "s", "e"),
        (None, inputs[2]),
    )  # fmt: skip
    return y, scores


def merged(op: OpContext, y: State, shape: tuple[int, ...]) -> State:
    """(batch, positions, heads d) from (batch, heads, positions, d)."""
    return reshaped(op, _swapped(y), shape)


@operator("Attention", resize=_resize_attention)
def attention(op: OpContext) -> None:
    """softmax(Q K' scale + mask) V per head (ONNX Attention 23, 24, 25); a cache of past keys is opaque."""
    if op.optional(4) is not None or op.optional(5) is not None:
        raise UnsupportedPattern("Attention with past keys and values")
    op.pin(op.optional(6), "lengths of the sequences")
    q = in_heads(op, op.state(0), op.attr("q_num_heads"))
    k = in_heads(op, op.state(1), op.attr("kv_num_heads"))
    v = in_heads(op, op.state(2), op.attr("kv_num_heads"))
    # inputs whose axes are those of the products
    inputs = [index if s is not None and s.rank == 4 and s.shape[1] == q.shape[1] else None
              for index, s in enumerate(op.inputs[:3])]  # fmt: skip
    y, scores = attend(op, q, k, v, inputs)
    made = y if op.state(0).rank == 4 else merged(op, y, op.shape())
    op.like(0, made, made.uniform)
    for index, state in ((1, k), (2, v), (3, scores)):
        if index < len(op.node.outputs) and op.node.outputs[index].name:
            op.like(index, State(state.shape, state.factors))


# ---------------------------------------------------------------- rotary position embedding
def _resize_rotary(r: Resize) -> None:
    """Planes go as pairs, in every head alike."""
    if len(r.old(0)) == 3:
        r.set_attr("num_heads", r.rows(0, 2, int(r.attr("num_heads"))))
    if r.attr("rotary_embedding_dim", 0):
        r.set_attr("rotary_embedding_dim", 2 * r.new(1)[-1])


@operator("RotaryEmbedding", resize=_resize_rotary, positionwise=True, free=True)
def rotary_embedding(op: OpContext) -> None:
    """Rotates planes of two positions of a head; the tables' columns move with the planes (ONNX RotaryEmbedding 23)."""
    x = op.state(0)
    op.pin(op.optional(3), "positions")
    grid = in_heads(op, x, op.attr("num_heads"))
    width = int(op.attr("rotary_embedding_dim", 0)) or grid.shape[3]
    rotate(op, grid, (1, 2), width, interleaved=bool(op.attr("interleaved", 0)))
    if x.rank == 3:
        op.like(0, State(x.shape, x.factors))
    else:
        op.set(0, grid.factors, grid.uniform & {1}, x.shape)


def rotate(op: OpContext, grid: State, tables: Sequence[int], width: int, *, interleaved: bool) -> None:
    """Tie the two positions of each plane among the first ``width`` of a head to the tables' columns.

    Args:
        op: the node.
        grid: (batch, heads, positions, d).
        tables: inputs of the node that hold cosines and sines.
        width: how many positions of a head are rotated.
        interleaved: whether the two positions of a plane are neighbours, or half of ``width`` apart.

    Raises: `UnsupportedPattern` where positions in a head are fixed or repeat.
    """
    f = grid.factor_of(3)
    if f is None or f.repeats or f.axes not in ((3,), (1, 3)):
        raise UnsupportedPattern("planes that are fixed or repeated")
    half = width // 2
    step = np.arange(half)
    first, second = (2 * step, 2 * step + 1) if interleaved else (step, step + half)
    one, two = f.labels.take(first, axis=-1), f.labels.take(second, axis=-1)
    op.rec.distinguish(one)
    op.rec.distinguish(two)
    op.rec.unify(one, two)
    plane = op.rec.marginal(Factor(f.axes, one, ZERO), (3,)).labels
    for index in tables:
        table = op.state(index)
        op.freeze(table)
        table = op.pin_axes(table, range(table.rank - 1), f"positions of {op.node.op_type}")
        op.note_uniform_operand(index, table.rank - 1, Factor((3,), plane), 3)
        own = table.factor_of(table.rank - 1)
        if own is not None and own.axes == (table.rank - 1,):
            op.rec.unify(plane, own.labels)
        elif not table.broadcasts(table.rank - 1):
            op.rec.pin(plane, "RotaryEmbedding with fixed angles")
