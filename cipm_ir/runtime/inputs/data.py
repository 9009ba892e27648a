"""Data as users hold it, as dicts of arrays by input name: the one place that knows what may be given.

Accepted are a dict of arrays or tensors by input name; an array or tensor, for a model of one input; a tuple or list of
them, one for each input; an iterable of such batches (a DataLoader, a generator, a list); and paths: an .npz or .npy
file, a list of them, a folder.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cipm_ir.errors import InputError
from cipm_ir.runtime.inputs.npz import Archive, Files, Rows, mapped

Array: TypeAlias = npt.NDArray[Any]
Data: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]

FORMS = (
    "a dict of arrays by input name, an array, a tuple of one array for each input, an iterable of such batches, or a "
    "path to .npz or .npy"
)


@dataclass(frozen=True)
class Named:
    """An iterable of batches, each given out as a mapping by input name; it can be read as often as its source."""

    source: Iterable[Any]
    names: tuple[str, ...]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for number, batch in enumerate(self.source):
            yield by_name(batch, self.names, f"batch {number} of the data")


def normalized(data: Data, names: Sequence[str]) -> Data:
    """Return data as a path to .npz, a mapping by input name, or an iterable of these.

    Only an iterator stays one that can be read once. Nothing of an iterable is read.

    Args:
        data: see the top of this file.
        names: of the inputs of the model, in order.

    Raises:
        InputError: no such file or folder, something else than data, or arrays that do not fit the inputs by number.
    """
    names = tuple(names)
    if isinstance(data, str | os.PathLike):
        return _path(data, names)
    if isinstance(data, Named | Files):
        return data
    if isinstance(data, Mapping) or is_array(data):
        return by_name(data, names, "the data")
    if isinstance(data, list | tuple) and data:
        if all(isinstance(one, str | os.PathLike) for one in data):
            return Named(Files(tuple(os.fspath(one) for one in data)), names)
        if _is_number(data):
            return by_name(_nested(data, "the data"), names, "the data")
        if len(names) > 1 and all(is_array(one) for one in data):
            return by_name(data, names, "the data")
    if isinstance(data, Iterable) and not isinstance(data, bytes):
        made = Named(data, names)
        return iter(made) if iter(data) is data else made
    raise InputError(f"The data is of type {type(data).__name__}; give {FORMS}.")


def by_name(batch: Any, names: Sequence[str], what: str) -> Mapping[str, Any]:
    """Return one batch as a mapping by input name; arrays that no input takes stay as they are.

    Of one input any array will do, whatever a dict calls it. A tuple holds the inputs by position, and labels behind
    them are left out: (images, labels).

    Raises:
        InputError: what it holds is no array, or there are fewer arrays than inputs.
    """
    if isinstance(batch, Archive):
        return batch if set(names) <= set(batch) or len(names) != 1 or len(batch) != 1 else _renamed(batch, names[0])
    if isinstance(batch, Mapping):
        if len(names) == 1 and len(batch) == 1 and names[0] not in batch:
            batch = _renamed(batch, names[0])
        wanted = set(names)
        made = {name: as_array(x, f"{name!r} of {what}") if name in wanted else x for name, x in batch.items()}
        return batch if all(made[name] is x for name, x in batch.items()) else made  # plans know data by identity
    if is_array(batch):
        if len(names) != 1:
            raise InputError(
                f"{capital(what)} is one array, but the model has inputs {', '.join(map(repr, names)) or 'no'}; give "
                "one for each, by name, in a dict or an .npz file."
            )
        return {names[0]: as_array(batch, what)}
    if isinstance(batch, list | tuple) and batch:
        if _is_number(batch):
            return by_name(_nested(batch, what), names, what)
        if isinstance(batch[0], Mapping) or (isinstance(batch[0], list | tuple) and not _is_number(batch[0])):
            return by_name(batch[0], names, what)  # ((a, b), label), or ({...}, label)
        if len(batch) < len(names):
            raise InputError(
                f"{capital(what)} holds {len(batch)} arrays, but the model has {len(names)} inputs: "
                f"{', '.join(map(repr, names))}."
            )
        parts = zip(names, batch, strict=False)
        return {name: as_array(x, f"array {k} of {what}") for k, (name, x) in enumerate(parts)}
    raise InputError(f"{capital(what)} is of type {type(batch).__name__}; give {FORMS}.")


def is_array(x: object) -> bool:
    """Return whether something is an array or a tensor of any library."""
    return hasattr(x, "__array__") and not isinstance(x, str | bytes)


def as_array(x: Any, what: str) -> Any:
    """Return a tensor of any library, or nested lists of numbers, as an array; rows of a file stay on disk.

    Tensors of torch leave their gradients and devices behind; bfloat16 and 8-bit floats, which numpy lacks, come as
    float32, which holds them exactly.

    Raises:
        InputError: not numbers, or lists of different lengths.
    """
    if isinstance(x, Rows | np.ndarray):
        return x
    if any(base.__module__.partition(".")[0] == "torch" for base in type(x).__mro__):
        x = x.detach().cpu()
        x = x if str(x.layout) == "torch.strided" else x.to_dense()
        x = x.resolve_conj().resolve_neg()
        if str(x.dtype) == "torch.bfloat16" or str(x.dtype).startswith("torch.float8"):
            x = x.float()
        return x.numpy()
    return _nested(x, what)


def _nested(x: Any, what: str) -> Array:
    if isinstance(x, list | tuple) and x and is_array(x[0]):
        x = [as_array(one, what) for one in x]
    try:
        array = np.asarray(x)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{capital(what)} cannot be made an array: {str(error).splitlines()[0].rstrip('.')}; pad rows of "
            "different lengths."
        ) from error
    if array.dtype == object:
        raise InputError(f"{capital(what)} holds objects of type {type(x).__name__}, which are no numbers.")
    return array


def _is_number(x: Any) -> bool:
    """Return whether lists go down to a number."""
    while isinstance(x, list | tuple) and x:
        x = x[0]
    return isinstance(x, int | float | np.number | np.bool_)


def _renamed(batch: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return {name: next(iter(batch.values()))}


def _path(path: str | os.PathLike[str], names: tuple[str, ...]) -> Data:
    shown = os.fspath(path)
    if os.path.isdir(shown):
        return _folder(shown, names)
    if shown.endswith(".npy"):
        array = mapped(shown)
        return by_name(array, names, repr(shown))
    if len(names) == 1 and os.path.exists(shown):
        return Named(Files((shown,)), names)
    return shown


def _folder(folder: str, names: tuple[str, ...]) -> Data:
    """Return the .npz files of a folder.

    Without any its .npy files: one for each input, by name, or batches of one input.
    """
    files = sorted(os.listdir(folder))
    archives = tuple(os.path.join(folder, name) for name in files if name.endswith(".npz"))
    if archives:
        return Named(Files(archives), names)
    arrays = {name.removesuffix(".npy"): os.path.join(folder, name) for name in files if name.endswith(".npy")}
    if names and set(names) <= set(arrays):
        return {name: mapped(arrays[name]) for name in names}
    if arrays and len(names) == 1:
        return Named(Files(tuple(arrays.values())), names)
    if arrays:
        raise InputError(
            f"The folder {folder!r} holds {', '.join(repr(f'{name}.npy') for name in itertools.islice(arrays, 4))}, "
            f"but the model has inputs {', '.join(map(repr, names))}; name a file after each."
        )
    raise InputError(
        f"The folder {folder!r} holds no .npz or .npy files; save arrays as the model takes them (images after its "
        "preprocessing)."
    )


def capital(text: str) -> str:
    """Return a sentence with a capital first letter; the others stay."""
    return text[:1].upper() + text[1:]
