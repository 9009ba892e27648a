"""Where the elements of all spaces are read for the last time: there, leaving one out means setting it to zero.

A node reads a unit where it sums products over it, or where an input moves with it and no output does (a mean). The
units of a residual stream are read by every block, even where a single product leads from the stream to the stream. A
head or group is read where an input moves with it and no output does. Of two inputs that meet in a sum over the same
elements (queries and keys) the first counts; setting both to zero is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.sparse import csr_array

from cipm_ir.errors import UnsupportedError
from cipm_ir.ir.labels import Factor, Labels
from cipm_ir.ops.registry import entry_of
from cipm_ir.runtime.gradients import Read
from cipm_ir.symmetry.analysis import Analysis
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Floats = npt.NDArray[np.float64]


@dataclass
class Places:
    """Which element of all (numbered across spaces, -1: none) each place of a read belongs to.

    ``turn`` is 0 for the input through which a node reads the elements, 1 for the second one that meets it, and so on.
    """

    read: int
    turn: int
    elements: Labels


@dataclass
class Reads:
    """All reads of a program; ``places`` may list a read more than once, as blocks and the units in them share it."""

    program: Program
    start: Labels
    reads: list[Read] = field(default_factory=list)
    places: list[Places] = field(default_factory=list)

    @property
    def total(self) -> int:
        """The number of elements of all spaces together."""
        return int(self.start[-1])

    def of(self, space: Space) -> slice:
        """Return the elements of one space."""
        k = self.program.index(space)
        return slice(int(self.start[k]), int(self.start[k + 1]))

    def require(self, space: Space) -> None:
        """Raise `UnsupportedError`: a space of which no value of real numbers is read."""
        mine = self.of(space)
        if not any(((p.elements >= mine.start) & (p.elements < mine.stop)).any() for p in self.places):
            raise UnsupportedError(
                f"No value of real numbers shows the units of @{space.name} where they are read (they are integers "
                "there, or stay inside an operator); rank them by magnitude, or leave them out with exclude."
            )

    def first(self) -> list[tuple[Read, csr_array]]:
        """Return what is read through first inputs, each with the matrix (places, elements) that adds up its places."""
        by_read: dict[int, list[Labels]] = {}
        for p in self.places:
            if not p.turn:
                by_read.setdefault(p.read, []).append(p.elements)
        return [(self.reads[k], self._matrix(mine)) for k, mine in by_read.items()]

    def _matrix(self, mine: list[Labels]) -> csr_array:
        rows = [np.flatnonzero(elements >= 0) for elements in mine]
        row = np.concatenate(rows)
        column = np.concatenate([elements[r] for elements, r in zip(mine, rows, strict=True)])
        return csr_array((np.ones(len(row)), (row, column)), shape=(len(mine[0]), self.total))


def find_reads(program: Program) -> Reads:
    """Return the reads of all spaces, in graph order."""
    return _Finder(program).run()


class _Finder:
    def __init__(self, program: Program) -> None:
        analysis = program.analysis
        self.walk, self.of = analysis.walk, analysis.classes.refined()
        start = np.cumsum([0, *(len(s.table) for s in analysis.spaces)])
        self.found = Reads(program, start)
        self.known: dict[tuple[int, str, tuple[int, ...]], int] = {}
        self.batch = _batch(program)
        self.layers = _layers(analysis, start)
        self.live = {v.name or "" for v in program.model.graph.inputs} - set(program.model.graph.initializers)

    def run(self) -> Reads:
        """Look at every node."""
        analysis = self.found.program.analysis
        for position, node in enumerate(self.walk.nodes):
            if self.walk.paths[position] or not any(v is not None and v.name in self.live for v in node.inputs):
                continue  # in a body, or made of parameters alone: nothing to see in data
            self.live.update(v.name or "" for v in node.outputs)
            if not entry_of(node).sizes_only:
                ending = [x for c in analysis.consumers.contractions_at.get(position, ()) for x in (c.a, c.b)]
                for layer in self.layers:
                    self._look(position, node, layer.element, ending if layer.units else [])
        return self.found

    def _look(self, position: int, node: ir.Node, element: Labels, summed: list[Labels]) -> None:
        """What this node reads of the elements of one layer."""
        carried = [e for v in node.outputs for _, e in self._elements(v.name or "", element)]
        turns: list[Labels] = []
        inside = np.unique(np.concatenate(carried)) if carried else np.zeros(0, np.int64)
        seen: set[str] = set()
        for k, value in enumerate(node.inputs):
            name = "" if value is None else value.name or ""
            if name not in self.live or name in seen or (position, k) in self.walk.use_leaf:
                continue
            seen.add(name)
            for factor, elements in self._elements(name, element):
                labels = factor.labels.ravel()
                ends = any(labels.size == a.size and np.array_equal(labels, a) for a in summed)
                left = elements if ends else np.where(np.isin(elements, inside), -1, elements)
                for turn, before in enumerate(turns):
                    again = np.isin(left, before)
                    self._add(position, name, factor, turn + 1, np.where(again, left, -1))
                    left = np.where(again, -1, left)
                self._add(position, name, factor, 0, left)
                turns.append(left[left >= 0])

    def _elements(self, name: str, element: Labels) -> Iterator[tuple[Factor, Labels]]:
        """Yield the factors of a value that hold elements, with these, flat."""
        state = self.walk.states.get(name)
        for f in () if state is None else state.factors:
            found = element[self.of[f.labels.ravel()]]
            if (found >= 0).any():
                yield f, found

    def _add(self, position: int, name: str, factor: Factor, turn: int, elements: Labels) -> None:
        if not (elements >= 0).any() or not self.walk.shapes.types.get(name, ir.DataType.FLOAT).is_floating_point():
            return
        key = position, name, factor.axes
        if key not in self.known:
            self.known[key] = len(self.found.reads)
            self.found.reads.append(Read(*key, self._samples(name, factor.axes)))
        self.found.places.append(Places(self.known[key], turn, elements))

    def _samples(self, name: str, axes: tuple[int, ...]) -> int | None:
        """Along which axis samples lie: its sizes are the batch's, or axis 0 has several places for each sample."""
        shapes = [self.walk.shapes.first.get(name), self.walk.shapes.second.get(name)]
        if self.batch is None or shapes[0] is None or shapes[1] is None:
            return None
        sizes = list(zip(*shapes, strict=True)) if len(shapes[0]) == len(shapes[1]) else []
        free = [a for a in range(len(sizes)) if a not in axes]
        same = next((a for a in free if sizes[a] == self.batch), None)
        if same is None and 0 in free and all(n % b == 0 for n, b in zip(sizes[0], self.batch, strict=True)):
            return 0
        return same


def _batch(program: Program) -> tuple[int, int] | None:
    """Return the stand-ins for the number of samples, which is the first size of every input."""
    shapes, initializers = program.analysis.walk.shapes, program.model.graph.initializers
    names = [v.name or "" for v in program.model.graph.inputs if v.name not in initializers]
    pairs = {(a[0], b[0]) for n in names if (a := shapes.first.get(n)) and (b := shapes.second.get(n))}
    return pairs.pop() if len(pairs) == 1 else None


@dataclass
class _Layer:
    """Class or cell -> element (-1: none), of spaces that do not overlap: all of units, or all of blocks."""

    units: bool
    element: Labels


def _layers(analysis: Analysis, start: Labels) -> list[_Layer]:
    """Several, since blocks hold the classes of their units."""
    layers: list[_Layer] = []
    for k, raw in enumerate(analysis.spaces):
        units = raw.kind != "blocks" and raw.table.shape[1] == 1
        places, element = analysis.places_of(k)
        layer = next((x for x in layers if x.units == units and (x.element[places] < 0).all()), None)
        if layer is None:
            layer = _Layer(units, np.full_like(analysis.elements_of(k), -1))
            layers.append(layer)
        layer.element[places] = start[k] + element
    return layers
