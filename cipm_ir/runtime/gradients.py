"""What a criterion asks of a gradient engine: for each place that reads units, gradient times value, sample by sample.

Nothing here computes a gradient; the torch backend does, and whoever runs the passes hands its function to them under
the option "gradients".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import onnx_ir as ir

from cipm_ir.runtime.inputs.generate import Array, Data

Loss = Literal["prediction", "output"]
"""What is derived, without labels; z stands for anything that the outputs depend on.

"prediction": Σ ± √p · log p over the classes of the model's own predictions p, with random signs and √p held fixed. The
mean square of its derivative by z is the Fisher information, and half of that the second-order term of the divergence
KL(model || changed model). "output": the sum of all outputs, each with a random sign. The mean square of its derivative
is the squared change of the outputs, to second order (Gauss-Newton)."""


@dataclass(frozen=True)
class Read:
    """A value as one node reads it: the gradient here leaves out what flows from the value to other readers.

    Attributes:
        node: position in the main graph.
        value: name of the value.
        axes: the axes of the value to tell apart, ascending.
        samples: the axis along which samples lie, or along which each has as many places in a row; None where there is
            no such axis: the batch then counts as one sample.
    """

    node: int
    value: str
    axes: tuple[int, ...]
    samples: int | None


@dataclass(frozen=True)
class Products:
    """One batch and draw: for each read Σ gradient · value over all other axes, (samples or 1, places along axes).

    ``samples``: how many samples the batch holds.
    """

    samples: int
    sums: list[Array]


class Gradients(Protocol):
    """Derives a loss without labels with respect to values that nodes read."""

    def __call__(
        self,
        model: ir.Model,
        reads: Sequence[Read],
        data: Data,
        *,
        loss: Loss,
        draws: int = 1,
        size: int = 16,
        limit: int | None = None,
        seed: int = 0,
        progress: Callable[[str, float | None], None] | None = None,
    ) -> Iterator[Products]:
        """Batch by batch, ``draws`` times each.

        Args:
            model: not changed; its functions are inlined.
            reads: where; several may look at the same value.
            data: as for `cipm_ir.runtime.inputs.generate.batches`.
            loss: see `Loss`.
            draws: how often labels or signs are drawn for each batch.
            size: samples per batch, where the model does not fix it.
            limit: at most this many samples.
            seed: of the draws.
            progress: called with a word and the fraction done.

        Raises:
            UnsupportedError: the engine is not installed, lacks an operator, or no output can be derived.
            InputError: the data does not fit, holds no samples, or makes something NaN or infinite.
        """
