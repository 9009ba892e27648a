"""Two products with a Relu between them, fitted together: the kept units take over from the removed ones.

Least squares, one product after the other, asks each unit that stays to do what it did. Here only what the second
product gives counts: ``min E |R (relu(t) - relu(t_dense))|²`` over both weights, where t is the sum that the second one
goes into and R the metric in which the next layers read it. A local reconstruction in the sense of BRECQ (Li et al.
2021), by L-BFGS in coordinates that whiten the inputs. Samples that are left out decide when to stop, and whether
anything changes at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.pruning.compress.selection import solve
from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.passes.pruning.refit.layers import Layer
from cipm_ir.runtime.activations.cache import ActivationCache
from cipm_ir.runtime.activations.linear_geometry import Array, LinearOpGeometry, sample_places
from cipm_ir.symmetry.program import Program

Matrix = npt.NDArray[np.float64]
_ROWS = 20_000
"""Rows of the second product, about."""
_ENTRIES = 1 << 25
"""Inputs of the first product that are held at most: 128 MiB."""
_STEPS = 40
_PATIENCE = 4
"""So many steps without a gain on the samples that were left out end the search."""
_LEFT_OUT = 5
"""One sample of so many is left out."""
_DAMPING = 1e-3
Targets = Callable[[list[Labels]], tuple[Array, Array | None]]
"""Targets of the second product and, where a Relu follows, the dense sums, at places of each batch: (rows, outputs)."""


def find_pairs(program: Program, layers: Sequence[Layer]) -> dict[int, Layer]:
    """For the second product of each pair, by node, the first one: only a Relu is between, nothing else reads."""
    nodes = nodes_in_order(program.model.graph)
    values = {v.name: v for n in nodes for v in n.outputs}
    by_node = {id(nodes[layer.reader.node]): layer for layer in layers}
    found: dict[int, Layer] = {}
    for first in layers:
        if first.bias is None or first.way.rectified is None or first.way.shortcut is not None:
            continue
        if not first.linear.plain:
            continue
        relus = [node for node, _ in values[first.way.rectified].uses()]
        uses = [] if len(relus) > 1 or relus[0].outputs[0].is_graph_output() else list(relus[0].outputs[0].uses())
        second = by_node.get(id(uses[0][0])) if len(uses) == 1 else None
        if second is None or second.bias is None or second.reader.source != relus[0].outputs[0].name:
            continue
        if len(first.linear.kernel) == len(second.linear.kernel) and second.linear.plain:
            found[second.reader.key] = first
    return found


@dataclass(frozen=True)
class Window:
    """One batch: what the first product reads to give what the second one reads at some places.

    Attributes:
        x: (samples, positions, K).
        index: (places, taps) which position each tap of the second product reads; ``positions`` where it is padding.
        target, total: (samples * places, outputs); ``total`` None where no Relu follows.
    """

    x: Array
    index: Labels
    target: Array
    total: Array | None

    def halves(self) -> tuple[Window, Window]:
        """Return all but some samples, and these."""
        out = len(self.x) - len(self.x) // _LEFT_OUT
        cut = out * len(self.index)
        total = (None, None) if self.total is None else (self.total[:cut], self.total[cut:])
        return (
            Window(self.x[:out], self.index, self.target[:cut], total[0]),
            Window(self.x[out:], self.index, self.target[cut:], total[1]),
        )


def box(grid: tuple[int, ...], wanted: int, rng: np.random.Generator) -> Labels:
    """Neighbouring positions in a grid, about so many: they share what they read."""
    side = max(1, round(float(wanted) ** (1 / len(grid))))
    sizes = [min(side, n) for n in grid]
    starts = [int(rng.integers(n - size + 1)) for n, size in zip(grid, sizes, strict=True)]
    axes = [np.arange(a, a + size) for a, size in zip(starts, sizes, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), grid).ravel()


def reads(
    linear: LinearOpGeometry, grid: tuple[int, ...], hidden: tuple[int, ...], places: Labels
) -> tuple[Labels, Labels]:
    """Return positions of its input that a convolution reads at some places, and for (places, taps) which of these."""
    out = np.unravel_index(places, grid)
    taps = np.unravel_index(np.arange(int(np.prod(linear.kernel))), linear.kernel)
    flat = np.zeros((len(places), len(taps[0])), np.int64)
    inside = np.ones(flat.shape, bool)
    for k, size in enumerate(hidden):
        at = out[k][:, None] * linear.strides[k] - linear.pads[k] + taps[k] * linear.dilations[k]
        inside &= (at >= 0) & (at < size)
        flat = flat * size + np.clip(at, 0, size - 1)
    positions = np.unique(flat[inside])
    return positions, np.where(inside, np.searchsorted(positions, flat), len(positions))


@dataclass(frozen=True)
class _Fit:
    """The loss in whitened coordinates: weights are ``turn1`` (K1, K1) and ``turn2`` (K2, K2) times what is varied."""

    factors: tuple[Array, Array]
    root: Array | None
    turns: tuple[Array, Array]
    shapes: tuple[tuple[int, int], tuple[int, int]]

    def split(self, flat: Matrix) -> tuple[Array, Array, Array, Array]:
        """First weight and shift, second weight and shift."""
        (k1, h), (k2, o) = self.shapes
        a, b, c, d = np.split(flat.astype(np.float32), np.cumsum([k1 * h, h, k2 * o]))
        return self.turns[0] @ a.reshape(k1, h), b, self.turns[1] @ c.reshape(k2, o), d

    def loss(self, flat: Matrix, windows: Sequence[Window]) -> float:
        """Return mean squared error."""
        parts = self.split(flat)
        return sum(self._forward(parts, w)[0] for w in windows) / sum(len(w.target) for w in windows)

    def slope(self, flat: Matrix, windows: Sequence[Window]) -> tuple[float, Matrix]:
        """Return mean squared error and its gradient."""
        parts = self.split(flat)
        _, _, w2, _ = parts
        sums = [np.zeros_like(p) for p in parts]
        value = 0.0
        for w in windows:
            far, active, hidden, back = self._forward(parts, w)
            value += far
            sums[2] += hidden.T @ back
            sums[3] += back.sum(axis=0)
            inner = (back @ w2.T).reshape(len(w.x), *w.index.shape, -1)
            spread = np.zeros((len(w.x), w.x.shape[1] + 1, inner.shape[-1]), np.float32)
            for tap in range(w.index.shape[1]):  # at one tap no position is read twice, but for the padding
                spread[:, w.index[:, tap]] += inner[:, :, tap]
            down = spread[:, :-1].reshape(active.shape) * active
            sums[1] += down.sum(axis=0)
            sums[0] += w.x.reshape(len(down), -1).T @ (down * self.factors[0])
        sums[0], sums[2] = self.turns[0].T @ sums[0], self.turns[1].T @ sums[2]
        count = sum(len(w.target) for w in windows)
        return value / count, np.concatenate([s.ravel() for s in sums]).astype(np.float64) / count

    def _forward(
        self, parts: tuple[Array, Array, Array, Array], w: Window
    ) -> tuple[float, npt.NDArray[np.bool_], Array, Array]:
        """Summed squared error, which units are active, what the second product reads, the slope by what it gives."""
        w1, b1, w2, b2 = parts
        z = (w.x.reshape(-1, w.x.shape[2]) @ w1) * self.factors[0] + b1
        hidden = unfolded(np.maximum(z, 0.0), w)
        gap = (hidden @ w2 + b2 - w.target) * self.factors[1]
        if w.total is not None:
            now = w.total + gap
            gap = np.maximum(now, 0.0) - np.maximum(w.total, 0.0)
        seen = gap if self.root is None else gap @ self.root
        back = 2.0 * (seen if self.root is None else seen @ self.root.T) * self.factors[1]
        if w.total is not None:
            back *= now > 0
        return float(np.einsum("ro,ro->", seen, seen)), z > 0, hidden, back


def unfolded(hidden: Array, w: Window) -> Array:
    """(rows, taps * units) of (samples * positions, units), with zeros for the padding."""
    full = np.zeros((len(w.x), w.x.shape[1] + 1, hidden.shape[1]), np.float32)
    full[:, :-1] = hidden.reshape(len(w.x), w.x.shape[1], -1)
    return full[:, w.index].reshape(len(w.x) * len(w.index), -1)


class _Search:
    """Keeps the point that does best on the samples that were left out."""

    def __init__(self, fit: _Fit, windows: Sequence[Window], start: Matrix) -> None:
        self.fit, self.windows, self.best, self.waited = fit, windows, start, 0
        self.first = self.least = fit.loss(start, windows)

    def __call__(self, intermediate_result: Any) -> None:
        far = self.fit.loss(intermediate_result.x, self.windows)
        self.waited += 1
        if far < self.least:
            self.least, self.best, self.waited = far, np.array(intermediate_result.x), 0
        if self.waited >= _PATIENCE:
            raise StopIteration


def whitening(gram: Matrix) -> Array:
    """Return a matrix T with ``Tᵀ gram T`` nearly the identity."""
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, 0.0) + _DAMPING * max(float(values.mean()), 1e-12)
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T, np.float32)


def fit_together(
    windows: Sequence[Window], weight: Matrix, shift: Matrix, factors: tuple[Array, Array], root: Array | None
) -> tuple[Matrix, Matrix, float] | None:
    """Return the first weight (K1, units), its shift behind the factor, and the error that is left as a fraction.

    The second weight starts where least squares has it, and is varied too. None where samples that were left out gain
    nothing.
    """
    inside, outside = zip(*(w.halves() for w in windows), strict=True)
    f1, f2 = (f.astype(np.float32) for f in factors)
    k1, count = len(weight), sum(len(w.target) for w in inside)
    gram = sum(w.x.reshape(-1, k1).T @ w.x.reshape(-1, k1) / w.x[:, :, 0].size for w in inside) / len(inside)
    start1, start0 = weight.astype(np.float32), shift.astype(np.float32)
    known = [unfolded(np.maximum((w.x.reshape(-1, k1) @ start1) * f1 + start0, 0.0), w) for w in inside]
    known = [np.hstack([k, np.ones((len(k), 1), np.float32)]) for k in known]
    inner = np.asarray(sum(k.T @ k for k in known), np.float64) / count
    cross = np.asarray(sum(k.T @ w.target for k, w in zip(known, inside, strict=True)), np.float64) / count
    second = solve(inner + np.eye(len(inner)) * 1e-4 * np.trace(inner) / len(inner), cross)
    turns = whitening(np.asarray(gram, np.float64)), whitening(inner[:-1, :-1])
    fit = _Fit((f1, f2), None if root is None else root.astype(np.float32), turns,
               ((k1, len(shift)), (len(second) - 1, second.shape[1])))  # fmt: skip
    ends = [np.linalg.solve(t.astype(np.float64), m) for t, m in zip(turns, (weight, second[:-1]), strict=True)]
    start = np.concatenate([ends[0].ravel(), shift, ends[1].ravel(), second[-1]])
    search = _Search(fit, outside, start)
    minimize(
        fit.slope, start, args=(inside,), jac=True, method="L-BFGS-B", callback=search, options={"maxiter": _STEPS}
    )
    if not search.least < search.first:
        return None
    made, moved, _, _ = fit.split(search.best)
    return made.astype(np.float64), moved.astype(np.float64), search.least / search.first


@dataclass(frozen=True)
class LinearPair:
    """Two products with a Relu between them, and the places along their summed axes that stay."""

    first: Layer
    second: Layer
    stays1: Labels
    stays2: Labels

    def windows(self, held: ActivationCache, dense: ActivationCache, seed: int, targets: Targets) -> list[Window]:
        """Draw places. ``held``: where the first product reads."""
        one, two = self.first.linear, self.second.linear
        columns = one.rows_of(self.stays1[:, None]).ravel()
        rng = np.random.default_rng([seed, self.second.reader.node, 3])
        share = _ROWS / sum(held.samples)
        most = _ENTRIES / max(1, len(columns)) / len(held.values)
        drawn: list[tuple[Array, Labels]] = []
        places: list[Labels] = []
        for values, outs, number in zip(held.values, dense.values, held.samples, strict=True):
            u = np.asarray(values[self.first.reader.source])
            if two.kernel:
                grid = outs[self.second.reader.output].shape[2:]
                places.append(box(grid, int(np.ceil(share)), rng))
                positions, index = reads(two, grid, one.grid(u), places[-1])
                u = u[: max(1, int(most / len(positions)))]
                x = one.inputs(u, positions)[:, columns].reshape(len(u), len(positions), -1)
            else:
                found = sample_places(len(u.reshape(-1, u.shape[-1])), int(np.ceil(min(share * number, most))), rng)
                places.append(np.arange(len(u.reshape(-1, u.shape[-1]))) if found is None else found)
                x, index = one.inputs(u, places[-1])[:, None, columns], np.zeros((1, 1), np.int64)
            drawn.append((np.ascontiguousarray(x, np.float32), index))
        target, total = targets(places)
        made, at = [], 0
        for (x, index), where, number in zip(drawn, places, held.samples, strict=True):
            use, of = len(x) * len(index), number * len(where) if two.kernel else len(where)
            part = None if total is None else total[at : at + use]
            if len(x) >= _LEFT_OUT:
                made.append(Window(x, index, target[at : at + use], part))
            at += of
        return made


def fit_pair(
    program: Program,
    duo: LinearPair,
    held: ActivationCache,
    dense: ActivationCache,
    targets: Targets,
    root: Array | None,
    seed: int,
) -> dict[str, Array]:
    """Return new weight and bias of the first product; nothing where nothing is gained."""
    one, two = duo.first, duo.second
    windows = duo.windows(held, dense, seed, targets)
    matrix = one.linear.matrix(parameter_array(program, one.reader.weight)).astype(np.float64)
    shift = _shift(program, duo, held, matrix)[duo.stays2]
    factor = one.way.factor[duo.stays2]
    at = np.ix_(one.linear.rows_of(duo.stays1[:, None]).ravel(), duo.stays2)
    found = fit_together(windows, matrix[at], shift, (factor, two.way.factor), root) if windows else None
    if found is None or one.bias is None:
        return {}
    matrix[at], now, _ = found
    moved = np.zeros(one.linear.width)
    moved[duo.stays2] = (now - shift) / factor
    bias = parameter_array(program, one.bias.name) + (one.bias.gain * moved).reshape(one.bias.shape)
    return {one.reader.weight: one.linear.weight(matrix), one.bias.name: bias}


def _shift(program: Program, duo: LinearPair, held: ActivationCache, matrix: Matrix) -> Matrix:
    """Return what is added behind the first product's factor, as seen on one batch."""
    one = duo.first
    with held.fork() as few:
        few.values, few.samples = few.values[:1], few.samples[:1]
        u, name = np.asarray(few.values[0][one.reader.source]), one.way.rectified or ""
        z = next(few.tail(program.model, [name]))[name]
    places = sample_places(one.linear.positions(u), 16, np.random.default_rng(0))
    x = one.linear.inputs(u, places).astype(np.float64)
    return np.asarray((one.linear.outputs(z, places) - (x @ matrix) * one.way.factor).mean(axis=0), np.float64)
