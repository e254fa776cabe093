"""The run, checkpoint, export or weight file that a new run starts with: train.start_from."""

from dataclasses import replace
from pathlib import Path

from ..checkpoints.find import POINTERS, generation_of, resolve_checkpoint
from ..checkpoints.upstream import is_upstream_file
from ..config import Config
from ..config_file import load_config
from ..ranks import from_rank_0


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
    """Whether fix_start may have made `stored` of `given`. Neither has to exist any more."""
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
