"""Units inside the bodies of If, Loop and Scan: found, moved, removed, counted."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests import zoo
from tests.control_flow_models import MODELS, UNITS, every_way

import cipm_ir
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers

NAMES = list(MODELS)


def ran(model: ir.Model | onnx.ModelProto, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return [zoo.run(proto, one)[0] for one in inputs]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[str, onnx.ModelProto, Program, list[dict[str, np.ndarray]]]:
    proto = MODELS[request.param]()
    return request.param, proto, cipm_ir.load(proto), every_way(proto)


def test_all_units_are_found(case) -> None:  # type: ignore[no-untyped-def]
    name, _, program, _ = case
    assert sum(s.size for s in program.spaces if s.kind == "units") == UNITS[name], str(program)


def test_random_elements_keep_the_function(case) -> None:  # type: ignore[no-untyped-def]
    _, proto, program, inputs = case
    before = ran(proto, inputs)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        moved = program.act({s: s.random(rng) for s in program.spaces})
        for a, b in zip(before, ran(moved.emit(), inputs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_an_element_outside_the_group_changes_the_function(case) -> None:  # type: ignore[no-untyped-def]
    """The inputs see every body: one weight of any body, changed alone, shows."""
    _, proto, program, inputs = case
    before = ran(proto, inputs)
    for leaf in program.analysis.walk.leaves:
        if len(leaf.shape) < 2 or not leaf.dtype.is_floating_point():
            continue
        value = program.model.graph.initializers[leaf.name].const_value
        assert value is not None
        wrong = program.refit({leaf.name: np.roll(value.numpy(), 1, axis=0)})
        after = ran(wrong.emit(), inputs)
        assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True)), leaf.name


def test_what_is_removed_is_what_contributes_nothing(case) -> None:  # type: ignore[no-untyped-def]
    _, _, program, inputs = case
    for space in [s for s in program.spaces if s.kind == "units" and s.size > 2]:
        keep = np.flatnonzero(
            np.arange(space.size) % 4 != 1
        )  # equally many of every four: a Reshape makes rows of four
        try:
            found = readers(program, space)
        except cipm_ir.SymmetryError:
            continue
        muted = program
        for reader in found:
            tensor = muted.model.graph.initializers[reader.weight].const_value
            assert tensor is not None
            array = tensor.numpy().copy()
            gone = np.delete(reader.columns, keep, axis=0).ravel()
            np.moveaxis(array, reader.axis, 0)[gone] = 0
            muted = muted.refit({reader.weight: array})
        small = muted.restrict({space: keep})
        assert small.parameters < program.parameters
        assert next(s for s in small.spaces if s.name == space.name).size == len(keep)
        for a, b in zip(ran(muted.emit(), inputs), ran(small.emit(), inputs), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_what_was_not_touched_stays(case) -> None:  # type: ignore[no-untyped-def]
    """A change of values gives the file's own nodes, names and Constants back."""
    _, proto, program, _ = case
    moved = ir.to_proto(program.act({s: s.identity() for s in program.spaces}).emit())
    rolled = ir.to_proto(program.act({s: s.random(np.random.default_rng(0)) for s in program.spaces}).emit())
    for other in (moved, rolled):
        assert _skeleton(other.graph) == _skeleton(proto.graph)


def _skeleton(graph: onnx.GraphProto) -> list[object]:
    nodes = [
        (n.op_type, list(n.input), list(n.output), [_skeleton(a.g) for a in n.attribute if a.HasField("g")])
        for n in graph.node
    ]
    return [nodes, sorted((t.name, tuple(t.dims)) for t in graph.initializer), [v.name for v in graph.input]]


PASSES = [
    "clean-up", "fold-batch-norm", "expose", "canonicalize", "canonicalize-signs", "equalize", "remove-dead",
    "recover-names", "absorb-bias", "rotate", "cluster", "fold{ratio=0.8}", "prune{macs=0.6}", "prune{units=0.5}",
]  # fmt: skip
