"""ONNX out: the graph IR as a file or a ModelProto, written beside its place and then renamed.

A file that was there before is either replaced whole or left as it was. The model that is written is never changed,
and its weights are evaluated one at a time: the peak is about the largest tensor when they go to external data, and
about two copies of the file when they are embedded (protobuf needs the message and its bytes).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from cipm_ir.errors import CipmError, OutputError
from cipm_ir.runtime.graphs import LISTED, all_graphs

__all__ = ["DEFAULT_THRESHOLD", "emit_proto", "save_onnx"]

DEFAULT_THRESHOLD = 1_800_000_000
_PROTOBUF_LIMIT = 2**31 - 1
_EMBED_BELOW = 1024
"""Tensors below this many bytes stay in the .onnx file: shape inference reads small ones, but no external data."""


@dataclass(frozen=True)
class _Slot:
    """A place in a model that holds a tensor."""

    tensor: ir.TensorProtocol
    name: str
    put: Callable[[ir.TensorProtocol], None]


def emit_proto(model: ir.Model) -> onnx.ModelProto:
    """Return the model as a self-contained ModelProto, all weights embedded; the model is not changed.

    Protobuf cannot serialize a message above 2 GB; the object itself may be larger.
    """
    copy = model.clone()
    for slot in _slots(copy):
        slot.put(_embedded(slot))
    return _serialize(copy)


def save_onnx(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: bool | None = None,
    source_external: bool = False,
    threshold_bytes: int = DEFAULT_THRESHOLD,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `path`, and `path + ".data"` beside it where the weights are external data.

    The path may be the file that the model was loaded from (see `MappedTensor`).

    Args:
        model: what to write; not changed. Lazy tensors are evaluated once each and not kept.
        path: the .onnx file; its folder must exist.
        external: weights to external data, or not. None: as the source had it, and above `threshold_bytes`.
            Above protobuf's limit of 2 GB the weights are external in any case.
        source_external: the source had external data.
        threshold_bytes: the total size of the weights from which on they go to external data.
        check: gets the finished file, its data beside it, before it is put in its place; what it raises stops that.

    Raises:
        OutputError: nothing was written; what was there before is untouched.
    """
    target = Path(os.path.abspath(path))
    data = target.with_name(target.name + ".data")
    copy = model.clone()
    slots = list(_slots(copy))
    total = sum(_nbytes(slot.tensor) for slot in slots)
    outside = total > _PROTOBUF_LIMIT - (64 << 20)
    outside = outside or (external if external is not None else source_external or total > threshold_bytes)
    _check_target(target, path)
    if outside:
        _check_target(data, f"{os.fspath(path)}.data")
    try:
        with _scratch(target) as folder:
            temporary, temporary_data = folder / target.name, folder / data.name
            if outside:
                _write_data(slots, temporary_data, data.name)
            else:
                for slot in slots:
                    slot.put(_embedded(slot))
            _write_proto(_serialize(copy), temporary)
            if check is not None:
                check(temporary)
            _replace([*([(temporary_data, data)] if outside else []), (temporary, target)])
    except Exception as error:
        cause = _root(error)
        if isinstance(cause, CipmError):
            raise cause from None
        raise OutputError(f"{os.fspath(path)!r} was not written: {_reason(cause)}; nothing was left behind.") from error


def _root(error: BaseException) -> BaseException:
    """Return what went wrong first; onnx_ir wraps whatever happens while it serializes."""
    while error.__cause__ is not None and not isinstance(error, CipmError):
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# --- tensors --------------------------------------------------------------------------------------


def _slots(model: ir.Model) -> Iterator[_Slot]:
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield _Slot(value.const_value, value.name or "", _put_value(value))
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                # Other attribute tensors stay as they are; these would point into a folder that is not ours.
                if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                    yield _Slot(attribute.value, attribute.value.name or "", _put_attribute(node, name))


def _put_value(value: ir.Value) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        value.const_value = tensor

    return put


def _put_attribute(node: ir.Node, name: str) -> Callable[[ir.TensorProtocol], None]:
    def put(tensor: ir.TensorProtocol) -> None:
        node.attributes[name] = ir.AttrTensor(name, tensor, doc_string=node.attributes[name].doc_string)

    return put


def _nbytes(tensor: ir.TensorProtocol) -> int:
    if isinstance(tensor, ir.StringTensor):
        return sum(len(text) for text in tensor.string_data())
    return tensor.nbytes


def _embedded(slot: _Slot) -> ir.TensorProtocol:
    """Return a tensor that serializes to its bytes under the slot's name; the slot's own where it already does."""
    tensor = slot.tensor
    if not isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)) and tensor.name == slot.name:
        return tensor
    metadata = dict(tensor.metadata_props) or None
    if isinstance(tensor, ir.StringTensor):
        return ir.StringTensor(
            tensor.string_data(),
            shape=ir.Shape(tensor.shape.numpy()),
            name=slot.name,
            doc_string=tensor.doc_string,
            metadata_props=metadata,
        )
    return ir.LazyTensor(
        lambda: _exact_bytes(tensor, slot.name),
        tensor.dtype,
        ir.Shape(tensor.shape.numpy()),
        name=slot.name,
        doc_string=tensor.doc_string,
        metadata_props=metadata,
    )


def _exact_bytes(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return the bytes of a tensor as a tensor, of which the serialization reads nothing else."""
    content = tensor.tobytes()
    _check_length(name, len(content), _nbytes(tensor))
    return ir.Tensor(np.frombuffer(content, dtype=np.uint8))


def _check_length(name: str, found: int, needed: int) -> None:
    if found != needed:
        raise OutputError(f"Tensor {name!r} should give {needed} bytes but gave {found}; nothing was written.")


def _serialize(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    _drop_implied(proto.graph, model.graph)
    return proto


def _drop_implied(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Remove the value_info that onnx_ir writes for an initializer, where the source had none and nothing is lost."""
    tensors = {tensor.name: tensor for tensor in proto.initializer}
    for i in range(len(proto.value_info) - 1, -1, -1):
        info = proto.value_info[i]
        tensor = tensors.get(info.name)
        if tensor is None or graph.initializers[info.name].meta.get(LISTED) or not _implied(info, tensor):
            continue
        del proto.value_info[i]
    for node_proto, node in zip(proto.node, graph, strict=True):
        for attribute in node_proto.attribute:
            if attribute.HasField("g"):
                _drop_implied(attribute.g, node.attributes[attribute.name].as_graph())
            for j, subproto in enumerate(attribute.graphs):
                _drop_implied(subproto, node.attributes[attribute.name].as_graphs()[j])


def _implied(info: onnx.ValueInfoProto, tensor: onnx.TensorProto) -> bool:
    kind = info.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
    return (
        not info.metadata_props
        and not info.doc_string
        and not info.type.denotation
        and not any(dim.denotation for dim in kind.shape.dim)
        and kind.elem_type == tensor.data_type
        and dims == list(tensor.dims)
    )


# --- files ----------------------------------------------------------------------------------------


def _check_target(target: Path, shown: str | os.PathLike[str]) -> None:
    """Refuse early what a rename would fail on, or would destroy (a device, a pipe)."""
    try:
        if not target.parent.is_dir():
            raise OutputError(
                f"{os.fspath(shown)!r} cannot be written: the folder {str(target.parent)!r} does not exist."
            )
        mode = target.stat().st_mode if target.exists() else stat.S_IFREG
    except OSError as error:
        raise OutputError(f"{os.fspath(shown)!r} cannot be written: {error.strerror}.") from error
    if stat.S_ISDIR(mode):
        raise OutputError(f"{os.fspath(shown)!r} is a folder; give the name of a file.")
    if not stat.S_ISREG(mode):
        raise OutputError(f"{os.fspath(shown)!r} is not a regular file; give the name of a file.")


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, so that files keep their names until they are moved; removed at the end."""
    folder = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_proto(proto: onnx.ModelProto, path: Path) -> None:
    content = proto.SerializeToString()
    with open(path, "xb") as file:
        file.write(content)


def _write_data(slots: list[_Slot], path: Path, location: str) -> None:
    """Write the tensors to `path` and point their slots there; a tensor used twice is written once.

    Two threads write, each into the part of the file that belongs to its tensor.
    """
    places: dict[int, int] = {}
    end = 0
    with open(path, "xb"), ThreadPoolExecutor(max_workers=2) as pool:
        writing: list[Future[None]] = []
        for slot in slots:
            tensor = slot.tensor
            nbytes = _nbytes(tensor)
            if nbytes < _EMBED_BELOW or tensor.dtype == ir.DataType.STRING:
                slot.put(_embedded(slot))
                continue
            if id(tensor) not in places:
                # Whole pages for large tensors, so that they can be mapped; the rest aligned for vector instructions.
                alignment = 4096 if nbytes >= 1 << 20 else 64
                start = places[id(tensor)] = -(-end // alignment) * alignment
                end = start + nbytes
                writing.append(pool.submit(_write_tensor, tensor, path, start, nbytes, slot.name))
            slot.put(
                ir.ExternalTensor(
                    location,
                    places[id(tensor)],
                    nbytes,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=slot.name,
                    doc_string=tensor.doc_string,
                    metadata_props=dict(tensor.metadata_props) or None,
                )
            )
        done, _ = wait(writing, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
        for future in done:
            future.result()


def _write_tensor(tensor: ir.TensorProtocol, path: Path, start: int, nbytes: int, name: str) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        if hasattr(tensor, "tofile"):
            tensor.tofile(file)
        else:
            file.write(tensor.tobytes())
        _check_length(name, file.tell() - start, nbytes)


def _replace(pairs: list[tuple[Path, Path]]) -> None:
    """Rename each temporary file to its target, which keeps its permissions: all or none."""
    backups = {target: target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.old") for _, target in pairs}
    for temporary, target in pairs:
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
    if len(pairs) == 1:
        os.replace(*pairs[0])
        return
    placed: list[Path] = []
    try:
        for temporary, target in pairs:
            if os.path.lexists(target):
                os.rename(target, backups[target])
            placed.append(target)
            os.replace(temporary, target)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for target, backup in backups.items():
            if os.path.lexists(backup):
                os.replace(backup, target)
        raise
    for backup in backups.values():
        with contextlib.suppress(OSError):
            backup.unlink(missing_ok=True)
