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

from tests.torch.torch_proof_nets import EXAMPLES, NEAR, NETS, apart, drawn, mlp, real_inputs, run, runs  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.backends.torch.proof import first_difference, unproven  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

PASSES = ("remove-dead", "fold-batch-norm", "clean-up", "canonicalize", "expose", "prune{macs=0.7}")


def test_the_measure_sees_a_small_channel() -> None:
    """The negative control: one part in a thousand of a channel that is a millionth of another."""
    x = torch.tensor([[1e6, 1.0], [2e6, 2.0]])
    assert apart(x, x) == 0 and apart(x, x * torch.tensor([1.0, 1.001])) > 5e-4


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("name", NETS)
def test_what_comes_out_is_the_verified_program(name: str, example: str) -> None:
    build, like = NETS[name]
    module = drawn(build)
    x, inputs = EXAMPLES[example](like), real_inputs(like)
    original = runs(module, inputs)
    for passes in PASSES:
        try:
            result = cipm_ir.optimize(module, [passes], example_inputs=(x,))
        except cipm_ir.CipmError as error:
            assert passes.startswith("prune") or "rolled back" in str(error), error
            continue
        origin: Any = result.program.origin
        made = runs(result.model, inputs)
        for verified, one in zip(runs(origin.graph(result.program.emit()), inputs), made, strict=True):
            assert apart(verified, one) <= NEAR, (passes, result.emitted)
        if not passes.startswith("prune"):
            for before, one in zip(original, made, strict=True):
                assert apart(before, one) <= NEAR, (passes, result.emitted)
        emitted = result.emitted
        assert emitted is not None and (emitted.form == "module" or emitted.reason)
        assert emitted.form == "graph" or emitted.proof == "same graph"


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


def test_a_bias_that_a_layer_did_not_have() -> None:
    """The layer gets one, and the copy, read again, is the program; a class that does not use it is not."""
    module = drawn(mlp)
    program = cipm_ir.optimize(module, example_inputs=(torch.randn(5, 6),)).program
    made: Any = program.origin.emit(program.emit())  # type: ignore[union-attr]
    assert (made.form, made.proof, type(made.object)) == ("module", "same graph", type(module))
    assert len(list(made.object.parameters())) > len(list(module.parameters()))


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
