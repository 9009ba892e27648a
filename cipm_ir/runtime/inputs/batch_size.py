"""Models that declare batches of any size and run with one size only: exporters trace one sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError
from cipm_ir.runtime.inputs.generate import RUNS_AT, Data, Feeds, batches, has_open_batch, true_inputs
from cipm_ir.runtime.session import Runner

_PROBE = 3
"""A model that runs with this many samples, which no exporter fixes, runs with any number."""

_BAKED = (1, 2, 4, 8, 16, 32, 64)


def fit_batch(model: ir.Model, data: Data | None) -> None:
    """Find out whether a model with an open batch runs with one size only, and note that on its graph for `batches`.

    A model that runs with no size on this data is left to those that run it, who say why.

    Args:
        model: gets the note, which nothing writes to a file.
        data: samples; nothing is read of an iterator, which can be read once.
    """
    if data is None or hasattr(data, "__next__") or not _is_open(model):
        return
    feeds = next(batches(data, model, max(_BAKED)), None)
    if feeds is None:
        return
    count = max((len(x) for x in feeds.values() if x.ndim), default=0)
    if count < 2:
        return
    try:
        with Runner(model) as runner:
            if not _runs(runner, feeds, min(_PROBE, count)):
                found = (size for size in _BAKED if size <= count and _runs(runner, feeds, size))
                if (size := next(found, None)) is not None:
                    model.graph.meta[RUNS_AT] = size
    except CipmError:  # no kernel, or a model that cannot be opened
        return


def share_batch(model: ir.Model, other: ir.Model) -> None:
    """Note on another form of the same model what was found out about one."""
    if (found := model.graph.meta.get(RUNS_AT)) is not None:
        other.graph.meta[RUNS_AT] = found


def batch_note(model: ir.Model) -> Iterator[str]:
    """Yield what a report says of a model that `fit_batch` or a verification found to run with one size only."""
    size = model.graph.meta.get(RUNS_AT)
    if size:
        yield f"the model declares batches of any size, but runs with {size} only, and was run so"


def _is_open(model: ir.Model) -> bool:
    inputs = [value for value in true_inputs(model) if value.shape]
    return bool(inputs) and has_open_batch(model)


def _runs(runner: Runner, feeds: Feeds, size: int) -> bool:
    try:
        runner.run({name: x[:size] if np.ndim(x) else x for name, x in feeds.items()})
    except InputError:
        return False
    return True
