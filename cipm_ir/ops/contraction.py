"""Contractions: MatMul, Gemm, Einsum. Both operands are treated alike; a weight is nothing special.

Axes are named by letters. A letter that both operands carry and the output lacks is contracted: its atoms are tied and
the log-scales cancel. A letter that all three carry is a batch axis: tied, the log-scales add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Factor, State, alike
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.registry import operator

Letters = tuple[str | None, ...]
_CELLS = 1 << 22
"""Entries of the largest grid of cells that is made of two factors."""


@dataclass
class _Piece:
    """A factor of an operand in terms of letters."""

    letters: tuple[str, ...]
    factor: Factor
    scale_var: int
    covered: bool = False


def contract(
    op: OpContext,
    states: Sequence[State],
    letters: Sequence[Letters],
    out_letters: Letters,
    inputs: Sequence[int | None] = (0, 1),
) -> State:
    """Return the state of the output of a contraction of one or two operands.

    ``letters[k]`` names the axes of operand k; None names an axis of size 1 that broadcasts. ``inputs[k]``: which input
    of the node it is, with its axes as they came in (or the first of them); None where it was reshaped.
    """
    rec = op.rec
    out_set = {x for x in out_letters if x is not None}
    pieces: list[list[_Piece]] = []
    blind: list[set[str]] = []
    for state, names in zip(states, letters, strict=True):
        mine = []
        for f in state.factors:
            axis_letters = tuple(names[a] for a in f.axes)
            if None in axis_letters or len(set(axis_letters)) < len(axis_letters):
                rec.pin(f.labels, "repeated index in Einsum")
                op.freeze_factor(f)
                continue
            mine.append(_Piece(tuple(x for x in axis_letters if x is not None), f, f.scale_var))
        pieces.append(mine)
        labelled = {x for p in mine for x in p.letters}
        blind.append({x for a, x in enumerate(names) if x and x not in labelled and not state.broadcasts(a)})
    if len(states) == 2:
        for p in pieces[0]:
            for q in pieces[1]:
                _meet(op, p, q, out_set)
        for mine, other, names, state in ((pieces[0], 1, letters[1], states[1]), (pieces[1], 0, letters[0], states[0])):
            flat = {x for a, x in enumerate(names) if x and state.broadcasts(a)}
            for p in mine:
                for a, x in enumerate(names):
                    if x in p.letters and state.broadcasts(a) and (index := inputs[other]) is not None:
                        op.note_uniform_operand(index, a, p.factor, p.factor.axes[p.letters.index(x)])
                _against(op, p, blind[other], flat, out_set)
    factors: list[Factor] = []
    where = {x: a for a, x in enumerate(out_letters) if x is not None}
    for p in sorted((p for mine in pieces for p in mine if not p.covered), key=lambda p: -len(p.letters)):
        _emit(op, p, where, factors)
    uniform = [
        a for a, x in enumerate(out_letters)
        if x and all(x not in names or s.broadcasts(names.index(x)) for s, names in zip(states, letters, strict=True))
    ]  # fmt: skip
    shape = op.shape()
    return State(shape, tuple(factors), frozenset(a for a in uniform if shape[a] > 1))


def _axes(p: _Piece, letters: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(a for a, x in zip(p.factor.axes, p.letters, strict=True) if x in letters)


def _meet(op: OpContext, p: _Piece, q: _Piece, out: set[str]) -> None:
    """Tie two operands' factors where they share letters."""
    common = tuple(x for x in p.letters if x in q.letters)
    if not common:
        return
    rec = op.rec
    a, b = rec.marginal(p.factor, _axes(p, common)), rec.marginal(q.factor, _axes(q, common))
    order = [q.factor.axes[q.letters.index(x)] for x in common]
    rec.unify(a.labels, b.on(order))
    if not out >= set(common):
        rec.contracted(p.factor.labels, q.factor.labels)
    if len(common) == len(p.letters) == len(q.letters):
        if not out & set(common):
            rec.equate(p.factor.labels, ((p.scale_var, 1), (q.scale_var, 1)))
        elif out >= set(common):
            var = rec.variable()
            rec.equate(p.factor.labels, ((var, 1), (p.scale_var, -1), (q.scale_var, -1)))
            p.scale_var, q.covered = var, True
            p.factor = Factor(p.factor.axes, p.factor.labels, var, p.factor.repeats)
        else:
            rec.equate(p.factor.labels, ((p.scale_var, 1), (q.scale_var, 1)))
            q.covered = True
        return
    # nested or crossing axes: the coarser side is tied to blocks, which carry no scale
    finer, coarser = (p, q) if len(p.letters) > len(q.letters) else (q, p)
    op.freeze_factor(coarser.factor)
    if not out >= set(common) or len(common) < len(coarser.letters):
        op.freeze_factor(finer.factor)
    rest = tuple(x for x in coarser.letters if x in out)
    if set(rest) <= {x for x in finer.letters if x in out}:
        coarser.covered = True


def _against(op: OpContext, p: _Piece, blind: set[str], flat: set[str], out: set[str]) -> None:
    """A factor against the other operand's fixed and uniform axes, and against letters that only it has."""
    fixed = tuple(x for x in p.letters if x in blind)
    if fixed:
        op.rec.pin(
            op.rec.marginal(p.factor, _axes(p, fixed)).labels,
            f"{op.node.op_type} with a value that is fixed along this axis",
        )
        if not out >= set(fixed):
            op.freeze_factor(p.factor)  # nothing on the other side makes up for a scale
        p.covered = p.covered or fixed == p.letters
    if any(x in flat and x not in out for x in p.letters):
        op.freeze_factor(p.factor)  # a sum over the axis


def _emit(op: OpContext, p: _Piece, where: dict[str, int], factors: list[Factor]) -> None:
    rest = tuple(x for x in p.letters if x in where)
    if not rest:
        return
    f = op.rec.marginal(p.factor, _axes(p, rest))
    letter_of = dict(zip(p.factor.axes, p.letters, strict=True))
    f = f.moved({a: where[letter_of[a]] for a in f.axes})
    met = [g for g in factors if set(g.axes) & set(f.axes)]
    if any(not set(f.axes) <= set(g.axes) for g in met):
        f = _crossed(op, [f, *met], len(where))
        factors[:] = [g for g in factors if g not in met]
        met = []
    for g in met:
        common = tuple(a for a in f.axes if a in g.axes)
        op.rec.unify(op.rec.marginal(f, common).labels, op.rec.marginal(g, common).labels)
        op.freeze_factor(g)
    if not met:
        factors.append(f)


def _crossed(op: OpContext, factors: Sequence[Factor], rank: int) -> Factor:
    """Return one joint factor for several that share some of their axes: a grid of cells tied to each of them.

    (head, i) of one operand and (head, j) of the other are the rows and columns of a matrix in each head.
    """
    sizes = {a: n for f in factors for a, n in zip(f.axes, f.labels.shape, strict=True)}
    axes = tuple(a for a in range(rank) if a in sizes)
    if math.prod(sizes.values()) > _CELLS:
        raise UnsupportedPattern(
            "labels of both operands overlap on some output axes only, and are too many for a grid"
        )
    cells = Factor(axes, op.rec.fresh(*(sizes[a] for a in axes)))
    for f in factors:
        op.freeze_factor(f)
        op.rec.unify(op.rec.marginal(cells, f.axes).labels, f.labels)
    return cells


def matmul_letters(a: State, b: State, out_rank: int) -> tuple[Letters, Letters, Letters]:
    """Letters of numpy-style matmul (ONNX MatMul), with vectors and broadcast batch axes."""
    ra, rb = a.rank, b.rank
    batch = max(ra, rb) - 2 if min(ra, rb) >= 2 else max(ra - 2, rb - 2, 0)
    names = [f"b{k}" for k in range(batch)]
    left: list[str | None] = ["k"] if ra == 1 else [*names[batch - (ra - 2) :], "m", "k"]
    right: list[str | None] = ["k"] if rb == 1 else [*names[batch - (rb - 2) :], "k", "n"]
    out: list[str | None] = [*names, *(["m"] if ra > 1 else []), *(["n"] if rb > 1 else [])]
    for state, letters, other, partner in ((a, left, b, right), (b, right, a, left)):
        for axis, x in enumerate(letters):
            if x in names and state.shape[axis] == 1 and x in partner and other.shape[partner.index(x)] != 1:
                letters[axis] = None
    return tuple(left), tuple(right), tuple(out)


def gemm_letters(node: ir.Node) -> tuple[Letters, Letters, Letters]:
    """Letters of A, B and the result of a Gemm."""
    left: Letters = ("k", "m") if attribute(node, "transA", 0) else ("m", "k")
    right: Letters = ("n", "k") if attribute(node, "transB", 0) else ("k", "n")
    return left, right, ("m", "n")


def weight_axes(node: ir.Node, rank: int) -> tuple[int, int]:
    """Return which axis of input 1 (of this rank) a product sums, and which its outputs lie along."""
    if node.op_type == "MatMul":
        return rank - 2, rank - 1
    return (1, 0) if node.op_type == "Conv" or attribute(node, "transB", 0) else (0, 1)


@operator("MatMul", "MatMulInteger", mergeable=True)
def matmul(op: OpContext) -> None:
    """Numpy-style matrix product."""
    a, b = op.state(0), op.state(1)
    integer = op.node.op_type == "MatMulInteger"
    if integer:
        for s in (a, b):
            op.freeze(s)
        for k in (2, 3):
            zero = op.optional(k)
            if zero is not None and math.prod(zero.shape) > 1:
                raise UnsupportedPattern("per-row zero points of MatMulInteger")
    left, right, out = matmul_letters(a, b, len(op.shape()))
    made = contract(op, by_expert(op, [a, b], [left, right], out), [left, right], out)
    op.like(0, made, made.uniform)


def by_expert(op: OpContext, states: Sequence[State], letters: Sequence[Letters], out: Letters) -> list[State]:
    """Return the operands of a product where a stack of weights (expert, rows, columns) has an order of units per
    expert.

    That is the contracted axis where the units of the other operand are labelled per expert already, otherwise the
    axis that only the weight has. The remaining axis has one order for all experts.
    """
    made = list(states)
    for k, (state, names) in enumerate(zip(states, letters, strict=True)):
        other, theirs = states[1 - k], letters[1 - k]
        if state.rank != 3 or names[0] is None or names[0] not in out:
            continue
        joint = [{theirs[a] for a in f.axes} for f in other.factors if len(f.axes) > 1]
        inner = [a for a in (1, 2) if names[a] not in out and any({names[0], names[a]} <= j for j in joint)]
        free = [a for a in (1, 2) if names[a] in out and names[a] not in theirs]
        for axis in (inner or free)[:1]:
            made[k] = op.by_row(k, axis) or state
    return made


@operator("Gemm", mergeable=True)
def gemm(op: OpContext) -> None:
    """alpha A B + beta C, with transposes; C broadcasts."""
    a, b = op.state(0), op.state(1)
    *letters, summed_to = gemm_letters(op.node)
    out = contract(op, [a, b], letters, summed_to)
    bias = op.optional(2)
    made = out if bias is None else add_bias(op, out, bias)
    op.like(0, made, made.uniform)


def add_bias(op: OpContext, out: State, bias: State, index: int = 2) -> State:
    """out + bias, the bias aligned from the right: it takes the scale of the output."""
    d = out.rank - bias.rank
    moved = {tuple(a + d for a in f.axes): f for f in bias.factors}
    for f in out.factors:
        own = moved.pop(f.axes, None)
        axes = [a - d for a in f.axes if a >= d]
        if own is not None:
            op.unify(f, own)
            op.rec.same(f.labels, f.scale_var, own.scale_var)
        elif all(bias.broadcasts(a) for a in axes):
            op.freeze_factor(f)  # the same bias everywhere
            for a in axes:
                if a < op.state(index).rank:
                    op.note_uniform_operand(index, a, f, a + d)
        else:
            op.rec.pin(f.labels, "bias that is fixed along this axis")
    for f in moved.values():
        op.rec.pin(f.labels, "bias against a fixed axis")
        op.freeze_factor(f)
    return State(out.shape, out.factors, alike([out, bias], out.shape))


def einsum_terms(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Letters of each operand and of the output of an Einsum equation; the ellipsis becomes named axes."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    wild = max((r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0)
    names = [f"e{k}" for k in range(wild)]

    def expand(term: str, rank: int | None) -> list[str]:
        if "..." not in term:
            return list(term)
        head, tail = term.split("...")
        width = wild if rank is None else rank - len(head) - len(tail)
        return [*head, *names[wild - width :], *tail]

    operands = [expand(t, r) for t, r in zip(terms, ranks, strict=True)]
    if arrow:
        return operands, expand(right, None)
    flat = [x for o in operands for x in o if x not in names]
    return operands, [*names, *sorted(x for x in set(flat) if flat.count(x) == 1)]


def _equation(op: OpContext) -> str:
    value = op.attr("equation", "")
    return value.decode() if isinstance(value, bytes) else str(value)


@operator("Einsum", mergeable=True)
def einsum(op: OpContext) -> None:
    """Any contraction; more than two operands are taken from left to right."""
    states = [op.state(k) for k in range(len(op.node.inputs))]
    operands, out = einsum_terms(_equation(op), [s.rank for s in states])
    if len(set(out)) < len(out) or any(len(set(o)) < len(o) for o in operands):
        raise UnsupportedPattern("Einsum with a repeated index")
    sizes: dict[str, int] = {}
    for o, s in zip(operands, states, strict=True):
        for x, n in zip(o, s.shape, strict=True):
            sizes[x] = max(sizes.get(x, 1), n)
    letters: list[Letters] = [
        tuple(None if n == 1 < sizes[x] else x for x, n in zip(o, s.shape, strict=True))
        for o, s in zip(operands, states, strict=True)
    ]
    for k, s in enumerate(states):
        needed = {*out, *(x for j, o in enumerate(operands) if j != k for x in o)}
        for f in s.factors:
            if any(operands[k][a] not in needed for a in f.axes):
                op.freeze_factor(f)  # summed over
    if len(states) == 2:
        states = by_expert(op, states, letters, tuple(out))
    made = _from_the_left(op, states, letters, tuple(out), sizes)
    op.like(0, made, made.uniform)


def _from_the_left(
    op: OpContext, states: Sequence[State], letters: Sequence[Letters], out: tuple[str, ...], sizes: dict[str, int]
) -> State:
    """Contract the first two operands, what that makes with the third, and so on; the state of the last product."""
    if len(states) < 3:
        return contract(op, states, letters, out)
    here, names, source = states[0], letters[0], 0
    for k in range(1, len(states)):
        later = {*out, *(x for o in letters[k + 1 :] for x in o)}
        present = dict.fromkeys(x for x in (*names, *letters[k]) if x is not None)
        ends = tuple(x for x in present if x in later) if k + 1 < len(states) else out
        local = replace(op, shapes=[tuple(sizes[x] for x in ends)])
        here = contract(local, [here, states[k]], [names, letters[k]], ends, (0 if source == 0 else None, k))
        if k + 1 < len(states):
            here = State(here.shape, here.factors)  # a uniform axis in between cannot follow what is removed
        names, source = ends, -1
    return here
