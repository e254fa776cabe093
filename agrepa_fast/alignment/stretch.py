"""Frames at another rate: teacher frames, or a layer's states, brought to the frames of an aligned layer; and means
over the teacher's frames."""

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


def mean_weights(lengths: torch.Tensor, counts: torch.Tensor, frames: int, parts: int) -> torch.Tensor:
    """Return (N, parts, frames) fp32: row s of clip n has the weights of the mean over part s of its lengths[n] frames,
    cut into counts[n] equal parts. It is how preparation pools the teacher's frames, F.interpolate(mode="area") where
    the parts are whole frames.

    lengths, counts (N,). Rows beyond counts have zeros within lengths, and any finite weights beyond.
    """
    wide = (lengths / counts.clamp(min=1)).view(-1, 1, 1)  # frames of a part
    start = torch.arange(parts, device=lengths.device).view(-1, 1) * wide
    frame = torch.arange(frames, device=lengths.device)
    shared = torch.minimum(start + wide, frame + 1) - torch.maximum(start, frame)
    return shared.clamp(min=0) / wide
