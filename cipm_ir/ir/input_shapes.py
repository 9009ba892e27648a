"""Sizes that the user gives for dynamic dimensions of the inputs: suggested for the analysis, or fixed in the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.parameters import free_inputs
from cipm_ir.ir.shapes import SUGGESTED, own_name

Sizes: TypeAlias = tuple[int | None, ...]
InputShapes: TypeAlias = Mapping[str, Sequence[int | None]] | Sequence[int | None]
"""Sizes by the name of the input, None where one stays open; of a model with one input also its sizes alone."""


def note_input_shapes(graph: ir.Graph, shapes: InputShapes) -> None:
    """Note sizes on the inputs, for analysis, costs and verification; the declared shapes stay as they are.

    Raises:
        InputError: an unknown input, another number of axes, or sizes that contradict the file or each other.
    """
    wanted = _checked(graph, shapes)
    symbols = _symbols(graph, wanted)
    for value in free_inputs(graph):
        sizes = wanted.get(value.name or "")
        if value.shape is None:
            found = sizes
        else:
            own: Sizes = sizes or (None,) * len(value.shape)
            found = tuple(
                n if isinstance(d, int) or d.value is None else symbols.get(d.value)
                for d, n in zip(value.shape, own, strict=True)
            )
        if found is not None and any(n is not None for n in found):
            value.meta[SUGGESTED] = found


def fix_input_shapes(graph: ir.Graph) -> None:
    """Declare the sizes that were noted, and put them wherever the graph has their symbols."""
    symbols: dict[str, int] = {}
    for value in free_inputs(graph):
        sizes: Sizes | None = value.meta.get(SUGGESTED)
        if sizes is None:
            continue
        if value.shape is None:
            value.shape = ir.Shape(sizes)
            continue
        symbols |= {
            d.value: n
            for d, n in zip(value.shape, sizes, strict=True)
            if n is not None and not isinstance(d, int) and d.value
        }
        value.shape = ir.Shape([d if n is None else n for d, n in zip(value.shape, sizes, strict=True)])
    for value in _values(graph):
        if value.shape is not None and any(not isinstance(d, int) and d.value in symbols for d in value.shape):
            value.shape = ir.Shape([d if isinstance(d, int) else symbols.get(d.value or "", d) for d in value.shape])


def noted_sizes(graph: ir.Graph) -> dict[str, int]:
    """Return the sizes that were noted, by symbol; by ``x[2]`` where an axis of input x has none."""
    found: dict[str, int] = {}
    for value in free_inputs(graph):
        for axis, (d, n) in enumerate(zip(value.shape or (), value.meta.get(SUGGESTED) or (), strict=False)):
            if n is not None and not isinstance(d, int):
                found[d.value or own_name(value.name or "", axis)] = n
    return found


def _checked(graph: ir.Graph, shapes: InputShapes) -> dict[str, Sizes]:
    inputs = {value.name or "": value for value in free_inputs(graph)}
    names = ", ".join(map(repr, inputs)) or "none"
    if not isinstance(shapes, Mapping):
        if len(inputs) != 1:
            raise InputError(f"The input shape {_text(shapes)} needs the name of an input; the model has {names}.")
        shapes = {next(iter(inputs)): shapes}
    found: dict[str, Sizes] = {}
    for name, given in shapes.items():
        if name not in inputs:
            raise InputError(f"The model has no input {name!r} to give a shape; its inputs: {names}.")
        declared = inputs[name].shape
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise InputError(f"The shape of input {name!r} must be a tuple of sizes, not {given!r}.")
        sizes = tuple(given)
        for axis, n in enumerate(sizes):
            if n is not None and (isinstance(n, bool) or not hasattr(n, "__index__") or int(n) < 1):
                raise InputError(
                    f"The size of input {name!r} along axis {axis} must be a whole number above 0, not {n!r}; "
                    "None (on the command line ?) leaves it open."
                )
        sizes = tuple(None if n is None else int(n) for n in sizes)
        if declared is not None and len(declared) != len(sizes):
            raise InputError(
                f"Input {name!r} has {len(declared)} axes, {declared}, but the shape given, {_text(sizes)}, has "
                f"{len(sizes)}; give one size for each axis."
            )
        for axis, (d, n) in enumerate(zip(declared or (), sizes, strict=False)):
            if isinstance(d, int) and n not in (None, d):
                raise InputError(
                    f"Input {name!r} has the fixed size {d} along axis {axis}, but the shape given says {n}; give {d}."
                )
        found[name] = sizes
    return found


def _symbols(graph: ir.Graph, wanted: Mapping[str, Sizes]) -> dict[str, int]:
    symbols: dict[str, tuple[int, str]] = {}
    for value in free_inputs(graph):
        for axis, (d, n) in enumerate(zip(value.shape or (), wanted.get(value.name or "", ()), strict=False)):
            if n is None or isinstance(d, int) or d.value is None:
                continue
            where = f"axis {axis} of input {value.name!r}"
            before, place = symbols.setdefault(d.value, (n, where))
            if before != n:
                raise InputError(
                    f"The shapes given say {before} for {place} and {n} for {where}, but the file calls both "
                    f"{d.value!r}; give them one size."
                )
    return {name: n for name, (n, _) in symbols.items()}


def _values(graph: ir.Graph) -> list[ir.Value]:
    found = [*graph.inputs, *graph.outputs]
    for node in graph:
        found += node.outputs
        for inner in subgraphs(node):
            found += _values(inner)
    return found


def _text(sizes: Iterable[int | None]) -> str:
    return "x".join("?" if n is None else str(n) for n in sizes)
