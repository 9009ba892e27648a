"""Units inside the bodies of If, Loop and Scan: found, moved, removed, counted."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.models.control_flow_models import MODELS, UNITS, every_way, feeds

import cipm_ir
from cipm_ir.runtime.session import Runner
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import readers

NAMES = list(MODELS)


def ran(model: ir.Model | onnx.ModelProto, inputs: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    with Runner(ir.from_proto(proto)) as runner:
        return [np.asarray(runner.run(one)["y"]) for one in inputs]


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


EXACT = (
    "clean-up", "fold-batch-norm", "expose", "canonicalize", "canonicalize-signs", "equalize", "remove-dead",
    "absorb-bias", "cluster",
)  # fmt: skip


def test_exact_passes_together(case) -> None:  # type: ignore[no-untyped-def]
    """One after the other, checked on inputs that take every branch."""
    _, proto, program, inputs = case
    result = cipm_ir.optimize(program, passes=list(EXACT), verify=False)
    for a, b in zip(ran(proto, inputs), ran(result.program.emit(), inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5)


def test_fingerprints_see_bodies(case) -> None:  # type: ignore[no-untyped-def]
    name, _, program, _ = case
    moved = program.act({s: s.random(np.random.default_rng(1), power_of_two=True) for s in program.spaces})
    assert cipm_ir.fingerprint(moved) == cipm_ir.fingerprint(program)
    body = next(s for s in program.spaces if program.unseen(s))
    tensor = body.members[0].rpartition("[")[0]
    value = program.model.graph.initializers[tensor].const_value
    assert value is not None
    array = value.numpy().copy()
    array.flat[0] = np.nextafter(array.flat[0], np.float32(9))
    assert cipm_ir.fingerprint(program.refit({tensor: array})) != cipm_ir.fingerprint(program), name


@pytest.mark.parametrize("budget", ["macs=0.8", "macs=0.5", "params=0.8"])
def test_prune_meets_budgets_that_lie_in_bodies(case, budget: str) -> None:  # type: ignore[no-untyped-def]
    name, _, program, inputs = case
    if name == "scanned" and budget != "macs=0.8":
        budget = "macs=0.75"  # its input product is not the body's
    result = cipm_ir.optimize(program, passes=[f"prune{{{budget}}}"], verify=False)
    kind, _, share = budget.partition("=")
    after, before = result.program, program
    ratio = after.macs / before.macs if kind == "macs" else after.parameters / before.parameters
    assert 0.3 < ratio <= float(share)
    assert all(np.isfinite(y).all() for y in ran(after.emit(), inputs))
    predicted = result.report.steps[-1].metrics["macs" if kind == "macs" else "params"][1]
    assert predicted == (after.macs if kind == "macs" else after.parameters)


def test_units_that_do_nothing_are_removed_from_bodies() -> None:
    """Outgoing weights of three units of each body are zeros; a control with small numbers there loses none."""
    proto = MODELS["branches"]()
    inputs = every_way(proto)
    for size, gone in ((0.0, 6), (1e-3, 0)):
        program = cipm_ir.load(proto)
        for space in [s for s in program.spaces if "If" in s.name]:
            (reader,) = readers(program, space)
            value = program.model.graph.initializers[reader.weight].const_value
            assert value is not None
            array = value.numpy().copy()
            array[reader.columns[:3].ravel()] *= size
            program = program.refit({reader.weight: array})
        small = cipm_ir.optimize(program, passes=["remove-dead"]).program
        assert sum(s.size for s in program.spaces) - sum(s.size for s in small.spaces) == gone
        for a, b in zip(ran(program.emit(), inputs), ran(small.emit(), inputs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_duplicates_in_bodies_are_merged() -> None:
    proto = MODELS["branches"]()
    program, inputs = cipm_ir.load(proto), every_way(proto)
    for name in ("ma", "mc"):
        value = program.model.graph.initializers[name].const_value
        assert value is not None
        array = value.numpy().copy()
        array[..., 1] = array[..., 0]
        program = program.refit({name: array})
    small = cipm_ir.optimize(program, passes=["fold"]).program
    assert sum(s.size for s in program.spaces) - sum(s.size for s in small.spaces) == 1
    for a, b in zip(ran(program.emit(), inputs), ran(small.emit(), inputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text", ["prune{ratio=0.3, importance=wanda}", "fold{ratio=0.3}", "equalize", "prune{ratio=0.3, compensate=true}"]
)
@pytest.mark.parametrize("name", ["branches", "looped"])
def test_passes_that_look_at_data_say_what_they_leave(name: str, text: str) -> None:
    proto = MODELS[name]()
    data = feeds(proto, yes=True, batch=32)
    try:
        said = cipm_ir.optimize(proto, passes=[text], data=data, verify=False).report.steps[-1].summary
    except cipm_ir.CipmError as error:
        said = str(error)
    assert "bod" in said, said


def test_names_say_where_things_stand() -> None:
    text = str(cipm_ir.load(MODELS["nested"]()))
    assert "  body z_If.then()" in text and "    body z_If.then/out_If.else()" not in text.splitlines()
    assert any("; named z_If.then/out_If.else/" in line for line in text.splitlines() if line.startswith("space @"))
    loop = cipm_ir.load(MODELS["looped"]())
    assert "body loop(%i : i64[], %cond : bool[], %h : f32[N, 8])" in str(loop)
    assert [o.name for o in loop.opaque if o.op == "Loop"] == ["loop"]
    annotated = loop.emit(annotate=True)
    marked = [v for n in annotated.graph.all_nodes() for v in n.outputs if "cipm_ir.axes" in v.metadata_props]
    assert {v.name for v in marked} >= {"mh", "ms", "mr"}
