"""The cost of a probe in block forwards of one clip, and the period at which it takes a small share of training."""

import math

import torch

from ..attribution.gate_plan import count_block_forwards, single_ablations
from ..config import Config
from ..models.backbone import Backbone

REFRESH_SHARE = 0.005  # of training's block forwards, for align.refresh=null
STEP = 3  # block forwards that forward and backward of a training step cost, per block and clip


def probe_block_forwards(config: Config, model: Backbone, clips: int) -> int:
    """Return the block forwards of one clip that a probe of align.strategy runs, over all ranks. clips: that it
    measures, of all domains.

    foga: L(L+1)/2 per clip, time and draw, and L per clip for the floor. foga-vjp: forward and backward per clip, time
    and draw. lasp: L per clip and time. gradnorm: none, it reads the gradient of the training step. A layer of several
    blocks has as many block forwards.
    """
    probe, parts = config.probe, [len(layer.parts) for layer in model.layers]
    points, gates = len(probe.times) * probe.draws, single_ablations(len(parts))
    counts = {
        "foga": points * count_block_forwards(gates.repeat_interleave(torch.tensor(parts), 1)) + sum(parts),
        "foga-vjp": points * STEP * sum(parts),
        "lasp": len(probe.times) * sum(parts),
        "gradnorm": 0,
    }
    return clips * counts[config.align.strategy]


def probe_steps(config: Config, model: Backbone, clips: int) -> float:
    """Return the cost of a probe in training steps of train.batch_clips."""
    step = config.train.batch_clips * STEP * sum(len(layer.parts) for layer in model.layers)
    return probe_block_forwards(config, model, clips) / step


def refresh_period(config: Config, model: Backbone, clips: int) -> int:
    """Return the steps between two choices, 0 for a single choice: align.refresh, or for null as many as keep the cost
    of probes within REFRESH_SHARE of training, at least probe.every."""
    if config.align.refresh is not None:
        return config.align.refresh
    return max(config.probe.every, math.ceil(probe_steps(config, model, clips) / REFRESH_SHARE))
