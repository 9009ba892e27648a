"""The primitives: act composes and inverts exactly, absorb merges exactly or refuses, refit sets values."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tests import zoo
from tests.symmetry.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.algebra import Element
from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]
MODELS = (
    "mlp_tanh",
    "gated_mlp",
    "residual_blocks",
    "grouped_conv",
    "depthwise",
    "batch_norm_relu",
    "attention_rope_table",
    "concat_relu",
    "lstm",
    "shared_zero_bias",
    "siamese",
    "pixel_shuffle_dcr",
    "attention_qkv_major",
)


def tensors(program: Program) -> dict[str, bytes]:
    return {t.name: numpy_helper.to_array(t).tobytes() for t in ir.to_proto(program.emit()).graph.initializer}


def exact_elements(program: Program, seed: int) -> dict[Space, Element]:
    rng = np.random.default_rng(seed)
    return {space: space.random(rng, power_of_two=True) for space in program.spaces}


# ---------------------------------------------------------------- act
@pytest.mark.parametrize("name", MODELS)
def test_act_composes_space_by_space(name: str) -> None:
    """act(g) then act(h) is act(h @ g), bit for bit where scales are powers of two."""
    program = program_of(zoo.build(name))
    first, second = exact_elements(program, 1), exact_elements(program, 2)
    for space in program.spaces:
        g, h = first[space], second[space]
        once = program.act({space: g})
        twin = once.space(space.name)
        assert (twin.size, twin.kind, twin.group) == (space.size, space.kind, space.group)
        assert values(once.act({twin: h})) == values(program.act({space: h @ g}))


def values(program: Program) -> Counter[bytes]:
    """Contents of all parameters, whatever their names: forks may be numbered differently."""
    return Counter(tensors(program).values())


@pytest.mark.parametrize("name", MODELS)
def test_the_inverse_restores_every_bit(name: str) -> None:
    model = zoo.build(name)
    program = program_of(model)
    before = tensors(program)
    for space, element in exact_elements(program, 3).items():
        moved = program.act({space: element})
        back = moved.act({moved.space(space.name): element.inverse()})
        assert set(tensors(back).values()) == set(before.values()), space.name


@pytest.mark.parametrize("name", [*MODELS, "llama_gqa", "bert_shared_bias"])
def test_spaces_keep_their_names_and_groups(name: str) -> None:
    program = program_of(zoo.build_or_skip(name))
    moved = program.act(exact_elements(program, 4))
    again = program_of(ir.to_proto(moved.emit()))
    assert [(s.name, s.kind, s.size, str(s.group)) for s in again.spaces] == [
        (s.name, s.kind, s.size, str(s.group)) for s in program.spaces
    ]


def test_the_identity_changes_no_tensor() -> None:
    program = program_of(zoo.build("attention_separate"))
    assert tensors(program.act({s: s.identity() for s in program.spaces})) == tensors(program)


def test_elements_outside_the_group_are_refused() -> None:
    program, other = program_of(zoo.build("mlp_relu")), program_of(zoo.build("mlp_gelu"))
    space = program.spaces[0]
    flipped = Element.of(np.arange(8), np.ones(8), -np.ones(8, np.int8))
    with pytest.raises(SymmetryError, match=r"not in the group R>0 wr S\(8\) of space @w_1"):
        program.act({space: flipped})
    with pytest.raises(SymmetryError, match="element on 5 classes"):
        program.act({space: Element.identity(5)})
    scaled = Element.of(np.arange(8), 2 * np.ones(8))
    with pytest.raises(SymmetryError, match=r"not in the group S\(8\)"):
        other.act({other.spaces[0]: scaled})
    tanh = program_of(zoo.build("mlp_tanh")).spaces[0]
    assert (tanh.name, tanh.size) == (space.name, space.size)
    with pytest.raises(SymmetryError, match=r"not in the group R>0 wr S\(8\)"):
        program.act({tanh: flipped})
    with pytest.raises(SymmetryError, match="not one of this program's spaces"):
        program_of(zoo.build("attention_separate")).act({space: space.identity()})
    with pytest.raises(SymmetryError, match="no space named 'nothing'"):
        program.space("nothing")


# ---------------------------------------------------------------- nothing else moves
def digest(model: ir.Model) -> str:
    return hashlib.sha256(ir.to_proto(model).SerializeToString(deterministic=True)).hexdigest()


@pytest.mark.parametrize("name", ["shared_zero_bias", "attention_qkv_major", "local_function_twice", "grouped_conv"])
def test_programs_and_models_are_immutable(name: str) -> None:
    model = ir.from_proto(zoo.build(name))
    program = Program.of(model)
    before, inner = digest(model), digest(program.model)
    space = next((s for s in program.spaces if s.kind == "units" and s.parent is None), program.spaces[-1])
    program.act(exact_elements(program, 5))
    program.restrict({space: np.arange(space.size - 1)})
    weight = space.members[0].rpartition("[")[0]
    value = program.model.graph.initializers[weight].const_value
    assert value is not None
    program.refit({weight: 2 * value.numpy()})
    program.emit(annotate=True)
    assert digest(model) == before
    assert digest(program.model) == inner


def counting(model: ir.Model, reads: Counter[str]) -> None:
    """Wrap every large tensor so that reading it is counted."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.size <= 4096:
            continue

        old = [int(d) for d in tensor.shape]  # type: ignore[arg-type]

        def read(tensor: ir.TensorProtocol = tensor, name: str = name) -> ir.TensorProtocol:
            reads[name] += 1
            return tensor

        value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(old), name=name)


def test_edits_are_evaluated_once_when_written() -> None:
    net = Net("lazy")
    h, width = net.input("x", ["N", 128]), 128
    for size in (96, 80):
        h, width = net.relu(net.gemm(h, width, size)), size
    net.output(net.gemm(h, width, 70), ["N", 70])
    model = ir.from_proto(net.model())
    reads: Counter[str] = Counter()
    counting(model, reads)
    program = Program.of(model)
    moved = program.act(exact_elements(program, 6))
    moved = moved.act(exact_elements(moved, 7))
    smaller = moved.restrict({moved.spaces[0]: np.arange(0, 96, 2)})
    assert not reads, "nothing may be read before it is written"
    ir.to_proto(smaller.emit())
    assert len(reads) == 3 and set(reads.values()) == {1}


def test_functions_stay_functions_when_values_change() -> None:
    model = zoo.build("local_function_twice")
    program, inputs = program_of(model), zoo.feeds("local_function_twice", model)
    moved = ir.to_proto(program.act(exact_elements(program, 8)).emit())
    assert [f.name for f in moved.functions] == ["Dense"]
    assert [n.op_type for n in moved.graph.node] == [n.op_type for n in model.graph.node]
    assert largest_change(zoo.run(model, inputs), zoo.run(moved, inputs)) <= 1e-5
    onnx.checker.check_model(ir.to_proto(program.restrict({program.spaces[0]: [0, 1, 2]}).emit()), full_check=True)


# ---------------------------------------------------------------- absorb
def layered(kind: str, dtype: str = "float32") -> tuple[Net, dict[str, Array]]:
    """Two layers of ``kind`` with 6 hidden units; the arrays to be edited before they become initializers."""
    net = Net(f"absorb_{kind}", dtype=dtype)
    w = {"conv": (6, 3, 1, 1), "matmul": (5, 6)}.get(kind, (6, 5))
    v = {"conv": (2, 6, 2, 2), "matmul": (6, 3)}.get(kind, (3, 6))
    return net, {"w": net.normal(w, 1.0), "b": net.normal((6,), 1.0), "v": net.normal(v, 1.0)}


def finished(net: Net, kind: str, a: dict[str, Array]) -> onnx.ModelProto:
    names = {key: net.const(array, key) for key, array in a.items()}
    if kind == "conv":
        h = net.relu(net.op("Conv", net.image(), names["w"], names["b"], kernel_shape=[1, 1]))
        net.output(net.op("Conv", h, names["v"], kernel_shape=[2, 2]), ["N", 2, 5, 5])
        return net.model()
    x = net.input("x", ["N", 5])
    if kind == "matmul":
        h = net.relu(net.op("Add", net.op("MatMul", x, names["w"]), names["b"]))
        net.output(net.op("MatMul", h, names["v"]), ["N", 3])
    else:
        h = net.relu(net.op("Gemm", x, names["w"], names["b"], transB=1))
        net.output(net.op("Gemm", h, names["v"], *([net.bias(3)] if kind == "gemm_bias" else []), transB=1), ["N", 3])
    return net.model()


def inputs_of(model: onnx.ModelProto) -> dict[str, Array]:
    (value,) = model.graph.input
    shape = [d.dim_value or 4 for d in value.type.tensor_type.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    return {value.name: np.random.default_rng(0).standard_normal(shape).astype(dtype)}


def checked(program: Program) -> onnx.ModelProto:
    proto = ir.to_proto(program.emit())
    onnx.checker.check_model(proto, full_check=True)
    return proto


@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["gemm", "gemm_bias", "matmul", "conv"])
def test_duplicates_merge_exactly(kind: str, factor: float) -> None:
    """Unit 4 is ``factor`` times unit 1 (Relu is homogeneous), so it is absorbed without a change."""
    net, a = layered(kind)
    row = (slice(None), 4) if kind == "matmul" else (4,)
    a["w"][row] = factor * a["w"][(slice(None), 1) if kind == "matmul" else (1,)]
    a["b"][4] = factor * a["b"][1]
    model = finished(net, kind, a)
    program, inputs = program_of(model), inputs_of(model)
    keep = np.array([0, 1, 2, 3, 5])
    mixing = np.eye(6)[:, keep]
    mixing[4, 1] = factor
    merged = program.absorb(program.spaces[0], keep, mixing)
    assert merged.spaces[0].size == 5
    assert largest_change(zoo.run(model, inputs), zoo.run(checked(merged), inputs)) <= 1e-6
    wrong = program.absorb(program.spaces[0], keep, np.eye(6)[:, keep])
    assert largest_change(zoo.run(model, inputs), zoo.run(checked(wrong), inputs)) > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["gemm", "gemm_bias", "matmul", "conv"])
def test_a_constant_unit_moves_into_the_bias(kind: str, dtype: str) -> None:
    net, a = layered(kind, dtype)
    a["w"][(slice(None), 2) if kind == "matmul" else (2,)] = 0.0
    a["b"][2] = 0.75
    model = finished(net, kind, a)
    program, inputs = program_of(model), inputs_of(model)
    keep = np.array([0, 1, 3, 4, 5])
    shift = np.zeros(6)
    shift[2] = 0.75
    folded = checked(program.absorb(program.spaces[0], keep, np.eye(6)[:, keep], shift))
    reference = (kind, dtype) == ("conv", "float64")  # onnxruntime has no kernel
    before, after = (zoo.run(m, inputs, reference=reference) for m in (model, folded))
    assert largest_change(before, after) <= 1e-6


def test_absorb_refuses_what_is_not_linear() -> None:
    keep = np.arange(7)

    def refused(name: str, match: str, size: int = 8, shift: Array | None = None, mixing: Array | None = None) -> None:
        program = program_of(zoo.build(name))
        space = next(s for s in program.spaces if s.size == size)
        index = keep[: size - 1]
        with pytest.raises(SymmetryError, match=match):
            program.absorb(space, index, np.eye(size)[:, index] if mixing is None else mixing, shift)

    refused("layer_norm", "normalization, softmax or mean")
    refused("softmax_hidden", "normalization, softmax or mean")
    refused("mlp_relu", r"must be \(units, kept units\) = \(8, 7\)", mixing=np.eye(8))
    refused("mlp_relu", "not finite", mixing=np.full((8, 7), np.nan))
    refused("residual_blocks", "Conv .* pads with zeros", shift=np.ones(8))
    refused("spatial_pad", "Pad .* pads with zeros", shift=np.ones(8))
    refused("grouped_conv", "grouped", size=2)
    program = program_of(zoo.build("attention_separate"))
    heads = next(s for s in program.spaces if s.kind == "blocks")
    with pytest.raises(SymmetryError, match="drop blocks with restrict"):
        program.absorb(heads, [0], np.ones((heads.size, 1)))


# ---------------------------------------------------------------- refit
def test_refit_sets_values_only() -> None:
    model = zoo.build("mlp_relu")
    program = program_of(model)
    name = model.graph.initializer[0].name
    old = numpy_helper.to_array(model.graph.initializer[0])
    changed = program.refit({name: (2.0 * old).astype(np.float64)})
    new = {t.name: numpy_helper.to_array(t) for t in ir.to_proto(changed.emit()).graph.initializer}
    assert new[name].dtype == np.float32 and np.array_equal(new[name], 2 * old)
    assert [s.name for s in changed.spaces] == [s.name for s in program.spaces]
    with pytest.raises(SymmetryError, match="no parameter named 'absent'"):
        program.refit({"absent": old})
    with pytest.raises(SymmetryError, match=r"refit of 'w_1': shape \(5, 8\) is not \(8, 5\)"):
        program.refit({name: old.T})
