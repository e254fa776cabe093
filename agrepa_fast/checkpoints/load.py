"""Resuming a run from one of its checkpoints, on any number of ranks and at any ZeRO stage."""

from pathlib import Path

import torch

from ..config import Config
from ..config_file import load_config, settings_that_differ
from ..errors import UserError
from ..lr_schedule import lr_factor
from ..probing.schedule import LayerChoice
from ..ranks import all_gather
from ..seeds import derive_seed, draws_seed
from ..zero.ema import Ema
from ..zero.engine import set_rate
from ..zero.recut import load_recut, whole_tensors
from ..zero.state_files import layout, load_engine, tensors_only
from .find import read_marker
from .random_state import rank_file, restore_random_state
from .retention import is_comparable
from .save import Checkpoints
from .shard_facts import shard_hash


def load_checkpoint(path: Path, checkpoints: Checkpoints, engine, ema: Ema, choice: LayerChoice) -> int:
    """Continue from a checkpoint of this run, and return its step. Every rank must call it. Raises UserError if the
    checkpoint is another run's or later than train.steps, or if its settings or shards are not this run's."""
    config, facts = checkpoints.config, read_marker(path)
    if facts is None:
        raise UserError(f"{path} is not seen by every rank: the run's folder has to be on storage that all nodes share")
    if facts["run"] != config.run.id:
        raise UserError(
            f"{path} is a checkpoint of another run: --resume takes only the run's own; "
            f"train.start_from={path} begins a new run with its weights"
        )
    _check_settings(path, config)
    if facts["step"] > config.train.steps:  # no step would be left, and the end would describe other weights
        raise UserError(
            f"{path} is later than train.steps={config.train.steps}: raise it to {facts['step']} at least, or resume "
            "an earlier checkpoint"
        )
    if facts["shards"] != shard_hash(checkpoints.index):
        raise UserError(f"{path} was trained on other shards than those in {checkpoints.index.folder}: set data.path")
    with tensors_only(path):
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    all_gather(None)  # DeepSpeed gathers next, and would wait for a rank that has failed
    if facts["layout"] == layout(engine, checkpoints.world):
        load_engine(engine, path)
    else:
        load_recut(engine, path, facts["layout"]["stage"], state["engine"], checkpoints.say)
    set_rate(engine, config.train.lr * lr_factor(config.train, facts["step"]))  # train.steps may have changed
    ema.load(whole_tensors(path / "ema.safetensors"), state["ema_updates"])
    choice.load_state_dict(state["choice"])
    checkpoints.score = facts["val/flow_loss"] if is_comparable(facts, checkpoints.validated_on) else None
    seed = derive_seed(draws_seed(config.run.seed, checkpoints.generation), facts["step"], checkpoints.rank)
    restore_random_state(path / rank_file(checkpoints.rank), seed)
    return facts["step"]


def _check_settings(path: Path, config: Config) -> None:
    for name, saved, value in settings_that_differ(load_config(path / "config.yaml"), config):
        kind = "another architecture: " if name.startswith("model.") else ""
        raise UserError(
            f"{path}: {kind}{name} is {saved} there and {value} in this run: leave it as it was, or start a new run"
        )
