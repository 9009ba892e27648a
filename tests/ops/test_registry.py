"""Every operator's rule against real execution, in both directions, and controls that the checker sees wrong rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tests.ops.families import CASES
from tests.ops.sample import Case, Sample, check, difference, naive

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import State
from cipm_ir.ops import load_rules, registry
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.elementwise import homogeneous, linear, odd, pointwise
from cipm_ir.ops.registry import registered
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program

load_rules()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_claims_hold_and_nothing_is_missing(case: Case) -> None:
    assert check(case) == []


@pytest.mark.parametrize("operator", registered(), ids=lambda o: f"{o.domain}::{o.name}")
def test_every_operator_has_a_case(operator: registry.Operator) -> None:
    key = f"{operator.domain}::{operator.name}" if operator.domain else operator.name
    assert any(c.op == key for c in CASES), f"{key} has a rule and no case; add one to tests/registry_cases_*.py"


def test_every_case_contains_its_operator() -> None:
    for case in CASES:
        assert any(case.holds(n) for n in case.build()[0].graph.node), case.name


# ---------------------------------------------------------------- controls: wrong rules are seen
def first_only(op: OpContext) -> None:
    """A sum that forgets to tie its terms."""
    op.like(0, op.state(0))


def channels_pass(op: OpContext) -> None:
    """As if neighbours did not matter."""
    op.freeze(op.state(0))
    op.like(0, op.state(0))


def rows_forgotten(op: OpContext) -> None:
    """Labels end, without a pin."""
    op.set(0)


def never(op: OpContext) -> None:
    """Pins what could move."""
    raise UnsupportedPattern("caution")


def bias_unscaled(op: OpContext) -> None:
    """Normalization parameters that do not follow their axis."""
    x = op.state(0)
    op.like(0, State(x.shape, x.factors))


INCORRECT: list[tuple[str, Callable[[OpContext], None]]] = [
    ("Sigmoid-vector", odd),
    ("Gelu-vector", homogeneous),
    ("Relu-vector", linear),
    ("Tanh-vector", homogeneous),
    ("Abs-vector", linear),
    ("Sqrt-square_root", homogeneous),
    ("Clip-six", odd),
    ("Add-two_branches", first_only),
    ("Mul-two_branches", first_only),
    ("Where-condition_from_outside", first_only),
    ("LRN-neighbours", channels_pass),
    ("CumSum-read_over_units", channels_pass),
    ("Hardmax-first_of_equals", channels_pass),
    ("Trilu-triangle", channels_pass),
    ("Gather-chosen_at_run_time", channels_pass),
    ("ReverseSequence-reversed_units", channels_pass),
    ("Resize-channels_by_a_little", channels_pass),
    ("ScatterElements-elements", rows_forgotten),
    ("TopK-over_units", rows_forgotten),
    ("ReduceLogSumExp-over_units", rows_forgotten),
    ("BatchNormalization-inference", bias_unscaled),
    ("LayerNormalization-into_sigmoid", bias_unscaled),
    ("QuantizeLinear-per_axis", channels_pass),
]

MISSING: list[tuple[str, Callable[[OpContext], None]]] = [
    ("Relu-vector", pointwise),
    ("Tanh-vector", pointwise),
    ("Identity-vector", odd),
    ("Gelu-vector", never),
    ("Add-two_branches", never),
    ("GlobalAveragePool-image", never),
    ("LSTM-plain", never),
    ("Softmax-over_units", never),
]


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, rule: Callable[[OpContext], None]) -> list[str]:
    """Complaints about a case when its operator has another rule."""
    case = next(c for c in CASES if c.name == name)
    key = (case.domain, case.op.rpartition("::")[2])
    entry = registry.lookup(*key)
    assert entry is not None
    monkeypatch.setitem(registry._REGISTRY, key, replace(entry, labels=rule))
    return check(case)


def _name(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", "rule")


@pytest.mark.parametrize(("name", "rule"), INCORRECT, ids=_name)
def test_a_rule_that_claims_too_much_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, rule: Callable[[OpContext], None]
) -> None:
    assert any(c.startswith("incorrect") for c in replaced(monkeypatch, name, rule))


@pytest.mark.parametrize(("name", "rule"), MISSING, ids=_name)
def test_a_rule_that_claims_too_little_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, rule: Callable[[OpContext], None]
) -> None:
    assert any(c.startswith("missing") for c in replaced(monkeypatch, name, rule))


def test_an_excuse_that_is_not_needed_is_reported() -> None:
    case = next(c for c in CASES if c.name == "Sigmoid-vector")
    assert any(c.startswith("stale") for c in check(replace(case, coarse={"h:sign": "not true"})))


def test_an_operator_without_a_rule_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in CASES if c.name == "Softplus-vector")
    monkeypatch.delitem(registry._REGISTRY, ("", "Softplus"))
    program = Program.of(ir.from_proto(case.build()[0]))
    assert [s for s in program.spaces if "w_1[1]" in s.members] == []
    assert [o.op for o in program.opaque] == ["Softplus"]


# ---------------------------------------------------------------- subgraphs: what they capture stays
def condition(net: Sample) -> str:
    """A boolean graph input that is true."""
    net.feeds["condition"] = np.array(True)
    return net.input("condition", [], TensorProto.BOOL)


def branch(nodes: list[tuple[str, list[str]]], name: str) -> object:
    """A subgraph without inputs: unary or binary operators one after another."""
    made = [helper.make_node(op, inputs, [f"{name}_{k}"]) for k, (op, inputs) in enumerate(nodes)]
    out = helper.make_tensor_value_info(f"{name}_{len(nodes) - 1}", TensorProto.FLOAT, [3, 6])
    return helper.make_graph(made, name, [], [out])


def captured_value(net: Sample) -> str:
    """The branches read a hidden value."""
    h = net.vector()
    return net.op(
        "If", condition(net), then_branch=branch([("Relu", [h])], "a"), else_branch=branch([("Neg", [h])], "b")
    )


def captured_parameter(net: Sample) -> str:
    """A branch reads the bias that the main graph adds."""
    h = net.vector()
    ramp = net.const(np.arange(18.0).reshape(3, 6))
    bias = net.makers["h"][1].parameter
    both = [branch([("Mul", [ramp, bias])], name) for name in ("a", "b")]
    return net.op("Add", h, net.op("If", condition(net), then_branch=both[0], else_branch=both[1]))


def captured_two_levels_down(net: Sample) -> str:
    """A branch of a branch reads a hidden value."""
    h, flag = net.vector(), condition(net)
    inner = [branch([("Relu", [h])], name) for name in ("a", "b")]
    info = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [3, 6])
    node = helper.make_node("If", [flag], ["inner"], then_branch=inner[0], else_branch=inner[1])
    outer = helper.make_graph([node], "outer", [], [info])
    return net.op("If", flag, then_branch=outer, else_branch=branch([("Neg", [h])], "c"))


def loop_body(net: Sample) -> str:
    """A loop carries one hidden value and captures another."""
    carried, h = net.source((3, 4)), net.vector()
    del carried
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Identity", ["go"], ["go_on"]),
        helper.make_node("Add", ["v", h], ["sum"]),
        helper.make_node("CumSum", ["sum", net.const(1)], ["v_next"]),
    ]
    inputs = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, [3, 6])]
    outputs = [info("go_on", TensorProto.BOOL, []), info("v_next", TensorProto.FLOAT, [3, 6])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    return net.op("Loop", net.const(2), net.const(True), net.vector(units="k"), body=body)


CAPTURES = (captured_value, captured_parameter, captured_two_levels_down, loop_body)


@pytest.fixture(params=CAPTURES, ids=lambda f: f.__name__)
def capture(request: pytest.FixtureRequest) -> Iterator[Sample]:
    net = Sample(request.param.__name__, 20)
    net.read(request.param(net))
    yield net


def test_what_a_subgraph_captures_moves_as_its_body_allows(capture: Sample) -> None:
    proto = capture.model()
    program = Program.of(ir.from_proto(proto))
    held = {f"{side.parameter}[{side.axis}]" for sides in capture.makers.values() for side in sides}
    moving = [s for s in program.spaces if held & set(s.members)]
    assert bool(moving) == (capture.name != "loop_body")  # the loop sums along the units, and hands them on
    before = run(ir.from_proto(proto), capture.feeds)
    rng = np.random.default_rng(3)
    acted = program.act({space: space.random(rng) for space in program.spaces})
    assert difference(before, run(acted.emit(), capture.feeds)) < 1e-5
    if capture.name in ("captured_parameter", "loop_body"):  # the others are elementwise inside
        assert difference(before, run(ir.from_proto(naive(proto, capture, "h", "permute")), capture.feeds)) > 1e-3
