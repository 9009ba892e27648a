"""Scales that a weight cannot take without rounding or overflow are given up, class by class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cipm_ir.ir.constants import is_float
from cipm_ir.ir.labels import Array
from cipm_ir.passes.exact.canonicalize.members import Floats, Member, Members

_ROUNDS = 8


def magnitude(members: Members, m: Member, scale: Floats) -> Floats:
    """Return what each position of a member is multiplied by, for log2-scales by class and direction."""
    power = (m.scale * scale[m.classes[:, None], m.scale_at]).sum(1)
    return np.asarray(np.ldexp(1.0, power.astype(np.int64)) if members.exact else np.exp2(power))


def give_up_rounding(members: Members, scale: Floats) -> int:
    """Set to 0, in place, the log2-scales of classes whose weights would round; gives how many classes that were.

    With ``members.exact`` no bit may be lost, to subnormal numbers neither; without, no finite entry may overflow.
    """
    lost = np.zeros(members.count, bool)
    for attempt in range(_ROUNDS):
        bad = np.zeros(members.count, bool)
        for leaf, found in members.on_leaf.items():
            if _may_round(members, leaf, found, scale):
                _mark(members, leaf, found, scale, bad)
        if not bad.any():
            break
        lost |= bad
        scale[bad] = 0.0
        if attempt == _ROUNDS - 2:
            lost[:] = True
            scale[:] = 0.0
    return int(lost.sum())


def _may_round(members: Members, leaf: int, found: list[Member], scale: Floats) -> bool:
    """Return whether some entry could leave the normal range of its type, by the exponents that the parameter holds."""
    moved = [np.abs((m.scale * scale[m.classes[:, None], m.scale_at]).sum(1)).max() for m in found]
    if not max(moved):
        return False
    array = members.array(leaf)
    if not is_float(array):
        return True  # eight bits or fewer: look at every entry
    limits = np.finfo(array.dtype if array.dtype.kind == "f" else np.float32)
    low, high = np.inf, 0.0
    for _, block in members.blocks(leaf, (), None):
        size = np.abs(block)
        least, most = float(size.min(initial=np.inf)), float(size.max(initial=0.0))
        if not (least > 0 and most < np.inf):
            used = size[(size > 0) & np.isfinite(size)]
            least, most = float(used.min(initial=np.inf)), float(used.max(initial=0.0))
        low, high = min(low, least), max(high, most)
    far = int(sum(moved))
    return bool(high and (np.frexp(low)[1] - far <= limits.minexp or np.frexp(high)[1] + far > limits.maxexp))


def _mark(members: Members, leaf: int, found: list[Member], scale: Floats, bad: Array) -> None:
    """Mark the classes whose scale a parameter cannot take."""
    dtype = members.array(leaf).dtype
    vectors = [magnitude(members, m, scale) for m in found]
    weights = [m.spread(vector) for m, vector in zip(found, vectors, strict=True)]

    def wrong() -> Iterator[tuple[slice, Array]]:
        for part, block in members.blocks(leaf, weights, found[0].epsilon):
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                back = block.astype(dtype).astype(np.float64)
            yield part, (back != block if members.exact else np.isinf(back)) & np.isfinite(block)

    for m, vector in zip(found, vectors, strict=True):
        hit = members.reduce(m, wrong(), np.logical_or).astype(bool) & (vector != 1.0)
        bad[m.classes[hit]] = True
