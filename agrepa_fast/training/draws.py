"""The random draws of a micro-batch, and the states of the averaged weights at a cleaner time."""

from dataclasses import replace

import torch

from ..attribution.points import evaluation_mode
from ..config import FlowConfig
from ..data.batch import Batch
from ..flow import Draws, reference_around, training_draws
from ..kernels import flow_mix, philox_uniform
from ..models.backbone import Backbone
from ..models.condition import Condition
from ..zero.ema import Ema

LATER = 0.2  # the longest way towards the data (t_max of SRA's loss.py)


def draw_condition(flow: FlowConfig, batch: Batch, keys: torch.Tensor) -> tuple[Draws, Condition]:
    """Return the draws of a micro-batch, and its condition with reference and drops. keys (N,): of its clips."""
    draws = training_draws(flow, batch.condition.lengths, keys)
    condition = replace(
        batch.condition,
        reference=reference_around(batch.mel, draws.hidden),
        keep_tokens=draws.keep_tokens,
        keep_reference=draws.keep_reference,
    )
    return draws, condition


def averaged_states(
    model: Backbone, ema: Ema, flow: FlowConfig, batch: Batch, keys: torch.Tensor, layers: tuple[int, ...]
) -> dict[int, torch.Tensor]:
    """Return layer -> states (N, T', D) of the averaged weights at t + U(0, LATER), at most 1, in evaluation mode: for
    the noise and the condition of the step. keys (2, N): of its draws and its noise. Every rank must call it.
    """
    draws, condition = draw_condition(flow, batch, keys[0])
    t = (draws.t + LATER * philox_uniform(~keys[0], 1)[:, 0]).clamp(max=1)
    x_t, _ = flow_mix(batch.mel, t, keys[1], flow.sigma)
    with ema.applied(), evaluation_mode(model), torch.no_grad():
        return model(x_t, t, condition, capture=layers).hidden
