"""Samples that are left out of calibration: on them models are compared, so that fitting too closely shows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.runtime.activations.observe import count_samples, samples
from cipm_ir.runtime.inputs.data import Named
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, true_inputs

_LEAST = 32
"""With fewer samples all are for calibration."""
_EVERY, _MOST = 8, 256
"""One of so many samples is left out, and at most so many in all."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Part:
    """Some of the samples of the data, read anew at each iteration.

    Attributes:
        data: all of them.
        model: that takes them.
        every: one of so many samples is left out.
        held: whether the part is those left out, or the others.
        limit: samples of the whole data that are looked at.
    """

    data: Data
    model: ir.Model
    every: int
    held: bool
    limit: int

    def __iter__(self) -> Iterator[Feeds]:
        """Yield a batch at a time; where a model fixes its batches, whole ones are in or out."""
        fixed = any(v.shape and isinstance(v.shape[0], int) for v in true_inputs(self.model))
        seen = 0
        for feeds in batches(self.data, self.model, _AT_ONCE, limit=self.limit):
            number = samples(feeds)
            marks = np.arange(seen, seen + (1 if fixed else number)) % self.every == self.every - 1
            places = np.flatnonzero(marks == self.held)
            seen += len(marks)
            if len(places) == len(marks):
                yield feeds
            elif len(places):
                yield {name: a[places] if a.ndim and len(a) == number else a for name, a in feeds.items()}


def holds_complete_inputs(data: Data, count: int) -> bool:
    """Return whether data is a list of inputs that hold several samples each. ``count``: of all samples."""
    source = data.source if isinstance(data, Named) else data
    return isinstance(source, (list, tuple)) and count > len(source)


def split(data: Data, model: ir.Model, limit: int) -> tuple[Data, Data | None]:
    """Return samples for calibration and samples that are left out; None where there are too few for that.

    A list of complete inputs of several samples each is not divided: what a sample is may depend on the others (words
    of a text, windows of a recording).
    """
    count = count_samples(model, data, _AT_ONCE, limit)
    if count < _LEAST:
        return data, None
    if holds_complete_inputs(data, count):
        return data, None
    every = max(_EVERY, -(-count // _MOST))
    calibration, held = (Part(data, model, every, held, limit) for held in (False, True))
    if next(iter(held), None) is None or next(iter(calibration), None) is None:
        return data, None
    return calibration, held
