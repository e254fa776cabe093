"""DistillMOS against figures of its authors' own code, and what is refused."""

import numpy as np
import pytest

from agrepa_fast.audio.waves import decode
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.mos import load_mos
from agrepa_fast.fetch import fetch_apt

from .test_embeddings import chirp


@pytest.fixture(scope="module")
def scorer():
    return load_mos("package:distillmos")


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(35_000, 1.6937962), (122_880, 1.7096198), (150_000, 1.7310355)],  # filled up, one window, three
)
def test_distillmos_gives_the_package_s_own_scores(scorer, samples, expected):
    """distillmos 0.9.1 with xls-r-sqa 0.1.0."""
    assert scorer.score(chirp(samples, 16000), 16000) == {"mos": pytest.approx(expected, abs=2e-5)}


def test_distillmos_of_speech_and_of_silence(scorer):
    file = next(fetch_apt("asterisk-core-sounds-en-g722").rglob("vm-goodbye.g722"))
    wave, rate = decode(file, file.name)
    assert scorer.score(wave, rate)["mos"] == pytest.approx(3.3796105, abs=2e-5)
    assert scorer.score(np.zeros(9000, np.float32), 16000)["mos"] == pytest.approx(1.9690433, abs=2e-5)


def test_identity(scorer):
    assert scorer.names == ("mos",)
    assert scorer.identity == {
        "spec": "package:distillmos",
        "sha256": "57a19137782b12ad43176c25f4e1a194c499beceeb112ab8d5d5fd2512ca4f4f",
        "licence": "MIT",
        "version": "0.9.1",
    }


def test_what_is_no_scorer_is_refused(scorer):
    for spec in ("package:distilmos", "distillmos"):
        with pytest.raises(UserError, match=rf"^metrics.mos={spec}: did you mean 'package:distillmos'\?$"):
            load_mos(spec)
    with pytest.raises(ValueError, match="at least one sample"):
        scorer.score(np.zeros(0, np.float32), 16000)
