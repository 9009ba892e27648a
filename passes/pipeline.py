"""Runs passes one after the other: timed, verified, and undone where one breaks its promise."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, TypeAlias

from cipm_ir.errors import CipmError, InputError, OptionError, VerificationError
from cipm_ir.passes.base import Context, Kind, Pass, PassResult, Progress, ignore_progress
from cipm_ir.passes.report import Report, Step, Totals, opaque_lines, space_lines
from cipm_ir.passes.text import parse_passes
from cipm_ir.runtime.batch_size import batch_note, fit_batch, share_batch
from cipm_ir.runtime.checks import check_finite, check_shapes
from cipm_ir.runtime.data_sizes import data_sizes
from cipm_ir.runtime.inputs import Data, batches
from cipm_ir.runtime.verify import Tolerance, Verification, Verifier, verify_models
from cipm_ir.symmetry.program import Program

OnFailure: TypeAlias = Literal["skip", "raise"]
"""What to do with a pass that broke its promise: leave it out and go on, or raise `RolledBack`."""

Verify: TypeAlias = bool | Literal["strict"]
"""Whether to run the model before and after each pass; "strict": refuse a pass whose result could not be run."""


@dataclass(frozen=True)
class Witness:
    """What one pass did, in the labels of the program that it got."""

    name: str
    kind: Kind
    data: Mapping[str, Any]


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


def run_passes(
    program: Program,
    passes: str | Pass | Iterable[str | Pass],
    *,
    data: Data | None = None,
    seed: int = 0,
    verify: Verify = True,
    on_failure: OnFailure = "raise",
    rtol: float | None = None,
    atol: float | None = None,
    progress: Progress = ignore_progress,
    options: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run passes on a program.

    After each pass that changed the program its shapes are checked, and with ``verify`` both programs run on random and
    given inputs: an EXACT pass must give equal outputs up to the rounding noise of the program, of an APPROXIMATE one
    the error is measured. What a run of exact passes computes is compared with the program before the first of them, so
    that errors do not add up unseen. A model that cannot be run is reported as not verified, with the reason.

    Args:
        program: not changed.
        passes: in text form, as objects, or a mix.
        data: calibration and verification input.
        seed: of random inputs and of passes that draw numbers.
        verify: see `Verify`.
        on_failure: see `OnFailure`.
        rtol, atol: of exact passes, instead of the rounding noise; see `cipm_ir.runtime.compare.Tolerance`.
        progress: called with what is being done and the fraction done.
        options: settings that all passes see.

    Raises:
        OptionError: for passes.
        InputError: for model or data.
        RolledBack: naming the pass that broke a promise, where ``on_failure`` is "raise".
    """
    todo = parse_passes(passes)
    check_properties(todo)
    _check_words(verify, on_failure)
    model = program.written
    if getattr(program.origin, "capture", None) is None:  # torch has computed every shape of what came from there
        check_shapes(model)
    check_finite(model)
    check_analysis(program)
    tolerance = Tolerance(rtol, atol)
    data = _reusable(data)
    fit_batch(program.model, data)
    share_batch(program.model, program.written)
    run = _Run(program, data, seed, verify, on_failure, tolerance, progress, dict(options or {}))
    run.check_data()
    for index, one in enumerate(todo):
        run.step(one, index, len(todo))
    progress("verify", None)
    outcome = run.outcome()
    progress("done", 1.0)
    return outcome


def _check_words(verify: Verify, on_failure: OnFailure) -> None:
    if verify not in (True, False, "strict"):
        raise OptionError(f'verify is True, False or "strict", not {verify!r}.')
    if on_failure not in ("skip", "raise"):
        raise OptionError(f'on_failure is "skip" or "raise", not {on_failure!r}.')


def check_analysis(program: Program) -> None:
    """Analyse a program, and tell a damaged model from a defect of the analysis by trying to run it.

    Shape inference cannot see every contradiction: behind a computed reshape, for one, it knows no sizes.

    Errors: `InputError` with what the runtime says, where the model can be neither analysed nor run.
    """
    try:
        _ = program.spaces
    except CipmError:
        raise
    except Exception as error:
        model = program.emit()
        found = verify_models(model, model, cases=1)
        if found.verified:
            raise
        raise InputError(f"The model can be neither analysed nor run: {found.reason.rstrip('.')}.") from error


def check_properties(passes: Iterable[Pass]) -> None:
    """Refuse an order in which a pass does not get what it requires.

    Errors: `OptionError` naming the pass, the property, and passes that ensure it.
    """
    have: frozenset[str] = frozenset()
    for one in passes:
        missing = sorted(one.requires - have)
        if missing:
            raise OptionError(
                f"Pass {one.name!r} requires {', '.join(map(repr, missing))}, which no pass before it ensures; "
                "put one that does before it."
            )
        kept = have if one.kind is Kind.ANALYSIS else have & one.preserves
        have = kept | one.ensures


def _reusable(data: Data | None) -> Data | None:
    """Data that can be read once per pass: a generator could only be read once."""
    if data is None or isinstance(data, str | os.PathLike | Mapping) or not isinstance(data, Iterator):
        return data
    return list(data)


@dataclass
class _Run:
    """The state of one run."""

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

    def step(self, one: Pass, index: int, count: int) -> None:
        """Run one pass, check it, and take over its program."""

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
            if self.on_failure == "raise":
                raise
            self._leave_out(one, str(error).rstrip("."), time.perf_counter() - start)
            return
        seconds = time.perf_counter() - start
        kind = result.kind or one.kind
        changed = result.changed and result.program is not self.program
        kept_comparison = self.against_first
        try:
            verification, checked = self._checked(one, kind, result) if changed else (None, "unchanged")
        except RolledBack as broken:
            self.against_first = kept_comparison
            if self.on_failure == "raise":
                raise
            self._leave_out(one, broken.why, seconds, broken.verification)
            return
        before = self.steps[-1].after if self.steps else self.before
        after = Totals.of(result.program, {**self.before.sizes, **(self.sizes or {})}) if changed else before
        said = result.summary, before, after, seconds, verification, checked, result.metrics, result.figures
        made = Step(str(one), kind.value, changed, *said)
        self.steps.append(made)
        kept = self.properties if one.kind is Kind.ANALYSIS else self.properties & one.preserves
        self.properties = kept | one.ensures
        if changed:
            self.program = result.program
            if kind is not Kind.EXACT:
                self.base, self._verifier = result.program, None
        if changed or result.witness:
            self.witness.append(Witness(str(one), kind, result.witness))

    def _leave_out(self, one: Pass, why: str, seconds: float = 0.0, verification: Verification | None = None) -> None:
        """Report a pass whose result does not count; the program stays as it was."""
        sizes = self.steps[-1].after if self.steps else self.before
        said = f"left out: {why}"
        step = Step(str(one), one.kind.value, False, said, sizes, sizes, seconds, verification, said, {}, skipped=True)
        self.steps.append(step)

    def _call(self, one: Pass, ctx: Context) -> PassResult:
        try:
            result = one.run(self.program, ctx)
        except CipmError as error:
            if one.name in str(error):
                raise
            raise type(error)(f"Pass {one.name!r}: {error}") from error
        except Exception as error:
            error.add_note(f"This happened in pass {one}.")
            raise
        if not isinstance(result, PassResult):
            raise OptionError(f"Pass {one.name!r} gave back {type(result).__name__}, not a PassResult; fix its run.")
        return result

    def _checked(self, one: Pass, kind: Kind, result: PassResult) -> tuple[Verification | None, str]:
        """Compare the new program with the one before; gives the comparison and what it says in words."""
        if kind is Kind.ANALYSIS:
            self._roll_back(one, "it is an analysis, but changed the program", None)
        after = result.program.written
        try:
            check_shapes(after)
        except InputError as error:
            self._roll_back(one, f"it made an invalid model: {str(error).rstrip('.')}", None)
        if not self.verify:
            return None, "not verified: verification is off"
        found = None
        if not self.unverifiable:
            found = self._compare(kind, result)
            self.unverifiable = "" if found.verified else str(found)
        if found is None or not found.verified:
            if self.verify == "strict":
                self._roll_back(one, f"it could not be verified ({self.unverifiable})", found)
            return found, self.unverifiable
        broken = not found and (kind is Kind.EXACT or not found.outputs or math.isinf(found.max_abs))
        if broken:
            promise = "it promised equal outputs, but " if kind is Kind.EXACT else ""
            self._roll_back(one, f"{promise}{found.reason.rstrip('.')}", found)
        return found, "verified" if kind is Kind.EXACT else "measured"

    def _verifier_of(self, program: Program) -> Any:
        """Return what compares other models with a program: in torch where it came from there, else in onnxruntime."""
        make = getattr(program.origin, "verifier", Verifier)
        return make(program.emit(), data=self.data, seed=self.seed)

    def _compare(self, kind: Kind, result: PassResult) -> Verification:
        """Run the new program and the one before the exact passes."""
        tolerance = self.tolerance if kind is Kind.EXACT else Tolerance(rtol=0.0, atol=0.0)
        tolerance = replace(tolerance, bits=True) if kind is Kind.EXACT and result.bit_exact else tolerance
        verifier = self.verifier
        if tolerance.bits and self.base is not self.program:
            # Bits are promised against the program just before: an exact pass in between may have rounded.
            verifier = self._verifier_of(self.program)
        found: Verification = verifier.check(result.program.emit(), tolerance)
        if isinstance(verifier, Verifier):
            share_batch(verifier.model, self.first.model)
        self.against_first = found if verifier is self._verifier and self.base is self.first else None
        return found

    def _roll_back(self, one: Pass, why: str, verification: Verification | None) -> NoReturn:
        raise RolledBack(str(one), why, self.outcome(compare=False), verification)

    def outcome(self, compare: bool = True) -> Outcome:
        """What was made so far, the first program compared with the last."""
        changed = [step for step in self.steps if step.changed]
        verification: Verification | None = None
        checked = "unchanged" if not changed else self.unverifiable or "not verified: verification is off"
        if changed and self.against_first is not None:
            verification, checked = self.against_first, changed[-1].checked
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
