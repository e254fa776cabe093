"""Checkpoints of a run: everything that a resume needs, and the weights as safetensors for everybody else.

checkpoints/<tag>/ holds DeepSpeed's files (model, optimizer), state.pt (schedule, heads, selection, probes),
rank<r>.safetensors (random state), model.safetensors and ema.safetensors (whole, fp32), heads.safetensors (alignment
heads and BiT-C's projections), config.yaml, selection.json, shards.json (features, tokens and teachers), and last of
all checkpoint.json, which makes it complete. `latest` names the newest complete one, `best` the one with the lowest
validation loss. A tag is never written twice.
"""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ..config import Config
from ..config_file import save_config
from ..data.index import Index
from ..errors import UserError, one_line
from ..files import flush, write_atomically
from ..probing.schedule import LayerChoice
from ..ranks import AgreedError, first_failure, from_rank_0, on_rank_0
from ..tensor_files import save_tensors
from ..zero.ema import Ema
from ..zero.masters import full_weights
from ..zero.state_files import layout, save_engine, step_counters
from .find import MARKER, complete_checkpoints
from .random_state import random_state, rank_file
from .retention import best_checkpoints, remove_checkpoint, remove_interrupted, remove_old
from .shard_facts import shard_facts, shard_hash
from .upload import Mirror


@dataclass
class Checkpoints:
    """The checkpoints folder of one run, seen from one rank. say: prints a line on rank 0."""

    folder: Path
    rank: int
    world: int
    config: Config
    index: Index
    say: Callable[[str], object]
    generation: int = 0  # of the run, see find.generation_of
    score: float | None = None  # the newest validation flow loss
    mirror: Mirror | None = None  # on rank 0, with train.copy_to

    def __post_init__(self) -> None:
        if self.config.train.copy_to is not None:
            on_rank_0(self._open_mirror)

    def remove_interrupted(self) -> None:
        """Remove the remains of a save that was cut short. Every rank must call it, before the first save."""
        on_rank_0(lambda: remove_interrupted(self.folder))

    def save(self, engine, ema: Ema, choice: LayerChoice, step: int, *, must_succeed: bool) -> bool:
        """Write a complete checkpoint, point `latest` and `best` at it and remove old ones. Every rank must call it.

        A save that fails, on a full disk for one, leaves everything as it was and returns False: training goes on until
        the next. Raises UserError instead if it `must_succeed`, because no other save follows.
        """
        write = _Writer(self.folder)
        path, failure = from_rank_0(lambda: self._new_folder(write, step))
        if failure is None:
            self._write_files(write, path, engine, ema, choice)
            failure = first_failure(write.failure)
        if failure is None:
            if self.rank == 0:
                write(self._complete, path, step, engine)
            failure = first_failure(write.failure)
        if failure is not None:
            self._give_up(path, failure, must_succeed)
            return False
        if self.rank == 0:
            self._remove_old()
            self.continue_copy()
        dist.barrier()
        return True

    @property
    def validated_on(self) -> dict:
        """The settings that a validation loss depends on: losses of others do not compare. A resume may change them."""
        return {"clips": self.config.eval.clips, "times": self.config.eval.times}

    def close(self) -> None:
        """Wait for the copy that is under way."""
        if self.mirror is not None:
            self.mirror.close()

    def continue_copy(self) -> None:
        """Copy in the background whatever the copy lacks: a run that was stopped or killed has not waited for it."""
        if self.mirror is not None:
            self.mirror.update()

    def leave_copy(self) -> None:
        """Let `close` wait for no copy. A scheduler kills a run that is not gone soon after its signal."""
        if self.mirror is not None:
            self.mirror.leave()
            self.mirror = None

    def _open_mirror(self) -> None:
        self.mirror = Mirror(self.folder.parent, self.config.train.copy_to, self.config.run.id, self.say)

    def _new_folder(self, write: "_Writer", step: int) -> tuple[Path, str | None]:
        """Make the folder of a save, which no save has had. Return it, and why it could not be made. Only rank 0 looks:
        on a network file system the others would remember for a while that it was missing."""
        path, number = self.folder / f"step{step:08d}", 1
        while path.exists():
            number += 1
            path = self.folder / f"step{step:08d}-{number}"
        write(path.mkdir, parents=True)
        return path, write.failure

    def _write_files(self, write: "_Writer", path: Path, engine, ema: Ema, choice: LayerChoice) -> None:
        save_engine(engine, path, write)
        write(save_tensors, random_state(), path / rank_file(self.rank))
        state = {"choice": choice.state_dict(), "engine": step_counters(engine), "ema_updates": ema.updates}
        weights = full_weights(engine)
        if self.rank == 0:
            write(torch.save, state, path / "state.pt")
            write(save_tensors, weights, path / "model.safetensors")
        del weights  # two whole models at once are too many
        with ema.applied():
            averaged = full_weights(engine)
        if self.rank == 0:
            write(save_tensors, averaged, path / "ema.safetensors")
            write(save_tensors, choice.aligner.export(), path / "heads.safetensors")
            write(save_config, self.config, path / "config.yaml")
            write((path / "shards.json").write_text, json.dumps(shard_facts(self.index), indent=1))
            if choice.aligner.selection is not None:
                write(choice.aligner.selection.save, path / "selection.json")

    def _complete(self, path: Path, step: int, engine) -> None:
        """Write the marker, then `latest`, then `best`: after a crash between them, the older names are right. Raises
        UserError, before the marker, if the files of a rank are missing."""
        for name in (rank_file(rank) for rank in range(self.world)):
            if not (path / name).is_file():
                raise UserError(f"{name} is missing: run.dir has to be on storage that all nodes share")
        for file in path.iterdir():
            flush(file)
        # Rotation goes by this order: a clock that was set back must not make the newest the oldest.
        saved = max([time.time_ns(), *(older["saved"] + 1 for older in complete_checkpoints(self.folder).values())])
        facts = {"step": step, "saved": saved, "run": self.config.run.id, "val/flow_loss": self.score}
        facts |= {"validated_on": self.validated_on, "generation": self.generation}
        facts |= {"shards": shard_hash(self.index), "layout": layout(engine, self.world)}
        facts["files"] = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        write_atomically(path / MARKER, json.dumps(facts, indent=1))
        write_atomically(self.folder / "latest", path.name)
        if best := best_checkpoints(self.folder, self.config.train.keep_best, self.validated_on):
            write_atomically(self.folder / "best", best[0].name)
        else:  # that of another train.keep_best would name one that goes
            (self.folder / "best").unlink(missing_ok=True)

    def _remove_old(self) -> None:
        """Remove old checkpoints. A failure is only printed: the save before it is complete, and the ranks wait."""
        train, copying = self.config.train, self.mirror.copying if self.mirror is not None else None
        try:
            remove_old(self.folder, train.keep, train.keep_best, self.validated_on, copying)
        except (UserError, OSError) as error:
            self.say(f"old checkpoints in {self.folder} stay until the next save ({one_line(error)})")

    def _give_up(self, path: Path, failure: str, must_succeed: bool) -> None:
        if self.rank == 0:
            with suppress(OSError):  # of a disk that is gone, too; the next start removes a part that stays
                remove_checkpoint(path)
        dist.barrier()
        line = f"{path} could not be saved: {failure}"
        if must_succeed:
            raise AgreedError(f"{line}, then --resume latest goes on from the checkpoint before")
        self.say(f"{line}; training goes on, and the next save tries again")


class _Writer:
    """Calls functions that write files, until one fails, and keeps the failure. A rank that cannot write still comes to
    every collective of the save: it must not leave the others waiting."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.failure: str | None = None

    def __call__(self, write: Callable[..., object], *args, **kwargs) -> None:
        if self.failure is None:
            try:
                write(*args, **kwargs)
            except UserError as error:
                self.failure = str(error)
            except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
                self.failure = f"{one_line(error)} ({_free_mib(self.folder)} MiB free): make room"


def _free_mib(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free >> 20
