"""The integer scale system and the sign system over F2 (DESIGN, section 3).

Unknowns are log-scales l(variable, space): what a value's factor may be multiplied by on the classes of a space. Every
equation says the same for every class of a space, so one representative stands for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cipm_ir.ir.labels import Labels
from cipm_ir.rules.events import Equation
from cipm_ir.symmetry.classes import Classes, components
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
    leaf_space, leaf_var = _leaf_variables(walk, classes, space_of)
    equations, at = _touched(walk, classes, space_of)
    scale = _Components(equations, at, leaf_space, leaf_var, len(spaces), signed=True)
    sign = _Components(equations, at, leaf_space, leaf_var, len(spaces), signed=False)
    tainted: dict[int, set[int]] = {}
    for eq, touched in zip(equations, at, strict=True):
        if eq.inexact:
            for k in touched:
                tainted.setdefault(k, set()).add(eq.terms[0][0])
    by_space: dict[int, list[int]] = {}
    for k, v in zip(leaf_space.tolist(), leaf_var.tolist(), strict=True):
        by_space.setdefault(k, []).append(v)
    out = []
    for k in range(len(spaces)):
        variables = by_space.get(k)
        if variables is None:
            out.append(Directions())
            continue
        n, exponents, exact = scale.directions(k, variables, tainted.get(k, set()))
        j, signs, _ = sign.directions(k, variables, set())
        out.append(Directions(n, j, exponents, signs, exact))
    return out


class _Components:
    """Equations of one or two terms, solved for all spaces at once; the rest is kept by space.

    An unknown is ``variable * spaces + space``. In the double cover, node 2i is +x_i and 2i + 1 is -x_i; over F2
    the two are the same, and one extra node stands for zero.
    """

    def __init__(
        self,
        equations: list[Equation],
        at: list[list[int]],
        leaf_space: Labels,
        leaf_var: Labels,
        count: int,
        *,
        signed: bool,
    ) -> None:
        self.count, self.signed = count, signed
        ones: list[int] = []
        pairs: list[tuple[int, int]] = []
        flips: list[bool] = []
        self.rest: dict[int, list[list[Term]]] = {}
        for eq, touched in zip(equations, at, strict=True):
            if eq.inexact or not (eq.scale if signed else eq.sign):
                continue
            terms = collect(eq.terms) if signed else collect((v, c % 2) for v, c in eq.terms)
            if not signed:
                terms = [(v, 1) for v, c in terms if c % 2]
            if not terms:
                continue
            if len(terms) == 1:
                ones.extend(terms[0][0] * count + k for k in touched)
            elif len(terms) == 2 and abs(terms[0][1]) == abs(terms[1][1]):
                (v, c), (w, d) = terms
                pairs.extend((v * count + k, w * count + k) for k in touched)
                flips.extend([c * d > 0] * len(touched))
            else:
                for k in touched:
                    self.rest.setdefault(k, []).append([(v * count + k, c) for v, c in terms])
        leaf = leaf_var * count + leaf_space
        single = np.asarray(ones, np.int64)
        double = np.asarray(pairs, np.int64).reshape(-1, 2)
        extra = [v for rows in self.rest.values() for terms in rows for v, _ in terms]
        names, index = np.unique(
            np.concatenate([single, double.ravel(), leaf, np.asarray(extra, np.int64)]), return_inverse=True
        )
        one, two = index[: len(single)], index[len(single) : len(single) + double.size].reshape(-1, 2)
        n = len(names)
        if signed:
            flip = np.asarray(flips, np.int64)
            a = np.concatenate([2 * one, 2 * two[:, 0], 2 * two[:, 0] + 1])
            b = np.concatenate([2 * one + 1, 2 * two[:, 1] + flip, 2 * two[:, 1] + 1 - flip])
            _, label = components(2 * n, [(a, b)])
            plus, minus = label[0::2], label[1::2]
            key = np.minimum(plus, minus)
            coefficient = np.where(plus == minus, 0, np.where(plus == key, 1, -1))
        else:
            a, b = np.concatenate([one, two[:, 0]]), np.concatenate([np.full(len(one), n), two[:, 1]])
            _, key = components(n + 1, [(a, b)])
            coefficient = np.where(key[:n] == key[n], 0, 1)
        self._image = dict(zip(names.tolist(), zip(key.tolist(), coefficient.tolist(), strict=False), strict=False))

    def directions(
        self, space: int, variables: list[int], tainted: set[int]
    ) -> tuple[int, dict[int, Vector], tuple[bool, ...]]:
        """Number of directions, exponents by variable, and which of them leave the tainted variables alone."""
        count = self.count
        images = {v: self._image[v * count + space] for v in variables}
        if space in self.rest:
            return self._solved(space, images, tainted)
        order = {key: d for d, key in enumerate(dict.fromkeys(key for key, c in images.values() if c))}
        n = len(order)
        units = {(key, c): tuple(c if d == e else 0 for e in range(n)) for key, d in order.items() for c in (1, -1)}
        bad = {self._image[u][0] for v in tainted if (u := v * count + space) in self._image and self._image[u][1]}
        exponents = {v: units[image] for v, image in images.items() if image[1]}
        return n, exponents, tuple(key not in bad for key in order)

    def _solved(
        self, space: int, images: dict[int, tuple[int, int]], tainted: set[int]
    ) -> tuple[int, dict[int, Vector], tuple[bool, ...]]:
        rest = []
        for terms in self.rest[space]:
            rest.append([(self._image[u][0], c * self._image[u][1]) for u, c in terms if self._image[u][1]])
        wanted = sorted({key for key, c in images.values() if c})
        extra = {
            self._image[u][0] for v in tainted if (u := v * self.count + space) in self._image and self._image[u][1]
        }
        if self.signed:
            n, solved = nullspace(rest, wanted, extra)
        else:
            n, solved = nullspace_f2([[v for v, c in collect(t) if c % 2] for t in rest], wanted)
        exponents = {v: tuple(c * e for e in solved[key]) for v, (key, c) in images.items() if c and key in solved}
        exact = tuple(not any(solved.get(key, (0,) * n)[d] for key in extra) for d in range(n))
        return n, exponents, exact


def _touched(walk: Walk, classes: Classes, space_of: Labels) -> tuple[list[Equation], list[list[int]]]:
    """The equations that mention the representative of a space, and which."""
    atom_space = space_of[classes.of]
    cache: dict[int, list[int]] = {}
    equations, at = [], []
    for eq in walk.rec.equations:
        hit = cache.get(id(eq.labels))
        if hit is None:
            found = atom_space[eq.labels]
            found = found[found >= 0]
            hit = cache[id(eq.labels)] = sorted(set(found.tolist())) if found.size else []
        if hit:
            equations.append(eq)
            at.append(hit)
    return equations, at


def _leaf_variables(walk: Walk, classes: Classes, space_of: Labels) -> tuple[Labels, Labels]:
    """Pairs (space, variable) of the parameters' factors that a space moves."""
    atom_space = space_of[classes.of]
    spaces: list[int] = []
    variables: list[int] = []
    for f in walk.leaf_factors:
        if not f.active or not walk.leaves[f.leaf].dtype.is_floating_point():
            continue
        found = atom_space[f.base : f.base + f.size]
        found = found[found >= 0]
        if found.size:
            here = sorted(set(found.tolist()))
            spaces.extend(here)
            variables.extend([f.var] * len(here))
    pairs = sorted(set(zip(spaces, variables, strict=True)))
    return np.asarray([k for k, _ in pairs], np.int64), np.asarray([v for _, v in pairs], np.int64)
