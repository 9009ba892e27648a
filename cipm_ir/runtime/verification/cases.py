"""Inputs of our own to compare models on: of the first sizes that a model runs with, by several recipes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.ir.input_shapes import noted_sizes
from cipm_ir.ir.shapes import SUGGESTED, dynamic_sizes, own_name
from cipm_ir.ir.stand_ins import infer_shapes
from cipm_ir.runtime.inputs.generate import (
    RUNS_AT,
    Feeds,
    Recipe,
    has_open_batch,
    largest_table,
    overrides,
    parts_of_tables,
    random_inputs,
    true_inputs,
)
from cipm_ir.runtime.verification.compare import Case, Outputs
from cipm_ir.runtime.verification.noise import DRAWS

__all__ = ["LEAST", "RECIPES", "affordable_cases", "own_cases", "rows_of_tables", "tried"]

RECIPES = (
    Recipe("random"),
    Recipe("zeros", "zeros", integers="low"),
    Recipe("random / 64", factor=1 / 64),
    Recipe("random x 32", factor=32.0),
    Recipe("ones", "ones", integers="high"),
    Recipe("uniform", "uniform"),
    Recipe("waves", "waves"),
    Recipe("pixels", "pixels"),
)
"""The inputs of our own, in order of importance: where a model is slow, the last ones are left out."""

# (batch, other unknown sizes, cap on integer inputs): the first that the model runs with is used. The later ones are
# for models with a batch baked in, for images that must survive much downsampling, and for tables that were not found.
_SIZES: tuple[tuple[int, int, int | None], ...]
_SIZES = ((2, 8, None), (1, 8, None), (2, 32, None), (1, 64, None), (1, 224, None), (1, 1, None), (1, 16, 2), (3, 3, 2))
_SIZES += tuple((batch, 8, None) for batch in (4, 8, 16, 32))
_LONG = (128, 64, 32, 16)
_LONG_ENTRIES = 1 << 19
_SAMPLES = 16
_SAMPLES_ENTRIES = 1 << 16
_SECONDS = 10.0
_OWN_SECONDS = 1.5
"""All runs on inputs of our own whose sizes we choose take about so long: beyond that, some recipes are left out."""
_CASE_SECONDS = 0.01
"""Inputs behind the first have fewer samples where a run takes longer than this."""
_FIRST_SECONDS = 0.1
"""The first input has more samples as far as its run does not take longer than this."""
LEAST = 3
"""So many inputs at least, unless a run takes very long."""
_PATIENCE = 30.0
_LONG_COST = 200
_PARTS = 64
_AXES = 4
"""With so many open axes, each is tried at the size of the batch."""


def own_cases(
    model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator, most: int | None
) -> list[Case]:
    """Draw inputs by each recipe, of the first sizes that the model runs with, and run it on them.

    Raises:
        InputError: the model runs on none of the sizes.
    """
    noted = {value: value.meta.get(SUGGESTED) for value in true_inputs(model)}
    try:
        return _own_cases(model, run, rng, most)
    finally:
        for value, sizes in noted.items():
            if sizes is None:
                value.meta.pop(SUGGESTED, None)


def _own_cases(
    model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator, most: int | None
) -> list[Case]:
    batch, free_size, limit, first, seconds = _accepted(model, run, rng)
    made = [first]
    few = batch if not has_open_batch(model) else max(1, min(batch, int(batch * _CASE_SECONDS / max(seconds, 1e-6))))
    most = affordable_cases(seconds * few / batch, _OWN_SECONDS) if most is None else most
    values = true_inputs(model)
    if not values:
        return made
    floats = any(value.dtype is not None and value.dtype.is_floating_point() for value in values)
    recipes = [recipe for recipe in RECIPES[1:] if floats or recipe.integers != "random"]
    for place, recipe in enumerate(recipes[: most - 1]):
        other = overrides(model, rng) if place % 2 == 0 else {}
        for count in dict.fromkeys((min(few, 2) if recipe.constant else few, batch)):
            drawn = random_inputs(model, rng, count, free_size=free_size, index_limit=limit, recipe=recipe)
            if ran := tried(recipe.name, drawn | other, run):  # some models only take the batch that was found
                made += ran
                break
    long = _long(model, run, rng, limit) if len(made) < most and seconds * _LONG_COST < _SECONDS else []
    if long:
        return made + long
    for recipe in rows_of_tables(model, first.feeds)[: max(most - len(made), 0)]:
        drawn = random_inputs(model, rng, batch, free_size=free_size, index_limit=limit, recipe=recipe)
        made += tried(recipe.name, drawn, run)
    return made


def rows_of_tables(model: ir.Model, feeds: Feeds) -> list[Recipe]:
    """Return recipes that together reach every row of a table, or many, with inputs of the sizes of one."""
    parts = parts_of_tables(model, feeds)
    return [Recipe(f"rows, part {k + 1} of {parts}", part=k) for k in range(min(parts, _PARTS))] if parts > 1 else []


def affordable_cases(seconds: float, budget: float = _SECONDS) -> int:
    """Return how many inputs of our own there is time for, given the seconds of one run and of all together."""
    # The plain run, its variants and the other model: all of them for each case.
    each = max(seconds, 1e-6) * (3 + DRAWS)
    return max(int(budget / each), LEAST if LEAST * each < _PATIENCE else 1)


def _accepted(
    model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator
) -> tuple[int, int, int | None, Case, float]:
    """Batch, free size and limit with which the model runs, the first case, and the processor's seconds of its run.

    That a model runs with one batch only is noted on its graph, see `cipm_ir.runtime.inputs.batch_size`.
    """
    first: InputError | None = None
    known = model.graph.meta.get(RUNS_AT)
    for batch, free_size, limit in itertools.chain(_SIZES, _fitting_sizes(model)):
        batch = known or batch
        feeds = random_inputs(model, rng, batch, free_size=free_size, index_limit=limit)
        start = time.process_time()
        try:
            case = Case(RECIPES[0].name, feeds, run(feeds))
        except InputError as error:
            first = first or error
            continue
        seconds = time.process_time() - start
        start = time.process_time()
        count = min(_SAMPLES, int(batch * _FIRST_SECONDS / max(seconds, 1e-6)))
        more = _more_samples(model, run, rng, batch, free_size, limit, feeds, count)
        if more:
            return count, free_size, limit, more[0], time.process_time() - start
        if first is not None and batch != 2 and has_open_batch(model):
            fewer = random_inputs(model, rng, 2, free_size=free_size, index_limit=limit)
            if {x.shape for x in fewer.values()} != {x.shape for x in feeds.values()} and not tried("", fewer, run):
                model.graph.meta[RUNS_AT] = batch
        return batch, free_size, limit, case, seconds
    if first is not None and _is_open(model):
        raise InputError(f"{str(first).rstrip('.')} (sizes that it runs with may be given in input_shapes).")
    raise first or InputError("No random inputs were tried.")


def _is_open(model: ir.Model) -> bool:
    return any(value.shape is None or not value.shape.is_static() for value in true_inputs(model))


def _fitting_sizes(model: ir.Model) -> Iterator[tuple[int, int, None]]:
    """Yield for sizes at which the shapes inside the model fit each other; they are noted on its inputs meanwhile."""
    if not _is_open(model) or noted_sizes(model.graph):
        return
    inputs = true_inputs(model)
    found = infer_shapes(model)
    for table in (found.first, found.second):
        shapes = [table.get(value.name or "") for value in inputs]
        if all(s is not None and math.prod(s) <= _LONG_ENTRIES for s in shapes):
            for value, shape in zip(inputs, shapes, strict=True):
                value.meta[SUGGESTED] = shape
            yield 1, 8, None
    for value in inputs:
        value.meta.pop(SUGGESTED, None)
    yield from _batch_elsewhere(model)


def _batch_elsewhere(model: ir.Model) -> Iterator[tuple[int, int, None]]:
    """Yield with the size of the batch on other axes than the first: states of (layers, batch, width)."""
    names = [name for name, places in dynamic_sizes(model.graph).items() if any(axis for _, axis in places)]
    if not 1 < len(names) <= _AXES:
        return
    end = time.perf_counter() + _SECONDS
    for count in range(1, len(names)):
        for batched in itertools.combinations(names, count):
            for batch, free_size, _ in _SIZES:
                if time.perf_counter() > end:
                    return
                for value in true_inputs(model):
                    named = [
                        None if isinstance(dim, int) else dim.value or own_name(value.name or "", axis)
                        for axis, dim in enumerate(value.shape or ())
                    ]
                    value.meta[SUGGESTED] = tuple(batch if name in batched else None for name in named)
                yield batch, free_size, None


def _more_samples(
    model: ir.Model,
    run: Callable[[Feeds], Outputs],
    rng: np.random.Generator,
    batch: int,
    free_size: int,
    limit: int | None,
    feeds: Feeds,
    count: int,
) -> list[Case]:
    """Take a larger batch where the model takes one and it is small: units that are rarely active show then."""
    if batch < 2 or count <= batch or sum(x.size for x in feeds.values()) * count // batch > _SAMPLES_ENTRIES:
        return []
    more = random_inputs(model, rng, count, free_size=free_size, index_limit=limit)
    if {name: x.shape for name, x in more.items()} == {name: x.shape for name, x in feeds.items()}:
        return []
    return tried(RECIPES[0].name, more, run)


def _long(model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator, limit: int | None) -> list[Case]:
    """Larger sizes, where sizes are open: later positions, and integers that reach every row of a table."""
    if not _is_open(model) or noted_sizes(model.graph):
        return []
    for free_size in _LONG:
        batch = min(max(2, -(-largest_table(model) // free_size)), 64)
        feeds = random_inputs(model, rng, batch, free_size=free_size, index_limit=limit)
        if sum(x.size for x in feeds.values()) <= _LONG_ENTRIES and (made := tried("random, long", feeds, run)):
            return made
    return []


def tried(label: str, feeds: Feeds, run: Callable[[Feeds], Outputs]) -> list[Case]:
    """Return the case, or nothing where the model does not take such an input."""
    try:
        return [Case(label, feeds, run(feeds))]
    except InputError:
        return []
