"""Names of the nodes of an exported program, given back to the graph of its module.

`ExportedProgram.module()` names nodes again where a name is a Python builtin's or taken by a parameter: inputs called
``input`` and ``input_1`` become ``input_1`` and ``input_2``. All that is known of a program is kept by the old names.
"""

from __future__ import annotations

from torch import fx

from cipm_ir.errors import UnsupportedError
from cipm_ir.ir.capture import Capture


def named_as_captured(graph: fx.Graph, capture: Capture) -> None:
    """Name inputs and calls as in the captured graph, in place: the two have them in the same order.

    Raises:
        UnsupportedError: a call of the captured graph is not there.
    """
    pairs = list(zip((n for n in graph.nodes if n.op == "placeholder"), capture.placeholders, strict=True))
    calls = iter([n for n in graph.nodes if n.op.startswith("call")])
    for own in capture.graph.nodes:
        if own.op.startswith("call"):
            found = next((n for n in calls if n.target == own.target), None)  # calls that torch added are passed over
            if found is None:
                raise UnsupportedError(f"The module of the exported program lacks its node {own.name!r}.")
            pairs.append((found, own.name))
    names, placed = {name for _, name in pairs}, {node for node, _ in pairs}
    for node in graph.nodes:
        if node not in placed and node.name in names:
            node.name = f"{node.name}.of_module"
    for node, name in pairs:
        node.name = name
