"""Operators for ONNX's reference evaluator, where its own are wrong, missing, slow, or round to single precision."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_average_pool import AveragePool_19 as _AveragePool
from onnx.reference.ops.op_conv_transpose import ConvTranspose as _ConvTranspose
from scipy.special import erf
from tests.zoo.feeds import RampUp

Array: TypeAlias = npt.NDArray[Any]
_PADDED = ("SAME_UPPER", "SAME_LOWER")


class Erf(OpRun):
    """On whole arrays; the evaluator's own calls `math.erf` for each entry."""

    def _run(self, x: Array) -> tuple[Array]:
        return (np.asarray(erf(x)).astype(x.dtype),)


class GatherElements(OpRun):
    """The evaluator's own fails for an index that is longer than one along a first axis of data of size one."""

    def _run(self, data: Array, indices: Array, axis: int = 0) -> tuple[Array]:
        axis %= data.ndim
        fit = tuple(slice(None) if a == axis else slice(size) for a, size in enumerate(indices.shape))
        return (np.take_along_axis(data[fit], np.where(indices < 0, indices + data.shape[axis], indices), axis),)


class AveragePool(OpRun):
    """All windows at once where none goes over an edge; the evaluator's own loops over the entries."""

    def _run(self, x: Array, **attributes: Any) -> tuple[Array]:
        kernel, rank = attributes["kernel_shape"], x.ndim - 2
        strides, dilations = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
        reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
        padded = any(attributes.get("pads") or []) or (attributes.get("auto_pad") or "NOTSET") in _PADDED
        left = any((size - r) % s for size, r, s in zip(x.shape[2:], reach, strides, strict=True))
        if padded or (left and attributes.get("ceil_mode")):
            one: Any = _AveragePool(self.onnx_node, self.run_params)
            return (one._run(x, **attributes)[0],)
        windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(2, x.ndim)))
        steps: Any = (..., *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
        return (windows[steps].mean(axis=tuple(range(-rank, 0))).astype(x.dtype),)


class LRN(OpRun):
    """The evaluator's own loops over the batch where it means the channels."""

    def _run(self, x: Array, alpha: float, beta: float, bias: float, size: int) -> tuple[Array]:
        before, channels = (size - 1) // 2, x.shape[1]
        total = np.zeros_like(x)
        for c in range(channels):
            window = slice(max(0, c - before), min(channels, c - before + size))
            total[:, c] = np.sum(x[:, window] ** 2, axis=1)
        return ((x / (bias + alpha / size * total) ** beta).astype(x.dtype),)


class ConvTranspose(OpRun):
    """One group after the other; the evaluator's own fails for several."""

    def _run(self, x: Array, w: Array, b: Array | None = None, group: int = 1, **attributes: Any) -> tuple[Array]:
        one: Any = _ConvTranspose(self.onnx_node, self.run_params)
        parts = []
        for part, kernel in zip(np.split(x, group or 1, axis=1), np.split(w, group or 1, axis=0), strict=True):
            parts.append(one._run(part, kernel, None, group=1, **attributes)[0])
        y = np.concatenate(parts, axis=1)
        return (y if b is None else y + b.reshape(-1, *[1] * (y.ndim - 2)),)


class BatchNormalization(OpRun):
    """As it runs when nothing is trained; the evaluator's own takes the statistics of the batch in opsets 9 to 13."""

    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        var: Array,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
        spatial: int = 1,
    ) -> tuple[Array]:
        if training_mode or not spatial:
            raise NotImplementedError("BatchNormalization with training_mode=1 or spatial=0")
        fit = (-1, *[1] * (x.ndim - 2))
        slope = scale / np.sqrt(var + epsilon)
        return ((x * slope.reshape(fit) + (bias - mean * slope).reshape(fit)).astype(x.dtype),)


class BiasGelu(OpRun):
    """onnxruntime's contributed operator."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array) -> tuple[Array]:
        y = x + bias
        return ((y * 0.5 * (1 + erf(y / np.sqrt(2.0)))).astype(x.dtype),)


OPERATORS: tuple[type[OpRun], ...] = (
    RampUp,
    BiasGelu,
    Erf,
    GatherElements,
    AveragePool,
    LRN,
    ConvTranspose,
    BatchNormalization,
)
