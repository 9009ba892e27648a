"""What is wrong with a rule's claims on the variants of `rule_states`, in both directions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper
from tests.ops.rule_states import SIZES_BY_CONTENT, Array, Bench, Site, bench, opsets, selected
from tests.ops.sample import difference

from cipm_ir.errors import CipmError, UnsupportedError
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program

SAME = 1e-4
"""Largest difference, relative to the largest output, that rounding explains."""


def complaints(site: Site, *, thorough: bool = False) -> tuple[list[str], set[str]]:
    """False claims, and the places where a rule claims less than is true (as "input: kind of state").

    What is claimed of one axis shows where that axis is contracted. A factor over several axes shows only where they
    are contracted as one, so these variants are run once more, flat.
    """
    made = bench(site, selected(site, thorough=thorough))
    program = Program.of(ir.from_proto(made.model()))
    wrong, coarse = _claims(made, program)
    states = program.analysis.walk.states
    several = {
        made.given[title]
        for value, title in made.seen.items()
        if value in states and any(len(factor.axes) > 1 for factor in states[value].factors)
    }
    done = {given for title, given in made.given.items() if title.endswith("flat")}
    if thorough and several - done:
        again = bench(site, [(given, "flat") for given in sorted(several - done)])
        more, also = _claims(again, Program.of(ir.from_proto(again.model())))
        wrong, coarse = wrong + more, coarse | also
    return wrong, coarse | set(_unclaimed(site, made, program))


def _claims(made: Bench, program: Program) -> tuple[list[str], set[str]]:
    """False claims of one model, and uniform axes that are not claimed."""
    proto = made.model()
    rng = np.random.default_rng(1)
    moved = program.act({space: space.random(rng) for space in program.spaces})
    before, after = _runs(proto, moved.model, made)
    wrong = []
    for title, ends in made.ends.items():
        error = max(difference({end: before[end]}, {end: after[end]}) for end in ends)
        if error > SAME:
            wrong.append(f"{title}: a random element of all spaces changes the outputs by {error:.1e}")
    coarse = set()
    for value, title in made.seen.items():
        state = program.analysis.walk.states.get(value)
        if state is None:
            continue
        claimed = state.uniform
        true = _uniform(before[value]) & _uniform(after[value])
        if claimed - true:
            wrong.append(f"{title}: axes {sorted(claimed - true)} are called uniform, and are not")
        labelled = {a for f in state.factors for a in f.axes}
        if "uniform" in title and true - claimed - labelled and before[value].min() < before[value].max():
            coarse.add(f"{title.split(';')[0]} -> {sorted(true - claimed - labelled)}")
    return wrong, coarse


def _runs(proto: onnx.ModelProto, moved: ir.Model, made: Bench) -> list[dict[str, Array]]:
    """All outputs of a model with its own and with other parameters, of one session where that is possible.

    Parameters are fed as inputs with a default; some kernels want constants.
    """
    outputs = [*made.seen, *(end for ends in made.ends.values() for end in ends)]
    draws = any(node.op_type.startswith("Random") or node.op_type == "Bernoulli" for node in proto.graph.node)
    fed = onnx.ModelProto()
    fed.CopyFrom(proto)
    present = {value.name for value in fed.graph.output}
    typed = {info.name: info for info in made.shapes}
    fed.graph.output.extend(
        typed.get(name, onnx.ValueInfoProto(name=name)) for name in made.seen if name not in present
    )
    values = {name: value.const_value for name, value in moved.graph.initializers.items()}
    assert values.keys() == {tensor.name for tensor in proto.graph.initializer}, "the element forked a parameter"
    other = dict(made.feeds)
    for tensor in proto.graph.initializer:
        value = values[tensor.name]
        assert value is not None
        if tensor.name[0] in "wv":
            fed.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
            other[tensor.name] = value.numpy()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        if draws:  # each run of a session draws other numbers
            raise UnsupportedError("the same numbers are needed twice")
        session = ort.InferenceSession(fed.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [dict(zip(outputs, session.run(outputs, feeds), strict=True)) for feeds in (made.feeds, other)]
    except Exception:  # onnxruntime raises classes of its own
        results = []
        for model in (ir.from_proto(proto), moved):
            with Runner(model, extra_outputs=list(made.seen)) as runner:
                results.append(runner.run(made.feeds))
        return results


def _uniform(array: Array) -> set[int]:
    """Axes longer than 1 along which an array does not change."""
    return {
        a for a, n in enumerate(array.shape)
        if n > 1 and array.size and np.allclose(array, array.take([0], axis=a), rtol=1e-5, atol=1e-6, equal_nan=True)
    }  # fmt: skip


# ---------------------------------------------------------------- claims that are missing
def _unclaimed(site: Site, made: Bench, program: Program) -> Iterator[str]:
    """Inputs whose units the operator lets move, by its numbers, and no space claims, beside others that are free."""
    claimed = {member.partition("[")[0] for space in program.spaces for member in space.members}
    free: dict[tuple[int, int], bool] = {}
    try:
        runner = _Alone(site)
    except CipmError:
        return
    reported: dict[str, bool] = {}
    for title, parameters in made.parameters.items():
        states, how = title.split("; ")
        given = dict(part.split(": ") for part in states.split(", "))
        for k, name in parameters.items():
            kind, *rest = given[str(k)].split()
            others = {state for j, state in given.items() if j != str(k)}
            if kind not in ("free", "joint", "tiled", "runs") or others - {"free"}:
                continue
            if how == "flat" and kind != "joint":  # an axis of its own must be claimed by what reads that axis
                continue
            array = site.arrays[k]
            assert array is not None
            axes = [a for a, n in enumerate(array.shape) if n > 1]
            if rest:
                axes = [int(rest[0])] if kind != "joint" else [int(rest[0]), int(rest[0]) + 1]
            for a in axes:
                if (k, a) not in free:
                    free[k, a] = runner.moves(k, a)
            held = free.values() if kind == "free" else [free[k, a] for a in axes]
            able = any(free[k, a] for a in axes) if kind == "free" else all(held)
            if able:
                key = f"{k}: {given[str(k)]}"
                reported[key] = reported.get(key, False) or name in claimed
    yield from (key for key, found in reported.items() if not found)


class _Alone:
    """The operator of a site as a model of its own, whose inputs are fed."""

    def __init__(self, site: Site) -> None:
        self.site, self.varied = site, site.varied
        if site.node.op_type in SIZES_BY_CONTENT or site.node.op_type.startswith("Random"):
            self.varied = []
        self.feeds: dict[str, Array] = {}
        node = onnx.NodeProto()
        node.CopyFrom(site.node)
        del node.input[:]
        inputs, constants = [], []
        for k, array in enumerate(site.arrays):
            name = "" if array is None else f"i{k}"
            node.input.append(name)
            if array is None:
                continue
            if k in self.varied:
                self.feeds[name] = array
                inputs.append(
                    helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                )
            else:
                constants.append(onnx.numpy_helper.from_array(array, name))
        outputs = []
        for name, kind in zip(node.output, site.types, strict=True):
            if name:
                info = onnx.ValueInfoProto()
                info.name = name
                info.type.tensor_type.elem_type = kind
                outputs.append(info)
        imports = opsets(max(site.opset, 8), [node])
        graph = helper.make_graph([node], "alone", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=imports)
        model.ir_version = max(9, helper.find_min_ir_version_for(imports[:1]))
        self.runner = Runner(ir.from_proto(model))
        self.before = self.runner.run(self.feeds)

    def moves(self, k: int, axis: int) -> bool:
        """Whether reordering an axis of an input, with one of the same length of the others, reorders the outputs."""
        if k not in self.varied:
            return False
        array = self.feeds[f"i{k}"]
        n = array.shape[axis]
        orders = [np.random.default_rng(seed).permutation(n) for seed in (3, 4)]
        orders = [np.roll(np.arange(n), 1) if (order == np.arange(n)).all() else order for order in orders]
        choices = [
            [(j, None), *((j, a) for a, m in enumerate(self.feeds[f"i{j}"].shape) if m == n)]
            for j in self.varied
            if j != k
        ]
        for along in itertools.islice(itertools.product(*choices), 64):
            if all(self._follows({k: axis} | {j: a for j, a in along if a is not None}, order) for order in orders):
                return True
        return False

    def _follows(self, axes: Mapping[int, int], order: Array) -> bool:
        moved = {
            name: array.take(order, axis=axes[int(name[1:])]) if int(name[1:]) in axes else array
            for name, array in self.feeds.items()
        }
        after = self.runner.run(moved)
        for name, array in self.before.items():
            expected = [array] + [array.take(order, axis=a) for a, m in enumerate(array.shape) if m == len(order)]
            if not any(difference({name: one}, {name: after[name]}) < SAME for one in expected):
                return False
        return True
