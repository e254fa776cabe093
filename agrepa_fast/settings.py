"""Typed settings: the type, the bounds, the default and the meaning of a setting stand in one line.

    @section("train.")
    class TrainConfig:
        steps: Count = setting(500_000, "optimizer steps")

pydantic checks the values; a value that fails gives one line that names the setting, the value and the allowed values.
A text stands for a number or a truth value where one is wanted, and for itself where a text is wanted.
"""

import dataclasses
import functools
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .errors import UserError, nearest
from .files import local_path

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, le=2**20)]  # of tensors in memory
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Period = Annotated[float, Field(gt=0, le=86_400)]  # seconds or minutes that a timer can take
Processes = Annotated[int, Field(ge=0, le=1024)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]

LARGEST_WHOLE, LARGEST = 2**31 - 1, 1e38  # of numbers without bounds of their own: they fit 32 bits
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "names and values",
    "string": "a text",
}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?(e[-+]?[0-9]+)?")  # not 007, and no 1_000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would break the line of a message, or end a path


def setting(default: object, meaning: str, *, resume: bool = False, path: bool = False) -> typing.Any:
    """Return a field of a section. meaning: its line in the configuration reference. resume: a resumed run may change
    it, because no number of the run depends on it. path: a path, or a URL; ~ at its start is the home folder."""
    metadata = {"meaning": meaning, "resume": resume, "path": path}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(prefix: str) -> Callable[[type], type]:
    """Make a frozen dataclass of a class of settings. prefix: of the settings' names in messages, such as `train.`.
    Creating an object raises UserError for a value of the wrong type or out of bounds."""

    def decorate(cls: type) -> type:
        cls = dataclass(cls, frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
        create = cls.__init__

        @functools.wraps(create)
        def checked(self, **values) -> None:
            given = values.copy()
            for field in dataclasses.fields(cls):
                if field.name in values:
                    hint, shown = _hints(cls)[field.name], _called(prefix, field.name)
                    values[field.name] = _value(hint, shown, values[field.name], field.metadata["path"])
            try:
                create(self, **values)
            except ValidationError as error:
                texts = {name: value for name, value in given.items() if isinstance(value, str)}
                raise UserError(_line(cls, prefix, error, values | texts)) from None

        cls.__init__ = checked
        return cls

    return decorate


def check(condition: bool, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def setting_names(part: type) -> tuple[str, ...]:
    """The settings that a section, or a part of one, declares."""
    return tuple(field.name for field in dataclasses.fields(part))


@functools.cache
def _hints(cls: type) -> dict[str, object]:
    return typing.get_type_hints(cls, include_extras=True)


def base_type(cls: type, name: str) -> type:
    """Return str, int, float, bool, list or dict: the type of a setting's values, null aside."""
    return _base(_hints(cls)[name])


def _base(hint: object) -> type:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _base(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return type(parts[0])
    return _base(parts[0]) if origin is Annotated else origin or hint


def _value(hint: object, shown: str, value: object, path: bool) -> object:
    """Return a value as its setting takes it. shown: the setting's name in messages. Raises UserError for a value that
    pydantic would let pass."""
    base = _base(hint)
    if base is str and isinstance(value, str):
        if not value or _CONTROL.search(value):
            kind = "a text without control characters" if value else "a text"
            raise UserError(f"{shown}={_shown(value)}: {kind} is wanted")
        try:
            return str(local_path(value)) if path and value.startswith("~") else value
        except UserError as error:
            raise UserError(f"{shown}={error}") from error
    if base is list and isinstance(value, list):
        return [_value(_item(hint), shown, item, path) for item in value]
    if base is dict:
        return _untyped(shown, value, 0, [])
    return _number(hint, shown, value) if base in (int, float) else value


def _untyped(shown: str, value: object, depth: int, parts: list[object]) -> object:
    """Return texts as the numbers and truth values that they are written like, inside of lists and dicts too. parts:
    all that were looked at; YAML's aliases can make billions of them, or an endless depth."""
    parts.append(value)
    if depth > 20 or len(parts) > 10_000:
        raise UserError(f"{shown}={_shown(value)}: more than 20 values inside each other, or 10000 in all")
    if isinstance(value, dict):
        return {name: _untyped(f"{shown}.{name}", part, depth + 1, parts) for name, part in value.items()}
    if isinstance(value, list):
        return [_untyped(shown, part, depth + 1, parts) for part in value]
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return _number(int if value.lstrip("-").isdigit() else float, shown, value)
    return value


def _number(hint: object, shown: str, value: object) -> object:
    """Return the number that a value is, or that a text stands for; the value if there is none. Raises UserError for
    true and false, and for a number that is too large."""
    base = _base(hint)
    if isinstance(value, bool):
        raise UserError(f"{shown}={_shown(value)}: {_KINDS[base.__name__]} is wanted")
    number = _parsed(value, base) if isinstance(value, str) else value
    if isinstance(number, int | float):
        largest = LARGEST_WHOLE if base is int else LARGEST
        overflows = math.isinf(number) and isinstance(value, str) and "inf" not in value.lower()  # 1e400
        without_bound = not {"le", "lt"} & _limits(hint).keys()
        if overflows or (without_bound and largest < abs(number) < math.inf):
            raise UserError(f"{shown}={_shown(value)}: too large, at most {largest}")
    return number


def _parsed(text: str, base: type) -> object:
    """Return the number in a text, or the text if there is none."""
    try:
        return base(text)
    except ValueError:
        pass
    try:
        number = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))  # as YAML writes them
    except ValueError:
        return text
    return int(number) if base is int and number.is_integer() else number  # 1e5 steps


def _item(hint: object) -> object:
    """Return the type of the items of a list."""
    while typing.get_origin(hint) is not list:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_args(hint)[0]


def allowed(cls: type, name: str) -> str:
    """Return the values that a setting takes, in words: "at least 1", "erf or tanh", "in [0, 1)", "true or false"."""
    hint = _hints(cls)[name]
    return _allowed(hint).replace("must not be", "not").replace("must be ", "") or _kind(hint)


def _kind(hint: object) -> str:
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return f"{_kind(parts[0])}, or null"
    if typing.get_origin(hint) is list:
        return f"a list, each {_kind(parts[0])}"
    if typing.get_origin(hint) is dict:
        return _KINDS["dict"]
    return _KINDS[{str: "string"}.get(hint, getattr(hint, "__name__", ""))]


def _line(cls: type, prefix: str, error: ValidationError, values: dict[str, object]) -> str:
    """Return the message for the first error. values: those of the section, as messages show them."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if name not in setting_names(cls):
        return f"{prefix}{name} is unknown: {nearest(name, setting_names(cls))}"
    shown = _called(prefix, name)
    value = _shown(values.get(name, first["input"]))
    hint = _hints(cls)[name]
    kind = first["type"].partition("_")[0]
    if first["type"].endswith(("_type", "_parsing", "_from_float")) and kind in _KINDS:
        null = ", or null" if type(None) in typing.get_args(hint) else ""
        return f"{shown}={value}: {_KINDS[kind]} is wanted{null}"
    if first["type"] == "literal_error":
        value = repr(value)
    if first["type"] in ("finite_number", "string_unicode"):
        kind = {"finite_number": "a finite number", "string_unicode": "a text in UTF-8"}[first["type"]]
        bounds = _allowed(hint)
        return f"{shown}={value}: {kind} is wanted{f' ({bounds})' if bounds else ''}"
    return f"{shown}={value}: {_allowed(hint) or first['msg']}"


def _called(prefix: str, name: str) -> str:
    """Return the name of a setting in messages."""
    return f"{prefix}{name.replace('_', '-') if prefix == '--' else name}"


def _shown(value: object) -> str:
    """Return the value as YAML writes it, its beginning if it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = reprlib.repr(value) if isinstance(value, list | dict) else str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _allowed(hint: object) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(part for part in parts if part is not type(None))
        text = _allowed(inner)
        return f"{text}, or null" if text and type(None) in parts else text
    if origin is Literal:
        return _either([str(part) for part in parts])
    if origin is list:
        text = _allowed(parts[0])
        return f"each {text.removeprefix('must be ')}" if text else ""
    if origin is Annotated:
        text, bounds = _allowed(parts[0]), _limits(hint)
        return ", ".join(part for part in (_length(bounds), _bounds(bounds) or text) if part)
    return ""


def _limits(hint: object) -> dict[str, float]:
    """Return the bounds that a type states, by their names in pydantic."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return _limits(next(part for part in typing.get_args(hint) if part is not type(None)))
    names = ("ge", "gt", "le", "lt", "min_length", "max_length")
    limits = [limit for part in getattr(hint, "__metadata__", ()) for limit in part.metadata]
    return {name: getattr(limit, name) for limit in limits for name in names if hasattr(limit, name)}


def _bounds(bounds: dict[str, float]) -> str:
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if low is None or high is None:
        if "gt" in bounds:
            return "must be positive" if low == 0 else f"must be above {low}"
        if "ge" in bounds:
            return "must not be negative" if low == 0 else f"at least {low}"
        return "" if high is None else f"at most {high}" if "le" in bounds else f"must be below {high}"
    if "gt" in bounds and "lt" in bounds:
        return f"must be between {low} and {high}"
    if "ge" in bounds and "le" in bounds and isinstance(low, int) and high != 1:
        return f"must be from {low} to {high}"
    return f"must be in {'[' if 'ge' in bounds else '('}{low}, {high}{']' if 'le' in bounds else ')'}"


def _length(bounds: dict[str, int]) -> str:
    low, high = bounds.get("min_length"), bounds.get("max_length")
    if low is None:
        return ""
    return f"{low} values" if low == high else f"at least {low} value{'s' if low > 1 else ''}"


def _either(choices: list[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else choices[0]
