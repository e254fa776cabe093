"""FoG-A as the released code computes it, faults included, for like-for-like comparison."""

import torch

from ..models.backbone import Backbone
from .blocks import gating
from .gate_plan import single_ablations
from .gates import multi_gate
from .points import OFFICIAL_POINTS, ProbeBatch, clip_times, evaluation_mode
from .scores import BatchScores, LayerScores


@torch.no_grad()
def official_foga(model: Backbone, batch: ProbeBatch) -> LayerScores:
    """Return foga(recipe="official"): the release's fog_attribution (models.py at 8c1371a).

    A score is sqrt(mean(dv^2) + 1e-8) over sqrt(mean(v^2) + 1e-8) + 1e-8, means over valid frames (the release has no
    padding), at the clean mel and t = 0.8. One forward per odd layer, in training mode; even layers are nan.
    """
    blocks = [part for layer in model.layers for part in layer.parts]
    if model.kind != "block" or len(blocks) != len(model.layers):
        raise ValueError("the official recipe measures models whose layers are one residual block each")
    eps, depth = 1e-8, len(blocks)
    values = torch.full((depth, len(batch.places), 1, 1), torch.nan)
    elements = batch.condition.lengths * batch.mel.shape[-1]
    t = clip_times(batch, OFFICIAL_POINTS.times[0])

    def velocity() -> torch.Tensor:
        return model(batch.mel, t, batch.condition).v

    def rms(x: torch.Tensor) -> torch.Tensor:  # the model's padding is zero
        return (x.float().square().sum((1, 2)) / elements + eps).sqrt()

    with evaluation_mode(model):
        model.train()
        base = velocity()
        energy = rms(base) + eps
        for layer in range(0, depth, 2):
            gates = single_ablations(depth)[layer + 1 : layer + 2]
            with multi_gate(blocks, gates, **gating(model)):
                values[layer, :, 0, 0] = (rms(velocity() - base) / energy).cpu()
        floor = rms(velocity() - base) / energy
    measured = values.clone()
    measured[1::2] = 0
    BatchScores(measured, floor, ~base.flatten(1).any(1)).check(batch.places)
    return LayerScores(values, floor.cpu(), batch.domain.cpu(), OFFICIAL_POINTS.times, "official")
