"""Random ONNX graphs, many of them odd: a growing pool of values of known shapes, and one method per kind of step.

`random_model(seed)` is a valid float64 model (opsets 13 to 23); the same seed always gives the same one. A step that
does not fit the value that it was offered raises `Unfit`, and another one is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from tests.zoo.net import Net

Shape = tuple[int, ...]
WIDTHS = (4, 6, 8, 12)
LARGEST = 4000
"""Entries of the largest value."""

UNARY = (
    "Relu", "LeakyRelu", "Tanh", "Sigmoid", "Abs", "Neg", "Identity", "Softplus", "Elu", "Selu", "Exp", "Sin", "Cos",
    "Erf", "Softsign", "HardSigmoid", "ThresholdedRelu", "Sign", "Floor", "Round", "Asinh", "Atan",
)  # fmt: skip
REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd",
    "ReduceLogSumExp",
)  # fmt: skip


class Unfit(Exception):
    """The step does not fit the value."""


class Fuzz(Net):
    """A net that keeps the shapes of its values, and the weights that may be used again."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng([20240, seed])
        super().__init__(f"fuzz_{seed}", int(rng.integers(13, 24)), "float64")
        self.rng = rng
        self.version = self.domains[""]
        self.dynamic = bool(rng.random() < 0.25)  # then axis 0 is the batch in every value
        self.shapes: dict[str, Shape] = {}
        self.pool: list[str] = []
        self.weights: dict[Shape, list[str]] = {}

    # ------------------------------------------------------------ choosing
    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def pick(self, items: Sequence[Any]) -> Any:
        if not len(items):
            raise Unfit
        return items[int(self.rng.integers(len(items)))]

    def width(self) -> int:
        return int(self.pick(WIDTHS))

    def axis(self, x: str, least: int = 1) -> int:
        """An axis that may be worked on: not the batch where that is dynamic."""
        shape = self.shapes[x]
        return int(self.pick([a for a in range(int(self.dynamic), len(shape)) if shape[a] >= least]))

    def ranked(self, x: str, *ranks: int) -> Shape:
        if len(self.shapes[x]) not in ranks:
            raise Unfit
        return self.shapes[x]

    def recent(self) -> str:
        """A value, rather one of the last."""
        back = min(int(self.rng.geometric(0.4)), len(self.pool))
        return self.pool[-back]

    # ------------------------------------------------------------ making
    def made(self, shape: Sequence[int], op_type: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output of known shape."""
        shape = tuple(int(d) for d in shape)
        if not shape or not 0 < math.prod(shape) <= LARGEST or len(shape) > 6:
            raise Unfit
        name = self.op(op_type, *inputs, **attributes)
        self.shapes[name] = shape
        return name

    def param(self, shape: Sequence[int], fan: int | None = None, *, reuse: float = 0.15, odd: float = 0.05) -> str:
        """A new weight, or one that is in use already; once in a while all zeros or ones."""
        shape = tuple(int(d) for d in shape)
        known = self.weights.setdefault(shape, [])
        if known and self.chance(reuse):
            return str(self.pick(known))
        if len(shape) == 2 and self.weights.get(shape[::-1]) and self.chance(reuse):
            return self.made(shape, "Transpose", self.pick(self.weights[shape[::-1]]), perm=[1, 0])
        data = self.normal(shape, (fan or 2) ** -0.5)
        if self.chance(odd):
            data = np.full(shape, float(self.rng.integers(0, 2)))
        name = self.const(data, "w")
        self.shapes[name] = shape
        known.append(name)
        return name

    def ints(self, *values: int) -> str:
        return self.const(np.asarray(values, np.int64), "i")

    def same(self, op_type: str, x: str, *inputs: str, **attributes: Any) -> str:
        return self.made(self.shapes[x], op_type, x, *inputs, **attributes)

    def tamed(self, x: str) -> str:
        """Positive and away from zero."""
        return self.same("Add", self.same("Abs", x), self.const(0.5))

    # ------------------------------------------------------------ contractions
    def linear_step(self, x: str) -> str:
        shape, n = self.shapes[x], self.width()
        if len(shape) < 2:
            raise Unfit
        y = self.made((*shape[:-1], n), "MatMul", x, self.param((shape[-1], n), shape[-1]))
        return self.same("Add", y, self.param((n,))) if self.chance(0.6) else y

    def gemm_step(self, x: str) -> str:
        shape = self.ranked(x, 2)
        n, trans = self.width(), int(self.chance(0.5))
        weight = self.param((n, shape[1]) if trans else (shape[1], n), shape[1])
        parts = [x, weight]
        if self.chance(0.7):
            parts.append(self.param(self.pick([(n,), (1, n), (1,)])))
        return self.made((shape[0], n), "Gemm", *parts, transB=trans, alpha=self.pick([1.0, 0.5]))

    def conv_step(self, x: str) -> str:
        shape = self.ranked(x, 3, 4)
        c, space = shape[1], shape[2:]
        group = int(self.pick([1, 1, 1, *(g for g in (2, 3, c) if c % g == 0)]))
        n = int(self.pick([m for m in (*WIDTHS, c, 2 * c) if m % group == 0 and m <= 24]))
        k = int(self.pick([1, 3]))
        weight = self.param((n, c // group, *([k] * len(space))), c // group * k)
        parts = [x, weight, *([self.param((n,))] if self.chance(0.6) else [])]
        pads = [k // 2] * (2 * len(space))
        return self.made((shape[0], n, *space), "Conv", *parts, group=group, kernel_shape=[k] * len(space), pads=pads)

    def conv_transpose_step(self, x: str) -> str:
        shape = self.ranked(x, 4)
        group, c = int(self.pick([1, 1, *(g for g in (2,) if shape[1] % g == 0)])), shape[1]
        n = self.width() // 2
        weight = self.param((c, n, 1, 1), c)
        return self.made((shape[0], n * group, *shape[2:]), "ConvTranspose", x, weight, group=group)

    def einsum_step(self, x: str) -> str:
        b, t, c = self.ranked(x, 3)
        h, d = int(self.pick([2, 3])), int(self.pick([2, 4]))
        case = int(self.rng.integers(4))
        if case == 0:
            return self.made((b, h, t, d), "Einsum", x, self.param((h, c, d), c), equation="btc,hcd->bhtd")
        if case == 1:
            return self.made((b, d, t), "Einsum", self.param((c, d), c), x, equation="cd,btc->bdt")
        if case == 2:
            return self.made((b, c, c), "Einsum", x, x, equation="bti,btj->bij")
        return self.made((b, t), "Einsum", x, self.param((c,), c), equation="btc,c->bt")

    def product_step(self, x: str) -> str:
        """Products of activations."""
        shape = self.shapes[x]
        if len(shape) < 3:
            raise Unfit
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        turned = self.made([shape[a] for a in perm], "Transpose", x, perm=perm)
        y = self.pick([v for v in self.pool if self.shapes[v] == shape])
        scores = self.made((*shape[:-1], shape[-2]), "MatMul", y, turned)
        if self.chance(0.5):
            scores = self.same("Softmax", scores, axis=-1)
            return self.made(shape, "MatMul", scores, self.pick([v for v in self.pool if self.shapes[v] == shape]))
        return scores

    # ------------------------------------------------------------ elementwise
    def unary_step(self, x: str) -> str:
        choices = [*UNARY, "Log", "Sqrt", "Reciprocal", "Clip", "Pow", "Cast", "PRelu"]
        choices += ["HardSwish"] * (self.version >= 14) + ["Mish"] * (self.version >= 18) + ["Gelu"] * (self.version >= 20)
        op_type = str(self.pick(["Relu", *choices]))
        if op_type in ("Log", "Sqrt", "Reciprocal"):
            return self.same(op_type, self.tamed(x))
        if op_type == "Clip":
            low, high = self.pick([(-1.0, 1.0), (0.0, 6.0), (0.0, None), (None, 0.5)])
            return self.same("Clip", x, *("" if b is None else self.const(b) for b in (low, high)))
        if op_type == "Pow":
            return self.same("Pow", x, self.const(float(self.pick([1, 2, 3]))))
        if op_type == "Cast":
            return self.same("Cast", x, to=TensorProto.DOUBLE)
        if op_type == "PRelu":
            return self.same("PRelu", x, self.param(self.broadcastable(x)))
        return self.same(op_type, x)

    def broadcastable(self, x: str) -> Shape:
        shape = self.shapes[x]
        keep = [int(self.chance(0.5)) and (a > 0 or not self.dynamic) for a in range(len(shape))]
        made = tuple(d if k else 1 for d, k in zip(shape, keep, strict=True))
        return made[int(self.rng.integers(len(made) + 1)) :] if self.chance(0.4) and made[0] == 1 else made

    def partner(self, x: str) -> str:
        """Something that broadcasts with x: a value or a parameter."""
        if self.chance(0.45):
            return self.param(self.broadcastable(x))
        fits = [v for v in self.pool if v != x and fitting(self.shapes[v], self.shapes[x], self.dynamic)]
        return str(self.pick(fits or self.pool[-1:])) if self.chance(0.9) else x

    def binary_step(self, x: str) -> str:
        y = self.partner(x)
        if not fitting(self.shapes[x], self.shapes[y], self.dynamic and y in self.pool):
            raise Unfit
        shape = np.broadcast_shapes(self.shapes[x], self.shapes[y])
        op_type = str(self.pick(["Add", "Add", "Sub", "Mul", "Mul", "Max", "Min", "Div", "Where", "Pow", "Sum", "Mean"]))
        if op_type == "Where":
            return self.made(shape, "Where", self.made(shape, self.pick(["Less", "Greater"]), x, y), x, y)
        if op_type == "Div":
            y = self.tamed(y)
        if op_type == "Pow":
            x, y = self.tamed(x), self.same("Tanh", y)
        pair = (y, x) if op_type not in ("Div", "Pow") and self.chance(0.4) else (x, y)
        return self.made(shape, op_type, *pair)

    def condition_step(self, x: str) -> str:
        shape = self.shapes[x]
        mask = self.const(self.rng.random(self.broadcastable(x)) < 0.6, "mask")
        return self.made(shape, "Where", mask, x, self.const(float(self.pick([0.0, 0.0, 1.5, -3.0]))))

    # ------------------------------------------------------------ indices
    def concat_step(self, x: str) -> str:
        axis, shape = self.axis(x), self.shapes[x]
        rest = [v for v in self.pool if without(self.shapes[v], axis) == without(shape, axis)]
        parts = [x]
        for _ in range(int(self.rng.integers(1, 3))):
            if self.chance(0.2) and not self.dynamic:
                width = int(self.rng.integers(1, 4))
                parts.append(self.param((*shape[:axis], width, *shape[axis + 1 :]), odd=0.5))
            else:
                parts.append(x if self.chance(0.25) else str(self.pick(rest)))
        self.rng.shuffle(parts)
        total = sum(self.shapes[p][axis] for p in parts)
        return self.made((*shape[:axis], total, *shape[axis + 1 :]), "Concat", *parts, axis=axis)

    def split_step(self, x: str) -> str:
        axis = self.axis(x, 2)
        shape, n = self.shapes[x], self.shapes[x][axis]
        cut = n // 2 if n % 2 == 0 and self.chance(0.7) else int(self.rng.integers(1, n))
        names = self.multi("Split", [x, self.ints(cut, n - cut)], 2, axis=axis - (len(shape) if self.chance(0.3) else 0))
        for name, size in zip(names, (cut, n - cut), strict=True):
            self.shapes[name] = (*shape[:axis], size, *shape[axis + 1 :])
            self.pool.append(name)
        if self.chance(0.3) and cut == n - cut:  # rotate_half
            return self.made(shape, "Concat", self.same("Neg", names[1]), names[0], axis=axis)
        return names[int(self.rng.integers(2))]

    def slice_step(self, x: str) -> str:
        axis = self.axis(x, 2)
        shape, n = self.shapes[x], self.shapes[x][axis]

        def part(start: int, end: int, step: int) -> str:
            count = len(range(n)[start : None if end < -n else end : step])
            bounds = [self.ints(v) for v in (start, end, axis, step)]
            return self.made((*shape[:axis], count, *shape[axis + 1 :]), "Slice", x, *bounds)

        case = int(self.rng.integers(4))
        if case == 0:
            return part(int(self.rng.integers(2)), 2**40, 2)
        if case == 1:
            return part(n - 1, -(2**40), -1 if self.chance(0.7) else -2)
        if case == 2:  # roll
            k = int(self.rng.integers(1, n))
            return self.made(shape, "Concat", part(k, n, 1), part(0, k, 1), axis=axis)
        lo = int(self.rng.integers(0, n - 1))
        return part(lo, int(self.rng.integers(lo + 1, n + 1)), 1)

    def gather_step(self, x: str) -> str:
        axis = self.axis(x, 2)
        shape, n = self.shapes[x], self.shapes[x][axis]
        index = self.pick([
            self.rng.permutation(n), self.rng.integers(-n, n, n), np.sort(self.rng.choice(n, max(1, n // 2), False)),
            np.repeat(np.arange(n), 2), np.tile(np.arange(n), 2), np.asarray(self.rng.integers(n)),
            np.arange(n // 2 * 2).reshape(2, -1), np.arange(n)[::-1], self.rng.permutation(n // 2 * 2).reshape(-1, 2),
        ])  # fmt: skip
        made = (*shape[:axis], *index.shape, *shape[axis + 1 :])
        return self.made(made, "Gather", x, self.const(index.astype(np.int64), "index"), axis=axis)

    def scatter_step(self, x: str) -> str:
        if self.dynamic:
            raise Unfit
        shape = self.shapes[x]
        rows = np.sort(self.rng.choice(shape[0], max(1, shape[0] // 2), False)).astype(np.int64)
        if self.chance(0.5):
            updates = self.param((len(rows), *shape[1:]))
            return self.made(shape, "ScatterND", x, self.const(rows[:, None], "index"), updates)
        axis = self.axis(x)
        index = self.rng.permuted(np.broadcast_to(np.arange(shape[axis]), shape[:axis] + shape[axis + 1 :] + (shape[axis],)), axis=-1)
        return self.made(shape, "GatherElements", x, self.const(np.moveaxis(index, -1, axis).astype(np.int64)), axis=axis)

    def ordered_step(self, x: str) -> str:
        axis, case = self.axis(x), int(self.rng.integers(2))
        shape = self.shapes[x]
        if case == 0:
            return self.same("CumSum", x, self.const(np.asarray(axis, np.int64)))
        k = max(1, shape[axis] // 2)
        names = self.multi("TopK", [x, self.ints(k)], 2, axis=axis)
        self.shapes[names[0]] = (*shape[:axis], k, *shape[axis + 1 :])
        return names[0]

    # ------------------------------------------------------------ shapes
    def transpose_step(self, x: str) -> str:
        shape = self.shapes[x]
        perm = self.rng.permutation(len(shape))
        if self.dynamic:
            perm = np.r_[0, 1 + self.rng.permutation(len(shape) - 1)]
        return self.made([shape[a] for a in perm], "Transpose", x, perm=perm.tolist())

    def target(self, x: str, new: Sequence[int]) -> str:
        """The target of a Reshape: numbers, zeros where the size stays, one of them inferred, or computed."""
        shape = self.shapes[x]
        flat: list[int] = list(new)
        if self.dynamic or self.chance(0.3):
            flat = [0 if a < len(shape) and d == shape[a] and (a == 0 or self.chance(0.5)) else d for a, d in enumerate(new)]
        if self.chance(0.3):
            flat[int(self.rng.integers(int(self.dynamic), len(flat)))] = -1
        if self.chance(0.25) and flat.count(-1) == 0:
            sizes = self.op("Shape", x)
            where = [a for a, d in enumerate(new) if a < len(shape) and d == shape[a]]
            parts = [self.op("Gather", sizes, self.ints(a)) if a in where else self.ints(d) for a, d in enumerate(new)]
            return self.op("Concat", *parts, axis=0)
        return self.ints(*flat)

    def reshape_step(self, x: str) -> str:
        new = list(self.shapes[x])
        for _ in range(int(self.rng.integers(1, 3))):
            first = int(self.dynamic)
            if self.chance(0.5) and len(new) > first + 1:
                a = int(self.rng.integers(first, len(new) - 1))
                new[a : a + 2] = [new[a] * new[a + 1]]
            else:
                a = int(self.pick([a for a in range(first, len(new)) if new[a] > 3]))
                k = int(self.pick([k for k in (2, 3, 4) if new[a] % k == 0]))
                new[a : a + 1] = [k, new[a] // k] if self.chance(0.5) else [new[a] // k, k]
        if len(new) < 2:
            raise Unfit
        return self.made(new, "Reshape", x, self.target(x, new))

    def rank_step(self, x: str) -> str:
        shape = self.shapes[x]
        ones = [a for a in range(1, len(shape)) if shape[a] == 1]
        if ones and self.chance(0.6):
            a = int(self.pick(ones))
            return self.made(shape[:a] + shape[a + 1 :], "Squeeze", x, self.ints(a))
        if self.chance(0.5):
            return self.made((shape[0], math.prod(shape[1:])), "Flatten", x)
        a = int(self.rng.integers(1, len(shape) + 1))
        return self.made((*shape[:a], 1, *shape[a:]), "Unsqueeze", x, self.ints(a))

    def repeat_step(self, x: str) -> str:
        axis, shape = self.axis(x), self.shapes[x]
        times = [1] * len(shape)
        if self.chance(0.5):
            times[axis] = 2
            return self.made(np.multiply(shape, times), "Tile", x, self.ints(*times))
        wide = self.made((*shape[: axis + 1], 1, *shape[axis + 1 :]), "Unsqueeze", x, self.ints(axis + 1))
        goal = [1] * (len(shape) + 1)
        goal[axis + 1] = 2
        grown = self.made((*shape[: axis + 1], 2, *shape[axis + 1 :]), "Expand", wide, self.ints(*goal))
        if self.chance(0.3):
            return grown
        new = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
        return self.made(new, "Reshape", grown, self.target(grown, new))

    def pad_step(self, x: str) -> str:
        axis, shape = self.axis(x, 3), self.shapes[x]
        lo, hi = int(self.rng.integers(0, 3)), int(self.rng.integers(0, 3))
        pads = [0] * (2 * len(shape))
        pads[axis], pads[axis + len(shape)] = lo, hi
        mode = str(self.pick(["constant", "constant", "constant", "reflect", "edge"]))
        value = [self.const(float(self.pick([0.0, 1.0])))] if mode == "constant" and self.chance(0.6) else []
        return self.made((*shape[:axis], shape[axis] + lo + hi, *shape[axis + 1 :]), "Pad", x, self.ints(*pads), *value, mode=mode)

    def space_step(self, x: str) -> str:
        n, c, h, w = self.ranked(x, 4)
        if self.chance(0.5) and c % 4 == 0:
            mode = self.pick(["DCR", "CRD"])
            return self.made((n, c // 4, 2 * h, 2 * w), "DepthToSpace", x, blocksize=2, mode=mode)
        if h % 2 or w % 2:
            raise Unfit
        return self.made((n, 4 * c, h // 2, w // 2), "SpaceToDepth", x, blocksize=2)

    # ------------------------------------------------------------ statistics
    def reduce_step(self, x: str) -> str:
        shape, op_type = self.shapes[x], str(self.pick(REDUCTIONS))
        axes = sorted({self.axis(x) for _ in range(int(self.rng.integers(1, 3)))})
        keep = int(self.chance(0.6))
        new = [1 if a in axes else d for a, d in enumerate(shape) if keep or a not in axes]
        if len(new) < 2:
            raise Unfit
        if self.version >= 18 or op_type == "ReduceSum":
            return self.made(new, op_type, x, self.ints(*axes), keepdims=keep)
        return self.made(new, op_type, x, axes=axes, keepdims=keep)

    def norm_step(self, x: str) -> str:
        shape = self.shapes[x]
        kinds = ["Softmax", "LogSoftmax", "rms", "LpNormalization", "BatchNormalization", "BatchNormalization"]
        kinds += ["LayerNormalization"] * 2 * (self.version >= 17) + ["GroupNormalization"] * (self.version >= 21)
        kind, axis = str(self.pick(kinds)), self.axis(x, 2)
        if kind in ("Softmax", "LogSoftmax", "LpNormalization"):
            return self.same(kind, x, axis=axis)
        if kind == "LayerNormalization":
            rest = shape[axis:]
            return self.same(kind, x, self.param(rest), *([self.param(rest)] if self.chance(0.7) else []), axis=axis)
        if kind == "rms":
            square = self.same("Mul", x, x)
            one = self.const(np.asarray([-1], np.int64)) if self.version >= 18 else ""
            extra: dict[str, Any] = {} if one else {"axes": [-1]}
            mean = self.made((*shape[:-1], 1), "ReduceMean", square, *([one] if one else []), **extra)
            root = self.same("Sqrt", self.same("Add", mean, self.const(1e-5)))
            return self.same("Mul", self.same("Div", x, root), self.param((shape[-1],)))
        if len(shape) < 3 or shape[1] < 2:
            raise Unfit
        c = shape[1]
        if kind == "GroupNormalization":
            groups = int(self.pick([g for g in (1, 2, 3, 4) if c % g == 0]))
            return self.same(kind, x, self.param((c,)), self.param((c,)), num_groups=groups)
        positive = self.const(self.rng.uniform(0.5, 2.0, c))
        return self.same(kind, x, self.param((c,)), self.param((c,)), self.param((c,)), positive)

    def pool_step(self, x: str) -> str:
        n, c, h, w = self.ranked(x, 4)
        if self.chance(0.3):
            return self.made((n, c, 1, 1), "GlobalAveragePool", x)
        return self.made((n, c, h, w), self.pick(["MaxPool", "AveragePool"]), x, kernel_shape=[3, 3], pads=[1] * 4)

    # ------------------------------------------------------------ patterns
    def residual_step(self, x: str) -> str:
        shape = self.shapes[x]
        if len(shape) < 2 or shape[-1] < 2:
            raise Unfit
        n = self.width()
        y = self.made((*shape[:-1], n), "MatMul", x, self.param((shape[-1], n), shape[-1]))
        y = self.same(self.pick(["Relu", "Tanh", "Sigmoid", "LeakyRelu"]), y)
        y = self.made(shape, "MatMul", y, self.param((n, shape[-1]), n))
        return self.same("Add", x, y)

    def shuffle_step(self, x: str) -> str:
        n, c, h, w = self.ranked(x, 4)
        g = int(self.pick([g for g in (2, 3, 4) if c % g == 0]))
        y = self.made((n, g, c // g, h, w), "Reshape", x, self.ints(0, g, -1, h, w))
        y = self.made((n, c // g, g, h, w), "Transpose", y, perm=[0, 2, 1, 3, 4])
        return self.made((n, c, h, w), "Reshape", y, self.target(y, (n, c, h, w)))

    def gate_step(self, x: str) -> str:
        n, c, _, _ = self.ranked(x, 4)
        mean = self.made((n, c, 1, 1), "GlobalAveragePool", x)
        low = self.made((n, 4, 1, 1), "Conv", mean, self.param((4, c, 1, 1), c))
        high = self.made((n, c, 1, 1), "Conv", self.same("Relu", low), self.param((c, 4, 1, 1), 4))
        return self.same("Mul", x, self.same("Sigmoid", high))

    def attention_step(self, x: str) -> str:
        b, t, c = self.ranked(x, 3)
        heads, times, d = int(self.pick([2, 3])), int(self.pick([1, 1, 2])), int(self.pick([2, 4]))

        def formed(y: str, count: int) -> str:
            y = self.made((b, t, count, d), "Reshape", y, self.target(y, (b, t, count, d)))
            return self.made((b, count, t, d), "Transpose", y, perm=[0, 2, 1, 3])

        if times == 1 and self.chance(0.4):
            joint = self.made((b, t, 3 * heads * d), "MatMul", x, self.param((c, 3 * heads * d), c))
            flat = self.multi("Split", [joint, self.ints(*[heads * d] * 3)], 3, axis=-1)
            for part in flat:
                self.shapes[part] = (b, t, heads * d)
        else:
            sizes = [heads * times * d, heads * d, heads * d]
            flat = [self.made((b, t, n), "MatMul", x, self.param((c, n), c)) for n in sizes]
        q, k, v = (formed(y, n) for y, n in zip(flat, (heads * times, heads, heads), strict=True))
        if times > 1:
            case = int(self.rng.integers(4))
            k, v = (self.repeated(y, case) for y in (k, v))
        if self.chance(0.3):
            k = self.same("Tanh", k)
        turned = self.made((b, heads * times, d, t), "Transpose", k, perm=[0, 1, 3, 2])
        scores = self.made((b, heads * times, t, t), "MatMul", q, turned)
        y = self.made((b, heads * times, t, d), "MatMul", self.same("Softmax", scores, axis=-1), v)
        y = self.made((b, t, heads * times, d), "Transpose", y, perm=[0, 2, 1, 3])
        n = heads * times * d
        y = self.made((b, t, n), "Reshape", y, self.target(y, (b, t, n)))
        y = self.made((b, t, c), "MatMul", y, self.param((n, c), n))
        return self.same("Add", x, y) if self.chance(0.6) else y

    def repeated(self, y: str, case: int) -> str:
        """Each head twice, or all heads twice."""
        b, h, t, d = self.shapes[y]
        new = (b, 2 * h, t, d)
        if case == 0:
            return self.made(new, "Concat", y, y, axis=1)
        if case == 1:
            return self.made(new, "Tile", y, self.ints(1, 2, 1, 1))
        if case == 2:
            return self.made(new, "Gather", y, self.const(np.repeat(np.arange(h), 2)), axis=1)
        wide = self.made((b, h, 1, t, d), "Unsqueeze", y, self.ints(2))
        wide = self.made((b, h, 2, t, d), "Expand", wide, self.ints(1, 1, 2, 1, 1))
        return self.made(new, "Reshape", wide, self.ints(0, 2 * h, t, d))

    # ------------------------------------------------------------ the graph
    def begin(self) -> None:
        batch: int | str = "N" if self.dynamic else 2
        for k in range(int(self.pick([1, 1, 2]))):
            shape = self.pick([(2, 5), (2, 5, 4), (2, 5, 4), (2, 3, 4, 4), (2, 3, 4, 4)])
            name = self.input(f"x{k}", [batch, *shape[1:]])
            self.shapes[name] = shape
            self.pool.append(name)
            step = self.conv_step if len(shape) == 4 else self.linear_step
            self.pool.append(step(name))

    def grow(self, steps: int) -> None:
        """Add this many steps; those that do not fit are taken back."""
        menu = [
            (step, weight) for name, weight in MENU.items() for step in [getattr(self, f"{name}_step")]
        ]  # fmt: skip
        chances = np.asarray([w for _, w in menu], float)
        count = 0
        for _ in range(10 * steps):
            if count >= steps:
                return
            step: Callable[[str], str] = menu[int(self.rng.choice(len(menu), p=chances / chances.sum()))][0]
            before = len(self.nodes), len(self.initializers), len(self.pool)
            try:
                self.pool.append(step(self.recent()))
                count += 1
            except Unfit:
                self.take_back(*before)

    def take_back(self, nodes: int, initializers: int, pool: int) -> None:
        """Forget what an unfit step left behind."""
        gone = {t.name for t in self.initializers[initializers:]}
        self.weights = {s: [w for w in known if w not in gone] for s, known in self.weights.items()}
        del self.nodes[nodes:], self.initializers[initializers:], self.pool[pool:]

    def finish(self) -> None:
        """One to three outputs: what nothing reads yet, mostly behind a linear map."""
        read = {i for node in self.nodes for i in node.input}
        loose = [v for v in self.pool[1:] if v not in read] or self.pool[-1:]
        for x in loose[-3:]:
            shape = self.shapes[x]
            if 1 < len(shape) and 3 * math.prod(shape[:-1]) <= LARGEST and self.chance(0.85):
                x = self.made((*shape[:-1], 3), "MatMul", x, self.param((shape[-1], 3), shape[-1]))
            else:
                x = self.same("Identity", x)
            batch: int | str = "N" if self.dynamic else self.shapes[x][0]
            self.output(x, [batch, *self.shapes[x][1:]])


MENU = {
    "linear": 9, "gemm": 5, "conv": 9, "conv_transpose": 1, "einsum": 2, "product": 2, "unary": 9, "binary": 10,
    "condition": 1, "concat": 5, "split": 4, "slice": 4, "gather": 5, "scatter": 1, "ordered": 1, "transpose": 4,
    "reshape": 7, "rank": 3, "repeat": 3, "pad": 3, "space": 2, "reduce": 4, "norm": 4, "pool": 2, "residual": 3,
    "shuffle": 3, "gate": 1, "attention": 3,
}  # fmt: skip
"""The steps and how often they are offered."""


def without(shape: Shape, axis: int) -> tuple[int, Shape]:
    """What must agree in a Concat along the axis."""
    return len(shape), shape[:axis] + shape[axis + 1 :]


def fitting(a: Shape, b: Shape, dynamic: bool) -> bool:
    """Whether two shapes broadcast; batch axes must meet where they are dynamic."""
    if dynamic and len(a) != len(b):
        return False
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


def random_model(seed: int, steps: int | None = None) -> onnx.ModelProto:
    """A valid float64 model of about 10 to 25 nodes; the same for the same seed."""
    fuzz = Fuzz(seed)
    fuzz.begin()
    fuzz.grow(int(fuzz.rng.integers(4, 14)) if steps is None else steps)
    fuzz.finish()
    return pruned(fuzz.model())


def pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the nodes, parameters and inputs that no output needs."""
    graph, needed = model.graph, {o.name for o in model.graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    for field, kept in (
        (graph.node, nodes[::-1]),
        (graph.initializer, [t for t in graph.initializer if t.name in needed]),
        (graph.input, [v for v in graph.input if v.name in needed]),
    ):
        del field[:]
        field.extend(kept)
    return model


def random_feeds(model: onnx.ModelProto, seed: int, batch: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs for a model of `random_model`."""
    rng = np.random.default_rng([7, seed])
    shapes = {v.name: [d.dim_value or batch for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}
