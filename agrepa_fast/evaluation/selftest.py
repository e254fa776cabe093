"""A test of metric models on the clips at hand, before their numbers are believed: each must rate clean clips above
those with noise 20 dB below, and these above those with noise 5 dB below.

A model whose input has the wrong scale or rate, or that was trained on something else, gives about the same number to
all of them. An opinion score that did not tell speech from noise was published so (vllm-omni issue 6910).

    test = self_test(opinion(scorer, "mos"), truths)
    if not test.passed: print(f"mos left out: {test}")
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..audio.waves import MAX_PEAK
from .embeddings import Embedder
from .mos import Scorer
from .recogniser import Recogniser
from .speaker import similarity

CLIPS = 8  # per domain; more would tell no more
NOISES = (20.0, 5.0)  # dB that a clip is above its noise
Clip = tuple[np.ndarray, int]  # wave (samples,) float32, rate in Hz


class Gauge(NamedTuple):
    """A metric of a wave, given the same clip without noise: the higher, the cleaner.

    least  the smallest drop from clean clips to those with the louder noise that is no accident, in the metric's unit
    slack  the most that clips with little noise may be above clean ones, of a metric that hardly hears it
    """

    score: Callable[[np.ndarray, Clip], float]
    least: float
    slack: float = 0.0


class SelfTest(NamedTuple):
    """The means over the clips without noise and with it, and whether the metric can be believed."""

    clean: float
    noise_20_db: float
    noise_5_db: float
    passed: bool

    def __str__(self) -> str:
        return f"clean {self.clean:.3g}, noise at 20 dB {self.noise_20_db:.3g}, at 5 dB {self.noise_5_db:.3g}"


def self_test(gauge: Gauge, clips: Sequence[Clip]) -> SelfTest:
    """Return the test of a metric on up to CLIPS of the clips, which are spread over all; silent ones are left out.
    Without a clip that has sound it fails, and the means are nan."""
    rows = [
        [gauge.score(heard, (wave, rate)) for heard in (wave, *(with_noise(wave, level, seed) for level in NOISES))]
        for seed, (wave, rate) in enumerate(choose_clips(clips))
    ]
    clean, quiet, loud = np.mean(rows, axis=0).tolist() if rows else [np.nan] * 3
    ordered = clean + gauge.slack > quiet > loud
    return SelfTest(clean, quiet, loud, ordered and clean - loud >= gauge.least)


def choose_clips(clips: Sequence[Clip]) -> list[Clip]:
    """Return up to CLIPS clips that are not silent, spread over all of them."""
    sounding = [clip for clip in clips if np.any(clip[0])]
    count = min(CLIPS, len(sounding))
    return [sounding[number * len(sounding) // count] for number in range(count)]


def with_noise(wave: np.ndarray, decibels: float, seed: int) -> np.ndarray:
    """Return a wave with white noise that many decibels below its own power, softer if its peak would be more than any
    model judges."""
    noise = np.random.default_rng(seed).standard_normal(len(wave))
    level = np.sqrt(np.mean(np.square(wave, dtype=np.float64))) * 10 ** (-decibels / 20)
    noisy = wave + level * noise
    return (noisy * min(1.0, 0.999 * MAX_PEAK / np.abs(noisy).max())).astype(np.float32)


def sureness(recogniser: Recogniser) -> Gauge:
    """Return the gauge of a recogniser: the mean log-probability of the words. Measured with the packaged Whisper:
    -0.27, -0.32, -0.63. Noise at 20 dB hardly disturbs it: without slack, 14 % of eights of clips would fail."""
    return Gauge(lambda wave, clean: recogniser.transcribe(wave, clean[1]).logprob, least=0.1, slack=0.1)


def opinion(scorer: Scorer, name: str) -> Gauge:
    """Return the gauge of a scorer's score `name`, 1 to 5. Measured with DistillMOS: 3.37, 2.88, 2.13."""
    return Gauge(lambda wave, clean: scorer.score(wave, clean[1])[name], least=0.2)


def voice(embedder: Embedder) -> Gauge:
    """Return the gauge of a speaker embedder: the similarity to the clean clip. Measured with Resemblyzer: 1, 0.78,
    0.50."""
    return Gauge(lambda wave, clean: similarity(embedder.embed(wave, clean[1]), embedder.embed(*clean)), least=0.05)


def distinctness(embedder: Embedder, clips: Sequence[Clip]) -> Gauge:
    """Return the gauge of an embedder: minus the distance to the clean clip, in units of the clips' own spread.
    It is nan, and the test fails, for an embedder that gives all of them one vector. Measured with aisfx: 0, -2.1, -3.0
    for speech and 0, -1.0, -1.4 for sounds."""
    vectors = np.array([embedder.embed(*clip) for clip in choose_clips(clips)] or [np.zeros(embedder.dim)])
    spread = np.sqrt(np.mean(np.square(vectors - vectors.mean(axis=0)).sum(axis=1)))

    def score(wave: np.ndarray, clean: Clip) -> float:
        distance = np.linalg.norm(embedder.embed(wave, clean[1]) - embedder.embed(*clean))
        return float(-distance / spread) if spread else np.nan

    return Gauge(score, least=0.2)
