"""The cases of all operators: each of these modules adds its own when it is imported."""

from __future__ import annotations

from tests.ops.sample import CASES

__all__ = ["CASES"]
