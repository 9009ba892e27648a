"""What a pass does once and what it does per layer: copies of the graph, analyses and sessions, counted, not timed."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import cipm_ir
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.analysis import Analysis

_WIDTH = 8


def stack(layers: int, *, doubles: int = 0) -> onnx.ModelProto:
    """Gemm and Relu in a row; the last ``doubles`` units of each hidden layer equal its first."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for k in range(layers):
        w = rng.normal(size=(_WIDTH, _WIDTH)).astype(np.float32) / np.float32(2)
        if doubles and k + 1 < layers:
            w[_WIDTH - doubles :] = w[0]
        weights.append(numpy_helper.from_array(w, f"w{k}"))
        weights.append(numpy_helper.from_array(np.full(_WIDTH, 0.1, np.float32), f"b{k}"))
        nodes.append(helper.make_node("Gemm", [x, f"w{k}", f"b{k}"], [f"y{k}"], transB=1))
        x = f"y{k}"
        if k + 1 < layers:
            nodes.append(helper.make_node("Relu", [x], [f"z{k}"]))
            x = f"z{k}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", _WIDTH]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def counts(monkeypatch: pytest.MonkeyPatch, layers: int, pass_: str) -> Counter[str]:
    """How often the whole model is copied and analysed, and how many sessions are opened, in one pass."""
    found: Counter[str] = Counter()
    clone, opened, analysed = ir.Model.clone, Runner.__init__, Analysis.of

    def cloned(self: ir.Model, deep_copy: bool = False) -> ir.Model:
        found["clones"] += 1
        return clone(self, deep_copy=deep_copy)

    def session(self: Runner, *args: object, **options: object) -> None:
        found["sessions"] += 1
        opened(self, *args, **options)  # type: ignore[arg-type]

    def analysis(model: ir.Model) -> Analysis:
        found["analyses"] += 1
        return analysed(model)

    data = {"x": np.random.default_rng(1).normal(size=(64, _WIDTH)).astype(np.float32)}
    model = stack(layers, doubles=2 if "fold" in pass_ else 0)
    with monkeypatch.context() as patched:
        patched.setattr(ir.Model, "clone", cloned)
        patched.setattr(Runner, "__init__", session)
        patched.setattr(Analysis, "of", analysis)
        result = cipm_ir.optimize(model, [pass_], data=data, verify=False)
    assert result.program.parameters < sum(np.prod(w.dims) for w in model.graph.initializer)
    return found


@pytest.mark.parametrize("pass_", ["fold", "compress{macs=0.5,rounds=0,steps=2}"])
def test_copies_and_analyses_do_not_grow_with_the_layers(monkeypatch: pytest.MonkeyPatch, pass_: str) -> None:
    few, many = (counts(monkeypatch, layers, pass_) for layers in (4, 12))
    assert few["clones"] > 0 and few["analyses"] > 0
    assert (many["clones"], many["analyses"]) == (few["clones"], few["analyses"])


@pytest.mark.parametrize("layers", [4, 12, 20])
def test_sessions_grow_linearly_with_the_layers(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """One per candidate, and two per product that is refitted: of the program as it is by then and of the dense one."""
    seen = counts(monkeypatch, layers, "compress{macs=0.5,rounds=0,steps=2,joint=false,plain=false}")["sessions"]
    assert 2 * layers < seen <= 4 * layers + 10


def test_the_counts_see_one_copy_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control: with a copy of the whole graph for each session, copies grow with the layers."""
    opened = Runner.__init__

    def copying(self: Runner, model: ir.Model, **options: object) -> None:
        opened(self, model.clone(), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "__init__", copying)
    few, many = (counts(monkeypatch, n, "compress{macs=0.5,rounds=0,steps=2}")["clones"] for n in (4, 12))
    assert many > few + 8
