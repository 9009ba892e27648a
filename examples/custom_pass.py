"""Write a pass of your own: a frozen dataclass with a decorator, which makes it known by its name.

    python examples/custom_pass.py [model.onnx]

From another package, announce the class by an entry point instead, and `cipm passes` lists it:

    [project.entry-points."cipm_ir.passes"]
    shuffle = "my_package.passes:Shuffle"
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import cipm_ir
from cipm_ir import passes
from cipm_ir.passes import Context, Kind, PassResult

DIGITS = Path(__file__).parent / "digits" / "digits.onnx"


@passes.register("shuffle")
@dataclass(frozen=True)
class Shuffle(passes.Pass):
    """Move every space by a random element of its group: other weights, the same function.

    Useful to hide which checkpoint a model came from, and as a test of anything that claims not to depend on the order
    of hidden units. EXACT: the pipeline runs the model before and after, and undoes the pass if it broke its promise.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    least: int = passes.option(2, "leave spaces with fewer units as they are", low=1)
    scales: bool = passes.option(True, "rescale units too, by powers of two")

    def run(self, program: cipm_ir.Program, ctx: Context) -> PassResult:
        """Draw one element for each space, and declare the elements, so that they can be undone."""
        chosen = [space for space in program.spaces if space.size >= self.least]
        elements = {}
        for space in chosen:
            element, still = space.random(ctx.rng, power_of_two=True), space.identity()
            elements[space] = element if self.scales else cipm_ir.Element(element.perm, still.scale, still.sign)
        if not elements:
            return PassResult(program, changed=False, summary="no space is large enough")
        moved = {space.name: element for space, element in elements.items()}
        return PassResult(program.act(elements), summary=f"{len(elements)} spaces moved", elements=moved)


def main() -> None:
    """Shuffle a model, print the report, and undo it."""
    model = sys.argv[1] if len(sys.argv) > 1 else DIGITS
    result = cipm_ir.optimize(model, passes=["shuffle{least=8}"])
    print(result.report)

    print(f"undone: {cipm_ir.verify(model, result.undo())}")


if __name__ == "__main__":
    main()
