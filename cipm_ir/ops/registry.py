"""The operator registry: one entry per operator, holding all that is known of it.

An entry is a function ``labels(op)`` that reads the states of the inputs and sets those of the outputs, decorated
with the operator's names. The decorator also takes how literals follow a change of size (``resize``), which inputs are
such literals, and the traits: statements about what the operator computes, which every other layer asks for instead of
knowing operators by name. Products are counted in `cipm_ir.ops.costs`: that needs shapes only, and no label rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

import onnx_ir as ir

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.ir.opsets import standard_name
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.resize import Resize

Shape = tuple[int, ...]
LabelRule = Callable[[OpContext], None]
ResizeRule = Callable[[Resize], None]


class Traits(TypedDict, total=False):
    """The traits that `operator` takes; `Operator` says what each means."""

    elementwise: bool
    moves: bool
    pools: bool
    reduces: bool
    sizes_only: bool
    linear: bool
    shifts: bool
    positionwise: bool
    mergeable: bool
    free: bool
    pads: Callable[[ir.Node], bool]


@dataclass(frozen=True)
class Operator:
    """Everything the framework knows about one operator.

    A trait that is not declared is absent, and whoever asks for it is then conservative.

    Attributes:
        name: of the operator.
        domain: empty for ONNX's own.
        labels: the label rule.
        resize: how literals and attributes follow a change of size.
        literals: inputs that are such literals.
        elementwise: an entry of an output is a function of the entries at its place (inputs aligned from the right),
            the same function everywhere. Only then does `OpContext.like` hand on that an axis is uniform.
        moves: each entry of an output is an entry of an input. Where it comes from depends on shapes, attributes and
            the other inputs, never on the entries that are moved.
        pools: an average, an extremum or a norm over windows of positions, for each channel alone.
        reduces: a statistic over whole axes, which are gone or have length 1 in the output.
        sizes_only: the output depends on the shape of the input alone.
        linear: linear in the first input with the others held fixed, by the same map for every unit.
        shifts: adding to each unit of the first input a constant of its own adds the same to that unit of the output
            (with the border left out, see ``pads``).
        positionwise: an entry of an output depends on entries of the inputs that carry the same labels only, but for
            the statistics and contractions that the rule records.
        mergeable: units that are equal before it are equal behind it, and sums over units are contractions that the
            rule records: a consumer behind it can take up a merge of units.
        free: no multiply-accumulates (see `cipm_ir.ops.costs`).
        pads: whether a node lets numbers in at the border that are no entries of its input.
    """

    name: str
    domain: str
    labels: LabelRule
    resize: ResizeRule | None = None
    literals: tuple[int, ...] = ()
    elementwise: bool = False
    moves: bool = False
    pools: bool = False
    reduces: bool = False
    sizes_only: bool = False
    linear: bool = False
    shifts: bool = False
    positionwise: bool = False
    mergeable: bool = False
    free: bool = False
    pads: Callable[[ir.Node], bool] | None = None


_REGISTRY: dict[tuple[str, str], Operator] = {}
_OF_DOMAIN: dict[str, Operator] = {}


def operator(
    *names: str,
    domain: str = "",
    resize: ResizeRule | None = None,
    literals: tuple[int, ...] = (),
    **traits: Unpack[Traits],
) -> Callable[[LabelRule], LabelRule]:
    """Register a label rule for operators, with their traits (see `Operator`); registering one twice is an error.

    Without names it is the rule of all operators of a domain that have none of their own.
    """
    traits = _with_implied(traits)

    def register(rule: LabelRule) -> LabelRule:
        if not names:
            _OF_DOMAIN[domain] = Operator("", domain, rule, resize, literals, **traits)
        for name in names:
            key = (domain, name)
            if key in _REGISTRY:
                raise ValueError(f"operator {domain}::{name} is registered twice")
            _REGISTRY[key] = Operator(name, domain, rule, resize, literals, **traits)
        return rule

    return register


def _with_implied(traits: Traits) -> Traits:
    """Return the traits with those that follow from them."""
    made = traits.copy()
    if traits.get("moves"):
        made["linear"] = made["shifts"] = True
    if traits.get("elementwise") or traits.get("moves") or traits.get("pools") or traits.get("sizes_only"):
        made["positionwise"] = made["mergeable"] = made["free"] = True
    if traits.get("reduces"):
        made["free"] = True
    return made


def lookup(domain: str, name: str) -> Operator | None:
    """Return the entry of an operator, or None where there is none."""
    domain = standard_name(domain)
    return _REGISTRY.get((domain, name)) or _OF_DOMAIN.get(domain)


def entry_of(node: ir.Node) -> Operator:
    """Return the entry of a node's operator; one without any trait where there is none."""
    return lookup(node.domain, node.op_type) or Operator(node.op_type, node.domain, _unknown)


def _unknown(op: OpContext) -> None:
    raise UnsupportedPattern("no rule for this operator")


def registered() -> tuple[Operator, ...]:
    """Return all entries, by domain and name."""
    return tuple(_REGISTRY[key] for key in sorted(_REGISTRY))
