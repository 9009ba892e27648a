"""How far the outputs of a changed model are from the original's: what allocation minimizes and `max_drop` bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from scipy.special import log_softmax

from cipm_ir.errors import InputError
from cipm_ir.ir.constants import attribute, is_float

Array = npt.NDArray[Any]
Measure = Literal["kl", "probabilities", "error"]
_PASS = ("Add", "Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "BatchNormalization")
_LEAST = 1e-12
_LARGE = 200.0
"""Outputs beyond this are not taken for logits."""


@dataclass(frozen=True)
class Divergence:
    """Per output, what compares it: ``kl`` the Kullback-Leibler divergence of the softmax over the last axis, in nats
    per distribution; ``probabilities`` the same where the model has taken the softmax itself; ``error`` the mean
    squared difference over the mean square. Outputs are averaged.
    """

    measures: Mapping[str, Measure]

    @classmethod
    def of(cls, model: ir.Model, outputs: Mapping[str, Array], asked: str = "auto") -> Divergence:
        """Return what suits the outputs of a model, seen on one batch: logits, or anything else.

        Raises:
            InputError: the model gives out no floating-point value.
        """
        found: dict[str, Measure] = {}
        for value in model.graph.outputs:
            array = outputs[value.name or ""]
            if not is_float(array):
                continue
            version = model.opset_imports.get("", 1)
            last = softmax_over_last(value.producer(), array.ndim, version)
            logits = asked == "kl" or (asked == "auto" and (bool(last) or _is_logits(value, array)))
            kind: Measure = "probabilities" if last == "Softmax" else "kl"
            found[value.name or ""] = kind if logits and array.ndim and array.shape[-1] > 1 else "error"
        if not found:
            raise InputError("The model gives out no floating-point value, so a change of it cannot be measured.")
        return cls(found)

    @property
    def logits(self) -> frozenset[str]:
        """Outputs that are logits of classes, or a softmax of such."""
        return frozenset(name for name, measure in self.measures.items() if measure != "error")

    def batch(self, a: Mapping[str, Array], b: Mapping[str, Array]) -> Array:
        """Return sums for one batch, (outputs, 2): numerator and denominator, to be added over batches."""
        rows = []
        for name, measure in self.measures.items():
            x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
            if measure != "error":
                p, q = (_logarithm(z) if measure == "probabilities" else log_softmax(z, axis=-1) for z in (x, y))
                rows.append([float((np.exp(p) * (p - q)).sum()), x.size / x.shape[-1]])
            else:
                rows.append([float(np.square(x - y).sum()), float(np.square(x).sum())])
        return np.asarray(rows)

    def each(self, a: Mapping[str, Array], b: Mapping[str, Array], count: int) -> list[Array]:
        """Return the sums of `batch` for each of ``count`` samples; of the whole batch where outputs hold none."""
        if any(np.ndim(a[name]) == 0 or len(a[name]) != count for name in self.measures):
            return [self.batch(a, b)]
        parts = [[{name: x[name][k : k + 1] for name in self.measures} for x in (a, b)] for k in range(count)]
        return [self.batch(one, two) for one, two in parts]

    def total(self, sums: Sequence[Array]) -> float:
        """Return the divergence, from the sums of all batches; infinite where a value is NaN."""
        whole = np.sum(sums, axis=0)
        ratio = whole[:, 0] / np.maximum(whole[:, 1], 1e-30)
        return max(float(ratio.mean()), 0.0) if np.isfinite(ratio).all() else float("inf")

    def __str__(self) -> str:
        kl = "KL divergence in nats"
        words = {"kl": kl, "probabilities": kl, "error": "relative squared error"}
        return " and ".join(sorted({words[m] for m in self.measures.values()}))


def softmax_over_last(node: ir.Node | None, rank: int, version: int) -> str:
    """``Softmax`` or ``LogSoftmax`` where a node is one over the last axis of a value; else empty."""
    if node is None or node.domain or node.op_type not in ("Softmax", "LogSoftmax"):
        return ""
    axis = attribute(node, "axis", -1 if version >= 13 else 1)
    return node.op_type if axis in (-1, rank - 1) else ""


def _logarithm(probabilities: Array) -> Array:
    """Of rows that sum to one, zeros as the smallest number that they could have been."""
    return np.asarray(np.log(np.maximum(probabilities, _LEAST)))


def _is_logits(value: ir.Value, array: Array) -> bool:
    """Return a product with a weight, of moderate size: what a classifier ends with."""
    if array.ndim < 2 or array.shape[-1] < 2 or np.abs(array).max(initial=0.0) > _LARGE:
        return False
    node = value.producer()
    while node is not None and node.op_type in _PASS:
        moving = [v for v in node.inputs if v is not None and v.producer() is not None]
        node = moving[0].producer() if moving else None
    if node is not None and node.op_type in ("Conv", "GlobalAveragePool"):
        return array.ndim == 2  # with places, the classes are not on the last axis
    return node is not None and node.op_type in ("Gemm", "MatMul", "ReduceMean")
