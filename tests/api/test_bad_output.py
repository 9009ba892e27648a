"""Failing saves: one clear sentence, nothing left behind, and what was there before untouched."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from cipm_ir.backends.onnx import save as to_onnx
from cipm_ir.backends.onnx.save import save_onnx
from cipm_ir.errors import OutputError


def chain(w1: np.ndarray[Any, Any] | None = None) -> ir.Model:
    """y = x @ w1 @ w2, sizes 4, 40, 30."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 20]>'
        "chain (float[N,4] x, float[4,40] w1, float[40,30] w2) => (float[N,30] y)"
        "{ a = MatMul(x, w1) y = MatMul(a, w2) }"
    )
    arrays = {"w1": np.ones((4, 40), np.float32) if w1 is None else w1, "w2": np.ones((40, 30), np.float32)}
    for value in list(model.graph.inputs)[1:]:
        value.const_value = ir.tensor(arrays[str(value.name)], name=value.name)
        model.graph.register_initializer(value)
    return model


def message(action: Callable[[], object]) -> str:
    """The text of the OutputError that the action raises: one line that ends as a sentence does."""
    with pytest.raises(OutputError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 500, text
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def model() -> ir.Model:
    return chain()


def test_output_path_cannot_be_written(model: ir.Model, tmp_path: Path) -> None:
    assert "does not exist" in message(lambda: save_onnx(model, tmp_path / "no" / "m.onnx"))
    assert "is a folder" in message(lambda: save_onnx(model, tmp_path))
    (tmp_path / "m.onnx.data").mkdir()
    assert "is a folder" in message(lambda: save_onnx(model, tmp_path / "m.onnx", external=True))
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in message(lambda: save_onnx(model, tmp_path / "pipe"))
    (tmp_path / "file").write_bytes(b"")
    assert "does not exist" in message(lambda: save_onnx(model, tmp_path / "file" / "m.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m.onnx.data", "pipe"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(model: ir.Model, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "ermission" in message(lambda: save_onnx(model, tmp_path / "m.onnx"))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
@pytest.mark.parametrize("external", [False, True])
def test_failing_open(
    model: ir.Model, code: int, external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a read-only folder does to anyone but root, who runs the tests in most containers."""

    def refuse(*_: object, **__: object) -> object:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(to_onnx, "open", refuse, raising=False)
    text = message(lambda: save_onnx(model, tmp_path / "m.onnx", external=external))
    assert os.strerror(code) in text and not contents(tmp_path)


class _Full(ir.Tensor[Any]):
    """A tensor that fills the disk after half its bytes."""

    def tofile(self, file: Any) -> None:
        file.write(bytes(self.nbytes // 2))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def tobytes(self) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_disk_full(model: ir.Model, external: bool, existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if existing:
        save_onnx(chain(), path, external=external)
    before = contents(tmp_path)
    full = _Full(np.zeros((40, 30), np.float32), name="w2")
    model.graph.initializers["w2"].const_value = full
    text = message(lambda: save_onnx(model, path, external=external))
    assert "No space left" in text
    assert contents(tmp_path) == before
    assert model.graph.initializers["w2"].const_value is full


def test_disk_full_on_a_real_device(model: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    before = contents(tmp_path)
    real = open

    def full(_path: Path, _mode: str) -> Any:
        return real("/dev/full", "wb")

    monkeypatch.setattr(to_onnx, "open", full, raising=False)
    assert "No space left" in message(lambda: save_onnx(model, tmp_path / "m.onnx"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_failing_rename_restores_both_files(
    model: ir.Model, failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    save_onnx(chain(w1=np.zeros((4, 40), np.float32)), path, external=True)
    before = contents(tmp_path)
    calls = []
    real = os.rename, os.replace

    def rename(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real[1](source, target)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", rename)
    message(lambda: save_onnx(model, path, external=True))
    assert contents(tmp_path) == before


def test_interrupt_leaves_nothing(model: ir.Model, tmp_path: Path) -> None:
    def interrupt() -> ir.TensorProtocol:
        raise KeyboardInterrupt

    lazy = ir.LazyTensor(interrupt, ir.DataType.FLOAT, ir.Shape([40, 30]), name="w2")
    model.graph.initializers["w2"].const_value = lazy
    for external in (False, True):
        with pytest.raises(KeyboardInterrupt):
            save_onnx(model, tmp_path / "m.onnx", external=external)
    assert not contents(tmp_path)


def test_a_lazy_tensor_of_the_wrong_size_is_refused(model: ir.Model, tmp_path: Path) -> None:
    lazy = ir.LazyTensor(lambda: ir.Tensor(np.zeros(7, np.float32)), ir.DataType.FLOAT, ir.Shape([40, 30]), name="w2")
    model.graph.initializers["w2"].const_value = lazy
    for external in (False, True):
        save = functools.partial(save_onnx, model, tmp_path / "m.onnx", external=external)
        assert "'w2'" in message(save)
    assert not contents(tmp_path)
