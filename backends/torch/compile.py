"""A backend of `torch.compile` that rewrites an inference graph and hands it to another backend.

What dynamo gives is a graph with the module's parameters and buffers among its inputs. They are frozen: the passes see
them as constants, and the rewritten graph holds copies of its own. Each call checks that the caller's tensors are still
those that were frozen; where they are not, the graph runs as dynamo gave it, with the tensors of that call.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from cipm_ir.backends.torch.emit import emit_graph
from cipm_ir.backends.torch.origin import TorchOrigin
from cipm_ir.backends.torch.runs import Side, computes_otherwise
from cipm_ir.errors import CipmError, OptionError
from cipm_ir.ir.capture import Capture
from cipm_ir.symmetry.program import Program

Compiled = Callable[..., Any]
Rewrite = Callable[[Program], Program]
_STATIC = "_dynamo_static_input_type"
_SEVERAL = 4.0
"""So many times as far as the rounding of the first may the result of several exact passes be away."""
_UNCHANGED = "a graph is left as it is: "
_STALE = (
    "weights changed after compilation, so that the graph runs uncompiled; torch.compiler.reset() compiles it again."
)


class _Left(Exception):
    """Why a graph is given on as it is."""


@dataclass
class Backend:
    """Called by dynamo with a graph and its inputs; gives back what runs it.

    Attributes:
        rewrite: runs the passes; gives the same object where they change nothing.
        then: the backend that gets the result.
        load: reads a GraphModule, see `cipm_ir.frontends.torch.load.load_torch`.
        verify: compare the rewritten graph with the one that came, on the inputs of the first call and on others like
            them, channel by channel beside the rounding of the one that came.
    """

    rewrite: Rewrite
    then: Compiled
    load: Callable[[Any], Capture]
    verify: bool = True
    said: set[str] = field(default_factory=set)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Compiled:
        """Compile one graph; ``options`` are those of `torch.compile`, and go to ``then``."""
        tensors = [x for x in (*example_inputs, *gm.parameters()) if isinstance(x, torch.Tensor)]
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        try:
            if trains:
                raise _Left(
                    "gradients are on and something requires them, but passes run for inference (torch.no_grad())"
                )
            with torch.inference_mode(False), torch.no_grad():
                made = self._rewritten(gm, example_inputs)
        except _Left as reason:
            self._warn(f"{_UNCHANGED}{reason}.")
            made = None
        except Exception as error:  # reading and writing torch runs torch and the user's code: anything can happen
            known = "" if isinstance(error, CipmError) else f"{type(error).__name__}: "
            self._warn(f"{_UNCHANGED}{known}{str(error).strip() or 'no reason given'}")
            made = None
        if made is None:
            return self.then(gm, example_inputs, **options)  # type: ignore[no-any-return]
        graph, frozen, rest = made
        inner = self.then(graph, [example_inputs[k] for k in rest], **options)
        return self._guarded(gm, inner, frozen, rest)

    def _guarded(self, gm: fx.GraphModule, inner: Compiled, frozen: Sequence[_Frozen], rest: Sequence[int]) -> Compiled:
        def run(*args: Any) -> Any:
            if all(f.unchanged(args) for f in frozen):
                return inner(*[args[k] for k in rest])
            self._warn(_STALE)
            return gm(*args)

        return run

    def _rewritten(
        self, gm: fx.GraphModule, inputs: Sequence[Any]
    ) -> tuple[fx.GraphModule, list[_Frozen], list[int]] | None:
        """Return the new graph, what it holds copies of, and which inputs it still takes.

        None where nothing changed.
        """
        places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        if len(places) != len(inputs) or any(isinstance(x, FakeTensor) for x in inputs):
            raise _Left("the graph came without example inputs that hold numbers")
        constant = [k for k, n in enumerate(places) if _is_static(n, inputs[k])]
        rest = [k for k in range(len(inputs)) if k not in set(constant)]
        _check_effects(gm, inputs, constant)
        frozen = [_Frozen.of(k, inputs[k]) for k in constant]
        frozen += [_Frozen.of(None, t) for t in (*gm.parameters(), *gm.buffers())]
        held = _with_constants(gm, {places[k]: inputs[k] for k in constant})
        capture = self.load(held)
        capture.args = (tuple(_as_tensor(inputs[k]) for k in rest), {})
        program = Program.of(capture.model, origin=TorchOrigin(capture))
        done = self.rewrite(program)
        if done is program:
            return None
        graph = emit_graph(capture, done.emit()).requires_grad_(False)
        _forget_shapes(graph)
        if self.verify:
            _compare(held, graph, inputs, rest)
        return graph, frozen, rest

    def _warn(self, reason: str) -> None:
        """Each reason once."""
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"cipm_ir.torch_backend: {reason}", RuntimeWarning, stacklevel=2)


def backend(rewrite: Rewrite, then: Any, load: Callable[[Any], Capture], verify: bool = True) -> Backend:
    """Return a backend for ``torch.compile(model, backend=...)``; see `cipm_ir.torch_backend`.

    Args:
        rewrite: runs exact passes; an error leaves the graph as it is.
        then: name of a backend of dynamo, or a callable that takes (GraphModule, example inputs).
        load: reads a GraphModule.
        verify: compare the rewritten graph with the one that came.

    Raises:
        OptionError: a backend that torch does not know.
    """
    try:
        known = torch._dynamo.lookup_backend(then)
    except torch._dynamo.exc.InvalidBackend as error:
        names = ", ".join(torch._dynamo.list_backends())
        raise OptionError(f"torch knows no backend {then!r}; there are {names}.") from error
    return Backend(rewrite, known, load, verify)


# ---------------------------------------------------------------- weights
@dataclass(frozen=True)
class _Frozen:
    """A tensor that the rewritten graph holds a copy of, as it was then."""

    place: int | None
    tensor: Any
    version: int
    address: int

    @classmethod
    def of(cls, place: int | None, tensor: torch.Tensor) -> _Frozen:
        if tensor.is_inference():
            raise _Left("its weights were made in inference mode, where torch does not count their changes")
        return cls(place, weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def unchanged(self, args: Sequence[Any]) -> bool:
        """Return the same object with the same memory.

        Not written to since (writes through ``.data`` are not counted).
        """
        tensor = self.tensor()
        if tensor is None or (self.place is not None and args[self.place] is not tensor):
            return False
        return bool(tensor._version == self.version and tensor.data_ptr() == self.address)


def _is_static(node: fx.Node, value: Any) -> bool:
    """Return a parameter, a buffer, or a tensor that a module holds."""
    if not isinstance(value, torch.Tensor):
        return False
    return isinstance(value, torch.nn.Parameter) or _STATIC in (node.meta.get("tensor_dict") or {})


# ---------------------------------------------------------------- graphs
def _with_constants(gm: fx.GraphModule, constants: Mapping[fx.Node, torch.Tensor]) -> fx.GraphModule:
    """Return the graph with some of its inputs as attributes."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    held: dict[str, Any] = {}
    paths = dict(zip(constants, _paths([str(node.target) for node in constants]), strict=True))
    for node in gm.graph.nodes:
        if node in constants:
            held[paths[node]] = constants[node]
            env[node] = graph.create_node("get_attr", paths[node], name=node.name)
            env[node].meta = {k: v for k, v in node.meta.items() if k in ("example_value", "val")}
            continue
        if node.op in ("get_attr", "call_module"):
            owner, _, leaf = str(node.target).rpartition(".")
            held[str(node.target)] = getattr(gm.get_submodule(owner), leaf)
        env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(held, graph)


def _paths(targets: Sequence[str]) -> list[str]:
    """Dotted paths from dynamo's names; ``L_self_modules_fc_parameters_weight_`` is ``L_self.fc.weight``.

    A path has a folder of its own layer, in which a pass may put what it adds: ``L_self.fc.bias``.
    """
    paths = [re.sub(r"_(?:modules|parameters|buffers)_", ".", target).strip("_") for target in targets]
    folders = {".".join(path.split(".")[:k]) for path in paths for k in range(1, path.count(".") + 1)}
    legal = len(set(paths)) == len(paths) and all(re.fullmatch(r"\w+(\.\w+)*", path, re.ASCII) for path in paths)
    if not legal or folders & set(paths):
        paths = list(targets)
    return [path if "." in path else f"{path}.value" for path in paths]


def _forget_shapes(gm: fx.GraphModule) -> None:
    """Drop what dynamo noted of values that may have another shape now."""
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            node.meta.pop("example_value", None)


# ---------------------------------------------------------------- runs
def _check_effects(gm: fx.GraphModule, inputs: Sequence[Any], constant: Sequence[int]) -> None:
    """A graph must not write to what is to be frozen, nor give it back."""
    values = [_fresh(x) for x in inputs]
    before = {k: values[k].clone() for k in constant}
    results = _results(gm, values)
    if not all(_same(values[k], old) for k, old in before.items()):
        raise _Left("it changes a buffer or parameter of the module")
    memory = {values[k].untyped_storage()._cdata for k in constant}
    if any(x.untyped_storage()._cdata in memory for x in results):
        raise _Left("it gives back a parameter or buffer of the module")


def _results(gm: Any, values: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors that a graph gives back."""
    devices = sorted({x.device.index for x in values if isinstance(x, torch.Tensor) and x.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return [x for x in pytree.tree_leaves(gm(*values)) if isinstance(x, torch.Tensor)]


def _compare(held: fx.GraphModule, graph: fx.GraphModule, inputs: Sequence[Any], rest: Sequence[int]) -> None:
    """Compare what both give back, and their inputs afterwards, as they may write to them."""
    places = [k for k in rest if isinstance(inputs[k], torch.Tensor)]

    def call(module: Any, tensors: Sequence[torch.Tensor]) -> Any:
        given = {k: x.clone() for k, x in zip(places, tensors, strict=True)}
        values = [given[k] if k in given else _fresh(inputs[k]) for k in rest]
        return [*_results(module, values), *given.values()]

    first, second = (Side(m, call, [f"input {k}" for k in places]) for m in (held, graph))
    try:
        why = computes_otherwise(first, second.run, [_fresh(inputs[k]) for k in places], times=_SEVERAL)
    except CipmError as error:
        raise _Left(f"it could not be compared: {error}") from error
    if why:
        raise _Left(f"the rewritten graph computes something else ({why})")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether all entries are equal; NaN is equal to NaN."""
    if a.is_floating_point() or a.is_complex():
        return torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
    return torch.equal(a, b)


def _fresh(x: Any) -> Any:
    """Return a copy of a tensor.

    Of a symbolic number the value that it has in the first call, without a guard on it.
    """
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    return x.node.hint if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) else x


def _as_tensor(x: Any) -> Any:
    return torch.tensor(x.node.hint) if isinstance(x, torch.SymInt) else x
