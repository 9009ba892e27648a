"""Recovery of the names of Linear weights that torch's ONNX exporter replaced.

``torch.onnx.export(dynamo=True)`` keeps the ``state_dict`` name of every parameter, with one exception: a Linear on
anything but a matrix becomes MatMul (and Add), for which the weight is transposed and stored as ``val_17``. What the
exporter notes on nodes and values (torch 2.13) is enough to tell which parameter that was.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.nested import graphs_within
from cipm_ir.ir.parameters import named
from cipm_ir.passes.exact.cleanup.fold_constants import FOLDED_FROM, listed
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult
from cipm_ir.passes.framework.registry import register
from cipm_ir.symmetry.program import Program

_FX_NODE = "pkg.torch.onnx.fx_node"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_PARAMETER = "pkg.torch.export.graph_signature.InputSpec.kind"
"""Written on initializers that kept the name they have in the ``state_dict``."""

_LINEAR = re.compile(r"call_function\[target=torch\.ops\.aten\.linear\.default\]\(args = \(%\w+, %p_(\w+)[,)]")
"""An fx node that multiplies with a parameter itself; the group is what became of the parameter's name."""

_NAMED = 3
"""So many weights that keep their names are named in the summary."""

_OWN = {"MultiheadAttention": ("in_proj_weight", "out_proj.weight")}
"""Modules that multiply with weights of their own, and how these are called; a Linear has ``weight``."""


@register("recover-names")
@dataclass(frozen=True)
class RecoverNames(Pass):
    """Rename Linear weights that torch's exporter stored as ``val_17`` back to their ``state_dict`` names.

    1. Candidates are matrices among the initializers that a MatMul or an untransposed Gemm multiplies with from the
       right, and whose name is no ``state_dict`` name: it has no dot, and the exporter did not mark it as a parameter.
    2. Each node that consumes it must stand for ``aten.linear`` of a parameter itself (fx_node). The name of that node
       spells the parameter in lower case, with ``_`` for dots.
    3. The name is that of the one tensor that the value was folded from (folded_from). In files without that note it is
       the weight of the innermost module (name_scopes), if that is a Linear or a MultiheadAttention (class_hierarchy).
    4. The name must match the spelling of rule 2 at every consumer. If torch numbered a spelling that two parameters
       share, folded_from and name_scopes must agree.

    Only the name changes: the value stays as it is stored, the transpose of the ``state_dict``'s tensor.

    Left alone: a weight that another kind of node consumes too, consumers that disagree (equal weights of two modules,
    stored once), missing notes, a weight that was computed from a parameter, a name that is taken (the tied embedding
    keeps it), two weights with the same name, inputs and outputs of the graph, buffers.
    """

    kind: ClassVar[Kind] = Kind.EXACT
    preserves: ClassVar[frozenset[str]] = frozenset({"batch-norm-folded"})

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Rename in a copy; without effect, the program that came in is given back."""
        model = program.emit()
        found, left = _find_names(model.graph)
        metrics = {"renamed": found, "left": left, "layout": "transposed"}
        if not found:
            return PassResult(program, False, _summary(found, left), metrics=metrics)
        for old, new in found.items():
            _rename(model.graph.initializers[old], new)
        witness = {"renamed": found, "transposed": sorted(found.values()), "left": left}
        return PassResult(
            Program.of(model, origin=program.origin), True, _summary(found, left), witness=witness, metrics=metrics
        )


def _summary(found: Mapping[str, str], left: Mapping[str, str]) -> str:
    few = "; ".join(f"{name!r}: {why}" for name, why in list(left.items())[:_NAMED])
    more = f"; {len(left) - _NAMED} more" if len(left) > _NAMED else ""
    kept = f"{len(left)} kept theirs ({few}{more})" if left else ""
    if not found:
        return f"no weight was renamed{'; ' if kept else ''}{kept}"
    renamed = "1 weight has its" if len(found) == 1 else f"{len(found)} weights have their"
    return f"{renamed} state_dict name again, the value transposed as before{'; ' if kept else ''}{kept}"


def _find_names(graph: ir.Graph) -> tuple[dict[str, str], dict[str, str]]:
    """For each candidate by its name: the name to give it, or why it keeps its own."""
    wanted: dict[str, list[str]] = defaultdict(list)
    left: dict[str, str] = {}
    taken = set(_value_names(graph))
    for old, value in graph.initializers.items():
        if not _is_candidate(value):
            continue
        try:
            name = _find_name(value)
        except UnsupportedPattern as reason:
            left[old] = str(reason)
            continue
        if name == old:
            continue
        if name in taken:
            left[old] = f"another value is called {name!r}"
        else:
            wanted[name].append(old)
    found = {olds[0]: name for name, olds in wanted.items() if len(olds) == 1}
    for name, olds in wanted.items():
        if len(olds) > 1:
            left |= {old: f"{len(olds)} weights would be called {name!r}" for old in olds}
    return found, left


def _value_names(graph: ir.Graph) -> Iterator[str]:
    """Yield every name in use in the graph and its subgraphs; these see each other's."""
    for part in graphs_within(graph):
        values = [*part.inputs, *part.initializers.values(), *(v for node in part for v in node.outputs)]
        yield from (value.name for value in values if value.name)


def _is_candidate(value: ir.Value) -> bool:
    """Rule 1."""
    named_by_torch = "." in (value.name or "") or _PARAMETER in value.metadata_props
    matrix = value.const_value is not None and len(value.const_value.shape) == 2
    return matrix and not named_by_torch and any(_multiplies(node, place) for node, place in value.uses())


def _multiplies(node: ir.Node, place: int) -> bool:
    """The node takes input ``place`` as right operand; a Gemm with transB has the weight as the state_dict has it."""
    if node.domain or place != 1:
        return False
    transposed = node.attributes.get_int("transB", 0) != 0
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not transposed)


def _find_name(value: ir.Value) -> str:
    """Rules 2 to 4: the ``state_dict`` name of a candidate; `UnsupportedPattern` where it cannot be told."""
    if value.is_graph_input() or value.is_graph_output():
        raise UnsupportedPattern("it is an input or output of the graph")
    names = {_name_at(node, place, value) for node, place in value.uses()}
    if len(names) > 1:
        raise UnsupportedPattern(f"the nodes that read it stand for different weights: {', '.join(sorted(names))}")
    return names.pop()


def _name_at(node: ir.Node, place: int, value: ir.Value) -> str:
    """Return the name according to one node that reads the value."""
    if not _multiplies(node, place):
        raise UnsupportedPattern(f"a {node.op_type} reads it too")
    linear = _LINEAR.search(node.metadata_props.get(_FX_NODE, ""))
    if linear is None:
        raise UnsupportedPattern(f"node {node.name!r} has no note that it multiplies with a parameter of the module")
    spelled = linear[1]
    scoped = _scope_weights(node)
    if FOLDED_FROM not in value.metadata_props:
        fitting = [name for name in scoped if _spelled(name) == spelled]
        if len(fitting) != 1:
            raise UnsupportedPattern(f"node {node.name!r} does not tell in which module the parameter {spelled!r} lies")
        return fitting[0]
    sources = listed(value.metadata_props[FOLDED_FROM])
    if len(sources) != 1:
        raise UnsupportedPattern("it was computed from more than one tensor")
    numbered = re.fullmatch(re.escape(_spelled(sources[0])) + r"_\d+", spelled) and sources[0] in scoped
    if _spelled(sources[0]) != spelled and not numbered:
        raise UnsupportedPattern(
            f"it was folded from {sources[0]!r}, but node {node.name!r} multiplies with {spelled!r}"
        )
    return sources[0]


def _scope_weights(node: ir.Node) -> tuple[str, ...]:
    """Return the weights that the innermost module of a node may multiply with, by their full names."""
    # Both lists end with the operation itself; torch.export may write a module's second call as `layer@1`.
    scopes, classes = listed(node.metadata_props.get(_SCOPES)), listed(node.metadata_props.get(_CLASSES))
    if len(scopes) < 2 or len(scopes) != len(classes):
        return ()
    module, kind = re.sub(r"@\d+", "", scopes[-2]), classes[-2].rpartition(".")[2]
    own = ("weight",) if kind.endswith("Linear") else _OWN.get(kind, ())
    return tuple(f"{module}.{name}" if module else name for name in own)


def _spelled(name: str) -> str:
    """Return a parameter's name as torch.export spells it behind the prefix ``p_``."""
    # It takes `self_` for a trace of its own, also where the name of a module (self_attn) begins so.
    return re.sub(r"[^a-zA-Z0-9]", "_", name.removeprefix("self_")).lower()


def _rename(value: ir.Value, name: str) -> None:
    """Rename an initializer; its tensor, shared with the model that came in, keeps its own name."""
    tensor = value.const_value
    if tensor is None:
        return
    own = named(tensor, name)
    own.doc_string = tensor.doc_string
    own.metadata_props.update(tensor.metadata_props)
    value.const_value = own
    value.name = name
