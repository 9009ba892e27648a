"""Steps of random modules: layers, activations, normalizations, sizes used as numbers, parts and joins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Function = Any
"""Takes the module, the tensor, and earlier tensors; gives a tensor."""


class Place:
    """Where a step stands: the module, a name for its layers, random choices, and the shape that arrives."""

    def __init__(
        self, module: nn.Module, name: str, rng: np.random.Generator, shape: tuple[int, ...], dynamic: bool, kept: Any
    ) -> None:
        self.module, self.name, self.rng, self.shape, self.dynamic, self.kept = module, name, rng, shape, dynamic, kept
        self.axis = 1 if len(shape) == 4 else len(shape) - 1
        self.width = shape[self.axis]
        self.held: list[str] = []

    def pick(self, *options: Any) -> Any:
        """One of some options; those that are None are left out."""
        found = [o for o in options if o is not None]
        return found[int(self.rng.integers(len(found)))]

    def layer(self, made: nn.Module | nn.Parameter) -> str:
        """Register a layer or a parameter."""
        name = f"{self.name}_{len(self.held)}"
        self.held.append(name)
        setattr(self.module, name, made)
        return name

    def forget(self) -> None:
        """Take the layers back."""
        for name in self.held:
            delattr(self.module, name)

    def along(self, *sizes: int) -> tuple[int, ...]:
        """A shape that broadcasts along the units: ones elsewhere."""
        rest = len(self.shape) - 1 - self.axis
        return (*sizes, *[1] * rest)


def project(p: Place) -> Function:
    """Linear or convolution, as a module, a functional, or by hand."""
    out = p.pick(6, 8, 12)
    if len(p.shape) == 4:
        groups = p.pick(1, 1, 2 if p.width % 2 == 0 else 1, p.width)
        out = out if out % groups == 0 else p.width
        a = p.layer(nn.Conv2d(p.width, out, p.pick(1, 3), padding=1 if p.rng.random() < 0.3 else 0, groups=groups,
                              bias=bool(p.rng.integers(2))))  # fmt: skip
        return p.pick(
            lambda m, x, k: getattr(m, a)(x),
            lambda m, x, k: F.conv2d(x, getattr(m, a).weight, getattr(m, a).bias, groups=groups),
        )
    a = p.layer(nn.Linear(p.width, out, bias=bool(p.rng.integers(2))))
    return p.pick(
        lambda m, x, k: getattr(m, a)(x),
        lambda m, x, k: F.linear(x, getattr(m, a).weight, getattr(m, a).bias),
        lambda m, x, k: x @ getattr(m, a).weight.t(),
        lambda m, x, k: torch.einsum("...c,dc->...d", x, getattr(m, a).weight),
        lambda m, x, k: x.reshape(-1, x.size(-1)).matmul(getattr(m, a).weight.T).view(*x.shape[:-1], out),
    )


def activation(p: Place) -> Function:
    """Modules, functions and methods, in place too."""
    a = p.layer(p.pick(nn.ReLU(inplace=True), nn.GELU(), nn.Tanh(), nn.SiLU(), nn.PReLU(), nn.LeakyReLU(0.2)))
    return p.pick(
        lambda m, x, k: getattr(m, a)(x * 1),
        lambda m, x, k: F.relu_(x + 0),
        lambda m, x, k: x.relu(),
        lambda m, x, k: torch.tanh(x),
        lambda m, x, k: (x - 0.5).clamp_(min=0),
        lambda m, x, k: F.hardtanh(x, -1, 1),
        lambda m, x, k: x.mul(2).relu_().sub_(0.1),
        lambda m, x, k: F.dropout(x, 0.5, training=m.training),
    )


def normalization(p: Place) -> Function | None:
    """With sizes as literals, computed, or in a layer."""
    c, half = p.width, p.width // 2
    if len(p.shape) == 3:
        a = p.layer(p.pick(nn.LayerNorm(c), nn.RMSNorm(c), nn.LayerNorm(c, elementwise_affine=False)))
        b = p.layer(nn.Parameter(torch.randn(c)))
        return p.pick(
            lambda m, x, k: getattr(m, a)(x),
            lambda m, x, k: F.layer_norm(x, (c,)),
            lambda m, x, k: F.layer_norm(x, (c,), getattr(m, b)),
            lambda m, x, k: F.layer_norm(x, x.shape[-1:], getattr(m, b)),
            lambda m, x, k: F.layer_norm(x, (x.size(-1),)),
            lambda m, x, k: F.rms_norm(x, (c,), getattr(m, b)),
            lambda m, x, k: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * getattr(m, b),
            lambda m, x, k: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 0.1).sqrt(),
            lambda m, x, k: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2) if c % 2 == 0 else x + 0,
        )
    kind = nn.BatchNorm2d if len(p.shape) == 4 else nn.BatchNorm1d
    a = p.layer(p.pick(kind(c), kind(c, affine=False)))
    b = p.layer(nn.GroupNorm(p.pick(1, 2 if c % 2 == 0 else 1, half if half and c % half == 0 else 1), c))
    return p.pick(
        lambda m, x, k: getattr(m, a)(x),
        lambda m, x, k: F.batch_norm(x, getattr(m, a).running_mean, getattr(m, a).running_var, eps=0.01),
        lambda m, x, k: getattr(m, b)(x),
        lambda m, x, k: F.instance_norm(x) if x.ndim == 4 else F.normalize(x, dim=1),
        lambda m, x, k: F.normalize(x, dim=1),
    )


def sizes(p: Place) -> Function:
    """Sizes used as numbers."""
    a, c = p.axis, p.width
    return p.pick(
        lambda m, x, k: x * x.size(a) ** -0.5,
        lambda m, x, k: x * c**-0.5,
        lambda m, x, k: x / x.shape[a],
        lambda m, x, k: x + x.size(a) / c,
        lambda m, x, k: x - 0.1 * x.size(a),
        lambda m, x, k: x * (x.shape[a] // 2),
        lambda m, x, k: x * (x.size(a) - 1),
        lambda m, x, k: x * (x[0].numel() * 0.01),
        lambda m, x, k: x.sum(a, keepdim=True) / x.size(a) + x,
        lambda m, x, k: x.sum(a, keepdim=True) / c + x,
        lambda m, x, k: x + torch.full_like(x, 0.3),
        lambda m, x, k: x + torch.ones(x.size(a)).view(p.along(-1)),
        lambda m, x, k: x + torch.ones(c).view(p.along(-1)),
        lambda m, x, k: x * torch.full((c,), 0.5).view(p.along(c)),
        lambda m, x, k: torch.addcmul(x, x, x.sigmoid(), value=1 / c),
        lambda m, x, k: x * torch.tensor(float(c)).rsqrt(),
    )


def reduction(p: Place) -> Function:
    """Statistics over the units and over the rest, broadcast back."""
    a, others = p.axis, tuple(i for i in range(1, len(p.shape)) if i != p.axis)
    return p.pick(
        lambda m, x, k: x - x.sum(a, keepdim=True),
        lambda m, x, k: x * torch.sigmoid(x.pow(2).sum(dim=a, keepdim=True)),
        lambda m, x, k: x / (x.norm(dim=a, keepdim=True) + 1),
        lambda m, x, k: x + x.abs().amax(a).unsqueeze(a),
        lambda m, x, k: x.mean(others, keepdim=True) * x if others else x * x,
        lambda m, x, k: x + x.square().sum().sqrt() * 0.1,
        lambda m, x, k: x + torch.logsumexp(x, others, keepdim=True) if others else x + x,
        lambda m, x, k: x + torch.einsum("bc,bc->b", x, x)[:, None] if len(p.shape) == 2 else x - x.mean(1, True),
    )


def gate(p: Place) -> Function | None:
    """Two halves of the units, one as a gate of the other."""
    a, c, h = p.axis, p.width, p.width // 2
    if c % 2:
        return None

    def cut(f: Callable[..., Any]) -> Function:
        def step(m: Any, x: Any, k: Any) -> torch.Tensor:
            u, v = f(x)
            made: torch.Tensor = u * torch.sigmoid(v)
            return made

        return step

    return p.pick(
        cut(lambda x: x.chunk(2, a)),
        cut(lambda x: torch.split(x, h, dim=a)),
        cut(lambda x: x.split(x.size(a) // 2, a)),
        cut(lambda x: x.split([h, h], dim=a)),
        cut(lambda x: x.split((x.shape[a] // 2, x.shape[a] - x.shape[a] // 2), dim=a)),
        cut(lambda x: (x.narrow(a, 0, h), x.narrow(a, h, h))),
        cut(lambda x: (x.narrow(a, 0, h), x.narrow(a, -h, h))),
        cut(lambda x: x.unflatten(a, (2, h)).unbind(a)),
        cut(lambda x: x.unflatten(a, (2, -1)).unbind(a)),
        cut(lambda x: x.unflatten(a, (h, 2)).unbind(a + 1)),
        cut(lambda x: (x.unflatten(a, (2, h)).select(a, 0), x.unflatten(a, (2, h)).select(a, -1))),
        cut(lambda x: x.tensor_split(2, a)),
        cut(lambda x: (x.movedim(a, 0)[:h].movedim(0, a), x.movedim(a, 0)[h:].movedim(0, a))),
        cut(lambda x: (x.movedim(a, 0)[: x.size(a) // 2].movedim(0, a), x.movedim(a, 0)[-h:].movedim(0, a))),
        cut(lambda x: (x.movedim(a, 0)[::2].movedim(0, a), x.movedim(a, 0)[1::2].movedim(0, a))),
        lambda m, x, k: F.glu(x, a),
    )


def parts(p: Place) -> Function | None:
    """Uneven pieces, some of which are changed, joined in another order."""
    a, c = p.axis, p.width
    n = int(p.rng.integers(1, max(c - 1, 2)))
    index = [int(i) for i in p.rng.permutation(c)[: max(c - 1, 1)]]
    b = p.layer(nn.Parameter(torch.randn(p.along(n))))
    return p.pick(
        lambda m, x, k: torch.cat(x.split([n, c - n], a)[::-1], a),
        lambda m, x, k: torch.cat([x.split([n, c - n], a)[0] * getattr(m, b), x.split([n, c - n], dim=a)[1]], a),
        lambda m, x, k: torch.cat([x.narrow(a, n, c - n), F.relu(x.narrow(a, 0, n))], dim=a),
        lambda m, x, k: torch.cat([x, x.narrow(a, 0, n)], a),
        lambda m, x, k: torch.cat(list(x.chunk(4, a))[1:], a) if c > 6 else x + 0,
        lambda m, x, k: torch.cat(x.split(4, a)[:-1], a) if c > 6 else x + 0,
        lambda m, x, k: x.index_select(a, torch.tensor(index)),
        lambda m, x, k: x[:, index] if a == 1 else x[..., index],
        lambda m, x, k: torch.roll(x, n, a),
        lambda m, x, k: x.roll(x.size(a) // 2, a),
        lambda m, x, k: x.flip(a),
        lambda m, x, k: torch.cat([x, -x], a),
        lambda m, x, k: x.repeat_interleave(2, a),
        lambda m, x, k: torch.stack([x, x * 2], a + 1).flatten(a, a + 1),
        lambda m, x, k: torch.stack([x, x * 2], a).flatten(a, a + 1),
        lambda m, x, k: x.repeat(*[2 if i == a else 1 for i in range(x.ndim)]),
    )


STEPS: dict[str, Callable[[Place], Function | None]] = {
    "project": project,
    "activation": activation,
    "normalization": normalization,
    "sizes": sizes,
    "reduction": reduction,
    "gate": gate,
    "parts": parts,
}
