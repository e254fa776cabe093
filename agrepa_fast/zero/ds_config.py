"""Read a ds_config, check it against the run, and fill in its "auto" values."""

import json
import math

import torch

from ..config import PRESETS, TrainConfig
from ..data.layout import BatchLayout
from ..errors import UserError, nearest
from ..files import local_path, read_text
from .ds_sections import PASSED, check_objects

_FLAGS = (
    *("prescale_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather"),
    *("memory_breakdown", "dump_state"),
)
_POSITIVE = {  # of each section, "" for none: DeepSpeed divides by them
    "": ("steps_per_print", "gradient_predivide_factor"),
    "zero_optimization": ("reduce_bucket_size", "allgather_bucket_size", "sub_group_size"),
}
_IN_BF16 = "averaged weights would hardly move: masters and averages are fp32"
_REFUSED = {  # section, name and value of what DeepSpeed takes -> why a run does not
    ("bf16", "check_grad_overflow", False): "steps that are not finite must be left out",
    ("bf16", "bf16_master_weights_and_grads", True): _IN_BF16,
    ("bf16", "bf16_optimizer_states", True): _IN_BF16,
    ("fp16", "auto_cast", True): "inputs would be rounded to fp16",
    ("zero_optimization", "compute_grad_norm", False): (
        "the norm shows which steps are not finite, and gradients are clipped by it"
    ),
    ("zero_optimization", "elastic_checkpoint", True): (
        "no run could be resumed from its checkpoints; those without it are for other ranks, too"
    ),
    ("zero_optimization", "load_from_fp32_weights", False): "a resumed run would begin at rounded weights",
    ("offload_optimizer", "super_offload", True): "DeepSpeed's own Adam would take the place of train.optimizer",
}
_TRUE = ("true", "1", "on", "yes", "t", "y")  # to DeepSpeed
_TYPES = ("fp32", "fp16", "bf16", "float32", "float16", "bfloat16", "float", "half")
_NEVER = 2**62  # steps between DeepSpeed's own progress lines: the run has a bar


def find_ds_config(name: str) -> dict:
    """Return the content of a ds_config: a JSON file, or one of the presets by its name. Raises UserError if there is
    none, or if it is no JSON object, has a name twice, or a number that is not finite."""
    path = local_path(name)
    if not path.is_file():
        path = PRESETS / name
        if not path.is_file():
            known = [preset.name for preset in PRESETS.glob("*.json")]
            raise UserError(f"--ds_config {name}: no such file, and no such preset; {nearest(name, known)}")
    try:
        checks = {"parse_constant": _finite, "parse_float": _finite, "object_pairs_hook": _without_repeats}
        values = json.loads(read_text(path), **checks)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--ds_config {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"--ds_config {path}: a JSON object is wanted, not {type(values).__name__}")
    return values


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    """Return an object of pairs. json would take the last of two values of one name, without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return values


def resolve_ds_config(values: dict, train: TrainConfig, layout: BatchLayout, device: torch.device) -> dict:
    """Return the ds_config with "auto" and absent values filled in from the run. values: what `adopt_sections` passes.
    Raises UserError for a value that contradicts the run."""
    if others := [section for section in values if section not in PASSED]:
        raise UserError(f'ds_config "{others[0]}" is not passed on to DeepSpeed: call adopt_sections first')
    _check_sections(values, train)
    resolved = dict(values)
    wanted = {
        "train_micro_batch_size_per_gpu": (layout.micro_batch, "train.batch_clips"),
        "gradient_accumulation_steps": (layout.accumulation, "train.accumulation"),
        "train_batch_size": (layout.micro_batch * layout.parts, "train.batch_clips"),
        "gradient_clipping": (train.clip_norm, "train.clip_norm"),
    }
    for name, (value, ours) in wanted.items():
        given = values.get(name, "auto")
        if given not in ("auto", value):
            raise UserError(f'ds_config "{name}": {given} contradicts the run\'s {value}: use "auto" or change {ours}')
        resolved[name] = value
    resolved["bf16"] = {**values.get("bf16", {}), "enabled": _bf16(values, train, device)}
    resolved.setdefault("steps_per_print", _NEVER)
    # DeepSpeed's throughput timer synchronises the GPU in each forward: no forward could then be captured as a graph.
    resolved["timers"] = {"throughput": {"enabled": False}}
    if offloads_optimizer(values):
        # torch's AdamW has a fused kernel for the CPU, and needs no compiler.
        resolved["zero_force_ds_cpu_optimizer"] = False
    return resolved


def precision(train: TrainConfig, device: torch.device) -> str:
    """Return fp32 or bf16: `auto` is bf16 on GPUs that compute in it (Ampere and later), and fp32 on a CPU, where a new
    run has chosen before."""
    if train.precision != "auto":
        return train.precision
    return "bf16" if device.type == "cuda" and _computes_in_bf16() else "fp32"


def _computes_in_bf16() -> bool:
    """Return whether the current GPU computes in bf16. On a machine without a GPU, settings for one are checked as
    if it did."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)


def zero_stage(ds_config: dict) -> int:
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def offloads_optimizer(ds_config: dict) -> bool:
    return _offloads(ds_config, "offload_optimizer")


def _check_sections(values: dict, train: TrainConfig) -> None:
    """Raise UserError for a value that no run can have."""
    check_objects(values)
    for name in _FLAGS:
        if (value := values.get(name, "auto")) != "auto" and not isinstance(value, bool):
            raise UserError(f'ds_config "{name}": {_json(value)}: true or false is wanted')
    _check_types(values)
    stage = zero_stage(values)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f'ds_config "zero_optimization": stage {_json(stage)} is unknown: 0, 1, 2 or 3')
    for section, names in _POSITIVE.items():
        content = values.get(section, {}) if section else values
        for name in names:
            value = content.get(name, "auto")
            if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                where = f"{section}.{name}" if section else name
                raise UserError(f'ds_config "{where}": {_json(value)}: a number above 0 is wanted; remove it otherwise')
    if train.compile and stage == 3:
        raise UserError(
            "train.compile: ZeRO-3 gathers weights inside a block, which cannot be compiled: use stage 0, 1 or 2"
        )
    offload = values.get("zero_optimization", {}).get("offload_optimizer")
    sections = {**values, "offload_optimizer": offload if isinstance(offload, dict) else {}}
    for (section, name, value), reason in _REFUSED.items():
        if sections.get(section, {}).get(name, not value) is not (not value):  # DeepSpeed takes 1 and "true", too
            raise UserError(f'ds_config "{section}": remove {name}, {reason}')
    if str(values.get("fp16", {}).get("enabled")).lower() in _TRUE:
        raise UserError('ds_config "fp16": this engine trains in bf16 or fp32; remove it and set train.precision')
    for section in ("offload_optimizer", "offload_param"):
        if _offloads(values, section) and stage == 0:
            raise UserError(f'ds_config "{section}": at stage 0 every GPU keeps everything: use stage 1, 2 or 3')


def _bf16(values: dict, train: TrainConfig, device: torch.device) -> bool:
    """Whether the run is in bf16. Raises UserError if the ds_config says otherwise, or the GPU cannot."""
    bf16 = precision(train, device) == "bf16"
    if bf16 and device.type == "cuda" and not _computes_in_bf16():
        raise UserError(f"{torch.cuda.get_device_name()} does not compute in bf16: set train.precision=fp32")
    given = values.get("bf16", {}).get("enabled", "auto")
    if given not in ("auto", bf16):
        raise UserError(
            f'ds_config "bf16": enabled={str(given).lower()} contradicts {"bf16" if bf16 else "fp32"} on '
            f'{device.type}: use "auto", or set train.precision={"bf16" if given else "fp32"}'
        )
    return bf16


def _check_types(values: dict) -> None:
    """Raise UserError for a data type that DeepSpeed does not know; it would say so without the field."""
    given = {"communication_data_type": values.get("communication_data_type")}
    types = values.get("data_types", {})
    given |= {f"data_types.{name}": types.get(name) for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype")}
    for name, value in given.items():
        if value is not None and str(value).lower() not in ("auto", *_TYPES):
            raise UserError(f'ds_config "{name}": {_json(value)}: fp32, fp16 or bf16 is wanted')


def _json(value: object) -> str:
    return json.dumps(value)[:80]


def _offloads(ds_config: dict, section: str) -> bool:
    """Whether the section asks for the host's memory. Raises UserError for any other device."""
    offload = ds_config.get("zero_optimization", {}).get(section) or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu"):
        raise UserError(f'ds_config "{section}": device {device!r} is not supported: cpu, or none')
    return device == "cpu"
