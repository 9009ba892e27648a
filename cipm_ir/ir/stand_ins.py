"""Concrete sizes for the dynamic dimensions of a model, two for each, and the shapes that follow.

What differs between the two choices is dynamic, and nothing that depends on it may be taken for a constant. The sizes
must be ones that the model runs with: where a net halves an image five times and doubles it again, the halves meet what
they came from only at multiples of 32, and windows and Splits ask for multiples, too. Shapes that contradict each other
say that the model does not run: sizes are tried until two have no contradiction, and those with the fewest are kept. A
model may declare a size as dynamic that a constant somewhere fixes (a Reshape to a batch of one). Where shapes
contradict each other at all other sizes tried, that one size is used in both choices (`Shapes.only`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.constants import constant_tensor
from cipm_ir.ir.parameters import free_inputs, parameters
from cipm_ir.ir.places import Constants, Place, cannot_run, place_from
from cipm_ir.ir.shapes import (
    Shape,
    Shapes,
    annotated,
    infer_sized,
    own_name,
    recorded_shape,
    replaceable_values,
    stripped,
    suggestion,
)

_SMALL = ((11, 17, 29, 31, 37, 47, 53, 59), (19, 41, 43, 61, 67, 71, 73, 79), (3, 7, 5, 13), (97, 1009, 1013, 1019))
_IMAGE = ((3, 5, 101, 103), (7, 11, 107, 109), (211, 223), (37, 43))
_LATE = (257, 263, 23, 2003)
"""Primes, which tell dynamic sizes from each other and from all others, for the two choices and two further ones."""
_CONTROLS = ((2, 1, 1), (3, 32, 1))
"""The further choices, small and large, and their multiples: they tell what only looks constant, as min(T, 64)."""
_MULTIPLES = ((32, 1), (19, 1), (128, 1), (32, 16), (128, 480), (6720, 1), (6720, 6720), (128, 26880))
"""What sides of images, and other sizes but the first axis, are multiples of; in the order in which they are tried."""
_SIDES = (48, 224, 32, 64, 256, 96, 128, 28, 16, 8, 4, 384, 320, 640, 512, 299, 6, 10, 12, 14, 20, 24)
"""Sides of images that a model may be made for."""
_HINTS = 12
_EFFORT = 30_000
_FOUND = "cipm:stand_ins"
"""Nodes to look at in the search for sizes that a model is made for."""

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class _Table:
    """Shapes at one choice of sizes.

    Attributes:
        sizes: of the dynamic dimensions, by key.
        shapes: by value.
        wrong: number of nodes that cannot run with these shapes.
        empty: number of nodes whose output has no entries though their inputs have.
    """

    sizes: Sizes
    shapes: dict[str, Shape]
    wrong: int
    empty: int


@dataclass(frozen=True)
class _Found:
    """Sizes that fitted a model, which copies of it take along: suggested ones, both choices, and further ones."""

    given: Mapping[str, int | None]
    first: Sizes
    second: Sizes
    others: Sequence[Sizes]


def infer_shapes(model: ir.Model) -> Shapes:
    """Concrete shapes of the values of the main graph; values that cannot be inferred are absent.

    Raises: `InputError` when ONNX's shape inference finds the model inconsistent.
    """
    replaceable = replaceable_values(model)
    known, types, complete = annotated(model, replaceable)
    if complete:
        return Shapes(known, known, types=types)
    if all(v.shape is not None and v.shape.is_static() for v in free_inputs(model.graph)):
        found = infer_sized(stripped(model, replaceable, recorded=True), lambda *_: 1, types)
        return Shapes(found, found, types=types)
    return _Search(model, stripped(model, replaceable, recorded=False), types).run()


def share_sizes(found: ir.Model, other: ir.Model) -> None:
    """Let the search for the sizes of another form of a model, and of its copies, begin with those that fitted here."""
    if _FOUND in found.graph.meta:
        other.graph.meta[_FOUND] = found.graph.meta[_FOUND]


@dataclass
class _Search:
    """The search for sizes.

    Attributes:
        model: the model.
        proto: what ONNX infers from, see `stripped`.
        types: element types of values.
        tables: of all sizes that were tried.
        error: the first one, where ONNX finds the model inconsistent.
        constants: what was read of tensors.
    """

    model: ir.Model
    proto: onnx.ModelProto
    types: dict[str, ir.DataType]
    tables: list[_Table] = field(default_factory=list)
    error: InputError | None = None
    constants: Constants = field(default_factory=dict)

    def run(self) -> Shapes:
        dims = self._dims()
        again = self._known(dims)
        first, second = again or self._searched(dims)
        others = [t for t in self.tables if t is not first and t is not second and not t.wrong]
        given = {key: dim.given for key, dim in dims.items()}
        self.model.graph.meta[_FOUND] = _Found(given, first.sizes, second.sizes, [t.sizes for t in others])
        only = {key: n for key, n in first.sizes.items() if second.sizes[key] == n}
        _forget_single_steps(first, [second, *others])
        return Shapes(first.shapes, second.shapes, dict(first.sizes), self.types, tuple(t.shapes for t in others), only)

    def _known(self, dims: Mapping[str, _Dim]) -> tuple[_Table, _Table] | None:
        """Return the two choices that were found for the model that this one was made of, where they fit here too."""
        found = self.model.graph.meta.get(_FOUND)
        if not isinstance(found, _Found) or found.given != {key: dim.given for key, dim in dims.items()}:
            return None
        first, second = self._try(found.first), self._try(found.second)
        if first is None or second is None or first.wrong or second.wrong or first.empty or second.empty:
            self.tables.clear()
            return None
        for sizes in found.others:
            self._try(sizes)
        return first, second

    def _searched(self, dims: Mapping[str, _Dim]) -> tuple[_Table, _Table]:
        """Return the two choices that fit best, and tables of further ones.

        Raises: `InputError` where ONNX finds the model inconsistent at all sizes.
        """
        for number, multiples in enumerate(_MULTIPLES):
            made = [self._try(_multiples(dims, which, *multiples)) for which in (0, 1)]
            first, second = made
            if first is None or second is None or first.wrong or second.wrong:
                continue
            if number == 3 or not (first.empty or second.empty or _single_steps(first, second)):
                break
        pair = self._pair(dims)
        if pair is None or pair[0].wrong or pair[1].wrong:
            pair = self._fixed(dims) or pair
        if pair is None:
            raise self.error or InputError("The shapes of the model could not be inferred.")
        for control in _CONTROLS:
            self._try(_multiples(dims, *control))
        return pair

    def _dims(self) -> dict[str, _Dim]:
        """Return the dynamic dimensions of the inputs by key, each as it stands at its first place."""
        found: dict[str, _Dim] = {}
        for value in self.model.graph.inputs:
            if value.const_value is not None or value.shape is None:
                continue
            given = suggestion(value)
            for axis, d in enumerate(value.shape):
                if isinstance(d, int):
                    continue
                kind = "batch" if axis == 0 else "side" if axis > 1 and len(value.shape) > 3 else "length"
                dim = found.setdefault(_key(value, axis), _Dim(kind))
                if given and given[axis] != 1:  # an axis of 1 would be taken for one that is broadcast
                    dim.given = dim.given or given[axis]
        return found

    def _try(self, sizes: Sizes) -> _Table | None:
        known = next((t for t in self.tables if t.sizes == sizes), None)
        if known is not None:
            return known
        inputs = {value.name or "": value for value in self.model.graph.inputs}
        by_name = {
            d.value: sizes[_key(value, axis)]
            for value in inputs.values()
            for axis, d in enumerate(value.shape or ())
            if not isinstance(d, int) and d.value and _key(value, axis) in sizes
        }

        def size(symbol: str, name: str, axis: int) -> int:
            return sizes.get(_key(inputs[name], axis) if name in inputs else symbol, 1)

        try:
            shapes = infer_sized(self.proto, size, self.types)
        except InputError as error:
            self.error = self.error or error
            return None
        places = place_from(
            self.model,
            shapes,
            self.types,
            lambda value: recorded_shape(value, by_name),
            defaults=False,
            constants=self.constants,
        )
        wrong = sum(cannot_run(place, self.types) for place in places)
        self.tables.append(_Table(sizes, shapes, wrong, sum(map(_is_emptied, places))))
        return self.tables[-1]

    def _pair(self, dims: Mapping[str, _Dim]) -> tuple[_Table, _Table] | None:
        """Return the two choices with the fewest contradictions; no size is the same in both."""
        pairs = [
            (a, b)
            for a, b in itertools.permutations(self._suggested(dims), 2)
            if all(a.sizes[key] != b.sizes[key] for key in dims)
        ]
        if pairs:
            return min(pairs, key=_cost)
        return (self.tables[0], self.tables[0]) if self.tables else None

    def _suggested(self, dims: Mapping[str, _Dim]) -> list[_Table]:
        """Return the tables at sizes that were suggested first; all where none are."""
        given = {key: dim.given for key, dim in dims.items() if dim.given is not None}
        return sorted(self.tables, key=lambda t: any(t.sizes[key] != n for key, n in given.items()))

    def _fixed(self, dims: Mapping[str, _Dim]) -> tuple[_Table, _Table] | None:
        """Where no two sizes fit: two choices that do and share as few sizes as possible, if one fits at all."""
        first = next((t for t in self._suggested(dims) if not t.wrong), None) or self._made_for(dims)
        if first is None:
            return None
        second = first
        usual, small = (_multiples(dims, which, *_MULTIPLES[0]) for which in (1, 2))
        for key in dims:  # what need not be fixed is not
            size = first.sizes[key]
            freed = self._fitting(second, key, (usual[key], small[key], 2 * size, size + 1, max(size - 1, 1)))
            if freed is not None:
                second = freed
                first = (size == 1 and self._fitting(first, key, (small[key], usual[key]))) or first
        return first, second

    def _fitting(self, table: _Table, key: str, sizes: Sequence[int]) -> _Table | None:
        """Return the first of the tables with another size that has no contradiction."""
        others = (self._try({**table.sizes, key: size}) for size in sizes if size != table.sizes[key])
        return next((t for t in others if t is not None and not t.wrong), None)

    def _made_for(self, dims: Mapping[str, _Dim]) -> _Table | None:
        """Return shapes at the sizes that the model is made for, where they are found."""
        hints, start = self._hints(dims), _multiples(dims, 0, *_MULTIPLES[0])
        most = max(_EFFORT // max(len(self.model.graph), 150), 24)
        for combination in itertools.islice(itertools.product(*hints.values()), most):
            chosen = dict(zip(hints, combination, strict=True))
            found = self._try({key: dim.given or chosen[dim.kind] or start[key] for key, dim in dims.items()})
            if found is not None and not found.wrong:
                return found
        return None

    def _hints(self, dims: Mapping[str, _Dim]) -> dict[str, list[int | None]]:
        """Return sizes to try by kind of dimension: those that stand in constants, and usual ones; None: as it is."""
        tensors = [v.const_value for v in parameters(self.model.graph).values() if v.const_value is not None]
        tensors += [t for node in self.model.graph if node.op_type == "Constant" and (t := constant_tensor(node))]
        lists = [t.numpy().ravel().tolist() for t in tensors if t.dtype == ir.DataType.INT64 and 0 < t.size < 8]
        entries = Counter(n for numbers in lists for n in numbers)
        entries += Counter(d for t in tensors if t.dtype.is_floating_point() for d in t.shape.numpy())
        some = [n for n, _ in entries.most_common() if 1 < n <= 1 << 16]
        heads = [n for n, _ in Counter(numbers[0] for numbers in lists).most_common() if n > 1]
        made: dict[str, Sequence[int]] = {
            "batch": [1, *heads[:3]],
            "length": some[:_HINTS],
            "side": [*_SIDES, *some[:_HINTS]],
        }
        kinds = {dim.kind for dim in dims.values()}
        return {kind: [None, *dict.fromkeys(sizes)] if kind in kinds else [None] for kind, sizes in made.items()}


@dataclass
class _Dim:
    """A dynamic dimension: "batch", "length" or "side" (of an image), and the size that was suggested."""

    kind: str
    given: int | None = None


def _key(value: ir.Value, axis: int) -> str:
    """Return the name of a dimension.

    Those without a symbol are taken as equal on equal axes, unless sizes are suggested.
    """
    d = None if value.shape is None else value.shape[axis]
    if d is not None and not isinstance(d, int) and d.value:
        return d.value
    return own_name(value.name or "", axis) if suggestion(value) else f"?{axis}"


def _multiples(dims: Mapping[str, _Dim], which: int, image: int, other: int) -> Sizes:
    """Multiples of primes; the first choice (``which`` is 0) takes sizes that were suggested."""
    small, side = iter(_SMALL[which]), iter(_IMAGE[which])
    made: dict[str, int] = {}
    for count, (key, dim) in enumerate(dims.items()):
        prime = next(side if dim.kind == "side" else small, _LATE[which] + 12 * count)
        made[key] = prime * {"batch": 1, "length": other, "side": image}[dim.kind]
        if dim.given is not None and (which == 0) != (made[key] == dim.given):
            made[key] = dim.given if which == 0 else 2 * dim.given  # the first choice takes it, no other does
    return made


def _cost(pair: tuple[_Table, _Table]) -> tuple[int, ...]:
    a, b = pair
    return a.wrong + b.wrong, a.empty + b.empty, _single_steps(a, b), -len(a.shapes) - len(b.shapes)


def _single_steps(first: _Table, second: _Table) -> int:
    """Return the number of values with a size of one at the first choice only: they would be taken for broadcast."""
    return sum(1 in s and _widens(s, second.shapes.get(name)) for name, s in first.shapes.items())


def _widens(first: Shape, second: Shape | None) -> bool:
    if second is None or len(first) != len(second):
        return False
    return any(a == 1 != b for a, b in zip(first, second, strict=True))


def _forget_single_steps(first: _Table, others: Sequence[_Table]) -> None:
    for other in others:
        for name in [n for n, s in first.shapes.items() if 1 in s and _widens(s, other.shapes.get(n))]:
            del first.shapes[name]


def _is_emptied(place: Place) -> bool:
    """Return whether a part of a value is taken that it does not have.

    A window of 400 steps behind the first 400 of 128.
    """
    return (
        place.node.op_type == "Slice"
        and any(s is not None and 0 in s for s in place.outputs)
        and all(s is None or 0 not in s for s in place.inputs)
    )
