"""A forward and backward of the largest batch before the first step, which shows whether it fits into memory."""

import math
from dataclasses import replace

import torch

from ..alignment.aligner import Aligner
from ..data.batch import Batch, TeacherFrames
from ..data.index import Index
from ..data.layout import BatchLayout
from ..data.plan import BatchPlan
from ..errors import UserError
from ..flow import flow_loss
from ..models.backbone import Backbone
from ..models.condition import Condition
from ..ranks import AgreedError, first_failure


def dry_run(engine, index: Index, plan: BatchPlan, layout: BatchLayout, device: torch.device, aligner: Aligner) -> str:
    """Run the length bucket that costs most: a rank's micro-batch of the longest clips, all layers captured, the first
    of them aligned. Return a line with its size and, on a GPU, its peak memory. Triton's kernels are compiled then.
    Every rank must call it.

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
            _forward_backward(engine.module, *silent_clips(clips, bucket.frames, index, device), index, aligner)
            # A batch without padding runs other kernels, which Triton would compile in the middle of the run.
            mel, condition = silent_clips(1, bucket.frames, index, device)
            _forward_backward(engine.module, mel, replace(condition, padded=False), index, aligner)
    except torch.OutOfMemoryError as error:
        failure = (
            f"{size}, do not fit into the memory of {device}: lower train.batch_frames or train.batch_clips, raise "
            f"train.accumulation, or prepare with a lower data.max_seconds ({str(error).splitlines()[0]})"
        )
        if engine.zero_optimization_stage() == 3:  # the others wait for this rank's partitions and cannot answer
            raise UserError(failure) from error
    engine.module.train(training)
    if (failure := first_failure(failure)) is not None:
        raise AgreedError(failure)
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


def _silent_batch(
    mel: torch.Tensor, condition: Condition, index: Index, aligner: Aligner, hidden: dict[int, torch.Tensor]
) -> Batch:
    """Return the batch of silent clips, with the targets of the run's objective."""
    clips, frames = mel.shape[:2]
    target, teacher, stored, averaged, attention = aligner.objective.target, {}, {}, {}, {}
    for domain in index.domains:
        teacher[domain] = mel.new_zeros(clips, index.teacher(domain).dim)
        if target == "frames":
            count = index.most_teacher_frames(frames)
            values = mel.new_zeros(clips, count, index.teacher(domain).dim, dtype=torch.float16)
            stored[domain] = TeacherFrames(values, condition.lengths.new_full((clips,), count))
            if aligner.objective.attention:
                attention[domain] = values.new_zeros(clips, count, *index.teacher(domain).attention)
    if target == "averaged":
        averaged = {layer: states.new_zeros(()).expand_as(states) for layer, states in hidden.items()}
    domain, places = condition.lengths.new_zeros(clips), tuple(range(clips))
    targets = {"teacher_frames": stored, "attention": attention, "averaged": averaged}
    return Batch((), domain, mel, condition, teacher, places, **targets)


def _forward_backward(
    module: Backbone, mel: torch.Tensor, condition: Condition, index: Index, aligner: Aligner
) -> None:
    first = 1 if module.condition_width is None else 0
    capture = tuple(range(first, len(module.layers) + 1))  # any layer may be chosen
    t, pooled = mel.new_full((len(mel),), 0.5), aligner.objective.tap == "pooled"
    attention = aligner.trial_layers if aligner.objective.attention else ()
    out = module(mel, t, condition, capture=capture, pooled=pooled, attention=attention)
    loss = flow_loss(out.v, mel, condition.lengths).mean()
    loss = loss + sum(hidden.float().mean() for hidden in out.hidden.values())
    term, heads = aligner.trial(out.hidden, _silent_batch(mel, condition, index, aligner, out.hidden), t, out.attention)
    trained = [p for p in module.parameters() if p.requires_grad]
    torch.autograd.grad(loss + term, [*trained, *heads], allow_unused=True)
