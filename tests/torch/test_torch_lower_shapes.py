"""Lowering of views, selections, joins and made tensors: the IR in onnxruntime computes what torch does."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from tests.torch.torch_running import largest_difference, lowering_error, run_both
from tests.torch.torch_shape_cases import CASES, LOWERED, METHODS, Calls, Function, image, opaque
from torch import nn
from torch.nn import functional as F

from cipm_ir.frontends.torch.load import load_torch
from cipm_ir.symmetry.program import Program


@pytest.mark.parametrize(("name", "method"), LOWERED)
def test_lowered(name: str, method: str) -> None:
    capture, error = lowering_error(Calls(CASES[name]), image(), method=method)
    assert opaque(capture) == []
    assert error < 1e-5


def test_comparison_control() -> None:
    """The comparison sees two entries that change places."""
    capture = load_torch(Calls(lambda m, x: x.flip(1)), (image(),))
    assert largest_difference(run_both(capture, Calls(lambda m, x: x.roll(1, 1)), (image(),), {})) > 0.1


# ---------------------------------------------------------------- modules
MODULES: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "Flatten": (nn.Flatten(), image()),
    "Flatten middle": (nn.Flatten(1, 2), image()),
    "Unflatten": (nn.Unflatten(1, (3, 1)), image()),
    "Unflatten -1": (nn.Unflatten(-2, (2, -1)), image()),
    "Embedding": (nn.Embedding(7, 4, padding_idx=2), torch.tensor([[1, 2, 6], [0, 0, 3]])),
    "EmbeddingBag": (nn.EmbeddingBag(7, 4), torch.tensor([[1, 2, 6], [0, 0, 3]])),
    "EmbeddingBag max": (nn.EmbeddingBag(7, 4, mode="max"), torch.tensor([[1, 2, 6], [0, 0, 3]])),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module, x = MODULES[name]
    capture, error = lowering_error(nn.Sequential(module), x, method="symbolic")
    assert opaque(capture) == []
    assert error < 1e-6


# ---------------------------------------------------------------- sizes that change
DYNAMIC: dict[str, Function] = {
    "view": lambda m, x: x.view(x.size(0), -1),
    "flatten": lambda m, x: x.flatten(1) @ torch.ones_like(x[0]).flatten(0).unsqueeze(-1),
    "flatten 0 1": lambda m, x: x.flatten(0, 1),
    "merge and back": lambda m, x: x.reshape(-1, 4, 5).unflatten(0, (x.size(0), -1)),
    "permute": lambda m, x: x.permute(1, 0, 3, 2).contiguous().view(3, -1),
    "expand": lambda m, x: m.table[:2, :4].expand(x.size(0), -1, -1),
    "expand_as": lambda m, x: x[:, :1].expand_as(x),
    "repeat_interleave": lambda m, x: x.repeat_interleave(2, 1),
    "chunk": lambda m, x: x.chunk(2, 2),
    "cat": lambda m, x: torch.cat([x, torch.zeros_like(x[:, :1])], 1),
    "class token": lambda m, x: torch.cat([m.table[:1].expand(x.size(0), -1, -1), x[:, 0].transpose(1, 2)], 1),
    "slice": lambda m, x: x[:, 1:, ::2],
    "slice of the batch": lambda m, x: x[: x.size(0)] + x[:1],
    "arange": lambda m, x: x + torch.arange(x.size(0), device=x.device)[:, None, None, None],
    "zeros": lambda m, x: x.new_zeros((x.size(0), 1)) + x[:, 0, 0],
    "full": lambda m, x: torch.full((x.size(0), 5), 2) + x[:, 0, 0],
    "gather nd": lambda m, x: x[:, 0][torch.arange(x.size(0)), x[:, 0, :, 0].argmax(-1)],
    "squeeze": lambda m, x: x[:, :1].squeeze(1),
    "roll": lambda m, x: torch.roll(x, (1, -1), (2, 3)),
    "masks": lambda m, x: torch.ones((x.size(0), x.size(0)), dtype=torch.bool).tril()[:, :, None, None, None] & (x > 0),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DYNAMIC)
def test_dynamic_batch(name: str, method: str) -> None:
    module, x = Calls(DYNAMIC[name]), image()
    shapes = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    capture = load_torch(module, (x,), dynamic_shapes=shapes, method=method)
    assert opaque(capture) == []
    for batch in (2, 5):
        other = torch.randn(batch, 3, 4, 5, generator=torch.Generator().manual_seed(batch))
        assert largest_difference(run_both(capture, module, (other,), {})) < 1e-5


# ---------------------------------------------------------------- refused uses
REFUSED: dict[str, Function] = {
    "view as type": lambda m, x: x.view(torch.int32).float(),
    "mask": lambda m, x: x[:, :, m.mask],
    "mask of all": lambda m, x: x[x > 0].sum() + x,
    "masked_select": lambda m, x: x.masked_select(x > 0).sum() + x,
    "nonzero": lambda m, x: x[0, 0].nonzero().sum() + x,
    "repeat_interleave tensor": lambda m, x: torch.repeat_interleave(x, m.places, 1, output_size=3),
    "max_norm": lambda m, x: F.embedding(m.others, m.table.detach() * 1, max_norm=1.0),
    "bag offsets": lambda m, x: F.embedding_bag(m.places, m.table, torch.tensor([0, 2])),
    "bag padding": lambda m, x: F.embedding_bag(m.others, m.table, padding_idx=0),
    "random": lambda m, x: x + torch.rand_like(x),
    "diagonal": lambda m, x: x.diagonal(0, 2, 3),
    "scatter mean": lambda m, x: x[0, 0].scatter_reduce(1, m.others, x[0, 1], "mean"),
    "scatter without self": lambda m, x: x[0, 0].scatter_reduce(1, m.others, x[0, 1], "sum", include_self=False),
    "slice_scatter step": lambda m, x: torch.slice_scatter(x, x[:, :, :2] * 2, 2, 0, 4, 2),
    "index_put mask": lambda m, x: x.index_put((x > 0,), x[x > 0]),
    "unfold": lambda m, x: x.unfold(2, 2, 1),
    "cartesian": lambda m, x: torch.cartesian_prod(x[0, 0, 0], x[0, 0, 1]),
}


HIDDEN = {"mask", "mask of all", "masked_select", "nonzero", "index_put mask"}
"""Shapes that depend on data: only torch.export has a way to say them."""


@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in REFUSED for m in METHODS if m == "export" or n not in HIDDEN],
)
def test_refused(name: str, method: str) -> None:
    """What has no exact form is an opaque node, and the program can still be analysed."""
    capture = load_torch(Calls(REFUSED[name]), (image(),), method=method)
    assert opaque(capture)
    Program.of(capture.model)
