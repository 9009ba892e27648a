"""Torch programs on disk: ``.onnx``, ``.pt2``, or a plan (JSON and safetensors) that a module of the class takes up."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from cipm_ir.backends.onnx.save import save_onnx
from cipm_ir.backends.targets import check_target, torch_form
from cipm_ir.backends.torch.attributes import apply_attributes
from cipm_ir.backends.torch.biases import added, set_biases
from cipm_ir.backends.torch.emit import Emitted
from cipm_ir.backends.torch.emitter import graph_module
from cipm_ir.backends.torch.state import as_torch, named_tensors, with_tensors
from cipm_ir.backends.torch.written import check_exported, check_onnx, check_plan, check_written_model
from cipm_ir.errors import CipmError, InputError, OutputError, UnsupportedError
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.inputs.generate import random_inputs, true_inputs
from cipm_ir.runtime.quiet import quiet
from cipm_ir.runtime.torch_modes import evaluating
from cipm_ir.version import __version__

PLAN, WEIGHTS = "plan.json", "model.safetensors"
_FORMAT = 1
_SIZES = ((2, 8), (2, 32), (2, 224), (1, 8), (1, 32), (1, 224))
"""Of unknown first axes and of the others, tried in this order; torch.export takes a size of 1 as fixed."""


def write(capture: Capture, emitted: Emitted, path: str) -> None:
    """Write an emitted program as it computes in evaluation, whole or not at all; its name says how (`torch_form`).

    What was written is read back and compared with the object before it gets its name
    (`cipm_ir.backends.torch.written`).

    Raises:
        OutputError: the file cannot be written.
        UnsupportedError: a plan of what is not a module of the caller's class; a program that torch cannot export.
    """
    form = torch_form(path)
    check_target(path, folder=form == "plan")
    if form == "plan":
        write_plan(capture, emitted, path)
    elif form == "onnx":
        with quiet():
            save_onnx(to_onnx(capture, emitted), path, check=lambda file: check_onnx(capture, emitted, file, path))
    else:
        made = emitted.object
        if emitted.form != "exported":
            args, kwargs = _example(capture)
            with evaluating(made):
                made = _export(made, args, kwargs, capture.dynamic_shapes)
        _save_exported(made, path, lambda file: check_exported(capture, emitted, made, file, path))


def write_exported(model: ir.Model, path: str) -> None:
    """Write an ONNX model as ``.pt2``: as a GraphModule, exported with the dynamic sizes of its inputs.

    Raises:
        OutputError: the file cannot be written.
        UnsupportedError: an operator has no counterpart in torch, or inputs cannot be drawn.
    """
    check_target(path)
    module = graph_module(model)
    inputs = true_inputs(model)
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, d in enumerate(v.shape or ()) if not isinstance(d, int)} for v in inputs
    )
    args = _runnable_inputs(module, model)
    made = _export(module, args, {}, dynamic if any(dynamic) else None)
    _save_exported(made, path, lambda file: check_written_model(model, module, args, file, path))


def _runnable_inputs(module: nn.Module, model: ir.Model) -> tuple[torch.Tensor, ...]:
    """Random inputs of sizes that the model runs with."""
    reason = ""
    for batch, free in _SIZES:
        feeds = random_inputs(model, np.random.default_rng(0), batch=batch, free_size=free)
        args = tuple(as_torch(ir.tensor(x)) for x in feeds.values())
        try:
            with torch.no_grad():
                module(*args)
            return args
        except Exception as error:  # any operation of torch
            reason = reason or _first_line(error)
    raise UnsupportedError(f"The model does not run in torch with random inputs: {reason}.")


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Any:
    try:
        with quiet():
            return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # runs the user's code on tensors without numbers: anything can happen
        raise UnsupportedError(f"torch.export does not take the program: {_first_line(error)}.") from error


def _save_exported(program: Any, path: str, check: Callable[[str], None]) -> None:
    """Write beside, check, and rename."""
    target = os.path.abspath(path)
    beside = f"{target}.{secrets.token_hex(4)}.pt2"
    try:
        with quiet():
            torch.export.save(program, beside)
            check(beside)
        os.replace(beside, target)
    except CipmError:
        raise
    except Exception as error:  # torch's serialization knows no error of its own
        raise OutputError(f"{path!r} was not written: {_first_line(error)}; nothing was left behind.") from error
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def _example(capture: Capture) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if capture.args is None:
        raise UnsupportedError("Writing this needs example inputs; give example_inputs=(x,).")
    return capture.args


def _first_line(error: BaseException) -> str:
    """Return what went wrong first, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# ---------------------------------------------------------------- ONNX
def to_onnx(capture: Capture, emitted: Emitted) -> ir.Model:
    """Return the program through torch's own exporter, in evaluation mode.

    Every tensor of the `state_dict` is an initializer of its name, with its values; names that share a tensor are one.

    Raises:
        UnsupportedError: torch does not export it.
    """
    program = emitted.object
    try:
        if emitted.form == "exported":
            made, state = (
                torch.onnx.export(program, dynamo=True, verbose=False, optimize=False),
                dict(program.state_dict),
            )
        else:
            args, kwargs = _example(capture)
            made, state = _exported_module(program, args, kwargs, capture.dynamic_shapes), program.state_dict()
    except CipmError:
        raise
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"torch.onnx.export needs {error.name}: pip install {error.name}.") from error
    except Exception as error:  # torch and its exporter raise errors of many kinds
        raise UnsupportedError(f"torch.onnx.export does not take the program: {_first_line(error)}.") from error
    if made is None:
        raise OutputError("torch.onnx.export gave nothing back.")
    model: ir.Model = made.model
    _fold(model, state)
    return model


def _exported_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Any:
    with evaluating(module):
        return torch.onnx.export(
            module, args, kwargs=kwargs, dynamo=True, verbose=False, optimize=False, dynamic_shapes=dynamic
        )


def _fold(model: ir.Model, state: Mapping[str, torch.Tensor]) -> None:
    """Compute what depends on no input, but keep every tensor of the state as it is.

    The exporter's own optimizer would transpose weights, and fold batch normalizations into them under their names.
    """
    from onnxscript.optimizer import fold_constants_ir

    fold_constants_ir(
        model, should_fold=lambda node: False if any(v and v.name in state for v in node.inputs) else None
    )
    RemoveUnusedNodesPass()(model)


# ---------------------------------------------------------------- plans
def write_plan(capture: Capture, emitted: Emitted, path: str) -> None:
    """Write ``plan.json`` and ``model.safetensors`` into the folder ``path``, both or none."""
    save_file = _safetensors().save_file
    if emitted.form != "module":
        why = f": {emitted.reason}" if emitted.reason else ""
        kind = "an ExportedProgram" if emitted.form == "exported" else "a GraphModule"
        raise UnsupportedError(
            f"A plan is for a module that keeps its class, but this program comes out as {kind}{why}; "
            "save it as .pt2 or .onnx."
        )
    tensors, ties = _unique(emitted.object)
    plan = {
        "format": _FORMAT,
        "cipm_ir": __version__,
        "class": _class_name(capture.source),
        "original": _shapes(capture.source),
        "attributes": emitted.attributes,
        "tied": ties,
        "added": list(added(emitted.object, capture.source)),
    }
    target = Path(os.path.abspath(path))
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        beside.mkdir()
        (beside / PLAN).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, str(beside / WEIGHTS))
        shutil.copymode(beside / PLAN, beside / WEIGHTS)  # safetensors writes for the owner alone
        check_plan(capture, emitted, apply_plan(capture.source, beside), path)
        _put(beside, target)
    except OutputError:
        raise
    except Exception as error:  # safetensors raises errors of its own
        raise OutputError(f"{path!r} was not written: {_first_line(error)}; nothing was left behind.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put(beside: Path, target: Path) -> None:
    """Move a finished plan to its place; where there is a folder, only its two files are replaced, both or none."""
    if not target.exists():
        os.rename(beside, target)
        return
    names, old = (WEIGHTS, PLAN), beside / "old"
    old.mkdir()
    placed: list[str] = []
    try:
        for name in names:
            if (target / name).exists():
                os.rename(target / name, old / name)
        for name in names:
            os.rename(beside / name, target / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            (target / name).unlink()
        for name in names:
            if (old / name).exists():
                os.rename(old / name, target / name)
        raise


def apply_plan(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Return a copy of a module, changed as a saved plan says.

    Args:
        module: of the class that the plan was made from, with the original sizes; its weights do not matter.
        path: the folder that ``Result.save`` wrote.

    Raises:
        InputError: there is no plan, or where it is one for another model.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"A plan is applied to a torch module, not to {type(module).__name__}.")
    plan, tensors = _read_plan(os.fspath(path))
    own = _shapes(module)
    if own != plan["original"]:
        name = next(n for n in {**plan["original"], **own} if own.get(n) != plan["original"].get(n))
        raise InputError(
            f"The plan is for another model: {name!r} has shape {own.get(name, 'none')} here and "
            f"{plan['original'].get(name, 'none')} in the {plan['class']} that it was made from."
        )
    if any(t.is_meta for _, t in named_tensors(module)):
        raise InputError("The module is on the meta device, which holds no numbers; build it on a real one.")
    made = with_tensors(module, tensors)
    try:
        set_biases(made, [(name, tensors[name]) for name in plan.get("added", ())])
        apply_attributes(
            made, {p: {k: _restored(v) for k, v in held.items()} for p, held in plan["attributes"].items()}
        )
    except AttributeError as error:
        raise InputError(f"The plan is for another model ({plan['class']}): {_first_line(error)}.") from error
    return made


def _read_plan(path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the plan, and its tensors by name; names that share a tensor have the same one."""
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"There is no folder {path!r}.")
    load_file = _safetensors().load_file
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        tensors: dict[str, torch.Tensor] = load_file(str(folder / WEIGHTS))
    except Exception as error:  # safetensors raises errors of its own
        raise InputError(f"{path!r} holds no plan that can be read: {_first_line(error)}.") from error
    if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
        raise InputError(f"{path!r} holds a plan of a format that this version does not know.")
    if not all(isinstance(plan.get(key), dict) for key in ("original", "attributes", "tied")) or not plan.get("class"):
        raise InputError(f"{path!r} holds a plan that is damaged: parts of it are missing.")
    tied = {name: tensors.get(first) for name, first in plan["tied"].items()}
    tensors.update({name: t for name, t in tied.items() if t is not None})
    odd = sorted(set(tensors) ^ {*plan["original"], *plan.get("added", ())})
    if odd:
        raise InputError(f"{path!r} is damaged: its plan and its weights do not belong together ({odd[0]!r}).")
    return plan, tensors


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UnsupportedError(
            'A plan needs safetensors, which is not installed: pip install "cipm-ir[torch]".'
        ) from error
    return safetensors.torch


def _restored(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in named_tensors(module)}


def _unique(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return tensors by name, without those that are another one (name to the name of that)."""
    seen: dict[Any, str] = {}
    tensors, ties = {}, {}
    for name, t in named_tensors(module):
        storage = t.untyped_storage()
        where = (storage._cdata, t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)
        if seen.setdefault(where, name) != name:
            ties[name] = seen[where]
        else:
            alone = storage.nbytes() == t.nbytes and t.is_contiguous()
            tensors[name] = t.detach() if alone else t.detach().clone(memory_format=torch.contiguous_format)
    return tensors, ties
