"""A pass of `onnx_ir.passes` as a step of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from cipm_ir.errors import OptionError, VerificationError
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult
from cipm_ir.symmetry.program import Program


@dataclass(frozen=True)
class OnnxIrPass(Pass):
    """Run a pass of onnx_ir on a copy of the model, and analyse the result again.

    The pipeline verifies it like a pass of its own: as an exact one, which is left out where outputs move by more than
    rounding. ``passes=`` takes a bare `onnx_ir.passes.PassBase` too and wraps it so.

    Attributes:
        wrapped: the pass of onnx_ir.
        exact: whether it keeps the function; False for one that may change it, such as a conversion to another type.
    """

    name: ClassVar[str] = "onnx-ir"
    kind: ClassVar[Kind] = Kind.EXACT
    wrapped: ir.passes.PassBase
    exact: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.wrapped, ir.passes.PassBase):
            raise OptionError(f"OnnxIrPass wraps an onnx_ir.passes.PassBase, not {type(self.wrapped).__name__}.")

    @property
    def approximates(self) -> bool:
        """Whether the result may compute something else."""
        return not self.exact

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Run the wrapped pass; without effect, the program that came in is returned.

        What the pass says of its effect is not trusted: a change that it does not report counts as one.

        Raises:
            VerificationError: the wrapped pass failed, or changed inputs or outputs; the pipeline leaves it out.
        """
        model = program.emit()
        parts = _parts(model)
        try:
            result = self.wrapped(model)
        except Exception as error:
            raise VerificationError(f"{self} failed: {_first_line(error)}.") from error
        now = _parts(result.model)
        same = len(parts) == len(now) and all(a is b for a, b in zip(parts, now, strict=True))
        if not result.modified and same:
            return PassResult(program, False, "nothing to do")
        before, after = _interface(program.source_model), _interface(result.model)
        if before != after:
            raise VerificationError(f"{self} changed the inputs or outputs of the model from {before} to {after}.")
        made = Program.of(result.model, origin=program.origin, own=True)
        return PassResult(made, True, "done", kind=Kind.EXACT if self.exact else Kind.APPROXIMATE)

    def __str__(self) -> str:
        return f"onnx_ir:{type(self.wrapped).__name__}"


def _parts(model: ir.Model) -> list[object]:
    """Return the objects that a model is made of, which a change replaces: nodes, values, attributes, weights."""
    found: list[object] = []
    for node in model.graph.all_nodes():
        found += [node, *node.inputs, *node.outputs, *node.attributes.values()]
    for graph in (model.graph, *model.graph.subgraphs()):
        found += [*graph.inputs, *graph.outputs, *(v.const_value for v in graph.initializers.values())]
    return found


def _interface(model: ir.Model) -> tuple[list[str], list[str]]:
    graph = model.graph
    inputs = [v.name or "" for v in graph.inputs if v.const_value is None]
    return inputs, [v.name or "" for v in graph.outputs]


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
