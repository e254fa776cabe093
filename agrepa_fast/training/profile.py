"""A torch profiler trace of a few steps, on request."""

from pathlib import Path

import torch


class ProfileWindow:
    """Records steps first to last (counted from 1) of rank 0 into <run>/profile/, for TensorBoard or Perfetto.

    window: train.profile; None records nothing.
    """

    def __init__(self, window: list[int] | None, folder: Path, rank: int):
        self.window = window if rank == 0 else None
        self.folder = folder / "profile"
        self._profiler: torch.profiler.profile | None = None

    def begin(self, step: int) -> None:
        """Before a step (counted from 1)."""
        if self.window and self.window[0] <= step <= self.window[1] and self._profiler is None:
            handler = torch.profiler.tensorboard_trace_handler(str(self.folder), use_gzip=True)
            self._profiler = torch.profiler.profile(on_trace_ready=handler)
            self._profiler.start()

    def end(self, step: int) -> None:
        """After a step, or at the end of the run: writes the trace once the window is over."""
        if self._profiler is not None and step >= self.window[1]:
            self.close()

    def close(self) -> None:
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
