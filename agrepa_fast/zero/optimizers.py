"""The optimizers that DeepSpeed wraps."""

import torch
import torch.nn as nn

from ..config import TrainConfig
from ..launch import local_device
from .ds_config import offloads_optimizer, zero_stage


def build_optimizer(model: nn.Module, train: TrainConfig, ds_config: dict) -> torch.optim.AdamW:
    """Return AdamW over all weights that are not frozen. ds_config: resolved.

    There is one parameter group, so biases, norms and embeddings decay too: DeepSpeed gives access to the optimizer
    state of the first group alone under stages 1 and 2.
    """
    # One kernel on a GPU, and on the CPU if DeepSpeed offloads the state. The parameters are not on the device yet.
    fused = local_device().type == "cuda" or offloads_optimizer(ds_config) or None
    options = {"lr": train.lr, "betas": tuple(train.betas), "weight_decay": train.weight_decay, "fused": fused}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if clips_in_optimizer(ds_config):
        return ClippedAdamW(trained, train.clip_norm, **options)
    return torch.optim.AdamW(trained, **options)


def clips_in_optimizer(ds_config: dict) -> bool:
    """Whether DeepSpeed puts no optimizer of its own around ours, and so neither clips nor skips: stage 0 in fp32."""
    return zero_stage(ds_config) == 0 and not ds_config["bf16"]["enabled"]


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm, and leaves everything as it is if that is not finite, as DeepSpeed's own
    optimizers do. The engine reads `overflow` and `_global_grad_norm` after a step."""

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


def optimizer_inside(engine) -> torch.optim.AdamW:
    """Return the AdamW that DeepSpeed's optimizer wraps. Its state is keyed by the masters."""
    return engine.basic_optimizer


def set_step(optimizer: torch.optim.AdamW, parameter: torch.Tensor, updates: int) -> None:
    """Set the parameter's count of updates as torch keeps it: a tensor, on the device where the kernel reads it."""
    on_device = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
    device = parameter.device if on_device else "cpu"
    optimizer.state[parameter]["step"] = torch.tensor(float(updates), device=device)
