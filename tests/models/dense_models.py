"""Small transformers whose residual stream is linear but for RMS normalizations, and ways to spoil that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from tests.zoo.net import Net

BATCH, LENGTH, VOCABULARY = 2, 5, 11
Spoil = Callable[[Net, str], str]
"""Puts something on the residual stream: gets the model and the stream, gives the stream."""


@dataclass(frozen=True)
class Style:
    """What a transformer looks like.

    ``gamma``: "ones", "equal" (one number for all units, another in each layer), "random" or "none".
    ``spelled``: the normalization as Pow, ReduceMean, Sqrt and Div instead of one operator. ``post``: normalizations
    behind the sums, as in BERT, instead of before the products. ``gated``: a Llama's MLP without biases, else BERT's.
    """

    width: int = 16
    heads: int = 4
    groups: int = 2
    hidden: int = 24
    layers: int = 2
    gamma: str = "ones"
    spelled: bool = True
    post: bool = False
    gated: bool = True
    tied: bool = False
    dtype: str = "float32"


LLAMA = Style()
BERT = Style(groups=4, post=True, gated=False, tied=True)


def transformer(style: Style, spoil: Spoil | None = None) -> onnx.ModelProto:
    """Token ids (2, 5) to logits; ``spoil`` changes the stream behind the first layer."""
    net = Net(f"dense{style}", 20 if style.spelled else 23, style.dtype)
    ids = net.input("ids", [BATCH, LENGTH], TensorProto.INT64)
    table = net.const(net.normal((VOCABULARY, style.width), 1.0), "table")
    x = net.op("Gather", table, ids, axis=0)
    for layer in range(style.layers):
        for block in (_attention, _mlp):
            if style.post:
                x = _norm(net, net.op("Add", x, block(net, style, x)), style, layer)
            else:
                x = net.op("Add", x, block(net, style, _norm(net, x, style, layer)))
        if spoil is not None and layer == 0:
            x = spoil(net, x)
    x = x if style.post else _norm(net, x, style, style.layers)
    head = net.op("Transpose", table, perm=[1, 0]) if style.tied else _weight(net, style.width, VOCABULARY)
    net.output(net.op("MatMul", x, head), [BATCH, LENGTH, VOCABULARY])
    return net.model()


def _weight(net: Net, rows: int, columns: int) -> str:
    return net.const(net.normal((rows, columns), rows**-0.5), "w")


def _linear(net: Net, style: Style, x: str, rows: int, columns: int) -> str:
    product = net.op("MatMul", x, _weight(net, rows, columns))
    return product if style.gated else net.op("Add", product, net.bias(columns))


def _norm(net: Net, x: str, style: Style, layer: int) -> str:
    gamma: NDArray[Any] = np.full(style.width, 1.0 if style.gamma == "ones" else 0.75 + layer / 8, net.dtype)
    if style.gamma == "random":
        gamma = net.rng.uniform(0.5, 1.5, style.width).astype(net.dtype)
    if not style.spelled:
        return net.op("RMSNormalization", x, net.const(gamma, "gamma"), axis=-1, epsilon=1e-5)
    square = net.op("Pow", x, net.const(2.0))
    mean = net.op("ReduceMean", square, net.const([-1]), keepdims=1)
    root = net.op("Sqrt", net.op("Add", mean, net.const(1e-5)))
    normed = net.op("Div", x, root)
    return normed if style.gamma == "none" else net.op("Mul", net.const(gamma, "gamma"), normed)


def _attention(net: Net, style: Style, x: str) -> str:
    size, heads, groups = style.width // style.heads, style.heads, style.groups

    def split(value: str, count: int) -> str:
        shape = net.const([BATCH, LENGTH, count, size], dtype=np.int64)
        return net.op("Transpose", net.op("Reshape", value, shape), perm=[0, 2, 1, 3])

    def repeated(value: str) -> str:
        if groups == heads:
            return value
        wide = net.op("Unsqueeze", value, net.const([2]))
        shape = [BATCH, groups, heads // groups, LENGTH, size]
        return net.op("Reshape", net.op("Expand", wide, net.const(shape)), net.const([BATCH, heads, LENGTH, size]))

    q = split(_linear(net, style, x, style.width, style.width), heads)
    k, v = (repeated(split(_linear(net, style, x, style.width, groups * size), groups)) for _ in range(2))
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    weights = net.op("Softmax", net.op("Mul", scores, net.const(size**-0.5)), axis=-1)
    merged = net.op("Transpose", net.op("MatMul", weights, v), perm=[0, 2, 1, 3])
    merged = net.op("Reshape", merged, net.const([BATCH, LENGTH, style.width]))
    return _linear(net, style, merged, style.width, style.width)


def _mlp(net: Net, style: Style, x: str) -> str:
    up = _linear(net, style, x, style.width, style.hidden)
    if style.gated:
        gate = net.op("MatMul", x, _weight(net, style.width, style.hidden))
        up = net.op("Mul", net.op("Mul", gate, net.op("Sigmoid", gate)), up)
    else:
        up = net.op("Mul", up, net.op("Sigmoid", up))
    return _linear(net, style, up, style.hidden, style.width)


def ids() -> dict[str, NDArray[Any]]:
    """Inputs of every such model."""
    return {"ids": np.random.default_rng(7).integers(0, VOCABULARY, (BATCH, LENGTH))}


def planted(model: onnx.ModelProto, width: int, channels: tuple[int, ...] = (3, 8), factor: float = 25.0) -> None:
    """Make a few units of the stream stand out in every matrix that touches it, as in large language models."""
    for tensor in model.graph.initializer:
        if tensor.name.startswith(("w_", "table_")):
            array = onnx.numpy_helper.to_array(tensor).copy()
            for axis in range(2):
                if array.shape[axis] == width:
                    np.moveaxis(array, axis, 0)[list(channels)] *= factor
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
