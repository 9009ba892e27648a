"""Where the units of a space come from: the product that makes them, and the function of each unit behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import CipmError, SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.ops.registry import entry_of
from cipm_ir.passes.exact.canonicalize.members import Floats, Members
from cipm_ir.passes.merging.clusters import cosine
from cipm_ir.passes.merging.rows import Row, UnitRows
from cipm_ir.runtime.activations.observe import extract_subgraph
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.consumers import element_places
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_JOINS = ("Add", "Sub", "Sum", "Max", "Min", "Mean", "Where")


@dataclass(frozen=True, eq=False)
class Origin:
    """Units before a nonlinearity, taken for normal numbers, and the values between which the nonlinearity lies.

    Attributes:
        before: the product, with what is added to it.
        after: what its readers read, or is only moved before they do; the same where nothing but averages lie between.
        mean: (units,).
        spread: (units,) standard deviations.
        rho: (units, units) correlations.
        dtype: of the values.
        inner: of a depthwise convolution, where its inputs come from; ``rho`` and ``spread`` then follow from theirs.
        taps: (units, entries) of that convolution, and its bias.
    """

    before: str
    after: str
    mean: Floats
    spread: Floats
    rho: Floats
    dtype: np.dtype[Any]
    inner: tuple[Origin, ...] = ()
    taps: Floats | None = None
    normalized: bool = False
    """Mean and spread are those of a batch normalization."""


def is_stream(program: Program, classes: Labels) -> bool:
    """Return whether several computed values are added up in these classes, as on a residual stream."""
    inside = np.zeros(program.analysis.classes.count, bool)
    inside[classes] = True
    for position in program.analysis.consumers.nodes(classes):
        node = program.analysis.walk.nodes[position]
        if node.op_type in _JOINS and sum(_carries(program, v, inside) for v in node.inputs) > 1:
            return True
    return False


def _carries(program: Program, value: ir.Value | None, inside: np.ndarray) -> bool:
    """Return whether a computed value has units among these classes."""
    state = None if value is None or value.producer() is None else program.analysis.walk.states.get(value.name or "")
    return state is not None and any(inside[program.analysis.classes.of[f.labels]].any() for f in state.factors)


def places_of(program: Program, value: str, classes: Labels) -> tuple[int, Labels]:
    """Return the axis of a value along which units lie, and the positions of each unit there: (units, occurrences).

    Raises:
        SymmetryError: there is no such axis.
    """
    analysis = program.analysis
    state = analysis.walk.states.get(value)
    element = np.full(analysis.classes.count, -1, np.int64)
    element[classes] = np.arange(len(classes))
    for f in () if state is None else state.factors:
        owner = element[analysis.classes.of[f.labels]]
        columns = element_places(owner, len(classes)) if len(f.axes) == 1 else None
        if columns is not None and columns.size:
            return f.axes[0], columns
    raise SymmetryError("the units do not lie along one axis of the values that are read")


def find_origins(members: Members, rows: UnitRows) -> list[Origin]:
    """Return the product that makes the units; of units that are gated, both.

    Raises:
        SymmetryError: the units are made or read in another way.
    """
    sources = {r.source for r in readers(members.program, rows.space)}
    if len(sources) > 1:
        raise SymmetryError("the units are read in several places")
    return _Search(members, rows).from_value(next(iter(sources)))


@dataclass
class _Search:
    members: Members
    rows: UnitRows

    def __post_init__(self) -> None:
        self.program, self.walk = self.members.program, self.members.analysis.walk
        self.consumers = self.members.analysis.consumers
        self.inside = np.zeros(self.members.count, bool)
        self.inside[self.members.analysis.spaces[self.rows.index].table[:, 0]] = True

    def from_value(self, name: str) -> list[Origin]:
        value = self._unmoved(next(v for node in self.walk.nodes for v in node.outputs if v.name == name))
        products = self._products(value)
        maker = value.producer()
        if len(products) == 1:
            return [self._origin(value, products[0])]
        if len(products) == 2 and maker is not None and maker.op_type == "Mul":
            branches = [self._unmoved(v) for v in maker.inputs if v is not None]
            found = [self._products(branch) for branch in branches]
            if all(len(p) == 1 for p in found):
                return [self._origin(v, p[0]) for v, p in zip(branches, found, strict=True)]
        raise SymmetryError("the units are made in several places")

    def _unmoved(self, value: ir.Value) -> ir.Value:
        while (maker := value.producer()) is not None and _is_moved(maker):
            sources = [v for v in maker.inputs if v is not None and _carries(self.program, v, self.inside)]
            if len(sources) != 1:
                break
            value = sources[0]
        return value

    def _products(self, value: ir.Value) -> list[ir.Value]:
        """Return the products with a weight from which a value is computed."""
        found: dict[str, ir.Value] = {}
        pending, seen = [value], set()
        while pending:
            one = pending.pop()
            node = one.producer()
            if one.name in seen or node is None:
                continue
            seen.add(one.name)
            if node.op_type in _PRODUCTS and not node.domain:
                weights = [v for v in node.inputs[:2] if v is not None and _carries(self.program, v, self.inside)]
                if weights and self._weight(node) is None:
                    pending.extend(weights)  # an average by attention
                else:
                    found[one.name or ""] = one
            elif node.op_type == "BatchNormalization" or _is_moved(node) or entry_of(node).elementwise:
                pending.extend(v for v in node.inputs if v is not None and _carries(self.program, v, self.inside))
            else:
                raise SymmetryError(f"{node.op_type} lies between the units and the weights that make them")
        return list(found.values())

    def _weight(self, node: ir.Node) -> Row | None:
        """Return rows of the weight of a product that makes the units."""
        found = self.consumers.weight(self.consumers.position[node], 1)
        return None if found is None else next((row for row in self.rows.matrices if row.leaf == found[0]), None)

    def _vector(self, node: ir.Node, index: int) -> Floats | None:
        """Return a parameter's number for each unit."""
        leaf = self.walk.use_leaf.get((self.consumers.position[node], index))
        found = (row for row in self.rows.producers if row.leaf == leaf and row.width == 1)
        return next((row.values[:, 0] for row in found), None)

    def _origin(self, after: ir.Value, before: ir.Value) -> Origin:
        maker = before.producer()
        weight = None if maker is None else self._weight(maker)
        if maker is None or weight is None:
            raise SymmetryError("the units are not made by a product with a weight of their own")
        dtype = self.members.array(weight.leaf).dtype
        inner: tuple[Origin, ...] = ()
        if maker.inputs[0] is not None and _carries(self.program, maker.inputs[0], self.inside):
            inner = tuple(self.from_value(maker.inputs[0].name or ""))
        bias = self._vector(maker, 2)
        user = next(iter(before.uses())).node if len(before.uses()) == 1 else None
        if user is not None and user.op_type == "BatchNormalization":
            mean, variance = self._vector(user, 3), self._vector(user, 4)
            if mean is not None and variance is not None:  # this with epsilon, as in every row of a variance
                spread = np.sqrt(np.maximum(variance, 0.0))
                name, rows = (before.name or "", after.name or ""), weight.values
                return Origin(*name, mean, spread, cosine(rows), dtype, inner, rows, True)
        if user is not None and user.op_type == "Add" and bias is None:
            bias = next((b for b in (self._vector(user, k) for k in (0, 1)) if b is not None), None)
            before = before if bias is None else user.outputs[0]
        full = weight.values if bias is None else np.concatenate([weight.values, bias[:, None]], axis=1)
        if not self._same_axis(before, after):
            before = after  # only averages lie between
        name = before.name or "", after.name or ""
        return Origin(*name, np.zeros(len(full)), np.linalg.norm(full, axis=1), cosine(full), dtype, inner, full)

    def _same_axis(self, before: ir.Value, after: ir.Value) -> bool:
        """Return whether nothing but functions of each unit lies between two values."""
        pending, seen = [after], set()
        while pending:
            one = pending.pop()
            node = one.producer()
            if one is before or one.name in seen or node is None:
                continue
            seen.add(one.name)
            if node.op_type in _PRODUCTS or _is_moved(node):
                return False
            pending.extend(v for v in node.inputs if v is not None and _carries(self.program, v, self.inside))
        return True


def _is_moved(node: ir.Node) -> bool:
    """Return whether a node moves, pads or averages one value, which hardly changes how units are related."""
    entry = entry_of(node)
    return not entry.elementwise and (entry.moves or entry.pools or (entry.pads is not None and entry.positionwise))


# ---------------------------------------------------------------- the function of each unit
def apply_function(program: Program, origin: Origin, classes: Labels, inputs: Floats) -> Floats:
    """(points, units): what units become behind their nonlinearity, for (points, units) before it.

    Raises:
        SymmetryError: what lies between cannot be run alone.
    """
    if origin.before == origin.after:
        return inputs
    axis, places = places_of(program, origin.before, classes)
    state = program.analysis.walk.states[origin.before]
    if axis == 0 or places.shape[1] != 1:
        raise SymmetryError("the units lie along the batch")
    feed = np.zeros((len(inputs), *(n if a == axis else 1 for a, n in enumerate(state.shape) if a)), origin.dtype)
    np.moveaxis(feed, axis, -1)[..., places[:, 0]] = inputs.reshape(len(inputs), *(1,) * (state.rank - 2), -1)
    between = extract_subgraph(program.model, {origin.before: feed}, [origin.after])
    _check_alone(between.graph, origin)
    try:
        with Runner(between) as runner:
            out = runner.run({origin.before: feed}, [origin.after])[origin.after]
    except CipmError as error:
        raise SymmetryError(f"what makes {origin.after} of {origin.before} cannot be run alone: {error}") from error
    axis, places = places_of(program, origin.after, classes)
    return np.moveaxis(out, axis, -1)[..., places[:, 0]].reshape(len(inputs), -1).astype(np.float64)


def _check_alone(graph: ir.Graph, origin: Origin) -> None:
    """Refuse what needs other inputs; forget shapes, as the values are fed at one position of an image or a text."""
    known = {v.name for v in graph.inputs} | set(graph.initializers) | {v.name for n in graph for v in n.outputs}
    for node in graph:
        inner = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        if inner or any(v is not None and v.name not in known for v in node.inputs):
            raise SymmetryError(f"{node.op_type} needs more than {origin.before} to make {origin.after}")
    for value in graph.inputs:
        if not value.is_initializer() and value.shape is not None:
            value.shape = ir.Shape([None] * len(value.shape))
    for value in (v for node in graph for v in node.outputs):
        value.shape = None
