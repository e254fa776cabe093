"""The sections of a ds_config: passed on to DeepSpeed, taken as settings of the run, left out, or refused.

DeepSpeed imports modules that its configuration names, and writes where it says, and a ds_config may come from a
stranger: no section that can do so is passed on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ..config import TrainConfig
from ..errors import UserError, nearest

PASSED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "communication_data_type", "data_types", "prescale_gradients", "gradient_predivide_factor"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "disable_allgather", "aio"),
    *("steps_per_print", "memory_breakdown", "comms_logger", "dump_state"),
)
_OBJECTS = ("bf16", "fp16", "zero_optimization", "data_types", "aio", "comms_logger")
_LEFT_OUT = {  # sections that change no number of a run, and what does the same here
    "activation_checkpointing": "train.activation_checkpointing=true keeps each block's input only",
    "flops_profiler": "metrics.jsonl has train/mfu, and train.profile=[10,12] writes a trace of steps 10 to 12",
    "tensorboard": "the run's folder has its own events in tensorboard/",
    "csv_monitor": "metrics.jsonl has every number",
    "comet": "metrics.jsonl has every number, and train.wandb=PROJECT logs them to Weights & Biases",
    "checkpoint": "a run writes whole checkpoints into its folder, and resumes on other ranks and stages",
    "timers": "they wait for the GPU in each forward, and train/clips_per_s is in metrics.jsonl",
    "wall_clock_breakdown": "its timers end CUDA graphs, and train.profile=[10,12] writes a trace of steps 10 to 12",
    "pipeline": "a model without pipeline stages does not read it",
}
_REFUSED = {  # sections that change how a run trains, and the reason against them
    "amp": "this engine trains in bf16 or fp32, set train.precision",
    "torch_autocast": "this engine trains in bf16 or fp32, set train.precision",
    "autotuning": "it starts runs of other batch sizes",
    "elasticity": "the batch is train.batch_clips on any number of GPUs",
    "compression_training": "weights are neither quantised nor pruned",
    "quantize_training": "weights are neither quantised nor pruned",
    "weight_quantization": "weights are neither quantised nor pruned",
    "eigenvalue": "it steers quantisation, and weights are not quantised",
    "data_efficiency": "the order and the lengths of clips are those of data.*",
    "curriculum_learning": "the order and the lengths of clips are those of data.*",
    "progressive_layer_drop": "probes and alignment need every layer in every step",
    "sparse_attention": "attention is the model's, over all frames",
    "sparse_gradients": "gradients are dense",
    "tensor_parallel": "models are split by ZeRO alone",
    "expert_parallel": "models are split by ZeRO alone",
    "hybrid_engine": "it generates text",
}
_ADAMW_TAKEN = ("lr", "betas", "weight_decay")
_ADAMW_FIXED = {"eps": 1e-8, "bias_correction": True, "amsgrad": False, "adam_w_mode": True}
_ADAMW_IGNORED = ("torch_adam", "fused")  # other kernels, the same numbers
_SCHEDULES = {  # DeepSpeed's parameter -> setting of train; its default, None: the run's setting
    "WarmupCosineLR": {
        "total_num_steps": ("steps", None),
        "warmup_num_steps": ("warmup_steps", 1000),
        "cos_min_ratio": ("final_lr", 0.0001),
    },
    "WarmupLR": {"warmup_max_lr": ("lr", None), "warmup_num_steps": ("warmup_steps", 1000)},
}
_IMPLIED = {"WarmupCosineLR": {"lr_decay": "cosine"}, "WarmupLR": {"final_lr": 1.0}}
_SCHEDULE_FIXED = {"warmup_min_ratio": 0, "warmup_min_lr": 0, "last_batch_iteration": -1, "warmup_type": "linear"}


def check_objects(values: dict) -> None:
    """Raise UserError for a section that is no object where DeepSpeed wants one."""
    for section in _OBJECTS:
        if not isinstance(values.get(section, {}), dict):
            raise UserError(
                f'ds_config "{section}": an object is wanted, such as {{"enabled": true}} or {{"stage": 2}}'
            )


def adopt_sections(
    values: dict, train: TrainConfig, overrides: Sequence[str] = ()
) -> tuple[dict, TrainConfig, list[str]]:
    """Return the ds_config with the sections that are passed on, `train` with the settings that others set, and a line
    for the user per section that was taken or left out.

    overrides: `train.lr=…` of the command line, which a section must not contradict; it replaces a preset's settings.
    Raises UserError for a section that contradicts the run, and for an unknown one.
    """
    check_objects(values)
    passed, wanted, lines = {}, {}, []
    for section, content in values.items():
        if section in PASSED:
            passed[section] = content
        elif section in _TAKEN:
            settings, note = _TAKEN[section](content)
            _add(wanted, settings, section)
            if settings:
                taken = ", ".join(f"train.{name}={value}" for name, value in settings.items())
                lines.append(f'ds_config "{section}": taken as {taken}{note}')
        elif section in _REFUSED and _enabled(content):
            raise UserError(f'ds_config "{section}": remove it, {_REFUSED[section]}')
        elif section in _LEFT_OUT and _enabled(content):
            lines.append(f'ds_config "{section}": left out, {_LEFT_OUT[section]}')
        elif section not in _REFUSED and section not in _LEFT_OUT:
            known = (*PASSED, *_TAKEN, *_LEFT_OUT)
            raise UserError(
                f'ds_config "{section}" is not among the sections that a run takes: {nearest(section, known)}'
            )
    given = {override.partition("=")[0] for override in overrides}
    for name, (section, value) in wanted.items():
        ours = getattr(train, name)
        if f"train.{name}" in given and ours != value:
            raise UserError(
                f'ds_config "{section}" sets train.{name}={value}, the command line train.{name}={ours}: '
                "leave one of them out"
            )
    for name, (section, value) in wanted.items():
        try:
            train = replace(train, **{name: value})
        except UserError as error:
            raise UserError(f'ds_config "{section}": {error}') from error
    return passed, train, lines


def _add(wanted: dict[str, tuple[str, object]], settings: dict[str, object], section: str) -> None:
    for name, value in settings.items():
        other, before = wanted.setdefault(name, (section, value))
        if before != value:
            raise UserError(
                f'ds_config "{other}" sets train.{name}={before}, "{section}" sets {value}: leave one of them out'
            )


def _optimizer(content: object) -> tuple[dict[str, object], str]:
    kind, params = _typed(content, "optimizer")
    if str(kind).lower() == "muon":
        raise UserError(
            'ds_config "optimizer": remove it and set train.optimizer=muon, whose train.lr is that of AdamW: '
            "DeepSpeed's Muon scales updates in another way"
        )
    if str(kind).lower() not in ("adam", "adamw"):  # DeepSpeed's Adam decays as AdamW does
        raise UserError(f'ds_config "optimizer": remove it, this engine trains with AdamW or Muon, not {kind}')
    _check_names("optimizer", params, (*_ADAMW_TAKEN, *_ADAMW_FIXED, *_ADAMW_IGNORED))
    _check_fixed("optimizer", params, _ADAMW_FIXED)
    taken = {name: params[name] for name in _ADAMW_TAKEN if params.get(name, "auto") != "auto"}
    return {"optimizer": "adamw"} | taken, ""


def _scheduler(content: object) -> tuple[dict[str, object], str]:
    kind, params = _typed(content, "scheduler")
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        raise UserError(
            f'ds_config "scheduler": remove it, {kind} is neither WarmupCosineLR nor WarmupLR: this engine warms up '
            "linearly over train.warmup_steps and decays by train.lr_decay to train.final_lr"
        )
    names = _SCHEDULES[kind]
    _check_names("scheduler", params, (*names, *_SCHEDULE_FIXED))
    _check_fixed("scheduler", params, _SCHEDULE_FIXED)
    settings = {}
    for name, (setting, default) in names.items():
        value = params.get(name, default)
        if value not in (None, "auto"):
            settings[setting] = value
    settings |= _IMPLIED[kind]
    note = "" if "warmup_type" in params else "; the warm-up is linear, DeepSpeed's default is logarithmic"
    return settings, note


def _wandb(content: object) -> tuple[dict[str, object], str]:
    if not _enabled(content):
        return {}, ""
    if not isinstance(content, dict):
        raise UserError('ds_config "wandb": an object is wanted, such as {"enabled": true, "project": "mine"}')
    left_out = [name for name in ("group", "team") if content.get(name) is not None]
    return {"wandb": content.get("project", "deepspeed")}, f"; without {' and '.join(left_out)}" if left_out else ""


_TAKEN: dict[str, Callable[[object], tuple[dict[str, object], str]]] = {
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "wandb": _wandb,
}


def _typed(content: object, section: str) -> tuple[object, dict]:
    """Return "type" and "params" of a section."""
    params = content.get("params", {}) if isinstance(content, dict) else None
    if not isinstance(params, dict):
        raise UserError(f'ds_config "{section}": an object is wanted, such as {{"type": "AdamW", "params": {{}}}}')
    return content.get("type"), params


def _check_names(section: str, params: dict, known: Sequence[str]) -> None:
    for name in params:
        if name not in known:
            raise UserError(f'ds_config "{section}": {name} is unknown: {nearest(name, known)}')


def _check_fixed(section: str, params: dict, fixed: dict[str, object]) -> None:
    for name, value in fixed.items():
        if params.get(name, "auto") not in ("auto", value):
            raise UserError(f'ds_config "{section}": {name}={params[name]}: this engine has {name}={value}, remove it')


def _enabled(content: object) -> bool:
    """Whether a section asks for something: by its "enabled", by that of any of its parts, or by being there."""
    if not isinstance(content, dict):
        return content not in (False, None, "auto")
    flags = [content["enabled"]] if "enabled" in content else list(_flags(content))
    return any(flag is True for flag in flags) if flags else bool(content)


def _flags(content: dict) -> Iterator[object]:
    for name, value in content.items():
        if name == "enabled":
            yield value
        elif isinstance(value, dict):
            yield from _flags(value)
