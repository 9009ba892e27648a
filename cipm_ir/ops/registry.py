"""The operator registry: one entry per ONNX operator, holding all that is known of it.

An entry is a function ``labels(op)`` that reads the states of the inputs and sets those of the outputs, decorated
with the operator's names. The decorator also takes how literals follow a change of size (``resize``), which inputs are
such literals, and whether it works on each entry alone (``elementwise``). What a node costs is in
`cipm_ir.ops.costs`: that needs shapes only, and no rule for labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cipm_ir.ir.opsets import standard_name
from cipm_ir.ops.context import OpContext
from cipm_ir.ops.resize import Resize

Shape = tuple[int, ...]
LabelRule = Callable[[OpContext], None]
ResizeRule = Callable[[Resize], None]


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
            the same function everywhere. Only then does `OpContext.like` hand on that an axis is uniform. Implies
            the two below.
        positionwise: an entry of an output depends on entries of the inputs that carry the same labels only, but for
            the statistics and contractions that the rule records.
        mergeable: units that are equal before it are equal behind it, and sums over units are contractions that the
            rule records: a consumer behind it can take up a merge of units.
    """

    name: str
    domain: str
    labels: LabelRule
    resize: ResizeRule | None = None
    literals: tuple[int, ...] = ()
    elementwise: bool = False
    positionwise: bool = False
    mergeable: bool = False


_REGISTRY: dict[tuple[str, str], Operator] = {}
_OF_DOMAIN: dict[str, Operator] = {}


def operator(
    *names: str,
    domain: str = "",
    resize: ResizeRule | None = None,
    literals: tuple[int, ...] = (),
    elementwise: bool = False,
    positionwise: bool = False,
    mergeable: bool = False,
) -> Callable[[LabelRule], LabelRule]:
    """Register a label rule for operators, with their traits (see `Operator`); registering one twice is an error.

    Without names it is the rule of all operators of a domain that have none of their own.
    """
    traits = elementwise, elementwise or positionwise, elementwise or mergeable

    def register(rule: LabelRule) -> LabelRule:
        if not names:
            _OF_DOMAIN[domain] = Operator("", domain, rule, resize, literals, *traits)
        for name in names:
            key = (domain, name)
            if key in _REGISTRY:
                raise ValueError(f"operator {domain}::{name} is registered twice")
            _REGISTRY[key] = Operator(name, domain, rule, resize, literals, *traits)
        return rule

    return register


def lookup(domain: str, name: str) -> Operator | None:
    """Return the entry of an operator, or None where there is none."""
    domain = standard_name(domain)
    return _REGISTRY.get((domain, name)) or _OF_DOMAIN.get(domain)


def registered() -> tuple[Operator, ...]:
    """Return all entries, by domain and name."""
    return tuple(_REGISTRY[key] for key in sorted(_REGISTRY))
