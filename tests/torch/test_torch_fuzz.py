"""Random torch modules: what is lowered, moved, made smaller and written again computes what it should.

A check returns a sentence that says what is wrong, or "" where all is well; errors of the package (`CipmError`) are
refusals and fine, any other exception is a defect and comes through.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.models.dead_units import Keep, killed, random_keep, restricted  # noqa: E402
from tests.torch.torch_fuzz_modules import Fuzzed, fuzzed  # noqa: E402
from tests.torch.torch_running import feeds_of, largest_difference, run_both, tensors_of  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.errors import CipmError  # noqa: E402
from cipm_ir.runtime.session import Runner  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

TOLERANCE = 1e-6
"""In float64; the IR holds epsilons and scales in float32."""


def outputs(call: Any, x: Any) -> list[Any]:
    with torch.no_grad():
        return tensors_of(call(x.clone()))


def apart(what: str, a: list[Any], b: list[Any], tolerance: float = TOLERANCE) -> str:
    if [x.shape for x in a] != [x.shape for x in b]:
        return f"{what}: shapes {[x.shape for x in a]} and {[x.shape for x in b]}"
    if not all(np.isfinite(x).all() for x in a):
        return ""
    change = largest_difference(list(zip(a, b, strict=True)))
    return f"{what}: {change:.1e}" if not change <= tolerance else ""


def emitted(program: Program) -> Any:
    """The object that comes out, ready to call."""
    made = program.origin.emit(program.emit()).object  # type: ignore[union-attr]
    return made.module() if isinstance(made, torch.export.ExportedProgram) else made


def source_of(module: Fuzzed, x: Any, form: str) -> tuple[Any, dict[str, Any]]:
    """What is loaded, and how."""
    if form in ("symbolic", "export"):
        return module, {"example_inputs": (x,), "method": form}
    if form == "graph":
        return torch.fx.symbolic_trace(module), {"example_inputs": (x,)}
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    if form == "dynamic":
        return module, {"example_inputs": (x,), "method": "export", "dynamic_shapes": dynamic}
    if form == "dynamic symbolic":
        return module, {"example_inputs": (x,), "method": "symbolic", "dynamic_shapes": dynamic}
    return torch.export.export(module, (x,), dynamic_shapes=dynamic), {}


def load(module: Fuzzed, x: Any, form: str) -> Program | None:
    """The program; None where torch cannot trace it, or the package refuses it."""
    try:
        source, options = source_of(module, x, form)
    except Exception:  # torch's own tracers
        return None
    try:
        return cipm_ir.load(source, **options)
    except CipmError:
        return None


def check_lowering(module: Fuzzed, form: str) -> str:
    """The IR in onnxruntime computes what torch computes."""
    x = module.example()
    program = load(module, x, form)
    if program is None or program.opaque:
        return ""
    return apart("the IR differs", *_columns(run_both(program.origin.capture, module, (x,), {})), 1e-4)  # type: ignore[union-attr]


def _columns(pairs: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def check_act(module: Fuzzed, form: str, seed: int) -> str:
    """A random element on all spaces leaves the outputs, of the object and of the graph."""
    module = module.double()
    x = module.example().double()
    program = load(module, x, form)
    if program is None:
        return ""
    rng = np.random.default_rng(seed)
    batch = 3 if form in ("exported", "dynamic", "dynamic symbolic") else 2
    other = module.example(batch, seed + 1).double()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    wanted = outputs(module, other)
    moved = program.act({s: s.random(rng) for s in program.spaces})
    wrong = apart("act changes the object", wanted, outputs(emitted(moved), other))
    after = module.state_dict()
    if list(after) != list(before) or any(not torch.equal(v, after[k]) for k, v in before.items()):
        return "the caller's module has changed"
    if not wrong and form in ("symbolic", "export"):
        compared = program.origin.compare(program.emit(), moved.emit(), rtol=TOLERANCE, atol=TOLERANCE)  # type: ignore[union-attr]
        wrong = "" if compared.ok else f"compare: {compared.reason} {compared.max_rel}"
    return wrong


def dead_and_small(program: Program, seed: int) -> tuple[Program, Program] | None:
    """The program with zeroed units and the one without them; None where nothing can go."""
    keep: Keep = random_keep(program, np.random.default_rng(seed), blocks=seed % 2 == 0)
    if not keep:
        return None
    dead = killed(program, keep)
    try:
        return dead, restricted(dead, keep)
    except CipmError:
        return None


def check_restrict(module: Fuzzed, form: str, seed: int) -> str:
    """Without its dead units, what is written computes the same; and the IR says the same as what is written."""
    module = module.double()
    x = module.example().double()
    program = load(module, x, form)
    both = None if program is None else dead_and_small(program, seed)
    if both is None:
        return ""
    dead, small = both
    batch = 3 if form in ("exported", "dynamic", "dynamic symbolic") else 2
    other = module.example(batch, seed + 1).double()
    first = outputs(emitted(dead), other)
    try:
        made = emitted(small)
    except CipmError as refusal:
        return f"refused: {refusal}" if "does not run" in str(refusal) else ""
    second = outputs(made, other)
    wrong = apart("restrict changes the object", first, second)
    if wrong and sums_what_rises(small):
        return ""
    return wrong


def check_smaller(module: Fuzzed, form: str, seed: int) -> str:
    """What is written of a smaller program computes what its IR computes, whether or not the units were dead."""
    program = load(module, module.example(), form)
    if program is None or program.opaque:
        return ""
    keep = random_keep(program, np.random.default_rng(seed), blocks=seed % 2 == 0)
    try:
        small = program.restrict(keep)
        made = emitted(small)
    except CipmError:
        return ""
    x = module.example(2, seed + 1)
    capture = program.origin.capture  # type: ignore[union-attr]
    with Runner(small.model) as runner:
        wanted = list(runner.run(feeds_of(capture, (x,), {})).values())
    return apart("the smaller object is not its IR", wanted, outputs(made, x), 1e-4)


RISING = {
    "Sigmoid", "Softplus", "Exp", "Cos", "HardSigmoid", "Softmax", "LogSoftmax", "Where", "Div", "Clip", "Pad", "Max",
    "Min", "Add", "Sub", "Pow", "ReduceLogSumExp", "ReduceMax", "Reciprocal", "Less", "Greater", "Concat", "Expand",
}  # fmt: skip
SUMMING = {"ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceMean", "Einsum", "ReduceMax", "Gather"}


def sums_what_rises(program: Program) -> bool:
    """Whether a unit without weights may still be something: an operation lifts zeros, and one sums over units."""
    ops = {node.op_type for node in program.model.graph}
    held = {v.name for v in program.model.graph.initializers.values()}
    products = any(
        n.op_type in ("MatMul", "Attention") and not {v.name for v in n.inputs if v is not None} & held
        for n in program.model.graph
    )
    return bool(ops & RISING) and bool(ops & SUMMING or products)


FORMS = ("symbolic", "export", "graph", "exported", "dynamic", "dynamic symbolic")


def checked(seed: int, form: str) -> list[str]:
    """What is wrong with the module of a seed, read in one form."""
    dynamic = form in ("exported", "dynamic", "dynamic symbolic")
    found = [check_act(fuzzed(seed, dynamic), form, seed), check_restrict(fuzzed(seed, dynamic), form, seed)]
    if form in ("symbolic", "export"):
        found.append(check_lowering(fuzzed(seed), form))
    found.append(check_smaller(fuzzed(seed, dynamic), form, seed))
    return [f"{form} {seed}: {f}" for f in found if f]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_random_modules(seed: int) -> None:
    """Four modules traced symbolically, the first of them in another form as well."""
    for own in range(seed, seed + 4):
        assert checked(own, "symbolic") == []
    form = FORMS[1 + seed // 4 % 5]
    assert checked(seed, form) == []


def test_random_modules_are_not_empty() -> None:
    """Most of them are read, have units to move and units to remove: otherwise the tests above say nothing."""
    counts = {"read": 0, "moved": 0, "smaller": 0}
    for seed in range(40):
        program = load(fuzzed(seed), fuzzed(seed).example(), "symbolic")
        counts["read"] += program is not None
        counts["moved"] += program is not None and bool(program.spaces)
        counts["smaller"] += program is not None and dead_and_small(program, seed) is not None
    assert counts["read"] >= 20 and counts["moved"] >= 15 and counts["smaller"] >= 10, counts


def test_a_wrong_module_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an object one of whose outputs is off."""
    original = emitted

    def off(program: Program) -> Any:
        made = original(program)
        return lambda x: torch.utils._pytree.tree_map(lambda t: t * 1.01, made(x))

    monkeypatch.setitem(globals(), "emitted", off)
    assert "act changes" in check_act(fuzzed(10), "symbolic", 0)
    assert any("not its IR" in check_smaller(fuzzed(seed), "symbolic", seed) for seed in range(10))
