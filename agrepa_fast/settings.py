"""Typed settings: the type, the bounds, the default and the meaning of a setting stand in one line.

    @section("train.")
    class TrainConfig:
        steps: Count = setting(500_000, "optimizer steps")

pydantic checks the values; a value that fails gives one line that names the setting, the value and what is allowed.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from .errors import UserError, nearest

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list", "string": "a text"}


def setting(default: object, meaning: str, *, resume: bool = False) -> typing.Any:
    """Return a field of a section. meaning: its line in the configuration reference. resume: a resumed run may change
    it, because no number of the run depends on it."""
    metadata = {"meaning": meaning, "resume": resume}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(prefix: str) -> Callable[[type], type]:
    """Make a frozen dataclass of a class of settings. prefix: what its settings are called by in messages, `train.` for
    one. Creating an object raises UserError for a value of the wrong type or out of bounds."""

    def decorate(cls: type) -> type:
        config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
        cls = dataclass(cls, frozen=True, config=config)
        create = cls.__init__

        @functools.wraps(create)
        def checked(self, *args, **values) -> None:
            try:
                create(self, *args, **values)
            except ValidationError as error:
                raise UserError(_line(cls, prefix, error, values)) from None

        cls.__init__ = checked
        return cls

    return decorate


def setting_names(part: type) -> tuple[str, ...]:
    """The settings that a section, or a part of one, declares."""
    return tuple(field.name for field in dataclasses.fields(part))


def allowed(cls: type, name: str) -> str:
    """Return what a setting takes, in words: "at least 1", "erf or tanh", "in [0, 1)", "true or false"."""
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    return _allowed(hint).replace("must not be", "not").replace("must be ", "") or _kind(hint)


def _kind(hint: object) -> str:
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return f"{_kind(parts[0])}, or null"
    if typing.get_origin(hint) is list:
        return f"a list, each {_kind(parts[0])}"
    return _KINDS[{str: "string"}.get(hint, getattr(hint, "__name__", ""))]


def _line(cls: type, prefix: str, error: ValidationError, values: dict[str, object]) -> str:
    """Return the message for the first error. values: what the section was created with."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    if name not in setting_names(cls):
        return f"{prefix}{name} is unknown: {nearest(name, setting_names(cls))}"
    shown = f"{prefix}{name.replace('_', '-') if prefix == '--' else name}"
    value = _shown(values.get(name, first["input"]))
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    kind = first["type"].partition("_")[0]
    if first["type"].endswith(("_type", "_parsing", "_from_float")) and kind in _KINDS:
        null = ", or null" if type(None) in typing.get_args(hint) else ""
        return f"{shown}={value}: {_KINDS[kind]} is wanted{null}"
    if first["type"] == "literal_error":
        value = repr(value)
    return f"{shown}={value}: {_allowed(hint) or first['msg']}"


def _shown(value: object) -> object:
    """Return the value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value


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
        text = _allowed(parts[0])
        bounds = {}
        for field in parts[1:]:
            for bound in field.metadata:
                bounds |= {
                    k: getattr(bound, k)
                    for k in ("ge", "gt", "le", "lt", "min_length", "max_length")
                    if hasattr(bound, k)
                }
        return ", ".join(part for part in (_length(bounds), _bounds(bounds) or text) if part)
    return ""


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
