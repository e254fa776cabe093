"""Training clips that cannot be read: counted by kind, named in faults.jsonl, and too many of them stop the run."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

import torch

from ..data.reading import Fault
from ..files import append_text
from ..ranks import AgreedError, all_gather, all_sum
from .context import RunContext
from .metrics import Metrics

FILE = "faults.jsonl"


class LostClips:
    """The clips that any rank could not read since the run's start or resume. A clip counts once, however often its
    turn comes."""

    def __init__(self, context: RunContext, metrics: Metrics):
        self.context, self.metrics = context, metrics
        self.total = sum(context.index.clips("train", domain) for domain in context.index.domains)
        self._new: dict[tuple[str, int], Fault] = {}  # found by this rank since the last report
        self._kinds: dict[tuple[str, int], str] = {}  # of all clips that any rank reported

    def add(self, faults: Iterable[Fault]) -> None:
        """Note the clips that a batch of this rank could not have."""
        for fault in faults:
            clip = fault.file, fault.clip
            if clip not in self._kinds:
                self._new[clip] = fault

    def report(self, step: int) -> None:
        """Write the clips found since the last report, and print their number, on rank 0. Raises UserError on all ranks
        if more than data.max_faults of the training clips are lost.

        Every rank must call it. It costs the sum of one number while every clip can be read.
        """
        count = torch.tensor([float(len(self._new))], device=self.context.device)
        if not all_sum(count).item():
            return
        faults = {
            clip: fault
            for of_rank in all_gather(self._new)
            for clip, fault in of_rank.items()
            if clip not in self._kinds
        }
        self._new = {}
        self._kinds |= {clip: fault.kind for clip, fault in faults.items()}
        if not faults:
            return
        path, allowed = self.context.folder / FILE, self.context.config.data.max_faults
        if self.context.rank == 0:
            lines = [json.dumps({"step": step, **asdict(fault)}) + "\n" for fault in faults.values()]
            if reason := append_text(path, "".join(lines)):
                self.metrics.print(f"step {step}: {FILE} could not be written ({reason}); training goes on")
        counts = Counter(self._kinds.values())
        self.metrics.write(step, {f"data/faults_{kind}": count for kind, count in counts.items()})
        fault = next(iter(faults.values()))
        lost = f"{len(self._kinds)} of {self.total} training clips could not be read"
        example = f"{fault.file}: {f'{fault.member}: ' if fault.member else ''}{fault.reason} ({fault.kind})"
        if len(self._kinds) > allowed * self.total:
            raise AgreedError(
                f"step {step}: {lost}, more than data.max_faults={allowed:g} allows; the latest is {example}; all "
                f"are in {path}: prepare these shards again, or raise data.max_faults"
            )
        self.metrics.print(f"step {step}: {lost}, others stand in; the latest is {example}; all are in {FILE}")
