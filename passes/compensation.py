"""Least-squares compensation: weights learn to do without what goes, one product after the other.

Inputs come from the network as it is by then, targets from the dense one (He et al. 2017; sequential as in GPTQ). Where
the product is added to a shortcut, the target takes up the shortcut's drift: ``y = W u + (shortcut_dense - shortcut)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.budget import Mask
from cipm_ir.passes.selection import solve
from cipm_ir.runtime.design import Array, Linear, sample_places
from cipm_ir.runtime.frontier import Frontier, moving
from cipm_ir.runtime.inputs import Data
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import Reader, products, summed_classes

Matrix = npt.NDArray[np.float64]
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention", "LSTM", "GRU", "RNN")
LARGEST = 6000
"""Products of more summed places than this are not refitted: the matrix would take too much memory."""
_ROWS_PER_PLACE = 40
_LEAST_ROWS = 60_000


@dataclass(frozen=True)
class Bias:
    """A parameter that is added to a product, or (``sign`` -1) subtracted: the running mean behind it."""

    name: str
    sign: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Drift:
    """What a product is added to, and the factor of each output on the way there."""

    shortcut: str
    factor: Array


class Normal:
    """Sums for ``min |Y - X W - b|²``, batch by batch, in float64."""

    def __init__(self, size: int, width: int) -> None:
        self.rows = 0
        self.xx = np.zeros((size, size))
        self.xy = np.zeros((size, width))
        self.x, self.y, self.yy = np.zeros(size), np.zeros(width), np.zeros(width)

    def add(self, x: Array, y: Array | None) -> None:
        """Rows of inputs (rows, K) and targets (rows, outputs); without targets only the inputs are counted."""
        x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
        self.rows += len(x)
        self.xx += x.T @ x
        self.x += x.sum(axis=0, dtype=np.float64)
        if y is not None:
            y = y.astype(x.dtype, copy=False)
            self.xy += x.T @ y
            self.y += y.sum(axis=0, dtype=np.float64)
            self.yy += np.square(y).sum(axis=0, dtype=np.float64)

    def gram(self, *, centred: bool) -> Matrix:
        """Mean of x xᵀ."""
        mean = self.x / max(self.rows, 1)
        return self.xx / max(self.rows, 1) - (np.outer(mean, mean) if centred else 0.0)

    def cross(self, *, centred: bool) -> Matrix:
        """Mean of x yᵀ."""
        mean = np.outer(self.x, self.y) / max(self.rows, 1) ** 2
        return self.xy / max(self.rows, 1) - (mean if centred else 0.0)


@dataclass(frozen=True)
class Layer:
    """A product with a weight that is used once, what is added to it, and where it goes."""

    reader: Reader
    linear: Linear
    bias: Bias | None
    drift: Drift | None


def layers_of(program: Program) -> list[Layer]:
    """Products whose weights may be refitted, in graph order."""
    uses: dict[str, int] = {}
    for leaf in program.analysis.walk.leaves:
        uses[leaf.name] = uses.get(leaf.name, 0) + len(leaf.uses)
    live = moving(program.model)
    nodes = list(program.model.graph)
    place = {id(n): k for k, n in enumerate(nodes)}
    made = []
    for reader in products(program):
        node = nodes[reader.node]
        tensor = program.model.graph.initializers.get(reader.weight)
        if uses.get(reader.weight) != 1 or tensor is None or reader.source not in live:
            continue
        if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        linear = Linear.of(program, reader)
        bias, drift = _surroundings(program, node, linear.width, uses, live, place)
        made.append(Layer(reader, linear, bias, drift))
    return made


def _surroundings(
    program: Program, node: ir.Node, width: int, uses: dict[str, int], live: set[str], place: dict[int, int]
) -> tuple[Bias | None, Drift | None]:
    """Follow a product through what adds and scales to the sum with a shortcut."""
    own = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    bias = _bias(program, own, 1.0, width, uses)
    channel = -1 if node.op_type != "Conv" else 1
    factor, value, start = np.ones(width), node.outputs[0], place[id(node)]
    while len(value.uses()) == 1 and not value.is_graph_output():
        after, index = value.uses()[0]
        if after.op_type == "Identity" or (after.op_type == "Dropout" and len(after.inputs) < 3):
            value = after.outputs[0]
        elif after.op_type == "BatchNormalization" and index == 0 and channel == 1:
            arrays = [_constant(v) for v in after.inputs[1:]]
            if any(a is None for a in arrays):
                break
            scale, _, _, variance = (np.asarray(a, np.float64) for a in arrays)
            bias = bias or _bias(program, after.inputs[3], -1.0, width, uses)
            factor = factor * scale / np.sqrt(variance + attribute(after, "epsilon", 1e-5))
            value = after.outputs[0]
        elif after.op_type in ("Add", "Sum") and len(after.inputs) == 2:
            other = after.inputs[1 - index]
            if other is not None and other.name in live:
                return bias, Drift(other.name or "", factor) if _ready(other, start, place) else None
            bias = bias or _bias(program, other, 1.0, width, uses)
            value = after.outputs[0]
        else:
            break
    return bias, None


def _ready(value: ir.Value, start: int, place: dict[int, int]) -> bool:
    """Whether a value is made without products from this node on: those may still change."""
    todo, seen = [value.producer()], set[int]()
    while todo:
        node = todo.pop()
        if node is None or place[id(node)] < start or id(node) in seen:
            continue
        if place[id(node)] == start or node.op_type in _PRODUCTS:
            return False
        seen.add(id(node))
        todo.extend(v.producer() for v in node.inputs if v is not None)
    return True


def _constant(value: ir.Value | None) -> Array | None:
    return None if value is None or value.const_value is None else np.asarray(value.const_value.numpy())


def _bias(program: Program, value: ir.Value | None, sign: float, width: int, uses: dict[str, int]) -> Bias | None:
    """A parameter of one entry for each output that nothing else uses."""
    if value is None or value.const_value is None or not value.is_initializer() or uses.get(value.name or "") != 1:
        return None
    shape = tuple(value.const_value.shape.numpy())
    if int(np.prod(shape)) != width or max(shape, default=0) != width:
        return None
    return Bias(value.name or "", sign, shape)


@dataclass
class Compensation:
    """Makes a program do without classes, at unchanged shapes.

    Attributes:
        data: calibration inputs.
        size: samples per batch.
        limit: at most this many samples.
        damping: pull towards the old weights, as a fraction of the mean variance of the inputs.
        seed: of the positions that are looked at where there are more than needed.
    """

    data: Data
    size: int = 64
    limit: int | None = None
    damping: float = 1e-4
    seed: int = 0
    progress: Callable[[str, float | None], None] | None = None

    def run(self, program: Program, stays: Mask) -> tuple[Program, list[str]]:
        """The program with weights that read nothing of the classes that go, and notes on products left alone."""
        layers = layers_of(program)
        gone = {layer.reader.node: gone_places(program, layer.reader, stays) for layer in layers}
        first = next((k for k, layer in enumerate(layers) if len(gone[layer.reader.node])), None)
        if first is None:
            return program, []
        notes = []
        groups = [list(g) for _, g in groupby(layers[first:], key=lambda layer: layer.reader.source)]
        current = program
        with Frontier(program.model, self.data, size=self.size, limit=self.limit) as dense:
            dense.advance(program.model, groups[0][0].reader.node)
            with dense.fork() as now:
                for number, group in enumerate(groups):
                    if self.progress is not None:
                        self.progress("compensate", number / len(groups))
                    weights = {}
                    start, stop = group[0].reader.node, group[-1].reader.node + 1
                    now.advance(current.model, start, _shortcuts(group))
                    dense.advance(program.model, stop, [layer.reader.output for layer in group] + _shortcuts(group))
                    small = [x for x in group if x.linear.size <= LARGEST]
                    for layer, sums in self._sums(small, now, dense):
                        weights.update(refitted(current, layer, sums, gone[layer.reader.node], self.damping))
                    for layer in group:
                        if layer.linear.size > LARGEST and len(gone[layer.reader.node]):
                            weights.update(emptied(current, layer, gone[layer.reader.node]))
                            notes.append(f"{layer.reader.weight} is too large to refit")
                    current = current.refit(weights)
        return current, notes

    def _sums(self, group: list[Layer], now: Frontier, dense: Frontier) -> Iterator[tuple[Layer, Normal]]:
        """Normal equations of products that read one value."""
        if not group:
            return
        rng = np.random.default_rng([self.seed, group[0].reader.node])
        sums = [Normal(layer.linear.size, layer.linear.width) for layer in group]
        for u, y, places in self._batches(group, now, dense, rng):
            x: Array | None = None
            for k, layer in enumerate(group):
                same = k > 0 and _geometry(layer.linear) == _geometry(group[k - 1].linear)
                x = x if same else layer.linear.inputs(u, places)
                assert x is not None
                sums[k].add(x, layer.linear.outputs(y[k], places))
        yield from zip(group, sums, strict=True)

    def _batches(
        self, group: list[Layer], now: Frontier, dense: Frontier, rng: np.random.Generator
    ) -> Iterator[tuple[Array, list[Array], Labels | None]]:
        source = group[0].reader.source
        total = sum(now.samples)
        for a, b, count in zip(now.values, dense.values, now.samples, strict=True):
            u = np.asarray(a[source])
            linear = group[0].linear
            rows = linear.positions(u)
            share = max(_LEAST_ROWS, _ROWS_PER_PLACE * linear.size) / total
            wanted = int(np.ceil(share * (1 if linear.kernel else count)))
            places = sample_places(rows, wanted, rng) if _alike(group) else None
            targets = []
            for layer in group:
                y = np.asarray(b[layer.reader.output])
                drift = layer.drift
                if drift is not None and drift.shortcut in a and drift.shortcut in b:
                    gap = np.asarray(b[drift.shortcut]) - np.asarray(a[drift.shortcut])
                    if gap.shape == y.shape:
                        y = y + _unscaled(gap, drift.factor, 1 if linear.kernel else -1)
                targets.append(y)
            yield u, targets, places


def _geometry(linear: Linear) -> tuple[object, ...]:
    return (linear.kernel, linear.strides, linear.pads, linear.dilations)


def _alike(group: list[Layer]) -> bool:
    return len({_geometry(x.linear) for x in group}) == 1


def _shortcuts(group: list[Layer]) -> list[str]:
    return [x.drift.shortcut for x in group if x.drift is not None]


def _unscaled(gap: Array, factor: Array, axis: int) -> Array:
    """The drift in the units of the product; outputs that hardly count take none."""
    safe = np.abs(factor) > 1e-3
    inverse = np.where(safe, 1.0 / np.where(safe, factor, 1.0), 0.0).astype(gap.dtype)
    return gap * inverse.reshape([-1 if k == axis % gap.ndim else 1 for k in range(gap.ndim)])


def gone_places(program: Program, reader: Reader, stays: Mask) -> Labels:
    """Places along the summed axis of a weight whose units go."""
    classes = summed_classes(program, reader)
    return np.flatnonzero((classes >= 0) & ~stays[classes])


def refitted(program: Program, layer: Layer, sums: Normal, gone: Labels, damping: float) -> dict[str, Array]:
    """The best weight and bias without some places of the summed axis: ridge regression around the old weight."""
    old = layer.linear.matrix(_parameter(program, layer.reader.weight)).astype(np.float64)
    out = np.zeros_like(old)
    mask = np.ones(len(old), bool)
    mask[layer.linear.rows_of(gone[:, None]).ravel()] = False
    stays = np.flatnonzero(mask)
    centred = layer.bias is not None
    gram, cross = sums.gram(centred=centred), sums.cross(centred=centred)
    if not centred and layer.reader.bias is not None:  # a bias that others use stays as it is
        fixed = _parameter(program, layer.reader.bias).astype(np.float64).ravel()
        cross -= np.outer(sums.x / max(sums.rows, 1), fixed)
    inner = gram[np.ix_(stays, stays)]
    pull = max(damping * float(np.trace(gram)) / max(len(gram), 1), 1e-12)
    prior = old[stays]
    out[stays] = prior + solve(inner + np.eye(len(stays)) * pull, cross[stays] - inner @ prior)
    made = {layer.reader.weight: layer.linear.weight(out)}
    if layer.bias is not None:
        made[layer.bias.name] = _shifted(program, layer, sums, out)
    return made


def _shifted(program: Program, layer: Layer, sums: Normal, weight: Matrix) -> Array:
    """The bias that gives the mean of the target."""
    assert layer.bias is not None
    mean = (sums.y - sums.x @ weight) / max(sums.rows, 1)
    if layer.reader.bias == layer.bias.name:
        return mean.reshape(layer.bias.shape)
    own = 0.0 if layer.reader.bias is None else _parameter(program, layer.reader.bias).astype(np.float64).ravel()
    # the target is the product without what is added behind it: only what the weight leaves over goes there
    old = _parameter(program, layer.bias.name).astype(np.float64)
    return old + (layer.bias.sign * (mean - own)).reshape(layer.bias.shape)


def emptied(program: Program, layer: Layer, gone: Labels) -> dict[str, Array]:
    """The weight with zeros in some places of the summed axis."""
    matrix = layer.linear.matrix(_parameter(program, layer.reader.weight)).copy()
    matrix[layer.linear.rows_of(gone[:, None]).ravel()] = 0.0
    return {layer.reader.weight: layer.linear.weight(matrix)}


def _parameter(program: Program, name: str) -> Array:
    tensor = program.model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())
