"""Label state of a value: which index positions of which axes carry which atoms.

An *atom* is an integer that names one index position of one axis of one parameter. A *factor* says that the
positions of some axes of a value move with some atoms. An axis without a factor is fixed, unless the value is known
to be constant along it (a *uniform* axis), in which case it behaves like a broadcast axis of size 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

ZERO = 0
"""The scale variable that is zero everywhere: values whose scale and sign are fixed."""


@dataclass(slots=True, eq=False)
class Factor:
    """Labels over some axes of a value. Never changed; not frozen, which would make it slow to create.

    ``axes`` ascend; ``labels`` has one dimension per axis, with the sizes of those axes. ``scale_var`` is the variable
    of the scale system: the log-scale (and the sign) of a position is a function of its atom, ``l_var(atom)``, and the
    log-scales of a value's factors add up. ``repeats`` says that an atom may occur more than once.
    """

    axes: tuple[int, ...]
    labels: Labels
    scale_var: int = ZERO
    repeats: bool = False

    def moved(self, axis_map: Sequence[int] | dict[int, int]) -> Factor:
        """Return the same factor where old axis ``a`` has become ``axis_map[a]``."""
        new = [axis_map[a] for a in self.axes]
        if len(new) == 1 or new == sorted(new):
            return replace(self, axes=tuple(new))
        order = sorted(range(len(new)), key=new.__getitem__)
        return replace(self, axes=tuple(new[k] for k in order), labels=self.labels.transpose(order))

    def on(self, axes: Sequence[int]) -> Labels:
        """Return labels with their dimensions in the order of ``axes`` (a permutation of ``self.axes``)."""
        if tuple(axes) == self.axes:
            return self.labels
        return self.labels.transpose([self.axes.index(a) for a in axes])

    def along(self, axis: int) -> Labels:
        """Return labels as a matrix: one row per index of ``axis``."""
        return np.moveaxis(self.labels, self.axes.index(axis), 0).reshape(self.labels.shape[self.axes.index(axis)], -1)


@dataclass(slots=True, eq=False)
class State:
    """Concrete shape of a value, its factors (over disjoint axes) and its uniform axes.

    That an axis is uniform says something of an operator, not of labels: it holds behind an operator only where that
    treats every index of the axis alike. No helper hands it on unasked; see `OpContext.like`.
    """

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    uniform: frozenset[int] = field(default_factory=frozenset)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def factor_of(self, axis: int) -> Factor | None:
        """Return the factor that covers ``axis``, if any."""
        for f in self.factors:
            if axis in f.axes:
                return f
        return None

    def broadcasts(self, axis: int) -> bool:
        """Return whether the value is the same all along ``axis``."""
        return self.shape[axis] == 1 or axis in self.uniform


def alike(states: Iterable[State], shape: Sequence[int]) -> frozenset[int]:
    """Return axes of a broadcast result of this shape along which no input (aligned from the right) changes."""
    rank = len(shape)
    shifted = [(s, s.rank - rank) for s in states]
    return frozenset(
        a for a in range(rank) if shape[a] > 1 and all(a + d < 0 or s.broadcasts(a + d) for s, d in shifted)
    )


def simplified(shape: Sequence[int], labels: Labels, axes: Sequence[int], var: int, repeats: bool) -> Factor | None:
    """Return a factor over those ``axes`` along which ``labels`` really change, or None where nothing is left."""
    keep = []
    for k, axis in enumerate(axes):
        if shape[axis] == 1 or (labels == labels.take([0], axis=k)).all():
            labels = labels.take([0], axis=k)
        else:
            keep.append(k)
    if not keep:
        return None
    kept_axes = tuple(axes[k] for k in keep)
    return Factor(kept_axes, labels.reshape([shape[a] for a in kept_axes]), var, repeats)


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[range, range]] | None:
    """Minimal runs of old and new axes with equal product; None where the shapes cannot be aligned."""
    if math.prod(old) != math.prod(new) or 0 in old:
        return None
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        p = old[i] if i < len(old) else 1
        q = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while p != q:
            if p < q:
                p, i = p * old[i], i + 1
            else:
                q, j = q * new[j], j + 1
        groups.append((range(i0, i), range(j0, j)))
    return groups


def occurrence_rank(labels: Labels) -> Labels:
    """For each position (row-major), how many earlier positions hold the same atom; shape of ``labels``, flat."""
    flat = labels.ravel()
    order = np.argsort(flat, kind="stable")
    ordered = flat[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    index = np.arange(len(flat))
    starts = np.maximum.accumulate(np.where(first, index, 0))
    rank = np.empty(len(flat), np.int64)
    rank[order] = index - starts
    return rank


def mix(values: Iterable[Any] | Any, salt: int = 0) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each entry (the finalizer of splitmix64), for signatures; deterministic across runs.

    Sums of hashes stand for multisets: hashes of different kinds of things need different salts, or x + y = y + x
    takes one for the other.
    """
    x = np.array(values).astype(np.uint64)
    with np.errstate(over="ignore"):
        x += np.uint64((0x9E3779B97F4A7C15 * (2 * salt + 1)) & 0xFFFFFFFFFFFFFFFF)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
        x ^= x >> np.uint64(31)
    return x
