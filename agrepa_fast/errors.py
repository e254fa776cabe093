"""Errors that a user can put right, and the nearest known name for one that is misspelt."""

import difflib


class UserError(Exception):
    """What a person can put right: one line that names the thing and the remedy. Commands print it and exit with code
    2."""


def nearest(name: str, known) -> str:
    """ "; did you mean 'x'?" when one of `known` is close to `name`, and the list of all of them otherwise."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


class LocalError(UserError):
    """A UserError that this rank alone ran into, while the others are fine."""
