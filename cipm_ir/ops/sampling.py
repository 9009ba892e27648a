"""Operators over positions: sampling at given places, transforms along an axis, windows. Positions are fixed.

Along all other axes they are linear in the data, so that every scaling passes.
"""

from __future__ import annotations

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import State
from cipm_ir.ops.context import OpContext, fixed
from cipm_ir.ops.convolution import convolve, resize_group
from cipm_ir.ops.elementwise import multiplied
from cipm_ir.ops.registry import operator
from cipm_ir.ops.shaping import reshaped
from cipm_ir.ops.steps import plain, step

RUNTIME = "com.microsoft"


def grid_sample(op: OpContext) -> None:
    """Interpolates over space, at places that a grid gives for each item; channels pass."""
    x = op.state(0)
    op.pin(op.optional(1), "places where GridSample looks")
    rest = op.pin_axes(x, [a for a in range(x.rank) if a != 1], "batch or spatial position of GridSample")
    op.set(0, rest.factors, rest.uniform & {1})


operator("GridSample")(grid_sample)
operator("GridSample", domain=RUNTIME)(grid_sample)


@operator("DeformConv", resize=resize_group)
def deform_conv(op: OpContext) -> None:
    """A convolution whose taps lie where offsets say; groups of offsets are groups of input channels."""
    if int(op.attr("offset_group", 1)) > 1:
        raise UnsupportedPattern("groups of channels with offsets of their own")
    for k in (2, 4):
        op.pin(op.optional(k), "offsets and weights of the taps of DeformConv")
    x = op.pin_axes(op.state(0), [0], "batch of DeformConv")
    convolve(op, x, op.state(1), 1, 3 if op.has(3) else None)


@operator("Col2Im", literals=(1, 2), free=True)
def column_to_image(op: OpContext) -> None:
    """Adds up overlapping blocks; channels lie in front of the positions in a block."""
    x, block = op.state(0), op.const(2)
    for k in (1, 2):
        op.pin(op.optional(k), "sizes of Col2Im")
    if block is None:
        raise UnsupportedPattern("a block whose size is computed")
    taps = int(block.prod())
    grid = reshaped(op, plain(x), (x.shape[0], x.shape[1] // taps, taps, x.shape[2]))
    grid = op.pin_axes(grid, (2, 3), "position in a block of Col2Im")
    op.set(0, grid.factors)


@operator("CumProd", free=True)
def cumulative_product(op: OpContext) -> None:
    """Order matters along the axis, and products of several entries do not scale."""
    x, axis = op.state(0), op.const(1)
    op.freeze(x)
    axes = list(range(x.rank)) if axis is None else [int(axis.reshape(())) % x.rank]
    op.pin(op.optional(1), "axis of CumProd")
    rest = op.pin_axes(x, axes, "CumProd depends on order")
    op.set(0, (fixed(f) for f in rest.factors), rest.uniform)


# ---------------------------------------------------------------- Fourier transforms
def _transform_axis(op: OpContext, rank: int) -> list[int]:
    if op.version >= 20:
        if not op.has(2):
            return [rank - 2]
        given = op.const(2)
        return list(range(rank)) if given is None else [int(given.reshape(-1)[0]) % rank]
    return [int(op.attr("axis", 1)) % rank]


@operator("DFT")
def fourier(op: OpContext) -> None:
    """Positions along one axis become frequencies, real and imaginary parts are the last axis; linear along others."""
    x = op.state(0)
    for k in (1, 2):
        op.pin(op.optional(k), "length or axis of DFT")
    gone = {*_transform_axis(op, x.rank), x.rank - 1}
    rest = op.pin_axes(x, gone, "position or part of a Fourier transform")
    op.set(0, rest.factors, rest.uniform - gone)


@operator("STFT")
def short_time_fourier(op: OpContext) -> None:
    """(batch, positions[, parts]) to (batch, frames, frequencies, parts): only the batch passes."""
    x = op.state(0)
    for k in (1, 2, 3):
        op.pin(op.optional(k), "window, step or length of STFT")
        op.freeze(op.optional(k))
    rest = op.pin_axes(x, range(1, x.rank), "position or part of a Fourier transform")
    op.set(0, rest.factors, rest.uniform & {0})


# ---------------------------------------------------------------- fixed sequences, crops, gates
@operator("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix", free=True)
def fixed_table(op: OpContext) -> None:
    """A table that its sizes alone determine."""
    for k in range(len(op.node.inputs)):
        op.pin(op.optional(k), "size of a window or table")
    op.set(0)


@operator("CenterCropPad", literals=(1,), free=True)
def centre_crop_pad(op: OpContext) -> None:
    """Axes that keep their size under both choices of dynamic sizes pass."""
    x, shape = op.state(0), op.shape()
    op.pin(op.optional(1), "target size of CenterCropPad")
    a, b = op.second_shape(op.node.inputs[0]), op.second_shape(op.node.outputs[0])
    changed = [k for k in range(x.rank) if x.shape[k] != shape[k] or (a is not None and b is not None and a[k] != b[k])]
    rest = op.pin_axes(x, changed, "cropped or padded axis")
    op.set(0, rest.factors, rest.uniform)


@operator("SwiGLU", elementwise=True)
def swiglu(op: OpContext) -> None:
    """Swish of one input times another."""
    gate = step(op, "Swish", [op.state(0)], op.state(0).shape)
    multiplied(op, [State(gate.shape, gate.factors, op.state(0).uniform), op.state(1)])
