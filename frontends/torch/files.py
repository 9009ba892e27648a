"""Torch programs named on the command line: a saved ExportedProgram, or a function that builds a module."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from cipm_ir.errors import InputError


def read_exported(path: str) -> Any:
    """Return the `torch.export.ExportedProgram` that a .pt2 file holds.

    Raises:
        InputError: there is no such file, or it holds no exported program.
    """
    if not os.path.isfile(path):
        raise InputError(f"There is no file {path!r}.")
    try:
        return torch.export.load(path)
    except Exception as error:  # a damaged archive fails in many ways
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path!r} is not a program saved by torch.export.save: {text}.") from error


def build(spec: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Call ``module:function`` (or ``file.py:function``), which gives a program, or (module, args) or with kwargs too.

    Raises:
        InputError: the message names what is missing, or what the function raised.
    """
    where, _, name = spec.rpartition(":")
    module = _imported(where)
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{where!r} has no function {name!r}.")
    try:
        made = function()
    except Exception as error:  # the user's code
        raise InputError(f"{spec!r} failed: {type(error).__name__}: {error}") from error
    program, *rest = made if isinstance(made, tuple) and made else (made,)
    args = rest[0] if rest else ()
    kwargs = rest[1] if len(rest) > 1 else {}
    args = (args,) if isinstance(args, torch.Tensor) else args
    if not isinstance(args, tuple | list) or not isinstance(kwargs, dict) or len(rest) > 2:
        raise InputError(f"{spec!r} must give a program, (module, args) or (module, args, kwargs).")
    if not isinstance(program, nn.Module | torch.export.ExportedProgram):
        raise InputError(f"{spec!r} gives a {type(program).__name__}, not a torch program.")
    return program, tuple(args), kwargs


def _imported(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise InputError(f"There is no file {where!r}.")
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(path.stem, module)
            spec.loader.exec_module(module)
            return module
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:  # the user's code
        raise InputError(f"{where!r} cannot be imported: {type(error).__name__}: {error}") from error
