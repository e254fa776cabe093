"""FoG-A over fixed clips, spread over ranks and combined clip by clip.

Every rank runs the same number of forwards (ZeRO-3 gathers weights in each), and a clip's result depends on nothing but
the clip, so the numbers are the same on any number of ranks.
"""

from dataclasses import dataclass

import torch

from ..attribution.blocks import part_names
from ..attribution.foga import FogaProbe
from ..attribution.points import ProbePoints
from ..attribution.scores import BatchScores, LayerScores
from ..attribution.vjp import FogaVjp
from ..device import CaptureError, record, to_host
from ..models.backbone import Backbone
from ..ranks import all_sum, first_failure
from .fixed_clips import Chunk, FixedClips, measure_chunks


@dataclass(frozen=True)
class PendingScores:
    """Scores of all ranks' clips whose computation is queued on the device."""

    scores: BatchScores  # on the host, complete once `ready` has come
    failures: torch.Tensor  # on the host, likewise: the number of ranks that failed
    ready: torch.cuda.Event | None
    failure: str | None  # of this rank
    clips: FixedClips
    step: int | None
    measure: str
    names: tuple[str, ...]  # of LayerScores

    def read(self) -> LayerScores:
        """Wait for the device and return the scores, the same on every rank. Every rank must call it.

        Raises ValueError on all if the measurement failed on one, or if a clip has no finite scores.
        """
        if self.ready is not None:
            self.ready.synchronize()
        if self.failures.any():  # on every rank alike
            raise ValueError(first_failure(self.failure))
        clips, labels = self.clips, {"step": self.step, "measure": self.measure, "names": self.names}
        return self.scores.of_clips(range(len(clips)), clips.domain, clips.config.probe.times, **labels)


class ClipProbe:
    """FoG-A of fixed clips, or its first-order estimate (measure "foga-vjp"), again and again with live weights.

    kind: "branch" measures the branches of every layer apart.
    """

    def __init__(self, model: Backbone, clips: FixedClips, *, measure: str = "foga", kind: str = "block"):
        self.model, self.clips, self.measure = model, clips, measure
        self.names = part_names(model, kind)
        self.layers = len(self.names) or len(model.layers)
        config = clips.config
        points = ProbePoints(tuple(config.probe.times), config.probe.draws, config.flow.sigma)
        if measure == "foga-vjp":
            self.probe = FogaVjp(model, points)
        else:
            self.probe = FogaProbe(model, points, kind=kind, graph=clips.one_shape and model.replayable)

    def launch(self, step: int | None = None, *, progress: bool = False) -> PendingScores:
        """Queue a measurement; on a GPU nothing is waited for. Every rank must call it.

        step: of the model, to label the scores. progress: show a bar.
        """
        clips, points = self.clips, self.probe.points
        values = torch.zeros(self.layers, len(clips), len(points.times), points.draws, device=clips.device)
        floor, silent = torch.zeros(len(clips), device=clips.device), torch.zeros(len(clips), device=clips.device)

        def measure(chunk: Chunk) -> None:
            try:
                scores = self.probe.launch(chunk.batch)
            except CaptureError as error:
                raise ValueError(
                    f"the probe cannot be captured ({error}): probe.graph=false runs it without CUDA graphs"
                ) from error
            for row, place in chunk.owned:
                values[:, place], floor[place] = scores.values[:, row], scores.floor[row]
                silent[place] = scores.silent[row]

        failure = measure_chunks(self.model, clips, measure, "probe" if progress else None)
        parts = [values.flatten(), floor, silent, floor.new_full((1,), float(failure is not None))]
        parts = all_sum(torch.cat(parts)).split([part.numel() for part in parts])
        on_host = [to_host(part) for part in parts]
        scores = BatchScores(on_host[0].view(values.shape), on_host[1], on_host[2])
        ready = record(clips.device)
        return PendingScores(scores, on_host[3], ready, failure, clips, step, self.measure, self.names)
