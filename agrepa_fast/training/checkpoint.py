"""Checkpoints of a run: everything a resume needs, and the weights as safetensors for everybody else.

checkpoints/<tag>/ holds DeepSpeed's files (model, optimizer, schedule, heads, selection, probes, position),
rank<r>.safetensors (EMA shard and random state), model.safetensors and ema.safetensors (whole, fp32), heads.safetensors
(alignment heads and BiT-C's projections), config.yaml, selection.json, and last of all checkpoint.json, which makes it
complete. `latest` names the newest complete one. A tag is never written twice.
"""

import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..config import Config, UserError, load_config, save_config
from ..data.shards import index_sha256
from ..models.dit import AudioDiT
from .choose import LayerChoice
from .ema import Ema
from .engine import full_weights
from .partition import gathered, whole_shape

MARKER = "checkpoint.json"
_MAY_CHANGE = {  # on a resume; so may eval.*
    *(
        "run.dir",
        "data.path",
        "data.workers",
        "data.read_timeout",
        "data.read_attempts",
        "data.max_faults",
        "probe.chunk",
        "probe.graph",
        "probe.max_rows",
        "train.steps",
        "train.accumulation",
    ),
    *("train.save_every", "train.val_every", "train.log_every", "train.keep", "train.max_skipped", "train.patience"),
    *("train.activation_checkpointing", "train.compile", "train.peak_tflops", "train.profile", "train.wandb"),
}


def _fields(config: Config) -> list[tuple[str, str]]:
    return [(section.name, field.name) for section in fields(config) for field in fields(getattr(config, section.name))]


@dataclass
class Checkpoints:
    """The checkpoints folder of one run, seen from one rank."""

    folder: Path
    rank: int
    world: int
    keep: int

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        if self.rank == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.is_dir() and not (path / MARKER).is_file():
                    shutil.rmtree(path)
        dist.barrier()

    def save(self, engine, ema: Ema, choice: LayerChoice, step: int, config: Config) -> Path:
        """Write a complete checkpoint, then point `latest` at it and drop the oldest. Every rank must call it."""
        tag = self._new_tag(step)
        path = self.folder / tag
        client = {"step": step, "choice": choice.state_dict()}
        engine.save_checkpoint(str(self.folder), tag=tag, client_state=client, save_latest=False)
        save_file({**ema.state_dict(), **_random_state()}, path / f"rank{self.rank}.safetensors")
        weights = full_weights(engine)
        with ema.applied():
            averaged = full_weights(engine)
        if self.rank == 0:
            save_file(weights, path / "model.safetensors")
            save_file(averaged, path / "ema.safetensors")
            save_config(config, path / "config.yaml")
            save_file(choice.aligner.export(), path / "heads.safetensors")
            if choice.aligner.selection is not None:
                choice.aligner.selection.save(path / "selection.json")
        dist.barrier()
        if self.rank == 0:
            facts = {"step": step, **self._facts(engine, config)}
            _write(path / MARKER, json.dumps(facts))
            _write(self.folder / "latest", tag)
            self._rotate()
        dist.barrier()
        return path

    def load(self, path: Path, engine, ema: Ema, choice: LayerChoice, config: Config) -> int:
        """Continue from a checkpoint of this run; returns its step. Raises UserError when it does not fit this run."""
        saved = load_config(path / "config.yaml")
        for section, name in _fields(config):
            there, here = getattr(getattr(saved, section), name), getattr(getattr(config, section), name)
            if there != here and f"{section}.{name}" not in _MAY_CHANGE and section != "eval":
                what = "another architecture: " if section == "model" else ""
                raise UserError(
                    f"{path}: {what}{section}.{name} is {there} there and {here} in this run: leave it as it "
                    "was, or start a new run"
                )
        facts = json.loads((path / MARKER).read_text())
        for name, here in self._facts(engine, config).items():
            if facts[name] != here:
                raise UserError(
                    f"{path} was saved with {name} {facts[name]}, this run has {here}: resume it with {facts[name]}"
                )
        _, client = engine.load_checkpoint(str(self.folder), tag=path.name)
        state = load_file(path / f"rank{self.rank}.safetensors")
        ema.load_state_dict(state)
        choice.load_state_dict(client["choice"])
        torch.set_rng_state(state["cpu_rng"])  # last: making the heads draws from it
        if torch.cuda.is_available() and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
        return client["step"]

    def _facts(self, engine, config: Config) -> dict:
        """What must be equal on a resume and is no setting."""
        shards = index_sha256(config.data)
        return {"ranks": self.world, "ZeRO stage": engine.zero_optimization_stage(), "shards": shards}

    def _new_tag(self, step: int) -> str:
        tag, number = f"step{step:08d}", 1
        while (self.folder / tag).exists():
            number += 1
            tag = f"step{step:08d}-{number}"
        dist.barrier()  # nobody creates the folder before everybody has looked
        return tag

    def _rotate(self) -> None:
        complete = sorted(
            (path for path in self.folder.iterdir() if (path / MARKER).is_file()),
            key=lambda path: (path / MARKER).stat().st_mtime_ns,
        )
        for path in complete[: -self.keep]:
            shutil.rmtree(path)


def find_checkpoint(run: Path, name: str) -> Path:
    """A complete checkpoint of a run by tag, or `latest`. Raises UserError when there is none."""
    folder = run / "checkpoints"
    tag = name
    if name == "latest":
        if not (folder / "latest").is_file():
            raise UserError(f"{run} has no checkpoint to resume: it ended before its first train.save_every steps")
        tag = (folder / "latest").read_text().strip()
    if not (folder / tag / MARKER).is_file():
        known = sorted(path.parent.name for path in folder.glob(f"*/{MARKER}"))
        raise UserError(f"{run} has no checkpoint {name!r}: there are {', '.join(known) or 'none'}")
    return folder / tag


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint's folder, from itself or from a run's folder (its newest one)."""
    if (path / "checkpoints").is_dir():
        return find_checkpoint(path, "latest")
    if not (path / "config.yaml").is_file() or not (path / MARKER).is_file():
        raise UserError(f"{path} is no checkpoint: give runs/<run>, or runs/<run>/checkpoints/<tag>")
    return path


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint."""
    return json.loads((path / MARKER).read_text())["step"]


def load_model(path: Path, *, live: bool = False) -> tuple[AudioDiT, Config]:
    """The model of a checkpoint, in evaluation mode on the CPU, with its configuration.

    Averaged weights unless `live`. Raises UserError when weights and configuration do not fit each other.
    """
    weights = path / ("model.safetensors" if live else "ema.safetensors")
    if not weights.is_file():
        raise UserError(f"{path}: {weights.name} is missing")
    config = load_config(path / "config.yaml")
    model = AudioDiT(config.model)
    load_weights(model, weights, "its config.yaml")
    return model.eval(), config


def load_weights(model: AudioDiT, weights: Path, wanted: str) -> None:
    """Fill the model from a safetensors file, one weight at a time, partitioned or not; every rank must call it. Raises
    UserError naming the first weight that is not as in `wanted`."""
    parameters = dict(model.named_parameters())
    with safe_open(weights, "pt") as file, torch.no_grad():
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name in sorted(parameters.keys() | there.keys()):
            here = whole_shape(parameters[name]) if name in parameters else None
            if there.get(name, "missing") != here:
                raise UserError(
                    f"{weights}: another architecture than {wanted}, {name} is {there.get(name, 'missing')}, not {here}"
                )
        for name, parameter in parameters.items():
            with gathered([parameter]):
                parameter.data.copy_(file.get_tensor(name))


def load_projections(path: Path) -> dict[str, torch.Tensor]:
    """Domain -> weight (E, token_dim) of BiT-C's projections in a checkpoint; {} when it was trained without."""
    file = path / "heads.safetensors"
    if not file.is_file():
        raise UserError(f"{path}: {file.name} is missing")
    return {name.split(".")[1]: weight for name, weight in load_file(file).items() if name.startswith("bitc.")}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
