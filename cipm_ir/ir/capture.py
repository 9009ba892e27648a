"""How a torch graph became a graph of the IR: what a backend needs to write the same kind of thing again.

Nothing here imports torch; its objects are held as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as ir


@dataclass(frozen=True)
class Results:
    """What one torch node computes in the IR.

    Attributes:
        value: the names of the IR values, in the structure that torch returns (a name, a tuple, a dict); None where the
            result is no tensor.
        own: those values that this node computes; the others it hands on.
        writes: the node changes its first argument in place, so that it must stay in its place.
    """

    value: Any
    own: tuple[str, ...]
    writes: bool = False


@dataclass
class Capture:
    """A torch program and the IR model that it was lowered to.

    Attributes:
        kind: what the caller gave.
        source: that object, never changed.
        graph: the `torch.fx.Graph` that was lowered.
        root: the module that ``graph`` takes its submodules and parameters from (None for an exported program).
        exported: the `torch.export.ExportedProgram`, where the graph is one's.
        method: "symbolic" or "export", how an `nn.Module` became a graph, otherwise "given".
        model: the IR model before any pass.
        results: by name of the torch node.
        parameters: every `state_dict` name that the graph uses, with the name of its initializer: names that share
            storage have the same one.
        layouts: for names whose tensor is another view of the same memory: how its axes are permuted.
        inputs: name of each graph input, with an example of its value; in the order of the placeholders.
        placeholders: an example (or the fixed value) of every placeholder that is no parameter, by its name.
        args: the example inputs as the caller gave them, (args, kwargs); None for an exported program without.
        dynamic_shapes: as the caller gave them to `torch.export`.
        notes: what the user should know of how the program was read.
        read_again: reads another torch object the same way: method, example inputs, dynamic shapes, evaluation mode.
    """

    kind: Literal["module", "graph", "exported"]
    source: Any
    graph: Any
    root: Any
    exported: Any
    method: str
    model: ir.Model
    results: Mapping[str, Results]
    parameters: Mapping[str, str]
    layouts: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, Any]
    placeholders: Mapping[str, Any]
    args: tuple[tuple[Any, ...], dict[str, Any]] | None
    dynamic_shapes: Any = None
    notes: list[str] = field(default_factory=list)
    read_again: Callable[[Any], Capture] | None = None
