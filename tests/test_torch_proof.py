"""The module that comes out is the verified program, whatever the example was, and in evaluation mode."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from tests.torch_proof_nets import EXAMPLES, NETS, drawn, mlp  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.backends.to_torch_proof import first_difference, unproven  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

PASSES = ("remove-dead", "fold-batch-norm", "clean-up", "canonicalize", "expose", "prune{macs=0.7}")
NEAR = 1e-4
"""Of the largest value of a channel: the programs are the same, but BLAS chooses kernels by size."""


def real_inputs(like: Tensor) -> list[Tensor]:
    """Inputs of several magnitudes, that are not the example."""
    if not like.is_floating_point():
        return [like.max() - like, torch.zeros_like(like), like.flip(0)]
    torch.manual_seed(7)
    return [s * torch.randn_like(like) for s in (1e-2, 1.0, 1e2)] + [torch.zeros_like(like)]


def apart(a: Any, b: Any) -> float:
    """The largest difference in any channel (last axis and axis 1), relative to its largest value there."""
    worst = 0.0
    leaves = torch.utils._pytree.tree_leaves
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.shape == y.shape and torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x[x.isinf()], y[y.isinf()])
        x, y = (z.double().nan_to_num(0, 0, 0) for z in (x, y))
        for axis in (1, x.ndim - 1):
            over = [k for k in range(x.ndim) if k != axis]
            worst = max(worst, float(((x - y).abs().amax(over) / x.abs().amax(over).clamp_min(1e-6)).max()))
    return worst


def run(module: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(module).eval()(x)


def test_the_measure_sees_a_small_channel() -> None:
    """The negative control: one part in a thousand of a channel that is a millionth of another."""
    x = torch.tensor([[1e6, 1.0], [2e6, 2.0]])
    assert apart(x, x) == 0 and apart(x, x * torch.tensor([1.0, 1.001])) > 5e-4


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name", NETS)
def test_what_comes_out_is_the_verified_program(name: str, example: str) -> None:
    build, like = NETS[name]
    module = drawn(build)
    x = EXAMPLES[example](like)
    for passes in PASSES:
        try:
            result = cipm_ir.optimize(module, [passes], example_inputs=(x,))
        except cipm_ir.CipmError as error:
            assert passes.startswith("prune") or "rolled back" in str(error), error
            continue
        origin: Any = result.program.origin
        graph = origin.graph(result.program.emit())
        for one in real_inputs(like):
            assert apart(run(graph, one), run(result.model, one)) <= NEAR, (passes, result.emitted)
            if not passes.startswith("prune"):
                assert apart(run(module, one), run(result.model, one)) <= NEAR, (passes, result.emitted)
        made = result.emitted
        assert made is not None and (made.form == "module" or made.reason)
        assert made.form == "graph" or made.proof == "same graph"


@pytest.mark.parametrize("name", ["conv", "mlp", "detector", "minus infinity", "tokens", "functional", "shared"])
def test_a_module_as_it_is_constructed(name: str) -> None:
    """It trains: what is compared is what it computes in evaluation, and it can be trained further."""
    build, like = NETS[name]
    module = drawn(build).train()
    for passes in PASSES[:3]:
        result = cipm_ir.optimize(module, [passes], example_inputs=(like,))
        assert module.training and all(m.training for m in module.modules())
        made = result.model
        assert made.training
        for one in real_inputs(like):
            assert apart(run(module, one), run(made, one)) <= NEAR, (passes, result.emitted)
        wanted = {type(m) for m in module.modules()} if result.emitted.form == "module" else {type(made)}  # type: ignore[union-attr]
        assert wanted <= {type(m) for m in made.modules()}
        assert all(m.training for m in made.modules())


def test_layers_that_do_not_train_keep_that() -> None:
    module: Any = drawn(mlp).train()
    module[3].eval()
    result = cipm_ir.optimize(module, ["canonicalize"], example_inputs=(torch.randn(5, 6),))
    assert [m.training for m in result.model.modules()] == [m.training for m in module.modules()]
    assert isinstance(result.model, nn.Sequential) and not module[3].training


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_a_graph_still_drops_while_it_trains(method: str) -> None:
    build, like = NETS["functional"]
    module = drawn(build).train()
    program = cipm_ir.load(module, (like,), method=method)
    made = program.origin.emit(program.emit()).object  # type: ignore[union-attr]
    graph: Any = program.origin.graph(program.emit())  # type: ignore[union-attr]
    assert isinstance(made, type(module)) and apart(run(module, like), run(graph, like)) <= NEAR
    graph.train()
    assert [m.p for m in graph.modules() if isinstance(m, nn.Dropout)] == [0.3]
    assert not torch.equal(graph(like), graph(like))


class AlwaysDropping(nn.Module):
    """Dropout that is on in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Any:
        return self.last(nn.functional.dropout(self.norm(self.first(x)), 0.5))


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_what_always_drops_still_does(method: str) -> None:
    x = torch.randn(5, 6)
    result = cipm_ir.optimize(drawn(AlwaysDropping), ["fold-batch-norm"], example_inputs=(x,), method=method)
    made = result.model.eval()
    assert not torch.equal(made(x), made(x))


# --- reasons --------------------------------------------------------------------------------------


def test_a_normalization_that_is_still_applied() -> None:
    build, like = NETS["conv"]
    made = cipm_ir.optimize(drawn(build), ["fold-batch-norm"], example_inputs=(torch.zeros_like(like),)).emitted
    assert made is not None and made.form == "graph"
    assert re.search(r"its forward computes '.+' by BatchNormalization, the program by Conv", made.reason), made.reason


def test_a_bias_that_has_no_place() -> None:
    module = drawn(mlp)
    program = cipm_ir.optimize(module, example_inputs=(torch.randn(5, 6),)).program
    made: Any = program.origin.emit(program.emit())  # type: ignore[union-attr]
    assert made.form == "graph" and "for which its forward has no place" in made.reason and "bias" in made.reason


def test_a_size_that_is_used_as_a_number() -> None:
    build, like = NETS["attention, scale of shape"]
    program = cipm_ir.load(drawn(build), (like,))
    inner = [s for s in program.spaces if s.kind == "units" and s.size == 4]
    assert len(inner) == 6, program.spaces  # of queries with keys, and of values, in each of three heads
    small = program.restrict({space: np.arange(3) for space in inner})
    made: Any = small.origin.emit(small.emit())  # type: ignore[union-attr]
    assert made.form == "graph" and "= 4.0" in made.reason and "= 3.0" in made.reason, made.reason
    x = torch.randn(2, 7, 8)
    assert apart(run(small.origin.graph(small.emit()), x), run(made.object, x)) <= NEAR  # type: ignore[union-attr]


# --- the proof itself -----------------------------------------------------------------------------


class Formula(nn.Module):
    """Operators whose order of operands, constants and axes count."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 10), nn.LayerNorm(10, eps=1e-3), nn.Linear(10, 4)
        self.drop, self.shift = nn.Dropout(0.1), 0.5

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        h = self.drop(self.norm(h)) - self.shift * h
        return torch.cumsum(self.last(h) / (1.5 + h.abs().sum(-1, keepdim=True)), 0)


def node(model: ir.Model, op: str, k: int = 0) -> ir.Node:
    return [n for n in model.graph if n.op_type == op][k]


def swap_operands(op: str) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        one = node(model, op)
        a, b = one.inputs[:2]
        one.replace_input_with(0, b)
        one.replace_input_with(1, a)

    return edit


def scale_tensor(name: str, factor: float) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()  # type: ignore[union-attr]
        array.flat[0] *= np.float32(factor)
        value.const_value = ir.tensor(array, name=name)

    return edit


def another_attribute(op: str, name: str, value: Any) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        kind = ir.AttrFloat32 if isinstance(value, float) else ir.AttrInt64
        node(model, op).attributes[name] = kind(name, value)

    return edit


def another_constant(op: str) -> Callable[[ir.Model], None]:
    def edit(model: ir.Model) -> None:
        value = next(v for v in node(model, op).inputs if v is not None and v.const_value is not None)
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.tensor(np.nextafter(array, np.float32(9), dtype=array.dtype), name=value.name)

    return edit


def without_bias(model: ir.Model) -> None:
    gemm = node(model, "Gemm")
    gemm.resize_inputs(2)


def one_more_relu(model: ir.Model) -> None:
    one = node(model, "Relu")
    made = ir.Node("", "Relu", [one.outputs[0]], num_outputs=1)
    made.outputs[0].name = "more"
    uses = [u for u in one.outputs[0].uses() if u.node is not made]
    model.graph.insert_after(one, made)
    for use in uses:
        use.node.replace_input_with(use.idx, made.outputs[0])


def another_operator(model: ir.Model) -> None:
    node(model, "Abs").op_type = "Neg"


def another_axis(model: ir.Model) -> None:
    one = node(model, "ReduceSum")
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array([0]), name="axis"))
    model.graph.register_initializer(axis)
    one.replace_input_with(1, axis)


WRONG: dict[str, Callable[[ir.Model], None]] = {
    "one weight by one part in a million": scale_tensor("first.weight", 1.000001),
    "one weight by its sign": scale_tensor("last.weight", -1.0),
    "a bias": scale_tensor("last.bias", 1.001),
    "operands of Sub": swap_operands("Sub"),
    "operands of Div": swap_operands("Div"),
    "epsilon": another_attribute("LayerNormalization", "epsilon", 1e-5),
    "axis of the normalization": another_attribute("LayerNormalization", "axis", 0),
    "axis of the sum": another_axis,
    "direction of the running sum": another_attribute("CumSum", "reverse", 1),
    "a constant by one unit in the last place": another_constant("Mul"),
    "no bias": without_bias,
    "one more Relu": one_more_relu,
    "another operator": another_operator,
}


def formula() -> tuple[Any, Program]:
    torch.manual_seed(0)
    program = cipm_ir.load(Formula().eval(), (torch.randn(5, 6),))
    return program.origin, program


@pytest.mark.parametrize("name", WRONG)
def test_the_proof_refuses(name: str) -> None:
    origin, program = formula()
    model = program.emit()
    WRONG[name](model)
    why = first_difference(program.emit(), model)
    assert why and first_difference(model, program.emit())
    assert "'" in why or "outputs" in why, why
    assert unproven(origin.capture, origin.capture.source, model)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("epsilon", "has epsilon=0.001 in the program, epsilon=1e-05 in its forward"),
        ("axis of the normalization", "has axis=-1 in the program, axis=0 in its forward"),
        ("direction of the running sum", "has the default of reverse in the program, reverse=1 in its forward"),
    ],
)
def test_an_attribute_that_differs_is_named(name: str, told: str) -> None:
    _, program = formula()
    model = program.emit()
    WRONG[name](model)
    assert told in first_difference(program.emit(), model)


def test_the_proof_accepts() -> None:
    """The same program, another probability of dropout, an identity, defaults that are written out, other names."""
    origin, program = formula()
    other = copy.deepcopy(origin.capture.source)
    other.drop.p = 0.7
    assert not unproven(origin.capture, other, program.emit())
    model = program.emit()
    for one in list(model.graph):
        for value in one.outputs:
            if not value.is_graph_output():
                value.name = f"{value.name}.renamed"
    another_attribute("Gemm", "alpha", 1.0)(model)
    relu = node(model, "Relu")
    copied = ir.Node("", "Identity", [relu.outputs[0]], num_outputs=1, name="copied")
    uses = list(relu.outputs[0].uses())
    model.graph.insert_after(relu, copied)
    for use in uses:
        if use.node is not copied:
            use.node.replace_input_with(use.idx, copied.outputs[0])
    assert first_difference(program.emit(), model) == ""


def edited(change: Callable[[Any], None]) -> str:
    """What the proof says of the program against a module in which something was changed."""
    origin, program = formula()
    other = copy.deepcopy(origin.capture.source)
    with torch.no_grad():
        change(other)
    return unproven(origin.capture, other, program.emit())


def test_modules_that_are_something_else() -> None:
    def hook(m: Any) -> None:
        m.last.register_forward_hook(lambda _, args, out: 2 * out)

    assert edited(lambda m: None) == ""
    assert "0.25" in edited(lambda m: setattr(m, "shift", 0.25))
    assert "LayerNormalization" in edited(lambda m: setattr(m.norm, "eps", 1e-5))
    assert "last.weight" in edited(lambda m: m.last.weight[0, 0].add_(1e-6))
    assert edited(lambda m: setattr(m.first, "bias", None))
    assert edited(lambda m: setattr(m, "drop", nn.ReLU()))
    assert edited(hook)
    assert edited(lambda m: setattr(m.last, "forward", lambda x: x[:, :4]))


class Unknown(nn.Module):
    """An operation that the table does not know, with a number that decides what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.keep = nn.Linear(6, 10), nn.Linear(10, 4), 3

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.first(x))
        return self.last(torch.renorm(h, 2, 0, float(self.keep)))


def test_numbers_of_unknown_operations_count() -> None:
    module = Unknown().eval()
    program = cipm_ir.load(module, (torch.randn(5, 6),), method="symbolic")
    assert program.opaque, "the operation has a rule now; take another one"
    origin: Any = program.origin
    other = copy.deepcopy(module)
    assert unproven(origin.capture, other, program.emit()) == ""
    other.keep = 2
    assert "renorm" in unproven(origin.capture, other, program.emit())


# --- what is read ---------------------------------------------------------------------------------


class Builtin(nn.Module):
    """Arguments with the names of builtins, and with the names that torch gives to those."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.norms, self.last = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(2)), nn.Linear(6, 4)

    def forward(self, input: Tensor, input_1: Tensor, max: Tensor, add: Tensor) -> Any:
        h = torch.relu(self.norms[0](self.a(input))) - self.norms[1](self.b(input_1))
        return self.last(h) + 2 * max - add


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_arguments_named_like_builtins(method: str) -> None:
    module, args = drawn(Builtin), tuple(torch.randn(5, 4) for _ in range(4))
    for passes in ("fold-batch-norm", "prune{macs=0.8}", "canonicalize"):
        result = cipm_ir.optimize(module, [passes], example_inputs=args, method=method)
        other = tuple(torch.randn(5, 4) for _ in args)
        with torch.no_grad():
            wanted = module(*other)
            if passes.startswith("prune"):
                wanted = fx.Interpreter(result.program.origin.graph(result.program.emit())).run(*other)  # type: ignore[union-attr]
            assert apart(wanted, result.model(*other)) <= NEAR


def test_an_exported_program_with_such_arguments() -> None:
    build, like = NETS["conv"]
    module = drawn(build)  # the forward of nn.Sequential takes `input`
    result = cipm_ir.optimize(torch.export.export(module, (like,)), ["fold-batch-norm"])
    assert apart(module(like + 1), result.model.module()(like + 1)) <= NEAR
    args = tuple(torch.randn(5, 4) for _ in range(4))
    program = torch.export.export(drawn(Builtin), args)
    if apart(program.module()(*args), drawn(Builtin)(*args)) > 1e-2:  # torch's own module is wrong
        with pytest.raises(cipm_ir.UnsupportedError, match="is not that program"):
            cipm_ir.optimize(program, ["fold-batch-norm"])


def test_buffers_in_arithmetic_keep_their_names() -> None:
    build, like = NETS["frozen"]
    module = drawn(build)
    program = cipm_ir.load(module, (like,))
    assert program.origin.capture.method == "symbolic"  # type: ignore[union-attr]
    assert {"1.weight", "1.bias", "1.running_mean", "1.running_var"} <= set(program.model.graph.initializers)
    (space,) = [s for s in program.spaces if s.size == 8]
    made: Any = program.restrict({space: np.arange(5)}).origin.emit(program.restrict({space: np.arange(5)}).emit())  # type: ignore[union-attr]
    assert made.form == "module" and made.object[1].running_var.shape == (5,)


@pytest.mark.parametrize("where", ["", "0", "3"])
@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward"])
def test_hooks_and_replaced_forwards_are_read(what: str, where: str) -> None:
    build, like = NETS["conv"]
    module = drawn(build)
    one = module.get_submodule(where)
    if what == "hook":
        one.register_forward_hook(lambda _, args, out: out * 3)
    elif what == "pre-hook":
        one.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    else:
        old = one.forward
        one.forward = lambda input: old(input) * 3
    for passes in ("canonicalize", "prune{macs=0.8}"):
        result = cipm_ir.optimize(module, [passes], example_inputs=(like,))
        wanted = module if passes == "canonicalize" else result.program.origin.graph(result.program.emit())  # type: ignore[union-attr]
        assert apart(run(wanted, like + 1), run(result.model, like + 1)) <= NEAR


def test_a_program_that_was_exported_while_it_trained() -> None:
    build, like = NETS["conv"]
    module = drawn(build)
    for trains in (True, False):
        result = cipm_ir.optimize(torch.export.export(module.train(trains), (like,)), ["canonicalize"])
        said = " ".join(result.report.notes)
        assert ("exported while it trained" in said) == trains == (not result.program.spaces)


class Counting(nn.Module):
    """Forward counts its calls and keeps what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls, self.kept = nn.Linear(6, 10), nn.Linear(10, 4), 0, None

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.kept = torch.relu(self.first(x))
        return self.last(self.kept)


def test_proving_leaves_no_traces() -> None:
    made = cipm_ir.optimize(Counting().eval(), ["canonicalize"], example_inputs=(torch.randn(5, 6),)).model
    assert isinstance(made, Counting) and made.calls == 0 and made.kept is None


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_open_sizes(method: str) -> None:
    """Where sizes are open, what is computed from them is compared as it is computed."""
    build, like = NETS["attention, scale kept"]
    if method == "symbolic":
        build, like = NETS["mlp"]
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    result = cipm_ir.optimize(
        drawn(build), ["canonicalize"], example_inputs=(like,), dynamic_shapes=dynamic, method=method
    )
    made = result.emitted
    assert made is not None and (made.form, made.proof) == ("module", "same graph")
    other = torch.cat([like, like + 1, like - 1])
    assert apart(run(drawn(build), other), run(made.object, other)) <= NEAR


# --- files ----------------------------------------------------------------------------------------


def other_weights(module: Any) -> Any:
    made = copy.deepcopy(module)
    with torch.no_grad():
        next(iter(made.parameters())).mul_(1.001)
    return made


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ""])
def test_a_wrong_file_is_not_written(suffix: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writers are made to write another module; what was there before stays as it was."""
    module, x = drawn(mlp), torch.randn(5, 6)
    result = cipm_ir.optimize(module, ["canonicalize"], example_inputs=(x,))
    path = tmp_path / f"model{suffix}"
    result.save(path)
    before = {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    if suffix == ".onnx":
        export = torch.onnx.export
        monkeypatch.setattr(torch.onnx, "export", lambda m, *a, **k: export(other_weights(m), *a, **k))
    elif suffix == ".pt2":
        save = torch.export.save
        wrong = torch.export.export(other_weights(result.model).eval(), (x,))
        monkeypatch.setattr(torch.export, "save", lambda program, where: save(wrong, where))
    else:
        import safetensors.torch

        save_file = safetensors.torch.save_file
        monkeypatch.setattr(
            safetensors.torch,
            "save_file",
            lambda held, where: save_file({k: 1.001 * v for k, v in held.items()}, where),
        )
    with pytest.raises(cipm_ir.OutputError, match="not be the program that was checked"):
        result.save(path)
    assert {p.name: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "name", ["conv", "mlp", "frozen", "detector", "minus infinity", "tokens", "shared", "functional"]
)
def test_files_of_a_module_that_trains(name: str, tmp_path: Any) -> None:
    """Files hold what the module computes in evaluation."""
    build, like = NETS[name]
    module = drawn(build).train()
    result = cipm_ir.optimize(module, ["canonicalize"], example_inputs=(like,))
    for suffix in (".pt2", ".onnx", ""):
        result.save(tmp_path / f"model{suffix}")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    planned = cipm_ir.apply_plan(drawn(build).train(), tmp_path / "model")
    assert result.model.training and planned.training
    for one in real_inputs(like):
        with torch.no_grad():
            assert apart(run(result.model, one), loaded(one)) <= NEAR
        assert apart(run(result.model, one), run(planned, one)) == 0
    assert cipm_ir.verify(result.model, tmp_path / "model.onnx", example_inputs=(like,))
