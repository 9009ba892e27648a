"""A product with a weight as a matrix problem: rows of inputs times a matrix gives rows of outputs.

A convolution's rows are its unfolded patches, zeros of the padding included, one for each output position. A
convolution in groups is a product whose matrix has zeros outside its diagonal blocks. A transposed one is an ordinary
one, with its taps reversed, on values between which zeros are put.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import UnsupportedError
from cipm_ir.ir.constants import attribute
from cipm_ir.ir.labels import Labels
from cipm_ir.runtime.statistics.moments import check_squares
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import RECURRENT, WeightConsumer

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]
_ROWS_AT_ONCE = 1 << 13


@dataclass(frozen=True)
class LinearOpGeometry:
    """The geometry of a `WeightConsumer`; of a Conv also ``kernel``, ``strides``, ``pads`` (begins, ends), dilations.

    ``axis``: which axis of the weight is summed. The matrix has shape (K, outputs), K = summed channels times taps.
    ``groups``: of a Conv; ``shape`` has all its input channels. ``stuffed``: the strides of a ConvTranspose.
    ``stored``: of a recurrent layer, the shape of the weight, whose directions and gates are outputs of one product.
    ``backward``: of its product with the states, which directions run backward: rows are the states of the steps before
    (behind), and the matrix has a block for each direction.
    """

    shape: tuple[int, ...]
    axis: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    groups: int = 1
    stuffed: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()
    backward: tuple[bool, ...] = ()

    @classmethod
    def of(cls, program: Program, reader: WeightConsumer) -> LinearOpGeometry:
        """Return the geometry of a reader.

        Raises:
            UnsupportedError: a Conv with auto_pad; a ConvTranspose that is not `plain_transpose`.
        """
        analysis = program.analysis
        shape, node = analysis.walk.leaves[reader.leaf].shape, analysis.walk.nodes[reader.node]
        if reader.op in RECURRENT:
            outputs = shape[0] * shape[1]
            if reader.index == 1:
                return cls((outputs, shape[2]), 1, stored=shape)
            way = attribute(node, "direction", "forward")
            backward = (way == "reverse",) if way != "bidirectional" else (False, True)
            return cls((outputs, shape[0] * shape[2]), 1, groups=shape[0], stored=shape, backward=backward)
        if reader.op not in ("Conv", "ConvTranspose"):
            return cls(shape, reader.axis)
        auto = attribute(node, "auto_pad", "NOTSET")
        if auto not in ("NOTSET", "VALID"):
            raise UnsupportedError(f"{reader.op} {node.name} has auto_pad {auto}; give it pads.")
        d = len(shape) - 2
        pads = (0,) * (2 * d) if auto == "VALID" else tuple(attribute(node, "pads", (0,) * (2 * d)))
        strides, dilations = attribute(node, "strides", (1,) * d), attribute(node, "dilations", (1,) * d)
        if reader.op == "Conv":
            whole = (shape[0], shape[1] * reader.groups, *shape[2:])
            return cls(whole, reader.axis, shape[2:], tuple(strides), pads, tuple(dilations), reader.groups)
        if not plain_transpose(node):
            raise UnsupportedError(f"ConvTranspose {node.name} has an output_shape, or pads beyond its kernel.")
        more = attribute(node, "output_padding", (0,) * d)
        reach = [step * (k - 1) for step, k in zip(dilations, shape[2:], strict=True)]
        around = [reach[k] - pads[k] for k in range(d)] + [reach[k] - pads[d + k] + more[k] for k in range(d)]
        return cls(shape, 0, shape[2:], (1,) * d, tuple(around), tuple(dilations), 1, tuple(strides))

    @property
    def size(self) -> int:
        """K, the number of rows of the matrix."""
        return self.shape[self.axis] * math.prod(self.kernel)

    @property
    def width(self) -> int:
        """The number of outputs."""
        return self.shape[1 - self.axis]

    @property
    def plain(self) -> bool:
        """Whether it is an ordinary product or convolution, without groups."""
        return self.groups == 1 and not self.stuffed and not self.stored

    @property
    def blocks(self) -> tuple[Labels, Labels] | None:
        """The group of each row of the matrix and of each output; None where there is one."""
        if self.groups == 1:
            return None
        return tuple(np.arange(n) * self.groups // n for n in (self.size, self.width))  # type: ignore[return-value]

    # ------------------------------------------------------------ rows
    def positions(self, u: Array) -> int:
        """Return how many rows a batch gives for each of its samples (of a MatMul: rows in all)."""
        if self.backward:
            return int(max(len(u) - 1, 1) * u.shape[2])
        if not self.kernel:
            return int(u.size // u.shape[-1])
        return math.prod(self.grid(u))

    def inputs(self, u: Array, places: Labels | None = None) -> Array:
        """(rows, K): of the values that are read. ``places``: only these positions, the same ones in every sample."""
        u = widened(u)
        if self.backward:  # (steps, directions, samples, units); of one step, its state stands for the one before
            steps = [u[1:, k] if back else u[:-1, k] for k, back in enumerate(self.backward)]
            u = np.concatenate(steps if len(u) > 1 else [u[:, k] for k in range(u.shape[1])], axis=-1)
        if not self.kernel:
            flat = u.reshape(-1, u.shape[-1])
            return flat if places is None else flat[places]
        d = len(self.kernel)
        u = self._stuffed(u)
        if any(self.pads):
            u = np.pad(u, [(0, 0), (0, 0), *zip(self.pads[:d], self.pads[d:], strict=True)])
        grid = self.grid(u, padded=True)
        where = np.unravel_index(np.arange(math.prod(grid)) if places is None else places, grid)
        index = []
        for k in range(d):
            tap = np.arange(self.kernel[k]) * self.dilations[k]
            tap = tap.reshape([-1 if j == k else 1 for j in range(d)])
            index.append(where[k].reshape(-1, *(1,) * d) * self.strides[k] + tap)
        where_all: Any = (slice(None), slice(None), *index)
        patches = np.moveaxis(u[where_all], 1, 2)  # N, rows, C, *kernel
        return np.ascontiguousarray(patches).reshape(-1, self.size)

    def outputs(self, y: Array, places: Labels | None = None) -> Array:
        """(rows, outputs): of the product, or anything of its shape."""
        y = widened(y)
        if not self.kernel:
            flat = y.reshape(-1, y.shape[-1])
            return flat if places is None else flat[places]
        flat = y.reshape(*y.shape[:2], -1)
        if places is not None:
            flat = flat[:, :, places]
        return np.ascontiguousarray(np.moveaxis(flat, 1, 2)).reshape(-1, y.shape[1])

    def grid(self, u: Array, padded: bool = False) -> tuple[int, ...]:
        """Return positions of a convolution along each axis.

        ``padded``: of values that the padding is there already.
        """
        d = len(self.kernel)
        extra = [0] * d if padded else [self.pads[k] + self.pads[d + k] for k in range(d)]
        steps = self.stuffed if self.stuffed and not padded else (1,) * d
        lengths = [(n - 1) * step + 1 for n, step in zip(u.shape[2:], steps, strict=True)]
        sizes = zip(lengths, extra, self.kernel, self.dilations, self.strides, strict=True)
        return tuple((n + more - step * (k - 1) - 1) // stride + 1 for n, more, k, step, stride in sizes)

    def _stuffed(self, u: Array) -> Array:
        """Return the values of a transposed convolution with zeros between them."""
        if not self.stuffed:
            return u
        sizes = [(n - 1) * step + 1 for n, step in zip(u.shape[2:], self.stuffed, strict=True)]
        made = np.zeros((*u.shape[:2], *sizes), u.dtype)
        where: Any = (slice(None), slice(None), *(slice(None, None, step) for step in self.stuffed))
        made[where] = u
        return made

    # ------------------------------------------------------------ weights
    def matrix(self, weight: Array) -> Array:
        """(K, outputs) of the weight in its own shape."""
        weight = np.asarray(weight)
        if self.stored and self.groups == 1:
            weight = weight.reshape(self.shape)
        if self.stuffed:
            weight = np.flip(weight, tuple(range(2, weight.ndim)))
        if self.groups > 1:
            taps = math.prod(self.kernel)
            parts = weight.reshape(self.groups, self.width // self.groups, -1, taps).transpose(0, 2, 3, 1)
            full = np.zeros((*parts.shape[:3], self.groups, parts.shape[3]), weight.dtype)
            each = np.arange(self.groups)
            full[each, :, :, each] = parts
            return full.reshape(self.size, self.width)
        moved = np.moveaxis(np.asarray(weight), self.axis, 0)  # summed, outputs, *kernel
        return np.ascontiguousarray(np.moveaxis(moved, 1, -1)).reshape(self.size, self.width)

    def weight(self, matrix: Array) -> Array:
        """Return the weight in its own shape, of a matrix."""
        if self.groups > 1:
            g, taps = self.groups, math.prod(self.kernel)
            split = matrix.reshape(g, self.shape[1] // g, taps, g, self.width // g)
            each = np.arange(g)
            own = split[each, :, :, each].transpose(0, 3, 1, 2)  # groups, outputs, channels, taps
            return np.ascontiguousarray(own).reshape(self.stored or (self.width, self.shape[1] // g, *self.kernel))
        full = matrix.reshape(self.shape[self.axis], *self.kernel, self.width)
        weight = np.moveaxis(np.moveaxis(full, -1, 1), 0, self.axis)
        if self.stuffed:
            weight = np.flip(weight, tuple(range(2, weight.ndim)))
        return np.ascontiguousarray(weight).reshape(self.stored or weight.shape)

    def rows_of(self, columns: Labels) -> Labels:
        """(elements, k times taps): the rows of the matrix that belong to each element."""
        taps = math.prod(self.kernel)
        return (columns[:, :, None] * taps + np.arange(taps)).reshape(len(columns), columns.shape[1] * taps)


def plain_transpose(node: ir.Node) -> bool:
    """Return whether a ConvTranspose has no output_shape, and no padding beyond what its kernel adds."""
    if attribute(node, "output_shape", None) or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    weight = node.inputs[1]
    kernel = None if weight is None or weight.shape is None else weight.shape.numpy()[2:]
    if kernel is None:
        return False
    d = len(kernel)
    pads, steps = attribute(node, "pads", (0,) * (2 * d)), attribute(node, "dilations", (1,) * d)
    return all(
        step * (k - 1) >= max(pads[i], pads[d + i]) for i, (step, k) in enumerate(zip(steps, kernel, strict=True))
    )


class NormalEquations:
    """Sums for ``min |Y - X W - b|²``, batch by batch.

    Rows are taken relative to the mean of the first batch, so that large means cost no digits; products of a few
    thousand rows are in the rows' own precision, everything else is in float64. ``x`` and ``y``: sums of the rows.
    ``zeros``: makes the matrices, perhaps in a file. ``blocks``: of a product in groups, `LinearOpGeometry.blocks`:
    sums between groups, which its weight cannot use, are taken for zero.
    """

    def __init__(
        self,
        size: int,
        width: int,
        zeros: Callable[[tuple[int, ...]], FloatArray] = lambda shape: np.zeros(shape),
        blocks: tuple[Labels, Labels] | None = None,
    ) -> None:
        self.rows = 0
        self._blocks = blocks
        self.x, self.y = np.zeros(size), np.zeros(width)
        self._xx, self._xy = zeros((size, size)), zeros((size, width))
        self._origin: tuple[Array, Array] | None = None

    def add(self, x: Array, y: Array | None) -> None:
        """Rows of inputs (rows, K) and targets (rows, outputs); without targets only the inputs are counted."""
        if not len(x):
            return
        x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
        if self._origin is None:
            about = self.y if y is None else y.mean(axis=0, dtype=np.float64)
            # as the rows' own type holds them, so that what is subtracted is what is added again
            self._origin = x.mean(axis=0, dtype=np.float64).astype(x.dtype), about.astype(x.dtype)
        self.rows += len(x)
        self.x += x.sum(axis=0, dtype=np.float64)
        if y is not None:
            y = y.astype(x.dtype, copy=False)
            self.y += y.sum(axis=0, dtype=np.float64)
            self._xy += self._products(x, y)
        for part in self._parts(x, self._origin[0]):
            self._xx += _squared(part)

    def retarget(self, x: Array, y: Array) -> None:
        """Other targets for the same rows, all of them at once."""
        assert self._origin is not None
        self.y = y.astype(x.dtype, copy=False).sum(axis=0, dtype=np.float64)
        self._origin = self._origin[0], (self.y / self.rows).astype(x.dtype)
        self._xy = self._products(x, y)

    def gram(self, *, centred: bool) -> FloatArray:
        """Return the mean of x xᵀ."""
        mean, (off, _) = self.x / max(self.rows, 1), self._offsets()
        inner = self._xx / max(self.rows, 1) - np.outer(off, off)
        whole = inner if centred else inner + np.outer(mean, mean)
        if self._blocks is not None:
            whole *= self._blocks[0][:, None] == self._blocks[0]
        return np.asarray(whole)

    @property
    def bordered(self) -> FloatArray:
        """Return the mean of u uᵀ for u = (x, 1)."""
        out = np.ones((len(self.x) + 1, len(self.x) + 1))
        out[:-1, :-1] = self.gram(centred=False)
        out[:-1, -1] = out[-1, :-1] = self.x / max(self.rows, 1)
        return out

    def cross(self, *, centred: bool) -> FloatArray:
        """Return the mean of x yᵀ."""
        inner = self._xy / max(self.rows, 1) - np.outer(*self._offsets())
        whole = inner if centred else inner + np.outer(self.x, self.y) / max(self.rows, 1) ** 2
        if self._blocks is not None:
            whole *= self._blocks[0][:, None] == self._blocks[1]
        return np.asarray(whole)

    def _offsets(self) -> tuple[Array, Array]:
        """Means relative to the origin."""
        if self._origin is None:
            return self.x, self.y
        a, b = self._origin
        return self.x / self.rows - a, self.y / self.rows - b

    def _products(self, x: Array, y: Array) -> FloatArray:
        assert self._origin is not None
        total = np.zeros_like(self._xy)
        y = y.astype(x.dtype, copy=False)
        for a, b in zip(self._parts(x, self._origin[0]), self._parts(y, self._origin[1]), strict=True):
            total += a.T @ b
        return total

    @staticmethod
    def _parts(rows: Array, origin: Array) -> Iterator[Array]:
        """Yield a few rows at a time, relative to the origin."""
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            yield part - origin


def widened(values: Array) -> Array:
    """Return values of 16 bits as float32: numpy multiplies them far more slowly, and rounds the result to 16 bits."""
    return values.astype(np.float32) if values.dtype.itemsize < 4 else values


def _squared(rows: Array) -> FloatArray:
    """Return xᵀ x, in the rows' own precision where that holds it.

    Raises:
        InputError: float64 does not, either.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        made = (rows.T @ rows).astype(np.float64)
        if not np.isfinite(np.diagonal(made)).all():
            wide = rows.astype(np.float64)
            made = wide.T @ wide
    check_squares(np.diagonal(made))
    return np.asarray(made)


def sample_places(count: int, wanted: int | None, rng: np.random.Generator) -> Labels | None:
    """At most ``wanted`` of ``count`` positions, sorted; None takes all."""
    if wanted is None or wanted >= count:
        return None
    return np.sort(rng.choice(count, wanted, replace=False))
