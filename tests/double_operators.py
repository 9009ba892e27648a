"""Operators for ONNX's reference evaluator that keep double precision, or that it lacks or computes slowly."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun
from tests.zoo.feeds import RampUp

Array: TypeAlias = npt.NDArray[Any]


class Erf(OpRun):
    """scipy's, on whole arrays; the reference evaluator calls `math.erf` for each entry."""

    def _run(self, x: Array) -> tuple[Array]:
        from scipy.special import erf

        return (np.asarray(erf(x)).astype(x.dtype),)


OPERATORS: tuple[type[OpRun], ...] = (RampUp, Erf)
