"""What reads the units of a space: when all readers do without some units, the outputs do not notice them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.models.compress_nets import array_of, mlp, names_in, program
from tests.models.dead_units import distance, outputs, program_of
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.passes.pruning.compress.candidates import find_candidates, mask_of
from cipm_ir.passes.pruning.refit.compensation import zero_input_rows
from cipm_ir.passes.pruning.refit.layers import gone_places, layers_of
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.readers import products, readers, weight_uses
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]
NETS = [
    "attention_separate", "attention_gqa", "attention_qkv_major", "attention_rope_table", "attention_einsum",
    "conv_flatten_gemm", "residual_blocks", "zero_pad_shortcut", "unet_concat_skip", "depthwise", "channel_shuffle",
    "dense_block", "repvgg_branches", "gated_mlp", "space_to_depth", "squeeze_excitation", "concat_self",
    "maxout_slices", "gather_repeated", "mlp_transposed_weight", "batch_norm_relu", "layer_norm", "grouped_conv",
]  # fmt: skip


def cut(program: Program, space: Space, kept: Array, leave_out: int = 0) -> Program:
    """The program in which readers do without the other elements; ``leave_out``: so many of the last still read."""
    weights: dict[str, Array] = {}
    found = readers(program, space)
    for reader in found[: len(found) - leave_out]:
        array = weights.get(reader.weight, array_of(program, reader.weight))
        index: list[Any] = [slice(None)] * array.ndim
        index[reader.axis] = np.delete(reader.columns, kept, axis=0).ravel()
        array[tuple(index)] = 0.0
        weights[reader.weight] = array
    return program.refit(weights)


def emptied_program(program: Program, kept: dict[int, Array]) -> Program:
    """Zeros wherever a product reads something that goes."""
    stays = mask_of(program, kept.items())
    weights: dict[str, Array] = {}
    for layer in layers_of(program):
        gone = gone_places(program, layer.reader, stays)
        if len(gone):
            weights.update(zero_input_rows(program, layer, gone))
    return program.refit(weights)


@pytest.mark.parametrize("name", NETS)
def test_what_no_reader_reads_may_go(name: str) -> None:
    """Candidates of compress: zeros in all readers, and the restricted program, give the same outputs."""
    made = program_of(name)
    candidates, _ = find_candidates(made, set(range(len(made.spaces))), 1, 1, 4)
    assert candidates
    rng = np.random.default_rng(0)
    moved = 0.0
    for candidate in candidates:
        number = int(candidate.levels[0])
        kept = {k: np.sort(rng.permutation(made.spaces[k].size)[:number]) for k in candidate.spaces}
        full = emptied_program(made, kept)
        small = full.restrict({full.space(made.spaces[k].name): index for k, index in kept.items()})
        assert small.parameters < made.parameters
        assert distance(outputs(full, name), outputs(small, name)) < 1e-5
        moved = max(moved, distance(outputs(made, name), outputs(small, name)))
    assert moved > 1e-3  # otherwise the outputs would not tell


@pytest.mark.parametrize("name", ["residual_blocks", "two_heads", "gated_mlp", "unet_concat_skip", "dense_block"])
def test_control_one_reader_left_out(name: str) -> None:
    """Of spaces with several readers, the restricted program differs as soon as one of them still reads."""
    made = program_of(name)
    seen = 0
    for space in made.spaces:
        try:
            found = readers(made, space)
        except SymmetryError:
            continue
        kept = np.arange(max(1, space.size // 2))
        small = made.restrict({space: kept})
        whole = cut(made, space, kept)
        if distance(outputs(whole, name), outputs(small, name)) < 1e-5:
            seen += 1
            part = cut(made, space, kept, leave_out=1)
            assert distance(outputs(part, name), outputs(whole, name)) > 1e-3, found[-1]
    assert seen


def test_what_a_reader_tells() -> None:
    made = program(mlp())
    first, second = made.spaces
    (reader,) = readers(made, first)
    node = list(made.model.graph)[reader.node]
    assert (reader.op, node.op_type, reader.axis, reader.columns.shape) == ("Gemm", "Gemm", 1, (12, 1))
    assert [reader.source, reader.weight, reader.bias] == names_in(node) and reader.output == node.outputs[0].name
    assert [r.node for r in (*readers(made, first), *readers(made, second))] == sorted(
        r.node for r in products(made)[1:]
    )


def test_a_channel_owns_its_columns_behind_a_flatten() -> None:
    made = program_of("conv_flatten_gemm")
    space = next(s for s in made.spaces if s.size == 6)
    (reader,) = readers(made, space)
    np.testing.assert_array_equal(reader.columns, np.arange(96).reshape(6, 16))


def test_a_unit_that_is_read_twice_owns_both_places() -> None:
    made = program_of("concat_self")
    (reader,) = readers(made, made.spaces[0])
    np.testing.assert_array_equal(np.sort(reader.columns, axis=1), np.arange(8)[:, None] + np.asarray([0, 8]))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("einsum_layers", "Einsum .* reads @w_1 otherwise than as a product with a weight of its own"),
        ("bilinear_gram", "MatMul .* reads @w_1 otherwise"),
        ("grouped_conv", "Conv .* reads @w_1 otherwise"),
        ("softmax_hidden", None),
    ],
)
def test_refusals(name: str, complaint: str | None) -> None:
    made = program_of(name)
    if complaint is None:  # products read it as well: it is for the caller to see that a softmax sums over it
        assert readers(made, made.space("w_1"))
        _, notes = find_candidates(made, set(range(len(made.spaces))), 1, 1, 4)
        assert any("softmax" in note for note in notes)
        return
    with pytest.raises(SymmetryError, match=complaint):
        readers(made, made.space("w_1"))


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_scaled_or_transposed_gemm_is_no_plain_product(attributes: dict[str, Any]) -> None:
    net = Net("odd")
    x = net.op("Tanh", net.gemm(net.input("x", [4, 6]), 6, 4))
    net.output(net.op("Gemm", x, net.weight((4, 3), 4), net.bias(3), **attributes), [4, 3])
    made = program(net)
    assert len(products(made)) == 1
    for space in made.spaces:
        with pytest.raises(SymmetryError):
            readers(made, space)


def test_a_transpose_read_twice_is_a_tie() -> None:
    """One use of the parameter, two products: neither may be refitted alone."""
    net = Net("turned")
    x = net.input("x", ["N", 6])
    a, b = net.relu(net.gemm(x, 6, 10)), net.op("Tanh", net.gemm(x, 6, 10))
    weight = net.weight((4, 10), 10)
    turned = net.op("Transpose", weight, perm=[1, 0])
    net.output(net.op("MatMul", a, turned), ["N", 4])
    net.output(net.op("MatMul", b, turned), ["N", 4])
    made = program(net)
    assert weight_uses(made)[weight] == 2
    assert weight not in {layer.reader.weight for layer in layers_of(made)}
    candidates, notes = find_candidates(made, set(range(len(made.spaces))), 1, 1, 4)
    assert not candidates and any(f"{weight} is used in several places" in note for note in notes)


def test_control_a_transpose_read_once_is_none() -> None:
    made = program_of("mlp_transposed_weight")
    assert {1} == set(weight_uses(made).values())
    assert len(layers_of(made)) == len(products(made)) == 2
