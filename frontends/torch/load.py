"""The torch frontend: `nn.Module`, `torch.fx.GraphModule` and `torch.export.ExportedProgram` to the IR."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from cipm_ir.errors import CipmError, InputError, OptionError, UnsupportedError
from cipm_ir.frontends.torch.capture import METHODS, Traced, from_exported, from_graph_module, from_module
from cipm_ir.frontends.torch.lowering import Lowerer
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.quiet import quiet
from cipm_ir.runtime.torch_modes import evaluating, unchanged


def load_torch(
    source: Any,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    method: str = "auto",
) -> Capture:
    """Lower a torch program as it computes in evaluation mode; it is never changed.

    Args:
        source: an `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        example_inputs: the positional arguments, a tuple (one tensor may stand alone); only shapes and types matter.
        example_kwargs: the keyword arguments.
        dynamic_shapes: as in `torch.export.export`; sizes that it does not name are taken as fixed.
        method: for an `nn.Module`: "symbolic" (`torch.fx` tracing), "export", or "auto": the first where it works.

    Raises:
        InputError: example inputs are missing or do not fit, or weights hold no numbers.
        UnsupportedError: no graph can be made, or weights are sparse or quantized.
        OptionError: the method is unknown.
    """
    if method not in METHODS:
        raise OptionError(f"There is no method {method!r}; use one of {', '.join(METHODS)}.")
    with evaluating(source):
        return _load(source, _as_args(example_inputs), _in_order(source, example_kwargs), dynamic_shapes, method)


def _load(source: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, method: str) -> Capture:
    if isinstance(source, torch.export.ExportedProgram):
        traced, kind = from_exported(source), "exported"
        args, kwargs = source.example_inputs or (args, kwargs)
    elif isinstance(source, fx.GraphModule):
        traced, kind = from_graph_module(source, args, kwargs), "graph"
    elif isinstance(source, nn.Module):
        if not args and not kwargs:
            raise InputError(
                f"{type(source).__name__} is a torch module: give example_inputs=(x,) as its forward takes them."
            )
        traced, kind = from_module(source, args, kwargs, dynamic_shapes, method), "module"
    else:
        raise UnsupportedError(f"A {type(source).__name__} is not a torch program that can be read.")
    given = (args, kwargs) if args or kwargs else None
    lowerer = Lowerer(traced, source, kind, given, dynamic_shapes)
    capture = lowerer.run()
    if lowerer.refused_writes and kind != "graph":
        capture = _functional(traced, source, kind, given, dynamic_shapes, method) or capture

    def read_again(made: Any) -> Capture:
        again = capture.method if kind == "module" and isinstance(made, nn.Module) else "auto"
        with quiet(), unchanged(made):
            return load_torch(made, args, kwargs, dynamic_shapes, again)

    capture.read_again = read_again
    return capture


def _functional(traced: Traced, source: Any, kind: Any, given: Any, dynamic: Any, method: str) -> Capture | None:
    """Read a program again whose writes in place cannot be expressed: as an exported one without any.

    None where the caller asked for tracing, or where torch cannot do that.
    """
    if traced.exported is None:
        if method != "auto" or given is None:
            return None
        args, kwargs = given
        try:
            traced = from_module(source, args, kwargs, dynamic, "export")
        except CipmError:
            return None
    notes = [*traced.notes, "writes in place were made explicit (run_decompositions)"]
    try:
        functional = from_exported(traced.exported.run_decompositions({}))
    except Exception:  # torch's own rewriting; what was read before is sound, with less that may move
        return None
    functional.method, functional.notes = traced.method, notes
    return Lowerer(functional, source, kind, given, dynamic).run()


def _in_order(source: Any, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments in the order of the forward's own: that of the inputs of a graph."""
    given = dict(kwargs or {})
    names = inspect.signature(source.forward).parameters if given and isinstance(source, nn.Module) else ()
    return {**{name: given[name] for name in names if name in given}, **given}


def _as_args(example: Any) -> tuple[Any, ...]:
    if example is None:
        return ()
    if isinstance(example, tuple | list):
        return tuple(example)
    return (example,)
