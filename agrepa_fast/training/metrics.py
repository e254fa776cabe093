"""The numbers of a run: metrics.jsonl, TensorBoard and the progress bar."""

import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ..files import write_atomically
from ..ranks import all_max, all_sum

_GIB = 2**30


class Metrics:
    """Collects the numbers of steps without waiting for the device; `flush` reduces them over ranks and writes them on
    rank 0.

    peak_flops: FLOP/s that a rank's device could do, for MFU; None for no MFU.
    """

    def __init__(self, folder: Path, rank: int, world: int, peak_flops: float | None = None):
        self.folder, self.rank, self.world, self.peak_flops = folder, rank, world, peak_flops
        self.clips, self.first_step = 0, 0  # that this rank has read since `open`; with which that began
        self._file = self._board = self._tracker = self._bar = None
        self._start_window()

    def _start_window(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts = {"clips": 0.0, "frames": 0.0, "flops": 0.0, "wait": 0.0}
        self._steps = self._skipped = 0
        self._clock = time.perf_counter()

    def open(self, steps: int, first_step: int, tracker=None) -> None:
        """Open the files and the progress bar of rank 0 for the steps from first_step to `steps`. The lines of later
        steps, which a resumed run writes again, are dropped. tracker: its write(step, values) gets every line, too."""
        self.first_step = first_step
        if self.rank == 0:
            self._tracker = tracker
            for name in ("metrics.jsonl", "skipped.jsonl", "faults.jsonl"):
                _drop_later_steps(self.folder / name, first_step)
            self._file = (self.folder / "metrics.jsonl").open("ab", buffering=0)  # no buffer that could fail later
            self._open_board(first_step + 1 if first_step else None)
            self._bar = tqdm(
                total=steps, initial=first_step, desc="train", unit="step", smoothing=0.1, dynamic_ncols=True
            )
        self._clock = time.perf_counter()

    def _open_board(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(self.folder / "tensorboard", purge_step=purge_step)

    def add(self, **values: torch.Tensor) -> None:
        """Add one optimizer step's means over this rank's clips."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1
        self._advance_bar()

    def skip(self) -> None:
        """Count one optimizer step that was left out; called instead of `add`."""
        self._skipped += 1
        self._advance_bar()

    def _advance_bar(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def count_batch(self, *, clips: int, frames: int, flops: float, wait: float) -> None:
        """Count a micro-batch of this rank: its clips and frames, the FLOPs of its step, the seconds waited for it."""
        self.clips += clips
        for name, value in (("clips", clips), ("frames", frames), ("flops", flops), ("wait", wait)):
            self._counts[name] += value

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time inside (validation, probe, checkpoint) out of the rates."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def flush(self, step: int, device: torch.device | str = "cpu", **extra: float) -> dict[str, float]:
        """Write and return as train/<name> the means over the steps since the last flush, how many were skipped, and
        the rates and the memory of all ranks. Every rank must call it."""
        names, counts = sorted(self._sums), list(self._counts)
        seconds = time.perf_counter() - self._clock
        local = torch.stack([*(self._sums[name].double() for name in names)]) if names else torch.zeros(0)
        rates = torch.tensor([self._counts[name] / seconds for name in counts], dtype=torch.float64)
        sums = all_sum(torch.cat((local.to(device, torch.float64), rates.to(device)))).tolist()
        values = {
            f"train/{name}": total / (self.world * self._steps)
            for name, total in zip(names, sums[: len(names)], strict=True)
        }
        rate = dict(zip(counts, sums[len(names) :], strict=True))
        values |= {"train/clips_per_s": rate["clips"], "train/frames_per_s": rate["frames"]}
        values["train/data_wait"] = rate["wait"] / self.world
        if self.peak_flops is not None:
            values["train/mfu"] = rate["flops"] / (self.world * self.peak_flops)
        values["train/peak_memory_gib"] = all_max(torch.tensor([peak_memory(device)], device=device)).item()
        values["train/skipped"] = self._skipped
        values |= {f"train/{name}": value for name, value in extra.items()}
        self.write(step, values)
        if self._bar is not None and names:
            self._bar.set_postfix(loss=f"{values['train/loss']:.3f}", clips_s=f"{values['train/clips_per_s']:.0f}")
        self._start_window()
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one line of metrics.jsonl, and TensorBoard scalars. On a full disk they are lost, and training goes
        on."""
        if self._file is None:
            return
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            if self._file.write(line) < len(line):
                self._file.write(b"\n")  # or the next line would be lost, too
            if self._board is None:
                self._open_board(None)
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        except OSError as error:
            self._board = None  # its thread has ended
            self.print(f"step {step}: metrics could not be written ({error.strerror or error}); training goes on")
        if self._tracker is not None:
            self._tracker.write(step, values)

    def print(self, line: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self.rank == 0:
            tqdm.write(line)
            sys.stdout.flush()  # in a file, too, an error comes after it

    def close(self) -> None:
        """Close the files that `open` has opened."""
        for opened in (self._bar, self._file, self._board, self._tracker):
            if opened is not None:
                opened.close()


def peak_memory(device: torch.device | str) -> float:
    """Return the most GiB that PyTorch had allocated on a GPU, or that this process had resident on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


def _drop_later_steps(path: Path, step: int) -> None:
    """Rewrite a metrics.jsonl without the lines of steps after `step`."""
    if path.is_file():
        lines = [json.dumps(line) + "\n" for line in _read_lines(path) if line["step"] <= step]
        write_atomically(path, "".join(lines))


def _read_lines(path: Path) -> Iterator[dict]:
    """Yield the lines of a metrics.jsonl, without those that a kill, a full disk or a crash of the machine cut, and
    that somebody else wrote."""
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and abs(line["step"]) < 2**63:
            yield line


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (step, value) pairs of a metrics.jsonl."""
    series = defaultdict(list)
    for values in _read_lines(path):
        step = values.pop("step")
        for name, value in values.items():
            if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63):
                series[name].append((step, value))
    return dict(series)
