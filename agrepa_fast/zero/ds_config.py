"""Read a ds_config, check it against the run, and fill in its "auto" values."""

import json
from pathlib import Path

import torch

from ..config import PRESETS, TrainConfig
from ..data.layout import BatchLayout
from ..errors import UserError, nearest

_NEVER = 2**62  # DeepSpeed's own progress lines: the run has a bar


_OURS = {
    "optimizer": "AdamW is built from train.lr, train.betas and train.weight_decay",
    "scheduler": "the schedule is built from train.warmup_steps and train.final_lr",
}


# DeepSpeed's sections that make sense here. Of the others, some import modules that they name, or write files anywhere.
_SECTIONS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "aio"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger", "dump_state"),
)


def find_ds_config(name: str) -> dict:
    """The JSON of a ds_config: a file, or the name of one of the presets. Raises UserError when it is neither, or no
    JSON."""
    path = Path(name)
    if not path.is_file():
        path = PRESETS / name
        if not path.is_file():
            known = [preset.name for preset in PRESETS.glob("*.json")]
            raise UserError(f"--ds_config {name}: no such file, and no such preset; {nearest(name, known)}")
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--ds_config {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--ds_config {path}: a JSON object is wanted, not {type(values).__name__}")
    return values


def precision(train: TrainConfig, device: torch.device) -> str:
    """fp32 or bf16: `auto` is bf16 on GPUs and fp32 on a CPU."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if device.type == "cuda" else "fp32"


def resolve_ds_config(values: dict, train: TrainConfig, layout: BatchLayout, device: torch.device) -> dict:
    """`values` with "auto" and absent fields filled in from the run. Raises UserError where it contradicts the run."""
    for section, reason in _OURS.items():
        if section in values:
            raise UserError(f'ds_config "{section}": remove it, {reason}')
    for section in values:
        if section not in _SECTIONS:
            raise UserError(
                f'ds_config "{section}" is not among the sections that a run takes: {nearest(section, _SECTIONS)}'
            )
    for section in ("bf16", "fp16", "zero_optimization"):
        if not isinstance(values.get(section, {}), dict):
            raise UserError(
                f'ds_config "{section}": an object is wanted, such as {{"enabled": true}} or {{"stage": 2}}'
            )
    stage = zero_stage(values)
    if stage not in (0, 1, 2, 3):
        raise UserError(f'ds_config "zero_optimization": stage {stage} is unknown: 0, 1, 2 or 3')
    if train.compile and stage == 3:
        raise UserError(
            "train.compile: ZeRO-3 gathers weights inside a block, which cannot be compiled: use stage 0, 1 or 2"
        )
    bf16 = precision(train, device) == "bf16"
    if values.get("bf16", {}).get("check_grad_overflow") is False:
        raise UserError('ds_config "bf16": remove check_grad_overflow, steps that are not finite are to be left out')
    if values.get("fp16", {}).get("enabled") is True:
        raise UserError('ds_config "fp16": this engine trains in bf16 or fp32; remove it and set train.precision')
    wanted = {
        "train_micro_batch_size_per_gpu": (layout.micro_batch, "train.batch_clips"),
        "gradient_accumulation_steps": (layout.accumulation, "train.accumulation"),
        "train_batch_size": (layout.micro_batch * layout.parts, "train.batch_clips"),
        "gradient_clipping": (train.clip_norm, "train.clip_norm"),
    }
    resolved = dict(values)
    for name, (value, ours) in wanted.items():
        given = values.get(name, "auto")
        if given not in ("auto", value):
            raise UserError(f'ds_config "{name}": {given} contradicts the run\'s {value}: use "auto" or change {ours}')
        resolved[name] = value
    given = values.get("bf16", {}).get("enabled", "auto")
    if given not in ("auto", bf16):
        here = "bf16" if bf16 else "fp32"
        raise UserError(
            f'ds_config "bf16": enabled={str(given).lower()} contradicts {here} on {device.type}: '
            f'use "auto", or set train.precision={"bf16" if given else "fp32"}'
        )
    resolved["bf16"] = {**values.get("bf16", {}), "enabled": bf16}
    resolved.setdefault("steps_per_print", _NEVER)
    for section in ("offload_optimizer", "offload_param"):
        if _offloads(values, section) and stage == 0:
            raise UserError(f'ds_config "{section}": at stage 0 every GPU keeps everything: use stage 1, 2 or 3')
    if offloads_optimizer(values):
        # torch's AdamW has a fused kernel for the CPU, and needs no compiler.
        resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def offloads_optimizer(ds_config: dict) -> bool:
    return _offloads(ds_config, "offload_optimizer")


def _offloads(ds_config: dict, section: str) -> bool:
    """Whether the section asks for the host's memory. Raises UserError for any other place, or no section."""
    offload = ds_config.get("zero_optimization", {}).get(section) or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu"):
        raise UserError(f'ds_config "{section}": device {device!r} is not supported: cpu, or none')
    return device == "cpu"


def zero_stage(ds_config: dict) -> int:
    return ds_config.get("zero_optimization", {}).get("stage", 0)
