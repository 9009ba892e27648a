"""What the rules emit while the graph is walked: unifications, pins, marks, blocks and scale equations.

Nothing is decided here. The recorder appends arrays; `cipm_ir.symmetry` turns them into classes, spaces and groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cipm_ir.errors import InputError
from cipm_ir.ir.components import connected_components
from cipm_ir.ir.labels import ZERO, Factor, Labels, mix, occurrence_rank


@dataclass(slots=True, eq=False)
class Unification:
    """Atoms ``a[k]`` and ``b[k]`` move together; the two sides of an event are told apart."""

    a: Labels
    b: Labels
    node: int


@dataclass(slots=True, eq=False)
class Pin:
    """Atoms that must not move, and why."""

    labels: Labels
    node: int
    reason: str


@dataclass(slots=True, eq=False)
class Link:
    """Block labels: ``parents[k]`` moves as a whole with its ``children[k, :]``.

    They are the labels ``whole`` of a factor, by its dimensions ``axes``.
    """

    parents: Labels
    children: Labels
    axes: tuple[int, ...]
    whole: Labels


@dataclass(slots=True, eq=False)
class Equation:
    """``sum(coefficient * l_var(atom)) == 0`` for every atom in ``labels``.

    ``scale`` / ``sign``: whether it holds for log-scales and (coefficients modulo 2) for signs. An *inexact* equation
    holds only where results must stay bit for bit: the epsilon of a normalization.
    """

    labels: Labels
    terms: tuple[tuple[int, int], ...]
    scale: bool
    sign: bool
    inexact: bool = False


@dataclass(slots=True, eq=False)
class Contraction:
    """Both operands of a node are summed over these atoms (equal shapes)."""

    node: int
    a: Labels
    b: Labels


@dataclass(slots=True, eq=False)
class Uniform:
    """Input ``index`` of a node is the same all along ``axis``, where it meets axis ``place`` of a factor.

    Nothing moves with it, but where the factor becomes shorter, so must it.
    """

    node: int
    index: int
    axis: int
    factor: Factor
    place: int


@dataclass
class Recorder:
    """Allocates atoms and scale variables and collects events."""

    atoms: int = 0
    variables: int = 1  # variable 0 is ZERO
    node: int = -1
    unifications: list[Unification] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    marks: list[tuple[Labels, int | np.ndarray]] = field(default_factory=list)
    equations: list[Equation] = field(default_factory=list)
    normalized: list[Labels] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    uniforms: list[Uniform] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    """Which unifications tie copies to what they are copies of."""
    fresh_ranges: list[tuple[int, int]] = field(default_factory=list)
    _marginals: dict[tuple[int, tuple[int, ...]], tuple[Labels, Factor]] = field(default_factory=dict)

    # atoms and variables
    def fresh(self, *shape: int) -> Labels:
        """Return new atoms, all different, that belong to no parameter (blocks, padding)."""
        labels = self.allocate(*shape)
        self.fresh_ranges.append((self.atoms - labels.size, self.atoms))
        return labels

    def allocate(self, *shape: int) -> Labels:
        """Return new atoms for a parameter; the caller keeps the book of them."""
        count = math.prod(shape)
        labels = np.arange(self.atoms, self.atoms + count, dtype=np.int64)
        self.atoms += count
        return labels if len(shape) == 1 else labels.reshape(shape)

    def variable(self) -> int:
        """Return a new variable of the scale system."""
        self.variables += 1
        return self.variables - 1

    # permutation structure
    def unify(self, a: Labels, b: Labels) -> None:
        """Atoms at equal positions of ``a`` and ``b`` (equal shapes) move together.

        Raises:
            InputError: their sizes differ.
        """
        if a.size != b.size:
            raise InputError(
                f"Axes of {a.size} and {b.size} entries meet at node {self.node} of the graph; correct the shapes."
            )
        if a is b or (a.shape == b.shape and a.size and a.flat[0] == b.flat[0] and np.array_equal(a, b)):
            return
        self.unifications.append(Unification(_flat(a), _flat(b), self.node))

    def copied(self, source: Labels) -> Labels:
        """Return new atoms for entries that equal those at ``source``, where an atom may stand several times.

        A copy moves with its source. Copies of one source may be exchanged among themselves, since they are equal.
        """
        made = self.fresh(*source.shape)
        self.copies.append(len(self.unifications))
        self.unify(made, source)
        return made

    def copied_fixed(self, sizes: Sequence[int], shape: Sequence[int], reason: str) -> Labels:
        """Return copies, of ``shape``, of fixed entries; ``sizes`` has 1 where ``shape`` counts copies of one entry."""
        source = self.fresh(*sizes)
        self.pin(source, reason)
        return self.copied(np.broadcast_to(source, shape))

    def pin(self, labels: Labels, reason: str) -> None:
        """The atoms must not move."""
        self.pins.append(Pin(labels.ravel(), self.node, reason))

    def distinguish(self, labels: Labels, colour: int | np.ndarray | None = None) -> None:
        """Tell these atoms from those outside: an operation applies to them alone."""
        salt = len(self.marks) + 1
        self.marks.append((labels.ravel(), salt if colour is None else colour))

    def marginal(self, factor: Factor, axes: tuple[int, ...]) -> Factor:
        """Return labels of the blocks of ``factor`` along ``axes``; the factor itself where it has no other axes."""
        if axes == factor.axes:
            return factor
        key = (id(factor.labels), tuple(factor.axes.index(a) for a in axes))
        known = self._marginals.get(key)
        if known is None:
            rest = [a for a in factor.axes if a not in axes]
            table = factor.on([*axes, *rest])
            sizes = table.shape[: len(axes)]
            children = table.reshape(int(np.prod(sizes)), -1)
            parents = self.fresh(*sizes)
            self.links.append(Link(parents.ravel(), children, key[1], factor.labels))
            if factor.repeats and len(children) > 1:
                self._mark_rows(factor.labels, key[1])
            known = self._marginals[key] = (factor.labels, Factor(axes, parents, ZERO))
        return Factor(axes, known[1].labels, ZERO)

    def _mark_rows(self, labels: Labels, dims: tuple[int, ...]) -> None:
        """Mark atoms apart whose occurrences, taken in order, lie in different rows of those that share atoms."""
        sizes = [n if k in dims else 1 for k, n in enumerate(labels.shape)]
        row = np.broadcast_to(np.arange(math.prod(sizes)).reshape(sizes), labels.shape).ravel()
        atoms, atom = np.unique(labels, return_inverse=True)
        atom = atom.ravel()
        rows, count = int(row.max()) + 1, len(atoms)
        family = connected_components(row, rows + atom, rows + count)[1][:rows]
        place = occurrence_rank(family)[row]  # of the row in its family
        code = mix(occurrence_rank(labels) * 1_000_003 + place) & np.uint64((1 << 30) - 1)
        colour = np.bincount(atom, weights=code.astype(np.float64)).astype(np.int64)
        self.marks.append((atoms, colour))

    def contracted(self, a: Labels, b: Labels) -> None:
        """The node sums products over these atoms."""
        self.contractions.append(Contraction(self.node, a.ravel(), b.ravel()))

    def normalizes(self, labels: Labels) -> None:
        """A statistic over these atoms is taken: removing one changes the others."""
        self.normalized.append(labels.ravel())

    def reindexed(self, old: Labels, new: Labels, source: Labels) -> None:
        """Account for repeated atoms when positions ``source`` (flat) of ``old`` become ``new``.

        The k-th occurrence of an atom stands for the k-th of any atom it is exchanged with. A selection that treats
        the occurrences of two atoms differently makes the two unlike: they are marked apart.
        """
        flat = new.ravel()
        before = occurrence_rank(old)[source.ravel()]
        after = occurrence_rank(new)
        atoms, inverse = np.unique(flat, return_inverse=True)
        code = mix(before * 1_000_003 + after) & np.uint64((1 << 30) - 1)
        colour = np.bincount(inverse.ravel(), weights=code.astype(np.float64)).astype(np.int64)
        self.marks.append((atoms, colour))

    # scale structure
    def equate(
        self, labels: Labels, terms: tuple[tuple[int, int], ...], *, scale: bool = True, sign: bool = True
    ) -> None:
        """``sum(c * l_v) == 0`` on these atoms, for log-scales, signs or both."""
        terms = tuple((v, c) for v, c in terms if v != ZERO)
        if terms:
            self.equations.append(Equation(_flat(labels), terms, scale, sign))

    def same(self, labels: Labels, first: int, *others: int) -> None:
        """All these variables agree on the atoms."""
        for other in others:
            if other != first:
                self.equate(labels, ((first, 1), (other, -1)))

    def zero(self, labels: Labels, var: int, *, scale: bool = True, sign: bool = True) -> None:
        """No scaling (no sign) on these atoms."""
        self.equate(labels, ((var, 1),), scale=scale, sign=sign)

    def inexact(self, labels: Labels, var: int) -> None:
        """A scaling here is exact in real arithmetic, but rounds: zero where results must stay bit for bit."""
        if var != ZERO:
            self.equations.append(Equation(_flat(labels), ((var, 1),), True, False, inexact=True))


def _flat(labels: Labels) -> Labels:
    """Return one dimension; the same object where it has one already, so that later stages see equal arrays as one."""
    return labels if labels.ndim == 1 else labels.ravel()
