"""The text form of a pipeline: passes joined by commas, options in braces: `canonicalize, prune{macs=0.5, norm=l1}`.

    pipeline = pass {"," pass}          value = word | '"' text '"' | "(" [value {"," value} [","]] ")"
    pass     = name ["{" [option {"," option}] "}"]        option = key "=" value

A word is read as its option's type wants it; a quoted text is always a text. Hyphens in a key count as underscores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx_ir as ir

from cipm_ir.errors import OptionError
from cipm_ir.passes.framework.base import Pass
from cipm_ir.passes.framework.onnx_ir_pass import OnnxIrPass
from cipm_ir.passes.framework.options import Word, options_of
from cipm_ir.passes.framework.registry import lookup, names
from cipm_ir.passes.framework.spelling import NAME, respelled

Passes: TypeAlias = str | Pass | ir.passes.PassBase | Iterable[str | Pass | type[Pass] | ir.passes.PassBase]
"""What names passes: text, pass objects, passes of onnx_ir, or a mix of these."""
_TOKEN = re.compile(r'\s*(?:(?P<mark>[,{}()=])|(?P<quoted>"(?:[^"\\]|\\.)*")|(?P<word>[^\s,{}()="\\]+))')


def parse_passes(source: Passes) -> tuple[Pass, ...]:
    """Passes from names, pass objects, or a mix; a text may hold several passes joined by commas.

    Raises:
        OptionError: the message names pass and option, with what is allowed.
    """
    if isinstance(source, str):
        try:
            return _Parser(source).pipeline()
        except _UnreadableError as error:
            raise OptionError(str(error)) from None
    if isinstance(source, Pass):
        return (source,)
    if isinstance(source, ir.passes.PassBase):
        return (OnnxIrPass(source),)
    if not isinstance(source, Iterable):
        raise OptionError(f"passes= takes names, pass objects, or a list of these, not {type(source).__name__}.")
    made: list[Pass] = []
    for item in source:
        if isinstance(item, type) and issubclass(item, Pass):
            made.append(make_pass(item, {}))
        elif isinstance(item, str | Pass | ir.passes.PassBase):
            made += parse_passes(item)
        else:
            raise OptionError(f"passes= takes names and pass objects; {item!r} is a {type(item).__name__}.")
    return tuple(made)


def print_passes(passes: Iterable[Pass]) -> str:
    """Return the text form of a pipeline; `parse_passes` reads it back."""
    return ", ".join(map(str, passes))


def make_pass(cls: type[Pass], values: dict[str, Any]) -> Pass:
    """Return a pass with these options, by their names.

    Raises:
        OptionError: unknown, missing and unfit options.
    """
    options = {option.name: option for option in options_of(cls)}
    for key in values:
        if key not in options:
            raise OptionError(f"Pass {cls.name!r} has no option {key!r}; {_options_hint(key, options)}")
    for option in options.values():
        if option.required and option.name not in values:
            raise OptionError(f"Pass {cls.name!r} needs option {option.name!r}: {option.allowed}.")
    return cls(**values)


def _options_hint(key: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(options), 2, 0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"it takes {', '.join(options)}." if options else "it takes none."


class _UnreadableError(OptionError):
    """The text does not follow the grammar."""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Parser:
    """Recursive descent over the grammar at the top of this file."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.tokens = list(self._scan(source))
        self.next = 0

    def _scan(self, source: str) -> Iterable[_Token]:
        at = 0
        while source[at:].strip():
            found = _TOKEN.match(source, at)
            if found is None:
                raise self._error("a quote or backslash without its end", len(source[:at]) + 1)
            kind = found.lastgroup or ""
            yield _Token(kind, found.group(kind), found.start(kind))
            at = found.end()

    def pipeline(self) -> tuple[Pass, ...]:
        passes = [self.one_pass()]
        while self.take(","):
            passes.append(self.one_pass())
        if self.next < len(self.tokens):
            raise self._error(f"{self.tokens[self.next].text!r} where a comma or the end should be")
        return tuple(passes)

    def one_pass(self) -> Pass:
        token = self.peek()
        word = self.word("the name of a pass")
        assert token is not None
        bare = NAME.match(word)
        name = word if bare is None else bare[0]
        cls = lookup(name)
        values: dict[str, Any] = {}
        behind = self.peek()
        if name != word or (behind is not None and (behind.kind == "word" or behind.text in ("(", "="))):
            raise self._misspelled(cls, token.at + len(name))
        if self.take("{") and not self.take("}"):
            try:
                self.one_option(cls, values)
                while self.take(","):
                    self.one_option(cls, values)
                self.expect("}")
            except _UnreadableError as error:
                rest = self.source[token.at + len(name) :]
                raise OptionError(
                    f"{str(error).rstrip('.')}; write {respelled(name, rest, options_of(cls))!r}."
                ) from None
        return make_pass(cls, values)

    def _misspelled(self, cls: type[Pass], at: int) -> OptionError:
        """The options of a pass do not stand in braces right behind its name."""
        behind = self.peek()
        if behind is not None and behind.text in names():
            what, meant = "a comma stands between passes", f"{cls.name}, {behind.text}"
        else:
            meant = respelled(cls.name, self.source[at:], options_of(cls))
            what = "options of a pass stand in braces behind its name"
            what = what if "{" in meant else "a pass without options is its name alone"
        return OptionError(f"The passes {self.source!r} cannot be read: column {at + 1}: {what}; write {meant!r}.")

    def one_option(self, cls: type[Pass], values: dict[str, Any]) -> None:
        key = self.word("the name of an option").replace("-", "_")
        if key in values:
            raise OptionError(f"Pass {cls.name!r}: option {key!r} is given twice.")
        self.expect("=")
        values[key] = self.value()

    def value(self) -> Any:
        if self.take("("):
            entries: list[Any] = []
            while not self.take(")"):
                entries.append(self.value())
                if not self.take(","):
                    self.expect(")")
                    break
            return tuple(entries)
        token = self.peek()
        if token is not None and token.kind == "quoted":
            self.next += 1
            return re.sub(r"\\(.)", r"\1", token.text[1:-1])
        return Word(self.word("a value"))

    def word(self, what: str) -> str:
        token = self.peek()
        if token is None or token.kind != "word":
            raise self._error(f"{'the end' if token is None else repr(token.text)} where {what} should be")
        self.next += 1
        return token.text

    def peek(self) -> _Token | None:
        return self.tokens[self.next] if self.next < len(self.tokens) else None

    def take(self, mark: str) -> bool:
        token = self.peek()
        if token is None or token.kind != "mark" or token.text != mark:
            return False
        self.next += 1
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            token = self.peek()
            raise self._error(f"{'the end' if token is None else repr(token.text)} where {mark!r} should be")

    def _error(self, what: str, column: int | None = None) -> OptionError:
        if column is None:
            token = self.peek()
            column = (len(self.source) if token is None else token.at) + 1
        return _UnreadableError(f"The passes {self.source!r} cannot be read: column {column} has {what}.")
