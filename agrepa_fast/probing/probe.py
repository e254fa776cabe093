"""Validation loss and layer probes over fixed clips, spread over ranks and combined clip by clip.

Every rank runs the same number of forwards (ZeRO-3 gathers weights in each), and a clip's result depends on nothing but
the clip, so the numbers are the same on any number of ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from tqdm import tqdm

from ..attribution.foga import (
    OFFICIAL_TIME,
    FogaProbe,
    Measured,
    ProbeBatch,
    noised,
    official_foga,
    part_names,
    probe_condition,
    undisturbed,
)
from ..attribution.scores import STORAGE, LayerScores
from ..attribution.stored import PooledStates, cka, lasp, ridge
from ..attribution.vjp import FogaVjp
from ..config import DOMAINS, Config
from ..data.batches import Batch, collate, fixed_clips
from ..data.index import Index, Sample
from ..device import record, to_host
from ..errors import UserError
from ..flow import flow_loss
from ..kernels import flow_mix
from ..ranks import all_sum, first_failure
from ..seeds import clip_keys


class FixedClips:
    """The first clips of every domain of a split, in chunks for this rank.

    static: all chunks have the same shape, for CUDA graphs. center: as collate. Raises UserError when there are fewer
    clips than ranks.
    """

    def __init__(
        self,
        index: Index,
        split: str,
        per_domain: int,
        chunk: int,
        device,
        rank: int = 0,
        world: int = 1,
        *,
        static: bool = False,
        center: bool = True,
    ):
        self.index, self.chunk, self.rank, self.world = index, chunk, rank, world
        self.device = torch.device(device)
        self.static, self.center = static, center
        self.samples: list[Sample] = [s for d in index.domains for s in fixed_clips(index, split, d, per_domain)]
        self.domain = torch.tensor([DOMAINS.index(sample.domain) for sample in self.samples])
        self._made: dict[float, list[tuple[Batch, list[int]]]] = {}
        if len(self) < world:
            raise UserError(
                f"{len(self)} {split} clips are fewer than the {world} ranks that share them: raise probe.clips and "
                "eval.clips"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, max_reference: float) -> list[tuple[Batch, list[int]]]:
        """This rank's chunks, on the device, and which rows of each it answers for; rows beyond its share repeat a clip
        and are dropped."""
        if max_reference not in self._made:
            self._made[max_reference] = list(self._make(max_reference))
        return self._made[max_reference]

    def _make(self, max_reference: float) -> Iterator[tuple[Batch, list[int]]]:
        share, chunk = -(-len(self) // self.world), self.chunk
        rows = share
        if self.static:
            chunks = -(-share // chunk)
            chunk = -(-share // chunks)  # as even as they can be: what fills up a chunk is computed for nothing
            rows = chunks * chunk
        mine = [self.rank * share + i for i in range(rows)]
        last = min((self.rank + 1) * share, len(self)) - 1
        least = {}
        if self.static:
            least = {"frames": max(s.frames for s in self.samples), "tokens": max(len(s.tokens) for s in self.samples)}
        padded = len({sample.frames for sample in self.samples}) > 1
        for start in range(0, rows, chunk):
            places = mine[start : start + chunk]
            owned = [row for row, place in enumerate(places) if place <= last]
            places = [min(place, len(self) - 1) for place in places]
            samples = [self.samples[place] for place in places]
            batch = collate(samples, tuple(places), self.index, center=self.center, **least).to(self.device)
            condition = probe_condition(batch.mel, batch.condition, max_reference)
            yield replace(batch, condition=replace(condition, padded=padded) if self.static else condition), owned


def _with_bar(clips: FixedClips, config: Config, what: str, progress: bool) -> Iterator[tuple[Batch, list[int]]]:
    batches = clips.batches(config.flow.max_reference)
    return iter(tqdm(batches, desc=what, unit="chunk", disable=not progress, leave=False))


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


@dataclass(frozen=True)
class PendingScores:
    """Scores of all ranks' clips whose computation is queued on the device."""

    measured: Measured  # on the host; filled when `ready` has come
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
        options = {"times": probe.times, "draws": probe.draws, "sigma": config.flow.sigma}
        if measure == "foga-vjp":
            self.one_batch = FogaVjp(model, **options)
        else:
            self.one_batch = FogaProbe(model, kind=kind, max_rows=probe.max_rows, graph=clips.static, **options)

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
        return PendingScores(Measured(values.view(shape), floor, silent), failures, ready, scores, failure)


def survivable(model: nn.Module) -> tuple[type[Exception], ...]:
    """What a probe may fail of on one rank while the others go on. Not of memory under ZeRO-3: there, a rank that stops
    inside a forward leaves the others waiting for its partitions."""
    partitioned = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return (ValueError,) if partitioned else (ValueError, torch.OutOfMemoryError)


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
    times = (OFFICIAL_TIME,) if recipe == "official" else tuple(config.probe.times)
    layers, count, sizes = range(len(model.blocks) + 1), len(clips), config.model
    hidden = torch.zeros(len(layers) - 1, count, len(times), sizes.dim, device=clips.device)
    condition = torch.zeros(count, sizes.token_dim, device=clips.device)
    dims = {domain: clips.index.teacher(domain).dim for domain in clips.index.domains}
    teacher = {domain: torch.zeros(count, dim, device=clips.device) for domain, dim in dims.items()}
    failure = None
    with undisturbed(model):
        for batch, owned in _with_bar(clips, config, "what layers store", progress):
            try:
                for number, t in enumerate(times):
                    given = ProbeBatch(batch.mel, batch.condition, batch.domain, batch.places)
                    x_t = batch.mel if recipe == "official" else noised(given, t, config.flow.sigma, 0, 0)
                    t_clips = batch.mel.new_full((len(batch.keys),), t)
                    pooled = model(x_t, t_clips, batch.condition, capture=tuple(layers), pooled=True).hidden
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


def _check_lasp(config: Config, index: Index, projections: dict[str, torch.Tensor]) -> None:
    """Before anything is computed: whether BiT-C's projections can be asked about layers."""
    if missing := set(index.domains) - projections.keys():
        raise ValueError(f"lasp asks BiT-C's projections, and there are none of {', '.join(sorted(missing))}")
    if config.model.dim != config.model.token_dim:
        raise ValueError(
            f"lasp: BiT-C's projections take {config.model.token_dim} channels (model.token_dim), layers have "
            f"{config.model.dim} (model.dim)"
        )


def storage_clips(index: Index, config: Config, device, rank: int = 0, world: int = 1) -> FixedClips:
    """The clips that say what layers store: probe.storage_clips per domain, or as many as there are."""
    count = min(config.probe.storage_clips, *(index.clips("train", domain) for domain in index.domains))
    return FixedClips(index, "train", count, config.probe.chunk, device, rank, world, center=config.align.center)
