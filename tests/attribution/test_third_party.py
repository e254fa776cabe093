"""Models as third parties write them, against one forward per block: the same scores, or a refusal.

`python -m tests.attribution.test_third_party 2000` compares so many, and counts the refusals.
"""

import sys
from collections import Counter

import pytest
import torch
import torch.nn as nn

from agrepa_fast import ablate

from .third_party import random_model, scores_one_by_one

STACKS = 150


def compare(seed: int) -> str:
    """Return "" if ablate gives the scores of one forward per block, or its refusal."""
    model, inputs, blocks = random_model(seed)
    shape, refusal = model.shape, ""
    wanted = scores_one_by_one(model, inputs, blocks)
    try:
        scores = ablate(model, inputs, blocks, kind=shape.kind, state=shape.state, max_rows=(None, 7)[seed % 2])
    except ValueError as error:
        refusal = str(error)
    else:
        message = f"seed {seed}: {vars(shape)}\n"
        got = scores.values[:, :, 0, 0]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5, msg=lambda reason: message + reason)
    assert not refusal or shape.refusable, f"seed {seed}: refused without need: {refusal}\n{vars(shape)}"
    return refusal


def test_random_stacks_score_as_in_one_forward_per_block_or_are_refused():
    refusals = [compare(seed) for seed in range(STACKS)]
    assert sum(not refusal for refusal in refusals) > STACKS // 2, Counter(refusals)
    assert all("block" in refusal or "layer" in refusal for refusal in refusals if refusal)


class Decides(nn.Module):
    """Its last line asks for a value to which the fifth of nine blocks alone contributes."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Shift(10.0 if number == 4 else 0.1) for number in range(9))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return 2 * x if x.mean() > 5 else x


class Shift(nn.Module):
    def __init__(self, shift: float):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return x + self.shift * torch.sigmoid(x)


def test_every_layer_is_verified_if_the_model_decides_by_values():
    torch.manual_seed(0)
    model = Decides()
    with pytest.raises(ValueError, match=r"layer 5 scores .* with shared rows and .* in a forward of its own"):
        ablate(model, {"x": torch.randn(2, 3, 4)}, model.blocks)


if __name__ == "__main__":
    for reason, count in Counter(compare(seed) for seed in range(int(sys.argv[1]))).most_common():
        print(count, reason or "equal")
