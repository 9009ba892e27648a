"""Tiers of the tests.

* all: every case (``make test-all``, plain pytest);
* share: of every test function, cases for two CPU seconds, at least one (``make test``, which CI runs, ``--share``);
* fast: one case of every test function that is not slow (``make test-fast``, ``--fast``).

`slow_tests.txt` lists the slow functions, `costly_tests.txt` the functions of which ``--share`` runs every k-th case
only, and k; 0 leaves a single expensive case to ``make test-all``. Which cases are taken differs from function to
function, so that every model of a long list meets most of the functions. To write both lists from a run of all tests:

    python -m pytest -n 2 --dist worksteal --cpu-times times.jsonl
    python -m tests.tiers times.jsonl
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
COSTLY_TESTS = Path(__file__).with_name("costly_tests.txt")
SHARE = 2.0
"""CPU seconds of one test function in the tier ``--share``."""
ALONE = 15.0
"""CPU seconds above which a single case is left to the tier of all tests."""
LIMIT = 0.2
"""CPU seconds of one case, above which the fast tier leaves a test function out."""


def slow_functions() -> set[str]:
    """Return the slow test functions, as "test_file.py::test_name"."""
    return set(SLOW_TESTS.read_text().split())


def strides() -> dict[str, int]:
    """Return of which test functions the tier of shares runs every k-th case only, and k."""
    return {name: int(k) for name, k in map(str.split, COSTLY_TESTS.read_text().splitlines())}


def function_of(nodeid: str) -> str:
    """Return the file and the name of the test function of a test, without its parameters."""
    return nodeid.partition("[")[0].rpartition("/")[2]


def id_without_folders(nodeid: str) -> str:
    """Return the id of a test without the folders its file lies in: random numbers stay the same when it moves."""
    path, _, rest = nodeid.partition("::")
    return f"tests/{Path(path).name}::{rest}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="one case of every test function that is not slow")
    parser.addoption("--share", action="store_true", help="of costly test functions, some of their cases")
    parser.addoption("--cpu-times", metavar="FILE", help="append the CPU seconds of every test to a file")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the listed tests as slow, and leave out what the tier does not run."""
    listed = slow_functions()
    for item in items:
        if function_of(item.nodeid) in listed:
            item.add_marker("slow")
    if config.getoption("--share"):
        _keep(config, items, _shares(items))
    if config.getoption("--fast"):
        _keep(config, items, _middles(items))


def _keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    chosen = {id(item) for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = kept


def _shares(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return every k-th case of a costly function, from a place that differs from function to function."""
    every, counts, kept = strides(), Counter[str](), []
    for item in items:
        name = function_of(item.nodeid)
        k = every.get(name, 1)
        if k and (counts[name] + zlib.crc32(name.encode())) % k == 0:
            kept.append(item)
        counts[name] += 1
    return kept


def _middles(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the case in the middle of every function that is not slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            cases.setdefault(function_of(item.nodeid), []).append(item)
    chosen = {id(found[len(found) // 2]) for found in cases.values()}
    return [item for item in items if id(item) in chosen]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """With --cpu-times, note what a test took, processes that it started included."""
    path = item.config.getoption("--cpu-times")
    before = sum(os.times()[:4])
    result = yield
    if path:
        with open(path, "a") as file:
            file.write(json.dumps([item.nodeid, round(sum(os.times()[:4]) - before, 3)]) + "\n")
    return result


def slow_of(times: dict[str, float]) -> list[str]:
    """Return the functions of which the case in the middle, or a case on average, takes more than the limit."""
    functions: dict[str, list[float]] = {}
    for nodeid, seconds in times.items():
        functions.setdefault(function_of(nodeid), []).append(seconds)
    return sorted(
        name for name, taken in functions.items() if max(taken[len(taken) // 2], sum(taken) / len(taken)) > LIMIT
    )


def costly_of(times: dict[str, float]) -> dict[str, int]:
    """Return the functions that take longer than their share, with the stride that brings them below it."""
    functions: dict[str, list[float]] = {}
    for nodeid, seconds in times.items():
        functions.setdefault(function_of(nodeid), []).append(seconds)
    found = {}
    for name, taken in sorted(functions.items()):
        if len(taken) == 1:
            if taken[0] > ALONE:
                found[name] = 0
        elif sum(taken) > SHARE:
            found[name] = min(math.ceil(sum(taken) / SHARE), len(taken))
    return found


if __name__ == "__main__":
    measured: dict[str, float] = dict(map(json.loads, Path(sys.argv[1]).read_text().splitlines()))
    SLOW_TESTS.write_text("\n".join(slow_of(measured)) + "\n")
    COSTLY_TESTS.write_text("".join(f"{name} {k}\n" for name, k in costly_of(measured).items()))
