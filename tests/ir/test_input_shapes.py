"""Sizes that the user gives: used for analysis, costs and verification; written into the file only on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.models.cost_models import model, weights

import cipm_ir
from cipm_ir.cli import main
from cipm_ir.cli_shapes import input_shapes
from cipm_ir.errors import InputError, OptionError


def images(*dims: int | str | None) -> onnx.ModelProto:
    """Two convolutions; 4 * 3 * 9 + 2 * 4 multiply-accumulates for each position."""
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w1"], ["y"]),
    ]
    return model(nodes, {"x": list(dims)}, {"y": None}, {"w0": weights(4, 3, 3, 3), "w1": weights(2, 4, 1, 1)})


def two_inputs(*, shared: bool = True) -> onnx.ModelProto:
    other = "n" if shared else "m"
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("MatMul", ["z", "w"], ["b"])]
    inputs = {"x": ["n", 3], "z:0": [other, 3]}
    nodes[1].input[0] = "z:0"
    return model(nodes, inputs, {"a": None, "b": None}, {"w": weights(3, 4)})


def declared(made: Any) -> list[int | str]:
    dims = made.graph.input[0].type.tensor_type.shape.dim
    return [dim.dim_value or dim.dim_param for dim in dims]


@pytest.mark.parametrize("given", [{"x": (2, 3, 20, 30)}, (2, 3, 20, 30), {"x": [2, None, np.int64(20), 30]}])
@pytest.mark.parametrize("dims", [["n", 3, "h", "w"], [None, 3, None, None], [-1, 3, -1, -1], ["?", 3, "?", "?"]])
def test_costs_count_at_the_given_sizes_and_the_file_stays_dynamic(given: Any, dims: list[Any]) -> None:
    result = cipm_ir.optimize(images(*dims), ["canonicalize"], input_shapes=given)
    assert result.report.before.macs == 2 * 20 * 30 * (4 * 27 + 8)
    assert sorted(result.report.before.sizes.values()) == [2, 20, 30]
    assert "MACs are counted at" in str(result.report)
    assert not any(isinstance(d, int) and d > 0 for d in (declared(result.model)[k] for k in (0, 2, 3)))


def test_sizes_that_stay_open_count_at_stand_ins() -> None:
    program = cipm_ir.load(images("n", 3, "h", "w"), input_shapes=(None, 3, 20, None))
    assert program.count().sizes == {"n": 1, "h": 20, "w": 224}


def test_given_sizes_win_over_those_of_the_data() -> None:
    data = {"x": np.zeros((3, 3, 8, 12), np.float32)}
    result = cipm_ir.optimize(images("n", 3, "h", "w"), ["remove-dead"], data=data, input_shapes=(1, 3, 20, None))
    assert result.report.before.sizes == {"n": 1, "h": 20, "w": 12}


def test_fixed_sizes_are_written_wherever_the_file_has_their_symbols() -> None:
    made = images("n", 3, "h", "w")
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, "h", "w"]))
    result = cipm_ir.optimize(made, ["canonicalize"], input_shapes={"x": (None, 3, 20, 30)}, fix_shapes=True)
    assert declared(result.model) == ["n", 3, 20, 30]
    dims = result.model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value or d.dim_param for d in dims] == ["n", 2, 20, 30]
    assert declared(made) == ["n", 3, "h", "w"]  # the caller's model is left alone


def test_verification_runs_at_the_given_sizes() -> None:
    """Ten rows of 21, which no constant says: only a caller who knows can let it run."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Reshape", ["m", "target"], ["y"])]
    numbers = {"target": np.asarray([14, 15], np.int64), "w": weights(21, 21)}
    made = model(nodes, {"x": ["a", "b"]}, {"y": None}, numbers)
    open_sizes = cipm_ir.verify(made, made)
    assert not open_sizes.verified and "input_shapes" in open_sizes.reason
    assert cipm_ir.verify(made, made, input_shapes={"x": (10, 21)}).ok


def test_verification_finds_sizes_that_constants_ask_for() -> None:
    nodes = [helper.make_node("Reshape", ["x", "target"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["y"])]
    numbers = {"target": np.asarray([7, 33], np.int64), "w": weights(33, 4)}
    made = model(nodes, {"x": ["a", "b"]}, {"y": None}, numbers)
    assert cipm_ir.verify(made, made).ok


def test_a_model_without_known_rank_runs_at_the_given_sizes() -> None:
    made = images(1, 3, 4, 4)
    made.graph.input[0].type.tensor_type.ClearField("shape")
    assert cipm_ir.verify(made, made, input_shapes=(1, 3, 5, 6)).ok


WRONG: dict[str, tuple[Any, str]] = {
    "unknown input": ({"image": (1, 3, 8, 8)}, "no input 'image'.*inputs: 'x'"),
    "too few": ({"x": (1, 3, 8)}, "'x' has 4 axes.*has 3"),
    "too many": ({"x": (1, 3, 8, 8, 8)}, "'x' has 4 axes.*has 5"),
    "fixed otherwise": ({"x": (1, 4, 8, 8)}, "fixed size 3 along axis 1.*give 3"),
    "zero": ({"x": (1, 3, 0, 8)}, "axis 2 must be a whole number above 0, not 0"),
    "negative": ({"x": (-1, 3, 8, 8)}, "axis 0 must be a whole number above 0, not -1"),
    "a fraction": ({"x": (1, 3, 8.0, 8)}, "axis 2 must be a whole number above 0, not 8.0"),
    "a bool": ({"x": (True, 3, 8, 8)}, "axis 0 must be a whole number"),
    "text": ({"x": "1x3x8x8"}, "must be a tuple of sizes"),
    "a number": ({"x": 8}, "must be a tuple of sizes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sizes_are_refused_in_one_sentence(name: str) -> None:
    given, said = WRONG[name]
    with pytest.raises(InputError, match=said) as error:
        cipm_ir.load(images("n", 3, "h", "w"), input_shapes=given)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_one_symbol_has_one_size() -> None:
    with pytest.raises(InputError, match=r"2 for axis 0 of input 'x' and 5 for axis 0 of input 'z:0'.*both 'n'"):
        cipm_ir.load(two_inputs(), input_shapes={"x": (2, 3), "z:0": (5, 3)})
    apart = cipm_ir.load(two_inputs(shared=False), input_shapes={"x": (2, 3), "z:0": (5, 3)})
    assert apart.count().sizes == {"n": 2, "m": 5}
    with pytest.raises(InputError, match="needs the name of an input"):
        cipm_ir.load(two_inputs(), input_shapes=(2, 3))


def test_fixing_needs_sizes() -> None:
    with pytest.raises(OptionError, match="input_shapes"):
        cipm_ir.load(images("n", 3, "h", "w"), fix_shapes=True)


def test_a_torch_program_has_the_sizes_of_its_examples() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(OptionError, match="example_inputs"):
        cipm_ir.load(torch.nn.Linear(3, 2), (torch.zeros(1, 3),), input_shapes={"x": (1, 3)})


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (["x:1x3x8x8"], {"x": (1, 3, 8, 8)}),
        (["x:0:1,3"], {"x:0": (1, 3)}),
        (["?x3x8x8"], (None, 3, 8, 8)),
        (["a:1", "b:2x?"], {"a": (1,), "b": (2, None)}),
        (["s:scalar"], {"s": ()}),
        (None, None),
    ],
)
def test_sizes_on_the_command_line(text: list[str] | None, sizes: Any) -> None:
    assert input_shapes(text) == sizes


@pytest.mark.parametrize("text", ["x", "x:", ":1x3", "x:1x", "x:1xax3", "x:1.5x3", "", "x=1x3", "x:1x3 "])
def test_text_that_is_no_shape(text: str) -> None:
    with pytest.raises(OptionError, match="name:1x3x640x640"):
        input_shapes([text])


@pytest.mark.parametrize("given", [["x:1x3", "x:1x4"], ["1x3", "1x4"], ["1x3", "x:1x4"]])
def test_sizes_that_are_given_twice(given: list[str]) -> None:
    with pytest.raises(OptionError, match=r"twice|without a name"):
        input_shapes(given)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(images("n", 3, "h", "w"), source)
    assert main(["inspect", str(source), "--json", "--input-shape", "x:1x3x20x30"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["sizes"] == {"n": 1, "h": 20, "w": 30}
    command = ["optimize", str(source), "-o", str(target), "-p", "canonicalize", "--input-shape", "?x3x20x30"]
    assert main(command) == 0
    assert declared(onnx.load(target)) == ["n", 3, "h", "w"]
    assert main([*command, "--fix-shapes"]) == 0
    assert declared(onnx.load(target)) == ["n", 3, 20, 30]
    assert main(["verify", str(source), str(target), "--input-shape", "x:2x3x20x30"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(source), "--input-shape", "image:1x3x20x30"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
