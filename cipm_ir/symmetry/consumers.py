"""Which nodes, contractions and weights use the units of a space: one index per analysis, looked up by class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels, State
from cipm_ir.ops.events import Contraction
from cipm_ir.symmetry.classes import Classes, unique_pairs
from cipm_ir.symmetry.leaves import LeafFactor
from cipm_ir.symmetry.walk import Walk


@dataclass(frozen=True, eq=False)
class Incidence:
    """Which of some label arrays hold which classes, stored by class (a sparse matrix by rows)."""

    start: Labels
    holders: Labels

    @classmethod
    def of(cls, arrays: Iterable[Labels]) -> Incidence:
        """Index the classes in each of some arrays; the position of an array is its number."""
        flat = [np.asarray(array, np.int64).ravel() for array in arrays]
        classes = np.concatenate([np.zeros(0, np.int64), *flat])
        owner = np.repeat(np.arange(len(flat)), [len(array) for array in flat])
        pairs = unique_pairs(classes, owner)
        start = np.searchsorted(pairs[:, 0], np.arange(int(classes.max(initial=-1)) + 2))
        return cls(start, pairs[:, 1])

    def holding(self, classes: Labels) -> Labels:
        """Return the numbers of the arrays that hold any of these classes, sorted, each once."""
        known = classes[classes < len(self.start) - 1]
        if len(known) == 1:
            return np.asarray(self.holders[self.start[known[0]] : self.start[known[0] + 1]])
        first, width = self.start[known], self.start[known + 1] - self.start[known]
        offset = np.arange(int(width.sum())) - np.repeat(np.cumsum(width) - width, width)
        found = np.sort(self.holders[np.repeat(first, width) + offset])
        return np.asarray(found[np.r_[True, found[1:] != found[:-1]][: len(found)]])


def element_places(owner: Labels, count: int) -> Labels | None:
    """Return where each element of a space stands: (elements, occurrences) positions, in ascending order.

    Args:
        owner: the element at each position; -1: none.
        count: of elements.

    Returns:
        None where some elements stand in more places than others.
    """
    owner = owner.ravel()
    times = np.bincount(owner[owner >= 0], minlength=count)
    if (times != times[0]).any():
        return None
    return np.argsort(owner, kind="stable")[int((owner < 0).sum()) :].reshape(count, -1)


class Consumers:
    """The consumers of every class of an analysis. Each index is built when it is first needed.

    Args:
        walk: the graph with the labels of its values.
        classes: the classes of these labels.
    """

    def __init__(self, walk: Walk, classes: Classes) -> None:
        self._walk, self._classes = walk, classes

    # ------------------------------------------------------------ nodes
    @cached_property
    def _nodes(self) -> Incidence:
        walk, known = self._walk, dict[int, Labels]()

        def classes_in(state: State) -> Labels:
            if id(state) not in known:
                labels = [self._classes.of[f.labels].ravel() for f in state.factors]
                known[id(state)] = np.unique(np.concatenate([np.zeros(0, np.int64), *labels]))
            return known[id(state)]

        def read(position: int) -> Labels:
            states = (walk.input_state(position, k) for k in range(len(walk.nodes[position].inputs)))
            found = [classes_in(state) for state in states if state is not None]
            return np.unique(np.concatenate([np.zeros(0, np.int64), *found]))

        return Incidence.of(read(position) for position in range(len(walk.nodes)))

    def nodes(self, classes: Labels) -> list[int]:
        """Return the positions of the nodes with an input that holds any of these classes, in graph order."""
        return [int(k) for k in self._nodes.holding(classes)]

    @cached_property
    def normalized(self) -> np.ndarray:
        """Per class, whether a normalization, softmax or mean runs over it."""
        found = np.zeros(self._classes.count, bool)
        for labels in self._walk.rec.normalized:
            found[self._classes.of[labels]] = True
        return found

    # ------------------------------------------------------------ contractions
    @cached_property
    def _contractions(self) -> Incidence:
        return Incidence.of(self._classes.of[c.a] for c in self._walk.rec.contractions)

    @cached_property
    def contractions_at(self) -> Mapping[int, list[Contraction]]:
        """The contractions of each node that has any, by its position."""
        found: dict[int, list[Contraction]] = {}
        for c in self._walk.rec.contractions:
            found.setdefault(c.node, []).append(c)
        return found

    @cached_property
    def _refined_contractions(self) -> Incidence:
        if self._classes.parts.cell is None:
            return self._contractions
        return Incidence.of(self._classes.refined(c.a) for c in self._walk.rec.contractions)

    def contractions(self, classes: Labels, *, refined: bool = False) -> list[Contraction]:
        """Return the contractions that sum over any of these classes, in graph order.

        Args:
            classes: numbers of classes.
            refined: the numbers are of classes and cells (`Classes.refined`).
        """
        index = self._refined_contractions if refined else self._contractions
        return [self._walk.rec.contractions[int(k)] for k in index.holding(classes)]

    # ------------------------------------------------------------ weights
    @cached_property
    def position(self) -> dict[ir.Node, int]:
        """The position of each node of the walk."""
        return {node: k for k, node in enumerate(self._walk.nodes)}

    def weight(self, position: int, k: int) -> tuple[int, tuple[int, ...]] | None:
        """Return the leaf that is input k of a node, and the permutation of a Transpose between them (else empty)."""
        leaf = self._walk.use_leaf.get((position, k))
        if leaf is not None:
            return leaf, ()
        value = self._walk.nodes[position].inputs[k] if k < len(self._walk.nodes[position].inputs) else None
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type != "Transpose":
            return None
        leaf = self._walk.use_leaf.get((self.position.get(maker, -1), 0))
        return None if leaf is None else (leaf, tuple(attribute(maker, "perm", (1, 0))))

    def axis(self, leaf: int, axis: int) -> LeafFactor | None:
        """Return the labels of a whole axis of a parameter; None where it is fixed, joint or grouped."""
        factors = self._walk.leaves[leaf].factors
        return next((f for f in factors if f.active and f.axes == (axis,) and not f.groups), None)

    @cached_property
    def _owners(self) -> tuple[Labels, list[LeafFactor]]:
        found = sorted((f for f in self._walk.leaf_factors if f.active and f.size), key=lambda f: f.base)
        return np.asarray([f.base for f in found], np.int64), found

    def owner(self, labels: Labels) -> LeafFactor | None:
        """Return the axis of a parameter whose labels these are; None where they are not those of one axis."""
        base, factors = self._owners
        if not labels.size or not factors:
            return None
        f = factors[max(int(np.searchsorted(base, int(labels.min()), side="right")) - 1, 0)]
        inside = f.base <= int(labels.min()) and int(labels.max()) < f.base + f.size
        return f if inside and labels.size == f.size else None
