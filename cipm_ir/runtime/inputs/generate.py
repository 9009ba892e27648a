"""Inputs to compare two models on: random ones that the model accepts, and batches cut from given samples."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.input_shapes import noted_sizes
from cipm_ir.ir.parameters import overridable_inputs
from cipm_ir.ir.shapes import own_name, suggestion
from cipm_ir.runtime.inputs.data import Data as Data
from cipm_ir.runtime.inputs.data import Named, is_array, normalized
from cipm_ir.runtime.inputs.index_inputs import looks_like_mask, table_size
from cipm_ir.runtime.inputs.npz import Archive, Files, Rows

Array: TypeAlias = npt.NDArray[Any]
Feeds: TypeAlias = dict[str, Array]

RUNS_AT = "cipm_ir.runs_at"
"""Key in `Graph.meta` of the only size of batches that the model was found to run with, whatever it declares."""

_BATCH_NAMES = {"n", "b", "bs", "batch", "batch_size", "batchsize", "num_samples"}


def true_inputs(model: ir.Model) -> list[ir.Value]:
    """Return the graph inputs that must be fed: not those that are initializers too (ir_version 3)."""
    return [value for value in model.graph.inputs if value.name not in model.graph.initializers]


@dataclass(frozen=True)
class Recipe:
    """How to draw the inputs of a model.

    Attributes:
        name: of what comes out, for messages.
        floats: "normal", "uniform" in [0, 1), "pixels" (whole numbers 0 to 255), "waves" (a sine along the last axis),
            "zeros" or "ones".
        factor: floats are multiplied by it.
        integers: "random", or "low" or "high" for the ends of their range; booleans are false and true there.
        part: random integers are those of this part of their range, of as many as the input holds, in random order.
    """

    name: str
    floats: str = "normal"
    factor: float = 1.0
    integers: str = "random"
    part: int | None = None

    @property
    def constant(self) -> bool:
        """Whether all samples are alike, but for masks."""
        return self.floats in ("zeros", "ones") and self.integers != "random"

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Draw floats of a shape."""
        if self.floats == "normal":
            made = np.asarray(rng.standard_normal(shape))
        elif self.floats == "uniform":
            made = np.asarray(rng.random(shape))
        elif self.floats == "waves":
            last = np.arange(shape[-1] if shape else 1) / max(shape[-1] if shape else 1, 1)
            start, pace = rng.random((2, *shape[:-1], 1))
            made = np.sin(2 * np.pi * (start + (1 + 7 * pace) * last)).reshape(shape)
        elif self.floats == "pixels":
            made = np.asarray(rng.integers(0, 256, shape), np.float64)
        else:
            made = np.full(shape, {"zeros": 0.0, "ones": 1.0}[self.floats])
        return np.asarray(made * self.factor)


NORMAL = Recipe("random")


def random_inputs(
    model: ir.Model,
    rng: np.random.Generator,
    batch: int = 2,
    dims: Mapping[str, int] | None = None,
    *,
    free_size: int = 8,
    index_limit: int | None = None,
    recipe: Recipe = NORMAL,
) -> Feeds:
    """Return one random input by name for each graph input that is not an initializer.

    Floats are N(0, 1) unless `recipe` says otherwise. Integers that index a table (Gather and similar operators) stay
    below its size,
    and none repeats before all have occurred. Masks are rows of ones, then zeros. 8-bit integers take their whole
    range; other integers are 0 or 1; booleans are a fair coin.

    Args:
        model: the model to feed.
        rng: the source of randomness.
        batch: the size of unknown first axes and of axes whose name says batch.
        dims: sizes of symbolic axes by name, ``x[2]`` for an axis of input x without one. Sizes that the user
            suggested for the model come first.
        free_size: the size of the other unknown axes; one name, one size.
        index_limit: caps integer inputs, for a model whose tables could not be found.
        recipe: what to draw.

    Raises:
        UnsupportedError: an input is not a tensor, holds strings, or has no known rank.
    """
    sizes = {**(dims or {}), **noted_sizes(model.graph)}
    made: Feeds = {}
    for value in true_inputs(model):
        name = value.name or ""
        axes = suggestion(value) if value.shape is None else tuple(value.shape)
        if value.shape is None and (not axes or None in axes):
            raise UnsupportedError(f"Input {value.name!r} has no known rank; give its sizes in input_shapes, or data.")
        shape = tuple(
            sizes.get(own_name(name, axis)) or _size(dim, axis, batch, sizes, free_size)
            for axis, dim in enumerate(axes)
            if dim is not None
        )
        made[value.name or ""] = _random_input(value, shape, rng, index_limit, recipe)
    return made


def random_inputs_like(
    model: ir.Model, examples: Mapping[str, Array], rng: np.random.Generator, recipe: Recipe = NORMAL
) -> Feeds:
    """Draw inputs of the shapes of examples; see `random_inputs`."""
    values = {value.name or "": value for value in true_inputs(model)}
    return {name: _random_input(values[name], example.shape, rng, None, recipe) for name, example in examples.items()}


def _random_input(
    value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator, limit: int | None, recipe: Recipe
) -> Array:
    dtype = value.dtype
    if not isinstance(value.type, ir.TensorType) or dtype is None or dtype == ir.DataType.STRING:
        raise UnsupportedError(f"Input {value.name!r} is not a tensor of numbers; give inputs as data.")
    if dtype.is_floating_point():
        return recipe.draw(rng, shape).astype(dtype.numpy())
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return np.asarray(recipe.draw(rng, shape) + 1j * recipe.draw(rng, shape)).astype(dtype.numpy())
    bound = table_size(value)
    if "mask" in (value.name or "").lower() or (bound is None and dtype.bitwidth >= 32 and looks_like_mask(value)):
        # A mask of zeros leaves nothing to compare: softmax turns it into NaN.
        made = np.ones(shape) if recipe.integers == "high" else _mask(shape, rng)
        return np.asarray(made.astype(dtype.numpy()))
    if dtype == ir.DataType.BOOL:
        return np.asarray(rng.random(shape) < {"low": 0.0, "high": 1.0}.get(recipe.integers, 0.5))
    low, high = (0, bound) if bound is not None else (0, 2)
    if bound is None and dtype.bitwidth == 8:
        low, high = (0, 256) if dtype == ir.DataType.UINT8 else (-128, 128)
    if limit is not None:
        high = max(low + 1, min(high, limit))
    if recipe.integers in ("low", "high"):
        return np.full(shape, low if recipe.integers == "low" else high - 1, dtype.numpy())
    count = math.prod(shape)
    if recipe.part is not None:
        made = low + (recipe.part * count + rng.permutation(count)) % (high - low)
        return np.asarray(made.reshape(shape).astype(dtype.numpy()))
    rounds = [rng.permutation(np.arange(low, high)) for _ in range(-(-count // (high - low)))]
    return np.asarray(np.concatenate([*rounds, np.zeros(0)])[:count].reshape(shape)).astype(dtype.numpy())


def parts_of_tables(model: ir.Model, feeds: Feeds) -> int:
    """Return how many inputs of the sizes of one it takes to reach every row of each table that integers index."""
    sizes = ((table_size(value) or 0, feeds[value.name or ""].size) for value in true_inputs(model))
    return max((-(-rows // count) for rows, count in sizes if count), default=0)


def largest_table(model: ir.Model) -> int:
    """Return the size of the largest table that an integer input indexes, 0 without any."""
    tables = (table_size(value) for value in true_inputs(model) if value.dtype is not None and value.dtype.is_integer())
    return max((size for size in tables if size is not None), default=0)


def overrides(model: ir.Model, rng: np.random.Generator) -> Feeds:
    """Draw other values than the default for the floating-point inputs that have one; the others keep it."""
    made: Feeds = {}
    for value in overridable_inputs(model):
        tensor = model.graph.initializers[value.name or ""].const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16:
            default = tensor.numpy()
            # Signs stay, for variances and the like.
            other = default * rng.uniform(0.5, 1.5, default.shape) if default.any() else rng.random(default.shape)
            made[value.name or ""] = np.asarray(other).astype(default.dtype)
    return made


def _size(dim: int | ir.SymbolicDim, axis: int, batch: int, sizes: dict[str, int], free_size: int) -> int:
    if isinstance(dim, int):
        # Some exporters write 0 or -1 for "unknown".
        return dim if dim > 0 else (batch if axis == 0 else free_size)
    name = dim.value
    if name is None:
        return batch if axis == 0 else free_size
    if name in sizes:
        return sizes[name]
    computed = _evaluate(dim, sizes, batch, free_size)
    if computed is None:
        sizes[name] = computed = _symbol_size(name, axis, batch, free_size)
    return computed


def _symbol_size(name: str, axis: int, batch: int, free_size: int) -> int:
    return batch if axis == 0 or name.lower() in _BATCH_NAMES or "batch" in name.lower() else free_size


def _evaluate(dim: ir.SymbolicDim, sizes: dict[str, int], batch: int, free_size: int) -> int | None:
    """Return the size of an axis whose name is an expression such as `past_length + 1`.

    None where it is a plain name.
    """
    if not set("+-*/%(") & set(dim.value or ""):
        return None
    try:
        symbols = sorted(dim.free_symbols())
        if not symbols or symbols == [dim.value]:
            return None
        for symbol in symbols:
            sizes.setdefault(symbol, _symbol_size(symbol, 1, batch, free_size))
        result = dim.evaluate({symbol: sizes[symbol] for symbol in symbols})
    except (ValueError, TypeError, SyntaxError):
        return None
    return result if isinstance(result, int) and result > 0 else None


def _mask(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return rows of ones followed by at most half zeros: no row is empty, which softmax would turn into NaN."""
    if not shape:
        return np.ones(())
    lengths = rng.integers((shape[-1] + 1) // 2, shape[-1] + 1, shape[:-1])
    return np.asarray(np.arange(shape[-1]) < np.maximum(lengths, 1)[..., None])


def batches(data: Data, model: ir.Model, size: int = 8, *, limit: int | None = None) -> Iterator[Feeds]:
    """Cut given samples into feeds for the model; one feed at a time is in memory (a .npz is read row by row).

    Args:
        data: see `cipm_ir.runtime.inputs.data`. Arrays that the model has no input for are ignored. An array that was
            saved in Fortran order is read whole.
        model: the model to feed; where it takes batches of one size only (`only_batch`), a rest is dropped.
        size: samples per batch otherwise.
        limit: at most this many samples, rounded up to whole batches where the model fixes their size; of an iterable,
            no more is taken than that needs.

    Raises:
        InputError: no such file, an input without data, the wrong shape or type, different numbers of samples.
    """
    left, first = limit, True
    for piece in _pieces(data, model):
        cut = _Cut.of(piece, model, size, left, first)
        yield from cut.feeds()
        first = False
        if left is not None:
            left -= cut.count
            if left <= 0:
                return


def sample_count(data: Data, model: ir.Model, *, limit: int | None = None) -> int | None:
    """Return how many samples `batches` gives, from shapes and the headers of a file; None where only reading them
    tells.

    Raises:
        CipmError: as `batches`, where the data does not fit the model.
    """
    held = data.source if isinstance(data, Named) else data
    if not isinstance(held, (str, os.PathLike, Mapping, list, tuple, Files)) and not is_array(held):
        return None
    count = 0
    for number, piece in enumerate(_pieces(data, model)):
        count += _Cut.of(piece, model, 1, None if limit is None else limit - count, number == 0).count
        if limit is not None and count >= limit:
            break
    return count


def only_batch(model: ir.Model) -> int | None:
    """Return the one size of batches that a model takes: declared, or found by running it (`fit_batch`).

    Raises:
        InputError: inputs declare different sizes.
    """
    literals = _first_sizes(model)
    if len(literals) > 1:
        raise InputError(
            f"The inputs have different fixed first sizes {sorted(literals)}; data cannot be cut for them: give whole "
            "batches, each as a dict of arrays of the declared shapes."
        )
    found: int | None = model.graph.meta.get(RUNS_AT)
    return next(iter(literals), found)


def has_open_batch(model: ir.Model) -> bool:
    """Return whether no size of batches is declared, or known from runs."""
    return not _first_sizes(model) and RUNS_AT not in model.graph.meta


def _first_sizes(model: ir.Model) -> set[int]:
    return {dim for v in true_inputs(model) if v.shape for dim in v.shape[:1] if isinstance(dim, int) and dim > 0}


def _pieces(data: Data, model: ir.Model) -> Iterator[Mapping[str, Any]]:
    """Mappings of arrays, or of `Rows`."""
    found = normalized(data, [value.name or "" for value in true_inputs(model)])
    if isinstance(found, (str, os.PathLike)):
        with Archive(found) as archive:
            yield archive
    elif isinstance(found, Mapping):
        yield found
    else:
        named: Iterable[Any] = found
        yield from named


class _Held:
    """An array in memory, taken from its beginning to its end, as `Rows` are."""

    def __init__(self, array: Array) -> None:
        self._array, self._taken = array, 0
        self.shape, self.dtype = array.shape, array.dtype

    def take(self, count: int) -> Array:
        if not self.shape:
            return self._array
        self._taken += count
        return self._array[self._taken - count : self._taken]


@dataclass(frozen=True)
class _Column:
    """What one input is fed: rows, and the type that they are converted to, batch by batch."""

    rows: Rows | _Held
    dtype: np.dtype[Any]

    def take(self, count: int) -> Array:
        with np.errstate(over="ignore"):  # what becomes infinite is told where the values are checked
            return self.rows.take(count).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class _Cut:
    """Arrays that fit a model: ``count`` samples of them, in batches of ``step``; ``whole``: they are one batch."""

    columns: dict[str, _Column]
    count: int
    step: int
    whole: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any], model: ir.Model, size: int, limit: int | None, first: bool = True) -> _Cut:
        """Args: ``first``: more samples than none must be there; behind it an incomplete batch is a rest."""
        columns = {value.name or "": _fitting(data, value) for value in true_inputs(model)}
        counts = {name: column.rows.shape[0] for name, column in columns.items() if column.rows.shape}
        if len(set(counts.values())) > 1:
            if not _is_one_batch(counts, model):
                raise InputError(f"The data holds different numbers of samples: {counts}.")
            return cls(columns, 1 if limit is None else min(max(limit, 0), 1), 1, whole=True)
        count = next(iter(counts.values()), 1)
        only = only_batch(model)
        if only and first and 0 < count < only:
            raise InputError(
                f"The model takes batches of exactly {only} samples, but the data holds {count}; give at least {only}."
            )
        step = only or size
        if limit is not None:
            count = min(count, max(-(-limit // step) * step if only else limit, 0))
        return cls(columns, count // step * step if only else count, step)

    def feeds(self) -> Iterator[Feeds]:
        if self.whole and self.count:
            yield {name: column.take((*column.rows.shape, 1)[0]) for name, column in self.columns.items()}
            return
        for start in range(0, self.count, self.step):
            number = min(self.step, self.count - start)
            yield {name: column.take(number) for name, column in self.columns.items()}


def _is_one_batch(counts: Mapping[str, int], model: ir.Model) -> bool:
    """Return whether arrays of different lengths are one batch: a state of (2, batch, 128) beside an input of (batch,
    576).

    The model fixes the first size of some inputs, which have it; all others are of one length.
    """
    fixed = {value.name: value.shape[0] for value in true_inputs(model) if value.shape}
    fixed = {name: dim for name, dim in fixed.items() if isinstance(dim, int) and dim > 0}
    free = {count for name, count in counts.items() if name not in fixed}
    return bool(fixed) and len(free) <= 1 and all(counts.get(name or "") in (None, dim) for name, dim in fixed.items())


def _fitting(data: Mapping[str, Any], value: ir.Value) -> _Column:
    name = value.name or ""
    if name not in data:
        raise InputError(
            f"The data has no array for input {name!r}; it holds {', '.join(map(repr, data)) or 'nothing'}."
        )
    found = data[name]
    rows = found if isinstance(found, Rows) else _Held(np.asarray(found))
    dtype = value.dtype.numpy() if value.dtype is not None and value.dtype != ir.DataType.STRING else rows.dtype
    if not _converts(rows.dtype, dtype):
        raise InputError(f"Input {name!r} takes {dtype}, but the data is {rows.dtype}; convert it first.")
    if value.shape is not None:
        wanted = [dim if isinstance(dim, int) and dim > 0 else None for dim in value.shape]
        bad = len(wanted) != len(rows.shape)
        bad = bad or any(want not in (None, got) for want, got in zip(wanted[1:], rows.shape[1:], strict=True))
        if len(wanted) == len(rows.shape) + 1 and all(
            want in (None, got) for want, got in zip(wanted[1:], rows.shape, strict=True)
        ):
            raise InputError(
                f"Input {name!r} has shape {value.shape}, but the data has shape {list(rows.shape)}: that is one "
                "sample without the batch axis; add it in front, as in x[None]."
            )
        if bad:
            raise InputError(f"Input {name!r} has shape {value.shape}, but the data has shape {list(rows.shape)}.")
    return _Column(rows, dtype)


def _converts(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Return whether an array can be fed as another type; numpy does not know that bfloat16 is a float."""
    floats = [dtype.kind == "f" or dtype.name.startswith(("bfloat", "float")) for dtype in (given, wanted)]
    integer = given.kind in "iub" and floats[1]
    return given == wanted or all(floats) or integer or np.can_cast(given, wanted, casting="same_kind")
