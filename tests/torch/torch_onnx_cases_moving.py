"""More rows: operators that reduce, move, select, resize, recur, attend and quantize."""

from __future__ import annotations

import numpy as np
import onnx
from tests.torch.torch_onnx_cases import Const, add, draw, scalar, weight, whole

FAR = 2**62


def reduction() -> None:
    for op in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare"):
        add(f"reduce_{op.lower()}", f"Reduce{op}", draw(2, 3, 4), [-1, 0], keepdims=0)
        add(f"reduce_{op.lower()}_old", f"Reduce{op}", draw(2, 3, 4), opset=11, axes=[1])
        add(f"reduce_{op.lower()}_all", f"Reduce{op}", draw(2, 3, 4))
    add("reduce_logsum", "ReduceLogSum", draw(2, 3, low=0.5), [1])
    add("reduce_noop", "ReduceSum", draw(2, 3), noop_with_empty_axes=1)
    for op in ("Sum", "Prod", "Max"):
        add(f"reduce_{op.lower()}_integers", f"Reduce{op}", whole(3, 4, dtype=np.int32), [0])
    for op in ("ArgMax", "ArgMin"):
        ties = whole(4, 6, low=0, high=2).astype(np.float32)
        add(f"{op.lower()}_first", op, ties, axis=1, keepdims=0)
        add(f"{op.lower()}_last", op, ties, axis=-1, select_last_index=1)
    ties = whole(4, 6, low=0, high=3).astype(np.float32)
    add("top_k_ties", "TopK", ties, [3], n=2)
    add("top_k_smallest", "TopK", ties, [2], n=2, axis=0, largest=0)
    for exclusive in (0, 1):
        for reverse in (0, 1):
            name = f"cumulative_{exclusive}{reverse}"
            add(name, "CumSum", draw(3, 4), 1, exclusive=exclusive, reverse=reverse)
    add("cumulative_integers", "CumSum", whole(3, 4, dtype=np.int32), 0)
    for op in ("Softmax", "LogSoftmax", "Hardmax"):
        add(f"{op.lower()}_old", op, draw(2, 3, 4), opset=11)
        add(f"{op.lower()}_old_axis", op, draw(2, 3, 2, 2), opset=11, axis=2)
        add(f"{op.lower()}_axis", op, draw(2, 3, 4), axis=1)


def shaping() -> None:
    add("reshape_copies", "Reshape", draw(2, 3, 4), [0, -1, 2])
    add("reshape_allowzero", "Reshape", draw(0, 3), [3, 0], allowzero=1)
    add("reshape_scalar", "Reshape", draw(1, 1), [])
    for axis in (0, 1, 2, 3, -1):
        add(f"flatten_{axis}", "Flatten", draw(2, 3, 4), axis=axis)
    add("squeeze_all", "Squeeze", draw(1, 3, 1), dynamic="")
    add("squeeze_some", "Squeeze", draw(1, 3, 1), [-1])
    add("squeeze_old", "Squeeze", draw(1, 3, 1), opset=11, axes=[0])
    add("unsqueeze_mixed", "Unsqueeze", draw(2, 3), [-1, 0])
    add("unsqueeze_unordered", "Unsqueeze", draw(2, 3), [3, 1])
    add("transpose_reversed", "Transpose", draw(2, 3, 4))
    add("expand_both_ways", "Expand", draw(2, 1, 3), [4, 1])
    add("expand_more_axes", "Expand", draw(3, 1), [2, 3, 4])
    for mode in ("DCR", "CRD"):
        add(f"depth_to_space_{mode.lower()}", "DepthToSpace", draw(2, 12, 3, 2), blocksize=2, mode=mode)
    add("space_to_depth", "SpaceToDepth", draw(2, 3, 4, 6), blocksize=2)
    if onnx.defs.onnx_opset_version() >= 28:
        add("space_to_depth_crd", "SpaceToDepth", draw(2, 3, 4, 6), blocksize=2, mode="CRD", opset=28, reference=True)
    add("concat_negative", "Concat", draw(2, 3), draw(2, 1), axis=-1)
    add("split_uneven", "Split", draw(7, 2), n=3, num_outputs=3)
    add("split_sizes", "Split", draw(2, 7), [1, 4, 2], n=3, axis=-1)
    add("split_equal", "Split", draw(6, 2), n=3, opset=13)
    add("split_old", "Split", draw(6, 2), n=2, opset=11, split=[2, 4])
    add("tile", "Tile", draw(2, 3), [2, 3])


def slicing() -> None:
    rows = {
        "clamped": ([-100, 1], [100, -1], [0, 1], [1, 1]),
        "steps": ([1, 0], [FAR, FAR], [-1, -2], [2, 3]),
        "reversed": ([-1], [-FAR], [1], [-1]),
        "reversed_part": ([-2, 4], [-6, 0], [1, 0], [-1, -2]),
        "reversed_wide": ([100], [1], [1], [-3]),
        "empty": ([3], [1], [0], [1]),
    }
    for name, (starts, ends, axes, steps) in rows.items():
        add(f"slice_{name}", "Slice", draw(6, 7), starts, ends, axes, steps)
    add("slice_first_axes", "Slice", draw(6, 7), [2], [4])
    add("slice_old", "Slice", draw(6, 7), opset=9, starts=[1], ends=[-1], axes=[1])
    flat = [0, 0, 1, 2, 0, 0, 3, 1]
    add("pad_fill", "Pad", draw(2, 2, 3, 3), flat, scalar(0.5))
    add("pad_axes", "Pad", draw(2, 2, 3, 3), [1, -1], None, [-1], mode="constant")
    for mode in ("reflect", "edge", "wrap"):
        add(f"pad_{mode}", "Pad", draw(2, 2, 4, 4), flat, mode=mode)
        static = "needs a static size"
        add(f"pad_{mode}_channels", "Pad", draw(2, 4, 3), [0, 2, 0, 0, 1, 0], mode=mode, dynamic=static)
    add("pad_old", "Pad", draw(2, 3), opset=10, pads=[0, 1, 0, 2], value=1.5)
    for upper in (0, 1):
        add(f"trilu_{upper}", "Trilu", draw(2, 4, 5), 1 - 3 * upper, upper=upper)


def indexing() -> None:
    table = draw(5, 4)
    add("gather_scalar", "Gather", table, -2, axis=1)
    add("gather_list", "Gather", table, [0, 3, 3])
    add("gather_negative", "Gather", table, [-1, 2], axis=-1)
    add("gather_fed", "Gather", table, whole(2, 3, low=-5, high=5), axis=0)
    add("gather_elements", "GatherElements", table, whole(3, 4, low=-5, high=5), axis=0)
    add("gather_elements_int32", "GatherElements", table, whole(5, 2, low=0, high=4, dtype=np.int32), axis=1)
    tuples = "length of its index tuples"
    add("gather_nd", "GatherND", draw(3, 4, 5), whole(2, 2, low=-3, high=3), dynamic=tuples)
    add("gather_nd_batch", "GatherND", draw(3, 4, 5), whole(3, 2, 1, low=0, high=4), batch_dims=1, dynamic=tuples)
    place = np.array([[0, -1, 2, 1]], np.int64)
    add("scatter_elements", "ScatterElements", table, place, draw(1, 4))
    for kind in ("add", "mul", "max", "min"):
        twice = np.array([[1, 1], [0, -2]], np.int64)
        add(f"scatter_elements_{kind}", "ScatterElements", table, twice, draw(2, 2), axis=1, reduction=kind)
    rows = np.array([[1], [-2]], np.int64)
    add("scatter_nd", "ScatterND", table, rows, draw(2, 4), dynamic=tuples)
    add("scatter_nd_add", "ScatterND", table, [[1], [1]], draw(2, 4), reduction="add")
    add("compress", "Compress", table, np.array([True, False, True]), axis=1)
    add("compress_flat", "Compress", table, np.array([False, True, True]))
    add("nonzero", "NonZero", whole(3, 4, low=0, high=2))
    lengths = np.array([2, 4, 1], np.int64)
    add("reverse_sequence", "ReverseSequence", draw(4, 3, 2), lengths)
    add("reverse_sequence_batch", "ReverseSequence", draw(3, 4, 2), lengths, batch_axis=0, time_axis=1)
    values = Const(np.array([0.5, 3.0], np.float32))
    add("one_hot", "OneHot", whole(2, 3, low=-4, high=5), 4, values)
    add("one_hot_axis", "OneHot", whole(2, 3, low=0, high=4), [4], values, axis=1)
    add("unique", "Unique", whole(9, low=0, high=4).astype(np.float32), dynamic="", n=1)
    add("range_integers", "Range", 2, 11, 3)
    add("range_fed", "Range", np.array(1, np.int64), np.array(7, np.int64), 2)
    add("range_floats", "Range", scalar(0.5), scalar(-2.0), scalar(-0.25))
    add("constant_of_shape", "ConstantOfShape", [2, 3])
    add("eye_like", "EyeLike", draw(3, 4), k=1)
    add("shape_part", "Shape", draw(2, 3, 4), start=1)
    add("size", "Size", draw(2, 3, 4))


def resizing() -> None:
    image, dynamic = draw(1, 2, 4, 5), "is dynamic and not repeated"
    floats = Const(np.array([1, 1, 2.5, 0.6], np.float32))
    for where in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
        for rounding in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
            options = {"coordinate_transformation_mode": where, "nearest_mode": rounding, "dynamic": dynamic}
            add(f"nearest_{where}_{rounding}", "Resize", image, None, floats, **options)
    doubled = Const(np.array([1, 1, 2, 3], np.float32))
    add("nearest_whole", "Resize", image, None, doubled)
    add("nearest_sizes", "Resize", image, None, None, [1, 2, 7, 3], dynamic=dynamic)
    add("linear_scales", "Resize", image, None, floats, mode="linear")
    add("nearest_corners_uneven", "Resize", image, None, None, [1, 2, 7, 3], dynamic=dynamic,
        coordinate_transformation_mode="align_corners", nearest_mode="floor")  # fmt: skip
    add("linear_sizes", "Resize", image, None, None, [1, 2, 7, 3], mode="linear", dynamic="last axes of an image")
    add("linear_axes", "Resize", image, None, None, [7, 3], axes=[2, 3], mode="linear", opset=18)
    add("linear_corners", "Resize", image, None, doubled, mode="linear", dynamic="sizes of its result are unknown",
        coordinate_transformation_mode="align_corners")  # fmt: skip
    add("cubic", "Resize", image, None, doubled, mode="cubic")
    add("upsample", "Upsample", image, doubled, opset=9, mode="nearest")


def recurrent() -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    x = draw(5, 2, 3)
    for op, count in gates.items():
        for direction, d in (("forward", 1), ("reverse", 1), ("bidirectional", 2)):
            parts = [weight(d, count * 4, 3), weight(d, count * 4, 4), weight(d, 2 * count * 4)]
            starts = [draw(d, 2, 4)] * (2 if op == "LSTM" else 1)
            options = {"hidden_size": 4, "direction": direction}
            n = 3 if op == "LSTM" else 2
            add(f"{op.lower()}_{direction}", op, x, *parts, None, *starts, n=n, **options)
            add(f"{op.lower()}_{direction}_bare", op, x, *parts[:2], n=n, **options)
            if op == "GRU":
                options["linear_before_reset"] = 1
                add(f"gru_{direction}_after", op, x, *parts, None, *starts, n=2, **options)
    batch = [weight(1, 16, 3), weight(1, 16, 4), weight(1, 32), None, draw(5, 1, 4), draw(5, 1, 4)]
    add("lstm_batch_first", "LSTM", x, *batch, n=3, hidden_size=4, layout=1, reference=True)
    add("rnn_relu", "RNN", x, weight(1, 4, 3), weight(1, 4, 4), n=2, hidden_size=4, activations=["Relu"])


def attending() -> None:
    q, k, v = draw(2, 4, 3, 6), draw(2, 2, 5, 6), draw(2, 2, 5, 6)
    heads, new = "numbers of heads", {"opset": 23}
    add("attention_gqa", "Attention", q, k, v, dynamic=heads, **new)
    add("attention_causal", "Attention", q, q, q, is_causal=1, dynamic=heads, **new)
    add("attention_scale", "Attention", q, q, q, scale=0.3, dynamic=heads, **new)
    add("attention_cap", "Attention", q, k, v, softcap=2.0, dynamic=heads, **new)
    add("attention_mask", "Attention", q, k, v, draw(2, 1, 3, 5), dynamic=heads, **new)
    allowed = np.tri(3, 5, 1, dtype=bool)
    add("attention_bool_mask", "Attention", q, k, v, allowed, dynamic=heads, **new)
    add("attention_mask_causal", "Attention", q, q, q, draw(3, 3), is_causal=1, dynamic=heads, **new)
    cache = [draw(2, 2, 4, 6), draw(2, 2, 4, 6)]
    add("attention_cache", "Attention", q, k, v, None, *cache, n=3, dynamic=heads, **new)
    three = [draw(2, 3, 24), draw(2, 5, 12), draw(2, 5, 8)]
    add("attention_3d", "Attention", *three, q_num_heads=4, kv_num_heads=2, **new)
    flat = [draw(2, 3, 24), draw(2, 3, 24), draw(2, 3, 24)]
    add("attention_3d_causal", "Attention", *flat, q_num_heads=4, kv_num_heads=4, is_causal=1, softcap=1.0, **new)
    tables, where = [weight(9, 3), weight(9, 3)], whole(2, 3, low=0, high=9)
    for interleaved in (0, 1):
        name = f"rotary_{interleaved}"
        add(name, "RotaryEmbedding", q, *tables, where, interleaved=interleaved, **new)
        add(f"{name}_3d", "RotaryEmbedding", flat[0], *tables, where, interleaved=interleaved, num_heads=4, **new)
        part = {"interleaved": interleaved, "rotary_embedding_dim": 4, **new}
        add(f"{name}_part", "RotaryEmbedding", q, weight(9, 2), weight(9, 2), where, **part)
    add("rotary_no_positions", "RotaryEmbedding", q, weight(2, 3, 3), weight(2, 3, 3), **new)


def quantizing() -> None:
    x, scales = draw(2, 3, 4, low=-9, high=9), Const(np.array([0.05, 0.1, 0.02], np.float32))
    for kind in (np.uint8, np.int8):
        zeros = Const(np.array([3, 0, 7], kind))
        add(f"quantize_{kind.__name__}", "QuantizeLinear", x, scales, zeros, axis=1)
        stored = whole(2, 3, 4, low=0, high=100, dtype=kind)
        add(f"dequantize_{kind.__name__}", "DequantizeLinear", stored, scales, zeros, axis=1)
    add("quantize_default", "QuantizeLinear", x, scalar(0.1))
    add("quantize_int16", "QuantizeLinear", x, scalar(0.001), Const(np.array(5, np.int16)), opset=21)
    add("dequantize_int32", "DequantizeLinear", whole(4, dtype=np.int32), scalar(0.25))
    add("dynamic_quantize", "DynamicQuantizeLinear", x, n=3)
    a, b = whole(3, 4, low=0, high=99, dtype=np.uint8), whole(4, 2, low=0, high=99, dtype=np.uint8)
    points = Const(np.array(7, np.uint8)), Const(np.array(3, np.uint8))
    add("matmul_integer", "MatMulInteger", a, b, *points)
    image, kernel = whole(1, 2, 5, 5, low=0, high=99, dtype=np.uint8), Const(whole(3, 2, 3, 3, low=0, dtype=np.uint8))
    add("conv_integer", "ConvInteger", image, kernel, points[0], pads=[1, 0, 0, 1])
    half = [Const(np.array(0.5, np.float32)), points[0]]
    add("qlinear_matmul", "QLinearMatMul", a, *half, b, *half, scalar(50.0), points[1])
    bias = Const(whole(3, dtype=np.int32))
    parts = [image, *half, kernel, *half, scalar(20.0), points[1], bias]
    add("qlinear_conv", "QLinearConv", *parts, pads=[1, 1, 1, 1])


FAMILIES = (reduction, shaping, slicing, indexing, resizing, recurrent, attending, quantizing)
