"""The torch backend: a changed program as the kind of object that came in, with its names and its way to train."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from cipm_ir.backends.torch.attributes import Attributes, apply_attributes, standard, suggested
from cipm_ir.backends.torch.biases import give_biases, new_biases
from cipm_ir.backends.torch.emitter import graph_module
from cipm_ir.backends.torch.graph import Rewritten, rewritten
from cipm_ir.backends.torch.naming import named_as_captured
from cipm_ir.backends.torch.proof import unproven
from cipm_ir.backends.torch.runs import Side, Watched, computes_otherwise, first_line, in_mode
from cipm_ir.backends.torch.state import Evaluated, State, copied, holder
from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.capture import Capture
from cipm_ir.runtime.torch_shapes import is_tensor
from cipm_ir.symmetry.analysis import gc_paused
from cipm_ir.symmetry.primitives.edits import EditedTensor

__all__ = [
    "Emitted",
    "called_side",
    "emit_graph",
    "emit_rewritten",
    "emit_torch",
    "example_tensors",
    "graph_module",
    "graph_side",
]


@dataclass(frozen=True)
class Emitted:
    """A program written in torch.

    Attributes:
        object: an `nn.Module` of the class that came in, a `GraphModule`, or an `ExportedProgram`.
        form: which of these.
        reason: why a module came out as a graph; empty otherwise.
        attributes: what was set on the modules of the copy, by path.
        proof: how it is known to be the program of the IR, besides runs on inputs of our own: read again it is the same
            graph; or it was written from that graph, node by node, and nothing more is known ("runs").
    """

    object: Any
    form: Literal["module", "graph", "exported"]
    reason: str = ""
    attributes: Attributes = field(default_factory=dict)
    proof: Literal["same graph", "runs"] = "runs"


def emit_torch(capture: Capture, model: ir.Model, runs: bool = True) -> Emitted:
    """Write the IR model as torch; nothing of the caller's is changed.

    Args:
        capture: how the program was read.
        model: the IR model to write.
        runs: what is proven to be the program runs beside it too. What cannot be proven always does.

    Raises:
        UnsupportedError: the change cannot be expressed in torch.
    """
    with gc_paused():
        return _emitted(capture, model, runs)


def _emitted(capture: Capture, model: ir.Model, runs: bool) -> Emitted:
    _evaluate(model)
    state = State(capture, model)
    if capture.kind == "module":
        if not runs and (emitted := _proven(capture, state)) is not None:
            return emitted
        written, attributes = _graph(capture, model, state)
        module, tried, reason = _same_class(capture, state, written, attributes)
        if module is not None:
            return Emitted(module, "module", attributes=tried, proof="same graph")
        _check_reading(capture)
        made = Emitted(written.module, "graph", reason)
    elif capture.kind == "graph":
        written, attributes = _graph(capture, model, state)
        made = Emitted(written.module, "graph", attributes=attributes)
    else:
        written, _ = _graph(capture, model, state)
        made = Emitted(_exported(capture, written.module), "exported")
    if capture.args is None:
        return made
    run = made.object.module() if made.form == "exported" else made.object
    why = disagreement(capture, run, written.module)
    if why:
        raise UnsupportedError(f"What torch makes of the changed program is not that program: {why}.")
    return made if unproven(capture, made.object, model) else replace(made, proof="same graph")


def _evaluate(model: ir.Model) -> None:
    """Compute every edited tensor once: what is handed back, and its proof, take each several times."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, EditedTensor):
            array = tensor.numpy()
            own = array.flags.owndata and array.flags.writeable and not tensor.cache  # no view of another's numbers
            value.const_value = (Evaluated if own else ir.Tensor)(array, dtype=tensor.dtype, name=tensor.name)


def _proven(capture: Capture, state: State) -> Emitted | None:
    """Return the caller's class with the new tensors, if that alone is proven to be the program.

    No graph is written.
    """
    if capture.args is None:
        return None
    module, attributes = _of_the_class(capture, state)
    if unproven(capture, module, state.model):
        return None
    return Emitted(module, "module", attributes=attributes, proof="same graph")


def _of_the_class(
    capture: Capture, state: State, known: Attributes | None = None, extra: Attributes | None = None
) -> tuple[nn.Module, Attributes]:
    """Return a copy of the caller's module with the new tensors, and the attributes that were set on it."""
    source, extra = capture.source, extra or {}
    module = copied(source, state, {} if capture.exported is None else _program_names(capture, source))
    give_biases(module, new_biases(capture, state.model))
    attributes = known or (standard(module, _held(capture, state.model)) if resized(capture, state.model) else {})
    attributes = {p: {**attributes.get(p, {}), **extra.get(p, {})} for p in {*attributes, *extra}}
    apply_attributes(module, attributes)
    return module, attributes


def emit_graph(capture: Capture, model: ir.Model) -> fx.GraphModule:
    """Return the IR model as a GraphModule over the captured graph, whatever kind came in; for running it."""
    return emit_rewritten(capture, model).module


def emit_rewritten(capture: Capture, model: ir.Model) -> Rewritten:
    """Return the same as `emit_graph`, with the nodes that compute the values of the IR."""
    return _graph(capture, model, State(capture, model))[0]


def _graph(capture: Capture, model: ir.Model, state: State) -> tuple[Rewritten, Attributes]:
    sizes = resized(capture, model)
    if capture.exported is not None:
        source = capture.exported.module()
        named_as_captured(source.graph, capture)
        return rewritten(capture, model, source.graph, holder(source, source.graph, state), sizes), {}
    root = copied(capture.root, state)
    attributes = standard(root, _held(capture, model)) if sizes else {}
    apply_attributes(root, attributes)
    return rewritten(capture, model, capture.graph, root, sizes), attributes


def resized(capture: Capture, model: ir.Model) -> bool:
    """Return whether any parameter has another shape than it came with, or is gone."""
    now = model.graph.initializers
    for name in set(capture.parameters.values()):
        old = capture.model.graph.initializers[name]
        if name not in now or now[name].shape != old.shape:
            return True
    return False


def _held(capture: Capture, model: ir.Model) -> dict[str, dict[str, Any]]:
    """Return what the IR says of attributes that no tensor shows: groups, by path of the layer that owns the weight."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in capture.parameters.items():
        value = model.graph.initializers.get(own)
        path, _, _ = name.rpartition(".")
        for user in () if value is None else value.consumers():
            if user.op_type in ("Conv", "ConvTranspose") and "group" in user.attributes:
                found.setdefault(path, {})["groups"] = user.attributes["group"].as_int()
            elif user.op_type == "GroupNormalization":
                found.setdefault(path, {})["num_groups"] = user.attributes["num_groups"].as_int()
    return found


def _same_class(
    capture: Capture, state: State, written: Rewritten, known: Attributes
) -> tuple[nn.Module | None, Attributes, str]:
    """Return the caller's class with new tensors and attributes, where it is proven to be the program of the IR."""
    reason = ""
    guesses = suggested(capture.source, capture.graph, written.changed) if written.changed else {}
    for extra in ({}, guesses) if guesses else ({},):
        module, attributes = _of_the_class(capture, state, known, extra)
        why = _not_the_program(capture, module, written.module, state.model)
        if not why:
            return module, attributes, ""
        reason = reason or why
    return None, {}, reason


def _program_names(capture: Capture, source: nn.Module) -> Mapping[str, str]:
    """Return names that export drops because they share a tensor: those of the twin that it keeps."""
    kept: dict[int, str] = {}
    for name, tensor in (
        *source.named_parameters(remove_duplicate=False),
        *source.named_buffers(remove_duplicate=False),
    ):
        if name in capture.parameters:
            kept.setdefault(id(tensor), name)
    return {
        name: kept[id(tensor)]
        for name, tensor in source.named_parameters(remove_duplicate=False)
        if name not in capture.parameters and id(tensor) in kept
    }


def _not_the_program(capture: Capture, module: nn.Module, graph: fx.GraphModule, model: ir.Model) -> str:
    """Return why a module is not the program: read again it is another graph, or it computes otherwise.

    Empty where it is.
    """
    if capture.args is None:
        return "there are no example inputs to read it again with"
    why = unproven(capture, module, model)
    if not why:
        return disagreement(capture, module, graph, few=True)
    args, kwargs = _with_tensors(capture.args, example_tensors(capture))
    try:
        in_mode(module, lambda m: m(*args, **kwargs))
    except Exception as error:  # the user's forward with sizes that it was not written for
        return f"its forward does not run with the new tensors ({first_line(error)})"
    return why


def _check_reading(capture: Capture) -> None:
    """Refuse to hand back a graph that computes something else than the module that it was read from.

    Raises:
        UnsupportedError: a feature of the input is not supported.
    """
    if capture.args is None:
        return
    why = disagreement(capture, capture.source, emit_graph(capture, capture.model), must_run=False)
    if why:
        raise UnsupportedError(
            f"{type(capture.source).__name__} computes something else than the graph that torch makes of it ({why}): "
            "its code does what a graph cannot hold; try the other method= (symbolic, export), or give a part of it."
        )


def disagreement(capture: Capture, made: Any, graph: fx.GraphModule, must_run: bool = True, few: bool = False) -> str:
    """Return how something made of a program computes otherwise than its graph, on inputs of our own; empty where it
    does not.

    Args:
        capture: how the program was read; it has example inputs.
        made: is called as the caller's module is.
        graph: is run node by node.
        must_run: that it fails on an input counts too.
        few: on two inputs only: it is proven already.

    Raises:
        UnsupportedError: the graph itself does not run.
    """

    first, second = graph_side(capture, graph), called_side(capture, made)
    try:
        return computes_otherwise(first, second.run, example_tensors(capture), must_run=must_run, few=few)
    except InputError as error:
        raise UnsupportedError(f"The rewritten graph does not run: {first_line(error)}.") from error


def called_side(capture: Capture, made: Any) -> Side:
    """Something that is called as the caller's module is, as something that runs; there are example inputs."""

    def call(m: Any, tensors: Sequence[torch.Tensor]) -> Any:
        args, kwargs = _with_tensors(capture.args, tensors)
        return m(*args, **kwargs)

    return Side(made, call, list(capture.inputs))


def graph_side(
    capture: Capture, graph: fx.GraphModule, seed: int = 0, watched: Mapping[str, fx.Node] | None = None
) -> Side:
    """Return a captured or rewritten graph as something that runs, node by node.

    ``watched``: nodes of the graph whose tensors are handed out too, by the names to give them.
    """
    places = {node: place for place, node in enumerate(graph.graph.nodes)}  # the same in copies of the graph
    wanted = {places[node]: name for name, node in (watched or {}).items() if node in places}
    return Side(graph, lambda m, tensors: _interpreted(m, capture, tensors, wanted), list(capture.inputs), seed)


def example_tensors(capture: Capture) -> list[torch.Tensor]:
    """Return the example inputs; random numbers where they hold none."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for x in pytree.tree_leaves(capture.args):
        if isinstance(x, torch.Tensor):
            if x.is_meta:
                kind = x.dtype.is_floating_point
                x = (
                    torch.randn(x.shape, generator=generator, dtype=x.dtype)
                    if kind
                    else torch.zeros(x.shape, dtype=x.dtype)
                )
            made.append(x.detach().clone())
    return made


def _with_tensors(args: Any, tensors: Sequence[torch.Tensor]) -> Any:
    found = iter(tensors)
    return pytree.tree_map(lambda x: next(found).clone() if isinstance(x, torch.Tensor) else x, args)


def _interpreted(
    graph: fx.GraphModule, capture: Capture, tensors: Sequence[torch.Tensor], wanted: Mapping[int, str]
) -> Watched:
    """Run node by node; tensors of the nodes at the wanted places are handed out under their names."""
    found = iter(tensors)
    values = [
        next(found).clone() if is_tensor(x) or isinstance(x, torch.SymInt) else x for x in capture.placeholders.values()
    ]
    names = {node: wanted[place] for place, node in enumerate(graph.graph.nodes) if place in wanted}
    interpreter = _Watching(graph, names)
    return Watched(interpreter.run(*values, enable_io_processing=False), interpreter.seen)


class _Watching(fx.Interpreter):
    """Copies the tensors of some nodes when they are made: what writes in place later does not change them."""

    def __init__(self, graph: fx.GraphModule, names: Mapping[fx.Node, str]) -> None:
        super().__init__(graph)
        self._names, self.seen = names, dict[str, torch.Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n in self._names and isinstance(made, torch.Tensor):
            self.seen[self._names[n]] = made.clone()
        return made


def _exported(capture: Capture, module: fx.GraphModule) -> Any:
    """Return the graph exported again, with the dynamic sizes of the program that came in."""
    program = capture.exported
    if capture.args is None:
        raise UnsupportedError(
            "The ExportedProgram has no example inputs, which writing it again needs; give example_inputs=(x,)."
        )
    args, kwargs = capture.args
    flat, spec = pytree.tree_flatten((args, kwargs))
    fakes = iter(x for x in capture.placeholders.values())
    dims = [_dynamic(next(fakes, None)) for _ in flat]
    tree = pytree.tree_unflatten([_Dims(d) for d in dims], spec)
    spec_args, spec_kwargs = pytree.tree_map(lambda d: d.dims, tree, is_leaf=lambda x: isinstance(x, _Dims))
    dynamic = (*spec_args, *spec_kwargs.values()) if any(dims) else None
    made = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic, strict=False)
    made.graph_module.meta.update(copy.copy(program.graph_module.meta))
    return made


@dataclass(frozen=True)
class _Dims:
    dims: Any


def _dynamic(fake: Any) -> dict[int, Any] | None:
    if not isinstance(fake, torch.Tensor):
        return None
    found = {axis: torch.export.Dim.AUTO for axis, d in enumerate(fake.shape) if type(d) is not int}
    return found or None
