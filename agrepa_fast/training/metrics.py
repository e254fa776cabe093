"""Numbers of a run: metrics.jsonl and TensorBoard, a progress bar, and the picture of the losses."""

import json
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from ..config import UserError
from .engine import all_sum


class Metrics:
    """Collects per-step tensors without a host sync; `flush` reduces them over ranks and writes them on rank 0."""

    def __init__(self, folder: Path, rank: int, world: int, batch_clips: int):
        self.folder, self.rank, self.world, self.batch_clips = folder, rank, world, batch_clips
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._clock = time.perf_counter()
        self._file = self._board = self.bar = None

    def open(self, steps: int, first_step: int) -> None:
        """The files and the progress bar of rank 0, from first_step of `steps` on."""
        if self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            path = self.folder / "metrics.jsonl"
            _drop_later_steps(path, first_step)
            self._file = path.open("a")
            self._board = SummaryWriter(self.folder / "tensorboard", purge_step=first_step + 1 if first_step else None)
            self.bar = tqdm(
                total=steps, initial=first_step, desc="train", unit="step", smoothing=0.1, dynamic_ncols=True
            )

    def add(self, **values: torch.Tensor) -> None:
        """Add one optimizer step's means over this rank's clips."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1

    def pause(self) -> "_Pause":
        """Time inside (validation, probe, checkpoint) does not count as training time."""
        return _Pause(self)

    def flush(self, step: int, **extra: float) -> dict[str, float]:
        """Write the means since the last flush as train/<name>, with clips/s over all ranks. Every rank must call
        it."""
        names = sorted(self._sums)
        means = all_sum(torch.stack([self._sums[name] for name in names]).float()) / (self.world * self._steps)
        seconds = time.perf_counter() - self._clock
        values = {f"train/{name}": value for name, value in zip(names, means.tolist(), strict=True)}
        values["train/clips_per_s"] = self._steps * self.batch_clips / seconds
        values |= {f"train/{name}": value for name, value in extra.items()}
        self.write(step, values)
        if not math.isfinite(values["train/loss"]):  # the same number on every rank
            raise UserError(
                f"the loss is {values['train/loss']} at step {step}: lower train.lr; checkpoints are as they were"
            )
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{values['train/loss']:.3f}", clips_s=f"{values['train/clips_per_s']:.0f}")
        self._sums, self._steps, self._clock = {}, 0, time.perf_counter()
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard scalars."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def say(self, line: str) -> None:
        """A line above the progress bar, on rank 0."""
        if self.bar is not None:
            self.bar.write(line)

    def close(self) -> None:
        if self._file is not None:
            self.bar.close()
            self._file.close()
            self._board.close()


class _Pause:
    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.metrics._clock += time.perf_counter() - self.start


def _drop_later_steps(path: Path, step: int) -> None:
    """A resumed run writes the steps after its checkpoint again."""
    if path.is_file():
        # A killed run may have left half a line at the end, without its newline.
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
        temporary.replace(path)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) pairs of a metrics.jsonl."""
    series = defaultdict(list)
    for line in path.read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            series[name].append((step, value))
    return dict(series)


def plot_loss(metrics: Path, path: Path, selection_step: int | None = None) -> None:
    """Training and validation flow loss, alignment and BiT-C losses over steps; the step of the choice is marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*series["train/flow_loss"], strict=True), color="#9ecae1", linewidth=1, label="train flow loss")
    axes.plot(
        *zip(*series["val/flow_loss"], strict=True), color="#08519c", marker="o", markersize=3, label="validation"
    )
    for domain, style in (("speech", "--"), ("audio", ":")):
        if points := series.get(f"val/flow_loss_{domain}"):
            axes.plot(
                *zip(*points, strict=True), color="#08519c", linestyle=style, linewidth=1, label=f"validation, {domain}"
            )
    for name, colour, label in (("align", "#e6550d", "alignment loss"), ("bitc", "#fdae6b", "BiT-C loss")):
        if points := [(step, value) for step, value in series[f"train/{name}_loss"] if value > 0]:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=label)
    if selection_step:
        axes.axvline(selection_step, color="grey", linewidth=1, linestyle=":")
        axes.annotate(
            "layers chosen", (selection_step, axes.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
