"""What every test may ask for."""

from __future__ import annotations

import gc
import os
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import settings
from tests.tiers import id_without_folders, pytest_addoption, pytest_collection_modifyitems, pytest_runtest_protocol

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_runtest_protocol"]

# Runs share their machine with others: a deadline per example would fail on load, not on defects.
settings.register_profile("cipm", deadline=None, max_examples=50)
settings.load_profile("cipm")

LIGHT_MODELS = 9


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: large, or listed in slow_tests.txt; `make test-fast` leaves it out")
    config.addinivalue_line("markers", "sample: a part of what a slow test does; only `make test-fast` runs it")
    config.addinivalue_line("markers", "corpus: needs models that `make corpus` fetches; `make test` leaves it out")
    config.addinivalue_line("markers", "models: needs torch and transformers (the extra test-models)")


def pytest_collection_finish() -> None:
    """What is there now stays to the end: the collector of garbage need not go through modules and tests again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 10)


@pytest.fixture(autouse=True)
def own_numbers(request: pytest.FixtureRequest) -> None:
    """A test that draws from the generator of its module draws the same numbers whatever ran before it."""
    generator = getattr(request.module, "RNG", None)
    if isinstance(generator, np.random.Generator):
        seed = zlib.crc32(id_without_folders(request.node.nodeid).encode())
        generator.bit_generator.state = np.random.default_rng(seed).bit_generator.state


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers in every run and every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with graphs/ and cifar10/, named by CIPM_TEST_DATA."""
    name = os.environ.get("CIPM_TEST_DATA")
    if not name:
        pytest.skip("CIPM_TEST_DATA does not name the folder with graphs/ and cifar10/")
    folder = Path(name)
    if not (folder / "graphs").is_dir():
        pytest.fail(f"CIPM_TEST_DATA is {name}, which has no folder graphs/")
    return folder


@pytest.fixture(scope="session")
def light_model_paths() -> tuple[Path, ...]:
    """The nine architectures that the onnx package ships, with constant weights."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    paths = tuple(sorted(folder.glob("light_*.onnx")))
    assert len(paths) == LIGHT_MODELS, f"{folder} holds {len(paths)} light models, not {LIGHT_MODELS}"
    return paths
