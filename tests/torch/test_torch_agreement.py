"""One network read by torch.fx tracing, by torch.export and from its ONNX file has the same spaces.

Compared are kind, size and group of every space, as a multiset: names differ between the frontends. torch's ONNX
exporter folds batch normalizations into the convolutions before them, so the pass that does the same runs first on
every program; it changes nothing in a network that has none.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.torch import torch_zoo  # noqa: E402
from tests.torch.torch_exporter import exported  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.passes import run_passes  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights:UserWarning")

Spaces = Counter[tuple[str, int, str]]

FROM_THE_ISSUE = (
    "mlp_relu",
    "resnet20_random",
    "resnet_bottleneck",
    "mobilenet_v2",
    "mobilenet_v3",
    "densenet",
    "shufflenet",
    "unet",
    "yolo_c2f",
    "squeeze_excitation",
    "convnext",
    "lstm_tagger",
    "gru_tagger",
    "encoder_qkv_3hd",
    "encoder_qkv_head_major",
    "torch_transformer_encoder",
    "bert",
    "vit",
    "gpt2",
    "llama",
    "qwen2",
    "hf_convnext",
    "whisper_encoder",
)
HARD_FOR_OTHERS = (
    "fail_option_a",
    "fail_channel_pad",
    "fail_roll",
    "fail_qkv_index",
    "fail_pixel_shuffle",
    "fail_channel_shuffle",
    "fail_grouped_view",
    "fail_grouped_gate",
    "fail_broadcast_mask",
    "fail_batch_norm",
    "fail_flatten",
    "distilbert",
    "gpt_neox",
)
NAMES = (*FROM_THE_ISSUE, *HARD_FOR_OTHERS)

UNTIED_BY_THE_EXPORTER = {
    "gpt2": "the head is a transposed copy of the embedding in the file, so each may be scaled on its own",
    "qwen2": "the head is a transposed copy of the embedding in the file, so each may be scaled on its own",
}
"""Here torch is right to find less: one weight plays two parts. With a copy in torch as well, they agree."""

NOT_TRACED = {"torch_transformer_encoder": "tracing enters its layers, and they branch on their input"}
"""torch's own tracer takes these layers as one call, which has no rule."""

NOT_EXPORTED = {
    "t5_encoder": "torch's exporter fails to decompose a view of a transposed tensor",
    "swin": "torch's exporter fails to decompose a view of a transposed tensor",
}
"""No file to compare with: tracing and torch.export are all there is."""


TRACED = [name for name in NAMES if torch_zoo.case(name).symbolic and name not in NOT_TRACED]


def spaces_of(program: Program) -> Spaces:
    """How many spaces there are of each kind, size and group, batch normalizations folded."""
    folded = run_passes(program, ["fold-batch-norm"], verify=False).program
    return Counter((s.kind, s.size, str(s.group)) for s in folded.spaces)


def units_of(spaces: Spaces) -> Counter[str]:
    """How many free units (heads, cells) there are, by kind."""
    found: Counter[str] = Counter()
    for (kind, size, _), times in spaces.items():
        found[kind] += size * times
    return found


@functools.cache
def case(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if "hf" in torch_zoo.case(name).tags:
        pytest.importorskip("transformers", reason="a model of that library")
    module, args, kwargs = torch_zoo.built(name)
    return (untied(module) if name in UNTIED_BY_THE_EXPORTER else module), args, kwargs


def untied(module: Any) -> Any:
    """A copy in which every place that holds a shared parameter has its own."""
    module, seen = copy.deepcopy(module), set()
    for layer in module.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter in seen:
                setattr(layer, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(parameter)
    return module


@functools.cache
def by_torch(name: str, method: str) -> Spaces:
    module, args, kwargs = case(name)
    if method == "auto" and name not in UNTIED_BY_THE_EXPORTER:
        return spaces_of(torch_zoo.program(name))
    return spaces_of(cipm_ir.load(module, args, kwargs, method=method))


def by_onnx(name: str, folder: Path) -> Spaces:
    module, args, kwargs = case(name)
    return spaces_of(cipm_ir.load(saved(module, args, kwargs, folder / f"{name}.onnx")))


def saved(module: Any, args: Any, kwargs: Any, path: Path) -> Path:
    exported(module, args, kwargs).save(str(path))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_torch_and_onnx_agree(name: str, tmp_path: Path) -> None:
    from_file, from_torch = by_onnx(name, tmp_path), by_torch(name, "auto")
    assert from_file == from_torch
    assert units_of(from_file) == units_of(from_torch)
    assert from_file


@pytest.mark.parametrize("name", TRACED)
def test_tracing_and_export_agree(name: str) -> None:
    traced, by_export = by_torch(name, "symbolic"), by_torch(name, "export")
    assert traced == by_export
    assert units_of(traced) == units_of(by_export)


@pytest.mark.parametrize("name", sorted(UNTIED_BY_THE_EXPORTER))
def test_a_tied_head_is_what_the_exporter_loses(name: str, tmp_path: Path) -> None:
    found = torch_zoo.case(name)
    case(name)
    module, (args, kwargs) = found.build(), found.inputs()
    tied = spaces_of(cipm_ir.load(module, args, kwargs))
    from_file = spaces_of(cipm_ir.load(saved(module, args, kwargs, tmp_path / "tied.onnx")))
    assert tied != from_file and units_of(tied) == units_of(from_file)
    assert from_file == by_torch(name, "auto")


@pytest.mark.parametrize("name", sorted(NOT_EXPORTED))
def test_what_has_no_file(name: str, tmp_path: Path) -> None:
    """When this fails the exporter has learned it: the model then belongs to the others."""
    module, args, kwargs = case(name)
    with pytest.raises(Exception, match="decompose"):
        saved(module, args, kwargs, tmp_path / "never.onnx")


def test_control_other_activations_do_not_agree(tmp_path: Path) -> None:
    """The comparison sees a group that is too small and a layer that is one unit narrower."""
    assert by_onnx("mlp_relu", tmp_path) != by_torch("mlp_tanh", "auto")
    module, args, kwargs = copy.deepcopy(case("mlp_relu"))
    layers = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    layers[0].weight = torch.nn.Parameter(layers[0].weight[:-1].detach())
    layers[0].bias = torch.nn.Parameter(layers[0].bias[:-1].detach())
    layers[1].weight = torch.nn.Parameter(layers[1].weight[:, :-1].detach())
    assert spaces_of(cipm_ir.load(module, args, kwargs)) != by_onnx("mlp_relu", tmp_path)
