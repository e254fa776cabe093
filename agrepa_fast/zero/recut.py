"""Resuming with other ranks or another ZeRO stage: whole tensors by name, cut to the part that this rank holds.

Weights and averages are whole in the checkpoint's safetensors. Adam's moments are in DeepSpeed's files, one per rank:
on the first resume that needs it, rank 0 makes a universal checkpoint of them, <tag>/universal/. DeepSpeed's own reader
of those cannot change the stage. Here the moments of every stage are written into the masters of any other, and copied
from there into the optimizer's state.
"""

import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from ..errors import UserError
from ..ranks import on_rank_0
from ..tensor_files import open_tensors
from .construction import whole_shape
from .masters import (
    WholeTensors,
    master_parameters,
    publish_masters,
    trained_parameters,
    write_masters,
    write_untrained,
)
from .optimizers import optimizer_inside
from .state_files import plain_path, tensors_only

MOMENTS = ("exp_avg", "exp_avg_sq")
FOLDER = "universal"


def whole_tensors(file: Path) -> WholeTensors:
    """Return a function that reads one tensor of a safetensors file by its name."""
    return open_tensors(file, "take another checkpoint").get_tensor


def load_recut(engine, path: Path, stage: int, counters: dict, say: Callable[[str], object]) -> None:
    """Continue from a checkpoint that was saved at `stage` on any ranks, in any precision, offloaded or not. Every rank
    must call it.

    counters: those of `step_counters` at the save. Raises UserError if DeepSpeed's files cannot be converted.
    """
    moments = _whole_moments(engine, path, stage, counters["updates"], say)
    parts = {key: write_masters(engine, lambda name, key=key: moments(name, key)) for key in MOMENTS}
    weights = whole_tensors(path / "model.safetensors")
    write_masters(engine, weights)
    write_untrained(engine.module, weights)
    optimizer = optimizer_inside(engine)
    for number, parameter in enumerate(master_parameters(engine)):
        optimizer.set_state(parameter, {key: parts[key][number] for key in MOMENTS}, counters["updates"])
    publish_masters(engine)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, counters[name])
    engine.lr_scheduler.load_state_dict(counters["schedule"])
    for group, lr in zip(optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def _whole_moments(engine, path: Path, stage: int, updates: int, say) -> Callable[[str, str], torch.Tensor]:
    """Return a function (parameter's name, exp_avg or exp_avg_sq) -> the whole moment."""
    shapes = {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}
    if updates == 0:  # DeepSpeed's files have no moments yet
        return lambda name, key: torch.zeros(shapes[name])
    if stage == 0:  # already whole, in the model's order; Muon's matrices have no exp_avg_sq
        file = path / "mp_rank_00_model_states.pt"
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["optimizer"]
        states = saved.get("optimizer_state_dict", saved)["state"]
        numbers = {name: number for number, (name, _) in enumerate(trained_parameters(engine.module))}

        def find(name: str, key: str) -> torch.Tensor:
            state = states[numbers[name]]
            return state[key] if key in state else torch.zeros(shapes[name])

        return find
    folder = path / FOLDER

    def convert() -> None:  # the other ranks of a network file system would remember that the folder was missing
        if not folder.is_dir():
            say(f"{path}: converting the optimizer's state for other ranks or another ZeRO stage")
            _convert(path, folder)

    on_rank_0(convert)

    def read(name: str, key: str) -> torch.Tensor:
        value = torch.load(folder / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True)
        return (value["param"] if isinstance(value, dict) else value).reshape(shapes[name])

    return read


def _convert(path: Path, folder: Path) -> None:
    """Make the universal checkpoint, complete or not at all. Raises UserError for any error of DeepSpeed's."""
    from deepspeed.checkpoint.ds_to_universal import main

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    options = {"strict": True, "keep_temp_folder": False, "num_extract_workers": 1, "num_merge_workers": 1}
    printed = StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), tensors_only(path), plain_path(path) as plain:
            folders = {"input_folder": str(plain), "output_folder": str(plain / part.name)}
            main(Namespace(**folders, **options, inject_missing_state=True))
        (path / "latest_universal").unlink()
        part.rename(folder)
    except Exception as error:  # a rank that dies of it leaves the others waiting
        shutil.rmtree(part, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be converted ({reason}): resume with the ranks and the ds_config that it was saved with"
        ) from error
