"""Criteria from activations on calibration data: variance, Wanda, and the optimal brain surgeon's cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.compress.selection import removal_costs
from cipm_ir.passes.pruning.importance.criteria import Scores, parameter_array, register_importance
from cipm_ir.passes.pruning.importance.gradient import needed_data
from cipm_ir.passes.pruning.importance.reads import Places, Reads, find_reads
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry, NormalEquations, sample_places
from cipm_ir.runtime.activations.observe import observe, samples
from cipm_ir.runtime.inputs.generate import Array
from cipm_ir.runtime.statistics.moments import Moments
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import WeightConsumer, readers
from cipm_ir.symmetry.space import Space

Floats = npt.NDArray[np.float64]
DAMPING = 1e-4
"""Added to the diagonal of a Gram matrix, scaled to 1, before it is inverted."""
_BYTES = 1 << 28
"""Gram matrices that are held at once."""


_Product = tuple[LinearOpGeometry, WeightConsumer]


# ---------------------------------------------------------------- moments
Place = tuple[str, tuple[int, ...]]
"""Name of a value, and the axes to tell apart."""


@dataclass
class _Observed:
    """The moments of every read of a program, and of other values that were asked for."""

    reads: Reads
    moments: dict[Place, Moments]

    @classmethod
    def of(cls, program: Program, ctx: Context, name: str, limit: int, more: Sequence[Place] = ()) -> _Observed:
        """Run the model once over the data.

        Raises:
            InputError: there is no data.
        """
        data, found = needed_data(ctx, name), find_reads(program)
        moments: dict[Place, Moments] = {}
        places = list(dict.fromkeys([*((r.value, r.axes) for r in found.reads), *more]))
        names = list(dict.fromkeys(value for value, _ in places))
        if names:
            for _, values in observe(program.model, names, data, limit=limit, progress=ctx.progress, what=name):
                for value, axes in places:
                    rows = _rows(values[value], axes)
                    if (value, axes) not in moments:
                        moments[value, axes] = Moments.zero(rows.shape[1], full=False)
                    moments[value, axes].update(rows)
        return cls(found, moments)

    def at(self, p: Places) -> Moments:
        """Return the moments of what is read there."""
        read = self.reads.reads[p.read]
        return self.moments[read.value, read.axes]

    def variance(self, space: Space) -> Scores:
        """For each element the mean variance of all places where it is read."""
        total, count = np.zeros(self.reads.total), np.zeros(self.reads.total)
        for p in self.reads.places:
            if not p.turn:
                inside = p.elements >= 0
                np.add.at(total, p.elements[inside], self.at(p).variance[inside])
                np.add.at(count, p.elements[inside], 1.0)
        self.reads.require(space)
        mine = self.reads.of(space)
        return np.asarray(total[mine] / np.maximum(count[mine], 1.0))

    def partners(self, space: Space) -> Scores:
        """Energy of a unit times that of what it is multiplied with, added up over the nodes that read it."""
        product: dict[int, Floats] = {}
        for p in self.reads.places:
            inside = p.elements >= 0
            energy = np.zeros(self.reads.total)
            np.add.at(energy, p.elements[inside], self.at(p).second[inside])
            node = self.reads.reads[p.read].node
            if not p.turn:
                product[node] = product.get(node, 0.0) + energy
            elif node in product:
                mine = np.unique(p.elements[inside])
                product[node][mine] *= energy[mine]
        self.reads.require(space)
        total = sum(product.values(), np.zeros(self.reads.total))
        return np.asarray(total[self.reads.of(space)])


def _rows(value: Array, axes: Sequence[int]) -> Array:
    """(rows, places): every axis that is not in ``axes`` counts as rows."""
    others = [a for a in range(value.ndim) if a not in axes]
    return value.transpose(*others, *axes).reshape(-1, int(np.prod([value.shape[a] for a in axes])))


# ---------------------------------------------------------------- criteria
@dataclass
class ActivationVariance:
    """Variance of a unit's activation where it is read; the mean over the places where it is, and over a head's units.

    A unit that never changes can be replaced by a bias. Attributes: ``limit``: at most this many samples.
    """

    observes: ClassVar[bool] = True
    limit: int = 1024
    _known: tuple[Program, _Observed] | None = field(default=None, repr=False, compare=False)

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Return a variance per element.

        Raises:
            InputError: there is no data, or where it makes a value NaN or infinite.
        """
        if self._known is None or self._known[0] is not program:
            self._known = program, _Observed.of(program, ctx, "activation-variance", self.limit)
        return self._known[1].variance(space)


@dataclass
class Wanda:
    """Σ |w| · rms(x) over all weights that read a unit, x being what the weight is multiplied with.

    Units that no weight reads (queries and keys) score by the mean squares of the two that are multiplied.
    Source: Sun et al. 2024, summed over whole columns. Attributes: ``limit``: at most this many samples.
    """

    observes: ClassVar[bool] = True
    limit: int = 1024
    _known: tuple[Program, _Observed] | None = field(default=None, repr=False, compare=False)

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Return a number per element.

        Raises:
            InputError: there is no data, or where it makes a value NaN or infinite.
        """
        if self._known is None or self._known[0] is not program:
            sources = [_source(program, reader) for _, reader in _all_readers(program)]
            self._known = program, _Observed.of(program, ctx, "wanda", self.limit, sources)
        observed = self._known[1]
        total = np.zeros(space.size)
        try:
            found = readers(program, space)
        except SymmetryError:
            return observed.partners(space)
        for reader in found:
            moments = observed.moments[_source(program, reader)]
            weight = np.abs(parameter_array(program, reader.weight)).astype(np.float64)
            size = np.moveaxis(weight, reader.axis, 0).reshape(weight.shape[reader.axis], -1).sum(axis=1)
            total += (np.sqrt(moments.second) * size)[reader.columns].sum(axis=1)
        return total


def _source(program: Program, reader: WeightConsumer) -> Place:
    """Return what a reader reads, along the axis that it sums."""
    state = program.analysis.walk.states[reader.source]
    return reader.source, (1 if reader.op == "Conv" else state.rank - 1,)


def _all_readers(program: Program) -> list[tuple[Space, WeightConsumer]]:
    """Return every product with a weight that reads a space, of all spaces that such products alone sum over."""
    found = []
    for space in program.spaces:
        if program.unseen(space):
            continue
        try:
            found += [(space, reader) for reader in readers(program, space)]
        except SymmetryError:
            continue  # scored otherwise
    return found


@dataclass
class BrainSurgeon:
    """½ Σ tr(W_u [(G⁻¹)_uu]⁻¹ W_uᵀ) over the products that read a unit: their squared change after the best refit.

    G is the Gram matrix of a product's inputs (of a convolution: its unfolded patches), a 1 appended for the bias, over
    samples and positions; W_u are the rows of the weight that the unit owns. Costs are per sample. Units that no weight
    reads (queries and keys) score by the mean squares of the two that are multiplied.

    Source: Hassibi and Stork 1993; for structures Kurtic et al. 2023, ZipLM.

    Attributes:
        limit: at most this many samples.
        positions: at most this many output positions of a convolution, drawn once for all samples.
        damping: of the diagonal of G, added to it.
    """

    observes: ClassVar[bool] = True
    limit: int = 1024
    positions: int = 64
    damping: float = DAMPING
    warnings: list[str] = field(default_factory=list, repr=False, compare=False)
    """What there was too little data for, after `score`."""
    _known: tuple[Program, dict[str, Scores]] | None = field(default=None, repr=False, compare=False)

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Return a cost per element; the first call computes those of all spaces.

        Raises:
            InputError: there is no data, or where it makes a value NaN or infinite.
            UnsupportedError: a Conv with auto_pad.
        """
        if self._known is None or self._known[0] is not program:
            self._known = program, self._measured(program, ctx)
        known = self._known[1]
        if space.name not in known:
            known[space.name] = _Observed.of(program, ctx, "obs", self.limit).partners(space)
        return known[space.name]

    def _measured(self, program: Program, ctx: Context) -> dict[str, Scores]:
        """Costs by name of the spaces that weights read."""
        needed_data(ctx, "obs")
        todo = _all_readers(program)
        costs = {space.name: np.zeros(space.size) for space, _ in todo}
        short: list[_Short] = []
        for group in _groups({reader.node: (LinearOpGeometry.of(program, reader), reader) for _, reader in todo}):
            grams = {k: _Gram(linear, reader, NormalEquations(linear.size, 0)) for k, (linear, reader) in group.items()}
            self._observe(program, ctx, list(grams.values()))
            inverse = {k: gram.inverse(self.damping) for k, gram in grams.items()}
            short += [s for s in map(_Short.of, grams.values()) if s.rows <= s.size or s.constant]
            for space, reader in todo:
                if reader.node in grams:
                    gram, (inside, size) = grams[reader.node], inverse[reader.node]
                    matrix = (
                        gram.linear.matrix(parameter_array(program, reader.weight)).astype(np.float64) * size[:-1, None]
                    )
                    rows = gram.linear.rows_of(reader.columns)
                    costs[space.name] += 0.5 * gram.places * removal_costs(inside, matrix, rows)
        self.warnings = _too_few(short)
        return costs

    def _observe(self, program: Program, ctx: Context, group: Sequence[_Gram]) -> None:
        names = list(dict.fromkeys(g.reader.source for g in group))
        data = needed_data(ctx, "obs")
        for feeds, values in observe(program.model, names, data, limit=self.limit, progress=ctx.progress, what="obs"):
            for gram in group:
                gram.add(values[gram.reader.source], samples(feeds), self.positions, ctx.seed)


@dataclass(eq=False)
class _Gram:
    """The inputs of one product over the data; ``places``: rows for each sample."""

    linear: LinearOpGeometry
    reader: WeightConsumer
    sums: NormalEquations
    places: float = 1.0

    def add(self, value: Array, count: int, positions: int, seed: int) -> None:
        """Take in a batch."""
        conv = bool(self.linear.kernel)
        each = self.linear.positions(value)
        rng = np.random.default_rng([seed, self.reader.node])
        self.sums.add(self.linear.inputs(value, sample_places(each, positions, rng) if conv else None), None)
        self.places = float(each) if conv else each / max(count, 1)

    def inverse(self, damping: float) -> tuple[Floats, Floats]:
        """Of the mean of u uᵀ, u = (x, 1), after its diagonal was scaled to 1, damped; and the root of that diagonal.

        Scaled this way the damping means the same for weak and strong inputs, and costs do not depend on the gauge.
        """
        mean = self.sums.bordered
        size = np.sqrt(np.diagonal(mean))
        divisor = np.where(size > 0, size, 1.0)
        mean = mean / divisor[:, None] / divisor
        mean[np.diag_indices_from(mean)] = 1.0 + damping
        return np.asarray(np.linalg.inv(mean)), size


@dataclass(frozen=True)
class _Short:
    """How many rows a product had for its inputs; ``constant``: whether all were the same, up to float32 rounding."""

    rows: int
    size: int
    output: str
    constant: bool

    @classmethod
    def of(cls, gram: _Gram) -> _Short:
        """Of one product."""
        variance = np.diagonal(gram.sums.gram(centred=True))
        moment = variance + np.square(gram.sums.x / gram.sums.rows)
        constant = bool((variance <= 1e-5 * moment).all())
        return cls(gram.sums.rows, gram.linear.size, gram.reader.output, constant)


def _too_few(short: Sequence[_Short]) -> list[str]:
    """``short``: of Gram matrices without full rank."""
    if not short:
        return []
    worst = min(short, key=lambda s: s.rows / s.size)
    more = f" (and so for {len(short) - 1} more)" if len(short) > 1 else ""
    reads, rank = f"the {worst.size} inputs of {worst.output!r}{more}", min(worst.rows, worst.size)
    if worst.constant and worst.rows > 1:
        said, rank = f"{reads} are the same in every row of the data", 1
    else:
        said = f"too few data: {worst.rows} rows for {reads}"
    return [f"{said}, so their Gram matrix has rank {rank} at most and the rest is damping; give more samples"]


def _groups(products: Mapping[int, _Product]) -> list[dict[int, _Product]]:
    """Runs of products whose Gram matrices fit into memory together."""
    groups: list[dict[int, _Product]] = []
    room = 0
    for node, product in products.items():
        need = 8 * (product[0].size + 1) ** 2
        if not groups or need > room:
            groups.append({})
            room = _BYTES
        groups[-1][node] = product
        room -= need
    return groups


register_importance("activation-variance", lambda _norm: ActivationVariance())
register_importance("wanda", lambda _norm: Wanda())
register_importance("obs", lambda _norm: BrainSurgeon())
