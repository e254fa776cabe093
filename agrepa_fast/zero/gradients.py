"""The gradients that DeepSpeed holds between the last backward of a step and engine.step(), at every ZeRO stage."""

from collections.abc import Sequence

import torch
import torch.nn as nn

from ..models.backbone import Layer


def gradient_norms(engine, layers: Sequence[Layer]) -> torch.Tensor:
    """Return the norm (L,) of the step's gradient to each layer's parameters, averaged over ranks and micro-batches as
    the optimizer will see it, before clipping.

    Call it between the last backward of a step and engine.step(), on every rank: partitions are gathered one after the
    other. The norms are the same on any number of ranks, at any ZeRO stage; 0 for a layer without trained parameters.
    """
    from deepspeed.utils import safe_get_full_grad

    def gradient(parameter: nn.Parameter) -> torch.Tensor | None:
        if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
            return parameter.grad
        return safe_get_full_grad(parameter)

    def square(layer: Layer) -> torch.Tensor:
        trained = dict.fromkeys(p for part in layer.parts for p in part.parameters() if p.requires_grad)
        found = [g for p in trained if (g := gradient(p)) is not None]
        return sum((g.float().square().sum() for g in found), start=torch.zeros((), device=engine.device))

    return torch.stack([square(layer) for layer in layers]).sqrt()


def make_gradient_nan(engine, *, unless_finite: torch.Tensor) -> None:
    """Make the engine's gradient NaN on this rank if `unless_finite` (0-dim, on the device) is not finite; add 0 to it
    otherwise. engine.step() then leaves the step out on every rank, because it reduces the global norm.

    Call it between the last backward of a step and engine.step(). Nothing waits for the device.
    """
    zero_or_nan = torch.where(unless_finite.isfinite(), 0.0, torch.nan)
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        next(p.grad for p in engine.module.parameters() if p.grad is not None).add_(zero_or_nan)
    elif norms := getattr(optimizer, "norm_for_param_grads", None):
        # Offloaded, stages 1 and 2: the gradient is on the host already, and the global norm comes from these norms.
        first = next(iter(norms))
        norms[first] = norms[first] + zero_or_nan.to(norms[first].device)
    elif partition := optimizer.averaged_gradients.get(0):  # empty on a rank that holds no part of the weights
        partition[0].add_(zero_or_nan)
