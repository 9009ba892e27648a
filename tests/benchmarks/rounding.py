"""A model's own rounding, and how far another model lies from it.

The rounding is measured by onnxruntime's optimizations and by weights and inputs moved by up to one unit in the last
place, for each channel of each output on each input. Independent of the verification that it judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from tests.oracles.double_precision import Array, Double, Feeds, Outputs, Single, by_channel
from tests.oracles.mutations import is_float, weights

_HALF = {"float16": 2.0**-12, "bfloat16": 2.0**-9, "float64": 2.0**-54}

_OF_SIZES = {"Resize", "Upsample", "Range"}


def nudged(model: ir.Model, rng: np.random.Generator) -> ir.Model:
    """Return a copy with every float weight moved by up to one unit in the last place."""
    copy = model.clone()
    for one in weights(copy):
        half = _HALF.get(one.array.dtype.name, 2.0**-24)
        # Scalars are constants of formulas (2, 0.5): exact. A scale of Resize decides the size of its output.
        if one.array.size > 1 and not _decides_sizes(one.holder):
            one.put(one.array.astype(np.float64) * (1 + rng.uniform(-2 * half, 2 * half, one.array.shape)))
    return copy


def _decides_sizes(holder: ir.Value | ir.Node) -> bool:
    value = holder if isinstance(holder, ir.Value) else holder.outputs[0]
    return any(node.op_type in _OF_SIZES for node, _ in value.uses())


@dataclass(frozen=True)
class Reference:
    """Outputs of a model on several inputs, and the rounding of each channel there."""

    feeds: Sequence[tuple[str, Feeds]]
    outputs: Sequence[Outputs]
    rounding: Sequence[Outputs]

    @classmethod
    def of(cls, model: ir.Model, feeds: Sequence[tuple[str, Feeds]], draws: int = 3, seed: int = 0) -> Reference:
        """Run a model as it is, with optimizations, and `draws` times with moved weights and inputs."""
        rng = np.random.default_rng([seed, 5])
        plain = Single(model)
        outputs = [plain.run(given) for _, given in feeds]
        rounding: list[Outputs] = [
            {key: np.zeros_like(by_channel(value)) for key, value in one.items()} for one in outputs
        ]
        for k in range(draws + 1):
            try:
                runner = Single(model, optimized=True) if k == 0 else Single(nudged(model, rng))
            except Exception:
                continue  # some models run only without optimizations
            for place, (_, given) in enumerate(feeds):
                moved = given if k == 0 else {name: _moved(value, rng) for name, value in given.items()}
                widen(rounding[place], outputs[place], runner.run(moved))
        for one, found in zip(outputs, rounding, strict=True):
            for key, value in one.items():
                unit = 2 * _HALF.get(value.dtype.name, 2.0**-24) if is_float(value) else 0.0
                found[key] = found[key] + unit * by_channel(np.abs(_wide(value)))
        return cls(feeds, outputs, rounding)

    def distance(self, model: ir.Model, runner: Single | Double | None = None) -> tuple[float, float, str]:
        """Compare another model: (largest |difference|, largest multiple of a channel's rounding, on which input)."""
        runner = runner or Single(model)
        largest, worst, where = 0.0, 0.0, ""
        for (name, given), expected, rounding in zip(self.feeds, self.outputs, self.rounding, strict=True):
            actual = runner.run(given)
            for key, value in expected.items():
                if value.shape != actual[key].shape or not np.array_equal(np.isfinite(value), np.isfinite(actual[key])):
                    return np.inf, np.inf, f"{name}: shape, NaN or infinities of {key!r}"
                apart = by_channel(np.abs(_wide(actual[key]) - _wide(value)))
                largest = max(largest, float(np.max(apart, initial=0.0)))
                multiple = float(np.max(apart / (rounding[key] + 1e-300), initial=0.0))
                if multiple > worst:
                    worst, where = multiple, f"{name}, {key}"
        return largest, worst, where


def _moved(array: Array, rng: np.random.Generator) -> Array:
    if not is_float(array):
        return array
    half = _HALF.get(array.dtype.name, 2.0**-24)
    # A product of arrays without axes is a scalar of numpy, which onnxruntime does not take.
    return np.asarray(array.astype(np.float64) * (1 + rng.uniform(-2 * half, 2 * half, array.shape)), array.dtype)


def widen(rounding: Outputs, expected: Outputs, moved: Outputs) -> None:
    """Let the rounding of each channel cover another run."""
    for key, value in expected.items():
        if value.shape == moved[key].shape:
            rounding[key] = np.maximum(rounding[key], by_channel(np.abs(_wide(moved[key]) - _wide(value))))


def _wide(array: Array) -> Array:
    wide = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    return np.where(np.isfinite(wide), wide, 0.0)
