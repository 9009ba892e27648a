"""Data as users hold it: every form gives the same batches, and what cannot be used is refused with one sentence."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import cipm_ir
from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs.data import normalized
from cipm_ir.runtime.inputs.generate import batches, sample_count

torch = pytest.importorskip("torch")

X = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
IDS = np.random.default_rng(1).integers(0, 7, (12, 3))


def net(batch: int | str = "N", *, baked: int | None = None, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = relu(x @ w) @ v; ``baked``: a Reshape that holds for this batch only, behind an open one."""
    rng = np.random.default_rng(2)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["z"]),
        helper.make_node("Reshape", ["z", "s"], ["y"]) if baked else helper.make_node("Identity", ["z"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(rng.standard_normal((4, 10)).astype(kind), "w"),
        numpy_helper.from_array(rng.standard_normal((10, 3)).astype(kind), "v"),
        *([numpy_helper.from_array(np.array([baked, 3]), "s")] if baked else []),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, [batch, 4])],
        [helper.make_tensor_value_info("y", dtype, [batch, 3])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def two_inputs() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["t", "ids"], ["g"]),
        helper.make_node("ReduceMean", ["g"], ["m"], axes=[1], keepdims=0),
        helper.make_node("Add", ["m", "x"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "T"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
    ]
    table = numpy_helper.from_array(np.random.default_rng(3).standard_normal((7, 4)).astype(np.float32), "t")
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def fed(data: Any, model: onnx.ModelProto, size: int = 5) -> dict[str, np.ndarray]:
    """All samples of all batches, by input."""
    loaded = ir.from_proto(model)
    names = [value.name or "" for value in loaded.graph.inputs]
    found = list(batches(normalized(data, names), loaded, size))
    return {name: np.concatenate([feeds[name] for feeds in found]) for name in names}


class Loader:
    """What a DataLoader is to us: an iterable of (images, labels), as often as asked."""

    def __iter__(self) -> Any:
        return iter([(torch.from_numpy(X[k : k + 4]), torch.zeros(4)) for k in (0, 4, 8)])


def grown(array: np.ndarray) -> Any:
    return torch.nn.Parameter(torch.from_numpy(array.copy())) * 1.0


ONE: dict[str, Callable[[], Any]] = {
    "array": lambda: X,
    "tensor": lambda: torch.from_numpy(X),
    "tensor that requires grad": lambda: grown(X),
    "dict": lambda: {"x": X},
    "dict of another name": lambda: {"input": torch.from_numpy(X)},
    "dict of a tensor that requires grad": lambda: {"x": grown(X)},
    "dict with labels": lambda: {"x": X, "labels": ["a"] * 12},
    "user dict": lambda: UserDict(x=X),
    "nested lists": lambda: X.tolist(),
    "list of arrays": lambda: [X[:5], X[5:]],
    "tuple of tensors": lambda: (torch.from_numpy(X[:5]), grown(X[5:])),
    "list of dicts": lambda: [{"x": X[:7]}, {"x": X[7:]}],
    "list of tuples": lambda: [(X[:7],), (X[7:], "label")],
    "DataLoader": lambda: torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(X), torch.zeros(12)), batch_size=4
    ),
    "loader": Loader,
    "generator": lambda: (X[k : k + 6] for k in (0, 6)),
    "generator of tuples": lambda: ((X[k : k + 6], k) for k in (0, 6)),
    "float64": lambda: X.astype(np.float64),
    "list of lists of tensors": lambda: {"x": [torch.from_numpy(row) for row in X]},
}


@pytest.mark.parametrize("form", ONE)
def test_forms_of_one_input(form: str) -> None:
    np.testing.assert_array_equal(fed(ONE[form](), net())["x"], X)


TWO: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"x": X, "ids": IDS},
    "dict of lists, as of a Hugging Face dataset": lambda: {"ids": IDS.tolist(), "x": X.tolist(), "text": ["a"] * 12},
    "tuple": lambda: (IDS, torch.from_numpy(X)),
    "list": lambda: [torch.from_numpy(IDS), grown(X)],
    "loader of tuples": lambda: [(IDS[:6], X[:6], "label"), (IDS[6:], X[6:], "label")],
    "loader of nested tuples": lambda: [((IDS[:6], X[:6]), 1), ((IDS[6:], X[6:]), 0)],
    "loader of dicts and labels": lambda: [({"ids": IDS, "x": X}, 1)],
}


@pytest.mark.parametrize("form", TWO)
def test_forms_of_two_inputs(form: str) -> None:
    found = fed(TWO[form](), two_inputs())
    np.testing.assert_array_equal(found["x"], X)
    np.testing.assert_array_equal(found["ids"], IDS)


def test_folders(tmp_path: Path) -> None:
    for k in (0, 6):
        np.save(tmp_path / f"part{k}.npy", X[k : k + 6])
    np.testing.assert_array_equal(fed(tmp_path, net())["x"], X)
    np.testing.assert_array_equal(fed([tmp_path / "part0.npy", tmp_path / "part6.npy"], net())["x"], X)
    named = tmp_path / "named"
    named.mkdir()
    np.save(named / "ids.npy", IDS)
    np.save(named / "x.npy", X)
    np.testing.assert_array_equal(fed(str(named), two_inputs())["ids"], IDS)
    other = tmp_path / "other"
    other.mkdir()
    np.savez(other / "a.npz", images=X)
    np.testing.assert_array_equal(fed(other, net())["x"], X)
    np.testing.assert_array_equal(fed(other / "a.npz", net())["x"], X)


def test_bfloat16_tensors_and_models() -> None:
    model = net(dtype=TensorProto.BFLOAT16)
    halves = X.astype(ml_dtypes.bfloat16)
    for data in (torch.from_numpy(X).bfloat16(), halves, X):
        np.testing.assert_array_equal(fed(data, model)["x"], halves)
    np.testing.assert_array_equal(fed(halves, net())["x"], halves.astype(np.float32))


def test_a_list_is_counted_and_a_generator_is_not() -> None:
    model = ir.from_proto(net())
    assert sample_count([X[:5], X], model) == 17
    assert sample_count((one for one in [X]), model) is None


def test_what_is_left_of_a_loader_is_dropped_where_the_batch_is_fixed() -> None:
    assert fed([X[:4], X[4:8], X[8:10]], net(batch=4))["x"].shape == (8, 4)


REFUSED: list[tuple[Any, bool, str]] = [
    (
        X[0],
        False,
        "Input 'x' has shape [N,4], but the data has shape [4]: that is one sample without the batch axis; add it in "
        "front, as in x[None].",
    ),
    (
        [{"x": X[0]}, {"x": X[1]}],
        False,
        "Input 'x' has shape [N,4], but the data has shape [4]: that is one sample without the batch axis; add it in "
        "front, as in x[None].",
    ),
    (
        {"a": X, "b": X},
        False,
        "The data has no array for input 'x'; it holds 'a', 'b'.",
    ),
    (
        X,
        True,
        "The data is one array, but the model has inputs 'ids', 'x'; give one for each, by name, in a dict or an "
        ".npz file.",
    ),
    (
        [(IDS,)],
        True,
        "Batch 0 of the data holds 1 arrays, but the model has 2 inputs: 'ids', 'x'.",
    ),
    (
        7,
        False,
        "The data is of type int; give a dict of arrays by input name, an array, a tuple of one array for each input, "
        "an iterable of such batches, or a path to .npz or .npy.",
    ),
    (
        [X, "labels"],
        False,
        "Batch 1 of the data is of type str; give a dict of arrays by input name, an array, a tuple of one array for "
        "each input, an iterable of such batches, or a path to .npz or .npy.",
    ),
    (
        {"x": [[1.0, 2.0, 3.0, 4.0], [1.0]]},
        False,
        "'x' of the data cannot be made an array: setting an array element with a sequence. The requested array has an "
        "inhomogeneous shape after 1 dimensions. The detected shape was (2,) + inhomogeneous part; pad rows of "
        "different lengths.",
    ),
    (
        {"x": ["a", "b"]},
        False,
        "Input 'x' takes float32, but the data is <U1; convert it first.",
    ),
    (
        X.astype(np.complex64),
        False,
        "Input 'x' takes float32, but the data is complex64; convert it first.",
    ),
]


@pytest.mark.parametrize(("data", "two", "text"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_used_is_refused(data: Any, two: bool, text: str) -> None:
    model = two_inputs() if two else net()
    with pytest.raises(InputError) as caught:
        cipm_ir.optimize(model, ["clean-up"], data=data)
    assert str(caught.value) == text


def test_fixed_batches_say_how_many() -> None:
    with pytest.raises(InputError) as caught:
        cipm_ir.optimize(net(batch=16), ["clean-up"], data=X)
    assert (
        str(caught.value) == "The model takes batches of exactly 16 samples, but the data holds 12; give at least 16."
    )


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        fed(tmp_path, net())
    assert str(caught.value) == (
        f"The folder {str(tmp_path)!r} holds no .npz or .npy files; save arrays as the model takes them (images after "
        "its preprocessing)."
    )
    np.save(tmp_path / "a.npy", X)
    with pytest.raises(
        InputError, match=r"holds 'a\.npy', but the model has inputs 'ids', 'x'; name a file after each"
    ):
        fed(tmp_path, two_inputs())


# --- torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["dict of another name", "tensor that requires grad", "DataLoader", "tuple of tensors"]
)
def test_a_torch_program_takes_the_same(form: str) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    results = [
        cipm_ir.optimize(
            module, ["prune{macs=0.5, compensate=true}"], data=data, example_inputs=torch.from_numpy(X[:1])
        )
        for data in (ONE[form](), X)
    ]
    found, wanted = (result.model(torch.from_numpy(X[:1])) for result in results)
    torch.testing.assert_close(found, wanted)


def test_a_torch_program_refuses_a_sample_without_batch() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).eval()
    with pytest.raises(
        InputError, match=r"that is one sample without the batch axis; add it in front, as in x\[None\]"
    ):
        cipm_ir.optimize(module, ["clean-up"], data=torch.from_numpy(X[0]), example_inputs=torch.from_numpy(X[:1]))


# --- batches that only one size fits --------------------------------------------------------------


@pytest.mark.parametrize("baked", [1, 4])
@pytest.mark.parametrize("spec", ["compress{macs=0.6}", "prune{macs=0.6, compensate=true}", "canonicalize"])
def test_a_model_that_runs_with_one_size_of_batch(baked: int, spec: str) -> None:
    """Declared open, run with what it takes, and said; the numbers are those of the model without the lie."""
    result = cipm_ir.optimize(net(baked=baked), [spec], data=X)
    honest = cipm_ir.optimize(net(batch=baked), [spec], data=X)
    note = f"the model declares batches of any size, but runs with {baked} only, and was run so"
    assert result.report.notes == (note,) and note in str(result.report)
    assert result.report.steps[0].verification is not None and result.report.steps[0].verification.verified
    assert result.report.after.parameters == honest.report.after.parameters
    shape = result.model.graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param == "N"


@pytest.mark.parametrize("baked", [1, 4])
def test_without_data_verification_finds_it(baked: int) -> None:
    result = cipm_ir.optimize(net(baked=baked), ["canonicalize"])
    assert result.report.steps[0].checked == "verified"
    assert result.report.notes[0].endswith(f"but runs with {baked} only, and was run so")
    assert cipm_ir.verify(net(baked=baked), net(baked=baked), data=X)


def test_an_honest_model_has_no_note() -> None:
    assert cipm_ir.optimize(net(), ["canonicalize"], data=X).report.notes == ()
    assert cipm_ir.optimize(net(batch=4), ["canonicalize"], data=X).report.notes == ()


# ---------------------------------------------------------------- one whole batch
def recurrent(state: int | str = 2, batch: int | str = "N") -> onnx.ModelProto:
    """y = relu(x @ w + sum of the states): a state of (2, batch, 4) beside an input of (batch, 4)."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("ReduceSum", ["h", "axes"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(rng.standard_normal((4, 10)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.standard_normal((10, 3)).astype(np.float32), "v"),
        numpy_helper.from_array(np.array([0]), "axes"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4]),
        helper.make_tensor_value_info("h", TensorProto.FLOAT, [state, batch, 4]),
    ]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def whole(batch: int, state: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    return {
        "x": rng.standard_normal((batch, 4)).astype(np.float32),
        "h": rng.standard_normal((state, batch, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("batch", ["N", 1])
@pytest.mark.parametrize("form", [lambda one: one, lambda one: [one, one], lambda one: iter([one])])
def test_a_state_beside_an_input_is_one_whole_batch(batch: int | str, form: Callable[[Any], Any]) -> None:
    model = ir.from_proto(recurrent(batch=batch))
    feeds = list(batches(form(whole(1)), model))
    for feed in feeds:
        assert {name: x.shape for name, x in feed.items()} == {"x": (1, 4), "h": (2, 1, 4)}
        assert np.array_equal(feed["h"], whole(1)["h"])
    result = cipm_ir.optimize(recurrent(batch=batch), ["canonicalize"], data=form(whole(1)))
    assert result.report.verification is not None and result.report.verification.ok


def test_a_whole_batch_of_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", **whole(5))
    model = ir.from_proto(recurrent())
    assert [feed["h"].shape for feed in batches(tmp_path / "one.npz", model)] == [(2, 5, 4)]
    assert sample_count(whole(5), model) == 1 and list(batches(whole(5), model, limit=0)) == []


def test_inputs_of_different_lengths_are_no_batch() -> None:
    made = {"ids": np.zeros((3, 2), np.int64), "x": np.zeros((4, 4), np.float32)}
    with pytest.raises(InputError, match="different numbers of samples"):
        list(batches(made, ir.from_proto(two_inputs())))
    with pytest.raises(InputError, match=r"different numbers of samples: \{'x': 1, 'h': 3\}"):
        list(batches(whole(1, state=3), ir.from_proto(recurrent())))
