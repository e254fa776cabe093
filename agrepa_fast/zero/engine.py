"""DeepSpeed: starting the ranks, checking the ds_config against the run, and building the engine."""

import json
import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from ..config import PRESETS, Config, TrainConfig
from ..data.batches import BatchLayout
from ..errors import UserError, nearest
from ..kernels import active_backend

_NEVER = 2**62  # DeepSpeed's own progress lines: the run has a bar
_PATIENCE = timedelta(hours=12)  # ranks wait while rank 0 prepares recordings; DeepSpeed's default is 10 minutes
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


def start_ranks() -> torch.device:
    """Join the process group (one rank when no launcher set the environment) and return this rank's device.

    Raises UserError for an AGREPA_BACKEND that is unknown or cannot run here.
    """
    import deepspeed
    import deepspeed.ops

    try:
        active_backend()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    cuda = torch.cuda.is_available()
    if not cuda:
        # Built on first use for a minute; killed while building, it leaves a lock on which every later run hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=_PATIENCE, verbose=False)
    return device


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


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
    if _offloads(values, "offload_optimizer"):
        resolved["zero_force_ds_cpu_optimizer"] = (
            False  # torch's AdamW has a fused kernel for the CPU, no compiler needed
        )
    return resolved


def _offloads(ds_config: dict, section: str) -> bool:
    """Whether the section asks for the host's memory. Raises UserError for any other place, or no section."""
    offload = ds_config.get("zero_optimization", {}).get(section) or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu"):
        raise UserError(f'ds_config "{section}": device {device!r} is not supported: cpu, or none')
    return device == "cpu"


def zero_stage(ds_config: dict) -> int:
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def lr_factor(train: TrainConfig, step: int) -> float:
    """Share of train.lr at an optimizer step: linear warm-up, then cosine decay to train.final_lr."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    progress = min(1.0, (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
    return train.final_lr + (1 - train.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_engine(model: nn.Module, config: Config, ds_config: dict):
    """The DeepSpeed engine around `model`, with AdamW and the schedule of the run. ds_config: resolved."""
    import deepspeed

    train = config.train
    # One parameter group: the optimizer state of any other is hard to reach under stages 1 and 2.
    options = {"lr": train.lr, "betas": tuple(train.betas), "weight_decay": train.weight_decay}
    if zero_stage(ds_config) == 0 and not ds_config["bf16"]["enabled"]:
        optimizer = ClippedAdamW(model.parameters(), train.clip_norm, **options)
        ds_config = ds_config | {"gradient_clipping": 0.0}
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), **options, fused=_offloads(ds_config, "offload_optimizer") or None
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(train, step))
    with deepspeed_refusals():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
        masters(engine)
    return engine


@contextmanager
def deepspeed_refusals() -> Iterator[None]:
    """What DeepSpeed objects to in a ds_config, as a UserError."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        yield
    except (AssertionError, AttributeError, ValueError, ZeRORuntimeException) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"DeepSpeed refuses this ds_config: {first}") from error


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm, and leaves everything as it is where that is not finite: what DeepSpeed's
    own optimizers do, for stage 0 in fp32, where it has none. The engine reads `overflow` and `_global_grad_norm`."""

    def __init__(self, parameters, clip_norm: float, **options):
        super().__init__(parameters, **options)
        self.clip_norm, self.overflow, self._global_grad_norm = clip_norm, False, None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.overflow = not bool(self._global_grad_norm.isfinite())
        if not self.overflow:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, self._global_grad_norm)
            super().step()


def master_parameters(engine) -> list[torch.Tensor]:
    """This rank's fp32 weights as the optimizer holds them: flat partitions under ZeRO 1 to 3, whole parameters in the
    model's order at stage 0. The optimizer's state is keyed by them."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage > 0:
        return list(optimizer.single_partition_of_fp32_groups)
    if engine.bfloat16_enabled():
        return [weights for group in optimizer.fp32_groups for weights in group]
    return list(engine.module.parameters())


def masters(engine) -> list[torch.Tensor]:
    """The values of `master_parameters`."""
    return [weights.data for weights in master_parameters(engine)]


def publish_masters(engine) -> None:
    """Bring the weights that the forward uses up to date with the masters, on every rank."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.empty_partition_cache()  # weights still gathered from the last forward would be those of before
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    elif engine.bfloat16_enabled():
        torch._foreach_copy_([parameter.data for parameter in engine.module.parameters()], masters(engine))


def gradient_norms(engine, blocks: Sequence[nn.Module]) -> torch.Tensor:
    """(L,) norm of the step's gradient to each block's parameters, averaged over ranks and micro-batches as the
    optimizer will see it, before clipping. Between the last backward of a step and engine.step(); every rank must call
    it, since partitions are gathered one after the other. The same on any number of ranks, at any ZeRO stage."""
    from deepspeed.utils import safe_get_full_grad

    def gradient(parameter: nn.Parameter) -> torch.Tensor:
        if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
            return parameter.grad
        return safe_get_full_grad(parameter)

    squares = [sum(gradient(p).float().square().sum() for p in block.parameters()) for block in blocks]
    return torch.stack(squares).sqrt()


def full_weights(engine) -> dict[str, torch.Tensor]:
    """Name -> whole fp32 weight on the CPU, from the masters; on rank 0, nothing elsewhere. Every rank must call it,
    since the partitions are gathered one after the other."""
    from deepspeed.utils import safe_get_full_fp32_param

    stage, whole = engine.zero_optimization_stage(), {}
    for (name, parameter), value in zip(engine.module.named_parameters(), _whole(engine, stage), strict=True):
        value = safe_get_full_fp32_param(parameter) if stage > 0 else value
        if dist.get_rank() == 0:
            whole[name] = value.detach().cpu().clone().contiguous()
    return whole


def _whole(engine, stage: int) -> list[torch.Tensor | None]:
    """The masters where they are whole parameters, in the model's order."""
    return masters(engine) if stage == 0 else [None] * len(list(engine.module.parameters()))
