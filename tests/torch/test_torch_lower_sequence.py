"""Attention and recurrent layers: the IR computes what torch computes, and heads and hidden units are found.

The inputs of a case are small; every parameter is drawn anew, so that a swapped gate or a forgotten bias shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")

from tests.torch.torch_running import feeds_of, lowering_error  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from cipm_ir.api import load  # noqa: E402
from cipm_ir.frontends.torch.load import load_torch  # noqa: E402
from cipm_ir.frontends.torch.ops import recurrent as from_torch_ops_recurrent  # noqa: E402
from cipm_ir.frontends.torch.values import OPAQUE  # noqa: E402
from cipm_ir.runtime.session import Runner  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

METHODS = ("symbolic", "export")
TOLERANCE = 1e-5


class Calls(nn.Module):
    """A function of a module (or of none) and of inputs."""

    def __init__(self, function: Callable[..., Any], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.inner = function, inner
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * draw(*parameter.shape, seed=parameter.numel()))
        self.eval()

    def forward(self, a: Any, b: Any = None, c: Any = None, d: Any = None) -> Any:
        given = [x for x in (a, b, c, d) if x is not None]
        return self.function(*given) if self.inner is None else self.function(self.inner, *given)


def draw(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def hidden(*shape: int, keep_first: bool = True) -> Any:
    """Truth values, some False."""
    mask = draw(*shape, seed=7) > -0.3
    if keep_first:
        mask[..., 0] = True
    return mask


def opaque(model: ir.Model) -> list[str]:
    return [f"{n.op_type}: {n.metadata_props.get('reason')}" for n in model.graph if n.domain == OPAQUE]


def check(module: nn.Module, *inputs: Any, method: str = "symbolic") -> Any:
    capture, error = lowering_error(module, *inputs, method=method)
    assert opaque(capture.model) == []
    assert error < TOLERANCE
    return capture


# ---------------------------------------------------------------- scaled dot product
Q, K, V = draw(2, 4, 5, 6), draw(2, 4, 7, 6, seed=1), draw(2, 4, 7, 8, seed=2)
MASKS = [(5, 7), (1, 7), (5, 1), (4, 5, 7), (4, 1, 7), (2, 1, 5, 7), (1, 4, 5, 7), (2, 4, 5, 7), (2, 1, 1, 7)]
SHOWN = torch.tensor([[True], [True], [False], [True], [True]])
sdpa = F.scaled_dot_product_attention
DOT_PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "plain": (sdpa, (Q, K, V)),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), (Q, K, V)),
    "causal, more queries than keys": (lambda q, k, v: sdpa(q, k, v, is_causal=True), (K, Q, draw(2, 4, 5, 3))),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), (Q, K, V)),
    "scale from a size": (lambda q, k, v: sdpa(q, k, v, scale=1 / q.size(-1)), (Q, K, V)),
    "key heads": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (Q, K[:, :2], V[:, :2])),
    "one key head": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (Q, K[:, :1], V[:, :1])),
    "key heads, mask": (lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True),
                        (Q, K[:, :2], V[:, :2], draw(2, 1, 5, 7))),
    "nothing shown": (sdpa, (Q, K, V, hidden(5, 7) & SHOWN)),
    "three axes": (sdpa, (Q[0], K[0], V[0])),
    "three axes, mask": (sdpa, (Q[0], K[0], V[0], hidden(4, 5, 7))),
    "three axes, key heads": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), (Q[0], K[0, :2], V[0, :2])),
    "two axes": (lambda q, k, v: sdpa(q, k, v, is_causal=True), (Q[0, 0], K[0, 0], V[0, 0])),
    "five axes": (sdpa, (draw(3, 2, 4, 5, 6), draw(3, 2, 4, 7, 6), draw(3, 2, 4, 7, 8))),
    "five axes, mask": (sdpa, (draw(3, 2, 4, 5, 6), draw(3, 2, 4, 7, 6), draw(3, 2, 4, 7, 8), hidden(2, 1, 5, 7))),
    "one batch of keys": (sdpa, (Q, K[:1], V[:1], draw(2, 1, 5, 7))),
    "one batch of keys, nothing shown": (sdpa, (Q, K[:1], V[:1], hidden(5, 7) & SHOWN)),
    "float64": (sdpa, (Q.double(), K.double(), V.double())),
    **{f"mask {shape}": (sdpa, (Q, K, V, draw(*shape, seed=3))) for shape in MASKS},
    **{f"truth values {shape}": (sdpa, (Q, K, V, hidden(*shape) if shape[-1] > 1 else hidden(*shape, keep_first=False)))
       for shape in MASKS},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", DOT_PRODUCTS)
def test_scaled_dot_product(case: str, method: str) -> None:
    function, inputs = DOT_PRODUCTS[case]
    check(Calls(function), *inputs, method=method)


def test_the_default_scale_stays_implicit() -> None:
    """What torch takes from the size of the head must not be a number in the IR."""
    for function, given in ((sdpa, False), (DOT_PRODUCTS["scale"][0], True)):
        model = load_torch(Calls(function), (Q, K, V)).model
        (node,) = [n for n in model.graph if n.op_type == "Attention"]
        assert ("scale" in node.attributes) == given


def test_attention_is_causal_on_five_axes_only_in_torch() -> None:
    module = Calls(lambda q, k, v: sdpa(q, k, v, is_causal=True))
    refused(module, *(draw(3, 2, 4, 5, 6) for _ in range(3)), method="symbolic")


# ---------------------------------------------------------------- multi-head attention
X, MEMORY, NARROW = draw(5, 2, 12), draw(7, 2, 12, seed=1), draw(7, 2, 9, seed=2)
PADDED = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
ATTENTIONS: dict[str, tuple[dict[str, Any], Callable[..., Any], tuple[Any, ...]]] = {
    "self": ({}, lambda m, x: m(x, x, x), (X,)),
    "self, no weights": ({}, lambda m, x: m(x, x, x, need_weights=False)[0], (X,)),
    "weights of every head": ({}, lambda m, x: m(x, x, x, average_attn_weights=False), (X,)),
    "batch first": ({"batch_first": True}, lambda m, x, y: m(x, y, y), (X.transpose(0, 1), MEMORY.transpose(0, 1))),
    "no bias": ({"bias": False}, lambda m, x, y: m(x, y, y, need_weights=False)[0], (X, MEMORY)),
    "other widths": ({"kdim": 9, "vdim": 12}, lambda m, x, y, z: m(x, y, z), (X, NARROW, MEMORY)),
    "extra key": ({"add_bias_kv": True}, lambda m, x, y, p: m(x, y, y, key_padding_mask=p), (X, MEMORY, PADDED)),
    "extra zero": ({"add_zero_attn": True}, lambda m, x, y, p: m(x, y, y, key_padding_mask=p, need_weights=False)[0],
                   (X, MEMORY, PADDED)),
    "padding": ({}, lambda m, x, y, p: m(x, y, y, key_padding_mask=p), (X, MEMORY, PADDED)),
    "padding, numbers": ({}, lambda m, x, y, p: m(x, y, y, key_padding_mask=p, need_weights=False)[0],
                         (X, MEMORY, draw(2, 7))),
    "mask": ({}, lambda m, x, y, a: m(x, y, y, attn_mask=a), (X, MEMORY, ~hidden(5, 7))),
    "mask, no weights": ({}, lambda m, x, y, a: m(x, y, y, attn_mask=a, need_weights=False)[0],
                         (X, MEMORY, ~hidden(5, 7))),
    "mask per head": ({}, lambda m, x, y, a: m(x, y, y, attn_mask=a, need_weights=False)[0],
                      (X, MEMORY, draw(6, 5, 7))),
    "both masks": ({}, lambda m, x, p, a: m(x, x, x, key_padding_mask=p, attn_mask=a, need_weights=False)[0],
                   (X, PADDED[:, 2:], ~hidden(6, 5, 5))),
    "causal": ({}, lambda m, x, a: m(x, x, x, attn_mask=a, is_causal=True, need_weights=False)[0],
               (X, torch.triu(torch.full((5, 5), -torch.inf), 1))),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_multihead_attention(case: str, method: str) -> None:
    options, function, inputs = ATTENTIONS[case]
    check(Calls(function, nn.MultiheadAttention(12, 3, **options)), *inputs, method=method)


@pytest.mark.parametrize("separate", [False, True])
def test_multi_head_attention_forward(separate: bool) -> None:
    """The function, with parameters of one's own."""
    layer = nn.MultiheadAttention(12, 3, kdim=9 if separate else None, vdim=9 if separate else None)

    def attend(m: Any, x: Any, y: Any) -> Any:
        return F.multi_head_attention_forward(
            x, y, y, 12, 3, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.1, m.out_proj.weight,
            m.out_proj.bias, training=False, need_weights=True, use_separate_proj_weight=separate,
            q_proj_weight=m.q_proj_weight, k_proj_weight=m.k_proj_weight, v_proj_weight=m.v_proj_weight,
        )  # fmt: skip

    check(Calls(attend, layer), X, NARROW if separate else MEMORY)


# ---------------------------------------------------------------- recurrent layers
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers": {"num_layers": 2, "dropout": 0.1},
    "batch first": {"batch_first": True},
    "both directions": {"bidirectional": True, "num_layers": 2, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
}
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LAYERS)
def test_recurrent_layer(case: str, kind: str, method: str) -> None:
    check(Calls(lambda m, x: m(x), KINDS[kind](12, 4, **LAYERS[case])), X, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", LAYERS)
def test_projections(case: str, method: str) -> None:
    check(Calls(lambda m, x: m(x), nn.LSTM(12, 4, proj_size=3, **LAYERS[case])), X, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_initial_states(kind: str, method: str) -> None:
    layer = KINDS[kind](12, 4, num_layers=2, bidirectional=True)
    h, c = draw(4, 2, 4, seed=1), draw(4, 2, 4, seed=2)
    if kind == "LSTM":
        check(Calls(lambda m, x, h, c: m(x, (h, c)), layer), X, h, c, method=method)
    else:
        check(Calls(lambda m, x, h: m(x, h), layer), X, h, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_recurrent_variants(method: str) -> None:
    check(Calls(lambda m, x: m(x), nn.RNN(12, 4, nonlinearity="relu", bidirectional=True)), X, method=method)
    check(Calls(lambda m, x: m(x), nn.LSTM(12, 4, batch_first=True)), X[:, 0], method=method)
    check(Calls(lambda m, x, h: m(x, h), nn.GRU(12, 4, num_layers=2)), X[:, 0], draw(2, 4), method=method)


CELLS: dict[str, Callable[[], Any]] = {
    "LSTMCell": lambda: nn.LSTMCell(12, 4),
    "LSTMCell, no bias": lambda: nn.LSTMCell(12, 4, bias=False),
    "GRUCell": lambda: nn.GRUCell(12, 4),
    "GRUCell, no bias": lambda: nn.GRUCell(12, 4, bias=False),
    "RNNCell": lambda: nn.RNNCell(12, 4),
    "RNNCell, relu": lambda: nn.RNNCell(12, 4, nonlinearity="relu"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CELLS)
def test_cell(case: str, method: str) -> None:
    """Without a state, with one, and without a batch axis."""
    h, c = draw(5, 4, seed=1), draw(5, 4, seed=2)
    check(Calls(lambda m, x: m(x), CELLS[case]()), X[:, 0], method=method)
    if case.startswith("LSTM"):
        check(Calls(lambda m, x, h, c: m(x, (h, c)), CELLS[case]()), X[:, 0], h, c, method=method)
        check(Calls(lambda m, x, h, c: m(x, (h, c)), CELLS[case]()), X[0, 0], h[0], c[0], method="symbolic")
    else:
        check(Calls(lambda m, x, h: m(x, h), CELLS[case]()), X[:, 0], h, method=method)
        check(Calls(lambda m, x, h: m(x, h), CELLS[case]()), X[0, 0], h[0], method="symbolic")


def test_a_wrong_order_of_gates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of the comparison with torch."""
    monkeypatch.setitem(from_torch_ops_recurrent._ORDER, "LSTM", (0, 3, 2, 1))
    _, error = lowering_error(Calls(lambda m, x: m(x), nn.LSTM(12, 4)), X, method="symbolic")
    assert error > 1e-2


# ---------------------------------------------------------------- refused
def refused(module: nn.Module, *inputs: Any, method: str) -> None:
    """The use becomes an opaque node, and the program can still be analysed."""
    capture = load_torch(module, inputs, method=method)
    assert opaque(capture.model)
    assert Program.of(capture.model).opaque


@pytest.mark.parametrize("method", METHODS)
def test_projections_with_given_states_are_refused(method: str) -> None:
    """The recurrent weights are multiplied by the projection, which a state that is given did not go through."""
    h, c = draw(1, 2, 3, seed=1), draw(1, 2, 4, seed=2)
    refused(Calls(lambda m, x, h, c: m(x, (h, c))[0], nn.LSTM(12, 4, proj_size=3)), X, h, c, method=method)


def test_attention_without_a_batch_is_refused() -> None:
    refused(Calls(lambda m, x: m(x, x, x)[0], nn.MultiheadAttention(12, 3)), X[:, 0], method="symbolic")


# ---------------------------------------------------------------- symmetry
class Between(nn.Module):
    """A layer between two linear ones: what is inside is free."""

    def __init__(self, layer: nn.Module, width: int, use: Callable[..., Any]) -> None:
        super().__init__()
        self.before, self.layer, self.after, self.use = nn.Linear(12, 12), layer, nn.Linear(width, 3), use

    def forward(self, x: Any) -> Any:
        return self.after(self.use(self.layer, self.before(x)))


def spaces(program: Program) -> list[tuple[str, int]]:
    return [(s.kind, s.size) for s in program.spaces]


def acted(capture: Any, *inputs: Any) -> tuple[float, bool]:
    """What a random element of the full group changes in the outputs, and whether it changed any parameter."""
    program = Program.of(capture.model)
    rng = np.random.default_rng(0)
    moved = program.act({space: space.random(rng) for space in program.spaces}).emit()
    feeds, runs = feeds_of(capture, inputs, {}), []
    for model in (capture.model, moved):
        with Runner(model) as runner:
            runs.append(list(runner.run(feeds).values()))
    scale = max(float(np.abs(a).max()) for a in runs[0])
    change = max(float(np.abs(a - b).max()) for a, b in zip(*runs, strict=True)) / scale
    old, new = (
        {name: np.asarray(value.const_value) for name, value in model.graph.initializers.items()}
        for model in (capture.model, moved)
    )
    return change, any(not np.array_equal(old[name], array) for name, array in new.items() if name in old)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions", [1, 2])
def test_hidden_units_are_free(directions: int, kind: str, method: str) -> None:
    layer = KINDS[kind](12, 4, bidirectional=directions == 2)
    net = Between(layer, 4 * directions, lambda m, x: m(x)[0]).eval()
    capture = check(net, X, method=method)
    program = Program.of(capture.model)
    assert not program.opaque
    assert ("units", 4) in spaces(program) and ("units", 12) in spaces(program)
    change, moved = acted(capture, X)
    assert moved and change < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("directions", [1, 2])
def test_cells_and_projected_units_are_free(directions: int, method: str) -> None:
    layer = nn.LSTM(12, 4, proj_size=3, bidirectional=directions == 2)
    net = Between(layer, 3 * directions, lambda m, x: m(x)[0]).eval()
    capture = check(net, X, method=method)
    program = Program.of(capture.model)
    assert not program.opaque
    assert spaces(program).count(("units", 4)) == directions and ("units", 3) in spaces(program)
    change, moved = acted(capture, X)
    assert moved and change < TOLERANCE


def test_a_projected_layer_keeps_its_class_when_it_shrinks() -> None:
    net = Between(nn.LSTM(12, 8, proj_size=3), 3, lambda m, x: m(x)[0]).eval()
    program = load(net, (X,))
    cells = next(space for space in program.spaces if space.size == 8)
    emitted = program.origin.emit(program.restrict({cells: np.arange(6)}).emit())  # type: ignore[union-attr]
    assert (emitted.form, emitted.proof) == ("module", "same graph")
    assert (emitted.object.layer.hidden_size, emitted.object.layer.proj_size) == (6, 3)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True}, {"kdim": 12, "vdim": 12}])
def test_heads_are_blocks_and_their_units_are_free(options: dict[str, Any], need_weights: bool) -> None:
    layer = nn.MultiheadAttention(12, 3, **options)
    net = Between(layer, 12, lambda m, x: m(x, x, x, need_weights=need_weights)[0]).eval()
    capture = check(net, X)
    program = Program.of(capture.model)
    assert not program.opaque
    assert spaces(program).count(("blocks", 3)) == 1
    assert spaces(program).count(("units", 4)) == 6  # per head one for queries and keys, one for values
    change, moved = acted(capture, X)
    assert moved and change < TOLERANCE


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_units_of_a_cell_are_free(kind: str) -> None:
    def steps(m: Any, x: Any) -> Any:
        state = m(x[0], (x[2, :, :4], x[3, :, :4])) if kind == "LSTMCell" else m(x[0])
        return (m(x[1], state)[0]) if kind == "LSTMCell" else m(x[1], state)

    net = Between(CELLS[kind](), 4, steps).eval()
    capture = check(net, X)
    assert kind == "LSTMCell" or ("units", 4) in spaces(Program.of(capture.model))
    change, moved = acted(capture, X)
    assert moved and change < TOLERANCE
