"""Every operator's rule against real execution, in both directions, and controls that the checker sees wrong rules."""

from __future__ import annotations

import pytest
from tests import registry_cases_elementwise, registry_cases_layout, registry_cases_linear, registry_cases_sequence
from tests.registry_sample import CASES, Case, check

FAMILIES = (registry_cases_elementwise, registry_cases_layout, registry_cases_linear, registry_cases_sequence)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_claims_hold(case: Case) -> None:
    assert check(case) == []
