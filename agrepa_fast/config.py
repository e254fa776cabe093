"""Every setting of a run: frozen dataclasses, presets, `section.field=value` overrides, one check each.

A configuration is read from a preset (agrepa_fast/presets/<name>.yaml) or a file, overridden from the command line,
typed by omegaconf against the dataclasses below, and saved resolved in the run's folder. Imports nothing of this
package.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from .errors import UserError, nearest

PRESETS = Path(__file__).with_name("presets")
DOMAINS = ("speech", "audio")
MEASURED = ("foga", "foga-vjp", "gradnorm", "lasp")  # strategies that rank layers by what a probe finds
STRATEGIES = (*MEASURED, "fixed", "shallow", "deep", "random", "none")
WEIGHTINGS = ("normalized", "equal", "raw2x")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True)
class RunConfig:
    """Where a run is written and what makes it reproducible."""

    dir: str | None = None  # folder of the run; None: runs/<preset>-<date-time>
    id: str | None = None  # made when a run begins; a resume takes only checkpoints that carry it
    seed: int = 0  # weights, order of clips, noise, times, condition drops
    preset: str | None = None  # name of the preset or file this configuration came from


@dataclass(frozen=True)
class ModelConfig:
    """AudioDiT. `n_mels` and `vocab` are those of the shards unless given."""

    dim: int = 1024  # width of the residual stream
    depth: int = 24  # number of blocks, named L1 ... L<depth>
    heads: int = 16
    ffn_mult: float = 4.0
    dropout: float = 0.0
    qk_norm: bool = False  # RMS norm of queries and keys, per head
    gelu: str = "erf"  # erf (exact) or tanh
    init: str = "adaln_zero"  # adaln_zero, or release: output layers at zero, modulations from N(0, 0.02)
    position: str = "sinusoidal"  # sinusoidal (absolute, the paper's) or rotary_conv (rotary + depthwise convolution)
    time_scale: float = 1.0  # t is multiplied by this before its sinusoidal embedding; the release uses 1
    token_dim: int = 1024  # width of the token condition
    token_scale: float = 1.0  # norm of each frame of the token condition; the release uses 1
    n_mels: int | None = None
    vocab: int | None = None  # number of token ids, all domains together
    extra_vocab: int | None = None  # ids of topology B's second token, data.extra_codebook; None: topology A, one token

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "token_dim"):
            _check(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)}: at least 1")
        _check(self.ffn_mult > 0 and self.dim * self.ffn_mult >= 1, f"model.ffn_mult={self.ffn_mult}: must be positive")
        _check(
            self.dim % self.heads == 0,
            f"model.heads={self.heads} does not divide model.dim={self.dim}: choose a divisor",
        )
        _check(
            (self.dim // self.heads) % 2 == 0, f"model.dim/model.heads={self.dim // self.heads}: rotary needs it even"
        )
        _check(self.gelu in ("erf", "tanh"), f"model.gelu={self.gelu!r}: erf or tanh")
        _check(self.init in ("adaln_zero", "release"), f"model.init={self.init!r}: adaln_zero or release")
        _check(
            self.position in ("sinusoidal", "rotary_conv"),
            f"model.position={self.position!r}: {nearest(self.position, ('sinusoidal', 'rotary_conv'))}",
        )
        _check(
            self.extra_vocab is None or self.extra_vocab >= 1,
            f"model.extra_vocab={self.extra_vocab}: at least 1, or null for topology A",
        )
        _check(0 <= self.dropout < 1, f"model.dropout={self.dropout}: must be in [0, 1)")


@dataclass(frozen=True)
class DataConfig:
    """Shards, and the features that `agrepa prepare` writes into them."""

    path: str = "data/demo"  # folder of shards with index.json, or its URL: http(s)://, s3://, what fsspec reads
    max_seconds: float = 10.0  # recordings are cut once, in prepare, never later
    min_seconds: float = 0.5  # shorter recordings are skipped
    sample_rate: int = 24000  # Hz
    n_fft: int = 1024
    win_length: int = 1024
    hop_length: int = 256  # samples between mel frames
    n_mels: int = 100
    f_min: float = 0.0  # Hz
    f_max: float = 12000.0  # Hz
    mel_scale: str = "htk"  # htk or slaney
    mel_norm: str | None = None  # None or slaney (area-normalised filters)
    center: bool = True  # torchaudio's centred frames; False: HiFi-GAN's, padded by (n_fft - hop) / 2
    speech_teacher: str = "openai/whisper-large-v3"  # package:NAME, beats:FILE, a folder or a hub name; @N for layer N
    audio_teacher: str = "openai/whisper-large-v3"
    teacher_precision: str = "fp32"  # fp32 or fp16, of the teacher's weights and activations
    teacher_rate: float | None = None  # teacher frames per second stored; None: their mean, one vector a clip
    codebook: int = 256  # token ids per domain
    speech_tokens: str = "kmeans"  # over the teacher's frames | vq:FILE of `agrepa tokens fit` | s3:NAME or s3:FILE
    audio_tokens: str = "kmeans"
    extra_tokens: str | None = None  # topology B: a second token beside every one, of both domains: vq: or s3:
    extra_codebook: int = 1024  # ids of the second token, both domains together
    val_share: float = 0.1  # clips whose hashed name falls below this are validation
    shard_clips: int = 64
    bucket_seconds: list[float] = field(
        default_factory=list
    )  # length buckets of train shards: their ends, but the last
    speech_share: float = 0.5  # mixing weight: share of speech among the clips, when both domains are there
    workers: int = 0  # loader processes; 0 reads in the training process
    max_faults: float = 0.001  # share of the training clips that may be unreadable before the run stops
    read_timeout: float = 60.0  # seconds that one attempt to read a URL may take, and 1 s more for each MB
    read_attempts: int = 6  # to read a URL, with exponential back-off

    def __post_init__(self) -> None:
        for name in ("sample_rate", "n_fft", "hop_length", "n_mels", "codebook", "extra_codebook", "shard_clips"):
            _check(getattr(self, name) >= 1, f"data.{name}={getattr(self, name)}: at least 1")
        _check(
            1 <= self.win_length <= self.n_fft,
            f"data.win_length={self.win_length}: must be from 1 to data.n_fft={self.n_fft}",
        )
        _check(0 < self.min_seconds < self.max_seconds, "data.min_seconds must be above 0 and below data.max_seconds")
        _check(
            all(a < b for a, b in pairwise([0, *self.bucket_seconds, self.max_seconds])),
            f"data.bucket_seconds={self.bucket_seconds}: must rise from above 0 to below "
            f"data.max_seconds={self.max_seconds}",
        )
        _check(
            self.teacher_precision in ("fp32", "fp16"),
            f"data.teacher_precision={self.teacher_precision!r}: fp32 or fp16",
        )
        _check(
            self.teacher_rate is None or self.teacher_rate > 0,
            f"data.teacher_rate={self.teacher_rate}: frames per second, or null",
        )
        _check(self.mel_scale in ("htk", "slaney"), f"data.mel_scale={self.mel_scale!r}: htk or slaney")
        _check(self.mel_norm in (None, "slaney"), f"data.mel_norm={self.mel_norm!r}: null or slaney")
        _check(
            self.f_min < self.f_max <= self.sample_rate / 2,
            f"data.f_max={self.f_max}: must be above data.f_min and at most half of the sample rate {self.sample_rate}",
        )
        for name in ("speech_tokens", "audio_tokens", "extra_tokens"):
            value = getattr(self, name)
            kind, _, source = (value or "").partition(":")
            known = source if kind in ("vq", "s3") else value == ("kmeans" if name != "extra_tokens" else None)
            _check(
                bool(known),
                f"data.{name}={value!r}: {'null' if name == 'extra_tokens' else 'kmeans'}, vq:FILE or s3:NAME",
            )
        _check(0 < self.val_share < 1, f"data.val_share={self.val_share}: must be between 0 and 1")
        _check(0 <= self.speech_share <= 1, f"data.speech_share={self.speech_share}: must be in [0, 1]")
        _check(self.workers >= 0, f"data.workers={self.workers}: must not be negative")
        _check(0 <= self.max_faults <= 1, f"data.max_faults={self.max_faults}: a share, in [0, 1]")
        _check(self.read_timeout > 0, f"data.read_timeout={self.read_timeout}: must be positive")
        _check(self.read_attempts >= 1, f"data.read_attempts={self.read_attempts}: at least 1")


@dataclass(frozen=True)
class FlowConfig:
    """The path x_t = (1 - t) sigma eps + t x, the condition drops, and the sampler."""

    sigma: float = 0.5  # scale of the noise
    max_reference: float = 0.3  # the reference mel is a prefix of at most this share of the clip
    drop_tokens: float = 0.1
    drop_reference: float = 0.1
    steps: int = 31  # Euler steps; the release's linspace(0, 1, 32) has 31
    guidance: float = 3.0
    sway: float = -1.0

    def __post_init__(self) -> None:
        _check(self.sigma > 0, f"flow.sigma={self.sigma}: must be positive")
        for name in ("max_reference", "drop_tokens", "drop_reference"):
            _check(0 <= getattr(self, name) < 1, f"flow.{name}={getattr(self, name)}: must be in [0, 1)")
        _check(self.steps >= 1, f"flow.steps={self.steps}: at least one Euler step is needed")


@dataclass(frozen=True)
class AlignConfig:
    """Which layers are aligned to the teacher, and how strongly."""

    strategy: str = "foga"  # foga | foga-vjp | gradnorm | lasp | fixed:4,8,12 | shallow | deep | random | none
    k: int = 3  # layers per domain
    share: float | None = None  # instead of k: the fewest layers that carry this share of all scores
    share_confidence: float = 0.9  # how probable that must be (bootstrap over clips)
    weighting: str = "normalized"  # lambda: normalized (score share) | equal | raw2x (2 x score, the release's)
    per_time: bool = False  # layers and weights for every probe time, interpolated to each clip's t
    weight: float = 1.0  # multiplies the whole alignment term
    refresh: int = 0  # measure and choose again every so many steps; 0: the first choice stays
    stop: int | None = None  # no alignment from this step on (HASTE); BiT-C goes on
    bitc_speech: float = 0.5  # BiT-C: weight of the token condition's own alignment to the speech teacher
    bitc_audio: float = 1.0
    lr: float = 1e-3  # of heads and BiT-C's projections, on the schedule of train.lr
    center: bool = True  # subtract each domain's mean teacher vector

    def __post_init__(self) -> None:
        name, _, layers = self.strategy.partition(":")
        _check(name in STRATEGIES, f"align.strategy={self.strategy!r} is unknown: {nearest(name, STRATEGIES)}")
        _check(
            (name == "fixed") == bool(layers) and all(part.strip().isdigit() for part in layers.split(",") if layers),
            f"align.strategy={self.strategy!r}: layers are written fixed:4,8,12, and only for fixed",
        )
        _check(
            self.weighting in WEIGHTINGS, f"align.weighting={self.weighting!r}: {nearest(self.weighting, WEIGHTINGS)}"
        )
        _check(self.k >= 1, f"align.k={self.k}: at least one layer; align.strategy=none aligns nothing")
        for field_name in ("weight", "bitc_speech", "bitc_audio", "refresh"):
            _check(getattr(self, field_name) >= 0, f"align.{field_name}={getattr(self, field_name)}: not below 0")
        _check(self.share is None or 0 < self.share <= 1, f"align.share={self.share}: must be in (0, 1]")
        _check(0 < self.share_confidence <= 1, f"align.share_confidence={self.share_confidence}: must be in (0, 1]")
        _check(self.stop is None or self.stop >= 0, f"align.stop={self.stop}: a step, or null")
        measured = name in MEASURED
        _check(not self.refresh or measured, f"align.refresh: {self.strategy} measures nothing that could change")
        _check(
            not self.per_time or name in ("foga", "foga-vjp", "lasp"),
            f"align.per_time: {self.strategy} has no score for each time; foga, foga-vjp and lasp have",
        )
        _check(self.share is None or measured, f"align.share: {self.strategy} has no scores: give align.k")
        _check(self.lr > 0, f"align.lr={self.lr}: must be positive")

    @property
    def measured(self) -> bool:
        """Whether the strategy ranks layers by what a probe finds."""
        return self.strategy in MEASURED

    @property
    def fixed_layers(self) -> tuple[int, ...]:
        """The 1-based layers of `fixed:…`, sorted and without repeats."""
        return tuple(sorted({int(part) for part in self.strategy.partition(":")[2].split(",") if part}))


@dataclass(frozen=True)
class ProbeConfig:
    """How layers are measured, during warm-up and by `agrepa probe`."""

    start_step: int = 200  # no ranking before: near the zero initialisation every layer looks the same
    every: int = 200
    warmup_steps: int = 5000  # the set is chosen here and stays
    clips: int = 16  # per domain
    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    draws: int = 1  # noise draws per clip and time
    chunk: int = 8  # clips per forward; bounds the memory, not the result
    max_rows: int | None = None  # rows (variants x clips) that a block runs at once; likewise
    graph: bool = True  # CUDA graphs on GPUs, but under ZeRO-3
    storage_clips: int = 64  # per domain, for what layers store (LASP, ridge, CKA); fewer when there are fewer
    pool: int = 1  # the layers are ranked on this many recent probes together
    confidence: float = 1.0  # choose before warmup_steps once the Top-K is this probable in every domain; 1: never

    def __post_init__(self) -> None:
        _check(self.pool >= 1, f"probe.pool={self.pool}: at least 1")
        _check(0 < self.confidence <= 1, f"probe.confidence={self.confidence}: must be in (0, 1]")
        _check(
            self.every >= 1 and self.clips >= 1 and self.draws >= 1,
            "probe.every, probe.clips and probe.draws: at least 1",
        )
        _check(self.chunk >= 1, f"probe.chunk={self.chunk}: at least 1")
        _check(self.max_rows is None or self.max_rows >= 1, f"probe.max_rows={self.max_rows}: at least 1, or null")
        _check(self.storage_clips >= 8, f"probe.storage_clips={self.storage_clips}: at least 8, to hold some out")
        _check(
            1 <= self.start_step <= self.warmup_steps,
            f"probe.start_step={self.start_step}: must be from 1 to probe.warmup_steps={self.warmup_steps}",
        )
        _check(
            len(self.times) > 0 and all(0 < t < 1 for t in self.times),
            f"probe.times={self.times}: must lie between 0 and 1",
        )
        _check(
            all(float(f"{a:g}") < float(f"{b:g}") for a, b in pairwise(self.times)),
            f"probe.times={self.times}: must rise, and differ in their first six digits",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation. Steps are optimizer steps, whatever the number of ranks and of accumulated micro-batches."""

    steps: int = 500_000
    start_from: str | None = None  # weights to start with: a run, or one of its checkpoints; None: random ones
    batch_clips: int = 16  # clips of one optimizer step, over all ranks and micro-batches
    batch_frames: float | None = None  # instead: what they may cost, sum of frames + attention_cost * frames^2
    attention_cost: float | None = None  # of a pair of frames; None: attention's FLOPs over the linear layers'
    accumulation: int = 1  # micro-batches per optimizer step
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.01
    warmup_steps: int = 1000  # linear, of the learning rate
    final_lr: float = 0.1  # share of lr that the cosine decay ends at
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"  # auto: bf16 on GPUs, fp32 on CPU | bf16 | fp32
    graphs: int = 0  # CUDA graphs of forward and backward, at most this many batch shapes (ZeRO 0 to 2, on GPUs)
    activation_checkpointing: bool = False  # keep each block's input only and compute it again in the backward
    compile: bool = False  # torch.compile of the blocks in training; ZeRO stages 0 to 2
    max_skipped: int = 5  # stop after so many steps in a row whose loss or gradient is not finite
    peak_tflops: float | None = None  # of a device, for MFU; None: from a table, for known GPUs in bf16
    profile: list[int] | None = None  # first and last step of a torch profiler trace in <run>/profile
    wandb: str | None = None  # project to log to with Weights & Biases as well
    save_every: int = 5000
    val_every: int = 1000
    keep: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints with the lowest validation flow loss kept beside them; `best` names the first
    copy_to: str | None = None  # a folder or an fsspec URL that checkpoints are copied to in the background
    log_every: int = 10
    patience: float = 30.0  # minutes that ranks wait for one that does not answer, before they give up

    def __post_init__(self) -> None:
        counts = ("steps", "batch_clips", "accumulation", "save_every", "val_every", "keep", "log_every", "max_skipped")
        for name in counts:
            _check(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: at least 1")
        _check(self.peak_tflops is None or self.peak_tflops > 0, f"train.peak_tflops={self.peak_tflops}: positive")
        window = self.profile
        _check(
            window is None or (len(window) == 2 and 1 <= window[0] <= window[1]),
            f"train.profile={window}: the first and the last step, from 1, such as [10,12]",
        )
        _check(self.graphs >= 0, f"train.graphs={self.graphs}: must not be negative")
        _check(
            not self.graphs or not (self.compile or self.activation_checkpointing),
            "train.graphs: neither with train.compile nor with train.activation_checkpointing",
        )
        _check(self.keep_best >= 0, f"train.keep_best={self.keep_best}: must not be negative")
        _check(
            self.batch_frames is None or self.batch_frames > 0,
            f"train.batch_frames={self.batch_frames}: must be positive, or null",
        )
        _check(
            self.attention_cost is None or self.attention_cost >= 0,
            f"train.attention_cost={self.attention_cost}: not below 0, or null",
        )
        _check(self.lr > 0, f"train.lr={self.lr}: must be positive")
        _check(self.clip_norm > 0, f"train.clip_norm={self.clip_norm}: must be positive")
        _check(0 <= self.ema_decay < 1, f"train.ema_decay={self.ema_decay}: must be in [0, 1)")
        _check(self.precision in ("auto", "bf16", "fp32"), f"train.precision={self.precision!r}: auto, bf16 or fp32")
        _check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"train.betas={self.betas}: two in [0, 1)")
        _check(self.weight_decay >= 0, f"train.weight_decay={self.weight_decay}: must not be negative")
        _check(self.patience > 0, f"train.patience={self.patience}: minutes, more than 0")
        _check(self.warmup_steps >= 0, f"train.warmup_steps={self.warmup_steps}: must not be negative")


@dataclass(frozen=True)
class EvalConfig:
    """Validation and what a person looks at."""

    clips: int = 32  # validation clips per domain
    times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    samples: int = 1  # wavs and mels per domain at the end of the run
    vocoder: str = "auto"  # auto | package:hifigan | a vocos folder or hub name | griffin-lim

    def __post_init__(self) -> None:
        _check(self.clips >= 1 and self.samples >= 1, "eval.clips and eval.samples: at least 1")
        _check(
            len(self.times) > 0 and all(0 < t < 1 for t in self.times),
            f"eval.times={self.times}: must lie between 0 and 1",
        )


@dataclass(frozen=True)
class VqFitConfig:
    """`agrepa tokens fit`: a vector quantiser over a teacher's frames. Not a section of a run: the file it writes is
    named by data.*_tokens."""

    teacher: str  # as data.speech_teacher, with @layer
    codes: int = 4096
    stride: int = 1  # teacher frames per token
    steps: int = 20_000
    batch: int = 32  # windows of 96 frames per step
    lr: float = 1e-4
    seed: int = 0
    max_frames: int = 2**20  # teacher frames to fit on, 5.8 hours at 50 Hz; kept in memory, fp16
    max_seconds: float = 10.0  # of a recording, from its start

    def __post_init__(self) -> None:
        for name in ("codes", "steps", "batch", "max_frames"):
            _check(getattr(self, name) >= 1, f"--{name.replace('_', '-')}={getattr(self, name)}: at least 1")
        _check(1 <= self.stride <= 8, f"--stride={self.stride}: from 1 to 8")
        _check(self.lr > 0, f"--lr={self.lr}: must be positive")
        _check(self.max_seconds > 0, f"--max-seconds={self.max_seconds}: must be positive")


@dataclass(frozen=True)
class Config:
    """One run. Sections are the first half of an override, fields the second."""

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


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration of a preset's name or a yaml file, with `section.field=value` overrides.

    Raises UserError for an unknown preset, section or field, a value of the wrong type and a value that fails its
    check.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = PRESETS / f"{source}.yaml"
    if not path.is_file():
        path = Path(source)
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            raise UserError(f"preset {str(source)!r} is unknown: {nearest(str(source), preset_names())}")
    for override in overrides:
        _known_field(override)
    try:
        read = OmegaConf.load(path)
        if not OmegaConf.is_dict(read):
            raise UserError(
                f"{path}: sections with fields are wanted, not a {type(OmegaConf.to_object(read)).__name__}"
            )
    except YAMLError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    try:
        named = {"run": {"preset": path.stem}}
        given = OmegaConf.from_dotlist(list(overrides))
        for content, where in ((read, path), (given, " ".join(overrides))):
            text = json.dumps(OmegaConf.to_container(content, resolve=False), default=str)
            # omegaconf would resolve it: ${oc.env:NAME} is a variable of the environment.
            _check("${" not in text, f"{where}: ${{…}} is not expanded: write the value")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), named, read, given))
    except YAMLError as error:
        raise UserError(f"{' '.join(overrides)}: {' '.join(str(error).split())}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', None) or path}: {str(error).splitlines()[0]}") from error


def _known_field(override: str) -> None:
    name, equals, _ = override.partition("=")
    section, dot, setting = name.partition(".")
    _check(bool(equals and dot), f"{override!r} is no override: write section.field=value")
    sections = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    _check(section in sections, f"section {section!r} is unknown: {nearest(section, sections)}")
    settings = [f.name for f in dataclasses.fields(sections[section])]
    _check(setting in settings, f"{name} is unknown: {nearest(setting, settings)}")


def save_config(config: Config, path: Path) -> None:
    from omegaconf import OmegaConf

    temporary = path.with_name(path.name + ".tmp")  # a kill must not leave a run without its configuration
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    temporary.replace(path)


def lr_factor(train: TrainConfig, step: int) -> float:
    """Share of train.lr at an optimizer step: linear warm-up, then cosine decay to train.final_lr."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    return train.final_lr + (1 - train.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
