"""Exact passes in a row are verified once; where that fails, the one to blame is found, and no other suffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cipm_ir.errors import InputError
from cipm_ir.ir.parameters import named
from cipm_ir.passes.framework import pipeline, verified_run
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult
from cipm_ir.passes.framework.pipeline import RolledBack, run_passes
from cipm_ir.runtime import session
from cipm_ir.runtime.inputs.generate import Feeds
from cipm_ir.runtime.session import Runner
from cipm_ir.runtime.verification import cases
from cipm_ir.runtime.verification.compare import Case, Outputs, Reference
from cipm_ir.runtime.verification.verify import Tolerance, Verification, Verifier, verify_models
from cipm_ir.sources import load_program
from cipm_ir.symmetry.program import Program

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def built(nodes: list[onnx.NodeProto], x: list[Any], y: list[Any], tensors: dict[str, Array]) -> ir.Model:
    """A model of one input and one output."""
    info = helper.make_tensor_value_info
    arrays = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", [info("x", 1, x)], [info("y", 1, y)], arrays)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.domain", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def network(batch: Any = "N", size: int = 8, odd: bool = False) -> ir.Model:
    """x @ w1, Relu, @ w2, and where asked an operator that no runtime here has."""
    made = [("MatMul", ["x", "w1"], "h"), ("Relu", ["h"], "a"), ("MatMul", ["a", "w2"], "p" if odd else "y")]
    nodes = [helper.make_node(op, given, [out]) for op, given, out in made]
    nodes += [helper.make_node("Odd", ["p"], ["y"], domain="my.domain")] if odd else []
    rng = np.random.default_rng(0)
    tensors = {"w1": rng.standard_normal((size, 6)), "w2": rng.standard_normal((6, 3))}
    return built(nodes, [batch, size], [batch, 3], {name: x.astype(np.float32) for name, x in tensors.items()})


def weight(program: Program, name: str) -> Array:
    tensor = program.model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


@dataclass(frozen=True)
class Exchange(Pass):
    """Exact: exchanges two hidden units."""

    first: int = 0
    second: int = 1

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Exchange."""
        order = np.arange(6)
        order[[self.first, self.second]] = order[[self.second, self.first]]
        w1, w2 = weight(program, "w1")[:, order], weight(program, "w2")[order]
        return PassResult(program.refit({"w1": w1, "w2": w2}), summary="exchanged")


@dataclass(frozen=True)
class Wrong(Pass):
    """Claims to be exact, and breaks the model: its numbers, its shapes, or so that others cannot work on it."""

    how: str = "numbers"

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Break."""
        if self.how == "numbers":
            return PassResult(program.refit({"w1": weight(program, "w1") * np.float32(1.01)}))
        model = program.emit()
        model.graph.initializers["w1"].const_value = named(ir.tensor(np.ones((5, 6), np.float32)), "w1")
        model.graph.initializers["w1"].shape = ir.Shape([5, 6])
        return PassResult(Program.of(model))


@dataclass(frozen=True)
class Strict(Pass):
    """Fails on a model that has not the shapes of `network`; changes nothing."""

    kind = Kind.EXACT

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Look."""
        if weight(program, "w1").shape != (8, 6):
            raise InputError("The weights have an odd shape.")
        return PassResult(program, False)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each comparison."""
    made: list[int] = []
    check = Verifier.check

    def counted(verifier: Verifier, model: ir.Model, tolerance: Tolerance) -> Verification:
        made.append(1)
        return check(verifier, model, tolerance)

    monkeypatch.setattr(Verifier, "check", counted)
    return made


def test_passes_in_a_row_are_verified_once(checks: list[int]) -> None:
    report = run_passes(Program.of(network()), [Exchange(), Strict(), Exchange(2, 3), Exchange(4, 5)]).report
    assert len(checks) == 1
    first, idle, second, third = report.steps
    assert first.verification is second.verification is third.verification is report.verification
    assert first.verification is not None and first.verification.ok
    assert first.checked == f"verified together with '{second.name}', '{third.name}'"
    assert idle.checked == "unchanged" and idle.verification is None
    assert report.checked == "verified"
    assert "verified together: Exchange, Exchange, Exchange" in str(report)


def test_what_changed_nothing_is_not_verified(checks: list[int]) -> None:
    assert run_passes(Program.of(network()), [Strict(), Strict()]).report.checked == "unchanged"
    assert not checks


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("how", ["numbers", "shapes"])
@pytest.mark.parametrize("verify", [True, "strict"])
def test_only_the_pass_that_breaks_is_left_out(checks: list[int], place: int, how: str, verify: Any) -> None:
    program = Program.of(network())
    good: list[Pass] = [Exchange(), Exchange(2, 3)]
    outcome = run_passes(
        program, [*good[:place], Wrong(how), *good[place:], Strict()], verify=verify, on_failure="skip"
    )
    report = outcome.report
    assert [step.skipped for step in report.steps] == [k == place for k in range(3)] + [False]
    assert all(step.checked == "verified" for step in report.steps if step.changed)
    wanted = run_passes(program, good).program
    for name in ("w1", "w2"):
        assert np.array_equal(weight(outcome.program, name), weight(wanted, name))
    assert [witness.name for witness in outcome.witness] == [str(one) for one in good]
    assert report.verification is not None and report.verification.ok and len(checks) > 2


def test_the_first_of_several_is_named() -> None:
    with pytest.raises(RolledBack, match="'Wrong' was rolled back: it promised equal outputs") as caught:
        run_passes(Program.of(network()), [Exchange(), Wrong(), Exchange(2, 3), Wrong("shapes")])
    assert [step.name for step in caught.value.outcome.report.steps] == [str(Exchange())]
    assert caught.value.outcome.report.steps[0].checked == "verified"


def test_a_pass_that_fails_on_the_work_of_another_is_not_blamed() -> None:
    report = run_passes(Program.of(network()), [Wrong("shapes"), Strict()], on_failure="skip").report
    assert [step.skipped for step in report.steps] == [True, False]
    with pytest.raises(RolledBack, match="Wrong"):
        run_passes(Program.of(network()), [Wrong("shapes"), Strict()])
    wide = Program.of(network(size=9))  # its own fault, behind a pass that is right
    with pytest.raises(InputError, match="odd shape"):
        run_passes(wide, [Exchange(), Strict()], on_failure="skip")


def test_without_verification_invalid_models_are_still_found() -> None:
    report = run_passes(Program.of(network()), [Exchange(), Wrong("shapes")], verify=False, on_failure="skip").report
    assert [step.skipped for step in report.steps] == [False, True]
    assert "verification is off" in report.steps[0].checked


def test_passes_that_cannot_be_verified_say_so() -> None:
    program = Program.of(network(odd=True))
    for step in run_passes(program, [Exchange(), Exchange(2, 3)]).report.steps:
        assert step.changed and step.checked.startswith("not verified: ") and "together" not in step.checked
    strict = run_passes(program, [Exchange(), Exchange(2, 3)], verify="strict", on_failure="skip").report
    assert all(step.skipped for step in strict.steps)


def test_shapes_of_a_file_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    for module in (pipeline, verified_run):
        check = module.check_shapes
        monkeypatch.setattr(module, "check_shapes", lambda m, c=check: (counts.update(["again"]), c(m))[1])
    program = load_program(ir.to_proto(network()))
    run_passes(program, [Strict()])
    assert not counts
    run_passes(program, [Exchange()])
    assert counts["again"] == 1
    run_passes(Program.of(network()), [Strict()])  # nobody has looked at this one
    assert counts["again"] == 2


# --- cost of a comparison -------------------------------------------------------------------------


def _rows(monkeypatch: pytest.MonkeyPatch, model: ir.Model, seconds: float) -> list[int]:
    monkeypatch.setattr(cases, "_CASE_SECONDS", seconds)
    with Runner(model) as runner:
        return [len(case.feeds["x"]) for case in cases.own_cases(model, runner.run, np.random.default_rng(0), 8)]


def test_slow_models_get_further_inputs_of_few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = _rows(monkeypatch, network(), 1e9)
    assert fast[0] == 16 and fast[1] == 2 and set(fast[2:]) <= {2, 16}  # samples of zeros are all alike
    slow = _rows(monkeypatch, network(), 0.0)
    assert slow[0] == 16 and set(slow[1:8]) == {1} and len(slow) == len(fast)
    assert set(_rows(monkeypatch, network(batch=5), 0.0)) == {5}


def test_a_model_that_takes_one_batch_only_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reshape = helper.make_node("Reshape", ["x", "s"], ["y"])
    model = built([reshape], ["N", 4], ["a", "b"], {"s": np.array([2, 4])})
    found = _rows(monkeypatch, model, 0.0)
    assert set(found) == {2} and len(found) == 8


class _Side:
    """A program with one way of rounding, which moves by `noise`."""

    backend = "toy"

    def __init__(self, noise: float) -> None:
        self.noise, self.ran = noise, list[int]()

    def others(self) -> Sequence[str]:
        return ["draw"]

    def more(self) -> Sequence[str]:
        return []

    def outputs(self, feeds: Sequence[Feeds], way: str = "") -> Any:
        self.ran.append(len(feeds))
        for one in feeds:
            yield {"y": one["x"] + np.float32(self.noise)}


@pytest.mark.parametrize(("noise", "equal", "ran"), [(1e-3, True, [1]), (1e-6, False, [1, 3])])
def test_noise_is_measured_where_outputs_differ_first(noise: float, equal: bool, ran: list[int]) -> None:
    xs = [RNG.random((4, 3)).astype(np.float32) for _ in range(4)]
    side = _Side(noise)
    reference = Reference(side, [Case(str(k), {"x": x}, {"y": x}) for k, x in enumerate(xs)])
    actual: list[Outputs] = [{"y": x.copy()} for x in xs]
    actual[2]["y"] += np.float32(2e-3)
    assert reference.compare(actual).ok is equal
    assert side.ran == ran
    reference.compare(actual)  # what is known is not measured again
    assert side.ran == ran


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.int64, np.float16])
@pytest.mark.parametrize("fast", [False, True])
def test_weights_that_are_lent_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: Any, fast: bool) -> None:
    content = (RNG.standard_normal((32, 16)) * 10).astype(dtype)
    held = np.frombuffer(b"\0" * 8 + content.tobytes(), np.uint8)[8:].view(dtype).reshape(32, 16)  # not aligned
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=1), helper.make_node("MatMul", ["x", "c"], ["y"])]
    model = built(nodes, ["N", 32], ["N", 16], {"w": content})
    model.graph.initializers["w"].const_value = ir.tensor(held, name="w")
    feeds = {"x": RNG.standard_normal((3, 32)).astype(np.float32)}
    plain = session.run(model, feeds)["y"]
    monkeypatch.setattr(session, "_LENT", 1)
    with Runner(model, fast=fast) as runner:
        assert bool(runner._lent) == (dtype is not np.float16)
        lent = runner.run(feeds)["y"]
    assert np.array_equal(plain, lent) if not fast else np.allclose(plain, lent)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), held)
    other = model.clone()
    other.graph.initializers["w"].const_value = ir.tensor((content * dtype(2)).astype(dtype), name="w")
    assert verify_models(model, model).ok and verify_models(model, other).ok is False


def _spare(place: str) -> ir.Model:
    """A matrix that nothing takes, that only a body takes, that is an output, or that a caller may replace."""
    body = [helper.make_node("MatMul", ["x", "w"], ["t"])]
    value = helper.make_tensor_value_info("t", 1, None)
    bodies = {key: helper.make_graph(body, key, [], [value]) for key in ("then_branch", "else_branch")}
    nodes = {
        "body": [helper.make_node("If", ["c"], ["y"], **bodies)],
        "input": [helper.make_node("MatMul", ["x", "w"], ["y"])],
    }.get(place, [helper.make_node("Relu", ["x"], ["y"])])
    tensors = {"w": np.eye(4, dtype=np.float32) * 2, "c": np.array(True)}
    model = built(nodes, ["N", 4], ["N", 4], tensors if place == "body" else {"w": tensors["w"]})
    if place == "output":
        model.graph.outputs.append(model.graph.initializers["w"])
    if place == "input":
        model.graph.inputs.append(model.graph.initializers["w"])
    return model


@pytest.mark.parametrize("place", ["nothing", "body", "output", "input"])
@pytest.mark.parametrize("fast", [False, True])
def test_weights_without_a_node_that_takes_them_are_not_lent(
    monkeypatch: pytest.MonkeyPatch, place: str, fast: bool
) -> None:
    monkeypatch.setattr(session, "_LENT", 16)
    feeds = {"x": np.ones((2, 4), np.float32)}
    with Runner(_spare(place), fast=fast, backend="onnxruntime") as runner:
        found = runner.run(feeds)
    assert np.array_equal(found["y"], feeds["x"] * (2 if place in ("body", "input") else 1))
    assert place != "output" or np.array_equal(found["w"], np.eye(4) * 2)
