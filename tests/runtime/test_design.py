"""Products as matrix problems: unfolded rows times the matrix against onnxruntime; sums of squares against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import array_of, gap, program, values
from tests.zoo.net import Net

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.passes.pruning.refit.layers import layers_of
from cipm_ir.runtime.activations.linear_geometry import LinearOpGeometry, NormalEquations, sample_places
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import WeightConsumer, products

Array = NDArray[Any]


def only(net: Net) -> tuple[Program, WeightConsumer, LinearOpGeometry]:
    """The one product of a net."""
    made = program(net)
    (reader,) = products(made, every=True)
    return made, reader, LinearOpGeometry.of(made, reader)


def compare(net: Net, data: Array, places: Array | None = None) -> tuple[Array, Array]:
    """Rows of the product: unfolded by us, and as onnxruntime gives them."""
    made, reader, linear = only(net)
    u, y = values(made, {"x": data}, reader.source, reader.output) if reader.source != "x" else (
        data.astype(np.float64),
        *values(made, {"x": data}, reader.output),
    )  # fmt: skip
    bias = 0.0 if reader.bias is None else array_of(made, reader.bias).astype(np.float64)
    matrix = linear.matrix(array_of(made, reader.weight)).astype(np.float64)
    assert linear.inputs(u, places).shape[1] == linear.size and matrix.shape == (linear.size, linear.width)
    return linear.inputs(u, places) @ matrix + bias, linear.outputs(y, places)


ROWS = {
    "matrix": LinearOpGeometry((6, 8), 1),
    "convolution": LinearOpGeometry((6, 8, 1, 1), 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
}


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_16_bit_values_are_multiplied_in_32(kind: str, control: bool, rng: np.random.Generator) -> None:
    """The control multiplies rows of 16 bits, which rounds to 11 bits."""
    linear = ROWS[kind]
    grid = (3, 3) if linear.kernel else ()
    u, y = (rng.standard_normal((200, width, *grid)).astype(np.float16) for width in (8, 6))
    x = linear.inputs(u)
    assert x.dtype == linear.outputs(y).dtype == np.float32
    matrix = rng.standard_normal((8, 6))
    exact = x.astype(np.float64) @ matrix
    x = x.astype(np.float16) if control else x
    assert (np.abs(x @ matrix.astype(x.dtype) - exact).max() < 1e-5) == (not control)


def conv(rank: int, kernel: list[int], size: list[int], **attributes: Any) -> Net:
    net = Net(f"conv{rank}{kernel}{sorted(attributes.items())}")
    weight = net.weight((5, 3, *kernel), 3 * int(np.prod(kernel)))
    y = net.op("Conv", net.input("x", ["N", 3, *size]), weight, net.bias(5), kernel_shape=kernel, **attributes)
    net.output(y, ["N", 5, *["s"] * rank])
    return net


CONVS = [
    (1, [3], [9], {"pads": [1, 1]}),
    (1, [4], [11], {"pads": [0, 3], "strides": [2], "dilations": [2]}),
    (2, [1, 1], [4, 5], {}),
    (2, [3, 3], [6, 6], {"pads": [1, 1, 1, 1]}),
    (2, [3, 2], [7, 6], {"pads": [2, 0, 1, 1], "strides": [2, 1]}),
    (2, [2, 3], [9, 8], {"pads": [1, 0, 0, 2], "dilations": [3, 2]}),
    (2, [3, 3], [6, 6], {"auto_pad": "VALID"}),
    (3, [2, 3, 1], [5, 4, 3], {"pads": [1, 0, 0, 0, 2, 1], "strides": [1, 2, 1], "dilations": [2, 1, 1]}),
]


@pytest.mark.parametrize(("rank", "kernel", "size", "attributes"), CONVS)
def test_convolutions(rank: int, kernel: list[int], size: list[int], attributes: dict[str, Any], rng: Any) -> None:
    x = rng.standard_normal((3, 3, *size)).astype(np.float32)
    ours, theirs = compare(conv(rank, kernel, size, **attributes), x)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    places = np.asarray([0, len(ours) // 3 - 1])  # the corners: padding on either side
    ours, theirs = compare(conv(rank, kernel, size, **attributes), x, places)
    assert len(ours) == 3 * 2
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_convolutions_in_groups(rng: np.random.Generator) -> None:
    """The matrix has zeros outside the blocks, and the weight comes back from it."""
    for groups, inner, outer, rank in ((2, 3, 4, 2), (4, 2, 1, 2), (3, 2, 2, 1), (2, 2, 3, 3)):
        net = Net(f"groups{groups}{rank}")
        weight = net.weight((groups * outer, inner, *[3] * rank), 9)
        x = net.input("x", ["N", groups * inner, *[6] * rank])
        y = net.op(
            "Conv", x, weight, net.bias(groups * outer), group=groups, pads=[1] * 2 * rank, kernel_shape=[3] * rank
        )
        net.output(y, ["N", groups * outer, *["s"] * rank])
        data = rng.standard_normal((2, groups * inner, *[6] * rank)).astype(np.float32)
        ours, theirs = compare(net, data)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        made, reader, linear = only(net)
        array = array_of(made, reader.weight)
        np.testing.assert_array_equal(linear.weight(linear.matrix(array)), array)
        rows, outputs = linear.blocks or pytest.fail("it has groups")
        assert not linear.matrix(array)[rows[:, None] != outputs].any()


def test_random_transposed_convolutions(rng: np.random.Generator) -> None:
    """Whatever the geometry, as long as padding takes no more away than the kernel adds."""
    tried = 0
    for _ in range(60):
        rank = int(rng.integers(1, 4))
        kernel, strides, dilations = (rng.integers(1, 4, rank).tolist() for _ in range(3))
        reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = [int(rng.integers(0, n + 1)) for n in (*reach, *reach)]
        more = [int(rng.integers(0, max(s, d))) for s, d in zip(strides, dilations, strict=True)]
        net = Net(f"transposed{_}")
        weight = net.weight((3, 5, *kernel), 9)
        size = [int(n) for n in rng.integers(3, 6, rank)]
        y = net.op(
            "ConvTranspose", net.input("x", ["N", 3, *size]), weight, net.bias(5), kernel_shape=kernel, pads=pads,
            strides=strides, dilations=dilations, output_padding=more,
        )  # fmt: skip
        net.output(y, ["N", 5, *["s"] * rank])
        made, reader, linear = only(net)
        array = array_of(made, reader.weight)
        np.testing.assert_array_equal(linear.weight(linear.matrix(array)), array)
        try:
            ours, theirs = compare(net, rng.standard_normal((2, 3, *size)).astype(np.float32))
        except InputError:  # onnxruntime refuses some output paddings, and sizes of nothing
            continue
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
        tried += 1
    assert tried > 30


@pytest.mark.parametrize("attributes", [{"output_shape": [9, 9]}, {"pads": [3, 0, 0, 0]}, {"auto_pad": "SAME_UPPER"}])
def test_other_transposed_convolutions_are_refused(attributes: dict[str, Any]) -> None:
    net = Net("transposed")
    y = net.op(
        "ConvTranspose", net.input("x", ["N", 3, 5, 5]), net.weight((3, 4, 3, 3), 9), strides=[2, 2], **attributes
    )
    net.output(y, ["N", 4, "h", "w"])
    made = program(net)
    (reader,) = products(made, every=True)
    with pytest.raises(UnsupportedError):
        LinearOpGeometry.of(made, reader)
    assert not layers_of(made)


def test_random_convolutions(rng: np.random.Generator) -> None:
    """Whatever the geometry."""
    for _ in range(40):
        rank = int(rng.integers(1, 4))
        kernel, strides, dilations = (rng.integers(1, 4, rank).tolist() for _ in range(3))
        pads = rng.integers(0, 3, 2 * rank).tolist()
        size = [int(d * (k - 1) + 1 + rng.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
        net = conv(rank, kernel, size, pads=pads, strides=strides, dilations=dilations)
        ours, theirs = compare(net, rng.standard_normal((2, 3, *size)).astype(np.float32))
        np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_control_mirrored_pads_are_seen(rng: np.random.Generator) -> None:
    """Begins and ends of the pads exchanged: the comparison fails."""
    net = conv(2, [3, 3], [6, 6], pads=[2, 0, 0, 2])
    made, reader, linear = only(net)
    turned = LinearOpGeometry(linear.shape, linear.axis, linear.kernel, linear.strides, (0, 2, 2, 0), linear.dilations)
    x = rng.standard_normal((3, 3, 6, 6)).astype(np.float32)
    y = linear.outputs(*values(made, {"x": x}, reader.output))
    weight, bias = array_of(made, reader.weight), array_of(made, reader.bias or "")
    assert gap(y, linear.inputs(x) @ linear.matrix(weight) + bias) < 1e-9
    assert gap(y, turned.inputs(x) @ linear.matrix(weight) + bias) > 1e-2


MATRICES: list[tuple[str, tuple[int, ...]]] = [(kind, (4,)) for kind in ("gemm0", "gemm1", "gemm-turned")]
MATRICES += [(kind, lead) for kind in ("matmul", "matmul-turned") for lead in ((4,), (4, 5), (2, 3, 4))]


@pytest.mark.parametrize(("kind", "lead"), MATRICES)
def test_matrices(kind: str, lead: tuple[int, ...], rng: np.random.Generator) -> None:
    net = Net(kind)
    x = net.input("x", [*("N", "a", "b")[: len(lead)], 6])
    if kind.startswith("gemm"):
        trans = int(kind != "gemm0")
        weight = net.weight((6, 7) if kind != "gemm1" else (7, 6), 6)
        weight = net.op("Transpose", weight, perm=[1, 0]) if kind == "gemm-turned" else weight
        y = net.op("Gemm", x, weight, net.bias(7), transB=trans)
    else:
        weight = net.weight((7, 6) if kind == "matmul-turned" else (6, 7), 6)
        y = net.op("MatMul", x, net.op("Transpose", weight) if kind == "matmul-turned" else weight)
    net.output(y, [*("N", "a", "b")[: len(lead)], 7])
    data = rng.standard_normal((*lead, 6)).astype(np.float32)
    ours, theirs = compare(net, data)
    assert ours.shape == (int(np.prod(lead)), 7)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    ours, theirs = compare(net, data, np.asarray([1, 3]))
    assert len(ours) == 2
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("rank", "kernel", "size", "attributes"), CONVS[::3])
def test_weights_come_back_and_rows_are_those_of_their_elements(
    rank: int, kernel: list[int], size: list[int], attributes: dict[str, Any], rng: Any
) -> None:
    made, reader, linear = only(conv(rank, kernel, size, **attributes))
    weight = array_of(made, reader.weight)
    np.testing.assert_array_equal(linear.weight(linear.matrix(weight)), weight)
    assert linear.positions(rng.standard_normal((2, 3, *size))) * 2 == len(linear.inputs(np.ones((2, 3, *size))))
    matrix = linear.matrix(weight)
    matrix[linear.rows_of(np.asarray([[2], [0]]))[0]] = 0.0
    wanted = weight.copy()
    wanted[:, 2] = 0.0
    np.testing.assert_array_equal(linear.weight(matrix), wanted)


def test_same_padding_is_refused() -> None:
    net = conv(2, [3, 3], [6, 6], auto_pad="SAME_UPPER")
    with pytest.raises(UnsupportedError, match="auto_pad SAME_UPPER; give it pads"):
        only(net)


def test_places_are_drawn_without_repeats(rng: np.random.Generator) -> None:
    assert sample_places(5, None, rng) is None is sample_places(5, 5, rng)
    places = sample_places(50, 7, rng)
    assert places is not None and len(set(places.tolist())) == 7 and (np.diff(places) > 0).all()


# ---------------------------------------------------------------- sums
def moments(x: Array, y: Array, centred: bool) -> tuple[Array, Array]:
    a, b = x.astype(np.float64), y.astype(np.float64)
    if centred:
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return a.T @ a / len(a), a.T @ b / len(a)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("centred", [True, False])
def test_sums_are_exact_even_far_from_zero(mean: float, centred: bool, rng: np.random.Generator) -> None:
    x = (mean + rng.standard_normal((20_000, 6)) @ rng.standard_normal((6, 6))).astype(np.float32)
    y = (x[:, :3] - 0.3 * x[:, 3:] + 5.0).astype(np.float32)
    sums = NormalEquations(6, 3)
    for k in (0, 10, 9_000):
        stop = {0: 10, 10: 9_000, 9_000: 20_000}[k]
        sums.add(x[k:stop], y[k:stop])
    sums.add(x[:0], y[:0])
    gram, cross = moments(x, y, centred)
    assert sums.rows == 20_000
    scale = np.abs(gram).max()
    np.testing.assert_allclose(sums.gram(centred=centred), gram, atol=3e-6 * scale)
    np.testing.assert_allclose(sums.cross(centred=centred), cross, atol=3e-6 * scale)
    sums.retarget(x, -2 * y)
    np.testing.assert_allclose(sums.cross(centred=centred), -2 * cross, atol=6e-6 * scale)
    np.testing.assert_allclose(sums.y, -2 * y.sum(axis=0, dtype=np.float64), rtol=1e-6)


def test_control_plain_sums_lose_the_variance(rng: np.random.Generator) -> None:
    """What the test above would not let pass: products in the rows' precision, centred afterwards."""
    x = (1e4 + rng.standard_normal((20_000, 6))).astype(np.float32)
    mean = x.mean(axis=0, dtype=np.float64)
    plain = (x.T @ x).astype(np.float64) / len(x) - np.outer(mean, mean)
    gram, _ = moments(x, x, True)
    assert np.abs(plain - gram).max() > 1e-2 * np.abs(gram).max()


def test_sums_without_targets_and_of_nothing() -> None:
    sums = NormalEquations(2, 1)
    assert not sums.gram(centred=True).any() and not sums.cross(centred=False).any()
    sums.add(np.asarray([[1.0, 2.0], [3.0, 4.0]], np.float32), None)
    np.testing.assert_allclose(sums.gram(centred=False), [[5, 7], [7, 10]])
    np.testing.assert_allclose(sums.gram(centred=True), [[1, 1], [1, 1]], atol=1e-12)
    assert not sums.cross(centred=True).any()


def test_rows_of_half_precision_are_summed_in_single() -> None:
    sums = NormalEquations(1, 1)
    sums.add(np.full((70_000, 1), 300.0, np.float16), np.full((70_000, 1), 2.0, np.float16))
    assert sums.gram(centred=False)[0, 0] == pytest.approx(9e4)
    assert sums.cross(centred=False)[0, 0] == pytest.approx(600)
