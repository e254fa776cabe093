"""Helpers that all metric models use: the wave that a model takes, and its identity."""

from collections.abc import Iterable

import numpy as np
import torch

from ..audio.waves import resample, wave_fault
from ..errors import UserError, nearest
from ..teachers.base import weights_sha256

HUB = "a folder saved with save_pretrained, or a name on the model hub, which needs a network"


def wave_at(wave: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Return a wave (samples,) float32 at `to_rate` Hz. Raises ValueError for one that is empty, not 1-D, not finite
    throughout, or far outside of [-1, 1]: no model can judge it."""
    if wave.ndim != 1 or len(wave) == 0:
        raise ValueError(f"wave of shape {wave.shape}: (samples,) with at least one sample is wanted")
    if fault := wave_fault(wave):
        raise ValueError(f"wave: {fault}")
    return resample(np.ascontiguousarray(wave, dtype=np.float32), from_rate, to_rate)


def identity(spec: str, module: torch.nn.Module, licence: str | None, version: str | None) -> dict[str, str | None]:
    """Return the facts that must be equal for two results to be of one model. licence and version: None if unknown."""
    return {"spec": spec, "sha256": weights_sha256(module), "licence": licence, "version": version}


def unknown_package(title: str, spec: str, known: Iterable[str]) -> UserError:
    """Return the error, which begins with `title`, of a `package:NAME` that does not exist. known: names without
    `package:`."""
    return UserError(f"{title}: {nearest(spec, [f'package:{name}' for name in known])}")


def mel_triangles(rate: int, bins: int, bands: int, low: float, high: float) -> torch.Tensor:
    """Return (bins, bands) float32: triangles of height 1 over HTK's mel scale from `low` to `high` Hz."""
    mel = np.log1p(np.linspace(0, rate / 2, bins) / 700)
    edges = np.linspace(np.log1p(low / 700), np.log1p(high / 700), bands + 2)
    rising = (mel[:, None] - edges[:-2]) / np.diff(edges[:-1])
    falling = (edges[2:] - mel[:, None]) / np.diff(edges[1:])
    return torch.from_numpy(np.minimum(rising, falling).clip(min=0).astype(np.float32))
