"""The ONNX frontend and backend: what goes in comes out, lazily, and the source stays as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cipm_ir.backends.onnx.save import emit_proto, save_onnx
from cipm_ir.frontends.onnx.load import check_finite, check_shapes, load_onnx
from cipm_ir.frontends.onnx.mapped import MappedTensor
from cipm_ir.runtime.verification.verify import verify_models

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
FLOAT = TensorProto.FLOAT


def mlp(width: int = 300, *, batch: str | int = "N") -> onnx.ModelProto:
    """x @ w + b, with a weight large enough for external data."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((8, width)).astype(np.float32), "w")
    bias = numpy_helper.from_array(rng.standard_normal(width).astype(np.float32), "b")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="mm"),
        helper.make_node("Add", ["h", "b"], ["y"], name="add"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", FLOAT, [batch, 8])],
        [helper.make_tensor_value_info("y", FLOAT, [batch, width])],
        [weight, bias],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def rich() -> onnx.ModelProto:
    """A model with everything that a round trip could lose."""
    rng = np.random.default_rng(1)
    bits = {
        "i4": numpy_helper.from_array(np.arange(-4, 4).astype(ml_dtypes.int4), "i4"),
        "bf": numpy_helper.from_array(rng.standard_normal(5).astype(ml_dtypes.bfloat16), "bf"),
        "f8": numpy_helper.from_array(rng.standard_normal(5).astype(ml_dtypes.float8_e4m3fn), "f8"),
        "text": numpy_helper.from_array(np.array(["a", "ß"], dtype=object), "text"),
        "listed": helper.make_tensor("listed", FLOAT, [4], [1.0, 2.0, 3.0, 4.0]),
    }
    bits["listed"].doc_string = "kept as float_data"

    def branch(name: str, value: float) -> onnx.GraphProto:
        inner = helper.make_tensor(f"{name}_c", FLOAT, [1], [value])
        node = helper.make_node("Add", ["h", f"{name}_c"], [f"{name}_out"], name=f"{name}_add")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)], [inner])

    nodes = [
        helper.make_node("Twice", ["x"], ["t"], name="call", domain="local"),
        helper.make_node("Add", ["t", "listed"], ["h"], name="add", doc_string="adds"),
        helper.make_node(
            "If", ["flag"], ["i"], name="if", then_branch=branch("then", 1.0), else_branch=branch("else", 2.0)
        ),
        helper.make_node(
            "FancyOp", ["i", "i4", "bf", "f8", "text"], ["y"], name="fancy", domain="com.example", gain=2.5, tag="a"
        ),
    ]
    nodes[1].metadata_props.add(key="origin", value="layer.0")
    twice = helper.make_function(
        "local", "Twice", ["a"], ["o"], [helper.make_node("Add", ["a", "a"], ["o"])], [helper.make_opsetid("", 20)]
    )
    infos = [helper.make_tensor_value_info("h", FLOAT, ["N", 4]), helper.make_tensor_value_info("listed", FLOAT, [4])]
    infos[0].metadata_props.add(key="scale", value="1")
    graph = helper.make_graph(
        nodes,
        "rich",
        [
            helper.make_tensor_value_info("x", FLOAT, ["N", 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        list(bits.values()),
        doc_string="a graph",
        value_info=infos,
    )
    graph.metadata_props.add(key="graph", value="meta")
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1), helper.make_opsetid("com.example", 3)]
    model = helper.make_model(graph, functions=[twice], opset_imports=imports, ir_version=10, producer_name="test")
    model.metadata_props.add(key="author", value="me")
    model.doc_string, model.domain, model.model_version = "a model", "org.test", 7
    return model


def normal(proto: onnx.ModelProto) -> bytes:
    """The bytes of a model up to the order of unordered parts, and up to fields that are set to their default."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    for field in ("producer_name", "producer_version", "domain", "doc_string", "model_version"):
        if not getattr(copy, field):
            copy.ClearField(field)
    sort(copy.opset_import)
    sort(copy.metadata_props)
    _normal_graph(copy.graph)
    content: bytes = copy.SerializeToString(deterministic=True)
    return content


def _normal_graph(graph: onnx.GraphProto) -> None:
    sort(graph.value_info)
    sort(graph.metadata_props)
    if not graph.doc_string:
        graph.ClearField("doc_string")
    for node in graph.node:
        sort(node.attribute)
        sort(node.metadata_props)
        for field in ("doc_string", "name", "domain"):
            if not getattr(node, field):
                node.ClearField(field)
        for attribute in node.attribute:
            if not attribute.doc_string:
                attribute.ClearField("doc_string")
            if attribute.HasField("g"):
                _normal_graph(attribute.g)


def sort(field: object) -> None:
    items = sorted(field, key=lambda item: item.SerializeToString(deterministic=True))  # type: ignore[call-overload]
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def external(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "in.onnx"
    onnx.save(mlp(), path, save_as_external_data=True, location="in.data", size_threshold=0)
    yield path


def test_rich_round_trip_loses_nothing(tmp_path: Path) -> None:
    source = rich()
    onnx.save(source, tmp_path / "in.onnx")
    save_onnx(load_onnx(tmp_path / "in.onnx").model, tmp_path / "out.onnx")
    assert normal(onnx.load(tmp_path / "out.onnx")) == normal(source)
    assert normal(emit_proto(load_onnx(source).model)) == normal(source)


def test_normal_form_sees_a_lost_field() -> None:
    for change in ("metadata", "listed", "name"):
        damaged = rich()
        if change == "metadata":
            del damaged.graph.node[1].metadata_props[:]
        elif change == "listed":
            del damaged.graph.value_info[1]
        else:
            damaged.graph.node[0].name = "other"
        assert normal(damaged) != normal(rich())


def test_round_trip_of_a_given_ir_model_keeps_it() -> None:
    source = ir.from_proto(rich())
    before = [(value, value.const_value) for value in source.graph.initializers.values()]
    loaded = load_onnx(source)
    assert loaded.kind == "ir" and loaded.model is not source and not loaded.external
    assert loaded.model.graph.initializers["bf"].const_value is source.graph.initializers["bf"].const_value
    emitted = emit_proto(loaded.model)
    assert [(value, value.const_value) for value in source.graph.initializers.values()] == before
    assert {t.name: t for t in emitted.graph.initializer} == {t.name: t for t in rich().graph.initializer}


@pytest.mark.parametrize("path", sorted(LIGHT.glob("light_*.onnx")), ids=lambda path: path.stem)
def test_light_models_round_trip(path: Path, tmp_path: Path) -> None:
    loaded = load_onnx(path)
    assert loaded.model.ir_version == 3
    check_shapes(loaded.model)
    check_finite(loaded.model)
    save_onnx(loaded.model, tmp_path / "out.onnx")
    assert normal(onnx.load(tmp_path / "out.onnx")) == normal(onnx.load(path))


def test_exported_graphs_round_trip(data_dir: Path, tmp_path: Path) -> None:
    for path in sorted((data_dir / "graphs").glob("*.onnx")):
        loaded = load_onnx(path)
        check_shapes(loaded.model)
        save_onnx(loaded.model, tmp_path / path.name)
        assert normal(onnx.load(tmp_path / path.name)) == normal(onnx.load(path)), path.name


def test_a_forked_tensor_does_not_rename_the_one_of_the_caller() -> None:
    source = mlp()
    before = source.SerializeToString()
    model = load_onnx(source).model
    shared = model.graph.initializers["b"].const_value
    fork = ir.Value(name="b_fork", const_value=shared, shape=ir.Shape([300]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.register_initializer(fork)
    model.graph.node("add").replace_input_with(1, fork)
    check_shapes(model)
    assert verify_models(load_onnx(source).model, model).ok
    assert [tensor.name for tensor in emit_proto(model).graph.initializer] == ["w", "b", "b_fork"]
    assert source.SerializeToString() == before


def test_unknown_operators_pass_the_shape_check() -> None:
    check_shapes(load_onnx(rich()).model)


def test_initializers_that_are_inputs_stay_inputs() -> None:
    source = mlp()
    source.ir_version = 3
    source.opset_import[0].version = 8
    source.graph.input.add().CopyFrom(helper.make_tensor_value_info("w", FLOAT, [8, 300]))
    emitted = emit_proto(load_onnx(source).model)
    assert [info.name for info in emitted.graph.input] == ["x", "w"]
    assert normal(emitted) == normal(source)


def test_external_data_is_mapped_and_written_back(external: Path, tmp_path: Path) -> None:
    before = digest(external), digest(tmp_path / "in.data")
    loaded = load_onnx(external)
    assert loaded.external and loaded.external_files == (tmp_path / "in.data",) and loaded.path == external
    tensor = loaded.model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    save_onnx(loaded.model, tmp_path / "out.onnx", source_external=loaded.external)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.data", "in.onnx", "out.onnx", "out.onnx.data"]
    for tensors in (onnx.load(tmp_path / "out.onnx").graph.initializer, emit_proto(loaded.model).graph.initializer):
        assert [t.raw_data for t in tensors] == [t.raw_data for t in mlp().graph.initializer]
    assert (digest(external), digest(tmp_path / "in.data")) == before
    assert loaded.model.graph.initializers["w"].const_value is tensor
    onnx.checker.check_model(str(tmp_path / "out.onnx"))


def test_external_by_choice_by_size_or_not(external: Path, tmp_path: Path) -> None:
    model = load_onnx(external).model
    save_onnx(model, tmp_path / "a.onnx", external=False, source_external=True)
    save_onnx(model, tmp_path / "b.onnx", threshold_bytes=100)
    save_onnx(model, tmp_path / "c.onnx")
    save_onnx(load_onnx(mlp()).model, tmp_path / "d.onnx", external=True)
    assert [(tmp_path / f"{name}.onnx.data").exists() for name in "abcd"] == [False, True, False, True]
    for name in "abcd":
        raw = [t.raw_data for t in onnx.load(tmp_path / f"{name}.onnx").graph.initializer]
        assert raw == [t.raw_data for t in mlp().graph.initializer]


def test_saving_over_the_input_keeps_the_loaded_model_valid(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save_onnx(load_onnx(mlp()).model, path, external=True)
    original = load_onnx(path).model
    edited = load_onnx(path).model
    zeros = np.zeros((8, 300), np.float32)
    edited.graph.initializers["w"].const_value = ir.tensor(zeros, name="w")
    save_onnx(edited, path, external=True)
    assert not numpy_helper.to_array(onnx.load(path).graph.initializer[0]).any()
    save_onnx(original, tmp_path / "copy.onnx", external=True)
    assert onnx.load(tmp_path / "copy.onnx").graph.initializer[0].raw_data == mlp().graph.initializer[0].raw_data


def test_lazy_tensors_are_evaluated_once_and_shared_ones_written_once(tmp_path: Path) -> None:
    model = load_onnx(mlp()).model
    calls = []

    def make() -> ir.TensorProtocol:
        calls.append(1)
        return ir.Tensor(np.ones(300, np.float32))

    lazy = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape([300]), name="b")
    model.graph.initializers["b"].const_value = lazy
    twin = ir.Value(name="twin", const_value=lazy, shape=ir.Shape([300]), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.register_initializer(twin)
    save_onnx(model, tmp_path / "out.onnx", external=True)
    assert len(calls) == 1 and lazy._tensor is None and lazy.name == "b"
    assert (tmp_path / "out.onnx.data").stat().st_size < 8 * 300 * 4 + 2 * 300 * 4
    written = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    assert written["twin"].tolist() == written["b"].tolist() == [1.0] * 300


def test_sub_byte_and_half_types_survive_external_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    arrays = {
        "i4": rng.integers(-8, 8, (101, 31)).astype(ml_dtypes.int4),
        "u2": rng.integers(0, 4, (101, 61)).astype(ml_dtypes.uint2),
        "bf": rng.standard_normal((40, 41)).astype(ml_dtypes.bfloat16),
        "f8": rng.standard_normal((40, 41)).astype(ml_dtypes.float8_e5m2),
    }
    source = mlp()
    source.ir_version = 13
    source.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    save_onnx(load_onnx(source).model, tmp_path / "out.onnx", external=True)
    back = load_onnx(tmp_path / "out.onnx").model.graph.initializers
    for name, array in arrays.items():
        tensor = back[name].const_value
        assert isinstance(tensor, MappedTensor)
        assert tensor.numpy().view(np.uint8).tobytes() == array.view(np.uint8).tobytes(), name
        assert tensor.tobytes() == next(t.raw_data for t in source.graph.initializer if t.name == name)


def test_permissions_of_a_replaced_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for external in (False, True):
        path.write_bytes(b"old")
        path.chmod(0o640)
        save_onnx(load_onnx(mlp()).model, path, external=external)
        assert path.stat().st_mode & 0o777 == 0o640
