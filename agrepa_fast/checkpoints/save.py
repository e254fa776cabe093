"""Checkpoints of a run: everything a resume needs, and the weights as safetensors for everybody else.

checkpoints/<tag>/ holds DeepSpeed's files (model, optimizer), state.pt (schedule, heads, selection, probes),
rank<r>.safetensors (random state), model.safetensors and ema.safetensors (whole, fp32), heads.safetensors (alignment
heads and BiT-C's projections), config.yaml, selection.json, shards.json (features, tokens and teachers), and last of
all checkpoint.json, which makes it complete. `latest` names the newest complete one, `best` the one with the lowest
validation loss. A tag is never written twice.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import Config
from ..config_file import load_config, save_config, settings_that_differ
from ..data.index import Index
from ..errors import UserError
from ..files import flush, write_atomically
from ..probing.schedule import LayerChoice
from ..ranks import first_failure
from ..seeds import derive_seed
from ..zero.ema import Ema
from ..zero.masters import full_weights
from ..zero.recut import FOLDER as UNIVERSAL
from ..zero.recut import load_recut, whole_tensors
from ..zero.state_files import layout, load_engine, save_engine, step_counters, tensors_only
from .upload import Mirror
from .weights import MARKER, checkpoints, marker


class _Writer:
    """Writes files and keeps this rank's first failure. What fails must not leave the others waiting in a collective,
    so a rank that cannot write goes on, without writing, to the place where all ranks ask."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.failure: str | None = None

    def __call__(self, write: Callable[..., object], *args, **kwargs) -> None:
        if self.failure is None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self.failure = f"{reason}; {_free_mib(self.folder)} MiB free"


@dataclass
class Checkpoints:
    """The checkpoints folder of one run, seen from one rank. say: prints a line on rank 0."""

    folder: Path
    rank: int
    world: int
    config: Config
    index: Index
    say: Callable[[str], object]
    score: float | None = None  # the newest validation flow loss
    mirror: Mirror | None = None

    def __post_init__(self) -> None:
        if self.config.train.copy_to is None:
            return
        failure = None
        if self.rank == 0:
            try:
                self.mirror = Mirror(self.folder.parent, self.config.train.copy_to, self.config.run.id, self.say)
            except UserError as error:
                failure = str(error)
        if (failure := first_failure(failure)) is not None:
            raise UserError(failure)

    def clean(self) -> None:
        """Remove what an interrupted save left behind."""
        if self.rank == 0 and self.folder.is_dir():
            for path in self.folder.iterdir():
                if _is_ours(path) and not (path / MARKER).is_file():
                    shutil.rmtree(path)
        dist.barrier()

    def save(self, engine, ema: Ema, choice: LayerChoice, step: int, *, must: bool) -> bool:
        """Write a complete checkpoint, then point `latest` and `best` at it and drop the oldest. Every rank must call
        it.

        A save that fails, on a full disk for one, leaves everything as it was: False, and training goes on until the
        next. Raises UserError instead when it `must` succeed, because none comes after it.
        """
        tag = self._new_tag(step)
        path = self.folder / tag
        writes = _Writer(self.folder)
        if self.rank == 0:
            writes(path.mkdir, parents=True)
        if (failure := first_failure(writes.failure)) is None:
            self._write_files(writes, path, engine, ema, choice)
            failure = first_failure(writes.failure)
        if failure is None:
            if self.rank == 0:
                writes(self._complete, path, step, engine)
            failure = first_failure(writes.failure)
        if failure is not None:
            self._gave_up(path, failure, must)
            return False
        if self.rank == 0:
            self._rotate()
            if self.mirror is not None:
                self.mirror.update()
        dist.barrier()
        return True

    def _write_files(self, writes: _Writer, path: Path, engine, ema: Ema, choice: LayerChoice) -> None:
        save_engine(engine, path, writes)
        writes(save_file, _random_state(), path / f"rank{self.rank}.safetensors")
        state = {"choice": choice.state_dict(), "engine": step_counters(engine), "ema_updates": ema.updates}
        weights = full_weights(engine)
        if self.rank == 0:
            writes(torch.save, state, path / "state.pt")
            writes(save_file, weights, path / "model.safetensors")
        del weights  # two whole models at once are too many
        with ema.applied():
            averaged = full_weights(engine)
        if self.rank == 0:
            writes(save_file, averaged, path / "ema.safetensors")
            writes(save_file, choice.aligner.export(), path / "heads.safetensors")
            writes(save_config, self.config, path / "config.yaml")
            writes((path / "shards.json").write_text, json.dumps(_trained_on(self.index), indent=1))
            if choice.aligner.selection is not None:
                writes(choice.aligner.selection.save, path / "selection.json")

    def _complete(self, path: Path, step: int, engine) -> None:
        """The marker, `latest` and `best`, in the order that a crash between them may cut."""
        for file in path.iterdir():
            flush(file)
        # Rotation goes by this order: a clock that was set back must not make the newest the oldest.
        saved = max([time.time_ns(), *(marker(older)["saved"] + 1 for older in checkpoints(self.folder))])
        facts = {"step": step, "saved": saved, "run": self.config.run.id, "val/flow_loss": self.score}
        facts |= {"shards": _identity(self.index), "layout": layout(engine, self.world)}
        facts["files"] = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        write_atomically(path / MARKER, json.dumps(facts, indent=1))
        write_atomically(self.folder / "latest", path.name)
        if best := self._best():
            write_atomically(self.folder / "best", best[0].name)

    def _gave_up(self, path: Path, failure: str, must: bool) -> None:
        if self.rank == 0:
            _remove(path)
        dist.barrier()
        line = f"{path} could not be saved ({failure}): make room"
        if must:
            raise UserError(f"{line}, then --resume latest goes on from the checkpoint before")
        self.say(f"{line}; training goes on, and the next save tries again")

    def load(self, path: Path, engine, ema: Ema, choice: LayerChoice) -> int:
        """Continue from a checkpoint of this run, saved on any number of ranks at any ZeRO stage; returns its step.
        Raises UserError when it does not fit this run."""
        facts = marker(path)
        if facts["run"] != self.config.run.id:
            raise UserError(
                f"{path} is a checkpoint of another run: --resume takes only the run's own; "
                f"train.start_from={path} begins a new run with its weights"
            )
        self._check_settings(path)
        if facts["shards"] != _identity(self.index):
            raise UserError(f"{path} was trained on other shards than those in {self.index.folder}: set data.path")
        with tensors_only(path):
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        if facts["layout"] == layout(engine, self.world):
            load_engine(engine, path)
        else:
            load_recut(engine, path, facts["layout"]["stage"], state["engine"], self.say)
        ema.load(whole_tensors(path / "ema.safetensors"), state["ema_updates"])
        choice.load_state_dict(state["choice"])
        self.score = facts["val/flow_loss"]
        _restore_random_state(path, self.rank, derive_seed(self.config.run.seed, facts["step"], self.rank))
        return facts["step"]

    def close(self) -> None:
        """Wait for the copy that is under way."""
        if self.mirror is not None:
            self.mirror.close()

    def _check_settings(self, path: Path) -> None:
        for name, saved, value in settings_that_differ(load_config(path / "config.yaml"), self.config):
            what = "another architecture: " if name.startswith("model.") else ""
            raise UserError(
                f"{path}: {what}{name} is {saved} there and {value} in this run: leave it as it was, or start a new run"
            )

    def _new_tag(self, step: int) -> str:
        tag, number = f"step{step:08d}", 1
        while (self.folder / tag).exists():
            number += 1
            tag = f"step{step:08d}-{number}"
        dist.barrier()  # nobody creates the folder before everybody has looked
        return tag

    def _best(self) -> list[Path]:
        """The train.keep_best checkpoints with the lowest validation loss, the lowest first; of equals, which rest on
        the same validation, the one that was saved next after it."""
        scored = [(marker(path)["val/flow_loss"], path) for path in self._ours()]
        scored = [(score, path) for score, path in scored if score is not None and score == score]
        ranked = sorted(scored, key=lambda one: one[0])  # stable: earlier saves first
        return [path for _, path in ranked[: self.config.train.keep_best]]

    def _ours(self) -> list[Path]:
        return [path for path in checkpoints(self.folder) if _is_ours(path)]

    def _rotate(self) -> None:
        """Drop old checkpoints, and the universal ones that led to this one."""
        ours = self._ours()
        kept = [*ours[-self.config.train.keep :], *self._best()]
        for path in ours:
            busy = self.mirror is not None and self.mirror.copying == path.name
            if path not in kept and not busy:
                _remove(path)
            shutil.rmtree(path / UNIVERSAL, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    """Whether a save made the folder: a copy that somebody put beside it, or a link, is not ours to remove."""
    return re.fullmatch(r"step\d{8,}(-\d+)?", path.name) is not None and path.is_dir() and not path.is_symlink()


def _free_mib(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20


def _remove(path: Path) -> None:
    """The marker first: a part of a checkpoint must never look complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _trained_on(index: Index) -> dict:
    """Features, tokens and the teachers in use; the shards may hold others, also later."""
    domains = {}
    for domain in index.domains:
        entry, name = index.content["domains"][domain], index.teacher(domain).name
        teacher = {key: value for key, value in entry["teachers"][name].items() if key != "files"}
        kept = {key: value for key, value in entry.items() if key != "teachers"}
        domains[domain] = kept | {"teacher": {"name": name} | teacher}
    return {"mel": {"mean": index.mel_mean, "std": index.mel_std}, "features": index.features, "domains": domains}


def _identity(index: Index) -> str:
    """SHA-256 over the checksums of the shards and what they were made with."""
    files = [(shard["file"], shard["sha256"]) for shard in index.content["shards"]]
    for domain in index.domains:
        sidecars = index.content["domains"][domain]["teachers"][index.teacher(domain).name]["files"] or {}
        files += [(sidecar["file"], sidecar["sha256"]) for sidecar in sidecars.values()]
    return hashlib.sha256(json.dumps([files, _trained_on(index)], sort_keys=True).encode()).hexdigest()


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(path: Path, rank: int, seed: int) -> None:
    """This rank's, which dropout draws from; a rank that was not there at the save gets one from `seed`."""
    torch.manual_seed(seed)
    file = path / f"rank{rank}.safetensors"
    if file.is_file():
        state = load_file(file)
        torch.set_rng_state(state["cpu_rng"])
        if torch.cuda.is_available() and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"])
