"""The DeepSpeed engine of a run."""

import torch
import torch.nn as nn

from ..config import Config
from ..lr_schedule import lr_factor
from .lean_step import compute_norm_in_fp32, detach_fragments, skip_overflow_pass, update_all_weights_at_once
from .masters import masters
from .optimizers import RuledOptimizer, build_optimizer, clips_in_optimizer, optimizer_inside
from .refusals import deepspeed_refusals


def build_engine(model: nn.Module, config: Config, ds_config: dict):
    """Return the DeepSpeed engine around `model`, with the run's optimizer and schedule. ds_config: resolved. Raises
    UserError for what DeepSpeed refuses."""
    import deepspeed
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if RuledOptimizer not in ZERO_SUPPORTED_OPTIMIZERS:  # its updates read no more than a master and its gradient
        ZERO_SUPPORTED_OPTIMIZERS.append(RuledOptimizer)
    optimizer = build_optimizer(model, config.train, ds_config)
    if clips_in_optimizer(ds_config):
        ds_config = ds_config | {"gradient_clipping": 0.0}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config.train, step))
    with deepspeed_refusals(ds_config):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
        masters(engine)  # an optimizer of DeepSpeed's that keeps its masters elsewhere is refused here
    optimizer.attach(engine)
    detach_fragments(engine)
    skip_overflow_pass(engine)
    compute_norm_in_fp32(engine)
    update_all_weights_at_once(engine)
    return engine


def announce_backward(engine) -> None:
    """Tell DeepSpeed's optimizer whether the next backward pass is the last of a step. The engine's forward does so,
    which a captured step leaves out, and hooks of full gradient buckets act on it amid the pass."""
    if engine.zero_optimization_stage() > 0:
        engine.optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())


def set_rate(engine, rate: float) -> None:
    """Let the next step have this learning rate, whatever the schedule was at the last one."""
    for group in optimizer_inside(engine).param_groups:
        group["lr"] = rate
