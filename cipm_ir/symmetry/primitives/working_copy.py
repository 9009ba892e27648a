"""A copy of a program whose weights are set in place: for passes that refit one product after the other."""

from __future__ import annotations

from collections.abc import Mapping

from cipm_ir.ir.labels import Array
from cipm_ir.symmetry.program import Program, set_values


class WorkingCopy:
    """A program of its own whose weights change in place, so that many refits need one copy of the graph.

    Attributes:
        program: the copy as it is by now. It must not be handed out: `result` returns a program that stays.
    """

    def __init__(self, program: Program) -> None:
        self._before = program
        self._changed: dict[str, Array] = {}
        self.program = program.refit({})

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Set the values, not the shapes, of named parameters; see `Program.refit`."""
        set_values(self.program.model, weights)
        self._changed.update(weights)

    def result(self) -> Program:
        """Return the program with all weights that were set."""
        return self._before.refit(self._changed)
