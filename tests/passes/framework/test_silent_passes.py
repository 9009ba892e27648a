"""No pass leaves something alone without a word: the summary names it and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import cipm_ir
from cipm_ir.passes.exact.rotate import rotate as rotate_pass
from cipm_ir.passes.framework.registry import lookup, names

Node = onnx.NodeProto


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model(
    nodes: list[Node],
    parameters: dict[str, np.ndarray],
    shape: tuple[Any, ...] = ("N", 8),
    out: str = "y",
    **domains: int,
) -> onnx.ModelProto:
    dtype = helper.np_dtype_to_tensor_dtype(next(iter(parameters.values())).dtype)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, list(shape))],
        [helper.make_tensor_value_info(out, dtype, None)],
        [numpy_helper.from_array(a, n) for n, a in parameters.items()],
    )
    imports = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, v) for d, v in domains.items())]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def opaque() -> onnx.ModelProto:
    """The hidden layer enters an operator that nobody knows."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Strange", ["h"], ["s"], domain="own", name="odd"),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    return model(nodes, {"w": weights(8, 16), "v": weights(16, 4)}, own=1)


def layers(activation: str = "Relu", **parameters: Any) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node(activation, ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "d"], ["y"]),
    ]
    given = {"w": weights(8, 16), "b": weights(16), "v": weights(16, 4), "d": weights(4)}
    return model(nodes, {**given, **parameters})


def said(made: onnx.ModelProto, spec: str, *, data: bool = False, shape: tuple[int, ...] = (64, 8)) -> str:
    given = {"x": weights(*shape, seed=5)} if data else None
    return cipm_ir.optimize(made, [spec], data=given, verify=False).report.steps[0].summary


# ---------------------------------------------------------------- opaque nodes
IDLE = [
    "canonicalize",
    "canonicalize-signs",
    "equalize",
    "cluster",
    "absorb-bias",
    "prune{ratio=0.5}",
    "fold{ratio=0.5}",
]


@pytest.mark.parametrize("spec", IDLE)
def test_an_opaque_node_is_named_where_nothing_else_can_be_done(spec: str) -> None:
    assert "Strange 'odd'" in said(opaque(), spec)


def test_rotate_says_why_nothing_is_rotated() -> None:
    assert "no residual stream admits a rotation" in said(opaque(), "rotate")
    assert "Strange 'odd'" in said(opaque(), "rotate{stream=false}")


@pytest.mark.parametrize("spec", ["prune{params=0.5}", "compress{params=0.5}", "fold{params=0.5}"])
def test_a_budget_out_of_reach_names_the_opaque_node(spec: str) -> None:
    with pytest.raises(cipm_ir.CipmError, match="Strange 'odd'"):
        said(opaque(), spec, data=True)


@pytest.mark.parametrize("spec", IDLE)
def test_nothing_is_blamed_where_nothing_is_opaque(spec: str) -> None:
    """Control: the note depends on the model."""
    assert "for want of a rule" not in said(layers(), spec)


# ---------------------------------------------------------------- single passes
def test_absorb_bias_names_what_stays() -> None:
    """The units also enter the output through a sum: their constants stay."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v", "d"], ["p"]),
        helper.make_node("ReduceMax", ["r"], ["m"], axes=[1]),
        helper.make_node("Add", ["p", "m"], ["y"]),
    ]
    made = model(nodes, {"w": weights(8, 16), "b": weights(16) + 9, "v": weights(16, 4), "d": weights(4)})
    summary = said(made, "absorb-bias{observed=true}", data=True)
    assert summary.startswith("no constant to move; left as they are: @") and "(" in summary


def test_equalize_names_dead_units_and_weights_that_are_no_numbers() -> None:
    dead = weights(8, 16)
    dead[:, :3] = 0
    assert "units of w keep their scale (it has rows or columns of zeros)" in said(layers(w=dead), "equalize")
    half = {
        n: a.astype(np.float16)
        for n, a in {"w": weights(8, 16), "b": weights(16), "v": weights(16, 4), "d": weights(4)}.items()
    }
    summary = said(layers("Relu", **half), "equalize")
    assert "no weight has a scale that is free" in summary and "float16 may round; exact=false scales it" in summary


def test_scales_behind_an_epsilon_are_named() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "g", "b", "mean", "variance"], ["n"]),
        helper.make_node("Relu", ["n"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"]),
    ]
    parameters = {"w": weights(6, 3, 1, 1), "g": weights(6), "b": weights(6), "v": weights(2, 6, 1, 1)}
    parameters |= {"mean": weights(6), "variance": np.abs(weights(6)) + 1}
    made = model(nodes, parameters, (1, 3, 5, 5))
    assert "since powers of two round behind an epsilon" in said(made, "canonicalize")
    assert "since powers of two round behind an epsilon" not in said(made, "canonicalize{exact=false}")


def test_rotate_names_spaces_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    made = model(nodes, {"w": weights(8, 16), "v": weights(16, 4)})
    assert "head rotated" in said(made, "rotate")
    assert "not asked for (heads=true)" in said(made, "rotate{heads=false}")
    monkeypatch.setattr(rotate_pass, "LARGEST", 15)
    assert "stay: more than 15 units" in said(made, "rotate")


def test_remove_dead_names_dead_units_that_stay() -> None:
    """A softmax runs over the layer: a unit that only zeros read counts in its sum."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Softmax", ["h"], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    v = weights(16, 4)
    v[:5] = 0
    summary = said(model(nodes, {"w": weights(8, 16), "v": v}), "remove-dead")
    assert "nothing dead that could go" in summary
    assert "5 of 16 units are dead, but a normalization, softmax or mean runs over them" in summary
    assert said(layers(), "remove-dead") == "nothing dead"


def test_remove_dead_names_units_of_uneven_groups() -> None:
    """One unit of the first group is dead, none of the second: groups stay equally wide."""
    w = weights(8, 3, 1, 1)
    w[0] = 0
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "g"], ["k"], group=2),
        helper.make_node("Relu", ["k"], ["q"]),
        helper.make_node("Conv", ["q", "v"], ["y"]),
    ]
    parameters = {"w": w, "g": weights(6, 4, 1, 1), "v": weights(2, 6, 1, 1)}
    summary = said(model(nodes, parameters, (1, 3, 5, 5)), "remove-dead")
    assert "1 of 4 units are dead, but rows would become uneven" in summary


def test_compensation_names_what_it_cannot_refit() -> None:
    """A convolution whose padding follows its input reads units that go: its weights stay, and the summary says so."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "g"], ["k"], group=2, auto_pad="SAME_UPPER", name="grouped"),
        helper.make_node("Relu", ["k"], ["q"]),
        helper.make_node("Conv", ["q", "v"], ["y"]),
    ]
    parameters = {"w": weights(8, 3, 1, 1), "g": weights(6, 4, 1, 1), "v": weights(2, 6, 1, 1)}
    made = model(nodes, parameters, ("N", 3, 5, 5))
    summary = said(made, "prune{ratio=0.3, compensate=true}", data=True, shape=(32, 3, 5, 5))
    assert "Conv 'grouped' loses units and is not refitted: its weight is computed, or its padding follows" in summary


def test_compensation_names_a_weight_that_is_used_twice() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["a"], name="first"),
        helper.make_node("MatMul", ["h", "v"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    made = model(nodes, {"w": weights(8, 16), "v": weights(16, 4)})
    summary = said(made, "prune{ratio=0.5, compensate=true}", data=True)
    assert "MatMul 'first' loses units and is not refitted: v is used in several places" in summary
    assert "nothing was compensated" in summary


def test_recover_names_says_why_a_weight_keeps_its_name() -> None:
    nodes = [helper.make_node("MatMul", ["x", "val_3"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    summary = said(model(nodes, {"val_3": weights(8, 16)}), "recover-names")
    assert "1 kept theirs ('val_3': node" in summary and "has no note" in summary


def test_fold_names_spaces_without_a_smaller_width() -> None:
    with pytest.raises(cipm_ir.CipmError, match="min_keep and round_to leave no smaller width"):
        said(layers(), "fold{params=0.5, round_to=64}")


# ---------------------------------------------------------------- all of them
EXAMPLES: dict[str, Callable[[], str]] = {
    "prune": lambda: said(layers(), "prune{ratio=0.0}"),
    "fold": lambda: said(layers(), "fold"),
    "canonicalize": lambda: said(opaque(), "canonicalize"),
    "canonicalize-signs": lambda: said(layers(), "canonicalize-signs"),
    "equalize": lambda: said(opaque(), "equalize"),
    "cluster": lambda: said(opaque(), "cluster"),
    "rotate": lambda: said(layers(), "rotate"),
    "absorb-bias": lambda: said(layers("Tanh"), "absorb-bias"),
    "remove-dead": lambda: said(layers(), "remove-dead"),
    "recover-names": lambda: said(layers(), "recover-names"),
    "expose": lambda: said(layers(), "expose"),
    "clean-up": lambda: said(layers(), "clean-up"),
    "fold-affine": lambda: said(layers(), "fold-affine"),
    "fold-batch-norm": lambda: said(layers(), "fold-batch-norm"),
    "compress": lambda: said(layers(), "compress{macs=1.0}", data=True),
}


def test_no_pass_is_left_out() -> None:
    """A new pass gets an example; those that other tests register are not the product's."""
    assert set(EXAMPLES) == {name for name in names() if lookup(name).__module__.startswith("cipm_ir.")}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_pass_that_does_nothing_says_something(name: str) -> None:
    assert EXAMPLES[name]().strip()


def test_compensation_names_a_weight_behind_a_copy() -> None:
    """It is no parameter of the product itself."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Identity", ["v"], ["copy"]),
        helper.make_node("MatMul", ["r", "copy"], ["y"], name="last"),
    ]
    made = model(nodes, {"w": weights(8, 16), "v": weights(16, 4)})
    summary = said(made, "prune{ratio=0.5, compensate=true}", data=True)
    assert "MatMul 'last' loses units and is not refitted" in summary and "nothing was compensated" in summary
