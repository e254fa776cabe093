"""The points at which layers are measured: clips, flow times and noise, the same for every layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn as nn

from ..config import TIMES, FlowConfig
from ..device import to_device
from ..flow import fixed_span, reference_around
from ..kernels import flow_mix
from ..models.condition import Condition
from ..seeds import clip_keys


class ProbeBatch(NamedTuple):
    """C clips to probe with. The noise of a clip depends on its place, so a clip gives the same score in any batch."""

    mel: torch.Tensor  # (C, T, n_mels) normalised
    condition: Condition
    domain: torch.Tensor  # (C,) index into DOMAINS
    places: tuple[int, ...]  # (C,) number of each clip among the probe's clips


@dataclass(frozen=True)
class ProbePoints:
    """The points of the path at which a model is evaluated: every time, with `draws` noises per clip.

    Iterating gives (time, draw). clean: x_t is the mel itself, as in the release's probe, instead of a mix with noise.
    """

    times: Sequence[float] = TIMES
    draws: int = 1
    sigma: float = 0.5  # scale of the noise: flow.sigma
    seed: int = 0  # of the noise
    clean: bool = False

    def __iter__(self) -> Iterator[tuple[float, int]]:
        return product(self.times, range(self.draws))

    def x_t(self, batch: ProbeBatch, time: float, draw: int) -> torch.Tensor:
        """Return x_t (C, T, n_mels). A clip's noise depends on seed, draw, time and the clip's place alone."""
        if self.clean:
            return batch.mel
        keys = self.keys(batch, draw, f"foga {time:g}")
        return flow_mix(batch.mel, clip_times(batch, time), keys, self.sigma)[0]

    def keys(self, batch: ProbeBatch, draw: int, stream: str) -> torch.Tensor:
        """Return the keys (C,) int64 of the clips' random draws, on the batch's device, without waiting for it."""
        return to_device(clip_keys(self.seed, draw, batch.places, stream), batch.mel.device)

    def stack(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the values of all points, in the order of iteration, as one tensor (..., times, draws)."""
        return torch.stack(list(values), -1).unflatten(-1, (len(self.times), self.draws))


OFFICIAL_POINTS = ProbePoints(times=(0.8,), clean=True)  # of the released code: the clean mel, at t = 0.8


def clip_times(batch: ProbeBatch, time: float) -> torch.Tensor:
    """Return the time of every clip, (C,) on the batch's device."""
    return torch.full_like(batch.mel[:, 0, 0], time)


def probe_condition(mel: torch.Tensor, condition: Condition, flow: FlowConfig) -> Condition:
    """Return the condition of a probe or validation clip: nothing dropped, and the reference around a fixed span."""
    reference = reference_around(mel, fixed_span(flow, condition.lengths))
    return replace(condition, reference=reference, keep_tokens=None, keep_reference=None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode. Afterwards every module's mode and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
