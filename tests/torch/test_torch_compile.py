"""`torch.compile` with our passes in front: equal outputs, weights that changed, every way back to the plain graph."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

import pytest

torch = pytest.importorskip("torch")

from tests.torch import torch_zoo  # noqa: E402
from tests.torch.torch_zoo_base import seeded  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402

import cipm_ir  # noqa: E402

FOLD = ["fold-batch-norm"]
P = ParamSpec("P")


def inference(test: Callable[P, None]) -> Callable[P, None]:
    """The test runs without gradients."""
    made: Callable[P, None] = torch.no_grad()(test)
    return made


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        # Every fallback warns: a test in which one is expected says so.
        warnings.filterwarnings("error", message="cipm_ir.torch_backend")
        yield
    torch.compiler.reset()


class ConvNet(nn.Module):
    """Convolution, batch norm, ReLU, twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.head(x.mean((2, 3)).view(x.shape[0], -1))


def conv_net() -> ConvNet:
    made = seeded(ConvNet)
    assert isinstance(made, ConvNet)
    return made


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)))


def images(batch: int = 2) -> Any:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def points(batch: int = 3) -> Any:
    return torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch))


class Spy:
    """A backend that keeps the graphs that it gets, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.inputs: list[int] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.inputs.append(len(example_inputs))
        return gm.forward

    def operations(self) -> set[str]:
        return {getattr(n.target, "__name__", str(n.target)) for gm in self.graphs for n in gm.graph.nodes}


def compiled(module: nn.Module, passes: Any, then: Any, **options: Any) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(module, backend=cipm_ir.torch_backend(passes, then=then, **options))
    return made


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())


# --- what works -----------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
@inference
def test_equal_outputs(then: str) -> None:
    net, chain = conv_net(), mlp()
    assert close(net(images()), compiled(net, ["fold-batch-norm", "canonicalize"], then)(images()))
    assert close(chain(points()), compiled(chain, "canonicalize", then)(points()))


@inference
def test_batch_norms_are_gone() -> None:
    spy, net = Spy(), conv_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert close(net(images()), compiled(net, FOLD, spy)(images()))
    assert "conv2d" in spy.operations() and "batch_norm" not in spy.operations()
    assert spy.inputs == [1]  # the weights are constants of the graph
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    control = Spy()
    compiled(net, "canonicalize", control)(images())
    assert "batch_norm" in control.operations()


@inference
def test_the_mlp_is_in_canonical_form() -> None:
    spy, chain = Spy(), mlp()
    assert close(chain(points()), compiled(chain, "canonicalize", spy)(points()))
    own = {tuple(p.shape): p for p in chain.parameters() if p.ndim == 2}
    new = {tuple(p.shape): p for p in spy.graphs[0].parameters() if p.ndim == 2}
    assert own.keys() == new.keys() and any(not torch.equal(own[k], new[k]) for k in own)


@pytest.mark.parametrize("passes", ["canonicalize", ["remove-dead"]])
@inference
def test_transformer_block(passes: Any) -> None:
    def build() -> nn.Module:
        return nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, batch_first=True)

    block, x = seeded(build), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert close(block(x), compiled(block, passes, "eager")(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", ["mlp_gelu", "fail_flatten", "squeeze_excitation"])
@inference
def test_models_of_the_zoo(name: str) -> None:
    case = torch_zoo.case(name)
    net, (args, kwargs) = case.build(), case.inputs()
    assert close(net(*args, **kwargs), compiled(net, "canonicalize", "eager")(*args, **kwargs))


@inference
def test_dynamic_batch_size() -> None:
    spy, net = Spy(), conv_net()
    run = compiled(net, FOLD, spy)
    for batch in (2, 3, 4, 7, 9):
        assert close(net(images(batch)), run(images(batch)))
    assert len(spy.graphs) == 2  # one for 2, one for all others: the passes put no guard on a size
    assert "batch_norm" not in spy.operations()


@inference
def test_graph_break() -> None:
    class Broken(ConvNet):
        def forward(self, x: Tensor) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            torch._dynamo.graph_break()
            return self.head(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))

    spy, net = Spy(), seeded(Broken)
    assert close(net(images()), compiled(net, FOLD, spy)(images()))
    assert len(spy.graphs) == 2 and "batch_norm" not in spy.operations()


def test_gradients_on_but_nothing_requires_them() -> None:
    spy, net = Spy(), conv_net().requires_grad_(False)
    assert close(net(images()), compiled(net, FOLD, spy)(images()))
    assert "batch_norm" not in spy.operations()


def test_inference_mode() -> None:
    spy, net = Spy(), conv_net()
    run = compiled(net, FOLD, spy)
    with torch.inference_mode():
        assert close(net(images()), run(images()))
        assert "batch_norm" not in spy.operations()
    with torch.no_grad():
        assert close(net(images()), run(images()))


@inference
def test_nothing_to_do_leaves_the_graph() -> None:
    spy, chain = Spy(), mlp()
    assert torch.equal(chain(points()), compiled(chain, FOLD, spy)(points()))
    assert spy.inputs == [7]  # weights still are inputs


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@inference
def test_inductor() -> None:
    net = conv_net()
    run = compiled(net, FOLD, "inductor")
    for batch in (2, 5):
        assert close(net(images(batch)), run(images(batch)))


# --- weights that change --------------------------------------------------------------------------


def copied_into(net: ConvNet) -> None:
    net.head.weight.copy_(net.head.weight + 1)


def replaced(net: ConvNet) -> None:
    net.head.weight = nn.Parameter(net.head.weight + 1)


def other_data(net: ConvNet) -> None:
    net.head.weight.data = net.head.weight.data + 1


def state_loaded(net: ConvNet) -> None:
    net.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in net.state_dict().items()})


def statistics(net: ConvNet) -> None:
    assert net.bn1.running_mean is not None
    net.bn1.running_mean.add_(1.0)


@pytest.mark.parametrize("change", [copied_into, replaced, other_data, state_loaded, statistics])
@inference
def test_weights_that_changed_are_used(change: Callable[[ConvNet], None]) -> None:
    net = conv_net()
    run = compiled(net, FOLD, "eager")
    first = run(images())
    change(net)
    wanted = net(images())
    assert not close(wanted, first)
    with pytest.warns(RuntimeWarning, match=r"weights changed.*torch\.compiler\.reset"):
        assert close(wanted, run(images()))
    assert close(wanted, run(images()))  # said once
    torch.compiler.reset()
    spy = Spy()
    assert close(wanted, compiled(net, FOLD, spy)(images()))
    assert "batch_norm" not in spy.operations()


@inference
def test_another_instance_has_its_own_weights() -> None:
    """Dynamo runs the code that it compiled for one module for others of its class too."""
    backend = cipm_ir.torch_backend(FOLD, then="eager")
    first, second = conv_net(), conv_net()
    second.head.weight.mul_(3.0)
    for net in (first, second):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert close(net(images()), torch.compile(net, backend=backend)(images()))


# --- falling back ---------------------------------------------------------------------------------


def test_training_falls_back() -> None:
    spy, net = Spy(), conv_net()
    run = compiled(net, FOLD, spy)
    with pytest.warns(RuntimeWarning, match="gradients are on") as seen:
        run(images()).sum().backward()
        run(images(4))
    assert len([w for w in seen if "torch_backend" in str(w.message)]) == 1
    assert net.conv1.weight.grad is not None and "batch_norm" in spy.operations()
    with torch.no_grad():
        assert close(net(images()), run(images()))


@inference
def test_a_buffer_that_the_graph_changes() -> None:
    net, reference = conv_net().train(), conv_net().train()
    run = compiled(net, FOLD, "eager")
    with pytest.warns(RuntimeWarning, match="changes a buffer"):
        assert close(reference(images()), run(images()))
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), reference.state_dict().values(), strict=True)
    )
    assert int(net.bn1.num_batches_tracked or 0) == 1


@inference
def test_a_parameter_that_is_given_back() -> None:
    class Gives(ConvNet):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.head.weight.t()

    net: Any = seeded(Gives)
    with pytest.warns(RuntimeWarning, match="gives back a parameter"):
        out, weight = compiled(net, FOLD, "eager")(images())
    assert close(net(images())[0], out) and weight.data_ptr() == net.head.weight.data_ptr()


@inference
def test_what_cannot_be_read() -> None:
    net: Any = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)))
    net[0].weight[0, 0] = float("nan")
    spy = Spy()
    with pytest.warns(RuntimeWarning, match="torch_backend: a graph is left as it is") as seen:
        got = compiled(net, "canonicalize", spy)(points())
    assert len(seen) == 1 and got.isnan().any() and spy.inputs == [5]


@inference
def test_a_rewritten_graph_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the last comparison: it notices what every check before it let through."""
    from cipm_ir.backends.torch import compile as to_torch_compile
    from cipm_ir.backends.torch import emit as to_torch

    whole = to_torch.emit_graph

    def wrong(capture: Any, model: Any) -> Any:
        made = whole(capture, model)
        next(made.parameters()).data.mul_(1.01)
        return made

    monkeypatch.setattr(to_torch_compile, "emit_graph", wrong)
    net, spy = conv_net(), Spy()
    with pytest.warns(RuntimeWarning, match="computes something else"):
        assert close(net(images()), compiled(net, FOLD, spy)(images()))
    assert "batch_norm" in spy.operations()
    assert not close(net(images()), compiled(net, FOLD, Spy(), verify=False)(images()))


@inference
def test_a_pass_whose_result_is_not_exact() -> None:
    from cipm_ir.passes import Pass, PassResult
    from cipm_ir.passes.framework.base import Kind

    class Inexact(Pass):
        def run(self, program: Any, ctx: Any) -> PassResult:
            space = program.spaces[0]
            return PassResult(program.act({space: space.random(ctx.rng)}), kind=Kind.APPROXIMATE)

    chain, spy = mlp(), Spy()
    with pytest.warns(RuntimeWarning, match="did not keep the function exactly"):
        assert torch.equal(chain(points()), compiled(chain, Inexact(), spy)(points()))
    assert spy.inputs == [7]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", ["prune{macs=0.5}", ["canonicalize", "prune{macs=0.5}"]])
def test_passes_that_are_not_exact_are_refused(passes: Any) -> None:
    with pytest.raises(cipm_ir.OptionError, match=r"exact passes only.*prune.*approximate"):
        cipm_ir.torch_backend(passes)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(cipm_ir.OptionError, match="no-such-pass"):
        cipm_ir.torch_backend("no-such-pass")
    with pytest.raises(cipm_ir.OptionError, match="no-such-backend"):
        cipm_ir.torch_backend("canonicalize", then="no-such-backend")
