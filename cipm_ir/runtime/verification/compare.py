"""Outputs of two programs on the same inputs, compared channel by channel with what rounding allows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import CipmError
from cipm_ir.runtime.inputs.generate import Feeds
from cipm_ir.runtime.verification.noise import MULTIPLE, Yardstick, by_channel, difference, is_float, settle, widened

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = dict[str, Array]


_NAMED = 3


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison; true in a condition when the models agree.

    Attributes:
        ok: the outputs agree; None when they could not be compared.
        max_abs: the largest |a - b| over all outputs and cases.
        max_rel: the largest of max|a - b| / max|a|, per output and case.
        cases: how many inputs were compared.
        reason: why not ok, or why not verified; empty otherwise.
        backend: what ran the models.
        outputs: (max_abs, max_rel) by output name.
        share: the largest |a - b| as a share of what is allowed there; at most 1 where the models agree.
        seconds: what the comparison took.
        unrun: bodies of If, Loop and Scan that no input entered, and that could not be compared by force either.
    """

    ok: bool | None
    max_abs: float = 0.0
    max_rel: float = 0.0
    cases: int = 0
    reason: str = ""
    backend: str = ""
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    share: float = 0.0
    seconds: float = 0.0
    unrun: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """The models were compared, whatever came out."""
        return self.ok is not None

    def __bool__(self) -> bool:
        return self.ok is True

    def __str__(self) -> str:
        if self.ok is None:
            return f"not verified: {self.reason}"
        numbers = f"max |Δ| {self.max_abs:.3g}, relative {self.max_rel:.3g}, {self.cases} cases"
        if self.ok:
            unseen = f"; no input enters the body {named_paths(self.unrun)}, unchanged" if self.unrun else ""
            return f"equal ({numbers}, at {self.share:.2g} of what rounding allows{unseen})"
        return f"different: {self.reason} ({numbers})"


def named_paths(paths: Sequence[str]) -> str:
    """Return some bodies by their paths, and how many more there are."""
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return f"{', '.join(paths[:_NAMED])}{more}"


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal.

    Attributes:
        rtol, atol: where either is given, |a - b| <= rtol * (largest |a| of the channel) + atol; otherwise the noise of
            the first model decides, see `cipm_ir.runtime.verification.noise`.
        bits: nothing but equal numbers will do.
    """

    rtol: float | None = None
    atol: float | None = None
    bits: bool = False

    @property
    def measured(self) -> bool:
        """The noise of the first model is needed."""
        return not self.bits and self.rtol is None and self.atol is None

    def allowed(self, stick: Yardstick, axis: int | None) -> Array:
        """Return how far each channel along an axis may move."""
        if self.bits:
            return np.zeros_like(stick.scale[axis])
        if self.measured:
            return stick.allowed(axis)
        return (self.rtol or 0.0) * stick.scale[axis] + (self.atol or 0.0)


DOUBTFUL = 100.0
"""Up to this multiple of what is allowed, more noise is measured before two programs count as different."""

_AT_ONCE = 3
_PATIENCE = 60.0
"""Once the noise of a slow model took so many seconds of the processor, no more of it is measured.

Not of the clock: on a busy machine, a right copy must not count as different for want of time.
"""

MEASURED = Tolerance()
"""The noise of the first model decides."""


class Variants(Protocol):
    """A program that runs in several ways which differ by nothing but rounding."""

    @property
    def backend(self) -> str:
        """What runs the program."""
        ...

    def others(self) -> Sequence[str]:
        """Return the names of all ways to run but the plain one."""
        ...

    def more(self) -> Sequence[str]:
        """Return further names, for cases of doubt."""
        ...

    def outputs(self, feeds: Sequence[Feeds], way: str = "") -> Iterator[Outputs]:
        """Run on each of several inputs; "" is the plain way.

        Raises:
            CipmError: this way does not work, or not on one of the inputs.
        """
        ...


@dataclass(frozen=True)
class Case:
    """An input, what it is, and what the program taken as right computes from it."""

    label: str
    feeds: Feeds
    outputs: Outputs


class Reference:
    """A program taken as right: what it computes on given inputs, and how far rounding alone moves that.

    The noise is measured when a comparison first needs it.

    Args:
        side: the program.
        cases: inputs, and its outputs in the plain way.
        units: by output, see `Yardstick`.
    """

    def __init__(self, side: Variants, cases: Sequence[Case], units: Mapping[str, float] | None = None) -> None:
        self._side = side
        self._measured: dict[str, set[int]] | None = None
        self.backend = side.backend
        self.labels = [case.label for case in cases]
        self.feeds = [case.feeds for case in cases]
        unit = dict(units or {})
        self.sticks = [
            {name: Yardstick(x, unit=unit.get(name, 0.0)) for name, x in case.outputs.items()} for case in cases
        ]

    def compare(self, actual: Sequence[Outputs], tolerance: Tolerance = MEASURED) -> Verification:
        """Compare outputs by name, one dict for each input; outputs that `actual` lacks are left out."""
        everything = [stick for one in self.sticks for stick in one.values()]
        if everything and not any(_informative(stick.expected) for stick in everything):
            return Verification(None, reason="no output has a finite entry on any input", backend=self.backend)
        start = time.process_time()
        found = self._compare(actual, tolerance)
        # What is allowed only grows with each way, so that the first one which explains the difference is enough; and
        # with each input that is measured, since noise counts at least as much as is usual over all of them.
        for way, measured in self._ways().items() if not found and tolerance.measured else ():
            for places in (self._doubtful(actual, tolerance), range(len(self.sticks))):
                places = [place for place in places if place not in measured]
                if not found and places:
                    measured.update(places)
                    self._measure_noise([way], places)
                    found = self._compare(actual, tolerance)
        # Where a value is rounded to a coarse grid inside the model, rounding shows as rare jumps; and of thousands of
        # channels, some look quieter than they are: look longer.
        more = list(self._side.more()) if tolerance.measured else []
        while more and not found and found.share < DOUBTFUL and time.process_time() - start < _PATIENCE:
            ways, more = more[:_AT_ONCE], more[_AT_ONCE:]
            self._measure_noise(ways, self._doubtful(actual, tolerance))
            found = self._compare(actual, tolerance)
        return found

    def _compare(self, actual: Sequence[Outputs], tolerance: Tolerance) -> Verification:
        worst: dict[str, tuple[float, float]] = {}
        reason, share, told = "", 0.0, 0.0
        for label, one, got in zip(self.labels, self.sticks, actual, strict=True):
            for name in (name for name in one if name in got):
                found = compare(one[name], got[name], tolerance)
                before = worst.get(name, (0.0, 0.0))
                worst[name] = (max(before[0], found.max_abs), max(before[1], found.max_rel))
                # Where nothing is allowed every share is infinite; the reason tells of NaN or infinities first.
                if found.why and (not reason or (found.share, found.max_abs) > (share, told)):
                    reason, told = f"output {name!r}: {found.why} (input: {label})", found.max_abs
                share = max(share, found.share)
        max_abs = max((pair[0] for pair in worst.values()), default=0.0)
        max_rel = max((pair[1] for pair in worst.values()), default=0.0)
        return Verification(not reason, max_abs, max_rel, len(self.sticks), reason, self.backend, worst, share)

    def _ways(self) -> dict[str, set[int]]:
        """For each way to run but the plain one, the inputs on which its noise is known."""
        if self._measured is None:
            self._measured = {way: set() for way in self._side.others()}
        return self._measured

    def _doubtful(self, actual: Sequence[Outputs], tolerance: Tolerance) -> list[int]:
        """Return the inputs on which some output differs by more than is allowed."""
        return [
            place
            for place, (one, got) in enumerate(zip(self.sticks, actual, strict=True))
            if any(compare(one[name], got[name], tolerance).why for name in one if name in got)
        ]

    def _measure_noise(self, ways: Sequence[str], places: Sequence[int]) -> None:
        feeds = [self.feeds[place] for place in places]
        for way in ways:
            try:
                for place, got in zip(places, self._side.outputs(feeds, way), strict=True):
                    for name, stick in self.sticks[place].items():
                        if name in got:
                            stick.add(got[name])
            except CipmError:  # a size that is computed from a moved number, a kernel that only exists unfused
                continue
        for name in {name for one in self.sticks for name in one}:
            settle([one[name] for one in self.sticks if name in one])


@dataclass(frozen=True)
class Found:
    """One output of two programs on one input: errors, their share of what is allowed, and what is wrong or ""."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    share: float = 0.0
    why: str = ""


def compare(stick: Yardstick, got: Array, tolerance: Tolerance = MEASURED) -> Found:
    """Compare one output with what it should be; errors are infinite where shapes, types or infinities differ."""
    a, b = stick.expected, got
    if a.shape != b.shape:
        return _different(f"shape {list(a.shape)} became {list(b.shape)}")
    if a.dtype != b.dtype:
        return _different(f"type {a.dtype} became {b.dtype}")
    if not is_float(a):
        return _compare_exact(stick, b)
    error, apart = difference(a, b)
    if stick.unstable is not None:
        apart &= ~stick.unstable
    if apart.any():
        return _different(f"NaN or infinities at different places, first at {_place(apart)}")
    largest = max((float(scale.max(initial=0.0)) for scale in stick.scale.values()), default=0.0)
    max_abs = float(error.max(initial=0.0))
    relative = max_abs / largest if largest else (0.0 if max_abs == 0 else np.inf)
    share, why = 0.0, ""
    for axis in stick.scale:
        errors, allowed = by_channel(error, axis), tolerance.allowed(stick, axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(errors > 0, errors / allowed, 0.0)
        worst = int(shares.argmax()) if shares.size else 0
        if shares.size and shares[worst] > share:
            share = float(shares[worst])
            where = "" if axis is None else f" in channel {worst} of axis {axis}"
            if share > 1:
                size = float(stick.scale[axis][worst])
                why = (
                    f"max |Δ| is {errors[worst]:.3g}{where} where {allowed[worst]:.3g} is allowed (largest {size:.3g})"
                )
    return Found(max_abs, relative, share, why)


def _different(why: str) -> Found:
    return Found(np.inf, np.inf, np.inf, why)


def _place(mask: Array) -> list[int]:
    return [int(i) for i in np.argwhere(mask)[0]] if mask.ndim else []


def _compare_exact(stick: Yardstick, b: Array) -> Found:
    a = stick.expected
    different = int(np.count_nonzero(a != b))
    if not different:
        return Found()
    number = a.dtype.kind in "iub"
    error = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))) if number else np.inf
    scale = float(np.max(np.abs(a.astype(np.float64)))) if number else 0.0
    allowed = MULTIPLE * stick.flips
    why = "" if different <= allowed else f"{different} of {a.size} entries differ"
    return Found(
        error, error / scale if scale else np.inf, different / allowed if allowed else float(different + 1), why
    )


def _informative(array: Array) -> bool:
    """Return whether there is anything to compare.

    An empty output (no box found) says nothing of how it is computed.
    """
    return array.size > 0 and (not is_float(array) or bool(np.isfinite(widened(array)).any()))
