"""The choice of aligned layers and their weights, with its evidence. Every strategy returns a LayerSelection."""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..config import CHOICES, STORAGE, WEIGHTINGS, AlignConfig, ProbeConfig
from ..errors import UserError, nearest
from ..files import write_atomically
from .scores import LayerScores

# A soft choice aligns the layers that are in the Top-K with at least this probability. At K = 3 a layer below it would
# have a weight below 0.02, and its head would cost as much as the others.
SOFT_BOUND = 0.05
HELD_BOUND = SOFT_BOUND / 2  # layers that are aligned already stay down to this probability
REPLACES = 0.9  # a newcomer replaces an aligned layer if it scores higher with this probability
ABOVE_FLOOR = 3.0  # a layer counts as measured when its score clears this multiple of the floor by two standard errors

SHARE_CONFIDENCE = 0.9  # how sure align.share has to be, by bootstrap over clips
SHARE_KEEPS = 0.5  # as many layers as are aligned already stay enough for it down to this


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
    # By domain: LayerScores.evidence(), and of the choice: k, its top_k_probability, chosen (the layers at each time,
    # or once), kept (those that hysteresis keeps behind others), choice, confidence_floor. Empty for fixed choices.
    evidence: dict = field(default_factory=dict)
    times: tuple[float, ...] = ()
    weights_at: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    @property
    def all_layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layers in self.layers.values() for layer in layers}))

    @property
    def warning(self) -> str | None:
        """Return one line if a hard choice is undecided in some domain, None otherwise."""
        unsure = {domain: measured for domain, measured in self.evidence.items() if is_undecided(measured)}
        if not unsure:
            return None
        probabilities = ", ".join(
            f"{domain} {measured['top_k_probability']:.2f}" for domain, measured in unsure.items()
        )
        (floor,) = {measured["confidence_floor"] for measured in unsure.values()}
        kept = [f"{domain} L{layer}" for domain, measured in unsure.items() for layer in measured.get("kept", ())]
        hysteresis = f"; {', '.join(kept)} stayed: no other layer scores higher with probability {REPLACES}"
        return (
            f"the Top-K cannot be told from the next layers: its probability is {probabilities}, below "
            f"probe.confidence_floor={floor:g}; align.choice=soft aligns all of them, more probe.clips may decide"
            f"{hysteresis if kept else ''}"
        )

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
    confidence_floor: float = 0.5,
    before: LayerSelection | None = None,
) -> LayerSelection:
    """Return the layers of each domain with the highest scores, and their weights.

    k: how many. share: instead, the fewest highest layers that carry this share of the sum of all scores above 0, with
    at least this `confidence` (bootstrap over clips). weighting: "normalized" lambda = score / sum of the selected
    scores; "equal" 1 / number; "raw2x" 2 x score, as the release hard-codes. per_time: the same at each of the scores'
    times (AG-REPA's timestep-adaptive set): `layers` are the union, and a layer has weight 0 at times that did not
    choose it.

    choice: "hard" takes the Top-K. "soft" takes every layer that is in the Top-K with a probability P of at least
    SOFT_BOUND (bootstrap over clips), and multiplies its score, or its 1 of "equal", by P. Rounding then decides
    nothing between two layers that score alike. If the Top-K is certain, the weights are those of "hard".

    confidence_floor: a hard choice whose Top-K is less probable has a `warning`. before: the choice that this one
    follows. Its layers stay until the evidence is against them: a hard choice replaces the lowest of them by a layer
    that scores higher with the probability REPLACES, and a soft one drops them below HELD_BOUND. A share keeps their
    number while so many carry it with the probability SHARE_KEEPS, and lowers it once fewer do with `confidence`.

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
        measured, held = _measured(scores, domain), _held(before, domain, scores.times if per_time else ())
        numbers = [
            k if share is None else _fewest(scores, domain, measured, time, aligned, share, confidence)
            for time, aligned in held.items()
        ]
        if int(measured.sum()) < max(numbers):
            raise NotRankableError(
                f"{domain}: {int(measured.sum())} of {scores.depth} layers stand out of the floor "
                f"{scores.floor_of(domain):.1e}, {max(numbers)} are wanted: train longer before ranking"
            )
        rows = [
            _choose_at(scores, domain, number, measured, time, aligned, choice)
            for number, (time, aligned) in zip(numbers, held.items(), strict=True)
        ]
        means = scores.mean_at(domain).T if per_time else scores.mean(domain).unsqueeze(0)
        chosen[domain] = [_weights(mean, row, weighting) for mean, (row, _) in zip(means, rows, strict=True)]
        sure = [probability for _, probability in rows]
        evidence[domain] |= {
            "choice": choice,
            "k": max(numbers),
            "top_k_probability": None if None in sure else min(sure),
            "confidence_floor": confidence_floor,
            "chosen": [sorted(row) for row in chosen[domain]],
            "kept": _behind(means, rows, measured) if choice == "hard" else [],
        }
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


def is_undecided(evidence: dict) -> bool:
    """Return whether a domain's evidence is that of a hard choice whose Top-K is less probable than its floor."""
    probability, floor = evidence.get("top_k_probability"), evidence.get("confidence_floor")
    return None not in (probability, floor) and evidence["choice"] == "hard" and probability < floor


def select_as(
    align: AlignConfig, probe: ProbeConfig, scores: LayerScores, before: LayerSelection | None = None
) -> LayerSelection:
    """Return select_layers with a run's settings. Raises NotRankableError for a first choice that is undecided, or has
    one clip alone to tell, if that is to be refused."""
    options = {"choice": align.choice, "share": align.share, "per_time": align.per_time, "before": before}
    options["confidence_floor"] = probe.confidence_floor
    selection = select_layers(scores, align.k, align.weighting, **options)
    if before is None and probe.undecided == "refuse":
        if selection.warning is not None:
            raise NotRankableError(selection.warning)
        if any(measured["top_k_probability"] is None for measured in selection.evidence.values()):
            raise NotRankableError(
                "one clip says nothing about others, and probe.undecided=refuse asks how they differ"
            )
    return selection


def _measured(scores: LayerScores, domain: str) -> torch.Tensor:
    """Return the layers (L,) bool that stand out of the floor. Storage scores have no floor: every finite one does.
    Nor have gradient norms, whose spread over steps is that of the whole gradient's: every layer that has one does."""
    mean = scores.mean(domain)
    if scores.measure in STORAGE:
        return mean.isfinite()
    if scores.measure == "gradnorm":
        return mean > 0
    stderr = scores.stderr(domain).nan_to_num(posinf=0)  # one clip has no standard error
    return mean - 2 * stderr > ABOVE_FLOOR * scores.floor_of(domain)


def _fewest(
    scores: LayerScores,
    domain: str,
    measured: torch.Tensor,
    time: int | None,
    held: frozenset[int],
    share: float,
    confidence: float,
) -> int:
    """Return the fewest layers of a hard choice that carry a share of all scores; one more than were measured if those
    do not. Raises NotRankableError if no score is above 0 with this `confidence`."""
    most = int(measured.sum())
    for k in range(1, most + 1):
        layers = _keep_or_replace(scores, domain, k, measured, time, held)
        enough = min(confidence, SHARE_KEEPS) if k == len(held) else confidence
        if scores.share_probability(domain, layers, share, time) >= enough:
            return k
    if most and scores.share_probability(domain, range(scores.depth), share, time) < confidence:
        raise NotRankableError(
            f"{domain}: no layer scores above 0 with probability {confidence:g}, so none carries a share: train longer "
            "before ranking"
        )
    return most + 1


def _highest(scores: torch.Tensor, measured: torch.Tensor, k: int) -> list[int]:
    """Return the k highest measured layers, 0-based, the highest first."""
    return torch.where(measured, scores, -torch.inf).argsort(descending=True, stable=True)[:k].tolist()


def _behind(
    means: torch.Tensor, rows: list[tuple[dict[int, float], float | None]], measured: torch.Tensor
) -> list[int]:
    """Return the chosen layers, 1-based, that are not the highest of some time. means: (times, L)."""
    behind = (set(row) - set(_highest(mean, measured, len(row))) for mean, (row, _) in zip(means, rows, strict=True))
    return sorted(layer + 1 for layer in set().union(*behind))


def _held(before: LayerSelection | None, domain: str, times: tuple[float, ...]) -> dict[int | None, frozenset[int]]:
    """Return the layers, 0-based, that are aligned already, by the index of each time; by None without times. They are
    none without a choice before, or if that was of other times."""
    rows = range(len(times)) if times else (None,)
    if before is None or domain not in before.layers or before.times != times:
        return dict.fromkeys(rows, frozenset())
    chosen = before.evidence.get(domain, {}).get("chosen")
    if chosen is None:  # a choice of version 0.1: all but those at a cosine below 0, whose weight is 0
        tables = before.weights_at.get(domain, (before.weights[domain],))
        chosen = [[k for k, weight in zip(before.layers[domain], table, strict=True) if weight > 0] for table in tables]
    return {row: frozenset(layer - 1 for layer in layers) for row, layers in zip(rows, chosen, strict=True)}


def _choose_at(
    scores: LayerScores,
    domain: str,
    k: int,
    measured: torch.Tensor,
    time: int | None,
    held: frozenset[int],
    choice: str,
) -> tuple[dict[int, float], float | None]:
    """Return the layers, 0-based, with the share of their score that counts; and the probability of the Top-K."""
    if choice == "soft":
        layers = _probable(scores, domain, k, measured, time, held)
        return layers, scores.top_k_probability(domain, k, measured, time)
    layers = _keep_or_replace(scores, domain, k, measured, time, held)
    return dict.fromkeys(layers, 1.0), scores.top_k_probability(domain, k, measured, time, chosen=layers)


def _keep_or_replace(
    scores: LayerScores, domain: str, k: int, measured: torch.Tensor, time: int | None, held: frozenset[int]
) -> list[int]:
    """Return the k layers, 0-based, of a hard choice: the held ones, but for those that a newcomer beats."""
    mean = scores.mean(domain) if time is None else scores.mean_at(domain)[:, time]
    order = _highest(mean, measured, int(measured.sum()))
    chosen = [layer for layer in order if layer in held][:k]
    newcomers = [layer for layer in order if layer not in chosen]
    missing = k - len(chosen)
    chosen += newcomers[:missing]
    for newcomer in newcomers[missing:]:
        lowest = max(chosen, key=order.index)
        beats = order.index(newcomer) < order.index(lowest)
        if beats and scores.higher_probability(domain, newcomer, lowest, time) >= REPLACES:
            chosen[chosen.index(lowest)] = newcomer
    return chosen


def _probable(
    scores: LayerScores, domain: str, k: int, measured: torch.Tensor, time: int | None, held: frozenset[int]
) -> dict[int, float]:
    """Return the layers, 0-based, that a soft choice takes, with their probability to be in the Top-K."""
    probabilities = scores.in_top_k(domain, k, measured, time)
    if probabilities is None:
        raise NotRankableError(f"{domain}: one clip says nothing about others, and a soft choice asks how they differ")
    bounds = {layer: HELD_BOUND if layer in held else SOFT_BOUND for layer in range(scores.depth)}
    return {layer: p for layer, p in enumerate(probabilities.tolist()) if p >= bounds[layer]}


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
    """Return the selection of a strategy without scores: fixed:…, shallow (L1 … Lk), middle (the k around the middle,
    half a layer nearer to L1 if there is no even split), deep (the last k), random, none. Equal weights that sum to 1.

    Raises UserError for the strategies that need scores.
    """
    name = align.strategy.partition(":")[0]
    if name == "none":
        return LayerSelection("none", {}, {})
    if name == "fixed":
        chosen = dict.fromkeys(domains, align.fixed_layers)
    elif name in ("shallow", "middle", "deep"):
        before = {"shallow": 0, "middle": (depth - align.k) // 2, "deep": depth - align.k}[name]
        chosen = dict.fromkeys(domains, tuple(range(before + 1, before + align.k + 1)))
    elif name == "random":
        draw = random.Random(f"{seed}/random layers")
        chosen = {domain: tuple(sorted(draw.sample(range(1, depth + 1), align.k))) for domain in domains}
    else:
        raise UserError(f"align.strategy={align.strategy!r} needs a probe's scores")
    return LayerSelection(align.strategy, chosen, {domain: (1 / len(k),) * len(k) for domain, k in chosen.items()})
