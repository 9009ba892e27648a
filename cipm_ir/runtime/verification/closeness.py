"""How close the outputs of two models are on the same inputs, without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs.generate import Feeds
from cipm_ir.runtime.session import Array
from cipm_ir.runtime.verification.noise import is_float, widened

Run: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Runs a model on one batch; outputs in the model's order."""


@dataclass(frozen=True)
class Closeness:
    """The outputs of a model against those of the one that it came from.

    Attributes:
        difference: ‖a − b‖ / ‖a‖ over all samples, the largest of all floating outputs; 0 is the same.
        agreement: the fraction of samples in which the first output of shape (samples, classes) is largest at the same
            class; None without such an output.
        samples: how many were compared.
    """

    difference: float
    agreement: float | None
    samples: int


def closeness(first: Run, second: Run, feeds: Iterable[Feeds]) -> Closeness:
    """Run both models on every batch; outputs are paired by position.

    Raises:
        InputError: there are no samples, or where the numbers of outputs or their shapes differ.
    """
    squares: dict[int, list[float]] = {}
    same = votes = samples = 0
    for one in feeds:
        a, b = list(first(one).values()), list(second(one).values())
        if [x.shape for x in a] != [x.shape for x in b]:
            raise InputError(f"The outputs have shapes {[x.shape for x in a]} and {[x.shape for x in b]}.")
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            if is_float(x):
                wide = widened(x)
                total = squares.setdefault(k, [0.0, 0.0])
                total[0] += float(np.sum(np.abs(wide - widened(y)) ** 2))
                total[1] += float(np.sum(np.abs(wide) ** 2))
        classes = [
            (x, y)
            for x, y in zip(a, b, strict=True)
            if is_float(x) and x.dtype.kind != "c" and x.ndim == 2 and x.shape[1] > 1
        ]
        for x, y in classes[:1]:
            same += int(np.sum(x.argmax(axis=1) == y.argmax(axis=1)))
            votes += len(x)
        samples += max((len(x) for x in one.values() if x.ndim), default=1)
    if not samples:
        raise InputError("The data holds no samples to compare the models on.")
    return Closeness(
        max((_relative(*pair) for pair in squares.values()), default=0.0), same / votes if votes else None, samples
    )


def _relative(off: float, whole: float) -> float:
    if not math.isfinite(off) or not math.isfinite(whole):
        return math.inf
    return math.sqrt(off / whole) if whole else (0.0 if not off else math.inf)
