"""The operator registry: one entry per ONNX operator, holding all that is known of it.

An entry is a function ``labels(op)`` that reads the states of the inputs and sets those of the outputs, decorated
with the operator's names. The decorator also takes how literals follow a change of size (``resize``), which inputs are
such literals, and whether it works on each entry alone (``elementwise``). What a node costs is in
`cipm_ir.ops.costs`: that needs shapes only, and no rule for labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cipm_ir.ops.context import OpContext
    from cipm_ir.ops.resize import Resize

Shape = tuple[int, ...]
LabelRule = Callable[["OpContext"], None]
ResizeRule = Callable[["Resize"], None]


@dataclass(frozen=True)
class Operator:
    """Everything the framework knows about one operator.

    ``elementwise``: an entry of an output is a function of the entries at its place (inputs aligned from the right),
    the same function everywhere. Only then does `OpContext.like` hand on that an axis is uniform.
    """

    name: str
    domain: str
    labels: LabelRule
    resize: ResizeRule | None = None
    literals: tuple[int, ...] = ()
    elementwise: bool = False


_REGISTRY: dict[tuple[str, str], Operator] = {}
_OF_DOMAIN: dict[str, Operator] = {}


def operator(
    *names: str,
    domain: str = "",
    resize: ResizeRule | None = None,
    literals: tuple[int, ...] = (),
    elementwise: bool = False,
) -> Callable[[LabelRule], LabelRule]:
    """Register a label rule for operators; registering one twice is an error.

    Without names it is the rule of all operators of a domain that have none of their own.
    """

    def register(rule: LabelRule) -> LabelRule:
        if not names:
            _OF_DOMAIN[domain] = Operator("", domain, rule, resize, literals, elementwise)
        for name in names:
            key = (domain, name)
            if key in _REGISTRY:
                raise ValueError(f"operator {domain}::{name} is registered twice")
            _REGISTRY[key] = Operator(name, domain, rule, resize, literals, elementwise)
        return rule

    return register


def lookup(domain: str, name: str) -> Operator | None:
    """The entry of an operator, or None where there is none."""
    domain = "" if domain == "ai.onnx" else domain
    return _REGISTRY.get((domain, name)) or _OF_DOMAIN.get(domain)


def registered() -> tuple[Operator, ...]:
    """All entries, by domain and name."""
    return tuple(_REGISTRY[key] for key in sorted(_REGISTRY))
