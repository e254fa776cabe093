"""The pass that teachers and tokenizers share: read waves ahead, compute a batch, keep the result of each clip."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ranks import Ranks
from .job import Stage, list_work, read_work, work_file, write_work

BATCH = 16  # clips per call of a teacher or tokenizer
REASON = "reason"  # the only entry of the result of a clip that cannot be used


class BatchPass:
    """Computes something of every clip, a batch at a time, and keeps the result of each clip in a work file.

    read(batch) returns the inputs, in threads that read ahead; compute(batch, inputs) returns a dict of arrays per
    clip, {REASON: text} for one that cannot be used. A clip is anything with a `name`, unique in the folder. A batch
    with a missing result is computed whole, so that the numbers of a clip do not depend on ranks and interruptions: on
    GPUs they depend on its batch.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        folder: Path,
        read: Callable[[list], Any],
        compute: Callable[[list, Any], Iterable[dict[str, np.ndarray]]],
    ):
        self.pool, self.folder, self.read, self.compute = pool, folder, read, compute
        self.unusable: dict[str, str] = {}  # name -> reason, of the clips of this rank's batches

    def run(self, batches: Sequence[list], stage: Stage) -> None:
        """Compute the missing results of all batches, and count their clips in `stage`."""
        for batch, computed in self.each(batches):
            stage.add(sum(clip.seconds for clip in batch), len(batch)) if computed else stage.skip(len(batch))

    def each(self, batches: Sequence[list]) -> Iterator[tuple[list, bool]]:
        """Yield (batch, whether it was computed now) once the results of its clips are in their files."""
        present = list_work(self.folder)

        def read(batch: list) -> Any:
            complete = all(present & {self.file(clip).name, self._mark(clip).name} for clip in batch)
            return None if complete else self.read(batch)

        for batch, inputs in zip(batches, read_ahead(self.pool, read, batches, depth=2), strict=True):
            if inputs is not None:
                for clip, result in zip(batch, self.compute(batch, inputs), strict=True):
                    if REASON in result:
                        self.unusable[clip.name] = result[REASON]
                    write_work(self._mark(clip) if REASON in result else self.file(clip), **result)
            else:
                marked = [clip for clip in batch if self._mark(clip).name in present]
                self.unusable |= {clip.name: str(read_work(self._mark(clip))[REASON]) for clip in marked}
            yield batch, inputs is not None

    def gather_unusable(self, ranks: Ranks) -> dict[str, str]:
        """Return the reasons of all ranks' clips that cannot be used. Every rank must call it."""
        return {name: reason for part in ranks.all_gather(self.unusable) for name, reason in part.items()}

    def file(self, clip) -> Path:
        return work_file(self.folder, f"{clip.name}.npz")

    def _mark(self, clip) -> Path:
        """Return the file of a clip that cannot be used; its name tells without reading it."""
        return work_file(self.folder, f"{clip.name}.unusable.npz")

    def result(self, clip) -> dict[str, np.ndarray]:
        """Return the result of a clip."""
        try:
            return read_work(self.file(clip))
        except FileNotFoundError:
            return read_work(self._mark(clip))


def compute_each(name: str, compute: Callable[[list], Iterable], inputs: list) -> list:
    """Return compute(inputs), a result per input. If it raises, it is called for each input alone, and the reason, a
    str, takes the place of the results that it raises for. Raises if it raises for all of several inputs, or for want
    of memory: then the inputs are not the cause."""
    try:
        return list(compute(inputs))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if len(inputs) > 1:
            results = [one for value in inputs for one in compute_each(name, compute, [value])]
            if all(isinstance(result, str) for result in results):
                raise
            return results
        return [f"{name} fails: {type(error).__name__}: {' '.join(str(error).split())[:160]}"]


def batches_by_length(clips: Iterable) -> list[list]:
    """Return batches of clips with like numbers of frames. They depend on the clips alone, not on the ranks."""
    clips = sorted(clips, key=lambda clip: (clip.frames, clip.name))
    return [clips[start : start + BATCH] for start in range(0, len(clips), BATCH)]


def read_ahead(pool: ThreadPoolExecutor, task: Callable, items: Iterable, depth: int = 32) -> Iterator:
    """Yield task(item) per item, in order. Threads compute up to `depth` results before they are asked for."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(task, item))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
