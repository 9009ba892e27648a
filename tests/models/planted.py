"""Networks with modules planted in them: shuffled block-structured weights, and the modules that ought to be found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTHS = (36, 48, 40)
INPUTS = 24


@dataclass(frozen=True)
class Planted:
    """A model, the module of each unit by hidden layer, and inputs."""

    model: onnx.ModelProto
    modules: tuple[np.ndarray, ...]
    data: dict[str, np.ndarray]


def planted(
    modules: int = 4, noise: float = 0.02, seed: int = 0, samples: int = 600, negative: float = 0.25
) -> Planted:
    """An MLP of three hidden layers with Relu. Units of a module are bound to each other; ``noise`` to all others.

    ``negative`` of the weights inside have the other sign. The inputs of one module are correlated, so that its
    activations are, too.
    """
    rng = np.random.default_rng(seed)
    sizes = (INPUTS, *WIDTHS)
    labels = [np.arange(INPUTS) * modules // INPUTS]
    labels += [rng.permutation(np.arange(n) * modules // n) for n in WIDTHS]
    nodes, weights, at = [], [], "x"
    for k in range(1, len(sizes)):
        inside = labels[k][:, None] == labels[k - 1]
        strength = np.where(inside, rng.uniform(0.5, 1.5, inside.shape), noise * rng.standard_normal(inside.shape))
        weight = strength * np.where(inside, np.where(rng.random(inside.shape) < negative, -1.0, 1.0), 1.0)
        weights.append(numpy_helper.from_array(weight.astype(np.float32) / 3, f"w{k}"))
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, sizes[k]).astype(np.float32), f"b{k}"))
        nodes.append(helper.make_node("Gemm", [at, f"w{k}", f"b{k}"], [f"z{k}"], transB=1))
        nodes.append(helper.make_node("Relu", [f"z{k}"], [f"h{k}"]))
        at = f"h{k}"
    head = np.where(labels[-1][:, None] == np.arange(modules), rng.uniform(0.5, 1.5, (WIDTHS[-1], modules)), 0.0)
    weights.append(numpy_helper.from_array(head.astype(np.float32), "head"))
    nodes.append(helper.make_node("MatMul", [at, "head"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "planted",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", modules])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    common = rng.standard_normal((samples, modules))[:, labels[0]]
    x = (common + 0.5 * rng.standard_normal((samples, INPUTS))).astype(np.float32)
    return Planted(model, tuple(labels[1:]), {"x": x})


def same_partition(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two labellings group the same units."""
    pairs = len({*zip(one.tolist(), two.tolist(), strict=True)})
    return pairs == len(np.unique(one)) == len(np.unique(two))
