"""Measure what layers store of the teacher, over fixed clips."""

from collections.abc import Sequence

import torch
import torch.nn as nn

from ..attribution.points import OFFICIAL_POINTS, ProbeBatch, ProbePoints, clip_times, evaluation_mode
from ..attribution.scores import LayerScores
from ..attribution.stored import PooledStates, cka, lasp, ridge
from ..config import DOMAINS, Config
from ..data.index import Index
from ..ranks import all_sum, first_failure
from .fixed_clips import FixedClips, _with_bar, survivable


@torch.no_grad()
def pooled_states(
    model: nn.Module,
    clips: FixedClips,
    config: Config,
    step: int | None = None,
    *,
    recipe: str = "corrected",
    progress: bool = False,
) -> PooledStates:
    """The time-means of every layer and of the token condition, beside the teacher, for all clips: what LASP, ridge and
    CKA need. The same on every rank, and every rank must call it; when it fails on one, all raise ValueError. x_t as
    FoG-A's; recipe "official": the clean mel, at t = 0.8."""
    points = (
        OFFICIAL_POINTS if recipe == "official" else ProbePoints(tuple(config.probe.times), sigma=config.flow.sigma)
    )
    times = points.times
    layers, count, sizes = range(len(model.blocks) + 1), len(clips), config.model
    hidden = torch.zeros(len(layers) - 1, count, len(times), sizes.dim, device=clips.device)
    condition = torch.zeros(count, sizes.token_dim, device=clips.device)
    dims = {domain: clips.index.teacher(domain).dim for domain in clips.index.domains}
    teacher = {domain: torch.zeros(count, dim, device=clips.device) for domain, dim in dims.items()}
    failure = None
    with evaluation_mode(model):
        for batch, owned in _with_bar(clips, config, "what layers store", progress):
            try:
                for number, t in enumerate(times):
                    given = ProbeBatch(batch.mel, batch.condition, batch.domain, batch.places)
                    x_t = points.x_t(given, t, 0)
                    pooled = model(
                        x_t, clip_times(given, t), batch.condition, capture=tuple(layers), pooled=True
                    ).hidden
                    for row in owned:
                        place = batch.places[row]
                        hidden[:, place, number] = torch.stack([pooled[layer][row].float() for layer in layers[1:]])
                        condition[place] = pooled[0][row]
            except survivable(model) as error:
                failure = failure or str(error)
            for row in owned:
                for domain, vectors in batch.teacher.items():
                    teacher[domain][batch.places[row]] = vectors[row]
    if (failure := first_failure(failure)) is not None:
        raise ValueError(failure)
    hidden, condition = (all_sum(values).cpu() for values in (hidden, condition))
    teacher = {domain: all_sum(vectors).cpu() for domain, vectors in teacher.items()}
    return PooledStates(hidden, condition, teacher, clips.domain, times, step)


def storage_scores(
    states: PooledStates,
    projections: dict[str, torch.Tensor],
    measures: Sequence[str] | None = None,
    *,
    recipe: str = "corrected",
) -> list[LayerScores]:
    """What layers store of the teacher. measures: of ridge, cka and lasp; None: those that fit the states, LASP where
    BiT-C's projections are as wide as the layers and there is one for every domain. Raises ValueError as they do."""
    domains = {DOMAINS[number] for number in states.domain.tolist()}
    if measures is None:
        fits = states.hidden.shape[-1] == states.condition.shape[-1] and set(projections) >= domains
        enough = min(int((states.domain == DOMAINS.index(domain)).sum()) for domain in domains) >= 8
        ours = enough and recipe == "corrected"  # the release has neither
        measures = [*(("ridge", "cka") if ours else ()), *(("lasp",) if fits else ())]
    made = {
        "ridge": lambda: ridge(states),
        "cka": lambda: cka(states),
        "lasp": lambda: lasp(states, projections, recipe=recipe),
    }
    return [made[measure]() for measure in measures]


def _check_lasp(config: Config, index: Index, projections: dict[str, torch.Tensor]) -> None:
    """Before anything is computed: whether BiT-C's projections can be asked about layers."""
    if missing := set(index.domains) - projections.keys():
        raise ValueError(f"lasp asks BiT-C's projections, and there are none of {', '.join(sorted(missing))}")
    if config.model.dim != config.model.token_dim:
        raise ValueError(
            f"lasp: BiT-C's projections take {config.model.token_dim} channels (model.token_dim), layers have "
            f"{config.model.dim} (model.dim)"
        )
