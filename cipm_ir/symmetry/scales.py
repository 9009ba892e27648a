"""The integer scale system and the sign system over F2.

Unknowns are log-scales l(variable, space): what a value's factor may be multiplied by on the classes of a space. Every
equation says the same for every class of a space, so one representative stands for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cipm_ir.ir.labels import Labels
from cipm_ir.ops.events import Equation
from cipm_ir.symmetry.classes import Classes, Flags, components, unique_pairs
from cipm_ir.symmetry.known import FLOATS
from cipm_ir.symmetry.linear import Term, collect, nullspace, nullspace_f2
from cipm_ir.symmetry.spaces import RawSpace
from cipm_ir.symmetry.walk import Walk

Vector = tuple[int, ...]


@dataclass
class Directions:
    """Free directions of one space: per variable, an integer exponent for each scale (sign) direction."""

    scales: int = 0
    signs: int = 0
    scale: dict[int, Vector] = field(default_factory=dict)
    sign: dict[int, Vector] = field(default_factory=dict)
    exact: tuple[bool, ...] = ()
    """Per scale direction: whether power-of-two elements leave every result the same bit for bit."""


def solve_scales(walk: Walk, classes: Classes, spaces: list[RawSpace]) -> list[Directions]:
    """Scale and sign directions of every unit and cell space; none for blocks."""
    space_of = np.full(classes.count, -1, np.int64)
    for k, space in enumerate(spaces):
        if space.kind != "blocks" and space.table.shape[1] == 1:
            space_of[space.table[0, 0]] = k
    atom_space = space_of[classes.of]
    leaf_space, leaf_var = _leaf_variables(walk, atom_space)
    equation, at = _touched(walk, atom_space)
    table = _Table.of(walk.rec.equations)
    scale = _Components(table, equation, at, leaf_space, leaf_var, len(spaces), signed=True)
    sign = _Components(table, equation, at, leaf_space, leaf_var, len(spaces), signed=False)
    tainted: dict[int, set[int]] = {}
    rounding = table.inexact[equation]
    for k, v in zip(at[rounding].tolist(), table.variable[equation[rounding], 0].tolist(), strict=True):
        tainted.setdefault(k, set()).add(v)
    bounds = np.searchsorted(leaf_space, np.arange(len(spaces) + 1))
    out = []
    for k in range(len(spaces)):
        span = slice(int(bounds[k]), int(bounds[k + 1]))
        if span.start == span.stop:
            out.append(Directions())
            continue
        n, exponents, exact = scale.directions(k, span, tainted.get(k, set()))
        j, signs, _ = sign.directions(k, span, set())
        out.append(Directions(n, j, exponents, signs, exact))
    return out


@dataclass
class _Table:
    """Equations of at most two terms as arrays; longer ones are kept as they are."""

    equations: list[Equation]
    terms: Labels
    variable: Labels
    coefficient: Labels
    scale: Flags
    sign: Flags
    inexact: Flags

    @classmethod
    def of(cls, equations: list[Equation]) -> _Table:
        collected = [
            eq.terms if len({v for v, _ in eq.terms}) == len(eq.terms) else collect(eq.terms) for eq in equations
        ]
        padded = [(*t[:2], (0, 0), (0, 0))[:2] for t in collected]
        pairs = np.asarray(padded, np.int64).reshape(-1, 2, 2)
        flags = np.asarray([(eq.scale, eq.sign, eq.inexact) for eq in equations], bool).reshape(-1, 3)
        length = np.asarray([len(t) for t in collected], np.int64)
        return cls(equations, length, pairs[:, :, 0], pairs[:, :, 1], flags[:, 0], flags[:, 1], flags[:, 2])


class _Components:
    """Equations of one or two terms, solved for all spaces at once; the rest is kept by space.

    An unknown is ``variable * spaces + space``. In the double cover, node 2i is +x_i and 2i + 1 is -x_i; over F2
    the two are the same, and one extra node stands for zero.
    """

    def __init__(
        self,
        table: _Table,
        equation: Labels,
        at: Labels,
        leaf_space: Labels,
        leaf_var: Labels,
        count: int,
        *,
        signed: bool,
    ) -> None:
        self.count, self.signed, self.variable = count, signed, leaf_var
        holds = (table.scale if signed else table.sign)[equation] & ~table.inexact[equation]
        equation, at = equation[holds], at[holds]
        length, c = table.terms[equation], table.coefficient[equation]
        if not signed:  # even coefficients vanish
            c = c % 2
            long = length > 2
            length = np.where(long, length, np.count_nonzero(c, axis=1))
        unknown = table.variable[equation] * count + at[:, None]
        one = length == 1
        two = (length == 2) & (np.abs(c[:, 0]) == np.abs(c[:, 1]))
        self.rest: dict[int, list[list[Term]]] = {}
        for e, k in zip(
            equation[(length > 0) & ~one & ~two].tolist(), at[(length > 0) & ~one & ~two].tolist(), strict=True
        ):
            terms = [(v * count + k, x) for v, x in collect(table.equations[e].terms)]
            self.rest.setdefault(k, []).append(terms if signed else [(v, 1) for v, x in terms if x % 2])
        single = np.where(c[one, 0] != 0, unknown[one, 0], unknown[one, 1])
        double = unknown[two]
        leaf = leaf_var * count + leaf_space
        extra = [v for rows in self.rest.values() for terms in rows for v, _ in terms]
        parts = [single, double.ravel(), leaf, np.asarray(extra, np.int64)]
        self.names, index = np.unique(np.concatenate(parts), return_inverse=True)
        first, second = index[: len(single)], index[len(single) : len(single) + double.size].reshape(-1, 2)
        n = len(self.names)
        if signed:
            flip = (c[two, 0] * c[two, 1] > 0).astype(np.int64)
            a = np.concatenate([2 * first, 2 * second[:, 0], 2 * second[:, 0] + 1])
            b = np.concatenate([2 * first + 1, 2 * second[:, 1] + flip, 2 * second[:, 1] + 1 - flip])
            _, label = components(2 * n, [(a, b)])
            plus, minus = label[0::2], label[1::2]
            self.key = np.minimum(plus, minus)
            self.coefficient = np.where(plus == minus, 0, np.where(plus == self.key, 1, -1))
        else:
            a = np.concatenate([first, second[:, 0]])
            b = np.concatenate([np.full(len(first), n), second[:, 1]])
            _, key = components(n + 1, [(a, b)])
            self.key, self.coefficient = key[:n], np.where(key[:n] == key[n], 0, 1)
        start = len(single) + double.size
        self.leaf_key = self.key[index[start : start + len(leaf)]].tolist()
        self.leaf_coefficient = self.coefficient[index[start : start + len(leaf)]].tolist()
        self.leaf_variable = leaf_var.tolist()
        where = index[start + len(leaf) :]
        self._met = dict(
            zip(extra, zip(self.key[where].tolist(), self.coefficient[where].tolist(), strict=True), strict=True)
        )

    def _image(self, unknown: int) -> tuple[int, int]:
        """(component, coefficient) of an unknown; coefficient 0 where it is zero or in no equation."""
        met = self._met.get(unknown)
        if met is not None:
            return met
        i = int(np.searchsorted(self.names, unknown))
        known = i < len(self.names) and int(self.names[i]) == unknown
        return (int(self.key[i]), int(self.coefficient[i])) if known else (-1, 0)

    def directions(self, space: int, span: slice, tainted: set[int]) -> tuple[int, dict[int, Vector], tuple[bool, ...]]:
        """Return the number of directions, exponents by variable.

        And which of them leave the tainted variables alone.
        """
        images = list(zip(self.leaf_variable[span], self.leaf_key[span], self.leaf_coefficient[span], strict=True))
        touched = {key for v in tainted if (image := self._image(v * self.count + space))[1] for key in image[:1]}
        if space in self.rest:
            return self._solved(space, images, touched)
        order = {key: d for d, key in enumerate(dict.fromkeys(key for _, key, c in images if c))}
        n = len(order)
        exponents = {v: (0,) * order[key] + (c,) + (0,) * (n - 1 - order[key]) for v, key, c in images if c}
        return n, exponents, tuple(key not in touched for key in order)

    def _solved(
        self, space: int, images: list[tuple[int, int, int]], touched: set[int]
    ) -> tuple[int, dict[int, Vector], tuple[bool, ...]]:
        rest = []
        for terms in self.rest[space]:
            seen = [(self._image(u), c) for u, c in terms]
            rest.append([(key, c * d) for (key, d), c in seen if d])
        wanted = sorted({key for _, key, c in images if c})
        if self.signed:
            n, solved = nullspace(rest, wanted, touched)
        else:
            n, solved = nullspace_f2([[v for v, c in collect(t) if c % 2] for t in rest], wanted)
        exponents = {v: tuple(c * e for e in solved[key]) for v, key, c in images if c and key in solved}
        exact = tuple(not any(solved.get(key, (0,) * n)[d] for key in touched) for d in range(n))
        return n, exponents, exact


def _touched(walk: Walk, atom_space: Labels) -> tuple[Labels, Labels]:
    """Return pairs (equation, space whose representative it mentions)."""
    cache: dict[int, list[int]] = {}
    equations: list[int] = []
    at: list[int] = []
    for number, eq in enumerate(walk.rec.equations):
        hit = cache.get(id(eq.labels))
        if hit is None:
            found = atom_space[eq.labels]
            found = found[found >= 0]
            hit = cache[id(eq.labels)] = sorted(set(found.tolist())) if found.size else []
        equations += [number] * len(hit)
        at += hit
    return np.asarray(equations, np.int64), np.asarray(at, np.int64)


def _leaf_variables(walk: Walk, atom_space: Labels) -> tuple[Labels, Labels]:
    """Return pairs (space, variable) of the parameters' factors that a space moves, sorted."""
    factors = walk.leaf_factors
    if not factors:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    base = np.asarray([f.base for f in factors], np.int64)  # ascending: in order of allocation
    end = base + np.asarray([f.size for f in factors], np.int64)
    used = np.asarray([f.active and walk.leaves[f.leaf].dtype in FLOATS for f in factors], bool)
    variable = np.asarray([f.scale_var for f in factors], np.int64)
    atoms = np.flatnonzero(atom_space >= 0)
    owner = np.maximum(np.searchsorted(base, atoms, side="right") - 1, 0)
    inside = (atoms >= base[owner]) & (atoms < end[owner]) & used[owner]
    pairs = unique_pairs(atom_space[atoms[inside]], variable[owner[inside]])
    return pairs[:, 0], pairs[:, 1]
