"""Making the model of a run part by part, so that ZeRO-3 never holds it whole, and writing into partitioned weights."""

import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn

from ..attribution.check_model import check_model
from ..config import Config
from ..launch import local_device
from ..models.backbone import Backbone
from ..models.registry import make_model
from .ds_config import zero_stage
from .refusals import deepspeed_refusals


def new_model(config: Config, ds_config: dict, measure: Callable[[Backbone], None] = lambda model: None) -> Backbone:
    """Return a model whose weights are drawn from torch's random state, the same at every stage; partitioned under
    ZeRO-3. ds_config: resolved. measure: called while another model than AudioDiT is whole, and on the CPU. Raises
    UserError for a user's model that does not do what Backbone promises."""
    partition = partitioner(ds_config)
    if config.model.backbone == "audio_dit":
        model = make_model(config.model, config.flow.prediction, partition)
    else:
        model = make_model(config.model, config.flow.prediction)
        for warning in check_model(model, config.model, config.flow):
            if dist.get_rank() == 0:
                print(f"warning: {warning}", file=sys.stderr)
        measure(model)
        partition(model)
    model.partitioned = zero_stage(ds_config) == 3
    if config.train.activation_checkpointing:
        model.recompute_layers()
    if config.train.compile:
        model.run_block = torch.compile(model.run_block)
    return model


def partitioner(ds_config: dict) -> Callable[[nn.Module], nn.Module]:
    """Return the function that a model calls on every finished part. Under ZeRO-3 it spreads the part over the ranks,
    so that none ever holds more than one part whole; at lower stages it does nothing. ds_config: resolved.

    Every rank makes each part on the CPU in fp32, from the one random stream of run.seed, and partitions it then. So
    the weights equal those of every other stage, bit for bit: inside `deepspeed.zero.Init()` they would be drawn on
    the GPU, in bf16. Every rank must make the same parts in the same order.
    """
    if zero_stage(ds_config) < 3:
        return lambda part: part
    import deepspeed

    dtype, device = torch.bfloat16 if ds_config["bf16"]["enabled"] else torch.float32, local_device()

    def partition(part: nn.Module) -> nn.Module:
        with deepspeed_refusals(ds_config):
            for parameter in part.parameters():  # buffers keep their type: positions are no bf16
                parameter.data = parameter.data.to(dtype)
            deepspeed.zero.Init(module=part, config_dict_or_path=ds_config, dtype=dtype)
        for buffer in part.buffers():  # DeepSpeed moves parameters alone
            buffer.data = buffer.data.to(device)
        for parameter in part.parameters():
            _clear_padding(parameter)
        return part

    return partition


def _clear_padding(parameter: nn.Parameter) -> None:
    """Zero this rank's partition beyond the end of the parameter, where the ranks do not divide it. DeepSpeed leaves
    there what the memory held, and every norm of the masters counts it."""
    partition = parameter.ds_tensor.data
    end = parameter.ds_numel - partition.numel() * dist.get_rank(parameter.ds_process_group)
    partition[max(0, end) :].zero_()


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Inside, the parameters are whole on every rank; at the end every rank gets the values that rank 0 has written.
    Every rank must enter it. Parameters that are not partitioned are left alone."""
    parameters = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parameters:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
