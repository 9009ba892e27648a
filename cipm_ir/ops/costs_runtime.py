"""Multiply-accumulates of onnxruntime's own operators (domain com.microsoft), fused and quantized."""

from __future__ import annotations

import math

from cipm_ir.ops.costs import (
    Site,
    Uncounted,
    attention_products,
    conv_macs,
    cost,
    fourier_macs,
    gemm_macs,
    grid_sample_macs,
    product_macs,
    recurrent_macs,
    transpose_macs,
)

_OURS = "com.microsoft"

cost("FusedConv", domain=_OURS)(conv_macs)
cost("ConvTransposeWithDynamicPads", domain=_OURS)(transpose_macs)
cost("FusedGemm", domain=_OURS)(gemm_macs)
cost("GridSample", domain=_OURS)(grid_sample_macs)
cost("DynamicQuantizeLSTM", domain=_OURS)(recurrent_macs)


@cost("FusedMatMul", "TransposeMatMul", "FusedMatMulActivation", "GemmFastGelu", domain=_OURS)
def _fused_matmul(site: Site) -> int:
    """A product with transposed operands."""
    if site.attr("transBatchA", 0) or site.attr("transBatchB", 0):
        raise Uncounted("its batch axes are transposed")
    a = site.input(0)
    return math.prod(site.output()) * a[-2 if site.attr("transA", 0) and len(a) > 1 else -1]


@cost("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger16", domain=_OURS)
def _quantized_matmul(site: Site) -> int:
    return product_macs(site.output(), site.input(0)[-1], site.input(1))


@cost("QGemm", domain=_OURS)
def _quantized_gemm(site: Site) -> int:
    return math.prod(site.output()) * site.input(0)[0 if site.attr("transA", 0) else 1]


@cost("NhwcFusedConv", "NhwcConv", domain=_OURS)
def _last_channels_conv(site: Site) -> int:
    return math.prod(site.output()) * math.prod(site.input(1)[1:])


@cost("QLinearConv", domain=_OURS)
def _quantized_conv(site: Site) -> int:
    return math.prod(site.output()) * math.prod(site.input(3)[1:])


@cost("MatMulNBits", "MatMulBnb4", domain=_OURS)
def _packed_matmul(site: Site) -> int:
    """The second operand is packed; its sizes are attributes."""
    a = site.input(0)
    if a[-1] != site.attr("K"):
        raise Uncounted(f"it contracts {site.attr('K')} entries, its input has {a[-1]}")
    return math.prod(a) * int(site.attr("N"))


@cost("CDist", domain=_OURS)
def _distances(site: Site) -> int:
    return math.prod(site.output()) * site.input(0)[-1]


@cost("Inverse", domain=_OURS)
def _inverse(site: Site) -> int:
    """Elimination: n^3 for each matrix."""
    *batch, n, _ = site.input(0)
    return math.prod(batch) * n**3


@cost("Rfft", domain=_OURS)
def _rfft(site: Site) -> int:
    return _fourier(site.input(0), int(site.attr("signal_ndim")), real=True)


@cost("Irfft", domain=_OURS)
def _irfft(site: Site) -> int:
    return _fourier(site.output(), int(site.attr("signal_ndim")), real=True)


def _fourier(signal: tuple[int, ...], axes: int, *, real: bool) -> int:
    """Transforms along each of the last axes in turn."""
    entries = math.prod(signal)
    return sum(fourier_macs(entries // n, n, real=real) for n in signal[len(signal) - axes :] if n)


# ---------------------------------------------------------------- attention
def _fused_attention(site: Site, past: int) -> int:
    """Input projections, and attention over the past and the present keys."""
    batch, length, width = site.input(0)
    weight = site.input(1)
    sizes = [int(n) for n in site.attr("qkv_hidden_sizes", ())] or [weight[-1] // 3] * 3
    keys = length + site.length(past, 3)
    rows = batch * length
    return rows * width * weight[-1] + attention_products(rows * sizes[0], rows * sizes[2], keys)


@cost("Attention", domain=_OURS)
def _attention(site: Site) -> int:
    return _fused_attention(site, 4)


@cost("QAttention", domain=_OURS)
def _quantized_attention(site: Site) -> int:
    return _fused_attention(site, 8)


@cost("MultiHeadAttention", domain=_OURS)
def _multi_head_attention(site: Site) -> int:
    """Keys of (batch, length, width), of (batch, heads, length, size), or packed with queries or values."""
    query = site.input(0)
    out = math.prod(site.output())
    packed = len(query) == 5  # (batch, length, heads, 3, size)
    queries = math.prod(query) // 3 if packed else math.prod(query)
    key = site.input(1) if site.has(1) else query
    keys = (key[2] if len(key) == 4 else key[1]) + site.length(6, 2)
    return attention_products(queries, out, keys)


@cost("GroupQueryAttention", domain=_OURS)
def _group_query_attention(site: Site) -> int:
    """Queries and values have heads of one size; the past may lie in a buffer that holds the present keys too."""
    batch, length, _ = site.input(0)
    keys = site.number(6)
    if keys is None:
        keys = (site.input(1)[1] if site.has(1) else length) + site.length(3, 2)
    width = math.prod(site.output()) // max(batch * length, 1)
    if site.has(1):
        width = site.input(0)[2]
    return attention_products(batch * length * width, batch * length * width, keys)
