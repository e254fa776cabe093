"""The run, checkpoint, export or weight file that a new run starts with: train.start_from."""

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..checkpoints.find import POINTERS, generation_of, resolve_checkpoint
from ..checkpoints.shard_facts import as_trained
from ..checkpoints.upstream import is_upstream_file, read_tensors
from ..checkpoints.weights import weights_file
from ..config import Config
from ..config_file import load_config
from ..data.index import Index
from ..errors import UserError
from ..models.backbone import Backbone
from ..ranks import from_rank_0
from ..zero.masters import publish_masters, write_masters
from ..zero.recut import whole_tensors

IN_NO_SHAPE = ("heads", "gelu", "time_scale", "token_scale", "padding")  # settings of model.* that no weight tells
OF_MELS = ("sample_rate", "n_fft", "hop_length", "f_max", "mel_scale", "mel_norm", "center", "normalize")  # of data.*
SAME_MELS = 0.01  # of a deviation: statistics of the same recordings, prepared elsewhere, differ by less
_NOT_SET = object()


def fix_start(config: Config) -> Config:
    """Return the settings with the checkpoint that train.start_from stands for at present: `latest` of a run that still
    trains is another a moment later. The same on every rank; every rank must call it."""
    start_from = config.train.start_from
    if start_from is None or is_upstream_file(Path(start_from)):
        return config
    checkpoint = from_rank_0(lambda: resolve_checkpoint(Path(start_from)))
    return replace(config, train=replace(config.train, start_from=str(checkpoint)))


def keep_start(config: Config, checkpoint: Path) -> Config:
    """Return the settings of a resume with the train.start_from of its checkpoint, if the given one names the same. The
    same on every rank; every rank must call it.

    A resume does not read it, and the command that began the run may name a run: its newest checkpoint was stored then,
    and may be another by now, or gone.
    """

    def stored_or_given() -> str | None:
        given, stored = config.train.start_from, load_config(checkpoint / "config.yaml").train.start_from
        same = None not in (given, stored) and _may_become(Path(given), Path(stored))
        return stored if same else given

    return replace(config, train=replace(config.train, start_from=from_rank_0(stored_or_given)))


def _may_become(given: Path, stored: Path) -> bool:
    """Return whether fix_start may have made `stored` of `given`. Neither has to exist any more."""
    names, folder = [stored], stored.absolute().parent
    if folder.name == "checkpoints":
        names += [folder.parent, *(folder / pointer for pointer in POINTERS)]
    return given.resolve() in [name.resolve() for name in names]


def own_generation(config: Config, checkpoint: Path | None) -> int:
    """Return how many runs have trained a run's weights before it. checkpoint: its own, if it goes on from one."""
    start_from = config.train.start_from
    if checkpoint is not None:
        return generation_of(checkpoint)
    if start_from is None:
        return 0
    return 1 if is_upstream_file(Path(start_from)) else generation_of(Path(start_from)) + 1


def start_masters(engine, start_from: Path) -> None:
    """Write the weights of train.start_from into the masters, whole and in fp32: DeepSpeed has made them from those of
    the forward, which a bf16 run rounds. Every rank must call it."""
    if is_upstream_file(start_from):
        state = engine.module.from_upstream(read_tensors(start_from))
        write_masters(engine, lambda name: state[name].float())
    else:
        write_masters(engine, whole_tensors(weights_file(start_from)))
    publish_masters(engine)


def check_start(config: Config, model: Backbone, index: Index, checkpoint: Path) -> str | None:
    """Return a warning if the weights of a run's checkpoint or of an export mean other mels or noise than those of this
    run, else None. Raises UserError if they belong to a network that computes something else, though the shapes may be
    equal, or to other ids of tokens or text."""
    trained = load_config(checkpoint / "config.yaml")
    settings = {f"model.{name}": (getattr(trained.model, name), getattr(config.model, name)) for name in IN_NO_SHAPE}
    settings["flow.prediction"] = trained.flow.prediction, model.predicts
    _refuse_other(checkpoint, {"model.backbone": (trained.model.backbone, config.model.backbone)} | settings)
    _refuse_other(checkpoint, _other_options(model, trained.model.options, config.model.options))
    values = {"flow.sigma": (trained.flow.sigma, config.flow.sigma)}
    values |= {f"data.{name}": (getattr(trained.data, name), getattr(config.data, name)) for name in OF_MELS}
    differing = [f"{name}={_typed(theirs)}" for name, (theirs, ours) in values.items() if theirs != ours]
    then = as_trained(index, checkpoint)
    if then is not index and trained.data.normalize == config.data.normalize:
        shift, scale = (then.mel_mean - index.mel_mean) / index.mel_std, then.mel_std / index.mel_std
        if max(abs(shift), abs(scale - 1)) > SAME_MELS:
            now = f"here {index.mel_mean:.3g} and {index.mel_std:.3g}"
            differing.append(f"mels of mean {then.mel_mean:.3g} and deviation {then.mel_std:.3g} ({now})")
    if not differing:
        return None
    theirs = " and ".join(differing)
    return f"warning: train.start_from={checkpoint}: its weights are of {theirs}, and this run's are not"


def _refuse_other(checkpoint: Path, settings: dict[str, tuple[object, object]]) -> None:
    """Raise UserError for the first setting whose values, of the checkpoint and of this run, differ."""
    for name, (theirs, ours) in settings.items():
        if theirs != ours:
            remedy = f"leave {name} out" if theirs is _NOT_SET else f"set {name}={_typed(theirs)}"
            raise UserError(
                f"train.start_from={checkpoint}: its {name} is {_typed(theirs)}, and this run's is {_typed(ours)}: "
                f"{remedy}"
            )


def _other_options(model: Backbone, theirs: dict, ours: dict) -> dict[str, tuple[object, object]]:
    """Return name -> values, theirs and ours, of the model.options that differ in more than neutral ones."""
    values = [model.option_defaults(options) | options for options in (theirs, ours)]
    compared = [_without(options, model.neutral_options) for options in values]
    names = [name for name in sorted(theirs.keys() | ours.keys()) if name in compared[0] or name in compared[1]]
    return {
        f"model.options.{name}": tuple(options.get(name, _NOT_SET) for options in values)
        for name in names
        if compared[0].get(name, _NOT_SET) != compared[1].get(name, _NOT_SET)
    }


def _without(options: dict, neutral: Collection[str]) -> dict:
    """Return options, and those inside of them, without neutral ones. Names and values of which none is left are None,
    as the option that is left out."""
    kept = {}
    for name, value in options.items():
        if name not in neutral and "dropout" not in str(name):
            value = (_without(value, neutral) or None) if isinstance(value, dict) else value
            kept[name] = list(value) if isinstance(value, tuple) else value
    return kept


def _typed(value: object) -> str:
    """Return a setting's value as it is typed."""
    if value is _NOT_SET:
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, default=str)
