"""What a graph has frozen, given back: dropout and batch normalization that know whether the module trains.

Programs are read in evaluation mode, and torch writes the mode of a module into its graph. A module that comes out as a
graph must still train, so these operations become calls of modules again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from cipm_ir.backends.torch.attributes import stack
from cipm_ir.backends.torch.places import free_path
from cipm_ir.ir.capture import Capture

_DROPOUTS = {
    torch.ops.aten.dropout.default: nn.Dropout,
    torch.ops.aten.feature_dropout.default: nn.Dropout2d,
    torch.ops.aten.alpha_dropout.default: nn.AlphaDropout,
    torch.ops.aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


class Trained:
    """Gives the modules that stand for operations whose work depends on the mode."""

    def __init__(self, capture: Capture, root: nn.Module) -> None:
        self.root, self.source = root, capture.source
        self.active = capture.kind == "module"
        self.modules = dict(self.source.named_modules()) if self.active else {}

    def path(self, node: fx.Node) -> str | None:
        """Path of a module to call with the first argument of a node instead; None where the node is right as it is."""
        if not self.active or node.op != "call_function":
            return None
        if node.target in _DROPOUTS:
            p, trains = _dropout(*node.args, **node.kwargs)
            if trains:  # dropped in evaluation too: it is meant so
                return None
            made = _DROPOUTS[node.target](float(p))
            made.training = self.source.training
            path = free_path(self.root, node.name)
            self.root.add_module(path, made)
            return path
        if node.target is torch.ops.aten.batch_norm.default:
            owner = next(iter(stack(node, self.modules)), "")
            if isinstance(self.modules.get(owner), nn.modules.batchnorm._BatchNorm):
                return self._batch_norm(owner)
        return None

    def _batch_norm(self, path: str) -> str | None:
        """Return the layer at its own path, with the tensors that the new root holds there."""
        source, held = self.modules[path], self.root.get_submodule(path)
        if isinstance(held, nn.modules.batchnorm._BatchNorm):
            return path
        tensors = {**held._parameters, **held._buffers}
        if set(tensors) < {k for k in ("weight", "running_mean") if getattr(source, k) is not None}:
            return None
        made = copy.copy(source)
        made._parameters = {k: tensors.get(k, p) for k, p in source._parameters.items()}
        made._buffers = {k: tensors.get(k, None if b is None else b.clone()) for k, b in source._buffers.items()}
        made.num_features = next(t.shape[0] for t in tensors.values() if t is not None)
        owner, _, leaf = path.rpartition(".")
        self.root.get_submodule(owner).add_module(leaf, made)
        return path


def _dropout(x: Any, p: Any = 0.5, training: Any = True, inplace: Any = False, train: Any = None) -> tuple[Any, Any]:
    """Return the probability and whether it is dropped, of a call of a function or of aten."""
    return p, training if train is None else train
