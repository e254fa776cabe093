"""Arms of an experiment, compared: differences to a baseline over clips, and over seeds.

Two questions have two intervals. Over clips: would these trained models differ on other clips? A paired bootstrap or a
paired jackknife, with the seeds of an arm averaged within a clip. Over seeds: would the method differ in other runs? A
t interval of the seeds' own differences, and exact sign flips, corrected by Holm over the arms.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .aggregate import (
    CLIP_METRICS,
    GROUPS,
    SEED,
    SET_METRICS,
    Row,
    SetDistances,
    clip_difference,
    clip_value,
    pairs_by_clip,
)
from .intervals import Interval, holm, jackknife, mean_interval, sign_flip
from .stored import read_clips, read_embeddings, read_results

ROW = "sample"
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Evaluated:
    """What `agrepa evaluate` wrote about one run. label: of its arm; seed: of the run; losses: its validation flow loss
    with averaged weights by domain, and of all clips as "", {} if it is unknown."""

    label: str
    seed: int
    folder: Path
    losses: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def results(self) -> dict:
        return read_results(self.folder / "results.json")

    @cached_property
    def clips(self) -> list[dict]:
        return [row for row in read_clips(self.folder / "clips.csv") if row["row"] == ROW]

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        return read_embeddings(self.folder / "embeddings.npz")

    def of_domain(self, domain: str) -> list[dict]:
        return [row for row in self.clips if row["domain"] == domain]

    def embeddings(self, domain: str) -> dict[str, np.ndarray]:
        """Return key -> embedding (dim,), or (draws, dim), of the clips of a domain that have one of every draw."""
        vectors, keys = self._array(domain, ROW), self._arrays.get(f"{domain}/{ROW}/keys")
        if keys is None:  # written before keys were: every clip had a vector then, or the numbers differ
            keys = np.array(sorted({row["key"] for row in self.of_domain(domain)}))
        draws = len({row["draw"] for row in self.of_domain(domain)})
        if draws > 1 and vectors.ndim == 2:
            raise UserError(
                f"{self.folder}: embeddings.npz has means over {draws} draws, as version 0.1 wrote them, which vary "
                "less than samples: remove this folder, and run the same command or agrepa evaluate again"
            )
        shape = (draws,) * (draws > 1) + self._array(domain, "reference").shape[1:]
        if len(keys) != len(vectors) or vectors.shape[1:] != shape:
            raise self._unlike(f"{domain}/{ROW}")
        return dict(zip(keys.tolist(), vectors, strict=True))

    def has_distance(self, domain: str, metric: str) -> bool:
        """Return whether the clips of a domain have a distance."""
        return self.results["rows"][ROW].get(domain, {}).get(metric, {}).get("value") is not None

    def distances(self, domain: str) -> SetDistances:
        return SetDistances(self._array(domain, "reference"))

    def _array(self, domain: str, name: str) -> np.ndarray:
        """Return a matrix that results.json has a distance of."""
        found = self._arrays.get(f"{domain}/{name}", ())
        if len(found) < 2:
            raise self._unlike(f"{domain}/{name}")
        return found

    def _unlike(self, name: str) -> UserError:
        return UserError(
            f"{self.folder}: {name} in embeddings.npz does not belong to results.json and clips.csv: run agrepa "
            "evaluate again with another --out"
        )


Pair = tuple[Evaluated, Evaluated]  # a run of an arm and that of the baseline, with one seed


class Difference(NamedTuple):
    """An arm minus the baseline. of_seeds: the difference of each seed. clips, seeds: intervals over them, or None; p:
    over seeds, by Holm, or None."""

    label: str
    domain: str
    metric: str
    of_seeds: Sequence[float]
    clips: Interval | None
    seeds: Interval | None
    p: float | None

    @property
    def value(self) -> float:
        return (self.clips or self.seeds).value

    @property
    def clear(self) -> bool:
        """Whether both intervals exclude 0 by more than rounding. One over seeds without width says nothing: counts of
        a few clips may agree by chance."""
        if not all(
            one is not None and (one.low > _ROUNDING or one.high < -_ROUNDING) for one in (self.clips, self.seeds)
        ):
            return False
        return self.seeds.high - self.seeds.low > _ROUNDING


def check_comparable(runs: Sequence[Evaluated]) -> None:
    """Raise UserError unless all were evaluated on the same clips, with the same vocoder, sampler, metric models and
    settings of these."""
    first = runs[0]
    for run in runs[1:]:
        for name, about in (
            ("manifest", "other clips"),
            ("vocoder", "another vocoder"),
            ("flow", "another sampler"),
            ("averaged", "averaged and with live weights (--live)"),
            ("models", "other metric models"),
            ("reference_clips", "other numbers of reference clips"),
            ("words", "another metrics.text or metrics.language"),
            ("confidence", "another metrics.confidence"),
        ):
            known = [one.results[name] for one in (first, run) if name in one.results]  # older results lack the last
            if known[1:] and known[0] != known[1]:
                raise UserError(
                    f"{first.folder} and {run.folder} were evaluated with {about}: evaluate them again with one "
                    "version and the same data.*, flow.*, eval.vocoder and metrics.*"
                )


def differences(runs: Sequence[Evaluated], baseline: str, confidence: float) -> list[Difference]:
    """Return every arm's differences to the baseline, for each metric and domain that both have. Raises UserError if an
    arm shares no seed with the baseline."""
    arms: dict[str, dict[int, Evaluated]] = {}
    for run in runs:
        arms.setdefault(run.label, {})[run.seed] = run
    found: list[Difference] = []
    for label, seeds in arms.items():
        if label == baseline:
            continue
        shared = sorted(seeds.keys() & arms[baseline].keys())
        if not shared:
            raise UserError(f"{label} and {baseline} have no seed in common: pairs are of the same run.seed")
        pairs = [(seeds[seed], arms[baseline][seed]) for seed in shared]
        found += _of_arm(label, pairs, confidence)
    return _corrected(found)


def _of_arm(label: str, pairs: Sequence[Pair], confidence: float) -> list[Difference]:
    found = []
    for domain in dict.fromkeys(row["domain"] for row in pairs[0][0].clips):
        for metric in CLIP_METRICS:
            rows = [_shared_rows(metric, *(run.of_domain(domain) for run in pair)) for pair in pairs]
            rows = [of_pair for of_pair in rows if of_pair[0]]
            one, other = ([row for of_pair in rows for row in of_pair[side]] for side in (0, 1))
            clips = clip_difference(metric, one, other, confidence)
            if clips is not None:
                of_seeds = [clip_value(metric, a) - clip_value(metric, b) for a, b in rows]
                found.append(Difference(label, domain, metric, of_seeds, clips, *_over_seeds(of_seeds, confidence)))
        for metric in SET_METRICS:
            if not all(run.has_distance(domain, metric) for run in chain(*pairs)):
                continue
            if (both := _set_difference(domain, metric, pairs, confidence)) is not None:
                clips, of_seeds = both
                found.append(Difference(label, domain, metric, of_seeds, clips, *_over_seeds(of_seeds, confidence)))
    for domain in pairs[0][0].losses:
        if all(domain in run.losses for pair in pairs for run in pair):
            losses = [a.losses[domain] - b.losses[domain] for a, b in pairs]
            over_seeds = _over_seeds(losses, confidence, alone=True)
            found.append(Difference(label, domain, "val/flow_loss", losses, None, *over_seeds))
    return found


def _shared_rows(metric: str, one: Sequence[Row], other: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return the rows of two runs of one seed, of the clips for which both have the figure. One of a run that diverged
    may be missing, and other clips or seeds would then be compared."""
    shared = pairs_by_clip(metric, one).keys() & pairs_by_clip(metric, other).keys()
    return tuple([row for row in rows if str(row["key"]) in shared] for rows in (one, other))


def _over_seeds(
    values: Sequence[float], confidence: float, *, alone: bool = False
) -> tuple[Interval | None, float | None]:
    """Return the interval and the p-value over seeds; one seed says nothing of the method. alone: return its value,
    without an interval."""
    if len(values) < 2 and not alone:
        return None, None
    tested = len(values) > 1 and np.isfinite(values).all()  # the loss of a run that diverged is nan
    return mean_interval(np.array(values), confidence), (sign_flip(values) if tested else None)


def _set_difference(
    domain: str, metric: str, pairs: Sequence[Pair], confidence: float
) -> tuple[Interval, list[float]] | None:
    """Return the mean over seeds of the distances' differences, jackknifed over the clips of all at once: those that
    have an embedding in all runs; and the differences of each seed's pair, of the same clips, since a distance grows as
    clips get fewer. None if fewer than two have."""
    distances = pairs[0][0].distances(domain)
    embedded = [[run.embeddings(domain) for run in pair] for pair in pairs]
    shared = sorted(set.intersection(*(set(of_run) for pair in embedded for of_run in pair)))
    if len(shared) < 2:
        return None
    matrices = [[np.array([of_run[key] for key in shared]) for of_run in pair] for pair in embedded]

    def of_seeds(places: np.ndarray) -> list[float]:
        return [distances.value(metric, a, places) - distances.value(metric, b, places) for a, b in matrices]

    interval = jackknife(len(shared), lambda places: float(np.mean(of_seeds(places))), GROUPS, confidence, SEED)
    return interval, of_seeds(np.arange(len(shared)))


def _corrected(found: Sequence[Difference]) -> list[Difference]:
    """Return the differences with p-values corrected for the number of arms, metric by metric."""
    result = list(found)
    kinds = dict.fromkeys((one.domain, one.metric) for one in found if one.p is not None)
    for kind in kinds:
        places = [n for n, one in enumerate(found) if (one.domain, one.metric) == kind and one.p is not None]
        for place, p in zip(places, holm([found[n].p for n in places]), strict=True):
            result[place] = found[place]._replace(p=p)
    return result


def agreement(selections: Sequence[Mapping[str, Sequence[int]]]) -> float | None:
    """Return the mean Jaccard index of the layers that pairs of seeds chose, over domains; None without two choices."""
    values = []
    for number, first in enumerate(selections):
        for second in selections[number + 1 :]:
            for domain in first.keys() & second.keys():
                one, other = set(first[domain]), set(second[domain])
                values.append(len(one & other) / max(1, len(one | other)))
    return float(np.mean(values)) if values else None
