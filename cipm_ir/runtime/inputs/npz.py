"""Arrays of ``.npz`` files read row by row, several in step: none of them is held whole."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError

Array = npt.NDArray[Any]

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_READ = 1 << 20
"""Bytes that are read at once: the file object makes a copy of what it is asked for."""


class Archive(Mapping[str, "Rows"]):
    """The arrays of a file by name; looking one up reads its header only. Use it as a context manager.

    Raises:
        InputError: no such file, not a zip file, or an array that is damaged or would have to be unpickled.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shown = repr(os.fspath(path))
        self._opened = contextlib.ExitStack()
        with self.errors():
            self._zip = self._opened.enter_context(zipfile.ZipFile(path))
            self._names = {name.removesuffix(".npy"): name for name in self._zip.namelist()}

    def __getitem__(self, name: str) -> Rows:
        return Rows(self, name, self._zip.getinfo(self._names[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def open(self, info: zipfile.ZipInfo) -> IO[bytes]:
        """Return a member from its beginning; any number may be open at once, until the archive is closed."""
        return self._opened.enter_context(self._zip.open(info))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what zip, zlib and numpy raise on a bad file into `InputError`."""
        try:
            yield
        except MemoryError:
            raise
        except FileNotFoundError:
            raise InputError(f"There is no data file {self._shown}.") from None
        except Exception as error:  # each compression method has its own kinds
            raise InputError(f"{self._shown} is not an .npz file of plain arrays: {error}.") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


class Rows:
    """One array of an archive, taken from its beginning to its end.

    Attributes:
        shape, dtype: of the whole array.
    """

    def __init__(self, archive: Archive, name: str, info: zipfile.ZipInfo) -> None:
        self._archive, self._name, self._info = archive, name, info
        self._whole: Array | None = None
        self._taken = 0
        with archive.errors():
            self._file = archive.open(info)
            version = np.lib.format.read_magic(self._file)
            if version not in _HEADERS:
                raise ValueError(f"the array {name!r} is in version {version} of the format")
            self.shape, self._fortran, self.dtype = _HEADERS[version](self._file)
            if self.dtype.hasobject:
                raise ValueError(f"the array {name!r} holds Python objects; save numbers instead")
            if info.file_size - self._file.tell() < math.prod(self.shape) * self.dtype.itemsize:
                raise ValueError(f"the array {name!r} is cut off")

    def take(self, count: int) -> Array:
        """Return the next ``count`` rows; the array itself where it has no axes.

        Raises:
            InputError: the file is damaged.
        """
        with self._archive.errors():
            # By columns, the rows are spread over all of the member: only then it is read whole.
            if self._fortran or not self.shape:
                return self._cut(count)
            out = np.empty((count, *self.shape[1:]), self.dtype)
            self._fill(memoryview(out.reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
            return out

    def _cut(self, count: int) -> Array:
        if self._whole is None:
            self._whole = np.lib.format.read_array(self._archive.open(self._info), allow_pickle=False)
        if not self.shape:
            return self._whole
        self._taken += count
        return self._whole[self._taken - count : self._taken]

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done : done + _READ])  # type: ignore[attr-defined]
            if not got:
                raise ValueError(f"the array {self._name!r} is cut off")
            done += got


@dataclass(frozen=True)
class Files:
    """Several ``.npz`` or ``.npy`` files, opened one after the other, as often as they are gone through."""

    paths: tuple[str, ...]

    def __iter__(self) -> Iterator[Archive | Array]:
        for path in self.paths:
            if path.endswith(".npy"):
                yield mapped(path)
                continue
            with Archive(path) as archive:
                yield archive


def mapped(path: str | os.PathLike[str]) -> Array:
    """Return the array of a ``.npy`` file, which stays on disk.

    Raises:
        InputError: no such file, damaged, or of objects.
    """
    shown = repr(os.fspath(path))
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except FileNotFoundError:
        raise InputError(f"There is no data file {shown}.") from None
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{shown} is not a .npy file of numbers: {error}.") from error
