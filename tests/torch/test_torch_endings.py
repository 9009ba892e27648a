"""Torch programs whose outputs saturate are compared in front of their last activation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cipm_ir  # noqa: E402
from cipm_ir.errors import VerificationError  # noqa: E402
from cipm_ir.passes.framework import registry  # noqa: E402
from cipm_ir.passes.framework.base import Context, Kind, Pass, PassResult  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
SCORES = torch.tensor([200.0, 0.0, -200.0, -300.0])

ENDS: dict[str, Callable[[Any], Any]] = {
    "sigmoid": nn.Sigmoid(),
    "in place": lambda z: z.sigmoid_(),
    "tanh": torch.tanh,
    "softmax": nn.Softmax(-1),
    "clip": nn.Hardtanh(-1e-3, 1e-3),
    "argmax": lambda z: z.argmax(1),
    "rounded": lambda z: torch.sigmoid(z).round(),
    "two heads": lambda z: (z[:, :1], {"probability": z.softmax(1)}),
}


class Scores(nn.Module):
    def __init__(self, end: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.end = nn.Linear(6, 8), nn.Linear(8, 4), end
        with torch.no_grad():
            self.last.bias.copy_(SCORES)

    def forward(self, x: Any) -> Any:
        return self.end(self.last(torch.relu(self.first(x))))


def off(net: Any, by: float, row: int = 2) -> Any:
    """A copy in which one row of the last weight is ``by`` times as large."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.last.weight[row] *= by
    return other


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("exported", [False, True])
def test_what_a_saturated_output_hides_is_seen(end: str, exported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Scores(ENDS[end]).eval()
    pair: list[Any] = [net, off(net, 1.001)]
    if exported:
        pair = [torch.export.export(one, (X,)) for one in pair]
    examples: dict[str, Any] = {} if exported else {"example_inputs": (X,)}
    assert cipm_ir.verify(pair[0], pair[0], **examples).ok
    found = cipm_ir.verify(*pair, **examples)
    assert found.ok is False
    assert any("<" in name and worst[0] > 0 for name, worst in found.outputs.items())
    # Control: with no look in front of the activations, a few of the same runs show nothing.
    monkeypatch.setattr("cipm_ir.backends.torch.origin.endings", lambda *_: [])
    assert cipm_ir.verify(*pair, cases=2, **examples).ok


@pytest.mark.parametrize("end", ["sigmoid", "softmax"])
def test_a_module_beside_its_onnx_file(end: str, tmp_path: Path) -> None:
    net = Scores(ENDS[end]).eval()
    for name, one in (("right", net), ("wrong", off(net, 1.001))):
        torch.onnx.export(one, (X,), tmp_path / f"{name}.onnx", dynamo=True, verbose=False)
    right, wrong = str(tmp_path / "right.onnx"), str(tmp_path / "wrong.onnx")
    for pair, ok in (((net, right), True), ((right, net), True), ((net, wrong), False), ((wrong, net), False)):
        assert cipm_ir.verify(*pair, example_inputs=(X,)).ok is ok


@registry.register("toy-spoil-hidden")
@dataclass(frozen=True)
class SpoilHidden(Pass):
    """Multiplies one row by 1.001, and says that this changes nothing."""

    kind: ClassVar[Kind] = Kind.EXACT

    def run(self, program: Program, ctx: Context) -> PassResult:
        tensor = program.model.graph.initializers["last.weight"].const_value
        assert tensor is not None
        array = tensor.numpy().copy()
        array[2] *= np.float32(1.001)
        return PassResult(program.refit({"last.weight": array}), True, "spoiled")


@pytest.mark.parametrize("end", ["sigmoid", "softmax", "argmax"])
def test_a_pass_that_spoils_a_hidden_row_is_refused(end: str) -> None:
    net = Scores(ENDS[end]).eval()
    assert all(
        step.checked == "verified" for step in cipm_ir.optimize(net, "canonicalize", example_inputs=(X,)).report.steps
    )
    with pytest.raises(VerificationError, match="<"):
        cipm_ir.optimize(net, "toy-spoil-hidden", example_inputs=(X,), on_failure="raise")
