"""`act` with matrices: rounding in float64, together with permutations and scales, what is refused, what is caught."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tests import zoo
from tests.models.dense_models import BERT, LLAMA, Style, ids, transformer
from tests.symmetry.test_dense_groups import change, dense_elements, stream_of
from tests.symmetry.test_soundness import largest_change, program_of

from cipm_ir.algebra import DenseElement, Element
from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.primitives.act import act_edits
from cipm_ir.symmetry.primitives.apply import Editor
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

STYLES = {"llama": LLAMA, "bert": BERT}
parametrize = pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)


def everything(program: Program, seed: int) -> dict[Space, Element | DenseElement]:
    """Matrices where they are admitted, and elements of the monomial group on all other spaces, blocks included."""
    rng = np.random.default_rng(seed)
    elements: dict[Space, Element | DenseElement] = {
        space: space.random(rng) for space in program.spaces if not space.dense
    }
    return {**elements, **dense_elements(program, seed)}


@parametrize
def test_exact_up_to_float64_rounding(style: Style) -> None:
    model = transformer(replace(style, dtype="float64"))
    program = program_of(model)
    assert change(model, dense_elements(program), program) < 1e-10


@parametrize
def test_matrices_act_together_with_permutations_and_scales(style: Style) -> None:
    """Heads change places as wholes, with matrices inside; the matrix of a weight turns on both axes."""
    model = transformer(replace(style, dtype="float64"))
    program = program_of(model)
    assert any(space.kind == "blocks" for space in program.spaces)
    assert change(model, everything(program, 1), program) < 1e-10


@parametrize
def test_half_precision(style: Style) -> None:
    model = transformer(replace(style, dtype="float16", layers=1))
    program = program_of(model)
    elements = {s: DenseElement.hadamard(s.size, np.random.default_rng(0)) for s in dense_elements(program)}
    assert change(model, elements, program) < 2e-2
    tensors = ir.to_proto(program.act(elements).emit()).graph.initializer
    assert {t.data_type for t in tensors} == {t.data_type for t in model.graph.initializer}


@parametrize
def test_composition_and_inverse(style: Style) -> None:
    program = program_of(transformer(replace(style, dtype="float64")))
    first, second = dense_elements(program, 1), dense_elements(program, 2)
    step = program.act(first)
    twice = step.act({step.space(space.name): g for space, g in second.items()})
    once = program.act({space: second[space] @ g for space, g in first.items()})
    back = step.act({step.space(space.name): g.inverse() for space, g in first.items()})
    for a, b in ((twice, once), (back, program)):
        for x, y in zip(_arrays(a), _arrays(b), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


def _arrays(program: Program) -> list[Any]:
    return [numpy_helper.to_array(t) for t in ir.to_proto(program.emit()).graph.initializer]


def test_a_permutation_is_the_same_as_its_matrix() -> None:
    program = program_of(transformer(replace(LLAMA, gamma="none", dtype="float64")))
    stream, rng = stream_of(program), np.random.default_rng(3)
    element = Element.of(rng.permutation(stream.size), None, rng.choice([-1, 1], (stream.group.signs, stream.size)))
    assert stream.group.signs == 1
    plain, dense = program.act({stream: element}), program.act({stream: DenseElement.of(element)})
    for x, y in zip(_arrays(plain), _arrays(dense), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-14)


@parametrize
def test_a_tensor_left_out_is_caught(style: Style) -> None:
    """Every tensor counts: with the edit of any one dropped the outputs change; but softmax sees no bias of keys."""
    model = transformer(replace(style, layers=1))
    program = program_of(model)
    analysis = program.analysis
    elements = {program.index(space): g for space, g in dense_elements(program).items()}
    before = zoo.run(model, ids())
    edits = act_edits(analysis, elements)
    assert len(edits) >= 6
    unseen = []
    for dropped in edits:
        clone = program.model.clone()
        Editor(clone, analysis).apply({leaf: edit for leaf, edit in edits.items() if leaf != dropped})
        if largest_change(before, zoo.run(ir.to_proto(clone), ids())) < 1e-3:
            unseen.append(analysis.walk.leaves[dropped].shape)
    assert unseen == ([] if style.gated else [(style.width,)])


def test_a_dual_left_out_is_caught() -> None:
    """An invertible matrix on V with the same on O, instead of its dual, is no symmetry; an orthogonal one is."""
    model = transformer(replace(LLAMA, layers=1))
    program = program_of(model)
    space = next(s for s in program.spaces if s.dense == "GL")
    rng, before = np.random.default_rng(0), zoo.run(model, ids())
    for element, kept in ((DenseElement.orthogonal(4, rng), True), (DenseElement.invertible(4, rng), False)):
        edits = act_edits(program.analysis, {program.index(space): element})
        for edit in edits.values():
            edit.mix = {a: [(p, element.matrix.T) for p, _ in pairs] for a, pairs in edit.mix.items()}
        clone = program.model.clone()
        Editor(clone, program.analysis).apply(edits)
        assert (largest_change(before, zoo.run(ir.to_proto(clone), ids())) < 1e-5) == kept


def test_what_is_refused() -> None:
    program = program_of(transformer(LLAMA))
    stream, rng = stream_of(program), np.random.default_rng(0)
    head = next(space for space in program.spaces if space.dense == "GL")
    hidden = next(space for space in program.spaces if space.size == LLAMA.hidden)
    for space, element, said in (
        (stream, DenseElement.invertible(stream.size, rng), r"it admits O\(16\)"),
        (stream, DenseElement.orthogonal(4, rng), "does not act"),
        (head, DenseElement.identity(5), r"it admits GL\(4\)"),
        (hidden, DenseElement.identity(hidden.size), "holds no dense matrices"),
    ):
        with pytest.raises(SymmetryError, match=said):
            program.act({space: element})


def test_random_elements_stay_monomial() -> None:
    program = program_of(transformer(LLAMA))
    rng = np.random.default_rng(0)
    assert all(isinstance(space.random(rng), Element) for space in program.spaces)


def test_spaces_keep_no_program_alive_and_can_be_stored() -> None:
    program = program_of(transformer(LLAMA))
    spaces = pickle.loads(pickle.dumps(program.spaces))
    assert [space.dense for space in spaces] == [space.dense for space in program.spaces]
    assert [str(space) for space in spaces] == [str(space) for space in program.spaces]


def test_dense_groups_are_found_only_when_asked_for() -> None:
    program = program_of(transformer(LLAMA))
    spaces = program.spaces
    assert program.analysis.linear is None
    assert spaces[0].dense in ("", "O", "GL")
    assert program.analysis.linear is not None


def test_constants_in_nodes_become_initializers() -> None:
    """Parameters held by Constant nodes turn as well."""
    model = transformer(LLAMA)
    nodes = [
        onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer if len(t.dims) == 2
    ]
    kept = [t for t in model.graph.initializer if len(t.dims) != 2]
    rest = list(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend([*nodes, *rest])
    model.graph.initializer.extend(kept)
    program = program_of(model)
    assert stream_of(program).dense == "O"
    assert change(model, dense_elements(program), program) < 1e-5
