"""Errors that a user can put right, and the nearest known name for one that is misspelt."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can put right. Its one line names the thing and the remedy; commands print it and exit
    with code 2."""


class LocalError(UserError):
    """A UserError of this rank alone, while the others are fine."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" if one of `known` is close to `name`, and the list of all of them otherwise."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
