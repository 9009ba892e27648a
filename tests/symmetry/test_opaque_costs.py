"""How many units each opaque node costs: those that nothing else pins."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from tests.zoo.net import Net
from typer.testing import CliRunner

from cipm_ir.cli import app
from cipm_ir.symmetry.pinned import costs_of_opaque, pinned_by_opaque
from cipm_ir.symmetry.program import Program


def net(*unknown: tuple[int, ...]) -> onnx.ModelProto:
    """Layers of 7 and 5 units; each unknown operator reads the ones it is given: 0, 1, or both (a sum)."""
    made = Net("costs")
    made.domains["elsewhere"] = 1
    x = made.input("x", [2, 4])
    hidden = [made.relu(made.linear(x, 4, n)) for n in (7, 5)]
    for h, n in zip(hidden, (7, 5), strict=True):
        made.output(made.linear(h, n, 3), [2, 3])
    for which in unknown:
        out = made.op("Odd", *(hidden[k] for k in which), domain="elsewhere")
        made.output(out, [2, 3])
    return made.model()


def costs(*unknown: tuple[int, ...]) -> tuple[list[int], int]:
    analysis = Program.of(ir.from_proto(net(*unknown))).analysis
    return [units for _, units in costs_of_opaque(analysis)], pinned_by_opaque(analysis)


@pytest.mark.parametrize(
    ("unknown", "each", "together"),
    [
        ((), [], 0),
        (((0,),), [7], 7),
        (((1,), (0,)), [7, 5], 12),  # the dearest first
        (((0, 1),), [12], 12),
        (((0,), (0,)), [0, 0], 7),  # either alone would not free them
        (((0,), (0, 1)), [5, 0], 12),
    ],
)
def test_units_that_a_node_alone_pins(unknown: tuple[tuple[int, ...], ...], each: list[int], together: int) -> None:
    assert costs(*unknown) == (each, together)


def test_what_is_pinned_elsewhere_too_does_not_count() -> None:
    """The hidden units are an output as well: without the node they would still be fixed."""
    made = Net("costs_output")
    made.domains["elsewhere"] = 1
    h = made.relu(made.linear(made.input("x", [2, 4]), 4, 7))
    made.output(h, [2, 7])
    made.output(made.op("Odd", h, domain="elsewhere"), [2, 7])
    analysis = Program.of(ir.from_proto(made.model())).analysis
    assert [units for _, units in costs_of_opaque(analysis)] == [0]


def test_inspect_lists_costs_in_text_and_json(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(net((1,), (0,)), path)
    wanted = ["opaque: 2 nodes, which cost 12 units in all", "opaque, 7 units by itself", "opaque, 5 units by itself"]
    for option, mark in (["--spaces"], "// "), ([], "// "):
        lines = CliRunner().invoke(app, ["inspect", str(path), *option]).output.splitlines()
        shown = [line for line in lines if line.startswith(f"{mark}opaque")]
        assert shown[0] == mark + wanted[0]
        assert [line.split(": ")[0] for line in shown[1:]] == [mark + one for one in wanted[1:]]
    found = json.loads(CliRunner().invoke(app, ["inspect", str(path), "--json"]).output)
    assert [one["units"] for one in found["opaque"]] == [7, 5]
    assert found["units_pinned_by_opaque"] == 12
