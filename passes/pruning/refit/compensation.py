"""Least-squares compensation: each product is refitted without the removed units, in graph order.

Inputs come from the network as refitted so far, targets from the dense one (He et al. 2017; sequential as in GPTQ).
Where
the product is added to a shortcut, the target takes up the shortcut's drift: ``y = W u + (shortcut_dense - shortcut)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from cipm_ir.ir.labels import Labels
from cipm_ir.passes.pruning.budget.search import Mask
from cipm_ir.passes.pruning.compress.selection import solve
from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.passes.pruning.limits import Limits
from cipm_ir.passes.pruning.refit.batchnorm_recalibration import Norm, norms_of, re_estimated
from cipm_ir.passes.pruning.refit.downstream_metric import DownstreamMetric
from cipm_ir.passes.pruning.refit.layers import (
    SMALL,
    Layer,
    draw_places,
    gone_places,
    grouped,
    layers_of,
    left_out,
    zero_outputs,
)
from cipm_ir.passes.pruning.refit.linear_pairs import LinearPair, find_pairs, fit_pair
from cipm_ir.passes.pruning.refit.refit_logits import refit_logits
from cipm_ir.runtime.activations.cache import ActivationCache
from cipm_ir.runtime.activations.linear_geometry import Array, LinearOpGeometry, NormalEquations
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.symmetry.primitives.working_copy import WorkingCopy
from cipm_ir.symmetry.program import Program

Matrix = npt.NDArray[np.float64]
_RECTIFIED_ROUNDS = 3
_DAMPINGS = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
"""Multiples of the damping that are tried where rows are few."""
_NEARLY = 1.2
"""The smallest damping is taken whose error is at most so many times the least."""
_PLENTY = 4
"""With so many rows for each unknown, damping makes no difference."""
_FOLD = 4
ROWS = 20_000
"""Rows of a product that are enough where it is small."""


@dataclass
class Compensation:
    """Makes a program do without classes, at unchanged shapes.

    Attributes:
        data: calibration inputs.
        size: samples per batch.
        limit: at most this many samples.
        rows: of each product, at least where there are as many.
        damping: pull towards the old weights, as a fraction of the mean variance of the inputs.
        seed: of the positions that are looked at where there are more than needed.
        logits: outputs that are logits of classes.
        joint: whether products with a Relu between them are fitted together first.
        limits: of memory and time; once the time is over, products only lose the rows of what is removed.
        mute: which outputs of products must be zero, by node: units that activations read.
    """

    data: Data
    size: int = 64
    limit: int | None = None
    rows: int = ROWS
    damping: float = 1e-4
    seed: int = 0
    logits: frozenset[str] = frozenset()
    mute: Callable[[Mask], dict[int, Labels]] | None = None
    joint: bool = False
    limits: Limits = field(default_factory=Limits)
    progress: Callable[[str, float | None], None] | None = None

    def run(self, program: Program, stays: Mask) -> Compensated:
        """Refit every product, and move the statistics of every batch normalization, behind the first change."""
        layers = layers_of(program)
        gone = {layer.reader.key: gone_places(program, layer.reader, stays) for layer in layers}
        quiet = self.mute(stays) if self.mute is not None else {}
        nodes = [layer.reader.key for layer in layers]
        first = next((k for k, node in enumerate(nodes) if len(gone[node]) or node in quiet), None)
        made = Compensated(program, program, {}, left_out(program, layers, stays))
        if first is None:
            return made
        working = made.working = WorkingCopy(program)
        made.program = working.program
        groups = grouped(program, layers[first:])
        norms = [n for n in norms_of(program, layers) if n.node > groups[0][0].reader.node]
        pairs = find_pairs(program, layers[first:]) if self.joint else {}
        duos = _Duos({node: one for node, one in pairs.items() if len(gone[node])}, DownstreamMetric(program, layers))
        held = self.limits.cached
        with ActivationCache(program.model, self.data, size=self.size, limit=self.limit, memory=held) as dense:
            dense.advance(program.model, groups[0][0].reader.node)
            with dense.fork() as now:
                for number, group in enumerate(groups):
                    if self.progress is not None:
                        self.progress("compensate", number / len(groups))
                    if self.limits.over:
                        self._cut(made, groups[number:], gone, quiet)
                        norms.clear()
                        break
                    start, stop = group[0].reader.node, group[-1].reader.node + 1
                    while norms and norms[0].node < start:
                        self._norm(made, norms.pop(0), now, dense)
                    shortcuts = [x.way.shortcut for x in group if x.way.shortcut]
                    sums = [x.way.rectified for x in group if x.way.rectified]
                    near = (x for some in groups[number : number + 2] for x in some if x.reader.node < stop)
                    sums += [x.reader.source for x in near if x.linear.stored]  # states that nothing else reads too
                    now.advance(made.program.model, start, shortcuts)
                    dense.advance(
                        program.model, stop, [*(x.reader.output for x in group if x.reader.output), *shortcuts, *sums]
                    )
                    for layer in group:
                        if self._together(made, duos, layer, now, dense, gone):
                            now.advance(made.program.model, start, shortcuts)
                    duos.hold(group, now)
                    self._group(made, group, now, dense, gone, quiet)
                for norm in norms:
                    self._norm(made, norm, now, dense)
        made.program, made.working = working.result(), None
        return made

    def _cut(
        self, made: Compensated, groups: Sequence[list[Layer]], gone: dict[int, Labels], quiet: dict[int, Labels]
    ) -> None:
        """Take the rows of what is removed out of products for which there is no time left."""
        left = [layer for group in groups for layer in group if len(gone[layer.reader.key])]
        for layer in left:
            made.refit(zero_input_rows(made.program, layer, gone[layer.reader.key]))
        for layer in (x for group in groups for x in group if x.reader.key in quiet):
            weights: dict[str, Array] = {}
            zero_outputs(made.program, layer, quiet[layer.reader.key], weights)
            made.refit(weights)
        if left:
            made.notes.append(f"the time was over before {len(left)} products that lose units were refitted")

    def _together(
        self,
        made: Compensated,
        duos: _Duos,
        layer: Layer,
        now: ActivationCache,
        dense: ActivationCache,
        gone: dict[int, Labels],
    ) -> bool:
        """Fit a product together with the one before it; where that helps, go back to where the first one reads."""
        one = duos.first.get(layer.reader.key)
        if one is None:
            return False
        stays = (np.setdiff1d(np.arange(x.linear.shape[x.linear.axis]), gone[x.reader.key]) for x in (one, layer))
        rows = _Rows(now, dense, made.dense, self.seed, self.rows, self.limits)
        held = duos.held.pop(one.reader.key)
        weights = fit_pair(
            made.program,
            LinearPair(one, layer, *stays),
            held,
            dense,
            partial(rows.at, layer),
            duos.reading.root(layer),
            self.seed,
        )
        if weights:
            made.refit(weights)
            now.values, now.position = held.values, held.position
        return bool(weights)

    def _norm(self, made: Compensated, norm: Norm, now: ActivationCache, dense: ActivationCache) -> None:
        """Move the statistics of a batch normalization."""
        now.advance(made.program.model, norm.node)
        dense.advance(made.dense.model, norm.node)
        if norm.source in dense.values[0]:  # else it lies between products of one group
            made.refit(re_estimated(made.program, norm, now, dense))

    def _group(
        self,
        made: Compensated,
        group: list[Layer],
        now: ActivationCache,
        dense: ActivationCache,
        gone: dict[int, Labels],
        quiet: dict[int, Labels],
    ) -> None:
        """Refit products that read one value."""
        weights: dict[str, Array] = {}
        rows = _Rows(now, dense, made.dense, self.seed, self.rows, self.limits)
        for layer in group:
            node = layer.reader.key
            if layer.linear.size > self.limits.largest:
                if len(gone[node]):
                    weights.update(zero_input_rows(made.program, layer, gone[node]))
                    made.notes.append(f"{layer.reader.weight} is too large to refit; allow more with memory=")
                continue
            x = rows.inputs(layer)
            target, total = rows.targets(layer)
            sums = NormalEquations(layer.linear.size, layer.linear.width, self.limits.zeros, layer.linear.blocks)
            sums.add(x, target)
            damping = self._damping(made.program, layer, gone[node], x, target, sum(now.samples))
            fitted = refitted(made.program, layer, sums, gone[node], damping)
            if total is not None and layer.bias is not None:
                for _ in range(_RECTIFIED_ROUNDS):
                    sums.retarget(x, _below_zero(layer, fitted, sums, x, target, total))
                    fitted = refitted(made.program, layer, sums, gone[node], damping)
            if layer.way.output in self.logits and layer.bias is not None and (layer.bias.gain == 1).all():
                self._sharpen(made.program, layer, fitted, gone[node], x, target)
            weights.update(fitted)
            made.sums[node] = (layer, sums)
        for layer in group:
            if layer.reader.key in quiet:
                zero_outputs(made.program, layer, quiet[layer.reader.key], weights)
        made.refit(weights)

    def _damping(self, program: Program, layer: Layer, gone: Labels, x: Array, target: Array, count: int) -> float:
        """Return the damping whose weights do best on a quarter of the samples when fitted to the others.

        Where there are plenty of rows for each unknown, damping makes no difference, and the smallest is taken.
        """
        count = max(count, _FOLD)  # of very few samples, parts are left out
        if len(x) >= _PLENTY * layer.linear.size or len(x) < count:
            return self.damping
        held = np.arange(len(x)) * count // len(x) % _FOLD == _FOLD - 1
        sums = NormalEquations(layer.linear.size, layer.linear.width, self.limits.zeros, layer.linear.blocks)
        sums.add(x[~held], target[~held])
        own = layer.reader.bias
        shift = np.zeros(1) if own is None else parameter_array(program, own).astype(np.float64).ravel()
        errors = []
        for factor in _DAMPINGS:
            fitted = refitted(program, layer, sums, gone, self.damping * factor)
            weight = layer.linear.matrix(fitted[layer.reader.weight]).astype(x.dtype)
            gap = target[held] - x[held] @ weight
            # a bias takes up the mean of the rows that were fitted; one that others use stays as it is
            free = sums.y / sums.rows - sums.x / sums.rows @ weight if layer.bias is not None else shift
            errors.append(float(np.square(gap - free).sum()))
        least = next((k for k, error in enumerate(errors) if error <= _NEARLY * min(errors)), 0)
        return self.damping * _DAMPINGS[least]

    def _sharpen(
        self, program: Program, layer: Layer, fitted: dict[str, Array], gone: Labels, x: Array, target: Array
    ) -> None:
        """Refit a product that gives logits by the divergence of the classes; the removed units stay unused."""
        assert layer.bias is not None
        logits = target
        if layer.reader.bias != layer.bias.name:  # what is added behind the product; a bias of its own stays
            logits = logits + parameter_array(program, layer.bias.name).astype(np.float64).ravel()
            if layer.reader.bias is not None:
                logits = logits - parameter_array(program, layer.reader.bias).astype(np.float64).ravel()
        matrix = layer.linear.matrix(fitted[layer.reader.weight]).astype(np.float64)
        stays = np.ones(len(matrix), bool)
        stays[layer.linear.rows_of(gone[:, None]).ravel()] = False
        start = np.asarray(fitted[layer.bias.name], np.float64).ravel()
        matrix[stays], bias = refit_logits(x[:, stays], logits, matrix[stays], start, self.seed)
        fitted[layer.reader.weight] = layer.linear.weight(matrix)
        fitted[layer.bias.name] = bias.reshape(layer.bias.shape)


@dataclass
class _Duos:
    """By node, the product before one with a Relu between them; where those read, once the run has come there."""

    first: dict[int, Layer]
    reading: DownstreamMetric
    held: dict[int, ActivationCache] = field(default_factory=dict)

    def hold(self, group: Sequence[Layer], now: ActivationCache) -> None:
        """Remember where the run is, if a first product comes now."""
        nodes = {layer.reader.key for layer in group} & {one.reader.key for one in self.first.values()}
        self.held.update({node: now.fork() for node in nodes})


@dataclass
class Compensated:
    """A program that reads none of the removed units, the one it was made of, the sums behind its weights by node,
    notes.

    ``working``: what holds the program while products are refitted.
    """

    program: Program
    dense: Program
    sums: dict[int, tuple[Layer, NormalEquations]]
    notes: list[str]
    working: WorkingCopy | None = None

    def refit(self, weights: dict[str, Array]) -> None:
        """Set weights of the program."""
        assert self.working is not None
        self.working.refit(weights)


@dataclass
class _Rows:
    """Rows of inputs and targets of products that read one value, at positions that are drawn once per geometry."""

    now: ActivationCache
    dense: ActivationCache
    original: Program
    seed: int
    least: int
    limits: Limits
    _known: dict[tuple[object, ...], tuple[Array, list[Labels | None]]] = field(default_factory=dict)

    def inputs(self, layer: Layer) -> Array:
        """(rows, K), from the network as it is by now."""
        linear, source = layer.linear, layer.reader.source
        key = _geometry(linear)
        if key not in self._known:
            self._known.clear()
            rng = np.random.default_rng([self.seed, layer.reader.node])
            share = self.limits.rows(linear.size, self.least) / sum(self.now.samples)
            xs, places = [], []
            # the states of the layer to be fitted are not known before that: those of the original stand for them
            for values in (self.dense if linear.backward else self.now).values:
                u = np.asarray(values[source])
                places.append(draw_places(linear, u, share, rng))
                xs.append(linear.inputs(u, places[-1]))
            self._known[key] = np.concatenate(xs), places
        return self._known[key][0]

    def targets(self, layer: Layer) -> tuple[Array, Array | None]:
        """(rows, outputs): the dense product, its shortcut's drift taken up; and the dense sum before a Relu."""
        return self.at(layer, self._known[_geometry(layer.linear)][1])

    def at(self, layer: Layer, places: Sequence[Labels | None]) -> tuple[Array, Array | None]:
        """Return the same at places that are given for each batch."""
        ys, zs = [], []
        way, linear = layer.way, layer.linear
        for a, b, where in zip(self.now.values, self.dense.values, places, strict=True):
            if linear.stored:  # what gates sum up is no value of the graph
                matrix = linear.matrix(parameter_array(self.original, layer.reader.weight))
                ys.append(linear.inputs(np.asarray(b[layer.reader.source]), where) @ matrix)
                continue
            y = linear.outputs(np.asarray(b[layer.reader.output]), where)
            if way.shortcut is not None:
                gap = np.asarray(b[way.shortcut]) - np.asarray(a[way.shortcut])
                if gap.shape == b[layer.reader.output].shape:
                    safe = np.abs(way.factor) > SMALL
                    inverse = np.where(safe, 1.0 / np.where(safe, way.factor, 1.0), 0.0).astype(y.dtype)
                    y = y + linear.outputs(gap, where) * inverse
            ys.append(y)
            if way.rectified is not None and b[way.rectified].shape == b[layer.reader.output].shape:
                zs.append(linear.outputs(np.asarray(b[way.rectified]), where))
        return np.concatenate(ys), np.concatenate(zs) if zs else None


def _below_zero(
    layer: Layer, fitted: dict[str, Array], sums: NormalEquations, x: Array, target: Array, total: Array
) -> Array:
    """Targets that ask for nothing where both the dense sum and the one of now are shut off by the Relu behind them.

    The alternation of Zhang et al. (Accelerating Very Deep Convolutional Networks, 2015) for nonlinear responses.
    """
    left = x @ layer.linear.matrix(fitted[layer.reader.weight]).astype(x.dtype)
    left += (sums.y / sums.rows - left.mean(axis=0, dtype=np.float64)).astype(x.dtype)  # what the bias does
    left -= target
    factor = layer.way.factor.astype(x.dtype)
    shut = (np.minimum(total + factor * left, 0.0) - total) / factor
    return np.asarray(target + np.where(total > 0, 0.0, shut).astype(x.dtype))


def _geometry(linear: LinearOpGeometry) -> tuple[object, ...]:
    return (linear.kernel, linear.strides, linear.pads, linear.dilations, linear.stuffed, linear.backward)


def refitted(program: Program, layer: Layer, sums: NormalEquations, gone: Labels, damping: float) -> dict[str, Array]:
    """Return the best weight and bias without some places of the summed axis.

    Ridge regression around the old weight.
    """
    old = layer.linear.matrix(parameter_array(program, layer.reader.weight)).astype(np.float64)
    out = np.zeros_like(old)
    mask = np.ones(len(old), bool)
    mask[layer.linear.rows_of(gone[:, None]).ravel()] = False
    stays = np.flatnonzero(mask)
    centred = layer.bias is not None
    gram, cross = sums.gram(centred=centred), sums.cross(centred=centred)
    if not centred and layer.reader.bias is not None:  # a bias that others use stays as it is
        fixed = parameter_array(program, layer.reader.bias).astype(np.float64).ravel()
        cross -= np.outer(sums.x / max(sums.rows, 1), fixed)
    inner = gram[np.ix_(stays, stays)]
    pull = max(damping * float(np.trace(gram)) / max(len(gram), 1), 1e-12)
    prior = old[stays]
    left = cross[stays] - inner @ prior
    inner[np.diag_indices_from(inner)] += pull
    out[stays] = prior + solve(inner, left)
    made = {layer.reader.weight: layer.linear.weight(out)}
    if layer.bias is not None:
        made[layer.bias.name] = _shifted(program, layer, sums, out)
    return made


def _shifted(program: Program, layer: Layer, sums: NormalEquations, weight: Matrix) -> Array:
    """Return the bias that gives the mean of the target."""
    assert layer.bias is not None
    mean = (sums.y - sums.x @ weight) / max(sums.rows, 1)
    if layer.reader.bias == layer.bias.name:
        return mean.reshape(layer.bias.shape)
    own = 0.0 if layer.reader.bias is None else parameter_array(program, layer.reader.bias).astype(np.float64).ravel()
    # the target is the product without what is added behind it: only what the weight leaves over goes there
    old = parameter_array(program, layer.bias.name).astype(np.float64)
    return old + (layer.bias.gain * (mean - own)).reshape(layer.bias.shape)


def zero_input_rows(program: Program, layer: Layer, gone: Labels) -> dict[str, Array]:
    """Return the weight with zeros in some places of the summed axis."""
    matrix = layer.linear.matrix(parameter_array(program, layer.reader.weight)).copy()
    matrix[layer.linear.rows_of(gone[:, None]).ravel()] = 0.0
    return {layer.reader.weight: layer.linear.weight(matrix)}
