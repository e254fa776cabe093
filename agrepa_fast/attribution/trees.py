"""Tensors inside other people's arguments and outputs: tuples, lists, mappings, dataclasses and plain objects."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
import torch.nn as nn

Path = tuple  # of keys, indices and names of fields: where in a value a tensor stands
_WHOLE = (str, bytes, int, float, complex, type(None), type, ModuleType, nn.Module, torch.dtype, torch.device)


def tensors(value, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Yield (path, tensor) of every tensor in a value, in order. Objects that contain themselves are entered once."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif id(value) not in above:
        for key, part in _parts(value):
            yield from tensors(part, (*path, key), (*above, id(value)))


def replaced(value, new: dict[Path, torch.Tensor]):
    """Return the value with the tensors at these paths in place of its own. What stays the same is not copied."""
    if () in new:
        return new[()]
    below: dict = {}
    for (key, *rest), tensor in new.items():
        below.setdefault(key, {})[tuple(rest)] = tensor
    if not below:
        return value
    parts = {key: replaced(part, below[key]) if key in below else part for key, part in _parts(value)}
    if isinstance(value, tuple):
        return type(value)(*parts.values()) if hasattr(value, "_fields") else tuple(parts.values())
    if isinstance(value, list):
        return list(parts.values())
    changed = copy.copy(value)
    for key in below:
        if isinstance(value, Mapping):
            changed[key] = parts[key]
        else:
            object.__setattr__(changed, key, parts[key])  # a frozen dataclass, too
    return changed


def describe(path: Path) -> str:
    """Return how a user would write the path: rope, rope[0], extra['mask']."""
    name, *keys = path or ("output",)
    return str(name) + "".join(f"[{key!r}]" for key in keys)


def _parts(value) -> list[tuple]:
    if isinstance(value, _WHOLE):
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
    return [] if callable(value) else list(getattr(value, "__dict__", {}).items())
