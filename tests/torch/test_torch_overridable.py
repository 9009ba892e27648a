"""Inputs with a default are arguments of the module that `to_torch` makes, and may be left out."""

from __future__ import annotations

import inspect

import numpy as np
import onnx
import pytest
from tests.api.test_overridable import FLOATS, NET, listed

import cipm_ir

torch = pytest.importorskip("torch", reason="torch is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

GROUPS = {
    "a weight": ["w3"],
    "a product": ["w1", "b1"],
    "statistics": ["mean", "var"],
    "scalars": ["low", "high"],
    "all": list(FLOATS),
}


@pytest.mark.parametrize("group", list(GROUPS))
def test_the_module_takes_what_the_runtime_takes(group: str) -> None:
    names = GROUPS[group]
    proto = listed(NET, *names)
    module = cipm_ir.to_torch(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options)
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    held = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    others = {name: np.asarray(held[name] * np.float32(1.5) + np.float32(0.125)) for name in names}
    wanted, changed = session.run(None, {"x": x})[0], session.run(None, {"x": x, **others})[0]
    assert np.abs(wanted - changed).max() > 1e-3
    with torch.no_grad():
        plain = module(torch.from_numpy(x)).numpy()
        given = module(torch.from_numpy(x), **{name: torch.from_numpy(a) for name, a in others.items()}).numpy()
    np.testing.assert_allclose(plain, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(given, changed, rtol=1e-4, atol=1e-4)
    assert set(names) <= set(module.state_dict())


def test_a_size_stays_its_default() -> None:
    module = cipm_ir.to_torch(listed(NET, "size"))
    assert list(inspect.signature(module.forward).parameters) == ["x"]


def test_before_ir_version_4_no_initializer_is_an_input() -> None:
    proto = listed(NET, "w3")
    proto.ir_version = 3
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(i.name, i.data_type, i.dims) for i in NET.graph.initializer if i.name != "w3"
    )
    assert list(inspect.signature(cipm_ir.to_torch(proto).forward).parameters) == ["x"]
