"""DeepSpeed's fp32 master weights, at every ZeRO stage."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from .construction import gathered

WholeTensors = Callable[[str], torch.Tensor]  # name of a parameter -> its whole tensor, fp32 on the CPU


def master_parameters(engine) -> list[torch.Tensor]:
    """Return this rank's fp32 weights as the optimizer holds them: flat partitions under ZeRO 1 to 3, whole parameters
    in the model's order at stage 0. The optimizer's state is keyed by them."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if stage > 0:
        return list(optimizer.single_partition_of_fp32_groups)
    if engine.bfloat16_enabled():
        return [weights for group in optimizer.fp32_groups for weights in group]
    return [parameter for _, parameter in trained_parameters(engine.module)]


class Piece(NamedTuple):
    """A run of elements of a parameter in a master. number: of the parameter among `trained_parameters`. start: in the
    elements of the whole parameter. at: in those of the master."""

    number: int
    start: int
    numel: int
    at: int = 0


def master_pieces(engine) -> list[list[Piece]]:
    """Return the pieces in each of `master_parameters`, in the order of their places."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    parameters = [parameter for _, parameter in trained_parameters(engine.module)]
    if stage == 0:
        return [[Piece(number, 0, parameter.numel())] for number, parameter in enumerate(parameters)]
    found: dict[int, list[Piece]] = {}
    if stage == 3:
        for number, parameter in enumerate(parameters):
            master, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * dist.get_rank(parameter.ds_process_group)
            numel = max(0, min(size, parameter.ds_numel - start))  # the last ranks' parts may be padding
            found.setdefault(master, []).append(Piece(number, start, numel, at))
    else:
        numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
        for master, group in enumerate(optimizer.bit16_groups):
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:  # some of it is on this rank
                    part, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                    piece = Piece(numbers[id(parameter)], part.start, part.numel, place.start)
                    found.setdefault(master, []).append(piece)
    kept = [[piece for piece in found.get(n, []) if piece.numel] for n in range(len(master_parameters(engine)))]
    return [sorted(pieces, key=lambda piece: piece.at) for pieces in kept]


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the named parameters that have masters: those that are not frozen."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def untrained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> tensor of what a model's weights hold besides: frozen parameters, and buffers of its state."""
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    kept = model.state_dict(keep_vars=True).keys()
    return frozen | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def masters(engine) -> list[torch.Tensor]:
    """Return the values of `master_parameters`."""
    return [weights.data for weights in master_parameters(engine)]


def publish_masters(engine) -> None:
    """Copy the masters into the weights that the forward uses. Every rank must call it after writing into masters."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 3:
        optimizer.empty_partition_cache()  # it still holds the old weights of the last forward
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage > 0:
        optimizer.update_lp_params()
    elif engine.bfloat16_enabled():
        torch._foreach_copy_([parameter.data for _, parameter in trained_parameters(engine.module)], masters(engine))


def full_weights(engine) -> dict[str, torch.Tensor]:
    """Return name -> whole fp32 weight on the CPU, from the masters, on rank 0; {} on other ranks. Frozen parameters
    and buffers are as the model holds them. Every rank must call it: partitions are gathered one after the other."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = trained_parameters(engine.module)
    if engine.zero_optimization_stage() == 0:
        values = masters(engine)  # whole already, in the model's order
    else:
        values = (safe_get_full_fp32_param(parameter) for _, parameter in named)
    whole = {}
    for (name, _), value in zip(named, values, strict=True):
        if dist.get_rank() == 0:
            whole[name] = value.detach().cpu().clone().contiguous()
    for name, value in untrained_tensors(engine.module).items():
        with gathered([value]):
            if dist.get_rank() == 0:
                whole[name] = value.detach().cpu().clone().contiguous()
    return whole


@torch.no_grad()
def write_untrained(model: nn.Module, whole: WholeTensors) -> None:
    """Write whole frozen parameters and buffers into a model, partitioned or not. Every rank must call it."""
    for name, value in untrained_tensors(model).items():
        with gathered([value]):
            value.data.copy_(whole(name))


@torch.no_grad()
def write_masters(engine, whole: WholeTensors) -> list[torch.Tensor]:
    """Write this rank's part of whole tensors into its masters, and return copies of the parts, laid out as
    masters(engine). Call `publish_masters` before the next forward."""
    stage, parameters = engine.zero_optimization_stage(), trained_parameters(engine.module)
    if stage == 0:
        for (name, _), master in zip(parameters, masters(engine), strict=True):
            master.copy_(whole(name))
        return [master.clone() for master in masters(engine)]
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, parameter in parameters:
        if stage < 3:
            safe_set_full_fp32_param(parameter, whole(name))
        else:  # DeepSpeed's function for whole tensors fails where the ranks do not divide a parameter
            size = parameter.ds_tensor.numel()
            flat = whole(name).flatten()
            padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - flat.numel()))
            safe_set_local_fp32_param(parameter, padded[size * dist.get_rank() :][:size])
    return [master.clone() for master in masters(engine)]
