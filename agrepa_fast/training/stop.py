"""SIGTERM and SIGUSR1, which schedulers send before they take a machine away: all ranks stop after the same step. After
the last step they change nothing."""

import signal

import torch

from ..device import record, to_host
from ..ranks import all_sum

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Notes signals to this rank inside a `with`, and tells the other ranks.

    The number of signalled ranks is reduced after one step and read after the next, so that no rank waits for its GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.received: str | None = None
        # How many ranks had a signal after the last step, and when that number is on the host.
        self._reduced: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Return whether any rank had a signal when this was called after the step before; the same on every rank.
        Every rank must call it once after every step."""
        step_before = self._reduced
        flag = torch.full((1,), float(self.received is not None), device=self.device)
        self._reduced = to_host(all_sum(flag)), record(self.device)
        if step_before is None:
            return False
        count, ready = step_before
        if ready is not None:
            ready.synchronize()
        return bool(count)
