"""Every setting of a run: sections of typed settings, presets, `section.field=value` overrides.

A configuration is read from a preset (agrepa_fast/presets/<name>.yaml) or a file, overridden from the command line,
checked, and saved resolved in the run's folder. `agrepa config` prints it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .errors import UserError, nearest
from .settings import (
    Count,
    Fraction,
    NotNegative,
    Period,
    Positive,
    Processes,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    Whole,
    section,
    setting,
    setting_names,
)

PRESETS = Path(__file__).with_name("presets")
DOMAINS = ("speech", "audio")
CONTRIBUTION = ("foga", "foga-vjp", "gradnorm")  # measures of what a layer contributes to the velocity
STORAGE = ("ridge", "cka", "lasp")  # measures of what a layer stores of the teacher
MEASURES = (*CONTRIBUTION, *STORAGE)
MEASURED = (*CONTRIBUTION, "lasp")  # strategies that rank layers by a measure
STRATEGIES = (*MEASURED, "fixed", "shallow", "deep", "random", "none")
WEIGHTINGS = ("normalized", "equal", "raw2x")
RECIPES = ("corrected", "official")
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # flow times of probes and of validation
GELUS = ("erf", "tanh")
INITS = ("adaln_zero", "release")
_LAYERS = re.compile(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@section("run.")
class RunConfig:
    """Where a run is written, and what makes it reproducible."""

    dir: str | None = setting(None, "folder; null: runs/<preset>-<date-time>-<part of run.id>", resume=True, path=True)
    id: str | None = setting(None, "made when a run begins; a resume takes only checkpoints that carry it")
    seed: Seed = setting(0, "of weights, order of clips, noise, times and condition drops")
    preset: str | None = setting(None, "name of the preset or file that this configuration came from")


@section("model.")
class ModelConfig:
    """AudioDiT. `n_mels` and `vocab` are those of the shards unless given."""

    dim: Count = setting(1024, "width of the residual stream")
    depth: Count = setting(24, "number of blocks, named L1 … L<depth>")
    heads: Count = setting(16, "attention heads")
    ffn_mult: Positive = setting(4.0, "width of the FFN over dim")
    dropout: ShareBelowOne = setting(0.0, "of attention's and the FFN's outputs")
    qk_norm: bool = setting(False, "RMS norm of queries and keys, per head")
    gelu: Literal[GELUS] = setting("erf", "exact, or its tanh approximation")
    init: Literal[INITS] = setting("adaln_zero", "release: output layers at zero, modulations from N(0, 0.02)")
    position: Literal["sinusoidal", "rotary_conv"] = setting(
        "sinusoidal", "absolute (the paper's), or rotary with a depthwise convolution"
    )
    time_scale: float = setting(1.0, "t is multiplied by it before its sinusoidal embedding; the release uses 1")
    token_dim: Count = setting(1024, "width of the token condition")
    token_scale: float = setting(1.0, "norm of each frame of the token condition; the release uses 1")
    n_mels: Count | None = setting(None, "mel bands; null: those of the shards")
    vocab: Count | None = setting(None, "token ids of all domains together; null: those of the shards")
    extra_vocab: Count | None = setting(None, "ids of topology B's second token, data.extra_codebook; null: topology A")

    def __post_init__(self) -> None:
        _check(self.dim * self.ffn_mult >= 1, f"model.ffn_mult={self.ffn_mult}: must be positive")
        _check(
            self.dim % self.heads == 0,
            f"model.heads={self.heads} does not divide model.dim={self.dim}: choose a divisor",
        )
        _check(
            (self.dim // self.heads) % 2 == 0, f"model.dim/model.heads={self.dim // self.heads}: rotary needs it even"
        )


@section("data.")
class MelConfig:
    """The mels of the shards. `agrepa prepare` computes them once."""

    max_seconds: Period = setting(10.0, "recordings are cut once, in prepare, never later")
    min_seconds: Positive = setting(0.5, "shorter recordings are skipped")
    sample_rate: Count = setting(24000, "Hz")
    n_fft: Count = setting(1024, "samples of a window and of its Fourier transform")
    hop_length: Count = setting(256, "samples between mel frames")
    n_mels: Count = setting(100, "mel bands, from 0 Hz on")
    f_max: float = setting(12000.0, "Hz, end of the last mel band")
    mel_scale: Literal["htk", "slaney"] = setting("htk", "scale of the mel bands")
    mel_norm: Literal["slaney"] | None = setting(None, "slaney: area-normalised filters")
    center: bool = setting(True, "torchaudio's centred frames; false: HiFi-GAN's, padded by (n_fft - hop_length) / 2")

    def __post_init__(self) -> None:
        _check(self.min_seconds < self.max_seconds, "data.min_seconds must be above 0 and below data.max_seconds")
        _check(
            0 < self.f_max <= self.sample_rate / 2,
            f"data.f_max={self.f_max}: must be above 0 and at most half of the sample rate {self.sample_rate}",
        )


@section("data.")
class ShardConfig(MelConfig):
    """Everything that the shards of a folder share: mels, token ids, split and sizes. index.json records it."""

    codebook: Count = setting(256, "token ids per domain")
    extra_tokens: str | None = setting(None, "topology B: a second token beside every one, of both domains: vq: or s3:")
    extra_codebook: Count = setting(1024, "ids of the second token, both domains together")
    val_share: Fraction = setting(0.1, "clips whose hashed name falls below this are validation")
    shard_clips: Count = setting(64, "clips per shard")
    bucket_seconds: list[float] = setting([], "length buckets of train shards: their ends, but the last")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_tokenizer("data.extra_tokens", self.extra_tokens, without="null")
        _check(
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
    speech_tokens: str = setting("kmeans", "over the teacher's frames, or vq:FILE of `agrepa tokens fit`, or s3:NAME")
    audio_tokens: str = setting("kmeans", "likewise, for audio")

    def __post_init__(self) -> None:
        _check_tokenizer("data.speech_tokens", self.speech_tokens, without="kmeans")
        _check_tokenizer("data.audio_tokens", self.audio_tokens, without="kmeans")


@section("data.")
class LoadingConfig:
    """Where shards are read from, and how."""

    path: str = setting(
        "data/demo", "folder of shards, or its URL: http(s)://, s3://, what fsspec reads", resume=True, path=True
    )
    speech_share: Share = setting(0.5, "share of speech among the clips, if both domains are there")
    workers: Processes = setting(0, "loader processes per rank; 0 reads in the training process", resume=True)
    max_faults: Share = setting(
        0.001, "share of the training clips that may be unreadable before the run stops", resume=True
    )
    read_timeout: Period = setting(
        60.0, "seconds that one attempt to read a URL may take, and 1 s more per MB", resume=True
    )
    read_attempts: Count = setting(6, "attempts to read a URL, with exponential back-off", resume=True)


@section("data.")
class DataConfig(LoadingConfig, TargetConfig, ShardConfig):
    """Shards, the features and targets that `agrepa prepare` writes into them, and how they are read."""

    def __post_init__(self) -> None:
        ShardConfig.__post_init__(self)
        TargetConfig.__post_init__(self)


def _check_tokenizer(name: str, value: str | None, without: str) -> None:
    kind, _, source = (value or "null").partition(":")
    known = source if kind in ("vq", "s3") else (value or "null") == without
    _check(bool(known), f"{name}={value!r}: {without}, vq:FILE or s3:NAME")


def values_of(part: type, data: DataConfig) -> dict[str, object]:
    """The values of the settings that `part`, a base of DataConfig, declares: ShardConfig's are what index.json calls
    features."""
    return {name: getattr(data, name) for name in setting_names(part)}


@section("flow.")
class FlowConfig:
    """The path x_t = (1 - t) sigma eps + t x, the condition drops, and the sampler."""

    sigma: Positive = setting(0.5, "scale of the noise")
    max_reference: ShareBelowOne = setting(0.3, "the reference mel is a prefix of at most this share of the clip")
    drop_tokens: ShareBelowOne = setting(0.1, "share of clips that train without tokens")
    drop_reference: ShareBelowOne = setting(0.1, "share of clips that train without the reference")
    steps: Count = setting(31, "Euler steps; the release's linspace(0, 1, 32) has 31")
    guidance: float = setting(3.0, "scale of classifier-free guidance")
    sway: float = setting(-1.0, "sway sampling of F5-TTS; 0: uniform steps")


@section("align.")
class AlignConfig:
    """Layers that are aligned to the teacher, and how strongly."""

    strategy: str = setting("foga", "foga, foga-vjp, gradnorm, lasp, fixed:4,8,12, shallow, deep, random or none")
    k: Count = setting(3, "layers per domain")
    share: ShareAboveZero | None = setting(
        None, "instead of k: the fewest layers that are 90 % sure to carry this share of all scores"
    )
    weighting: Literal[WEIGHTINGS] = setting(
        "normalized", "lambda: share of the scores, equal, or 2 x score as in the release"
    )
    per_time: bool = setting(False, "layers and weights for every probe time, interpolated to each clip's t")
    weight: NotNegative = setting(1.0, "multiplies the whole alignment term")
    refresh: Whole = setting(0, "measure and choose again every so many steps; 0: the first choice stays")
    stop: Whole | None = setting(None, "no alignment from this step on (HASTE); BiT-C goes on")
    bitc_speech: NotNegative = setting(0.5, "BiT-C: weight of the token condition's alignment to the speech teacher")
    bitc_audio: NotNegative = setting(1.0, "likewise, to the audio teacher")
    lr: Positive = setting(1e-3, "of heads and BiT-C's projections, on the schedule of train.lr")
    center: bool = setting(True, "subtract each domain's mean teacher vector")

    def __post_init__(self) -> None:
        name, _, layers = self.strategy.partition(":")
        _check(name in STRATEGIES, f"align.strategy={self.strategy!r} is unknown: {nearest(name, STRATEGIES)}")
        _check(
            (name == "fixed") == bool(layers) and (not layers or _LAYERS.fullmatch(layers)),
            f"align.strategy={self.strategy!r}: layers are written fixed:4,8,12, and only for fixed",
        )
        measured = name in MEASURED
        _check(not self.refresh or measured, f"align.refresh: {self.strategy} measures nothing that could change")
        _check(
            not self.per_time or name in ("foga", "foga-vjp", "lasp"),
            f"align.per_time: {self.strategy} has no score for each time; foga, foga-vjp and lasp have",
        )
        _check(self.share is None or measured, f"align.share: {self.strategy} has no scores: give align.k")

    @property
    def measured(self) -> bool:
        """Whether the strategy ranks layers by a measure."""
        return self.strategy in MEASURED

    @property
    def fixed_layers(self) -> tuple[int, ...]:
        """The 1-based layers of `fixed:…`, sorted and without repeats."""
        return tuple(sorted({int(part) for part in self.strategy.partition(":")[2].split(",") if part}))


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
    pool: Count = setting(1, "the layers are ranked on this many recent probes together")
    confidence: ShareAboveZero = setting(
        1.0, "choose before warmup_steps once the Top-K is this probable in every domain; 1: never"
    )

    def __post_init__(self) -> None:
        _check(
            self.start_step <= self.warmup_steps,
            f"probe.start_step={self.start_step}: must be from 1 to probe.warmup_steps={self.warmup_steps}",
        )
        _check(
            all(float(f"{a:g}") < float(f"{b:g}") for a, b in pairwise(self.times)),
            f"probe.times={self.times}: must rise, and differ in their first six digits",
        )


@section("train.")
class TrainConfig:
    """Optimisation. Steps are optimizer steps, whatever the number of ranks and of accumulated micro-batches."""

    steps: Count = setting(500_000, "optimizer steps", resume=True)
    start_from: str | None = setting(None, "run or checkpoint whose weights it starts with; null: random", path=True)
    batch_clips: Count = setting(16, "clips per optimizer step, over all ranks and micro-batches")
    batch_frames: Positive | None = setting(
        None, "instead: the cost per optimizer step, the sum over clips of frames + c frames^2, c the cost of attention"
    )
    accumulation: Count = setting(1, "micro-batches per optimizer step", resume=True)
    lr: Positive = setting(1e-4, "peak learning rate of AdamW")
    betas: Annotated[list[ShareBelowOne], Field(min_length=2, max_length=2)] = setting([0.9, 0.999], "of AdamW")
    weight_decay: NotNegative = setting(0.01, "of AdamW, on every parameter")
    warmup_steps: Whole = setting(1000, "linear warm-up of the learning rate")
    final_lr: float = setting(0.1, "share of lr that the cosine decay ends at")
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = setting(1.0, "bound of the gradient's global norm")
    ema_decay: ShareBelowOne = setting(0.999, "of the averaged weights")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on GPUs, fp32 on CPUs")
    graphs: Whole | None = setting(
        None,
        "CUDA graphs of forward and backward, at most this many batch shapes (GPUs, ZeRO 0 to 2); 0: none; null: of "
        "all, if length buckets, batch_frames or clips of one length leave at most 8",
        resume=True,
    )
    activation_checkpointing: bool = setting(
        False, "keep each block's input only and compute it again in the backward", resume=True
    )
    compile: bool = setting(False, "torch.compile of the blocks in training; ZeRO stages 0 to 2", resume=True)
    max_skipped: Count = setting(
        5, "stop after so many steps in a row whose loss or gradient is not finite", resume=True
    )
    peak_tflops: Positive | None = setting(None, "of a device, for MFU; null: of a known GPU in bf16", resume=True)
    profile: list[int] | None = setting(
        None, "first and last step of a torch profiler trace in <run>/profile", resume=True
    )
    wandb: str | None = setting(None, "project to log to with Weights & Biases as well", resume=True)
    save_every: Count = setting(5000, "steps between checkpoints", resume=True)
    val_every: Count = setting(1000, "steps between validations", resume=True)
    keep: Count = setting(2, "newest checkpoints kept", resume=True)
    keep_best: Whole = setting(
        1, "checkpoints with the lowest validation flow loss kept beside them; `best` names the first", resume=True
    )
    copy_to: str | None = setting(None, "folder or fsspec URL that checkpoints are copied to", resume=True, path=True)
    log_every: Count = setting(10, "steps between log lines", resume=True)
    patience: Period = setting(30.0, "minutes that ranks wait for one that does not answer", resume=True)

    def __post_init__(self) -> None:
        window = self.profile
        _check(
            window is None or (len(window) == 2 and 1 <= window[0] <= window[1]),
            f"train.profile={window}: the first and the last step, from 1, such as [10,12]",
        )
        _check(
            not self.graphs or not (self.compile or self.activation_checkpointing),
            "train.graphs: neither with train.compile nor with train.activation_checkpointing",
        )


@section("eval.")
class EvalConfig:
    """Validation and samples."""

    clips: Count = setting(32, "validation clips per domain", resume=True)
    times: Annotated[list[Fraction], Field(min_length=1)] = setting(list(TIMES), "flow times", resume=True)
    vocoder: str = setting("auto", "auto, package:hifigan, a Vocos folder or hub name, or griffin-lim", resume=True)


@dataclass(frozen=True)
class Config:
    """One run. Sections are the first half of an override, settings the second."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        outside = [layer for layer in self.align.fixed_layers if not 1 <= layer <= self.model.depth]
        _check(not outside, f"align.strategy={self.align.strategy!r}: layers are numbered 1 to {self.model.depth}")
        ranks_layers = self.align.strategy not in ("none",) and not self.align.fixed_layers
        _check(
            not ranks_layers or self.align.share is not None or self.align.k <= self.model.depth,
            f"align.k={self.align.k} is more than the model's {self.model.depth} layers",
        )
        _check(
            self.align.strategy != "lasp" or self.model.dim == self.model.token_dim,
            f"align.strategy=lasp: BiT-C's projection fits layers only where model.dim={self.model.dim} is "
            f"model.token_dim={self.model.token_dim}",
        )
        _check(
            self.align.strategy != "lasp" or min(self.align.bitc_speech, self.align.bitc_audio) > 0,
            "align.strategy=lasp needs align.bitc_speech and align.bitc_audio above 0: it asks BiT-C's projections",
        )
        if self.align.measured:
            _check(
                self.probe.warmup_steps < self.train.steps,
                f"probe.warmup_steps={self.probe.warmup_steps} leaves no step to align before "
                f"train.steps={self.train.steps}: lower it, or choose another align.strategy",
            )
            _check(
                self.align.stop is None or self.align.stop > self.probe.warmup_steps + 1 or self.probe.confidence < 1,
                f"align.stop={self.align.stop} comes before the layers are chosen: raise it above "
                f"probe.warmup_steps={self.probe.warmup_steps}",
            )
