"""Learning rate: linear warm-up, then a decay by a cosine or a line."""

import math

from .config import TrainConfig


def lr_factor(train: TrainConfig, step: int) -> float:
    """Return the share of train.lr at an optimizer step, counted from 0."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    left = 1 - progress if train.lr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.final_lr + (1 - train.final_lr) * left
