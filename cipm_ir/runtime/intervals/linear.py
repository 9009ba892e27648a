"""Bounds through contractions, convolutions, pooling, normalizations, reductions and recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from cipm_ir.ops.contraction import einsum_terms, gemm_letters, matmul_letters
from cipm_ir.runtime.intervals.arithmetic import Interval, Letters, add, contract, mean, multiply, total
from cipm_ir.runtime.intervals.site import Site, bounds, filled, refit


def _sizes(site: Site, parts: Sequence[tuple[int, Letters]]) -> dict[str, int | None]:
    """Size of each letter; None where it is dynamic."""
    sizes: dict[str, int | None] = {}
    for index, letters in parts:
        for axis, x in enumerate(letters):
            if x is not None:
                sizes[x] = site.size(index, axis)
    return sizes


@bounds("MatMul")
def matmul(site: Site) -> Interval:
    """Numpy-style matrix product."""
    left, right, out = matmul_letters(site.state(0), site.state(1), len(site.out()))
    sizes = _sizes(site, ((0, left), (1, right)))
    return contract(site.of(0), site.of(1), left, right, out, sizes, site.p)


@bounds("Gemm")
def gemm(site: Site) -> Interval:
    """alpha A B + beta C."""
    left, right, summed_to = gemm_letters(site.node)
    sizes = _sizes(site, ((0, left), (1, right)))
    out = contract(site.of(0), site.of(1), left, right, summed_to, sizes, site.p)
    out = _scaled(site, out, "alpha")
    return add(out, _scaled(site, site.of(2), "beta"), site.p) if site.has(2) else out


def _scaled(site: Site, x: Interval, name: str) -> Interval:
    factor = np.float32(site.attr(name, 1.0))
    return x if factor == 1 else multiply(x, Interval.point(factor), site.p)


@bounds("Einsum")
def einsum(site: Site) -> Interval | None:
    """One or two operands without repeated letters."""
    count = len(site.inputs)
    operands, out = einsum_terms(str(site.attr("equation", "")), [site.rank(k) for k in range(count)])
    if count > 2 or any(len(set(o)) < len(o) for o in operands):
        return None
    full = {x for k, o in enumerate(operands) for a, x in enumerate(o) if site.shape(k)[a] != 1}
    letters = [
        tuple(None if x in full and site.shape(k)[a] == 1 else x for a, x in enumerate(o))
        for k, o in enumerate(operands)
    ]
    sizes = _sizes(site, list(enumerate(letters)))
    second = (site.of(1), letters[1]) if count == 2 else (Interval.point(1.0), ())
    return contract(site.of(0), second[0], letters[0], second[1], out, sizes, site.p)


# ---------------------------------------------------------------- convolutions
@bounds("Conv", "ConvTranspose")
def conv(site: Site) -> Interval:
    """Channels are contracted; space keeps one bound, which includes zero where positions may be padding."""
    x, w, rank = site.of(0), site.of(1), site.rank(0)
    x = x.merged(range(2, rank))
    transposed = site.node.op_type == "ConvTranspose"
    pads = site.attr("pads") or ()
    if transposed or any(pads) or site.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        x = Interval(np.minimum(x.lo, 0.0), np.maximum(x.hi, 0.0))
    group, channels = int(site.attr("group", 1)), site.shape(0)[1]
    outs = site.shape(1)[1] * group if transposed else site.shape(1)[0]
    taps = [f"t{k}" for k in range(rank - 2)]
    inside, outside = channels // group, outs // group
    wshape = (group, inside, outside) if transposed else (group, outside, inside)
    x = refit(x.map(lambda e: e.reshape(e.shape[:2])), site.shape(0)[:2], (site.shape(0)[0], group, inside))
    w = refit(w, site.shape(1), (*wshape, *site.shape(1)[2:]))
    names = ["g", "c", "o", *taps] if transposed else ["g", "o", "c", *taps]
    sizes: dict[str, int | None] = {"n": None, "g": group, "c": inside, "o": outside}
    sizes.update(zip(taps, site.shape(1)[2:], strict=True))
    out = contract(x, w, ("n", "g", "c"), names, ("n", "g", "o"), sizes, site.p)
    batch = out.shape[0]
    out = refit(out, (batch, group, outside), (batch, outs)).map(lambda e: e.reshape(e.shape + (1,) * (rank - 2)))
    if not site.has(2):
        return out
    return add(out, site.of(2).map(lambda e: e.reshape((1, -1) + (1,) * (rank - 2))), site.p)


@bounds("MaxPool", "GlobalMaxPool", "AveragePool", "GlobalAveragePool")
def pool(site: Site) -> list[Interval | None]:
    """Within the bounds of the input; counted padding brings zeros in."""
    x, rank = site.of(0).merged(range(2, site.rank(0))), site.rank(0)
    if site.node.op_type == "AveragePool" and site.attr("count_include_pad", 0):
        x = Interval(np.minimum(x.lo, 0.0), np.maximum(x.hi, 0.0))
    if "Average" in site.node.op_type:
        window = site.attr("kernel_shape")
        space = dict(enumerate(window, 2)) if window else {a: site.size(0, a) for a in range(2, rank)}
        x = mean(x, space, site.p)
    return [x] + [None] * (len(site.node.outputs) - 1)


# ---------------------------------------------------------------- normalizations
@bounds("BatchNormalization")
def batch_norm(site: Site) -> list[Interval | None] | None:
    """scale (x - mean) / sqrt(var + eps) + bias with known parameters; a run may multiply out the bracket."""
    parameters = [site.of(k) for k in range(1, 5)]
    if site.attr("training_mode", 0) or not all(q.known and np.isfinite(q.lo).all() for q in parameters):
        return None
    scale, bias, average, variance = (q.lo.reshape((1, -1) + (1,) * (site.rank(0) - 2)) for q in parameters)
    spread = variance + float(np.float32(site.attr("epsilon", 1e-5)))
    if (spread <= 0).any():
        return None
    slope = scale / np.sqrt(spread)
    x, still = site.of(0), slope == 0
    lows, highs = [], []
    for end in (x.lo, x.hi):
        finite = np.where(np.isinf(end), 0.0, end)
        value = slope * (finite - average) + bias
        error = 8 * site.p.eps * (np.abs(slope) * (np.abs(finite) + np.abs(average)) + np.abs(bias))
        error = np.where(still, 0.0, error)
        away = np.where(np.isinf(end) & ~still, np.copysign(np.inf, slope * np.sign(end)), 0.0)
        lows.append(value - error + away)
        highs.append(value + error + away)
    out = Interval.of(np.minimum(*lows), np.maximum(*highs))
    return [out] + [None] * (len(site.node.outputs) - 1)


def _affine(site: Site, limit: float, scale: Interval | None, bias: Interval | None) -> Interval:
    """What lies within -limit .. limit, scaled and shifted."""
    hat = Interval.of(np.full((1,) * site.rank(0), -limit), np.full((1,) * site.rank(0), limit))
    out = hat if scale is None else multiply(hat, scale, site.p)
    return out if bias is None else add(out, bias, site.p)


def _limit(site: Site, axes: Sequence[int]) -> float:
    """The largest entry of a vector of n numbers with mean square one is sqrt(n)."""
    sizes = [site.size(0, a) for a in axes]
    known = [n for n in sizes if n is not None]
    return math.inf if len(known) < len(sizes) else math.sqrt(math.prod(known)) * (1 + 1e-3)


@bounds("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_norm(site: Site) -> list[Interval | None]:
    """At most sqrt(n) before scale and bias."""
    first = site.axis("axis", -1, site.rank(0))
    scale = site.of(1) if site.has(1) else None
    bias = site.of(2) if site.has(2) else None
    out = _affine(site, _limit(site, range(first, site.rank(0))), scale, bias)
    return [out] + [None] * (len(site.node.outputs) - 1)


@bounds("InstanceNormalization", "GroupNormalization")
def channel_norm(site: Site) -> Interval:
    """At most sqrt(n) before scale and bias, which are per channel, or per group before opset 21."""
    rank, channels = site.rank(0), site.shape(0)[1]
    limit = _limit(site, range(2, rank))
    if site.node.op_type == "GroupNormalization":
        limit *= math.sqrt(channels // int(site.attr("num_groups", 1)))

    def spread(q: Interval) -> Interval:
        return q.map(lambda e: np.repeat(e, channels // e.size).reshape((1, -1) + (1,) * (rank - 2)))

    return _affine(site, limit, spread(site.of(1)), spread(site.of(2)))


# ---------------------------------------------------------------- reductions
def _axes(site: Site) -> list[int] | None:
    axes, rank = site.attr("axes"), site.rank(0)
    if axes is None and site.has(1):
        const = site.const(1)
        if const is None:
            return None
        axes = const.ravel().tolist()
    if not axes:
        return [] if site.attr("noop_with_empty_axes", 0) else list(range(rank))
    return [int(a) % rank for a in axes]


@bounds("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
def reduce(site: Site) -> Interval | None:
    """Sums and means of bounds; norms from absolute values."""
    gone, x, name = _axes(site), site.of(0), site.node.op_type
    if gone is None:
        return None
    sizes = {a: site.size(0, a) for a in gone}
    if name == "ReduceSum":
        out = total(x, sizes, site.p)
    elif name == "ReduceMean":
        out = mean(x, sizes, site.p)
    elif name in ("ReduceMax", "ReduceMin"):
        join = np.max if name == "ReduceMax" else np.min
        out = x.map(lambda e: np.asarray(join(e, axis=tuple(gone), keepdims=True)))
    else:
        size = Interval(np.zeros_like(x.lo), x.largest)
        sums = total(size if name == "ReduceL1" else multiply(size, size, site.p), sizes, site.p)
        out = sums.map(np.sqrt).rounded(site.p, 8.0) if name == "ReduceL2" else sums
    return out if site.attr("keepdims", 1) else out.map(lambda e: e.squeeze(tuple(gone)))


# ---------------------------------------------------------------- attention, recurrent layers
@bounds("Attention")
def attention(site: Site) -> list[Interval | None]:
    """Each output is a mean of values, with weights from a softmax."""
    v, heads = site.of(2), site.shape(0)[1] if site.rank(0) == 4 else int(site.attr("q_num_heads", 1))
    own = site.shape(2)[1] if site.rank(2) == 4 else int(site.attr("kv_num_heads", heads))
    v = v.merged([0, site.rank(2) - 2])
    if site.rank(2) == 3:
        shape = (1, 1, own, site.shape(2)[2] // own)
        split = refit(v, (1, 1, site.shape(2)[2]), shape)
        wide = filled(split, 2, own).map(lambda e: np.repeat(e, heads // own, axis=2))
        v = refit(wide, (1, 1, heads, shape[3]), (1, 1, heads * shape[3]))
    elif v.shape[1] != 1:
        v = v.map(lambda e: np.repeat(e, heads // own, axis=1))
    out = mean(v, {site.rank(2) - 2: None}, site.p)
    return [out] + [None] * (len(site.node.outputs) - 1)


@bounds("LSTM", "GRU")
def recurrent(site: Site) -> list[Interval | None] | None:
    """A hidden state is a gate times a tanh (LSTM), or a mean of a tanh and the state before (GRU)."""
    names = [str(n, "ascii") if isinstance(n, bytes) else n for n in site.attr("activations") or ()]
    if any(n not in ("Sigmoid", "Tanh") for n in names):
        return None
    limit = 1 + 1e-3
    if site.node.op_type == "GRU" and site.has(5):
        limit = max(limit, float(site.of(5).largest.max(initial=0.0)))
    made: list[Interval | None] = []
    for value, shape in zip(site.node.outputs, site.outs, strict=True):
        known = value.name and shape is not None and len(made) < 2
        one = np.full((1,) * len(shape or ()), limit)
        made.append(Interval.of(-one, one) if known else None)
    return made
