"""The integer scale system and the sign system over F2 (DESIGN, section 3).

Unknowns are log-scales l(variable, space): what a value's factor may be multiplied by on the classes of a space. Every
equation says the same for every class of a space, so one representative stands for all. Equations with two terms of
coefficient one are solved by connected components of a signed graph; what remains, a few sums per model, by integer
elimination. The sign system is the same over F2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from cipm_ir.ir.labels import ZERO, Labels
from cipm_ir.symmetry.classes import Classes
from cipm_ir.symmetry.spaces import RawSpace
from cipm_ir.symmetry.walk import Walk

Term = tuple[int, int]
"""(unknown, coefficient)"""
Vector = tuple[int, ...]


@dataclass
class Directions:
    """Free directions of one space: per variable, an integer exponent for each scale (sign) direction."""

    scales: int
    signs: int
    scale: dict[int, Vector]
    sign: dict[int, Vector]
    exact: tuple[bool, ...]
    """Per scale direction: whether power-of-two elements leave every result the same bit for bit."""


def solve_scales(walk: Walk, classes: Classes, spaces: list[RawSpace]) -> list[Directions]:
    """Scale and sign directions of every unit and cell space; none for blocks."""
    space_of = np.full(classes.count, -1, np.int64)
    for k, space in enumerate(spaces):
        if space.kind != "blocks" and space.table.shape[1] == 1:
            space_of[space.table[0, 0]] = k
    rows = _touched(walk, classes, space_of)
    leaf_vars = _leaf_variables(walk, classes, space_of)
    scale_rows: list[dict[int, list[Term]]] = []
    per_space_scale: dict[int, list[list[Term]]] = {}
    per_space_sign: dict[int, list[list[Term]]] = {}
    inexact: dict[int, set[int]] = {}
    del scale_rows
    for number, touched in rows:
        eq = walk.rec.equations[number]
        terms = _collect(eq.terms)
        for k in touched:
            if eq.inexact:
                inexact.setdefault(k, set()).update(v for v, _ in terms)
                continue
            if eq.scale:
                per_space_scale.setdefault(k, []).append(terms)
            if eq.sign:
                per_space_sign.setdefault(k, []).append([(v, 1) for v, c in terms if c % 2])
    out = []
    cache: dict[object, tuple[int, dict[int, Vector], int, dict[int, Vector]]] = {}
    for k in range(len(spaces)):
        variables = leaf_vars.get(k, [])
        if not variables:
            out.append(Directions(0, 0, {}, {}, ()))
            continue
        signature = (tuple(variables), _frozen(per_space_scale.get(k, [])), _frozen(per_space_sign.get(k, [])))
        known = cache.get(signature)
        if known is None:
            n, scale = nullspace(per_space_scale.get(k, []), variables)
            j, sign = nullspace_f2(per_space_sign.get(k, []), variables)
            known = cache[signature] = (n, scale, j, sign)
        n, scale, j, sign = known
        tainted = inexact.get(k, set())
        basis = _all_exponents(per_space_scale.get(k, []), variables, tainted) if tainted else {}
        exact = tuple(not any(basis.get(v, (0,) * n)[d] for v in tainted) for d in range(n))
        out.append(Directions(n, j, scale, sign, exact))
    return out


def _frozen(system: list[list[Term]]) -> tuple[tuple[Term, ...], ...]:
    return tuple(tuple(terms) for terms in system)


def _collect(terms: Iterable[Term]) -> list[Term]:
    """Terms with equal unknowns added, zeros dropped."""
    total: dict[int, int] = {}
    for v, c in terms:
        total[v] = total.get(v, 0) + c
    return [(v, c) for v, c in total.items() if c and v != ZERO]


def _touched(walk: Walk, classes: Classes, space_of: Labels) -> list[tuple[int, list[int]]]:
    """For each equation, the spaces whose representative it mentions."""
    atom_space = space_of[classes.of]
    cache: dict[int, list[int]] = {}
    out = []
    for number, eq in enumerate(walk.rec.equations):
        hit = cache.get(id(eq.labels))
        if hit is None:
            found = atom_space[eq.labels]
            found = found[found >= 0]
            hit = cache[id(eq.labels)] = np.unique(found).tolist() if len(found) else []
        if hit:
            out.append((number, hit))
    return out


def _leaf_variables(walk: Walk, classes: Classes, space_of: Labels) -> dict[int, list[int]]:
    """Per space, the variables of the parameters' factors that it moves."""
    atom_space = space_of[classes.of]
    out: dict[int, list[int]] = {}
    for f in walk.leaf_factors:
        if not f.active or walk.leaves[f.leaf].dtype.is_floating_point() is False:
            continue
        found = atom_space[f.base : f.base + f.size]
        found = found[found >= 0]
        for k in np.unique(found).tolist() if len(found) else []:
            out.setdefault(k, []).append(f.var)
    return {k: sorted(set(v)) for k, v in out.items()}


# ---------------------------------------------------------------- over the integers
def _reduce(system: list[list[Term]]) -> tuple[dict[int, Term | None], list[list[Term]]]:
    """Solve two-term equations: each unknown becomes +-1 times a representative, or zero (None); the rest remains."""
    signs: dict[int, Term | None] = {}
    rest = system
    while True:
        rest = [_collect(_substitute(terms, signs)) for terms in rest]
        rest = [terms for terms in rest if terms]
        two = [t for t in rest if len(t) == 1 or (len(t) == 2 and abs(t[0][1]) == abs(t[1][1]))]
        if not two:
            return signs, rest
        rest = [t for t in rest if not (len(t) == 1 or (len(t) == 2 and abs(t[0][1]) == abs(t[1][1])))]
        fresh = _components(two)
        signs = {v: (None if r is None else _through(r, fresh)) for v, r in signs.items()} | {
            v: r for v, r in fresh.items() if v not in signs
        }


def _through(term: Term, fresh: dict[int, Term | None]) -> Term | None:
    if term[0] not in fresh:
        return term
    inner = fresh[term[0]]
    return None if inner is None else (inner[0], inner[1] * term[1])


def _substitute(terms: list[Term], signs: dict[int, Term | None]) -> list[Term]:
    out = []
    for v, c in terms:
        if v not in signs:
            out.append((v, c))
            continue
        r = signs[v]
        if r is not None:
            out.append((r[0], r[1] * c))
    return out


def _components(two: list[list[Term]]) -> dict[int, Term | None]:
    """Signed components: node 2i stands for +x_i, node 2i+1 for -x_i; x and -x together mean x = 0."""
    names = sorted({v for terms in two for v, _ in terms})
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
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(2 * len(names), 2 * len(names))).tocsr()
    _, label = connected_components(graph, directed=False)
    chosen: dict[int, Term] = {}
    out: dict[int, Term | None] = {}
    for i, v in enumerate(names):
        plus, minus = int(label[2 * i]), int(label[2 * i + 1])
        if plus == minus:
            out[v] = None
        elif plus in chosen:
            out[v] = chosen[plus]
        else:
            chosen[plus], chosen[minus] = (v, 1), (v, -1)
            out[v] = (v, 1)
    return out


def _all_exponents(system: list[list[Term]], variables: list[int], extra: Iterable[int]) -> dict[int, Vector]:
    """Exponents in the basis of `nullspace`, for further unknowns too."""
    return _solution(system, variables, extra)[1]


def nullspace(system: list[list[Term]], variables: list[int]) -> tuple[int, dict[int, Vector]]:
    """Integer basis of the solutions, seen on ``variables``: how many directions, and each variable's exponents."""
    n, exponents = _solution(system, variables, ())
    return n, {v: exponents[v] for v in variables if any(exponents[v])}


def _solution(system: list[list[Term]], variables: list[int], extra: Iterable[int]) -> tuple[int, dict[int, Vector]]:
    signs, rest = _reduce(system)
    wanted = list(dict.fromkeys([*variables, *extra]))
    image: dict[int, Term | None] = {v: signs.get(v, (v, 1)) for v in wanted}
    unknowns = sorted({r[0] for r in image.values() if r is not None} | {v for terms in rest for v, _ in terms})
    basis = _eliminate(rest, unknowns)
    column = {v: i for i, v in enumerate(unknowns)}

    def vector(v: int) -> list[Fraction]:
        r = image[v]
        return [Fraction(0)] * len(basis) if r is None else [b[column[r[0]]] * r[1] for b in basis]

    seen = _independent([vector(v) for v in variables], len(basis))
    chosen = _integral([[vector(v)[d] for v in wanted] for d in seen])
    return len(chosen), {v: tuple(row[i] for row in chosen) for i, v in enumerate(wanted)}


def _eliminate(rows: list[list[Term]], unknowns: list[int]) -> list[list[Fraction]]:
    """Basis of the null space by exact Gauss-Jordan elimination; free unknowns are set to one in turn."""
    index = {v: i for i, v in enumerate(unknowns)}
    matrix = []
    for terms in rows:
        line = [Fraction(0)] * len(unknowns)
        for v, c in terms:
            line[index[v]] += c
        matrix.append(line)
    pivots: list[int] = []
    row = 0
    for col in range(len(unknowns)):
        pick = next((r for r in range(row, len(matrix)) if matrix[r][col]), None)
        if pick is None:
            continue
        matrix[row], matrix[pick] = matrix[pick], matrix[row]
        head = matrix[row][col]
        matrix[row] = [x / head for x in matrix[row]]
        for r in range(len(matrix)):
            if r != row and matrix[r][col]:
                factor = matrix[r][col]
                matrix[r] = [x - factor * y for x, y in zip(matrix[r], matrix[row], strict=True)]
        pivots.append(col)
        row += 1
    basis = []
    for free in (c for c in range(len(unknowns)) if c not in pivots):
        vector = [Fraction(0)] * len(unknowns)
        vector[free] = Fraction(1)
        for r, p in enumerate(pivots):
            vector[p] = -matrix[r][free]
        basis.append(vector)
    return basis


def _independent(columns: list[list[Fraction]], n: int) -> list[int]:
    """Basis vectors that the variables can tell apart: a maximal independent set."""
    kept: list[int] = []
    reduced: list[list[Fraction]] = []
    for d in range(n):
        row = [c[d] for c in columns]
        for other in reduced:
            head = next(i for i, x in enumerate(other) if x)
            if row[head]:
                factor = row[head] / other[head]
                row = [x - factor * y for x, y in zip(row, other, strict=True)]
        if any(row):
            reduced.append(row)
            kept.append(d)
    return kept


def _integral(rows: list[list[Fraction]]) -> list[list[int]]:
    out = []
    for row in rows:
        scale = lcm(*(x.denominator for x in row)) if row else 1
        whole = [int(x * scale) for x in row]
        divisor = gcd(*whole) or 1
        head = next((x for x in whole if x), 1)
        out.append([x // divisor * (1 if head > 0 else -1) for x in whole])
    return out


# ---------------------------------------------------------------- over F2
def nullspace_f2(system: list[list[Term]], variables: list[int]) -> tuple[int, dict[int, Vector]]:
    """Basis of the sign system seen on ``variables``; rows as Python integers, one bit per unknown."""
    parent: dict[int, int] = {}

    def find(v: int) -> int:
        while parent.get(v, v) != v:
            v = parent[v]
        return v

    rest = []
    for terms in system:
        names = [v for v, _ in terms]
        if len(names) == 2:
            a, b = find(names[0]), find(names[1])
            if a != b:
                parent[max(a, b)] = min(a, b)
        elif names:
            rest.append(names)
    unknowns = sorted({find(v) for v in variables} | {find(v) for names in rest for v in names})
    index = {v: i for i, v in enumerate(unknowns)}
    pivots: dict[int, int] = {}
    for names in rest:
        row = 0
        for v in names:
            row ^= 1 << index[find(v)]
        for p, other in pivots.items():
            if row >> p & 1:
                row ^= other
        if row:
            p = row.bit_length() - 1
            for q in pivots:
                if pivots[q] >> p & 1:
                    pivots[q] ^= row
            pivots[p] = row
    free = [i for i in range(len(unknowns)) if i not in pivots]
    wanted = [index[find(v)] for v in variables]
    basis = []
    reduced: list[int] = []
    for f in free:
        vector = (1 << f) | sum(1 << p for p, row in pivots.items() if row >> f & 1)
        seen = sum(1 << k for k, i in enumerate(wanted) if vector >> i & 1)
        for other in reduced:
            seen = min(seen, seen ^ other)
        if seen:
            reduced.append(seen)
            basis.append(vector)
    exponents = {v: tuple(b >> i & 1 for b in basis) for v, i in zip(variables, wanted, strict=True)}
    return len(basis), {v: e for v, e in exponents.items() if any(e)}
