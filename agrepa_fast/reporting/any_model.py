"""`agrepa probe --model`: FoG-A of a model that a user's factory makes."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn

from ..attribution.ablate import VERIFY, ablate
from ..attribution.blocks import find_blocks
from ..audio.waves import make_torchaudio_importable
from ..errors import UserError
from ..files import check_writable
from ..their_code import named_object, their_error
from .probe import report


@dataclass(frozen=True)
class ModelRequest:
    """A model, and how its blocks are gated. Raises UserError for a factory or blocks that are not named.

    factory: MODULE:FACTORY, which returns (model, inputs). blocks: the path of its blocks. kind, row_arguments, state,
    velocity, per_call, verify: as in ablate. traceback: show an error of the user's code whole.
    """

    factory: str
    blocks: str | None
    kind: str = "block"
    row_arguments: Sequence[str] | None = None
    state: str | None = None
    velocity: str | None = None
    per_call: bool = False
    verify: int | None = VERIFY
    traceback: bool = False

    def __post_init__(self) -> None:
        module, _, name = self.factory.partition(":")
        if not module or not name or self.blocks is None:
            raise UserError(f"--model {self.factory}: write MODULE:FACTORY, and --blocks PATH beside it")


def probe_any_model(request: ModelRequest, out: Path) -> None:
    """Measure the layers; write attribution.csv and plots; print tables. Raises UserError, with the place in the user's
    code, if the model cannot be imported, built, run or gated."""
    check_writable(out, "--out")
    try:
        model, inputs = _built(request.factory)
        found = find_blocks(model, request.blocks)
        scores = ablate(
            model,
            inputs,
            list(found.values()),
            kind=request.kind,
            row_arguments=request.row_arguments and [_name(argument) for argument in request.row_arguments],
            state=None if request.state is None else _name(request.state),
            velocity=request.velocity,
            per_call=request.per_call,
            verify=request.verify,
        )
    except (Exception, SystemExit) as error:
        if request.traceback:
            traceback.print_exception(error)
        raise UserError(f"--model {request.factory}: {their_error(error)}") from error
    report([scores], None, out, 3)
    print(f"L1 ... L{len(found)} are {', '.join(found)}")


def _built(factory: str) -> tuple[nn.Module, Mapping]:
    """Return the factory's model and inputs. Modules are found from the current folder."""
    make_torchaudio_importable()  # transformers imports it
    made, name = named_object(factory)(), factory.partition(":")[2]
    if not (isinstance(made, tuple | list) and len(made) == 2):
        raise ValueError(f"{name}() returned {type(made).__name__}, not (model, inputs)")
    model, inputs = made
    if not isinstance(model, nn.Module) or not isinstance(inputs, Mapping):
        kinds = f"({type(model).__name__}, {type(inputs).__name__})"
        raise ValueError(f"{name}() returned {kinds}, not a module and a dictionary of its keyword arguments")
    return model, inputs


def _name(argument: str) -> str | int:
    return int(argument) if argument.isdigit() else argument
