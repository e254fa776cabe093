"""The table of docs/objectives.md: selectors, objectives, backbones, topologies and settings that a run refuses
together. Every pair goes through the checks that refuse a run, with models on the meta device."""

from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from ..config import OBJECTIVES, STRATEGIES, Config
from ..config_file import load_config
from ..data.layout import BatchLayout
from ..domains import DOMAINS
from ..errors import UserError
from ..models.backbone import Backbone
from ..models.registry import make_model
from ..training.builder import check_together, fit_to_shards
from ..training.captured_step import check_graphs
from ..zero.ds_config import find_ds_config, resolve_ds_config, zero_stage

PRESETS = ("agrepa-a", "agrepa-b", "voicebox", "e2", "f5-v1", "cosyvoice1", "cosyvoice2", "cosyvoice3")
_WIDTH = 1280  # of teachers


class Value(NamedTuple):
    """A choice on one axis of the table. settings: overrides, in which LAST is the number of the model's layers, MORE
    one more, and CHOICE the step of probe.warmup_steps; lacks: what the shards do not have."""

    axis: str
    name: str
    settings: tuple[str, ...] = ()
    lacks: str | None = None


@cache
def values() -> tuple[Value, ...]:
    """Return all values, the presets among them whose packages are installed."""
    layers = {"fixed": ("fixed", "fixed:1,2", "fixed:LAST")}
    strategies = [written for name in STRATEGIES for written in layers.get(name, (name,))]
    settings = (
        *("align.share=0.5", "align.choice=soft", "align.per_time=true", "align.refresh=200", "align.refresh=null"),
        *("align.k=MORE", "align.deeper=2", "align.stop=CHOICE", "train.steps=CHOICE", "align.bitc_speech=0"),
        *("probe.undecided=refuse", "train.compile=true", "train.activation_checkpointing=true", "train.graphs=8"),
        *("train.batch_frames=9000", "model.padding=upstream"),
    )
    return (
        *(Value("strategy", f"align.strategy={name}", (f"align.strategy={name}",)) for name in strategies),
        *(Value("objective", f"align.objective={name}", (f"align.objective={name}",)) for name in OBJECTIVES),
        *(Value("preset", f"--preset {name}") for name in PRESETS if _depth(name)),
        Value("tokens", "topology A, model.extra_vocab=null", ("model.extra_vocab=null",)),
        Value("tokens", "topology B, model.extra_vocab=1024", ("model.extra_vocab=1024",)),
        *(Value("text", f"data.text={text}", (f"data.text={text}",)) for text in ("bytes", "null")),
        *(Value("reference", f"flow.reference={mode}", (f"flow.reference={mode}",)) for mode in ("prefix", "infill")),
        Value("prediction", "flow.prediction=x", ("flow.prediction=x",)),
        Value("teacher", "shards without data.teacher_rate", lacks="frames"),
        Value("attention", "shards without data.teacher_attention", lacks="attention"),
        Value("second tokens", "shards without data.extra_tokens", lacks="extra"),
        Value("speaker", "shards without data.speaker", lacks="speaker"),
        Value("ds_config", "--ds_config zero3.json"),
        *(Value(setting.partition("=")[0], setting, (setting,)) for setting in settings),
    )


# A pair goes together if it does with one of these, which the axes of the pair itself replace.
_OTHERS = tuple(
    product(("agrepa-a", "demo-f5", "cosyvoice3"), ("foga", "shallow", "lasp", "none"), ("pooled", "layersync"))
)


def combinations_table() -> list[str]:
    """Return the lines of the table: each selector, objective, backbone, topology and kind of shards, with everything
    that is refused beside it."""
    lines = ["| | a run refuses it with |", "|---|---|"]
    for value in values():
        if not value.axis.startswith(("train.", "probe.", "ds_config")):
            lines.append(f"| `{value.name}` | {_cell(value)} |")
    if absent := [preset for preset in PRESETS if not _depth(preset)]:
        lines += ["", f"Left out, because their packages are not installed: {', '.join(absent)}."]
    return lines


def _cell(value: Value) -> str:
    if refusal(value) is not None:
        return "everything"
    others = (other for other in values() if other.axis != value.axis and refusal(other) is None)
    refused = [f"`{other.name}`" for other in others if refusal(value, other) is not None]
    return ", ".join(refused) or "nothing"


def refusal(*chosen: Value) -> str | None:
    """Return the line that ends every run of these values, or None if there is a run of them."""
    return _refusal(frozenset(chosen))


@cache
def _refusal(chosen: frozenset[Value]) -> str | None:
    given, line = {value.axis: value for value in chosen}, None
    own = tuple(setting for value in chosen for setting in value.settings)
    lacks = frozenset(value.lacks for value in chosen)
    for preset, strategy, objective in _OTHERS:
        if "preset" in given:
            preset = given["preset"].name.split()[-1]
        elif not _depth(preset):
            continue
        more = {"strategy": f"align.strategy={strategy}", "objective": f"align.objective={objective}"}
        settings = (*(setting for axis, setting in more.items() if axis not in given), *own)
        line = _refusal_of(preset, settings, lacks, "zero3.json" if "ds_config" in given else "zero2.json")
        if line is None:
            return None
    return line


@cache
def _refusal_of(preset: str, settings: tuple[str, ...], lacks: frozenset[str | None], ds_config: str) -> str | None:
    """Return the line that ends one run before its first step, or None."""
    depth, device = _depth(preset), torch.device("cuda")
    numbers = {"LAST": depth, "MORE": depth + 1, "CHOICE": load_config(preset).probe.warmup_steps}
    for word, number in numbers.items():
        settings = [setting.replace(word, str(number)) for setting in settings]
    try:
        config = load_config(preset, settings)
        clips = config.train.batch_clips if config.train.batch_frames is None else None
        layout = BatchLayout(clips, config.train.accumulation, 0, 1)
        resolved = resolve_ds_config(find_ds_config(ds_config), config.train, layout, device)
        check_graphs(config.train, device, zero_stage(resolved))
        shards = _shards(config, lacks)
        config = fit_to_shards(config, shards)
        check_together(config, _model(config), shards)
    except UserError as error:
        return str(error)
    return None


def _shards(config: Config, lacks: frozenset[str | None] = frozenset()) -> SimpleNamespace:
    """Return the facts of an index that a run asks for: of shards with everything but what they lack."""
    text = None if config.data.text is None else SimpleNamespace(spec=config.data.text, size=256)
    teacher = SimpleNamespace(dim=_WIDTH, rate=None if "frames" in lacks else 12.5)
    teacher.attention = None if {"frames", "attention"} & lacks else (1, 2, 20, 64)
    return SimpleNamespace(
        folder=Path(config.data.path),
        n_mels=config.data.n_mels,
        vocab=len(DOMAINS) * config.data.codebook,
        text=text,
        extra_vocab=None if "extra" in lacks else config.data.extra_codebook,
        speaker_dim=None if "speaker" in lacks else 192,
        domains=DOMAINS,
        teacher=lambda domain: teacher,
    )


_models: dict[str, Backbone | UserError] = {}


def _model(config: Config) -> Backbone:
    """Return the model of a run, without memory; raise the UserError that refuses it."""
    key = repr((config.model, config.flow.prediction))
    if key not in _models:
        try:
            with torch.device("meta"):
                _models[key] = make_model(config.model, config.flow.prediction)
        except UserError as error:
            _models[key] = error
    if isinstance(_models[key], UserError):
        raise _models[key]
    return _models[key]


@cache
def _depth(preset: str) -> int:
    """Return the number of layers of a preset's model, 0 if its package is not installed."""
    config = load_config(preset)
    try:
        return len(_model(fit_to_shards(config, _shards(config))).layers)
    except UserError:
        return 0
