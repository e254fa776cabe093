"""The settings of probes: section `probe`."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field

from .settings import Count, Fraction, Share, ShareAboveZero, check, section, setting

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # flow times of probes and of validation
UNDECIDED = ("warn", "refuse")


@section("probe.")
class ProbeConfig:
    """How layers are measured, during warm-up and by `agrepa probe`."""

    start_step: Count = setting(200, "no ranking before: near the zero initialisation every layer looks the same")
    every: Count = setting(200, "steps between probes")
    warmup_steps: Count = setting(5000, "the layers are chosen here")
    clips: Count = setting(16, "clips per domain")
    times: Annotated[list[Fraction], Field(min_length=1)] = setting(list(TIMES), "flow times")
    draws: Count = setting(1, "noise draws per clip and time")
    chunk: Count = setting(8, "clips per forward; bounds the memory, not the result", resume=True)
    graph: bool = setting(True, "CUDA graphs on GPUs, except under ZeRO-3", resume=True)
    storage_clips: Annotated[int, Field(ge=8)] = setting(
        64, "clips per domain for what layers store (LASP, ridge, CKA); fewer if there are fewer"
    )
    pool: Count = setting(
        1, "the layers are ranked on this many recent probes together, which count less the older they are"
    )
    confidence: ShareAboveZero = setting(
        1.0, "choose before warmup_steps once the Top-K is this probable in every domain; 1: never"
    )

    confidence_floor: Share = setting(
        0.5, "a hard choice is undecided below this probability of the Top-K: other clips would as soon choose others"
    )
    undecided: Literal[UNDECIDED] = setting(
        "warn", "then: warn, and align; or refuse, and go on warming up until it is decided"
    )

    def __post_init__(self) -> None:
        check(
            self.start_step <= self.warmup_steps,
            f"probe.start_step={self.start_step}: must be from 1 to probe.warmup_steps={self.warmup_steps}",
        )
        check(
            all(float(f"{a:g}") < float(f"{b:g}") for a, b in pairwise(self.times)),
            f"probe.times={self.times}: must rise, and differ in their first six digits",
        )
