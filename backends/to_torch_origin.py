"""A program that came from torch: how it is written, run and compared."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from torch import fx

from cipm_ir.backends.to_torch import Emitted, emit_graph, emit_torch, example_tensors, graph_side
from cipm_ir.backends.to_torch_runs import Side, cases_like, near
from cipm_ir.errors import CipmError
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.compare import MEASURED, Case, Outputs, Reference, Tolerance, Variants, Verification
from cipm_ir.runtime.inputs import Data, Feeds, batches, true_inputs
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verify import OnnxVariants
from cipm_ir.symmetry.program import Program

_BATCHES = 3


@dataclass
class TorchOrigin:
    """Where a torch program came from."""

    capture: Capture

    def emit(self, model: ir.Model) -> Emitted:
        """The model as the kind of torch object that came in; see `cipm_ir.backends.to_torch.emit_torch`."""
        return emit_torch(self.capture, model)

    def graph(self, model: ir.Model) -> fx.GraphModule:
        """The model as a GraphModule in evaluation mode, whatever kind came in."""
        return emit_graph(self.capture, model).eval()

    def write(self, model: ir.Model, path: str) -> None:
        """Write ``path``: ``.onnx`` by torch's exporter, ``.pt2`` by `torch.export.save`, a folder as a plan."""
        from cipm_ir.backends.to_torch_files import write

        write(self.capture, self.emit(model), path)

    def verifier(
        self, model: ir.Model, *, data: Data | None = None, seed: int = 0, cases: int | None = None
    ) -> TorchVerifier:
        """What compares other models with this one, in torch."""
        return TorchVerifier(Program(model, origin=self), data=data, seed=seed, cases=cases)

    def compare(self, a: ir.Model, b: ir.Model, **settings: Any) -> Verification:
        """Run both in torch; ``settings`` as for `compare_programs`."""
        return compare_programs(Program(a, origin=self), Program(b, origin=self), **settings)

    def run(self, graph: fx.GraphModule, feeds: Feeds) -> Outputs:
        """Outputs by position, as arrays.

        Errors: `InputError` where torch cannot run the graph with these inputs.
        """
        return graph_side(self.capture, graph).run(feeds)


class TorchVerifier:
    """Compares programs with one that is taken as right; one of them at least came from torch.

    They run in evaluation mode, on data, on the example inputs and on inputs of our own of the same shapes
    (`cipm_ir.backends.to_torch_runs.inputs_like`). Inputs and outputs are taken by position.

    Args:
        program: taken as right.
        origin: of the torch program, where this one did not come from torch.
        data: samples, see `batches`.
        seed: of the random inputs.
        cases: at most so many inputs of our own, and batches of data.

    Raises:
        InputError: the data does not fit.
    """

    def __init__(
        self, program: Program, origin: TorchOrigin | None = None, *, data: Data | None = None, seed: int = 0,
        cases: int | None = None,
    ) -> None:  # fmt: skip
        own = program.origin if isinstance(program.origin, TorchOrigin) else origin
        assert own is not None
        self.program, self.origin, self.seed, self.cases = program, own, seed, cases
        model = program.emit()
        self.names = _names(program)
        self.given = [] if data is None else list(itertools.islice(batches(data, model), cases or _BATCHES))
        self._reference: Reference | None = None

    def check(self, other: ir.Model | Program, tolerance: Tolerance = MEASURED) -> Verification:
        """Compare another program; a model is one of the same origin."""
        start = time.perf_counter()
        second = other if isinstance(other, Program) else Program(other, origin=self.origin)
        return replace(self._check(second, tolerance), seconds=time.perf_counter() - start)

    def _check(self, second: Program, tolerance: Tolerance) -> Verification:
        names = _names(second)
        if len(names) != len(self.names):
            return Verification(False, reason=f"the first takes {len(self.names)} inputs, the second {len(names)}")
        try:
            reference = self._measured()
        except CipmError as error:
            return Verification(None, reason=str(error).rstrip("."), backend="torch")
        renamed = [{b: feeds[a] for a, b in zip(self.names, names, strict=True)} for feeds in reference.feeds]
        try:
            actual = list(_variants(second, self.seed).outputs(renamed))
        except CipmError as error:
            reason = f"the second model fails: {error}"
            return Verification(False, cases=len(renamed), reason=reason, backend="torch")
        counts = [len(reference.sticks[0]), len(actual[0])]
        if counts[0] != counts[1]:
            return Verification(False, reason=f"the first gives {counts[0]} outputs, the second {counts[1]}")
        found = reference.compare(actual, tolerance)
        across = isinstance(second.origin, TorchOrigin) != isinstance(self.program.origin, TorchOrigin)
        if found.ok is False and tolerance.measured and across and near(reference, actual):
            return replace(found, ok=True, reason="")
        return found

    def _measured(self) -> Reference:
        if self._reference is None:
            first = _variants(self.program, self.seed)
            made = [
                Case(f"batch {k} of the data", feeds, out)
                for k, (feeds, out) in enumerate(zip(self.given, first.outputs(self.given), strict=True))
            ]
            self._reference = Reference(first, [*made, *self._own(first)])
        return self._reference

    def _own(self, first: Variants) -> list[Case]:
        capture = self.origin.capture
        if capture.args is None:
            return []
        if isinstance(first, Side):
            drawn = cases_like(first, example_tensors(capture))
        else:  # shapes and inputs are those of the torch program, numbers those of the other
            side = graph_side(capture, self.origin.graph(capture.model), self.seed)
            like = cases_like(side, example_tensors(capture))
            feeds = [dict(zip(self.names, case.feeds.values(), strict=True)) for case in like]
            drawn = [Case("like the example", one, out) for one, out in zip(feeds, first.outputs(feeds), strict=True)]
        return drawn[: self.cases]


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
        InputError: the data does not fit.
    """
    origin = a.origin if isinstance(a.origin, TorchOrigin) else b.origin
    assert isinstance(origin, TorchOrigin)
    return TorchVerifier(a, origin, data=data, seed=seed, cases=cases).check(b, Tolerance(rtol, atol))


def _names(program: Program) -> list[str]:
    return [v.name or "" for v in true_inputs(program.model)]


def _variants(program: Program, seed: int) -> Variants:
    if isinstance(program.origin, TorchOrigin):
        capture = program.origin.capture
        return graph_side(capture, emit_graph(capture, program.emit()), seed)
    model = program.emit()
    with Runner(model) as runner:
        backend = runner.backend
    return _ByPosition(OnnxVariants(model, [], seed, backend), backend)


@dataclass
class _ByPosition:
    """An ONNX model whose outputs are named by their position."""

    side: OnnxVariants
    backend: str

    def others(self) -> Sequence[str]:
        return self.side.others()

    def more(self) -> Sequence[str]:
        more = getattr(self.side, "more", None)
        return () if more is None else tuple(more())

    def outputs(self, feeds: Sequence[Feeds], way: str = "") -> Iterator[Outputs]:
        for made in self.side.outputs(feeds, way):
            yield {f"output {k}": x for k, x in enumerate(made.values())}
