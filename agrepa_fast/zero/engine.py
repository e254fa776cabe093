"""DeepSpeed: starting the ranks, checking the ds_config against the run, and building the engine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.nn as nn

from ..config import Config
from ..errors import UserError
from ..kernels import active_backend
from ..launch import complete_launch_environment, local_device
from ..lr_schedule import lr_factor
from ..ranks import PATIENCE
from .ds_config import _offloads, zero_stage
from .masters import masters


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
    complete_launch_environment()
    device = local_device()
    cuda = device.type == "cuda"
    if not cuda:
        # Built on first use for a minute; killed while building, it leaves a lock on which every later run hangs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=PATIENCE, verbose=False)
    return device


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


def limit_waiting(minutes: float) -> None:
    """From here on, a collective that some rank does not come to fails after so many minutes, in every group."""
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in _world.pg_map:
        _set_pg_timeout(timedelta(minutes=minutes), group)
