"""Attributes that count units, heads and groups follow when units that nothing reads are removed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from tests.ops import cases_sequence as registry_cases_sequence
from tests.ops.sample import CASES, SAME, Sample, Side, difference

from cipm_ir.runtime.session import run
from cipm_ir.symmetry.program import Program
from cipm_ir.symmetry.space import Space

SOURCE = registry_cases_sequence


def built(name: str) -> tuple[onnx.ModelProto, Sample]:
    """The model of a case."""
    return next(c for c in CASES if c.name == name).build()


def silenced(proto: onnx.ModelProto, sides: list[Side], units: list[int]) -> onnx.ModelProto:
    """The model in which some units are not read: their entries of the given parameters are zero."""
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    tensors = {t.name: t for t in changed.graph.initializer}
    for side in sides:
        array = numpy_helper.to_array(tensors[side.parameter]).copy()
        n = array.shape[side.axis] // side.blocks
        np.moveaxis(array, side.axis, 0)[[u + k * n for u in units for k in range(side.blocks)]] = 0
        tensors[side.parameter].CopyFrom(numpy_helper.from_array(array, side.parameter))
    return changed


def removed(proto: onnx.ModelProto, member: str, drop: list[int], kind: str = "units") -> onnx.ModelProto:
    """The model without some units of every space of a kind that moves a parameter."""
    program = Program.of(ir.from_proto(proto))
    spaces: list[Space] = [s for s in program.spaces if s.kind == kind and member in s.members]
    if kind == "blocks":  # not the query heads inside a key head
        spaces = [s for s in spaces if s.parent is None]
    assert spaces, [str(s) for s in program.spaces]
    keep = {s: np.setdiff1d(np.arange(s.size), drop) for s in spaces}
    return ir.to_proto(program.restrict(keep).emit())


def attributes(model: onnx.ModelProto, op: str) -> dict[str, Any]:
    """Attributes of the only node of an operator."""
    (node,) = [n for n in model.graph.node if n.op_type == op]
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def agree(a: onnx.ModelProto, b: onnx.ModelProto, sample: Sample) -> bool:
    """Whether two models compute the same."""
    return difference(run(ir.from_proto(a), sample.feeds), run(ir.from_proto(b), sample.feeds)) <= SAME


def member(side: Side) -> str:
    """As spaces name it."""
    return f"{side.parameter}[{side.axis}]"


RECURRENT = ["LSTM-plain", "LSTM-bidirectional", "LSTM-states_and_peepholes", "GRU-linear_before_reset", "RNN-tanh"]


@pytest.mark.parametrize("name", RECURRENT)
def test_hidden_size_follows(name: str) -> None:
    proto, sample = built(name)
    small = removed(proto, member(sample.readers["u"][0]), [1, 3])
    assert attributes(small, name.split("-")[0])["hidden_size"] == 3
    assert agree(silenced(proto, sample.readers["u"], [1, 3]), small, sample)
    assert not agree(silenced(proto, sample.readers["u"], [0, 3]), small, sample)


@pytest.mark.parametrize("name", ["Attention-three_axes", "Attention-four_axes_in_and_out"])
def test_the_scale_of_attention_stays_when_heads_become_narrow(name: str) -> None:
    proto, sample = built(name)
    small = removed(proto, member(sample.makers["q"][0]), [1])  # in both heads
    assert attributes(small, "Attention")["scale"] == pytest.approx(1 / np.sqrt(3))
    assert agree(silenced(proto, sample.readers["q"], [1, 4]), small, sample)


def test_a_scale_that_is_given_is_kept() -> None:
    proto, sample = built("Attention-causal_with_mask")
    small = removed(proto, member(sample.makers["q"][0]), [1])
    assert attributes(small, "Attention")["scale"] == pytest.approx(0.4)
    assert agree(silenced(proto, sample.readers["q"], [1, 4]), small, sample)


@pytest.mark.parametrize("name", ["Attention-three_axes", "Attention-mask_per_head", "Attention-four_axes_in_and_out"])
def test_heads_go_as_wholes(name: str) -> None:
    proto, sample = built(name)
    small = removed(proto, member(sample.makers["v"][0]), [0], "blocks")
    assert attributes(small, "Attention").get("q_num_heads", 1) == 1
    assert agree(silenced(proto, sample.readers["v"], [0, 1, 2]), small, sample)


def test_query_heads_go_with_their_key_head() -> None:
    proto, sample = built("Attention-grouped_queries")
    small = removed(proto, member(sample.makers["v"][0]), [1], "blocks")
    found = attributes(small, "Attention")
    assert (found["q_num_heads"], found["kv_num_heads"]) == (2, 1)
    assert agree(silenced(proto, sample.readers["o"], [4, 5, 6, 7]), small, sample)


def test_planes_of_a_rotary_embedding_go_as_wholes() -> None:
    proto, sample = built("RotaryEmbedding-halves")
    small = removed(proto, member(sample.makers["h"][0]), [0], "blocks")
    assert agree(silenced(proto, sample.readers["h"], [0, 2, 4, 6]), small, sample)


def test_groups_of_a_quantized_convolution_go_as_wholes() -> None:
    proto, sample = built("QLinearConv-grouped")
    small = removed(proto, member(sample.makers["u"][0]), [1], "blocks")
    assert attributes(small, "QLinearConv").get("group", 1) == 1
    assert agree(silenced(proto, sample.readers["u"], [4, 5, 6, 7]), small, sample)
