"""Which listeners' ratings count.

ITU-R BS.1534-3, 4.1.2, "Post-screening of assessors": "The post-screening method excludes assessors who assign a very
high grade to a significantly impaired anchor signal, and those who frequently grade the hidden reference as though it
were significantly impaired": an assessor who "rates the hidden reference condition for > 15% of the test items lower
than a score of 90", or a mid-range anchor above 90 for more than 15 % of them; unless more than 25 % of the assessors
do so for an item, since its anchor may then be no significant impairment: "In this case assessors should not be
excluded on the basis of scores for that item."

Its scores of 0 to 100 are given side by side with the reference. Here clips are rated alone on a scale of five, or in
pairs, so the rule compares the listener's own answers: see RULE.
"""

from collections.abc import Sequence

import numpy as np

RULE = (
    "left out after ITU-R BS.1534-3, 4.1.2: listeners who put the anchor above the hidden reference in more than 15 % "
    "of the clips (not counting clips in which more than 25 % of the others do), or whose references are not above "
    "their anchors on average"
)
_MOST, _OF_OTHERS = 0.15, 0.25


def screened(names: Sequence[str], differences: np.ndarray) -> dict[str, str]:
    """Return listener -> reason of those who are left out. differences (listeners, clips): the reference's score minus
    the anchor's."""
    reasons, inverted = {}, differences < 0
    for place, name in enumerate(names):
        others = np.delete(inverted, place, axis=0)
        counted = others.mean(0) <= _OF_OTHERS if len(others) else np.ones(differences.shape[1], bool)
        wrong, clips = int(inverted[place, counted].sum()), int(counted.sum())
        if differences[place].mean() <= 0:
            reasons[name] = "references are not rated above anchors on average"
        elif wrong > _MOST * clips:
            reasons[name] = f"the anchor is rated above the reference in {wrong} of {clips} clips"
    return reasons
