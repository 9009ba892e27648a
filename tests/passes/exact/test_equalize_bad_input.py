"""What `equalize` makes of weights that it should not touch: it leaves them alone or says why, and is never wrong."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from tests.benchmarks.bit_exact_table import largest_delta, program_of, random_gauge, run
from tests.zoo.net import Net

from cipm_ir.errors import InputError, OptionError
from cipm_ir.passes.exact.equalize.equalize import Equalize
from cipm_ir.passes.framework.base import Context, PassResult
from cipm_ir.passes.framework.pipeline import run_passes

Array = NDArray[Any]
WIDTH = 8


def weights(rng: np.random.Generator, layers: int = 2, spread: float = 2.0) -> list[Array]:
    """Matrices (in, out) of an MLP in a bad gauge: units differ by e^N(0, spread^2)."""
    sizes = [5, *[WIDTH] * layers, 3]
    made = [rng.standard_normal((a, b)) / np.sqrt(a) for a, b in pairwise(sizes)]
    for first, second in pairwise(made):
        scale = np.exp(spread * rng.standard_normal(WIDTH))
        first *= scale
        second /= scale[:, None]
    return made


def mlp(arrays: list[Array], act: str = "Relu", dtype: Any = "float32") -> onnx.ModelProto:
    """x @ w, act, ... without biases, every matrix as it is given."""
    net = Net("equalize_bad", dtype=dtype)
    h = net.input("x", ["N", len(arrays[0])])
    for k, array in enumerate(arrays):
        name = net.const(np.asarray(array, net.dtype), f"w{k}")
        h = net.op("MatMul", h, name)
        if k + 1 < len(arrays):
            h = net.op("Mul", h, h) if act == "Square" else net.op(act, h)
    net.output(h, ["N", arrays[-1].shape[1]])
    return net.model()


def equalized(model: onnx.ModelProto, data: Any = None, **options: Any) -> PassResult:
    return Equalize(**options).run(program_of(model), Context(data=data))


def feeds(model: onnx.ModelProto, size: float = 1.0, count: int = 16) -> dict[str, Array]:
    width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    dtype = onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    return {"x": (size * np.random.default_rng(1).standard_normal((count, width))).astype(dtype)}


def arrays_of(result: PassResult) -> list[Array]:
    return [numpy_helper.to_array(t) for t in ir.to_proto(result.program.emit()).graph.initializer]


def delta(model: onnx.ModelProto, result: PassResult, size: float = 1.0) -> float:
    given = feeds(model, size)
    before, after = run(model, given), run(ir.to_proto(result.program.emit()), given)
    assert all(np.isfinite(y).all() for y in before), "the model itself overflows: the test says nothing"
    return largest_delta(before, after)


def scale_of(result: PassResult, space: int = 0) -> Array:
    """(units,) scales of one space, 1 where the witness lacks it."""
    name = result.program.spaces[space].name
    entry = result.witness.get(name)
    return np.ones(WIDTH) if entry is None else np.asarray(entry["scale"]).reshape(-1, WIDTH)[0]


# ---------------------------------------------------------------- zeros and what is no number
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("where", ["row", "column", "both"])
def test_dead_units_stay(where: str, per: str, rng: np.random.Generator) -> None:
    made = weights(rng)
    if where != "column":
        made[0][:, 3] = 0.0
    if where != "row":
        made[1][3] = 0.0
    model = mlp(made)
    result = equalized(model, per=per)
    assert result.changed and scale_of(result)[3] == 1.0
    assert all(np.isfinite(a).all() for a in arrays_of(result))
    assert delta(model, result) == 0.0


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_matrix_of_zeros(which: int, rng: np.random.Generator) -> None:
    made = weights(rng)
    made[which][:] = 0.0
    model = mlp(made)
    assert delta(model, equalized(model)) == 0.0


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_weights_that_are_no_numbers_are_left_alone(bad: float, rng: np.random.Generator) -> None:
    made = weights(rng, layers=3)
    made[3][2, 1] = bad
    model = mlp(made)
    result = equalized(model)
    assert result.changed, "the other layers can be equalized"
    assert np.array_equal(arrays_of(result)[3], made[3].astype(np.float32), equal_nan=True)
    assert scale_of(result, 2).tolist() == [1.0] * WIDTH
    given = feeds(model)
    assert largest_delta(run(model, given), run(ir.to_proto(result.program.emit()), given)) == 0.0


def test_a_pipeline_refuses_or_keeps_nan_weights(rng: np.random.Generator) -> None:
    made = weights(rng)
    made[1][2, 1] = np.nan
    try:
        outcome = run_passes(program_of(mlp(made)), "equalize")
    except InputError as error:
        assert "NaN" in str(error) or "finite" in str(error)
    else:
        assert outcome.report.steps[0].verification is None or outcome.report.steps[0].verification.max_abs == 0.0


# ---------------------------------------------------------------- the ends of the range
def extreme(rng: np.random.Generator, value: float, unit: int = 2) -> list[Array]:
    """A bad gauge in which one unit has an entry of this size and one of ordinary size."""
    made = weights(rng)
    made[0][:, unit] = rng.standard_normal(5)
    made[1][unit] = rng.standard_normal(WIDTH)
    made[1][unit, 0] = value
    return made


@pytest.mark.parametrize("value", [1e-45, 1e-40, 1.2e-38, 3e38, -3.4e38])
@pytest.mark.parametrize("pull", [1e-4, 1.0, 1e4])
def test_the_ends_of_float32(value: float, pull: float, rng: np.random.Generator) -> None:
    """Nothing overflows, and no bit of a subnormal is lost, whichever way the other weights pull."""
    made = extreme(rng, value)
    made[0][:, 2] *= pull
    model = mlp(made)
    before = [a.astype(np.float32).astype(np.float64) for a in made]
    result = equalized(model)
    after = [a.astype(np.float64) for a in arrays_of(result)]
    scale = scale_of(result)
    assert np.array_equal(before[0] * scale, after[0]), "a weight was rounded"
    assert all(np.isfinite(a).all() for a in after)
    assert np.array_equal(after[1] * scale[:, None] / scale_of(result, 1), before[1])


def test_denormal_weights_throughout(rng: np.random.Generator) -> None:
    made = weights(rng)
    made[0] *= 1e-39
    model = mlp(made)
    result = equalized(model)
    assert delta(model, result, size=1e30) == 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15, 1e30])
def test_layers_of_very_different_size(size: float, rng: np.random.Generator) -> None:
    made = weights(rng)
    made[0] *= size
    made[1] /= size
    model = mlp(made)
    assert delta(model, equalized(model)) == 0.0
    back = equalized(model, exact=False)
    given = feeds(model)
    before, after = run(model, given)[0], run(ir.to_proto(back.program.emit()), given)[0]
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("bias", [1e33, 1e-36, 1e-44])
@pytest.mark.parametrize("size", [2.0**-22, 2.0**22])
def test_a_bias_at_the_ends_of_the_range(bias: float, size: float, rng: np.random.Generator) -> None:
    """A row asks for a large scale, which its bias cannot take."""
    net = Net("equalize_bias")
    first, second = rng.standard_normal((5, WIDTH)), rng.standard_normal((WIDTH, 3))
    first[:, 2] *= size
    second[2] /= size
    values = 0.1 * rng.standard_normal(WIDTH)
    values[2] = bias
    h = net.op("MatMul", net.input("x", ["N", 5]), net.const(first, "first"))
    h = net.relu(net.op("Add", h, net.const(values, "bias")))
    net.output(net.op("MatMul", h, net.const(second, "second")), ["N", 3])
    model = net.model()
    result = equalized(model)
    old = numpy_helper.to_array(model.graph.initializer[1]).astype(np.float64)
    new = arrays_of(result)[1].astype(np.float64)
    assert np.array_equal(old * scale_of(result), new), "the bias was rounded, or overflows"


def test_degrees_multiply(rng: np.random.Generator) -> None:
    """Three squares in a row take a scale to its eighth power: values must not overflow behind them."""
    made = weights(rng, layers=3, spread=0.0)
    made[0][:, 1] *= 2.0**-13
    made[1] *= np.exp(3 * rng.standard_normal((WIDTH, 1)))
    model = mlp(made, act="Square")
    assert delta(model, equalized(model)) == 0.0


# ---------------------------------------------------------------- other types
def test_double(rng: np.random.Generator) -> None:
    model = mlp(weights(rng), dtype="float64")
    result = equalized(model)
    assert result.changed and delta(model, result) == 0.0


def test_float16_stays_unless_scales_may_be_real(rng: np.random.Generator) -> None:
    model = mlp(weights(rng, spread=1.0), dtype="float16")
    assert not equalized(model).changed
    result = equalized(model, exact=False)
    assert all(np.isfinite(a).all() for a in arrays_of(result))
    assert delta(model, result) <= 5e-3 * np.abs(run(model, feeds(model))[0]).max()


def test_float16_near_its_largest_number(rng: np.random.Generator) -> None:
    """Real scales in half precision: a result that overflows is undone by the pipeline, not handed on."""
    made = [rng.standard_normal((5, WIDTH)) * 2.0**-6, rng.standard_normal((WIDTH, WIDTH)) * 2.0**-9]
    made += [rng.standard_normal((WIDTH, 3)) * 2.0**12]
    model = mlp(made, dtype="float16")
    result = equalized(model, exact=False)
    given = feeds(model)
    before, after = run(model, given)[0], run(ir.to_proto(result.program.emit()), given)[0]
    assert np.isfinite(before).all() and np.isfinite(after).all()
    wide = before.astype(np.float64)
    assert np.abs(wide - after).max() <= 2e-2 * np.abs(wide).max()


def test_bfloat16(rng: np.random.Generator) -> None:
    """onnxruntime has no bfloat16 kernels on the CPU, so the weights are compared: each is scaled, none rounded."""
    made = [a.astype(ml_dtypes.bfloat16) for a in weights(rng)]
    net = Net("equalize_bfloat16")
    net.dtype = np.dtype(ml_dtypes.bfloat16)
    h = net.input("x", ["N", 5], TensorProto.BFLOAT16)
    for k, array in enumerate(made):
        net.initializers.append(ir.to_proto(ir.tensor(array, name=f"w{k}")))
        h = net.op("MatMul", h, f"w{k}")
        h = net.relu(h) if k < 2 else h
    net.output(h, ["N", 3], TensorProto.BFLOAT16)
    result = Equalize().run(program_of(net.model()), Context())
    scales = [np.ones(5), scale_of(result), scale_of(result, 1), np.ones(3)]
    assert result.changed and (scales[1] != 1).any()
    initializers = result.program.model.graph.initializers
    for k, array in enumerate(made):
        tensor = initializers[f"w{k}"].const_value
        assert tensor is not None and tensor.dtype == ir.DataType.BFLOAT16
        want = array.astype(np.float64) * scales[k + 1] / scales[k][:, None]
        assert np.array_equal(tensor.numpy().astype(np.float64), want)


def test_integer_weights(rng: np.random.Generator) -> None:
    """A weight of integers, cast behind the initializer, is none that can be scaled; what is around it can."""
    net = Net("equalize_integers")
    made = weights(rng, layers=3)
    h = net.input("x", ["N", 5])
    for k, array in enumerate(made):
        if k == 1:
            whole = net.const(rng.integers(-9, 9, array.shape), "whole", np.int8)
            w = net.op("Cast", whole, to=TensorProto.FLOAT)
        else:
            w = net.const(array, f"w{k}")
        h = net.op("MatMul", h, w)
        h = net.relu(h) if k < 3 else h
    net.output(h, ["N", 3])
    model = net.model()
    result = equalized(model)
    assert delta(model, result) == 0.0
    held = [a for a in arrays_of(result) if a.dtype == np.int8]
    assert len(held) == 1 and np.array_equal(held[0], numpy_helper.to_array(model.graph.initializer[1]))


# ---------------------------------------------------------------- data and options
def test_data_that_does_not_fit_or_is_no_number(rng: np.random.Generator) -> None:
    model = mlp(weights(rng))
    with pytest.raises(InputError):
        equalized(model, data={"x": np.zeros((4, 6), np.float32)})
    with pytest.raises(InputError, match="NaN"):
        equalized(model, data={"x": np.full((4, 5), np.nan, np.float32)})
    with pytest.raises(InputError):
        equalized(model, data={"y": np.zeros((4, 5), np.float32), "z": np.zeros((4, 5), np.float32)})


def test_data_of_zeros_and_of_one_sample(rng: np.random.Generator) -> None:
    model = mlp(weights(rng))
    for data in (np.zeros((4, 5), np.float32), np.ones((1, 5), np.float32), 1e-30 * np.ones((3, 5), np.float32)):
        result = equalized(model, data={"x": data})
        assert all(np.isfinite(a).all() for a in arrays_of(result))
        assert delta(model, result) == 0.0


@pytest.mark.parametrize("options", [{"per": "row"}, {"alpha": 1.5}, {"alpha": -0.1}, {"samples": 0}])
def test_options(options: dict[str, Any], rng: np.random.Generator) -> None:
    with pytest.raises(OptionError):
        Equalize(**options)


def test_nothing_to_scale() -> None:
    model = mlp([np.ones((5, WIDTH)), np.ones((WIDTH, 3))], act="Sigmoid")
    result = equalized(model)
    assert not result.changed and result.program.spaces


def test_a_wrong_scale_would_be_seen(rng: np.random.Generator) -> None:
    """Negative control: the comparison of outputs notices a column that was not scaled back."""
    model = mlp(weights(rng))
    moved = random_gauge(program_of(model))
    broken = ir.to_proto(moved.emit())
    broken.graph.initializer[1].CopyFrom(model.graph.initializer[1])
    given = feeds(model)
    assert largest_delta(run(model, given), run(broken, given)) > 1e-3
