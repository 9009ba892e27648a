"""Reductions and order-dependent operators along the hidden axis."""

from __future__ import annotations

from tests.zoo.net import INT64, Net
from tests.zoo.registry import synthetic


def reduced(net: Net, op: str) -> None:
    """Reduce the channels of a convolution, then a Gemm on the 16 pixels."""
    h = net.op("Tanh", net.conv(net.image(size=4), 3, 8))
    h = net.op(op, h, net.const([1]), keepdims=1)
    net.output(net.gemm(net.op("Flatten", h), 16, 3), ["N", 3])


for _op in (
    "ReduceMean",
    "ReduceSum",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceSumSquare",
):

    def _write(net: Net, op: str = _op) -> None:
        reduced(net, op)

    synthetic(8, "reduce", name=f"channel_{_op.lower()}")(_write)  # 8: a reduction does not care about the order


def hidden(net: Net) -> str:
    """Input (N, 5), Gemm and Relu: (N, 8)."""
    return net.relu(net.gemm(net.input("x", ["N", 5]), 5, 8))


@synthetic(6, "reduce", "pins")  # only the last 6: the indices of TopK are an output
def topk_hidden(net: Net) -> None:
    values, indices = net.multi("TopK", [hidden(net), net.const([4])], 2, axis=1)
    net.output(net.gemm(net.relu(net.gemm(values, 4, 6)), 6, 3), ["N", 3])
    net.output(indices, ["N", 4], INT64)


@synthetic(6, "reduce", "pins")  # only the last 6: ArgMax names a unit
def argmax_hidden(net: Net) -> None:
    h = hidden(net)
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])
    net.output(net.op("ArgMax", h, axis=1, keepdims=0), ["N"], INT64)


@synthetic(6, "reduce", "pins")  # only the last 6: a running sum depends on the order
def cumsum_hidden(net: Net) -> None:
    h = net.op("CumSum", hidden(net), net.const(1))
    net.output(net.gemm(net.relu(net.gemm(h, 8, 6)), 6, 3), ["N", 3])


@synthetic(14, "reduce")  # 8 + 6: a running sum along the sequence leaves the units alone
def cumsum_sequence(net: Net) -> None:
    h = net.relu(net.linear(net.input("x", ["N", "T", 5]), 5, 8))
    h = net.op("CumSum", h, net.const(1))
    net.output(net.linear(net.relu(net.linear(h, 8, 6)), 6, 3), ["N", "T", 3])


# 8: mean and maximum over channels make a spatial gate (CBAM), whose one channel may or may not count as a unit
@synthetic(None, "reduce", at_least=8)
def spatial_attention(net: Net) -> None:
    h = net.relu(net.conv(net.image(), 3, 8))
    pooled = [net.op(op, h, net.const([1])) for op in ("ReduceMean", "ReduceMax")]
    gate = net.op(
        "Sigmoid", net.op("Conv", net.op("Concat", *pooled, axis=1), net.weight((1, 2, 3, 3), 18), pads=[1] * 4)
    )
    net.classify(net.op("Mul", h, gate), 8)
