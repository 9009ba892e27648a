"""The cases of all operators: each of these modules adds its own when it is imported."""

from __future__ import annotations

from tests import (  # noqa: F401
    registry_cases_elementwise,
    registry_cases_layout,
    registry_cases_linear,
    registry_cases_runtime,
    registry_cases_runtime_quantized,
    registry_cases_sampling,
    registry_cases_sequence,
)
from tests.registry_sample import CASES

__all__ = ["CASES"]
