"""Lowering of tensors that a program makes: constants, ranges, fills, copies; random ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.ops.shaping import flat_sizes, shape_value
from cipm_ir.frontends.torch.table import computes
from cipm_ir.frontends.torch.values import Lowering, Number, Operand, Tensor

LIMIT = 1 << 24
"""Largest constant that is written into the graph."""


# ---------------------------------------------------------------- constants
def written(b: Lowering, make: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A constant that torch computes from Python numbers."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor | Number):
            raise UnsupportedPattern("a constant that depends on data or on sizes")
    if None in b.shape or int(np.prod([d or 0 for d in b.shape])) > LIMIT:
        raise UnsupportedPattern("a constant of dynamic size, or a very large one")
    made = make(*args, **kwargs)
    if made.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        made = made.float()
    return b.const(made.numpy(), b.dtype)


def _made(name: str, make: Callable[..., torch.Tensor]) -> None:
    @computes(name)
    def entry(
        b: Lowering, *args: Any, dtype: Any = None, device: Any = None, layout: Any = None, pin_memory: Any = None,
        requires_grad: Any = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        return written(b, make, *args, dtype=b.dtype, **kwargs)


for _name in ("logspace", "tril_indices", "triu_indices", "hann_window", "hamming_window",
              "blackman_window", "bartlett_window"):  # fmt: skip
    _made(_name, getattr(torch, _name))


@computes("eye")
def eye(b: Lowering, n: Any, m: Any = None, **options: Any) -> Tensor:
    """A constant, or of sizes that come from the graph."""
    sizes = [n, n if m is None else m]
    if not any(isinstance(x, Number) for x in sizes):
        return written(b, torch.eye, *sizes, dtype=b.dtype)
    rows, columns = (_counted(b, x, size) for x, size in zip(sizes, b.shape, strict=True))
    same = b.op("Equal", b.op("Unsqueeze", rows, b.ints([1])), columns, shape=b.shape, dtype=torch.bool)
    return b.cast(same, b.dtype)


def _counted(b: Lowering, count: Any, size: int | None) -> Tensor:
    """0, 1, ... up to a count that comes from sizes."""
    bounds = [b.tensor(x, torch.int64) for x in (0, count, 1)]
    return b.op("Range", *bounds, shape=(size,))


@computes("linspace")
def linspace(b: Lowering, start: Any, end: Any, steps: Any, **options: Any) -> Tensor:
    """A constant, or where it comes from sizes: start + i (end - start) / max(steps - 1, 1)."""
    if not any(isinstance(x, Number | Tensor) for x in (start, end, steps)):
        return written(b, torch.linspace, start, end, steps, dtype=b.dtype)
    if b.dtype not in (torch.float32, torch.float64):
        raise UnsupportedPattern("steps that are rounded")
    first, last, count = b.tensor(start, b.dtype), b.tensor(end, b.dtype), b.tensor(steps, torch.int64)
    gaps = b.op("Max", b.op("Sub", count, 1, shape=()), 1, shape=())
    step = b.op("Div", b.op("Sub", last, first, shape=()), b.cast(gaps, b.dtype), shape=())
    return b.op(
        "Add", first, b.op("Mul", b.cast(_counted(b, steps, b.shape[0]), b.dtype), step, shape=b.shape), shape=b.shape
    )


@computes("arange")
def arange(b: Lowering, *bounds: Any, start: Any = 0, end: Any = None, step: Any = 1, **options: Any) -> Tensor:
    """A constant of what the program writes; bounds that come from sizes stay computed."""
    if len(bounds) == 1:
        end = bounds[0]
    elif bounds:
        start, end, step = (*bounds, step)[:3]
    if not any(isinstance(x, Number | Tensor) for x in (start, end, step)):
        return written(b, torch.arange, start, end, step, dtype=b.dtype)
    kind = b.dtype if b.dtype in (torch.int64, torch.int32, torch.float32, torch.float64) else torch.float32
    parts = [b.tensor(x, kind) for x in (start, end, step)]
    return b.cast(b.op("Range", *parts, shape=b.shape), b.dtype)


@computes("tensor", "as_tensor", "scalar_tensor", "new_tensor")
def tensor(b: Lowering, *data: Any, **options: Any) -> Tensor:
    """Python numbers, also those that come from sizes, in nested lists; the last argument holds them."""
    source = next((options[k] for k in ("data", "s") if k in options), None) if not data else data[-1]
    if isinstance(source, Tensor):
        return b.cast(source, b.dtype) if source.dtype != b.dtype else source
    if isinstance(source, Number):
        return b.tensor(source, b.dtype)
    if isinstance(source, list | tuple) and any(isinstance(x, Number) for x in source):
        return b.cast(b.ints(flat_sizes(source)), b.dtype)
    if isinstance(source, bool | int | float | list | tuple):
        return written(b, torch.tensor, source, dtype=b.dtype)
    raise UnsupportedPattern(f"a tensor of {type(source).__name__}")


# ---------------------------------------------------------------- one value everywhere
def filled(b: Lowering, value: Operand, sizes: Tensor) -> Tensor:
    """A tensor of one value; ``sizes`` is its shape."""
    if not isinstance(value, bool | int | float) or b.dtype == torch.bfloat16:
        scalar = b.tensor(value, b.dtype)
        if scalar.rank:
            scalar = b.reshape(scalar, [1])
        return b.op("Expand", scalar, sizes, shape=b.shape)
    one = torch.full((1,), value, dtype=b.dtype).numpy()
    return b.op("ConstantOfShape", sizes, value=one, shape=b.shape, dtype=b.dtype)


def _fill_of_size(value: int | float, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, *size: Any, **options: Any) -> Tensor:
        return filled(b, value, b.ints(flat_sizes(size or (options["size"],))))


def _fill_like(value: int | float, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, input: Tensor, **options: Any) -> Tensor:
        return filled(b, value, shape_value(b, input))


def _fill_new(value: int | float, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, input: Tensor, *size: Any, **options: Any) -> Tensor:
        return filled(b, value, b.ints(flat_sizes(size or (options["size"],))))


for _value, _word in ((0, "zeros"), (1, "ones"), (0, "empty")):
    _fill_of_size(_value, _word)
    _fill_like(_value, f"{_word}_like")
    _fill_new(_value, f"new_{_word}")


@computes("full")
def full(b: Lowering, size: Any, fill_value: Operand, **options: Any) -> Tensor:
    return filled(b, fill_value, b.ints(flat_sizes([size])))


@computes("full_like")
def full_like(b: Lowering, input: Tensor, fill_value: Operand, **options: Any) -> Tensor:
    return filled(b, fill_value, shape_value(b, input))


@computes("new_full")
def new_full(b: Lowering, input: Tensor, size: Any, fill_value: Operand, **options: Any) -> Tensor:
    return filled(b, fill_value, b.ints(flat_sizes([size])))


@computes("fill")
def fill(b: Lowering, input: Tensor, value: Operand) -> Tensor:
    return filled(b, value, shape_value(b, input))


@computes("zero")
def zero(b: Lowering, input: Tensor) -> Tensor:
    return filled(b, 0, shape_value(b, input))


@computes("copy")
def copy(b: Lowering, input: Tensor, src: Operand, non_blocking: bool = False) -> Tensor:
    """The second tensor in the shape and type of the first."""
    value = b.tensor(src, input.dtype)
    if value.shape == input.shape and None not in input.dims:
        return b.op("Identity", value, shape=value.shape)
    return b.op("Expand", value, shape_value(b, input), shape=b.shape)


@computes("meshgrid")
def meshgrid(b: Lowering, *tensors: Any, indexing: str | None = "ij") -> tuple[Tensor, ...]:
    """Each tensor along an axis of its own, expanded to all sizes; "xy" exchanges the first two axes."""
    given: Sequence[Tensor] = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    order = list(range(len(given)))
    if indexing == "xy" and len(given) > 1:
        order[:2] = [1, 0]
    lines = [x if x.rank else b.reshape(x, [1]) for x in given]
    sizes = b.ints([b.size(lines[k], 0) for k in order])
    shape = [lines[k].dims[0] for k in order]
    made = []
    for k, x in enumerate(lines):
        column = b.reshape(x, [-1 if place == k else 1 for place in order])
        made.append(b.op("Expand", column, sizes, shape=shape))
    return tuple(made)


# ---------------------------------------------------------------- refused
def _refused(reason: str, *names: str) -> None:
    @computes(*names)
    def entry(b: Lowering, *args: Any, **options: Any) -> Any:
        raise UnsupportedPattern(reason)


_refused(
    "random numbers",
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
    "normal", "uniform", "poisson", "exponential",
)  # fmt: skip
_refused(
    "the size of its result depends on data",
    "masked_select", "nonzero", "argwhere", "pad_sequence", "masked_scatter",
)  # fmt: skip
_refused("no rule for this selection", "diagonal", "diag", "diag_embed", "cartesian_prod", "combinations", "block_diag")
