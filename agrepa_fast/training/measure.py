"""Validation loss and FoG-A over fixed clips, spread over ranks and combined clip by clip.

Every rank runs the same number of forwards (ZeRO-3 gathers weights in each), and a clip's result depends on nothing but
the clip, so the numbers are the same on any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attribution.foga import ProbeBatch, foga, probe_condition
from ..attribution.scores import LayerScores
from ..config import DOMAINS, Config
from ..data.shards import Index, Sample
from ..data.stream import Batch, collate, fixed_clips
from ..flow import clip_keys, flow_loss
from ..kernels import flow_mix
from .engine import all_sum, first_failure


class FixedClips:
    """The first clips of every domain of a split, in chunks for this rank."""

    def __init__(self, index: Index, split: str, per_domain: int, chunk: int, device, rank: int = 0, world: int = 1):
        self.index, self.chunk, self.device, self.rank, self.world = index, chunk, device, rank, world
        self.samples: list[Sample] = [s for d in index.domains for s in fixed_clips(index, split, d, per_domain)]
        self.domain = torch.tensor([DOMAINS.index(sample.domain) for sample in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, max_reference: float) -> Iterator[tuple[Batch, list[int]]]:
        """This rank's chunks and which rows of each it answers for; rows beyond its share repeat a clip and are
        dropped."""
        share = -(-len(self) // self.world)
        mine = [self.rank * share + i for i in range(share)]
        for start in range(0, share, self.chunk):
            places = mine[start : start + self.chunk]
            owned = [row for row, place in enumerate(places) if place < len(self)]
            places = [min(place, len(self) - 1) for place in places]
            batch = collate([self.samples[place] for place in places], tuple(places), self.index).to(self.device)
            yield replace(batch, condition=probe_condition(batch.mel, batch.condition, max_reference)), owned


def _with_bar(clips: FixedClips, config: Config, what: str, progress: bool) -> Iterator[tuple[Batch, list[int]]]:
    chunks = -(-len(clips) // (clips.world * clips.chunk))
    batches = clips.batches(config.flow.max_reference)
    return iter(tqdm(batches, desc=what, total=chunks, unit="chunk", disable=not progress, leave=False))


@torch.no_grad()
def validation_loss(model: nn.Module, clips: FixedClips, config: Config, *, progress: bool = False) -> dict[str, float]:
    """Flow loss at fixed times and noise: mean over all clips, and of each domain. Every rank must call it."""
    times = config.eval.times
    losses = torch.zeros(len(clips), device=clips.device)
    training = model.training
    model.eval()
    for batch, owned in _with_bar(clips, config, "validation", progress):
        for number, t in enumerate(times):
            keys = clip_keys(0, number, batch.places, "validation").to(clips.device)
            t_clips = torch.full((len(batch.keys),), t, device=clips.device)
            x_t, target = flow_mix(batch.mel, t_clips, keys, config.flow.sigma)
            v = model(x_t, t_clips, batch.condition).v
            loss = flow_loss(v, target, batch.condition.lengths) / len(times)
            for row in owned:
                losses[batch.places[row]] += loss[row]
    model.train(training)
    losses = all_sum(losses).cpu()
    result = {"val/flow_loss": losses.mean().item()}
    for name in clips.index.domains:
        result[f"val/flow_loss_{name}"] = losses[clips.domain == DOMAINS.index(name)].mean().item()
    return result


def probe(
    model: nn.Module,
    clips: FixedClips,
    config: Config,
    step: int | None = None,
    *,
    recipe: str = "corrected",
    progress: bool = False,
) -> LayerScores:
    """LayerScores of all clips, the same on every rank. Every rank must call it; when the measurement fails on one, all
    raise ValueError after the same number of forwards."""
    shape = (len(config.probe.times), config.probe.draws) if recipe == "corrected" else (1, 1)
    change = torch.zeros(len(model.blocks), len(clips), *shape)
    floor, failure, times = torch.zeros(len(clips)), None, ()
    for batch, owned in _with_bar(clips, config, "probe", progress):
        try:
            part = foga(
                model,
                ProbeBatch(batch.mel, batch.condition, batch.domain, batch.places),
                times=config.probe.times,
                draws=config.probe.draws,
                sigma=config.flow.sigma,
                recipe=recipe,
            )
        except ValueError as error:
            failure = failure or str(error)
            continue
        times = part.times
        for row in owned:
            change[:, batch.places[row]] = part.values[:, row]
            floor[batch.places[row]] = part.floor[row]
    failure = first_failure(failure)
    if failure is not None:
        raise ValueError(failure)
    change, floor = (all_sum(values.to(clips.device)).cpu() for values in (change, floor))
    return LayerScores(change, floor, clips.domain, times, recipe, step)
