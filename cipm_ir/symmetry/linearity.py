"""Which operators leave a space linear: one look at every node that carries units of a candidate space.

A space admits a change of basis when each operator on it either commutes with every matrix on its units (products with
weights, sums of values that all carry it, moves of whole axes), or depends on nothing but a length or an inner product
of its vectors. Units of one space look alike to every operator already, so a linear map that treats each unit on its
own does the same to all of them, and commutes. Operators that are linear in a way of their own have a rule below; for
the others their entry says that they are linear, or depend on sizes alone. Anything else ends the matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels, State
from cipm_ir.ops.events import Contraction
from cipm_ir.ops.registry import entry_of
from cipm_ir.symmetry.analysis import Analysis

REAL = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
VECTOR, GAMMA = "vector", "gamma"


@dataclass(slots=True, eq=False)
class Hit:
    """A factor of a value that carries units of candidate spaces, and the class at each of its positions."""

    axes: tuple[int, ...]
    labels: Labels
    classes: Labels
    spaces: tuple[int, ...]


@dataclass(slots=True, eq=False)
class Site:
    """A node with what its inputs and outputs carry."""

    position: int
    node: ir.Node
    states: list[State | None]
    ins: list[list[Hit]]
    outs: list[list[Hit]]

    def rank(self, k: int) -> int:
        """Return the number of axes of an input."""
        state = self.states[k]
        return 0 if state is None else state.rank

    @property
    def hits(self) -> list[Hit]:
        """Everything that it reads or makes."""
        return [hit for side in (self.ins, self.outs) for hits in side for hit in hits]


class LinearityAnalysis:
    """Goes through the graph; ``alive`` are the candidates on which everything seen so far is linear."""

    def __init__(self, analysis: Analysis, candidates: Iterable[int]) -> None:
        self.analysis, self.walk = analysis, analysis.walk
        self.alive = set(candidates)
        self.reasons: dict[int, str] = {}
        self.normalized: set[int] = set()
        self.roles: dict[int, str] = {}
        self.squares: set[str] = set()
        space_of = np.full(analysis.classes.count, -1, np.int64)
        for k in self.alive:
            space_of[analysis.spaces[k].table[:, 0]] = k
        self.space_of_atom = space_of[analysis.classes.of]
        self._carried: dict[int, tuple[Labels, tuple[int, ...]]] = {}

    def run(self) -> None:
        """Visit every node."""
        for position, node in enumerate(self.walk.nodes):
            if not self.alive:
                return
            self._visit(position, node)

    # ------------------------------------------------------------ what a value carries
    def spaces_on(self, labels: Labels) -> tuple[int, ...]:
        """Return the candidate spaces with units among some atoms."""
        known = self._carried.get(id(labels))
        if known is None:  # holds the array, so that its id stays its own
            known = self._carried[id(labels)] = (labels, self.spaces_among(labels.ravel()))
        return known[1]

    def spaces_among(self, atoms: Labels | slice) -> tuple[int, ...]:
        """Return the same, not kept."""
        found = self.space_of_atom[atoms]
        high = int(found.max(initial=-1))
        if high < 0 or int(found.min()) == high:
            return (high,) if high >= 0 else ()
        return tuple(np.flatnonzero(np.bincount(found + 1)[1:]).tolist())

    def _hits(self, state: State | None) -> list[Hit]:
        hits = []
        for f in () if state is None else state.factors:
            spaces = self.spaces_on(f.labels)
            if spaces and not self.alive.isdisjoint(spaces):
                hits.append(Hit(f.axes, f.labels, self.analysis.classes.of[f.labels], spaces))
        return hits

    def _visit(self, position: int, node: ir.Node) -> None:
        walk, states = self.walk, []
        for k, value in enumerate(node.inputs):
            leaf = walk.use_leaf.get((position, k))
            known = None if value is None else walk.states.get(value.name or "")
            states.append(walk.leaves[leaf].stacked if leaf is not None else known)
        ins = [self._hits(state) for state in states]
        if not any(ins):
            return
        outs = [self._hits(walk.states.get(value.name or "")) for value in node.outputs]
        site = Site(position, node, states, ins, outs)
        squared = bool(self.squares) and any(v is not None and v.name in self.squares for v in node.inputs)
        entry = entry_of(node)
        rule = None if entry.domain else _RULES.get(entry.name)
        if squared and not (entry.reduces and entry.linear):  # the square of a vector is for sums alone
            self.end(site, site.hits)
        elif rule is not None:
            rule(self, site)
        elif entry.linear and entry.positionwise:
            _linear(self, site)
        elif not entry.sizes_only:
            self.end(site, site.hits)

    # ------------------------------------------------------------ what rules say
    def end(self, site: Site, hits: Iterable[Hit], why: str = "") -> None:
        """The spaces on these hits admit no change of basis."""
        reason = why or f"{site.node.op_type} {site.node.name or ''} is not linear in it".replace("  ", " ")
        for hit in hits:
            for k in hit.spaces:
                if k in self.alive:
                    self.alive.discard(k)
                    self.reasons[k] = reason

    def takes(self, site: Site, k: int, role: str = VECTOR) -> None:
        """Input number k, where it is a parameter, plays this role; it cannot play two."""
        leaf = self.walk.use_leaf.get((site.position, k))
        if leaf is not None and site.ins[k] and self.roles.setdefault(leaf, role) != role:
            self.end(site, site.ins[k], f"{self.walk.leaves[leaf].name} is added or multiplied, and a factor elsewhere")

    def is_leaf(self, site: Site, k: int) -> bool:
        """Return whether input number k is a parameter."""
        return (site.position, k) in self.walk.use_leaf

    def literal(self, site: Site, k: int) -> np.ndarray | None:
        """Return a small constant input."""
        value = site.node.inputs[k] if k < len(site.node.inputs) else None
        return None if value is None else self.walk.constant(value.name or "")

    def is_zero(self, site: Site, k: int) -> bool:
        """Return whether input number k is a constant zero, which every matrix leaves as it is."""
        number = self.literal(site, k)
        return number is not None and not number.any()

    def events(self, site: Site) -> list[Contraction]:
        """Contractions of the node over candidate spaces that are alive."""
        return [
            e
            for e in self.analysis.consumers.contractions_at.get(site.position, ())
            if not self.alive.isdisjoint(self.spaces_on(e.a))
        ]


def _same(a: Hit, b: Hit) -> bool:
    return a.labels is b.labels or (a.classes.shape == b.classes.shape and np.array_equal(a.classes, b.classes))


def _shifted(site: Site, k: int, rank: int) -> dict[tuple[int, ...], Hit]:
    d = rank - site.rank(k)
    return {tuple(a + d for a in hit.axes): hit for hit in site.ins[k]}


# ---------------------------------------------------------------- rules
def _linear(survey: LinearityAnalysis, site: Site) -> None:
    """The first input passes; the others carry nothing."""
    survey.takes(site, 0)
    survey.end(site, (hit for hits in site.ins[1:] for hit in hits))


def _dropout(survey: LinearityAnalysis, site: Site) -> None:
    _linear(survey, site)
    survey.end(site, (hit for hits in site.outs[1:] for hit in hits))


def _cast(survey: LinearityAnalysis, site: Site) -> None:
    target = ir.DataType(attribute(site.node, "to", ir.DataType.UNDEFINED))
    if target in REAL:
        _linear(survey, site)
    else:
        survey.end(site, site.hits)


def _pad(survey: LinearityAnalysis, site: Site) -> None:
    mode = attribute(site.node, "mode", "constant")
    filled = survey.is_zero(site, 2) or len(site.node.inputs) < 3 or site.node.inputs[2] is None
    if mode in ("constant", b"constant") and filled and not attribute(site.node, "value", 0.0):
        _linear(survey, site)
    else:
        survey.end(site, site.hits)


def _terms(survey: LinearityAnalysis, site: Site, operands: Sequence[int], skip: int | None = None) -> None:
    """All of these inputs carry the same units on the same axes, or are zero; those on axis ``skip`` need not."""
    rank = max(site.rank(k) for k in operands)
    found: defaultdict[tuple[int, ...], dict[int, Hit]] = defaultdict(dict)
    for k in operands:
        for axes, hit in _shifted(site, k, rank).items():
            if skip is None or skip not in axes:
                found[axes][k] = hit
        survey.takes(site, k)
    for by in found.values():
        first = next(iter(by.values()))
        if not all(_same(by[k], first) if k in by else survey.is_zero(site, k) for k in operands):
            survey.end(site, by.values(), f"{site.node.op_type} {site.node.name or ''} adds what does not carry it")


def _sum(survey: LinearityAnalysis, site: Site) -> None:
    _terms(survey, site, range(len(site.ins)))


def _where(survey: LinearityAnalysis, site: Site) -> None:
    _terms(survey, site, (1, 2))
    survey.end(site, site.ins[0])


def _concat(survey: LinearityAnalysis, site: Site) -> None:
    axis = int(attribute(site.node, "axis", 0)) % max(site.rank(0), 1)
    _terms(survey, site, range(len(site.ins)), skip=axis)


def _product(survey: LinearityAnalysis, site: Site) -> None:
    """By what does not carry the space; by itself (a square, for sums alone to read); by a gamma of equal entries."""
    a, b = site.ins[:2]
    divides = site.node.op_type == "Div"
    if not (a and b):
        survey.takes(site, 0)
        survey.takes(site, 1)
        if divides:
            survey.end(site, b)
        return
    if site.node.inputs[0] is site.node.inputs[1] and not divides and not survey.is_leaf(site, 0):
        survey.squares.add(site.node.outputs[0].name or "")
        return
    for gamma, x in ((1, 0), (0, 1)):
        if survey.is_leaf(site, gamma) and not survey.is_leaf(site, x) and not (divides and gamma == 0):
            _scaled_by(survey, site, gamma, x, max(site.rank(0), site.rank(1)))
            return
    survey.end(site, [*a, *b])


def _scaled_by(survey: LinearityAnalysis, site: Site, gamma: int, x: int, rank: int) -> None:
    """A parameter that multiplies unit by unit: a multiple of the identity only where its entries are equal."""
    own, other = _shifted(site, gamma, rank), _shifted(site, x, rank)
    survey.takes(site, gamma, GAMMA)
    for axes, hit in own.items():
        if len(axes) > 1 or axes not in other or not _same(hit, other[axes]):
            survey.end(site, [hit, *site.ins[x]])


def _power(survey: LinearityAnalysis, site: Site) -> None:
    degree = survey.literal(site, 1)
    if degree is None or degree.size != 1 or float(degree.reshape(())) != 2 or survey.is_leaf(site, 0) or site.ins[1]:
        survey.end(site, site.hits)
    else:
        survey.squares.add(site.node.outputs[0].name or "")


def _reduction(survey: LinearityAnalysis, site: Site) -> None:
    """Along other axes linear; along its own only a sum of squares, which is a length."""
    node, rank = site.node, site.rank(0)
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        given = survey.literal(site, 1)
        axes = None if given is None else given.ravel().tolist()
    everything = [] if attribute(node, "noop_with_empty_axes", 0) else range(rank)
    gone = {int(a) % rank for a in axes} if axes else set(everything)
    value = node.inputs[0]
    squared = value is not None and value.name in survey.squares
    sums = entry_of(node).linear
    survey.takes(site, 0)
    for hit in site.ins[0]:
        if not gone & set(hit.axes):
            if not sums:
                survey.end(site, [hit])
            elif squared:
                survey.squares.add(node.outputs[0].name or "")
        elif set(hit.axes) <= gone and squared == sums:
            survey.normalized.update(hit.spaces)
        else:
            survey.end(site, [hit], f"{node.op_type} {node.name or ''} takes a mean over it" if sums else "")


def _rms(survey: LinearityAnalysis, site: Site) -> None:
    """Divides by the root mean square over the whole axis, and multiplies by gamma."""
    rank = site.rank(0)
    over = set(range(int(attribute(site.node, "axis", -1)) % rank, rank))
    survey.takes(site, 0)
    for hit in site.ins[0]:
        if set(hit.axes) <= over:
            survey.normalized.update(hit.spaces)
        else:
            survey.end(site, [hit])
    survey.end(site, (hit for hits in site.ins[2:] for hit in hits))
    if len(site.ins) > 1 and site.ins[1]:
        if survey.is_leaf(site, 1):
            _scaled_by(survey, site, 1, 0, rank)
        else:
            survey.end(site, site.ins[1])


def _mean_norm(survey: LinearityAnalysis, site: Site) -> None:
    survey.end(site, site.hits, f"{site.node.op_type} {site.node.name or ''} subtracts a mean")


def _contraction(survey: LinearityAnalysis, site: Site) -> None:
    """Axes that are summed are summed against the same units; the others come out as they went in."""
    left, right = list(site.ins[0]), list(site.ins[1]) if len(site.ins) > 1 else []
    if attribute(site.node, "group", 1) != 1:
        survey.end(site, site.hits)
        return
    for event in survey.events(site):
        a, b = _pop(left, event.a), _pop(right, event.b)
        if a is None or b is None or not np.array_equal(a.classes.ravel(), b.classes.ravel()):
            survey.end(site, [hit for hit in site.hits if set(hit.spaces) & set(survey.spaces_on(event.a))])
    made = list(site.outs[0])
    for hit in left + right:
        where = next((k for k, out in enumerate(made) if _same(hit, out)), None)
        if where is None:
            survey.end(site, [hit])
        else:
            made.pop(where)
    survey.end(site, made)
    for k in range(min(2, len(site.ins))):
        survey.takes(site, k)
    if len(site.ins) > 2 and site.states[2] is not None:
        _bias(survey, site)


def _pop(hits: list[Hit], labels: Labels) -> Hit | None:
    for k, hit in enumerate(hits):
        if hit.labels.size == labels.size and np.array_equal(hit.labels.ravel(), labels):
            return hits.pop(k)
    return None


def _bias(survey: LinearityAnalysis, site: Site) -> None:
    survey.takes(site, 2)
    bias = site.ins[2]
    for hit in site.outs[0]:
        if not any(_same(hit, own) for own in bias) and not survey.is_zero(site, 2):
            survey.end(site, [hit])
    survey.end(site, (own for own in bias if not any(_same(own, hit) for hit in site.outs[0])))


def _attention(survey: LinearityAnalysis, site: Site) -> None:
    """Queries meet keys unit by unit; values pass."""
    q, k, v = ({s for hit in hits for s in hit.spaces} for hits in site.ins[:3])
    out = {s for hit in site.outs[0] for s in hit.spaces}
    summed: set[int] = set()
    for event in survey.events(site):
        of = survey.analysis.classes.of
        if np.array_equal(of[event.a], of[event.b]):
            summed |= set(survey.spaces_on(event.a))
    good = {s for s in (q & k & summed) - v - out} | {s for s in (v & out) - q - k - summed}
    for number in range(3):
        survey.takes(site, number)
    others = {s for hits in (*site.ins[3:], *site.outs[1:]) for hit in hits for s in hit.spaces}
    bad = ((q | k | v | out | others) - good) | others
    survey.end(site, [hit for hit in site.hits if set(hit.spaces) & bad])


Rule = Callable[[LinearityAnalysis, Site], None]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean"), _sum),
    **dict.fromkeys(("Mul", "Div"), _product),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceL2", "ReduceSumSquare"), _reduction),
    **dict.fromkeys(("RMSNormalization", "SimplifiedLayerNormalization"), _rms),
    **dict.fromkeys(("LayerNormalization", "MeanVarianceNormalization"), _mean_norm),
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose"), _contraction),
    "Attention": _attention,
    "Dropout": _dropout,
    "Cast": _cast,
    "Pad": _pad,
    "Where": _where,
    "Concat": _concat,
    "Pow": _power,
}
