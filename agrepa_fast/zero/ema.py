"""Exponential moving average of the weights: fp32, from the master weights, sharded exactly as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..device import SideStream
from .masters import WholeTensors, masters, publish_masters, write_masters
from .optimizers import optimizer_inside


class Ema:
    """The average of this rank's master weights. After n updates the decay is at most (1 + n) / (10 + n), so that early
    averages forget the start. On a GPU it is updated beside the forward and backward that follow."""

    def __init__(self, engine, decay: float):
        self.engine, self.decay, self.updates = engine, decay, 0
        self.average = [weights.clone() for weights in masters(engine)]
        self._side = SideStream(self.average[0].device)  # of a CPU if the optimizer is offloaded
        optimizer_inside(engine).register_step_pre_hook(lambda *_: self._side.join())  # it writes into the masters

    @torch.no_grad()
    def update(self) -> None:
        """Add the current weights to the average. Call it after every optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self._side.run(lambda: torch._foreach_lerp_(self.average, masters(self.engine), 1 - decay))
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; afterwards the live ones are back, bit for bit. Every
        rank must enter it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._side.join()
        for average, live in zip(self.average, masters(self.engine), strict=True):
            kept = live.clone()
            live.copy_(average)
            average.copy_(kept)
        publish_masters(self.engine)

    @torch.no_grad()
    def load(self, whole: WholeTensors, updates: int) -> None:
        """Continue from an average of whole weights after so many updates, saved on any ranks at any stage."""
        self._side.join()
        live = [weights.clone() for weights in masters(self.engine)]
        self.average = write_masters(self.engine, whole)
        torch._foreach_copy_(masters(self.engine), live)
        self.updates = updates
