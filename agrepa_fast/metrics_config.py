"""The settings of metrics.*: the measures of `agrepa evaluate`, and the models that they use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .settings import Count, Fraction, section, setting

METRICS = ("wer", "mos", "mmd", "fad", "similarity", "mel")


@section("metrics.")
class MetricsConfig:
    """The measures of `agrepa evaluate`. No run depends on them."""

    only: Annotated[list[Literal[METRICS]], Field(min_length=1)] = setting(list(METRICS), "metrics", resume=True)
    clips: Count | None = setting(None, "validation clips per domain; null: all", resume=True)
    draws: Count = setting(1, "samples per clip", resume=True)
    asr: str = setting(
        "package:whisper-base", "recogniser: or a Whisper or CTC model, by folder or hub name", resume=True
    )
    language: str = setting("en", "of the transcripts", resume=True)
    text: Literal["whisper", "seedtts", "f5"] = setting(
        "whisper", "how texts are made comparable: Whisper's normaliser, seed-tts-eval's, or F5-TTS's", resume=True
    )
    mos: str = setting(
        "package:distillmos", "predictor of listeners' scores: or package:dnsmos, or utmos:FILE", resume=True
    )
    speech_embedding: str = setting(
        "package:aisfx", "of MMD and FAD: or a spec of data.speech_teacher, or vggish:FILE", resume=True
    )
    audio_embedding: str = setting("package:aisfx", "likewise, for audio", resume=True)
    speaker: str = setting("package:resemblyzer", "of speaker similarity: or an x-vector model", resume=True)
    reference_clips: Annotated[int, Field(ge=2)] = setting(
        512, "training clips per domain that MMD and FAD compare with; fewer if there are fewer", resume=True
    )
    confidence: Fraction = setting(0.95, "of intervals", resume=True)
