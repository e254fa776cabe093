"""Other people's code: objects by name, and errors in one line with the place in that code."""

import importlib
import sys
import sysconfig
from pathlib import Path
from types import TracebackType

from .errors import UserError

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OURS = __name__.partition(".")[0]
_LONGEST = 300  # characters of a reason


def named_object(place: str) -> object:
    """Return the object of MODULE:NAME, looked for in the current folder and on PYTHONPATH. Raises ValueError for
    another form, and whatever the import raises."""
    module, _, name = place.partition(":")
    if not (module and name):
        raise ValueError(f"{place!r} is not MODULE:NAME")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, which a script's path lacks
    return getattr(importlib.import_module(module), name)


def their_error(error: BaseException) -> str:
    """Return an error that a factory, a model or a block raised as one line: the innermost place in the user's files,
    the type and the message. A ValueError or UserError of this package is its message alone."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]} …"
    places = _places(error.__traceback__)
    if places and places[-1][0] and isinstance(error, ValueError | UserError):
        cause = _their_place(_places(error.__cause__.__traceback__)) if error.__cause__ else None
        return " ".join(str(error).split()) + (f" ({cause})" if cause else "")
    text = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}: {type(error).__name__}: {error.msg}"
    place = _their_place(places)
    return f"{place}: {text}" if place else text


def _places(trace: TracebackType | None) -> list[tuple[bool, str]]:
    """Return (whether it is in this package, place) of every frame outside of libraries, the innermost last.

    Without a frame of a user's files, those of installed packages stand in for them, torch apart.
    """
    users, all_packages = [], []
    while trace is not None:
        code, module = trace.tb_frame.f_code, trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]
        place = module == _OURS, f"{_short(code.co_filename)}:{trace.tb_lineno}, in {code.co_name}"
        is_package = "site-packages" in Path(code.co_filename).parts
        if place[0] or not (is_package or code.co_filename.startswith(("<", *_LIBRARIES))):
            users.append(place)
        if place[0] or (is_package and module != "torch"):
            all_packages.append(place)
        trace = trace.tb_next
    return users if any(not is_ours for is_ours, _ in users) else all_packages


def _their_place(places: list[tuple[bool, str]]) -> str | None:
    return next((place for is_ours, place in reversed(places) if not is_ours), None)


def _short(path: str) -> str:
    """Return the path relative to the current folder, if it is below it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
