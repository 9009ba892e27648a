"""`restrict` beside uniform inputs, which are cut to what they meet, and literals that sizes would break."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.ops import (
    cases_elementwise as registry_cases_elementwise,
)
from tests.ops import (
    cases_layout as registry_cases_layout,
)
from tests.ops import (
    cases_linear as registry_cases_linear,
)
from tests.ops import (
    cases_sequence as registry_cases_sequence,
)
from tests.ops.rule_states import Bench, Site, states
from tests.ops.sample import CASES, difference

from cipm_ir.errors import SymmetryError
from cipm_ir.ops import load_rules
from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

FAMILIES = (registry_cases_elementwise, registry_cases_layout, registry_cases_linear, registry_cases_sequence)
load_rules()
STATES = {
    # case: states of the inputs that vary
    "Add-two_branches": ("free", "uniform 1"),
    "Mul-two_branches": ("uniform 1 fixed", "free"),
    "Where-condition_from_one": ("free", "uniform 1"),
    "MatMul-with_a_vector": ("uniform 1", "free"),
    "Gemm-bias_per_unit": ("free", "free", "uniform 0"),
    "Conv-strided": ("uniform 1", "free", "free"),
    "Concat-along_time": ("joint 0", "uniform"),
    "Concat-two_sources": ("uniform 1", "free"),
    "LayerNormalization-into_relu": ("joint 0", "uniform 0", "uniform 0"),
    "QuantizeLinear-per_axis": ("free", "uniform 0", "uniform 0"),
    "LSTM-plain": ("free", "free", "free", "uniform 1"),
    "GRU-state_from_outside": ("free", "free", "free", "free", "uniform 2"),
    "Attention-four_axes_in_and_out": ("uniform", "free", "free"),
    "Attention-three_axes": ("uniform", "uniform", "free"),
    "Attention-grouped_queries": ("free", "uniform", "free"),
    "RotaryEmbedding-angles_from_outside": ("free", "uniform", "uniform"),
}


def emptied(proto: onnx.ModelProto, program: Program, space: Space, keep: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """The model with zeros in all that belongs to the units that go: they contribute nothing."""
    analysis = program.analysis
    gone = ~program.kept_classes({space: keep})[analysis.classes.of]
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    stored = {t.name: t for t in copy.graph.initializer}
    for f in analysis.walk.leaf_factors:
        mask = gone[f.base : f.base + f.size]
        if f.active and mask.any():
            name = analysis.walk.leaves[f.leaf].name
            array = numpy_helper.to_array(stored[name]).copy()
            array[(slice(None),) * f.axes[0] + (mask,)] = 0
            stored[name].CopyFrom(numpy_helper.from_array(array, name))
    return copy


def removals(proto: onnx.ModelProto, feeds: dict[str, Any]) -> list[float]:
    """Change of the outputs by dropping the last unit of each space that no statistic runs over."""
    program = Program.of(ir.from_proto(proto))
    normalized = np.zeros(program.analysis.classes.count, bool)
    for labels in program.analysis.walk.rec.normalized:
        normalized[program.analysis.classes.of[labels]] = True
    errors = []
    for space, raw in zip(program.spaces, program.analysis.spaces, strict=True):
        if space.kind != "units" or space.size < 2 or space.parent is not None or normalized[raw.table].any():
            continue
        keep = np.arange(space.size - 1)
        model = emptied(proto, program, space, keep)
        before = Program.of(ir.from_proto(model))
        try:
            after = before.restrict({before.space(space.name): keep}).emit()
        except SymmetryError as refused:  # heads and groups keep equal widths
            assert "equally many" in str(refused)
            continue
        errors.append(difference(run(ir.from_proto(model), feeds), run(after, feeds)))
    return errors


def fits(site: Site, given: tuple[str, ...]) -> bool:
    """Whether the inputs that vary can be in these states."""
    shapes = [array.shape for k in site.varied if (array := site.arrays[k]) is not None]
    return len(shapes) == len(given) and all(s in states(shape) for s, shape in zip(given, shapes, strict=True))


def bench_of(name: str, how: str) -> Bench:
    """The operator of a case on inputs in the states of the table."""
    sites = [site for case in CASES if case.name == name for site in Site.all_of(case)]
    site = next(site for site in reversed(sites) if fits(site, STATES[name]))
    given = [""] * len(site.arrays)
    for k, state in zip(site.varied, STATES[name], strict=True):
        given[k] = state
    made = Bench(site.opset)
    made.variant(site, given, how, np.random.default_rng(0))
    return made


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("how", ["axes", "flat"])
def test_units_that_contribute_nothing_go_beside_uniform_inputs(name: str, how: str) -> None:
    made = bench_of(name, how)
    assert all(error < 1e-4 for error in removals(made.model(), made.feeds))


def test_the_comparison_sees_a_unit_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.symmetry.test_restrict_uniform.emptied", lambda proto, *_: proto)
    made = bench_of("Add-two_branches", "axes")
    assert max(removals(made.model(), made.feeds)) > 1e-2


# ---------------------------------------------------------------- literals that a size of one, or a type, would break
def network(nodes: list[onnx.NodeProto], given: dict[str, Any], shape: list[int], opset: int = 18) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    initializers = [numpy_helper.from_array(np.asarray(a), k) for k, a in given.items()]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, shape)], [info("y", TensorProto.FLOAT, [3, 2])], initializers
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def drop(model: onnx.ModelProto, keep: list[int], shape: list[int]) -> float:
    program = Program.of(ir.from_proto(model))
    feeds = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
    before = Program.of(ir.from_proto(emptied(model, program, program.spaces[0], np.asarray(keep))))
    after = before.restrict({before.spaces[0]: keep}).emit()
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    return difference(run(before.emit(), feeds), run(after, feeds))


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("size", [2, 5])
def test_squeeze_of_all_axes_keeps_an_axis_that_shrinks_to_one(opset: int, size: int) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]), helper.make_node("Squeeze", ["p"], ["q"]),
        helper.make_node("MatMul", ["q", "v"], ["y"]),
    ]  # fmt: skip
    given = {"w": rng.standard_normal((size, 2, 1, 1)), "v": rng.standard_normal((size, 2))}
    model = network(nodes, {k: a.astype(np.float32) for k, a in given.items()}, [3, 2, 4, 4], opset)
    for keep in ([0], list(range(size - 1))):
        assert drop(model, keep, [3, 2, 4, 4]) < 1e-5


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize(("start", "step"), [(-1, -1), (5, -1), (4, -2), (2**31 - 1, -1)])
def test_backward_slices_of_either_type_follow(kind: type, start: int, step: int) -> None:
    rng = np.random.default_rng(0)
    end = int(np.iinfo(kind).min)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Slice", ["r", "starts", "ends", "axes", "steps"], ["q"]),
        helper.make_node("MatMul", ["q", "v"], ["y"]),
    ]  # fmt: skip
    count = len(range(6)[min(start, 5) if start >= 0 else start :: step])
    given: dict[str, Any] = {name: np.array([n], kind) for name, n in
                             (("starts", start), ("ends", end), ("axes", 1), ("steps", step))}  # fmt: skip
    given |= {
        "w": rng.standard_normal((4, 6)).astype(np.float32),
        "v": rng.standard_normal((count, 2)).astype(np.float32),
    }
    model = network(nodes, given, [3, 4])
    size = Program.of(ir.from_proto(model)).spaces[0].size
    assert drop(model, list(range(size - 1)), [3, 4]) < 1e-5
    assert drop(model, list(range(1, size)), [3, 4]) < 1e-5


@pytest.mark.parametrize("given", [{}, {"axes": [0, 2, 3]}, {"axes": [2, 3]}])
def test_mean_variance_normalization_is_read_with_and_without_axes(given: dict[str, Any]) -> None:
    import cipm_ir

    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("MeanVarianceNormalization", ["c"], ["h"], **given),
        helper.make_node("Conv", ["h", "v"], ["y"]),
    ]
    tensors = {"w": rng.standard_normal((6, 3, 1, 1)), "v": rng.standard_normal((2, 6, 1, 1))}
    initializers = [numpy_helper.from_array(a.astype(np.float32), k) for k, a in tensors.items()]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [2, 3, 4, 4])], [info("y", TensorProto.FLOAT, [2, 2, 4, 4])],
        initializers,
    )  # fmt: skip
    program = cipm_ir.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    assert [space.size for space in program.spaces] == [6]
    moved = program.act({space: space.random(rng) for space in program.spaces})
    feeds = {"x": rng.standard_normal((2, 3, 4, 4)).astype(np.float32)}
    assert difference(run(program.emit(), feeds), run(moved.emit(), feeds)) < 1e-5


def test_channels_that_differ_by_their_normalization_alone() -> None:
    """One image in six channels: the parameters of a batch normalization tell them apart, and go with them."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 6, 3, 3)).astype(np.float32)
    weight[:, 1::2] = 0  # the channels that are dropped count for nothing
    vectors = {name: rng.standard_normal(6).astype(np.float32) for name in ("g", "b", "m")}
    nodes = [
        helper.make_node("Expand", ["x", "s"], ["e"]),
        helper.make_node("BatchNormalization", ["e", "g", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    given = {**vectors, "v": np.abs(vectors["g"]) + 1, "w": weight, "s": np.array([2, 6, 8, 8])}
    model = ir.from_proto(network(nodes, given, [2, 1, 8, 8]))
    program = Program.of(model)
    (space,) = [space for space in program.spaces if space.size == 6]
    x = {"x": rng.standard_normal((2, 1, 8, 8)).astype(np.float32)}
    wanted = run(model, x)["y"]
    for changed in (program.act({space: space.random(rng)}), program.restrict({space: [0, 2, 4]})):
        np.testing.assert_allclose(run(changed.emit(), x)["y"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    lost = run(program.restrict({space: [1, 3, 5]}).emit(), x)["y"]
    assert np.abs(lost - wanted).max() > 0.1 * np.abs(wanted).max()
