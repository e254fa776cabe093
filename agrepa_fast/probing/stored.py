"""Measure what layers store of the teacher, over fixed clips."""

from collections.abc import Sequence

import torch

from ..attribution.points import OFFICIAL_POINTS, ProbePoints, clip_times, evaluation_mode
from ..attribution.scores import LayerScores
from ..attribution.stored import PooledStates, cka, lasp, ridge
from ..config import DOMAINS
from ..models.backbone import Backbone
from ..ranks import all_sum, first_failure
from .fixed_clips import Chunk, FixedClips, measure_chunks

ENOUGH_CLIPS = 8  # per domain, for ridge and CKA to be measured unasked


@torch.no_grad()
def pooled_states(
    model: Backbone,
    clips: FixedClips,
    step: int | None = None,
    *,
    recipe: str = "corrected",
    progress: bool = False,
) -> PooledStates:
    """Return the time-means of every layer and of the token condition for all clips, with the teacher's vectors.

    LASP, ridge and CKA are computed from them; layers narrower than the widest are filled up with zeros, which changes
    none of the three. x_t is FoG-A's of the first draw; recipe "official": the clean mel at t = 0.8. step: of the
    model, to label the scores. progress: show a bar. The result is the same on every rank, and every rank must call
    it. Raises ValueError on all if one of them fails.
    """
    config, domains = clips.config, clips.index.domains
    points = ProbePoints(tuple(config.probe.times), sigma=config.flow.sigma)
    if recipe == "official":
        points = OFFICIAL_POINTS
    depth, count, device = len(model.layers), len(clips), clips.device
    widest, given = max(layer.width for layer in model.layers), model.condition_width is not None
    hidden = torch.zeros(depth, count, len(points.times), widest, device=device)
    condition = torch.zeros(count, model.condition_width or 0, device=device)
    teacher = {domain: torch.zeros(count, clips.index.teacher(domain).dim, device=device) for domain in domains}

    def measure(chunk: Chunk) -> None:
        batch = chunk.batch
        for row, place in chunk.owned:
            for domain, vectors in batch.teacher.items():
                teacher[domain][place] = vectors[row]
        for number, time in enumerate(points.times):
            x_t, t = points.x_t(batch, time, 0), clip_times(batch, time)
            capture = tuple(range(0 if given else 1, depth + 1))
            pooled = model(x_t, t, batch.condition, capture=capture, pooled=True).hidden
            for row, place in chunk.owned:
                for layer in range(depth):
                    states = pooled[layer + 1][row]
                    hidden[layer, place, number, : len(states)] = states
                if given:
                    condition[place] = pooled[0][row]

    with evaluation_mode(model):
        failure = measure_chunks(model, clips, measure, "what layers store" if progress else None)
    if (failure := first_failure(failure)) is not None:
        raise ValueError(failure)
    hidden, condition = (all_sum(values).cpu() for values in (hidden, condition))
    teacher = {domain: all_sum(vectors).cpu() for domain, vectors in teacher.items()}
    return PooledStates(hidden, condition, teacher, clips.domain, points.times, step)


def storage_scores(
    states: PooledStates,
    projections: dict[str, torch.Tensor],
    measures: Sequence[str] | None = None,
    *,
    recipe: str = "corrected",
) -> list[LayerScores]:
    """Return scores of what layers store of the teacher, by each of `measures`: of ridge, cka and lasp.

    None: those that fit the states. LASP fits if BiT-C's projections are as wide as the layers and there is one for
    every domain; ridge and CKA fit from 8 clips per domain on, in the corrected recipe (the release has neither).
    projections: domain -> weight of BiT-C's projection. Raises ValueError as the measures do.
    """
    domains = {DOMAINS[number] for number in states.domain.tolist()}
    if measures is None:
        fits = states.hidden.shape[-1] == states.condition.shape[-1] and set(projections) >= domains
        clips = min(int((states.domain == DOMAINS.index(domain)).sum()) for domain in domains)
        corrected = ("ridge", "cka") if clips >= ENOUGH_CLIPS and recipe == "corrected" else ()
        measures = [*corrected, *(("lasp",) if fits else ())]
    compute = {
        "ridge": lambda: ridge(states),
        "cka": lambda: cka(states),
        "lasp": lambda: lasp(states, projections, recipe=recipe),
    }
    return [compute[measure]() for measure in measures]
