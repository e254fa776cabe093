"""All measures of a checkpoint's layers, on one rank: `agrepa probe`."""

from dataclasses import dataclass, replace

import torch

from ..attribution.official import official_foga
from ..attribution.points import ProbeBatch
from ..attribution.scores import LayerScores
from ..config import STORAGE, Config
from ..data.index import Index
from ..errors import UserError
from ..models.backbone import Backbone
from .fixed_clips import FixedClips, probe_clips, storage_clips
from .probe import ClipProbe
from .stored import pooled_states, storage_scores


@dataclass(frozen=True)
class ProbeRequest:
    """The measures that a user asks for. Raises UserError for combinations that do not exist.

    measures: of foga, foga-vjp, ridge, cka and lasp; None: foga and the storage measures that fit. recipe: corrected,
    or official, the release's. kind: block, or branch for the attention and the FFN of every block apart.
    """

    measures: tuple[str, ...] | None = None
    recipe: str = "corrected"
    kind: str = "block"

    def __post_init__(self) -> None:
        if self.kind == "branch":
            if (self.measures or ("foga",)) != ("foga",) or self.recipe != "corrected":
                raise UserError("--kind branch: only foga in the corrected recipe measures parts of blocks")
            object.__setattr__(self, "measures", ("foga",))
        if self.recipe == "official" and (others := set(self.measures or ()) - {"foga", "lasp"}):
            raise UserError(f"--recipe official: the release measures foga and lasp, not {', '.join(sorted(others))}")


def measure_model(
    model: Backbone,
    index: Index,
    config: Config,
    device: torch.device,
    request: ProbeRequest,
    projections: dict[str, torch.Tensor],
    step: int | None = None,
) -> list[LayerScores]:
    """Return the scores of every requested measure, contribution first.

    projections: domain -> weight of BiT-C's projection, for LASP. step: of the checkpoint, to label the scores. Raises
    ValueError if a measurement fails.
    """
    wanted = request.measures
    if "lasp" in (wanted or ()):
        _check_lasp(model, index, projections)
    clips = probe_clips(index, config, device, one_shape=config.probe.graph and device.type == "cuda")
    measured = []
    for measure in ("foga", "foga-vjp"):
        if measure not in (wanted or ("foga",)):
            continue
        if measure == "foga" and request.recipe == "official":
            measured.append(official_probe(model, clips, step))
        else:
            probe = ClipProbe(model, clips, measure=measure, kind=request.kind)
            measured.append(probe.launch(step, progress=True).read())
    stored = None if wanted is None else [measure for measure in wanted if measure in STORAGE]
    if stored is None or stored:
        clips = storage_clips(index, config, device)
        states = pooled_states(model, clips, step, recipe=request.recipe, progress=True)
        measured += storage_scores(states, projections, stored, recipe=request.recipe)
    return measured


def official_probe(model: Backbone, clips: FixedClips, step: int | None = None) -> LayerScores:
    """Return FoG-A as the release measures it: of the first clip of each domain, on one rank."""
    scores: dict[int, LayerScores] = {}
    for batch, owned in clips.chunks():
        for row, place in owned:
            if (domain := int(batch.domain[row])) not in scores:
                one = slice(row, row + 1)
                clip = ProbeBatch(batch.mel[one], batch.condition[one], batch.domain[one], (place,))
                scores[domain] = official_foga(model, clip)
    *earlier, last = scores.values()
    return replace(last.joined_with(earlier), step=step)


def _check_lasp(model: Backbone, index: Index, projections: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if BiT-C's projections do not fit the layers, before anything is computed."""
    if missing := set(index.domains) - projections.keys():
        raise ValueError(f"lasp asks BiT-C's projections, and there are none of {', '.join(sorted(missing))}")
    widths = {layer.width for layer in model.layers}
    if widths != {model.condition_width}:
        raise ValueError(
            f"lasp: BiT-C's projections take the token condition's {model.condition_width} channels, layers have "
            + " and ".join(map(str, sorted(widths)))
        )
