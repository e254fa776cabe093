"""The clips of an order, read ahead of time in the background; other clips replace those that cannot be used."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from ..errors import UserError
from .index import Index, Shard, remedy
from .order import ClipAddress, ClipOrder
from .reading import Fault, OpenShard
from .samples import ClipError, Sample

_SHARDS_IN_A_ROW = 3  # without one good clip: then the fault is not in single clips


class Background:
    """Runs calls in daemon threads. Unlike the threads of concurrent.futures, they hold up no exit while a read
    hangs."""

    def __init__(self, threads: int):
        self._waiting: SimpleQueue[tuple[Future, Callable[[], object]]] = SimpleQueue()
        for _ in range(threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, call: Callable[[], object]) -> Future:
        """Queue a call and return the future of its result."""
        future: Future = Future()
        self._waiting.put((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._waiting.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # raised again by future.result()
                    future.set_exception(error)


class ClipReader:
    """The clips of an order, for a process that reads `lanes` of its lanes."""

    def __init__(self, index: Index, shards: tuple[Shard, ...], order: ClipOrder, lanes: int, background: Background):
        self.index, self.shards, self.order, self.background = index, shards, order, background
        self.most_open = min(lanes, order.lanes, len(shards)) + 2  # as many more may be being read ahead
        self._open: OrderedDict[int, OpenShard] = OrderedDict()  # the last one was used last
        self._ahead: dict[int, Future] = {}

    def read(self, positions: list[int]) -> tuple[list[Sample], list[Fault]]:
        """Return the clips at some positions, and the faults of the clips that others replace.

        The next good clip of the same shard, or of the order's next shards, replaces a clip that cannot be used. Raises
        UserError if there is none.
        """
        addresses = [self.order.find(position) for position in positions]
        for address in addresses:
            self._read_ahead(address.shard)
        samples, faults = [], []
        for address in addresses:
            sample, fault = self._read_or_replace(address)
            samples.append(sample)
            if fault is not None:
                faults.append(fault)
        for address in addresses:
            if address.remaining <= self.shards[address.shard].clips // 2:
                self._read_ahead(self.order.next_shard(address))
        return samples, faults

    def _read_or_replace(self, address: ClipAddress) -> tuple[Sample, Fault | None]:
        fault = None
        for candidates in self.order.candidates(address, _SHARDS_IN_A_ROW):
            for shard, clip in candidates:
                try:
                    return self._opened(shard)[clip], fault
                except ClipError as error:
                    if fault is None:
                        file, place = self.shards[shard].path.name, self.shards[shard].places[clip]
                        fault = Fault(file, place, error.member, error.kind, error.reason)
        raise UserError(
            f"{self.index.folder}: no good clip in {_SHARDS_IN_A_ROW} shards in a row, from {fault.file} on: "
            f"{fault.kind}: {fault.reason}: {remedy(self.index.folder)}"
        )

    def _opened(self, shard: int) -> OpenShard:
        if shard not in self._open:
            future = self._ahead.pop(shard, None)
            if future is None or future.cancel():  # not begun: it might wait behind others
                self._open[shard] = OpenShard(self.shards[shard], self.index)
            else:
                self._open[shard] = future.result()
            while len(self._open) > self.most_open:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def _read_ahead(self, shard: int) -> None:
        if shard not in self._open and shard not in self._ahead:
            self._ahead[shard] = self.background.submit(lambda: OpenShard(self.shards[shard], self.index))
            if len(self._ahead) > self.most_open:  # read ahead in vain: its lane has gone to another rank
                self._ahead.pop(next(iter(self._ahead))).cancel()
