"""The cases of all operators: each of these modules adds its own when it is imported."""

from __future__ import annotations

from tests.ops import (  # noqa: F401
    cases_elementwise,
    cases_layout,
    cases_linear,
    cases_runtime,
    cases_runtime_quantized,
    cases_sampling,
    cases_sequence,
)
from tests.ops.sample import CASES

__all__ = ["CASES"]
