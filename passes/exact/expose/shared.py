"""Splitting of constants that several places read."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from cipm_ir.ir.parameters import is_parameter
from cipm_ir.passes.exact.expose.gain import directions
from cipm_ir.passes.exact.expose.rewriter import REAL, GraphRewriter
from cipm_ir.symmetry.program import Program

_PAIRED = ("QuantizeLinear", "DequantizeLinear")


@dataclass
class Split:
    """Names of the initializers that became several, and how many copies and bytes that made."""

    names: list[str] = field(default_factory=list)
    copies: int = 0
    bytes: int = 0


def split_shared(draft: GraphRewriter) -> Split:
    """Give every reader of a shared vector its own; with ``split="all"``, of a matrix where that frees symmetry.

    Exporters write equal vectors once, and the analysis does not take that for a tie. A shared matrix is one to it, and
    so is a vector that a frontend marks as tied: these are split only where the group grows.
    """
    done = Split()
    shared = [value for value in draft.graph.initializers.values() if _shared(draft, value)]
    tied = [value for value in shared if _tied(value)]
    freeing = _freeing(draft.model, [value.name or "" for value in tied])
    for value in shared:
        tensor = value.const_value
        if tensor is None or (value in tied and value.name not in freeing):
            continue
        copies = _split(draft, value)
        done.names.append(value.name or "")
        done.copies += copies
        done.bytes += copies * tensor.nbytes
    return done


def _tied(value: ir.Value) -> bool:
    tensor = value.const_value
    return bool(value.meta.get("tied")) or (tensor is not None and sum(n > 1 for n in tensor.shape.numpy()) > 1)


def _shared(draft: GraphRewriter, value: ir.Value) -> bool:
    """Return a constant of several floating-point entries that several places of the main graph read.

    And may be split.
    """
    tensor = value.const_value
    if tensor is None or tensor.dtype not in REAL or tensor.size < 2 or not draft.may_split(tensor):
        return False
    if not is_parameter(value) or value.is_graph_output() or len(value.uses()) < 2:
        return False
    # one scale for both ends of a quantized value is how other tools know the pair
    return all(use.node.graph is draft.graph and use.node.op_type not in _PAIRED for use in value.uses())


def _split(draft: GraphRewriter, value: ir.Value) -> int:
    """The first reader in graph order keeps the name; gives the number of copies."""
    tensor = value.const_value
    assert tensor is not None
    uses = [(node, k) for node in draft.graph for k, given in enumerate(node.inputs) if given is value]
    for node, index in uses[1:]:
        node.replace_input_with(index, draft.stored(value.name or "shared", tensor))
    return len(uses) - 1


def _freeing(model: ir.Model, names: list[str]) -> set[str]:
    """Return those of some initializers with which the group grows when each reader gets its own."""
    if not names:
        return set()
    before = _freedom(model, [])
    if _freedom(model, names) <= before:
        return set()
    return {name for name in names if len(names) == 1 or _freedom(model, [name]) > before}


def _freedom(model: ir.Model, names: list[str]) -> int:
    trial = model.clone()
    draft = GraphRewriter(trial, "all")
    for name in names:
        _split(draft, trial.graph.initializers[name])
    return sum(directions(Program.of(trial)).values())
