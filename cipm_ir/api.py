"""What a program calls: `load`, `optimize`, `verify`, `fingerprint`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import onnx
import onnx_ir as ir

from cipm_ir.backends.to_onnx import emit_proto, save_onnx
from cipm_ir.errors import OutputError, UnsupportedError
from cipm_ir.frontends.from_onnx import check_finite, check_shapes, load_onnx
from cipm_ir.passes.base import Pass, Progress, ignore_progress
from cipm_ir.passes.pipeline import Outcome, Witness, check_analysis, check_properties, run_passes
from cipm_ir.passes.report import Report
from cipm_ir.passes.text import parse_passes
from cipm_ir.runtime.inputs import Data
from cipm_ir.runtime.verify import Verification, verify_models
from cipm_ir.symmetry.program import Program

Source: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model | Program
"""A path to an .onnx file, a model in memory, or a program that was loaded before."""

DEFAULT_PASSES = ("clean-up", "fold-batch-norm", "remove-dead")
"""What `optimize` runs when it is not told: every exact pass that makes a model smaller."""


@dataclass(frozen=True)
class OnnxOrigin:
    """A program that came in as ONNX, and goes out the same way: external data stays external."""

    kind: Literal["path", "proto", "ir"]
    path: Path | None
    external: bool

    def write(self, model: ir.Model, path: str) -> None:
        """Write ``path``, with ``path + ".data"`` where the source had external data or the weights need it."""
        save_onnx(model, path, source_external=self.external)


@dataclass(frozen=True)
class Result:
    """What `optimize` gives back: the program, the report, and what each pass did.

    Attributes:
        program: the program after the last pass.
        report: sizes, errors and seconds; ``print`` it, or take ``to_dict()``.
        witness: for each pass that changed something: its name, its kind, and what it did, in the labels of the
            program that it got.
    """

    program: Program
    report: Report
    witness: tuple[Witness, ...]
    annotate: bool = False

    @cached_property
    def model(self) -> ir.Model | onnx.ModelProto:
        """The model as the kind that came in: a ModelProto for a ModelProto, otherwise an `onnx_ir.Model`."""
        model = self.program.emit(annotate=self.annotate)
        origin = self.program.origin
        return emit_proto(model) if isinstance(origin, OnnxOrigin) and origin.kind == "proto" else model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to ``path``, whole or not at all.

        Errors: `OutputError`; nothing is left behind.
        """
        _origin(self.program).write(self.program.emit(annotate=self.annotate), os.fspath(path))


def load(source: Source) -> Program:
    """Read a model and make it a program; weights stay on disk until they are needed.

    Errors: `InputError` (no such file, not a model, damaged, shapes that contradict each other), `UnsupportedError`.
    """
    program = _checked(source)
    check_analysis(program)
    return program


def optimize(
    source: Source,
    passes: str | Pass | Iterable[str | Pass] = DEFAULT_PASSES,
    data: Data | None = None,
    output: str | os.PathLike[str] | None = None,
    verify: bool = True,
    annotate: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Run passes on a model and check after each that it still computes what it should.

    Args:
        source: a path, an `onnx.ModelProto`, an `onnx_ir.Model` or a program; never changed.
        passes: names in text form (`"prune{macs=0.5}"`), pass objects, or a mix.
        data: calibration and verification input: a path to .npz (arrays by input name, first axis samples), a dict of
            arrays, or an iterable of dicts.
        output: where to write the result, beside first and then renamed; it may be the source.
        verify: run the model before and after each pass.
        annotate: write the groups of every axis into the metadata of the result.
        seed: of random inputs and of passes that draw numbers.
        progress: called with what is being done and the fraction done (None: unknown).

    Errors: `InputError`, `UnsupportedError`, `OptionError`, `OutputError`, and `VerificationError` naming the pass that
        broke the model; then nothing is written.
    """
    todo = parse_passes(passes)
    check_properties(todo)
    if output is not None:
        check_output(output)
    program = _read(source)
    outcome: Outcome = run_passes(
        program, todo, data=data, seed=seed, verify=verify, progress=progress or ignore_progress
    )
    result = Result(outcome.program, outcome.report, outcome.witness, annotate)
    if output is not None:
        result.save(output)
    return result


def verify(
    a: Source,
    b: Source,
    data: Data | None = None,
    seed: int = 0,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    cases: int = 3,
) -> Verification:
    """Do two models compute the same? Both run on the same random and given inputs.

    Args:
        a: the model taken as right.
        b: the model to compare.
        data: samples, as for `optimize`.
        seed: of the random inputs.
        rtol: allowed max|a - b| over max|a|; None: by type, see `cipm_ir.runtime.verify.TOLERANCE`.
        atol: allowed in addition.
        cases: how many random inputs, and how many batches of data.

    Errors: `InputError`, `UnsupportedError`.
    """
    first, second = _checked(a), _checked(b)
    return verify_models(first.emit(), second.emit(), data=data, seed=seed, rtol=rtol, atol=atol, cases=cases)


def fingerprint(model: Source) -> str:
    """A hash that agrees for models that differ only by their symmetry, and differs where one weight differs.

    Errors: `InputError`, `UnsupportedError`.
    """
    from cipm_ir.passes.fingerprint import fingerprint_program

    program = load(model)
    check_finite(program.model)
    return fingerprint_program(program)


def check_output(path: str | os.PathLike[str]) -> None:
    """Fail before the work, not after it, where the result could not be written.

    Errors: `OutputError`.
    """
    target = Path(os.path.abspath(path))
    if target.is_dir():
        raise OutputError(f"{os.fspath(path)!r} is a folder; give the name of a file.")
    if not target.parent.is_dir():
        raise OutputError(f"{os.fspath(path)!r} cannot be written: the folder {str(target.parent)!r} does not exist.")


def _checked(source: Source) -> Program:
    program = _read(source)
    if program is not source:
        check_shapes(program.model)
    return program


def _read(source: Source) -> Program:
    if isinstance(source, Program):
        return source
    if _is_torch(source):
        raise UnsupportedError(
            f"A {type(source).__name__} of torch cannot be read yet: the torch frontend comes with the [torch] extra "
            "in a later version; until then, write it with torch.onnx.export(..., dynamo=True) and give the file."
        )
    loaded = load_onnx(source)
    return Program.of(loaded.model, origin=OnnxOrigin(loaded.kind, loaded.path, loaded.external))


def _is_torch(source: object) -> bool:
    return any(base.__module__.partition(".")[0] == "torch" for base in type(source).__mro__)


def _origin(program: Program) -> OnnxOrigin:
    origin = program.origin
    return origin if isinstance(origin, OnnxOrigin) else OnnxOrigin("ir", None, False)
