"""Dense groups where a weight is a stack of matrices: a change of basis for each head or expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from tests import zoo
from tests.symmetry.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.algebra import DenseElement
from cipm_ir.symmetry.primitives.act import act_edits
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.primitives.edits import Edit
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

Array = NDArray[Any]
EXPERTS, WIDTH, HIDDEN = 3, 5, 4
Between = Callable[[Net, str], str]


def stacked(name: str, between: Between, *, turned: bool = False) -> onnx.ModelProto:
    """x W1 in each expert, something between, and W2; ``turned``: by Einsum, with the units along axis 1 of W1."""
    net = Net(name)
    x = net.input("x", [EXPERTS, 2, WIDTH])
    if turned:
        h = net.op("Einsum", x, net.weight((EXPERTS, HIDDEN, WIDTH), WIDTH), equation="ebm,enm->ebn")
    else:
        h = net.op("MatMul", x, net.weight((EXPERTS, WIDTH, HIDDEN), WIDTH))
    h = between(net, h)
    net.output(net.op("MatMul", h, net.weight((EXPERTS, HIDDEN, WIDTH), HIDDEN)), [EXPERTS, 2, WIDTH])
    return net.model()


def biased(net: Net, h: str) -> str:
    return net.op("Add", h, net.const(net.normal((EXPERTS, 1, HIDDEN), 1.0)))


LINEAR: dict[str, tuple[Between, bool]] = {
    "products": (lambda net, h: h, False),
    "Einsum": (lambda net, h: h, True),
    "negated": (lambda net, h: net.op("Neg", h), False),
    "halved": (lambda net, h: net.op("Mul", h, net.const(np.float32(0.5))), False),
}
OTHERS: dict[str, Between] = {
    "relu": lambda net, h: net.relu(h),
    "tanh": lambda net, h: net.op("Tanh", h),
    "softmax": lambda net, h: net.op("Softmax", h, axis=-1),
    "gains": lambda net, h: net.op("Mul", h, net.const(net.normal((EXPERTS, 1, HIDDEN), 1.0))),
    "sum over units": lambda net, h: net.op("Add", h, net.op("ReduceSum", h, net.const([2]), keepdims=1)),
}


def outputs(model: ir.Model) -> list[Array]:
    x = np.random.default_rng(0).standard_normal((EXPERTS, 2, WIDTH)).astype(np.float32)
    return zoo.run(ir.to_proto(model), {"x": x})


def bases(program: Program) -> list[Space]:
    return [space for space in program.spaces if space.dense == "GL"]


@pytest.mark.parametrize("name", LINEAR)
def test_each_matrix_of_a_stack_has_a_basis(name: str) -> None:
    between, turned = LINEAR[name]
    program, rng = program_of(stacked(name, between, turned=turned)), np.random.default_rng(1)
    assert [space.size for space in bases(program)] == [HIDDEN] * EXPERTS
    before = outputs(program.emit())
    for chosen in ([bases(program)[1]], bases(program)):
        moved = program.act({space: DenseElement.invertible(HIDDEN, rng) for space in chosen})
        assert largest_change(before, outputs(moved.emit())) < 1e-5
    both = moved.act({space: space.random(rng) for space in moved.spaces})
    assert largest_change(before, outputs(both.emit())) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_linear_has_none(name: str) -> None:
    assert not bases(program_of(stacked(name, OTHERS[name])))


def test_a_bias_of_each_expert_is_turned_or_ends_it() -> None:
    program, rng = program_of(stacked("biased", biased)), np.random.default_rng(2)
    before = outputs(program.emit())
    moved = program.act({space: DenseElement.invertible(HIDDEN, rng) for space in bases(program)})
    assert largest_change(before, outputs(moved.emit())) < 1e-5


@pytest.mark.parametrize("wrong", ["row", "dual", "nothing"])
def test_a_wrong_action_is_caught(wrong: str) -> None:
    """The control: the matrix on another expert, or without its dual, is no symmetry."""
    program = program_of(stacked("control", LINEAR["products"][0]))
    space, before = bases(program)[0], outputs(program.emit())
    element = DenseElement.invertible(HIDDEN, np.random.default_rng(3))
    edits = act_edits(program.analysis, {program.index(space): element})
    assert len(edits) == 2
    for k, edit in enumerate(edits.values()):
        ((axis, ((row, positions, matrix),)),) = edit.inner_mix.items()
        if k and wrong == "dual":
            edit.inner_mix[axis] = [(row, positions, np.linalg.inv(matrix))]
        if k and wrong == "row":
            edit.inner_mix[axis] = [(row + 1, positions, matrix)]
    clone = program.model.clone()
    Editor(clone, program.analysis).apply(edits)
    assert (largest_change(before, outputs(clone)) < 1e-5) == (wrong == "nothing")


def test_rows_are_mixed_as_they_come_in_blocks() -> None:
    """A stack that is evaluated some rows at a time, and exchanged: each row gets its own matrix."""
    rng = np.random.default_rng(4)
    array, matrix = rng.standard_normal((9, 600, 40)), rng.standard_normal((40, 40))
    take = rng.permutation(9)
    edit = Edit(take={0: take}, inner_mix={2: [(4, np.arange(40)[:, None], matrix)]})
    blocks = list(edit.blocks(array))
    expected = array.copy()
    expected[4] = expected[4] @ matrix
    assert len(blocks) > 1 and np.allclose(np.concatenate(blocks), expected[take])
    assert edit.key() != Edit(take={0: take}, inner_mix={2: [(5, np.arange(40)[:, None], matrix)]}).key()
