"""Ways to quantize a float ONNX model, and what is lost: round-to-nearest weights, and onnxruntime's static QDQ."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper
from tests.models import quantized_models

Array = NDArray[Any]
Feeds = Mapping[str, Array]


# ---------------------------------------------------------------- weights alone
def weight_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The weights of Conv, Gemm and MatMul, with the axis of their outputs."""
    known = {t.name for t in model.graph.initializer if len(t.dims) > 1}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and len(node.input) > 1 and node.input[1] in known:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            found[node.input[1]] = 0 if node.op_type == "Conv" or transposed else 1
    return found


def rounded(weight: Array, bits: int, axis: int | None, stretch: float = 1.0) -> Array:
    """Symmetric round to nearest, per tensor or per index of an axis, with steps a little longer if asked; float64."""
    wide = weight.astype(np.float64)
    others = None if axis is None else tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(wide).max(axis=others, keepdims=True)
    step = stretch * np.where(largest > 0, largest, 1.0) / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(wide / step) * step)


def sqnr(weight: Array, quantized: Array) -> float:
    """Signal to quantization noise, dB."""
    noise = np.square(weight - quantized).sum()
    return float(10 * np.log10(np.square(weight.astype(np.float64)).sum() / max(noise, 1e-300)))


def weights_rounded(
    model: onnx.ModelProto, bits: int, *, per_channel: bool, stretch: float = 1.0
) -> tuple[onnx.ModelProto, float]:
    """The model with rounded weights, kept as floats, and the mean SQNR of its weights in dB."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    axes, ratios = weight_axes(model), []
    for tensor in made.graph.initializer:
        if tensor.name in axes:
            weight = numpy_helper.to_array(tensor)
            new = rounded(weight, bits, axes[tensor.name] if per_channel else None, stretch)
            if weight.any():
                ratios.append(sqnr(weight, new))
            tensor.CopyFrom(numpy_helper.from_array(new.astype(weight.dtype), tensor.name))
    return made, float(np.mean(ratios))


# ---------------------------------------------------------------- onnxruntime
@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the quantizer's hints on the root logger."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def static(model: onnx.ModelProto, feeds: Sequence[Feeds], *, per_channel: bool, **options: Any) -> onnx.ModelProto:
    """onnxruntime's static quantization, QDQ, signed bytes for weights and activations."""
    with quiet():
        return quantized_models.static(model, [dict(one) for one in feeds], per_channel=per_channel, **options)


# ---------------------------------------------------------------- what is lost
def outputs(model: onnx.ModelProto, name: str, inputs: Array, batch: int = 200, *, fast: bool = False) -> Array:
    """First output of a model with one input, as the graph says: nothing is fused, unless it may be."""
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fast else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {name: inputs[k : k + batch]})[0] for k in range(0, len(inputs), batch)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


@dataclass(frozen=True)
class Loss:
    """Against the float model: squared error relative to its outputs; share of equal and of right predictions."""

    error: float
    agreement: float
    accuracy: float

    @classmethod
    def of(cls, wanted: Array, found: Array, labels: Array) -> Loss:
        """From logits and labels."""
        error = float(np.square(wanted - found).sum() / np.square(wanted).sum())
        same = float((wanted.argmax(1) == found.argmax(1)).mean())
        return cls(error, same, float((found.argmax(1) == labels).mean()))

    @classmethod
    def mean(cls, losses: Sequence[Loss]) -> Loss:
        """Of several runs; the geometric mean of the errors."""
        error = float(np.exp(np.mean([np.log(max(one.error, 1e-300)) for one in losses])))
        same, right = ([getattr(one, name) for one in losses] for name in ("agreement", "accuracy"))
        return cls(error, float(np.mean(same)), float(np.mean(right)))

    def __str__(self) -> str:
        return f"{self.error:.2g}, {self.accuracy:.1%}"
