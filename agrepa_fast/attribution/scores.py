"""Scores of every layer for every clip, whatever measured them, and the statistics that a choice of layers rests on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..config import DOMAINS

MEASURES = ("foga", "foga-vjp", "gradnorm", "lasp", "ridge", "cka")
CONTRIBUTION, STORAGE = MEASURES[:3], MEASURES[3:]
RESAMPLES = 2000


@dataclass(frozen=True)
class LayerScores:
    """What one measure says of every layer, clip, time and draw, and its statistics.

    `values` is (L, C, times, draws) on the CPU, nan for a layer that was not measured; `floor` (C,) what the measure
    gives for no ablation at all (arithmetic noise; 0 where a measure has no such thing); `domain` (C,) indexes DOMAINS.
    Scores of several ranks or chunks are joined clip by clip, never as means of means.
    """

    values: torch.Tensor
    floor: torch.Tensor
    domain: torch.Tensor
    times: tuple[float, ...]
    recipe: str = "corrected"
    step: int | None = None
    measure: str = "foga"
    names: tuple[str, ...] = ()  # of the layers, without their L; () for 1 ... L

    @property
    def depth(self) -> int:
        return self.values.shape[0]

    def layer_names(self) -> tuple[str, ...]:
        """ "L1", "L2", ..., or "L1.attn", "L1.ffn", ... for parts of blocks."""
        return tuple(f"L{name}" for name in self.names or range(1, self.depth + 1))

    def domains(self) -> tuple[str, ...]:
        return tuple(name for number, name in enumerate(DOMAINS) if (self.domain == number).any())

    def clips(self, domain: str) -> int:
        return int((self.domain == DOMAINS.index(domain)).sum())

    def of_domain(self, domain: str) -> torch.Tensor:
        """(L, clips of the domain, times, draws)."""
        return self.values[:, self.domain == DOMAINS.index(domain)]

    def per_clip(self, domain: str) -> torch.Tensor:
        """(L, clips of the domain): mean over times and draws."""
        return self.of_domain(domain).mean((2, 3))

    def mean(self, domain: str) -> torch.Tensor:
        """(L,) score of each layer."""
        return self.per_clip(domain).mean(1)

    def mean_at(self, domain: str) -> torch.Tensor:
        """(L, times) score of each layer at each time."""
        return self.of_domain(domain).mean((1, 3))

    def stderr(self, domain: str) -> torch.Tensor:
        """(L,) standard error over clips; infinite for a single clip."""
        scores = self.per_clip(domain)
        if scores.shape[1] < 2:
            return torch.full_like(scores[:, 0], torch.inf)
        return scores.std(1) / scores.shape[1] ** 0.5

    def resampled(self, domain: str, time: int | None = None) -> torch.Tensor:
        """(RESAMPLES, L) fp64: mean scores of bootstrap resamples of the domain's clips, at one of the times or over
        all. The same numbers every time; layers that were not measured are -inf, below all others."""
        scores = self.per_clip(domain) if time is None else self.of_domain(domain)[:, :, time].mean(2)
        scores = scores.double().nan_to_num(nan=-torch.inf)
        clips = scores.shape[1]
        picked = torch.randint(clips, (RESAMPLES, clips), generator=torch.Generator().manual_seed(0))
        return scores[:, picked].mean(-1).T

    def top_k_probability(
        self, domain: str, k: int, among: torch.Tensor | None = None, time: int | None = None
    ) -> float | None:
        """Share of bootstrap resamples of the clips in which the k highest layers are the k highest of all clips: how
        sure the choice is, given these clips. among: (L,) bool, the layers that may be chosen; time: index of one of
        the times, instead of the mean over all. None for a single clip, which says nothing about others."""
        if self.clips(domain) < 2:
            return None
        mean = self.mean(domain) if time is None else self.mean_at(domain)[:, time]
        barred = torch.zeros_like(mean, dtype=torch.bool) if among is None else ~among
        scores = self.resampled(domain, time).masked_fill(barred, -torch.inf)
        best = mean.double().nan_to_num(nan=-torch.inf).masked_fill(barred, -torch.inf).topk(k).indices
        chosen = scores.topk(k, dim=1).indices.sort(dim=1).values
        return float((chosen == best.sort().values).all(1).double().mean())

    def share_probability(self, domain: str, layers: Sequence[int], share: float) -> float:
        """Share of bootstrap resamples in which these layers (0-based) carry at least `share` of the sum over all. A
        single clip is its only resample."""
        resampled = self.resampled(domain).nan_to_num(neginf=0)
        return float((resampled[:, list(layers)].sum(1) >= share * resampled.sum(1)).double().mean())

    def rank_correlation(self, other: "LayerScores", domain: str) -> float:
        """Spearman's correlation of the layers' mean scores with those of another probe or measure: 1 is the same
        order. Layers that either did not measure are left out; nan for fewer than two, or equal scores."""
        return rank_correlation(self.mean(domain).tolist(), other.mean(domain).tolist())

    def pooled_with(self, earlier: Sequence["LayerScores"]) -> "LayerScores":
        """These scores and those of earlier probes of the same clips, as further draws of each clip. Raises ValueError
        for other clips or times."""
        for scores in earlier:
            if not torch.equal(scores.domain, self.domain) or scores.times != self.times:
                raise ValueError("only probes of the same clips and times can be pooled")
        values = torch.cat([*(scores.values for scores in earlier), self.values], dim=3)
        floor = torch.stack([*(scores.floor for scores in earlier), self.floor]).mean(0)
        return replace(self, values=values, floor=floor)

    def joined_with(self, earlier: Sequence["LayerScores"]) -> "LayerScores":
        """These scores and those of other clips."""
        parts = [*earlier, self]
        return replace(
            self,
            values=torch.cat([part.values for part in parts], dim=1),
            floor=torch.cat([part.floor for part in parts]),
            domain=torch.cat([part.domain for part in parts]),
        )

    def floor_of(self, domain: str) -> float:
        """Mean over the domain's clips of what no ablation gives."""
        return float(self.floor[self.domain == DOMAINS.index(domain)].mean())

    def evidence(self) -> dict[str, dict]:
        """Per domain what a choice of layers rests on, as plain numbers: measure, the layers' names, mean and stderr of
        each, floor, clips, times, recipe, step. None stands for what was not measured."""
        return {
            domain: {
                "measure": self.measure,
                "layers": list(self.layer_names()),
                "mean": _plain(self.mean(domain)),
                "stderr": _plain(self.stderr(domain)),
                "floor": self.floor_of(domain),
                "clips": self.clips(domain),
                "times": _plain(torch.tensor(self.times, dtype=torch.float64)),
                "recipe": self.recipe,
                "step": self.step,
            }
            for domain in self.domains()
        }


def _plain(values: torch.Tensor) -> list[float | None]:
    return [value if abs(value) < float("inf") else None for value in values.tolist()]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's correlation of two lists, without the places where either is nan."""
    from scipy.stats import spearmanr

    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x == x and y == y]
    if len(pairs) < 2 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return float("nan")
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
