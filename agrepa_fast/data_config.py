"""The settings of data.*: mels, shards, targets, and how they are read."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from .settings import (
    Count,
    Fraction,
    Period,
    Positive,
    Processes,
    Share,
    Size,
    check,
    section,
    setting,
    setting_names,
)


@section("data.")
class MelConfig:
    """The mels of the shards. `agrepa prepare` computes them once."""

    max_seconds: Period = setting(10.0, "recordings are cut once, in prepare, never later")
    long: Literal["cut", "skip"] = setting("cut", "longer recordings: cut, or left out, because their text is longer")
    min_seconds: Positive = setting(0.5, "shorter recordings are skipped")
    sample_rate: Size = setting(24000, "Hz")
    n_fft: Size = setting(1024, "samples of a window and of its Fourier transform")
    hop_length: Size = setting(256, "samples between mel frames")
    n_mels: Size = setting(100, "mel bands, from 0 Hz on")
    f_max: float = setting(12000.0, "Hz, end of the last mel band")
    mel_scale: Literal["htk", "slaney"] = setting("htk", "scale of the mel bands")
    mel_norm: Literal["slaney"] | None = setting(None, "slaney: area-normalised filters")
    center: bool = setting(True, "torchaudio's centred frames; false: HiFi-GAN's, padded by (n_fft - hop_length) / 2")

    def __post_init__(self) -> None:
        check(self.min_seconds < self.max_seconds, "data.min_seconds must be above 0 and below data.max_seconds")
        check(
            0 < self.f_max <= self.sample_rate / 2,
            f"data.f_max={self.f_max}: must be above 0 and at most half of the sample rate {self.sample_rate}",
        )


@section("data.")
class ShardConfig(MelConfig):
    """Everything that the shards of a folder share: mels, token ids, split and sizes. index.json records it."""

    codebook: Size = setting(256, "token ids per domain")
    extra_tokens: str | None = setting(None, "topology B: a second token beside every one, of both domains: vq: or s3:")
    speaker: str | None = setting(None, "vectors of the speakers' voices: campplus:FILE.onnx; null: none")
    extra_codebook: Size = setting(1024, "ids of the second token, both domains together")
    val_share: Fraction = setting(0.1, "clips whose hashed name falls below this are validation")
    shard_clips: Size = setting(64, "clips per shard")
    bucket_seconds: list[float] = setting([], "length buckets of train shards: their ends, but the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tokenizer("data.extra_tokens", self.extra_tokens, without="null")
        kind, _, file = (self.speaker or "campplus:null").partition(":")
        check(kind == "campplus" and bool(file), f"data.speaker={self.speaker!r}: null or campplus:FILE.onnx")
        check(
            all(a < b for a, b in pairwise([0, *self.bucket_seconds, self.max_seconds])),
            f"data.bucket_seconds={self.bucket_seconds}: must rise from above 0 to below "
            f"data.max_seconds={self.max_seconds}",
        )


@section("data.")
class TargetConfig:
    """Teachers and tokenizers. Shards may hold the targets of several teachers."""

    speech_teacher: str = setting(
        "openai/whisper-large-v3", "package:NAME, beats:FILE, a folder or a hub name; @N takes layer N"
    )
    audio_teacher: str = setting("openai/whisper-large-v3", "likewise, for audio")
    teacher_precision: Literal["fp32", "fp16"] = setting("fp32", "of the teacher's weights and activations")
    teacher_rate: Positive | None = setting(None, "teacher frames stored per second; null: one mean vector per clip")
    teacher_attention: Size | None = setting(
        None, "of so many last layers of the teacher, queries and keys are stored with its frames; null: none"
    )
    speech_tokens: str = setting(
        "kmeans", "over the teacher's frames, or vq:FILE of `agrepa tokens fit`, s3:NAME, or phones"
    )
    audio_tokens: str = setting("kmeans", "likewise, for audio")

    def __post_init__(self) -> None:
        check(
            self.teacher_attention is None or self.teacher_rate is not None,
            f"data.teacher_attention={self.teacher_attention} needs the teacher's frames: set data.teacher_rate=12.5",
        )
        if self.speech_tokens != "phones":
            _check_tokenizer("data.speech_tokens", self.speech_tokens, without="kmeans, phones")
        _check_tokenizer("data.audio_tokens", self.audio_tokens, without="kmeans")


@section("data.")
class LoadingConfig:
    """Where shards are read from, and how."""

    path: str = setting(
        "data/demo", "folder of shards, or its URL: http(s)://, s3://, any of fsspec's", resume=True, path=True
    )
    text: str | None = setting(None, "ids of transcripts: bytes, chars:FILE, pinyin:FILE or package:f5; null: no text")
    speech_share: Share = setting(0.5, "share of speech among the clips, if both domains are there")
    normalize: bool = setting(
        True, "mels to mean 0 and deviation 1 over the train clips; false: natural logarithms as they are"
    )
    workers: Processes = setting(0, "loader processes per rank; 0 reads in the training process", resume=True)
    max_faults: Share = setting(
        0.001, "share of the training clips that may be unreadable before the run stops", resume=True
    )
    read_timeout: Period = setting(
        60.0, "seconds that one attempt to read a URL may take, and 1 s more per MB", resume=True
    )
    read_attempts: Count = setting(6, "attempts to read a URL, with exponential back-off", resume=True)

    def __post_init__(self) -> None:
        kind, _, source = (self.text or "").partition(":")
        known = source if kind in ("chars", "pinyin") else self.text in (None, "bytes", "package:f5")
        check(bool(known), f"data.text={self.text!r}: bytes, chars:FILE, pinyin:FILE or package:f5")


@section("data.")
class DataConfig(LoadingConfig, TargetConfig, ShardConfig):
    """Shards, the features and targets that `agrepa prepare` writes into them, and how they are read."""

    def __post_init__(self) -> None:
        ShardConfig.__post_init__(self)
        TargetConfig.__post_init__(self)
        LoadingConfig.__post_init__(self)
        check(
            self.long == "skip" or self.speech_tokens != "phones",
            "data.speech_tokens=phones: set data.long=skip, because transcripts do not fit recordings that are cut",
        )


def _check_tokenizer(name: str, value: str | None, without: str) -> None:
    kind, _, source = (value or "null").partition(":")
    known = source if kind in ("vq", "s3") else (value or "null") == without.partition(",")[0]
    check(bool(known), f"{name}={value!r}: {without}, vq:FILE or s3:NAME")


def values_of(part: type, data: DataConfig) -> dict[str, object]:
    """The values of the settings that `part`, a base of DataConfig, declares: ShardConfig's are what index.json calls
    features."""
    return {name: getattr(data, name) for name in setting_names(part)}
