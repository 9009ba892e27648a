"""What it costs to shrink: for each candidate and number of units, which to keep and how far the outputs move."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.labels import Labels
from cipm_ir.passes.pruning.budget.search import Mask
from cipm_ir.passes.pruning.compress.candidates import Candidate
from cipm_ir.passes.pruning.compress.divergence import Divergence
from cipm_ir.passes.pruning.compress.held_out import holds_complete_inputs
from cipm_ir.passes.pruning.compress.selection import Problem, Swaps, eliminate
from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.passes.pruning.limits import Limits
from cipm_ir.passes.pruning.refit.compensation import Compensated, refitted
from cipm_ir.passes.pruning.refit.downstream_metric import DownstreamMetric
from cipm_ir.passes.pruning.refit.layers import Layer, draw_places, gone_places, layers_of, zero_outputs
from cipm_ir.runtime.activations.cache import ActivationCache, SharedEnds, SuffixRunner
from cipm_ir.runtime.activations.linear_geometry import Array, NormalEquations
from cipm_ir.runtime.activations.observe import count_samples, observe, samples
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, true_inputs
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import WeightConsumer

Curve = npt.NDArray[np.float64]
Progress = Callable[[str, float | None], None]
_LEAST_ROWS = 20_000
_CONSTANT = 1e-10
"""An output whose variance is at most this share of its mean square is constant up to rounding."""
_SPREAD = 8
"""Probes are taken from so many times as many samples: data may be sorted, by class or by length."""
_PROBED = 8192
"""Rows of outputs (samples times positions, such as tokens) that are enough to measure a divergence on."""
_LEAST_PROBES = 64
_ROWS = 4096
"""Rows that are collected before they are multiplied: batches may be small, and each product fills a whole matrix."""
_REACH = 2
"""So many levels up and down are measured again around a choice."""
_MEASURING, _MEASURING_AGAIN = 0.45, 0.7
"""Parts of the time after which sensitivity is not measured (again) any more."""


def gather(
    program: Program,
    candidates: Sequence[Candidate],
    data: Data,
    *,
    size: int,
    limit: int | None,
    count: int,
    seed: int,
    limits: Limits,
    progress: Progress | None = None,
) -> dict[int, tuple[Layer, NormalEquations]]:
    """Gram matrices of everything that reads a candidate, by node. ``count``: how many samples there will be."""
    layers = {layer.reader.key: layer for layer in layers_of(program)}
    wanted = {r.key for c in candidates for found in c.readers for r in found if r.key in layers}
    chosen = [layers[k] for k in sorted(wanted) if layers[k].linear.size <= limits.largest]
    sums = {x.reader.key: NormalEquations(x.linear.size, x.linear.width, limits.zeros, x.linear.blocks) for x in chosen}
    held: defaultdict[int, list[Array]] = defaultdict(list)
    rng = np.random.default_rng([seed, 1])
    sources = list(dict.fromkeys(layer.reader.source for layer in chosen))
    if not sources:
        return {}
    for _, values in observe(
        program.model, sources, data, size=size, limit=limit, progress=progress, what="look at the activations"
    ):
        for layer in chosen:
            linear, u = layer.linear, values[layer.reader.source]
            rows = linear.inputs(u, draw_places(linear, u, limits.rows(linear.size, _LEAST_ROWS) / count, rng))
            held[layer.reader.key].append(rows)
            if sum(map(len, held[layer.reader.key])) >= min(_ROWS, limits.entries // (len(chosen) * linear.size)):
                sums[layer.reader.key].add(np.concatenate(held.pop(layer.reader.key)), None)
    for node, rest in held.items():
        if rest:
            sums[node].add(np.concatenate(rest), None)
    return {layer.reader.key: (layer, sums[layer.reader.key]) for layer in chosen}


def problem_of(program: Program, layer: Layer, sums: NormalEquations, columns: Labels, damping: float) -> Problem:
    """Return the least-squares problem of one reader."""
    weight = layer.linear.matrix(parameter_array(program, layer.reader.weight)).astype(np.float64)
    gram = sums.gram(centred=layer.bias is not None)
    energy = float(np.einsum("ko,ko->", weight, gram @ weight))
    whole = float(np.einsum("ko,ko->", weight, sums.gram(centred=False) @ weight))
    if energy <= _CONSTANT * whole:
        energy = float("inf")  # an output that does not vary: nothing that happens to its inputs counts
    return Problem(gram, weight, layer.linear.rows_of(columns), energy, damping)


def choose_units(
    program: Program,
    candidates: Sequence[Candidate],
    grams: Mapping[int, tuple[Layer, NormalEquations]],
    damping: float,
    progress: Progress | None = None,
) -> None:
    """Fill in which elements each candidate keeps at each of its levels."""
    reading = DownstreamMetric(program, layers_of(program))
    for number, candidate in enumerate(candidates):
        if progress is not None:
            progress("choose units", number / len(candidates))
        per_space, candidate.order = [], []
        for k, found in zip(candidate.spaces, candidate.readers, strict=True):
            size = program.spaces[k].size
            problems = _problems(program, found, grams, reading, damping)
            order = eliminate(problems, size, int(candidate.levels[0])) if problems else np.arange(size)[::-1]
            candidate.order.append(order)
            swaps = Swaps(problems, size)
            per_space.append([swaps.improve(order[max(0, size - int(n)) :]) for n in candidate.levels[::-1]][::-1])
        candidate.kept = [list(level) for level in zip(*per_space, strict=True)]


def _problems(
    program: Program,
    found: Sequence[WeightConsumer],
    grams: Mapping[int, tuple[Layer, NormalEquations]],
    reading: DownstreamMetric,
    damping: float,
) -> list[Problem]:
    """Return one for each reader, in which errors of the outputs count as they are read further on."""
    made = []
    for reader in found:
        if reader.key in grams:
            layer, sums = grams[reader.key]
            made.append(problem_of(program, layer, sums, reader.columns, damping).seen_by(reading.root(layer)))
    return made


@dataclass
class Probe:
    """The outputs of the original model on some samples, to compare others with."""

    program: Program
    data: Data
    size: int
    limit: int
    damping: float
    divergence: Divergence
    dense: list[dict[str, Array]]
    limits: Limits
    estimated: int = 0
    """Number of candidates whose sensitivity there was no time to measure."""

    @classmethod
    def of(
        cls,
        program: Program,
        data: Data,
        *,
        size: int,
        limit: int,
        damping: float,
        asked: str = "auto",
        limits: Limits | None = None,
    ) -> Probe:
        """Run the original model.

        Raises:
            InputError: its outputs cannot be compared.
        """
        names = [v.name or "" for v in program.model.graph.outputs]
        data = list(spread(program, data, size, limit))
        first, out = next(observe(program.model, names, data, size=size))
        rows = max(a.size // max(a.shape[-1], 1) if a.ndim else 1 for a in out.values()) / samples(first)
        enough = max(_LEAST_PROBES, int(_PROBED / rows))
        if enough < limit:  # a token is nearly as good as a sample
            data, limit = list(spread(program, data, size, enough)), enough
        dense = [dict(out) for _, out in observe(program.model, names, data, size=size, limit=limit)]
        measures = Divergence.of(program.model, dense[0], asked)
        return cls(program, data, size, limit, damping, measures, dense, limits or Limits())

    def frontier(self, program: Program) -> ActivationCache:
        """Return the same samples, to run another program on."""
        return ActivationCache(program.model, self.data, size=self.size, limit=self.limit, memory=self.limits.cached)

    def compare(self, program: Program, frontier: ActivationCache) -> float:
        """Divergence of a program from the original; it is run from where the frontier is."""
        return self._far(frontier.tail(program.model, list(self.divergence.measures)))

    def _far(self, outs: Iterable[Mapping[str, Array]]) -> float:
        return self.divergence.total([self.divergence.batch(a, b) for a, b in zip(self.dense, outs, strict=True)])

    def _ends(self, program: Program) -> SharedEnds:
        return SharedEnds(program.model, list(self.divergence.measures))

    def _each(
        self, frontier: ActivationCache, ends: SharedEnds, changes: Iterable[tuple[int, dict[str, Array]]]
    ) -> Iterator[tuple[int, float]]:
        """Yield levels and divergences of a program with other weights.

        The changes have the same names at all levels.
        """
        rest: SuffixRunner | None = None
        for level, weights in changes:
            rest = rest or SuffixRunner(frontier, ends.model, ends.names, list(weights), ends)
            yield level, self._far(rest.run(weights))
        if rest is not None:
            rest.close()

    def whole(self, program: Program) -> float:
        """Divergence of a program from the original."""
        with self.frontier(program) as frontier:
            return self.compare(program, frontier)

    def each(self, program: Program) -> Curve:
        """Return what each sample, or each batch where outputs hold no samples, adds to the divergence.

        Errors are relative to the mean square of all: an output near zero in one sample says nothing alone.
        """
        with self.frontier(program) as frontier:
            outs = frontier.tail(program.model, list(self.divergence.measures))
            pairs = zip(self.dense, outs, frontier.samples, strict=True)
            sums = [one for a, b, count in pairs for one in self.divergence.each(a, b, count)]
        parts = np.asarray(sums)  # samples, outputs, numerator and denominator
        with np.errstate(invalid="ignore", over="ignore"):
            each = (parts[..., 0] / np.maximum(parts[..., 1].mean(axis=0), 1e-30)).mean(axis=1)
        return np.where(np.isfinite(each), each, np.inf)

    def curves(
        self,
        candidates: Sequence[Candidate],
        grams: Mapping[int, tuple[Layer, NormalEquations]],
        progress: Progress | None = None,
    ) -> list[Curve]:
        """Return the divergence when one candidate alone is brought to each of its levels and its readers are refitted.

        Candidates for which there is no time get the errors of their readers' outputs, on the scale of the others'.
        """
        found: list[Curve] = []
        with self.frontier(self.program) as frontier, self._ends(self.program) as ends:
            for number, candidate in enumerate(candidates):
                if progress is not None:
                    progress("measure sensitivity", number / len(candidates))
                if self.limits.spent(_MEASURING):
                    break
                frontier.advance(self.program.model, candidate.first)
                changes = shrunk(self.program, candidate, range(len(candidate.levels) - 1), grams, self.damping)
                curve = np.zeros(len(candidate.levels))
                for level, far in self._each(frontier, ends, changes):
                    curve[level] = far
                found.append(np.minimum.accumulate(curve))  # more units never cost more: the rest is noise
        left = candidates[len(found) :]
        if left:
            near = [local_curve(self.program, c, grams, self.damping) for c in candidates]
            ratios = [curve[0] / max(one[0], 1e-12) for curve, one in zip(found, near, strict=False)]
            scale = float(np.median(ratios)) if ratios else 1.0
            found += [scale * curve for curve in near[len(found) :]]
            self.estimated = len(left)
        return found

    def around(
        self,
        made: Compensated,
        candidates: Sequence[Candidate],
        levels: Sequence[int],
        curves: Sequence[Curve],
        stays: Callable[[Sequence[int]], Mask],
        progress: Progress | None = None,
    ) -> list[Curve]:
        """Return the same with all others as they were chosen and compensated: measured near, continued by ``curves``.

        ``candidates`` may have more levels than are measured; between these the curves are interpolated.
        """
        found: list[Curve] = []
        with self.frontier(made.program) as frontier, self._ends(made.program) as ends:
            start = self.compare(made.program, frontier)
            for number, (candidate, now, old) in enumerate(zip(candidates, levels, curves, strict=True)):
                if progress is not None:
                    progress("measure sensitivity again", number / len(candidates))
                if self.limits.spent(_MEASURING_AGAIN):
                    found.append(old)
                    continue
                frontier.advance(made.program.model, candidate.first)
                nodes = [r.key for readers in candidate.readers for r in readers if r.key in made.sums]
                near = np.sort(candidate.measured[np.argsort(np.abs(candidate.measured - now))[: 2 * _REACH + 1]])
                left = (
                    (level, stays([*levels[:number], level, *levels[number + 1 :]]))
                    for level in near.tolist()
                    if level != now and nodes
                )
                changes = ((level, self._again(made, nodes, mask)) for level, mask in left)
                seen = {now: start, **dict(self._each(frontier, ends, changes))}
                found.append(_continued(candidate, seen, old))
        return found

    def _again(self, made: Compensated, nodes: Sequence[int], stays: Mask) -> dict[str, Array]:
        """Return weights of some products, refitted to other classes."""
        weights: dict[str, Array] = {}
        for layer, sums in (made.sums[node] for node in nodes):
            gone = gone_places(self.program, layer.reader, stays)
            weights.update(refitted(self.program, layer, sums, gone, self.damping))
        return weights


def _continued(candidate: Candidate, seen: Mapping[int, float], old: Curve) -> Curve:
    """Return a curve through what was measured, with the differences of an old one beyond; zero at the last level."""
    places = sorted(seen)
    low, high = places[0], places[-1]
    curve = np.interp(candidate.levels, candidate.levels[places], [seen[k] for k in places])
    curve[:low] += old[:low] - old[low]
    curve[high + 1 :] += old[high + 1 :] - old[high]
    curve = np.minimum.accumulate(curve)
    return np.asarray(curve - curve[-1])


def local_curve(
    program: Program, candidate: Candidate, grams: Mapping[int, tuple[Layer, NormalEquations]], damping: float
) -> Curve:
    """Return the squared error of what a candidate's readers give, over its variance, at each level; runs nothing."""
    nodes = sorted({reader.key for found in candidate.readers for reader in found} & set(grams))
    curve = np.zeros(len(candidate.levels))
    for node in nodes:
        problem = problem_of(program, *grams[node], np.zeros((0, 1), np.int64), damping)
        for level in range(len(curve) - 1):
            curve[level] += problem.error(problem.without(_gone_rows(grams[node][0], candidate, level)))
    return np.minimum.accumulate(curve)


def _gone_rows(layer: Layer, candidate: Candidate, level: int) -> Labels:
    """Return the rows of a reader's matrix whose units a candidate drops at a level."""
    pairs = zip(candidate.readers, candidate.kept[level], strict=True)
    node = layer.reader.key
    gone = [np.delete(r.columns, kept, axis=0).ravel() for found, kept in pairs for r in found if r.key == node]
    return layer.linear.rows_of(np.concatenate(gone)[:, None]).ravel()


def shrunk(
    program: Program,
    candidate: Candidate,
    levels: Iterable[int],
    grams: Mapping[int, tuple[Layer, NormalEquations]],
    damping: float,
) -> Iterator[tuple[int, dict[str, Array]]]:
    """For each level the weights and biases of the readers of one candidate.

    Refitted without the units removed at that level.
    """
    nodes = sorted({reader.key for found in candidate.readers for reader in found} & set(grams))
    problems = {node: problem_of(program, *grams[node], np.zeros((0, 1), np.int64), damping) for node in nodes}
    for level in levels:
        weights: dict[str, Array] = {}
        for node, problem in problems.items():
            layer, sums = grams[node]
            weight = problem.without(_gone_rows(layer, candidate, level))
            weights[layer.reader.weight] = layer.linear.weight(weight)
            if layer.bias is not None:
                shift = (sums.x / max(sums.rows, 1)) @ (problem.weight - weight)
                moved = (layer.bias.gain * shift).reshape(layer.bias.shape)
                weights[layer.bias.name] = parameter_array(program, layer.bias.name) + moved
        for pair, kept in zip(candidate.pairs, candidate.kept[level], strict=False):
            zero_outputs(program, pair.first, np.delete(pair.left, kept), weights)
        yield level, weights


def spread(program: Program, data: Data, size: int, wanted: int) -> Iterator[Feeds]:
    """About ``wanted`` samples from all over the data, of much from its first part.

    Fixed batches are taken whole, and so are complete inputs of several samples, which may depend on each other.
    """
    fixed = any(v.shape and isinstance(v.shape[0], int) for v in true_inputs(program.model))
    count = count_samples(program.model, data, size, _SPREAD * wanted)
    fixed = fixed or holds_complete_inputs(data, count)
    share = min(wanted / max(count, 1), 1.0)
    seen = given = 0
    for feeds in batches(data, program.model, size, limit=_SPREAD * wanted):
        number = samples(feeds)
        marks = np.floor((seen + np.arange(number + 1)) * share)
        places = np.flatnonzero(np.diff(marks)) if not fixed else np.arange(number if seen * share >= given else 0)
        seen, given = seen + number, given + len(places)
        if len(places):
            yield {name: a[places] if a.ndim and len(a) == number else a for name, a in feeds.items()}
