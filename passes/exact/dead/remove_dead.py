"""Removal of hidden units, heads and groups that contribute nothing, and of units that only contribute a constant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import OptionError, SymmetryError
from cipm_ir.ir.labels import Labels
from cipm_ir.passes.exact.dead.contributions import Sum, find_sums
from cipm_ir.passes.exact.dead.liveness import Liveness
from cipm_ir.passes.exact.dead.removal import removable_units
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import left_alone
from cipm_ir.passes.framework.registry import register
from cipm_ir.runtime.inputs.generate import batches
from cipm_ir.runtime.intervals.arithmetic import Interval
from cipm_ir.runtime.intervals.bounds import Intervals, along, find_intervals
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

_SAME = 1e-9
"""Bounds in real arithmetic this close, relative to their size, are one number."""
_NEARLY = 1e-2
"""Bounds with rounding further apart than this are not of one number, whatever the rounding was."""


@register("remove-dead")
@dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove hidden units, heads and groups that contribute nothing, and units that contribute a constant.

    1. A unit is dead if each product that it enters on the way to an output is zero: because bounds that hold for all
       inputs prove its activation zero (a zero row and bias, a Relu that never opens), or because the weights that
       consume it are zero. Units that feed only dead units are dead too. Heads and groups are removed as a whole, if
       everything in them is dead.
    2. A unit whose value is one number c wherever weights consume it is removed, and W c is added to the bias of each
       consumer.
    3. With ``never_firing``, a unit that is zero on all the data where weights consume it counts as dead (approximate).

    Left alone: units under a normalization, softmax or mean over them (its statistic would change), a constant before a
    zero-padded convolution (not constant at the border), and units without which rows (heads, groups) would have
    different widths: sibling blocks lose equally many. Exact as long as no value of the model overflows.

    Raises:
        OptionError: ``never_firing`` without data.
    """

    kind: ClassVar[Kind] = Kind.EXACT

    never_firing: bool = option(False, "also remove units that are zero on all the data (approximate)")
    constants: bool = option(True, "also remove units that are constant, by a shift of the biases of their readers")
    rounds: int = option(4, "how often the result is looked at again after constants are gone", low=1)

    @property
    def approximates(self) -> bool:
        """With units that are zero on the data."""
        return self.never_firing

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Analyse, restrict, absorb, until nothing more is found."""
        if self.never_firing and ctx.data is None:
            raise OptionError("Pass 'remove-dead': never_firing looks at data, but none was given; pass data=.")
        tally = _Tally(program)
        current = program
        for number in range(self.rounds):
            ctx.progress("bounds", None)
            seen = _Seen.of(current)
            shifts = self.constants and bool(np.isfinite(_shifts(seen, _NEARLY)).any())
            current = self._dead(seen, tally, ctx, number)
            if not shifts:
                break
            before = current
            current = _constants(current, tally)
            if current is before:
                break
        return tally.result(current)

    def _dead(self, seen: _Seen, tally: _Tally, ctx: Context, number: int) -> Program:
        program = seen.program
        keep, made = removable_units(program, seen.liveness, seen.sums)
        if number == 0:
            tally.note_staying(seen, keep)
        if self.never_firing and number == 0:
            proven = program.kept_classes(keep)
            keep, made = removable_units(program, seen.liveness, find_sums(_observed(seen, ctx)))
            extra = proven & ~program.kept_classes(keep)
            tally.approximate = bool(extra.any())
            units = (s for s in keep if s.kind == "units")
            tally.silent = sum(int(extra[program.analysis.spaces[program.index(s)].table[:, 0]].sum()) for s in units)
        if tally.fits(keep):
            tally.note(keep)
            return made
        return program


@dataclass
class _Seen:
    """A program with the bounds of its values and what reads its units."""

    program: Program
    found: Intervals
    sums: list[Sum]
    liveness: Liveness

    @classmethod
    def of(cls, program: Program, *, rounding: bool = True) -> _Seen:
        """Look at a program."""
        found = find_intervals(program.model, program.analysis, rounding=rounding)
        sums = find_sums(found)
        liveness = Liveness(program.analysis)
        liveness.read(found, sums)
        return cls(program, found, sums, liveness)


# ---------------------------------------------------------------- data
def _observed(seen: _Seen, ctx: Context) -> Intervals:
    """Return bounds in which what is read by a sum, and zero on all the data, is zero."""
    found, walk = seen.found, seen.program.analysis.walk
    labelled: dict[str, set[int]] = {}
    for one in seen.sums:
        for operand, _ in one.ending():
            value = walk.nodes[one.node].inputs[operand.index]
            name = "" if value is None else value.name or ""
            if name in found.values and not found.values[name].zero.all():
                labelled[name] = {a for f in walk.states[name].factors for a in f.axes}
    values = dict(found.values)
    for name, largest in _largest(seen.program, labelled, ctx).items():
        low, high = np.where(largest == 0, 0.0, values[name].lo), np.where(largest == 0, 0.0, values[name].hi)
        values[name] = Interval.of(low, high)
    return Intervals(found.analysis, values, found.parameters)


def _largest(program: Program, labelled: Mapping[str, set[int]], ctx: Context) -> dict[str, npt.NDArray[Any]]:
    """Return largest absolute values on the data, by position along the labelled axes of some values."""
    largest: dict[str, npt.NDArray[Any]] = {}
    names = sorted(labelled)
    if not names or ctx.data is None:
        return largest
    with Runner(program.model, extra_outputs=names) as runner:
        for count, feeds in enumerate(batches(ctx.data, program.model)):
            ctx.progress(f"batch {count + 1} of the data", None)
            for name, array in runner.run(feeds, names).items():
                rest = tuple(a for a in range(array.ndim) if a not in labelled[name])
                seen = np.abs(array).max(axis=rest, keepdims=True, initial=0.0)
                largest[name] = np.maximum(largest.get(name, 0.0), seen)
    return largest


# ---------------------------------------------------------------- constants
def _constants(program: Program, tally: _Tally) -> Program:
    """Return the program with the constant units of each space absorbed into the biases of what reads them."""
    shift = _shifts(_Seen.of(program, rounding=False), _SAME)
    values = {
        space.name: shift[program.analysis.spaces[k].table[:, 0]]
        for k, space in enumerate(program.spaces)
        if space.kind == "units"
    }
    for name, value in values.items():
        constant = np.flatnonzero(np.isfinite(value))
        constant = constant[1:] if len(constant) == len(value) else constant
        space = next((s for s in program.spaces if s.name == name and s.size == len(value)), None)
        if not len(constant) or space is None:
            continue
        keep = np.setdiff1d(np.arange(len(value)), constant)
        offset = np.zeros(len(value))
        offset[constant] = value[constant]
        if tally.fits({space: keep}):
            try:
                program = program.absorb(space, keep, np.eye(len(value), dtype=np.uint8)[:, keep], offset)
                tally.note({space: keep}, offset)
            except SymmetryError as refusal:
                tally.refused[name] = str(refusal)
    return program


def _shifts(seen: _Seen, close: float) -> npt.NDArray[np.float64]:
    """Per class, the one value that all its readers see, not zero; NaN where there is none."""
    analysis, found = seen.program.analysis, seen.found
    low, high = np.full(analysis.classes.count, np.inf), np.full(analysis.classes.count, -np.inf)
    for one in seen.sums:
        for operand, _ in one.ending():
            value = analysis.walk.nodes[one.node].inputs[operand.index]
            bounds = None if value is None else found.values.get(value.name or "")
            if bounds is None:
                continue  # a parameter
            for f in found.state(one.node, operand.index).factors:
                classes = analysis.classes.of[f.labels]
                lo, hi = along(bounds, f)
                np.minimum.at(low, classes.ravel(), lo.ravel())
                np.maximum.at(high, classes.ravel(), hi.ravel())
    same = np.isfinite(low) & np.isfinite(high) & ~seen.liveness.summed
    same &= analysis.classes.free
    with np.errstate(invalid="ignore"):
        same &= (high - low <= close * np.abs(high)) & (high != 0)
        return np.where(same, (low + high) / 2, np.nan)


# ---------------------------------------------------------------- what was done
class _Tally:
    """Kept units in the labels of the program that came in, over several steps."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.kept: dict[str, Labels] = {s.name: np.arange(s.size) for s in program.spaces}
        self.shifts: dict[str, npt.NDArray[np.float64]] = {}
        self.units = self.blocks = self.constant = self.silent = 0
        self.approximate = False
        self.refused: dict[str, str] = {}
        """Per space, why its constant units stay."""
        self.staying: dict[str, str] = {}
        """Per space, why its dead units stay."""

    def fits(self, keep: Mapping[Space, Labels]) -> bool:
        """Return whether the spaces are those that came in, as far as they are left."""
        return all(s.name in self.kept and len(self.kept[s.name]) == s.size for s in keep)

    def note(self, keep: Mapping[Space, Labels], shift: npt.NDArray[np.float64] | None = None) -> None:
        """Account for a restriction, and for the constants that went with it."""
        for space, index in keep.items():
            before = self.kept[space.name]
            if shift is not None:
                full = self.shifts.setdefault(space.name, np.zeros(self.program.space(space.name).size))
                full[before] += shift
                self.constant += space.size - len(index)
            elif space.kind == "units":
                self.units += space.size - len(index)
            else:
                self.blocks += space.size - len(index)
            self.kept[space.name] = before[index]

    def note_staying(self, seen: _Seen, keep: Mapping[Space, Labels]) -> None:
        """Note dead units that stay, by space, with the reason."""
        program, analysis = seen.program, seen.program.analysis
        apart = seen.liveness
        if analysis.walk.rec.normalized:  # without the statistics that keep a unit alive
            apart = Liveness(analysis.without_statistics(analysis.walk.rec.normalized))
            apart.read(seen.found, seen.sums)
        dead = ~apart.alive(seen.sums, np.zeros(analysis.classes.count, bool))
        gone = ~np.asarray(program.kept_classes(keep), bool)
        for space, raw in zip(program.spaces, analysis.spaces, strict=True):
            classes = raw.table[:, 0]
            left = classes[dead[classes] & ~gone[classes]] if space.kind == "units" else classes[:0]
            if not len(left) or gone[classes].sum() + 1 == len(classes):  # a space keeps one unit
                continue
            held = seen.liveness.summed[left].any()
            why = "a normalization, softmax or mean runs over them" if held else "rows would become uneven"
            self.staying[space.name] = f"{len(left)} of {space.size} units are dead, but {why}"

    def result(self, program: Program) -> PassResult:
        """Summary, witness and numbers."""
        stay = left_alone({**self.refused, **self.staying})
        kept = {s.name: self.kept[s.name] for s in self.program.spaces if len(self.kept[s.name]) < s.size}
        metrics = {
            "dead": self.units - self.silent, "never_firing": self.silent, "constant": self.constant,
            "blocks": self.blocks, "widths": {n: [self.program.space(n).size, len(k)] for n, k in kept.items()},
            "refused": {**self.refused, **self.staying},
        }  # fmt: skip
        if not kept:
            what = "nothing dead" if not stay else "nothing dead that could go"
            return PassResult(self.program, False, "; ".join(x for x in (what, stay) if x), metrics=metrics)
        parts = [
            f"{count} {what}"
            for count, what in (
                (self.units - self.silent, "dead"),
                (self.silent, "never firing on the data"),
                (self.constant, "constant"),
            )
            if count
        ]
        whole = f"{self.blocks} block{'s' * (self.blocks != 1)}" if self.blocks else ""
        units = f"units removed: {', '.join(parts)}" if parts else ""
        summary = "; ".join(x for x in (units, f"{whole} removed" if whole else "", stay) if x)
        kind = Kind.APPROXIMATE if self.approximate else None
        witness = {"kept": kept, "shift": self.shifts} if self.shifts else {"kept": kept}
        return PassResult(program, True, summary, witness, metrics, kind)
