"""Steps of random graphs: contractions, functions of single entries, selections. Each extends a value of the pool."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from tests.fuzz.fuzz_pool import WIDTHS, Pool, Shape, Unfit, fitting, without

UNARY = (
    "Relu", "LeakyRelu", "Tanh", "Sigmoid", "Abs", "Neg", "Identity", "Softplus", "Elu", "Selu", "Exp", "Sin", "Cos",
    "Erf", "Softsign", "HardSigmoid", "ThresholdedRelu", "Sign", "Floor", "Round", "Asinh", "Atan",
)  # fmt: skip
BINARY = ("Add", "Add", "Sub", "Mul", "Mul", "Max", "Min", "Div", "Where", "Pow", "Sum", "Mean")


class Steps(Pool):
    """Steps that combine or select entries."""

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
        choices += (
            ["HardSwish"] * (self.version >= 14) + ["Mish"] * (self.version >= 18) + ["Gelu"] * (self.version >= 20)
        )
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
        op_type = str(
            self.pick(["Add", "Add", "Sub", "Mul", "Mul", "Max", "Min", "Div", "Where", "Pow", "Sum", "Mean"])
        )
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
        names = self.multi(
            "Split", [x, self.ints(cut, n - cut)], 2, axis=axis - (len(shape) if self.chance(0.3) else 0)
        )
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
        index = self.rng.permuted(
            np.broadcast_to(np.arange(shape[axis]), shape[:axis] + shape[axis + 1 :] + (shape[axis],)), axis=-1
        )
        return self.made(
            shape, "GatherElements", x, self.const(np.moveaxis(index, -1, axis).astype(np.int64)), axis=axis
        )

    def ordered_step(self, x: str) -> str:
        axis, case = self.axis(x), int(self.rng.integers(2))
        shape = self.shapes[x]
        if case == 0:
            return self.same("CumSum", x, self.const(np.asarray(axis, np.int64)))
        k = max(1, shape[axis] // 2)
        names = self.multi("TopK", [x, self.ints(k)], 2, axis=axis)
        self.shapes[names[0]] = (*shape[:axis], k, *shape[axis + 1 :])
        return names[0]
