"""align.objective=haste beyond test_objectives.py: pairs of layers, and means over the teacher's frames."""

import pytest
import torch

from agrepa_fast.alignment.haste import Haste
from agrepa_fast.alignment.heads import AlignmentHeads
from agrepa_fast.alignment.losses import alignment_loss
from agrepa_fast.alignment.stretch import mean_weights
from agrepa_fast.attribution.selection import LayerSelection
from agrepa_fast.prepare.targets import resample_frames

from .test_objectives import DIMS, FRAMES, clips, queries_keys


@pytest.mark.parametrize(
    ("stored", "layers", "wanted"),
    [
        (4, (4, 5, 6, 7), (0, 1, 2, 3)),
        (1, (1, 4, 6), (0, 0, 0)),
        (4, (2, 3, 5), (1, 2, 3)),
        (2, (1, 3, 5, 8), (0, 0, 1, 1)),
    ],
)
def test_the_deepest_layer_attends_as_the_teachers_last_does(stored, layers, wanted):
    """Four with four, in order, are the released HASTE's."""
    seen = {}

    class Seen(Haste):
        def total(self, layers, weights, t, share):
            seen["places"] = [int(layer.attention.teacher[0, 0, 0, 0, 0]) for layer in layers]
            return super().total(layers, weights, t, share)

    batch, objective = clips((0, 0, 0, 0)), Seen()
    batch.attention["speech"] = torch.arange(stored).view(-1, 1, 1, 1).expand(4, 6, stored, 2, 3, 5).half()
    hidden = {layer: torch.randn(4, FRAMES, 8) for layer in layers}
    chosen = LayerSelection("foga", {"speech": layers}, {"speech": (1 / len(layers),) * len(layers)})
    made = AlignmentHeads(objective, chosen, [8] * 8, DIMS, seed=0)
    alignment_loss(objective, made, hidden, batch, torch.rand(4), attention=queries_keys(hidden))
    assert seen["places"] == list(wanted)


@pytest.mark.parametrize(("count", "length"), [(1, 5), (4, 4), (3, 11), (7, 5)])
def test_means_over_the_teachers_frames_are_those_of_preparation(count, length):
    values = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))
    weights = mean_weights(torch.tensor([length, 6]), torch.tensor([count, 0]), 12, 9)
    found = weights[0, :count, :length] @ values
    torch.testing.assert_close(found, torch.from_numpy(resample_frames(values.numpy(), count)))
    assert not weights[0, :count, length:].any()
    assert weights.isfinite().all()
