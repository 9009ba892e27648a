"""Evaluation of nodes that have the same result in every run.

A node is evaluated where all its inputs are parameters or constants (an overridable initializer is neither), or where
its result is a vector of sizes that are all proven (Shape, and what is gathered and joined from it). The model's own
runtime evaluates it, so that the result is the number that the model would have computed there; another runtime may
round differently. Never evaluated:

* operators that draw at random, Dropout, operators with subgraphs, calls of functions and operators of other domains;
* a ConstantOfShape that is no short list of integers (a size stored as a tensor), unless constants are scattered over
  it (a sparse weight, which becomes a dense one);
* the quantizing operators (their result is larger, and says less);
* products of 8-bit integers, which saturate on some processors;
* nodes with an attribute that refers to one of the function around them;
* what the runtime cannot evaluate: a node that fails is left to fail where it did.
"""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.ir.constants import evaluate
from cipm_ir.ir.labels import Array
from cipm_ir.ir.nested import subgraphs
from cipm_ir.ir.opsets import standard_version
from cipm_ir.ir.parameters import parameter_tensor
from cipm_ir.passes.exact.cleanup.graph_facts import GraphFacts
from cipm_ir.passes.exact.cleanup.replace_values import constant_before, replace_value
from cipm_ir.passes.exact.cleanup.reshapes import keeps_order
from cipm_ir.runtime.session import Runner

DRAWS = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
)
"""Operators that may give something else in every run."""
FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
"""Metadata of an initializer: the names of what it was computed from; torch's exporter notes the same."""
_KEPT = DRAWS | {"Identity", "Constant"}
_KEPT |= {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_KEPT |= {"QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}  # may saturate, by processor
_MOVES = ("Reshape", "Transpose", "Concat")
_SCATTERS = ("Scatter", "ScatterElements", "ScatterND")
_SMALL = 64
_UNFIT = {ir.DataType.STRING, ir.DataType.UNDEFINED}


@dataclass(frozen=True)
class ConstantFolder:
    """Evaluates nodes within limits on the entries of inputs and outputs."""

    model: ir.Model
    facts: GraphFacts
    input_limit: int
    output_limit: int

    def fold(self, node: ir.Node, domains: dict[str, int], *, in_function: bool) -> bool:
        """Replace a node by what it always computes, if it can be evaluated; return whether it is gone."""
        graph = node.graph
        if graph is None or any(v.is_graph_output() and sum(o is v for o in graph.outputs) != 1 for v in node.outputs):
            return False
        tensors = self._evaluated(node, domains)
        if tensors is None:
            return False
        for value, tensor in zip(list(node.outputs), tensors, strict=True):
            if not (value.uses() or value.is_graph_output()):
                continue
            # Functions hold no initializers, and an output of a graph must come from a node.
            if in_function or value.is_graph_output():
                constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], num_outputs=1)
                new = constant.outputs[0]
                new.name, new.type, new.shape = f"{value.name}/constant", value.type, value.shape
                graph.insert_before(node, constant)
                replace_value(value, new)
            else:
                new = ir.Value(
                    name=value.name,
                    type=ir.TensorType(tensor.dtype),
                    shape=ir.Shape(tensor.shape.numpy()),
                    const_value=tensor,
                )
                new.metadata_props[FOLDED_FROM] = repr(_sources(node))
                replace_value(value, new)
                value.name = None
                graph.register_initializer(new)
        graph.remove(node, safe=True)
        return True

    def _evaluated(self, node: ir.Node, domains: dict[str, int]) -> list[ir.TensorProtocol] | None:
        if node.domain or node.op_type in _KEPT or subgraphs(node):
            return None
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return None
        if node.op_type == "ConstantOfShape" and not self._is_small_vector(node):
            return None
        sizes = self._sizes(node)
        if sizes is not None:
            return [sizes]
        fill = self._fill(node) if node.op_type in _SCATTERS else None
        inputs = [parameter_tensor(value) for value in node.inputs if value is not None]
        inputs = inputs if fill is None else [fill, *inputs[1:]]
        given = [tensor for tensor in inputs if tensor is not None]
        if not given or len(given) != len(inputs) or any(tensor.dtype in _UNFIT for tensor in given):
            return None
        if any(tensor.size > self.input_limit for tensor in given if tensor is not fill):
            return self._rearranged(node)
        if any(self._too_large(self._size(value), node) for value in node.outputs):
            return None
        arrays = _moved(node, given) or _run(node, given, domains, max(self.model.ir_version, 4))
        if arrays is None:
            return None
        tensors = [_tensor(array, self.facts.dtype(value)) for array, value in zip(arrays, node.outputs, strict=True)]
        if any(tensor is None or self._too_large(tensor.size, node) for tensor in tensors):
            return None
        return [tensor for tensor in tensors if tensor is not None]

    def _sizes(self, node: ir.Node) -> ir.TensorProtocol | None:
        """Return the result of a node that only moves proven sizes."""
        found = self.facts.constant_entries(node.outputs[0]) if len(node.outputs) == 1 else None
        dtype = self.facts.dtype(node.outputs[0])
        return None if found is None or dtype is None else ir.tensor(found.astype(dtype.numpy()), dtype=dtype)

    def _size(self, value: ir.Value) -> int:
        shape = self.facts.shape(value)
        return int(np.prod([d if isinstance(d, int) else 1 for d in shape])) if shape is not None else 0

    def _is_small_vector(self, node: ir.Node) -> bool:
        value = node.attributes.get("value")
        integers = value is not None and value.as_tensor().dtype.is_integer()
        return integers and 0 < self._size(node.outputs[0]) <= _SMALL

    def _too_large(self, size: int, node: ir.Node) -> bool:
        """Return whether a result is above the limit, and more than the constants that it makes superfluous."""
        if size <= self.output_limit:
            return False
        alone = [value for value in node.inputs if value is not None and len(value.uses()) == 1]
        return size > sum(tensor.size for value in alone if (tensor := parameter_tensor(value)) is not None)

    def _fill(self, node: ir.Node) -> ir.TensorProtocol | None:
        """Return what a ConstantOfShape of known sizes, within the limit on results, gives as the first input."""
        maker = None if node.inputs[0] is None else node.inputs[0].producer()
        if maker is None or maker.op_type != "ConstantOfShape" or maker.domain:
            return None
        sizes, value = parameter_tensor(maker.inputs[0]), maker.attributes.get("value")
        if sizes is None or (value is not None and value.is_ref()):
            return None
        shape = [int(size) for size in np.asarray(sizes.numpy()).reshape(-1)]
        if min(shape, default=0) < 0 or math.prod(shape) > self.output_limit:
            return None
        one = ir.tensor(np.zeros(1, np.float32)) if value is None else value.as_tensor()
        if one.dtype in _UNFIT:
            return None
        return ir.tensor(np.full(shape, one.numpy().reshape(-1)[0]), dtype=one.dtype)

    def _rearranged(self, node: ir.Node) -> list[ir.TensorProtocol] | None:
        """Return a large weight that only this Transpose or change of shape consumes, rearranged when it is written."""
        value = node.inputs[0]
        tensor = parameter_tensor(value)
        if tensor is None or value is None or len(value.uses()) != 1 or value.is_graph_output():
            return None
        shape, source = tensor.shape.numpy(), tensor
        perm: tuple[int, ...] = tuple(range(len(shape)))
        if node.op_type == "Transpose":
            perm = tuple(node.attributes.get_ints("perm", perm[::-1]))
            made: tuple[int, ...] = tuple(shape[k] for k in perm)
        elif keeps_order(node, self.facts):
            proven = self.facts.shape(node.outputs[0])
            made = tuple(size for size in proven or () if isinstance(size, int))
            if proven is None or len(made) != len(proven) or math.prod(made) != tensor.size:
                return None
        else:
            return None

        def rearrange() -> ir.TensorProtocol:
            array = np.ascontiguousarray(np.transpose(source.numpy(), perm)).reshape(made)
            return ir.tensor(array, dtype=source.dtype)

        return [ir.LazyTensor(rearrange, tensor.dtype, ir.Shape(made))]


def scalar_bounds(node: ir.Node, name: Callable[[str], str]) -> None:
    """Make constant bounds of a Range scalars: onnxruntime takes vectors of one entry only where they are computed."""
    for index, value in enumerate(node.inputs):
        tensor = parameter_tensor(value)
        if node.op_type == "Range" and tensor is not None and tensor.size == 1 and len(tensor.shape):
            node.replace_input_with(index, constant_before(node, np.asarray(tensor.numpy()).reshape(()), name("bound")))


def _sources(node: ir.Node) -> list[str]:
    """Return names of the values that a node computes with, and of what these were computed from."""
    found: set[str] = set()
    for value in node.inputs:
        if value is not None and value.name:
            found |= {value.name, *listed(value.metadata_props.get(FOLDED_FROM))}
    return sorted(found)


def listed(note: str | None) -> tuple[str, ...]:
    """Return the names in a note that is a list literal; none where it is anything else."""
    try:
        names = ast.literal_eval(note or "[]")
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _tensor(array: Array, dtype: ir.DataType | None) -> ir.TensorProtocol | None:
    """Return the array as a tensor, where its type is the one that the operator's definition says."""
    if dtype in _UNFIT or (dtype is not None and array.dtype != dtype.numpy()):
        return None
    return ir.tensor(array) if dtype is None else ir.tensor(array, dtype=dtype)


def _moved(node: ir.Node, tensors: list[ir.TensorProtocol]) -> list[Array] | None:
    """Return the result of a node that only moves entries, which is the same in every runtime."""
    if node.op_type not in _MOVES or len(tensors) != len(node.inputs):
        return None
    found = evaluate(node, [tensor.numpy() for tensor in tensors], None, 0, limit=sys.maxsize)
    return None if found is None else [np.ascontiguousarray(found)]


def _run(
    node: ir.Node, tensors: list[ir.TensorProtocol], domains: dict[str, int], ir_version: int
) -> list[Array] | None:
    """Return outputs of a node whose inputs are given; None where no runtime can evaluate it."""
    version = node.version or standard_version(domains, 1)
    waiting = iter(tensors)
    made: dict[int, ir.Value] = {}
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is None:
            inputs.append(None)
            continue
        tensor = next(waiting)
        if id(value) not in made:
            made[id(value)] = ir.Value(
                name=f"input_{len(made)}",
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
        inputs.append(made[id(value)])
    outputs = [ir.Value(name=f"output_{k}" if v.name else "") for k, v in enumerate(node.outputs)]
    copy = ir.Node("", node.op_type, inputs, list(node.attributes.values()), outputs=outputs)
    wanted = [value for value in outputs if value.name]
    for value, old in zip(outputs, node.outputs, strict=True):
        value.type = old.type
    graph = ir.Graph(
        [], wanted, nodes=[copy], initializers=list(made.values()), opset_imports={"": version}, name="constant"
    )
    try:
        with Runner(ir.Model(graph, ir_version=ir_version), threads=1) as runner:
            found = runner.run({})
    except (InputError, UnsupportedError):
        return None
    return [found[value.name] if value.name else np.zeros(0) for value in outputs]
