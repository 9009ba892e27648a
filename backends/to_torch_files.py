"""Torch programs on disk: ``.onnx``, ``.pt2``, or a plan (JSON and safetensors) that a module of the class takes up."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from cipm_ir.backends.to_onnx import save_onnx
from cipm_ir.backends.to_torch import Emitted
from cipm_ir.backends.to_torch_attributes import apply_attributes
from cipm_ir.backends.to_torch_state import with_tensors
from cipm_ir.errors import InputError, OutputError, UnsupportedError
from cipm_ir.ir.capture import Capture
from cipm_ir.version import __version__

PLAN, WEIGHTS = "plan.json", "model.safetensors"
_FORMAT = 1


def write(capture: Capture, emitted: Emitted, path: str) -> None:
    """Write an emitted program, whole or not at all; the suffix says how.

    Errors: `OutputError`, `UnsupportedError` (a plan of what is not a module of the caller's class).
    """
    suffix = Path(path).suffix
    if suffix == ".onnx":
        save_onnx(to_onnx(capture, emitted), path)
    elif suffix == ".pt2":
        program = emitted.object if emitted.form == "exported" else _exported(capture, emitted.object)
        _replacing(path, lambda beside: torch.export.save(program, beside), suffix)
    elif suffix in ("", ".d"):
        write_plan(capture, emitted, path)
    else:
        raise OutputError(
            f"{path!r}: a torch program is written as .onnx, as .pt2 (torch.export), or as a folder (plan and weights)."
        )


def _replacing(path: str, save: Callable[[str], Any], suffix: str) -> None:
    """Write beside and rename."""
    target = os.path.abspath(path)
    beside = f"{target}.{secrets.token_hex(4)}{suffix}"
    try:
        save(beside)
        os.replace(beside, target)
    except OSError as error:
        raise OutputError(f"{path!r} cannot be written: {error.strerror or error}.") from error
    finally:
        if os.path.exists(beside):
            os.remove(beside)


def _example(capture: Capture) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if capture.args is None:
        raise UnsupportedError("Writing this needs example inputs; give example_inputs=(x,).")
    return capture.args


def _exported(capture: Capture, module: nn.Module) -> Any:
    args, kwargs = _example(capture)
    return torch.export.export(module, args, kwargs, dynamic_shapes=capture.dynamic_shapes, strict=False)


# ---------------------------------------------------------------- ONNX
def to_onnx(capture: Capture, emitted: Emitted) -> ir.Model:
    """The program through torch's own exporter, in evaluation mode, its initializers under their `state_dict` names.

    The exporter stores the weights of linear layers transposed under names of its own; these are given back the names
    of the tensors that they equal.
    """
    args, kwargs = _example(capture)
    program = emitted.object
    if emitted.form == "exported":
        made = torch.onnx.export(program, dynamo=True, verbose=False)
        state = dict(program.state_dict)
    else:
        modes = {m: m.training for m in program.modules()}
        try:
            program.eval()
            made = torch.onnx.export(
                program, args, kwargs=kwargs, dynamo=True, verbose=False, dynamic_shapes=capture.dynamic_shapes
            )
        finally:
            for m, mode in modes.items():
                m.training = mode
        state = program.state_dict()
    if made is None:
        raise OutputError("torch.onnx.export gave nothing back.")
    model: ir.Model = made.model
    _recover_names(model, state)
    return model


def _recover_names(model: ir.Model, state: dict[str, torch.Tensor]) -> None:
    """Rename initializers that are the transpose of a tensor of the state, value for value."""
    waiting = {name: t for name, t in state.items() if name not in model.graph.initializers and t.ndim == 2}
    table = {(tuple(t.t().shape), _digest(t.detach().t().contiguous().cpu())): name for name, t in waiting.items()}
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        if value.name in state or tensor is None or len(tensor.shape) != 2:
            continue
        name = table.pop((tuple(tensor.shape.numpy()), _digest_array(tensor.numpy())), None)
        if name is not None:
            model.graph.initializers.pop(value.name or "")
            value.name = name
            model.graph.register_initializer(value)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest()


def _digest_array(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# ---------------------------------------------------------------- plans
def write_plan(capture: Capture, emitted: Emitted, path: str) -> None:
    """Write ``plan.json`` and ``model.safetensors`` into the folder ``path``."""
    from safetensors.torch import save_file

    if emitted.form != "module":
        why = f": {emitted.reason}" if emitted.reason else ""
        raise UnsupportedError(
            f"A plan is for a module that keeps its class, but this program came out as {emitted.form}{why}; "
            "save it as .pt2 or .onnx."
        )
    module = emitted.object
    tensors, ties = _unique(module)
    plan = {
        "format": _FORMAT,
        "cipm_ir": __version__,
        "class": _class_name(capture.source),
        "original": {name: list(t.shape) for name, t in _named_tensors(capture.source)},
        "attributes": emitted.attributes,
        "tied": ties,
    }
    text = json.dumps(plan, indent=1, default=_plain)
    target = Path(os.path.abspath(path))
    beside = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
    if target.is_file():
        raise OutputError(f"{path!r} is a file; a plan is written into a folder.")
    try:
        beside.mkdir()
        (beside / PLAN).write_text(text + "\n")
        save_file(tensors, str(beside / WEIGHTS))
        target.mkdir(exist_ok=True)
        for name in (WEIGHTS, PLAN):
            os.replace(beside / name, target / name)
    except OSError as error:
        raise OutputError(f"{path!r} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def apply_plan(module: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A copy of a module, changed as a saved plan says.

    Args:
        module: of the class that the plan was made from, with the original sizes; its weights do not matter.
        path: the folder that ``Result.save`` wrote.

    Errors: `InputError` where there is no plan, or where it is one for another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(path)
    try:
        plan = json.loads((folder / PLAN).read_text())
        tensors = load_file(str(folder / WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{os.fspath(path)!r} holds no plan that can be read: {error}.") from error
    if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
        raise InputError(f"{os.fspath(path)!r} holds a plan of a format that this version does not know.")
    if not isinstance(module, nn.Module):
        raise InputError(f"A plan is applied to a torch module, not to {type(module).__name__}.")
    own = {name: list(t.shape) for name, t in _named_tensors(module)}
    if own != plan["original"]:
        name = next(n for n in {**plan["original"], **own} if own.get(n) != plan["original"].get(n))
        raise InputError(
            f"The plan is for another model: {name!r} has shape {own.get(name, 'none')} here and "
            f"{plan['original'].get(name, 'none')} in the model ({plan['class']}) that it was made from."
        )
    tensors.update({name: tensors[first] for name, first in plan["tied"].items()})
    made = with_tensors(module, tensors)
    apply_attributes(made, {p: {k: _restored(v) for k, v in own.items()} for p, own in plan["attributes"].items()})
    return made


def _restored(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Size | tuple):
        return list(value)
    return int(value)


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _unique(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, without those that are another one (name to the name of that)."""
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    tensors, ties = {}, {}
    for name, t in _named_tensors(module):
        where = (t.untyped_storage()._cdata, tuple(t.shape))
        if seen.setdefault(where, name) != name:
            ties[name] = seen[where]
        else:
            tensors[name] = t.detach().contiguous()
    return tensors, ties
