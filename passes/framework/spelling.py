"""What was probably meant by a pass that is not spelled as the text form wants it: `prune(macs=0.5)`, `macs=50%`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cipm_ir.passes.framework.options import Option

NAME = re.compile(r"[A-Za-z][\w.-]*")
_PAIR = re.compile(
    r"""["']?-{0,2}(?P<key>[A-Za-z_][\w-]*)["']?      # macs, 'macs', --macs
        \s*(?:[=:]+|\s)\s*
        (?P<value>\([^()]*\)|\[[^\[\]]*\]|"[^"]*"|'[^']*'|\d+,\d+(?=\s*(?:[\])}>]|$))|[^\s,;=:()\[\]{}<>"']+)""",
    re.VERBOSE,
)


def respelled(name: str, rest: str, options: tuple[Option, ...]) -> str:
    """The pass with its options in braces, as far as they can be told; else what the form looks like.

    Args:
        name: of the pass.
        rest: the text behind it.
        options: those of the pass.
    """
    known = {option.name: option for option in options}
    found: dict[str, str] = {}
    for pair in _PAIR.finditer(rest):
        key = pair["key"].replace("-", "_")
        if key in known:
            found.setdefault(key, _value(pair["value"], known[key]))
    alone = re.fullmatch(r"\W*?([\d.]+)%?\W*", rest)
    if not found and alone is not None and options:
        found = {options[0].name: _value(alone[1], options[0])}
    if not found:
        return name if not rest.strip("()[]{}<>:= ") else f"{name}{{option=value, ...}}"
    return f"{name}{{{', '.join(f'{key}={value}' for key, value in found.items())}}}"


def _value(text: str, option: Option) -> str:
    if text[0] == "[":
        return f"({text[1:-1]})"
    plain = text.strip("\"'")
    if re.fullmatch(r"\d+,\d+", plain):
        return plain.replace(",", ".")
    if option.high == 1 and (share := as_share(plain)) is not None:
        return f"{share:g}"
    return plain if re.fullmatch(r"[\w.+-]+", plain) else text


def as_share(text: str) -> float | None:
    """The fraction that a percentage stands for: 0.5 for ``50%`` or ``50``; None where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if found is None:
        return None
    number = float(found[1])
    if number > 100 or (number <= 1 and not found[2]):
        return None
    return number / 100


def hint(value: Any, option: Option) -> str:
    """How a value that does not fit would be written, in brackets; empty where that cannot be told."""
    text = str(value)
    share = as_share(text) if option.high == 1 else None
    if share is not None:
        return f" (write {share:g} for {text.strip().rstrip('%')}%)"
    if re.fullmatch(r"\d+/\d+", text) and int(text.partition("/")[2]):
        return f" (write {int(text.partition('/')[0]) / int(text.partition('/')[2]):g})"
    if type(value) is str and re.fullmatch(r"[\d.]+|true|false|none", text):
        return " (write it without quotation marks)"
    return ""
