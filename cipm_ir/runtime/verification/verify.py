"""Do two models compute the same? They run on the same inputs, and may differ by the first one's rounding."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import CipmError, InputError, UnsupportedError
from cipm_ir.ir.bodies import body_graphs
from cipm_ir.ir.nested import nodes_within
from cipm_ir.ir.parameters import overridable_inputs
from cipm_ir.runtime.graphs import all_graphs
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, true_inputs
from cipm_ir.runtime.integer_products import computes_in_integers, processor_saturates
from cipm_ir.runtime.session import Backend, Runner
from cipm_ir.runtime.verification.branches import EntryCounter, body_hash, forced, has_bodies, without_functions
from cipm_ir.runtime.verification.cases import LEAST, own_cases, tried
from cipm_ir.runtime.verification.compare import (
    MEASURED,
    Case,
    Outputs,
    Reference,
    Tolerance,
    Verification,
    named_paths,
)
from cipm_ir.runtime.verification.endings import Ending, common_endings, endings, output_units
from cipm_ir.runtime.verification.modes import mode_cases, varied
from cipm_ir.runtime.verification.noise import DRAWS, MORE_DRAWS, nudged, nudged_model

__all__ = ["BATCHES", "OnnxVariants", "Tolerance", "Verification", "Verifier", "verify_models"]

_RANDOM_OPS = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
BATCHES = 3
"""So many batches of data are looked at."""

_FORCES = 8
"""So many branches that no input takes are looked at by force."""
_LARGE = 256 << 20
_SMALL = 64 << 20


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
        self._entered: list[tuple[Feeds, dict[str, int]]] | None = None
        self._branches: dict[tuple[str, bool], Verifier | None] = {}
        self._forces, self._below = _FORCES, ""

    @property
    def model(self) -> ir.Model:
        """The model taken as right."""
        return self._model

    def check(self, model: ir.Model, tolerance: Tolerance = MEASURED) -> Verification:
        """Compare another model, whose inputs and outputs must have the same names."""
        start = time.perf_counter()
        found = self._check(model, tolerance)
        if found.ok and has_bodies(self._model):
            found = self._with_branches(found, model, tolerance)
        return replace(found, seconds=time.perf_counter() - start)

    # ------------------------------------------------------------ bodies that no input enters
    def _with_branches(self, found: Verification, model: ir.Model, tolerance: Tolerance) -> Verification:
        """Compare what no input entered with the condition of its If forced; note what cannot be compared so."""
        mine, other = without_functions(self._model), without_functions(model)
        unknown, share = [], found.share
        paths = self._never_entered(mine)
        changed = {path for path in paths if body_hash(mine, path) != body_hash(other, path)}
        for path in sorted(paths, key=lambda path: path not in changed):
            verdict = self._forced(path, mine, other, tolerance)
            if path in changed and (verdict is None or verdict.ok is None):  # other sizes may fit
                verdict = self._forced(path, mine, other, tolerance, own=True)
            if verdict is not None and verdict.ok is False:
                return replace(verdict, reason=f"where {path} is taken, {verdict.reason}")
            if verdict is None or verdict.ok is None:
                unknown.append(path)
            else:
                unknown += verdict.unrun
                share = max(share, verdict.share)
        lost = [path for path in unknown if path in changed or body_hash(mine, path) != body_hash(other, path)]
        if lost:
            reason = f"no input enters the body {named_paths(lost)}, which changed; where inputs go, the outputs agree"
            return replace(found, ok=None, reason=reason, unrun=tuple(unknown))
        return replace(found, unrun=tuple(unknown), share=share)

    def _never_entered(self, model: ir.Model) -> list[str]:
        """Bodies that no input enters but constant ones, which tell little; without those below another of them."""
        if self._entered is None:
            assert self._made is not None
            feeds = [one for one in self._made.feeds if varied(one)] or self._made.feeds
            backend: Backend = "reference" if self._made.backend == "reference" else "onnxruntime"
            try:
                with EntryCounter(model, backend) as count:
                    self._entered = [(one, count(one)) for one in feeds]
            except CipmError:
                self._entered = [(one, {path: 0 for path, _, _ in body_graphs(model.graph)}) for one in feeds]
        paths = self._entered[0][1]
        never = {path for path in paths if path.startswith(self._below) and not any(c[path] for _, c in self._entered)}
        return [path for path in paths if path in never and not any(path.startswith(f"{o}/") for o in never)]

    def _reaching(self, path: str) -> list[Feeds]:
        """Return the inputs that enter the body around another one."""
        runs = self._entered or []
        outer = [known for known in (runs[0][1] if runs else ()) if path.startswith(f"{known}/")]
        around = max(outer, key=len, default=None)
        return [feeds for feeds, counts in runs if around is None or counts[around]]

    def _forced(
        self, path: str, mine: ir.Model, other: ir.Model, tolerance: Tolerance, own: bool = False
    ) -> Verification | None:
        """Compare with one branch always taken; None where that is not possible, or was done often enough.

        Args:
            path: of the branch.
            mine, other: the models, without functions that hold bodies.
            tolerance: what counts as equal.
            own: on inputs drawn for the branch, else on those that get to its If.
        """
        second = forced(other, path)
        if (path, own) not in self._branches:
            first = forced(mine, path) if len(self._branches) < self._forces else None
            self._branches[path, own] = None if first is None else self._alike(first, path, own)
        inner = self._branches[path, own]
        return None if inner is None or second is None else inner.check(second, tolerance)

    def _alike(self, model: ir.Model, path: str, own: bool) -> Verifier:
        """Return a verifier of a variant that takes a branch, for what is in it."""
        made = Verifier(model, seed=self._seed, cases=min(self._cases or LEAST, LEAST) if own else 0)
        made._given = [] if own else self._reaching(path)
        made._forces, made._below = self._forces // 2, f"{path}/"
        return made

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
                self._made = self._first_runs(backend)
            except InputError:
                if not self._endings:
                    raise
                self._endings = []  # a value that cannot be handed out
                self._made = self._first_runs(backend)
        return self._made

    def _first_runs(self, backend: Backend | None) -> Reference:
        # onnxruntime's optimizations have crashed on graphs with a branch that never fits
        whole = not self._below
        return _reference(self._model, self._endings, self._given, self._seed, self._cases, backend, whole)

    def _actual(self, model: ir.Model, reference: Reference) -> list[Outputs] | InputError:
        pairs = common_endings(self._endings, endings(model))
        try:
            with _runner(model, pairs, reference.backend, self._model) as runner:
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
    """Compare two models on batches of `data` and on generated inputs (`cipm_ir.runtime.verification.cases`).

    Floating outputs agree when they differ, in each channel, by no more than the rounding noise of the first model
    allows (`cipm_ir.runtime.verification.noise`), and NaN and infinities are at the same positions. Integers must be
    equal, except as many
    as rounding alone changes. Values in front of the last activations are compared too. The models run one
    after the other, so that one of them is in memory at a time.

    Args:
        a: the reference model.
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

    def __init__(
        self, model: ir.Model, found: Sequence[Ending], seed: int, backend: Backend | None, optimized: bool = True
    ) -> None:
        self._model, self._seed, self._backend, self._optimized = model, seed, backend, optimized
        self._pairs = [(ending, ending) for ending in found]

    @property
    def backend(self) -> str:
        """What runs the model."""
        return self._backend or "onnxruntime"

    def others(self) -> Sequence[str]:
        """Return the names of all ways to run but the plain one."""
        draws = [f"draw {k}" for k in range(DRAWS if _weights(self._model) <= _LARGE else 1)]
        exact = (
            self._optimized
            and self.backend == "onnxruntime"
            and not (processor_saturates() and computes_in_integers(self._model))
        )
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
        with _runner(model, self._pairs, self._backend, self._model, fast=way == "optimized") as runner:
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
    optimized: bool,
) -> Reference:
    """Run a model on data and on inputs of our own that it accepts.

    Raises:
        InputError: it runs on none.
        UnsupportedError: it runs on none.
    """
    pairs = [(ending, ending) for ending in found]
    with _runner(model, pairs, backend, model) as runner:

        def run(feeds: Feeds) -> Outputs:
            return _with_endings(runner.run(feeds), model, pairs)

        if cases == 0:
            ran = (one for k, feeds in enumerate(given) for one in tried(f"input {k}", feeds, run))
            made = list(itertools.islice(ran, LEAST))
            if not made:
                raise InputError("The model runs on none of the inputs that the other branches take.")
        else:
            made = [Case(f"batch {k} of the data", feeds, run(feeds)) for k, feeds in enumerate(given)]
            try:
                made += own_cases(model, run, np.random.default_rng(seed), cases)
            except CipmError:
                if not given:
                    raise
        if optimized:  # not a variant that takes one branch anyway
            made += mode_cases(without_functions(model), run, made, np.random.default_rng(seed), runner.backend)
    return Reference(OnnxVariants(model, found, seed, runner.backend, optimized), made, units=output_units(model))


def _runner(
    model: ir.Model, pairs: Sequence[tuple[Ending, Ending]], backend: str | None, first: ir.Model, *, fast: bool = False
) -> Runner:
    """Make a model ready to run on a few small inputs; the size of the first of those compared decides how.

    Threads cost small models more than they save; the weights of large ones are not copied.
    """
    small = _weights(first) <= _SMALL
    threads = 1 if small else None
    return Runner(model, extra_outputs=_values(pairs), backend=backend, fast=fast, threads=threads, lean=not small)  # type: ignore[arg-type]


def _weights(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    return sum(v.const_value.nbytes for g in all_graphs(model) for v in g.initializers.values() if v.const_value)


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
    """Return the first node whose result is not a function of its inputs, described; "" if there is none.

    A node with a `seed` gives the same stream in both models and is allowed.
    """
    for node in _all_nodes(model):
        if node.domain or "seed" in node.attributes:
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
    for root in (model.graph, *(function.graph for function in model.functions.values())):
        yield from nodes_within(root)
