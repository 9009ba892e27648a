"""Graphs of real architectures at full size, with seeded random weights, as an exporter writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Builder:
    """Appends nodes and initializers; every method returns the name of its output."""

    def __init__(self, opset: int = 20, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)
        self.opset = opset

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """A random parameter."""
        scale = scale if scale is not None else (2.0 / max(int(np.prod(shape[1:])), 1)) ** 0.5
        array = (self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def const(self, name: str, value: np.ndarray) -> str:
        """A given initializer."""
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=f"n{len(self.nodes)}", **attributes))
        return out

    def model(self, name: str, inputs: dict[str, tuple[int, list[int]]], output: str) -> onnx.ModelProto:
        """The checked model with inferred shapes."""
        graph = helper.make_graph(
            self.nodes,
            name,
            [helper.make_tensor_value_info(k, t, s) for k, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)


def _norm(b: Builder, x: str, name: str, n: int) -> str:
    parts = [
        b.weight(f"{name}.weight", n, scale=1.0),
        b.weight(f"{name}.bias", n, scale=0.1),
        b.weight(f"{name}.running_mean", n, scale=0.1),
    ]
    parts.append(b.const(f"{name}.running_var", np.ones(n, np.float32)))
    return b.node("BatchNormalization", x, *parts, epsilon=1e-5)


def densenet121(size: int = 224) -> onnx.ModelProto:
    """DenseNet-121 (Huang et al. 2017) with batch norm kept, as torchvision's exports to ONNX."""
    b = Builder()
    x = b.node(
        "Conv",
        "x",
        b.weight("features.conv0.weight", 64, 3, 7, 7),
        strides=[2, 2],
        pads=[3, 3, 3, 3],
        kernel_shape=[7, 7],
    )
    x = b.node("Relu", _norm(b, x, "features.norm0", 64))
    x = b.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for k, layers in enumerate((6, 12, 24, 16), start=1):
        parts = [x]
        for j in range(1, layers + 1):
            name = f"features.denseblock{k}.denselayer{j}"
            joined = parts[0] if len(parts) == 1 else b.node("Concat", *parts, axis=1)
            y = b.node("Relu", _norm(b, joined, f"{name}.norm1", channels))
            y = b.node("Conv", y, b.weight(f"{name}.conv1.weight", 128, channels, 1, 1), kernel_shape=[1, 1])
            y = b.node("Relu", _norm(b, y, f"{name}.norm2", 128))
            parts.append(
                b.node(
                    "Conv", y, b.weight(f"{name}.conv2.weight", 32, 128, 3, 3), kernel_shape=[3, 3], pads=[1, 1, 1, 1]
                )
            )
            channels += 32
        x = b.node("Concat", *parts, axis=1)
        if k < 4:
            x = b.node("Relu", _norm(b, x, f"features.transition{k}.norm", channels))
            x = b.node(
                "Conv",
                x,
                b.weight(f"features.transition{k}.conv.weight", channels // 2, channels, 1, 1),
                kernel_shape=[1, 1],
            )
            x = b.node("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            channels //= 2
    x = b.node("Relu", _norm(b, x, "features.norm5", channels))
    x = b.node("Flatten", b.node("GlobalAveragePool", x))
    x = b.node(
        "Gemm", x, b.weight("classifier.weight", 1000, channels), b.weight("classifier.bias", 1000, scale=0.1), transB=1
    )
    return b.model("densenet121", {"x": (TensorProto.FLOAT, [1, 3, size, size])}, x)


def bert(
    layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 30522, batch: int = 1, length: int = 128
) -> onnx.ModelProto:
    """BERT-base (Devlin et al. 2019), attention decomposed as torch.onnx.export writes it."""
    b = Builder()
    d = width // heads
    split = b.const("split", np.array([batch, length, heads, d], np.int64))
    merge = b.const("merge", np.array([batch, length, width], np.int64))
    scale = b.const("scale", np.array(d**-0.5, np.float32))

    def linear(x: str, name: str, n: int, m: int) -> str:
        y = b.node("MatMul", x, b.weight(f"{name}.weight", n, m, scale=0.02))
        return b.node("Add", y, b.weight(f"{name}.bias", m, scale=0.02))

    def norm(x: str, name: str) -> str:
        return b.node(
            "LayerNormalization",
            x,
            b.weight(f"{name}.weight", width, scale=1.0),
            b.weight(f"{name}.bias", width, scale=0.1),
            axis=-1,
        )

    x = b.node("Gather", b.weight("embeddings.word_embeddings.weight", vocabulary, width, scale=0.02), "ids")
    x = b.node("Add", x, b.weight("embeddings.position_embeddings.weight", length, width, scale=0.02))
    x = norm(x, "embeddings.LayerNorm")
    for k in range(layers):
        name = f"encoder.layer.{k}"
        q, key, v = (
            b.node("Reshape", linear(x, f"{name}.attention.self.{part}", width, width), split)
            for part in ("query", "key", "value")
        )
        q, v = b.node("Transpose", q, perm=[0, 2, 1, 3]), b.node("Transpose", v, perm=[0, 2, 1, 3])
        score = b.node("Mul", b.node("MatMul", q, b.node("Transpose", key, perm=[0, 2, 3, 1])), scale)
        context = b.node("Transpose", b.node("MatMul", b.node("Softmax", score, axis=-1), v), perm=[0, 2, 1, 3])
        context = b.node("Reshape", context, merge)
        x = norm(
            b.node("Add", linear(context, f"{name}.attention.output.dense", width, width), x),
            f"{name}.attention.output.LayerNorm",
        )
        hidden = b.node("Gelu", linear(x, f"{name}.intermediate.dense", width, 4 * width))
        x = norm(b.node("Add", linear(hidden, f"{name}.output.dense", 4 * width, width), x), f"{name}.output.LayerNorm")
    x = linear(x, "pooler", width, width)
    return b.model("bert", {"ids": (TensorProto.INT64, [batch, length])}, b.node("Tanh", x))
