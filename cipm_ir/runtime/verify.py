"""Do two models compute the same? They run on the same inputs, and may differ by the first one's rounding."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError, UnsupportedError
from cipm_ir.ir.parameters import overridable_inputs
from cipm_ir.runtime.compare import MEASURED, Case, Outputs, Reference, Tolerance, Verification
from cipm_ir.runtime.endings import Ending, common_endings, endings, output_units
from cipm_ir.runtime.graphs import all_graphs
from cipm_ir.runtime.inputs import (
    RUNS_AT,
    Data,
    Feeds,
    Recipe,
    batches,
    largest_table,
    only_batch,
    overrides,
    random_inputs,
    true_inputs,
)
from cipm_ir.runtime.integer_products import computes_in_integers, processor_saturates
from cipm_ir.runtime.noise import DRAWS, MORE_DRAWS, nudged, nudged_model
from cipm_ir.runtime.session import Backend, Runner

__all__ = [
    "BATCHES",
    "RECIPES",
    "OnnxVariants",
    "Tolerance",
    "Verification",
    "Verifier",
    "affordable_cases",
    "own_cases",
    "tried",
    "verify_models",
]

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

_RANDOM_OPS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
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
_LEAST = 3
_PATIENCE = 3 * _SECONDS
BATCHES = 3
"""So many batches of data are looked at."""

_LONG_COST = 200
_LARGE = 256 << 20


class Verifier:
    """Compare models with one that is taken as right; what that computes is found out once.

    Args:
        model: taken as right.
        data: samples, see `batches`.
        seed: of the random inputs.
        cases: at most so many inputs of our own, and batches of data (at most 3 by default); None: what time allows.

    Raises:
        InputError: `data` does not fit the model.
    """

    def __init__(self, model: ir.Model, *, data: Data | None = None, seed: int = 0, cases: int | None = None) -> None:
        self._model, self._seed, self._cases = model, seed, cases
        self._given = [] if data is None else list(itertools.islice(batches(data, model), cases or BATCHES))
        self._endings = endings(model)
        self._made: Reference | None = None

    @property
    def model(self) -> ir.Model:
        """The model taken as right."""
        return self._model

    def check(self, model: ir.Model, tolerance: Tolerance = MEASURED) -> Verification:
        """Compare another model, whose inputs and outputs must have the same names."""
        start = time.perf_counter()
        return replace(self._check(model, tolerance), seconds=time.perf_counter() - start)

    def _check(self, model: ir.Model, tolerance: Tolerance) -> Verification:
        apart = _interface_difference(self._model, model)
        if apart:
            return Verification(False, reason=apart)
        random_node = _random_node(self._model) or _random_node(model)
        if random_node:
            return Verification(None, reason=f"{random_node} draws random numbers, so two runs differ anyway")
        try:
            reference = self._reference(None)
            try:
                actual = self._actual(model, reference)
            except UnsupportedError:
                # The other model is valid but uses a kernel that onnxruntime lacks: both run on the evaluator of ONNX.
                reference = self._reference("reference")
                actual = self._actual(model, reference)
        except CipmError as error:
            return Verification(None, reason=str(error).rstrip("."))
        if isinstance(actual, InputError):
            reason = f"the second model fails: {actual}"
            return Verification(False, cases=len(reference.feeds), reason=reason, backend=reference.backend)
        return reference.compare(actual, tolerance)

    def _reference(self, backend: Backend | None) -> Reference:
        if self._made is None or (backend is not None and self._made.backend != backend):
            try:
                self._made = _reference(self._model, self._endings, self._given, self._seed, self._cases, backend)
            except InputError:
                if not self._endings:
                    raise
                self._endings = []  # a value that cannot be handed out
                self._made = _reference(self._model, [], self._given, self._seed, self._cases, backend)
        return self._made

    def _actual(self, model: ir.Model, reference: Reference) -> list[Outputs] | InputError:
        pairs = common_endings(self._endings, endings(model))
        try:
            with Runner(model, extra_outputs=_values(pairs), backend=reference.backend) as runner:  # type: ignore[arg-type]
                return [_with_endings(runner.run(feeds), model, pairs) for feeds in reference.feeds]
        except InputError as error:
            return error


def verify_models(
    a: ir.Model,
    b: ir.Model,
    *,
    data: Data | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    cases: int | None = None,
) -> Verification:
    """Compare two models on batches of `data` and on inputs of our own, see `RECIPES`.

    Floating outputs agree when they differ, in each channel, by no more than the rounding noise of the first model
    allows (`cipm_ir.runtime.noise`), and NaN and infinities stand at the same places. Integers must be equal, but for
    as many as rounding alone changes. Values in front of the last activations are compared too. The models run one
    after the other, so that one of them is in memory at a time.

    Args:
        a: the model taken as right.
        b: the model to compare; inputs and outputs must have the same names.
        data: samples, see `batches`.
        seed: of the random inputs.
        rtol, atol: see `Tolerance`.
        cases: at most so many inputs of our own, and batches of data (at most 3 by default); None: what time allows.

    Raises:
        InputError: `data` does not fit the models.
    """
    return Verifier(a, data=data, seed=seed, cases=cases).check(b, Tolerance(rtol, atol))


class OnnxVariants:
    """An ONNX model, run plainly, with all of onnxruntime's optimizations, and with weights and inputs moved."""

    def __init__(self, model: ir.Model, found: Sequence[Ending], seed: int, backend: Backend | None) -> None:
        self._model, self._seed, self._backend = model, seed, backend
        self._pairs = [(ending, ending) for ending in found]

    @property
    def backend(self) -> str:
        """What runs the model."""
        return self._backend or "onnxruntime"

    def others(self) -> Sequence[str]:
        """Return the names of all ways to run but the plain one."""
        weights = sum(
            v.const_value.nbytes for g in all_graphs(self._model) for v in g.initializers.values() if v.const_value
        )
        draws = [f"draw {k}" for k in range(DRAWS if weights <= _LARGE else 1)]
        exact = self.backend == "onnxruntime" and not (processor_saturates() and computes_in_integers(self._model))
        return ["optimized", *draws] if exact else draws

    def more(self) -> Sequence[str]:
        """Return further names, for cases of doubt."""
        return [f"draw {k}" for k in range(DRAWS, DRAWS + MORE_DRAWS)]

    def outputs(self, feeds: Sequence[Feeds], way: str = "") -> Iterator[Outputs]:
        """Run on each of several inputs; "" is the plain way."""
        draw = int(way.removeprefix("draw ")) if way.startswith("draw ") else None
        seeds = (self._seed, draw or 0)
        model, rng = self._model, np.random.default_rng(seeds)
        if draw is not None:
            model = nudged_model(model, seeds)
        fast, extra = way == "optimized", _values(self._pairs)
        with Runner(model, extra_outputs=extra, backend=self._backend, fast=fast) as runner:
            for one in feeds:
                moved = one if draw is None else {name: nudged(x, rng) for name, x in one.items()}
                yield _with_endings(runner.run(moved), model, self._pairs)


def _reference(
    model: ir.Model,
    found: Sequence[Ending],
    given: Sequence[Feeds],
    seed: int,
    cases: int | None,
    backend: Backend | None,
) -> Reference:
    """Run a model on data and on inputs of our own that it accepts.

    Errors: `InputError`, `UnsupportedError` where it runs on none.
    """
    pairs = [(ending, ending) for ending in found]
    with Runner(model, extra_outputs=_values(pairs), backend=backend) as runner:

        def run(feeds: Feeds) -> Outputs:
            return _with_endings(runner.run(feeds), model, pairs)

        made = [Case(f"batch {k} of the data", feeds, run(feeds)) for k, feeds in enumerate(given)]
        try:
            made += own_cases(model, run, np.random.default_rng(seed), cases)
        except CipmError:
            if not given:
                raise
    return Reference(OnnxVariants(model, found, seed, runner.backend), made, units=output_units(model))


def own_cases(
    model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator, most: int | None
) -> list[Case]:
    """Draw inputs by each recipe, of the first sizes that the model runs with, and run it on them.

    Errors: `InputError` where the model runs on none of the sizes.
    """
    batch, free_size, limit, first, seconds = _accepted(model, run, rng)
    made = [first]
    most = affordable_cases(seconds) if most is None else most
    values = true_inputs(model)
    if not values:
        return made
    floats = any(value.dtype is not None and value.dtype.is_floating_point() for value in values)
    recipes = [recipe for recipe in RECIPES[1:] if floats or recipe.integers != "random"]
    for place, recipe in enumerate(recipes[: most - 1]):
        drawn = random_inputs(model, rng, batch, free_size=free_size, index_limit=limit, recipe=recipe)
        drawn |= overrides(model, rng) if place % 2 == 0 else {}
        made += tried(recipe.name, drawn, run)
    if len(made) < most and seconds * _LONG_COST < _SECONDS:
        made += _long(model, run, rng, limit)
    return made


def affordable_cases(seconds: float) -> int:
    """Return how many inputs of our own there is time for, given the seconds of one run."""
    # The plain run, its variants and the other model: all of them for each case.
    each = max(seconds, 1e-6) * (3 + DRAWS)
    return max(int(_SECONDS / each), _LEAST if _LEAST * each < _PATIENCE else 1)


def _accepted(
    model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator
) -> tuple[int, int, int | None, Case, float]:
    """Batch, free size and limit with which the model runs, the first case, and the seconds of its run.

    That a model runs with one batch only is noted on its graph, see `cipm_ir.runtime.batch_size`.
    """
    first: InputError | None = None
    known = model.graph.meta.get(RUNS_AT)
    for batch, free_size, limit in _SIZES:
        batch = known or batch
        feeds = random_inputs(model, rng, batch, free_size=free_size, index_limit=limit)
        start = time.perf_counter()
        try:
            case = Case(RECIPES[0].name, feeds, run(feeds))
        except InputError as error:
            first = first or error
            continue
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        more = _more_samples(model, run, rng, batch, free_size, limit, feeds) if seconds < _SECONDS / _SAMPLES else []
        if more:
            return _SAMPLES, free_size, limit, more[0], time.perf_counter() - start
        if first is not None and batch != 2 and only_batch(model) is None:
            fewer = random_inputs(model, rng, 2, free_size=free_size, index_limit=limit)
            if {x.shape for x in fewer.values()} != {x.shape for x in feeds.values()} and not tried("", fewer, run):
                model.graph.meta[RUNS_AT] = batch
        return batch, free_size, limit, case, seconds
    raise first or InputError("No random inputs were tried.")


def _more_samples(
    model: ir.Model,
    run: Callable[[Feeds], Outputs],
    rng: np.random.Generator,
    batch: int,
    free_size: int,
    limit: int | None,
    feeds: Feeds,
) -> list[Case]:
    """Take a larger batch where the model takes one and it is small: units that are rarely active show then."""
    if batch < 2 or sum(x.size for x in feeds.values()) * _SAMPLES // batch > _SAMPLES_ENTRIES:
        return []
    more = random_inputs(model, rng, _SAMPLES, free_size=free_size, index_limit=limit)
    if {name: x.shape for name, x in more.items()} == {name: x.shape for name, x in feeds.items()}:
        return []
    return tried(RECIPES[0].name, more, run)


def _long(model: ir.Model, run: Callable[[Feeds], Outputs], rng: np.random.Generator, limit: int | None) -> list[Case]:
    """Larger sizes, where sizes are open: later positions, and integers that reach every row of a table."""
    if all(isinstance(dim, int) and dim > 0 for value in true_inputs(model) for dim in value.shape or ()):
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


def _values(pairs: Sequence[tuple[Ending, Ending]]) -> list[str]:
    return list(dict.fromkeys(ending.value for _, ending in pairs))


def _with_endings(outputs: Outputs, model: ir.Model, pairs: Sequence[tuple[Ending, Ending]]) -> Outputs:
    """Return the outputs of the model and, under the names of the first of each pair, the values of its endings."""
    own = {value.name or "" for value in model.graph.outputs}
    made = {name: array for name, array in outputs.items() if name in own}
    return made | {one.name: ending.shown(outputs[ending.value]) for one, ending in pairs}


def _interface_difference(a: ir.Model, b: ir.Model) -> str:
    for kind, first, second in (
        ("inputs", true_inputs(a), true_inputs(b)),
        ("inputs with a default", overridable_inputs(a), overridable_inputs(b)),
        ("outputs", list(a.graph.outputs), list(b.graph.outputs)),
    ):
        names = [value.name for value in first], [value.name for value in second]
        if sorted(map(str, names[0])) != sorted(map(str, names[1])):
            return f"the {kind} {names[0]} became {names[1]}"
    return ""


def _random_node(model: ir.Model) -> str:
    """The first node whose result is not a function of its inputs, described; "" if there is none.

    A node with a `seed` gives the same stream in both models and is allowed.
    """
    for node in _all_nodes(model):
        if node.domain not in ("", "ai.onnx") or "seed" in node.attributes:
            continue
        if node.op_type in _RANDOM_OPS or (node.op_type == "Dropout" and _trains(node)):
            return f"node {node.name!r} ({node.op_type})"
    return ""


def _trains(dropout: ir.Node) -> bool:
    mode = dropout.inputs[2] if len(dropout.inputs) > 2 else None
    if mode is None:
        return False
    constant = ir.convenience.get_const_tensor(mode)
    return constant is None or bool(constant.numpy().any())


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()
