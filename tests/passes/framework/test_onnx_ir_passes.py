"""Passes of onnx_ir in our pipelines, and our passes in pipelines of onnx_ir."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from tests import zoo
from tests.models.dead_units import program_of
from tests.paths import DIGITS

import cipm_ir
from cipm_ir.errors import OptionError, VerificationError
from cipm_ir.passes import OnnxIrPass, Prune


class Scale(ir.passes.InPlacePass):
    """A bad pass: the first weight is multiplied."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        value = next(v for v in model.graph.initializers.values() if len(v.shape or ()) > 1)
        assert value.const_value is not None
        value.const_value = ir.tensor((value.const_value.numpy() * self.factor).astype(np.float32), name=value.name)
        return ir.passes.PassResult(model, True)


class Liar(ir.passes.InPlacePass):
    """Changes a weight and says that it did nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(Scale(2.0)(model).model, False)


class Fails(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise ValueError("it broke\nhere")


class Renames(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.outputs[0].name = "other"
        return ir.passes.PassResult(model, True)


class Silent(ir.passes.InPlacePass):
    """Takes an Identity away and says that it did nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(common.IdentityEliminationPass()(model).model, False)


class Drops(ir.passes.InPlacePass):
    """Takes the output away."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        model.graph.outputs.clear()
        return ir.passes.PassResult(model, True)


def duplicated() -> ir.Model:
    """The perceptron of the zoo with an Identity, an unused node and a node twice."""
    model = ir.from_proto(zoo.build("mlp_relu"))
    relu = next(node for node in model.graph if node.op_type == "Relu")
    twin = ir.node("Relu", [relu.inputs[0]])
    same = ir.node("Identity", [twin.outputs[0]])
    unused = ir.node("Neg", [relu.inputs[0]])
    for name, node in (("twin", twin), ("same", same), ("unused", unused)):
        node.outputs[0].name, node.outputs[0].type = name, relu.outputs[0].type
    for use in tuple(relu.outputs[0].uses()):
        use.node.replace_input_with(use.idx, same.outputs[0])
    model.graph.insert_after(relu, [twin, same, unused])
    return model


@pytest.mark.parametrize(
    ("one", "gone"),
    [
        (common.IdentityEliminationPass(), "Identity"),
        (common.RemoveUnusedNodesPass(), "Neg"),
        (ir.passes.Sequential(common.IdentityEliminationPass(), common.RemoveUnusedNodesPass()), "Neg"),
    ],
)
def test_passes_of_onnx_ir_are_steps(one: ir.passes.PassBase, gone: str) -> None:
    model = duplicated()
    result = cipm_ir.optimize(model, [one, "canonicalize"])
    first, second = result.report.steps
    assert first.changed and not first.skipped and second.changed
    assert result.report.verification is not None and result.report.verification.ok
    assert gone not in [node.op_type for node in result.model.graph]
    assert gone in [node.op_type for node in model.graph]
    assert first.name.startswith("onnx_ir:")


def test_a_pass_alone_is_taken_too() -> None:
    result = cipm_ir.optimize(duplicated(), common.IdentityEliminationPass())
    assert [step.changed for step in result.report.steps] == [True]


def test_a_pass_that_breaks_the_model_is_left_out() -> None:
    result = cipm_ir.optimize(DIGITS, [Scale(1.01), common.RemoveUnusedNodesPass()])
    assert result.report.steps[0].skipped
    assert cipm_ir.verify(DIGITS, result.model).ok


def test_control_one_that_may_change_the_function_is_kept() -> None:
    result = cipm_ir.optimize(DIGITS, [OnnxIrPass(Scale(1.01), exact=False)])
    assert not result.report.steps[0].skipped and not cipm_ir.verify(DIGITS, result.model).ok


def test_a_change_that_is_not_reported_counts() -> None:
    """It is verified like any other: one that breaks the model is left out, one that does not is kept."""
    broken = cipm_ir.optimize(program_of("mlp_relu"), [Liar()]).report.steps[0]
    assert broken.skipped and not broken.changed
    kept = cipm_ir.optimize(duplicated(), [Silent()])
    assert kept.report.steps[0].changed and "Identity" not in [node.op_type for node in kept.model.graph]
    assert not cipm_ir.optimize(kept.model, [Silent()]).report.steps[0].changed  # the control: nothing is left to do


FAULTS = [
    (Fails(), ["onnx_ir:Fails failed", "it broke"]),
    (Renames(), ["onnx_ir:Renames changed the", "other"]),
    (Drops(), ["onnx_ir:Drops changed the"]),
]


@pytest.mark.parametrize(("one", "words"), FAULTS)
def test_a_pass_that_fails_is_named(one: ir.passes.PassBase, words: list[str]) -> None:
    with pytest.raises(VerificationError) as caught:
        cipm_ir.optimize(program_of("mlp_relu"), [one], on_failure="raise")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(("one", "words"), FAULTS)
def test_the_others_run_on_where_one_fails(one: ir.passes.PassBase, words: list[str]) -> None:
    result = cipm_ir.optimize(duplicated(), [one, common.IdentityEliminationPass()])
    first, second = result.report.steps
    assert first.skipped and all(word in first.summary for word in words)
    assert second.changed and cipm_ir.verify(duplicated(), result.model).ok


def test_other_things_are_refused() -> None:
    with pytest.raises(OptionError, match="wraps an onnx_ir"):
        OnnxIrPass("canonicalize")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="passes= takes"):
        cipm_ir.optimize(DIGITS, [3])  # type: ignore[list-item]


# ---------------------------------------------------------------- the other direction
def test_our_passes_in_a_pipeline_of_onnx_ir() -> None:
    model = duplicated()
    ours = cipm_ir.IrPass(["canonicalize"])
    result = ir.passes.Sequential(common.IdentityEliminationPass(), ours, common.RemoveUnusedNodesPass())(model)
    assert result.modified and ours.report is not None and ours.report.steps[0].changed
    assert cipm_ir.verify(zoo_model(), result.model).ok
    names = [node.op_type for node in result.model.graph]
    assert "Identity" not in names and "Neg" not in names


def zoo_model() -> ir.Model:
    return ir.from_proto(zoo.build("mlp_relu"))


def test_the_model_that_comes_in_stays() -> None:
    model = zoo_model()
    before = ir.to_proto(model).SerializeToString()
    result = cipm_ir.IrPass([Prune(params=0.6)], seed=1)(model)
    assert result.modified and result.model is not model
    assert ir.to_proto(model).SerializeToString() == before


def test_nothing_to_do_is_not_modified() -> None:
    once = cipm_ir.IrPass()(zoo_model()).model
    assert not cipm_ir.IrPass()(once).modified


def test_errors_come_through() -> None:
    with pytest.raises(OptionError, match="no pass named 'nothing'"):
        cipm_ir.IrPass(["nothing"])(zoo_model())
