"""DeepSpeed's fp32 master weights, at every ZeRO stage."""

import torch
import torch.distributed as dist


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
