"""Settings of `agrepa tokens fit`."""

from typing import Annotated

from pydantic import Field

from ..settings import Count, Positive, section, setting


@section("--")
class VqFitConfig:
    """`agrepa tokens fit`: a vector quantiser over a teacher's frames. Not a section of a run: data.*_tokens names the
    file that it writes."""

    teacher: str = setting("", "whose frames, as data.speech_teacher: NAME@LAYER")
    codes: Count = setting(4096, "ids")
    stride: Annotated[int, Field(ge=1, le=8)] = setting(1, "teacher frames per token")
    steps: Count = setting(20_000, "optimizer steps")
    batch: Count = setting(32, "windows of 96 frames per step")
    lr: Positive = setting(1e-4, "peak learning rate")
    seed: int = setting(0, "of weights and windows")
    max_frames: Count = setting(2**20, "teacher frames to fit on, 5.8 hours at 50 Hz; kept in memory, fp16")
    max_seconds: Positive = setting(10.0, "of a recording, from its start")
