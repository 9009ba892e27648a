"""Options of a pass: their types read off the annotations, conversion from text, and the check of values."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cipm_ir.errors import OptionError

_BARE = re.compile(r"[^\s,{}()=\"\\]+")


class Word(str):
    """A bare word of the text form: may stand for a number, true, false or none. A quoted text is a plain `str`."""

    __slots__ = ()


@dataclass(frozen=True)
class Option:
    """One option of a pass, as its dataclass field describes it."""

    name: str
    annotation: Any
    default: Any
    required: bool
    doc: str
    choices: tuple[Any, ...] | None
    low: float | None
    high: float | None
    above: float | None

    @property
    def allowed(self) -> str:
        """What the option takes, for people: `a number above 0 and at most 1, or none`."""
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        text = describe_type(self.annotation)
        bounds = [
            f"{word} {_plain(limit)}"
            for word, limit in (("above", self.above), ("at least", self.low), ("at most", self.high))
            if limit is not None
        ]
        if not bounds:
            return text
        head, none, _ = text.partition(" or none")
        return f"{head} {' and '.join(bounds)}{',' if none else ''}{none}"


def options_of(cls: type[Any]) -> tuple[Option, ...]:
    """Return the options of a pass class, in the order of its fields.

    Raises:
        OptionError: an annotation is not one that can be written as text.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise OptionError(f"The options of {cls.__name__} cannot be read: {error}; import that name.") from None
    found = []
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        annotation, meta = hints[item.name], item.metadata
        choices = meta.get("choices")
        if choices is None and typing.get_origin(annotation) is typing.Literal:
            choices = typing.get_args(annotation)
        limits = (meta.get("low"), meta.get("high"), meta.get("above"))
        found.append(Option(item.name, annotation, default, required, meta.get("doc", ""), choices, *limits))
    return tuple(found)


def describe_type(annotation: Any) -> str:
    """Return an annotation in words."""
    if annotation is type(None):
        return "none"
    simple = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if annotation in simple:
        return simple[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Callable:
        return "a function"
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        parts = [describe_type(arg) for arg in args if arg is not type(None)]
        return " or ".join([*parts, *(["none"] if type(None) in args else [])])
    if origin in (tuple, list, Sequence):
        inner = [arg for arg in args if arg is not Ellipsis]
        if origin is tuple and Ellipsis not in args:
            return "(" + ", ".join(describe_type(arg) for arg in inner) + ")"
        return f"a list (a, b, …), each {describe_type(inner[0]) if inner else 'anything'}"
    return getattr(annotation, "__name__", str(annotation))


def _plain(limit: float) -> str:
    return f"{limit:g}"


# --- values ---------------------------------------------------------------------------------------


class _Unfit(Exception):
    """The value does not fit the annotation."""


def _convert(value: Any, annotation: Any) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin is typing.Literal:
        return _one_of(value, args)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, args)
    if origin is Callable:
        if not callable(value):
            raise _Unfit
        return value
    if origin in (tuple, list, Sequence) or annotation in (tuple, list):
        return _convert_list(value, origin or annotation, args)
    return _convert_scalar(value, annotation)


def _one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if value == choice or (isinstance(value, Word) and str(choice).lower() == value.lower()):
            return choice
    raise _Unfit


def _first_that_fits(value: Any, members: tuple[Any, ...]) -> Any:
    # None and the narrow types first: as text, everything is a str.
    order = sorted(members, key=lambda member: (member is str, member is float))
    for member in order:
        try:
            return _convert(value, member)
        except _Unfit:
            continue
    raise _Unfit


def _convert_list(value: Any, origin: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise _Unfit
    if origin is tuple and args and Ellipsis not in args:
        if len(value) != len(args):
            raise _Unfit
        return tuple(_convert(entry, arg) for entry, arg in zip(value, args, strict=True))
    inner = args[0] if args else Any
    made = [_convert(entry, inner) for entry in value]
    return made if origin is list else tuple(made)


def _convert_scalar(value: Any, annotation: Any) -> Any:
    if annotation is type(None):
        if value is None or (isinstance(value, Word) and value.lower() == "none"):
            return None
    elif annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, Word) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif annotation in (int, float):
        return _number(value, annotation)
    elif annotation is str:
        if isinstance(value, str):
            return str(value)
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise _Unfit


def _number(value: Any, annotation: type[Any]) -> Any:
    if isinstance(value, bool | list | tuple) or value is None or type(value) is str:
        raise _Unfit
    try:
        number = annotation(value)
    except (TypeError, ValueError, OverflowError):
        raise _Unfit from None
    # int(0.5) is 0: a fraction is no whole number.
    if not isinstance(value, str) and number != value:
        raise _Unfit
    if isinstance(number, float) and not math.isfinite(number):
        raise _Unfit
    return number


def check_options(made: Any, name: str) -> None:
    """Convert and check every option of a pass that was just made; converted values are stored in it.

    Raises:
        OptionError: the message names the pass, the option, the value and what is allowed.
    """
    for option in options_of(type(made)):
        value = checked(getattr(made, option.name), option, name)
        object.__setattr__(made, option.name, value)


def checked(value: Any, option: Option, name: str) -> Any:
    """Return a value that fits an option, converted where it must be."""
    try:
        fitting = _convert(value, option.annotation)
        if option.choices is not None and fitting is not None:
            fitting = _one_of(fitting, option.choices)
        entries = fitting if isinstance(fitting, list | tuple) else [fitting]
        if not all(_within(entry, option) for entry in entries):
            raise _Unfit
    except _Unfit:
        said = f"{option.allowed}, not {value!r}{hint(value, option)}"
        raise OptionError(f"Pass {name!r}: option {option.name!r} takes {said}.") from None
    return fitting


def _within(entry: Any, option: Option) -> bool:
    if isinstance(entry, bool) or not isinstance(entry, int | float):
        return True
    return (
        (option.low is None or entry >= option.low)
        and (option.high is None or entry <= option.high)
        and (option.above is None or entry > option.above)
    )


# --- text -----------------------------------------------------------------------------------------


def print_options(made: Any, name: str) -> str:
    """Return the text form of a pass: its name and the options that differ from their defaults."""
    given = [
        f"{option.name}={_print_value(getattr(made, option.name))}"
        for option in options_of(type(made))
        if option.required or getattr(made, option.name) != option.default
    ]
    return f"{name}{{{', '.join(given)}}}" if given else name


def _print_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        # The comma tells a list of one from a value in brackets.
        return "(" + ", ".join(_print_value(entry) for entry in value) + ("," if len(value) == 1 else "") + ")"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _print_text(value)
    return repr(value)


def _print_text(text: str) -> str:
    if _BARE.fullmatch(text) and not _reads_as_other(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _reads_as_other(text: str) -> bool:
    if text.lower() in ("none", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def as_share(text: str) -> float | None:
    """Return the fraction that a percentage stands for: 0.5 for ``50%`` or ``50``; None where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if found is None:
        return None
    number = float(found[1])
    if number > 100 or (number <= 1 and not found[2]):
        return None
    return number / 100


def hint(value: Any, option: Option) -> str:
    """Return how a value that does not fit would be written, in brackets; empty where that cannot be told."""
    text = str(value)
    share = as_share(text) if option.high == 1 else None
    if share is not None:
        return f" (write {share:g} for {text.strip().rstrip('%')}%)"
    if re.fullmatch(r"\d+/\d+", text) and int(text.partition("/")[2]):
        return f" (write {int(text.partition('/')[0]) / int(text.partition('/')[2]):g})"
    if type(value) is str and re.fullmatch(r"[\d.]+|true|false|none", text):
        return " (write it without quotation marks)"
    return ""
