"""The choice of aligned layers and their weights, with its evidence. Every strategy returns a LayerSelection."""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..config import CHOICES, STORAGE, WEIGHTINGS, AlignConfig
from ..errors import UserError, nearest
from ..files import write_atomically
from .scores import LayerScores

# A soft choice aligns the layers that are in the Top-K with at least this probability. At K = 3 a layer below it would
# have a weight below 0.02, and its head would cost as much as the others.
SOFT_BOUND = 0.05
ABOVE_FLOOR = 3.0  # a layer counts as measured when its score clears this multiple of the floor by two standard errors

SHARE_CONFIDENCE = 0.9  # how sure align.share has to be, by bootstrap over clips


class NotRankableError(ValueError):
    """Raised when too few layers stand out of the floor. Near the zero initialisation every layer looks the same."""


@dataclass(frozen=True)
class LayerSelection:
    """Aligned layers per domain (1-based), their weights lambda, and the evidence for them.

    With `times`, weights differ by time: weights_at[domain][i] are those of the domain's layers at times[i], and
    `weights` their means over times.
    """

    strategy: str
    layers: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[float, ...]]
    step: int = 0  # optimizer step of the choice
    evidence: dict = field(default_factory=dict)  # LayerScores.evidence(), top_k_probability; empty for fixed choices
    times: tuple[float, ...] = ()
    weights_at: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    @property
    def all_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layers in self.layers.values() for layer in layers}))

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def from_dict(cls, values: dict) -> "LayerSelection":
        return cls(
            strategy=values["strategy"],
            layers={domain: tuple(layers) for domain, layers in values["layers"].items()},
            weights={domain: tuple(weights) for domain, weights in values["weights"].items()},
            step=values["step"],
            evidence=values["evidence"],
            times=tuple(values["times"]),
            weights_at={domain: tuple(map(tuple, rows)) for domain, rows in values["weights_at"].items()},
        )

    def describe(self) -> str:
        """Return one line: speech L1 0.52, L3 0.28; audio …"""
        return "; ".join(
            f"{domain} " + ", ".join(f"L{k} {w:.2f}" for k, w in zip(layers, self.weights[domain], strict=True))
            for domain, layers in self.layers.items()
        )


def select_layers(
    scores: LayerScores,
    k: int = 3,
    weighting: str = "normalized",
    *,
    choice: str = "hard",
    share: float | None = None,
    confidence: float = SHARE_CONFIDENCE,
    per_time: bool = False,
) -> LayerSelection:
    """Return the layers of each domain with the highest scores, and their weights.

    k: how many. share: instead, the fewest highest layers that carry this share of the sum of all scores with at least
    this `confidence` (bootstrap over clips). weighting: "normalized" lambda = score / sum of the selected scores;
    "equal" 1 / number; "raw2x" 2 x score, as the release hard-codes. per_time: the same at each of the scores' times
    (AG-REPA's timestep-adaptive set): `layers` are the union, and a layer has weight 0 at times that did not choose it.

    choice: "hard" takes the Top-K. "soft" takes every layer that is in the Top-K with a probability P of at least
    SOFT_BOUND (bootstrap over clips), and multiplies its score, or its 1 of "equal", by P. Rounding then decides
    nothing between two layers that score alike. If the Top-K is certain, the weights are those of "hard".

    A layer is never chosen unless its score is above three times the no-ablation floor by two standard errors. Raises
    NotRankableError while fewer layers than wanted are, or a soft choice has one clip alone; and ValueError for an
    unknown weighting or choice, for k out of range, and for share with a soft choice.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: {nearest(weighting, WEIGHTINGS)}")
    if choice not in CHOICES:
        raise ValueError(f"choice={choice!r}: {nearest(choice, CHOICES)}")
    if choice == "soft" and share is not None:
        raise ValueError("share: a soft choice weighs the Top-K, give k")
    if share is None and not 1 <= k <= scores.depth:
        raise ValueError(f"k={k}: must be from 1 to the {scores.depth} layers that were measured")
    evidence, chosen = scores.evidence(), {}
    for domain in scores.domains():
        measured = _measured(scores, domain)
        wanted = k if share is None else _fewest(scores, domain, measured, share, confidence)
        if int(measured.sum()) < wanted:
            raise NotRankableError(
                f"{domain}: {int(measured.sum())} of {scores.depth} layers stand out of the floor "
                f"{scores.floor_of(domain):.1e}, {wanted} are wanted: train longer before ranking"
            )
        times = range(len(scores.times)) if per_time else (None,)
        sure = [scores.top_k_probability(domain, wanted, measured, time) for time in times]
        evidence[domain] |= {"k": wanted, "top_k_probability": None if None in sure else min(sure), "choice": choice}
        rows = scores.mean_at(domain).T if per_time else scores.mean(domain).unsqueeze(0)
        factors = [dict.fromkeys(_highest(row, measured, wanted), 1.0) for row in rows]
        if choice == "soft":
            factors = [_probable(scores, domain, wanted, measured, time) for time in times]
        chosen[domain] = [_weights(row, of_row, weighting) for row, of_row in zip(rows, factors, strict=True)]
    layers = {domain: tuple(sorted(set().union(*rows))) for domain, rows in chosen.items()}
    tables = {
        domain: tuple(tuple(row.get(layer, 0.0) for layer in layers[domain]) for row in rows)
        for domain, rows in chosen.items()
    }
    mean = {
        domain: tuple(torch.tensor(table, dtype=torch.float64).mean(0).tolist()) for domain, table in tables.items()
    }
    by_time = {"times": scores.times, "weights_at": tables} if per_time else {}
    return LayerSelection(scores.measure, layers, mean, scores.step or 0, evidence, **by_time)


def select_as(align: AlignConfig, scores: LayerScores) -> LayerSelection:
    """Return select_layers with a run's settings."""
    options = {"choice": align.choice, "share": align.share, "per_time": align.per_time}
    return select_layers(scores, align.k, align.weighting, **options)


def _measured(scores: LayerScores, domain: str) -> torch.Tensor:
    """Return the layers (L,) bool that stand out of the floor. Storage scores have no floor: every finite one does."""
    mean = scores.mean(domain)
    if scores.measure in STORAGE:
        return mean.isfinite()
    stderr = scores.stderr(domain).nan_to_num(posinf=0)  # one clip has no standard error
    return mean - 2 * stderr > ABOVE_FLOOR * scores.floor_of(domain)


def _fewest(scores: LayerScores, domain: str, measured: torch.Tensor, share: float, confidence: float) -> int:
    for k in range(1, int(measured.sum()) + 1):
        layers = _highest(scores.mean(domain), measured, k)
        if scores.share_probability(domain, layers, share) >= confidence:
            return k
    return int(measured.sum()) + 1  # those that were measured do not carry it


def _highest(scores: torch.Tensor, measured: torch.Tensor, k: int) -> list[int]:
    """Return the k highest measured layers, 0-based, the highest first."""
    return torch.where(measured, scores, -torch.inf).argsort(descending=True, stable=True)[:k].tolist()


def _probable(scores: LayerScores, domain: str, k: int, measured: torch.Tensor, time: int | None) -> dict[int, float]:
    """Return the layers, 0-based, that a soft choice takes, with their probability to be in the Top-K."""
    probabilities = scores.in_top_k(domain, k, measured, time)
    if probabilities is None:
        raise NotRankableError(f"{domain}: one clip says nothing about others, and a soft choice asks how they differ")
    return {layer: p for layer, p in enumerate(probabilities.tolist()) if p >= SOFT_BOUND}


def _weights(scores: torch.Tensor, factors: dict[int, float], weighting: str) -> dict[int, float]:
    """Return lambda by 1-based layer. factors: of the chosen layers, 0-based: how much of their score counts."""
    layers = sorted(factors)
    picked = scores[layers].double().clamp(min=0)  # a cosine may be negative
    if weighting == "equal" or not picked.any():
        picked, weighting = torch.ones_like(picked), "equal"
    picked = picked * torch.tensor([factors[layer] for layer in layers], dtype=torch.float64)
    picked = 2 * picked if weighting == "raw2x" else picked / picked.sum()
    return {layer + 1: weight for layer, weight in zip(layers, picked.tolist(), strict=True)}


def unmeasured_selection(align: AlignConfig, depth: int, domains: tuple[str, ...], seed: int) -> LayerSelection:
    """Return the selection of a strategy without scores: fixed:…, shallow (L1 … Lk), deep (the last k), random, none.
    Equal weights that sum to 1.

    Raises UserError for the strategies that need scores.
    """
    name = align.strategy.partition(":")[0]
    if name == "none":
        return LayerSelection("none", {}, {})
    if name == "fixed":
        chosen = dict.fromkeys(domains, align.fixed_layers)
    elif name == "shallow":
        chosen = dict.fromkeys(domains, tuple(range(1, align.k + 1)))
    elif name == "deep":
        chosen = dict.fromkeys(domains, tuple(range(depth - align.k + 1, depth + 1)))
    elif name == "random":
        draw = random.Random(f"{seed}/random layers")
        chosen = {domain: tuple(sorted(draw.sample(range(1, depth + 1), align.k))) for domain in domains}
    else:
        raise UserError(f"align.strategy={align.strategy!r} needs a probe's scores")
    return LayerSelection(align.strategy, chosen, {domain: (1 / len(k),) * len(k) for domain, k in chosen.items()})
