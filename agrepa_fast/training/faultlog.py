"""Clips that training had to do without: counted by kind, named in faults.jsonl, and too many of them stop the run."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from ..data.index import Index
from ..data.reading import Fault
from ..errors import UserError
from ..ranks import all_gather, all_sum
from .metrics import Metrics

FILE = "faults.jsonl"


class FaultLog:
    """Each clip counts once, however often its turn comes, from the run's start or resume on. share: of the training
    clips that may be lost (data.max_faults)."""

    def __init__(self, index: Index, share: float, metrics: Metrics, folder: Path, device: torch.device):
        self.total = sum(index.clips("train", domain) for domain in index.domains)
        self.share, self.metrics, self.folder, self.device = share, metrics, folder, device
        self._found: dict[tuple[str, int], Fault] = {}  # by this rank, since the last flush
        self._kinds: dict[tuple[str, int], str] = {}  # of all clips lost by any rank

    def note(self, faults: Iterable[Fault]) -> None:
        """What a batch of this rank had to do without."""
        for fault in faults:
            clip = fault.file, fault.clip
            if clip not in self._kinds:
                self._found[clip] = fault

    def flush(self, step: int) -> None:
        """Write what was found since the last flush, on rank 0. Every rank must call it, and all raise UserError when
        more is lost than allowed. Costs a sum of one number while all is well."""
        count = torch.tensor([float(len(self._found))], device=self.device)
        if not all_sum(count).item():
            return
        faults = {
            clip: fault for found in all_gather(self._found) for clip, fault in found.items() if clip not in self._kinds
        }
        self._found = {}
        self._kinds |= {clip: fault.kind for clip, fault in faults.items()}
        if not faults:
            return
        counts = Counter(self._kinds.values())
        if dist.get_rank() == 0:
            with (self.folder / FILE).open("a") as file:
                file.writelines(json.dumps({"step": step, **asdict(fault)}) + "\n" for fault in faults.values())
        self.metrics.write(step, {f"data/faults_{kind}": count for kind, count in counts.items()})
        fault = next(iter(faults.values()))
        lost = f"{len(self._kinds)} of {self.total} training clips could not be read"
        example = f"{fault.file}: {f'{fault.member}: ' if fault.member else ''}{fault.reason} ({fault.kind})"
        if len(self._kinds) > self.share * self.total:
            raise UserError(
                f"step {step}: {lost}, more than data.max_faults={self.share:g} allows; the latest is {example}; all "
                f"are in {self.folder / FILE}: prepare these shards again, or raise data.max_faults"
            )
        self.metrics.say(f"step {step}: {lost}, others stand in; the latest is {example}; all are in {FILE}")
