"""A forward and backward of the largest batch before the first step, which shows whether it fits into memory."""

import math
from dataclasses import replace

import torch

from ..data.index import Index
from ..data.layout import BatchLayout
from ..data.plan import BatchPlan
from ..errors import LocalError, UserError
from ..flow import flow_loss
from ..models.backbone import Backbone
from ..models.condition import Condition
from ..ranks import first_failure


def dry_run(engine, index: Index, plan: BatchPlan, layout: BatchLayout, device: torch.device) -> str:
    """Run the length bucket that costs most: a rank's micro-batch of the longest clips, all layers captured. Return a
    line with its size and, on a GPU, its peak memory. Triton's kernels are compiled then. Every rank must call it.

    Weights, gradients, random states and DeepSpeed's counters stay as they are: the gradients are returned instead of
    accumulated, so that none of DeepSpeed's hooks run. All of them are held at once, as ZeRO 0 and 1 hold them in
    training; stages 2 and 3 need less. Raises UserError if the device's memory does not suffice.
    """
    bucket = plan.buckets[plan.worst]
    clips = math.ceil(bucket.clips / layout.parts)
    size = f"{clips} clips of {bucket.frames} frames a rank and micro-batch, the largest bucket"
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    failure = None
    training = engine.module.training
    engine.module.train()
    try:
        with torch.random.fork_rng([device] if cuda else []):
            _forward_backward(engine.module, *silent_clips(clips, bucket.frames, index, device))
            # A batch without padding runs other kernels, which Triton would compile in the middle of the run.
            mel, condition = silent_clips(1, bucket.frames, index, device)
            _forward_backward(engine.module, mel, replace(condition, padded=False))
    except torch.OutOfMemoryError as error:
        failure = (
            f"{size}, do not fit into the memory of {device}: lower train.batch_frames or train.batch_clips, raise "
            f"train.accumulation, or prepare with a lower data.max_seconds ({str(error).splitlines()[0]})"
        )
        if engine.zero_optimization_stage() == 3:  # the others wait for this rank's partitions and cannot answer
            raise LocalError(failure) from error
    engine.module.train(training)
    if (failure := first_failure(failure)) is not None:
        raise UserError(failure)
    if not cuda:
        return f"dry run: {size}"
    peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    torch.cuda.reset_peak_memory_stats(device)
    return f"dry run: {size}: peak memory {peak / 2**30:.1f} of {total / 2**30:.1f} GiB"


def silent_clips(clips: int, frames: int, index: Index, device: torch.device) -> tuple[torch.Tensor, Condition]:
    """Return silent clips (C, T, n_mels) of `frames` frames and their conditions, masked as most batches are."""
    mel, tokens = torch.zeros(clips, frames, index.n_mels, device=device), index.most_tokens(frames)
    kept = torch.ones(clips, dtype=torch.bool, device=device)
    ids = torch.zeros(clips, tokens, dtype=torch.int64, device=device)
    return mel, Condition(
        tokens=ids,
        extra_tokens=None if index.extra_vocab is None else ids,
        speaker=None if index.speaker_dim is None else torch.zeros(clips, index.speaker_dim, device=device),
        text=None if index.text is None else ids.new_zeros(clips, frames),
        token_lengths=torch.full((clips,), tokens, device=device),
        reference=torch.zeros_like(mel),
        lengths=torch.full((clips,), frames, device=device),
        keep_tokens=kept,
        keep_reference=kept,
        padded=True,
    )


def _forward_backward(module: Backbone, mel: torch.Tensor, condition: Condition) -> None:
    first = 1 if module.condition_width is None else 0
    capture = tuple(range(first, len(module.layers) + 1))  # any layer may be chosen
    out = module(mel, mel.new_full((len(mel),), 0.5), condition, capture=capture, pooled=True)
    loss = flow_loss(out.v, mel, condition.lengths).mean()
    loss = loss + sum(hidden.float().mean() for hidden in out.hidden.values())
    torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
