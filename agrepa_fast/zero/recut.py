"""Resuming with other ranks or another ZeRO stage: whole tensors by name, cut to what this rank holds.

Weights and averages are whole in the checkpoint's safetensors. Adam's moments are in DeepSpeed's files, one a rank:
rank 0 makes a universal checkpoint of them, <tag>/universal/, on the first resume that needs it. DeepSpeed's own reader
of those does not change stages; here every stage takes its part from every other's, through one way in, the masters.
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist

from ..errors import UserError
from ..ranks import on_rank_0
from .construction import whole_shape
from .masters import master_parameters, masters, publish_masters

Whole = Callable[[str], torch.Tensor]  # name of a parameter -> its whole tensor, fp32 on the CPU
MOMENTS = ("exp_avg", "exp_avg_sq")
FOLDER = "universal"


@contextmanager
def without_pickle(path: Path) -> Iterator[None]:
    """DeepSpeed reads its files with weights_only=False; inside, torch overrules it: tensors, numbers and these three
    classes, nothing else. UserError where a file of the checkpoint `path` holds more."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than numbers, and was not loaded: no run of agrepa_fast wrote it"
        ) from error
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def whole_file(file: Path) -> Whole:
    """The tensors of a safetensors file, read one at a time."""
    from safetensors import safe_open

    return safe_open(file, "pt").get_tensor


@torch.no_grad()
def cut(engine, whole: Whole) -> list[torch.Tensor]:
    """This rank's part of whole tensors, laid out as masters(engine), whose values are lost."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        for (name, _), master in zip(engine.module.named_parameters(), masters(engine), strict=True):
            master.copy_(whole(name))
        return [master.clone() for master in masters(engine)]
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in engine.module.named_parameters():
        if stage < 3:
            safe_set_full_fp32_param(parameter, whole(name))
        else:  # by part: DeepSpeed's way with whole ones fails where ranks do not divide a parameter
            size = parameter.ds_tensor.numel()
            flat = whole(name).flatten()
            padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
            safe_set_local_fp32_param(parameter, padded[size * dist.get_rank() :][:size])
    return [master.clone() for master in masters(engine)]


def counters(engine) -> dict:
    """What an engine counts, the same on every rank."""
    states = _base_optimizer(engine).state
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "updates": max((int(state["step"]) for state in states.values() if "step" in state), default=0),
        "schedule": engine.lr_scheduler.state_dict(),
    }


def load_recut(engine, path: Path, stage: int, counted: dict, say: Callable[[str], object]) -> None:
    """Continue from a checkpoint of `stage`, whatever its ranks, precision or offloading were. Every rank must call it.

    counted: what `counters` returned at the save. Raises UserError when DeepSpeed's files cannot be converted.
    """
    moments = _moments(engine, path, stage, say)
    parts = {key: cut(engine, lambda name, key=key: moments(name, key)) for key in MOMENTS}
    cut(engine, whole_file(path / "model.safetensors"))
    optimizer = _base_optimizer(engine)
    for number, parameter in enumerate(master_parameters(engine)):
        state = optimizer.state[parameter]
        state.update({key: parts[key][number] for key in MOMENTS})
        state["step"] = _step(optimizer, parameter, counted["updates"])
    publish_masters(engine)
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, counted[name])
    engine.lr_scheduler.load_state_dict(counted["schedule"])
    for group, lr in zip(optimizer.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def _base_optimizer(engine):
    """The AdamW inside DeepSpeed's optimizer; at stage 0 in fp32 there is nothing round it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _step(optimizer, parameter: torch.Tensor, updates: int) -> torch.Tensor | int:
    """The count of updates as the optimizer keeps it: a tensor in torch's, on the device where its kernel reads it."""
    if not isinstance(optimizer, torch.optim.Optimizer) or "fused" not in optimizer.defaults:
        return updates
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    return torch.tensor(float(updates), device=parameter.device if on_device else "cpu")


def _moments(engine, path: Path, stage: int, say) -> Callable[[str, str], torch.Tensor]:
    """(parameter's name, exp_avg or exp_avg_sq) -> the whole moment."""
    if stage == 0:  # already whole, in the model's order
        file = path / "mp_rank_00_model_states.pt"
        saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["optimizer"]
        states = saved.get("optimizer_state_dict", saved)["state"]
        numbers = {name: number for number, (name, _) in enumerate(engine.module.named_parameters())}
        return lambda name, key: states[numbers[name]][key]
    folder = path / FOLDER
    if not folder.is_dir():
        say(f"{path}: converting the optimizer's state for other ranks or another ZeRO stage")
    on_rank_0(lambda: folder.is_dir() or _convert(path, folder))
    shapes = {name: whole_shape(parameter) for name, parameter in engine.module.named_parameters()}

    def read(name: str, key: str) -> torch.Tensor:
        value = torch.load(folder / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=True)
        return (value["param"] if isinstance(value, dict) else value).reshape(shapes[name])

    return read


def _convert(path: Path, folder: Path) -> None:
    """Make the universal checkpoint: complete or absent. Raises UserError when it fails, whatever DeepSpeed raises."""
    from deepspeed.checkpoint.ds_to_universal import main

    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    arguments = {"input_folder": str(path), "output_folder": str(part), "strict": True, "keep_temp_folder": False}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    printed = StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed), without_pickle(path):
            main(Namespace(**arguments, **workers, inject_missing_state=True))
        (path / "latest_universal").unlink()
        part.rename(folder)
    except Exception as error:  # the other ranks wait
        shutil.rmtree(part, ignore_errors=True)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be converted ({reason}): resume with the ranks and the ds_config that it was saved with"
        ) from error
