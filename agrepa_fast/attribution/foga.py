"""FoG-A, forward-only gate ablation: how much the predicted velocity changes when one block is left out.

AG-REPA (arXiv 2603.01006): FoG-A_k = E[ ||v without block k - v|| / (||v|| + eps) ], no gradient, kept per domain.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn

from ..config import DOMAINS
from ..flow import clip_keys, reference_prefix
from ..kernels import flow_mix, velocity_change
from ..models.conditioning import Condition
from .gates import multi_gate, single_ablations

RECIPES = ("corrected", "official")
OFFICIAL_TIME = 0.8


class ProbeBatch(NamedTuple):
    """C clips to probe with. The noise of a clip depends on its place, so a clip gives the same score in any batch."""

    mel: torch.Tensor  # (C, T, n_mels) normalised
    condition: Condition
    domain: torch.Tensor  # (C,) index into DOMAINS
    places: tuple[int, ...]  # (C,) number of each clip among the probe's clips


@dataclass(frozen=True)
class FogaScores:
    """Relative velocity change of every layer, clip, time and draw, and its statistics.

    `change` is (L, C, times, draws) on the CPU, `floor` (C,) the change that no ablation at all makes (arithmetic
    noise), `domain` (C,) indexes DOMAINS. Scores of several ranks or chunks are joined clip by clip, never as means of
    means.
    """

    change: torch.Tensor
    floor: torch.Tensor
    domain: torch.Tensor
    times: tuple[float, ...]
    recipe: str = "corrected"
    step: int | None = None

    @property
    def depth(self) -> int:
        return self.change.shape[0]

    def domains(self) -> tuple[str, ...]:
        return tuple(name for number, name in enumerate(DOMAINS) if (self.domain == number).any())

    def clips(self, domain: str) -> int:
        return int((self.domain == DOMAINS.index(domain)).sum())

    def per_clip(self, domain: str) -> torch.Tensor:
        """(L, clips of the domain): mean over times and draws."""
        return self.change[:, self.domain == DOMAINS.index(domain)].mean((2, 3))

    def mean(self, domain: str) -> torch.Tensor:
        """(L,) score of each layer."""
        return self.per_clip(domain).mean(1)

    def mean_at(self, domain: str) -> torch.Tensor:
        """(L, times) score of each layer at each time."""
        return self.change[:, self.domain == DOMAINS.index(domain)].mean((1, 3))

    def stderr(self, domain: str) -> torch.Tensor:
        """(L,) standard error over clips; infinite for a single clip."""
        scores = self.per_clip(domain)
        if scores.shape[1] < 2:
            return torch.full_like(scores[:, 0], torch.inf)
        return scores.std(1) / scores.shape[1] ** 0.5

    def floor_of(self, domain: str) -> float:
        """Mean change over the domain's clips without an ablation."""
        return float(self.floor[self.domain == DOMAINS.index(domain)].mean())

    def evidence(self) -> dict[str, dict]:
        """Per domain what a choice of layers rests on, as plain numbers: mean and stderr per layer, floor, clips,
        times, recipe, step."""
        return {
            domain: {
                "mean": self.mean(domain).tolist(),
                "stderr": [error if error < float("inf") else None for error in self.stderr(domain).tolist()],
                "floor": self.floor_of(domain),
                "clips": self.clips(domain),
                "times": list(self.times),
                "recipe": self.recipe,
                "step": self.step,
            }
            for domain in self.domains()
        }


@torch.no_grad()
def foga(
    model: nn.Module,
    batch: ProbeBatch,
    *,
    times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    draws: int = 1,
    gates: torch.Tensor | None = None,
    sigma: float = 0.5,
    seed: int = 0,
    recipe: str = "corrected",
    blocks: Sequence[nn.Module] | None = None,
) -> FogaScores:
    """Scores of all layers of `model`, in L(L+1)/2 block forwards for each time and draw.

    Evaluation mode; the same noise for every variant (common random numbers). recipe "official" is the release's: the
    clean mel as x_t, at t = 0.8. gates (V, L), first row all ones, replaces the single ablations; `change` then has V -
    1 rows. blocks: default model.blocks.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: {' or '.join(RECIPES)}")
    times = (OFFICIAL_TIME,) if recipe == "official" else tuple(times)
    draws = 1 if recipe == "official" else draws
    blocks = model.blocks if blocks is None else blocks
    gates = single_ablations(len(blocks)) if gates is None else gates
    if not (gates[0] == 1).all():
        raise ValueError("the first row of gates is the whole model: all ones")
    training = model.training
    model.eval()
    floor, changes = None, []
    try:
        for t in times:
            for draw in range(draws):
                x_t = _noised(batch, t, sigma, seed, draw, recipe)
                base, *ablated = _velocities(model, blocks, gates, batch.condition, x_t, t)
                changes.append(velocity_change(torch.stack(ablated), base, batch.condition.lengths))
                if floor is None:
                    plain = model(x_t, x_t.new_full(x_t.shape[:1], t), batch.condition).v
                    floor = velocity_change(plain[None], base, batch.condition.lengths)[0]
    finally:
        model.train(training)
    change = torch.stack(changes, dim=-1).unflatten(-1, (len(times), draws))
    return FogaScores(change.cpu(), floor.cpu(), batch.domain.cpu(), times, recipe)


def _noised(batch: ProbeBatch, t: float, sigma: float, seed: int, draw: int, recipe: str) -> torch.Tensor:
    if recipe == "official":
        return batch.mel
    keys = clip_keys(seed, draw, batch.places, f"foga {t:g}").to(batch.mel.device)
    return flow_mix(batch.mel, torch.full_like(batch.mel[:, 0, 0], t), keys, sigma)[0]


def _velocities(model, blocks, gates, condition: Condition, x_t: torch.Tensor, t: float) -> torch.Tensor:
    """(V, C, T, n_mels): the velocity of every variant at x_t (C, T, n_mels)."""
    variants, clips = len(gates), x_t.shape[0]
    with multi_gate(blocks, gates, row_arguments=()):
        v = model(x_t.repeat(variants, 1, 1), x_t.new_full((clips,), t), condition).v
    return v.unflatten(0, (variants, clips))


def probe_condition(mel: torch.Tensor, condition: Condition, max_reference: float) -> Condition:
    """The condition of a probe or validation clip: nothing dropped, and half of the longest reference prefix."""
    reference = (0.5 * max_reference * condition.lengths).long().clamp(min=1)
    return replace(condition, reference=reference_prefix(mel, reference), keep_tokens=None, keep_reference=None)
