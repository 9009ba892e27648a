"""The list of slow tests names tests that exist, what is slow is found, and no test depends on those before it."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from tests.tiers import (
    ALONE,
    LIMIT,
    SHARE,
    costly_of,
    function_of,
    id_without_folders,
    slow_functions,
    slow_of,
    strides,
)

RNG = np.random.default_rng(0)
HERE = Path(__file__).parents[1]
LAYERS = (
    "test_algebra",
    "test_registry",
    "test_solver",
    "test_verify",
    "test_prune",
    "test_frontend_onnx",
    "test_torch_lower",
    "test_cli",
)
"""Beginnings of the names of files, at least one for each layer of ARCHITECTURE.md."""


def defined() -> set[str]:
    """Every test function of the folder."""
    return {
        f"{path.name}::{name}"
        for path in HERE.rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.MULTILINE)
    }


def test_what_is_listed_exists() -> None:
    listed = slow_functions() | strides().keys()
    assert listed - defined() == set(), "write the lists of tests again, see tests/tiers.py"


def test_most_functions_of_every_layer_are_fast() -> None:
    fast = defined() - slow_functions()
    assert len(fast) > 0.75 * len(defined())
    for layer in LAYERS:
        of_layer = [name for name in defined() if name.startswith(layer)]
        assert len(fast.intersection(of_layer)) > len(of_layer) / 2, layer


def test_slow_is_what_takes_longer_in_the_middle_or_on_average() -> None:
    taken = {
        "tests/test_a.py::test_quick[1/2[x]]": LIMIT / 2,
        "tests/test_a.py::test_middle[1]": 0.0,
        "tests/test_a.py::test_middle[2]": 1.5 * LIMIT,
        "tests/test_a.py::test_middle[3]": 0.0,
        "tests/test_b.py::test_average[1]": 3 * LIMIT,
        "tests/test_b.py::test_average[2]": 0.0,
    }
    assert function_of(next(iter(taken))) == "test_a.py::test_quick"
    assert slow_of(taken) == ["test_a.py::test_middle", "test_b.py::test_average"]


def test_numbers_are_those_of_the_test(request: pytest.FixtureRequest) -> None:
    expected = np.random.default_rng(zlib.crc32(id_without_folders(request.node.nodeid).encode())).standard_normal(3)
    assert np.array_equal(RNG.standard_normal(3), expected)


def test_costly_functions_run_as_many_cases_as_their_share_allows() -> None:
    taken = {f"tests/test_a.py::test_many[{k}]": 1.0 for k in range(40)}
    taken |= {"tests/test_a.py::test_few[1]": SHARE / 4, "tests/test_a.py::test_few[2]": SHARE / 4}
    taken |= {"tests/test_b.py::test_alone": ALONE + 1, "tests/test_b.py::test_single": ALONE - 1}
    taken |= {"tests/test_b.py::test_two[1]": 3 * SHARE, "tests/test_b.py::test_two[2]": 3 * SHARE}
    found = costly_of(taken)
    assert found == {"test_a.py::test_many": 20, "test_b.py::test_alone": 0, "test_b.py::test_two": 2}


def test_every_costly_function_keeps_a_case() -> None:
    assert all(k != 1 for k in strides().values())
    assert sum(k == 0 for k in strides().values()) <= 6, "too much is left to make test-all"
