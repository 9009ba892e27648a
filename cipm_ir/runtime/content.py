"""What a model and data are, as a hash: the same content gives the same text, on every run and machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs.data import Data, Named
from cipm_ir.runtime.inputs.npz import Files

_CHUNK = 1 << 20


def model_hash(model: ir.Model) -> str:
    """Return a hash over nodes, names, shapes and every byte of the weights, but not over comments and metadata."""
    digest = hashlib.sha256()
    _add(digest, sorted(model.opset_imports.items()))
    add_graph(digest, model.graph)
    for function in sorted(model.functions.values(), key=lambda f: f.identifier()):
        _add(digest, "function", function.identifier())
        add_graph(digest, function.graph)
    return digest.hexdigest()


def data_hash(data: Data | None) -> str:
    """Return a hash over the bytes of a file, or over names, types, shapes and entries of arrays; "none" without data.

    Args:
        data: as `cipm_ir.runtime.inputs.data.normalized` gives it.

    Raises:
        InputError: no such file; something else than samples; or samples that can be read only once.
    """
    if data is None:
        return "none"
    digest = hashlib.sha256()
    if isinstance(data, (str, os.PathLike)):
        _file(digest, data)
    elif isinstance(data, Mapping):
        _arrays(digest, data)
    elif isinstance(data, Named) and isinstance(data.source, Files):
        _add(digest, [data_hash(path) for path in data.source.paths])
    elif not isinstance(data, Iterable):
        raise InputError(f"The data is of type {type(data).__name__}; give a list, a dict or an .npz file.")
    elif check_repeatable(data):
        one: Any
        for one in data:
            if not isinstance(one, Mapping):
                raise InputError(f"The data holds a {type(one).__name__}; give batches as dicts of arrays.")
            _arrays(digest, one)
    return digest.hexdigest()


def check_repeatable(data: Any) -> bool:
    """Return whether samples can be gone through more than once.

    Raises:
        InputError: they cannot.
    """
    if iter(data) is data:
        raise InputError("The data is an iterator, which can be read only once; give a list, a dict or an .npz file.")
    return True


def add_graph(digest: Any, graph: ir.Graph) -> None:
    """Add nodes, names, shapes and every byte of the weights of a graph, subgraphs included."""
    for values in (graph.inputs, graph.outputs):
        _add(digest, [(v.name, str(v.dtype), str(v.shape)) for v in values])
    for name, value in sorted(graph.initializers.items()):
        _add(digest, name)
        if value.const_value is not None:
            add_tensor(digest, value.const_value)
    for node in graph:
        _add(digest, node.domain, node.op_type, node.overload)
        _add(digest, [v.name if v is not None else None for v in node.inputs], [v.name for v in node.outputs])
        for name, attribute in sorted(node.attributes.items()):
            _add(digest, name, str(attribute.type))
            if attribute.is_ref():
                _add(digest, attribute.ref_attr_name)
            else:
                _attribute(digest, attribute.value)


def _attribute(digest: Any, value: Any) -> None:
    if isinstance(value, ir.Graph):
        add_graph(digest, value)
    elif isinstance(value, ir.TensorProtocol):
        add_tensor(digest, value)
    elif isinstance(value, list | tuple):
        _add(digest, len(value))
        for one in value:
            _attribute(digest, one)
    else:
        _add(digest, value)


def add_tensor(digest: Any, tensor: ir.TensorProtocol) -> None:
    """Add type, shape and bytes of a tensor."""
    _add(digest, str(tensor.dtype), str(tensor.shape))
    digest.update(tensor.tobytes())


def _arrays(digest: Any, arrays: Mapping[str, Any]) -> None:
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        _add(digest, name, str(array.dtype), array.shape)
        if array.dtype.hasobject:
            digest.update(repr(array.tolist()).encode())
            continue
        rows = array if array.ndim else array.reshape(1)  # in pieces: what lies on disk may be larger than memory
        step = max(1, _CHUNK // max(rows[:1].nbytes, 1))
        for start in range(0, len(rows), step):
            digest.update(rows[start : start + step].tobytes())


def _file(digest: Any, path: str | os.PathLike[str]) -> None:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        raise InputError(f"There is no data file {os.fspath(path)!r}.") from None
    except OSError as error:
        raise InputError(f"The data file {os.fspath(path)!r} cannot be read: {error.strerror}.") from error


def _add(digest: Any, *parts: object) -> None:
    # The length in front keeps ("ab", "c") and ("a", "bc") apart.
    text = repr(parts).encode()
    digest.update(f"{len(text)}:".encode() + text)
