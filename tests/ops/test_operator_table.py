"""Every operator of the installed ONNX and onnxruntime has a rule, or a stated reason why it has none, never both."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state
from tests.zoo.net import Net

from cipm_ir.ops import load_rules
from cipm_ir.ops.no_rule import REASONS
from cipm_ir.ops.registry import registered
from cipm_ir.symmetry.pinned import opaque_summary
from cipm_ir.symmetry.program import Program

Key = tuple[str, str]
load_rules()
WITH_RULE = {(one.domain, one.name) for one in registered()}
BY_THE_WALK = {("", "Constant")}
"""Parameters to the walk."""
ONNX = {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas_with_history()}
RUNTIME = {
    (schema.domain, schema.name) for schema in ort_state.get_all_operator_schema() if schema.domain == "com.microsoft"
}


def missing(operators: Iterable[Key], rules: set[Key], reasons: Iterable[Key]) -> set[Key]:
    """Operators in neither table."""
    return set(operators) - rules - set(reasons) - BY_THE_WALK


@pytest.mark.parametrize("operators", [ONNX, RUNTIME], ids=["onnx", "onnxruntime"])
def test_every_operator_has_a_rule_or_a_reason(operators: set[Key]) -> None:
    assert len(operators) > 100
    assert missing(operators, WITH_RULE, REASONS) == set()


def test_none_has_both_and_none_is_made_up() -> None:
    assert WITH_RULE & set(REASONS) == set()
    assert set(REASONS) <= ONNX | RUNTIME


def test_an_operator_in_neither_table_is_found() -> None:
    assert missing(ONNX, WITH_RULE - {("", "Conv")}, REASONS) == {("", "Conv")}
    assert missing(ONNX, WITH_RULE, set(REASONS) - {("", "Det")}) == {("", "Det")}


def test_the_reason_is_shown() -> None:
    net = Net("reason")
    h = net.op("Reshape", net.linear(net.input("x", [2, 4]), 4, 9), net.const(np.array([2, 3, 3])))
    net.output(net.op("Det", h), [2])
    program = Program.of(ir.from_proto(net.model()))
    assert [node.reason for node in program.opaque] == [REASONS["", "Det"]]
    assert REASONS["", "Det"] in "\n".join(opaque_summary(program.analysis))
