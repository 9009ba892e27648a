"""Resize and Upsample, as far as `F.interpolate` or a selection of positions is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import fx

from cipm_ir.backends.torch.emitter import Emitter, Int, emits, refuse
from cipm_ir.backends.torch.ops.elementwise import arg, first
from cipm_ir.ir.constants import attribute

__all__: list[str] = []

_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@dataclass(frozen=True)
class _Change:
    """What changes: per axis the input size, the output size and the scale, None where unknown."""

    before: Sequence[int | None]
    after: Sequence[Int | None]
    scales: Sequence[float | None]

    @property
    def axes(self) -> list[int]:
        """The axes that are resized."""
        return [k for k, s in enumerate(self.scales) if s != 1.0]

    @property
    def whole(self) -> bool:
        """Whether each scale leads to a whole number of positions, as far as known."""
        pairs = zip(self.before, self.scales, strict=True)
        return all(n is None or s is None or abs(n * s - round(n * s)) < 1e-4 for n, s in pairs)


def _change(e: Emitter, node: ir.Node) -> _Change:
    before = e.shape(node.inputs[0])
    rank = e.rank(node, node.inputs[0])
    before = before or (None,) * rank
    chosen = [a % rank for a in attribute(node, "axes", range(rank))]
    upsample = node.op_type == "Upsample"
    scale_input = 1 if upsample or e.version < 11 else 2
    listed = attribute(node, "scales")
    found = np.asarray(listed) if listed is not None else e.constant(arg(node, scale_input))
    scales: list[float | None] = [1.0] * rank
    after: list[Int | None] = list(before)
    if found is not None and found.size:
        for axis, scale in zip(chosen, found.tolist(), strict=True):
            scales[axis], size = scale, before[axis]
            after[axis] = None if size is None else math.floor(size * scale)
        return _Change(before, after, scales)
    sizes = e.ints(arg(node, 3)) if not upsample and arg(node, 3) is not None else None
    if sizes is None:
        raise refuse(node, "its scales or sizes are computed from data; make them constants")
    for axis, target in zip(chosen, sizes, strict=True):
        known, size = not isinstance(target, fx.Node), before[axis]
        after[axis] = target
        scales[axis] = int(target) / size if known and size else None  # type: ignore[arg-type]
        if isinstance(target, fx.Node) and size is None and axis < 2:
            scales[axis], after[axis] = 1.0, None  # batch and channels, read from the input's own shape
    return _Change(before, after, scales)


@emits("Resize", "Upsample")
def _resize(e: Emitter, node: ir.Node) -> fx.Node:
    change, mode = _change(e, node), attribute(node, "mode", "nearest")
    old = node.op_type == "Upsample" or e.version < 11
    where = "asymmetric" if old else attribute(node, "coordinate_transformation_mode", "half_pixel")
    if attribute(node, "antialias", 0) or attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise refuse(node, "antialiasing and aspect-ratio policies are not written; resize by plain sizes")
    if not change.axes:
        return first(e, node)
    if where == "align_corners" and not change.whole:
        raise refuse(node, "align_corners with sizes that the scales do not meet is not written; give sizes")
    if mode == "nearest":
        rounding = "floor" if old else attribute(node, "nearest_mode", "round_prefer_floor")
        return _nearest(e, node, change, where, rounding)
    rank = len(change.before)
    kind = _LINEAR.get(rank) if mode == "linear" else "bicubic" if rank == 4 else None
    if kind is None or min(change.axes) < 2:
        raise refuse(node, f"torch interpolates ({mode}) the last axes of an image only; transpose the input before")
    if mode == "cubic" and (attribute(node, "cubic_coeff_a", -0.75) != -0.75 or attribute(node, "exclude_outside", 0)):
        raise refuse(node, "torch interpolates with the coefficient -0.75 and with border weights only")
    return _interpolate(e, node, change, where, kind)


def _interpolate(e: Emitter, node: ir.Node, change: _Change, where: str, kind: str) -> fx.Node:
    sizes = change.after[2:]
    if where == "pytorch_half_pixel" and all(isinstance(n, int) and n > 1 for n in sizes):
        where = "half_pixel"
    if where not in ("half_pixel", "align_corners"):
        raise refuse(node, f"torch has no interpolation with {where} coordinates; use half_pixel or align_corners")
    corners = where == "align_corners"
    x = first(e, node)
    if arg(node, 3) is not None or corners:
        if any(n is None for n in sizes):
            raise refuse(node, "the sizes of its result are unknown; give sizes, or a static input")
        return e.call(F.interpolate, x, size=list(sizes), mode=kind, align_corners=corners)
    scales = [float(s) for s in change.scales[2:] if s is not None]
    return e.call(F.interpolate, x, scale_factor=scales, mode=kind, align_corners=False)


def _nearest(e: Emitter, node: ir.Node, change: _Change, where: str, rounding: str) -> fx.Node:
    """Positions are selected axis by axis; a dynamic axis by a whole factor is repeated."""
    x = first(e, node)
    for axis in change.axes:
        size, target, scale = change.before[axis], change.after[axis], change.scales[axis]
        if size is not None and isinstance(target, int) and scale is not None:
            positions = _positions(node, size, target, scale, where, rounding)
            x = e.call(torch.index_select, x, axis, e.buffer(positions, "positions"))
        elif scale is not None and scale == int(scale) and scale > 0 and _repeats(int(scale), where, rounding):
            x = e.call(torch.repeat_interleave, x, int(scale), dim=axis)
        else:
            raise refuse(node, f"axis {axis} is dynamic and not repeated a whole number of times; fix the input shape")
    return x


def _repeats(factor: int, where: str, rounding: str) -> bool:
    """Whether output position i comes from i // factor: so it is, if the first `factor` positions come from 0."""
    if where not in ("half_pixel", "asymmetric", "half_pixel_symmetric", "pytorch_half_pixel"):
        return False
    source = _source(np.arange(2 * factor), 2, 2 * factor, float(factor), where)
    return bool(np.array_equal(_rounded(source, rounding), np.arange(2 * factor) // factor))


def _positions(node: ir.Node, size: int, target: int, scale: float, where: str, rounding: str) -> np.ndarray:
    if where not in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"):
        raise refuse(node, f"{where} is not written; crop with Slice and resize then")
    source = _source(np.arange(target), size, target, scale, where)
    return np.asarray(np.clip(_rounded(source, rounding), 0, size - 1), np.int64)


def _source(x: np.ndarray, size: int, target: int, factor: float, where: str) -> np.ndarray:
    """Where output positions lie in the input (coordinate_transformation_mode), in float32 as kernels do."""
    x, scale = x.astype(np.float32), np.float32(factor)
    if where == "asymmetric":
        return np.asarray(x / scale)
    if where == "align_corners":
        return np.asarray(x * (size - 1) / max(target - 1, 1), np.float32)
    if where == "pytorch_half_pixel" and target <= 1:
        return np.zeros(len(x))
    centred: np.ndarray = np.asarray((x + 0.5) / scale - 0.5)
    if where == "half_pixel_symmetric":
        adjustment = target / (scale * size)
        return np.asarray(centred + size / 2 * (1 - adjustment))
    return centred


def _rounded(x: np.ndarray, rounding: str) -> np.ndarray:
    x = np.clip(x, 0, None)
    shift = {"floor": 0.0, "ceil": 0.0, "round_prefer_floor": -0.5, "round_prefer_ceil": 0.5}[rounding]
    up = rounding in ("ceil", "round_prefer_floor")
    return np.asarray(np.ceil(x + shift) if up else np.floor(x + shift))
