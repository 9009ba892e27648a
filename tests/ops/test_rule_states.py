"""Every rule on every kind of input state, in both directions, and controls: rules that claim too much or too little.

The states and the checker are in `rule_states` and `rule_states_check`; operators and values come from the registry's
cases. All variants run, but for `make test-fast`, which takes a selection of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.ops.families import CASES
from tests.ops.rule_states import Site
from tests.ops.rule_states_check import complaints

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import State
from cipm_ir.ops import load_rules, registry
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.elementwise import homogeneous
from cipm_ir.ops.registry import operator, registered
from cipm_ir.symmetry.program import Program

load_rules()

ALL = "free joint runs tiled uniform"
COARSE: dict[str, tuple[str, str]] = {
    # operator: (kinds of input states on which its rule claims less than is true, why)
    "ArgMin": ("uniform", "the first of equal entries along the axis itself"),
    "Attention": (ALL, "batch and positions are fixed, heads in one axis are never uniform; a cache is opaque"),
    "BatchNormalization": ("joint", "parameters are per channel: a joint factor over channels is pinned"),
    "Bernoulli": ("uniform", "equal only by chance"),
    "CenterCropPad": ("uniform", "along the cropped axis"),
    "Col2Im": ("uniform", "nothing of it is uniform"),
    "Concat": ("uniform", "along the joined axis, of equal parts"),
    "Conv": ("joint uniform", "joint channels of a grouped one are pinned; space counts as fixed"),
    "ConvInteger": ("uniform", "space counts as fixed"),
    "ConvTranspose": ("uniform", "space, and the batch of a grouped one"),
    "DeformConv": ("free runs tiled uniform", "space counts as fixed; several groups of offsets are opaque"),
    "DequantizeLinear": ("free uniform", "by blocks it is opaque; along the axis of the scales nothing is uniform"),
    "Einsum": ("uniform", "of three operands, positions that are summed in between count as fixed"),
    "EyeLike": ("free joint runs tiled", "opaque, though only the shape of the input counts"),
    "GRU": ("uniform", "states and outputs are never uniform"),
    "GatherElements": ("uniform", "indices for each entry on its own: nothing passes"),
    "GatherND": ("uniform", "along the axis that counts the indices"),
    "GridSample": (ALL, "places are from outside, and are not told apart by axis"),
    "GroupNormalization": ("free joint runs tiled", "batch and space must be fixed"),
    "Hardmax": ("uniform", "equal only by chance"),
    "LSTM": ("uniform", "states and outputs are never uniform"),
    "LayerNormalization": (ALL, "opaque where its statistics are asked for"),
    "LessOrEqual": ("uniform", "equal only by chance"),
    "LpPool": ("uniform", "space counts as fixed"),
    "MaxPool": ("uniform", "space counts as fixed; with indices it is opaque"),
    "MaxRoiPool": ("uniform", "space counts as fixed"),
    "Pad": ("uniform", "mirrored entries of a uniform axis are equal"),
    "QLinearConv": ("uniform", "space counts as fixed"),
    "QuantizeLinear": ("free uniform", "by blocks it is opaque; along the axis of the scales nothing is uniform"),
    "RNN": (
        "free runs tiled uniform",
        "lengths of the sequences are from outside; states and outputs are never uniform",
    ),
    "Resize": ("uniform", "an interpolation of equal entries"),
    "ReverseSequence": ("uniform", "opaque"),
    "RoiAlign": ("uniform", "space counts as fixed"),
    "RotaryEmbedding": (ALL, "positions are fixed, planes of a uniform axis opaque"),
    "Scatter": ("free", "indices for each entry on its own: nothing passes"),
    "ScatterElements": ("free", "indices for each entry on its own: nothing passes"),
    "STFT": ("free runs tiled uniform", "the window is from outside, positions are fixed"),
    "ScatterND": ("uniform", "no axis of the result is uniform"),
    "Shape": ("free joint runs tiled", "nothing of it depends on entries"),
    "Size": ("free joint", "nothing of it depends on entries"),
    "TopK": ("uniform", "the largest of equal entries along the axis itself"),
    "Upsample": ("uniform", "an interpolation of equal entries"),
    "com.microsoft::Attention": (
        "free uniform",
        "uniform parts of a packed axis count as fixed; masks are from outside",
    ),
    "com.microsoft::DynamicQuantizeLSTM": ("uniform", "states and outputs are never uniform"),
    "com.microsoft::EmbedLayerNormalization": (
        "free joint runs tiled",
        "a table of rows that are chosen by equal indices",
    ),
    "com.microsoft::FusedConv": ("uniform", "space counts as fixed"),
    "com.microsoft::GridSample": (ALL, "places are from outside, and are not told apart by axis"),
    "com.microsoft::GroupQueryAttention": ("free uniform", "lengths of the sequences are from outside"),
    "com.microsoft::MatMulNBits": ("uniform", "no axis of a packed product is uniform"),
    "com.microsoft::MultiHeadAttention": (ALL, "batch and positions are fixed, and a mask is from outside"),
    "com.microsoft::QAttention": ("uniform", "what is cut out of one packed axis counts as fixed where it is uniform"),
    "com.microsoft::QLinearAveragePool": ("uniform", "space counts as fixed"),
    "com.microsoft::QLinearConcat": ("uniform", "parts that are uniform count as fixed"),
    "com.microsoft::QLinearConv": ("uniform", "space counts as fixed"),
    "com.microsoft::RotaryEmbedding": ("uniform", "a table of uniform planes counts as fixed"),
    "com.microsoft::SkipSimplifiedLayerNormalization": ("uniform", "terms that are uniform count as fixed"),
}


def check(name: str, *, thorough: bool = False) -> tuple[list[str], dict[str, set[str]]]:
    """False claims over all cases of an operator, and its coarse places by kind of state."""
    wrong, coarse = [], dict[str, set[str]]()
    sites = {site.kind: site for case in CASES if case.op == name for site in Site.all_of(case) if site.varied}
    for site in sites.values():
        found, places = complaints(site, thorough=thorough)
        wrong += [f"{site.case}: {one}" for one in found]
        for place in places:
            kind = "uniform" if "->" in place else place.split(": ")[1].split()[0]
            coarse.setdefault(kind, set()).add(f"{site.case}: {place}")
    return wrong, coarse


OPERATORS = [f"{entry.domain}::{entry.name}" if entry.domain else entry.name for entry in registered()]


@pytest.mark.sample
@pytest.mark.parametrize("name", OPERATORS)
def test_claims_hold_in_every_state(name: str) -> None:
    wrong, coarse = check(name)
    assert wrong == []
    known = COARSE.get(name, ("", ""))[0].split()
    assert {kind: places for kind, places in coarse.items() if kind not in known} == {}, "the rule has become coarser"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_claims_hold_in_every_combination_of_states(name: str) -> None:
    wrong, coarse = check(name, thorough=True)
    assert wrong == []
    assert set(coarse) == set(COARSE.get(name, ("", ""))[0].split()), "the list of coarse rules is out of date"


# ---------------------------------------------------------------- controls: rules that lie are caught
def stays_uniform(op: OpContext) -> None:
    """Hands on every uniform axis of the input by name."""
    x = op.state(0)
    op.freeze(x)
    op.set(0, (fixed(f) for f in x.factors), x.uniform, x.shape)


def any_order(op: OpContext) -> None:
    """As if each entry stood alone: entries of a joint factor would change places between rows."""
    x = op.state(0)
    op.freeze(x)
    op.like(0, State(x.shape, tuple(fixed(f) for f in x.factors)))


def bias_forgotten(op: OpContext) -> None:
    """A sum whose second term does not matter."""
    op.set(0, op.state(0).factors, op.state(0).uniform)


def never(op: OpContext) -> None:
    """Pins what could move."""
    raise UnsupportedPattern("caution")


WRONG: list[tuple[str, Callable[[OpContext], None], str]] = [
    ("CumSum", stays_uniform, "uniform"),
    ("LRN", stays_uniform, "uniform"),
    ("Hardmax", stays_uniform, "uniform"),
    ("Trilu", stays_uniform, "uniform"),
    ("Add", bias_forgotten, "uniform"),
    ("Softmax", any_order, "joint"),
    ("LpNormalization", any_order, "joint"),
    ("MeanVarianceNormalization", any_order, "joint"),
    ("CumSum", any_order, "free"),
    ("Sigmoid", homogeneous, "free"),
    ("Sigmoid", homogeneous, "joint"),
    ("Sigmoid", homogeneous, "tiled"),
    ("ReverseSequence", any_order, "tiled"),
    ("Trilu", any_order, "runs"),
]


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, rule: Callable[[OpContext], None]) -> None:
    entry = registry.lookup("", name)
    assert entry is not None
    monkeypatch.setitem(registry._REGISTRY, ("", name), replace(entry, labels=rule))


@pytest.mark.parametrize(("name", "rule", "state"), WRONG, ids=lambda v: getattr(v, "__name__", v))
def test_a_rule_that_claims_too_much_is_caught(
    monkeypatch: pytest.MonkeyPatch, name: str, rule: Callable[[OpContext], None], state: str
) -> None:
    replaced(monkeypatch, name, rule)
    assert any(f": {state}" in one for one in check(name)[0])


def test_what_is_wrong_over_several_axes_alone_shows_where_they_are_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """The channels of a block in the wrong places, from an input whose axes are free."""
    entry = registry.lookup("", "DepthToSpace")
    assert entry is not None

    def wrong_way_round(op: OpContext) -> None:
        entry.labels(op)
        state = op.outputs[0]
        assert state is not None
        for factor in state.factors:
            if len(factor.axes) > 1:
                factor.labels = factor.labels[::-1]

    replaced(monkeypatch, "DepthToSpace", wrong_way_round)
    found = check("DepthToSpace", thorough=True)[0]
    assert any(": 0: free; flat: " in one for one in found), found
    assert not any(": 0: free; axes: " in one for one in found)


@pytest.mark.parametrize(("name", "states"), [("Relu", ALL), ("Add", ALL), ("Softmax", "joint uniform")])
def test_a_rule_that_claims_too_little_is_caught(monkeypatch: pytest.MonkeyPatch, name: str, states: str) -> None:
    replaced(monkeypatch, name, never)
    assert set(states.split()) <= set(check(name)[1])


# ---------------------------------------------------------------- rules from elsewhere, written in the obvious way
def program_with(op_type: str) -> Program:
    """(4, 1) expanded to (4, 6), an operator of another domain, and a product with a weight."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["e"]),
        helper.make_node(op_type, ["e"], ["c"], domain="elsewhere"),
        helper.make_node("MatMul", ["c", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    given = {
        "shape": np.array([4, 6]),
        "w": rng.standard_normal((6, 5)).astype(np.float32),
        "v": rng.standard_normal((5, 2)).astype(np.float32),
    }
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [4, 1])], [info("y", TensorProto.FLOAT, [4, 2])],
        [numpy_helper.from_array(a, k) for k, a in given.items()], value_info=[info("c", TensorProto.FLOAT, [4, 6])],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    return Program.of(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10)))


def one_axis_pinned(op: OpContext) -> None:
    op.like(0, op.pin_axes(op.state(0), [1], "order matters"))


def given_back(op: OpContext) -> None:
    op.like(0, op.state(0))


def copied(op: OpContext) -> None:
    x = op.state(0)
    op.like(0, State(x.shape, x.factors, x.uniform))


def pinned_and_declared(op: OpContext) -> None:
    rest = op.pin_axes(op.state(0), [1], "order matters")
    op.set(0, rest.factors, rest.uniform)


@pytest.mark.parametrize("rule", [one_axis_pinned, given_back, copied, pinned_and_declared], ids=lambda f: f.__name__)
@pytest.mark.parametrize("elementwise", [False, True])
def test_uniform_axes_end_unless_the_operator_declares_otherwise(
    monkeypatch: pytest.MonkeyPatch, rule: Callable[[OpContext], None], elementwise: bool
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    operator("Ordered", domain="elsewhere", elementwise=elementwise)(rule)
    program = program_with("Ordered")
    declared = elementwise and rule is not pinned_and_declared
    assert (1 in program.analysis.walk.states["c"].uniform) == declared
    assert any("w[0]" in space.members for space in program.spaces) == declared
    assert any("w[1]" in space.members for space in program.spaces)


def test_pins_of_part_of_a_joint_factor_have_no_way_around_without() -> None:
    """A rule that pins one axis of a joint factor must go on with what is left: only `without` does that."""
    with pytest.raises(TypeError):
        OpContext.pin(object(), State((2, 3)), "reason", [0])  # type: ignore[call-arg, arg-type]
