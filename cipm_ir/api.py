"""What a program calls: `load`, `optimize`, `verify`, `fingerprint`, `statistics`, and the ways to torch and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cipm_ir.backends.onnx.save import emit_proto
from cipm_ir.errors import InputError, OptionError, UnsupportedError
from cipm_ir.frontends.onnx.load import check_finite
from cipm_ir.ir.input_shapes import InputShapes
from cipm_ir.passes.framework.base import Kind, Progress, ignore_progress
from cipm_ir.passes.framework.parser import Passes, parse_passes
from cipm_ir.passes.framework.pipeline import OnFailure, Outcome, Verify, check_analysis, check_properties, run_passes
from cipm_ir.passes.framework.report import Report
from cipm_ir.passes.framework.witness import Witness, undo_all
from cipm_ir.runtime.inputs.batch_size import fit_batch, share_batch
from cipm_ir.runtime.inputs.data import Data
from cipm_ir.runtime.verification.verify import Verification, verify_models
from cipm_ir.sources import (
    Examples,
    OnnxOrigin,
    Sizes,
    Source,
    check_output,
    load_program,
    load_validated,
    normalize_data,
    origin_of,
    torch_module,
)
from cipm_ir.symmetry.program import Program

if TYPE_CHECKING:
    from cipm_ir.backends.torch.emit import Emitted
    from cipm_ir.runtime.statistics.store import Statistics

DEFAULT_PASSES = ("clean-up", "fold-affine", "remove-dead")
"""What `optimize` runs on an ONNX model when it is not told: every exact pass that makes it smaller."""

DEFAULT_TORCH_PASSES = ("remove-dead",)
"""The same for a torch program, which keeps its batch normalizations, so that it can be trained further."""

DEFAULT_COMPILE_PASSES = ("fold-batch-norm", "remove-dead")
"""The same for `torch_backend`, whose graphs are only run."""


@dataclass(frozen=True, repr=False)
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
    verify: Verify = True

    def __repr__(self) -> str:
        """Return the report as a table: what a notebook or a print shows."""
        return str(self.report)

    def undo(self) -> Program:
        """Return the program with every unit where it was in the model that came in: exact passes are undone.

        Bit for bit where they permuted, flipped signs or scaled by powers of two. Rewrites of the graph stay.

        Raises:
            SymmetryError: a pass cannot be undone: it removed, merged or changed units, or does not say how.
        """
        return undo_all(self.program, self.witness)

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
        return None if emit is None else emit(self.program.emit(), bool(self.verify))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to ``path``, whole or not at all.

        ``.onnx`` and ``.pt2`` (`torch.export.save`) for every model; for an `nn.Module` also a folder: a plan and
        weights that `apply_plan` puts onto a module of the original class. Of a torch program `model` is written, as it
        is then: trained further, where it was.

        Raises:
            OutputError: the file cannot be written; nothing is left behind.
            UnsupportedError: the file cannot be written; nothing is left behind.
        """
        origin = origin_of(self.program)
        if self.emitted is not None:
            torch_module("backends.torch.files").write(origin.capture, self.emitted, os.fspath(path))
        else:
            origin.write(
                self.program.emit(annotate=True) if self.annotate else self.program.source_model, os.fspath(path)
            )


def load(
    source: Source,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    method: str = "auto",
    input_shapes: InputShapes | None = None,
    fix_shapes: bool = False,
) -> Program:
    """Load a model as a program; weights stay on disk until they are needed.

    Args:
        source: see `Source`.
        example_inputs: for torch: the arguments of the module's forward, a tuple, or one tensor.
        example_kwargs: for torch: its keyword arguments.
        dynamic_shapes: for torch: as in `torch.export.export`; sizes that it does not name are fixed.
        method: for an `nn.Module`: "symbolic" (torch.fx tracing), "export", or "auto": the first where it works.
        input_shapes: for ONNX: sizes by input, ``{"x": (1, 3, 640, 640)}``, None for one that stays open; of one input
            also its sizes alone. Analysis, costs and verification use them; the model stays dynamic.
        fix_shapes: declare these sizes in the model.

    Raises:
        InputError: there is no such file, it is no model, it is damaged, or its shapes contradict each other.
        OptionError: an option is out of range.
        UnsupportedError: the model uses a feature that is not supported.
    """
    examples = Examples(example_inputs, example_kwargs, dynamic_shapes, method)
    program = load_validated(source, examples, Sizes(input_shapes, fix_shapes))
    check_analysis(program)
    return program


def optimize(
    source: Source,
    passes: Passes | None = None,
    data: Data | None = None,
    output: str | os.PathLike[str] | None = None,
    verify: Verify = True,
    annotate: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    on_failure: OnFailure = "skip",
    rtol: float | None = None,
    atol: float | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "auto",
    input_shapes: InputShapes | None = None,
    fix_shapes: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Result:
    """Run passes on a model and check after each that it still computes what it should.

    Args:
        source: see `Source`; never changed.
        passes: names in text form (`"prune{macs=0.5}"`), pass objects, or a mix; None: `DEFAULT_PASSES`, for a torch
            program `DEFAULT_TORCH_PASSES`.
        data: calibration and verification input, first axes samples: a dict of arrays or tensors by input name, an
            array for a model of one input, a tuple of one for each input, an iterable of such batches (a DataLoader, a
            list; labels behind the inputs are left out), an .npz or .npy file, a list or folder of them; see
            `cipm_ir.runtime.inputs.data`.
        output: where to write the result, under a temporary name first; it may be the source.
        verify: run the model before and after each pass; "strict": also leave out passes whose result could not be run.
        annotate: write the groups of every axis into the metadata of the result.
        seed: of random inputs and of passes that draw numbers.
        progress: called with what is being done and the fraction done (None: unknown).
        on_failure: "skip": a pass that broke its promise is left out, the others' work is kept, and the report says so
            (`Report.skipped`); "raise": stop with a `VerificationError`, and write nothing.
        rtol, atol: if either is given, outputs of exact passes may move by rtol times the largest value of their
            channel, plus atol; otherwise the rounding noise of the model itself decides.
        example_inputs, example_kwargs, dynamic_shapes, method: how to read a torch program, see `load`.
        input_shapes, fix_shapes: sizes of dynamic dimensions of an ONNX model, see `load`.
        options: settings that all passes of the run see, see `cipm_ir.passes.Context`.

    Raises:
        InputError: the model or the data cannot be used.
        UnsupportedError: a feature of the input is not supported.
        OptionError: an option is unknown or out of range.
        OutputError: the result cannot be written.
        VerificationError: a pass broke the model where ``on_failure`` is "raise".
    """
    todo = None if passes is None else parse_passes(passes)
    check_properties(todo or ())
    if output is not None:
        check_output(output, source)
    examples = Examples(example_inputs, example_kwargs, dynamic_shapes, method)
    program = load_program(source, examples, Sizes(input_shapes, fix_shapes))
    if todo is None:
        todo = parse_passes(DEFAULT_PASSES if isinstance(origin_of(program), OnnxOrigin) else DEFAULT_TORCH_PASSES)
    outcome: Outcome = run_passes(
        program,
        todo,
        data=normalize_data(data, program),
        seed=seed,
        verify=verify,
        on_failure=on_failure,
        rtol=rtol,
        atol=atol,
        progress=progress or ignore_progress,
        options={"gradients": _gradients, **(options or {})},
    )
    result = _noted(Result(outcome.program, outcome.report, outcome.witness, annotate, verify))
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
    cases: int | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    input_shapes: InputShapes | None = None,
) -> Verification:
    """Compare what two models compute: both run on the same random and given inputs.

    Args:
        a: the model taken as right.
        b: the model to compare.
        data: samples, as for `optimize`.
        seed: of the random inputs.
        rtol, atol: where either is given, an output may move by rtol times the largest value of its channel, plus atol;
            otherwise the rounding noise of ``a`` decides, see `cipm_ir.runtime.verification.noise`.
        cases: at most this many generated inputs, and batches of data; None: as many as time allows.
        example_inputs, example_kwargs: for an `nn.Module`, see `load`. A torch program runs in torch, in evaluation
            mode; it may be compared with an ONNX model, inputs and outputs by position.
        input_shapes: sizes of the random inputs, see `load`.

    Raises:
        InputError: the model or the data cannot be used.
        OptionError: an option is unknown or out of range.
        UnsupportedError: a feature of the input is not supported.
    """
    examples, sizes = Examples(example_inputs, example_kwargs), Sizes(input_shapes)
    first, second = load_validated(a, examples, sizes), load_validated(b, examples, sizes)
    data = normalize_data(data, first)
    fit_batch(first.model, data)
    share_batch(first.model, first.source_model)
    if not isinstance(origin_of(first), OnnxOrigin) or not isinstance(origin_of(second), OnnxOrigin):
        across = torch_module("backends.torch.origin").compare_programs
        found: Verification = across(first, second, data=data, seed=seed, rtol=rtol, atol=atol, cases=cases)
        return found
    return verify_models(first.emit(), second.emit(), data=data, seed=seed, rtol=rtol, atol=atol, cases=cases)


def fingerprint(model: Source, *, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a hash that agrees for models that differ only by their symmetry, and differs where one weight differs.

    Raises:
        InputError: the model or the data cannot be used.
        UnsupportedError: a feature of the input is not supported.
    """
    from cipm_ir.passes.exact.canonicalize.fingerprint import fingerprint_program

    program = load(model, example_inputs, example_kwargs)
    check_finite(program.model)
    return fingerprint_program(program)


def statistics(
    source: Source,
    data: Data,
    *,
    engine: str | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Statistics:
    """Return what the hidden units of a model do on data: moments, correlations, firing rates, Gram matrices of their
    readers.

    Args:
        source: see `Source`.
        data: samples, as for `optimize`; they are streamed.
        engine: None collects in this process; "ray", "processes": several workers, the same numbers; see
            `cipm_ir.runtime.statistics.distributed.collect`.
        example_inputs, example_kwargs: for an `nn.Module`, see `load`.
        options: of `cipm_ir.runtime.statistics.collect.collect`: ``spaces``, ``gram``, ``pairs``, ``lags``,
            ``measures``, ...

    Raises:
        InputError: the model or the data cannot be used.
        OptionError: an option is unknown or out of range.
        SymmetryError: the symmetry analysis does not allow it.
        UnsupportedError: a feature of the input is not supported.
    """
    from cipm_ir.runtime.statistics import collect as statistics
    from cipm_ir.runtime.statistics import distributed

    program = load(source, example_inputs, example_kwargs)
    samples = normalize_data(data, program)
    if samples is None:
        raise InputError("Statistics need data: give inputs, as for optimize.")
    fit_batch(program.model, samples)
    if engine is None:
        return statistics.collect(program, samples, **options)
    return distributed.collect(program, samples, engine=engine, **options)


def to_torch(source: Source, *, example_inputs: Any = None, example_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Return a model as a `torch.fx.GraphModule` in evaluation mode; an ONNX model is written in torch.

    Inputs and outputs are in the order of the model; parameters keep the names of the initializers. Inputs of floats
    with a default (initializers that are inputs) come last and may be left out; those of integers stay their defaults.

    Raises:
        InputError: an operator has no counterpart in torch, or torch is not installed.
        UnsupportedError: an operator has no counterpart in torch, or torch is not installed.
    """
    program = load(source, example_inputs, example_kwargs)
    graph_module = torch_module("backends.torch.emitter").graph_module
    origin, model = origin_of(program), program.emit()
    return graph_module(model) if isinstance(origin, OnnxOrigin) else origin.graph(model)


def apply_plan(module: Any, path: str | os.PathLike[str]) -> Any:
    """Return a copy of a torch module, changed as the plan in the folder ``path`` says (`Result.save`); its class is
    kept.

    Raises:
        InputError: there is no plan, or where it is one for another model.
        UnsupportedError: torch is not installed.
    """
    return torch_module("backends.torch.files").apply_plan(module, path)


def torch_backend(
    passes: Passes = DEFAULT_COMPILE_PASSES, *, then: Any = "inductor", verify: bool = True
) -> Callable[..., Any]:
    """Return a backend for ``torch.compile(model, backend=...)`` that runs exact passes in front of another backend.

    For inference: where gradients are on and something requires them, the graph goes to ``then`` as it is. So it does,
    with one warning per reason, where it cannot be read or rewritten, where it changes its own buffers, or where a pass
    turns out not to be exact. **Weights are frozen** when a graph is compiled. Each call checks that they are the same
    objects, in the same memory, not written to since; where they are not, that call runs the graph uncompiled with the
    weights of now, and a warning says so: `torch.compiler.reset()` compiles again. Torch does not count writes through
    ``weight.data`` or numpy: reset after these.

    Args:
        passes: exact passes; others are refused.
        then: the backend that gets the result: its name, or a callable.
        verify: check each pass, and the graph that comes out, on real runs.

    Raises:
        OptionError: a pass that is not exact, and for a backend that torch does not know.
        UnsupportedError: torch is not installed.
    """
    todo = parse_passes(passes)
    check_properties(todo)
    inexact = next((one for one in todo if one.kind is not Kind.EXACT), None)
    if inexact is not None:
        raise OptionError(
            f"torch_backend runs exact passes only, and '{inexact}' is {inexact.kind.value}; leave it out."
        )

    def rewrite(program: Program) -> Program:
        outcome = run_passes(program, todo, verify=verify)
        for step in outcome.report.steps:
            if step.changed and step.kind != Kind.EXACT.value:
                raise UnsupportedError(f"Pass '{step.name}' did not keep the function exactly.")
        return outcome.program

    load_torch = torch_module("frontends.torch.load").load_torch
    made: Callable[..., Any] = torch_module("backends.torch.compile").backend(rewrite, then, load_torch, verify)
    return made


def _gradients(*args: Any, **kwargs: Any) -> Any:
    """Gradients for criteria that ask for them; see `cipm_ir.runtime.gradients`."""
    return torch_module("backends.torch.gradients").products(*args, **kwargs)


def _noted(result: Result) -> Result:
    """Say in the report how a torch program was read and as what it comes out."""
    emitted, capture = result.emitted, getattr(result.program.origin, "capture", None)
    if emitted is None or capture is None:
        return result
    notes = []
    if capture.kind == "module":
        how = {"symbolic": "torch.fx tracing", "export": "torch.export"}.get(capture.method, capture.method)
        notes.append(f"read by {how}{f' ({capture.notes[0]})' if capture.notes else ''}")
    elif capture.notes:
        notes.append(capture.notes[0])
    kind = {"module": type(emitted.object).__name__, "graph": "a GraphModule", "exported": "an ExportedProgram"}
    notes.append(f"comes out as {kind[emitted.form]}{f': {emitted.reason}' if emitted.reason else ''}")
    inputs = result.program.model.graph.inputs
    if emitted.reason and inputs and all(v.shape is not None and v.shape.is_static() for v in inputs):
        notes.append("the graph may take only inputs of the example's sizes: dynamic_shapes= keeps sizes open")
    noted = replace(result, report=replace(result.report, notes=(*result.report.notes, *notes)))
    noted.__dict__["emitted"] = emitted
    return noted
