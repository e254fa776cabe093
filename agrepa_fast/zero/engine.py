"""The DeepSpeed engine of a run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn

from ..config import Config
from ..errors import UserError
from ..lr_schedule import lr_factor
from .lean_step import compute_norm_in_fp32, detach_fragments, skip_overflow_pass, update_all_weights_at_once
from .masters import masters
from .optimizers import build_optimizer, clips_in_optimizer


def build_engine(model: nn.Module, config: Config, ds_config: dict):
    """Return the DeepSpeed engine around `model`, with the run's optimizer and schedule. ds_config: resolved. Raises
    UserError for what DeepSpeed refuses."""
    import deepspeed

    optimizer = build_optimizer(model, config.train, ds_config)
    if clips_in_optimizer(ds_config):
        ds_config = ds_config | {"gradient_clipping": 0.0}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config.train, step))
    with deepspeed_refusals():
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config)
        masters(engine)  # an optimizer of DeepSpeed's that keeps its masters elsewhere is refused here
    detach_fragments(engine)
    skip_overflow_pass(engine)
    compute_norm_in_fp32(engine)
    update_all_weights_at_once(engine)
    return engine


@contextmanager
def deepspeed_refusals() -> Iterator[None]:
    """Raise UserError for what DeepSpeed objects to in a ds_config."""
    from deepspeed.runtime.zero.utils import ZeRORuntimeException

    try:
        yield
    except (AssertionError, AttributeError, ValueError, ZeRORuntimeException) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"DeepSpeed refuses this ds_config: {first}") from error
