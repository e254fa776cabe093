"""Flow matching: the path's draws, the loss, and the Euler sampler with sway and classifier-free guidance.

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
    t: torch.Tensor  # (C,) uniform in [0, 1)
    keep_tokens: torch.Tensor  # (C,) bool
    keep_reference: torch.Tensor  # (C,) bool
    reference_lengths: torch.Tensor  # (C,) frames, uniform in 1 ... max(1, int(max_reference * length))


def training_draws(flow: FlowConfig, lengths: torch.Tensor, keys: torch.Tensor) -> Draws:
    """Return a training step's draws for each clip. lengths (C,) frames; keys (C,) int64, on the same device."""
    t, tokens, reference, share = philox_uniform(keys, 4).unbind(1)
    longest = (flow.max_reference * lengths).long().clamp(min=1)
    return Draws(t, tokens >= flow.drop_tokens, reference >= flow.drop_reference, 1 + (share * longest).long())


def reference_prefix(mel: torch.Tensor, reference_lengths: torch.Tensor) -> torch.Tensor:
    """Return the first frames of mel (C, T, M), zero beyond reference_lengths (C,)."""
    return torch.where(valid_frames(reference_lengths, mel.shape[1]).unsqueeze(-1), mel, 0)


def flow_loss(v: torch.Tensor, target: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the mean square of v - target (C, T, M) over each clip's valid frames, (C,) fp32."""
    square = torch.where(valid_frames(lengths, v.shape[1]).unsqueeze(-1), v.float() - target.float(), 0).square()
    return square.sum((1, 2)) / (lengths * v.shape[2])


def sway_times(steps: int, sway: float, device: torch.device | str | None = None) -> torch.Tensor:
    """Return steps + 1 times from 0 to 1. sway < 0 makes smaller steps near the noise (F5-TTS, Chen et al. 2024, sec.
    3.3)."""
    t = torch.linspace(0, 1, steps + 1, device=device)
    return t + sway * (torch.cos(math.pi / 2 * t) - 1 + t)


def euler(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, times: torch.Tensor
) -> torch.Tensor:
    """Return x at times[-1], from x at times[0], along velocity(x, t); t is a scalar tensor."""
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * velocity(x, t)
    return x


@torch.no_grad()
def sample(
    model: torch.nn.Module, condition: Condition, keys: torch.Tensor, flow: FlowConfig, *, progress: bool = False
) -> torch.Tensor:
    """Return normalised mels (C, T, n_mels) for C conditions, from noise keyed by keys (C,).

    Guidance v_u + guidance (v_c - v_u) needs both branches, which run in one batch. The null branch drops the tokens
    and keeps the reference, as the release does. progress: show a bar.
    """
    from tqdm import tqdm

    clips = condition.lengths.shape[0]
    shape = condition.reference.shape
    x = flow.sigma * philox_normal(keys, shape[1] * shape[2]).view(shape)
    guided = flow.guidance != 1
    both = _with_null_branch(condition) if guided else condition
    times = sway_times(flow.steps, flow.sway, x.device)
    bar = tqdm(total=flow.steps, desc="sample", unit="step", disable=not progress)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        bar.update()
        rows = torch.cat((x, x)) if guided else x
        v = model(rows, t.expand(rows.shape[0]), both).v.float()
        return v[clips:] + flow.guidance * (v[:clips] - v[clips:]) if guided else v

    training = model.training
    model.eval()
    try:
        return euler(velocity, x, times)
    finally:
        model.train(training)
        bar.close()


def _with_null_branch(condition: Condition) -> Condition:
    """Return the conditions twice: as they are, then without tokens."""
    clips = torch.arange(condition.lengths.shape[0], device=condition.lengths.device)
    doubled = condition[torch.cat((clips, clips))]
    kept = (
        torch.ones(len(clips), dtype=torch.bool, device=clips.device)
        if condition.keep_tokens is None
        else condition.keep_tokens
    )
    return replace(doubled, keep_tokens=torch.cat((kept, torch.zeros_like(kept))))
