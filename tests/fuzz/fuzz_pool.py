"""What random graphs are drawn from: a pool of values of known shapes, and weights that may be used again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.zoo.net import Net

Shape = tuple[int, ...]
WIDTHS = (4, 6, 8, 12)
LARGEST = 4000
"""Entries of the largest value."""


class Unfit(Exception):
    """The step does not fit the value."""


class Pool(Net):
    """A net that keeps the shapes of its values, and the weights that may be used again."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng([20240, seed])
        super().__init__(f"fuzz_{seed}", int(rng.integers(13, 24)), "float64")
        self.rng = rng
        self.version = self.domains[""]
        self.dynamic = bool(rng.random() < 0.25)  # then axis 0 is the batch in every value
        self.shapes: dict[str, Shape] = {}
        self.pool: list[str] = []
        self.weights: dict[Shape, list[str]] = {}

    # ------------------------------------------------------------ choosing
    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, items: Sequence[Any]) -> Any:
        if not len(items):
            raise Unfit
        return items[int(self.rng.integers(len(items)))]

    def width(self) -> int:
        return int(self.pick(WIDTHS))

    def axis(self, x: str, least: int = 1) -> int:
        """An axis that may be worked on: not the batch where that is dynamic."""
        shape = self.shapes[x]
        return int(self.pick([a for a in range(int(self.dynamic), len(shape)) if shape[a] >= least]))

    def ranked(self, x: str, *ranks: int) -> Shape:
        if len(self.shapes[x]) not in ranks:
            raise Unfit
        return self.shapes[x]

    def recent(self) -> str:
        """A value, rather one of the last."""
        back = min(int(self.rng.geometric(0.4)), len(self.pool))
        return self.pool[-back]

    # ------------------------------------------------------------ making
    def made(self, shape: Sequence[int], op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output of known shape."""
        shape = tuple(int(d) for d in shape)
        if not shape or not 0 < math.prod(shape) <= LARGEST or len(shape) > 6:
            raise Unfit
        name = self.op(op_type, *inputs, **attributes)
        self.shapes[name] = shape
        return name

    def param(self, shape: Sequence[int], fan: int | None = None, *, reuse: float = 0.15, odd: float = 0.05) -> str:
        """A new weight, or one that is in use already; once in a while all zeros or ones."""
        shape = tuple(int(d) for d in shape)
        known = self.weights.setdefault(shape, [])
        if known and self.chance(reuse):
            return str(self.pick(known))
        if len(shape) == 2 and self.weights.get(shape[::-1]) and self.chance(reuse):
            return self.made(shape, "Transpose", self.pick(self.weights[shape[::-1]]), perm=[1, 0])
        data = self.normal(shape, (fan or 2) ** -0.5)
        if self.chance(odd):
            data = np.full(shape, float(self.rng.integers(0, 2)))
        name = self.const(data, "w")
        self.shapes[name] = shape
        known.append(name)
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.asarray(values, np.int64), "i")

    def same(self, op_type: str, x: str, *inputs: str, **attributes: Any) -> str:
        return self.made(self.shapes[x], op_type, x, *inputs, **attributes)

    def tamed(self, x: str) -> str:
        """Positive and away from zero."""
        return self.same("Add", self.same("Abs", x), self.const(0.5))


def without(shape: Shape, axis: int) -> tuple[int, Shape]:
    """What must agree in a Concat along the axis."""
    return len(shape), shape[:axis] + shape[axis + 1 :]


def fitting(a: Shape, b: Shape, dynamic: bool) -> bool:
    """Whether two shapes broadcast; batch axes must meet where they are dynamic."""
    if dynamic and len(a) != len(b):
        return False
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))
