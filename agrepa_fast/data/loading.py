"""Batches for training and probing out of shards. Which clips a step takes is plan.py's; here they are read, ahead of
time and in the background, faulty ones replaced, and put together.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..config import DataConfig
from .batch import Batch, _packed, _unpacked, collate
from .clip_reader import Background, ClipReader
from .index import Index
from .layout import BatchLayout
from .plan import BatchPlan
from .reading import Fault
from .samples import Sample

_loaders: list[multiprocessing.Process] = []
_READERS = 4  # threads that read ahead


class _RankBatches(IterableDataset):
    """This rank's micro-batches from a step on; loader worker w of W makes every W-th of them."""

    def __init__(self, index: Index, plan: BatchPlan, layout: BatchLayout, center: bool, step: int):
        self.index, self.plan, self.layout, self.center, self.step = index, plan, layout, center, step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        background, readers = Background(_READERS), {}
        while True:
            ahead, micro = divmod(number, self.layout.accumulation)
            batch = self._batch(self.step + ahead, micro, readers, background)
            yield _packed(batch) if worker else batch
            number += stride

    def _batch(
        self, step: int, micro: int, readers: dict[tuple[int, str], ClipReader], background: Background
    ) -> Batch:
        plan, layout = self.plan, self.layout
        number, picks = plan.batch(step)
        bucket = plan.buckets[number]
        places = layout.places(micro, bucket.clips)
        samples: dict[int, Sample] = {}
        faults: list[Fault] = []
        for domain in bucket.shards:
            mine = [place for place in places if picks[place].domain == domain]
            if (number, domain) not in readers:
                # Its lanes in all its micro-batches of a step, and one more at the edge of each.
                width = layout.accumulation * (len(mine) + 2)
                order, shards = plan.orders[number, domain], bucket.shards[domain]
                readers[number, domain] = ClipReader(self.index, shards, order, width, background)
            read, lost = readers[number, domain].read([picks[place].position for place in mine])
            samples |= dict(zip(mine, read, strict=True))
            faults += lost
        shape = {"frames": bucket.frames, "tokens": self.index.most_tokens(bucket.frames)} if plan.fixed_shapes else {}
        ordered = [samples[place] for place in places]
        batch = collate(ordered, tuple(places), self.index, center=self.center, **shape)
        return replace(batch, weight=layout.weight(micro, bucket.clips), faults=tuple(faults))


def train_batches(
    index: Index,
    data: DataConfig,
    layout: BatchLayout,
    *,
    seed: int,
    center: bool,
    step: int = 0,
    plan: BatchPlan | None = None,
) -> Iterator[Batch]:
    """This rank's micro-batches in order, from optimizer step `step` on, without end: ranks cannot run out of batches
    apart. plan: None for layout.batch_clips clips in every batch."""
    if plan is None:
        plan = BatchPlan(index, data.speech_share, seed, clips=layout.batch_clips)
    # A generator of its own: DataLoader would draw from the one whose state a resumed run has restored for dropout.
    loader = DataLoader(
        _RankBatches(index, plan, layout, center, step),
        batch_size=None,
        num_workers=data.workers,
        generator=torch.Generator(),
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if data.workers else None,  # plans are not pickled
    )
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    _loaders.extend(set(multiprocessing.active_children()) - others)
    return map(_unpacked, batches) if data.workers else batches


def end_loaders() -> None:
    """End loader processes that are left, such as one in the middle of a read that hangs: they ignore the signal that
    multiprocessing would send them at exit, and it would wait."""
    for process in _loaders:
        process.kill()
    _loaders.clear()


def _ignore_signals(_worker: int) -> None:
    """A scheduler's signal goes to every process of a job; the ranks decide when their loader processes end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
