"""Whether the largest batch fits: a forward and backward of its shape before the first step, leaving no trace."""

import torch

from ..data.index import Index
from ..data.layout import BatchLayout
from ..data.plan import BatchPlan
from ..errors import LocalError, UserError
from ..flow import flow_loss
from ..models.audio_dit.conditioning import Condition
from ..ranks import first_failure


def rehearse(
    engine, index: Index, plan: BatchPlan, layout: BatchLayout, workers: int, device: torch.device
) -> list[str]:
    """What a person should know before the first step, in lines. Every rank must call it. On a CPU without length
    buckets nothing is tried: there, batches are as long as their clips, and no error says that memory ran out."""
    lines = [plan.describe()] if plan.fixed_shapes else []
    if crowded := plan.crowding(layout, workers):
        lines.append(crowded)
    if plan.fixed_shapes or device.type == "cuda":
        lines.append(dry_run(engine, index, plan, layout, device))
    return lines


def dry_run(engine, index: Index, plan: BatchPlan, layout: BatchLayout, device: torch.device) -> str:
    """Run the bucket that costs most, a rank's micro-batch full of the longest clips, all layers captured. Returns a
    line that says what was tried, and on a GPU its peak memory. Every rank must call it.

    Neither weights nor gradients, neither random states nor DeepSpeed's counters change: gradients are asked for, not
    accumulated, so none of its hooks on them run. They are held all at once, as ZeRO 0 and 1 hold them in training;
    stages 2 and 3 need less. Raises UserError when the device's memory does not suffice.
    """
    bucket = plan.buckets[plan.worst]
    clips = -(-bucket.clips // layout.parts)
    what = f"{clips} clips of {bucket.frames} frames a rank and micro-batch, the largest bucket"
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    failure = None
    training = engine.module.training
    engine.module.train()
    try:
        with torch.random.fork_rng([device] if cuda else []):
            _forward_backward(engine.module, _longest(clips, bucket.frames, index, device))
    except torch.OutOfMemoryError as error:
        failure = (
            f"{what}, do not fit into the memory of {device}: lower train.batch_frames or train.batch_clips, raise "
            f"train.accumulation, or prepare with a lower data.max_seconds ({str(error).splitlines()[0]})"
        )
        if engine.zero_optimization_stage() == 3:  # the others wait for this rank's partitions: no asking them
            raise LocalError(failure) from error
    engine.module.train(training)
    if (failure := first_failure(failure)) is not None:
        raise UserError(failure)
    if not cuda:
        return f"dry run: {what}"
    peak, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    torch.cuda.reset_peak_memory_stats(device)
    return f"dry run: {what}: peak memory {peak / 2**30:.1f} of {there / 2**30:.1f} GiB"


def _longest(clips: int, frames: int, index: Index, device: torch.device) -> tuple[torch.Tensor, Condition]:
    """Silent clips (C, T, n_mels) of full length, and their conditions; masked all the same, as most batches are."""
    mel, tokens = torch.zeros(clips, frames, index.n_mels, device=device), index.most_tokens(frames)
    kept = torch.ones(clips, dtype=torch.bool, device=device)
    ids = torch.zeros(clips, tokens, dtype=torch.int64, device=device)
    return mel, Condition(
        tokens=ids,
        extra_tokens=None if index.extra_vocab is None else ids,
        token_lengths=torch.full((clips,), tokens, device=device),
        reference=torch.zeros_like(mel),
        lengths=torch.full((clips,), frames, device=device),
        keep_tokens=kept,
        keep_reference=kept,
        padded=True,
    )


def _forward_backward(module: torch.nn.Module, batch: tuple[torch.Tensor, Condition]) -> None:
    mel, condition = batch
    capture = tuple(range(len(module.blocks) + 1))  # any of them may be chosen
    out = module(mel, mel.new_full((len(mel),), 0.5), condition, capture=capture, pooled=True)
    loss = flow_loss(out.v, mel, condition.lengths).mean() + sum(
        hidden.float().mean() for hidden in out.hidden.values()
    )
    torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
