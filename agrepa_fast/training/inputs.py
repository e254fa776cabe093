"""Turn the command line of a run into settings."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..config import Config
from ..config_file import load_config
from ..errors import UserError
from ..files import local_path
from ..launch import complete_launch_environment
from ..ranks import from_rank_0
from ..zero.ds_config import find_ds_config
from ..zero.ds_sections import adopt_sections
from ..zero.process_group import join_process_group


def read_inputs(preset: str, overrides: Sequence[str], ds_config: str, resume: str | None) -> tuple[Config, dict]:
    """Return the settings of a preset, or of the run that --resume continues, and the values of a ds_config for the
    engine. Settings that the ds_config has, such as its optimizer's, are taken from it and printed. Raises UserError if
    there is no such preset, run or ds_config, or a value is refused."""
    config = load_config(preset, overrides) if resume is None else _load_run_config(preset, overrides)
    ds_values, train, lines = adopt_sections(find_ds_config(ds_config), config.train, overrides)
    for line in lines:
        print(line)
    return replace(config, train=train), ds_values


def share_inputs(preset: str, overrides: Sequence[str], ds_config: str, resume: str | None) -> tuple[Config, dict]:
    """Join the other ranks and return the result of `read_inputs` on rank 0: files may differ from node to node. Every
    rank must call it. A process without others joins none."""
    if complete_launch_environment() > 1:
        join_process_group()
    return from_rank_0(lambda: read_inputs(preset, overrides, ds_config, resume))


def _load_run_config(preset: str, overrides: Sequence[str]) -> Config:
    """Return the settings of the run that --resume continues, with overrides: the run in run.dir, or else the newest of
    the preset in runs/. Raises UserError if there is no run."""
    folders = [value for name, _, value in (override.partition("=") for override in overrides) if name == "run.dir"]
    if folders and folders[-1] != "null":  # as the setting takes it: no folder
        folder = local_path(folders[-1])
    else:
        stem = re.escape(Path(preset).stem)  # demo's are not demo-long's
        found = [p for p in Path("runs").glob("*/config.yaml") if re.fullmatch(rf"{stem}-\d+-\d+-\w+", p.parent.name)]
        runs = sorted(found, key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"--resume: no run of preset {preset!r} in runs/; name it with run.dir=…")
        folder = runs[-1].parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume: {folder} holds no run (no config.yaml): start it without --resume")
    return load_config(folder / "config.yaml", [*overrides, f"run.dir={folder}"])
