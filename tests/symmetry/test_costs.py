"""Multiply-accumulates: against a second count from onnxruntime's profile, and what happens where nobody can count."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests import zoo
from tests.models.cost_models import count, model, sequence, weights
from tests.oracles.second_count import second_count

import cipm_ir
from cipm_ir.errors import SymmetryError
from cipm_ir.ir.shapes import dynamic_sizes
from cipm_ir.ops import costs as cost_rules
from cipm_ir.ops import load_rules
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.pruning.budget.cost import CostModel
from cipm_ir.passes.pruning.budget.search import link_spaces
from cipm_ir.passes.pruning.prune import Prune
from cipm_ir.runtime.inputs.generate import random_inputs
from cipm_ir.symmetry.counting import Count
from cipm_ir.symmetry.program import Program

DATA = Path(os.environ.get("CIPM_TEST_DATA", "missing"))
FILES = sorted(DATA.glob("graphs/*.onnx")) + sorted(DATA.glob("cifar10/*.onnx"))
ZOO = zoo.names(without=("large", "reference", "minilm"))
NOBODY = {
    # subgraphs are counted where they stand; for the others there is no rule yet
    "If", "Loop", "Scan", "SequenceMap", "CausalConvWithState", "LinearAttention",
}  # fmt: skip


def sizes_of(program: Program, feeds: Mapping[str, Any]) -> dict[str, int]:
    found = dynamic_sizes(program.model.graph)
    return {name: feeds[v.name or ""].shape[axis] for name, places in found.items() for v, axis in places}


def both(name: str) -> tuple[Count, int]:
    made = zoo.build_or_skip(name)
    if made.functions:
        made = onnx.inliner.inline_local_functions(made)
    feeds = zoo.feeds(name, made)
    program = cipm_ir.load(made)
    return program.count(sizes_of(program, feeds)), sum(second_count(made, feeds).values())


# ---------------------------------------------------------------- the second count
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_counted_as_it_runs(name: str) -> None:
    counted, second = both(name)
    assert counted.total == second
    assert not counted.unknown


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_real_files_are_counted_as_they_run(path: Path) -> None:
    program = cipm_ir.load(path)
    counted = program.count()
    feeds = random_inputs(program.model, np.random.default_rng(0), batch=1, dims=dict(counted.sizes))
    assert counted.total == sum(second_count(onnx.load(path), feeds).values())
    assert not counted.unknown


@pytest.mark.parametrize("op", ["Conv", "Gemm", "LSTM", "Einsum", "MatMul", "ConvTranspose", "QLinearConv"])
def test_a_wrong_rule_is_found_out(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the comparison: one product too many in every node of an operator differs from the run's."""
    load_rules()
    right = cost_rules._RULES["", op]
    monkeypatch.setitem(cost_rules._RULES, ("", op), lambda site: right(site) + 1)
    counted, second = both(_first(lambda node: node.op_type == op))
    assert counted.total > second


def _first(wanted: Callable[[onnx.NodeProto], bool]) -> str:
    """The first model of the zoo with such a node."""
    return next(name for name in ZOO if any(map(wanted, zoo.build_or_skip(name).graph.node)))


def test_groups_are_not_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the classical mistake, a grouped convolution counted as a full one."""

    def full(site: cost_rules.Site) -> int:
        return int(np.prod(site.output()) * np.prod(site.input(1)[2:]) * site.input(0)[1])

    load_rules()
    monkeypatch.setitem(cost_rules._RULES, ("", "Conv"), full)
    grouped = _first(lambda node: any(a.name == "group" and a.i > 1 for a in node.attribute))
    counted, second = both(grouped)
    assert counted.total > second


def test_every_operator_of_onnx_is_decided() -> None:
    """Counted, declared free, or known to be neither; a new operator of ONNX is in none and fails here."""
    load_rules()
    there_are = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    assert {name for name in there_are if cost_rules.rule_of("", name) is None} == NOBODY & there_are


# ---------------------------------------------------------------- single operators, by hand
def one(
    op: str, inputs: list[list[int]], out: list[int] | None, opset: int = 20, domain: str = "", **attributes: Any
) -> int:
    names = [f"i{k}" for k in range(len(inputs))]
    node = helper.make_node(op, names, ["y"], domain=domain, **attributes)
    extra = {domain.replace(".", "_"): 1} if domain else {}
    counted = count(model([node], dict(zip(names, inputs, strict=True)), {"y": out}, {}, opset, **extra))
    assert not counted.unknown, counted.unknown
    return counted.total


OURS = "com.microsoft"


@pytest.mark.parametrize(
    ("expected", "made"),
    [
        (2 * 3 * 4 * 5, lambda: one("MatMul", [[2, 3, 4], [4, 5]], [2, 3, 5])),
        (4, lambda: one("MatMul", [[4], [4]], [])),
        (3 * 4 * 5, lambda: one("Gemm", [[4, 3], [5, 4]], [3, 5], transA=1, transB=1)),
        # three operands, from left to right: (ij,jk) then (ik,kl)
        (2 * 3 * 4 + 2 * 4 * 5, lambda: one("Einsum", [[2, 3], [3, 4], [4, 5]], [2, 5], equation="ij,jk,kl->il")),
        # what one operand alone has is summed before
        (2 * 5, lambda: one("Einsum", [[2, 3], [5]], [2, 5], equation="ij,k->ik")),
        (0, lambda: one("Einsum", [[2, 3]], [3, 2], equation="ij->ji")),
        (4 * 2 * 3 * 5, lambda: one("Einsum", [[4, 2, 3], [3, 5]], [4, 2, 5], equation="...ij,jk->...ik")),
        (
            2 * 6 * 9 * (16 + 16),
            lambda: one(
                "Attention", [[2, 6, 16], [2, 9, 16], [2, 9, 16]], [2, 6, 16], 23, q_num_heads=4, kv_num_heads=4
            ),
        ),
        (64 * 6 * 2, lambda: one("DFT", [[1, 64, 2]], [1, 64, 2], 17, axis=1)),
        (3 * 64 * 6, lambda: one("DFT", [[3, 64, 1]], [3, 64, 2], 17, axis=1)),
        (2 * 3 * 4 * 4 * 4, lambda: one("GridSample", [[2, 3, 8, 8], [2, 4, 4, 2]], [2, 3, 4, 4], mode="linear")),
        (0, lambda: one("GridSample", [[2, 3, 8, 8], [2, 4, 4, 2]], [2, 3, 4, 4], mode="nearest")),
        (
            5 * 6 * 36 * 27 + 4 * 36 * 3 * 9 * 5,
            lambda: one("DeformConv", [[5, 3, 8, 8], [6, 3, 3, 3], [5, 18, 6, 6]], [5, 6, 6, 6]),
        ),
        (0, lambda: one("Softmax", [[4, 5]], [4, 5])),
        (0, lambda: one("LayerNormalization", [[4, 5], [5]], [4, 5])),
        (2 * 3 * 4 * 5, lambda: one("FusedMatMul", [[2, 4, 3], [2, 4, 5]], None, domain=OURS, transA=1)),
        (2 * 6 * 16 * 9, lambda: one("FusedConv", [[2, 1, 6, 6], [6, 1, 3, 3]], None, domain=OURS, activation="Relu")),
        (
            7 * 16 * 32,
            lambda: one(
                "MatMulNBits", [[7, 16], [32, 1, 8], [32]], None, domain=OURS, K=16, N=32, bits=4, block_size=16
            ),
        ),
        # 2 * 6 rows through (16, 48), then 6 keys for 16 queries and 16 values
        (
            12 * 16 * 48 + 6 * 12 * 32,
            lambda: one("Attention", [[2, 6, 16], [16, 48], [48]], None, domain=OURS, num_heads=4),
        ),
        (
            9 * 2 * 6 * 32,
            lambda: one("MultiHeadAttention", [[2, 6, 16], [2, 9, 16], [2, 9, 16]], None, domain=OURS, num_heads=4),
        ),
        (
            6 * 6 * 2 * 16,
            lambda: one(
                "GroupQueryAttention",
                [[1, 6, 16], [1, 6, 8], [1, 6, 8]],
                None,
                domain=OURS,
                num_heads=4,
                kv_num_heads=2,
            ),
        ),
    ],
)
def test_single_operators(expected: int, made: Any) -> None:
    assert made() == expected


@pytest.mark.parametrize("op", ["FusedMatMul", "FusedConv", "FusedGemm"])
def test_operators_of_onnxruntime_are_counted_as_they_run(op: str) -> None:
    shapes: dict[str, tuple[list[int], np.ndarray, dict[str, Any]]] = {
        "FusedMatMul": ([2, 4, 3], weights(2, 4, 5), {"transA": 1}),
        "FusedConv": ([2, 4, 6, 6], weights(8, 2, 3, 3), {"group": 2, "activation": "Relu", "pads": [1] * 4}),
        "FusedGemm": ([4, 3], weights(5, 3), {"transB": 1, "activation": "Relu"}),
    }
    shape, weight, attributes = shapes[op]
    nodes = [
        helper.make_node(op, ["x", "w"], ["h"], domain=OURS, **attributes),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    last = {"FusedMatMul": 5, "FusedConv": 6, "FusedGemm": 5}[op]
    made = model(nodes, {"x": shape}, {"y": None}, {"w": weight, "v": weights(last, 2)}, com_microsoft=1)
    counted = count(made)
    assert not counted.unknown  # the product behind has its shape from the fused operator
    assert counted.total == sum(second_count(made, {"x": weights(*shape)}).values())


# ---------------------------------------------------------------- subgraphs
def branch(columns: int) -> onnx.GraphProto:
    nodes = [
        helper.make_node("MatMul", ["x", f"w{columns}"], [f"h{columns}"]),
        helper.make_node("ReduceSum", [f"h{columns}"], [f"o{columns}"]),
    ]
    return helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info(f"o{columns}", TensorProto.FLOAT, None)])


@pytest.mark.parametrize(("constant", "expected"), [(None, 3 * 4 * 7), (True, 3 * 4 * 5), (False, 3 * 4 * 7)])
def test_an_if_costs_its_dearer_branch_or_the_one_that_is_taken(constant: bool | None, expected: int) -> None:
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch(5), else_branch=branch(7))
    made = model([node], {"x": [3, 4]}, {"y": None}, {"w5": weights(4, 5), "w7": weights(4, 7)})
    if constant is None:
        made.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    else:
        made.graph.initializer.append(numpy_helper.from_array(np.array(constant), "c"))
    assert count(made).total == expected
    for taken in (True, False) if constant is None else (constant,):
        feeds = {"x": weights(3, 4), **({"c": np.array(taken)} if constant is None else {})}
        assert sum(second_count(made, feeds).values()) <= expected


def loop(trips: int | None) -> onnx.ModelProto:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["h2"]), helper.make_node("Identity", ["go"], ["go2"])], "body",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go2", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h2", TensorProto.FLOAT, None),
        ],
    )  # fmt: skip
    made = model(
        [helper.make_node("Loop", ["m", "", "x"], ["y"], body=body, name="steps")],
        {"x": [3, 4]},
        {"y": [3, 4]},
        {"w": weights(4, 4)},
    )
    if trips is None:
        made.graph.input.append(helper.make_tensor_value_info("m", TensorProto.INT64, []))
    else:
        made.graph.initializer.append(numpy_helper.from_array(np.array(trips), "m"))
    return made


def test_a_loop_costs_its_body_times_its_trips() -> None:
    assert count(loop(6)).total == 6 * 3 * 4 * 4 == sum(second_count(loop(6), {"x": weights(3, 4)}).values())
    unknown = count(loop(None))
    assert unknown.total == 0 and [u.name for u in unknown.doubtful] == ["steps"]
    assert "how often" in unknown.unknown[0].reason


# ---------------------------------------------------------------- what cannot be counted
def with_custom(
    after: list[onnx.NodeProto] | None = None, shape: list[int] | None = None, domain: str = "own"
) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["o"]),
        helper.make_node("Strange", ["o"], ["y"], domain=domain, name="odd"),
        *(after or []),
    ]
    parameters = {"w1": weights(64, 256), "w2": weights(256, 4)}
    made = model(nodes, {"x": [8, 64]}, {"y": shape or [8, 4]}, parameters)
    made.opset_import.append(helper.make_opsetid(domain, 1))
    return made


@pytest.mark.parametrize("spec", ["prune{macs=0.5}", "fold{macs=0.5}", "compress{macs=0.5}"])
def test_a_budget_is_refused_where_a_node_cannot_be_counted(spec: str) -> None:
    with pytest.raises(SymmetryError, match=r"Strange 'odd': there is no rule.*params="):
        cipm_ir.optimize(with_custom(), [spec], data={"x": weights(64, 64)})


def test_other_budgets_need_no_count_and_the_report_says_what_is_missing() -> None:
    result = cipm_ir.optimize(with_custom(), ["prune{params=0.5}"])
    assert result.report.steps[0].changed
    assert "MACs are without what cannot be counted: Strange 'odd': there is no rule" in str(result.report)
    assert result.report.to_dict()["after"]["uncounted"] == [
        "Strange 'odd': there is no rule that counts this operator"
    ]


def test_a_node_that_is_small_by_its_shapes_does_not_matter() -> None:
    """An operator of onnxruntime without a rule: 32 entries in and out, at most 1,024 products."""
    made = with_custom(domain=OURS)
    counted = count(made)
    assert counted.unknown[0].most == 32 * 32
    assert counted.doubtful  # 1,024 of 139,264 is more than a thousandth
    small = with_custom(domain=OURS)
    small.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    small.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert count(small).unknown and not count(small).doubtful
    assert cipm_ir.optimize(small, ["prune{macs=0.5}"], verify=False).report.steps[0].changed


def test_nothing_is_known_behind_an_unknown_shape() -> None:
    after = [helper.make_node("MatMul", ["y", "w3"], ["z"], name="last")]
    made = with_custom(after)
    made.graph.initializer.append(numpy_helper.from_array(weights(4, 3), "w3"))
    made.graph.output[0].name = "z"
    del made.graph.output[0].type.tensor_type.shape.dim[:]
    assert [u.name for u in count(made).unknown] == ["odd", "last"]


# ---------------------------------------------------------------- what a choice would cost
@pytest.mark.parametrize(
    "name", ["unet_concat_skip", "channel_shuffle", "attention_gqa", "lstm", "residual_blocks", "einsum_layers"]
)
def test_predicted_is_counted_is_run(name: str) -> None:
    """The cost model, the count of the program that comes out, and the second count of it agree."""
    made = zoo.build_or_skip(name)
    feeds = zoo.feeds(name, made)
    program = cipm_ir.load(made)
    sizes = sizes_of(program, feeds)
    costs = CostModel(program, sizes)
    rng = np.random.default_rng(1)
    keep = {}
    for group in link_spaces(program.analysis).groups:
        if program.spaces[group[0]].kind == "units":
            number = int(rng.integers(1, min(program.spaces[k].size for k in group) + 1))
            for k in group:
                keep[program.spaces[k]] = np.sort(rng.choice(program.spaces[k].size, number, replace=False))
    after = program.restrict(keep)
    predicted = costs.macs(program.kept_classes(keep))
    assert predicted == after.count(sizes).total < program.count(sizes).total
    assert predicted == sum(second_count(ir.to_proto(after.emit()), feeds).values())


# ---------------------------------------------------------------- nothing removed: why
def test_a_budget_that_is_met_says_how_much_there_is() -> None:
    made = sequence(1, 8, 16)
    summary = Prune(macs=1.0).run(cipm_ir.load(made), Context()).summary
    assert summary.startswith("nothing to remove: 1 of the multiply-accumulates are there, within the budget of 1")


def test_a_budget_without_spaces_names_what_pins() -> None:
    """The hidden layer is an output: nothing may go, and the message says which tensors are held by what."""
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["h"]), helper.make_node("MatMul", ["h", "w2"], ["y"])]
    made = model(nodes, {"x": [2, 4]}, {"h": [2, 8], "y": [2, 3]}, {"w1": weights(4, 8), "w2": weights(8, 3)})
    with pytest.raises(SymmetryError, match=r"w1\[1\].* pinned.*\(graph output\)"):
        Prune(macs=0.5).run(cipm_ir.load(made), Context())
    said = Prune(ratio=0.5).run(cipm_ir.load(made), Context()).summary
    assert "has no units" in said and "graph output" in said


def test_spaces_without_a_smaller_width_are_named() -> None:
    with pytest.raises(SymmetryError, match="min_keep and round_to leave no smaller width"):
        Prune(macs=0.5, round_to=512).run(cipm_ir.load(sequence(1, 8, 16)), Context())
