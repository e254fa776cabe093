"""Rows and conditions: a batch has N rows over C conditions, C divides N, and row n has condition n mod C."""

import torch


def split_rows(x: torch.Tensor, conditions: int) -> torch.Tensor:
    """View (N, ...) as (N / C, C, ...), so that per-condition tensors broadcast instead of being copied."""
    if x.shape[0] % conditions:
        raise ValueError(f"{x.shape[0]} rows over {conditions} conditions: the conditions must divide the rows")
    return x.unflatten(0, (-1, conditions))


def over_time(m: torch.Tensor) -> torch.Tensor:
    """(C, D) as (C, 1, D), so that it broadcasts over frames; (C, T, D) as it is."""
    if m.ndim not in (2, 3):
        raise ValueError(f"a modulation is (C, D) or (C, T, D), not {tuple(m.shape)}")
    return m.unsqueeze(1) if m.ndim == 2 else m


def valid_frames(lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """(C, T) bool: frame t of condition c is real, t < lengths[c]."""
    return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)
