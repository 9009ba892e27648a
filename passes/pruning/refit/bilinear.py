"""Spaces on which everything is linear: their basis may be changed, so that what matters least stands alone and can go.

The scores of an attention head are ``(x Q)(z K)ᵀ``, what it adds is ``a V O``: for any invertible A, ``Q A`` with
``K A⁻ᵀ``, or ``V A`` with ``A⁻¹ O``, computes the same. The A taken here makes the first
units the best approximation of each lower rank: for ``C = E[q qᵀ]``, the singular vectors of ``C_q^½ C_k^½`` and of
``C^½ O`` (Eckart & Young 1936). A softmax over the keys does not see their mean: it is left out of ``C_k``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.ir.constants import is_float
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.pruning.budget.search import Mask
from cipm_ir.passes.pruning.compress.candidates import Pair
from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.passes.pruning.refit.layers import Layer, layers_of
from cipm_ir.runtime.activations.linear_geometry import NormalEquations, sample_places
from cipm_ir.runtime.activations.observe import count_samples, observe
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.symmetry.program import Program

Matrix = npt.NDArray[np.float64]
Weights = Callable[[str], Matrix]
"""Gives a parameter by name, as refitted so far; it may be written to."""
LARGEST = 1024
"""Spaces of more units than this keep their basis: it costs a decomposition of a matrix of that size."""
_FLOOR = 1e-6
"""Directions with less than this share of the largest variance are taken to have that much."""
_SAME = 1e-6
"""The outputs may change by this relative squared error, which is rounding; else the basis stays as it is."""
_ROWS = 20_000
_PASSED = {
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Reshape",
    "Transpose",
    "Identity",
    "Cast",
    "Softmax",
    "Squeeze",
    "Unsqueeze",
}


def find_pairs(program: Program, layers: Sequence[Layer] | None = None) -> dict[int, Pair]:
    """Return spaces of units on which everything is linear, by index: one maker and one reader, or two factors."""
    analysis = program.analysis
    layers = layers_of(program) if layers is None else layers
    by_leaf = {layer.reader.leaf: layer for layer in layers if not layer.linear.kernel}
    space = np.full(analysis.classes.count, -1)
    for k, raw in enumerate(analysis.spaces):
        group = program.spaces[k].group
        free = group.permutes and group.signs
        if raw.kind == "units" and raw.table.shape[1] == 1 and free and 2 <= len(raw.table) <= LARGEST:
            space[raw.table[:, 0]] = k
    makers: defaultdict[int, list[tuple[Layer, Labels]]] = defaultdict(list)
    takers: defaultdict[int, list[tuple[Layer, Labels]]] = defaultdict(list)
    others: defaultdict[int, set[str]] = defaultdict(set)
    for number, leaf in enumerate(analysis.walk.leaves):
        for factor in (f for f in leaf.factors if f.active):
            classes = analysis.classes.of[factor.base : factor.base + factor.size]
            layer = by_leaf.get(number)
            for k in np.unique(space[classes][space[classes] >= 0]).tolist():
                if layer is None or len(factor.axes) != 1 or factor.groups:
                    others[k].add(leaf.name)
                else:
                    where = takers if factor.axes[0] == layer.reader.axis else makers
                    where[k].append((layer, classes))
    found = {}
    for k, made in makers.items():
        pair = _pair(program, k, made, takers[k], others[k])
        if pair is not None:
            found[k] = pair
    return found


def _pair(
    program: Program,
    k: int,
    makers: list[tuple[Layer, Labels]],
    takers: list[tuple[Layer, Labels]],
    others: set[str],
) -> Pair | None:
    wanted = ((1, 1), (2, 0)) if program.spaces[k].group.scales else ((1, 0),)  # one weight cannot take both a and 1/a
    if (len(makers), len(takers)) not in wanted:
        return None
    if not others <= {layer.bias.name for layer, _ in makers if layer.bias is not None}:
        return None
    table = program.analysis.spaces[k].table[:, 0]
    if len(makers) + len(takers) == 1:
        return _fused(program, k, makers[0][0], table)
    places = [_places(table, classes) for _, classes in (*makers, *takers)]
    if places[0] is None or places[1] is None:
        return None
    first = makers[0][0]
    if takers:
        return Pair(k, first, takers[0][0], places[0], places[1], True)
    second = makers[1][0]
    key = _key(program, first, second, table)
    if key is first:
        return Pair(k, second, first, places[1], places[0], False, True)
    return Pair(k, first, second, places[0], places[1], False, key is second)


def _fused(program: Program, k: int, layer: Layer, table: Labels) -> Pair | None:
    """Both factors of a sum made by one product, as queries and keys are by one that makes the values too."""
    walk, of = program.analysis.walk, program.analysis.classes.of
    consumers = program.analysis.consumers
    factor, sums = consumers.axis(layer.reader.leaf, 1 - layer.reader.axis), consumers.contractions(table)
    if factor is None or len(sums) != 1:
        return None
    places = []
    for labels in (np.unique(sums[0].a), np.unique(sums[0].b)):
        own = labels[np.isin(of[labels], table)]
        at = _places(table, of[own])
        if at is None or own.min() < factor.base or own.max() >= factor.base + factor.size:
            return None
        places.append(np.asarray(own[at] - factor.base))
    if np.intersect1d(places[0], places[1]).size:
        return None
    return Pair(k, layer, layer, places[0], places[1], False, _keys_follow(walk.nodes[sums[0].node]))


def _keys_follow(node: ir.Node) -> bool:
    """Return whether a softmax runs over the positions of the second factor of this sum."""
    return node.op_type == "Attention" or (node.op_type == "MatMul" and _softmax_follows(node))


def _places(table: Labels, classes: Labels) -> Labels | None:
    """Where each class of a table stands; None where one does not stand exactly once."""
    order = np.argsort(classes, kind="stable")
    low, high = (np.searchsorted(classes[order], table, side=side) for side in ("left", "right"))
    return np.asarray(order[low]) if (high - low == 1).all() else None


def _key(program: Program, first: Layer, second: Layer, table: Labels) -> Layer | None:
    """Return the factor over whose positions a softmax runs; None where there is none."""
    analysis = program.analysis
    nodes = analysis.walk.nodes
    own = {id(nodes[layer.reader.node]): layer for layer in (first, second)}
    for c in analysis.consumers.contractions(table):
        if nodes[c.node].op_type not in ("MatMul", "Attention"):
            continue
        if not _keys_follow(nodes[c.node]):
            return None
        value = nodes[c.node].inputs[1]
        todo = [] if value is None else [value.producer()]
        while todo:
            node = todo.pop()
            if node is not None and id(node) in own:
                return own[id(node)]
            if node is not None and node.op_type in _PASSED:
                todo.extend(v.producer() for v in node.inputs if v is not None)
    return None


def _softmax_follows(node: ir.Node) -> bool:
    """Return whether what a node makes goes to a softmax over its last axis, and nowhere else.

    But for shifts and scales.
    """
    while True:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return False
        node = uses[0][0]
        if node.op_type == "Softmax":
            axis = node.attributes.get_int("axis", -1)
            return axis in (-1, len(node.outputs[0].shape or ()) - 1)
        if node.op_type not in ("Add", "Mul", "Div"):
            return False


def outputs_to_zero(program: Program, pairs: Mapping[int, Pair], stays: Mask) -> dict[int, Labels]:
    """Return outputs of products that must be zero for units to be without effect, by node.

    Not those of removed blocks.
    """
    found: defaultdict[int, list[Labels]] = defaultdict(list)
    for pair in pairs.values():
        raw = program.analysis.spaces[pair.space]
        gone = ~stays[raw.table[:, 0]]
        if not pair.chain and gone.any() and (raw.parent_class < 0 or stays[raw.parent_class]):
            found[pair.first.reader.key].append(pair.left[gone])
            found[pair.second.reader.key].append(pair.right[gone])
    return {node: np.concatenate(places) for node, places in found.items()}


# ---------------------------------------------------------------- change of basis
def diagonalize_bases(
    program: Program, wanted: set[int], data: Data, *, size: int, limit: int, seed: int
) -> tuple[Program, dict[int, Pair]]:
    """Return the same function in a basis in which units may go, and the pairs that are in it: in the order of what
    matters.

    Whether a space is linear is checked on the outputs: where they move by more than rounding, its basis stays.
    """
    pairs = {k: pair for k, pair in find_pairs(program).items() if k in wanted}
    if not pairs:
        return program, {}
    count = count_samples(program.model, data, size, limit)
    sums = _observed(program, pairs.values(), data, size, limit, count, seed)
    made = sorted_basis(program, pairs.values(), sums)
    if change(program, made, data) > _SAME:  # |h| and h² admit sign and scale, as if they were linear
        makers: defaultdict[int, list[Pair]] = defaultdict(list)
        for pair in pairs.values():
            makers[pair.first.reader.node].append(pair)
        turned = {node: sorted_basis(program, some, sums) for node, some in makers.items()}
        good = {node for node, one in turned.items() if change(program, one, data) <= _SAME}
        pairs = {k: pair for k, pair in pairs.items() if pair.first.reader.node in good}
        made = sorted_basis(program, pairs.values(), sums)
        if not pairs or change(program, made, data) > _SAME:
            return program, {}
    return made, pairs


def sorted_basis(program: Program, pairs: Iterable[Pair], sums: Mapping[str, NormalEquations]) -> Program:
    """Return the units of these spaces in the order of what they matter.

    ``sums``: of the rows that products read, by name.
    """
    weights: dict[str, Matrix] = {}

    def of(name: str) -> Matrix:
        if name not in weights:
            weights[name] = np.array(parameter_array(program, name), np.float64)
        return weights[name]

    for pair in pairs:
        turn = _basis(pair, sums, of)
        dual = np.asarray(np.linalg.inv(turn).T, np.float64)
        _turn(pair.first, of, pair.left, turn)
        if pair.chain:
            matrix = pair.second.linear.matrix(of(pair.second.reader.weight))
            matrix[pair.right] = dual.T @ matrix[pair.right]
            weights[pair.second.reader.weight] = pair.second.linear.weight(matrix)
        else:
            _turn(pair.second, of, pair.right, dual)
    return program.refit(weights)


def _turn(layer: Layer, of: Weights, places: Labels, turn: Matrix) -> None:
    """Turn outputs of a product, its bias included."""
    weight = of(layer.reader.weight)
    turned = np.moveaxis(weight, layer.reader.axis, 0)  # a view: (inputs, outputs)
    turned[:, places] = turned[:, places] @ turn
    if layer.bias is not None:
        flat = of(layer.bias.name).reshape(-1)
        flat[places] = flat[places] @ turn


def _basis(pair: Pair, sums: Mapping[str, NormalEquations], of: Weights) -> Matrix:
    """Return columns by which the units of ``first`` are turned."""
    if pair.chain:
        gram = sums[pair.second.reader.source].gram(centred=pair.second.bias is not None)
        gram = gram[np.ix_(pair.right, pair.right)]
        other = pair.second.linear.matrix(of(pair.second.reader.weight))[pair.right]
    else:
        gram = _moment(pair.first, pair.left, sums, of, centred=False)
        other = _roots(_moment(pair.second, pair.right, sums, of, centred=pair.centred))[0]
    root, inverse = _roots(gram)
    return np.asarray(inverse @ np.linalg.svd(root @ other)[0])


def _moment(layer: Layer, places: Labels, sums: Mapping[str, NormalEquations], of: Weights, *, centred: bool) -> Matrix:
    """Second moments of some outputs of a product."""
    found = sums[layer.reader.source]
    weight = layer.linear.matrix(of(layer.reader.weight))[:, places]
    moment = weight.T @ found.gram(centred=True) @ weight
    if not centred:
        mean = found.x / max(found.rows, 1) @ weight
        if layer.bias is not None:
            mean = mean + of(layer.bias.name).reshape(-1)[places]
        moment = moment + np.outer(mean, mean)
    return np.asarray(moment)


def _roots(moment: Matrix) -> tuple[Matrix, Matrix]:
    """Return the square root of a matrix of moments, and its inverse."""
    values, vectors = np.linalg.eigh((moment + moment.T) / 2)
    values = np.sqrt(np.maximum(values, max(_FLOOR * float(values[-1]), 1e-20)))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _observed(
    program: Program, pairs: Iterable[Pair], data: Data, size: int, limit: int | None, count: int, seed: int
) -> dict[str, NormalEquations]:
    """Return sums of the rows that the products of pairs read, by the name of the value."""
    layers: dict[str, Layer] = {}
    for pair in pairs:
        for layer in (pair.second,) if pair.chain else (pair.first, pair.second):
            layers[layer.reader.source] = layer
    sums = {name: NormalEquations(layer.linear.size, 0) for name, layer in layers.items()}
    rng = np.random.default_rng([seed, 2])
    for feeds, values in observe(program.model, list(sums), data, size=size, limit=limit):
        del feeds
        for name, found in sums.items():
            rows = layers[name].linear.inputs(values[name])
            share = _ROWS / max(count, 1) * len(values[name])
            places = sample_places(len(rows), int(np.ceil(share)), rng)
            found.add(rows if places is None else rows[places], None)
    return sums


def change(before: Program, after: Program, data: Data) -> float:
    """Relative squared error of the outputs on a few samples."""
    names = [v.name or "" for v in before.model.graph.outputs]
    gap = whole = 0.0
    runs = zip(*(observe(p.model, names, data, size=8, limit=8) for p in (before, after)), strict=True)
    for (_, a), (_, b) in runs:
        for name in names:
            if is_float(a[name]):
                x, y = a[name].astype(np.float64), b[name].astype(np.float64)
                gap, whole = gap + float(np.square(x - y).sum()), whole + float(np.square(x).sum())
    return gap / max(whole, 1e-30)
