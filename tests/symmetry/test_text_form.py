"""The text form: golden dumps, the same in every process; the networkx form; what is written for graph viewers.

After a wanted change of the form, CIPM_UPDATE_GOLDEN=1 rewrites the files in tests/golden; read the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from tests import zoo
from tests.paths import ROOT
from tests.symmetry.test_soundness import program_of
from tests.zoo.net import Net

from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.short_names import repeats, short_names

GOLDEN = Path(__file__).parent / "golden"

# Models in ONNX's own text syntax: weights are made by ConstantOfShape, which the analysis takes for parameters.
TEXTS = {
    "text_residual": """
        <ir_version: 8, opset_import: ["" : 17]>
        residual (float[N, T, 4] x) => (float[N, T, 2] y)
        <int64[2] w_shape = {4, 6}, int64[1] b_shape = {6}, int64[2] v_shape = {6, 6}, int64[2] o_shape = {6, 2}> {
            w = ConstantOfShape <value: tensor = float[1] {0.5}> (w_shape)
            b = ConstantOfShape (b_shape)
            v = ConstantOfShape <value: tensor = float[1] {0.25}> (v_shape)
            o = ConstantOfShape <value: tensor = float[1] {1.0}> (o_shape)
            xw = MatMul (x, w)
            stream = Add (xw, b)
            inner = Relu (stream)
            update = MatMul (inner, v)
            sum = Add (stream, update)
            y = MatMul (sum, o)
        }
    """,
    "text_opaque": """
        <ir_version: 8, opset_import: ["" : 17, "acme" : 1]>
        opaque (float[batch, 3, height, width] image) => (float[batch, 5, h, w] y)
        <int64[4] k_shape = {8, 3, 3, 3}, int64[4] q_shape = {6, 8, 1, 1}, int64[4] r_shape = {5, 6, 1, 1}> {
            k = ConstantOfShape <value: tensor = float[1] {0.1}> (k_shape)
            q = ConstantOfShape <value: tensor = float[1] {0.2}> (q_shape)
            r = ConstantOfShape <value: tensor = float[1] {0.3}> (r_shape)
            c = Conv <pads: ints = [1, 1, 1, 1]> (image, k)
            up = acme.FancyOp <factor: float = 1.5> (c)
            d = Conv (up, q)
            e = Gelu6 (d)
            f = Tanh (d)
            y = Conv (f, r)
        }
    """,
}
ZOO = (
    "conv_flatten_gemm",
    "grouped_conv",
    "dense_block",
    "attention_separate",
    "attention_rope_table",
    "shared_zero_bias",
    "reshape_computed_channels",
    "custom_op",
    "if_capture",
    "local_function_twice",
    "lstm",
)
NAMES = (*TEXTS, *ZOO)


def program(name: str) -> Program:
    return program_of(onnx.parser.parse_model(TEXTS[name]) if name in TEXTS else zoo.build(name))


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str) -> None:
    text = str(program(name)) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("CIPM_UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(NAMES)


def test_same_text_in_every_process() -> None:
    """With other hash seeds: nothing may follow the order of a set."""
    names = ["attention_rope_table", "dense_block", "channel_shuffle"]
    code = "from tests import zoo\nfrom tests.symmetry.test_soundness import program_of\n"
    code += f"for n in {names}: print(program_of(zoo.build(n)))"
    root = str(ROOT)
    texts = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    here = "".join(f"{program_of(zoo.build(n))}\n" for n in names)
    assert texts == [here, here]


@pytest.mark.parametrize("name", NAMES)
def test_no_ids_and_no_stand_ins(name: str) -> None:
    """Neither addresses nor the primes that stand in for symbolic sizes may show."""
    one = program(name)
    text = str(one)
    assert "0x" not in text and "object at" not in text
    symbols = one.analysis.walk.shapes.symbols
    declared = {d for t in one.model.graph.initializers.values() for d in (t.shape or ()) if isinstance(d, int)}
    for prime in set(symbols.values()) - declared:
        assert f"[{prime}," not in text and f" {prime}," not in text and f" {prime}]" not in text


def test_the_text_does_not_depend_on_values() -> None:
    """An action changes weights only, so the text stays, but for constants that are shown."""
    one = program("dense_block")
    rng = np.random.default_rng(0)
    assert str(one.act({s: s.random(rng) for s in one.spaces})) == str(one)


def test_dynamic_sizes_are_written_with_the_models_symbols() -> None:
    net = Net("symbols")
    x = net.input("x", ["N", "T", 4])
    token = net.op(
        "Expand", net.const(np.ones((1, 1, 4))), net.op("Concat", net.op("Shape", x, end=1), net.const([1, 4]), axis=0)
    )
    longer = net.op("Concat", token, net.op("Concat", x, x, axis=1), axis=1)
    flat = net.op("Reshape", x, net.const([-1, 4]))
    double = net.op("Concat", flat, flat, axis=0)
    unknown = net.op(
        "Compress", net.op("Reshape", x, net.const([-1])), net.input("flags", ["M"], onnx.TensorProto.BOOL), axis=0
    )
    for value in (longer, double, unknown):
        net.output(net.op("Identity", value), [])
    model = net.model()
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    text = str(program_of(model))
    assert f"%{token} = Expand" in text and "f32[N, 1, 4]" in text
    assert "f32[N*T, 4]" in text and "f32[2*N*T, 4]" in text
    assert "f32[N, 2*T, 4]" in text
    assert "%compress" in text and "f32[?]" in text


def test_networkx_form() -> None:
    one = program("attention_separate")
    graph = one.to_networkx()
    spaces = {node for node, kind in graph.nodes(data="kind") if kind != "parameter"}
    assert spaces == {f"@{s.name}" for s in one.spaces}
    for s in one.spaces:
        assert graph.nodes[f"@{s.name}"]["size"] == s.size and graph.nodes[f"@{s.name}"]["group"] == str(s.group)
        for member in s.members:
            tensor, axis = member[:-1].rsplit("[", 1)
            assert int(axis) in graph.edges[f"@{s.name}", tensor]["axes"]
        if s.parent is not None:
            assert graph.edges[f"@{s.name}", f"@{s.parent[0].name}"]["block"] == s.parent[1]


@pytest.mark.parametrize("name", ["attention_separate", "local_function_twice", "dense_block"])
def test_annotations_for_graph_viewers(name: str) -> None:
    one = program(name)
    proto = ir.to_proto(one.emit(annotate=True))
    onnx.checker.check_model(proto)
    model = {p.key: p.value for p in proto.metadata_props}
    assert model["cipm_ir.spaces"].splitlines() == [str(s) for s in one.spaces]
    nodes = [{p.key: p.value for p in node.metadata_props} for node in proto.graph.node]
    assert any("@" in props.get("cipm_ir.axes", "") for props in nodes)
    weight = one.spaces[0].members[0].rpartition("[")[0]
    read = next(p for p, n in zip(nodes, proto.graph.node, strict=True) if weight in n.input)
    assert f"{weight}: [" in read["cipm_ir.parameters"] and f"@{one.spaces[0].name}" in read["cipm_ir.parameters"]
    assert all("[11," not in props.get("cipm_ir.axes", "") for props in nodes)
    plain = ir.to_proto(one.emit())
    assert not any(p.key.startswith("cipm_ir.") for node in plain.graph.node for p in node.metadata_props)


def stacked(blocks: int) -> Program:
    """Equal blocks of a product, a Relu, a product and a sum, under the long names that an exporter writes."""
    net = Net("stacked")
    h = net.input("x", ["N", 4])
    for _ in range(blocks):
        hidden = net.op("Relu", net.op("MatMul", h, net.weight((4, 6), 4)))
        h = net.op("Add", h, net.op("MatMul", hidden, net.weight((6, 4), 6)))
    net.output(net.op("Tanh", h), ["N", 4])
    model = net.model()
    for node in model.graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = (
                    name if name in ("x", model.graph.output[0].name) else f"jit_main/pjit_body/net/{name}/value:0"
                )
    for tensor in model.graph.initializer:
        tensor.name = f"jit_main/pjit_body/net/{tensor.name}/value:0"
    return program_of(model)


def test_long_names_are_cut_to_unique_ends() -> None:
    one = stacked(2)
    text = str(one)
    space = one.spaces[0].name
    assert space.startswith("jit_main/") and f"named {space}" in text
    assert "@w_1/value:0 : 6" in text and "%w_1/value:0 : f32[4, 6:@w_1/value:0]" in text
    assert text.count("jit_main/") == len(one.spaces)


def test_repeated_blocks_are_shown_once() -> None:
    one = stacked(5)
    lines, folded = str(one).splitlines(), one.text(fold=True).splitlines()
    note = next(line for line in folded if " more of these " in line)
    assert note.startswith("// 4 more of these 4 operators at these sizes, to %")
    assert len(folded) == len(lines) - 4 * 4 + 1
    assert [line for line in folded if line in set(lines)] == [line for line in folded if line != note]


@pytest.mark.parametrize(
    "text", ["", "abc", "abab", "abcd" * 3, "xabcdabcdabcdy", "abcdeabcdf", "aaaaaaaa", "abcd" * 2 + "z" * 9]
)
def test_repeats_cover_what_they_say(text: str) -> None:
    found = repeats(text)
    end = 0
    for start, length, times in found:
        assert start >= end and length >= 4 and times >= 2
        assert text[start : start + length * times] == text[start : start + length] * times
        end = start + length * times
    assert bool(found) == any(a * 2 in text for n in (4, 5) for k in range(len(text)) if len(a := text[k : k + n]) == n)


def test_short_names_are_unique_and_the_shortest() -> None:
    names = ["a/b/c", "d/b/c", "c", "b/c", "e/f", "plain", "x//y", "a/b/c"]
    short = short_names(names)
    assert short["e/f"] == "f" and short["plain"] == "plain" and short["x//y"] == "y"
    assert short["a/b/c"] == "a/b/c" and short["c"] == "c" and short["b/c"] == "b/c"
    assert len(set(short.values())) == len(set(names))


def test_parameters_come_in_order_of_use_and_small_constants_inline() -> None:
    text = str(program_of(zoo.build("attention_separate")))
    names = [line.split()[1] for line in text.splitlines() if line.startswith("param")]
    places = [text.index(f"({name}" if f"({name}" in text else f", {name}") for name in names]
    assert places == sorted(places)
    assert "Mul(%matmul_30, 0.5)" in text and " = 0.5" not in text


def test_blocks_of_other_sizes_or_constants_are_not_folded() -> None:
    """Also where the file notes no shapes, so that only inferred sizes tell them apart."""
    for widths, factors in (([6, 7, 8, 9], [2.0] * 4), ([6] * 4, [2.0, 3.0, 4.0, 5.0])):
        net = Net("unlike")
        h = net.input("x", ["N", 4])
        for width, factor in zip(widths, factors, strict=True):
            hidden = net.op("Mul", net.op("MatMul", h, net.weight((4, width), 4)), net.const(np.float32(factor)))
            h = net.op("Add", h, net.op("MatMul", net.op("Relu", hidden), net.weight((width, 4), width)))
        net.output(net.op("Tanh", h), ["N", 4])
        one = program_of(net.model())
        assert one.text(fold=True) == str(one)
