"""FoG-A of any model, at given inputs."""

from collections.abc import Sequence

import torch
import torch.nn as nn

from ..config import DOMAINS
from ..kernels import velocity_change
from .points import evaluation_mode
from .scores import BatchScores, LayerScores
from .variants import Variants, check_floor


@torch.no_grad()
def ablate(
    model: nn.Module,
    inputs: dict,
    blocks: Sequence[nn.Module],
    *,
    gates: torch.Tensor | None = None,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    max_rows: int | None = None,
    domain: str = "audio",
) -> LayerScores:
    """Return how much model(**inputs) changes when each block is left out.

    inputs: keyword arguments. The first tensor has C rows, and every tensor with C rows is repeated for the variants;
    name in `row_arguments` what a block must slice if its size does not tell. The output, or the first of a tuple, is
    the velocity: C rows of any shape. blocks, gates, kind, row_arguments, max_rows: as in multi_gate, but the first row
    of gates is all ones. domain: of all clips.

    Raises ValueError as foga and multi_gate do, and if the inputs have no rows.
    """
    variants = Variants(gates, len(blocks))
    clips = next((value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    if not clips:
        raise ValueError("the inputs hold no tensor with a row for every clip")

    def run(count: int) -> torch.Tensor:
        repeated = {name: _repeat(value, clips, count) for name, value in inputs.items()}
        return _first(model(**repeated)).reshape(count * clips, 1, -1)

    options = {"kind": kind, "row_arguments": row_arguments, "max_rows": max_rows}
    with evaluation_mode(model):
        changes, base = variants.changes(run, blocks, **options)
        alone = _first(model(**inputs)).reshape(1, clips, 1, -1)
    floor = velocity_change(alone, base)[0]
    scores = BatchScores(changes[..., None, None], floor, ~base.flatten(1).any(1))
    domains = torch.full((clips,), DOMAINS.index(domain))
    checked = scores.of_clips(range(clips), domains, (float("nan"),), recipe="given")
    check_floor(checked.floor, base.dtype)
    return checked


def _repeat(value, clips: int, variants: int):
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == clips
    return value.repeat(variants, *[1] * (value.ndim - 1)) if has_rows else value


def _first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]
