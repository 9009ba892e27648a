"""A program that came from torch: how it is written, run and compared."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx

from cipm_ir.backends.torch.emit import Emitted, emit_graph, emit_rewritten, emit_torch, example_tensors, graph_side
from cipm_ir.backends.torch.runs import as_array, near
from cipm_ir.errors import CipmError
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.inputs.generate import Data, Feeds, batches, random_inputs_like, true_inputs
from cipm_ir.runtime.verification.cases import RECIPES, affordable_cases, own_cases, rows_of_tables, tried
from cipm_ir.runtime.verification.compare import (
    MEASURED,
    Array,
    Case,
    Outputs,
    Reference,
    Tolerance,
    Variants,
    Verification,
)
from cipm_ir.runtime.verification.endings import Ending, common_endings, endings, softmax_units
from cipm_ir.runtime.verification.verify import BATCHES, OnnxVariants
from cipm_ir.symmetry.program import Program


@dataclass
class TorchOrigin:
    """Where a torch program came from."""

    capture: Capture

    def emit(self, model: ir.Model, runs: bool = True) -> Emitted:
        """Return the model as the kind of torch object that came in; see `cipm_ir.backends.torch.emit.emit_torch`."""
        return emit_torch(self.capture, model, runs)

    def graph(self, model: ir.Model) -> fx.GraphModule:
        """Return the model as a GraphModule in evaluation mode, whatever kind came in."""
        return emit_graph(self.capture, model).eval()

    def write(self, model: ir.Model, path: str) -> None:
        """Write ``path``: ``.onnx`` by torch's exporter, ``.pt2`` by `torch.export.save`, a folder as a plan."""
        from cipm_ir.backends.torch.files import write

        write(self.capture, self.emit(model), path)

    def verifier(self, model: ir.Model, **settings: Any) -> TorchVerifier:
        """Return what compares other models of this origin with one; ``settings`` as for `TorchVerifier`."""
        return TorchVerifier(Program(model, origin=self), self, **settings)

    def compare(
        self, a: ir.Model, b: ir.Model, *, rtol: float | None = None, atol: float | None = None, **settings: Any
    ) -> Verification:
        """Run both in torch; ``settings`` as for `TorchVerifier`."""
        return self.verifier(a, **settings).check(b, Tolerance(rtol, atol))

    def run(self, graph: fx.GraphModule, feeds: Feeds) -> dict[str, Array]:
        """Return outputs by position, as arrays.

        Raises:
            InputError: torch cannot run the graph with these inputs.
        """
        return graph_side(self.capture, graph).run(feeds)

    def examples(self) -> Feeds:
        """Return the example inputs by name; empty where there are none."""
        if self.capture.args is None:
            return {}
        tensors = zip(self.capture.inputs, example_tensors(self.capture), strict=True)
        return {name: as_array(x) for name, x in tensors}


class Renamed:
    """Runs of a program under other names of its inputs and outputs, with its endings as their activations see them."""

    def __init__(
        self, side: Variants, inputs: Mapping[str, str], outputs: Mapping[str, str], shown: Mapping[str, Ending]
    ) -> None:
        self._side, self._inputs, self._outputs, self._shown = side, inputs, outputs, shown
        self.backend = side.backend

    def others(self) -> Sequence[str]:
        """Return the names of all ways to run but the plain one."""
        return self._side.others()

    def more(self) -> Sequence[str]:
        """Return further names, for cases of doubt."""
        return self._side.more()

    def outputs(self, feeds: Sequence[Feeds], way: str = "") -> Iterator[Outputs]:
        """Run on each of several inputs; "" is the plain way."""
        renamed = [{self._inputs.get(name, name): x for name, x in one.items()} for one in feeds]
        for got in self._side.outputs(renamed, way):
            made = {self._outputs.get(name, name): x for name, x in got.items()}
            yield {name: self._shown[name].shown(x) if name in self._shown else x for name, x in made.items()}


class TorchVerifier:
    """Compare programs with one that is taken as right, inputs and outputs by position.

    They run in evaluation mode, on data, on the example inputs and on inputs of our own of the examples' sizes. Values
    in front of the last activations are compared too (`cipm_ir.runtime.verification.endings`).

    Args:
        program: taken as right; of torch or ONNX.
        origin: of a torch program: of this one, or of those that it is compared with.
        data: samples, see `batches`.
        seed: of the random inputs.
        cases: at most so many inputs of our own, and batches of data; None: what time allows.

    Raises:
        InputError: where the data does not fit.
    """

    def __init__(
        self,
        program: Program,
        origin: TorchOrigin,
        *,
        data: Data | None = None,
        seed: int = 0,
        cases: int | None = None,
        inputs: ir.Model | None = None,
    ) -> None:
        self._program, self._origin, self._seed, self._cases = program, origin, seed, cases
        self._inputs = inputs or program.model
        given = [] if data is None else list(itertools.islice(batches(data, self._inputs), cases or BATCHES))
        self._given = given
        self._endings = _endings(program.model)
        self._made: Reference | None = None

    def check(self, other: ir.Model | Program, tolerance: Tolerance = MEASURED) -> Verification:
        """Compare another program, or another model of the same origin."""
        start = time.perf_counter()
        program = other if isinstance(other, Program) else Program(other, origin=self._origin)
        return replace(self._check(program, tolerance), seconds=time.perf_counter() - start)

    def _check(self, program: Program, tolerance: Tolerance) -> Verification:
        counts = len(true_inputs(self._program.model)), len(true_inputs(program.model))
        if counts[0] != counts[1]:
            return Verification(False, reason=f"the first takes {counts[0]} inputs, the second {counts[1]}")
        try:
            reference = self._reference()
        except CipmError as error:
            return Verification(None, reason=str(error).rstrip("."), backend="torch")
        try:
            actual = self._actual(program, reference)
        except CipmError as error:
            return Verification(False, reason=f"the second model fails: {error}", backend="torch")
        counts = _outputs(reference.sticks[0]), _outputs(actual[0])
        if counts[0] != counts[1]:
            return Verification(False, reason=f"the first gives {counts[0]} outputs, the second {counts[1]}")
        found = reference.compare(actual, tolerance)
        across = isinstance(program.origin, TorchOrigin) != isinstance(self._program.origin, TorchOrigin)
        if found.ok is False and tolerance.measured and across and near(reference, actual):
            return replace(found, ok=True, reason="")
        return found

    def _actual(self, program: Program, reference: Reference) -> list[Outputs]:
        """Run another program; without a look in front of its activations where a value cannot be handed out."""
        pairs = common_endings(self._endings, _endings(program.model))
        if pairs:
            with contextlib.suppress(CipmError):
                return list(self._side(program, [ending for _, ending in pairs]).outputs(reference.feeds))
        return list(self._side(program, ()).outputs(reference.feeds))

    def _side(self, program: Program, found: Sequence[Ending]) -> Renamed:
        model = program.emit()
        shown = {ending.name: ending for ending in found}
        if isinstance(program.origin, TorchOrigin):
            capture = program.origin.capture
            written = emit_rewritten(capture, model)
            watched = {e.name: written.values[e.value] for e in found if e.value in written.values}
            return Renamed(graph_side(capture, written.module, self._seed, watched), {}, {}, shown)
        own = [value.name or "" for value in true_inputs(self._inputs)]
        names = dict(zip(own, (value.name or "" for value in true_inputs(model)), strict=True))
        outputs = {value.name or "": name for value, name in zip(model.graph.outputs, _numbered(model), strict=True)}
        return Renamed(OnnxVariants(model, found, self._seed, None), names, outputs, {})

    def _reference(self) -> Reference:
        if self._made is None and self._endings:
            try:
                self._made = self._first_runs()
            except CipmError:  # a value that cannot be handed out
                self._endings = []
        if self._made is None:
            self._made = self._first_runs()
        return self._made

    def _first_runs(self) -> Reference:
        side = self._side(self._program, self._endings)

        def run(feeds: Feeds) -> Outputs:
            return next(iter(side.outputs([feeds])))

        made = [Case(f"batch {k} of the data", feeds, run(feeds)) for k, feeds in enumerate(self._given)]
        made += self._own(run, np.random.default_rng(self._seed), bool(made))
        return Reference(side, made, softmax_units(self._endings))

    def _own(self, run: Callable[[Feeds], Outputs], rng: np.random.Generator, given: bool) -> list[Case]:
        examples = self._origin.examples()
        if not examples:
            return own_cases(self._inputs, run, rng, self._cases)
        start = time.perf_counter()
        made = [] if given else [Case("example", examples, run(examples))]
        most = affordable_cases(time.perf_counter() - start) if self._cases is None else self._cases
        for recipe in [*RECIPES, *rows_of_tables(self._inputs, examples)][: max(most - len(made), 0)]:
            made += tried(recipe.name, random_inputs_like(self._inputs, examples, rng, recipe), run)
        return made


def _numbered(model: ir.Model) -> list[str]:
    return [f"output {k}" for k in range(len(model.graph.outputs))]


def _endings(model: ir.Model) -> list[Ending]:
    return endings(model, _numbered(model))


def _outputs(names: Iterable[str]) -> int:
    """Return how many of the names are those of outputs, not of endings."""
    return sum("<" not in name for name in names)


def compare_programs(
    a: Program,
    b: Program,
    *,
    data: Data | None = None,
    seed: int = 0,
    cases: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
) -> Verification:
    """Compare two programs of which at least one came from torch; see `TorchVerifier`.

    Raises:
        InputError: where the data does not fit.
    """
    torch_one = a if isinstance(a.origin, TorchOrigin) else b
    assert isinstance(torch_one.origin, TorchOrigin)
    inputs = torch_one.model
    verifier = TorchVerifier(a, torch_one.origin, data=data, seed=seed, cases=cases, inputs=inputs)
    return verifier.check(b, Tolerance(rtol, atol))
