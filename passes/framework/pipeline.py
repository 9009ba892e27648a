"""Runs passes one after the other: timed, verified, and undone where one breaks its promise."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from cipm_ir.errors import CipmError, OptionError
from cipm_ir.passes.framework.base import Kind, Pass, Progress, ignore_progress
from cipm_ir.passes.framework.parser import parse_passes
from cipm_ir.passes.framework.verified_run import OnFailure, Outcome, RolledBack, Run, Verify, Witness, refuse_damaged
from cipm_ir.runtime.checks import check_finite, check_shapes
from cipm_ir.runtime.inputs.batch_size import fit_batch, share_batch
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.runtime.verification.verify import Tolerance
from cipm_ir.symmetry.program import Program

__all__ = [
    "OnFailure",
    "Outcome",
    "RolledBack",
    "Verify",
    "Witness",
    "check_analysis",
    "check_properties",
    "run_passes",
]


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

    Behind passes that changed the program its shapes are checked, and with ``verify`` both programs run on random and
    given inputs: an EXACT pass must give equal outputs up to the rounding noise of the program, of an APPROXIMATE one
    the error is measured. What a run of exact passes computes is compared once, behind the last of them, with the
    program before the first, so that errors do not add up unseen; where that does not succeed, they run again and are
    compared one by one. A model that cannot be run is reported as not verified, with the reason.

    Args:
        program: not changed.
        passes: in text form, as objects, or a mix.
        data: calibration and verification input.
        seed: of random inputs and of passes that draw numbers.
        verify: see `Verify`.
        on_failure: see `OnFailure`.
        rtol, atol: of exact passes, instead of the rounding noise; see
            `cipm_ir.runtime.verification.compare.Tolerance`.
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
    model = program.source_model
    if not program.fits and getattr(program.origin, "capture", None) is None:  # torch has computed every shape
        check_shapes(model)
    check_finite(model)
    check_analysis(program)
    tolerance = Tolerance(rtol, atol)
    data = _reusable(data)
    fit_batch(program.model, data)
    share_batch(program.model, program.source_model)
    run = Run(program, data, seed, verify, on_failure, tolerance, progress, dict(options or {}))
    run.check_data()
    run.all(todo)
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

    Raises:
        InputError: with what the runtime says, where the model can be neither analysed nor run.
    """
    try:
        _ = program.spaces
    except CipmError:
        raise
    except Exception as error:
        refuse_damaged(program, "analysed", error)
        raise


def check_properties(passes: Iterable[Pass]) -> None:
    """Refuse an order in which a pass does not get what it requires.

    Raises:
        OptionError: the message names the pass, the property, and passes that ensure it.
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
