"""Steps of random graphs: changes of shape, statistics, and patterns of several nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tests.fuzz.fuzz_pool import Unfit
from tests.fuzz.fuzz_steps import Steps

REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd",
    "ReduceLogSumExp",
)  # fmt: skip


class Layers(Steps):
    """Steps that rearrange values or take statistics, and blocks as networks have them."""

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
            flat = [
                0 if a < len(shape) and d == shape[a] and (a == 0 or self.chance(0.5)) else d for a, d in enumerate(new)
            ]
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
            return self.made([a * b for a, b in zip(shape, times, strict=True)], "Tile", x, self.ints(*times))
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
        return self.made(
            (*shape[:axis], shape[axis] + lo + hi, *shape[axis + 1 :]), "Pad", x, self.ints(*pads), *value, mode=mode
        )

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
        return self.same(kind, x, *(self.param((c,)) for _ in range(3)), positive, epsilon=2.0**-17)

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
