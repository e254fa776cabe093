"""Predicted mean opinion scores of speech, 1 to 5. They are a network's opinion: of use to compare systems on the same
clips, no replacement for listeners.

load_mos("package:distillmos")                        # without a model hub
load_mos("package:dnsmos")                            # made to judge the suppression of noise
load_mos("utmos:/models/utmos22_strong_step7459_v1.pt")
"""

from abc import ABC, abstractmethod

import numpy as np
import torch

from ..errors import UserError, nearest
from . import distillmos, dnsmos, utmos
from .metric_model import identity, wave_at

_KNOWN = ("package:distillmos", "package:dnsmos", "utmos:FILE")
SCORE_NAMES = ("mos", *dnsmos.NAMES)


class Scorer(ABC):
    """A frozen network that scores speech.

    names     of the scores, some of SCORE_NAMES
    identity  spec, sha256, licence and version
    """

    names: tuple[str, ...]
    identity: dict[str, str | None]

    @abstractmethod
    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        """Return {name: score} of a wave (samples,) float32 at `rate` Hz, higher is better. Raises ValueError for a
        wave that is empty or not finite."""


class NetworkScorer(Scorer):
    """A network that takes a wave (samples,) at `sample_rate` Hz and returns its score, ()."""

    names = ("mos",)

    def __init__(self, network: torch.nn.Module, sample_rate: int, facts: dict, device: str | torch.device):
        self.identity, self._sample_rate = facts, sample_rate
        self._network, self._device = network.to(device), torch.device(device)

    @torch.inference_mode()
    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        wave = torch.from_numpy(wave_at(wave, rate, self._sample_rate))
        return {"mos": self._network(wave.to(self._device)).item()}


class DnsmosScorer(Scorer):
    names = dnsmos.NAMES

    def __init__(self, spec: str, title: str):
        self._model = dnsmos.Dnsmos(title)
        known = {"licence": dnsmos.LICENCE, "version": dnsmos.VERSION}
        self.identity = {"spec": spec, "sha256": self._model.sha256, **known}

    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        return dict(zip(self.names, self._model.scores(wave_at(wave, rate, dnsmos.RATE)), strict=True))


def load_mos(spec: str, device: str | torch.device = "cpu") -> Scorer:
    """Return the scorer of `package:distillmos`, `package:dnsmos` or utmos:FILE. Raises UserError, in one line with the
    remedy, for an unknown one, and for one that cannot be fetched or read. DNSMOS runs on the CPU."""
    title = f"metrics.mos={spec}"
    if spec == "package:dnsmos":
        return DnsmosScorer(spec, title)
    if spec == "package:distillmos":
        network, sample_rate = distillmos.load_distillmos(), distillmos.RATE
        facts = identity(spec, network, distillmos.LICENCE, distillmos.VERSION)
    elif spec.startswith("utmos:"):
        network, sample_rate = utmos.load_utmos(spec.removeprefix("utmos:"), title), utmos.RATE
        facts = identity(spec, network, None, None)
    else:
        raise UserError(f"{title}: {nearest(spec, _KNOWN)}")
    return NetworkScorer(network, sample_rate, facts, device)
