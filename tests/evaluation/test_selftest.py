"""The self-test of metric models: measures that hear noise pass, and broken ones do not. Then the packaged models."""

import numpy as np
import pytest

from agrepa_fast.audio.waves import decode
from agrepa_fast.evaluation.embeddings import load_embedding
from agrepa_fast.evaluation.mos import load_mos
from agrepa_fast.evaluation.recogniser import Heard, load_recogniser
from agrepa_fast.evaluation.selftest import (
    Gauge,
    choose_clips,
    distinctness,
    opinion,
    self_test,
    sureness,
    voice,
    with_noise,
)
from agrepa_fast.evaluation.speaker import load_speaker
from agrepa_fast.fetch import fetch_apt

RATE = 8000


def tones(count: int, level: float = 0.3) -> list[tuple[np.ndarray, int]]:
    """Clips of one tone each, with a pause at the end."""
    time = np.arange(RATE) / RATE
    return [
        ((level * np.sin(2 * np.pi * (200 + 100 * n) * time) * (time < 0.8)).astype(np.float32), RATE)
        for n in range(count)
    ]


class PauseScorer:
    """5 for a silent pause, down to 1 for a loud one. Takes samples of 16 bits; the quietest steps do not count."""

    names = ("mos",)

    def __init__(self, scale: float):
        self.scale = scale

    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        pause = np.sqrt(np.mean(np.square(wave[-rate // 10 :] * self.scale)))
        return {"mos": float(5 - 4 * np.tanh(pause / 3000))}


def test_a_scorer_that_hears_noise_passes():
    test = self_test(opinion(PauseScorer(32767), "mos"), tones(3))
    assert test.passed
    assert test.clean == 5
    assert test.clean > test.noise_20_db > test.noise_5_db > 1
    assert str(test) == "clean 5, noise at 20 dB 4.17, at 5 dB 1.68"


@pytest.mark.parametrize(
    "score",
    [
        lambda wave, clean: 3.0,  # constant
        lambda wave, clean: PauseScorer(1).score(wave, RATE)["mos"],  # forgets to scale: right order, no difference
        lambda wave, clean: -PauseScorer(32767).score(wave, RATE)["mos"],  # the wrong way round
        lambda wave, clean: abs(PauseScorer(32767).score(wave, RATE)["mos"] - 4.2),  # prefers loud noise to a little
        lambda wave, clean: -abs(PauseScorer(32767).score(wave, RATE)["mos"] - 4.2),  # prefers a little to none
        lambda wave, clean: float("nan"),
    ],
    ids=["constant", "unscaled", "reversed", "loud first", "quiet first", "nan"],
)
def test_a_broken_scorer_fails(score):
    assert not self_test(Gauge(score, least=0.2), tones(3)).passed


def test_the_unscaled_scorer_fails_by_the_size_of_the_drop_alone():
    test = self_test(opinion(PauseScorer(1), "mos"), tones(3))
    assert test.clean > test.noise_20_db > test.noise_5_db
    assert not test.passed


def test_without_a_clip_that_sounds_nothing_is_believed():
    for clips in ([], [(np.zeros(RATE, np.float32), RATE)]):
        test = self_test(opinion(PauseScorer(32767), "mos"), clips)
        assert not test.passed
        assert np.isnan(test.clean)
        assert not self_test(distinctness(Bands(), clips), clips).passed


def test_eight_clips_are_enough_and_silent_ones_say_nothing():
    clips = tones(30)
    clips[0] = (np.zeros(RATE, np.float32), RATE)
    chosen = choose_clips(clips)
    places = [next(n for n, clip in enumerate(clips) if clip is one) for one in chosen]
    assert len(places) == 8
    assert places == sorted(set(places))
    assert places[0] == 1
    assert places[-1] > 24
    assert len(choose_clips(clips[:5])) == 4


def test_noise_has_the_level_it_says():
    wave = tones(1)[0][0]
    for level in (20.0, 5.0):
        noise = with_noise(wave, level, 0) - wave
        assert 10 * np.log10(np.mean(wave**2) / np.mean(noise**2)) == pytest.approx(level, abs=0.3)
        assert np.array_equal(with_noise(wave, level, 0) - wave, noise)
        assert not np.array_equal(with_noise(wave, level, 1) - wave, noise)


class Bands:
    """An embedder: the levels of sixteen bands, or always the same."""

    dim = 16

    def __init__(self, constant: bool = False):
        self.constant = constant

    def embed(self, wave: np.ndarray, rate: int) -> np.ndarray:
        if self.constant:
            return np.ones(self.dim)
        return np.log1p([band.sum() for band in np.array_split(np.abs(np.fft.rfft(wave)), self.dim)])


def test_embedders_that_hear_noise_pass_and_a_constant_one_fails():
    clips = tones(6)
    assert self_test(distinctness(Bands(), clips), clips).passed
    assert self_test(voice(Bands()), clips).passed
    constant = self_test(distinctness(Bands(constant=True), clips), clips)
    assert np.isnan(constant.clean)
    assert not constant.passed
    assert not self_test(voice(Bands(constant=True)), clips).passed


def test_recognisers_are_judged_by_their_sureness():
    class Ear:
        def __init__(self, constant: bool):
            self.constant = constant

        def transcribe(self, wave: np.ndarray, rate: int) -> Heard:
            return Heard("beep", -0.3 if self.constant else PauseScorer(32767).score(wave, rate)["mos"] - 5)

    assert self_test(sureness(Ear(constant=False)), tones(3)).passed
    assert not self_test(sureness(Ear(constant=True)), tones(3)).passed


def test_slack_is_for_little_noise_alone():
    """Scores of one clip without noise, with little, and with much."""
    for scores, passed in (
        ((1.0, 1.09, 0.8), True),
        ((1.0, 1.11, 0.8), False),
        ((1.0, 0.8, 0.89), False),  # much noise above little
        ((1.0, 1.05, 0.95), False),  # too small a drop
    ):
        given = iter(scores)
        gauge = Gauge(lambda wave, clean, given=given: next(given), least=0.1, slack=0.1)
        assert self_test(gauge, tones(1)).passed == passed


def recordings(package: str, suffix: str, count: int) -> list[tuple[np.ndarray, int]]:
    """Real recordings of the demo corpus, 1.5 to 2.2 s of each, spread over the package."""
    files = sorted(fetch_apt(package).rglob(f"*{suffix}"))
    clips = [decode(file, file.name, 0.0, 2.2) for file in files[:: len(files) // (4 * count)]]
    return [(wave, rate) for wave, rate in clips if len(wave) > 1.5 * rate][:count]


SPEECH, SOUNDS = ("asterisk-core-sounds-en-g722", ".g722"), ("sonic-pi-samples", ".flac")


def test_packaged_models_tell_real_clips_from_noisy_ones():
    """Whisper is among the drills."""
    speech, sounds = recordings(*SPEECH, 3), recordings(*SOUNDS, 3)
    aisfx = load_embedding("package:aisfx")
    for clips in (speech, sounds):
        assert len(clips) == 3
        assert self_test(distinctness(aisfx, clips), clips).passed
    assert self_test(voice(load_speaker("package:resemblyzer")), speech).passed
    assert self_test(opinion(load_mos("package:distillmos"), "mos"), speech).passed


@pytest.mark.drill
def test_packaged_models_on_eight_clips():
    """The order also holds for nearly every clip alone, and the drops are those in the docstrings of the gauges."""
    speech, sounds = recordings(*SPEECH, 8), recordings(*SOUNDS, 8)
    aisfx, mos = load_embedding("package:aisfx"), load_mos("package:distillmos")
    recogniser = load_recogniser("package:whisper-base", "en")
    for gauge, clips, drop in (
        (distinctness(aisfx, speech), speech, 2.0),
        (distinctness(aisfx, sounds), sounds, 0.8),
        (voice(load_speaker("package:resemblyzer")), speech, 0.3),
        (opinion(mos, "mos"), speech, 0.8),
        (sureness(recogniser), speech, 0.1),
    ):
        test = self_test(gauge, clips)
        assert test.passed, test
        assert test.clean - test.noise_5_db > drop, test
        alone = [self_test(gauge, [clip]) for clip in clips]
        assert sum(one.clean > one.noise_5_db for one in alone) >= 7
