"""The pass `rotate`: residual streams and heads in a basis in which no entry stands out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cipm_ir.algebra import DenseElement
from cipm_ir.errors import OptionError
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.passes.exact.rotate.metrics import compare
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult, option
from cipm_ir.passes.framework.reasons import idle, listed
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.primitives.act import act_edits
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

LARGEST = 8192
"""Spaces of more units than this stay: their matrix would take more than half a gigabyte."""
_MOVES = ("Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze")
_WORDS = {"stream": "residual stream", "heads": "head", "scores": "product of queries and keys"}


class Matrices(dict[str, Any]):
    """Matrices by name of a space; prints short."""

    def __repr__(self) -> str:
        return f"<{len(self)} matrices>"


@register("rotate")
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate spaces on which everything is linear or RMS-normalized, so that outliers spread over all units.

    1. ``stream``: a residual stream whose only nonlinearity is the length of its vectors (RMSNormalization with gamma
       folded) admits O(n): what writes to it takes Q, what reads it takes Q too (R1 of SpinQuant, Liu et al. 2024).
    2. ``heads``: between V and O of a head, and wherever else one product follows another with nothing between that is
       not linear, one orthogonal matrix per space (R2 there; QuaRot, Ashkboos et al. 2024).
    3. ``scores``: between Q and K where no rotary embedding comes in between.

    ``hadamard`` takes a Hadamard matrix with random signs, which spreads a single outlier evenly; ``random`` a uniform
    orthogonal matrix; ``matrix`` (from Python only) your own, by name of the space, also for spaces not asked for
    otherwise. Spaces with gammas that differ, or with a LayerNormalization, stay: run ``expose`` first.
    Exact in real arithmetic; weights are computed in float64 and rounded once. The witness holds the matrices.
    """

    stream: bool = option(True, "rotate residual streams under RMS normalization")
    heads: bool = option(True, "rotate between V and O of each head, and other spaces between two products")
    scores: bool = option(False, "rotate between Q and K of each head, where nothing depends on the position")
    method: str = option("hadamard", "how matrices are drawn", choices=("hadamard", "random"))
    matrix: Any = option(  # noqa: RUF009 (a field description, not a value that is shared)
        None, "from Python only: orthogonal or invertible matrices by name of a space"
    )
    kind: ClassVar[Kind] = Kind.EXACT

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.matrix is None:
            return
        if not isinstance(self.matrix, Mapping):
            raise OptionError(
                f"Pass 'rotate': option 'matrix' takes a dict from names of spaces to matrices, not {self.matrix!r}."
            )
        object.__setattr__(self, "matrix", Matrices(self.matrix))

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Choose spaces, draw matrices, act, and measure what it did to the weights."""
        ctx.progress("rotate", None)
        roles = dense_roles(program)
        elements = self._given(program)
        for space, role in roles.items():
            if getattr(self, role) and space not in elements and space.size <= LARGEST:
                elements[space] = draw(self.method, space.size, ctx.rng)
        large = [
            f"@{s.name}" for s, role in roles.items() if getattr(self, role) and s.size > LARGEST and s not in elements
        ]
        notes = [obstacles(program)] if self.stream and "stream" not in roles.values() else []
        notes += [f"{listed(large)} stay: more than {LARGEST} units"] if large else []
        unasked = Counter(role for space, role in roles.items() if not getattr(self, role) and space not in elements)
        notes += [f"{n} {_plural(_WORDS[role], n)} not asked for ({role}=true)" for role, n in unasked.items()]
        left = "; ".join(notes)
        if not elements:
            return PassResult(program, changed=False, summary=left or idle(program, "no space admits a rotation"))
        edits = act_edits(program.analysis, {program.index(space): g for space, g in elements.items()})
        found = compare(program, edits)
        metrics = {"spaces": len(elements), "method": self.method, **found.metrics()}
        witness = {space.name: {"matrix": element.matrix} for space, element in elements.items()}
        summary = f"{_counted(elements, roles)} rotated; {_effect(metrics)}" + (f"; {left}" if left else "")
        return PassResult(
            program.act(elements),
            True,
            summary,
            witness,
            metrics,
            figures=found.figures(),
            elements={s.name: g for s, g in elements.items()},
        )

    def _given(self, program: Program) -> dict[Space, DenseElement]:
        made: dict[Space, DenseElement] = {}
        for name, matrix in (self.matrix or {}).items():
            space, element = program.space(name), DenseElement(np.asarray(matrix))
            space.check_dense(element)
            made[space] = element
        return made


def draw(method: str, n: int, rng: np.random.Generator) -> DenseElement:
    """Return an orthogonal matrix: "hadamard" or "random"."""
    return DenseElement.hadamard(n, rng) if method == "hadamard" else DenseElement.orthogonal(n, rng)


# ---------------------------------------------------------------- which spaces
def dense_roles(program: Program) -> dict[Space, str]:
    """Return spaces with a dense group: "stream" (normalized), "heads" (a weight reads it) or "scores" (Q meets K)."""
    analysis = program.analysis
    dense = {k: space for k, space in enumerate(program.spaces) if space.dense}

    def is_read(k: int) -> bool:
        sums = analysis.consumers.contractions(analysis.spaces[k].table[:, 0])
        return any(_is_weight(program, c.node, side) for c in sums for side in (0, 1))

    return {
        space: "stream" if space.linearity.normalized else "heads" if is_read(k) else "scores"
        for k, space in dense.items()
    }


def _is_weight(program: Program, position: int, index: int) -> bool:
    """Return whether an input of a node is a parameter, or one that only changed its shape."""
    walk = program.analysis.walk
    node = walk.nodes[position]
    if (position, index) in walk.use_leaf or index >= len(node.inputs):
        return index < len(node.inputs)
    value = node.inputs[index]
    while value is not None and (maker := value.producer()) is not None and maker.op_type in _MOVES:
        value = maker.inputs[0]
    return parameter_tensor(value) is not None


def obstacles(program: Program) -> str:
    """Return why no residual stream admits a rotation, and what would make one; empty where there is nothing to say."""
    gammas = {k for space in program.spaces if not space.dense for k in space.linearity.gammas}
    means = sum(node.op_type == "LayerNormalization" for node in program.model.graph)
    if gammas:
        leaves = program.analysis.walk.leaves
        what = f"{len(gammas)} normalizations scale their units unlike ({leaves[min(gammas)].name}, ...)"
    elif means:
        what = f"{means} LayerNormalizations subtract a mean"
    else:
        return "no residual stream admits a rotation: none is linear but for normalizations by its length"
    cure = "run expose right before, which takes out what it can (equalize scales gains again)"
    return f"the residual stream stays, as {what}; {cure}"


# ---------------------------------------------------------------- words
def _counted(elements: Mapping[Space, DenseElement], roles: Mapping[Space, str]) -> str:
    counts = Counter(roles[space] for space in elements)
    parts = [f"{n} {_plural(_WORDS[role], n)}" for role in _WORDS if (n := counts[role])]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _plural(word: str, n: int) -> str:
    if n == 1:
        return word
    head, space, rest = word.partition(" of ")
    return f"{head}s{space}{rest}"


def _effect(metrics: Mapping[str, Any]) -> str:
    if not metrics["tensors"]:
        return "no weight changes"
    ratio, error = (
        f"{metrics[f'{name}_before']:.3g} -> {metrics[f'{name}_after']:.3g}"
        for name in ("largest_outlier", "int4_error")
    )
    return f"largest entry over rms {ratio}, int4 error {error} ({metrics['tensors']} weights)"
