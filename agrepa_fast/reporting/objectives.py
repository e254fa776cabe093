"""docs/objectives.md: what every alignment objective compares, costs and goes with, computed from the code."""

import torch
import torch.nn as nn

from ..alignment.objective import OF_LAYERS, Objective
from ..alignment.registry import OBJECTIVES, check_layers
from ..config import STRATEGIES, AlignConfig, ModelConfig
from ..errors import UserError
from ..training.flops import step_flops

_CLIPS, _FRAMES, _TEACHER, _HEADS = 16, 938, 1280, 6
_MODEL = ModelConfig(n_mels=100, vocab=8192)
_TARGETS = {
    "pooled": "the teacher's vector of the clip",
    "frames": "the teacher's frame at that time",
    "deeper": "the layer `align.deeper` deeper",
    "averaged": "that layer by the averaged weights, at a cleaner time",
}
_SHARDS = {"frames": "with `data.teacher_rate`"}
_HEAD = """# Alignment objectives

`align.objective` says what an aligned layer is pulled to. Each of them takes the layers and weights of any
`align.strategy`, with any backbone and topology, but for what the second table names; a run that asks for that ends
before its first step, in one line. `agrepa config --objectives` prints this page.

"More per step" is counted, not timed: FLOPs of matrix products for 24 x 1024, 16 clips of 10 s, a teacher of 1280
channels and three layers per domain, over those of the model's own forward and backward."""


def objectives_reference() -> str:
    """Return docs/objectives.md."""
    lines = [_HEAD, "", "| `align.objective` | a layer's | is compared with | parameters of a head | more per step |"]
    lines.append("|---|---|---|---|---|")
    for name, objective in OBJECTIVES.items():
        made = objective()
        taken = {"pooled": "time-mean", "frames": "frames"}[made.tap]
        parameters = sum(p.numel() for p in _head(made).parameters())
        cells = (
            f"`{name}`",
            taken,
            _TARGETS[made.target],
            f"{parameters / 1e6:.1f} M" if parameters else "no head",
            f"{_extra(made):.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| `align.objective` | shards | layers | does not go with |", "|---|---|---|---|"]
    for name, objective in OBJECTIVES.items():
        layers = "of one width" if objective.target in OF_LAYERS else "any"
        cells = (f"`{name}`", _SHARDS.get(objective.target, "any"), layers, _refused(name, objective()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _refused(name: str, objective: Objective) -> str:
    """Return the strategies that are refused beside an objective, of a model of 24 layers."""
    written = [f"fixed:{_MODEL.depth}" if name == "fixed" else name for name in STRATEGIES]
    refused = []
    for strategy in written:
        try:
            check_layers(AlignConfig(strategy=strategy, objective=name), objective, [_MODEL.dim] * _MODEL.depth)
        except UserError:
            refused.append(f"`align.strategy={strategy}`")
    return ", ".join(refused) or "nothing"


def _head(objective: Objective) -> nn.Module:
    with torch.device("meta"):
        return objective.head(_MODEL.dim, _MODEL.dim if objective.target in OF_LAYERS else _TEACHER) or nn.Identity()


def _extra(objective: Objective) -> float:
    """Return the FLOPs of the heads' forward and backward, and of another forward of the model if the objective needs
    one, over those of a step."""
    rows = _CLIPS if objective.tap == "pooled" else _CLIPS * _FRAMES
    weights = sum(p.numel() for p in _head(objective).parameters() if p.ndim > 1)
    step = step_flops(_MODEL, [_FRAMES] * _CLIPS)
    return (6.0 * _HEADS * rows * weights + (step / 3 if objective.target == "averaged" else 0)) / step
