"""FoG-A, forward-only gate ablation: how much the predicted velocity changes when one block is left out.

AG-REPA (arXiv 2603.01006): FoG-A_k = E[ ||v without block k - v|| / (||v|| + eps) ], no gradient, kept per domain.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn as nn

from ..config import DOMAINS
from ..flow import clip_keys, reference_prefix
from ..kernels import flow_mix, velocity_change
from ..models.conditioning import Condition
from .gates import multi_gate, prefix_order, single_ablations

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

    def top_k_probability(self, domain: str, k: int, resamples: int = 2000) -> float:
        """Share of bootstrap resamples of the domain's clips in which the k highest layers are the k highest of all
        clips: how sure the choice is, given these clips. The same numbers every time."""
        scores = self.per_clip(domain).double()
        clips = scores.shape[1]
        draw = torch.Generator().manual_seed(0)
        picked = torch.randint(clips, (resamples, clips), generator=draw)
        resampled = scores[:, picked].mean(-1).T  # (resamples, L)
        chosen = resampled.topk(k, dim=1).indices.sort(dim=1).values
        return float((chosen == scores.mean(1).topk(k).indices.sort().values).all(1).double().mean())

    def rank_correlation(self, other: "FogaScores", domain: str) -> float:
        """Spearman's correlation of the layers' mean scores with those of another probe: 1 is the same order."""
        from scipy.stats import spearmanr

        return float(spearmanr(self.mean(domain), other.mean(domain)).statistic)

    def pooled_with(self, earlier: Sequence["FogaScores"]) -> "FogaScores":
        """These scores and those of earlier probes of the same clips, as further draws of each clip. Raises ValueError
        for other clips or times."""
        for scores in earlier:
            if not torch.equal(scores.domain, self.domain) or scores.times != self.times:
                raise ValueError("only probes of the same clips and times can be pooled")
        change = torch.cat([*(scores.change for scores in earlier), self.change], dim=3)
        floor = torch.stack([*(scores.floor for scores in earlier), self.floor]).mean(0)
        return replace(self, change=change, floor=floor)

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
    max_rows: int | None = None,
) -> FogaScores:
    """Scores of all layers of `model`, in L(L+1)/2 block forwards for each time and draw.

    Evaluation mode; the same noise for every variant (common random numbers). recipe "official" is the release's: the
    clean mel as x_t, at t = 0.8. gates (V, L), first row all ones, replaces the single ablations; `change` then has V -
    1 rows. blocks: default model.blocks. max_rows bounds the rows that a block runs at once.

    The modes of all modules and the random state are as before afterwards, also when it raises. Raises ValueError when
    the first row of gates ablates something, or a velocity is zero or not finite.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: {' or '.join(RECIPES)}")
    times = (OFFICIAL_TIME,) if recipe == "official" else tuple(times)
    draws = 1 if recipe == "official" else draws
    blocks = model.blocks if blocks is None else blocks
    gates = single_ablations(len(blocks)) if gates is None else gates
    if not (gates[0] == 1).all():
        raise ValueError("the first row of gates is the whole model: all ones")
    floor, changes = None, []
    with _undisturbed(model):
        for t in times:
            for draw in range(draws):
                x_t = _noised(batch, t, sigma, seed, draw, recipe)
                v = _velocities(model, blocks, gates, batch.condition, x_t, t, max_rows)
                base = v[0]
                changes.append(velocity_change(v[1:], base, batch.condition.lengths))
                if floor is None:
                    plain = model(x_t, x_t.new_full(x_t.shape[:1], t), batch.condition).v
                    floor = velocity_change(plain[None], base, batch.condition.lengths)[0]
                    silent = ~base.flatten(1).any(1)
    change = torch.stack(changes, dim=-1).unflatten(-1, (len(times), draws)).cpu()
    _check_scores(change, silent.cpu(), batch.places)
    return FogaScores(change, floor.cpu(), batch.domain.cpu(), times, recipe)


@torch.no_grad()
def ablate(
    model: nn.Module,
    inputs: dict,
    blocks: Sequence[nn.Module],
    *,
    gates: torch.Tensor | None = None,
    kind: str = "block",
    row_arguments: Sequence[str | int] | None = None,
    max_rows: int | None = None,
    domain: str = "audio",
) -> FogaScores:
    """FogaScores of any model at given inputs: how much model(**inputs) changes when each block is left out.

    inputs: keyword arguments; the first tensor has C rows, and every tensor with C rows is repeated for the variants,
    so name in `row_arguments` what a block must slice if that is not plain from its size. The output, or the first of a
    tuple, is the velocity, C rows of any shape. blocks, gates, kind, row_arguments, max_rows: as in multi_gate.
    Raises ValueError as foga and multi_gate do, and when the inputs have no rows.
    """
    gates = single_ablations(len(blocks)) if gates is None else gates
    clips = next((value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim), None)
    if not clips:
        raise ValueError("the inputs hold no tensor with a row for every clip")
    order = prefix_order(gates)
    rows = {name: _repeat(value, clips, len(gates)) for name, value in inputs.items()}
    with _undisturbed(model):
        with multi_gate(blocks, gates[order], kind=kind, row_arguments=row_arguments, max_rows=max_rows):
            v = _first(model(**rows))
        v = v.reshape(len(gates), clips, 1, -1)[order.argsort().to(v.device)]
        base = v[0]
        plain = _first(model(**inputs)).reshape(1, clips, 1, -1)
    change, floor = velocity_change(v[1:], base), velocity_change(plain, base)[0]
    scores = FogaScores(
        change[..., None, None].cpu(),
        floor.cpu(),
        torch.full((clips,), DOMAINS.index(domain)),
        (float("nan"),),
        "given",
    )
    _check_scores(scores.change, ~base.flatten(1).any(1).cpu(), tuple(range(clips)))
    return scores


def _repeat(value, clips: int, variants: int):
    has_rows = isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == clips
    return value.repeat(variants, *[1] * (value.ndim - 1)) if has_rows else value


def _first(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module's mode and the random state are what they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _check_scores(change: torch.Tensor, silent: torch.Tensor, places: tuple[int, ...]) -> None:
    for clip, place in enumerate(places):
        if silent[clip]:
            raise ValueError(f"probe clip {place}: the model's velocity is zero, so no relative change can be measured")
        if not change[:, clip].isfinite().all():
            layer = int((~change[:, clip].isfinite()).flatten(1).any(1).nonzero()[0]) + 1
            raise ValueError(f"probe clip {place}, layer {layer}: the score is not finite")


def _noised(batch: ProbeBatch, t: float, sigma: float, seed: int, draw: int, recipe: str) -> torch.Tensor:
    if recipe == "official":
        return batch.mel
    keys = clip_keys(seed, draw, batch.places, f"foga {t:g}").to(batch.mel.device)
    return flow_mix(batch.mel, torch.full_like(batch.mel[:, 0, 0], t), keys, sigma)[0]


def _velocities(
    model, blocks, gates, condition: Condition, x_t: torch.Tensor, t: float, max_rows: int | None
) -> torch.Tensor:
    """(V, C, T, n_mels): the velocity of every variant at x_t (C, T, n_mels)."""
    variants, clips = len(gates), x_t.shape[0]
    order = prefix_order(gates)
    with multi_gate(blocks, gates[order], row_arguments=(), max_rows=max_rows):
        v = model(x_t.repeat(variants, 1, 1), x_t.new_full((clips,), t), condition).v
    return v.unflatten(0, (variants, clips))[order.argsort().to(v.device)]


def probe_condition(mel: torch.Tensor, condition: Condition, max_reference: float) -> Condition:
    """The condition of a probe or validation clip: nothing dropped, and half of the longest reference prefix."""
    reference = (0.5 * max_reference * condition.lengths).long().clamp(min=1)
    return replace(condition, reference=reference_prefix(mel, reference), keep_tokens=None, keep_reference=None)
