"""Lowering of padding: constant, reflect, replicate, circular; channels too; negative amounts crop."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.table import lowers
from cipm_ir.frontends.torch.values import Lowering, Number, Tensor

Pairs = list[tuple[int | Number, int | Number]]
"""What comes before and behind, per axis."""

_MODES = {"constant": None, "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _hint(n: int | Number) -> int | None:
    if isinstance(n, Number):
        return None if n.hint is None else int(n.hint)
    return int(n)


def _positive(n: int | Number, hint: int | None) -> int | Number:
    return n if hint is None or hint > 0 else 0


def padded(b: Lowering, x: Tensor, pairs: Pairs, mode: str, value: Any) -> Tensor:
    """Pad every axis by its pair; a negative amount cuts entries off first."""
    if mode not in _MODES:
        raise UnsupportedPattern(f"padding in mode {mode!r}")
    hints = [(_hint(p), _hint(q)) for p, q in pairs]
    if any(h is not None and h < 0 for pair in hints for h in pair):
        if mode != "constant":
            raise UnsupportedPattern(f"padding by a negative amount in mode {mode!r}")
        x = _cropped(b, x, hints)
        pairs = [(_positive(p[0], h[0]), _positive(p[1], h[1])) for p, h in zip(pairs, hints, strict=True)]
        hints = [(_hint(p), _hint(q)) for p, q in pairs]
    if all(h == 0 for pair in hints for h in pair):
        return x
    shape = [None if None in (d, *pair) else int(d or 0) + int(pair[0] or 0) + int(pair[1] or 0)
             for d, pair in zip(x.dims, hints, strict=True)]  # fmt: skip
    amounts = b.ints([p for p, _ in pairs] + [q for _, q in pairs])
    fill = None if mode != "constant" or value in (None, 0, 0.0, False) else b.const(value, x.dtype)
    return b.op("Pad", x, amounts, fill, mode=_MODES[mode], shape=shape)


def _cropped(b: Lowering, x: Tensor, hints: list[tuple[int | None, int | None]]) -> Tensor:
    """Cut off what negative amounts ask for."""
    cut = [[max(-(h or 0), 0) for h in pair] for pair in hints]
    axes = [a for a, pair in enumerate(cut) if any(pair)]
    far = np.iinfo(np.int64).max
    starts = np.asarray([cut[a][0] for a in axes], np.int64)
    ends = np.asarray([-cut[a][1] or far for a in axes], np.int64)
    shape = [d if d is None else d - sum(pair) for d, pair in zip(x.dims, cut, strict=True)]
    return b.op("Slice", x, starts, ends, np.asarray(axes, np.int64), np.ones(len(axes), np.int64), shape=shape)


@lowers("pad", "constant_pad_nd")
def pad(b: Lowering, input: Tensor, pad: Any, mode: Any = "constant", value: Any = None) -> Tensor:
    """Pairs from the last axis backwards. (`constant_pad_nd` gives the value in the place of the mode.)"""
    if not isinstance(mode, str):
        mode, value = "constant", mode
    amounts = list(pad)
    pairs: Pairs = list(zip(amounts[::2], amounts[1::2], strict=True))[::-1]
    if len(pairs) > input.rank:
        raise UnsupportedPattern("padding of more axes than there are")
    if isinstance(value, Tensor | Number):
        raise UnsupportedPattern("padding with a value that is computed")
    return padded(b, input, [(0, 0)] * (input.rank - len(pairs)) + pairs, mode, value)


@lowers(modules=(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d))
def constant_pad(b: Lowering, input: Tensor, padding: Any, value: Any) -> Tensor:
    return pad(b, input, padding, "constant", value)


@lowers("reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
        modules=(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d))  # fmt: skip
def reflection_pad(b: Lowering, input: Tensor, padding: Any) -> Tensor:
    return pad(b, input, padding, "reflect")


@lowers("replication_pad1d", "replication_pad2d", "replication_pad3d",
        modules=(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d))  # fmt: skip
def replication_pad(b: Lowering, input: Tensor, padding: Any) -> Tensor:
    return pad(b, input, padding, "replicate")


@lowers("_pad_circular", modules=(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d))
def circular_pad(b: Lowering, input: Tensor, padding: Any) -> Tensor:
    return pad(b, input, padding, "circular")
