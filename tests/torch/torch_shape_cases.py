"""Uses of operations that move, select, join, write and make tensors, each with the ways in which programs call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cipm_ir.frontends.torch.values import OPAQUE

Function = Callable[..., Any]
METHODS = ("symbolic", "export")


class Calls(nn.Module):
    """A function with a few tensors to hand: a table of rows, positions, and weights."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.linspace(-1, 1, 24).reshape(6, 4))
        self.register_buffer("places", torch.tensor([2, 0, 1]))
        self.register_buffer("others", torch.tensor([[1, 3, 0], [2, 2, 1]]))
        self.register_buffer("mask", torch.tensor([True, False, True, False]))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def image() -> torch.Tensor:
    """Shape (2, 3, 4, 5)."""
    return torch.arange(120.0).reshape(2, 3, 4, 5).sin()


def opaque(capture: Any) -> list[str]:
    """Reasons of nodes that were not lowered."""
    return [n.metadata_props.get("reason", n.op_type) for n in capture.model.graph if n.domain == OPAQUE]


VIEWS: dict[str, Function] = {
    "view": lambda m, x: x.view(2, 12, 5),
    "view -1": lambda m, x: x.view(2, -1),
    "view size": lambda m, x: x.view(x.size(0), x.size(1), -1),
    "view shape": lambda m, x: x.transpose(1, 2).reshape(x.shape),
    "view *shape": lambda m, x: x.view(*x.shape[:2], -1),
    "view computed": lambda m, x: x.view(x.shape[0] * x.shape[1], x.shape[2] // 2, -1),
    "reshape": lambda m, x: torch.reshape(x, (6, 20)),
    "reshape kw": lambda m, x: torch.reshape(x, shape=(6, 20)),
    "view_as": lambda m, x: x.transpose(0, 1).reshape_as(x).view_as(x),
    "flatten": lambda m, x: torch.flatten(x),
    "flatten 1": lambda m, x: x.flatten(1),
    "flatten 2": lambda m, x: x.flatten(2),
    "flatten 1 2": lambda m, x: x.flatten(1, 2),
    "flatten 0 1": lambda m, x: x.flatten(0, 1),
    "flatten 0 2": lambda m, x: x.flatten(0, -2),
    "flatten 2 2": lambda m, x: x.flatten(2, 2),
    "unflatten": lambda m, x: x.unflatten(2, (2, 2)),
    "unflatten -1": lambda m, x: torch.unflatten(x, 2, (-1, 2)),
    "unflatten size": lambda m, x: x.flatten(1, 2).unflatten(1, (x.size(1), -1)),
    "ravel": lambda m, x: x.ravel(),
    "permute": lambda m, x: x.permute(0, 2, 3, 1),
    "permute list": lambda m, x: torch.permute(x, (0, -1, 1, 2)),
    "permute kw": lambda m, x: x.permute(dims=(3, 2, 1, 0)),
    "transpose": lambda m, x: x.transpose(1, -1),
    "swapaxes": lambda m, x: torch.swapaxes(x, 0, 1).swapdims(2, 3),
    "t": lambda m, x: x[0, 0].t(),
    "t of a vector": lambda m, x: x[0, 0, 0].t() * 2,
    "T": lambda m, x: x[0, 0].T,
    "mT": lambda m, x: x.mT,
    "movedim": lambda m, x: x.movedim(1, -1),
    "movedim several": lambda m, x: torch.movedim(x, (0, 2), (3, 0)),
    "squeeze": lambda m, x: x[:, :1, :, :1].squeeze(),
    "squeeze dim": lambda m, x: x[:, :1, :, :1].squeeze(1),
    "squeeze dims": lambda m, x: x[:, :1, :, :1].squeeze((1, 2)),
    "squeeze nothing": lambda m, x: x.squeeze(1) * 2,
    "unsqueeze": lambda m, x: x.unsqueeze(1).unsqueeze(-1),
    "atleast": lambda m, x: [f(x[0, 0, 0]) for f in (torch.atleast_1d, torch.atleast_2d, torch.atleast_3d)],  # type: ignore[no-untyped-call]
    "atleast of a number": lambda m, x: [f(x[0, 0, 0, 0]) for f in (torch.atleast_1d, torch.atleast_2d)],  # type: ignore[no-untyped-call]
    "heads": lambda m, x: x.reshape(2, 3, 2, 2, 5).permute(0, 2, 3, 1, 4).flatten(2).unflatten(1, (1, -1)),
}

SIZES: dict[str, Function] = {
    "expand": lambda m, x: x[:, :1].expand(2, 7, 4, 5),
    "expand -1": lambda m, x: x[:, :1].expand(-1, 7, -1, -1),
    "expand tuple": lambda m, x: x[0, 0].expand((3, 2, 4, 5)),
    "expand size": lambda m, x: x[:1].expand(x.size(1), -1, -1, -1),
    "expand_as": lambda m, x: x[:, :1].expand_as(x),
    "broadcast_to": lambda m, x: torch.broadcast_to(x[0, :, :1], (2, 3, 4, 5)),
    "repeat": lambda m, x: x.repeat(1, 2, 1, 3),
    "repeat more axes": lambda m, x: x.repeat(2, 1, 1, 2, 1),
    "repeat size": lambda m, x: x.repeat(x.size(0), 1, 1, 1),
    "repeat once": lambda m, x: x.repeat(1, 1, 1, 1),
    "tile": lambda m, x: torch.tile(x, (2, 1)),
    "repeat_interleave": lambda m, x: torch.repeat_interleave(x, 2, dim=1),
    "repeat_interleave last": lambda m, x: x.repeat_interleave(3, -1),
    "repeat_interleave flat": lambda m, x: x.repeat_interleave(2),
    "repeat_interleave size": lambda m, x: x.repeat_interleave(x.size(0), 1),
    "roll": lambda m, x: torch.roll(x, 1, 1),
    "roll back": lambda m, x: x.roll(-2, 2),
    "roll several": lambda m, x: torch.roll(x, shifts=(-1, 7), dims=(2, 3)),
    "roll flat": lambda m, x: torch.roll(x, 7),
    "roll nothing": lambda m, x: torch.roll(x, 4, 2),
    "roll size": lambda m, x: torch.roll(x, x.size(2) // 2, 2),
    "flip": lambda m, x: torch.flip(x, (1, -1)),
    "flip one": lambda m, x: x.flip(2),
    "fliplr": lambda m, x: torch.fliplr(x) + torch.flipud(x),
}

JOINS: dict[str, Function] = {
    "cat": lambda m, x: torch.cat([x, x * 2], 1),
    "cat axis": lambda m, x: torch.concat((x, x), axis=-1),  # type: ignore[call-arg]
    "cat types": lambda m, x: torch.cat([x[0, 0, 0], m.places]),
    "cat one": lambda m, x: torch.cat([x]),
    "cat of nothing": lambda m, x: torch.cat([x.new_zeros(0), x], 2),
    "stack": lambda m, x: torch.stack([x, x * 2, x * 3], dim=-1),
    "stack 1": lambda m, x: torch.stack((x, x * 2), 1),
    "stack numbers": lambda m, x: torch.stack([x[0, 0, 0, 0], x[0, 0, 0, 1]]),
    "hstack": lambda m, x: torch.hstack((x, x)) + torch.hstack([x[0, 0, 0, 0], x[0, 0, 0, 1]]).sum(),
    "vstack": lambda m, x: torch.vstack((x[0, 0, 0], x[0, 0])),
    "dstack": lambda m, x: torch.dstack((x[0, 0], x[0, 1])),
    "split": lambda m, x: torch.split(x, 2, dim=3),
    "split kw": lambda m, x: x.split(split_size=2, dim=3),
    "split list": lambda m, x: x.split([1, 2], 1),
    "split sizes": lambda m, x: torch.split_with_sizes(x, (1, 1, 2), 2),
    "split computed": lambda m, x: x.split(x.size(2) // 2, 2),
    "split computed list": lambda m, x: x.split([x.size(2) - 1, 1], 2),
    "split whole": lambda m, x: x.split(5, 3)[0] * 2,
    "chunk": lambda m, x: x.chunk(2, 2),
    "chunk rest": lambda m, x: torch.chunk(x, 3, dim=-1),
    "chunk fewer": lambda m, x: torch.chunk(x, 4, dim=-1),
    "chunk one": lambda m, x: x.chunk(1, 2)[0] * 2,
    "tensor_split": lambda m, x: torch.tensor_split(x, 3, dim=3),
    "tensor_split even": lambda m, x: x.tensor_split(2, 2),
    "tensor_split places": lambda m, x: x.tensor_split((1, 4), dim=3),
    "unbind": lambda m, x: torch.unbind(x, 1),
    "unbind first": lambda m, x: x.unbind(),
    "unbind one": lambda m, x: x[:, :1].unbind(1)[0],
}

SELECTIONS: dict[str, Function] = {
    "narrow": lambda m, x: x.narrow(1, 1, 2),
    "narrow negative": lambda m, x: torch.narrow(x, -1, -3, 2),
    "narrow size": lambda m, x: x.narrow(3, x.size(0), x.size(1)),
    "select": lambda m, x: x.select(1, -1),
    "select size": lambda m, x: x.select(3, x.size(1)),
    "int": lambda m, x: x[1],
    "negative": lambda m, x: x[:, -1],
    "slice": lambda m, x: x[:, 1:],
    "slice negative": lambda m, x: x[:, :-1, -3:],
    "slice step": lambda m, x: x[..., ::2],
    "slice bounds": lambda m, x: x[:, :, 1:100:2, 1:4],
    "slice size": lambda m, x: x[..., : x.size(1)] + x[..., x.size(0) :],
    "slice all": lambda m, x: x[:, :] * 2,
    "none": lambda m, x: x[:, None, :, 0, None],
    "ellipsis": lambda m, x: x[0, ..., 1],
    "ellipsis alone": lambda m, x: x[...] * 2,
    "list": lambda m, x: x[:, [2, 0, 1]],
    "list behind a number": lambda m, x: x[0, :, [2, 0, 3]],
    "list between numbers": lambda m, x: x[0, [2, 0], 1],
    "tensor": lambda m, x: x[:, m.places],
    "tensor first": lambda m, x: m.table[m.others],
    "tensor negative": lambda m, x: x[:, m.places - 1],
    "tensor int32": lambda m, x: x[:, m.places.int()],
    "tensor and slice": lambda m, x: x[:, m.places, 1:, None],
    "two tensors": lambda m, x: x[:, m.places, m.others],
    "two tensors first": lambda m, x: x[m.places % 2, m.places],
    "two tensors apart": lambda m, x: x[:, m.places, :, m.others],
    "three tensors": lambda m, x: x[m.others % 2, m.places, m.others],
    "rows by argmax": lambda m, x: x[:, 0][torch.arange(x.size(0)), x[:, 0, :, 0].argmax(-1)],
    "index_select": lambda m, x: torch.index_select(x, 1, m.places),
    "index_select kw": lambda m, x: x.index_select(dim=-1, index=m.places),
    "gather": lambda m, x: torch.gather(x[0, 0], 1, m.others),
    "gather same": lambda m, x: x.gather(3, x.argsort(3)),
    "take_along_dim": lambda m, x: torch.take_along_dim(x[0, 0, :2], m.others, 1),
    "take_along_dim wide": lambda m, x: torch.take_along_dim(x[0, 0, :1], m.others, 1),
    "take": lambda m, x: torch.take(x, m.others),
    "one_hot": lambda m, x: F.one_hot(m.others, 5),
    "tril": lambda m, x: torch.tril(x),
    "triu": lambda m, x: x.triu(diagonal=1) + x.triu(-1),
    "causal": lambda m, x: torch.ones((x.size(2), x.size(2)), dtype=torch.bool).tril() & torch.tril(x[0, 0, :, :4] > 0),
}

LOOKUPS: dict[str, Function] = {
    "embedding": lambda m, x: F.embedding(m.others, m.table),
    "embedding padding": lambda m, x: F.embedding(m.others, m.table, padding_idx=1),
    "torch.embedding": lambda m, x: torch.embedding(m.table, m.others),
    "bag": lambda m, x: F.embedding_bag(m.others, m.table),
    "bag sum": lambda m, x: F.embedding_bag(m.others, m.table, mode="sum"),
    "bag max": lambda m, x: F.embedding_bag(m.others, m.table, mode="max"),
    "bag weights": lambda m, x: F.embedding_bag(m.others, m.table, per_sample_weights=x[0, 0, :2, :3], mode="sum"),
}

WRITES: dict[str, Function] = {
    "scatter": lambda m, x: torch.scatter(x[0, 0], 1, m.others, x[0, 1]),
    "scatter value": lambda m, x: x[0, 0].scatter(1, m.others, 2.5),
    "scatter add": lambda m, x: x[0, 0].scatter_add(1, m.others, x[0, 1, :2, :3]),
    "scatter_reduce": lambda m, x: x[0, 0].scatter_reduce(1, m.others, x[0, 1], "amax"),
    "index_add": lambda m, x: x.index_add(1, m.places, x * 2, alpha=3),
    "index_copy": lambda m, x: x.index_copy(1, m.places, x * 2),
    "index_fill": lambda m, x: x.index_fill(1, m.places[:2], 1.5),
    "slice_scatter": lambda m, x: torch.slice_scatter(x, x[:, :, :2] * 2, 2, 1, 3),
    "slice_scatter all": lambda m, x: torch.slice_scatter(x, x * 2, 2),
    "select_scatter": lambda m, x: torch.select_scatter(x, x[:, 0] * 2, 1, -1),
    "index_put": lambda m, x: x[0, 0].index_put((m.others[0], m.places), x[0, 1, 0, :3]),
    "index_put row": lambda m, x: x.index_put((m.places[:2] % 2,), x[0, :1] * 0),
    "index_put add": lambda m, x: x[0, 0].index_put((m.others,), x[0, 1, 0], accumulate=True),
    "index_put mask": lambda m, x: torch.index_put(x, (x > 0,), x.new_zeros(())),
    "copy": lambda m, x: torch.zeros_like(x).copy_(x[:, :1]),
    "fill": lambda m, x: (x * 2).fill_(3.0) + x,
    "zero": lambda m, x: (x * 2).zero_() + x,
}

MADE: dict[str, Function] = {
    "arange": lambda m, x: x + torch.arange(x.size(3)),
    "arange start": lambda m, x: x[..., 1:] + torch.arange(1, x.size(3), dtype=torch.float32),
    "arange step": lambda m, x: x[..., :3] + torch.arange(0.0, x.size(3), 2),
    "arange written": lambda m, x: x + torch.arange(1, 11, 2, device=x.device),
    "zeros": lambda m, x: torch.cat([x, torch.zeros((x.size(0), 1, 4, 5))], 1),
    "ones": lambda m, x: x + torch.ones((x.size(2), 5), dtype=torch.int64),
    "full": lambda m, x: x + torch.full((x.size(2), 1), 2.5),
    "full size": lambda m, x: torch.full((2, 2), x.size(1)) + x[0, 0, :2, :2],
    "empty": lambda m, x: torch.empty(x.shape).zero_() + x,
    "zeros_like": lambda m, x: x + torch.zeros_like(x),
    "ones_like": lambda m, x: x + torch.ones_like(x, dtype=torch.float64),
    "full_like": lambda m, x: torch.full_like(x, -1.5) + x,
    "new_zeros": lambda m, x: torch.cat([x, x.new_zeros(2, 3, 4, 1)], -1),
    "new_ones": lambda m, x: x.new_ones((x.size(3),)) + x,
    "new_full": lambda m, x: x.new_full((4, 1), 2) + x,
    "new_tensor": lambda m, x: x + x.new_tensor([1.0, 2, 3, 4, 5]),
    "tensor": lambda m, x: x + torch.tensor(x.size(1)),
    "tensor list": lambda m, x: x[..., :2] * torch.tensor([x.size(1), 3]),
    "scalar_tensor": lambda m, x: x * torch.scalar_tensor(2.5),
    "eye": lambda m, x: x[..., :4] * torch.eye(4, device=x.device),
    "linspace": lambda m, x: x * torch.linspace(0, 1, 5, device=x.device),
    "eye size": lambda m, x: x @ torch.eye(x.size(3), 4, device=x.device),
    "linspace size": lambda m, x: x * torch.linspace(-1, x.size(1), x.size(3), device=x.device),
    "linspace of one": lambda m, x: x * torch.linspace(2, 3, x[:, :1].size(1), device=x.device),
    "triu_indices": lambda m, x: x[0, 0][torch.triu_indices(4, 5, 1, device=x.device).unbind(0)],
    "meshgrid": lambda m, x: torch.meshgrid(x[0, 0, 0], x[0, 1, :, 0], indexing="ij"),
    "meshgrid xy": lambda m, x: torch.meshgrid([x[0, 0, 0], x[0, 1, :, 0]], indexing="xy"),
    "causal mask": lambda m, x: torch.full((x.size(3), x.size(3)), float("-inf")).triu(1).exp() + x[:, :, :1],
}

CASES = {**VIEWS, **SIZES, **JOINS, **SELECTIONS, **LOOKUPS, **WRITES, **MADE}

UNTRACED = {"view *shape", "tensor", "tensor list"}
"""Python that symbolic tracing cannot follow."""

BAGS = set(LOOKUPS) - {"embedding", "embedding padding", "torch.embedding"}
"""torch.export turns equal bags into offsets."""

LOWERED = [(name, method) for name in CASES for method in METHODS
           if name not in (UNTRACED if method == "symbolic" else BAGS)]  # fmt: skip
