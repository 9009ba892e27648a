"""Products whose weights may be refitted, what shifts them, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.ir.bodies import nodes_in_order
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.ir.parameters import is_parameter, parameter_tensor
from cipm_ir.passes.pruning.budget.search import Mask
from cipm_ir.passes.pruning.compress.divergence import softmax_over_last
from cipm_ir.passes.pruning.importance.criteria import parameter_array
from cipm_ir.runtime.activations.cache import moving
from cipm_ir.runtime.activations.linear_geometry import Array, LinearOpGeometry, plain_transpose, sample_places
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import RECURRENT, WeightConsumer, products, summed_classes, weight_uses

SMALL = 1e-3
"""Factors of outputs that hardly count."""
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Bias:
    """A parameter that shifts a product: one that is added, or the running mean behind it, which is subtracted.

    ``gain``: (outputs,), how far the parameter goes for a product that goes up by one.
    """

    name: str
    gain: Array
    shape: tuple[int, ...]


@dataclass(frozen=True)
class OutputPath:
    """Where a product goes: times a factor per output, plus a shortcut, perhaps into Relu alone.

    Attributes:
        factor: (outputs,).
        shortcut: name of what is added; None where nothing is, or where it may still change.
        rectified: name of the sum, where nothing but Relu reads it: what is below zero there makes no difference.
        output: name of the output of the graph that the product is, bias included, or the softmax of the product.
    """

    factor: Array
    shortcut: str | None = None
    rectified: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Layer:
    """A product with a weight that is used once, what is added to it, and where it goes."""

    reader: WeightConsumer
    linear: LinearOpGeometry
    bias: Bias | None
    way: OutputPath


def layers_of(program: Program) -> list[Layer]:
    """Return products whose weights may be refitted, in graph order."""
    uses = weight_uses(program)
    live = moving(program.model)
    nodes = nodes_in_order(program.model.graph)
    place = {id(n): k for k, n in enumerate(nodes)}
    made = []
    for reader in products(program, every=True):
        node = nodes[reader.node]
        tensor = program.model.graph.initializers.get(reader.weight)
        if uses.get(reader.weight) != 1 or tensor is None or reader.source not in live:
            continue
        if reader.bias is not None and parameter_tensor(node.inputs[2]) is None:
            continue  # computed, or given by the caller: what the product adds is not known
        if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            continue
        if program.analysis.walk.paths[reader.node]:
            continue  # in a body, whose values cannot be looked at
        if node.op_type in RECURRENT:
            linear = LinearOpGeometry.of(program, reader)
            made.append(Layer(reader, linear, None, OutputPath(np.ones(linear.width))))
            continue
        if node.op_type == "ConvTranspose" and not plain_transpose(node):
            continue  # padding that takes more away than the kernel adds, or sizes that are given
        linear = LinearOpGeometry.of(program, reader)
        made.append(Layer(reader, linear, *_surroundings(program, node, linear, uses, live, place)))
    return made


def left_out(program: Program, layers: Sequence[Layer], stays: Mask) -> list[str]:
    """Return products with a weight that lose some of their units and are not refitted, with the reason."""
    analysis, fitted = program.analysis, {layer.reader.node for layer in layers}
    uses, by_node = weight_uses(program), {reader.node: reader for reader in products(program, every=True)}
    live = moving(program.model)
    why: dict[int, str] = {}
    for event in analysis.consumers.contractions(np.flatnonzero(~stays)):
        node = analysis.walk.nodes[event.node]
        weighted = any(v is not None and v.name not in live for v in node.inputs[:2])
        if event.node in fitted or not weighted:
            continue
        reader = by_node.get(event.node)
        if analysis.walk.paths[event.node]:
            why[event.node] = f"it stands in the body {analysis.walk.paths[event.node]}"
        elif reader is None:
            why[event.node] = "only Conv, ConvTranspose (group 1), Gemm, MatMul and recurrent layers with a weight are"
        elif uses.get(reader.weight) != 1:
            why[event.node] = f"{reader.weight} is used in several places"
        else:
            why[event.node] = "its weight is computed, or its padding follows its input"
    named = {k: analysis.walk.nodes[k] for k in sorted(why)}
    return [
        f"{node.op_type} {node.name or (node.outputs[0].name or '')!r} loses units and is not refitted: {why[k]}"
        for k, node in named.items()
    ]


def _surroundings(
    program: Program,
    node: ir.Node,
    linear: LinearOpGeometry,
    uses: dict[str, int],
    live: set[str],
    place: dict[int, int],
) -> tuple[Bias | None, OutputPath]:
    """Follow a product through what adds and scales to the sum with a shortcut."""
    width = linear.width
    own = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    bias = _bias(program, own, np.ones(width), uses)
    spatial = len(linear.kernel)
    factor, shortcut, value = np.ones(width), None, node.outputs[0]
    while len(value.uses()) == 1 and not value.is_graph_output():
        after, index = next(iter(value.uses()))
        if after.op_type == "BatchNormalization" and index == 0 and spatial and shortcut is None:
            arrays = [_constant(v) for v in after.inputs[1:]]
            if any(a is None for a in arrays):
                break
            scale, _, _, variance = (np.asarray(a, np.float64) for a in arrays)
            bias = bias or _bias(program, after.inputs[3], -factor, uses)
            factor = factor * scale / np.sqrt(variance + attribute(after, "epsilon", 1e-5))
        elif after.op_type == "Add" and shortcut is None:
            other = after.inputs[1 - index]
            if other is not None and other.name in live:
                if not _ready(other, place[id(node)], place):
                    return bias, OutputPath(factor)
                shortcut = other.name
            else:
                bias = bias or _bias(program, other, factor, uses, spatial)
        elif after.op_type != "Identity":
            break
        value = after.outputs[0]
    shut = not value.is_graph_output() and {n.op_type for n, _ in value.uses()} == {"Relu"}
    plain = shortcut is None and bool((factor == 1.0).all())
    return bias, OutputPath(
        factor,
        shortcut,
        value.name if shut and (np.abs(factor) > SMALL).all() else None,
        _classes(program, value) if plain else None,
    )


def _classes(program: Program, value: ir.Value) -> str | None:
    """Return the output that a value is, or of which it holds the logits."""
    if value.is_graph_output():
        return value.name
    node = next(iter(value.uses()))[0] if len(value.uses()) == 1 else None
    rank, version = 0 if value.shape is None else len(value.shape), program.model.opset_imports.get("", 1)
    if node is None or not softmax_over_last(node, rank, version) or not node.outputs[0].is_graph_output():
        return None
    return node.outputs[0].name


def _ready(value: ir.Value, start: int, place: dict[int, int]) -> bool:
    """Return whether a value is made without products from this node on: those may still change."""
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


def grouped(program: Program, layers: list[Layer]) -> list[list[Layer]]:
    """Return products in a row that read one value.

    One that is added to another of them comes after it, in a group alone.
    """
    nodes = nodes_in_order(program.model.graph)
    place = {id(n): k for k, n in enumerate(nodes)}
    made = {v.name: v for n in nodes for v in n.outputs}
    groups: list[list[Layer]] = []
    for layer in layers:
        first = groups[-1][0].reader if groups else None
        shortcut = made.get(layer.way.shortcut)
        together = first is not None and first.source == layer.reader.source
        if first is not None and together and (shortcut is None or _ready(shortcut, first.node, place)):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _constant(value: ir.Value | None) -> Array | None:
    tensor = parameter_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())


def _bias(program: Program, value: ir.Value | None, gain: Array, uses: dict[str, int], spatial: int = 0) -> Bias | None:
    """Return a parameter with one entry for each output, ``spatial`` axes before its last, that nothing else uses."""
    if value is None or value.const_value is None or not is_parameter(value) or uses.get(value.name or "") != 1:
        return None
    shape = tuple(value.const_value.shape.numpy())
    lined_up = len(shape) > spatial and shape[len(shape) - 1 - spatial] == len(gain)
    return Bias(value.name or "", gain, shape) if lined_up and int(np.prod(shape)) == len(gain) else None


def gone_places(program: Program, reader: WeightConsumer, stays: Mask) -> Labels:
    """Return places along the summed axis of a weight whose units go."""
    classes = summed_classes(program, reader)
    return np.flatnonzero((classes >= 0) & ~stays[classes])


def zero_outputs(program: Program, layer: Layer, outputs: Labels, weights: dict[str, Array]) -> None:
    """Make outputs of a product zero, bias included; ``weights``: new ones by name, to begin with and to add to."""
    names = [layer.reader.weight] + ([layer.bias.name] if layer.bias is not None else [])
    for name in names:
        weights[name] = np.array(weights[name] if name in weights else parameter_array(program, name))
    matrix = layer.linear.matrix(weights[layer.reader.weight]).copy()
    matrix[:, outputs] = 0.0
    weights[layer.reader.weight] = layer.linear.weight(matrix)
    if layer.bias is not None:
        weights[layer.bias.name].reshape(-1)[outputs] = 0.0


def draw_places(linear: LinearOpGeometry, u: Array, share: float, rng: np.random.Generator) -> Labels | None:
    """Return positions of a batch, ``share`` rows for each of its samples; None takes all."""
    return sample_places(linear.positions(u), int(np.ceil(share * (1 if linear.kernel else len(u)))), rng)
