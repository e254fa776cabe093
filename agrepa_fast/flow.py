"""Flow matching: the path's draws, the loss, and the sampler with sway and classifier-free guidance.

Everything random is drawn per clip from a key, so a step does not depend on how its batch is spread over ranks.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch

from .config import FlowConfig
from .kernels import philox_normal, philox_uniform, valid_frames
from .models.condition import Condition


class Draws(NamedTuple):
    t: torch.Tensor  # (C,) fp32 in [0, 1], distributed as flow.times says
    keep_tokens: torch.Tensor  # (C,) bool
    keep_reference: torch.Tensor  # (C,) bool
    hidden: "Span"  # what the reference does not give


class Span(NamedTuple):
    """Frames of each clip, from `start` to before `end`, (C,) each."""

    start: torch.Tensor
    end: torch.Tensor

    def frames(self, count: int) -> torch.Tensor:
        """Return a mask (C, count)."""
        place = torch.arange(count, device=self.start.device)
        return (place >= self.start.unsqueeze(1)) & (place < self.end.unsqueeze(1))


def training_draws(flow: FlowConfig, lengths: torch.Tensor, keys: torch.Tensor) -> Draws:
    """Return a training step's draws for each clip. lengths (C,) frames; keys (C,) int64, on the same device.

    A prefix has 1 to max(1, int(max_reference * length)) frames, none if max_reference is 0. A span to fill in has a
    share of the clip between the two of flow.infill, and lies anywhere (F5-TTS's mask_from_frac_lengths). A
    logit-normal t (Esser et al. 2024, "Scaling Rectified Flow Transformers", sec. 3.1) is the quantile of the uniform
    draw. The t of the paper is 1 - t here, so its mean has the other sign.
    """
    t, tokens, reference, share, place, everything = philox_uniform(keys, 6).unbind(1)
    if flow.logit_normal is not None:
        mean, scale = flow.logit_normal
        t = torch.sigmoid(mean + scale * torch.special.ndtri(t))
    kept = everything >= flow.drop_all
    if flow.reference == "prefix":
        least = int(flow.max_reference > 0)
        longest = (flow.max_reference * lengths).long().clamp(min=least)
        hidden = Span(least + (share * longest).long(), lengths)
    else:
        least, most = flow.infill
        span = ((least + share * (most - least)) * lengths).long()
        start = (place * (lengths - span)).long()
        hidden = Span(start, start + span)
    return Draws(t, kept & (tokens >= flow.drop_tokens), kept & (reference >= flow.drop_reference), hidden)


def fixed_span(flow: FlowConfig, lengths: torch.Tensor) -> Span:
    """Return what is hidden from probes and validation: all beyond half of the longest prefix, or a middle span."""
    if flow.reference == "prefix":
        return Span((0.5 * flow.max_reference * lengths).long().clamp(min=int(flow.max_reference > 0)), lengths)
    span = (sum(flow.infill) / 2 * lengths).long()
    start = (lengths - span) // 2
    return Span(start, start + span)


def reference_prefix(mel: torch.Tensor, reference_lengths: torch.Tensor) -> torch.Tensor:
    """Return the first frames of mel (C, T, M), zero beyond reference_lengths (C,)."""
    return torch.where(valid_frames(reference_lengths, mel.shape[1]).unsqueeze(-1), mel, 0)


def reference_around(mel: torch.Tensor, hidden: Span) -> torch.Tensor:
    """Return mel (C, T, M) with the hidden frames set to zero."""
    return torch.where(hidden.frames(mel.shape[1]).unsqueeze(-1), 0, mel)


def flow_loss(v: torch.Tensor, target: torch.Tensor, counted: Span | torch.Tensor) -> torch.Tensor:
    """Return the mean square of v - target (C, T, M) over each clip's counted frames, (C,) fp32: a span of them, or the
    first ones, (C,)."""
    span = counted if isinstance(counted, Span) else Span(torch.zeros_like(counted), counted)
    square = torch.where(span.frames(v.shape[1]).unsqueeze(-1), v.float() - target.float(), 0).square()
    return square.sum((1, 2)) / ((span.end - span.start).clamp(min=1) * v.shape[2])


def training_loss(
    flow: FlowConfig, v: torch.Tensor, target: torch.Tensor, counted: Span | torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Return the loss (C,) fp32 that training minimises, for v, target (C, T, M) at times t (C,): flow_loss, with the
    factor min(1, (1 - t) / 0.05)^2 if flow.prediction is x. There v - target is the error of the clean mel over 1 - t,
    which has no bound near t = 1. The product equals the loss of Li & He 2025, "Back to Basics: Let Denoising
    Generative Models Denoise" (arXiv 2511.13720): their code (LTH14/JiT) clamps 1 - t at 0.05 in v and in the target.
    Here v stays a velocity at every t, and the sampler ends at the predicted mel."""
    loss = flow_loss(v, target, counted)
    return loss if flow.prediction == "velocity" else loss * ((1 - t) / 0.05).clamp(max=1).square()


def counted_frames(flow: FlowConfig, hidden: Span, lengths: torch.Tensor) -> Span:
    """Return the frames whose loss counts (flow.loss_region)."""
    return hidden if flow.loss_region == "hidden" else Span(torch.zeros_like(lengths), lengths)


def expected_frames(flow: FlowConfig, frames: float) -> float:
    """Return how many frames count in a clip on average, given the clips' mean of frames. flow.average=frame weights
    every clip by its counted frames over this: about the mean over all frames of the global batch, which packages take,
    without communication. The clips are those of the batch's bucket: a batch of long ones may have fewer."""
    if flow.loss_region == "clip":
        return frames
    return frames * (1 - flow.max_reference / 2 if flow.reference == "prefix" else sum(flow.infill) / 2)


def sway_times(steps: int, sway: float, device: torch.device | str | None = None) -> torch.Tensor:
    """Return steps + 1 times from 0 to 1. sway < 0 makes smaller steps near the noise (F5-TTS, Chen et al. 2024, sec.
    3.3)."""
    t = torch.linspace(0, 1, steps + 1, device=device)
    return t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)


def sample_times(flow: FlowConfig, device: torch.device | str | None = None) -> torch.Tensor:
    """Return the flow.steps + 1 times of the sampler, from 0 to 1."""
    if flow.schedule == "sway":
        return sway_times(flow.steps, flow.sway, device)
    return 1 - torch.cos(math.pi / 2 * torch.linspace(0, 1, flow.steps + 1, device=device))


def integrate(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    times: torch.Tensor,
    solver: str = "euler",
) -> torch.Tensor:
    """Return x at times[-1], from x at times[0], along velocity(x, t); t is a scalar tensor. solver: "euler" takes each
    step with the velocity at its first time, "midpoint" with that of its middle, which it reaches by half a step."""
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        if solver == "midpoint":
            half = (t_next - t) / 2
            v = velocity(x + half * v, t + half)
        x = x + (t_next - t) * v
    return x


@torch.no_grad()
def sample(
    model: torch.nn.Module, condition: Condition, keys: torch.Tensor, flow: FlowConfig, *, progress: bool = False
) -> torch.Tensor:
    """Return normalised mels (C, T, n_mels) for C conditions, from noise keyed by keys (C,).

    Guidance v_u + guidance (v_c - v_u) needs both branches, which run in one batch. The null branch drops the tokens
    and keeps the reference, as the release does, or drops both (flow.guidance_without). If no loss has taught the model
    the given frames, they are the reference's, as in F5-TTS and Voicebox. progress: show a bar.
    """
    from tqdm import tqdm

    clips = condition.lengths.shape[0]
    shape = condition.reference.shape
    x = flow.sigma * philox_normal(keys, shape[1] * shape[2]).view(shape)
    guided = flow.guidance != 1
    both = _with_null_branch(condition, flow.guidance_without) if guided else condition
    times = sample_times(flow, x.device)
    forwards = flow.steps * (2 if flow.solver == "midpoint" else 1)
    bar = tqdm(total=forwards, desc="sample", unit="forward", disable=not progress)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar.update()
        rows = torch.cat((x, x)) if guided else x
        v = model(rows, t.expand(rows.shape[0]), both).v.float()
        return v[clips:] + flow.guidance * (v[:clips] - v[clips:]) if guided else v

    training = model.training
    model.eval()
    try:
        mels = integrate(velocity, x, times, flow.solver)
    finally:
        model.train(training)
        bar.close()
    if flow.loss_region == "clip":
        return mels
    given = (condition.reference != 0).any(2, keepdim=True)
    return torch.where(given, condition.reference, mels)


def _with_null_branch(condition: Condition, without: str) -> Condition:
    """Return the conditions twice: as they are, then without tokens, or without all."""
    clips = torch.arange(condition.lengths.shape[0], device=condition.lengths.device)
    doubled, kept = condition[torch.cat((clips, clips))], torch.ones_like(clips, dtype=torch.bool)

    def then_none(keep: torch.Tensor | None) -> torch.Tensor:
        return torch.cat((kept if keep is None else keep, ~kept))

    dropped = {"keep_tokens": then_none(condition.keep_tokens)}
    if without == "all":
        dropped["keep_reference"] = then_none(condition.keep_reference)
    return replace(doubled, **dropped)
