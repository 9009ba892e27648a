"""The names that torch's exporter takes from Linear weights come back, and only where they are certain."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="needs torch, the exporter whose names are recovered")

from tests.torch.torch_exporter import drawn, exported  # noqa: E402
from tests.zoo import minilm  # noqa: E402
from tests.zoo.exported import data_file  # noqa: E402
from tests.zoo.registry import UnavailableError  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from cipm_ir.api import load  # noqa: E402
from cipm_ir.passes import CleanUp, RecoverNames, run_passes  # noqa: E402
from cipm_ir.passes.framework.base import Context  # noqa: E402
from cipm_ir.symmetry.program import Program  # noqa: E402

Array = np.ndarray[Any, Any]
FX, SCOPES, CLASSES = (f"pkg.torch.onnx.{name}" for name in ("fx_node", "name_scopes", "class_hierarchy"))
FOLDED = "pkg.onnxscript.optimizer.folded_from"
X = (2, 3, 4)


def export(module: Any, x: Any, *, optimize: bool = True) -> Program:
    """The export of a module in inference mode, its weights drawn anew."""
    return load(exported(drawn(module), (x,), optimize=optimize).model_proto)


GENERATOR = torch.Generator().manual_seed(0)


def floats(*shape: int) -> Any:
    return torch.randn(shape, generator=GENERATOR)


class Net(nn.Module):
    """Named parts and a function that calls them."""

    def __init__(self, forward: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, x: Any) -> Any:
        return self._forward(self, x)


def recover(program: Program) -> tuple[Program, Mapping[str, str], Mapping[str, str]]:
    """The program after the pass (the pipeline has verified it), old to new names, and the refusals."""
    outcome = run_passes(program, [RecoverNames()])
    (step,) = outcome.report.steps
    assert step.checked == ("verified" if step.metrics["renamed"] else "unchanged")
    return outcome.program, step.metrics["renamed"], step.metrics["left"]


def arrays(program: Program) -> dict[str, Array]:
    tensors = {name: value.const_value for name, value in program.emit().graph.initializers.items()}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def check_values(program: Program, renamed: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Each recovered initializer is the transpose of the state_dict's tensor of that name, bit for bit."""
    found = arrays(program)
    for name in renamed.values():
        np.testing.assert_array_equal(found[name], state[name].detach().numpy().T, err_msg=name)


def layers() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4, bias=False))


def encoder_layer() -> Any:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def encoder() -> Any:
    return nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)


def bert() -> Any:
    transformers = pytest.importorskip("transformers", reason="BERT comes from transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return Net(lambda net, ids: net.m(ids).last_hidden_state, m=transformers.BertModel(config, add_pooling_layer=False))


def mixed() -> Any:
    def forward(net: Any, x: Any) -> Any:
        return net.f(net.norm(net.conv(x).flatten(2).mT) @ net.p)

    return Net(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.LayerNorm(4), p=nn.Parameter(floats(4, 7)), f=nn.Linear(7, 2))


def attention() -> Any:
    return Net(
        lambda net, x: net.o(net.m(x, x, x)[0]), m=nn.MultiheadAttention(8, 2, batch_first=True), o=nn.Linear(8, 3)
    )


def functional() -> Any:
    return Net(lambda net, x: net.L(F.linear(x, net.w)), w=nn.Parameter(floats(5, 4)), L=nn.Linear(5, 3))


def twice() -> Any:
    return Net(lambda net, x: net.a(net.a(x).relu()), a=nn.Linear(4, 4))


def tied() -> Any:
    net: Any = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    net.b.weight = net.a.weight
    return net


def one_spelling() -> Any:
    """``a.weight`` and ``a_weight`` are one spelling; torch numbers the second."""
    net = Net(lambda net, x: F.linear(net.a(x), net.a_weight), a=nn.Linear(4, 4))
    net.a_weight = nn.Parameter(floats(4, 4))
    return net


BERT = (
    *(f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")),
    *("intermediate.dense", "output.dense"),
)
NETS: dict[str, tuple[Callable[[], Any], Any, set[str]]] = {
    "layers": (layers, floats(*X), {"0.weight", "2.weight"}),
    "matrix": (layers, floats(3, 4), set()),  # Gemm takes the weight as it is: nothing was renamed
    "root": (lambda: nn.Linear(4, 3), floats(*X), {"weight"}),
    "mixed": (mixed, floats(2, 3, 6, 6), {"f.weight"}),
    "functional": (functional, floats(*X), {"w", "L.weight"}),
    "twice": (twice, floats(*X), {"a.weight"}),
    "one_spelling": (one_spelling, floats(*X), {"a.weight", "a_weight"}),
    "attention": (attention, floats(2, 5, 8), {"m.in_proj_weight", "o.weight"}),
    "encoder_layer": (
        encoder_layer,
        floats(2, 5, 8),
        {"self_attn.in_proj_weight", "linear1.weight", "linear2.weight"},
    ),
    "encoder": (
        encoder,
        floats(2, 5, 8),
        {
            f"layers.{k}.{name}"
            for k in (0, 1)
            for name in ("self_attn.in_proj_weight", "linear1.weight", "linear2.weight")
        },
    ),
    "bert": (
        bert,
        torch.arange(10).reshape(2, 5),
        {f"m.encoder.layer.{k}.{name}.weight" for k in (0, 1) for name in BERT},
    ),
}


@functools.cache
def _exported_once(name: str) -> tuple[Any, bytes]:
    build, x, _ = NETS[name]
    module = drawn(build())
    return module, exported(module, (x,)).model_proto.SerializeToString()


def exported_net(name: str) -> tuple[Any, Program]:
    """One of the nets and its export: exported once, a program of its own for every test."""
    module, proto = _exported_once(name)
    return module, load(onnx.load_model_from_string(proto))


@pytest.mark.models
@pytest.mark.parametrize("name", NETS)
def test_every_linear_weight_is_recovered(name: str) -> None:
    expected = NETS[name][2]
    module, program = exported_net(name)
    before = set(arrays(program))
    after, renamed, left = recover(program)
    assert set(renamed.values()) == expected and not left
    assert all(old.startswith("val_") for old in renamed)
    assert set(arrays(after)) == (before - set(renamed)) | expected
    check_values(after, renamed, module.state_dict())


@pytest.mark.models
@pytest.mark.parametrize("name", NETS)
def test_without_the_note_on_the_value_the_scopes_tell(name: str) -> None:
    """Older exporters do not write what a value was folded from."""
    expected = NETS[name][2]
    module, program = exported_net(name)
    model = program.emit()
    for value in model.graph.initializers.values():
        value.metadata_props.pop(FOLDED, None)
    after, renamed, _ = recover(Program.of(model))
    # A weight of no module, and a spelling of two parameters, cannot be told.
    assert set(renamed.values()) == expected - {"w", "a_weight"} - ({"a.weight"} if name == "one_spelling" else set())
    check_values(after, renamed, module.state_dict())


@pytest.mark.models
def test_tied_linears_have_the_name_that_the_exporter_knows() -> None:
    module = tied()
    after, renamed, left = recover(export(module, floats(*X)))
    assert len(renamed) == 1 and not left
    check_values(after, renamed, module.state_dict())


@pytest.mark.models
def test_after_our_own_folding_of_transposes() -> None:
    module = layers()
    program = export(module, floats(*X), optimize=False)
    assert recover(program)[1] == {}
    cleaned = run_passes(program, [CleanUp()]).program
    after, renamed, left = recover(cleaned)
    assert set(renamed.values()) == {"0.weight", "2.weight"} and not left
    check_values(after, renamed, module.state_dict())


@pytest.mark.models
def test_the_program_that_came_in_keeps_its_names() -> None:
    """Clones share their tensors, and onnx_ir's renaming of a value renames its tensor."""
    _, program = exported_net("layers")
    after = recover(program)[0]
    for one in (program, after):
        for name, value in one.model.graph.initializers.items():
            assert value.name == name and value.const_value is not None and value.const_value.name == name
    assert any(name.startswith("val_") for name in program.model.graph.initializers)


@pytest.mark.models
def test_what_is_said() -> None:
    _, program = exported_net("layers")
    result = RecoverNames().run(program, Context())
    assert "2 weights" in result.summary and "transposed" in result.summary
    assert set(result.witness["renamed"].values()) == {"0.weight", "2.weight"} == set(result.witness["transposed"])
    assert result.metrics["layout"] == "transposed" and set(result.metrics["renamed"]) <= set(arrays(program))
    again = RecoverNames().run(result.program, Context())
    assert not again.changed and again.program is result.program and not again.metrics["left"]


# --- refused --------------------------------------------------------------------------------------


def edited(change: Callable[[ir.Node], None]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """What is found in an export of two Linears after a change to the node of the first."""
    model = exported_net("layers")[1].emit()
    change(next(node for node in model.graph if node.op_type == "MatMul"))
    _, renamed, left = recover(Program.of(model))
    return renamed, left


def strip(*keys: str) -> Callable[[ir.Node], None]:
    def change(node: ir.Node) -> None:
        for key in keys:
            del node.metadata_props[key]

    return change


def respell(node: ir.Node) -> None:
    node.metadata_props[FX] = node.metadata_props[FX].replace("%p_0_weight", "%p_1_weight")


def compute(node: ir.Node) -> None:
    node.metadata_props[FX] = node.metadata_props[FX].replace("%p_0_weight", "%abs_1")


def unread(node: ir.Node) -> None:
    """The note on the value is gone, and the scopes cannot be read."""
    value = node.inputs[1]
    assert value is not None
    del value.metadata_props[FOLDED]
    node.metadata_props[SCOPES] = "['', '0', "


def same_source(node: ir.Node) -> None:
    """Both weights say that they are the second one."""
    other = [one for one in (node.graph or ()) if one.op_type == "MatMul"][1]
    for key in (FX, SCOPES, CLASSES):
        node.metadata_props[key] = other.metadata_props[key]
    first, second = node.inputs[1], other.inputs[1]
    assert first is not None and second is not None
    first.metadata_props[FOLDED] = second.metadata_props[FOLDED]


def disagree(node: ir.Node) -> None:
    """The second MatMul reads the weight of the first; their sizes are the same."""
    other = [one for one in (node.graph or ()) if one.op_type == "MatMul"][1]
    other.replace_input_with(1, node.inputs[1])


def disagree_without_note(node: ir.Node) -> None:
    value = node.inputs[1]
    assert value is not None
    del value.metadata_props[FOLDED]
    disagree(node)


@pytest.mark.models
@pytest.mark.parametrize(
    ("change", "kept", "reason"),
    [
        (strip(FX, SCOPES, CLASSES), 1, "has no note"),
        (strip(FX), 1, "has no note"),
        (respell, 1, "folded from '0.weight', but node"),
        (compute, 1, "has no note"),
        (unread, 1, "does not tell in which module"),
        (same_source, 2, "2 weights would be called '2.weight'"),
        (disagree, 1, "folded from '0.weight', but node"),
        (disagree_without_note, 1, "stand for different weights: 0.weight, 2.weight"),
    ],
)
def test_refused_where_the_notes_do_not_tell(change: Callable[[ir.Node], None], kept: int, reason: str) -> None:
    renamed, left = edited(change)
    assert len(left) == kept and all(reason in why for why in left.values()), left
    assert "0.weight" not in renamed.values()


@pytest.mark.models
def test_equal_weights_of_two_modules_are_refused() -> None:
    """The exporter stores them once, so the tensor has two names."""
    net: Any = Net(lambda net, x: net.b(net.a(x).relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    net.b.load_state_dict(net.a.state_dict())
    _, renamed, left = recover(load(exported(net, (floats(*X),)).model_proto))
    assert not renamed and ["folded from 'a.weight'" in why for why in left.values()] == [True]


@pytest.mark.models
def test_a_tied_embedding_keeps_the_name() -> None:
    net: Any = Net(
        lambda net, ids: net.h(net.a(net.e(ids))), e=nn.Embedding(11, 8), a=nn.Linear(8, 8), h=nn.Linear(8, 11)
    )
    net.h.weight = net.e.weight
    _, renamed, left = recover(export(net, torch.arange(10).reshape(2, 5)))
    assert set(renamed.values()) == {"a.weight"}
    assert ["another value is called" in why for why in left.values()] == [True]


@pytest.mark.models
def test_computed_weights_and_buffers_are_refused() -> None:
    def forward(net: Any, x: Any) -> Any:
        return F.linear(x, net.a.weight.abs()) + F.linear(x, net.table) + x @ net.a.weight.t() + net.normed(x)

    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    net = Net(forward, a=nn.Linear(4, 4), normed=normed)
    net.register_buffer("table", floats(4, 4))
    _, renamed, left = recover(export(net, floats(*X)))
    assert not renamed and len(left) == 4


@pytest.mark.models
def test_inputs_and_outputs_of_the_graph_keep_their_names() -> None:
    for place in ("inputs", "outputs"):
        model = exported_net("layers")[1].emit()
        (value,) = (v for name, v in model.graph.initializers.items() if v.metadata_props.get(FOLDED) == "['0.weight']")
        getattr(model.graph, place).append(value)
        result = RecoverNames().run(Program.of(model), Context())
        assert set(result.metrics["renamed"].values()) == {"2.weight"}
        assert result.metrics["left"] == {value.name: "it is an input or output of the graph"}


# --- trained and given models ---------------------------------------------------------------------


@pytest.mark.models
def test_all_36_weights_of_minilm() -> None:
    pytest.importorskip("transformers", reason="MiniLM is a BERT of transformers")
    from safetensors.numpy import load_file

    try:
        program = load(minilm.build())
        state = load_file(minilm._weights_folder() / "model.safetensors")
    except UnavailableError as error:
        pytest.skip(str(error))
    result = RecoverNames().run(program, Context())
    renamed = result.metrics["renamed"]
    assert len(renamed) == 36 and not result.metrics["left"]
    found = arrays(result.program)
    for name in renamed.values():
        np.testing.assert_array_equal(found[name], state[name.removeprefix("encoder.")].T, err_msg=name)


@pytest.mark.models
@pytest.mark.parametrize(("name", "weights"), [("bert", 12), ("bert_shared_bias", 12), ("vit", 12), ("llama_gqa", 15)])
def test_given_graphs(name: str, weights: int) -> None:
    try:
        program = load(data_file(f"graphs/{name}.onnx"))
    except UnavailableError as error:
        pytest.skip(str(error))
    _, renamed, left = recover(program)
    assert len(renamed) == weights == len([new for new in renamed.values() if new.endswith(".weight")]) and not left
