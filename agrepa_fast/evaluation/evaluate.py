"""The figures that metric models give the wavs of an evaluation: for the rows of clips.csv, and embeddings of sets.

Every rank judges its part of the wavs, and all ranks get the figures of all.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..audio.vocoder import Vocoder
from ..audio.waves import decode, wave_fault
from ..data.samples import Sample
from ..errors import UserError
from ..fetch import cache_dir
from ..files import file_sha256, write_atomically
from ..metrics_config import MetricsConfig
from ..ranks import Ranks
from .embeddings import Embedder, load_embedding
from .manifest import mel_digest
from .mos import Scorer, load_mos
from .recogniser import Heard, load_recogniser
from .scores import FAILED, Figures, Judge, ScoreCache
from .selftest import Clip as Sound
from .selftest import Gauge, SelfTest, distinctness, opinion, self_test, sureness, voice
from .speaker import load_speaker, similarity
from .synthesis import Wav
from .words import character_errors, load_normaliser, word_errors

_SHORTEST = 0.1  # seconds of a clip of a self-test; networks fail on less
UNDERSTOOD = -1.0  # mean log-probability of heard tokens; a recogniser that invents text is below


class Judges:
    """Lets metric models judge wavs. Figures are kept in the user's cache, by content: what several evaluations share,
    such as the truths, is judged once.

    prompts: true recordings that models are tested on if there are no truths. models: by their use; left_out: those
    that failed their self-test; failed: wav and model -> reason.
    """

    def __init__(self, metrics: MetricsConfig, ranks: Ranks, prompts: Sequence[Wav] = ()):
        self.metrics, self.ranks, self.prompts = metrics, ranks, prompts
        self.models: dict[str, Any] = {}
        self.left_out: dict[str, SelfTest] = {}
        self.failed: dict[str, str] = {}
        self._sha256 = cache(file_sha256)

    def judge(
        self,
        kind: str,
        wavs: Sequence[Wav],
        load: Callable[[str], Any],
        judge_of: Callable[[Any], Judge],
        gauge_of: Callable[[Any, Sequence[Sound]], Gauge],
    ) -> Figures:
        """Return the figures of each wav by the model that `load` returns for a device; {} if the model fails its
        self-test on the truths. A wav without a file has failed. Every rank must call it."""
        there = [wav for wav in wavs if wav.path.is_file()]
        model = self.models[kind] = self.ranks.load_on_every_rank(f"metrics: {kind}", load)
        test = self.ranks.from_rank_0(lambda: self._test(kind, model, gauge_of, _truths([*there, *self.prompts])))
        if not test.passed:
            self.left_out[kind] = test
            return {}
        identity = {**model.identity, "language": self.metrics.language}
        scores, judge = ScoreCache(cache_dir() / "scores", kind, identity), judge_of(model)
        found = self._each(kind, there, lambda wav: scores.judge(self._sha256(wav.path), partial(_read, wav), judge))
        figures = dict(zip(there, found, strict=True))
        self.failed |= {f"{w.row}/{w.path.name}: {kind}": f[FAILED] for w, f in figures.items() if FAILED in f}
        return {wav: figures.get(wav, {FAILED: "missing"}) for wav in wavs}

    def _test(self, kind: str, model: Any, gauge_of: Callable, truths: Sequence[Wav]) -> SelfTest:
        """Return the self-test of a model on the truths. It is kept in the user's cache: for a recogniser it takes as
        long as a tenth of an evaluation."""
        sounds = _usable(truths)
        gauge = gauge_of(model, sounds)
        asked = {**model.identity, "language": self.metrics.language, "bounds": gauge[1:]}
        asked["clips"] = [self._sha256(wav.path) for wav in truths]
        kept = ScoreCache(cache_dir() / "self-tests", kind, asked)
        if (before := kept.read("test")) is not None:
            return SelfTest(**before)
        test = self_test(gauge, sounds)
        write_atomically(kept.file("test"), json.dumps(test._asdict()), durable=False)
        return test

    def words(self, wavs: Sequence[Wav]) -> tuple[Figures, Callable[[str], str]]:
        """Return the text that is heard in each wav, and the function that makes texts comparable."""
        spelling: dict[str, str] = {}

        def load(device: str):
            recogniser = load_recogniser(self.metrics.asr, self.metrics.language, device)
            spelling.update(recogniser.spelling)
            return recogniser

        def judge_of(recogniser) -> Judge:
            def judge(wave: np.ndarray, rate: int) -> dict:
                heard: Heard = recogniser.transcribe(wave, rate)
                return {"heard": heard.text, "logprob": heard.logprob}

            return judge

        figures = self.judge("asr", wavs, load, judge_of, lambda recogniser, _: sureness(recogniser))
        return figures, load_normaliser(self.metrics.text, self.metrics.language, spelling)

    def mos(self, wavs: Sequence[Wav]) -> Figures:
        def load(device: str) -> Scorer:
            return load_mos(self.metrics.mos, device)

        def gauge(scorer: Scorer, _: Sequence[Sound]) -> Gauge:
            return opinion(scorer, scorer.names[-1])

        return self.judge("mos", wavs, load, lambda scorer: scorer.score, gauge)

    def speakers(self, wavs: Sequence[Wav]) -> Figures:
        def load(device: str) -> Embedder:
            return load_speaker(self.metrics.speaker, device)

        return self.judge("speaker", wavs, load, _embed, lambda embedder, _: voice(embedder))

    def embeddings(self, domain: str, wavs: Sequence[Wav]) -> Figures:
        spec = getattr(self.metrics, f"{domain}_embedding")
        return self.judge(
            f"{domain}-embedding", wavs, lambda device: load_embedding(spec, device), _embed, distinctness
        )

    def reference(self, domain: str, samples: Sequence[Sample], vocoder: Vocoder) -> np.ndarray:
        """Return the embeddings (clips, dim) of training clips through the vocoder, by the model of `embeddings`. They
        are kept in the user's cache, since all evaluations of the same shards need them. Clips that the model cannot
        judge are added to `failed`."""
        kind = f"{domain}-embedding"
        made = {**self.models[kind].identity, "vocoder": vocoder.name, "rate": vocoder.sample_rate}
        scores, judge = ScoreCache(cache_dir() / "references", kind, made), _embed(self.models[kind])
        found = self._each(
            f"{domain} reference",
            samples,
            lambda sample: scores.judge(mel_digest(sample.mel), partial(_vocoded, sample, vocoder), judge),
        )
        pairs = list(zip(samples, found, strict=True))
        self.failed |= {f"reference/{s.key}: {kind}": figures[FAILED] for s, figures in pairs if FAILED in figures}
        return np.array([figures["vector"] for figures in found if "vector" in figures])

    def _each(self, label: str, items: Sequence, judge: Callable[[Any], dict]) -> list[dict]:
        """Return judge(item) of all items, of which every rank judges its part."""
        own = []
        with tqdm(total=len(items), desc=f"evaluate: {label}", unit="clip", disable=self.ranks.rank > 0) as bar:
            for item in self.ranks.part_of(items):
                own.append(judge(item))
                bar.update(self.ranks.world)
                self.ranks.check_others()
        return self.ranks.join_parts(self.ranks.all_gather(own))


def _embed(model) -> Judge:
    return lambda wave, rate: {"vector": model.embed(wave, rate).tolist()}


def _read(wav: Wav) -> tuple[np.ndarray, int]:
    return decode(wav.path, wav.path.name)


def _usable(wavs: Sequence[Wav]) -> list[Sound]:
    """Return the sounds of the wavs that a model can judge; the others are named when they are judged."""
    sounds = []
    for wav in wavs:
        with suppress(UserError):
            wave, rate = _read(wav)
            if len(wave) >= _SHORTEST * rate > 0 and not wave_fault(wave):
                sounds.append((wave, rate))
    return sounds


def _vocoded(sample: Sample, vocoder: Vocoder) -> tuple[np.ndarray, int]:
    return vocoder(torch.from_numpy(sample.mel).float()).numpy(), vocoder.sample_rate


def _truths(wavs: Sequence[Wav]) -> list[Wav]:
    """Return the truths, or prompts if there are no truths, or the wavs of another row."""
    rows = {wav.row for wav in wavs}
    row = next((row for row in ("truth", "prompt") if row in rows), sorted(rows)[0])
    return [wav for wav in wavs if wav.row == row]


def word_figures(heard: Figures, normalise: Callable[[str], str]) -> Figures:
    """Return the counts of each wav's words against its text, and against those heard in its truth. A wav that could
    not be judged counts as one in which nothing is heard."""
    texts = {wav: normalise(str(heard[wav].get("heard", ""))) for wav in heard}
    truths = {wav.clip.key: texts[wav] for wav in heard if wav.row == "truth"}
    figures: Figures = {}
    for wav in heard:
        said, logprob = texts[wav], heard[wav].get("logprob")
        found = {"text": wav.clip.text, "heard": heard[wav].get("heard"), "logprob": logprob}
        found["understood"] = None if logprob is None else logprob >= UNDERSTOOD
        if reference := normalise(wav.clip.text):
            errors, letters = word_errors(reference, said), character_errors(reference, said)
            found |= {"words": errors.units, "errors": errors.total, "sub": errors.substituted}
            found |= {"del": errors.deleted, "ins": errors.inserted}
            found |= {"chars": letters.units, "char_errors": letters.total}
        if wav.row != "truth" and truths.get(wav.clip.key):
            errors = word_errors(truths[wav.clip.key], said)
            found |= {"heard_words": errors.units, "heard_errors": errors.total}
        figures[wav] = found
    return figures


def similarities(vectors: Figures) -> Figures:
    """Return the cosine of each wav's speaker vector with those of its truth and of its prompt, if it has them: of a
    truth with its prompt alone, and nothing of prompts."""
    of_row: dict[str, dict[str, np.ndarray]] = {"truth": {}, "prompt": {}}
    for wav, figure in vectors.items():
        if wav.row in of_row and "vector" in figure:
            of_row[wav.row][wav.clip.key] = np.array(figure["vector"])
    figures: Figures = {}
    for wav, figure in vectors.items():
        for row, metric in (("truth", "similarity"), ("prompt", "similarity_prompt")):
            if wav.row not in (row, "prompt") and "vector" in figure and wav.clip.key in of_row[row]:
                cosine = similarity(np.array(figure["vector"]), of_row[row][wav.clip.key])
                figures.setdefault(wav, {})[metric] = cosine
    return figures
