"""A torch graph for a changed IR model: every torch node that the change does not touch is kept as it was.

A node whose slice of the IR differs (another target of a reshape, other pieces of a split, heads that are gone) is
written again from the IR, in its place, by the ONNX table. Kept nodes with an argument that no longer fits are found by
computing shapes, and written again too.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import fx, nn
from torch.utils import _pytree as pytree

from cipm_ir.backends.torch.arguments import part_arguments
from cipm_ir.backends.torch.emitter import Emitter
from cipm_ir.backends.torch.slices import Difference, Slices
from cipm_ir.backends.torch.training import Trained
from cipm_ir.errors import UnsupportedError
from cipm_ir.ir.capture import Capture, Results
from cipm_ir.runtime.torch_shapes import ShapeError, Symbolic, propagate

_NONE = Results(None, ())


@dataclass
class Rewritten:
    """The new graph, over ``root``, and the torch nodes that were written again with what differed.

    Attributes:
        module: the graph.
        changed: by name of the torch node as captured.
        values: the node of ``module`` that computes a value of the IR, by name of the value.
    """

    module: fx.GraphModule
    changed: dict[str, Difference] = field(default_factory=dict)
    values: Mapping[str, fx.Node] = field(default_factory=dict)


def rewritten(capture: Capture, model: ir.Model, old: fx.Graph, root: nn.Module, resized: bool) -> Rewritten:
    """Write the program of ``model`` as a GraphModule.

    Args:
        capture: the program as it came in.
        model: the IR model as it is now.
        old: the captured graph, with parameters as ``get_attr``.
        root: holds the new parameters, and modules with the new attributes.
        resized: sizes may have changed, so that kept nodes must be tried.

    Raises:
        UnsupportedError: a changed node cannot be written in torch.
    """
    forced: set[str] = set()
    slices = Slices(capture, model)
    differences = {name: slices.difference(made.own) for name, made in capture.results.items() if made.own}
    while True:
        writer = _Writer(capture, model, old, root, slices, differences, forced)
        module = writer.run()
        stale = _stale(module, writer, capture) if resized else set()
        if not stale:
            return Rewritten(module, writer.changed, writer.emitter.known)
        forced |= stale


def _stale(module: fx.GraphModule, writer: _Writer, capture: Capture) -> set[str]:
    """Return the kept nodes that do not fit their inputs any more.

    One run over the shapes finds them all: behind one that does not fit, it goes on with the shape that the IR says.
    """
    stale: set[str] = set()

    def instead(node: fx.Node, made: Any) -> Any:
        source = writer.source.get(node)
        known = _NONE if source is None else capture.results.get(source, _NONE)
        expected = writer.slices.after.get(known.value) if isinstance(known.value, str) else None
        shape = None if expected is None else expected.shape
        if source is None or (made is not None and _agree(shape, made)):
            return made
        if not writer.is_kept(source):
            if made is not None:
                raise UnsupportedError(f"Node {source!r} was written with shape {list(made.shape)}, not {shape}.")
            return None
        if not known.own:
            return made
        stale.add(source)
        if expected is None or shape is None or not shape.is_static() or expected.dtype is None:
            return made
        dtype = tensor_adapters.to_torch_dtype(expected.dtype)
        return torch.empty(tuple(shape.numpy()), dtype=dtype, device="meta")

    try:
        names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        inputs = dict(zip(names, example_sizes(capture).values(), strict=True))
        propagate(module, module.graph, inputs, instead=instead)
    except ShapeError as error:
        if not stale:
            raise UnsupportedError(f"The changed program does not fit together in torch: {error}.") from error
    return stale


def _agree(shape: ir.Shape | None, made: Any) -> bool:
    if shape is None or not isinstance(made, torch.Tensor):
        return True
    return all(not isinstance(d, int) or d == s for d, s in zip(shape, made.shape, strict=False))


def example_sizes(capture: Capture) -> dict[str, Any]:
    """Return a tensor without numbers (or the fixed value) by placeholder name; dynamic sizes as in the example."""

    def plain(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return torch.empty([_hint(d) for d in x.shape], dtype=x.dtype, device="meta")
        if isinstance(x, Symbolic):
            sizes = [d if isinstance(d, int) else int(str(d).removeprefix("size_")) for d in x.names]
            return torch.empty(sizes, dtype=x.dtype, device="meta")
        return _hint(x) if isinstance(x, torch.SymInt) else x

    return {name: pytree.tree_map(plain, x) for name, x in capture.placeholders.items()}


def _hint(d: Any) -> int:
    return int(d) if type(d) is int else int(d.node.hint if d.node.hint is not None else 2)


class _Writer:
    def __init__(
        self, capture: Capture, model: ir.Model, old: fx.Graph, root: nn.Module, slices: Slices,
        differences: dict[str, Difference], forced: set[str],
    ) -> None:  # fmt: skip
        self.capture, self.model, self.old, self.root = capture, model, old, root
        self.slices, self.differences, self.forced = slices, differences, forced
        self.graph = fx.Graph(tracer_cls=old._tracer_cls)
        root.training = capture.source.training if capture.kind == "module" else root.training
        self.emitter = Emitter(root, self.graph, model, {})
        known = set(capture.parameters.values())
        self.emitter.fixed = frozenset(
            n
            for n in model.graph.initializers
            if n not in known and ("/" in n or n in capture.model.graph.initializers)
        )
        self.trained = Trained(capture, root)
        self.env: dict[fx.Node, Any] = {}
        self.source: dict[fx.Node, str] = {}
        self.changed: dict[str, Difference] = {}
        self.old_nodes = {n.name: n for n in old.nodes}
        self.wanted: set[str] = set()

    def is_kept(self, name: str) -> bool:
        """Return whether a torch node stays as it was."""
        difference = self.differences.get(name)
        if difference is None:
            return True
        if name in self.forced or not difference.same:
            return False
        node = self.old_nodes.get(name)
        return not difference.held or (node is not None and node.op == "call_module")

    def run(self) -> fx.GraphModule:
        needed = self._needed()
        for node in self.old.nodes:
            if node not in needed:
                continue
            last = next(iter(reversed(self.graph.nodes)), None)
            if self.is_kept(node.name):
                self._keep(node)
            else:
                self._write(node)
            for made in _after(last, self.graph):
                made.meta.setdefault("nn_module_stack", node.meta.get("nn_module_stack", {}))
        for node in list(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        self._part_inputs()
        self.graph._codegen = self.old._codegen
        part_arguments(self.graph)
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, type(self.capture.source).__name__)
        module.training = self.root.training
        self._forget_constants(module)
        return module

    def _part_inputs(self) -> None:
        """Rename inputs whose node has the name of another argument: fx would overwrite that before it is read."""
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        arguments = {str(n.target) for n in inputs}
        for n in inputs:
            if n.name != n.target and n.name in arguments:
                n._rename(f"{n.name}_value")

    def _forget_constants(self, module: nn.Module) -> None:
        """Buffers that the `state_dict` of the source does not hold stay out of the new one too."""
        held = getattr(self.capture.source, "state_dict", None)
        names = set(held() if callable(held) else held or ())
        for name, _ in list(module.named_buffers(remove_duplicate=False)):
            owner, _, leaf = name.rpartition(".")
            if owner and name not in names:  # a copy of a GraphModule forgets this for its own buffers
                module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)

    def _needed(self) -> set[fx.Node]:
        results, needed = self.capture.results, set[fx.Node]()
        pending = [n for n in self.old.nodes if n.op in ("output", "placeholder") or self._has_effect(n)]
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            if self.is_kept(node.name):
                pending.extend(node.all_input_nodes)
                continue
            values = self.slices.boundary(results[node.name].own)
            self.wanted |= values
            pending.extend(self.old_nodes[self.slices.definer[v]] for v in values)
        return needed

    def _has_effect(self, node: fx.Node) -> bool:
        made = self.capture.results.get(node.name)
        if node.op == "call_function" and node.is_impure():
            return True
        return made.writes if made is not None else node.op.startswith("call")

    def _keep(self, node: fx.Node) -> None:
        made = self.capture.results.get(node.name, _NONE)
        if node.op == "call_function" and node.target is operator.getitem:
            whole = self.env[node.args[0]] if isinstance(node.args[0], fx.Node) else None
            if isinstance(whole, tuple | list) and isinstance(node.args[1], int):
                self.env[node] = whole[node.args[1]]
                return
        path = self.trained.path(node)
        if path is None:
            copy = self.graph.node_copy(node, lambda n: self.env[n])
        else:
            copy = self.graph.call_module(path, fx.node.map_arg((node.args[0],), self.env.__getitem__))
        self.env[node] = copy
        self.source[copy] = node.name
        for name, part in _parts(made.value, copy):
            if name in made.own and (isinstance(part, fx.Node) or name in self.wanted):
                self.emitter.known[name] = part if isinstance(part, fx.Node) else self._part(copy, part)
        for name in made.own:  # what a write in place has changed besides is still read where it was
            before = name.partition("/")[2]
            if name not in self.emitter.known and before in self.emitter.known:
                self.emitter.known[name] = self.emitter.known[before]

    def _part(self, whole: fx.Node, path: tuple[Any, ...]) -> fx.Node:
        for key in path:
            whole = self.graph.call_function(operator.getitem, (whole, key))
        return whole

    def _write(self, node: fx.Node) -> None:
        made, after = self.capture.results[node.name], self.slices.after
        self.changed[node.name] = self.differences[node.name]
        if not any(name in after for name in made.own):
            raise UnsupportedError(f"The value of torch node {node.name!r} is needed, but no longer computed.")
        new = {name: self.emitter.value(after[name]) for name in made.own if name in after}
        for part in new.values():
            self.source.setdefault(part, node.name)
        self.env[node] = self._structure(made.value, new)

    def _structure(self, names: Any, new: dict[str, fx.Node]) -> Any:
        if isinstance(names, tuple):
            return tuple(self._structure(n, new) for n in names)
        if isinstance(names, dict):
            return {k: self._structure(n, new) for k, n in names.items()}
        return new.get(names, self.emitter.known.get(names)) if names is not None else None


def _after(last: fx.Node | None, graph: fx.Graph) -> Iterator[fx.Node]:
    """Return the nodes that were written since ``last`` was the last one."""
    return takewhile(lambda node: node is not last, reversed(graph.nodes))


def _parts(value: Any, whole: Any, path: tuple[Any, ...] = ()) -> list[tuple[str, Any]]:
    """Return value names of a structure, each with the node itself (no structure) or the path into it."""
    if isinstance(value, str):
        return [(value, path or whole)]
    if isinstance(value, tuple):
        return [p for k, v in enumerate(value) for p in _parts(v, whole, (*path, k))]
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in _parts(v, whole, (*path, k))]
    return []
