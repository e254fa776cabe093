"""Layer probes over fixed clips, spread over ranks and combined clip by clip.

Every rank runs the same number of forwards (ZeRO-3 gathers weights in each), and a clip's result depends on nothing but
the clip, so the numbers are the same on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from ..attribution.blocks import part_names
from ..attribution.foga import FogaProbe
from ..attribution.official import official_foga
from ..attribution.points import ProbeBatch, ProbePoints
from ..attribution.scores import BatchScores, LayerScores
from ..attribution.vjp import FogaVjp
from ..config import STORAGE, Config
from ..data.index import Index
from ..device import CaptureError, record, to_host
from ..ranks import all_sum, first_failure
from .fixed_clips import FixedClips, _with_bar, storage_clips, survivable
from .stored import _check_lasp, pooled_states, storage_scores


@dataclass(frozen=True)
class PendingScores:
    """Scores of all ranks' clips whose computation is queued on the device."""

    measured: BatchScores  # on the host; filled when `ready` has come
    failures: torch.Tensor  # likewise: on how many ranks it failed
    ready: torch.cuda.Event | None
    scores: LayerScores  # all but the values and the floor
    failure: str | None  # of this rank

    def read(self) -> LayerScores:
        """Wait for the device. The same on every rank, and every rank must call it; when the measurement failed on one,
        or has clips without finite scores, all raise ValueError."""
        if self.ready is not None:
            self.ready.synchronize()
        if self.failures.any():  # on every rank alike
            raise ValueError(first_failure(self.failure))
        self.measured.check(range(len(self.measured.floor)))
        return replace(self.scores, values=self.measured.values, floor=self.measured.floor)


class ClipProbe:
    """FoG-A, or its first-order estimate, of fixed clips, again and again with the model's live weights."""

    def __init__(
        self, model: nn.Module, clips: FixedClips, config: Config, *, measure: str = "foga", kind: str = "block"
    ):
        self.clips, self.config, self.measure = clips, config, measure
        self.names = part_names(len(model.blocks), kind)
        self.layers = len(self.names) or len(model.blocks)
        probe = config.probe
        points = ProbePoints(tuple(probe.times), probe.draws, config.flow.sigma)
        if measure == "foga-vjp":
            self.one_batch = FogaVjp(model, points)
        else:
            self.one_batch = FogaProbe(model, points, kind=kind, graph=clips.static)

    def launch(self, step: int | None = None, *, progress: bool = False) -> PendingScores:
        """Queue a probe. Every rank must call it; it runs the same forwards on each, and on a GPU nothing is waited
        for."""
        clips, probe = self.clips, self.config.probe
        shape = (self.layers, len(clips), len(probe.times), probe.draws)
        values = torch.zeros(shape, device=clips.device)
        floor, silent = torch.zeros(len(clips), device=clips.device), torch.zeros(len(clips), device=clips.device)
        failure = None
        for batch, owned in _with_bar(clips, self.config, "probe", progress):
            try:
                part = self.one_batch.launch(ProbeBatch(batch.mel, batch.condition, batch.domain, batch.places))
            except CaptureError as error:
                failure = f"the probe cannot be captured ({error}): probe.graph=false runs it without CUDA graphs"
                continue
            except survivable(self.one_batch.model) as error:
                failure = failure or str(error)
                continue
            for row in owned:
                place = batch.places[row]
                values[:, place], floor[place], silent[place] = part.values[:, row], part.floor[row], part.silent[row]
        parts = [values.flatten(), floor, silent, floor.new_full((1,), float(failure is not None))]
        parts = all_sum(torch.cat(parts)).split([part.numel() for part in parts])
        values, floor, silent, failures = (to_host(part) for part in parts)
        ready = record(clips.device)
        scores = LayerScores(
            values, floor, clips.domain, tuple(probe.times), step=step, measure=self.measure, names=self.names
        )
        return PendingScores(BatchScores(values.view(shape), floor, silent), failures, ready, scores, failure)


def probe(
    model: nn.Module,
    clips: FixedClips,
    config: Config,
    step: int | None = None,
    *,
    measure: str = "foga",
    kind: str = "block",
    progress: bool = False,
) -> LayerScores:
    """LayerScores of all clips, the same on every rank. Every rank must call it; when the measurement fails on one, all
    raise ValueError after the same number of forwards."""
    return ClipProbe(model, clips, config, measure=measure, kind=kind).launch(step, progress=progress).read()


def official_probe(model: nn.Module, clips: FixedClips, config: Config, step: int | None = None) -> LayerScores:
    """FoG-A as the release measures it: the first clip of each domain, on one rank."""
    batches = clips.batches(config.flow.max_reference)
    parts, seen = [], set()
    for batch, owned in batches:
        for row in owned:
            if (domain := int(batch.domain[row])) not in seen:
                seen.add(domain)
                one = slice(row, row + 1)
                chosen = ProbeBatch(batch.mel[one], batch.condition[one], batch.domain[one], (batch.places[row],))
                parts.append(official_foga(model, chosen))
    return replace(parts[-1].joined_with(parts[:-1]), step=step)


def measure_model(
    model: nn.Module,
    index: Index,
    config: Config,
    device,
    step: int | None,
    *,
    measures: Sequence[str] | None,
    recipe: str,
    kind: str,
    projections: dict[str, torch.Tensor],
) -> list[LayerScores]:
    """What `agrepa probe` reports of a checkpoint, on one rank, contribution first. measures: of foga, foga-vjp, ridge,
    cka, lasp; None: foga and the storage measures that fit. Raises ValueError when a measurement fails."""
    if "lasp" in (measures or ()):
        _check_lasp(config, index, projections)
    options = {"center": config.align.center, "static": config.probe.graph and torch.device(device).type == "cuda"}
    clips = FixedClips(index, "train", config.probe.clips, config.probe.chunk, device, **options)
    found = []
    for measure in ("foga", "foga-vjp"):
        if measure in (measures or ("foga",)):
            if recipe == "official" and measure == "foga":
                found.append(official_probe(model, clips, config, step))
            else:
                found.append(probe(model, clips, config, step, measure=measure, kind=kind, progress=True))
    stored = None if measures is None else [measure for measure in measures if measure in STORAGE]
    if stored or stored is None:
        clips = storage_clips(index, config, device)
        states = pooled_states(model, clips, config, step, recipe=recipe, progress=True)
        found += storage_scores(states, projections, stored, recipe=recipe)
    return found
