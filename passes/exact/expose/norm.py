"""Folding gamma and beta of normalizations into the products that read them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.labels import Array
from cipm_ir.ops.registry import entry_of
from cipm_ir.passes.exact.expose.forms import Norm, find_norms
from cipm_ir.passes.exact.expose.linear import Step, absorb_input, carry_out
from cipm_ir.passes.exact.expose.moves import moved_axis, moved_outputs
from cipm_ir.passes.exact.expose.rewriter import GraphRewriter


@dataclass
class Folded:
    """How many normalizations were folded, into how many products, and why others were kept."""

    norms: int = 0
    products: int = 0
    kept: Counter[str] = field(default_factory=Counter)


def fold_norms(draft: GraphRewriter) -> Folded:
    """Fold gamma and beta of every normalization whose readers are all products with weights of their own.

    Gamma becomes ones and stays, as it carries the scales of the output; beta goes, or becomes zeros where an Add of
    its own holds it (runtimes look for that Add when they fuse).
    """
    done = Folded()
    for norm in find_norms(draft):
        scale, shift = affine_of(draft, norm)
        if (scale == 1).all() and not shift.any():
            continue
        try:
            done.products += _fold(draft, norm, scale, shift)
            done.norms += 1
        except UnsupportedPattern as reason:
            done.kept[str(reason)] += 1
    return done


def affine_of(draft: GraphRewriter, norm: Norm) -> tuple[Array, Array]:
    """Gamma and beta as vectors along the axis, in float64."""
    sizes = draft.sizes(norm.source)
    assert sizes is not None
    size = sizes[0][norm.axis]
    gamma = np.ones(size) if norm.gamma is None else norm.gamma.array.ravel()
    return gamma, np.zeros(size) if norm.beta is None else norm.beta.array.ravel()


def _fold(draft: GraphRewriter, norm: Norm, scale: Array, shift: Array) -> int:
    """Decide on all readers, then write; gives the number of products."""
    readers = axis_readers(draft, norm.output, norm.axis)
    if not readers:
        raise UnsupportedPattern("nothing reads it")
    for weight in (norm.gamma, norm.beta):
        if weight is not None and not weight.alone and not draft.may_split(weight.tensor):
            raise UnsupportedPattern(f"{weight.name} is read in several places (shared=vectors splits it)")
    steps: list[Step] = []
    for node, index, axis in readers:
        steps += absorb_input(draft, node, index, axis, scale, shift)
    if norm.gamma is not None:
        steps.append(draft.change(norm.gamma, np.ones_like))
    if norm.beta is not None and not norm.fused:
        steps.append(draft.change(norm.beta, np.zeros_like))
    carry_out(draft, steps)
    if norm.beta is not None and norm.fused:
        norm.node.resize_inputs(2)
    return len({node for node, _, _ in readers})


def axis_readers(draft: GraphRewriter, value: ir.Value, axis: int) -> list[tuple[ir.Node, int, int]]:
    """Return everything that reads a value otherwise than by moving it: (node, input, axis there).

    Refuses graph outputs and what subgraphs read.
    """
    found: list[tuple[ir.Node, int, int]] = []
    todo = [(value, axis)]
    while todo:
        value, axis = todo.pop()
        if value.is_graph_output():
            raise UnsupportedPattern("a graph output shows it")
        for use in value.uses():
            node = use.node
            if node.graph is not draft.graph:
                raise UnsupportedPattern("a subgraph reads it")
            if entry_of(node).sizes_only:
                continue
            place = moved_axis(draft, node, use.idx, axis)
            if place is None:
                found.append((node, use.idx, axis))
            else:
                todo += [(out, place) for out in moved_outputs(node)]
    return found
