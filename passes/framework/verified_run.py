"""One run of passes: timed, verified (exact ones in a row together), and undone where one broke its promise."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from cipm_ir.errors import CipmError, InputError, OptionError, VerificationError
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, Progress
from cipm_ir.passes.framework.report import TOGETHER, Report, Step, Totals, opaque_lines, space_lines
from cipm_ir.passes.framework.witness import Witness
from cipm_ir.runtime.checks import check_shapes
from cipm_ir.runtime.inputs.batch_size import batch_note, share_batch
from cipm_ir.runtime.inputs.data_sizes import data_sizes
from cipm_ir.runtime.inputs.generate import Data, batches
from cipm_ir.runtime.verification.verify import Tolerance, Verification, Verifier, verify_models
from cipm_ir.symmetry.program import Program

OnFailure: TypeAlias = Literal["skip", "raise"]
"""What to do with a pass that broke its promise: leave it out and go on, or raise `RolledBack`."""

Verify: TypeAlias = bool | Literal["strict"]
"""Whether to run the model before and after each pass; "strict": refuse a pass whose result could not be run."""


_LOG = logging.getLogger("cipm_ir")


@dataclass(frozen=True)
class Outcome:
    """The last program, the report, and a witness for each pass that changed something."""

    program: Program
    report: Report
    witness: tuple[Witness, ...]


class RolledBack(VerificationError):
    """A pass broke its promise and was undone.

    Attributes:
        name: the pass, in text form.
        why: what it broke.
        outcome: what the passes before it had made, which holds.
        verification: the comparison that failed, None where the pass made an invalid model.
    """

    def __init__(self, name: str, why: str, outcome: Outcome, verification: Verification | None) -> None:
        super().__init__(f"Pass '{name}' was rolled back: {why}.")
        self.name = name
        self.why = why
        self.outcome = outcome
        self.verification = verification


def refuse_damaged(program: Program, what: str, error: Exception) -> None:
    """Raise `InputError` in place of an error of ours where the runtime cannot run the model either."""
    model = program.emit()
    found = verify_models(model, model, cases=1)
    if not found.verified:
        raise InputError(f"The model can be neither {what} nor run: {found.reason.rstrip('.')}.") from error


class _Doubt(Exception):
    """Some exact passes could not be verified together."""


class _Broken(Exception):
    """A program breaks the promise of its pass.

    Attributes:
        why: what it broke.
        verification: the comparison that failed, None where the model is invalid.
    """

    def __init__(self, why: str, verification: Verification | None = None) -> None:
        super().__init__(why)
        self.why, self.verification = why, verification


@dataclass(frozen=True)
class _Mark:
    """The state in front of the first exact pass that is not verified yet, to go back to."""

    index: int
    program: Program
    properties: frozenset[str]
    steps: int
    witness: int
    against_first: Verification | None


@dataclass
class Run:
    """The state of one run.

    Exact passes wait for the last of them: they are verified together, by `settle`. Where that fails, they run again
    from the program before the first of them, and each is verified alone.
    """

    program: Program
    data: Data | None
    seed: int
    verify: Verify
    on_failure: OnFailure
    tolerance: Tolerance
    progress: Progress
    options: dict[str, Any]
    first: Program = field(init=False)
    before: Totals = field(init=False)
    sizes: Mapping[str, int] = field(init=False)
    steps: list[Step] = field(default_factory=list)
    witness: list[Witness] = field(default_factory=list)
    unverifiable: str = ""
    properties: frozenset[str] = frozenset()
    mark: _Mark | None = None
    waiting: list[int] = field(default_factory=list)
    """Steps that are not verified yet."""
    alone: int = 0
    """Passes before this one, by number, are verified one by one."""
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first = self.base = self.program
        self.sizes = data_sizes(self.program.model, self.data)
        self.before = Totals.of(self.program, self.sizes)
        self._verifier: Any = None
        self.against_first: Verification | None = None

    @property
    def verifier(self) -> Any:
        """Compares with `base`: the program since which there were exact passes only."""
        if self._verifier is None:
            self._verifier = self._verifier_of(self.base)
        return self._verifier

    def check_data(self) -> None:
        """Fail before the first pass where the data does not fit the model."""
        if self.data is not None and next(iter(batches(self.data, self.program.model)), None) is None:
            raise InputError("The data holds no samples.")

    def all(self, todo: Sequence[Pass]) -> None:
        """Run the passes in order."""
        index = 0
        while index < len(todo):
            try:
                self.step(todo[index], index, len(todo))
                index += 1
                if index == len(todo):
                    self.settle()
            except _Doubt:
                assert self.mark is not None
                self.alone, index, mark = index + 1, self.mark.index, self.mark
                self.program, self.properties, self.against_first = mark.program, mark.properties, mark.against_first
                del self.steps[mark.steps :], self.witness[mark.witness :]
                self.mark, self.waiting = None, []

    def settle(self) -> None:
        """Verify together what waits for it.

        Raises:
            _Doubt: that did not succeed.
        """
        if not self.waiting:
            return
        try:
            found, checked = self._checked(Kind.EXACT, self.program, False, shared=len(self.waiting) > 1)
        except _Broken as broken:
            raise _Doubt from broken
        self.program.fits = True
        steps = [self.steps[place] for place in self.waiting if place < len(self.steps)]  # a step may have failed
        for place, step in zip(self.waiting, steps, strict=False):
            others = ", ".join(repr(other.name) for other in steps if other is not step)
            said = f"{checked}{TOGETHER}{others}" if others and found is not None else checked
            self.steps[place] = replace(step, verification=found, checked=said)
            _LOG.debug("%s: %s", step.name, said)
        self.mark, self.waiting = None, []

    def step(self, one: Pass, index: int, count: int) -> None:
        """Run one pass, check it or let it wait for the next ones, and take over its program."""
        try:
            self._step(one, index, count)
        except _Doubt:
            raise
        except Exception:
            self.settle()  # what a pass fails on may be the work of one before it
            raise

    def _step(self, one: Pass, index: int, count: int) -> None:
        def report_progress(what: str, fraction: float | None) -> None:
            self.progress(f"{one.name}: {what}", (index + min(max(fraction or 0.0, 0.0), 1.0)) / count)

        self.progress(str(one), index / count)
        missing = sorted(one.requires - self.properties)
        if missing:
            self._leave_out(
                one, f"it requires {', '.join(map(repr, missing))}, and the pass that ensures it was left out"
            )
            return
        start = time.perf_counter()
        verify = bool(self.verify)
        ctx = Context(self.data, self.seed, report_progress, verify, self.options, self.first, index, self.sizes)
        try:
            result = self._call(one, ctx)
        except VerificationError as error:  # a check of its own
            self.settle()
            if self.on_failure == "raise":
                raise
            self._leave_out(one, str(error).rstrip("."), time.perf_counter() - start)
            return
        seconds = time.perf_counter() - start
        kind = result.kind or one.kind
        changed = result.changed and result.program is not self.program
        waits = changed and kind is Kind.EXACT and not result.bit_exact and index >= self.alone
        if waits:
            self._wait(index)
        elif changed:
            self.settle()
        kept_comparison = self.against_first
        try:
            verification, checked = (None, "unchanged") if not changed or waits else self._alone(one, kind, result)
        except _Broken as broken:
            self.against_first = kept_comparison
            if self.on_failure == "raise":
                raise RolledBack(str(one), broken.why, self.outcome(compare=False), broken.verification) from None
            self._leave_out(one, broken.why, seconds, broken.verification)
            return
        before = self.steps[-1].after if self.steps else self.before
        received = self.program
        if changed:
            self.program = result.program
        after = Totals.of(result.program, {**self.before.sizes, **(self.sizes or {})}) if changed else before
        said = result.summary, before, after, seconds, verification, checked, result.metrics, result.figures
        made = Step(str(one), kind.value, changed, *said)
        self.steps.append(made)
        _LOG.info("%s: %s (%.2f s)", one, result.summary or ("done" if changed else "no change"), seconds)
        kept = self.properties if one.kind is Kind.ANALYSIS else self.properties & one.preserves
        self.properties = kept | one.ensures
        if changed and kind is not Kind.EXACT:
            self.base, self._verifier = result.program, None
        if changed or result.witness:
            names = tuple(space.name for space in received.spaces) if result.elements else ()
            self.witness.append(Witness(str(one), kind, result.witness, result.elements, one.keeps_units, names))

    def _wait(self, index: int) -> None:
        """Let the step that comes next be verified later."""
        if self.mark is None:
            counts = len(self.steps), len(self.witness)
            self.mark = _Mark(index, self.program, self.properties, *counts, self.against_first)
        self.waiting.append(len(self.steps))

    def _leave_out(self, one: Pass, why: str, seconds: float = 0.0, verification: Verification | None = None) -> None:
        """Report a pass whose result does not count; the program stays as it was."""
        sizes = self.steps[-1].after if self.steps else self.before
        said = f"left out: {why}"
        step = Step(str(one), one.kind.value, False, said, sizes, sizes, seconds, verification, said, {}, skipped=True)
        self.steps.append(step)
        _LOG.warning("%s %s", one, said)

    def _call(self, one: Pass, ctx: Context) -> PassResult:
        try:
            result = one.run(self.program, ctx)
        except CipmError as error:
            if one.name in str(error):
                raise
            raise type(error)(f"Pass {one.name!r}: {error}") from error
        except Exception as error:
            refuse_damaged(self.program, f"changed by pass '{one}'", error)
            error.add_note(f"This happened in pass {one}.")
            raise
        if not isinstance(result, PassResult):
            raise OptionError(f"Pass {one.name!r} gave back {type(result).__name__}, not a PassResult; fix its run.")
        return result

    def _alone(self, one: Pass, kind: Kind, result: PassResult) -> tuple[Verification | None, str]:
        """Check what one pass made; gives the comparison and what it says in words."""
        if kind is Kind.ANALYSIS:
            raise _Broken("it is an analysis, but changed the program")
        return self._checked(kind, result.program, result.bit_exact)

    def _checked(
        self, kind: Kind, program: Program, bits: bool, *, shared: bool = False
    ) -> tuple[Verification | None, str]:
        """Compare a program with the one before; `shared`: several passes made it, so that each must be verified."""
        try:
            check_shapes(program.source_model)
        except InputError as error:
            raise _Broken(f"it made an invalid model: {str(error).rstrip('.')}") from None
        if not self.verify:
            return None, "not verified: verification is off"
        found = None
        if not self.unverifiable:
            found = self._compare(kind, program, bits)
            if not found.verified and shared:
                raise _Broken(str(found), found)
            self.unverifiable = "" if found.verified else str(found)
        if found is None or not found.verified:
            if self.verify == "strict":
                raise _Broken(f"it could not be verified ({self.unverifiable})", found)
            return found, self.unverifiable
        broken = not found and (kind is Kind.EXACT or not found.outputs or math.isinf(found.max_abs))
        if broken:
            promise = "it promised equal outputs, but " if kind is Kind.EXACT else ""
            raise _Broken(f"{promise}{found.reason.rstrip('.')}", found)
        return found, "verified" if kind is Kind.EXACT else "measured"

    def _verifier_of(self, program: Program) -> Any:
        """Return what compares other models with a program: in torch where it came from there, else in onnxruntime."""
        make = getattr(program.origin, "verifier", Verifier)
        return make(program.emit(), data=self.data, seed=self.seed)

    def _compare(self, kind: Kind, program: Program, bits: bool) -> Verification:
        """Run a program and the one before the exact passes."""
        tolerance = self.tolerance if kind is Kind.EXACT else Tolerance(rtol=0.0, atol=0.0)
        tolerance = replace(tolerance, bits=True) if kind is Kind.EXACT and bits else tolerance
        verifier = self.verifier
        if tolerance.bits and self.base is not self.program:
            # Bits are promised against the program just before: an exact pass in between may have rounded.
            verifier = self._verifier_of(self.program)
        found: Verification = verifier.check(program.source_model, tolerance)
        if isinstance(verifier, Verifier):
            share_batch(verifier.model, self.first.model)
        self.against_first = found if verifier is self._verifier and self.base is self.first else None
        return found

    def outcome(self, compare: bool = True) -> Outcome:
        """Return what was made so far, the first program compared with the last."""
        changed = [step for step in self.steps if step.changed]
        verification: Verification | None = None
        checked = "unchanged" if not changed else self.unverifiable or "not verified: verification is off"
        if changed and self.against_first is not None:
            verification, checked = self.against_first, changed[-1].checked.partition(TOGETHER)[0]
        elif changed and compare and self.verify and not self.unverifiable:
            verification = self._verifier_of(self.first).check(self.program.emit())
            checked = "compared" if verification.verified else str(verification)
        report = Report(
            tuple(self.steps),
            self.before,
            self.steps[-1].after if self.steps else self.before,
            verification,
            checked,
            space_lines(self.program),
            opaque_lines(self.program),
            time.perf_counter() - self.started,
            tuple(batch_note(self.first.model)),
        )
        return Outcome(self.program, report, tuple(self.witness))
