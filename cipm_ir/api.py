"""What a program calls: `load`, `optimize`, `verify`, `fingerprint`, `apply_plan`, `torch_backend`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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

if TYPE_CHECKING:
    from cipm_ir.backends.to_torch import Emitted

Source: TypeAlias = Any
"""What holds a model: a path to an .onnx or .pt2 file, ``"module:function"``, an `onnx.ModelProto`, an `onnx_ir.Model`,
an `nn.Module`, a `torch.fx.GraphModule`, a `torch.export.ExportedProgram`, or a program that was loaded before."""

DEFAULT_PASSES = ("clean-up", "fold-batch-norm", "remove-dead")
"""What `optimize` runs on an ONNX model when it is not told: every exact pass that makes it smaller."""

DEFAULT_TORCH_PASSES = ("remove-dead",)
"""The same for a torch program, which keeps its batch normalizations, so that it can be trained further."""


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
    def model(self) -> Any:
        """The model as the kind that came in: ModelProto, `onnx_ir.Model`, `nn.Module`, GraphModule, ExportedProgram.

        An `nn.Module` whose forward does not run with the new sizes comes out as a GraphModule; the report says why.
        """
        if self.emitted is not None:
            return self.emitted.object
        model = self.program.emit(annotate=self.annotate)
        origin = self.program.origin
        return emit_proto(model) if isinstance(origin, OnnxOrigin) and origin.kind == "proto" else model

    @cached_property
    def emitted(self) -> Emitted | None:
        """For a torch program: the object, as what it came out, and the attributes that were set."""
        emit = getattr(self.program.origin, "emit", None)
        return None if emit is None else emit(self.program.emit())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to ``path``, whole or not at all.

        ``.onnx`` for every model; for a torch program also ``.pt2`` (`torch.export.save`), or a folder: a plan and
        weights that `apply_plan` puts onto a module of the original class.

        Errors: `OutputError`; nothing is left behind.
        """
        _origin(self.program).write(self.program.emit(annotate=self.annotate), os.fspath(path))


def load(
    source: Source,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    method: str = "auto",
) -> Program:
    """Read a model and make it a program; weights stay on disk until they are needed.

    Args:
        source: see `Source`.
        example_inputs: for torch: the arguments of the module's forward, a tuple, or one tensor.
        example_kwargs: for torch: its keyword arguments.
        dynamic_shapes: for torch: as in `torch.export.export`; sizes that it does not name are fixed.
        method: for an `nn.Module`: "symbolic" (torch.fx tracing), "export", or "auto": the first where it works.

    Errors: `InputError` (no such file, not a model, damaged, shapes that contradict each other), `UnsupportedError`.
    """
    program = _checked(source, _Examples(example_inputs, example_kwargs, dynamic_shapes, method))
    check_analysis(program)
    return program


def optimize(
    source: Source,
    passes: str | Pass | Iterable[str | Pass] | None = None,
    data: Data | None = None,
    output: str | os.PathLike[str] | None = None,
    verify: bool = True,
    annotate: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "auto",
) -> Result:
    """Run passes on a model and check after each that it still computes what it should.

    Args:
        source: see `Source`; never changed.
        passes: names in text form (`"prune{macs=0.5}"`), pass objects, or a mix; None: `DEFAULT_PASSES`, for a torch
            program `DEFAULT_TORCH_PASSES`.
        data: calibration and verification input: a path to .npz (arrays by input name, first axis samples), a dict of
            arrays, or an iterable of dicts.
        output: where to write the result, beside first and then renamed; it may be the source.
        verify: run the model before and after each pass.
        annotate: write the groups of every axis into the metadata of the result.
        seed: of random inputs and of passes that draw numbers.
        progress: called with what is being done and the fraction done (None: unknown).
        example_inputs, example_kwargs, dynamic_shapes, method: how to read a torch program, see `load`.

    Errors: `InputError`, `UnsupportedError`, `OptionError`, `OutputError`, and `VerificationError` naming the pass that
        broke the model; then nothing is written.
    """
    todo = None if passes is None else parse_passes(passes)
    check_properties(todo or ())
    if output is not None:
        check_output(output)
    program = _read(source, _Examples(example_inputs, example_kwargs, dynamic_shapes, method))
    if todo is None:
        todo = parse_passes(DEFAULT_PASSES if isinstance(_origin(program), OnnxOrigin) else DEFAULT_TORCH_PASSES)
    outcome: Outcome = run_passes(
        program, todo, data=data, seed=seed, verify=verify, progress=progress or ignore_progress
    )
    result = _noted(Result(outcome.program, outcome.report, outcome.witness, annotate))
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
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
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
        example_inputs, example_kwargs: for an `nn.Module`, see `load`. A torch program runs in torch, in evaluation
            mode; it may be compared with an ONNX model, inputs and outputs by position.

    Errors: `InputError`, `UnsupportedError`.
    """
    examples = _Examples(example_inputs, example_kwargs)
    first, second = _checked(a, examples), _checked(b, examples)
    if not isinstance(_origin(first), OnnxOrigin) or not isinstance(_origin(second), OnnxOrigin):
        across = _torch("backends.to_torch_origin").compare_programs
        found: Verification = across(first, second, data=data, seed=seed, rtol=rtol, atol=atol, cases=cases)
        return found
    return verify_models(first.emit(), second.emit(), data=data, seed=seed, rtol=rtol, atol=atol, cases=cases)


def fingerprint(
    model: Source, *, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None
) -> str:
    """A hash that agrees for models that differ only by their symmetry, and differs where one weight differs.

    Errors: `InputError`, `UnsupportedError`.
    """
    from cipm_ir.passes.fingerprint import fingerprint_program

    program = load(model, example_inputs, example_kwargs)
    check_finite(program.model)
    return fingerprint_program(program)


def apply_plan(module: Any, path: str | os.PathLike[str]) -> Any:
    """A copy of a torch module, changed as the plan in the folder ``path`` says (`Result.save`); its class is kept.

    Errors: `InputError` where there is no plan, or where it is one for another model; `UnsupportedError` without torch.
    """
    return _torch("backends.to_torch_files").apply_plan(module, path)


def torch_backend(
    passes: str | Pass | Iterable[str | Pass] = DEFAULT_TORCH_PASSES, *, then: Any = "inductor", verify: bool = True
) -> Callable[..., Any]:
    """A backend for ``torch.compile(model, backend=...)`` that runs exact passes in front of another backend.

    Args:
        passes: exact passes; others are refused.
        then: the backend that gets the result: its name, or a callable.
        verify: check each pass on real runs.

    Errors: `OptionError` for a pass that is not exact; `UnsupportedError` without torch. A graph that cannot be read or
        rewritten goes to ``then`` as it is, with a warning.
    """
    todo = parse_passes(passes)
    check_properties(todo)
    compiled = _torch("backends.to_torch_compile")
    load = _torch("frontends.from_torch").load_torch
    return compiled.backend(todo, then, verify, load)  # type: ignore[no-any-return]


def check_output(path: str | os.PathLike[str]) -> None:
    """Fail before the work, not after it, where the result could not be written.

    Errors: `OutputError`.
    """
    target = Path(os.path.abspath(path))
    if target.is_dir():
        raise OutputError(f"{os.fspath(path)!r} is a folder; give the name of a file.")
    if not target.parent.is_dir():
        raise OutputError(f"{os.fspath(path)!r} cannot be written: the folder {str(target.parent)!r} does not exist.")


@dataclass(frozen=True)
class _Examples:
    """How to read a torch program; see `load`."""

    inputs: Any = None
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None
    method: str = "auto"


def _checked(source: Source, examples: _Examples = _Examples()) -> Program:  # noqa: B008
    program = _read(source, examples)
    if program is not source:
        check_shapes(program.model)
    return program


def _read(source: Source, examples: _Examples = _Examples()) -> Program:  # noqa: B008
    if isinstance(source, Program):
        return source
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if path.endswith(".pt2"):
            source = _torch("frontends.from_torch_files").read_exported(path)
        elif re.fullmatch(r"[\w./\\-]+:[A-Za-z_]\w*", path) and not os.path.exists(path):
            source, args, kwargs = _torch("frontends.from_torch_files").build(path)
            if examples.inputs is None and not examples.kwargs:
                examples = replace(examples, inputs=args, kwargs=kwargs)
    if _is_torch(source):
        capture = _torch("frontends.from_torch").load_torch(
            source, examples.inputs, examples.kwargs, examples.dynamic_shapes, examples.method
        )
        return Program.of(capture.model, origin=_torch("backends.to_torch_origin").TorchOrigin(capture))
    loaded = load_onnx(source)
    return Program.of(loaded.model, origin=OnnxOrigin(loaded.kind, loaded.path, loaded.external))


def _torch(module: str) -> Any:
    """A module of the torch frontend or backend.

    Errors: `UnsupportedError` where torch is not installed.
    """
    from importlib import import_module

    try:
        return import_module(f"cipm_ir.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UnsupportedError(
            f'Torch programs need {error.name}, which is not installed: pip install "cipm-ir[torch]".'
        ) from error


def _noted(result: Result) -> Result:
    """Say in the report how a torch program was read and as what it comes out."""
    emitted, capture = result.emitted, getattr(result.program.origin, "capture", None)
    if emitted is None or capture is None:
        return result
    notes = []
    if capture.kind == "module":
        how = {"symbolic": "torch.fx tracing", "export": "torch.export"}.get(capture.method, capture.method)
        notes.append(f"read by {how}{f' ({capture.notes[0]})' if capture.notes else ''}")
    kind = {"module": type(emitted.object).__name__, "graph": "a GraphModule", "exported": "an ExportedProgram"}
    notes.append(f"comes out as {kind[emitted.form]}{f': {emitted.reason}' if emitted.reason else ''}")
    noted = replace(result, report=replace(result.report, notes=tuple(notes)))
    noted.__dict__["emitted"] = emitted
    return noted


def _is_torch(source: object) -> bool:
    return any(base.__module__.partition(".")[0] == "torch" for base in type(source).__mro__)


def _origin(program: Program) -> Any:
    return program.origin if program.origin is not None else OnnxOrigin("ir", None, False)
