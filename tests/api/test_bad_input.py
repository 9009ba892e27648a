"""Bad models: each is refused with one clear sentence, and the source is untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from cipm_ir.backends.onnx.save import emit_proto
from cipm_ir.errors import CipmError, InputError, UnsupportedError
from cipm_ir.frontends.onnx.load import check_finite, check_shapes, load_onnx

FLOAT = TensorProto.FLOAT


def chain(weights: dict[str, np.ndarray[Any, Any]] | None = None) -> onnx.ModelProto:
    """y = relu(x @ w1) @ w2, sizes 4, 40, 30."""
    rng = np.random.default_rng(0)
    arrays = {
        "w1": rng.standard_normal((4, 40)).astype(np.float32),
        "w2": rng.standard_normal((40, 30)).astype(np.float32),
    }
    arrays.update(weights or {})
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def message(kind: type[CipmError], action: Callable[[], object]) -> str:
    """The text of the error that the action raises: one line that ends as a sentence does."""
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500, text
    return text


# --- files ----------------------------------------------------------------------------------------


def test_no_file_and_not_a_file(tmp_path: Path) -> None:
    assert "no file" in message(InputError, lambda: load_onnx(tmp_path / "none.onnx"))
    assert "folder" in message(InputError, lambda: load_onnx(tmp_path))
    (tmp_path / "empty.onnx").touch()
    assert "empty" in message(InputError, lambda: load_onnx(str(tmp_path / "empty.onnx")))
    assert "not int" in message(InputError, lambda: load_onnx(3))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"hello, this is text\n", b"\x89PNG\r\n\x1a\n" + bytes(64), bytes(range(256))])
def test_not_protobuf(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    assert "bad.onnx" in message(InputError, lambda: load_onnx(path))
    assert path.read_bytes() == content


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = chain().SerializeToString()
    path = tmp_path / "cut.onnx"
    for size in [*range(1, 40), *range(40, len(whole), 97), *range(len(whole) - 12, len(whole))]:
        path.write_bytes(whole[:size])
        assert "cut.onnx" in message(InputError, lambda: load_onnx(path)), size
    path.write_bytes(whole)
    load_onnx(path)


def test_flipped_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    """Whatever a damaged byte makes of the file, no other kind of error comes out, and what loads can be written."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(chain().SerializeToString(), np.uint8)
    structure = np.r_[0:130, len(whole) - 80 : len(whole)]
    path = tmp_path / "flipped.onnx"
    refused = 0
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.choice(structure)] = rng.integers(256)
        path.write_bytes(damaged.tobytes())
        try:
            model = load_onnx(path).model
            check_shapes(model)
        except CipmError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            emit_proto(model)
    assert 100 < refused < 300


def external(tmp_path: Path, **changes: str) -> Path:
    onnx.save(chain(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for entry in model.graph.initializer[1].external_data:
        entry.value = changes.get(entry.key, entry.value)
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_external_data_missing_or_short(tmp_path: Path) -> None:
    path = external(tmp_path)
    load_onnx(path)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:-1])
    text = message(InputError, lambda: load_onnx(path))
    assert "'w2'" in text and "m.data" in text and "truncated" in text
    (tmp_path / "m.data").unlink()
    text = message(InputError, lambda: load_onnx(path))
    assert "'w1'" in text and "m.data" in text and "missing" in text


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"location": "../m.data"}, "outside"),
        ({"location": "/etc/passwd"}, "outside"),
        ({"location": "link.data"}, "outside"),
        ({"location": ""}, "names no file"),
        ({"offset": "-4"}, "whole number"),
        ({"offset": "99999"}, "truncated"),
        ({"length": "12"}, "4800 bytes"),
    ],
)
def test_external_data_outside_the_folder_or_inconsistent(changes: dict[str, str], word: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "m.data").write_bytes(bytes(10000))
    (inner / "link.data").symlink_to(tmp_path / "m.data")
    path = external(inner, **changes)
    text = message(InputError, lambda: load_onnx(path))
    assert "'w2'" in text and word in text


def test_links_as_in_a_download_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    external(snapshot)
    for name in ("m.onnx", "m.data"):
        (snapshot / name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(blobs / f"hash-{name}")
    tensor = load_onnx(snapshot / "m.onnx").model.graph.initializers["w2"].const_value
    assert tensor is not None and tensor.tobytes() == chain().graph.initializer[1].raw_data


def test_proto_with_external_data_has_no_folder(tmp_path: Path) -> None:
    proto = onnx.load(external(tmp_path), load_external_data=False)
    assert "no folder" in message(InputError, lambda: load_onnx(proto))


# --- structure ------------------------------------------------------------------------------------


def edited(edit: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = chain()
    edit(model)
    return model


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "r"


def training(model: onnx.ModelProto) -> None:
    model.training_info.add()


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add().values.name = "thin"


def defined_again(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 41), np.float32), "w1"))


def mapped(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.sequence_type.elem_type.map_type.key_type = TensorProto.INT64


@pytest.mark.parametrize(
    ("edit", "kind", "words"),
    [
        (cyclic, InputError, ["cycle", "'first'", "'r'"]),
        (lambda m: m.graph.node[0].input.__setitem__(0, "a"), InputError, ["cycle", "'first'", "own output"]),
        (lambda m: m.graph.node[2].input.__setitem__(1, "ghost"), InputError, ["'second'", "'ghost'", "no node"]),
        (lambda m: m.graph.node[1].output.__setitem__(0, "a"), InputError, ["'a'", "twice", "'act'"]),
        (defined_again, InputError, ["'w1'", "twice", "different shapes"]),
        (lambda m: setattr(m, "ir_version", 99), UnsupportedError, ["IR version 99", "upgrade onnx"]),
        (lambda m: setattr(m.opset_import[0], "version", 99), UnsupportedError, ["opset 99", "upgrade onnx"]),
        (lambda m: setattr(m.opset_import[0], "version", 0), InputError, ["opset 0", "damaged"]),
        (lambda m: m.graph.input.append(m.graph.input[0]), InputError, ["'x'", "twice"]),
        (lambda m: setattr(m.graph.output[0], "name", "none"), InputError, ["'none'", "no node"]),
        (lambda m: m.graph.output.pop(), InputError, ["no outputs"]),
        (lambda m: m.ClearField("graph"), InputError, ["no graph"]),
        (lambda m: m.ClearField("opset_import"), InputError, ["opset"]),
        (lambda m: m.ClearField("ir_version"), InputError, ["ir_version"]),
        (lambda m: setattr(m.graph.initializer[0], "name", ""), InputError, ["'first'", "'w1'", "no node"]),
        (lambda m: setattr(m.graph.initializer[1], "raw_data", b"123"), InputError, ["'w2'", "4800 bytes", "holds 3"]),
        (lambda m: m.graph.initializer[1].ClearField("raw_data"), InputError, ["'w2'", "holds 0"]),
        (lambda m: m.graph.initializer[1].dims.__setitem__(0, -40), InputError, ["'w2'", "negative"]),
        (lambda m: setattr(m.graph.initializer[1], "data_type", 99), InputError, ["'w2'", "data type 99"]),
        (sparse, InputError, ["'thin'", "sparse tensor"]),
        (training, UnsupportedError, ["training_info"]),
        (mapped, UnsupportedError, ["'y'", "map"]),
    ],
)
def test_damaged_structure(edit: Callable[[onnx.ModelProto], object], kind: type[CipmError], words: list[str]) -> None:
    model = edited(edit)
    before = model.SerializeToString()
    text = message(kind, lambda: load_onnx(model))
    assert all(word in text for word in words), text
    assert model.SerializeToString() == before


def test_undefined_name_inside_a_subgraph() -> None:
    inner = helper.make_graph(
        [helper.make_node("Neg", ["ghost"], ["o"], name="neg")],
        "g",
        [],
        [helper.make_tensor_value_info("o", FLOAT, None)],
    )
    model = chain()
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], name="if", then_branch=inner, else_branch=inner))
    text = message(InputError, lambda: load_onnx(model))
    assert "'neg'" in text and "'ghost'" in text


def test_a_given_ir_model_is_checked_too() -> None:
    model = ir.from_proto(chain())
    first, _, last = list(model.graph)
    first.replace_input_with(0, last.outputs[0])
    assert "cycle" in message(InputError, lambda: load_onnx(model))
    model = ir.from_proto(chain())
    model.graph.initializers["w1"].const_value = None
    assert "'w1'" in message(InputError, lambda: load_onnx(model))


# --- shapes and values ----------------------------------------------------------------------------


def test_wrong_shapes_inside() -> None:
    check_shapes(load_onnx(chain()).model)
    damaged = load_onnx(chain({"w2": np.zeros((39, 30), np.float32)})).model
    text = message(InputError, lambda: check_shapes(damaged))
    assert "'second' (MatMul)" in text


def test_wrong_convolution_channels() -> None:
    node = helper.make_node("Conv", ["x", "k"], ["y"], name="conv")
    kernel = numpy_helper.from_array(np.zeros((8, 5, 3, 3), np.float32), "k")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 4, 9, 9])],
        [helper.make_tensor_value_info("y", FLOAT, ["N", 8, 7, 7])],
        [kernel],
    )
    model = load_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)).model
    assert "'conv' (Conv)" in message(InputError, lambda: check_shapes(model))


def test_wrong_notes_on_inner_shapes_are_forgiven() -> None:
    model = chain()
    model.graph.value_info.append(helper.make_tensor_value_info("a", FLOAT, ["N", 41]))
    check_shapes(load_onnx(model).model)


def test_nan_weights_are_named_and_infinities_pass(tmp_path: Path) -> None:
    weight = np.ones((4, 40), np.float32)
    weight[3, 2] = np.inf
    check_finite(load_onnx(chain({"w1": weight})).model)
    weight[2, 7] = np.nan
    onnx.save(
        chain({"w1": weight}), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    model = load_onnx(tmp_path / "m.onnx").model
    text = message(InputError, lambda: check_finite(model))
    assert "'w1'" in text and "[2, 7]" in text


def one_operator(op: str, shapes: dict[str, tuple[int, ...]], **attributes: Any) -> onnx.ModelProto:
    """A product with a weight, then an operator with parameters of the given shapes."""
    arrays = {"w": np.ones((5, 6), np.float32), **{k: np.ones(s, np.float32) for k, s in shapes.items()}}
    first = [3, 4, 5] if op in ("LSTM", "GRU", "RNN") else [4, 5]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node(op, ["h", *shapes], ["y"], name="odd", **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, first)],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


LENGTHS: list[tuple[str, dict[str, tuple[int, ...]], dict[str, Any], str, tuple[int, ...]]] = [
    ("Gemm", {"v": (6, 3), "c": (2,)}, {}, "c", (3,)),
    ("Gemm", {"v": (3, 6), "c": (4, 2)}, {"transB": 1}, "c", (4, 3)),
    ("LayerNormalization", {"s": (7,), "b": (6,)}, {}, "s", (6,)),
    ("LayerNormalization", {"s": (6,), "b": (5,)}, {}, "b", (6,)),
    ("LSTM", {"v": (1, 8, 5), "r": (1, 8, 2)}, {"hidden_size": 2}, "v", (1, 8, 6)),
    ("GRU", {"v": (1, 6, 6), "r": (1, 8, 2)}, {"hidden_size": 2}, "r", (1, 6, 2)),
    ("RNN", {"v": (1, 2, 6), "r": (1, 2, 2), "b": (1, 3)}, {"hidden_size": 2}, "b", (1, 4)),
]


@pytest.mark.parametrize(("op", "shapes", "attributes", "name", "right"), LENGTHS)
def test_parameters_of_wrong_length(
    op: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any], name: str, right: tuple[int, ...]
) -> None:
    """The control is the same operator with the right length."""
    text = message(InputError, lambda: check_shapes(load_onnx(one_operator(op, shapes, **attributes)).model))
    assert f"of {name!r} has size" in text and "'odd'" in text
    check_shapes(load_onnx(one_operator(op, {**shapes, name: right}, **attributes)).model)


def test_broadcasting_of_old_opsets() -> None:
    model = one_operator("Add", {"b": (4,)}, axis=0, broadcast=1)
    model.opset_import[0].version = 6
    text = message(UnsupportedError, lambda: load_onnx(model))
    assert text.startswith("Node 'odd' (Add) broadcasts along an axis, as ONNX did before opset 7")
    del model.graph.node[1].attribute[0]
    load_onnx(model)


@pytest.mark.parametrize(
    ("attribute", "text"),
    [
        ({"axis": "words"}, "Attribute 'axis' of node 'odd' (Softmax) is of type STRING, and INT is needed"),
        ({"axes": [1]}, "Attribute 'axes' of node 'odd' (Softmax) is not one that Softmax has in opset 17 ('axis')"),
    ],
)
def test_attributes_that_the_operator_does_not_take(attribute: dict[str, Any], text: str) -> None:
    load_onnx(one_operator("Softmax", {}, axis=1))
    assert text in message(InputError, lambda: load_onnx(one_operator("Softmax", {}, **attribute)))


@pytest.mark.parametrize(
    ("op", "attributes", "word"),
    [
        ("RandomUniformLike", {"low": 0.5, "high": 0.0}, "empty range"),
        ("RandomUniformLike", {"low": 2.0}, "empty range"),
        ("RandomNormalLike", {"scale": 0.0}, "scale 0"),
        ("RandomNormalLike", {"scale": -1.0}, "not positive"),
    ],
)
def test_distributions_that_end_the_process(op: str, attributes: dict[str, float], word: str) -> None:
    """onnxruntime aborts on these, and takes the process with it."""
    assert word in message(InputError, lambda: load_onnx(one_operator(op, {}, **attributes)))
    load_onnx(one_operator(op, {}))


@pytest.mark.parametrize("control", ["\r", "\n", "\x0b", "\u2028", "\x85", "\x1b[31m"])
@pytest.mark.parametrize("field", ["name", "op_type", "input"])
def test_control_characters_in_names_keep_the_message_on_one_line(field: str, control: str) -> None:
    def edit(model: onnx.ModelProto) -> None:
        node = model.graph.node[0]
        node.input[1] = "missing"
        if field == "input":
            node.input[1] = f"a{control}b"
        else:
            setattr(node, field, f"a{control}b")

    text = message(InputError, lambda: load_onnx(edited(edit)))
    assert text.isprintable() and len(text.splitlines()) == 1
