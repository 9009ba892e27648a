"""ONNX in: a path, a ModelProto or an onnx_ir.Model becomes a checked `onnx_ir.Model` whose weights are not loaded."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from cipm_ir.errors import InputError, UnsupportedError
from cipm_ir.frontends.onnx.checks import check_proto, is_sorted, sort_nodes
from cipm_ir.frontends.onnx.mapped import DataFolder, map_external
from cipm_ir.frontends.onnx.repairs import repaired
from cipm_ir.runtime.checks import check_finite, check_shapes
from cipm_ir.runtime.graphs import LISTED, all_graphs, quiet

__all__ = ["Loaded", "check_finite", "check_shapes", "load_onnx"]


@dataclass(frozen=True)
class Loaded:
    """A model that was read, and what it was read from.

    Attributes:
        model: the graph; its own copy, whose tensors are shared with the source.
        kind: what came in: a file, an `onnx.ModelProto` or an `onnx_ir.Model`.
        path: the absolute path of the file, None for objects.
        external: some weights lie in external data files.
        external_files: these files.
    """

    model: ir.Model
    kind: Literal["path", "proto", "ir"]
    path: Path | None
    external: bool
    external_files: tuple[Path, ...]


def load_onnx(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> Loaded:
    """Read and check an ONNX model; external weights stay mapped, and the source is never changed.

    Structure is checked, in time linear in the number of nodes; for the rest see `check_shapes` and `check_finite`.
    Nodes in another order are sorted, and what onnxruntime puts right is put right (`onnx_repairs`).

    Raises:
        InputError: no such file, not an ONNX model, truncated, inconsistent, cyclic, external data missing or outside.
        UnsupportedError: training info, map types, sparse tensors but for weights, versions that onnx does not know.
    """
    if isinstance(source, ir.Model):
        return _load_ir(source)
    if isinstance(source, onnx.ModelProto):
        return _load_proto(source, "proto", None)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(f"A model is a path, an onnx.ModelProto or an onnx_ir.Model, not {type(source).__name__}.")
    path = Path(os.path.abspath(source))
    try:
        return _load_proto(_parse(path), "path", path)
    except (InputError, UnsupportedError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{os.fspath(source)}: {error}") from error.__cause__


def _parse(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder, not an ONNX file.")
    try:
        size = path.stat().st_size
        if size == 0 and path.is_file():
            raise InputError(f"{str(path)!r} is an empty file, not an ONNX model.")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            with memoryview(mapped) as view:
                proto = onnx.ModelProto()
                proto.ParseFromString(view)  # parsing from the mapping saves a copy of the embedded weights
            return proto
    except FileNotFoundError:
        raise InputError(f"There is no file {str(path)!r}.") from None
    except DecodeError:
        if size >= 2**31:
            text = f"{str(path)!r} has {size} bytes, above protobuf's limit of 2 GB; save it with external data."
        else:
            text = f"{str(path)!r} is not an ONNX model, or is truncated: it cannot be parsed as protobuf."
        raise InputError(text) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _load_proto(proto: onnx.ModelProto, kind: Literal["path", "proto"], path: Path | None) -> Loaded:
    proto = repaired(proto, own=kind == "path")
    check_proto(proto)
    try:
        with quiet("onnx_ir"):  # `sort_nodes` reports these defects as one error
            model = ir.from_proto(proto)
    except ir.serde.SerdeError as error:
        cause = _root(error)
        refused = UnsupportedError if isinstance(cause, NotImplementedError) else InputError
        raise refused(f"The model cannot be read: {str(cause).strip().splitlines()[0]}") from error
    _mark_listed(proto.graph, model.graph)
    sort_nodes(model)
    folder = DataFolder(path)
    map_external(all_graphs(model), folder)
    return Loaded(model, kind, path, bool(folder.paths), folder.paths)


def _load_ir(source: ir.Model) -> Loaded:
    if not is_sorted(source):  # onnx_ir cannot clone it, and the caller's own stays as it is
        return replace(_load_proto(ir.to_proto(source), "proto", None), kind="ir")
    for graph in all_graphs(source):
        for value in graph.initializers.values():
            if value.const_value is None:
                raise InputError(f"Initializer {value.name!r} of graph {graph.name!r} has no tensor.")
    model = source.clone()
    folder = DataFolder(None)
    map_external(all_graphs(model), folder)
    return Loaded(model, "ir", None, bool(folder.paths), folder.paths)


def _mark_listed(proto: onnx.GraphProto, graph: ir.Graph) -> None:
    """Remember which initializers have a value_info entry, in the main graph and its subgraphs."""
    for info in proto.value_info:
        value = graph.initializers.get(info.name)
        if value is not None:
            value.meta[LISTED] = True
    if not any(attribute.HasField("g") or attribute.graphs for node in proto.node for attribute in node.attribute):
        return
    for node_proto, node in zip(proto.node, graph, strict=True):
        for attribute in node_proto.attribute:
            inner = node.attributes[attribute.name]
            if attribute.HasField("g"):
                _mark_listed(attribute.g, inner.as_graph())
            for subproto, subgraph in zip(attribute.graphs, inner.as_graphs() if attribute.graphs else (), strict=True):
                _mark_listed(subproto, subgraph)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
