"""Models of IR version 3, whose initializers are inputs of the graph as well: primitives cut both, once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tests.models.compress_nets import images, residual, rows, values
from tests.zoo.net import Net

import cipm_ir
from cipm_ir.symmetry.program import Program


def old(net: Net) -> onnx.ModelProto:
    """The model of a net with every initializer declared as an input, as all were before IR version 4."""
    model = net.model()
    model.ir_version = 3
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", 8))
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(model)
    return model


def fire() -> Net:
    """Squeeze, two expansions side by side, their concatenation, a classifying convolution, a pool."""
    net = Net("fire", 8)
    squeezed = net.relu(net.conv(net.image(3, 6, 4), 3, 6, 1))
    wide = [net.relu(net.conv(squeezed, 6, n, k)) for n, k in ((5, 1), (7, 3))]
    scores = net.relu(net.conv(net.op("Concat", *wide, axis=1), 12, 4, 1))
    net.output(net.op("Flatten", net.op("GlobalAveragePool", scores)), [4, 4])
    return net


def shapes(model: onnx.ModelProto) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Shapes of the initializers, and those that the inputs of the same names declare."""
    tensors = {t.name: list(t.dims) for t in model.graph.initializer}
    declared = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    return tensors, {name: shape for name, shape in declared.items() if name in tensors}


@pytest.mark.parametrize("net", [fire, lambda: residual(blocks=1)], ids=["fire", "residual"])
def test_restrict_cuts_parameters_that_are_inputs(net: object, tmp_path: Path) -> None:
    model = old(net())  # type: ignore[operator]
    made = cipm_ir.load(model)
    data = images(4)
    spaces = [s for s in made.spaces if s.kind == "units" and s.size > 2]
    assert len(spaces) >= 2
    keep = {s: np.arange(s.size)[::2] for s in spaces}
    small = made.restrict(keep)
    path = tmp_path / "small.onnx"
    small.save(str(path))
    saved = onnx.load(path)
    assert saved.ir_version == 3
    onnx.checker.check_model(saved, full_check=True)
    tensors, declared = shapes(saved)
    assert tensors == declared and tensors.keys() == {t.name for t in model.graph.initializer}
    assert sum(map(np.prod, tensors.values())) < 0.6 * sum(map(np.prod, shapes(model)[0].values()))
    assert all(np.isfinite(y).all() for y in values(Program.of(ir.from_proto(saved)), data))


def test_what_remains_computes_what_zeros_in_its_place_do() -> None:
    """Units that only have zeros around them go without a change; without the zeros, the control, the outputs move."""
    made, data = Program.of(ir.from_proto(old(fire()))), images(4)
    space = made.spaces[0]
    zeros = {}
    for name in space.members:
        tensor = made.model.graph.initializers[name.rpartition("[")[0]].const_value
        assert tensor is not None
        array = np.array(tensor.numpy())
        if array.shape[0] == 6:
            array[[1, 4]] = 0.0
            zeros[name.rpartition("[")[0]] = array
    keep = np.array([0, 2, 3, 5])
    silent = made.refit(zeros)
    before = values(silent, data)[0]
    np.testing.assert_allclose(values(silent.restrict({silent.spaces[0]: keep}), data)[0], before, atol=1e-5)
    assert np.abs(values(made.restrict({space: keep}), data)[0] - values(made, data)[0]).max() > 1e-3


def test_inputs_of_the_user_keep_their_shapes() -> None:
    """Only what is a parameter is cut: an input of the same sizes stays."""
    net = Net("plain", 8)
    x = net.input("x", [4, 6])
    h = net.relu(net.gemm(x, 6, 6))
    net.output(net.gemm(h, 6, 6), [4, 6])
    made = Program.of(ir.from_proto(old(net)))
    small = ir.to_proto(made.restrict({made.spaces[0]: np.array([0, 5])}).emit())
    (given,) = [v for v in small.graph.input if v.name == "x"]
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [4, 6]
    tensors, declared = shapes(small)
    assert tensors == declared and [2, 6] in tensors.values()
    assert values(Program.of(ir.from_proto(small)), rows(4))[0].shape == (4, 6)
