"""Sparse exact linear algebra for the scale and sign systems: equations of a few terms, coefficients of one.

Equations of one or two terms are solved for all unknowns at once by connected components of a signed graph. The rest
is eliminated row by row over the rationals (over F2 for signs), pivots chosen where nothing fills in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from cipm_ir.ir.components import connected_components

Term = tuple[int, int]
"""(unknown, coefficient)"""
Row = dict[int, Fraction | int]


def collect(terms: Iterable[Term]) -> list[Term]:
    """Terms with equal unknowns added, zeros dropped."""
    total: dict[int, int] = {}
    for v, c in terms:
        total[v] = total.get(v, 0) + c
    return [(v, c) for v, c in total.items() if c]


class Reduced:
    """Each unknown as +-1 times a representative or zero, and the equations that remain among representatives."""

    def __init__(self, system: Iterable[list[Term]], *, preferred: Collection[int] = ()) -> None:
        self._image: dict[int, Term | None] = {}
        rest = [collect(t) for t in system]
        rest = [t for t in rest if t]
        while True:
            two = [t for t in rest if _simple(t)]
            if not two:
                break
            rest = [t for t in rest if not _simple(t)]
            fresh = _components(two, preferred)
            for v, r in self._image.items():
                if r is not None and r[0] in fresh:
                    inner = fresh[r[0]]
                    self._image[v] = None if inner is None else (inner[0], inner[1] * r[1])
            self._image.update({v: r for v, r in fresh.items() if v not in self._image})
            rest = [t for t in (collect(self._substituted(t)) for t in rest) if t]
        self.rest = rest

    def image(self, unknown: int) -> Term | None:
        """(representative, +-1), or None for zero."""
        return self._image.get(unknown, (unknown, 1))

    def _substituted(self, terms: list[Term]) -> list[Term]:
        images = ((self.image(v), c) for v, c in terms)
        return [(r[0], r[1] * c) for r, c in images if r is not None]


def _simple(terms: list[Term]) -> bool:
    return len(terms) == 1 or (len(terms) == 2 and abs(terms[0][1]) == abs(terms[1][1]))


def _components(two: list[list[Term]], preferred: Collection[int]) -> dict[int, Term | None]:
    """Signed components: node 2i stands for +x_i, node 2i+1 for -x_i; x and -x together mean x = 0."""
    names = sorted({v for terms in two for v, _ in terms}, key=lambda v: (v not in preferred, v))
    index = {v: i for i, v in enumerate(names)}
    a, b = [], []
    for terms in two:
        i = index[terms[0][0]]
        if len(terms) == 1:
            a.append(2 * i)
            b.append(2 * i + 1)
            continue
        j = index[terms[1][0]]
        flip = int(terms[0][1] * terms[1][1] > 0)  # x + y = 0
        a += [2 * i, 2 * i + 1]
        b += [2 * j + flip, 2 * j + 1 - flip]
    label = connected_components(np.array(a, np.int64), np.array(b, np.int64), 2 * len(names))[1].tolist()
    chosen: dict[int, Term] = {}
    out: dict[int, Term | None] = {}
    for i, v in enumerate(names):
        plus, minus = label[2 * i], label[2 * i + 1]
        if plus == minus:
            out[v] = None
        elif plus in chosen:
            out[v] = chosen[plus]
        else:
            chosen[plus], chosen[minus] = (v, 1), (v, -1)
            out[v] = (v, 1)
    return out


def eliminate(rows: list[list[Term]], preferred: Collection[int]) -> dict[int, Row]:
    """Express pivot unknowns by free ones; preferred unknowns are kept free where possible."""
    work: list[Row] = [dict(collect(r)) for r in rows]
    where: dict[int, set[int]] = {}
    for k, row in enumerate(work):
        for v in row:
            where.setdefault(v, set()).add(k)
    solved: list[tuple[int, Row]] = []
    todo = set(range(len(work)))
    while todo:
        k, v = _pivot(work, where, todo, preferred)
        if k < 0:
            break
        todo.discard(k)
        row = work[k]
        head = row.pop(v)
        expression: Row = {w: -c if head == 1 else Fraction(-c) / head for w, c in row.items()}
        for other in list(where[v] - {k}):
            if other not in todo:
                continue
            factor = work[other].pop(v)
            for w, c in expression.items():
                value = work[other].get(w, 0) + factor * c
                if value:
                    work[other][w] = value
                    where[w].add(other)
                else:
                    work[other].pop(w, None)
                    where[w].discard(other)
            if not work[other]:
                todo.discard(other)
        solved.append((v, expression))
    out: dict[int, Row] = {}
    for v, expression in reversed(solved):
        total: Row = {}
        for w, c in expression.items():
            for u, d in out.get(w, {w: 1}).items():
                value = total.get(u, 0) + c * d
                if value:
                    total[u] = value
                else:
                    total.pop(u, None)
        out[v] = total
    return out


def _pivot(work: list[Row], where: dict[int, set[int]], todo: set[int], preferred: Collection[int]) -> tuple[int, int]:
    """Return a pivot that appears in few rows, without looking at all of them."""
    best: tuple[tuple[bool, int, bool], int, int] | None = None
    for k in sorted(todo):
        for v, c in work[k].items():
            key = (abs(c) != 1, len(where[v] & todo), v in preferred)
            if best is None or key < best[0]:
                best = (key, k, v)
        if best is not None and best[0] <= (False, 1, False):
            break
    return (-1, -1) if best is None else (best[1], best[2])


def nullspace(
    system: list[list[Term]], variables: list[int], extra: Iterable[int] = ()
) -> tuple[int, dict[int, tuple[int, ...]]]:
    """Integer basis of the solutions as seen on ``variables``: how many directions, and each unknown's exponents.

    Unknowns in ``extra`` get exponents in the same basis, without adding directions.
    """
    reduced = Reduced(system, preferred=set(variables))
    images = {v: reduced.image(v) for v in dict.fromkeys([*variables, *extra])}
    preferred = {r[0] for v in variables if (r := images[v]) is not None}
    pivots = eliminate(reduced.rest, preferred)
    rows: dict[int, Row] = {}
    for v, r in images.items():
        rows[v] = {} if r is None else {w: c * r[1] for w, c in pivots.get(r[0], {r[0]: 1}).items()}
    free = list(dict.fromkeys(w for v in variables for w in rows[v]))
    chosen = free if all(f in preferred for f in free) else _independent([rows[v] for v in variables], free)
    columns: dict[int, list[tuple[int, Fraction | int]]] = {f: [] for f in chosen}
    index = {v: i for i, v in enumerate(images)}
    for v, row in rows.items():
        for f, c in row.items():
            if f in columns:
                columns[f].append((index[v], c))
    table = np.zeros((len(index), len(chosen)), np.int64)
    for d, f in enumerate(chosen):
        scale = lcm(*(c.denominator for _, c in columns[f]))
        where, whole = [i for i, _ in columns[f]], [int(c * scale) for _, c in columns[f]]
        head = next((x for i, x in zip(where, whole, strict=True) if i < len(variables)), 1)
        table[where, d] = whole
        table[:, d] //= gcd(*whole) * (
            1 if head > 0 else -1
        )  # divides the extra ones too: half of one is no power of two
    return len(chosen), {v: tuple(e) for v, e in zip(index, table.tolist(), strict=True) if any(e)}


def _independent(rows: list[Row], free: list[int]) -> list[int]:
    """Free unknowns whose columns over the rows are independent: a maximal set, in order."""
    kept: list[int] = []
    basis: list[tuple[int, dict[int, Fraction]]] = []
    for f in free:
        column = {k: Fraction(row[f]) for k, row in enumerate(rows) if f in row}
        for head, other in basis:
            if head in column:
                factor = column[head] / other[head]
                for k, c in other.items():
                    value = column.get(k, Fraction(0)) - factor * c
                    if value:
                        column[k] = value
                    else:
                        column.pop(k, None)
        if column:
            basis.append((min(column), column))
            kept.append(f)
    return kept


def nullspace_f2(system: list[list[int]], variables: list[int]) -> tuple[int, dict[int, tuple[int, ...]]]:
    """Basis of the solutions over F2 as seen on ``variables``; an equation is the list of its unknowns."""
    parent: dict[int, int] = {}

    def find(v: int) -> int:
        root = v
        while parent.get(root, root) != root:
            root = parent[root]
        while parent.get(v, v) != root:
            parent[v], v = root, parent[v]
        return root

    rest = []
    for names in system:
        if len(names) == 2:
            a, b = find(names[0]), find(names[1])
            if a != b:
                parent[max(a, b)] = min(a, b)
        elif names:
            rest.append(names)
    zero = {find(names[0]) for names in rest if len(names) == 1}
    sets = []
    for names in rest:
        odd: set[int] = set()
        for v in names:
            odd ^= {find(v)}
        odd -= zero
        if odd:
            sets.append(odd)
    seen = {find(v) for v in variables}
    often: dict[int, int] = {}
    for row in sets:
        for v in row:
            often[v] = often.get(v, 0) + 1
    alone = [(p, row) for row in sets if (p := min((v for v in row if often[v] == 1), default=-1)) >= 0]
    pivots: list[tuple[int, set[int]]] = []
    for row in (row for row in sets if all(often[v] > 1 for v in row)):
        for p, other in pivots:
            if p in row:
                row = row ^ other
        if row:
            inner = [v for v in row if v not in seen]
            pivots.append((min(inner or row), row))
    pivots = alone + pivots  # such an unknown is in no other equation: it follows from the rest, last
    value: dict[int, frozenset[int]] = dict.fromkeys(zero, frozenset())
    for p, row in reversed(pivots):
        total: frozenset[int] = frozenset()
        for v in row - {p}:
            total = total ^ value.get(v, frozenset((v,)))
        value[p] = total
    shown = {v: value.get(find(v), frozenset((find(v),))) for v in variables}
    free = list(dict.fromkeys(f for v in variables for f in sorted(shown[v])))
    kept: list[int] = []
    basis: list[set[int]] = []
    for f in free:
        column = {k for k, v in enumerate(variables) if f in shown[v]}
        for other in basis:
            if min(other) in column:
                column ^= other
        if column:
            basis.append(column)
            kept.append(f)
    return len(kept), {
        v: tuple(int(f in shown[v]) for f in kept) for v in variables if any(f in shown[v] for f in kept)
    }
