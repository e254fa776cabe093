"""Validation loss over fixed clips, times and noise."""

import torch
import torch.nn as nn

from ..config import DOMAINS, Config
from ..flow import flow_loss
from ..kernels import flow_mix
from ..ranks import all_sum
from ..seeds import clip_keys
from .fixed_clips import FixedClips, _with_bar


@torch.no_grad()
def validation_loss(model: nn.Module, clips: FixedClips, config: Config, *, progress: bool = False) -> dict[str, float]:
    """Flow loss at fixed times and noise: mean over all clips, and of each domain. Every rank must call it."""
    times = config.eval.times
    losses = torch.zeros(len(clips), device=clips.device)
    training = model.training
    model.eval()
    for batch, owned in _with_bar(clips, config, "validation", progress):
        for number, t in enumerate(times):
            keys = clip_keys(0, number, batch.places, "validation").to(clips.device)
            t_clips = torch.full((len(batch.keys),), t, device=clips.device)
            x_t, target = flow_mix(batch.mel, t_clips, keys, config.flow.sigma)
            v = model(x_t, t_clips, batch.condition).v
            loss = flow_loss(v, target, batch.condition.lengths) / len(times)
            for row in owned:
                losses[batch.places[row]] += loss[row]
    model.train(training)
    losses = all_sum(losses).cpu()
    result = {"val/flow_loss": losses.mean().item()}
    for name in clips.index.domains:
        result[f"val/flow_loss_{name}"] = losses[clips.domain == DOMAINS.index(name)].mean().item()
    return result
