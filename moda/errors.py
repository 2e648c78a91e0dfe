"""The one kind of error that means: what you gave cannot work, and here is what would."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "nearest"]


class UserError(Exception):
    """A mistake of the user's, to be shown without a traceback.

    :param key: the configuration key, argument or file concerned.
    :param expected: what is allowed.
    :param got: what was given, or None if nothing was.
    :param hint: what to do about it.
    """

    def __init__(self, key: str, expected: str, got: object | None = None, hint: str | None = None) -> None:
        self.key, self.expected, self.got, self.hint = key, expected, got, hint
        text = f"{key}: expected {expected}"
        if got is not None:
            text += f", got {got!r}" if not isinstance(got, str) else f", got {got}"
        if hint:
            text += f" ({hint})"
        super().__init__(text)


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` or an empty string, and then all known names."""
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (f"did you mean {match[0]!r}? " if match else "") + "known: " + ", ".join(names)
