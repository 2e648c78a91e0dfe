"""The one error for bad input: it names what was given and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


class UserError(Exception):
    """Bad input, reported without a traceback.

    :param key: the configuration key, argument or file concerned.
    :param expected: what is allowed.
    :param got: what was given, or None if nothing was.
    :param hint: what to do about it.
    :param every_rank: whether each process that raises it says so, and not the first alone.
    """

    def __init__(
        self, key: str, expected: str, got: object | None = None, hint: str | None = None, *, every_rank: bool = False
    ) -> None:
        super().__init__(key, expected, got, hint)  # all of them, so that it can be pickled and sent to other processes
        self.key, self.expected, self.got, self.hint = key, expected, got, hint
        self.every_rank = every_rank

    def __str__(self) -> str:
        text = f"{_short(self.key)}: expected {self.expected}"
        if self.got is not None:
            text += f", got {_short(self.got)}"
        text = f"{text} ({self.hint})" if self.hint else text
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)  # one line


def _short(value: object, limit: int = 300) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # integers of more than 4,300 digits; deep lists
        return f"a huge {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` or an empty string, and then all known names, unless they are a page beside a guess."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if match and len(names) > 40:
        return f"did you mean {match[0]!r}?"
    return (f"did you mean {match[0]!r}? " if match else "") + "known: " + ", ".join(names)
