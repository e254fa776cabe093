"""The micro-batches of a rank, read ahead of time by loader processes. plan.py says which clips a step takes."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import context, resource_tracker
from multiprocessing.connection import wait
from types import ModuleType
from typing import TYPE_CHECKING, Self

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from ..errors import UserError
from .batch import Batch, PackedBatch, pack
from .clip_reader import Background, ClipReader
from .index import Index
from .layout import BatchLayout
from .plan import BatchPlan
from .reading import Fault
from .samples import Sample

if TYPE_CHECKING:  # loader processes do without pydantic
    from ..config import DataConfig

_READERS = 4  # threads that read ahead


class TrainBatches:
    """This rank's micro-batches in order, from optimizer step `step` on. They do not end, so that no rank runs out of
    batches before the others.

    plan: None for layout.batch_clips clips in every batch. teacher_frames, attention: whether batches hold the
    teacher's frames beside their means, and their queries and keys. data.workers processes read the shards and make
    the batches; `close`, or the end of a `with`, ends them. With a GPU the batches are in pinned memory.
    """

    def __init__(
        self,
        index: Index,
        data: "DataConfig",
        layout: BatchLayout,
        *,
        seed: int,
        center: bool,
        step: int = 0,
        plan: BatchPlan | None = None,
        teacher_frames: bool = False,
        attention: bool = False,
    ):
        if plan is None:
            plan = BatchPlan(index, data.speech_share, seed, clips=layout.batch_clips)
        self._context = _LoaderContext()
        self._batches: Iterator[PackedBatch] = iter(
            DataLoader(
                _RankBatches(index, plan, layout, center, step, teacher_frames, attention),
                batch_size=None,
                num_workers=data.workers,
                pin_memory=torch.cuda.is_available(),
                # Without one of its own it would draw from the generator whose state a resume has restored for dropout.
                generator=torch.Generator(),
                multiprocessing_context=self._context if data.workers else None,
            )
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """Return the next batch. Raises UserError for shards that cannot be read, and RuntimeError, which begins with
        "DataLoader worker", if a loader process ended."""
        try:
            batch = next(self._batches)
            if isinstance(batch, UserError):
                raise batch
            return batch.unpack()
        except (OSError, EOFError, RuntimeError) as error:
            self._say_no_more()
            # A process that ends while it hands over a batch shows first as a fault of its connection, or of the thread
            # that pins.
            processes = {process.sentinel: process.pid for process in self._context.processes}
            ended = [processes[sentinel] for sentinel in wait(processes, timeout=1)]
            if not ended or str(error).startswith("DataLoader worker"):
                raise
            raise RuntimeError(f"DataLoader worker (pid {ended[0]}) ended while it handed over a batch") from error

    def _say_no_more(self) -> None:
        """Keep DataLoader's handler of SIGCHLD from raising for this iterator's processes: it would do so anywhere,
        while the first error is handled, too."""
        if self._context.processes and self._batches._worker_pids_set:
            _remove_worker_pids(id(self._batches))
            self._batches._worker_pids_set = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the loader processes. One that hangs in a read is killed: Python would wait for it at exit."""
        self._say_no_more()
        if self._context.processes:
            # DataLoader calls it when its iterator is dropped, but the traceback of an error would keep the iterator.
            self._batches._shutdown_workers()
        for process in self._context.processes:
            process.kill()


class _LoaderContext(context.SpawnContext):
    """Starts loader processes and keeps them in `processes`. They are spawned: a fork of a process with CUDA, gloo and
    threads would inherit their locks in whatever state they are."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[_LoaderProcess] = []

    def Process(self, *args, **kwargs) -> "_LoaderProcess":
        self.processes.append(_LoaderProcess(*args, **kwargs))
        return self.processes[-1]


class _LoaderProcess(context.SpawnProcess):
    @staticmethod
    def _Popen(process: "_LoaderProcess"):
        """Start the process without the main program, whose imports (DeepSpeed's) take seconds, and with the signals
        blocked that a scheduler sends to every process of a job: the ranks decide when their loader processes end."""
        resource_tracker.ensure_running()  # on its first start it unblocks SIGTERM
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
        try:
            return context.SpawnProcess._Popen(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            sys.modules["__main__"] = main

    def _bootstrap(self, *args):
        """Run in the new process. End it as multiprocessing ends a fork, without Python's finalization: that would end
        the thread that hands over batches inside C++ code, which aborts the process."""
        os._exit(super()._bootstrap(*args))


class _RankBatches(IterableDataset):
    """This rank's micro-batches from a step on; loader process w of W makes every W-th of them."""

    def __init__(
        self,
        index: Index,
        plan: BatchPlan,
        layout: BatchLayout,
        center: bool,
        step: int,
        teacher_frames: bool,
        attention: bool,
    ):
        self.index, self.plan, self.layout, self.center, self.step = index, plan, layout, center, step
        self.teacher_frames, self.attention = teacher_frames, attention

    def __iter__(self) -> Iterator[PackedBatch | UserError]:
        """Yield batches without end, or at last an error: raised in a loader process, it would come as the text of its
        traceback."""
        worker = get_worker_info()
        number, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        background, readers = Background(_READERS), {}
        while True:
            steps, micro = divmod(number, self.layout.accumulation)
            try:
                yield self._batch(self.step + steps, micro, readers, background)
            except UserError as error:
                yield error
                return
            number += stride

    def _batch(
        self, step: int, micro: int, readers: dict[tuple[int, str], ClipReader], background: Background
    ) -> PackedBatch:
        plan, layout = self.plan, self.layout
        number, picks = plan.batch(step)
        bucket = plan.buckets[number]
        places = layout.places(micro, bucket.clips)
        samples: dict[int, Sample] = {}
        faults: list[Fault] = []
        for domain in bucket.shards:
            of_domain = [place for place in places if picks[place].domain == domain]
            if (number, domain) not in readers:
                # The lanes of all this rank's micro-batches of a step, and one more at the edge of each.
                lanes = layout.accumulation * (len(of_domain) + 2)
                order, shards = plan.orders[number, domain], bucket.shards[domain]
                readers[number, domain] = ClipReader(self.index, shards, order, lanes, background)
            read, replaced = readers[number, domain].read([picks[place].position for place in of_domain])
            samples |= dict(zip(of_domain, read, strict=True))
            faults += replaced
        shape = self.index.longest(bucket.frames) if plan.fixed_shapes else {}
        if self.teacher_frames:
            shape["teacher_frames"] = self.index.most_teacher_frames(bucket.frames) if plan.fixed_shapes else 0
        ordered = [samples[place] for place in places]
        packed = pack(ordered, tuple(places), self.index, center=self.center, attention=self.attention, **shape)
        weight = layout.weight(micro, bucket.clips)
        return replace(packed, weight=weight, mean_frames=bucket.mean_frames, faults=tuple(faults))
