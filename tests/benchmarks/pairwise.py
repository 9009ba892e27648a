"""Pairwise cross-layer equalization (Nagel et al. 2019, section 4.1), the baseline that `equalize` is compared with.

Layers are found by the usual pattern: Conv or Gemm, then Relu or nothing, then Conv or Gemm, each the only reader of
what comes before; and triples with a depthwise convolution in the middle. Residual streams are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

Array = NDArray[Any]
PASSING = ("Relu", "LeakyRelu")
TOLERANCE = 1e-4
SWEEPS = 1000


@dataclass
class Layer:
    """A Conv or Gemm with a weight of its own; ``outward`` and ``inward`` are its weight's axes."""

    weight: str
    bias: str
    outward: int
    inward: int
    source: str
    result: str
    depthwise: bool


@dataclass
class Link:
    """Scales between two layers: the first is divided by e^log along its outputs, the second multiplied by it."""

    first: Layer
    second: Layer
    log: Array = field(default_factory=lambda: np.zeros(0))


def equalized(model: onnx.ModelProto, *, power_of_two: bool = False) -> onnx.ModelProto:
    """All pairs and triples in turn, until no scale changes by more than 1e-4; the same function as the model.

    With ``power_of_two`` the total scales are rounded at the end, so that the function is the same bit for bit.
    """
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    chains = find_chains(model)
    for _ in range(SWEEPS):
        if max((_step(chain, weights) for chain in chains), default=0.0) < TOLERANCE:
            break
    links = [link for chain in chains for link in chain]
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {t.name: t for t in made.graph.initializer}
    weights = {name: numpy_helper.to_array(t).astype(np.float64) for name, t in tensors.items()}
    moved = set()
    for link in links:
        log = np.round(link.log / np.log(2)) * np.log(2) if power_of_two else link.log
        scale = np.exp2(np.round(link.log / np.log(2))) if power_of_two else np.exp(log)
        _apply(link, scale, weights)
        moved |= {link.first.weight, link.first.bias, link.second.weight}
    for name in moved - {""}:
        dtype = numpy_helper.to_array(tensors[name]).dtype
        tensors[name].CopyFrom(numpy_helper.from_array(weights[name].astype(dtype), name))
    return made


# ---------------------------------------------------------------- the pattern
def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """Conv (dense or depthwise) and Gemm nodes whose parameters nothing else reads."""
    shape = {t.name: tuple(t.dims) for t in model.graph.initializer}
    reads = [name for node in model.graph.node for name in node.input]
    layers = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or node.input[1] not in shape:
            continue
        bias = node.input[2] if len(node.input) > 2 else ""
        own = [node.input[1], *([bias] if bias else [])]
        if any(reads.count(name) != 1 for name in own) or (bias and bias not in shape):
            continue
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        out, inward = (0, 1) if node.op_type == "Conv" or given.get("transB") else (1, 0)
        group, weight = given.get("group", 1), shape[node.input[1]]
        depthwise = group > 1 and group == weight[0] and weight[1] == 1
        if (group > 1 and not depthwise) or given.get("transA"):
            continue
        layers.append(Layer(node.input[1], bias, out, inward, node.input[0], node.output[0], depthwise))
    return layers


def find_chains(model: onnx.ModelProto) -> list[list[Link]]:
    """Pairs, as one link, and depthwise triples, as two."""
    layers = find_layers(model)
    by_source = {layer.source: layer for layer in layers}
    outputs = {value.name for value in model.graph.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def following(layer: Layer) -> Layer | None:
        value = layer.result
        if value in outputs or len(readers.get(value, [])) != 1:
            return None
        node = readers[value][0]
        if node.op_type in PASSING:
            value = node.output[0]
            if value in outputs or len(readers.get(value, [])) != 1:
                return None
        return by_source.get(value)

    chains: list[list[Link]] = []
    middle = set()
    size = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for first in layers:
        second = following(first)
        if second is None:
            continue
        third = following(second) if second.depthwise else None
        found = [(first, second)] + ([(second, third)] if third is not None and not third.depthwise else [])
        if (second.depthwise and len(found) == 1) or first.weight in middle:
            continue
        middle |= {b.weight for _, b in found[:-1]}
        chains.append([Link(a, b, np.zeros(size[a.weight][a.outward])) for a, b in found])
    return chains


# ---------------------------------------------------------------- scales
def _range(layer: Layer, axis: int, weights: dict[str, Array]) -> Array:
    weight = np.abs(weights[layer.weight])
    return np.asarray(weight.max(axis=tuple(a for a in range(weight.ndim) if a != axis)))


def _apply(link: Link, scale: Array, weights: dict[str, Array]) -> None:
    """Divide the outputs of the first layer, multiply the inputs of the second."""
    a, b = link.first, link.second
    for name, axis, factor in (
        (a.weight, a.outward, 1.0 / scale),
        (a.bias, 0, 1.0 / scale),
        (b.weight, 0 if b.depthwise else b.inward, scale),
    ):
        if name:
            array = weights[name]
            weights[name] = array * factor.reshape([-1 if k == axis else 1 for k in range(array.ndim)])


def _step(chain: list[Link], weights: dict[str, Array]) -> float:
    """Equalize one pair (s = r1 / sqrt(r1 r2)) or triple (cube roots); the largest change of a log-scale."""
    ranges = [_range(chain[0].first, chain[0].first.outward, weights)]
    ranges += [_range(k.second, 0 if k.second.depthwise else k.second.inward, weights) for k in chain]
    alive = np.all([r > 0 for r in ranges], axis=0)
    logs = [np.log(np.where(alive, r, 1.0)) for r in ranges]
    mean = np.mean(logs, axis=0)
    steps = [logs[0] - mean] if len(chain) == 1 else [logs[0] - mean, mean - logs[2]]
    for link, step in zip(chain, steps, strict=True):
        link.log = link.log + step
        _apply(link, np.exp(step), weights)
    return float(max(np.abs(step).max() for step in steps))
