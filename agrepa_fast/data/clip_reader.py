"""The clips of an order, read ahead of time in the background."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from ..errors import UserError
from .index import Index, Shard, remedy
from .order import ClipOrder, Place
from .reading import Fault, OpenShard
from .samples import ClipError, Sample

_SHARDS_IN_A_ROW = 3  # without one good clip: then it is not the odd clip that is at fault


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
