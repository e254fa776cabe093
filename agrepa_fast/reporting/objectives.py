"""docs/objectives.md: what every alignment objective compares, costs and goes with, computed from the code."""

import torch
import torch.nn as nn

from ..alignment.objective import OF_LAYERS, Objective
from ..alignment.registry import OBJECTIVES
from ..config import ModelConfig
from ..training.flops import step_flops
from .combinations import combinations_table

_CLIPS, _FRAMES, _TEACHER, _HEADS = 16, 938, 1280, 6
_TEACHER_FRAMES, _TEACHER_WIDTH = 125, 64  # of a clip, and of the teacher's 20 heads
_MODEL = ModelConfig(n_mels=100, vocab=8192)
_TARGETS = {
    "pooled": "the teacher's vector of the clip",
    "frames": "the teacher's frame at that time",
    "deeper": "the layer `align.deeper` deeper",
    "averaged": "that layer by the averaged weights, at a cleaner time",
}
_HEAD = """# Alignment objectives

`align.objective` says what an aligned layer is pulled to. Each of them takes the layers and weights of any
`align.strategy`, with any backbone and topology, but for what the second table names. `agrepa config --objectives`
prints this page.

"More per step" is counted: FLOPs of matrix products for 24 x 1024, 16 clips of 10 s, a teacher of 1280 channels, 20
heads and 12.5 frames a second, and three layers per domain, over those of the model's own forward and backward. Each
objective was also [timed on a CPU](benchmarks.md#cost-of-each-objective)."""
_TOGETHER = """
## Settings that go together

Every pair of these went through the checks that begin a run, with shards that have teacher frames and attention, second
tokens and speaker vectors, and `zero2.json`, unless the pair says otherwise. A refused run ends before its first step,
in one line with the remedy, and exit code 2. All other pairs with the setting of a row go together. LAST is the number
of the model's layers, MORE is one more, and CHOICE is `probe.warmup_steps`. Layers of several widths, which a backbone
of yours may have, are refused by `align.strategy=lasp` and by objectives that compare layers.
"""


def objectives_reference() -> str:
    """Return docs/objectives.md."""
    lines = [_HEAD, "", "| `align.objective` | a layer's | is compared with | parameters of a head | more per step |"]
    lines.append("|---|---|---|---|---|")
    for name, objective in OBJECTIVES.items():
        made = objective()
        taken, compared = {"pooled": "time-mean", "frames": "frames"}[made.tap], _TARGETS[made.target]
        if made.attention:
            taken, compared = f"{taken} and attention", f"{compared} and its attention"
        parameters = sum(p.numel() for p in _head(made).parameters())
        cells = (
            f"`{name}`",
            taken,
            compared,
            f"{parameters / 1e6:.1f} M" if parameters else "no head",
            f"{_extra(made):.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [_TOGETHER, *combinations_table()]
    return "\n".join(lines) + "\n"


def _head(objective: Objective) -> nn.Module:
    with torch.device("meta"):
        return objective.head(_MODEL.dim, _MODEL.dim if objective.target in OF_LAYERS else _TEACHER) or nn.Identity()


def _extra(objective: Objective) -> float:
    """Return the FLOPs of the heads' forward and backward, and of another forward of the model if the objective needs
    one, over those of a step."""
    rows = _CLIPS if objective.tap == "pooled" else _CLIPS * _FRAMES
    weights = sum(p.numel() for p in _head(objective).parameters() if p.ndim > 1)
    step = step_flops(_MODEL, [_FRAMES] * _CLIPS)
    extra = 6.0 * _HEADS * rows * weights + (step / 3 if objective.target == "averaged" else 0)
    if objective.attention:
        width = _MODEL.dim // _MODEL.heads
        of_layer = attention_flops(_FRAMES, _TEACHER_FRAMES, _MODEL.heads, width, _TEACHER_WIDTH)
        extra += _HEADS * _CLIPS * of_layer
    return extra / step


def attention_flops(frames: int, parts: int, heads: int, width: int, teacher_width: int) -> int:
    """Return the FLOPs of haste's attention for one clip and layer: the means of queries and keys over `parts` teacher
    frames, forth and back; their products, forth and twice back; and those of the teacher's."""
    means, products = 2 * 2 * parts * frames * width, 2 * parts * parts
    return heads * (2 * means + products * (3 * width + teacher_width))
