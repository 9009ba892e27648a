"""Writes in place: which nodes of a torch graph may share memory, and what a write does to them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from cipm_ir.errors import UnsupportedPattern
from cipm_ir.frontends.torch.capture import Traced
from cipm_ir.frontends.torch.table import Entry, function_entry, module_entry, written
from cipm_ir.frontends.torch.values import Tensor


class Memory:
    """Nodes that may share memory carry one mark. What is not known to have memory of its own shares its argument's."""

    def __init__(self, traced: Traced, modules: Mapping[str, nn.Module]) -> None:
        self.traced, self.modules = traced, modules
        self.aliases: dict[fx.Node, Any] = {}
        self.marked: dict[Any, list[fx.Node]] = {}
        self.position = {node: k for k, node in enumerate(traced.graph.nodes)}

    def written(self, node: fx.Node) -> list[Any]:
        """Return the arguments that a node changes."""
        if node.op == "call_module":
            return list(node.args[:1]) if getattr(self.modules[str(node.target)], "inplace", False) is True else []
        return written(node.target, node.args, node.kwargs) if node.op in ("call_function", "call_method") else []

    def check(self, node: fx.Node, targets: list[Any]) -> None:
        """A write is expressed by a new value for the first argument: only where it is not read through a view."""
        target = targets[0]
        if len(targets) > 1 or target is not node.args[0]:
            raise UnsupportedPattern("it writes into another argument than its first")
        if self._counts(node, target):
            return
        if not isinstance(target, fx.Node) or any(self.state(n) for n in self.sharing(target)):
            raise UnsupportedPattern("it changes a parameter or buffer in place")
        for other in self.sharing(target):
            if other is not target and self.read_after(other, node):
                raise UnsupportedPattern(f"it changes memory in place that {other.name!r} shares")

    def _counts(self, write: fx.Node, target: Any) -> bool:
        """Return whether a batch normalization of a module that is read counts its batches, which nothing else uses."""
        held = self.sharing(target) if isinstance(target, fx.Node) else []
        counter = any(self.state(n).rpartition(".")[2] == "num_batches_tracked" for n in held)
        alone = not write.users and {user for n in held for user in n.users} == {write}
        return self.traced.method == "export" and counter and alone

    def _entry(self, node: fx.Node) -> Entry | None:
        if node.op != "call_module" or self.traced.root is None:
            return function_entry(node.target) if node.op.startswith("call") else None
        found = module_entry(type(self.modules[str(node.target)]))
        return None if found is None else found.entry

    def state(self, node: fx.Node) -> str:
        """Return the name of the parameter or buffer that a node fetches; empty where it fetches none."""
        return str(node.target) if node.op == "get_attr" else self.traced.lifted.get(node.name, "")

    def read_after(self, node: fx.Node, write: fx.Node) -> bool:
        """Return whether something reads a node after a write."""
        return any(self.position[user] > self.position[write] for user in node.users)

    def sharing(self, target: fx.Node) -> list[fx.Node]:
        """Return a node and all that may share its memory."""
        return [target, *(n for n in self.marked.get(self.aliases.get(target), ()) if n is not target)]

    def share(self, node: fx.Node, made: Any, own: tuple[str, ...], targets: list[Any], source_made: Any) -> None:
        """Mark what a node computes: it may be what it wrote (``targets``), or a view of its first argument.

        ``source_made`` is what the first argument was lowered to.
        """
        sources = targets or node.args[:1]
        source = sources[0] if sources and isinstance(sources[0], fx.Node) else None
        entry = self._entry(node)
        handed = isinstance(made, Tensor) and made.value.name not in own
        if source is not None and node.target is operator.getitem and isinstance(source_made, tuple | list):
            whole = self._entry(source)
            if whole is not None and not whole.view:  # results of their own
                self.mark(node, (self.aliases[source], node.args[1]))
                return
        if source is not None and source in self.aliases and (targets or handed or entry is None or entry.view):
            self.mark(node, self.aliases[source])
        else:
            self.mark(node, self.position[node])

    def mark(self, node: fx.Node, mark: Any) -> None:
        """Put a node among those with a mark."""
        self.aliases[node] = mark
        self.marked.setdefault(mark, []).append(node)
