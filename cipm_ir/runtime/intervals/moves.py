"""Bounds through operators that move, repeat or select positions."""

from __future__ import annotations

import numpy as np

from cipm_ir.ir.constants import slice_positions
from cipm_ir.runtime.intervals.arithmetic import Interval
from cipm_ir.runtime.intervals.site import Site, bounds, filled, refit


@bounds("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(site: Site) -> Interval:
    """Any change of shape that keeps the row-major order."""
    return refit(site.of(0), site.shape(0), site.out())


@bounds("Expand", "Tile")
def expand(site: Site) -> Interval:
    """Copies along axes; bounds of size 1 hold for all of them."""
    x, out = site.of(0), site.out()
    x = x.map(lambda e: e.reshape((1,) * (len(out) - e.ndim) + e.shape))
    if site.node.op_type == "Expand":
        return x
    times = [out[a] // site.shape(0)[a] if x.shape[a] != 1 else 1 for a in range(len(out))]
    return x.map(lambda e: np.tile(e, times))


@bounds("Transpose")
def transpose(site: Site) -> Interval:
    """Axes change places."""
    perm = site.attr("perm") or tuple(range(site.rank(0)))[::-1]
    return site.of(0).map(lambda e: e.transpose(perm))


@bounds("DepthToSpace", "SpaceToDepth")
def depth_space(site: Site) -> Interval:
    """A reshape, a transpose and a reshape (ONNX DepthToSpace, modes DCR and CRD)."""
    x, out, b = site.of(0).merged((2, 3)), site.out(), int(site.attr("blocksize"))
    n, c, h, w = site.shape(0)
    if site.node.op_type == "SpaceToDepth":
        steps = ((n, c, h // b, b, w // b, b), (0, 3, 5, 1, 2, 4))
    elif site.attr("mode", "DCR") == "CRD":
        steps = ((n, c // (b * b), b, b, h, w), (0, 1, 4, 2, 5, 3))
    else:
        steps = ((n, b, b, c // (b * b), h, w), (0, 3, 4, 1, 5, 2))
    middle = refit(x, site.shape(0), steps[0]).map(lambda e: e.transpose(steps[1]))
    if site.node.op_type == "SpaceToDepth":
        return refit(middle, [steps[0][a] for a in steps[1]], out)
    return refit(middle.merged((2, 3, 4, 5)), [steps[0][a] for a in steps[1]], out)


@bounds("Resize", "Upsample")
def resize(site: Site) -> Interval | None:
    """Nearest and linear interpolation stay within the bounds; cubic overshoots."""
    if site.attr("mode", "nearest") == "cubic" or site.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        return None
    x = site.of(0)
    moved = [a for a in range(x.rank) if site.shape(0)[a] != site.out()[a]]
    return x.merged(moved).rounded(site.p, 8.0)


# ---------------------------------------------------------------- selections
def _taken(x: Interval, axis: int, index: np.ndarray) -> Interval:
    return x if x.shape[axis] == 1 else x.map(lambda e: e.take(index, axis=axis))


@bounds("Slice")
def slice_(site: Site) -> Interval:
    """Constant bounds select; others leave one bound along the axes that they may touch."""
    x, rank = site.of(0), site.rank(0)
    if site.version < 10:
        given = [site.attr(name) for name in ("starts", "ends", "axes")] + [None]
    else:
        given = [None if v is None else v.ravel().tolist() for v in (site.const(k) for k in range(1, 5))]
    computed = site.version >= 10 and any(site.has(k) and site.const(k) is None for k in range(1, 5))
    starts, ends, axes, steps = given
    if computed or starts is None or ends is None:
        return x.merged(range(rank))
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        a = int(axis) % rank
        x = _taken(x, a, slice_positions(site.shape(0)[a], int(start), int(end), int(step)))
    return x


@bounds("Split")
def split(site: Site) -> list[Interval | None]:
    """Consecutive runs."""
    x, axis, at = site.of(0), site.axis("axis", 0, site.rank(0)), 0
    made: list[Interval | None] = []
    for k in range(len(site.node.outputs)):
        size = site.out(k)[axis]
        made.append(_taken(x, axis, np.arange(at, at + size)))
        at += size
    return made


@bounds("Concat")
def concat(site: Site) -> Interval:
    """One after the other; one bound for all where no part has more along the axis."""
    axis = site.axis("axis", 0, site.rank(0))
    parts = [site.of(k) for k in range(len(site.inputs))]
    if all(x.shape[axis] == 1 for x in parts) and any(site.size(k, axis) is None for k in range(len(parts))):
        return parts[0].hull(*parts[1:])
    parts = [filled(x, axis, site.shape(k)[axis]) for k, x in enumerate(parts) if site.shape(k)[axis]]
    sizes = np.max([x.shape for x in parts], axis=0)

    def shaped(x: Interval) -> Interval:
        shape = [x.shape[a] if a == axis else int(n) for a, n in enumerate(sizes)]
        return x.map(lambda e: np.broadcast_to(e, shape))

    every = [shaped(x) for x in parts]
    return Interval(*(np.concatenate([getattr(x, end) for x in every], axis=axis) for end in ("lo", "hi")))


@bounds("Gather")
def gather(site: Site) -> Interval:
    """A constant index selects; one from outside may take any row."""
    axis, index, extra = site.axis("axis", 0, site.rank(0)), site.const(1), site.rank(1)
    raw = site.raw(0)
    if index is None and raw is not None and raw.dtype.kind == "f" and raw.shape[axis] > 1:
        x = Interval.of(raw.min(axis=axis, keepdims=True), raw.max(axis=axis, keepdims=True))
    else:
        x = site.of(0)
    if index is None:
        x = x.merged((axis,))
    if x.shape[axis] == 1:
        return x.map(lambda e: e.reshape(e.shape[:axis] + (1,) * extra + e.shape[axis + 1 :]))
    where = np.asarray(index, np.int64) % site.shape(0)[axis]
    return x.map(lambda e: e.take(where, axis=axis))


@bounds("GatherElements", "GatherND")
def gather_any(site: Site) -> Interval:
    """Any entry."""
    rank = len(site.out())
    x = site.of(0)
    return Interval(np.full((1,) * rank, x.lo.min()), np.full((1,) * rank, x.hi.max()))


@bounds("ScatterND", "ScatterElements", "Scatter")
def scatter(site: Site) -> Interval | None:
    """Any entry of the data or of what is written."""
    if site.attr("reduction", "none") != "none":
        return None
    rank, x, y = len(site.out()), site.of(0), site.of(2)
    low, high = min(x.lo.min(), y.lo.min()), max(x.hi.max(), y.hi.max())
    return Interval(np.full((1,) * rank, low), np.full((1,) * rank, high))


@bounds("Pad")
def pad(site: Site) -> Interval | None:
    """Constant padding brings its value in; the other modes repeat positions."""
    x, rank = site.of(0), site.rank(0)
    flat = site.attr("pads") if site.version < 11 else site.const(1)
    axes = site.const(3) if site.has(3) else np.arange(rank)
    if flat is None or axes is None:
        axes, flat = np.arange(rank), [1] * (2 * rank)
        x = x.merged(range(rank))
    amount = [int(n) for n in np.asarray(flat).ravel()]
    places = [int(a) % rank for a in np.asarray(axes).ravel()]
    pads = dict(zip(places, zip(amount[: len(places)], amount[len(places) :], strict=True), strict=True))
    hit = [a for a in places if pads[a] != (0, 0)]
    if site.attr("mode", "constant") != "constant":
        return x.merged(hit)
    value = Interval.point(float(site.attr("value", 0.0)) if site.version < 11 else 0.0)
    if site.version >= 11 and site.has(2):
        value = site.of(2).map(lambda e: e.reshape(()))
    single = [a for a in hit if x.shape[a] == 1]
    if single:
        x = x.hull(value)
    width = [(0, 0) if a not in hit or a in single else pads[a] for a in range(rank)]
    if any(min(w) < 0 for w in width):
        return x.merged(range(rank)).hull(value)
    if not any(sum(w) for w in width):
        return x
    ends = [(x.lo, float(value.lo)), (x.hi, float(value.hi))]
    return Interval(*(np.pad(e, width, constant_values=v) for e, v in ends))
