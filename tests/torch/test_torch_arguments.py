"""Arguments of a forward: named like builtins, by keyword only, in another order, any number of them, with defaults."""

from __future__ import annotations

from typing import Any

import pytest

import cipm_ir

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import nn  # noqa: E402

from cipm_ir.backends.torch.emit import emit_graph  # noqa: E402


class Base(nn.Module):
    """16 hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 4)

    def net(self, x: Any) -> Any:
        return self.b(torch.relu(self.a(x)))


def module(arguments: str, computed: str) -> Any:
    """A module whose forward takes these arguments and gives ``net`` of what is computed of them."""
    names: dict[str, Any] = {"Base": Base, "torch": torch}
    exec(f"class Net(Base):\n    def forward(self, {arguments}):\n        return self.net({computed})", names)
    torch.manual_seed(0)
    return names["Net"]().eval()


GENERATOR = torch.Generator().manual_seed(0)
X, Y, Z = (torch.randn(3, 6, generator=GENERATOR) for _ in range(3))
FORMS: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
    **{name: (f"{name}, other", f"{name} - other", (X, Y), {}) for name in (
        "max", "sum", "type", "id", "filter", "range", "len", "float", "next", "slice", "getattr", "device", "inf",
    )},
    "keyword only": ("x, *, max", "x * max", (X,), {"max": Y}),
    "all by keyword": ("*, x, filter", "x * filter", (), {"x": X, "filter": Y}),
    "keyword only with a default": ("x, *, scale=2.0", "x * scale", (X,), {}),
    "keywords in another order": ("x, y, z", "x - y * z", (), {"z": Z, "y": Y, "x": X}),
    "some keywords in another order": ("x, *, sum, min", "x - sum * min", (X,), {"min": Y, "sum": Z}),
    "keywords as a dictionary": ("x, **kw", "x - kw['type'] * kw['id']", (X,), {"id": Y, "type": Z}),
    "all positions": ("*xs", "xs[0] - xs[1]", (X, Y), {}),
    "all positions, named input": ("*input", "input[0] - input[1]", (X, Y), {}),
    "further positions": ("x, *rest", "x - rest[0] * rest[1]", (X, Y, Z), {}),
    "no further positions": ("x, *rest", "x", (X,), {}),
    "a default": ("x, id=None, type=None", "x if type is None else x * type", (X,), {"type": Y}),
    "position only": ("max, /, id", "max - id", (X, Y), {}),
}  # fmt: skip


@pytest.mark.parametrize("form", list(FORMS))
def test_arguments(form: str) -> None:
    arguments, computed, args, kwargs = FORMS[form]
    net = module(arguments, computed)
    program = cipm_ir.load(net, args, kwargs)
    assert sum(space.size for space in program.spaces if space.kind == "units") == 16
    result = cipm_ir.optimize(program, "canonicalize")
    assert result.emitted is not None and program.origin is not None
    assert (result.emitted.form, result.emitted.proof) == ("module", "same graph")
    graph = emit_graph(program.origin.capture, program.emit())  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = net(*args, **kwargs)
        for made in (result.model, graph):
            torch.testing.assert_close(made(*args, **kwargs), wanted, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(made(*args, **dict(reversed(kwargs.items()))), wanted, rtol=1e-5, atol=1e-6)
