"""Which layers are aligned, with which weights, and on what evidence. Selection is data: every strategy returns a
LayerSelection."""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..config import WEIGHTINGS, AlignConfig, UserError, nearest
from .scores import LayerScores

ABOVE_FLOOR = 3.0  # a layer counts as measured when its score clears this multiple of the floor by two standard errors


class NotRankableError(ValueError):
    """Too few layers stand out of the floor: near the zero initialisation every layer looks the same."""


@dataclass(frozen=True)
class LayerSelection:
    """Aligned layers per domain (1-based), their weights lambda, and the evidence they were chosen on."""

    strategy: str
    layers: dict[str, tuple[int, ...]]
    weights: dict[str, tuple[float, ...]]
    step: int = 0  # optimizer step of the choice
    evidence: dict = field(default_factory=dict)  # LayerScores.evidence(), top_k_probability; empty for fixed choices

    @property
    def all_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layers in self.layers.values() for layer in layers}))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def from_dict(cls, values: dict) -> "LayerSelection":
        return cls(
            strategy=values["strategy"],
            layers={domain: tuple(layers) for domain, layers in values["layers"].items()},
            weights={domain: tuple(weights) for domain, weights in values["weights"].items()},
            step=values["step"],
            evidence=values["evidence"],
        )

    def describe(self) -> str:
        """One line: speech L1 0.52, L3 0.28; audio …"""
        return "; ".join(
            f"{domain} " + ", ".join(f"L{k} {w:.2f}" for k, w in zip(layers, self.weights[domain], strict=True))
            for domain, layers in self.layers.items()
        )


def select_layers(scores: LayerScores, k: int = 3, weighting: str = "normalized") -> LayerSelection:
    """The k layers of each domain with the highest FoG-A, and their weights.

    weighting: "normalized" lambda = score / sum of the selected scores; "equal" 1 / k; "raw2x" 2 x score, what the
    release hard-codes.
    Raises NotRankableError while fewer than k layers of a domain stand out of the no-ablation floor.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: {nearest(weighting, WEIGHTINGS)}")
    if not 1 <= k <= scores.depth:
        raise ValueError(f"k={k}: must be from 1 to the {scores.depth} layers that were measured")
    layers, weights, evidence = {}, {}, scores.evidence()
    for domain in scores.domains():
        mean, stderr, floor = scores.mean(domain), scores.stderr(domain), scores.floor_of(domain)
        measured = mean - 2 * stderr.nan_to_num(posinf=0) > ABOVE_FLOOR * floor  # one clip has no standard error
        if int(measured.sum()) < k:
            raise NotRankableError(
                f"{domain}: {int(measured.sum())} of {scores.depth} layers stand out of the floor {floor:.1e}, "
                f"{k} are wanted: train longer before ranking"
            )
        ranked = torch.where(measured, mean, -1).argsort(descending=True, stable=True)[:k]
        chosen = sorted(int(layer) for layer in ranked)
        layers[domain] = tuple(layer + 1 for layer in chosen)
        weights[domain] = _weights(mean[chosen], weighting)
        evidence[domain]["top_k_probability"] = scores.top_k_probability(domain, k)
    return LayerSelection("foga", layers, weights, scores.step or 0, evidence)


def _weights(scores: torch.Tensor, weighting: str) -> tuple[float, ...]:
    if weighting == "equal":
        return (1 / len(scores),) * len(scores)
    return tuple((2 * scores if weighting == "raw2x" else scores / scores.sum()).tolist())


def unmeasured_selection(align: AlignConfig, depth: int, domains: tuple[str, ...], seed: int) -> LayerSelection:
    """The selection of a strategy that looks at no score: fixed:…, shallow (L1 … Lk), random, none. Equal weights that
    sum to 1.

    Raises UserError for `foga`, which needs scores.
    """
    name = align.strategy.partition(":")[0]
    if name == "none":
        return LayerSelection("none", {}, {})
    if name == "fixed":
        chosen = dict.fromkeys(domains, align.fixed_layers)
    elif name == "shallow":
        chosen = {domain: tuple(range(1, align.k + 1)) for domain in domains}
    elif name == "random":
        draw = random.Random(f"{seed}/random layers")
        chosen = {domain: tuple(sorted(draw.sample(range(1, depth + 1), align.k))) for domain in domains}
    else:
        raise UserError(f"align.strategy={align.strategy!r} needs a probe's scores")
    return LayerSelection(align.strategy, chosen, {domain: (1 / len(k),) * len(k) for domain, k in chosen.items()})
