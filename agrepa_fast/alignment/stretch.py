"""Frames at another rate: teacher frames, or a layer's states, brought to the frames of an aligned layer."""

import torch


def stretch(values: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Return (N, frames, E) fp32: row n is values[n, :counts[n]] stretched linearly to lengths[n] frames.

    values (N, S, E); counts, lengths (N,). Both span the clip evenly, so frame i of the result lies at
    (i + 1/2) counts / lengths - 1/2, constant beyond the first and the last: F.interpolate(mode="linear") of each clip.
    Frames beyond lengths, and rows without values, hold any finite number.
    """
    place = torch.arange(frames, device=values.device) + 0.5
    last = (counts - 1).clamp(min=0).unsqueeze(1)
    place = place * (counts / lengths.clamp(min=1)).unsqueeze(1) - 0.5
    place = torch.minimum(place.clamp(min=0), last)
    left = place.long()
    right = torch.minimum(left + 1, last)
    both = (values.gather(1, at.unsqueeze(-1).expand(-1, -1, values.shape[-1])).float() for at in (left, right))
    return torch.lerp(*both, (place - left).unsqueeze(-1))
