"""Every setting of a run: sections of typed settings, presets, `section.field=value` overrides.

A configuration is read from a preset (agrepa_fast/presets/<name>.yaml) or a file, overridden from the command line,
checked, and saved resolved in the run's folder. `agrepa config` prints it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .data_config import DataConfig
from .domains import DOMAINS as DOMAINS
from .errors import UserError, nearest
from .metrics_config import MetricsConfig
from .probe_config import TIMES as TIMES
from .probe_config import ProbeConfig as ProbeConfig
from .settings import (
    Count,
    Fraction,
    NotNegative,
    Period,
    Positive,
    Seed,
    ShareAboveZero,
    ShareBelowOne,
    Size,
    Whole,
    check,
    section,
    setting,
)

PRESETS = Path(__file__).with_name("presets")
CONTRIBUTION = ("foga", "foga-vjp", "gradnorm")  # measures of what a layer contributes to the velocity
STORAGE = ("ridge", "cka", "lasp")  # measures of what a layer stores of the teacher
MEASURES = (*CONTRIBUTION, *STORAGE)
MEASURED = (*CONTRIBUTION, "lasp")  # strategies that rank layers by a measure
STRATEGIES = (*MEASURED, "fixed", "shallow", "middle", "deep", "random", "none")
CHOICES = ("hard", "soft")
OF_LAYERS = ("layersync", "sra")  # objectives that compare a layer with a deeper one
OBJECTIVES = ("pooled", "frames", "irepa", "haste", *OF_LAYERS)
WEIGHTINGS = ("normalized", "equal", "raw2x")
RECIPES = ("corrected", "official")
GELUS = ("erf", "tanh")
INITS = ("adaln_zero", "release")
OF_SHARDS = ("n_mels", "vocab", "extra_vocab", "text_vocab", "speaker_dim")  # model.*: for every backbone alike
_LAYERS = re.compile(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*")
_DECIMAL = r"[0-9]{1,2}(?:\.[0-9]{1,9})?"
_TIMES = re.compile(rf"uniform|logit_normal(?::(-?{_DECIMAL}),({_DECIMAL}))?")


@section("run.")
class RunConfig:
    """The place of a run, and the seed that makes it reproducible."""

    dir: str | None = setting(None, "folder; null: runs/<preset>-<date-time>-<part of run.id>", resume=True, path=True)
    id: str | None = setting(None, "made when a run begins; a resume takes only checkpoints that carry it")
    seed: Seed = setting(0, "of weights, order of clips, noise, times and condition drops")
    preset: str | None = setting(None, "name of the preset or file that this configuration came from")


@section("model.")
class ModelConfig:
    """AudioDiT, or a model of yours. `n_mels` and `vocab` are those of the shards unless given."""

    backbone: str = setting("audio_dit", "audio_dit, cosyvoice1, 2 or 3, f5, voicebox, or MODULE:CLASS of a Backbone")
    options: dict[str, Any] = setting({}, "keywords for its class: model.options.NAME=VALUE; most below is AudioDiT's")
    padding: Literal["strict", "upstream"] = setting(
        "strict", "upstream: valid frames see padding as in the package that the model comes from"
    )
    dim: Size = setting(1024, "width of the residual stream")
    depth: Size = setting(24, "number of blocks, named L1 … L<depth>")
    heads: Size = setting(16, "attention heads")
    ffn_mult: Positive = setting(4.0, "width of the FFN over dim")
    dropout: ShareBelowOne = setting(0.0, "of attention's and the FFN's outputs")
    qk_norm: bool = setting(False, "RMS norm of queries and keys, per head")
    gelu: Literal[GELUS] = setting("erf", "exact, or its tanh approximation")
    init: Literal[INITS] = setting("adaln_zero", "release: output layers at zero, modulations from N(0, 0.02)")
    position: Literal["sinusoidal", "rotary_conv"] = setting(
        "sinusoidal", "absolute (the paper's), or rotary with a depthwise convolution"
    )
    time_scale: float = setting(1.0, "t is multiplied by it before its sinusoidal embedding; the release 1, DiT 1000")
    token_dim: Size = setting(1024, "width of the token condition")
    token_scale: float = setting(1.0, "norm of each frame of the token condition; the release uses 1")
    n_mels: Size | None = setting(None, "mel bands; null: those of the shards")
    vocab: Count | None = setting(None, "token ids of all domains together; null: those of the shards")
    text_vocab: Count | None = setting(None, "text ids, of models that take text; null: those of data.text")
    speaker_dim: Count | None = setting(None, "channels of speaker vectors; null: those of the shards")
    extra_vocab: Count | None = setting(None, "ids of topology B's second token, data.extra_codebook; null: topology A")

    def __post_init__(self) -> None:
        if self.backbone != "audio_dit":
            self._refuse_settings_of_audio_dit()
            check(
                ":" in self.backbone or self.extra_vocab is None,
                f"model.extra_vocab: {self.backbone} takes no second token (topology B), AudioDiT does: set it to null",
            )
            return
        check(not self.options, "model.options are those of another model: set model.backbone, too")
        check(self.padding == "strict", "model.padding=upstream: AudioDiT comes from no other package")
        check(self.dim * self.ffn_mult >= 1, f"model.ffn_mult={self.ffn_mult}: must be positive")
        check(
            self.dim % self.heads == 0,
            f"model.heads={self.heads} does not divide model.dim={self.dim}: choose a divisor",
        )
        check(
            (self.dim // self.heads) % 2 == 0, f"model.dim/model.heads={self.dim // self.heads}: rotary needs it even"
        )

    def _refuse_settings_of_audio_dit(self) -> None:
        shared = {"backbone", "options", "padding", *OF_SHARDS}
        for part in fields(self):
            if part.name not in shared and getattr(self, part.name) != part.default:
                raise UserError(
                    f"model.{part.name} is AudioDiT's: for {self.backbone} write model.options.{part.name}=…, if its "
                    "class takes it"
                )


@section("flow.")
class FlowConfig:
    """The path x_t = (1 - t) sigma eps + t x, the condition drops, and the sampler."""

    sigma: Positive = setting(0.5, "scale of the noise")
    reference: Literal["prefix", "infill"] = setting(
        "prefix", "frames of the clip that are given: a prefix, or all but a span"
    )
    max_reference: ShareBelowOne = setting(0.3, "prefix: at most this share of the clip is given")
    infill: Annotated[list[ShareAboveZero], Field(min_length=2, max_length=2)] = setting(
        [0.7, 1.0], "infill: least and largest share of the clip in the span that is hidden"
    )
    times: str = setting(
        "uniform", "t of training: uniform, or logit_normal:MEAN,SCALE, the sigmoid of a normal number; 0,1 if left out"
    )
    prediction: Literal["velocity", "x"] = setting(
        "velocity", "output of the network; x: the clean mel, from which the velocity is computed for everything else"
    )
    drop_tokens: ShareBelowOne = setting(0.1, "share of clips that train without tokens")
    drop_reference: ShareBelowOne = setting(0.1, "share of clips that train without the reference")
    drop_all: ShareBelowOne = setting(0.0, "share of clips that train without either")
    loss_region: Literal["clip", "hidden"] = setting("clip", "frames whose loss counts: all, or those not given")
    average: Literal["clip", "frame"] = setting("clip", "every clip of a batch counts alike, or every frame")
    solver: Literal["euler", "midpoint"] = setting("euler", "of the sampler; midpoint runs the model twice per step")
    steps: Count = setting(31, "steps of the sampler; the release's linspace(0, 1, 32) has 31")
    guidance: float = setting(3.0, "scale of classifier-free guidance")
    guidance_without: Literal["tokens", "all"] = setting("tokens", "what the other branch of guidance lacks")
    schedule: Literal["sway", "cosine"] = setting("sway", "times of the steps; cosine: 1 - cos(pi t / 2)")
    sway: float = setting(-1.0, "sway sampling of F5-TTS; 0: uniform steps")

    def __post_init__(self) -> None:
        check(self.infill[0] <= self.infill[1], f"flow.infill={self.infill}: the least share comes first")
        check(
            _TIMES.fullmatch(self.times) and (self.logit_normal is None or self.logit_normal[1] > 0),
            f"flow.times={self.times!r}: write uniform, logit_normal, or logit_normal:MEAN,SCALE with a positive "
            "SCALE, such as logit_normal:-0.8,0.8",
        )

    @property
    def logit_normal(self) -> tuple[float, float] | None:
        """Mean and scale of the logits of t; None if t is uniform."""
        mean, scale = _TIMES.fullmatch(self.times).groups()
        if self.times == "uniform":
            return None
        return (0.0, 1.0) if mean is None else (float(mean), float(scale))


@section("align.")
class AlignConfig:
    """Layers that are aligned to the teacher, and how strongly."""

    objective: str = setting(
        "pooled", "pooled, frames, irepa, haste, layersync, sra, or MODULE:CLASS of an Objective of yours"
    )
    deeper: Size | None = setting(
        None, "layersync, sra: a layer is compared with the one so many layers deeper; null: a third of the depth"
    )
    strategy: str = setting(
        "foga", "foga, foga-vjp, gradnorm, lasp, fixed:4,8,12, shallow, middle, deep, random or none"
    )
    k: Size = setting(3, "layers per domain")
    share: ShareAboveZero | None = setting(
        None, "instead of k: the fewest layers that are 90 % sure to carry this share of all scores"
    )
    choice: Literal[CHOICES] = setting(
        "hard", "soft: every layer that may be in the Top-K, by its probability to be; near ties move lambda little"
    )
    weighting: Literal[WEIGHTINGS] = setting(
        "normalized", "lambda: share of the scores, equal, or 2 x score as in the release"
    )
    per_time: bool = setting(False, "layers and weights for every probe time, interpolated to each clip's t")
    weight: NotNegative = setting(1.0, "multiplies the whole alignment term")
    warmup_steps: Whole = setting(0, "linear warm-up of the weight, from the choice of layers on")
    decay: Literal["linear", "cosine"] | None = setting(
        None, "the weight falls to 0 at stop, or at the end of the run; null: it is constant"
    )
    refresh: Whole | None = setting(
        0,
        "measure and choose again every so many steps, layers change if the evidence says so; 0: the first choice "
        "stays; null: so seldom that it costs 0.5 % of training",
    )
    stop: Whole | None = setting(None, "no alignment from this step on (HASTE); BiT-C goes on")
    bitc_speech: NotNegative = setting(0.5, "BiT-C: weight of the token condition's alignment to the speech teacher")
    bitc_audio: NotNegative = setting(1.0, "likewise, to the audio teacher")
    lr: Positive = setting(1e-3, "of heads and BiT-C's projections, on the schedule of train.lr")
    center: bool = setting(True, "subtract each domain's mean teacher vector")

    def __post_init__(self) -> None:
        name, colon, layers = self.strategy.partition(":")
        check(name in STRATEGIES, f"align.strategy={self.strategy!r} is unknown: {nearest(name, STRATEGIES)}")
        check(
            (name == "fixed") == bool(colon) and (not colon or _LAYERS.fullmatch(layers)),
            f"align.strategy={self.strategy!r}: layers are written fixed:4,8,12, and only for fixed",
        )
        own = ":" in self.objective  # MODULE:CLASS
        check(
            own or self.objective in OBJECTIVES,
            f"align.objective={self.objective!r} is unknown: {nearest(self.objective, OBJECTIVES)}, or MODULE:CLASS",
        )
        check(
            self.deeper is None or own or self.objective in OF_LAYERS,
            f"align.deeper={self.deeper}: align.objective={self.objective} compares with no deeper layer",
        )
        measured = name in MEASURED
        check(self.refresh == 0 or measured, f"align.refresh: {self.strategy} measures nothing that could change")
        check(
            not self.per_time or name in ("foga", "foga-vjp", "lasp"),
            f"align.per_time: {self.strategy} has no score for each time; foga, foga-vjp and lasp have",
        )
        if self.choice == "soft":
            check(measured, f"align.choice=soft: {self.strategy} has no scores that could be nearly equal")
            check(self.share is None, "align.choice=soft weighs the Top-K: give align.k, not align.share")
        check(self.share is None or measured, f"align.share: {self.strategy} has no scores: give align.k")
        check(
            self.weighting != "raw2x" or measured or name == "none",
            f"align.weighting=raw2x: {self.strategy} has no scores, give normalized",
        )

    @property
    def measured(self) -> bool:
        """Whether the strategy ranks layers by a measure."""
        return self.strategy in MEASURED

    @property
    def fixed_layers(self) -> tuple[int, ...]:
        """The 1-based layers of `fixed:…`, sorted and without repeats."""
        return tuple(sorted({int(part) for part in self.strategy.partition(":")[2].split(",") if part}))


@section("train.")
class TrainConfig:
    """Optimisation. Steps are optimizer steps, for any number of ranks and of accumulated micro-batches."""

    steps: Count = setting(500_000, "optimizer steps", resume=True)
    start_from: str | None = setting(
        None, "run, checkpoint, or weight file of the model's package, to start with; null: random", path=True
    )
    batch_clips: Size = setting(16, "clips per optimizer step, over all ranks and micro-batches")
    batch_frames: Positive | None = setting(
        None, "instead: the cost per optimizer step, the sum over clips of frames + c frames^2, c the cost of attention"
    )
    accumulation: Size = setting(1, "micro-batches per optimizer step", resume=True)
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "muon: for the layers' weight matrices, and AdamW for all other parameters"
    )
    lr: Positive = setting(1e-4, "peak learning rate, of Muon and AdamW alike: their updates have the same RMS")
    betas: Annotated[list[ShareBelowOne], Field(min_length=2, max_length=2)] = setting([0.9, 0.999], "of AdamW")
    momentum: ShareBelowOne = setting(0.95, "of Muon")
    weight_decay: NotNegative = setting(0.01, "of weights; biases, norms and embeddings do not decay")
    warmup_steps: Whole = setting(1000, "linear warm-up of the learning rate")
    lr_decay: Literal["cosine", "linear"] = setting("cosine", "of the learning rate, after the warm-up")
    final_lr: float = setting(0.1, "share of lr that the decay ends at")
    clip_norm: Annotated[float, Field(gt=0, allow_inf_nan=True)] = setting(1.0, "bound of the gradient's global norm")
    ema_decay: ShareBelowOne = setting(0.999, "of the averaged weights")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on newer GPUs, and CPUs that gain by it")
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
        check(
            window is None or (len(window) == 2 and 1 <= window[0] <= window[1]),
            f"train.profile={window}: the first and the last step, from 1, such as [10,12]",
        )
        check(
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
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        if self.model.backbone == "audio_dit":
            self.check_layers([self.model.dim] * self.model.depth, self.model.token_dim)
        else:
            check(
                not self.train.compile, f"train.compile compiles AudioDiT's blocks, not those of {self.model.backbone}"
            )
        check(
            self.align.strategy != "lasp" or min(self.align.bitc_speech, self.align.bitc_audio) > 0,
            "align.strategy=lasp needs align.bitc_speech and align.bitc_audio above 0: it asks BiT-C's projections",
        )
        check(
            self.align.refresh is not None or self.train.batch_frames is None,
            "align.refresh=null counts train.batch_clips per step: give a number beside train.batch_frames",
        )
        if self.align.measured:
            self._check_choice()

    def _check_choice(self) -> None:
        """Raise UserError if no step is left to align the layers that a measure chooses, or if a setting asks how sure
        their choice is and the probes cannot tell."""
        align, probe = self.align, self.probe
        soft, refuses = align.choice == "soft", probe.undecided == "refuse"
        check(not (soft and refuses), "probe.undecided=refuse: a soft choice is never undecided, leave it out")
        name = {"gradnorm": "pool", "lasp": "storage_clips"}.get(align.strategy, "clips")
        clips = getattr(probe, name)
        asks = "align.choice=soft" if soft else "probe.undecided=refuse" if refuses else None
        check(asks is None or clips > 1, f"{asks}: probe.{name}={clips} shows no spread, raise it to 2 at least")
        first = probe.warmup_steps + 1  # that aligns: a probe is read a step later
        check(
            first < self.train.steps,
            f"probe.warmup_steps={probe.warmup_steps} leaves no step to align before train.steps={self.train.steps}: "
            f"lower it, raise train.steps, or choose another align.strategy",
        )
        if probe.confidence < 1 and clips > 1:  # gradnorm is sure of nothing before a second probe
            first = min(first, probe.start_step + 1 + (probe.every if name == "pool" else 0))
        check(
            align.stop is None or align.stop > first,
            f"align.stop={align.stop} comes before the layers are chosen: raise it above {first}",
        )

    def check_layers(self, widths: Sequence[int], condition_width: int | None) -> None:
        """Raise UserError if the model's layers do not suit align.*. widths: of its layers, L1 first."""
        align, depth = self.align, len(widths)
        outside = [layer for layer in align.fixed_layers if not 1 <= layer <= depth]
        check(not outside, f"align.strategy={align.strategy!r}: layers are numbered 1 to {depth}")
        ranks_layers = align.strategy != "none" and not align.fixed_layers
        check(
            not ranks_layers or align.share is not None or align.k <= depth,
            f"align.k={align.k} is more than the model's {depth} layers",
        )
        different = {*widths} - {condition_width}
        check(
            align.strategy != "lasp" or not different,
            f"align.strategy=lasp: BiT-C's projection takes the token condition's {condition_width} channels "
            f"(model.token_dim), layers have {' and '.join(map(str, sorted(different)))} (model.dim)",
        )
