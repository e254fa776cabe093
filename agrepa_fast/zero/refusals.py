"""What DeepSpeed and pydantic refuse in a ds_config, in one line that names the field, its value and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from pydantic import ValidationError

from ..errors import UserError, nearest

# Not about the ds_config: memory, other ranks, files, and what we raise ourselves.
_OTHERS = (UserError, OSError, MemoryError, torch.OutOfMemoryError, dist.DistError)


def check_ds_config(ds_config: dict) -> None:
    """Raise UserError for what DeepSpeed refuses in a resolved ds_config. Call it inside the process group, before
    anything is made that takes long."""
    from deepspeed.runtime.config import DeepSpeedConfig

    with deepspeed_refusals(ds_config):
        DeepSpeedConfig(ds_config)


@contextmanager
def deepspeed_refusals(ds_config: dict | None = None) -> Iterator[None]:
    """Raise UserError for what DeepSpeed objects to in a ds_config, whatever the type of its exception."""
    try:
        yield
    except _OTHERS:
        raise
    except ValidationError as error:
        raise UserError(_field_line(error, ds_config or {})) from error
    except Exception as error:
        if isinstance(error, RuntimeError) and _is_of_the_machine(str(error)):
            raise
        kind = "" if isinstance(error, AssertionError | ValueError) else f"{type(error).__name__}: "
        reason = f"{kind}{' '.join(str(error).split())[:300]}" if str(error) else type(error).__name__
        raise UserError(f"DeepSpeed refuses this ds_config: {reason}{_named(str(error), ds_config or {})}") from error


def _is_of_the_machine(text: str) -> bool:
    return any(part in text for part in ("CUDA", "NCCL", "gloo", "can't allocate memory", "Error building extension"))


def _field_line(error: ValidationError, ds_config: dict) -> str:
    """Return the line about pydantic's first error. Its title is the name of a class of DeepSpeed's."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    section = _section_of(path, first.get("input"), ds_config)
    field, value = ".".join(path) or "value", repr(first.get("input"))
    if first["type"] == "extra_forbidden":
        reason = f"is unknown: {nearest(path[-1], _zero_fields())}" if len(path) == 1 else "is unknown: remove it"
        return f'ds_config "{section}": {field}={value[:80]} {reason}'
    return f'ds_config "{section}": {field}={value[:80]}: {first["msg"]}: correct it, or remove it for the default'


def _section_of(path: list[str], value: object, ds_config: dict) -> str:
    """Return the section of a ds_config that has a field."""
    for section, content in ds_config.items():
        if isinstance(content, dict) and path and path[0] in content:
            return section
    return "zero_optimization"


def _zero_fields() -> list[str]:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]


def _named(text: str, ds_config: dict) -> str:
    """Return the remedy for a message: the first field of the ds_config in it, with its value."""
    for section, content in ds_config.items():
        for name, value in content.items() if isinstance(content, dict) else [(section, content)]:
            if name in text:
                where = section if name == section else f"{section}.{name}"
                return f" ({where}={str(value)[:80]}: correct or remove it)"
    return ""
