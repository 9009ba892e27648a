"""The canonical form: equal bit by bit on a whole orbit, sound, undoable, and the fingerprint that rests on it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from tests import zoo

from cipm_ir.algebra import Element
from cipm_ir.errors import SymmetryError
from cipm_ir.passes.exact.canonicalize.canonicalize import Canonicalize, canonical_elements
from cipm_ir.passes.exact.canonicalize.fingerprint import fingerprint_program
from cipm_ir.passes.exact.canonicalize.gauge import Gauge
from cipm_ir.passes.exact.canonicalize.order import Ordering
from cipm_ir.passes.framework.base import Context
from cipm_ir.passes.framework.witness import undo
from cipm_ir.symmetry.program import Program

Arrays = list[np.ndarray[Any, Any]]
SMALL = zoo.names("synthetic")
TRAINED = ["resnet20", "bert", "bert_shared_bias", "vit", "llama_gqa", "mobilenetv2_revived", "resnet_bottleneck"]
LARGER = ["squeezenet", "inception_v2", "shufflenet", "densenet121", "squeezenet_constant", "minilm"]
# Half precision has no room for 2^±9 above its subnormals: the action itself rounds there.
ROUNDING = [name for name in SMALL if "float16" in zoo.entry(name).tags]


def program_of(model: onnx.ModelProto) -> Program:
    return Program.of(ir.from_proto(model))


def load(name: str) -> Program:
    return program_of(zoo.build_or_skip(name))


def reread(program: Program) -> Program:
    """The same model as read from a file: new tensors, new analysis."""
    return program_of(onnx.ModelProto.FromString(ir.to_proto(program.emit()).SerializeToString()))


def canonical(program: Program, *, exact: bool = True) -> Program:
    return Canonicalize(exact=exact).run(program, Context()).program


def constants(program: Program) -> Arrays:
    """Every parameter where it is used, so that it does not matter which uses share a tensor."""
    found = []
    for node in program.model.graph:
        for value in node.inputs if node.op_type not in ("Constant", "ConstantOfShape") else ():
            producer = None if value is None else value.producer()
            if value is not None and value.const_value is not None:
                found.append(np.asarray(value.const_value.numpy()))
            elif producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
                found.append(np.asarray(producer.attributes["value"].as_tensor().numpy()))
    return found


def same_bits(a: Arrays, b: Arrays) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


def moved(program: Program, seed: int, *, power_of_two: bool = True, scales: bool = True) -> Program:
    """A random element on all spaces at once."""
    rng = np.random.default_rng(seed)
    elements = {space: space.random(rng, power_of_two=power_of_two) for space in program.spaces}
    if not scales:
        elements = {s: Element(e.perm, np.ones_like(e.scale), e.sign) for s, e in elements.items()}
    return program.act(elements)


def check_orbit(program: Program, *, seeds: int = 3, scales: bool = True) -> None:
    """Fails unless every model of the orbit that is tried has the same canonical form, and can be taken back."""
    want = constants(canonical(program))
    for seed in range(seeds):
        other = moved(program, seed, scales=scales)
        result = Canonicalize().run(other, Context())
        assert same_bits(constants(result.program), want), f"seed {seed} has another canonical form"
        assert same_bits(constants(undo(result.program, result.elements)), constants(other)), "undo does not restore"


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ROUNDING])
def test_an_orbit_has_one_form_bit_for_bit(name: str) -> None:
    check_orbit(load(name))


@pytest.mark.parametrize("name", TRAINED)
def test_trained_and_exported_models(name: str) -> None:
    program = load(name)
    check_orbit(program, seeds=2)
    assert fingerprint_program(reread(moved(program, 5))) == fingerprint_program(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER)
def test_larger_models(name: str) -> None:
    program = load(name)
    check_orbit(program, seeds=2)
    assert fingerprint_program(moved(program, 5)) == fingerprint_program(program)


@pytest.mark.parametrize("name", ROUNDING)
def test_half_precision_is_canonical_up_to_order_and_sign_and_loses_no_bit(name: str) -> None:
    program = load(name)
    check_orbit(program, scales=False)
    result = Canonicalize().run(program, Context())
    assert same_bits(constants(undo(result.program, result.elements)), constants(program))


@pytest.mark.parametrize("name", [*(n for n in SMALL if n not in ROUNDING), "resnet20", "vit", "llama_gqa"])
def test_any_scale_to_one_part_in_a_million(name: str) -> None:
    program = load(name)
    want = constants(canonical(program, exact=False))
    for seed in range(2):
        got = constants(canonical(moved(program, seed, power_of_two=False), exact=False))
        for a, b in zip(want, got, strict=True):
            if a.dtype.kind == "f" and a.size:
                assert np.abs(a - b).max() <= 1e-6 * max(np.abs(a).max(), 1e-30)
            else:
                assert np.array_equal(a, b)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", [*zoo.names("synthetic"), "resnet20", "vit"])
def test_the_function_is_kept(name: str, exact: bool) -> None:
    model = zoo.build_or_skip(name)
    feeds, reference = zoo.feeds(name, model), zoo.entry(name).reference
    after = ir.to_proto(canonical(program_of(model), exact=exact).emit())
    wide = 5e-3 if name in ROUNDING else 1e-5
    for a, b in zip(
        zoo.run(model, feeds, reference=reference), zoo.run(after, feeds, reference=reference), strict=True
    ):
        if a.dtype.kind == "f":
            assert np.abs(a - b).max(initial=0.0) <= wide * max(np.abs(a).max(initial=0.0), 1e-6)
        else:
            assert np.array_equal(a, b)


@pytest.mark.parametrize("name", ["mlp_relu", "attention_gqa", "grouped_conv", "lstm", "depthwise", "vit"])
def test_a_canonical_model_stays(name: str) -> None:
    result = Canonicalize().run(canonical(load(name)), Context())
    assert not result.changed and not result.witness


# --- negative controls ----------------------------------------------------------------------------


def skip_gauge(self: Gauge) -> None:
    self.scaled[:], self.signed[:] = True, True


def skip_ordering(self: Ordering) -> np.ndarray[Any, Any]:
    return np.arange(self.members.count)


@pytest.mark.parametrize(("owner", "method", "stub"), [(Gauge, "fix", skip_gauge), (Ordering, "run", skip_ordering)])
@pytest.mark.parametrize("name", ["mlp_relu", "mlp_identity", "attention_separate"])
def test_the_check_notices_a_missing_step(
    name: str, owner: type, method: str, stub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load(name)
    monkeypatch.setattr(owner, method, stub)
    with pytest.raises(AssertionError, match="another canonical form"):
        check_orbit(program)


def test_witness_of_another_model_is_refused() -> None:
    with pytest.raises(SymmetryError, match="'nowhere'"):
        undo(load("mlp_relu"), {"nowhere": Element.identity(1)})


# --- fingerprint ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_relu", "mlp_tanh", "attention_rope_table", "grouped_conv", "qlinear_conv_net"])
def test_fingerprint_agrees_on_an_orbit_and_after_reading_again(name: str) -> None:
    program = load(name)
    want = fingerprint_program(program)
    assert {fingerprint_program(reread(moved(program, seed))) for seed in range(3)} == {want}


@pytest.mark.parametrize("name", ["mlp_relu", "attention_separate", "conv_pool", "tied_embedding"])
def test_fingerprint_sees_one_unit_in_the_last_place(name: str) -> None:
    model = zoo.build(name)
    want = fingerprint_program(program_of(model))
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        array = onnx.numpy_helper.to_array(tensor).copy()
        before = tensor.SerializeToString()
        array.flat[-1] = np.nextafter(array.flat[-1], np.float32(np.inf))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        assert fingerprint_program(program_of(model)) != want, tensor.name
        tensor.ParseFromString(before)
    assert fingerprint_program(program_of(model)) == want


def test_fingerprint_sees_structure_but_no_names() -> None:
    model = zoo.build("mlp_leakyrelu")
    want = fingerprint_program(program_of(model))
    renamed = onnx.ModelProto.FromString(model.SerializeToString())
    names = {t.name: f"renamed_{k}" for k, t in enumerate(renamed.graph.initializer)}
    names |= {out: f"value_{k}" for k, node in enumerate(renamed.graph.node[:-1]) for out in node.output}
    for node in renamed.graph.node:
        node.name, node.doc_string = f"{node.name}_x", "said"
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    for tensor in renamed.graph.initializer:
        tensor.name = names[tensor.name]
    del renamed.graph.value_info[:]
    renamed.producer_name = "someone else"
    assert fingerprint_program(program_of(renamed)) == want
    node = next(n for n in renamed.graph.node if n.op_type == "LeakyRelu")
    found = {want}
    for slope in (0.25, 0.25 + 2.0**-20):
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("alpha", slope))
        found.add(fingerprint_program(program_of(renamed)))
    node.op_type = "Elu"
    found.add(fingerprint_program(program_of(renamed)))
    assert len(found) == 4


# --- hard cases -----------------------------------------------------------------------------------


def mlp(
    weights: Arrays, activation: str = "Relu", biases: Arrays | None = None, kind: int = TensorProto.FLOAT
) -> Program:
    """x @ w0 (+ b0), activation, @ w1 (+ b1), ..."""
    nodes, tensors, last = [], [], "x"
    for k, w in enumerate(weights):
        tensors.append(ir.to_proto(ir.tensor(w, name=f"w{k}")))
        nodes.append(helper.make_node("MatMul", [last, f"w{k}"], [f"h{k}"]))
        last = f"h{k}"
        if biases is not None:
            tensors.append(ir.to_proto(ir.tensor(biases[k], name=f"b{k}")))
            nodes.append(helper.make_node("Add", [last, f"b{k}"], [f"s{k}"]))
            last = f"s{k}"
        if k + 1 < len(weights):
            nodes.append(helper.make_node(activation, [last], [f"a{k}"]))
            last = f"a{k}"
    inputs = [helper.make_tensor_value_info("x", kind, ["N", len(weights[0])])]
    outputs = [helper.make_tensor_value_info(last, kind, ["N", weights[-1].shape[1]])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return program_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def normal(rng: np.random.Generator, *sizes: int) -> Arrays:
    return [rng.standard_normal((a, b)).astype(np.float32) for a, b in pairwise(sizes)]


def test_units_without_weights_and_equal_units(rng: np.random.Generator) -> None:
    weights = normal(rng, 5, 8, 7, 3)
    weights[0][:, 2] = 0.0  # constant
    weights[0][:, 3], weights[1][3] = 0.0, 0.0  # dead
    weights[0][:, 6], weights[1][6] = weights[0][:, 1], weights[1][1]  # twins
    weights[0][:, 5] = weights[0][:, 4]  # alike only in their producer
    for activation in ("Relu", "Tanh", "Gelu"):
        check_orbit(mlp(weights, activation))


def test_infinite_entries(rng: np.random.Generator) -> None:
    weights = normal(rng, 5, 8, 3)
    weights[0][2, 3], weights[0][1, 4], weights[1][3, 1] = np.inf, -np.inf, np.inf
    weights[0][:, 7] = np.inf
    check_orbit(mlp(weights))


def test_rows_that_do_not_tell_their_sign(rng: np.random.Generator) -> None:
    weights = normal(rng, 4, 6, 3)
    weights[0][2:] = -weights[0][:2]  # largest and smallest entry of each column have one magnitude
    check_orbit(mlp(weights, "Tanh"))
    zero = [np.zeros((4, 6), np.float32), np.zeros((6, 3), np.float32)]
    zero[0][1] = -0.0
    check_orbit(mlp(zero, "Tanh"))


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "Gelu", "Identity"])
def test_ties_that_are_coupled_between_spaces(activation: str) -> None:
    """Every unit of two layers looks alike; their orders must be chosen together."""
    link = np.eye(9, dtype=np.float32)
    check_orbit(mlp([np.ones((2, 9), np.float32), link, np.ones((9, 2), np.float32)], activation))


def test_more_ties_than_are_chosen_one_by_one() -> None:
    count = 40
    weights = [np.repeat(np.arange(1, count + 1, dtype=np.float32), 2)[None], np.eye(2 * count, dtype=np.float32)]
    check_orbit(mlp([*weights, np.ones((2 * count, 1), np.float32)], "Gelu"), seeds=2)


def test_bfloat16(rng: np.random.Generator) -> None:
    weights = [w.astype(ml_dtypes.bfloat16) for w in normal(rng, 5, 8, 7, 3)]
    program = mlp(weights, "Relu", kind=TensorProto.BFLOAT16)
    assert any(space.group.scales for space in program.spaces)
    check_orbit(program)


def test_scales_that_a_weight_cannot_take_are_given_up(rng: np.random.Generator) -> None:
    weights = normal(rng, 5, 8, 3)
    weights[0][:, 2] *= np.float32(2.0**-70)
    weights[1][2] = np.float32(3e-38)
    program = mlp(weights)
    result = Canonicalize().run(program, Context())
    assert all(np.isfinite(array).all() for array in constants(result.program))
    assert same_bits(constants(undo(result.program, result.elements)), constants(program))


def test_rows_have_unit_gauge(rng: np.random.Generator) -> None:
    program = mlp(normal(rng, 5, 8, 3))
    size = np.abs(constants(canonical(program))[0]).max(0)
    assert ((size >= 0.5) & (size < 1)).all()
    assert np.allclose(np.linalg.norm(constants(canonical(program, exact=False))[0], axis=0), 1, atol=1e-6)


def test_large_spaces_are_ordered_in_spite_of_noise(rng: np.random.Generator) -> None:
    """Hundreds of units, some of which nearly agree in what is compared first."""
    program = mlp(normal(rng, 16, 700, 500, 4), "Relu")
    want = constants(canonical(program, exact=False))
    got = constants(canonical(moved(program, 1, power_of_two=False), exact=False))
    assert max(np.abs(a - b).max() / np.abs(a).max() for a, b in zip(want, got, strict=True)) <= 1e-6


def test_elements_belong_to_the_groups() -> None:
    program = load("attention_gqa")
    for exact in (True, False):
        for space, element in canonical_elements(program, exact=exact).items():
            assert element in space.group
            assert not exact or element.is_power_of_two
