"""Files of torch programs, read back and compared with the object that they were written from, before they count."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from cipm_ir.backends.torch.emit import Emitted, called_side, example_tensors
from cipm_ir.backends.torch.proof import first_difference
from cipm_ir.backends.torch.runs import Side, as_array, computes_otherwise
from cipm_ir.backends.torch.state import named_tensors
from cipm_ir.errors import CipmError, OutputError
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.inputs.generate import Feeds, true_inputs
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verification.compare import Outputs

__all__ = ["check_exported", "check_onnx", "check_plan", "check_written_model"]


def check_onnx(capture: Capture, emitted: Emitted, file: Path, path: str) -> None:
    """Compare an ONNX file with the object: every tensor that has a name of its state, and runs in onnxruntime.

    Raises:
        OutputError: it is something else.
    """
    model = ir.load(file)
    state = emitted.object.state_dict
    held = state() if callable(state) else state
    for name, value in model.graph.initializers.items():
        if name in held and value.const_value is not None:
            array = np.asarray(value.const_value.numpy())
            if not _same_bits(array, as_array(held[name])):
                raise _refused(path, f"tensor {name!r} has other values in it")
    _compare_runs(model, _side(capture, emitted), example_tensors(capture), path)


def check_exported(capture: Capture, emitted: Emitted, program: Any, file: str, path: str) -> None:
    """Compare a saved ExportedProgram with the one in memory, node by node, and with the object, in runs.

    Raises:
        OutputError: it is something else.
    """
    loaded = torch.export.load(file)
    if capture.read_again is not None:
        why = first_difference(capture.read_again(program).model, capture.read_again(loaded).model)
        if why:
            raise _refused(path, f"read back, it is another program: {why}")
    if capture.args is not None:
        side = _side(capture, emitted)
        why = computes_otherwise(side, called_side(capture, loaded.module()).run, example_tensors(capture))
        if why:
            raise _refused(path, why)


def check_plan(capture: Capture, emitted: Emitted, made: nn.Module, path: str) -> None:
    """Compare what a plan makes of the caller's module with the object: tensor by tensor, and node by node.

    Raises:
        OutputError: it is something else.
    """
    wanted, found = (dict(named_tensors(m)) for m in (emitted.object, made))
    for name in {**wanted, **found}:
        if name not in wanted or name not in found or not _same_bits(as_array(wanted[name]), as_array(found[name])):
            raise _refused(path, f"a plan does not give the module its tensor {name!r}")
    if capture.read_again is not None:
        why = first_difference(capture.read_again(emitted.object).model, capture.read_again(made).model)
        if why:
            raise _refused(path, f"a plan makes another module: {why}; save it as .pt2 or .onnx")


def check_written_model(model: ir.Model, module: nn.Module, args: Sequence[torch.Tensor], file: str, path: str) -> None:
    """Compare a saved ExportedProgram with the ONNX model that it was made from, and with its GraphModule, in runs.

    Raises:
        OutputError: it is something else.
    """
    names = [v.name or "" for v in true_inputs(model)]
    side = Side(module, lambda m, tensors: m(*tensors), names)
    loaded = Side(torch.export.load(file).module(), side.call, names)
    why = computes_otherwise(side, loaded.run, args)
    if why:
        raise _refused(path, why)
    _compare_runs(model, side, args, path)


def _side(capture: Capture, emitted: Emitted) -> Side:
    return called_side(capture, emitted.object.module() if emitted.form == "exported" else emitted.object)


def _compare_runs(model: ir.Model, side: Side, example: Sequence[torch.Tensor], path: str) -> None:
    """Run an ONNX model beside a torch program, inputs and outputs by position."""
    own = [v.name or "" for v in true_inputs(model)]
    try:
        runner = Runner(model)
    except CipmError as error:
        warnings.warn(f"{path!r} could not be run, so that it was not compared: {error}", RuntimeWarning, stacklevel=2)
        return
    with runner:
        why = computes_otherwise(side, _by_position(runner, side.names, own), example, same_kernels=False)
    if why:
        raise _refused(path, why)


def _by_position(runner: Runner, names: Sequence[str], own: Sequence[str]) -> Callable[[Feeds], Outputs]:
    def run(feeds: Feeds) -> Outputs:
        made = runner.run({b: feeds[a] for a, b in zip(names, own, strict=False)})
        return {f"output {k}": x for k, x in enumerate(made.values())}

    return run


def _same_bits(a: Any, b: Any) -> bool:
    same: bool = a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return same


def _refused(path: str, why: str) -> OutputError:
    return OutputError(f"{path!r} was not written: it would not be the program that was checked ({why}).")
