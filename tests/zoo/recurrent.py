"""Recurrent layers: the gates of LSTM and GRU are blocks of one hidden space."""

from __future__ import annotations

from typing import Any

from tests.zoo.net import Net
from tests.zoo.registry import synthetic

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
IN, HIDDEN = 8, 6


def recur(net: Net, op: str, outputs: int, directions: int = 1, **attributes: Any) -> list[str]:
    """(T, N, 4) -> linear to 8 -> Relu -> recurrent layer of 6 units per direction."""
    h = net.relu(net.linear(net.input("x", ["T", "N", 4]), 4, IN))
    rows = GATES[op] * HIDDEN
    weights = [net.weight((directions, rows, IN), IN), net.weight((directions, rows, HIDDEN), HIDDEN)]
    bias = net.const(net.normal((directions, 2 * rows), 0.3), "b")
    return net.multi(op, [h, *weights, bias], outputs, hidden_size=HIDDEN, **attributes)


@synthetic(14, "recurrent")  # 8 + 6, the sequence output
def lstm(net: Net) -> None:
    y = net.op("Squeeze", recur(net, "LSTM", 1)[0], net.const([1]))
    net.output(net.linear(y, HIDDEN, 3), ["T", "N", 3])


@synthetic(14, "recurrent")  # 8 + 6, last hidden state and last cell state
def lstm_states(net: Net) -> None:
    _, state, cell = recur(net, "LSTM", 3)
    both = [net.op("Squeeze", value, net.const([0])) for value in (state, cell)]
    net.output(net.op("Add", *(net.gemm(value, HIDDEN, 3) for value in both)), ["N", 3])


@synthetic(14, "recurrent")  # 8 + 6
def gru(net: Net) -> None:
    state = recur(net, "GRU", 2)[1]
    net.output(net.gemm(net.op("Squeeze", state, net.const([0])), HIDDEN, 3), ["N", 3])


@synthetic(14, "recurrent")  # 8 + 6, the reset gate after the matrix product as in torch
def gru_linear_before_reset(net: Net) -> None:
    y = net.op("Squeeze", recur(net, "GRU", 1, linear_before_reset=1)[0], net.const([1]))
    net.output(net.linear(y, HIDDEN, 3), ["T", "N", 3])


# 8 + 6, or 8 + 6 + 6
@synthetic(None, "recurrent", at_least=14, note="20 where each direction has labels of its own")
def lstm_bidirectional(net: Net) -> None:
    y = recur(net, "LSTM", 1, directions=2, direction="bidirectional")[0]
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.const([0, 0, 2 * HIDDEN]))
    net.output(net.linear(y, 2 * HIDDEN, 3), ["T", "N", 3])


@synthetic(None, "recurrent", at_least=8)  # 8; 14 where the plain RNN has a rule too
def rnn(net: Net) -> None:
    y = net.op("Squeeze", recur(net, "RNN", 1)[0], net.const([1]))
    net.output(net.linear(y, HIDDEN, 3), ["T", "N", 3])
