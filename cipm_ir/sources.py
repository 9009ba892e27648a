"""What holds a model, and how it is read: files, objects of ONNX and of torch, functions that build a module."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx_ir as ir

from cipm_ir.backends.onnx.save import save_onnx
from cipm_ir.backends.targets import check_target, onnx_form, torch_form
from cipm_ir.errors import OptionError, OutputError, UnsupportedError
from cipm_ir.frontends.onnx.load import load_onnx
from cipm_ir.ir.input_shapes import InputShapes
from cipm_ir.runtime.checks import check_shapes, correct_shapes
from cipm_ir.runtime.inputs.data import Data, normalized
from cipm_ir.runtime.inputs.generate import true_inputs
from cipm_ir.runtime.quiet import quiet
from cipm_ir.symmetry.analysis import gc_paused
from cipm_ir.symmetry.program import Program

Source: TypeAlias = Any
"""What holds a model: a path to an .onnx or .pt2 file, ``"module:function"``, an `onnx.ModelProto`, an `onnx_ir.Model`,
an `nn.Module`, a `torch.fx.GraphModule`, a `torch.export.ExportedProgram`, or a program that was loaded before."""


@dataclass(frozen=True)
class OnnxOrigin:
    """A program that came in as ONNX, and goes out the same way: external data stays external."""

    kind: Literal["path", "proto", "ir"]
    path: Path | None
    external: bool

    def write(self, model: ir.Model, path: str) -> None:
        """Write ``path``, with ``path + ".data"`` where the source had external data or the weights need it.

        A ``.pt2`` is written through torch.
        """
        if onnx_form(path) == "exported":
            torch_module("backends.torch.files").write_exported(model, path)
        else:
            save_onnx(model, path, source_external=self.external)


@dataclass(frozen=True)
class Examples:
    """How to read a torch program; see `load`."""

    inputs: Any = None
    kwargs: Mapping[str, Any] | None = None
    dynamic_shapes: Any = None
    method: str = "auto"


@dataclass(frozen=True)
class Sizes:
    """Sizes of dynamic dimensions of an ONNX model; see `load`."""

    input_shapes: InputShapes | None = None
    fix_shapes: bool = False

    def __post_init__(self) -> None:
        if self.fix_shapes and self.input_shapes is None:
            raise OptionError("fix_shapes fixes the sizes of input_shapes; give those, too.")


def load_program(source: Source, examples: Examples = Examples(), sizes: Sizes = Sizes()) -> Program:
    """Return a program of whatever holds a model; the shapes of an ONNX model are checked, and wrong notes corrected.

    Raises:
        InputError: there is no such file, it is no model, it is damaged, or shapes do not fit.
        OptionError: an option is out of range.
        UnsupportedError: the model uses a feature that is not supported.
    """
    if sizes.input_shapes is not None and _holds_torch(source):
        raise OptionError(
            "input_shapes is for ONNX models; a torch program has the sizes of its example_inputs, and dynamic_shapes "
            "keeps some open."
        )
    if isinstance(source, Program):
        if sizes.input_shapes is None:
            return source
        return Program.of(source.source_model, origin=source.origin, **vars(sizes))
    if _names_torch(source):
        files, path = torch_module("frontends.torch.files"), os.fspath(source)
        if path.endswith(".pt2"):
            source = files.read_exported(path)
        else:
            source, args, kwargs = files.build(path)
            if examples.inputs is None and not examples.kwargs:
                examples = replace(examples, inputs=args, kwargs=kwargs)
    if _is_torch(source):
        load_torch = torch_module("frontends.torch.load").load_torch
        checks = torch_module("frontends.torch.checks")
        checks.check_readable(source, examples.inputs, examples.kwargs)
        with quiet(), torch_module("runtime.torch_modes").unchanged(source), gc_paused():
            capture = load_torch(source, examples.inputs, examples.kwargs, examples.dynamic_shapes, examples.method)
        return Program(capture.model, origin=torch_module("backends.torch.origin").TorchOrigin(capture))
    loaded = load_onnx(source)
    correct_shapes(loaded.model)
    origin = OnnxOrigin(loaded.kind, loaded.path, loaded.external)
    program = Program.of(loaded.model, origin=origin, **vars(sizes), own=True)
    program.fits = sizes.input_shapes is None  # sizes that are suggested or fixed were not looked at
    return program


def load_validated(source: Source, examples: Examples = Examples(), sizes: Sizes = Sizes()) -> Program:
    """Return the same, the shapes of a torch graph checked, too.

    Raises:
        CipmError: as `load_program`.
    """
    program = load_program(source, examples, sizes)
    capture = getattr(program.origin, "capture", None)
    if program is not source and capture is not None and capture.kind == "graph":  # torch has checked what it traced
        check_shapes(program.model)
    return program


def torch_module(module: str) -> Any:
    """Return a module of the torch frontend or backend.

    Raises:
        UnsupportedError: torch is not installed.
    """
    try:
        return import_module(f"cipm_ir.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UnsupportedError(
            f'Torch programs need {error.name}, which is not installed: pip install "cipm-ir[torch]".'
        ) from error


def _names_torch(source: Source) -> bool:
    """Return whether this is the path of a saved ExportedProgram, or ``module:function``."""
    if not isinstance(source, str | os.PathLike):
        return False
    path = os.fspath(source)
    return path.endswith(".pt2") or (
        re.fullmatch(r"(?:[\w.]+|.+\.py):[A-Za-z_]\w*", path) is not None and not os.path.exists(path)
    )


def _holds_torch(source: Source) -> bool:
    if isinstance(source, Program):
        return not isinstance(origin_of(source), OnnxOrigin)
    return _is_torch(source) or _names_torch(source)


def _is_torch(source: object) -> bool:
    return any(base.__module__.partition(".")[0] == "torch" for base in type(source).__mro__)


def origin_of(program: Program) -> Any:
    """Where a program came from; one that was made in memory counts as an ONNX model."""
    return program.origin if program.origin is not None else OnnxOrigin("ir", None, False)


def normalize_data(data: Data | None, program: Program) -> Data | None:
    """Samples by input name, whatever holds them; see `cipm_ir.runtime.inputs.data`.

    Raises:
        InputError: no such file, a folder without arrays, one array for a model of several inputs.
    """
    if data is None:
        return None
    return normalized(data, [value.name or "" for value in true_inputs(program.model)])


def check_output(path: str | os.PathLike[str], source: Source = None) -> None:
    """Fail before the work, not after it, where the result could not be written, or not under that name.

    Raises:
        OutputError: the result cannot be written.
    """
    if source is None:
        check_target(path)
        return
    check_target(path, folder=(torch_form if _holds_torch(source) else onnx_form)(path) == "plan")


def check_annotated(path: str | os.PathLike[str]) -> None:
    """Fail before the work where a program could not be written with its groups, or not as ONNX.

    Raises:
        OutputError: the result cannot be written.
    """
    if onnx_form(path) != "onnx":
        raise OutputError(f"{os.fspath(path)!r}: groups are written into the metadata of an .onnx file, not of a .pt2.")
    check_target(path)


def save_annotated(program: Program, path: str) -> None:
    """Write a program with its groups in the metadata, as ONNX: for a torch program the graph that it was lowered to.

    Raises:
        OutputError: the result cannot be written.
    """
    if isinstance(origin_of(program), OnnxOrigin):
        program.save(path, annotate=True)
    else:
        save_onnx(program.emit(annotate=True), path)
