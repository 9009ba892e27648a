"""Inputs that choose between branches: values and sizes with which bodies run that no other input enters.

An integer or a flag that an If depends on (a mode, a sampling rate) takes the values around the constants that it is
compared with. Where a model does not run with such a value at the sizes of an input that it accepts, other sizes are
tried, and so they are for a branch that depends on sizes alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError
from cipm_ir.ir.lifted import held_weights
from cipm_ir.ir.shapes import dynamic_sizes
from cipm_ir.runtime.graphs import all_graphs
from cipm_ir.runtime.inputs.generate import Array, Feeds, random_inputs_like, true_inputs
from cipm_ir.runtime.session import Backend
from cipm_ir.runtime.verification.branches import EntryCounter, has_bodies
from cipm_ir.runtime.verification.cases import RECIPES, tried
from cipm_ir.runtime.verification.compare import Case, Outputs

__all__ = ["mode_cases", "mode_values", "varied"]

Undo = Callable[[float], float | None]
"""Gives the value of an input at which a value computed from it is a number; None where there is none."""

_COMPARISONS = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
_SAME = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Gather", "Slice", "Expand", "Not"}
_SAME |= {"ReduceMax", "ReduceMin", "Abs", "Concat"}
_VALUES = 8
"""So many values of one input at most."""
_COMBINATIONS, _SIZES = 64, 48
_SECONDS = 5.0
_LENGTHS = (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024)
_SHARES = (1 / 2, 2, 1 / 4, 4, 1 / 3, 3)
_RECIPES = (RECIPES[0], RECIPES[3], RECIPES[5])
_SMALL = 16
"""Inputs with more entries are data, not a choice."""


def mode_cases(
    model: ir.Model,
    run: Callable[[Feeds], Outputs],
    bases: Sequence[Case],
    rng: np.random.Generator,
    backend: Backend | None,
) -> list[Case]:
    """Return further cases that enter bodies of a model, without functions, which none of the cases so far enters.

    Args:
        model: the model; with bodies, or there is nothing to find.
        run: runs it.
        bases: cases that it runs with.
        rng: for more inputs of the sizes that were found.
        backend: what runs it.
    """
    if not has_bodies(model):
        return []
    try:
        with EntryCounter(model, backend) as count:
            search = _Search(model, count, [case.feeds for case in bases])
            found = search.found()
    except CipmError:  # the model with its counters does not run
        return []
    made: list[Case] = []
    for label, feeds in found:
        made += tried(label, feeds, run)
        for recipe in _RECIPES:
            drawn = random_inputs_like(model, feeds, rng, recipe)
            drawn |= {name: x for name, x in feeds.items() if x.dtype.kind in "iub"}
            made += tried(f"{label}, {recipe.name}", drawn, run)
    return made


def varied(feeds: Feeds) -> bool:
    """Return whether some floating-point input has different entries."""
    return any(x.dtype.kind not in "iub" and x.size > 1 and bool((x != x.flat[0]).any()) for x in feeds.values())


class _Search:
    """Looks for inputs that enter bodies which were not entered, within a limit of time."""

    def __init__(self, model: ir.Model, count: EntryCounter, bases: Sequence[Feeds]) -> None:
        self._model, self._count = model, count
        self._deadline = time.monotonic() + _SECONDS
        usable = [feeds for feeds in bases if varied(feeds)] or list(bases)
        self._bases: list[Feeds] = []
        self._missing = set(count.paths)
        for feeds in usable:
            new = self._entered(feeds)
            if new or not self._bases:
                self._bases.append(feeds)
        self._groups = [
            [(value.name or "", axis) for value, axis in places] for places in dynamic_sizes(model.graph).values()
        ]
        weights = (tensor for graph in all_graphs(model) for tensor in _tensors(graph))
        self._widths = sorted({n for tensor in weights for n in tensor.shape.numpy() if n <= max(_LENGTHS)})

    def found(self) -> list[tuple[str, Feeds]]:
        """Return inputs with a label each, values of modes first, then sizes."""
        made: list[tuple[str, Feeds]] = []
        values = mode_values(self._model) if self._missing else {}
        good: list[Mapping[str, tuple[int, ...]]] = []
        for label, changed in self._combinations(values):
            for feeds in itertools.chain([changed], (s for _, s in self._sizes(changed, good))):
                if not self._missing or time.monotonic() > self._deadline:
                    return made
                new = self._entered(feeds)
                if new is None:
                    continue
                if new:
                    made.append((label, feeds))
                if feeds is not changed:
                    good.insert(0, {name: x.shape for name, x in feeds.items()})
                break
        for base in [*self._bases, *(feeds for _, feeds in made)]:
            for label, feeds in self._sizes(base, good):
                if not self._missing or time.monotonic() > self._deadline:
                    return made
                if self._entered(feeds):
                    made.append((label, feeds))
        return made

    def _entered(self, feeds: Feeds) -> set[str] | None:
        """Bodies that are entered for the first time; None where the model does not run."""
        try:
            entered = {path for path, times in self._count(feeds).items() if times}
        except InputError:
            return None
        new = entered & self._missing
        self._missing -= new
        return new

    def _combinations(self, values: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, Feeds]]:
        """Yield inputs with other values for modes, few changes first."""
        for base in self._bases:
            options = [(name, [None, *given]) for name, given in values.items() if name in base]
            choices = itertools.islice(itertools.product(*(given for _, given in options)), 16 * _COMBINATIONS)
            ordered = sorted(choices, key=lambda choice: sum(one is not None for one in choice))
            for choice in ordered[1 : _COMBINATIONS + 1]:
                taken = {name: one for (name, _), one in zip(options, choice, strict=True) if one is not None}
                changed = {name: np.full_like(base[name], one) for name, one in taken.items()}
                label = ", ".join(f"{name} = {base[name].dtype.type(one)}" for name, one in taken.items())
                yield label, base | changed

    def _sizes(self, base: Feeds, good: Sequence[Mapping[str, tuple[int, ...]]]) -> Iterator[tuple[str, Feeds]]:
        """Yield the same input at other sizes: at those that were found to run, then with one open size changed."""
        for shapes in good:
            made = {name: _fitted(x, shapes[name]) for name, x in base.items()}
            yield _sizes_in_words(made), made
        yielded = 0
        for group in sorted(self._groups, key=lambda places: all(axis == 0 for _, axis in places)):
            size = next((base[name].shape[axis] for name, axis in group if name in base), 0)
            if not size:
                continue
            for other in dict.fromkeys([*(int(size * share) for share in _SHARES), *_LENGTHS, *self._widths]):
                if other in (0, size) or yielded >= _SIZES:
                    continue
                yielded += 1
                made = dict(base)
                for name, axis in group:
                    if name in made:
                        shape = made[name].shape
                        made[name] = _fitted(made[name], (*shape[:axis], other, *shape[axis + 1 :]))
                yield _sizes_in_words(made), made


def _tensors(graph: ir.Graph) -> Iterator[ir.TensorProtocol]:
    """Yield the weights that a graph holds in initializers and Constant nodes."""
    yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
    yield from (tensor for _, tensor in held_weights(graph))


def _sizes_in_words(feeds: Feeds) -> str:
    return "sizes " + ", ".join("x".join(map(str, x.shape)) for x in feeds.values() if x.ndim)


def _fitted(array: Array, shape: tuple[int, ...]) -> Array:
    """Return an array cut, or repeated, to a shape of the same rank."""
    for axis, size in enumerate(shape):
        if size != array.shape[axis]:
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
    return array


def mode_values(model: ir.Model) -> dict[str, list[float]]:
    """Return, for each integer or boolean input that an If depends on, values that may take other branches.

    They are the constants that it is compared with on the way, one less and one more, as far as what lies between the
    input and the comparison can be undone.
    """
    deciding = _deciding(model.graph)
    made: dict[str, list[float]] = {}
    for value in true_inputs(model):
        if value.dtype is None or not (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL):
            continue
        if value.shape is not None and math.prod(d for d in value.shape if isinstance(d, int)) > _SMALL:
            continue
        found = dict.fromkeys(_values(value, lambda number: number, deciding, set()))
        kept = [one for one in found if _fits(one, value.dtype)]
        if kept:
            made[value.name or ""] = kept[:_VALUES]
    return made


def _deciding(graph: ir.Graph) -> set[ir.Value]:
    """Return values that the condition of an If is computed from."""
    found: set[ir.Value] = set()
    stack = [node.inputs[0] for node in graph.all_nodes() if node.op_type == "If" and not node.domain]
    while stack:
        value = stack.pop()
        if value is None or value in found:
            continue
        found.add(value)
        maker = value.producer()
        if maker is not None:
            stack.extend(maker.inputs)
    return found


def _values(value: ir.Value, undo: Undo, deciding: set[ir.Value], seen: set[ir.Value]) -> Iterator[float]:
    if value in seen:
        return
    seen.add(value)
    for node, index in value.uses():
        if node.op_type == "If" and index == 0:
            yield from _undone(undo, (0, 1))
        if not any(out in deciding for out in node.outputs):
            continue
        if node.op_type in _COMPARISONS:
            other = _number(node.inputs[1 - index])
            for found in _undone(undo, () if other is None else (other,)):
                yield from (found, math.floor(found) + 1, math.ceil(found) - 1)
        elif node.op_type in ("And", "Or", "Xor"):
            yield from _undone(undo, (0, 1))
        elif node.op_type in _SAME:
            yield from _values(node.outputs[0], undo, deciding, seen)
        elif (inner := _through(node, index, undo)) is not None:
            yield from _values(node.outputs[0], inner, deciding, seen)


def _undone(undo: Undo, numbers: Sequence[float]) -> Iterator[float]:
    yield from (found for number in numbers if (found := undo(number)) is not None)


def _through(node: ir.Node, index: int, undo: Undo) -> Undo | None:
    """Return how to undo an operation with a constant, and what came before it."""
    op = node.op_type
    if op == "Neg":
        return lambda number: undo(-number)
    if len(node.inputs) != 2 or (other := _number(node.inputs[1 - index])) is None:
        return None
    by = other
    if op == "Add":
        return lambda number: undo(number - by)
    if op == "Sub":
        return (lambda number: undo(number + by)) if index == 0 else (lambda number: undo(by - number))
    if op == "Mul" and by:
        return lambda number: undo(number / by)
    if op == "Div" and index == 0:
        return lambda number: undo(number * by)
    if op == "Mod" and index == 0:
        return lambda number: undo(number % by if by else number)
    return None


def _number(value: ir.Value | None) -> float | None:
    """Return the number that a constant is; None for other values and constants of several numbers."""
    while value is not None and (maker := value.producer()) is not None and maker.op_type in _SAME:
        value = maker.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return float(tensor.numpy().reshape(-1)[0])


def _fits(number: float, dtype: ir.DataType) -> bool:
    if dtype == ir.DataType.BOOL:
        return number in (0, 1)
    limits = np.iinfo(dtype.numpy())
    return number == int(number) and limits.min <= number <= limits.max
