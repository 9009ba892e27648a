"""External weights, mapped once per file.

`onnx_ir.ExternalTensor` opens its file again, by name, each time it is written. A model saved over its own file would
then read the new bytes through the old offsets. Here a tensor holds a view of one shared mapping: the mapping keeps
the old file alive, so a model that was loaded stays what it was whatever happens to the name.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cipm_ir.errors import InputError


class MappedFile:
    """A read-only mapping of a whole data file; nothing is read before it is touched."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None

    def view(self, offset: int, length: int) -> memoryview:
        """Return the bytes [offset, offset + length) without copying them."""
        return memoryview(self._map)[offset : offset + length] if self._map is not None and length else memoryview(b"")

    def drop_pages(self, offset: int, length: int) -> None:
        """Tell the system that these pages are not needed now, so that they do not count as resident memory."""
        if self._map is not None and hasattr(self._map, "madvise"):
            start = offset - offset % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + length - start)


class MappedTensor(ir.ExternalTensor):
    """An `onnx_ir.ExternalTensor` whose bytes are a view of a `MappedFile`; it never opens its path again."""

    __slots__ = ("_file", "_view")

    def __init__(self, tensor: ir.ExternalTensor, file: MappedFile) -> None:
        super().__init__(
            tensor.location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props) or None,
            base_dir=tensor.base_dir,
        )
        self._file = file
        self._view = file.view(tensor.offset or 0, tensor.nbytes)

    def numpy(self) -> npt.NDArray[Any]:
        """Return the weights as a read-only array over the mapping (sub-byte types are unpacked into memory)."""
        if self.size == 0:
            return np.zeros(self.shape.numpy(), dtype=self.dtype.numpy())
        if self.dtype.bitwidth < 8:
            packed = np.frombuffer(self._view, dtype=np.uint8)
            return ir.PackedTensor(packed, self.dtype, shape=self.shape).numpy()
        stored = np.dtype(self.dtype.numpy()).newbyteorder("<")
        return np.frombuffer(self._view, dtype=stored).reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None) -> npt.NDArray[Any]:
        return self.numpy().__array__(dtype)

    def tobytes(self) -> bytes:
        """Return a copy of the stored bytes, little endian."""
        return bytes(self._view)

    def tofile(self, file: Any) -> None:
        """Write the stored bytes to an open binary file and give their pages back."""
        file.write(self._view)
        self.drop_pages()

    def drop_pages(self) -> None:
        """Give back the memory of the pages that were touched; they are read again when needed."""
        self._file.drop_pages(self.offset or 0, self.nbytes)


class DataFolder:
    """Resolves and checks the external data of one model; opens each file once.

    `model` is the path of the model file; None for a model given as an object, whose tensors carry their own folder.
    """

    def __init__(self, model: Path | None) -> None:
        self._folder = model.parent if model is not None else None
        # Download caches keep links to model and data in one folder, and both files in another.
        self._real = Path(os.path.realpath(model)).parent if model is not None else None
        self._files: dict[Path, MappedFile] = {}
        self._located: dict[tuple[str, str], Path] = {}

    @property
    def paths(self) -> tuple[Path, ...]:
        """The data files in use, in the order of first use."""
        return tuple(self._files)

    def tensor(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        """Return the same tensor over a mapping.

        Raises:
            InputError: the file is missing, unreadable, too short or outside the folder of the model, or the declared
                length contradicts the shape.
        """
        if isinstance(tensor, MappedTensor):
            return tensor
        name, offset = tensor.name, tensor.offset or 0
        if tensor.dtype == ir.DataType.STRING:
            raise InputError(f"Tensor {name!r} holds strings as external data, which ONNX does not define.")
        if tensor.length is not None and tensor.length != tensor.nbytes:
            raise InputError(
                f"Tensor {name!r} has shape {list(tensor.shape)} of {tensor.dtype.name}, which takes {tensor.nbytes} "
                f"bytes, but declares {tensor.length} bytes of external data in {str(tensor.location)!r}."
            )
        key = os.fspath(tensor.base_dir), os.fspath(tensor.location)
        path = self._located.get(key) or self._locate(tensor)
        self._located[key] = path
        if path not in self._files:
            self._files[path] = _open(path, name)
        file = self._files[path]
        if offset < 0 or offset + tensor.nbytes > file.size:
            raise InputError(
                f"External data file {str(path)!r} has {file.size} bytes, but tensor {name!r} needs bytes {offset} to "
                f"{offset + tensor.nbytes}; the file is truncated or belongs to another model."
            )
        if self._folder is not None:
            tensor.base_dir = str(self._folder)
        return MappedTensor(tensor, file)

    def _locate(self, tensor: ir.ExternalTensor) -> Path:
        location = os.fspath(tensor.location)
        if self._folder is None and not tensor.base_dir:
            raise InputError(
                f"Tensor {tensor.name!r} lies in the external data file {location!r}, and a model given as an object "
                "has no folder to look in; give the path of the .onnx file, or load its external data first."
            )
        folder = self._folder or Path(os.path.abspath(tensor.base_dir))
        path = Path(os.path.normpath(folder / location))
        real = Path(os.path.realpath(path))
        allowed = real.is_relative_to(os.path.realpath(folder)) or (
            self._real is not None and real.parent == self._real
        )
        inside = path.is_relative_to(folder) and allowed
        if os.path.isabs(location) or not inside or path == folder:
            raise InputError(
                f"Tensor {tensor.name!r} refers to external data at {location!r}, outside the folder of the model "
                f"({str(folder)!r}), which is refused; put the data file beside the model."
            )
        return path


def _open(path: Path, tensor: str) -> MappedFile:
    if path.is_dir():
        raise InputError(f"External data file {str(path)!r} of tensor {tensor!r} is a folder.")
    try:
        return MappedFile(path)
    except FileNotFoundError:
        raise InputError(
            f"External data file {str(path)!r} of tensor {tensor!r} is missing; put it beside the model."
        ) from None
    except OSError as error:
        raise InputError(f"External data file {str(path)!r} of tensor {tensor!r}: {error.strerror}.") from error


def map_external(graphs: list[ir.Graph], folder: DataFolder) -> None:
    """Replace every external tensor of these graphs, in initializers and in attributes, by a mapped one."""
    for graph in graphs:
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = folder.tensor(value.const_value)
        for node in graph:
            _map_attributes(node.attributes, folder)


def _map_attributes(attributes: Mapping[str, ir.Attr], folder: DataFolder) -> None:
    for name, attribute in list(attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            mapped = ir.AttrTensor(name, folder.tensor(attribute.value), doc_string=attribute.doc_string)
            attributes[name] = mapped  # type: ignore[index]
