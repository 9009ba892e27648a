"""What broke when models from outside the tests were used through the public API."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import cipm_ir
from cipm_ir.errors import InputError, SymmetryError
from cipm_ir.runtime.session import run
from cipm_ir.runtime.statistics.distributed import pack, unpack
from cipm_ir.runtime.verification.verify import verify_models

UNITS = 6
_DETOUR = """
    h = Relu(c)
    m = ReduceMean <keepdims = 1> (h, hw)
    flat = Reshape(m, one)
    size = Shape <start = 0, end = 1> (x)
    rows = Squeeze(size)
    row = Range(zero, rows, unit)
    far = Mul(row, width)
    column = Unsqueeze(far, behind)
    index = Add(column, within)
"""


def pooled(batch: str = "N", steps: int = 1, fixed: int = 0) -> onnx.ModelProto:
    """Conv, Relu, mean over the picture, and as torch's exporter writes it a Gather of what is there already, Gemm.

    ``steps``: distance of the positions; only 1 gives the mean back. ``fixed``: positions for a batch of this size.
    """
    rng = np.random.default_rng(0)
    source = (
        f"< ir_version: 10, opset_import: ['': 20] > g (float[{batch}, 1, 5, 5] x) => (float[{batch}, 3] y) {{"
        f"c = Conv <pads = [1, 1, 1, 1]> (x, w, b) {_DETOUR}"
        f"again = Gather({'flat, index' if not fixed else 'flat, numbers'}) v = Reshape(again, rest) "
        "y = Gemm <transB = 1> (v, head, bias) }"
    ).replace("'", '"')
    model = onnx.parser.parse_model(source)
    within = np.arange(UNITS) * steps % UNITS
    floats = {"w": (UNITS, 1, 3, 3), "b": (UNITS,), "head": (3, UNITS), "bias": (3,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in floats.items()}
    integers = {
        "hw": [2, 3],
        "one": [-1],
        "zero": 0,
        "unit": 1,
        "width": UNITS,
        "behind": [1, 2, 3],
        "within": within.reshape(1, UNITS, 1, 1),
        "rest": [-1, UNITS],
        "numbers": (np.arange(max(fixed, 1))[:, None] * UNITS + within).reshape(-1, UNITS, 1, 1),
    }
    arrays |= {name: np.asarray(value, np.int64) for name, value in integers.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    return model


def feeds(batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((batch, 1, 5, 5)).astype(np.float32)}


@pytest.mark.parametrize(("batch", "fixed"), [("N", 0), ("2", 2), ("1", 1)])
def test_units_go_through_the_pooling_of_torchs_exporter(batch: str, fixed: int) -> None:
    model = pooled(batch, fixed=fixed)
    program = cipm_ir.load(model)
    assert [space.size for space in program.spaces] == [UNITS]
    space = program.spaces[0]
    moved = program.act({space: space.random(np.random.default_rng(2))})
    assert verify_models(program.emit(), moved.emit())
    small = program.restrict({space: [0, 2, 5]}).emit()
    assert small.graph.initializers["head"].shape == (3, 3)
    assert "Gather" not in {node.op_type for node in small.graph}
    for size in (1, 2, 7) if batch == "N" else (int(batch),):
        assert run(small, feeds(size))["y"].shape == (size, 3)


def test_an_unchanged_model_keeps_the_detour() -> None:
    model = pooled()
    emitted = cipm_ir.load(model).emit()
    assert [node.op_type for node in emitted.graph] == [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(("batch", "fixed"), [("N", 0), ("2", 2)])
def test_a_gather_that_reorders_is_no_detour(batch: str, fixed: int) -> None:
    """Negative control: the same graph with the positions in another order is left alone, and nothing is claimed."""
    model = pooled(batch, steps=5, fixed=fixed)
    program = cipm_ir.load(model)
    assert "Gather" in {node.op_type for node in program.model.graph}
    moved = program.act({s: s.random(np.random.default_rng(3)) for s in program.spaces})
    assert verify_models(program.emit(), moved.emit())


def test_compress_prunes_what_the_pooling_hid() -> None:
    result = cipm_ir.optimize(pooled(), "compress{macs=0.6}", data=feeds(50))
    assert result.program.spaces[0].size < UNITS


def test_workers_get_weights_that_lie_beside_the_model(tmp_path: Path) -> None:
    """torch's exporter writes external data whatever the size; a worker does not stand in the model's folder."""
    model = pooled()
    path = tmp_path / "model.onnx"
    onnx.save(pooled(), path, save_as_external_data=True, size_threshold=0, location="model.data")
    program = cipm_ir.load(path)
    sent = unpack(pack(program.model))
    (tmp_path / "model.data").unlink()
    np.testing.assert_array_equal(run(sent, feeds(2))["y"], run(cipm_ir.load(model).emit(), feeds(2))["y"])


def test_nan_in_the_data_names_the_input_and_the_sample() -> None:
    data = feeds(80)
    data["x"][70, 0, 1, 1] = np.nan
    with pytest.raises(InputError, match="input 'x' is so already, first on sample 70"):
        cipm_ir.statistics(pooled(), data)


def test_nan_that_the_model_makes_blames_no_input() -> None:
    model = pooled()
    weight = next(t for t in model.graph.initializer if t.name == "w")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.full((UNITS, 1, 3, 3), 3e38, np.float32), "w"))
    with pytest.raises(InputError, match="repair the model, or leave these samples out"):
        cipm_ir.statistics(model, feeds(3))


def test_too_much_to_keep_is_said() -> None:
    with pytest.raises(SymmetryError, match="min_keep and round_to leave no choice"):
        cipm_ir.optimize(pooled(), "compress{macs=0.5, min_keep=100}", data=feeds(20))
