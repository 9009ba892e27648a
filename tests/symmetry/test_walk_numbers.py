"""Sizes that a graph computes by itself keep the axes behind them free: positions, masks, first states, paddings."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import cipm_ir

HEAD = '<ir_version: 8, opset_import: ["" : 17]>\n'


def filled(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """The model with random weights of these shapes in place of those inputs."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        array = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    kept = [v for v in model.graph.input if v.name not in shapes]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    onnx.checker.check_model(model)
    return model


def masked_recurrence() -> onnx.ModelProto:
    """A mask from the lengths, as exporters write it; a GRU whose first state takes its size behind it."""
    text = """recurrence (float[B,T,8] x, int64[B] lengths, float[8,12] w, float[1,48,12] wx, float[1,48,16] wh,
                         float[16,16] out) => (float[B,16] y) {
        one = Constant <value = int64[1] {1}> ()
        start = Constant <value_int = 0> ()
        step = Constant <value_int = 1> ()
        sizes = Shape (x)
        steps = Gather <axis = 0> (sizes, step)
        positions = Range (start, steps, step)
        zero_axis = Constant <value = int64[1] {0}> ()
        row = Unsqueeze (positions, zero_axis)
        column = Unsqueeze (lengths, one)
        inside = Less (row, column)
        mask = Cast <to = 1> (inside)
        two_axis = Constant <value = int64[1] {2}> ()
        mask3 = Unsqueeze (mask, two_axis)
        h = MatMul (x, w)
        r = Relu (h)
        m = Mul (mask3, r)
        samples = Gather <axis = 0> (sizes, start)
        order = Range (start, samples, step)
        picked = Gather <axis = 0> (m, order)
        s = Transpose <perm = [1, 0, 2]> (picked)
        after = Shape (s)
        batch = Gather <axis = 0> (after, step)
        batch1 = Unsqueeze (batch, zero_axis)
        units = Constant <value = int64[1] {16}> ()
        target = Concat <axis = 0> (one, batch1, units)
        first = ConstantOfShape <value = float[1] {0}> (target)
        all, last = GRU <hidden_size = 16> (s, wx, wh, , , first)
        y1 = Squeeze (last, zero_axis)
        y = MatMul (y1, out)
    }"""
    model = onnx.parser.parse_model(HEAD + text)
    return filled(model, {"w": (8, 12), "wx": (1, 48, 12), "wh": (1, 48, 16), "out": (16, 16)})


def padded(length: str) -> onnx.ModelProto:
    """What torch's exporter writes for ``F.pad(h, (0, 4))``: the pairs are turned round by Slice and Transpose."""
    text = f"""pad (float[2,3,{length}] x, float[6,3,1] w, float[5,6,3] v) => (float[2,5,L] y) {{
        h = Conv (x, w)
        given = Constant <value = int64[2] {{0, 4}}> ()
        count = Constant <value = int64[1] {{4}}> ()
        rest = ConstantOfShape <value = int64[1] {{0}}> (count)
        flat = Concat <axis = 0> (given, rest)
        pair = Constant <value = int64[2] {{-1, 2}}> ()
        pairs = Reshape (flat, pair)
        begin = Constant <value = int64[1] {{-1}}> ()
        end = Constant <value = int64[1] {{-9223372036854775807}}> ()
        zero = Constant <value = int64[1] {{0}}> ()
        turned = Slice (pairs, begin, end, zero, begin)
        onnx = Transpose <perm = [1, 0]> (turned)
        line = Reshape (onnx, begin)
        pads = Cast <to = 7> (line)
        p = Pad (h, pads)
        r = Relu (p)
        y = Conv (r, v)
    }}"""
    return filled(onnx.parser.parse_model(HEAD + text), {"w": (6, 3, 1), "v": (5, 6, 3)})


@pytest.mark.parametrize(
    ("model", "units"),
    [(masked_recurrence(), {12, 16}), (padded("20"), {6}), (padded("T"), {6})],
    ids=["mask of positions", "padding, fixed length", "padding, open length"],
)
def test_axes_behind_computed_sizes_are_free(model: onnx.ModelProto, units: set[int]) -> None:
    program = cipm_ir.load(model)
    assert not program.opaque
    assert {space.size for space in program.spaces if space.kind == "units"} == units
    rng = np.random.default_rng(1)
    moved = program.act({space: space.random(rng) for space in program.spaces})
    assert cipm_ir.verify(model, moved.emit()).ok
    half = program.restrict({space: np.arange(space.size // 2) for space in program.spaces})
    assert cipm_ir.optimize(half.emit(), ["canonicalize"], verify="strict").witness


def test_the_comparison_sees_a_moved_unit() -> None:
    """The negative control: units that move in one weight alone."""
    model, other = masked_recurrence(), masked_recurrence()
    weight = next(w for w in other.graph.initializer if w.name == "w")
    turned = np.roll(onnx.numpy_helper.to_array(weight), 1, axis=1)
    weight.CopyFrom(onnx.numpy_helper.from_array(turned, "w"))
    assert not cipm_ir.verify(model, other).ok


MOVES = {
    "none": "v = DequantizeLinear (w, s, z)",
    "Identity": "m = Identity (w) v = DequantizeLinear (m, s, z)",
    "Transpose": "t = Transpose <perm = [1, 0]> (w) m = Transpose <perm = [1, 0]> (t) v = DequantizeLinear (m, s, z)",
    "Reshape": "all = Constant <value = int64[2] {6, -1}> () m = Reshape (w, all) v = DequantizeLinear (m, s, z)",
    "Cast": "m = Cast <to = 3> (w) v = DequantizeLinear (m, s, z)",
}


def quantized(move: str) -> onnx.ModelProto:
    """A small weight in 8 bits behind an operator that a chain of sizes might have, too."""
    text = f"""quantized (float[N,6] x, int8[6,8] w, int8[8,5] w2) => (float[N,5] y) {{
        s = Constant <value = float {{0.01}}> ()
        z = Constant <value = int8 {{0}}> ()
        {MOVES[move]}
        h = MatMul (x, v)
        r = Relu (h)
        v2 = DequantizeLinear (w2, s, z)
        y = MatMul (r, v2)
    }}"""
    model = onnx.parser.parse_model(HEAD + text)
    rng = np.random.default_rng(0)
    for name, shape in {"w": (6, 8), "w2": (8, 5)}.items():
        array = rng.integers(-100, 100, shape).astype(np.int8)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    del model.graph.input[1:]
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("move", MOVES)
def test_small_quantized_weights_are_no_sizes(move: str) -> None:
    program = cipm_ir.load(quantized(move))
    (space,) = program.spaces
    assert space.size == 8
    moved = program.act({space: space.random(np.random.default_rng(1))})
    assert cipm_ir.verify(program.emit(), moved.emit()).ok
    small = program.restrict({space: np.array([0, 2, 5])}).emit()
    plain = cipm_ir.load(quantized("none"))
    wanted = plain.restrict({plain.spaces[0]: np.array([0, 2, 5])}).emit()
    assert cipm_ir.verify(wanted, small).ok
    other = plain.restrict({plain.spaces[0]: np.array([0, 2, 6])}).emit()
    assert not cipm_ir.verify(other, small).ok
