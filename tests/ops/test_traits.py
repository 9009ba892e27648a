"""Traits of operators: where a rule lives makes no difference; without a declared trait passes find less."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable

import pytest
from tests import zoo
from tests.models.dead_units import distance, outputs, program_of
from tests.models.fold_planted import planted

from cipm_ir.errors import SymmetryError
from cipm_ir.ops import load_rules, registry
from cipm_ir.ops.context import OpContext
from cipm_ir.passes import Context, Fold, RemoveDead
from cipm_ir.passes.exact.dead.liveness import Liveness
from cipm_ir.symmetry.primitives.absorb import consumers
from cipm_ir.symmetry.program import Program

NAMES = zoo.names("synthetic", without=("large", "data", "torch"))
TRAITS = ("elementwise", "positionwise", "mergeable")


def from_elsewhere(entry: registry.Operator) -> registry.Operator:
    """The entry with a copy of its rule that says it comes from another package."""
    rule = entry.labels
    assert isinstance(rule, types.FunctionType)
    copy = types.FunctionType(rule.__code__, rule.__globals__, "my_rule", rule.__defaults__, rule.__closure__)
    copy.__module__ = "third_party.package"
    return dataclasses.replace(entry, labels=copy)


def reregister(monkeypatch: pytest.MonkeyPatch, change: Callable[[registry.Operator], registry.Operator]) -> None:
    load_rules()
    table = {key: change(entry) for key, entry in registry._REGISTRY.items()}
    monkeypatch.setattr(registry, "_REGISTRY", table)


def facts(name: str) -> tuple[object, ...]:
    """What every layer that asks for traits makes of a model: groups, liveness, and which spaces may be merged."""
    program = program_of(name)
    analysis = program.analysis
    merged: list[object] = []
    for space in analysis.spaces:
        try:
            merged.append([(c.node, c.a.tolist()) for c in consumers(analysis, space.table[:, 0])])
        except SymmetryError as error:
            merged.append(str(error))
    alive = Liveness(analysis)
    return str(program), alive.summed.tolist(), alive.roots.tolist(), merged


@pytest.mark.parametrize("name", NAMES)
def test_rules_from_another_module_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.build_or_skip(name)
    expected = facts(name)
    reregister(monkeypatch, from_elsewhere)
    assert facts(name) == expected


def merged_and_dead(program: Program) -> tuple[Program, Program]:
    context = Context(original=program)
    return Fold().run(program, context).program, RemoveDead().run(program, context).program


@pytest.mark.parametrize("name", ["mlp_relu", "mlp_tanh", "residual_blocks", "two_heads"])
def test_passes_do_the_same_with_rules_from_another_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [str(one) for one in merged_and_dead(duplicated(name))]
    reregister(monkeypatch, from_elsewhere)
    assert [str(one) for one in merged_and_dead(duplicated(name))] == found


def without_traits(entry: registry.Operator) -> registry.Operator:
    return dataclasses.replace(entry, elementwise=False, positionwise=False, mergeable=False)


def duplicated(name: str) -> Program:
    program = program_of(name)
    space = next(s for s in program.spaces if s.kind == "units" and s.size > 4)
    return planted(program, space, {3: 1})


def test_control_without_traits_less_is_found_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = duplicated("mlp_relu").emit()
    assert merged_and_dead(Program.of(model))[0].space("w_1").size == 7
    reregister(monkeypatch, lambda entry: without_traits(entry) if entry.name == "Relu" else entry)
    program = Program.of(model)
    kept = merged_and_dead(program)[0]
    assert kept.space("w_1").size == 8
    assert distance(outputs(program, "mlp_relu"), outputs(kept, "mlp_relu")) == 0


@pytest.mark.parametrize("trait", TRAITS)
def test_elementwise_implies_the_other_traits(trait: str) -> None:
    load_rules()
    assert all(getattr(entry, trait) for entry in registry.registered() if entry.elementwise)


def test_a_rule_that_looks_up_an_axis_that_is_not_there_pins_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op: OpContext) -> None:
        raise KeyError(2)  # as from a look-up of an axis, where attributes contradict shapes

    def broken(entry: registry.Operator) -> registry.Operator:
        return dataclasses.replace(entry, labels=wrong) if entry.name == "Relu" else entry

    model = program_of("mlp_relu").emit()
    reregister(monkeypatch, broken)
    program = Program.of(model)
    assert {node.op for node in program.opaque} == {"Relu"} and "do not fit" in program.opaque[0].reason
