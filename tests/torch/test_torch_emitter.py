"""Single nodes written into a given torch graph, sizes as integers, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="the backend under test writes torch graphs")

from tests.torch.test_torch_from_onnx import emitted, of_text  # noqa: E402
from torch import fx, nn  # noqa: E402

from cipm_ir.backends.torch.emitter import Emitter  # noqa: E402
from cipm_ir.backends.torch.places import attribute_at  # noqa: E402
from cipm_ir.errors import InputError, UnsupportedError  # noqa: E402


def test_emit_into_a_torch_graph() -> None:
    """One node is written anew in a program of torch's own; tensors that the root has are used as they are."""
    model = ir.from_proto(of_text("""g (float[N,4] x) => (float[N,3] y) {
        h = Relu (x)
        t = Transpose <perm = [1, 0]> (fc.weight)
        z = MatMul (h, t)
        y = Add (z, fc.bias)
    }""".replace("fc.", "fc_"), fc_weight=np.zeros((3, 4), np.float32), fc_bias=np.zeros(3, np.float32)))  # fmt: skip
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").replace("_", ".")
    root = nn.Module()
    root.add_module("fc", nn.Linear(4, 3))
    graph = fx.Graph()
    x = graph.placeholder("x")
    known = {"h": graph.call_function(torch.tanh, (x,))}
    emitter = Emitter(root, graph, model, known)
    emitter.emit(model.graph[2])
    graph.output(known["z"])
    module = fx.GraphModule(root, graph)
    data = torch.randn(2, 4)
    weight = attribute_at(root, "fc.weight")
    assert weight is not None and torch.equal(module(data), torch.tanh(data) @ weight.T)
    assert [name for name, _ in module.named_parameters()] == ["fc.weight"]


def test_emit_keeps_sizes_as_integers() -> None:
    model = ir.from_proto(of_text("""g (float[N,4] x) => (float[N,2,2] y) {
        s = Shape <end = 1> (x)
        t = Concat <axis = 0> (s, two, two)
        y = Reshape (x, t)
    }""", two=np.array([2])))  # fmt: skip
    graph = fx.Graph()
    emitter = Emitter(nn.Module(), graph, model, {"x": graph.placeholder("x")})
    for node in model.graph:
        emitter.emit(node)
    assert emitter.constant(model.graph[1].inputs[1]) is not None
    assert emitter.constant(model.graph[1].outputs[0]) is None
    assert emitter.shape(model.graph[0].inputs[0]) == (None, 4)
    reshape = emitter.known["y"]
    assert isinstance(reshape.args[1], list) and reshape.args[1][1:] == [2, 2]
    graph.output((reshape, emitter.known["t"]))
    out, sizes = fx.GraphModule(nn.Module(), graph)(torch.zeros(3, 4))
    assert out.shape == (3, 2, 2) and sizes.tolist() == [3, 2, 2] and sizes.dtype is torch.int64


def test_expand_as_torchscript_exports_it() -> None:
    """-1 in the target of an expand is replaced at run time by the size of the input: all of it on integers."""
    model = of_text(
        """g (float[N,1,4] x) => (float[N,M,4] y) {
        n = Shape <end = 1> (x)
        t = Concat <axis = 0> (n, three, minus)
        r = Shape (t)
        ones = ConstantOfShape <value = int64[1] {1}> (r)
        m = Constant <value_int = -1> ()
        neg = Mul (ones, m)
        e = Equal (t, neg)
        s = Where (e, ones, t)
        y = Expand (x, s)
    }""",
        three=np.array([3]),
        minus=np.array([-1]),
    )
    module = emitted(model)
    assert {n.target for n in module.graph.nodes} == {"x", "expand", "output"}
    assert module(torch.zeros(2, 1, 4)).shape == (2, 3, 4)


def test_a_size_of_a_traced_program_is_taken_as_a_number() -> None:
    """Where the node that stands for a value computes a Python integer, so does what is emitted from it."""
    model = ir.from_proto(of_text("g (float[N,4] x, int64[1] n) => (float[M] y) { y = Reshape (x, n) }"))
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_method("numel", (x,))
    size.meta["val"] = 8
    emitter = Emitter(nn.Module(), graph, model, {"x": x, "n": size})
    emitter.emit(model.graph[0])
    assert emitter.known["y"].args[1] == [size]


def test_unknown_input() -> None:
    model = ir.from_proto(of_text("g (float[N] x) => (float[N] y) { y = Relu (x) }"))
    with pytest.raises(InputError, match="'x' is an input that has no node"):
        Emitter(nn.Module(), fx.Graph(), model).emit(model.graph[0])


# ---------------------------------------------------------------- refusals
REFUSALS = {
    "Bernoulli": ("y = Bernoulli (x)", "has no torch entry"),
    "training": ("y, m, v = BatchNormalization <training_mode = 1> (x, w, w, w, w)", "only inference"),
    "pads": ("i = Cast <to = 7> (w) \n y = Pad (x, i)", "pads are computed from data"),
    "shape": ("i = Cast <to = 7> (w) \n y = Reshape (x, i)", "target shape is computed from data"),
    "dilated": (
        "y = AveragePool <kernel_shape = [2, 2], dilations = [2, 1]> (x)",
        "no dilated average pool",
    ),
    "indices": ("y, i = MaxPool <kernel_shape = [2, 2]> (x) \n z = Add (i, i)", "output 1 .* no counterpart"),
    "lengths": (
        "t = Squeeze (x, o) \n i = Cast <to = 6> (w) \n y = LSTM <hidden_size = 1> (t, f, g, , i)",
        "length of each sequence",
    ),
    "activations": (
        'y = RNN <hidden_size = 1, activations = ["Sigmoid"]> (x, f, g)',
        "no kernel with the activations",
    ),
    "corners": (
        'y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (x, , q)',
        "sizes that the scales do not meet",
    ),
    "antialias": ('y = Resize <mode = "linear", antialias = 1> (x, , k)', "antialiasing"),
    "reduction": ('y = ScatterND <reduction = "max"> (x, n, u)', "no index_put with reduction"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str) -> None:
    body, reason = REFUSALS[name]
    model = of_text(
        f"g (float[1,3,4,4] x) => (float y) {{ {body} }}",
        w=np.ones(3, np.float32), o=np.array([0]), f=np.ones((1, 4, 4), np.float32), g=np.ones((1, 4, 1), np.float32),
        k=np.ones(4, np.float32), q=np.array([1, 1, 0.6, 0.6], np.float32), n=np.array([[0]]),
        u=np.ones((1, 3, 4, 4), np.float32),
    )  # fmt: skip
    if name == "indices":
        model.graph.output[0].name = "z"
    with pytest.raises(UnsupportedError, match=reason):
        emitted(model)
