"""Rates, means and distances of rows of clips.csv, and the figures of single wavs."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agrepa_fast.audio.waves import decode
from agrepa_fast.evaluation.aggregate import (
    CLIP_METRICS,
    SET_METRICS,
    SetDistances,
    clip_difference,
    clip_interval,
    pairs_by_clip,
)
from agrepa_fast.evaluation.manifest import Clip
from agrepa_fast.evaluation.mos import SCORE_NAMES
from agrepa_fast.evaluation.results import SCORES, embedding_matrix
from agrepa_fast.evaluation.scores import FAILED, ScoreCache
from agrepa_fast.evaluation.synthesis import Wav
from agrepa_fast.files import file_sha256

NOTHING = dict.fromkeys(
    (
        "words",
        "errors",
        "chars",
        "char_errors",
        "heard_words",
        "heard_errors",
        "understood",
        "mos",
        "similarity",
        "mel_l1",
    )
)


def row(key: str, **figures) -> dict:
    return {"key": key, **NOTHING, **figures}


ROWS = [
    row("a", words=1, errors=1, chars=2, char_errors=1, understood=True, mos=3.0),
    row("b", words=9, errors=0, chars=30, char_errors=0, understood=True, mos=4.0),
    row("c", words=2, errors=5, chars=8, char_errors=9, understood=True, mos=None),
    row("d", words=4, errors=1, chars=8, char_errors=0, understood=False),
    row("e"),
]


def test_rates_are_ratios_of_sums_and_leave_out_what_was_not_measured():
    assert clip_interval("wer", ROWS, 0.95).value == 7 / 16
    assert clip_interval("wer", ROWS, 0.95).n == 4
    assert clip_interval("wer_utterance", ROWS, 0.95).value == pytest.approx((1 + 0 + 2.5 + 0.25) / 4)
    assert clip_interval("over_half", ROWS, 0.95).value == 0.5
    assert clip_interval("cer", ROWS, 0.95).value == 10 / 48
    assert clip_interval("mos", ROWS, 0.95)[::3] == (3.5, 2)
    assert clip_interval("similarity", ROWS, 0.95) is None
    assert pairs_by_clip("mel_l1", ROWS) == {}


def test_capped_errors_are_at_most_the_words_and_all_of_them_where_nothing_was_understood():
    assert pairs_by_clip("wer_capped", ROWS) == {"a": (1, 1), "b": (0, 9), "c": (2, 2), "d": (4, 4)}
    assert clip_interval("wer_capped", ROWS, 0.95).value == 7 / 16


def test_draws_are_joined_within_a_clip():
    rows = [
        row("a", words=2, errors=2, mos=1.0),
        row("a", words=2, errors=0, mos=2.0),
        row("b", words=4, errors=0, mos=4.0),
    ]
    assert clip_interval("wer", rows, 0.95)[::3] == (1 / 6, 2)
    assert clip_interval("mos", rows, 0.95)[::3] == (2.75, 2)


def test_a_difference_is_over_the_clips_that_both_have():
    better = [{**one, "errors": 0} if one["key"] == "a" else one for one in ROWS if one["key"] != "d"]
    found = clip_difference("wer", ROWS, better, 0.95)
    assert found.value == pytest.approx(6 / 12 - 5 / 12)
    assert found.n == 3
    assert clip_difference("wer", ROWS, ROWS, 0.95)[:3] == (0, 0, 0)
    assert clip_difference("wer", ROWS, [row("z", words=1, errors=1)], 0.95) is None


def test_distances_of_sets_and_their_paired_difference():
    random = np.random.default_rng(0)
    distances, x = SetDistances(random.normal(size=(60, 4))), random.normal(size=(40, 4))
    far = x + np.array([2.0, 0, 0, 0])
    for metric in SET_METRICS:
        near, away = distances.interval(metric, x, 0.95), distances.interval(metric, far, 0.95)
        paired = distances.difference(metric, far, x, 0.95)
        assert paired.value == pytest.approx(away.value - near.value)
        assert paired.low > 0
        assert distances.difference(metric, x, x, 0.95)[:3] == (0, 0, 0)
    assert {"wer", "mos", "mel_l1"} < CLIP_METRICS.keys()


def embedded(vectors: np.ndarray) -> dict[Wav, dict]:
    """Figures of samples with embeddings (clips, draws, dim)."""
    return {
        Wav("sample", Clip("speech", f"{key:02}", draw, 8, "", ""), Path("x.wav")): {"vector": vector.tolist()}
        for key, of_clip in enumerate(vectors)
        for draw, vector in enumerate(of_clip)
    }


def test_more_draws_of_a_perfect_model_are_no_further_from_the_truth():
    random, values = np.random.default_rng(0), []
    for _ in range(100):
        distances, x = SetDistances(random.normal(size=(40, 3))), random.normal(size=(20, 4, 3))
        values.append(distances.value("mmd", embedding_matrix(embedded(x), "sample")))
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(len(values))  # with means of draws it is 35 errors off


def test_a_distance_of_draws_is_the_mean_of_theirs_and_one_draw_is_a_set():
    random = np.random.default_rng(0)
    distances, x = SetDistances(random.normal(size=(40, 3))), random.normal(size=(12, 2, 3))
    matrix, alone = (embedding_matrix(embedded(part), "sample") for part in (x, x[:, :1]))
    assert np.array_equal(matrix, x)
    assert np.array_equal(alone, x[:, 0])
    for metric in SET_METRICS:
        found = distances.interval(metric, matrix, 0.95)
        assert found.value == pytest.approx(np.mean([distances.value(metric, x[:, draw]) for draw in (0, 1)]))
        assert found.n == 12
        twice = distances.interval(metric, np.repeat(x[:, :1], 2, axis=1), 0.95)  # a clip is left out in both draws
        assert twice[:3] == pytest.approx(distances.interval(metric, alone, 0.95)[:3])
    figures = embedded(x)
    figures[next(iter(figures))] = {FAILED: "no reason"}
    assert np.array_equal(embedding_matrix(figures, "sample"), x[1:])


def test_every_score_of_a_clip_has_a_mean():
    """The names of a scorer that no metric knew would be in clips.csv, and nowhere else."""
    assert set(SCORE_NAMES) < set(SCORES)
    assert set(SCORES) - {"logprob"} < CLIP_METRICS.keys()
    rows = [row("a", dnsmos_ovrl=2.0), row("b", dnsmos_ovrl=3.0), row("c")]
    assert clip_interval("dnsmos_ovrl", rows, 0.95)[::3] == (2.5, 2)


def judged(cache: ScoreCache, wav, judge) -> dict:
    return cache.judge(file_sha256(wav), lambda: decode(wav, wav.name), judge)


def test_figures_belong_to_the_content_of_a_wav_and_to_the_model(tmp_path):
    calls = []

    def judge(wave, rate):
        calls.append(len(wave))
        return {"mos": float(np.abs(wave).max()), "rate": rate}

    wav = tmp_path / "a.wav"
    soundfile.write(wav, np.full(100, 0.5), 8000)
    cache = ScoreCache(tmp_path / "cache", "mos", {"sha256": "1"})
    assert judged(cache, wav, judge) == judged(cache, wav, judge) == {"mos": 0.5, "rate": 8000}
    old = file_sha256(wav)
    soundfile.write(wav, np.full(120, 0.25), 8000)  # made again under the same name
    assert judged(cache, wav, judge)["mos"] == 0.25
    assert json.loads(cache.file(old).read_text())["mos"] == 0.5
    assert judged(ScoreCache(tmp_path / "cache", "mos", {"sha256": "2"}), wav, judge)
    assert calls == [100, 120, 120]


def test_a_wav_that_cannot_be_judged_has_the_reason_and_is_judged_again(tmp_path):
    def raises(wave, rate):
        raise RuntimeError("shapes\ndo not fit")

    cache = ScoreCache(tmp_path / "cache", "mos", {})
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 8000)
    (tmp_path / "b.wav").write_bytes(b"no recording")
    for name, reason in (("a.wav", "RuntimeError: shapes do not fit"), ("b.wav", "b.wav")):
        assert reason in judged(cache, tmp_path / name, raises)[FAILED]
        assert not cache.file(file_sha256(tmp_path / name)).exists()
    assert judged(cache, tmp_path / "a.wav", lambda wave, rate: {"mos": 3.0}) == {"mos": 3.0}
