"""Where hidden units are summed: the sums over their positions, and which entries of the operands are zero there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels, State
from cipm_ir.ops.contraction import einsum_terms, gemm_letters, matmul_letters
from cipm_ir.runtime.intervals.arithmetic import Interval
from cipm_ir.runtime.intervals.bounds import Intervals
from cipm_ir.runtime.intervals.site import refit

Mask = npt.NDArray[np.bool_]
Letters = tuple[str, ...]
SUMS = ("MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "Attention")
"""Operators whose sums over units are followed term by term."""


@dataclass
class Marked:
    """Classes of positions; the dimensions of the array by letters."""

    classes: Labels
    letters: Letters


@dataclass
class Operand:
    """One side of a sum of products. ``nonzero`` is None where no entry is zero for sure.

    ``bounds`` has the operand's own letters, each axis of size 1 or full; ``index``: number of the node's input.
    """

    index: int
    letters: tuple[str | None, ...]
    bounds: Interval
    marked: list[Marked]
    nonzero: Mask | None = None
    own: Letters = ()


@dataclass
class Sum:
    """A node that sums products over the letters in ``summed``; ``out`` marks what its results move with."""

    node: int
    operands: list[Operand]
    out: list[Marked]
    summed: frozenset[str]

    def ending(self) -> Iterator[tuple[Operand, Marked]]:
        """Operands with the classes that end here."""
        for operand in self.operands:
            for marked in operand.marked:
                if self.summed.intersection(marked.letters):
                    yield operand, marked

    def reached(self, marked: Marked, alive: Mask) -> Mask:
        """Return positions with a term that may be nonzero in a result that matters."""
        terms: list[Any] = []
        number = {x: k for k, x in enumerate(self._alphabet())}
        for operand in self.operands:
            if operand.nonzero is not None:
                terms += [operand.nonzero.astype(np.float32), [number[x] for x in operand.own]]
        for result in self.out:
            terms += [alive[result.classes].astype(np.float32), [number[x] for x in result.letters]]
        present = {k for names in terms[1::2] for k in names}
        kept = [x for x in marked.letters if number[x] in present]
        hits = np.einsum(*terms, [number[x] for x in kept], optimize=True) if terms else np.ones(())
        shape = [n if x in kept else 1 for x, n in zip(marked.letters, marked.classes.shape, strict=True)]
        return np.asarray(np.broadcast_to(np.reshape(hits, shape) > 0, marked.classes.shape))

    def _alphabet(self) -> list[str]:
        parts = [o.own for o in self.operands] + [m.letters for o in self.operands for m in o.marked]
        return list(dict.fromkeys(x for part in [*parts, *(m.letters for m in self.out)] for x in part))


def find_sums(found: Intervals) -> list[Sum]:
    """Return all sums over labelled positions, in graph order."""
    sums = []
    for position, node in enumerate(found.analysis.walk.nodes):
        if node.op_type in SUMS and not node.domain and (made := _sum(found, position)) is not None:
            _finish(found, made)
            sums.append(made)
    return sums


def _sum(found: Intervals, position: int) -> Sum | None:
    node = found.analysis.walk.nodes[position]
    if any(v is not None and found.operand(position, k) is None for k, v in enumerate(node.inputs[:2])):
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return _conv(found, position)
    if node.op_type == "Attention":
        return _attention(found, position)
    states = [found.state(position, k) for k in range(1 if len(node.inputs) == 1 else 2)]
    out_state = found.analysis.walk.states.get(node.outputs[0].name or "")
    if out_state is None:
        return None
    letters: Sequence[Sequence[str | None]]
    out: Sequence[str | None]
    if node.op_type == "MatMul":
        *letters, out = matmul_letters(states[0], states[1], out_state.rank)
    elif node.op_type == "Gemm":
        *letters, out = gemm_letters(node)
    else:
        equation = attribute(node, "equation", "")
        text = equation.decode() if isinstance(equation, bytes) else str(equation)
        if len(node.inputs) > 2:
            return None
        letters, out = einsum_terms(text, [s.rank for s in states])
        if any(len(set(x)) < len(x) for x in letters):
            return None
    operands = []
    for k, (state, names) in enumerate(zip(states, letters, strict=True)):
        bounds = found.operand(position, k)
        assert bounds is not None
        operands.append(Operand(k, tuple(names), bounds, _marked(found, state, names)))
    summed = frozenset(x for names in letters for x in names if x is not None and x not in out)
    return Sum(position, operands, _marked(found, out_state, out), summed)


def _marked(found: Intervals, state: State, letters: Sequence[str | None]) -> list[Marked]:
    of, made = found.analysis.classes.of, []
    for f in state.factors:
        names = [letters[a] for a in f.axes]
        if all(x is not None for x in names):
            made.append(Marked(of[f.labels], tuple(x for x in names if x is not None)))
    return made


def _conv(found: Intervals, position: int) -> Sum | None:
    """Channels by (group, channel in the group); a group of one channel sums nothing."""
    node = found.analysis.walk.nodes[position]
    x, w = found.state(position, 0), found.state(position, 1)
    out = found.analysis.walk.states.get(node.outputs[0].name or "")
    group, transposed = int(attribute(node, "group", 1)), node.op_type == "ConvTranspose"
    inside, outside = x.shape[1] // group, (w.shape[1] if transposed else w.shape[0] // group)
    if inside == 1 or out is None or any(1 in f.axes and f.axes != (1,) for f in x.factors):
        return None
    data, weight = found.operand(position, 0), found.operand(position, 1)
    assert data is not None and weight is not None
    data = data.merged(range(2, x.rank)).map(lambda e: e.reshape(e.shape[:2]))
    data = refit(data, x.shape[:2], (x.shape[0], group, inside))
    first = (group, inside, outside) if transposed else (group, outside, inside)
    weight = refit(weight, w.shape, (*first, *w.shape[2:]))
    taps = tuple(f"t{k}" for k in range(w.rank - 2))
    names = ("g", "c", "o", *taps) if transposed else ("g", "o", "c", *taps)
    return Sum(
        position,
        [
            Operand(0, ("n", "g", "c"), data, _channels(found, x, group, "c")),
            Operand(1, names, weight, []),
        ],
        _channels(found, out, group, "o"),
        frozenset("c"),
    )


def _channels(found: Intervals, state: State, group: int, letter: str) -> list[Marked]:
    of = found.analysis.classes.of
    return [Marked(of[f.labels].reshape(group, -1), ("g", letter)) for f in state.factors if f.axes == (1,)]


def _attention(found: Intervals, position: int) -> Sum | None:
    """Return products of queries and keys, per head; they matter where one of the head's results does."""
    node, of = found.analysis.walk.nodes[position], found.analysis.classes.of
    out = found.analysis.walk.states.get(node.outputs[0].name or "")
    q = found.state(position, 0)
    heads = q.shape[1] if q.rank == 4 else int(attribute(node, "q_num_heads", 1))
    if out is None or any(v.name for v in node.outputs[1:]):
        return None
    for k in (0, 1):
        state = found.state(position, k)
        ours, width = ({1, 3}, 3) if state.rank == 4 else ({2}, 2)
        if any(width in f.axes and not set(f.axes) <= ours for f in state.factors):
            return None
    operands = []
    for k in (0, 1):
        state, bounds = found.state(position, k), found.operand(position, k)
        assert bounds is not None
        count = attribute(node, "q_num_heads" if k == 0 else "kv_num_heads", 1)
        own = state.shape[1] if state.rank == 4 else int(count)
        grid, marks = _by_head(state, bounds, of, own)
        if grid.shape[0] != 1:
            times = heads // own
            grid = Interval(np.repeat(grid.lo, times, axis=0), np.repeat(grid.hi, times, axis=0))
        marks = [np.repeat(m, heads // own, axis=0) for m in marks]
        operands.append(Operand(k, ("h", "d"), grid, [Marked(m, ("h", "d")) for m in marks]))
    results = _by_head(out, Interval.unbounded(out.rank), of, heads)[1]
    return Sum(position, operands, [Marked(m, ("h", "e")) for m in results], frozenset("d"))


def _by_head(state: State, bounds: Interval, of: Labels, heads: int) -> tuple[Interval, list[Labels]]:
    """Return bounds and classes of a value of Attention by (head, position in the head)."""
    if state.rank == 4:
        grid = bounds.merged((0, 2)).map(lambda e: e.reshape(e.shape[1], e.shape[3]))
        wide = (heads, state.shape[3])
        marks = []
        for f in state.factors:
            if set(f.axes) <= {1, 3}:
                shape = [n if a in f.axes else 1 for a, n in ((1, heads), (3, state.shape[3]))]
                marks.append(np.broadcast_to(of[f.labels].reshape(shape), wide))
        return grid, marks
    width = state.shape[2] // heads
    flat = bounds.merged((0, 1)).map(lambda e: e.reshape(-1))
    grid = refit(flat, (heads * width,), (heads, width))
    return grid, [of[f.labels].reshape(heads, width) for f in state.factors if f.axes == (2,)]


def _finish(found: Intervals, made: Sum) -> None:
    """Fill in which entries may be nonzero. A weight that is not finite makes something of a zero, so nothing is."""
    node = found.analysis.walk.nodes[made.node]
    values = [node.inputs[o.index] for o in made.operands]
    broken = [
        v is not None and v.name in found.parameters and not np.isfinite(o.bounds.lo).all()
        for v, o in zip(values, made.operands, strict=True)
    ]
    useful = {x for o in made.operands for m in o.marked for x in m.letters} | {x for m in made.out for x in m.letters}
    for k, operand in enumerate(made.operands):
        if any(b for j, b in enumerate(broken) if j != k):
            continue
        nonzero = ~operand.bounds.zero
        if nonzero.all():
            continue
        shared = useful | {x for j, o in enumerate(made.operands) if j != k for x in o.letters if x is not None}
        keep = [a for a, x in enumerate(operand.letters) if x in shared and nonzero.shape[a] > 1]
        gone = tuple(a for a in range(nonzero.ndim) if a not in keep)
        operand.own = tuple(x for a, x in enumerate(operand.letters) if a in keep and x is not None)
        operand.nonzero = np.asarray(nonzero.any(axis=gone))


def is_depthwise(found: Intervals, position: int) -> bool:
    """Return whether each group of a convolution has one channel.

    Positions stay apart, nothing is summed over units.
    """
    node = found.analysis.walk.nodes[position]
    if node.op_type not in ("Conv", "ConvTranspose"):
        return False
    return bool(found.state(position, 0).shape[1] == attribute(node, "group", 1))


def mark(alive: Mask, classes: Labels, hit: Mask) -> bool:
    """Note classes as alive; whether one of them is new."""
    new = classes[hit]
    if alive[new].all():
        return False
    alive[new] = True
    return True


def all_classes(of: Labels, states: Iterable[State]) -> Labels:
    """Return classes of every label of some values."""
    parts = [of[f.labels].ravel() for s in states for f in s.factors]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
