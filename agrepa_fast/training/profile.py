"""A torch profiler trace of a few steps, if train.profile asks for it."""

import torch

from .context import RunContext


class ProfileWindow:
    """Traces the steps of train.profile on rank 0 into <run>/profile/, for TensorBoard or Perfetto. Steps are counted
    from 1."""

    def __init__(self, context: RunContext):
        self.window = context.config.train.profile if context.rank == 0 else None
        self.folder = context.folder / "profile"
        self._profiler: torch.profiler.profile | None = None

    def before_step(self, step: int) -> None:
        """Start the trace if the step is in the window."""
        if self.window and self.window[0] <= step <= self.window[1] and self._profiler is None:
            handler = torch.profiler.tensorboard_trace_handler(str(self.folder), use_gzip=True)
            self._profiler = torch.profiler.profile(on_trace_ready=handler)
            self._profiler.start()

    def after_step(self, step: int) -> None:
        """Write the trace if the step was the window's last."""
        if self._profiler is not None and step >= self.window[1]:
            self.close()

    def close(self) -> None:
        """Write the trace of a run that ends inside the window."""
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
