"""Validation loss over fixed clips, times and noise."""

import torch
import torch.nn as nn

from ..config import DOMAINS
from ..flow import counted_frames, fixed_span, flow_loss
from ..kernels import flow_mix
from ..ranks import all_sum
from ..seeds import clip_keys
from .fixed_clips import FixedClips


@torch.no_grad()
def validation_loss(model: nn.Module, clips: FixedClips, *, progress: bool = False) -> dict[str, float]:
    """Return val/flow_loss, the mean flow loss over all clips at eval.times, val/flow_loss_<domain> of each domain, and
    val/flow_loss_t<time> of each time.

    The noise is the same at every call and on any number of ranks. The model is in evaluation mode meanwhile. progress:
    show a bar. Every rank must call it.
    """
    times, flow = clips.config.eval.times, clips.config.flow
    losses = torch.zeros(len(clips), len(times), device=clips.device)
    training = model.training
    model.eval()
    for batch, owned in clips.chunks("validation" if progress else None):
        lengths = batch.condition.lengths
        counted = counted_frames(flow, fixed_span(flow, lengths), lengths)
        for number, time in enumerate(times):
            keys = clip_keys(0, number, batch.places, "validation").to(clips.device)
            t = torch.full((len(batch.keys),), time, device=clips.device)
            x_t, target = flow_mix(batch.mel, t, keys, flow.sigma)
            v = model(x_t, t, batch.condition).v
            loss = flow_loss(v, target, counted)
            for row, place in owned:
                losses[place, number] = loss[row]
    model.train(training)
    losses = all_sum(losses).cpu()
    result = {"val/flow_loss": losses.mean().item()}
    for name in clips.index.domains:
        result[f"val/flow_loss_{name}"] = losses[clips.domain == DOMAINS.index(name)].mean().item()
    for time in dict.fromkeys(times):  # one that is listed twice has two draws of noise
        result[f"val/flow_loss_t{time:g}"] = losses[:, [other == time for other in times]].mean().item()
    return result
