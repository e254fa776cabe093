"""Scores of every layer for every clip, whichever measure made them, and their statistics."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..config import DOMAINS

RESAMPLES = 2000  # of the clips, for bootstrap probabilities


class BatchScores(NamedTuple):
    """Scores of one batch of C clips, on the batch's device, whose work may still be under way."""

    values: torch.Tensor  # (L, C, times, draws)
    floor: torch.Tensor  # (C,) as in LayerScores
    silent: torch.Tensor  # (C,) bool, or numbers that are not 0: the velocity is zero at some time

    def check(self, places: Sequence[int]) -> None:
        """Raises ValueError naming a clip whose velocity is zero, or a clip and layer whose score is not finite. Waits
        for the device."""
        values, silent = self.values.cpu(), self.silent.cpu()
        for clip, place in enumerate(places):
            if silent[clip]:
                raise ValueError(
                    f"probe clip {place}: the model's velocity is zero, so no relative change can be measured"
                )
            if not values[:, clip].isfinite().all():
                layer = int((~values[:, clip].isfinite()).flatten(1).any(1).nonzero()[0]) + 1
                raise ValueError(f"probe clip {place}, layer {layer}: the score is not finite")

    def of_clips(self, places: Sequence[int], domain: torch.Tensor, times: Sequence[float], **labels) -> "LayerScores":
        """Return the checked scores on the CPU. domain: (C,). labels: recipe, step, measure and names of LayerScores.
        Raises ValueError as `check`."""
        self.check(places)
        return LayerScores(self.values.cpu(), self.floor.cpu(), domain.cpu(), tuple(times), **labels)


@dataclass(frozen=True)
class LayerScores:
    """One measure's score of every layer, clip, time and draw, and statistics over them, on the CPU.

    Scores of several ranks or chunks are joined clip by clip, never as means of means.
    """

    values: torch.Tensor  # (L, C, times, draws); nan for a layer that was not measured
    floor: torch.Tensor  # (C,) the measure's value where nothing is ablated: arithmetic noise; 0 for most measures
    domain: torch.Tensor  # (C,) index into DOMAINS
    times: tuple[float, ...]  # nan for a measure without times
    recipe: str = "corrected"  # or official, the release's; "given" for a model and inputs of the user
    step: int | None = None  # optimizer steps of the model before the measurement
    measure: str = "foga"
    names: tuple[str, ...] = ()  # of the layers, without their L; () for 1 ... L

    @property
    def depth(self) -> int:
        return self.values.shape[0]

    def layer_names(self) -> tuple[str, ...]:
        """Return "L1", "L2", ..., or "L1.attn", "L1.ffn", ... for parts of blocks."""
        return tuple(f"L{name}" for name in self.names or range(1, self.depth + 1))

    def domains(self) -> tuple[str, ...]:
        return tuple(name for number, name in enumerate(DOMAINS) if (self.domain == number).any())

    def clips(self, domain: str) -> int:
        return int((self.domain == DOMAINS.index(domain)).sum())

    def of_domain(self, domain: str) -> torch.Tensor:
        """Return values (L, clips of the domain, times, draws)."""
        return self.values[:, self.domain == DOMAINS.index(domain)]

    def per_clip(self, domain: str) -> torch.Tensor:
        """Return the means over times and draws, (L, clips of the domain)."""
        return self.of_domain(domain).mean((2, 3))

    def mean(self, domain: str) -> torch.Tensor:
        """Return the score of each layer, (L,)."""
        return self.per_clip(domain).mean(1)

    def mean_at(self, domain: str) -> torch.Tensor:
        """Return the score of each layer at each time, (L, times)."""
        return self.of_domain(domain).mean((1, 3))

    def stderr(self, domain: str) -> torch.Tensor:
        """Return each score's standard error over clips, (L,); infinite for a single clip."""
        scores = self.per_clip(domain)
        if scores.shape[1] < 2:
            return torch.full_like(scores[:, 0], torch.inf)
        return scores.std(1) / scores.shape[1] ** 0.5

    def resampled(self, domain: str, time: int | None = None) -> torch.Tensor:
        """Return mean scores of bootstrap resamples of the domain's clips, (RESAMPLES, L) fp64, the same at every call.

        time: index of one of the times; None: the mean over all. Layers that were not measured are -inf.
        """
        scores = self.per_clip(domain) if time is None else self.of_domain(domain)[:, :, time].mean(2)
        scores = scores.double().nan_to_num(nan=-torch.inf)
        clips = scores.shape[1]
        picked = torch.randint(clips, (RESAMPLES, clips), generator=torch.Generator().manual_seed(0))
        return scores[:, picked].mean(-1).T

    def top_k_probability(
        self,
        domain: str,
        k: int,
        among: torch.Tensor | None = None,
        time: int | None = None,
        *,
        chosen: Sequence[int] | None = None,
    ) -> float | None:
        """Return how sure a choice of k layers is: the share of bootstrap resamples in which they are the k highest. A
        resample in which layers tie for the last place counts as if a coin decided.

        among: (L,) bool, the layers that may be chosen. time: index of one of the times; None: the mean over all.
        chosen: the k layers, 0-based; None: the highest. None is returned for a single clip, whose only resample is
        itself.
        """
        if self.clips(domain) < 2:
            return None
        if chosen is None:
            mean = self.mean(domain) if time is None else self.mean_at(domain)[:, time]
            mean = _only(mean.double().nan_to_num(nan=-torch.inf), among)
            chosen = mean.argsort(descending=True, stable=True)[:k].tolist()
        best = torch.zeros(self.depth, dtype=torch.bool).index_fill(0, torch.tensor(chosen), True)
        above, tied, places = self._ranked(domain, k, among, time)
        possible = ((above <= best) & (best <= (above | tied))).all(1)
        ways = torch.tensor([math.comb(*pair) for pair in zip(tied.sum(1).tolist(), places.tolist(), strict=True)])
        return float((possible.double() / ways).mean())

    def in_top_k(
        self, domain: str, k: int, among: torch.Tensor | None = None, time: int | None = None
    ) -> torch.Tensor | None:
        """Return the probability of each layer to be one of the k highest, (L,) fp64 with the sum k: the share of
        bootstrap resamples in which it is. Ties, arguments and None as in top_k_probability."""
        if self.clips(domain) < 2:
            return None
        above, tied, places = self._ranked(domain, k, among, time)
        return (above + tied * (places.double() / tied.sum(1))[:, None]).mean(0)

    def _ranked(
        self, domain: str, k: int, among: torch.Tensor | None, time: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return of every bootstrap resample which layers score above the k-th highest, which as much as it, each
        (RESAMPLES, L) bool, and how many of the latter are among the k highest, (RESAMPLES,)."""
        scores = _only(self.resampled(domain, time), among)
        lowest = scores.topk(k, dim=1).values[:, -1:]
        above = scores > lowest
        return above, scores == lowest, k - above.sum(1)

    def higher_probability(self, domain: str, layer: int, other: int, time: int | None = None) -> float:
        """Return the share of bootstrap resamples in which a layer (0-based) scores higher than another. A single clip
        is its only resample."""
        resampled = self.resampled(domain, time)
        return float((resampled[:, layer] > resampled[:, other]).double().mean())

    def share_probability(self, domain: str, layers: Sequence[int], share: float, time: int | None = None) -> float:
        """Return the share of bootstrap resamples in which these layers (0-based) carry at least `share` of the sum
        over all layers. A layer below 0 counts as 0, and a resample without a layer above 0 has no share. time: as in
        `resampled`. A single clip is its only resample."""
        resampled = self.resampled(domain, time).clamp(min=0)  # a cosine may be negative
        others, total = [layer for layer in range(self.depth) if layer not in layers], resampled.sum(1)
        # The share of the other layers is exactly 0 if there are none; two sums of all layers could differ by rounding.
        carried = (total > 0) & (resampled[:, others].sum(1) <= (1 - share) * total)
        return float(carried.double().mean())

    def rank_correlation(self, other: "LayerScores", domain: str) -> float:
        """Return Spearman's correlation of the layers' mean scores with those of another probe or measure.

        1 is the same order. Layers that one of them did not measure are left out. nan for fewer than two layers, and
        for equal scores.
        """
        return rank_correlation(self.mean(domain).tolist(), other.mean(domain).tolist())

    def pooled_with(self, earlier: Sequence["LayerScores"], window: int) -> "LayerScores":
        """Return the means of these scores and of those of earlier probes of the same clips, the newest last, as one
        draw per clip. A probe that is n probes older than these counts 1 - n / window. Raises ValueError for other
        clips or times."""
        for scores in earlier:
            if not torch.equal(scores.domain, self.domain) or scores.times != self.times:
                raise ValueError("only probes of the same clips and times can be pooled")
        if not earlier:
            return self
        parts = [*earlier, self]
        weights = torch.arange(window - len(parts) + 1, window + 1, dtype=torch.float64)
        weights = (weights / weights.sum()).float()
        values = torch.stack([scores.values.mean(3, keepdim=True) for scores in parts], -1) @ weights
        return replace(self, values=values, floor=torch.stack([scores.floor for scores in parts], -1) @ weights)

    def joined_with(self, earlier: Sequence["LayerScores"]) -> "LayerScores":
        """Return these scores with those of other clips."""
        parts = [*earlier, self]
        return replace(
            self,
            values=torch.cat([part.values for part in parts], dim=1),
            floor=torch.cat([part.floor for part in parts]),
            domain=torch.cat([part.domain for part in parts]),
        )

    def floor_of(self, domain: str) -> float:
        """Return the mean floor of the domain's clips."""
        return float(self.floor[self.domain == DOMAINS.index(domain)].mean())

    def evidence(self) -> dict[str, dict]:
        """Return the evidence of a choice of layers as plain values, per domain: measure, names of the layers, their
        means and standard errors, floor, clips, times, recipe, step. None stands for a value that was not measured."""
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


def _only(scores: torch.Tensor, among: torch.Tensor | None) -> torch.Tensor:
    """Return scores (..., L), -inf for layers that may not be chosen."""
    return scores if among is None else scores.masked_fill(~among, -torch.inf)


def _plain(values: torch.Tensor) -> list[float | None]:
    return [value if abs(value) < float("inf") else None for value in values.tolist()]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's correlation of two lists, without the places where one of them is nan."""
    from scipy.stats import spearmanr

    pairs = [(x, y) for x, y in zip(a, b, strict=True) if not (math.isnan(x) or math.isnan(y))]
    if len(pairs) < 2 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return float("nan")
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
