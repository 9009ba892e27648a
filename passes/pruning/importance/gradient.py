"""Criteria from gradients: how much the model would say something else without a unit, to first and second order.

Let z scale a unit where it is read for the last time (`cipm_ir.passes.pruning.importance.reads`), so that z = 0 leaves
it out.
The derivative of the loss by z, of one sample, is the sum of gradient times activation over all these places. No labels
are used: see `cipm_ir.runtime.gradients.Loss` for what is derived instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from cipm_ir.errors import InputError, OptionError, UnsupportedError
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.importance.criteria import Scores, register_importance
from cipm_ir.passes.pruning.importance.reads import Reads, find_reads
from cipm_ir.runtime.gradients import Gradients, Loss
from cipm_ir.runtime.inputs.generate import Data
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Order = Literal[1, 2]
_FLAT = {"QuantizeLinear", "DynamicQuantizeLinear", "Round", "Floor", "Ceil", "Sign"}
"""Operators whose derivative is zero nearly everywhere."""


@dataclass
class Taylor:
    """Expected change of the model when an element is left out, from a Taylor expansion at the dense model.

    With d = ∂ loss / ∂ z of a sample: order 1 scores E|d|, order 2 scores ½ E d², the diagonal of the Gauss-Newton
    matrix of the divergence (loss "prediction") or of the squared change of the outputs (loss "output"). Heads and
    groups are left out as wholes: derivatives of their units are added up before they are squared.

    Source: Molchanov et al. 2017 (order 1); LeCun et al. 1990, Theis et al. 2018 (order 2).

    Attributes:
        name: for messages.
        order: 1 or 2.
        loss: what is derived.
        limit: at most this many samples, the first ones.
        draws: how often labels or signs are drawn for each sample.
        size: samples per batch.
    """

    observes: ClassVar[bool] = True
    name: str
    order: Order = 2
    loss: Loss = "prediction"
    limit: int = 1024
    draws: int = 2
    size: int = 16
    _known: tuple[Program, Reads, Scores] | None = field(default=None, repr=False, compare=False)

    def score(self, program: Program, space: Space, ctx: Context) -> Scores:
        """Return a number per element of the space; the first call computes those of all spaces.

        Raises:
            InputError: there is no data.
            UnsupportedError: torch is not installed, for an operator that torch lacks, and where no gradient arrives.
        """
        if self._known is None or self._known[0] is not program:
            self._known = (program, *self._measured(program, ctx))
        _, reads, scores = self._known
        reads.require(space)
        found = scores[reads.of(space)]
        stops = () if found.any() else sorted({n.op_type for n in program.model.graph} & _FLAT)
        if stops:
            raise UnsupportedError(
                f"The criterion {self.name!r} cannot rank @{space.name}: no gradient comes there, since that of "
                f"{' and '.join(stops)} is zero; choose another criterion, or leave the space out with exclude."
            )
        return found

    def _measured(self, program: Program, ctx: Context) -> tuple[Reads, Scores]:
        data, engine = needed_data(ctx, self.name), _engine(ctx, self.name)
        reads = find_reads(program)
        first = reads.first()
        total, seen = np.zeros(reads.total), 0
        settings: dict[str, Any] = {"draws": self.draws, "size": self.size, "limit": self.limit}
        settings["progress"] = ctx.progress
        try:
            for batch in engine(program.model, [r for r, _ in first], data, loss=self.loss, seed=ctx.seed, **settings):
                derivative = np.zeros((reads.total, 1))
                for sums, (_, matrix) in zip(batch.sums, first, strict=True):
                    if sums.any():
                        derivative = derivative + matrix.T @ sums.T
                size = np.abs(derivative) if self.order == 1 else 0.5 * np.square(derivative)
                total += size.sum(axis=1)
                seen += batch.samples
        except UnsupportedError as refusal:
            raise UnsupportedError(f"The criterion {self.name!r} needs gradients: {refusal}") from refusal
        if reads.total and not total.any():
            raise UnsupportedError(
                f"The criterion {self.name!r} finds no gradient: {self._flat()}; choose one without gradients, such as "
                "wanda."
            )
        return reads, total / max(seen, 1)

    def _flat(self) -> str:
        smooth = "no output of the model depends smoothly on its units"
        if self.loss == "output":
            return smooth
        return (
            f"{smooth}, or all its answers on this data are certain, with a probability of 1 (taylor2 looks at outputs)"
        )


def needed_data(ctx: Context, name: str) -> Data:
    """Return the calibration data.

    Raises:
        InputError: there is none.
    """
    if ctx.data is None:
        raise InputError(
            f"The criterion {name!r} needs calibration data; give data=... (a path to .npz, or a dict of arrays; "
            "--data on the command line), or choose one without: magnitude, batch-norm-scale."
        )
    return ctx.data


def _engine(ctx: Context, name: str) -> Gradients:
    engine: Gradients | None = ctx.options.get("gradients")
    if engine is None:
        raise OptionError(
            f"The criterion {name!r} needs gradients, and nothing here computes any; run it by cipm_ir.optimize, or "
            'put cipm_ir.backends.torch.gradients.products under "gradients" into the options of the context.'
        )
    return engine


register_importance("taylor", lambda _norm: Taylor("taylor", order=1))
register_importance("taylor2", lambda _norm: Taylor("taylor2", loss="output"))
register_importance("fisher", lambda _norm: Taylor("fisher"))
