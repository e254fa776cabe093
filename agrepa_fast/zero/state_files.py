"""DeepSpeed's own files of a checkpoint: weights, masters and moments as its engine holds them, one set per rank."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory

import torch

from ..errors import UserError
from .lean_step import detach_fragments
from .optimizers import optimizer_inside

# In messages of torch.load about files that are no archives, or half of one.
_DAMAGE = (
    "PytorchStreamReader",
    "mmap can only be used",
    "central directory",
    "invalid load key",
    "Unsupported operand",
)


def layout(engine, ranks: int) -> dict:
    """Return the settings that DeepSpeed's files depend on. An engine of the same layout reads them again; any other
    takes whole tensors (recut.py)."""
    precision = "bf16" if engine.bfloat16_enabled() else "fp32"
    settings = {"ranks": ranks, "stage": engine.zero_optimization_stage(), "precision": precision}
    return settings | {"zero_optimization": engine.config.get("zero_optimization", {})}


def save_engine(engine, path: Path, write: Callable[..., object]) -> None:
    """Write DeepSpeed's files into the folder `path`. Every rank must call it. write(function, *args): calls the
    function, or leaves it out; DeepSpeed's own writer raises on one rank while the others wait for it."""
    files, save, copy_scripts = engine.checkpoint_engine, engine.checkpoint_engine.save, engine._copy_recovery_script
    files.save = lambda *args, **kwargs: write(save, *args, **kwargs)
    engine._copy_recovery_script = lambda path: None  # scripts that unpickle; model.safetensors is there
    try:
        engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)
    finally:
        files.save, engine._copy_recovery_script = save, copy_scripts


def load_engine(engine, path: Path) -> None:
    """Load DeepSpeed's files from the folder `path`, written by an engine of the same layout. Every rank must call it.
    Raises UserError where a file holds more than tensors and numbers."""
    with tensors_only(path), plain_path(path) as plain:
        engine.load_checkpoint(str(plain.parent), tag=plain.name)
    detach_fragments(engine)  # loading has made them again


def step_counters(engine) -> dict:
    """Return what an engine counts, the same on every rank: steps, clips, and the place in the schedule."""
    steps = [state["step"] for state in optimizer_inside(engine).state.values() if "step" in state]
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "updates": int(torch.stack(steps).max()) if steps else 0,
        "schedule": engine.lr_scheduler.state_dict(),
    }


def _stage_by_name(owner, name: str):
    """Return a ZeRO stage by name, in place of the `getattr(enum, name)` that Python 3.11.2 (Debian 12) pickles for a
    member of an enum. Raises UnpicklingError for anything else."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if owner is ZeroStageEnum and name in ZeroStageEnum.__members__:
        return ZeroStageEnum[name]
    raise UnpicklingError(f"getattr({owner}, {name!r}) is no ZeRO stage")


@contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """Give a folder a path of letters, a link if its own has others: DeepSpeed takes brackets, plus signs and the like
    for a pattern."""
    if re.fullmatch(r"[\w/.-]+", str(path.absolute())):
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, "checkpoint")
        link.symlink_to(path.absolute())
        yield link


@contextmanager
def tensors_only(path: Path) -> Iterator[None]:
    """Inside, DeepSpeed reads tensors, numbers and three classes of its own, and runs no pickled code. Raises UserError
    where a file of the checkpoint `path` holds more."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    # DeepSpeed passes weights_only=False at a dozen places; only torch's own variable overrules an explicit argument.
    # torch raises if its opposite is set as well.
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = {of: os.environ.pop(of, None) for of in (name, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")}
    os.environ[name] = "1"
    try:
        classes = [LossScaler, ZeroStageEnum, fragment_address, (_stage_by_name, "builtins.getattr")]
        with torch.serialization.safe_globals(classes):
            yield
    except (UnpicklingError, RuntimeError, EOFError) as error:
        text = " ".join(str(error).split()) or "empty"
        if isinstance(error, EOFError) or any(sign in text for sign in _DAMAGE):
            raise UserError(f"{path} is damaged ({text[:120]}): take another checkpoint") from error
        if isinstance(error, RuntimeError):
            raise
        raise UserError(
            f"{path} holds more than numbers, and was not loaded: no run of agrepa_fast wrote it"
        ) from error
    finally:
        del os.environ[name]
        os.environ.update({of: value for of, value in before.items() if value is not None})
