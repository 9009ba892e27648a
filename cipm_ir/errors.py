"""Errors that a user can act on.

Every message is one sentence that names the op, value or file and says what to do about it.
Each class says which kind of thing went wrong; the command line turns any of them into exit code 2.
"""

from __future__ import annotations


class CipmError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        """Return the message on one line: names in a file may hold line breaks and other control characters."""
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class InputError(CipmError):
    """The model or the data cannot be used: no such file, not a model, corrupt, inconsistent."""


class UnsupportedError(CipmError):
    """The input is well formed, but uses a feature that is refused rather than handled wrongly."""


class OptionError(CipmError):
    """An unknown pass, an unknown option, or an option value out of range."""


class SymmetryError(CipmError):
    """A requested action, restriction or absorption is not allowed by the symmetry analysis."""


class VerificationError(CipmError):
    """A model no longer computes what it computed before."""


class OutputError(CipmError):
    """The result could not be written; nothing was left behind."""


class UnsupportedPattern(Exception):
    """Raised where a rule, a rewrite or a lowering does not apply, with the reason as one clause.

    It is caught inside the package, where the node is left as it is and the reason goes into a report.
    """
