"""Models as onnxruntime's static quantization writes them (QDQ), and variants of what it writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from tests.zoo.net import Net

Array = NDArray[Any]
Feeds = Mapping[str, Array]
PAIR = ("QuantizeLinear", "DequantizeLinear")


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands out given feeds one after another."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self.feeds: Iterator[Feeds] = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next feeds, or None."""
        return next(self.feeds, None)


def static(
    model: onnx.ModelProto,
    feeds: Sequence[Feeds],
    *,
    per_channel: bool = False,
    exclude: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
    **options: Any,
) -> onnx.ModelProto:
    """Static quantization to signed bytes, QDQ; ``extra`` and ``options`` are onnxruntime's."""
    given = onnx.ModelProto()
    given.CopyFrom(model)  # onnxruntime moves the weights of the proto that it gets to a file of its own
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            given,
            path,
            Reader(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(exclude) or None,
            extra_options=dict(extra or {}),
            **options,
        )
        return onnx.load(path)


def weights_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the pairs on computed values: only parameters stay quantized."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    known = {t.name for t in made.graph.initializer}
    maker = {n.output[0]: n for n in made.graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in known}
    source = {
        n.output[0]: maker[n.input[0]].input[0]
        for n in made.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in maker
    }
    kept = [n for n in made.graph.node if n.output[0] not in maker and n.output[0] not in source]
    for node in kept:
        for k in range(len(node.input)):
            node.input[k] = _through(node.input[k], source)
    outputs = {value.name for value in made.graph.output}
    kept += [onnx.helper.make_node("Identity", [_through(n, source)], [n]) for n in sorted(outputs & set(source))]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    return made


def _through(name: str, source: Mapping[str, str]) -> str:
    while name in source:
        name = source[name]
    return name


def whole_numbers(model: onnx.ModelProto) -> onnx.ModelProto:
    """With every scale rounded to a power of two: sums are exact in float32 then, in any order."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    scales = {n.input[1] for n in made.graph.node if n.op_type in PAIR}
    for tensor in made.graph.initializer:
        if tensor.name in scales:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(np.exp2(np.round(np.log2(array))).astype(array.dtype), tensor.name))
    return made


# ---------------------------------------------------------------- float models
def convolutions() -> onnx.ModelProto:
    """Conv 3-6, Relu, Conv 6-8, Relu, pool, Gemm."""
    net = Net("quantized_convolutions")
    h = net.relu(net.conv(net.image(), 3, 6))
    net.classify(net.relu(net.conv(h, 6, 8)), 8)
    return net.model()


def separable() -> onnx.ModelProto:
    """Conv 3-6, Relu, depthwise 6, Relu, Conv 6-8, Relu, pool, Gemm."""
    net = Net("quantized_separable")
    h = net.relu(net.conv(net.image(), 3, 6))
    h = net.relu(net.conv(h, 6, 6, group=6))
    net.classify(net.relu(net.conv(h, 6, 8, k=1)), 8)
    return net.model()


def perceptron() -> onnx.ModelProto:
    """Gemm 5-12, Relu, MatMul and Add 12-10, Relu, Gemm."""
    net = Net("quantized_perceptron")
    h = net.relu(net.gemm(net.input("x", ["N", 5]), 5, 12))
    h = net.relu(net.linear(h, 12, 10))
    net.output(net.gemm(h, 10, 3), ["N", 3])
    return net.model()


def feeds(model: onnx.ModelProto, count: int = 4, batch: int = 8) -> list[dict[str, Array]]:
    """Normal inputs for the only input of a model."""
    (value,) = model.graph.input
    shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
    rng = np.random.default_rng(0)
    return [{value.name: rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]
