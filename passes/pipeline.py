"""Runs passes one after the other: timed, verified, and undone where one breaks its promise."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError, OptionError, VerificationError
from cipm_ir.passes.base import Context, Kind, Pass, PassResult, Progress, ignore_progress
from cipm_ir.passes.report import Report, Step, Totals, opaque_lines, space_lines
from cipm_ir.passes.text import parse_passes
from cipm_ir.runtime.checks import check_finite, check_shapes
from cipm_ir.runtime.data_sizes import data_sizes
from cipm_ir.runtime.inputs import Data, batches
from cipm_ir.runtime.verify import Verification, verify_models
from cipm_ir.symmetry.program import Program


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
        outcome: what the passes before it had made, which holds.
        verification: the comparison that failed, None where the pass made an invalid model.
    """

    def __init__(self, message: str, name: str, outcome: Outcome, verification: Verification | None) -> None:
        super().__init__(message)
        self.name = name
        self.outcome = outcome
        self.verification = verification


def run_passes(
    program: Program,
    passes: str | Pass | Iterable[str | Pass],
    *,
    data: Data | None = None,
    seed: int = 0,
    verify: bool = True,
    progress: Progress = ignore_progress,
    options: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run passes on a program.

    After each pass that changed the program its shapes are checked, and with ``verify`` both programs run on random and
    given inputs: an EXACT pass must give equal outputs within the tolerance of their type, of an APPROXIMATE one the
    error is measured. A model that cannot be run is reported as not verified, with the reason.

    Errors: `OptionError` for passes, `InputError` for model or data, `RolledBack` naming the pass that broke a promise.
    """
    todo = parse_passes(passes)
    check_properties(todo)
    model = program.written
    check_shapes(model)
    check_finite(model)
    check_analysis(program)
    run = _Run(program, _reusable(data), seed, verify, progress, dict(options or {}))
    run.check_data()
    for index, one in enumerate(todo):
        run.step(one, index, len(todo))
    progress("verify", None)
    outcome = run.outcome()
    progress("done", 1.0)
    return outcome


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
    verify: bool
    progress: Progress
    options: dict[str, Any]
    first: Program = field(init=False)
    before: Totals = field(init=False)
    sizes: Mapping[str, int] = field(init=False)
    steps: list[Step] = field(default_factory=list)
    witness: list[Witness] = field(default_factory=list)
    unverifiable: str = ""
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first = self.program
        self.sizes = data_sizes(self.program.model, self.data)
        self.before = Totals.of(self.program, self.sizes)

    def check_data(self) -> None:
        """Fail before the first pass where the data does not fit the model."""
        if self.data is not None and next(iter(batches(self.data, self.program.model)), None) is None:
            raise InputError("The data holds no samples.")

    def step(self, one: Pass, index: int, count: int) -> None:
        """Run one pass, check it, and take over its program."""

        def report_progress(what: str, fraction: float | None) -> None:
            self.progress(f"{one.name}: {what}", (index + min(max(fraction or 0.0, 0.0), 1.0)) / count)

        self.progress(str(one), index / count)
        start = time.perf_counter()
        ctx = Context(self.data, self.seed, report_progress, self.verify, self.options, self.first, index, self.sizes)
        result = self._call(one, ctx)
        seconds = time.perf_counter() - start
        kind = result.kind or one.kind
        changed = result.changed and result.program is not self.program
        verification, checked = self._checked(one, kind, result) if changed else (None, "unchanged")
        before = self.steps[-1].after if self.steps else self.before
        after = Totals.of(result.program, self.sizes) if changed else before
        said = result.summary, before, after, seconds, verification, checked, result.metrics, result.figures
        made = Step(str(one), kind.value, changed, *said)
        self.steps.append(made)
        if changed:
            self.program = result.program
        if changed or result.witness:
            self.witness.append(Witness(str(one), kind, result.witness))

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
        if self.unverifiable:
            return None, self.unverifiable
        found = self._compare(self.program.emit(), after)
        if not found.verified:
            self.unverifiable = str(found)
            return found, self.unverifiable
        broken = not found and (kind is Kind.EXACT or not found.outputs or math.isinf(found.max_abs))
        if broken:
            promise = "it promised equal outputs, but " if kind is Kind.EXACT else ""
            self._roll_back(one, f"{promise}{found.reason.rstrip('.')}", found)
        return found, "verified" if kind is Kind.EXACT else "measured"

    def _compare(self, a: ir.Model, b: ir.Model) -> Verification:
        """Run two models the way their origin says; in onnxruntime where it says nothing."""
        compare = getattr(self.program.origin, "compare", verify_models)
        found: Verification = compare(a, b, data=self.data, seed=self.seed)
        return found

    def _roll_back(self, one: Pass, why: str, verification: Verification | None) -> None:
        message = f"Pass '{one}' was rolled back: {why}."
        raise RolledBack(message, str(one), self.outcome(compare=False), verification)

    def outcome(self, compare: bool = True) -> Outcome:
        """What was made so far, the first program compared with the last."""
        changed = [step for step in self.steps if step.changed]
        verification: Verification | None = None
        checked = "unchanged" if not changed else self.unverifiable or "not verified: verification is off"
        if len(changed) == 1:
            verification, checked = changed[0].verification, changed[0].checked
        elif changed and compare and self.verify and not self.unverifiable:
            verification = self._compare(self.first.emit(), self.program.emit())
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
        )
        return Outcome(self.program, report, tuple(self.witness))
