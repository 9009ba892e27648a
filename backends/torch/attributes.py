"""Attributes of modules that say a size: what they become when the tensors of a module change shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from cipm_ir.backends.torch.slices import Difference

Attributes = dict[str, dict[str, Any]]
"""By dotted path of a module: attribute name to value."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _linear(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _convolution(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    groups = held.get("groups", m.groups)
    first, second = m.weight.shape[0], m.weight.shape[1] * groups
    if isinstance(m, _TRANSPOSED):
        return {"in_channels": first, "out_channels": second, "groups": groups}
    return {"out_channels": first, "in_channels": second, "groups": groups}


def _batch_norm(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    known = m.weight if m.weight is not None else m.running_mean
    return {} if known is None else {"num_features": known.shape[0]}


def _layer_norm(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _group_norm(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    groups = {"num_groups": held["num_groups"]} if "num_groups" in held else {}
    return groups if m.weight is None else {"num_channels": m.weight.shape[0], **groups}


def _embedding(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _recurrent(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"hidden_size": m.weight_hh_l0.shape[1], "input_size": m.weight_ih_l0.shape[1]}
    if m.proj_size:
        sizes |= {"hidden_size": m.weight_hr_l0.shape[1], "proj_size": m.weight_hr_l0.shape[0]}
    return sizes


def _cell(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    return {"hidden_size": m.weight_hh.shape[1], "input_size": m.weight_ih.shape[1]}


def _attention(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    if m.in_proj_weight is None:
        width, keys, values = m.q_proj_weight.shape[1], m.k_proj_weight.shape[1], m.v_proj_weight.shape[1]
    else:
        width = keys = values = m.in_proj_weight.shape[1]
    return {"embed_dim": width, "kdim": keys, "vdim": values, "head_dim": width // m.num_heads}


def _bilinear(m: Any, held: Mapping[str, Any]) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in1_features": m.weight.shape[1], "in2_features": m.weight.shape[2]}


_RULES: tuple[tuple[tuple[type, ...], Callable[[Any, Mapping[str, Any]], dict[str, Any]]], ...] = (
    ((nn.Linear,), _linear),
    ((*_CONVOLUTIONS, *_TRANSPOSED), _convolution),
    ((nn.modules.batchnorm._NormBase,), _batch_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    ((nn.PReLU,), lambda m, held: {"num_parameters": m.weight.numel()}),
    ((nn.RNNBase,), _recurrent),
    ((nn.RNNCellBase,), _cell),
    ((nn.MultiheadAttention,), _attention),
    ((nn.Bilinear,), _bilinear),
)


def standard(module: nn.Module, held: Mapping[str, Mapping[str, Any]]) -> Attributes:
    """Return attributes of the layers of torch.nn that no longer say what their tensors are.

    ``held`` gives, by path, what the IR says of attributes that no tensor shows (groups).
    """
    found: Attributes = {}
    for path, layer in module.named_modules():
        for kinds, rule in _RULES:
            if isinstance(layer, kinds):
                new = rule(layer, held.get(path, {}))
                own = {k: v for k, v in new.items() if getattr(layer, k, v) != v}
                if own:
                    found[path] = own
    return found


def suggested(module: nn.Module, old_graph: Any, changed: Mapping[str, Difference]) -> Attributes:
    """Integers of the user's own classes that were literals of the graph and should now be others.

    A guess, which counts only where the module then computes the same as the rewritten graph.
    """
    modules = dict(module.named_modules())
    found: Attributes = {}
    for node in old_graph.nodes:
        difference = changed.get(node.name)
        if difference is None:
            continue
        for path in stack(node, modules):
            for old, new in difference.literals:
                for name, value in _integers(modules[path]):
                    if value == old:
                        found.setdefault(path, {}).setdefault(name, new)
    return found


def stack(node: Any, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Paths of the modules whose code made a node, innermost first."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        path = path.removeprefix("L['self'].").removeprefix("self.")
        if path in modules:
            yield path
    yield ""


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    for name, value in vars(module).items():
        if type(value) is int and not name.startswith("_"):
            yield name, value


def apply_attributes(module: nn.Module, attributes: Attributes) -> None:
    """Set attributes of the modules below ``module``, in place."""
    for path, own in attributes.items():
        layer = module.get_submodule(path)
        for name, value in own.items():
            setattr(layer, name, value)
