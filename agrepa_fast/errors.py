"""Errors that a user can put right, and the nearest known name for one that is misspelt."""

import difflib
import re
import sys
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LONGEST = 1000  # characters of a message


class UserError(Exception):
    """An error that the user can put right. Its one line names the thing and the remedy; commands print it and exit
    with code 2. Line breaks and control characters of names in it are escaped, and the middle of a long line is cut."""

    def __init__(self, message: str):
        message = _CONTROL.sub(lambda found: repr(found[0])[1:-1], message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} … {message[-_LONGEST // 2 :]}"
        super().__init__(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" if one of `known` is close to `name`, and the list of all of them otherwise."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line: of an OSError the file and the reason, and the variable to set if
    there is no folder for temporary files."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        text = ": ".join([" to ".join(places), error.strerror] if places else [error.strerror])
        if error.strerror.startswith("No usable temporary directory"):
            text += ": set TMPDIR to a folder that can be written"
    return " ".join(text.splitlines()) or type(error).__name__


def print_any_name() -> None:
    """Let stdout write names that its encoding cannot, as stderr does, instead of raising UnicodeEncodeError."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
