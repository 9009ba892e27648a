"""What was probably meant by a pass that is not spelled as the text form wants it: `prune(macs=0.5)`, `macs=50%`."""

from __future__ import annotations

import re

from cipm_ir.passes.framework.options import Option, as_share

NAME = re.compile(r"[A-Za-z][\w.-]*")
_PAIR = re.compile(
    r"""["']?-{0,2}(?P<key>[A-Za-z_][\w-]*)["']?      # macs, 'macs', --macs
        \s*(?:[=:]+|\s)\s*
        (?P<value>\([^()]*\)|\[[^\[\]]*\]|"[^"]*"|'[^']*'|\d+,\d+(?=\s*(?:[\])}>]|$))|[^\s,;=:()\[\]{}<>"']+)""",
    re.VERBOSE,
)


def respelled(name: str, rest: str, options: tuple[Option, ...]) -> str:
    """Return the pass with its options in braces, as far as they can be told; else what the form looks like.

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
