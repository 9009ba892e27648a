"""A program that came from torch: how it is written, run and compared."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx
from torch.utils import _pytree as pytree

from cipm_ir.backends.to_torch import Emitted, emit_graph, emit_torch, example_tensors, first_line, run_flat
from cipm_ir.backends.to_torch_state import as_torch
from cipm_ir.errors import CipmError, InputError
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.inputs import Data, Feeds, batches, random_inputs, true_inputs
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verify import Array, Verification, compare_outputs
from cipm_ir.symmetry.program import Program


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

    def compare(self, a: ir.Model, b: ir.Model, **settings: Any) -> Verification:
        """Run both in torch; ``settings`` as for `compare_programs`."""
        return compare_programs(Program(a, origin=self), Program(b, origin=self), **settings)

    def run(self, graph: fx.GraphModule, feeds: Feeds) -> dict[str, Array]:
        """Outputs by position, as arrays.

        Errors: `InputError` where torch cannot run the graph with these inputs.
        """
        device = next((p.device for p in itertools.chain(graph.parameters(), graph.buffers())), torch.device("cpu"))
        tensors = [as_torch(ir.tensor(feeds[name])).to(device) for name in self.capture.inputs]
        try:
            made = run_flat(graph, self.capture, tensors)
        except Exception as error:  # any operation of torch
            raise InputError(f"torch cannot run the program: {first_line(error)}.") from error
        outputs = [x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
        return {f"output {k}": tensor_adapters.TorchTensor(x.detach().cpu()).numpy() for k, x in enumerate(outputs)}

    def drawn(self, model: ir.Model, rng: np.random.Generator, cases: int) -> list[Feeds]:
        """The example inputs, and random ones like these."""
        if self.capture.args is None:
            return [random_inputs(model, rng) for _ in range(cases)]
        examples = dict(zip(self.capture.inputs, example_tensors(self.capture), strict=True))
        return [{name: _like(x, rng, case) for name, x in examples.items()} for case in range(cases)]


def _like(example: torch.Tensor, rng: np.random.Generator, case: int) -> Array:
    """The example first; then random numbers of its shape: floats N(0, 1), integers drawn from its entries."""
    array = np.asarray(tensor_adapters.TorchTensor(example.cpu()).numpy())
    if case == 0 or not array.size or array.dtype == bool:
        return array
    if example.dtype.is_floating_point:
        return np.asarray(rng.standard_normal(array.shape)).astype(array.dtype)
    return np.asarray(rng.permutation(array.ravel()).reshape(array.shape))


def compare_programs(
    a: Program,
    b: Program,
    *,
    data: Data | None = None,
    seed: int = 0,
    cases: int = 3,
    rtol: float | None = None,
    atol: float | None = None,
) -> Verification:
    """Compare two programs of which at least one came from torch, inputs and outputs by position.

    They run in evaluation mode, on data, on the example inputs and on random ones like these.

    Errors: `InputError` where the data does not fit.
    """
    torch_one = a if isinstance(a.origin, TorchOrigin) else b
    origin = torch_one.origin
    assert isinstance(origin, TorchOrigin)
    model, names = torch_one.emit(), [[v.name or "" for v in true_inputs(p.model)] for p in (a, b)]
    if len(names[0]) != len(names[1]):
        return Verification(False, reason=f"the first takes {len(names[0])} inputs, the second {len(names[1])}")
    given = list(itertools.islice(batches(data, model), cases)) if data is not None else []
    feeds = [*given, *origin.drawn(model, np.random.default_rng(seed), cases)]
    own = [v.name or "" for v in true_inputs(model)]
    results: list[list[dict[str, Array]]] = []
    for program, wanted in zip((a, b), names, strict=True):
        renamed = [{w: one[o] for o, w in zip(own, wanted, strict=True)} for one in feeds]
        try:
            results.append(_outputs(program, renamed))
        except CipmError as error:
            first = program is a
            reason = str(error).rstrip(".") if first else f"the second model fails: {error}"
            return Verification(None if first else False, reason=reason, backend="torch")
    counts = [len(r[0]) for r in results]
    if counts[0] != counts[1]:
        return Verification(False, reason=f"the first gives {counts[0]} outputs, the second {counts[1]}")
    return compare_outputs(results[0], results[1], rtol, atol, "torch")


def _outputs(program: Program, feeds: list[Feeds]) -> list[dict[str, Array]]:
    if isinstance(program.origin, TorchOrigin):
        graph = emit_graph(program.origin.capture, program.emit())
        return [program.origin.run(graph, one) for one in feeds]
    with Runner(program.emit()) as runner:
        return [{f"output {k}": x for k, x in enumerate(runner.run(one).values())} for one in feeds]
