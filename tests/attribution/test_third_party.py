"""Models as third parties write them, against one forward per block: the same scores, or a refusal.

`python -m tests.attribution.test_third_party 2000` compares so many, and counts the refusals.
"""

import sys
from collections import Counter

import torch

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


if __name__ == "__main__":
    for reason, count in Counter(compare(seed) for seed in range(int(sys.argv[1]))).most_common():
        print(count, reason or "equal")
