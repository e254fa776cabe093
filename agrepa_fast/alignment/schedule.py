"""The weight of alignment over a run: a warm-up after the layers were chosen, then constant or falling to zero."""

import math

from ..config import Config


def align_factor(config: Config, step: int, since: int) -> float:
    """Return the share of align.weight at an optimizer step, counted from 0. since: the first step that aligns. The
    decay ends at align.stop, or with the run."""
    align = config.align
    warm = min(1.0, (step - since + 1) / align.warmup_steps) if align.warmup_steps else 1.0
    if align.decay is None:
        return warm
    last = config.train.steps if align.stop is None else align.stop
    progress = min(1.0, max(0, step - since) / max(1, last - since))
    return warm * (1 - progress if align.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
