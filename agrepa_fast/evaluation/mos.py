"""Predicted mean opinion scores of speech, 1 to 5. They are a network's opinion: of use to compare systems on the same
clips, no replacement for listeners."""

from abc import ABC, abstractmethod

import numpy as np
import torch

from . import distillmos
from .metric_model import identity, unknown_package, wave_at


class Scorer(ABC):
    """A frozen network that scores speech.

    names     of the scores: ("mos",)
    identity  spec, sha256, licence and version
    """

    names: tuple[str, ...]
    identity: dict[str, str | None]

    @abstractmethod
    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        """Return {name: score} of a wave (samples,) float32 at `rate` Hz, higher is better. Raises ValueError for a
        wave that is empty or not finite."""


class DistillMosScorer(Scorer):
    names = ("mos",)

    def __init__(self, spec: str, device: str | torch.device):
        self._network, self._device = distillmos.load_distillmos().to(device), torch.device(device)
        self.identity = identity(spec, self._network, distillmos.LICENCE, distillmos.VERSION)

    @torch.inference_mode()
    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        wave = torch.from_numpy(wave_at(wave, rate, distillmos.RATE)).to(self._device)
        return {"mos": self._network(wave).item()}


_PACKAGES = {"distillmos": DistillMosScorer}


def load_mos(spec: str, device: str | torch.device = "cpu") -> Scorer:
    """Return the scorer of `package:distillmos`. Raises UserError, in one line with the remedy, for an unknown one and
    for one that cannot be fetched."""
    title, name = f"metrics.mos={spec}", spec.removeprefix("package:")
    if name not in _PACKAGES or name == spec:
        raise unknown_package(title, spec, _PACKAGES)
    return _PACKAGES[name](spec, device)
