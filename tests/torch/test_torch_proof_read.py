"""How programs of torch are read for the proof, and what is written of them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.torch.torch_proof_nets import NEAR, NETS, apart, drawn, mlp, real_inputs, run  # noqa: E402
from torch import Tensor, fx, nn  # noqa: E402

import cipm_ir  # noqa: E402

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
