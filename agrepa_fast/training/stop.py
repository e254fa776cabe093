"""SIGTERM and SIGUSR1, what schedulers send before they take a machine away: all ranks stop after the same step."""

import signal

import torch

from ..device import record, to_host
from ..ranks import all_sum

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes a signal to this rank, inside a `with`; `agreed` says when all ranks know of one.

    The flag is reduced after one step and read after the next, so that a GPU is never waited for.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.received: str | None = None
        self._reduced: tuple[torch.Tensor, torch.cuda.Event | None] | None = None  # ranks with a signal, a step ago

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether some rank had a signal by the step before: the same on every rank. Every rank must call it once after
        every step."""
        before = self._reduced
        flag = torch.full((1,), float(self.received is not None), device=self.device)
        self._reduced = to_host(all_sum(flag)), record(self.device)
        if before is None:
            return False
        count, ready = before
        if ready is not None:
            ready.synchronize()
        return bool(count)
