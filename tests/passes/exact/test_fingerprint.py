"""Models with equal fingerprints compute the same: differences planted in every tensor, attribute and in the structure.

A copy with another fingerprint needs no run; one with an equal fingerprint is run beside the original.
Uniform axes, overridable initializers, functions and operators that change with the opset are cases of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests import zoo
from tests.oracles.fingerprint_plants import KINDS, planted, tensors, with_attributes, with_structure

from cipm_ir.errors import CipmError
from cipm_ir.passes.exact.canonicalize import fingerprint
from cipm_ir.passes.exact.canonicalize.fingerprint import fingerprint_program
from cipm_ir.symmetry.program import Program

Copies = Iterator[tuple[str, onnx.ModelProto]]
SMALL = zoo.names(without=("large", "light", "constant", "torch", "data"))
ROUNDING = [name for name in SMALL if "float16" in zoo.entry(name).tags]
"""In half precision, powers of two leave the normal range."""
SAME = 1e-5


def hashed(model: onnx.ModelProto) -> str:
    """Fingerprint, or why the model is refused."""
    try:
        return fingerprint_program(Program.of(ir.from_proto(model)))
    except (CipmError, ValueError, onnx.shape_inference.InferenceError) as reason:
        return f"refused: {reason}"


def largest_difference(name: str, a: onnx.ModelProto, b: onnx.ModelProto) -> float:
    """Of two models of the zoo on a few runs, relative to the largest output; infinite where one fails."""
    worst, reference = 0.0, zoo.entry(name).reference
    for seed in range(3):
        feeds = zoo.feeds(name, a, seed=seed)
        try:
            pairs = zip(zoo.run(a, feeds, reference=reference), zoo.run(b, feeds, reference=reference), strict=True)
            for x, y in pairs:
                if x.shape != y.shape or x.dtype != y.dtype:
                    return float("inf")
                wide, other = x.astype(np.float64), y.astype(np.float64)
                worst = max(
                    worst, float(np.abs(wide - other).max() / max(np.abs(wide).max(), 1e-30)) if x.size else 0.0
                )
        except Exception:  # the runtimes raise classes of their own
            return float("inf")
    return worst


def collisions(name: str, copies: Callable[[onnx.ModelProto], Copies]) -> list[str]:
    """Copies of a model of the zoo that have its fingerprint and compute something else."""
    model = zoo.build_or_skip(name)
    want = hashed(model)
    found = []
    for label, copy in copies(model):
        if hashed(copy) == want and (error := largest_difference(name, model, copy)) > SAME:
            found.append(f"{name}, {label}: equal fingerprints, outputs differ by {error:.1e}")
    return found


@pytest.mark.sample
@pytest.mark.parametrize("name", SMALL[::2])
def test_a_difference_in_a_tensor_shows(name: str) -> None:
    assert collisions(name, planted) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_difference_in_a_tensor_shows(name: str) -> None:
    assert collisions(name, lambda model: planted(model, KINDS)) == []


@pytest.mark.parametrize("name", SMALL[::4])
def test_a_difference_in_an_attribute_shows(name: str) -> None:
    assert collisions(name, with_attributes) == []


@pytest.mark.parametrize("name", SMALL[1::4])
def test_a_difference_in_the_structure_shows(name: str) -> None:
    assert collisions(name, with_structure) == []


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ROUNDING])
def test_another_gauge_has_the_same_fingerprint(name: str) -> None:
    model = zoo.build_or_skip(name)
    program = Program.of(ir.from_proto(model))
    rng = np.random.default_rng(0)
    moved = program.act({space: space.random(rng, power_of_two=True) for space in program.spaces})
    assert hashed(ir.to_proto(moved.emit())) == hashed(model)


def test_a_fingerprint_that_leaves_out_a_tensor_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("mlp_relu")
    blind = numpy_helper.to_array(tensors(model)[0]).shape
    content = fingerprint._content
    monkeypatch.setattr(
        fingerprint, "_content", lambda dtype, shape, array: b"" if shape == blind else content(dtype, shape, array)
    )
    assert collisions("mlp_relu", lambda m: planted(m, ("entry",)))


def test_a_fingerprint_that_leaves_out_attributes_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint._Hasher, "_attribute", lambda self, attribute: [])
    assert collisions("layer_norm", with_attributes)


# ---------------------------------------------------------------- cases of their own
def build(
    nodes: list[onnx.NodeProto], given: dict[str, Any], shape: tuple[int, ...], *, opset: int = 20, ir_version: int = 9
) -> onnx.ModelProto:
    """A model from "x" of a shape to "y"."""
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), k) for k, a in given.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def weights(*shapes: tuple[int, ...]) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


node = helper.make_node
UNIFORM: dict[str, tuple[list[onnx.NodeProto], dict[str, Any]]] = {
    "CumSum": ([node("CumSum", ["e", "axis"], ["c"])], {"axis": np.array(1)}),
    "CumSum_exclusive": ([node("CumSum", ["e", "axis"], ["c"], exclusive=1, reverse=1)], {"axis": np.array(1)}),
    "Hardmax": ([node("Hardmax", ["e"], ["c"], axis=1)], {}),
    "LRN": (
        [
            node("Unsqueeze", ["e", "two"], ["u"]),
            node("LRN", ["u"], ["l"], size=3, alpha=1.0),
            node("Squeeze", ["l", "two"], ["c"]),
        ],
        {"two": np.array([2])},
    ),
    "BatchNormalization": (
        [node("BatchNormalization", ["e", "gamma", "beta", "mean", "var"], ["c"])],
        dict(zip(("gamma", "beta", "mean", "var"), np.abs(weights((6,), (6,), (6,), (6,))) + 0.1, strict=True)),
    ),
    "Trilu": ([node("Trilu", ["e"], ["c"])], {}),
    "Pad": ([node("Slice", ["e", "one", "six", "one"], ["s"]), node("Pad", ["s", "pads", "value"], ["c"])],
            {"one": np.array([1]), "six": np.array([6]), "pads": np.array([0, 1, 0, 0]), "value": np.float32(2.0)}),
    "Add": ([node("Add", ["e", "bias"], ["c"])], {"bias": weights((6,))[0]}),
    "Gemm": ([node("Gemm", ["e", "square", "bias"], ["c"])],
             {"square": np.ones((6, 6), np.float32), "bias": weights((6,))[0]}),
    "RandomNormalLike": ([node("RandomNormalLike", ["e"], ["c"], seed=1.0)], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNIFORM)
def test_order_behind_a_uniform_axis_shows(name: str) -> None:
    nodes, given = UNIFORM[name]
    w, v = weights((6, 5), (5, 2))
    tail = [node("MatMul", ["c", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])]

    def made(matrix: np.ndarray[Any, Any]) -> onnx.ModelProto:
        parts = {"shape": np.array([4, 6]), "w": matrix, "v": v, **given}
        return build([node("Expand", ["x", "shape"], ["e"]), *nodes, *tail], parts, (4, 1))

    assert hashed(made(w)) != hashed(made(w[::-1].copy()))
    assert hashed(made(w)) == hashed(made(w))


def test_order_behind_an_axis_that_is_uniform_does_not_count() -> None:
    w, v = weights((6, 5), (5, 2))
    nodes = [
        node("Expand", ["x", "shape"], ["e"]), node("Softmax", ["e"], ["c"], axis=1), node("MatMul", ["c", "w"], ["h"]),
        node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"]),
    ]  # fmt: skip
    a, b = (build(nodes, {"shape": np.array([4, 6]), "w": m, "v": v}, (4, 1)) for m in (w, w[::-1].copy()))
    assert hashed(a) == hashed(b)


def layer(ir_version: int = 9, *, overridable: bool = False, times: float = 1.0) -> onnx.ModelProto:
    w, v = weights((4, 6), (6, 2))
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("MatMul", ["r", "v"], ["y"])]
    model = build(nodes, {"w": w * np.float32(times), "v": v}, (3, 4), ir_version=ir_version)
    if overridable or ir_version < 4:
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 6]))
    if ir_version < 4:
        model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [6, 2]))
    return model


def test_an_initializer_that_can_be_overridden_counts_with_its_default() -> None:
    hashes = [hashed(layer()), hashed(layer(overridable=True)), hashed(layer(overridable=True, times=1.5))]
    assert len(set(hashes)) == 3
    assert not any(h.startswith("refused") for h in hashes)


def test_before_ir_version_4_an_initializer_is_always_listed_as_an_input() -> None:
    assert hashed(layer(3)) == hashed(layer())


def test_semantics_that_change_with_the_opset_count() -> None:
    (w,) = weights((12, 6))
    nodes = [node("Softmax", ["x"], ["s"]), node("Reshape", ["s", "t"], ["f"]), node("MatMul", ["f", "w"], ["y"])]
    models = [build(nodes, {"t": np.array([2, 12]), "w": w}, (2, 3, 4), opset=opset) for opset in (12, 13)]
    assert hashed(models[0]) != hashed(models[1])


def test_names_of_inputs_and_outputs_do_not_count() -> None:
    model = layer()
    renamed = onnx.ModelProto.FromString(model.SerializeToString())
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "image"
    renamed.graph.output[0].name = renamed.graph.node[-1].output[0] = "score"
    assert hashed(renamed) == hashed(model)


def test_two_inputs_of_one_type_do_not_change_places_unnoticed() -> None:
    model = build([node("Sub", ["x", "z"], ["y"])], {}, (3, 4))
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 4]))
    other = onnx.ModelProto.FromString(model.SerializeToString())
    other.graph.node[0].input[:] = ["z", "x"]
    assert hashed(model) != hashed(other)


def test_batch_normalization_that_trains_differs_by_its_outputs_alone() -> None:
    given = dict(zip(("gamma", "beta", "mean", "var"), np.abs(weights((3,), (3,), (3,), (3,))) + 0.1, strict=True))
    names = ["x", "gamma", "beta", "mean", "var"]
    outputs = (["y", "", "", "", ""], ["y", "m", "v", "sm", "sv"])
    hashes = {hashed(build([node("BatchNormalization", names, out)], given, (2, 3, 4, 4), opset=9)) for out in outputs}
    assert len(hashes) == 2


def with_function(slope: float, weight: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """A function with an attribute, a constant of its own, and a weight."""
    body = [
        node("Constant", [], ["c"], value=numpy_helper.from_array(weight, "c")),
        node("MatMul", ["a", "c"], ["m"]),
        node("LeakyRelu", ["m"], ["b"], alpha=slope),
    ]
    function = helper.make_function("own", "Block", ["a"], ["b"], body, [helper.make_opsetid("", 20)])
    model = build([node("Block", ["x"], ["h"], domain="own"), node("MatMul", ["h", "v"], ["y"])],
                  {"v": weights((6, 2))[0]}, (3, 4))  # fmt: skip
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def test_bodies_of_functions_count() -> None:
    (w,) = weights((4, 6))
    models = [with_function(0.1, w), with_function(0.2, w), with_function(0.1, w * np.float32(1.5))]
    assert len({hashed(model) for model in models}) == 3


def test_bodies_of_branches_count() -> None:
    def made(then: str, bias: float) -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        branches = {}
        for name, op in (("then_branch", then), ("else_branch", "Neg")):
            inner = [node(op, ["x"], [f"{name}_a"]), node("Add", [f"{name}_a", f"{name}_b"], [f"{name}_y"])]
            own = numpy_helper.from_array(np.full(4, bias, np.float32), f"{name}_b")
            out = info(f"{name}_y", TensorProto.FLOAT, [3, 4])
            branches[name] = helper.make_graph(inner, name, [], [out], [own])
        model = build([node("If", ["flag"], ["y"], **branches)], {}, (3, 4))
        model.graph.input.append(info("flag", TensorProto.BOOL, []))
        return model

    assert len({hashed(made(*case)) for case in (("Relu", 0.5), ("Tanh", 0.5), ("Relu", 0.25))}) == 3


# ---------------------------------------------------------------- torch
TORCH = ["lstm_tagger", "resnet20_random", "group_norm", "attention_rotary", "fail_flatten"]


@pytest.mark.parametrize("name", TORCH)
def test_differences_in_torch_modules_show(name: str) -> None:
    torch = pytest.importorskip("torch")
    from tests.torch.torch_zoo import case, output_tensors

    import cipm_ir

    one = case(name)
    args, kwargs = one.inputs()

    def result(module: Any) -> tuple[str, list[Any]]:
        with torch.no_grad():
            outputs = [t.clone() for t in output_tensors(module(*args, **kwargs))]
        return cipm_ir.fingerprint(module, example_inputs=args, example_kwargs=kwargs), outputs

    want, before = result(one.build())
    assert result(one.build())[0] == want
    names = [k for k, t in one.build().state_dict().items() if t.is_floating_point() and t.numel() > 1]
    for index, key in list(enumerate(names))[:: max(1, len(names) // 4)]:
        module = one.build()
        tensor = module.state_dict()[key]
        with torch.no_grad():
            if index % 2 and tensor.shape[0] > 1:
                tensor.copy_(tensor.roll(1, 0))
            else:
                tensor.view(-1)[0] += 0.5
        found, after = result(module)
        same = all(torch.allclose(a, b, atol=1e-5, rtol=1e-5) for a, b in zip(before, after, strict=True))
        assert found != want or same, key
