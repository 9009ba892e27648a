"""More steps of random modules: reshapes, attention, residuals, padding, writes in place, the order of units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.torch.torch_fuzz_steps import Function, Place
from torch import nn
from torch.nn import functional as F


def shuffle(p: Place) -> Function | None:
    """Groups of units exchanged by reshapes, with sizes as literals, as -1 and computed."""
    a, c = p.axis, p.width
    g = p.pick(2, c // 2)
    if a != 1 or c % 2:
        return None
    rest, b = p.shape[2:], None if p.dynamic else p.shape[0]
    n = c // g
    ends = p.pick(
        lambda x: x.reshape(x.size(0), c, *rest),
        lambda x: x.reshape(-1, c, *rest),
        lambda x: x.reshape(x.size(0), -1, *rest),
        lambda x: x.flatten(1, 2),
        None if b is None else lambda x: x.reshape(b, -1, *rest),
        None if b is None else lambda x: x.reshape(b, c, *rest),
        lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2], *rest),
    )
    starts = p.pick(
        lambda x: x.view(x.size(0), g, n, *rest),
        lambda x: x.view(-1, g, n, *rest),
        lambda x: x.reshape(x.size(0), g, -1, *rest),
        lambda x: x.reshape(x.size(0), -1, n, *rest),
        lambda x: x.reshape(x.size(0), g, x.size(1) // g, *x.shape[2:]),
        None if b is None else lambda x: x.view(b, g, n, *rest),
        lambda x: x.unflatten(1, (g, n)),
        lambda x: x.unflatten(1, (-1, n)),
    )
    middle = p.pick(lambda x: x.transpose(1, 2), lambda x: x.permute(0, 2, 1, *range(3, x.ndim)), lambda x: x * 2)
    return lambda m, x, k: ends(middle(starts(x.contiguous())))


def flatten(p: Place) -> Function | None:
    """All axes but the batch merged, and a layer on top."""
    whole = 1
    for n in p.shape[1:]:
        whole *= n
    if len(p.shape) < 3 or whole > 150:
        return None
    a = p.layer(nn.Linear(whole, 8))
    merge = p.pick(
        lambda x: x.flatten(1),
        lambda x: x.reshape(x.size(0), -1),
        lambda x: x.reshape(-1, whole),
        lambda x: x.reshape(x.size(0), whole),
        None if p.dynamic else lambda x: x.reshape(2, -1),
        lambda x: x.permute(0, *range(2, x.ndim), 1).flatten(1),
        lambda x: x.reshape(x.shape[0], x[0].numel()),
    )
    return lambda m, x, k: getattr(m, a)(merge(x))


def rows(p: Place) -> Function | None:
    """An image as a sequence of its pixels and the other way round."""
    c = p.width
    if len(p.shape) == 4:
        return p.pick(
            lambda m, x, k: x.flatten(2).transpose(1, 2),
            lambda m, x, k: x.permute(0, 2, 3, 1).reshape(x.size(0), -1, c),
            lambda m, x, k: x.view(x.size(0), c, -1).mT,
            lambda m, x, k: torch.einsum("bchw->bhwc", x).flatten(1, 2),
            lambda m, x, k: x.reshape(*x.shape[:2], -1).permute(0, 2, 1),
            lambda m, x, k: x.mean((2, 3)),
            lambda m, x, k: F.adaptive_avg_pool2d(x, 1).view(-1, c),
            lambda m, x, k: F.adaptive_avg_pool2d(x, 1).flatten(1),
            lambda m, x, k: F.adaptive_avg_pool2d(x, (1, 1)).squeeze(),
            lambda m, x, k: F.pixel_shuffle(x, 2) if c % 4 == 0 else x + 0,
            lambda m, x, k: F.interpolate(x[:, :, :2, :2], scale_factor=2),
        )
    if len(p.shape) == 3:
        return p.pick(
            lambda m, x, k: x.transpose(1, 2).reshape(x.size(0), c, x.size(1), 1),
            lambda m, x, k: x.mT.unsqueeze(-1),
            lambda m, x, k: x[:, 0],
            lambda m, x, k: x.mean(1),
            lambda m, x, k: x.amax(dim=1),
        )
    return p.pick(lambda m, x, k: x[:, None, :] * torch.ones(1, 3, 1), lambda m, x, k: x[:, :, None, None])


def attention(p: Place) -> Function | None:
    """Heads by view, unflatten or chunk; scales given, computed and by default."""
    if len(p.shape) != 3:
        return None
    h, d, t, c = 2, p.pick(4, 6, 3), p.shape[1], p.width
    a, b = p.layer(nn.Linear(c, 3 * h * d)), p.layer(nn.Linear(h * d, c))
    split = p.pick(
        lambda x: x.view(x.size(0), t, 3, h, d).permute(2, 0, 3, 1, 4),
        lambda x: x.reshape(x.size(0), -1, 3, h, d).permute(2, 0, 3, 1, 4),
        lambda x: x.view(*x.shape[:2], 3, h, -1).permute(2, 0, 3, 1, 4).unbind(0),
        lambda x: x.view(x.size(0), x.size(1), h, 3, d).permute(3, 0, 2, 1, 4),
        lambda x: [u.view(x.size(0), x.size(1), h, d).transpose(1, 2) for u in x.chunk(3, -1)],
        lambda x: [u.unflatten(-1, (h, -1)).transpose(1, 2) for u in x.split(h * d, dim=-1)],
        lambda x: [u.view(x.size(0), -1, h, x.size(-1) // (3 * h)).transpose(1, 2) for u in x.chunk(3, dim=2)],
        lambda x: [x[..., i * h * d : (i + 1) * h * d].unflatten(2, (h, d)).transpose(1, 2) for i in range(3)],
    )
    scale = p.pick(lambda q: q.size(-1) ** -0.5, lambda q: d**-0.5, lambda q: q.shape[-1] ** (-1 / 2))
    slopes = p.layer(nn.Parameter(torch.randn(h, 1, 1)))
    core = p.pick(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=d**-0.5),
        lambda m, q, k, v: torch.softmax(q @ k.transpose(-2, -1) * scale(q), -1) @ v,
        lambda m, q, k, v: ((q * scale(q)) @ k.mT + getattr(m, slopes)).softmax(-1) @ v,
        lambda m, q, k, v: torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).tanh(), v),
        lambda m, q, k, v: (q @ k.mT).masked_fill(torch.ones(t, t).tril() == 0, -1e9).softmax(-1) @ v,
    )
    join = p.pick(
        lambda o: o.transpose(1, 2).reshape(o.size(0), t, h * d),
        lambda o: o.transpose(1, 2).flatten(2),
        lambda o: o.permute(0, 2, 1, 3).reshape(o.size(0), -1, h * d),
        lambda o: o.transpose(1, 2).reshape(o.size(0), o.size(2), -1),
        lambda o: torch.cat(o.unbind(1), -1),
    )
    other = p.layer(nn.MultiheadAttention(c, 2 if c % 2 == 0 else 1, batch_first=True))
    if p.rng.random() < 0.1:
        return lambda m, x, k: getattr(m, other)(x, x, x, need_weights=False)[0]
    residual = p.pick(0, 1)

    def step(m: Any, x: Any, k: Any) -> torch.Tensor:
        made: torch.Tensor = getattr(m, b)(join(core(m, *split(getattr(m, a)(x)))))
        return made + x if residual else made

    return step


def residual(p: Place) -> Function | None:
    """A block around which the stream goes, added, multiplied or joined; modules used twice; tied weights."""
    c, hidden, a = p.width, p.pick(6, 8, 12), p.axis
    if len(p.shape) == 4:
        u, v = p.layer(nn.Conv2d(c, hidden, 1)), p.layer(nn.Conv2d(hidden, c, 1))
        s = p.layer(nn.Conv2d(c, c, 1))
        return p.pick(
            lambda m, x, k: x + getattr(m, v)(F.relu(getattr(m, u)(x))),
            lambda m, x, k: x * torch.sigmoid(getattr(m, v)(F.relu(getattr(m, u)(x.mean((2, 3), keepdim=True))))),
            lambda m, x, k: x * getattr(m, v)(getattr(m, u)(F.adaptive_avg_pool2d(x, 1)).relu()).expand_as(x),
            lambda m, x, k: x * getattr(m, s)(x.mean((2, 3)).view(x.size(0), c, 1, 1)),
            lambda m, x, k: x * getattr(m, s)(x.mean((2, 3)).view(-1, c, 1, 1)).expand(-1, -1, *p.shape[2:]),
            lambda m, x, k: x + getattr(m, s)(x.mean((2, 3))[:, :, None, None]).expand(-1, c, *p.shape[2:]),
            lambda m, x, k: torch.cat([getattr(m, u)(x).relu(), x], 1),
            lambda m, x, k: getattr(m, s)(F.relu(getattr(m, s)(x))),
        )
    u, v, s = p.layer(nn.Linear(c, hidden)), p.layer(nn.Linear(hidden, c)), p.layer(nn.Linear(c, c))
    w = p.layer(nn.Bilinear(c, c, 6))
    return p.pick(
        lambda m, x, k: x + getattr(m, v)(F.relu(getattr(m, u)(x))),
        lambda m, x, k: x + F.linear(F.relu(getattr(m, u)(x)), getattr(m, u).weight.t()),
        lambda m, x, k: getattr(m, s)(F.relu(getattr(m, s)(x))),
        lambda m, x, k: torch.cat([x, getattr(m, u)(x)], a),
        lambda m, x, k: getattr(m, w)(x, x.tanh()),
        lambda m, x, k: x + getattr(m, u)(x)[..., :1] * getattr(m, u)(x)[..., -1:],
        lambda m, x, k: torch.lerp(x, getattr(m, s)(x), 0.3),
        lambda m, x, k: torch.bmm(x, (x.transpose(1, 2) @ x) / x.size(1)) if x.ndim == 3 else x * 2,
    )


def earlier(p: Place) -> Function | None:
    """An earlier tensor again."""
    same = [i for i, t in enumerate(p.kept) if tuple(t.shape) == p.shape]
    i, a = same[0], p.axis
    return p.pick(
        lambda m, x, k: x + k[i],
        lambda m, x, k: torch.cat([x, k[i]], a),
        lambda m, x, k: torch.where(k[i] > 0, x, k[i]),
        lambda m, x, k: x.reshape(k[i].shape) - k[i],
        lambda m, x, k: torch.maximum(x, k[i]).view_as(k[i]),
        lambda m, x, k: x.clone().add_(k[i]).mul_(0.5),
    )


def padding(p: Place) -> Function:
    """Units of zeros, or of other numbers, before, behind and between."""
    a, c = p.axis, p.width
    pair = (0, 0) * (len(p.shape) - 1 - a)
    return p.pick(
        lambda m, x, k: F.pad(x, (*pair, 1, 2)),
        lambda m, x, k: F.pad(x, (*pair, 0, 12 - c)),
        lambda m, x, k: F.pad(x, (*pair, 0, 14 - x.size(a))),
        lambda m, x, k: F.pad(x, (*pair, 2, 0), value=0.5),
        lambda m, x, k: F.pad(x, (*pair, -1, 1)),
        lambda m, x, k: torch.cat([x, torch.zeros_like(x.narrow(a, 0, 2))], a),
        lambda m, x, k: torch.cat(
            [x, x.new_zeros(x.size(0), *[2 if i == a else x.size(i) for i in range(1, x.ndim)])], a
        ),
        lambda m, x, k: torch.cat([torch.zeros_like(x), x], a),
        lambda m, x, k: x + torch.zeros(p.shape[1:]),
        lambda m, x, k: x + torch.ones_like(x).cumsum(a) if c < 7 else x + torch.ones_like(x),
    )


def written(p: Place) -> Function:
    """Writes into a copy, through views too."""
    a = p.axis
    return p.pick(
        lambda m, x, k: x.clone().transpose_(0, 1).transpose_(0, 1),
        lambda m, x, k: _then(x * 2, lambda y: y.narrow(a, 0, 2).relu_()),
        lambda m, x, k: _then(x * 2, lambda y: y.select(a, 1).zero_()),
        lambda m, x, k: _then(x * 2, lambda y: y.chunk(2, a)[0].mul_(2)),
        lambda m, x, k: _then(x * 2, lambda y: y.view(-1).add_(1)),
        lambda m, x, k: _then(x.contiguous() * 2, lambda y: y.flatten(1).tanh_()),
        lambda m, x, k: (lambda y: y.add_(1) + y)(x * 2),
        lambda m, x, k: (lambda y: y.relu() + y.mul_(2))(x * 3),
    )


def _then(y: Any, write: Callable[[Any], Any]) -> Any:
    write(y)
    return y


def ordered(p: Place) -> Function:
    """What depends on the order or the number of the units."""
    a, c = p.axis, p.width
    table = p.layer(nn.Parameter(torch.randn(p.along(40))))
    square = p.layer(nn.Parameter(torch.randn(20, 20)))
    last = a == len(p.shape) - 1
    return p.pick(
        lambda m, x, k: x * torch.arange(c).view(p.along(-1)),
        lambda m, x, k: x * torch.arange(x.size(a)).view(p.along(-1)),
        lambda m, x, k: x + torch.linspace(0, 1, c).reshape(p.along(c)),
        lambda m, x, k: x.cumsum(a),
        lambda m, x, k: x.softmax(a),
        lambda m, x, k: torch.sort(x, a)[0],
        lambda m, x, k: x.topk(3, a)[0],
        lambda m, x, k: x + getattr(m, table)[: x.size(a)] if c <= 40 else x + 0,
        lambda m, x, k: x + getattr(m, table)[:c] if c <= 40 else x + 0,
        lambda m, x, k: x @ torch.eye(x.size(-1)) if last else x + 0,
        lambda m, x, k: x @ torch.ones(c, c).tril() if last else x + 0,
        lambda m, x, k: x @ getattr(m, square)[: x.size(-1), : x.size(-1)] if last and c <= 20 else x + 0,
        lambda m, x, k: x.masked_fill((torch.arange(x.size(a)) < 3).view(p.along(-1)), 0.0),
        lambda m, x, k: x * F.one_hot(torch.arange(c), c).sum(0).view(p.along(-1)),
        lambda m, x, k: x + x.argmax(a, keepdim=True),
        lambda m, x, k: x.diff(dim=a),
        lambda m, x, k: x.gather(a, torch.zeros(p.shape, dtype=torch.int64)) if not p.dynamic else x + 0,
        lambda m, x, k: F.max_pool1d(x.flatten(0, -2)[:, None], 2).view(*p.shape[:-1], -1) if last and not p.dynamic
        else x + 0,
        lambda m, x, k: F.interpolate(x, size=4) if x.ndim == 3 else x + 0,
        lambda m, x, k: F.local_response_norm(x, 3) if x.ndim > 2 else x + 0,
    )  # fmt: skip


MORE_STEPS: dict[str, Callable[[Place], Function | None]] = {
    "shuffle": shuffle,
    "flatten": flatten,
    "rows": rows,
    "attention": attention,
    "residual": residual,
    "earlier": earlier,
    "padding": padding,
    "written": written,
    "ordered": ordered,
}
