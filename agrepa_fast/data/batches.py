"""Batches for training and probing out of shards. Which clips a step takes is plan.py's; here they are read, ahead of
time and in the background, faulty ones replaced, and put together.
"""

import multiprocessing
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from queue import SimpleQueue

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..config import DOMAINS, DataConfig
from ..errors import UserError
from ..models.audio_dit.conditioning import Condition
from .index import Index, Sample, Shard, remedy
from .plan import BatchLayout, BatchPlan, ClipOrder, Place
from .reading import ClipError, Fault, OpenShard, read_shard

_loaders: list[multiprocessing.Process] = []
_READERS = 4  # threads that read ahead
_SHARDS_IN_A_ROW = 3  # without one good clip: then it is not the odd clip that is at fault


@dataclass(frozen=True)
class Batch:
    """B clips. `condition.reference` is empty (zeros): the training step draws it, probes fix it."""

    keys: tuple[str, ...]
    domain: torch.Tensor  # (B,) index into DOMAINS
    mel: torch.Tensor  # (B, T, n_mels) fp32, normalised, zero in the padding
    condition: Condition
    teacher: dict[str, torch.Tensor]  # domain -> (B, E) fp32, zero rows for clips of other domains
    places: tuple[int, ...]  # of each clip in the global batch
    weight: float = 1.0  # times its mean loss: then the mean over ranks and micro-batches is that over all clips
    faults: tuple[Fault, ...] = ()  # clips that it should have had; others stand in for them

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        return replace(
            self,
            domain=function(self.domain),
            mel=function(self.mel),
            condition=self.condition.map(function),
            teacher={name: function(vectors) for name, vectors in self.teacher.items()},
        )


def collate(
    samples: list[Sample],
    places: tuple[int, ...],
    index: Index,
    *,
    center: bool = True,
    frames: int = 0,
    tokens: int = 0,
) -> Batch:
    """Pad samples to the longest (and at least `frames` and `tokens`), normalise mels by the index's mean and std,
    centre teacher vectors by their mean."""
    frames = max(frames, *(s.mel.shape[0] for s in samples))
    tokens = max(tokens, *(len(s.tokens) for s in samples))
    mel = torch.zeros(len(samples), frames, index.n_mels)
    ids = torch.zeros(len(samples), tokens, dtype=torch.int64)
    extra = None if index.extra_vocab is None else torch.zeros_like(ids)
    teacher = {name: torch.zeros(len(samples), index.teacher(name).dim) for name in index.domains}
    for row, s in enumerate(samples):
        mel[row, : s.mel.shape[0]].copy_(torch.from_numpy(s.mel)).sub_(index.mel_mean).div_(index.mel_std)
        ids[row, : len(s.tokens)] = torch.from_numpy(s.tokens)
        if extra is not None:
            extra[row, : len(s.tokens)] = torch.from_numpy(s.tokens2)
        vector = s.pooled
        teacher[s.domain][row] = torch.from_numpy(vector - index.teacher(s.domain).mean if center else vector)
    condition = Condition(
        tokens=ids,
        token_lengths=torch.tensor([len(s.tokens) for s in samples]),
        reference=_empty_reference(mel),
        lengths=torch.tensor([s.mel.shape[0] for s in samples]),
        extra_tokens=extra,
    )
    domain = torch.tensor([DOMAINS.index(s.domain) for s in samples])
    return Batch(tuple(s.key for s in samples), domain, mel, condition, teacher, tuple(places))


def fixed_clips(index: Index, split: str, domain: str, count: int) -> list[Sample]:
    """Return `count` clips of a domain, the same in every run: the first in shard order of each length bucket, as many
    as its share of the domain's clips.

    Raises UserError if there are fewer, or if one of them is not as it was written: measurements on other clips could
    not be compared.
    """
    available = index.clips(split, domain)
    if available < count:
        raise UserError(
            f"{index.folder}: {count} {domain} clips of the {split} split are wanted, {available} are there: "
            "prepare more recordings, or lower probe.clips and eval.clips"
        )
    buckets: dict[int, list[Shard]] = {}
    for shard in index.shards(split, domain):
        buckets.setdefault(shard.bucket, []).append(shard)
    samples: list[Sample] = []
    counts = _proportional(count, [sum(shard.clips for shard in shards) for shards in buckets.values()])
    for shards, wanted in zip(buckets.values(), counts, strict=True):
        of_bucket: list[Sample] = []
        for shard in shards:
            if len(of_bucket) < wanted:
                of_bucket += read_shard(shard, index)
        samples += of_bucket[:wanted]
    return samples


def _proportional(total: int, sizes: list[int]) -> list[int]:
    """Split `total` in proportion to `sizes`, by largest remainders; the first of equal ones come first."""
    shares, remainders = zip(*(divmod(total * size, sum(sizes)) for size in sizes), strict=True)
    largest = sorted(range(len(sizes)), key=lambda i: -remainders[i])[: total - sum(shares)]
    return [share + (i in largest) for i, share in enumerate(shares)]


class Background:
    """Calls in daemon threads: a read that hangs holds up no exit, as those of concurrent.futures would."""

    def __init__(self, threads: int):
        self._waiting: SimpleQueue[tuple[Future, Callable[[], object]]] = SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, call: Callable[[], object]) -> Future:
        future: Future = Future()
        self._waiting.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._waiting.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # for whoever asks for the result
                    future.set_exception(error)


class ClipReader:
    """The clips of an order, for a process that reads `width` of its lanes."""

    def __init__(self, index: Index, shards: tuple[Shard, ...], order: ClipOrder, width: int, background: Background):
        self.index, self.shards, self.order, self.background = index, shards, order, background
        self.keep = (
            min(width, order.lanes, len(shards)) + 2
        )  # shards that are open; more come while they are read ahead
        self._open: OrderedDict[int, OpenShard] = OrderedDict()  # the one used last comes last
        self._ahead: dict[int, Future] = {}

    def read(self, positions: list[int]) -> tuple[list[Sample], list[Fault]]:
        """The clips at some positions, and the faults of those that others stand in for.

        That is the next good clip of the order's shard, or of its next shards. Raises UserError when there is none.
        """
        places = [self.order.find(position) for position in positions]
        for place in places:
            self._read_ahead(place.shard)
        samples, faults = [], []
        for place in places:
            sample, fault = self._clip(place)
            samples.append(sample)
            faults += [fault] if fault is not None else []
        for place in places:
            if place.left <= self.shards[place.shard].clips // 2:
                self._read_ahead(self.order.after(place))
        return samples, faults

    def _clip(self, place: Place) -> tuple[Sample, Fault | None]:
        lost = None
        for candidates in self.order.instead(place, _SHARDS_IN_A_ROW):
            for shard, clip in candidates:
                try:
                    return self._shard(shard)[clip], lost
                except ClipError as error:
                    if lost is None:
                        lost = Fault(self.shards[shard].path.name, clip, error.member, error.kind, error.reason)
        raise UserError(
            f"{self.index.folder}: no good clip in {_SHARDS_IN_A_ROW} shards in a row, from {lost.file} on: "
            f"{lost.kind}: {lost.reason}: {remedy(self.index.folder)}"
        )

    def _shard(self, number: int) -> OpenShard:
        if number not in self._open:
            future = self._ahead.pop(number, None)
            if future is None or future.cancel():  # not begun: it might wait behind others
                self._open[number] = OpenShard(self.shards[number], self.index)
            else:
                self._open[number] = future.result()
            while len(self._open) > self.keep:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _read_ahead(self, number: int) -> None:
        if number not in self._open and number not in self._ahead:
            self._ahead[number] = self.background.submit(lambda: OpenShard(self.shards[number], self.index))
            if len(self._ahead) > self.keep:  # asked for, but its lane has gone to another rank
                self._ahead.pop(next(iter(self._ahead))).cancel()


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


def _packed(batch: Batch) -> Batch:
    """To be sent to another process: only the mels stay a tensor, for each tensor costs a file descriptor and a
    handshake, and the others are small. The reference is empty."""
    return replace(
        batch,
        domain=batch.domain.numpy(),
        condition=replace(batch.condition, reference=None).map(torch.Tensor.numpy),
        teacher={name: vectors.numpy() for name, vectors in batch.teacher.items()},
    )


def _unpacked(batch: Batch) -> Batch:
    arrays = {field.name: getattr(batch.condition, field.name) for field in fields(batch.condition)}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items() if isinstance(value, np.ndarray)}
    return replace(
        batch,
        domain=torch.from_numpy(batch.domain),
        condition=replace(batch.condition, reference=_empty_reference(batch.mel), **tensors),
        teacher={name: torch.from_numpy(vectors) for name, vectors in batch.teacher.items()},
    )


def _empty_reference(mel: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, 1, 1).expand_as(mel)


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
