"""Calibration statistics of a program's spaces, collected batch by batch: `collect`.

The model runs in onnxruntime with the values in which units are seen as extra outputs. Memory is bounded by the batch
and by the statistics themselves, whatever the size of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cipm_ir.errors import InputError, OptionError
from cipm_ir.runtime.activations.observe import observe, samples
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.runtime.statistics.plan import (
    EXACT_SIZE,
    Collector,
    Plan,
    Request,
    follow,
    make_plan,
    sample_numbers,
    several,
)
from cipm_ir.runtime.statistics.rows import ROWS
from cipm_ir.runtime.statistics.sketch import BUCKETS
from cipm_ir.runtime.statistics.store import MEASURES, Grams, SpaceStatistics, Statistics
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

__all__ = ["EXACT_SIZE", "MEASURES", "Grams", "SpaceStatistics", "Statistics", "collect", "gather", "readable_again"]

Progress = Callable[[str, float | None], None]


def collect(
    program: Program,
    data: Data,
    *,
    spaces: Iterable[Space | str] | None = None,
    gram: bool = False,
    pairs: str = "auto",
    lags: Iterable[int] = (),
    measures: Iterable[str] = (),
    size: int = 64,
    limit: int | None = None,
    progress: Progress | None = None,
    buckets: int = BUCKETS,
    partners: int = 8,
    rows: int = ROWS,
) -> Statistics:
    """Run the program over the data and sum up what each space does.

    Args:
        program: what to run; not changed.
        data: as for `cipm_ir.runtime.inputs.generate.batches`. Every token is a row, also padding: best give none.
        spaces: which, or their names; None takes all that can be seen.
        gram: also, for each reader of a space, E[u u^T] of what it reads, convolution patches unfolded, 1 appended.
        pairs: products of all pairs of units: "exact"; "sketch"; "auto": exact up to `EXACT_SIZE` units; "none".
        lags: steps for lagged correlations.
        measures: what else `similarity` shall know: "cofiring", "spearman", "information" ("lagged": ``lags=(1,)``).
        size: samples per batch.
        limit: at most this many samples.
        progress: called with a word and the fraction done.
        buckets: rows of a sketch; the standard error of a correlation is at most ``sqrt(2 / buckets)``.
        partners: of a sketched space, so many of the strongest partners of each unit are followed exactly in a second
            run over the data; 0, or data that can be read once only: no second run.
        rows: how many rows are sampled for "spearman" and "information".

    Raises:
        InputError: the data does not fit the model, holds no samples, or makes a value NaN or infinite.
        OptionError: an option that there is none of.
        SymmetryError: a space that was named cannot be seen, or (with ``gram``) is read by something else than products
            with weights. Without names `Statistics.unseen` says of what cannot be seen why; what is read otherwise
            has no Gram matrices, and `Statistics.warnings` say so.
    """
    request = Request(gram, pairs, several(lags), several(measures), buckets, partners, rows)
    if size < 1:
        raise OptionError(f"size is {size}; a batch must hold at least 1 sample.")
    plan = make_plan(program, request, spaces)
    found = gather(program.model, plan, data, size=size, limit=limit, progress=progress)
    second = follow(plan, found) if readable_again(data) else None
    if second is None:
        return found
    more = gather(program.model, second, data, size=size, limit=limit, progress=progress, what="follow strongest pairs")
    return joined(found, more)


def gather(
    model: Any,
    plan: Plan,
    data: Data,
    *,
    size: int = 64,
    limit: int | None = None,
    start: int = 0,
    progress: Progress | None = None,
    what: str = "collect statistics",
) -> Statistics:
    """Carry a plan out; ``start`` is the number of the first sample, where the data is a shard of something larger."""
    collector = Collector(plan)
    if not plan.values:
        return collector.result(0)
    seen = 0
    for feeds, values in observe(
        model, plan.values, data, size=size, limit=limit, start=start, progress=progress, what=what
    ):
        count = samples(feeds)
        numbers = sample_numbers(feeds, start + seen, count) if plan.numbered else np.zeros(count, np.uint64)
        collector.update(values, numbers)
        seen += count
    return collector.result(seen)


def readable_again(data: Data) -> bool:
    """Return whether the data can be read a second time."""
    return isinstance(data, Mapping) or not hasattr(data, "__next__")


def joined(first: Statistics, second: Statistics) -> Statistics:
    """Return the parts of two runs over the same data. Raises: InputError where the data was not the same."""
    if first.samples != second.samples:
        raise InputError(
            f"The data gave {first.samples} samples in the first run and {second.samples} in the second; "
            "give data that can be read twice, or partners=0."
        )
    spaces = dict(first.spaces)
    for name, more in second.spaces.items():
        one = spaces[name]
        spaces[name] = replace(one, parts={**one.parts, **more.parts})
    return Statistics(spaces, first.samples, first.unseen, first.model)
