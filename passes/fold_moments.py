"""Second moments of the units of a space where weights read them: measured on data, or estimated from weights alone.

Without data, a unit is f(z), with z its value before the nonlinearity. Inputs of the layer are taken for independent
normal numbers of size one, so that two units are correlated like their rows of weights, bias included. The moments
are then the dual of f (Daniely et al. 2016): with a_k(i) the coefficients of f_i in Hermite polynomials,
E[h_i h_j] = sum_k a_k(i) a_k(j) rho_ij^k. A batch normalization knows the mean and the variance of z: they are used.
For Relu without bias this is the arc-cosine kernel (Cho and Saul 2009).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import CipmError, SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.base import Context
from cipm_ir.passes.canonical_members import Floats, Members
from cipm_ir.passes.fold_clusters import cosine
from cipm_ir.passes.fold_rows import UnitRows
from cipm_ir.rules.registry import lookup
from cipm_ir.runtime.observe import observe, part
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers

_POINTS = 96
_DEGREE = 32
_SAMPLES = 4096
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_MOVES = ("MaxPool", "AveragePool", "GlobalAveragePool", "Pad", "Flatten", "Reshape", "Transpose", "Dropout")
"""Between the nonlinearity and the readers these hardly change how units are related."""


@dataclass(frozen=True, eq=False)
class Moments:
    """``second`` (units, units): E[h_i h_j]. ``mean`` (units,): E[h_i]."""

    second: Floats
    mean: Floats

    @property
    def covariance(self) -> Floats:
        """(units, units)."""
        return np.asarray(self.second - np.outer(self.mean, self.mean))

    @property
    def correlation(self) -> Floats:
        """(units, units); a unit that never changes is like nothing but itself."""
        found = self.covariance
        spread = np.sqrt(np.maximum(np.diag(found), 0.0))
        size = np.outer(spread, spread)
        out = np.clip(np.divide(found, size, out=np.zeros_like(found), where=size > 0), -1.0, 1.0)
        np.fill_diagonal(out, 1.0)
        return out


def _places(program: Program, value: str, classes: Labels) -> tuple[int, Labels]:
    """The axis of a value along which units lie, and the positions of each unit there: (units, occurrences)."""
    analysis = program.analysis
    state = analysis.walk.states.get(value)
    element = np.full(analysis.classes.count, -1, np.int64)
    element[classes] = np.arange(len(classes))
    for f in () if state is None else state.factors:
        owner = element[analysis.classes.of[f.labels]].ravel()
        if len(f.axes) == 1 and (owner >= 0).any():
            columns = np.argsort(owner, kind="stable")[int((owner < 0).sum()) :]
            if len(columns) % len(classes) == 0:
                return f.axes[0], columns.reshape(len(classes), -1)
    raise SymmetryError(f"The units do not lie along one axis of {value}.")


# ---------------------------------------------------------------- from data
@dataclass(frozen=True, eq=False)
class Site:
    """Where the units of a space are read: the value, the axis, and the positions (units, occurrences)."""

    value: str
    axis: int
    places: Labels


def observation_sites(program: Program, rows: UnitRows) -> list[Site]:
    """All values in which weights read the units. Errors: `SymmetryError` where they lie along no single axis."""
    classes = program.analysis.spaces[rows.index].table[:, 0]
    names = sorted({r.source for r in readers(program, rows.space)})
    return [Site(name, *_places(program, name, classes)) for name in names]


def measured_moments(program: Program, sites: Mapping[int, list[Site]], ctx: Context) -> dict[int, Moments]:
    """Moments over data, positions and readers, of several spaces in one run.

    Errors: as `cipm_ir.runtime.observe.observe`.
    """
    if ctx.data is None or not sites:
        return {}
    sums: dict[int, tuple[Floats, Floats, int]] = {}
    names = sorted({site.value for found in sites.values() for site in found})
    seen = observe(program.model, names, ctx.data, limit=_SAMPLES, progress=ctx.progress, what="moments of units")
    for _, values in seen:
        for k, found in sites.items():
            for site in found:
                flat = np.moveaxis(values[site.value], site.axis, -1)
                for column in site.places.T:
                    h = flat[..., column].reshape(-1, len(column)).astype(np.float64)
                    second, total, count = sums.get(k, (0.0, 0.0, 0))
                    sums[k] = second + h.T @ h, total + h.sum(axis=0), count + len(h)
    return {k: Moments(second / count, total / count) for k, (second, total, count) in sums.items()}


# ---------------------------------------------------------------- from weights
@dataclass(frozen=True, eq=False)
class _Origin:
    """Units before the nonlinearity: the value, its normal distribution, and the value behind the nonlinearity."""

    before: str
    after: str
    mean: Floats
    spread: Floats
    rho: Floats
    dtype: np.dtype[Any]


def estimated_moments(members: Members, rows: UnitRows) -> Moments:
    """Moments of one space from its weights.

    Errors: `SymmetryError` where the units are not one product with a weight followed by a function of each unit.
    """
    program = members.program
    classes = program.analysis.spaces[rows.index].table[:, 0]
    origin = _origin(members, rows)
    points, weights = np.polynomial.hermite_e.hermegauss(_POINTS)
    polynomials = _hermite(points) * (weights / weights.sum())
    axis, places = _places(program, origin.before, classes)
    rank = program.analysis.walk.states[origin.before].rank
    width = program.analysis.walk.states[origin.before].shape[axis]
    if axis == 0 or places.shape[1] != 1:
        raise SymmetryError(f"The units of @{rows.space.name} lie along the first axis of {origin.before}.")
    feed = np.zeros((_POINTS, *(width if a == axis else 1 for a in range(1, rank))), origin.dtype)
    np.moveaxis(feed, axis, -1)[..., places[:, 0]] = (
        origin.mean + np.multiply.outer(points, origin.spread)
    ).reshape(_POINTS, *(1,) * (rank - 2), -1)
    out = _applied(program, origin, feed)
    axis, places = _places(program, origin.after, classes)
    h = np.moveaxis(out, axis, -1)[..., places[:, 0]].reshape(_POINTS, -1).astype(np.float64)
    a = h.T @ polynomials.T
    if not np.isfinite(a).all():
        raise SymmetryError(f"The units of @{rows.space.name} overflow on normal inputs.")
    second, power = np.zeros_like(origin.rho), np.ones_like(origin.rho)
    for coefficient in a.T:
        second += np.outer(coefficient, coefficient) * power
        power = power * origin.rho
    return Moments(second, a[:, 0])


def _hermite(points: Floats) -> Floats:
    """Normalized Hermite polynomials at some points: (degrees, points)."""
    out = [np.ones_like(points), points]
    for k in range(2, _DEGREE):
        out.append((points * out[-1] - np.sqrt(k - 1) * out[-2]) / np.sqrt(k))
    return np.stack(out)


def _applied(program: Program, origin: _Origin, feed: Floats) -> Floats:
    """The value behind the nonlinearity for given values before it."""
    if origin.before == origin.after:
        return feed
    try:
        between = part(program.model, {origin.before: feed}, [origin.after])
        _forget_shapes(between.graph, feed.ndim)
        with Runner(between) as runner:
            out = runner.run({origin.before: feed}, [origin.after])[origin.after]
    except CipmError as error:
        raise SymmetryError(f"What lies between {origin.before} and {origin.after} cannot be run alone: {error}") from error
    return np.asarray(out)


def _forget_shapes(graph: ir.Graph, rank: int) -> None:
    """The values are fed at one position of an image or a sequence, whatever its size was."""
    for value in graph.inputs:
        value.shape = ir.Shape([None] * rank)
    for value in (v for node in graph for v in node.outputs):
        value.shape = None


def _origin(members: Members, rows: UnitRows) -> _Origin:
    program, walk = members.program, members.analysis.walk
    position = {id(node): k for k, node in enumerate(walk.nodes)}
    sources = {r.source for r in readers(program, rows.space)}
    if len(sources) > 1 or len(rows.matrices) != 1:
        raise SymmetryError(f"The units of @{rows.space.name} are made or read in several places.")
    value = _value(walk.nodes, sources.pop())
    while (maker := value.producer()) is not None and maker.op_type in _MOVES and maker.inputs[0] is not None:
        value = maker.inputs[0]
    after, before = value.name or "", _product(value, rows.space.name)
    maker = before.producer()
    assert maker is not None
    weight = rows.matrices[0].values
    dtype = members.array(rows.matrices[0].leaf).dtype
    bias = _of_leaf(members, rows, walk.use_leaf.get((position[id(maker)], 2)))
    uses = [use.node for use in before.uses()]
    if len(uses) == 1 and uses[0].op_type == "BatchNormalization":
        at = position[id(uses[0])]
        mean, variance = (_of_leaf(members, rows, walk.use_leaf.get((at, k))) for k in (3, 4))
        if mean is not None and variance is not None:
            spread = np.sqrt(np.maximum(variance, 0.0))  # with the epsilon, as in every row of a variance
            return _Origin(before.name or "", after, mean, spread, cosine(weight), dtype)
    if len(uses) == 1 and uses[0].op_type == "Add" and bias is None:
        at = position[id(uses[0])]
        added = next((k for k in (0, 1) if (at, k) in walk.use_leaf), None)
        bias = None if added is None else _of_leaf(members, rows, walk.use_leaf[at, added])
        before = before if bias is None else uses[0].outputs[0]
    full = weight if bias is None else np.concatenate([weight, bias[:, None]], axis=1)
    zero = np.zeros(len(full))
    return _Origin(before.name or "", after, zero, np.linalg.norm(full, axis=1), cosine(full), dtype)


def _of_leaf(members: Members, rows: UnitRows, leaf: int | None) -> Floats | None:
    """A vector's entry for each unit."""
    found = [row for row in rows.producers if row.leaf == leaf and row.values.shape[1] == 1]
    return found[0].values[:, 0] if found else None


def _value(nodes: list[ir.Node], name: str) -> ir.Value:
    return next(v for node in nodes for v in node.outputs if v.name == name)


def _product(value: ir.Value, space: str) -> ir.Value:
    """The only product from which a value is computed unit by unit."""
    found: dict[str, ir.Value] = {}
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        node = one.producer()
        if one.name in seen or node is None:
            continue
        seen.add(one.name)
        entry = lookup(node.domain, node.op_type)
        module = "" if entry is None else entry.labels.__module__.rpartition(".")[2]
        if node.op_type in _PRODUCTS and not node.domain:
            found[one.name or ""] = one
        elif node.op_type in ("BatchNormalization", "Constant") or module == "elementwise":
            pending.extend(v for v in node.inputs if v is not None)
        else:
            raise SymmetryError(f"{node.op_type} lies between the weights of @{space} and its nonlinearity.")
    if len(found) != 1:
        raise SymmetryError(f"The units of @{space} are not made by one product with a weight.")
    return next(iter(found.values()))
