"""Removing units that contribute nothing changes nothing, and every literal that depends on a size follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from tests import zoo
from tests.test_soundness import largest_change, program_of
from tests.zoo.net import Net

from cipm_ir.errors import SymmetryError
from cipm_ir.symmetry.program import Program, Space

Array = NDArray[Any]

# Models in which a statistic runs over some space, so that even a unit of zeros is seen: it is counted.
COUNTED = {
    "softmax_hidden", "layer_norm", "layer_norm_spelled_out", "layer_norm_channels", "rms_norm", "rms_norm_spelled_out", "group_norm",
    "lp_normalization", "tied_embedding", "gated_mlp", "maxout_reshape", "spatial_attention",
    "channel_reducemean", "channel_reducemax", "channel_reducemin", "channel_reducelogsumexp",
    *(name for name in zoo.names("attention") if name != "attention_einsum"),
}  # fmt: skip


def counted(program: Program) -> set[Space]:
    """Spaces over which a normalization, a softmax, a mean or a maximum runs."""
    of = program.analysis.classes.of
    hit = {int(c) for labels in program.analysis.walk.rec.normalized for c in of[labels]}
    return {s for s, raw in zip(program.spaces, program.analysis.spaces, strict=True) if hit & set(raw.table[:, 0].tolist())}


def thinned(program: Program) -> dict[Space, Array]:
    """Every third unit of every uncounted space goes, the same in all blocks of one layer."""
    keep = {}
    for space in set(program.spaces) - counted(program):
        if space.kind == "units" and space.size > 1 and space.group.permutes:
            keep[space] = np.flatnonzero(np.arange(space.size) % 3 != 2) if space.size > 2 else np.array([0])
    return keep


def silenced(program: Program, keep: dict[Space, Any]) -> onnx.ModelProto:
    """The model with zeros in every position of the units that ``restrict`` is about to drop."""
    analysis, proto = program.analysis, ir.to_proto(program.model)
    stays = program.kept_classes(keep)[analysis.classes.of]
    tensors = {t.name: t for t in proto.graph.initializer}
    for f in analysis.walk.leaf_factors:
        leaf = analysis.walk.leaves[f.leaf]
        if not f.active or leaf.name not in tensors or not leaf.dtype.is_floating_point():
            continue
        array = numpy_helper.to_array(tensors[leaf.name]).copy()
        mask = stays[f.base : f.base + f.size]
        if f.groups:
            rows = mask.reshape(f.shape)[np.arange(leaf.shape[0]) * f.groups // leaf.shape[0]]
            array *= rows.reshape(rows.shape[:1] + tuple(rows.shape[1] if a == f.axes[1] else 1 for a in range(1, array.ndim)))
        else:
            array *= mask.reshape([-1 if a == f.axes[0] else 1 for a in range(array.ndim)]).astype(array.dtype)
        tensors[leaf.name].CopyFrom(numpy_helper.from_array(array, leaf.name))
    return proto


def restricted(program: Program, keep: dict[Space, Any]) -> onnx.ModelProto:
    proto = ir.to_proto(program.restrict(keep).emit())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def check(name: str, program: Program, keep: dict[Space, Any], run: Callable[[onnx.ModelProto, int], Any]) -> onnx.ModelProto:
    """The model without dead units is valid, is smaller, and computes the same, at several batch sizes."""
    dead = silenced(program, keep)
    small = restricted(program_of(dead), {program_of(dead).space(s.name): k for s, k in keep.items()})
    assert sum(np.prod(t.dims) for t in small.graph.initializer) < sum(np.prod(t.dims) for t in dead.graph.initializer)
    for batch in (2, 3):
        assert largest_change(run(dead, batch), run(small, batch)) <= 1e-5, name
    return small


@pytest.mark.parametrize("name", zoo.names("synthetic", without=("float16", "quantized")))
def test_dead_units_leave_no_trace(name: str) -> None:
    model, entry = zoo.build(name), zoo.entry(name)
    program = program_of(model)
    keep = thinned(program)
    assert bool(counted(program)) == (name in COUNTED)
    if not keep:
        pytest.skip("no space of two units that is not counted")

    def run(proto: onnx.ModelProto, batch: int) -> Any:
        return zoo.run(proto, zoo.feeds(name, model, dims={"N": batch}), reference=entry.reference)

    check(name, program, keep, run)
