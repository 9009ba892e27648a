"""`compress` on what people bring: fused queries and keys, group normalization, a softmax at the end, bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional

import cipm_ir
from cipm_ir.errors import SymmetryError
from cipm_ir.passes.pruning.refit.bilinear import find_pairs

FAST = "steps=3,min_keep=1,rounds=0"


class Attention(nn.Module):
    """Queries, keys and values from one weight, as in most vision transformers."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(12)
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        with torch.no_grad():
            self.qkv.bias.normal_()  # a mean of the keys, which the softmax does not see

    def forward(self, x: Any) -> Any:
        q, k, v = self.qkv(self.norm(x)).view(4, 5, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).reshape(4, 5, 12))


def groups_net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(6, 12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(6, 12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


def mlp(last: Any = None) -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    made: Any = nn.Sequential(*layers, *([] if last is None else [last])).eval()
    with torch.no_grad():
        made[4].weight.mul_(4)
    return made


def compressed(module: Any, x: Any, spec: str, batch: int = 4) -> Any:
    name = cipm_ir.load(module, x[:batch]).model.graph.inputs[0].name or ""
    return cipm_ir.optimize(module, [f"compress{{{spec},{FAST}}}"], data={name: x.numpy()}, example_inputs=x[:batch])


def far(module: Any, other: Any, x: Any) -> float:
    with torch.no_grad():
        a, b = (torch.cat([m(part) for part in x.split(4)]) for m in (module, other))
    return float((a - b).square().mean() / a.var())


@pytest.mark.parametrize("causal", [False, True])
def test_heads_of_one_weight_become_narrower(causal: bool) -> None:
    torch.manual_seed(0)
    module, x = Attention(causal).eval(), torch.randn(40, 5, 12)
    result = compressed(module, x, "params=0.75,blocks=false")
    assert [n for n in result.report.steps[0].summary.split("; ") if "qkv" in n] == []  # not refused
    small = result.model
    assert small.qkv.weight.shape[0] in (18, 24, 30) and small.qkv.weight.shape[0] == 3 * small.out.weight.shape[1]
    pruned = cipm_ir.optimize(module, ["prune{params=0.75,min_keep=1,blocks=false}"], example_inputs=x[:4]).model
    fresh = torch.randn(16, 5, 12)
    assert far(module, small, fresh) < 0.3 * far(module, pruned, fresh)


def test_keys_of_one_weight_are_told_from_queries() -> None:
    """Their mean makes no difference; which part of the weight they are depends on how it is cut."""
    pairs = find_pairs(cipm_ir.load(Attention().eval(), torch.randn(4, 5, 12)))
    inner = [pair for pair in pairs.values() if not pair.chain]
    assert len(inner) == 2 and all(pair.centred for pair in inner)
    assert sorted(np.concatenate([pair.left for pair in inner])) == list(range(12))
    assert sorted(np.concatenate([pair.right for pair in inner])) == list(range(12, 24))


def test_groups_of_a_normalization_go_as_wholes() -> None:
    module, x = groups_net(), torch.randn(60, 2, 6, 6)
    result = compressed(module, x, "params=0.6")
    small = result.model
    assert small[1].num_groups < 6 or small[4].num_groups < 6
    assert all(small[k].num_channels == 2 * small[k].num_groups for k in (1, 4))
    pruned = cipm_ir.optimize(module, ["prune{params=0.6,min_keep=1}"], example_inputs=x[:4]).model
    fresh = torch.randn(40, 2, 6, 6)
    assert far(module, small, fresh) < 0.3 * far(module, pruned, fresh)


class Nested(nn.Module):
    """A stream under two normalizations, of 8 groups and of 2: only the larger ones are apart in both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Conv2d(2, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 3)
        self.small, self.large = nn.GroupNorm(8, 16), nn.GroupNorm(2, 16)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        x = x + self.inner(self.small(x).relu())
        return self.head(self.large(x).relu().mean((2, 3)))


def test_control_groups_within_groups_do_not_go_alone() -> None:
    torch.manual_seed(0)
    result = compressed(Nested().eval(), torch.randn(20, 2, 6, 6), "macs=0.7,plain=false")
    assert (result.model.small.num_groups, result.model.large.num_groups) == (4, 1)


def test_control_a_normalization_of_all_channels_is_left_alone() -> None:
    module, x = groups_net(), torch.randn(20, 2, 6, 6)
    module[1], module[4] = nn.GroupNorm(1, 12), nn.GroupNorm(1, 12)
    with pytest.raises(SymmetryError, match="a normalization, softmax or sum runs over"):
        compressed(module, x, "params=0.6,plain=false")


@pytest.mark.parametrize("last", [nn.Softmax(dim=-1), nn.LogSoftmax(dim=1)])
def test_a_softmax_at_the_end_changes_nothing(last: Any) -> None:
    """The same measure, the same units and, up to rounding, the same weights."""
    x = torch.randn(200, 6)
    plain, ended = (compressed(mlp(end), x, "params=0.5") for end in (None, last))
    one, two = (r.report.steps[0].metrics for r in (plain, ended))
    assert one["widths"] == two["widths"] and one["divergence"]["measure"] == two["divergence"]["measure"]
    assert one["divergence"]["measured"] == pytest.approx(two["divergence"]["measured"], rel=0.05)
    assert torch.allclose(plain.model[4].weight, ended.model[4].weight, rtol=1e-2, atol=1e-2)


def test_bfloat16() -> None:
    x = torch.randn(200, 6)
    module = mlp().to(torch.bfloat16)
    name = cipm_ir.load(module, x[:4].bfloat16()).model.graph.inputs[0].name or ""
    passes = [f"compress{{params=0.6,{FAST}}}"]
    result = cipm_ir.optimize(module, passes, data={name: x.numpy()}, example_inputs=x[:4].bfloat16())
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    pruned = cipm_ir.optimize(module, ["prune{params=0.6,min_keep=1}"], example_inputs=x[:4].bfloat16()).model
    fresh = torch.randn(64, 6).bfloat16()
    assert far(module, result.model, fresh) < far(module, pruned, fresh)


def test_all_spaces_excluded_is_said() -> None:
    with pytest.raises(SymmetryError, match="include, exclude and blocks leave no free space"):
        compressed(mlp(), torch.randn(20, 6), "params=0.5,exclude=*")


def test_a_score_may_be_a_tensor() -> None:
    x = torch.randn(60, 6)
    score: Any = torch.tensor([0.5], requires_grad=True)
    scored = cipm_ir.passes.Compress(max_drop=0.5, evaluate=lambda run: score, steps=2, rounds=0)
    name = cipm_ir.load(mlp(), x[:4]).model.graph.inputs[0].name or ""
    result = cipm_ir.optimize(mlp(), [scored], data={name: x.numpy()}, example_inputs=x[:4])
    assert "drop of the score 0," in result.report.steps[0].summary


def test_why_recurrent_units_stay() -> None:
    """Of a module the weights reach the layer in another order of gates, so they are not refitted."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: Any) -> Any:
            return self.out(self.rnn(x)[0])

    with pytest.raises(SymmetryError, match=r"GRU rnn\S* feeds its units back to itself, and its weights or states"):
        compressed(Tagger().eval(), torch.randn(8, 5, 3), "params=0.5,plain=false")


class Masked(nn.Module):
    """Rows with padding: torch adds minus infinity to the scores."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Any, padded: Any = None) -> Any:
        return self.encoder(x, src_key_padding_mask=padded).mean(1)


def test_masks_of_minus_infinity() -> None:
    torch.manual_seed(0)
    module, x = Masked().eval(), torch.randn(40, 5, 12)
    padded = (torch.arange(5) >= 4).expand(40, 5).contiguous()
    data = {"x": x.numpy(), "padded": padded.numpy()}
    passes = [f"compress{{params=0.8,{FAST}}}"]
    result = cipm_ir.optimize(module, passes, data=data, example_inputs=(x[:4], padded[:4]), method="export")
    pruned = cipm_ir.optimize(
        module, ["prune{params=0.8,min_keep=1}"], example_inputs=(x[:4], padded[:4]), method="export"
    )
    with torch.no_grad():
        wanted, small, other = (m(x[:4], padded[:4]) for m in (module, result.model, pruned.model))
    assert (small - wanted).square().mean() < (other - wanted).square().mean()


def test_heads_go_while_others_become_narrower() -> None:
    """The batch times the heads is a size of its own in torch's attention, with the batch left open."""
    module, x = Masked().eval(), torch.randn(7, 5, 12)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = cipm_ir.load(module, x[:4], dynamic_shapes=shapes, method="export")
    heads = next(s for s in program.spaces if s.kind == "blocks")
    kept = {heads: np.array([1]), **{s: np.arange(3) for s in program.spaces if s.parent is not None}}
    small: Any = program.restrict(kept)
    emitted = small.origin.emit(small.emit()).object
    with torch.no_grad():
        assert emitted(x).shape == (7, 5, 12)[::2]
