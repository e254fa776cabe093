"""When layers are measured during a run, and when a measurement becomes the layers that are aligned."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch

from ..alignment.aligner import Aligner
from ..attribution.csv import append_csv
from ..attribution.scores import LayerScores
from ..attribution.selection import LayerSelection, NotRankableError, select_as, unmeasured_selection
from ..attribution.stored import lasp
from ..config import DOMAINS, Config
from .fixed_clips import FixedClips
from .probe import ClipProbe, PendingScores
from .stored import pooled_states, storage_scores


class LayerChoice:
    """The strategy of a run. A probe is launched after a step and read after the next one: foga and foga-vjp are only
    queued until then, and nobody waits for them.

    model: the module inside the engine. storage_clips: those that say what layers store. say: prints a line on rank 0.
    folder: the run's folder on rank 0, None elsewhere.
    """

    def __init__(
        self, config: Config, model, aligner: Aligner, clips: FixedClips, storage_clips: FixedClips, say, folder=None
    ):
        self.config, self.model, self.aligner, self.say, self.folder = config, model, aligner, say, folder
        self.clips, self.storage_clips = clips, storage_clips
        self.probes: list[LayerScores] = []  # the recent ones since the last choice, to pool with the next
        self.last: LayerScores | None = None  # to compare the next with
        self.pending: PendingScores | LayerScores | None = None
        self._foga: ClipProbe | None = None
        self._norms: torch.Tensor | None = None  # (L,) of a watched step

    def start(self, domains: tuple[str, ...]) -> None:
        """Align from step 0 on where the strategy needs no scores."""
        align, model = self.config.align, self.config.model
        if not align.measured:
            self.aligner.select(unmeasured_selection(align, model.depth, domains, self.config.run.seed))

    def due(self, step: int) -> bool:
        """Whether layers are measured after this many steps."""
        schedule, align, selection = self.config.probe, self.config.align, self.aligner.selection
        if not align.measured or (align.stop is not None and step >= align.stop):
            return False
        if selection is None:
            return step >= schedule.start_step and (step % schedule.every == 0 or step == schedule.warmup_steps)
        return align.refresh > 0 and (step - selection.step) % align.refresh == 0

    def watch(self, gradient_norms: Callable[[], torch.Tensor], step: int) -> None:
        """Keep the gradient norms (L,) of the blocks if gradnorm measures after this step. Call it between the last
        backward of a step and its update."""
        self._norms = None
        if self.config.align.strategy == "gradnorm" and self.due(step + 1):
            self._norms = gradient_norms()

    def after_step(self, step: int, timed=nullcontext) -> None:
        """Read the probe of the step before and choose, then launch one when it is due. Every rank must call it."""
        launches = self.due(step)  # as the watched step saw it
        with timed():
            self.settle()
            if launches and self.due(step):  # not when the layers have just been chosen
                self.pending = self._launch(step)

    def settle(self) -> None:
        """Read the probe that is under way, if any, and decide."""
        if self.pending is None:
            return
        scores = self._read()
        if scores is None:
            return
        self._write(scores)
        try:
            self._decide(scores)
        except NotRankableError as refusal:
            self.say(f"step {scores.step}: {scores.measure} does not rank yet: {refusal}")
        except ValueError as failure:
            self.say(f"step {scores.step}: the probe failed and training goes on: {failure}")

    def _read(self) -> LayerScores | None:
        """The pending scores, no longer pending; None when they failed."""
        pending, self.pending = self.pending, None
        if isinstance(pending, LayerScores):
            return pending
        return self._try(pending.scores.step, pending.read)

    def _launch(self, step: int) -> PendingScores | LayerScores | None:
        strategy = self.config.align.strategy  # foga and foga-vjp are only queued
        if strategy == "gradnorm":
            return self._try(step, lambda: self._gradient_scores(step))
        if strategy == "lasp":
            return self._try(step, lambda: lasp(self._states(step), self._projections()))
        return self.launch_foga(step, strategy)

    def launch_foga(self, step: int, measure: str = "foga") -> PendingScores:
        if self._foga is None or self._foga.measure != measure:
            self._foga = ClipProbe(self.model, self.clips, self.config, measure=measure)
        return self._foga.launch(step, progress=self.folder is not None)

    def _gradient_scores(self, step: int) -> LayerScores:
        """One step's norms: of the whole batch, hence the same for every domain; a step counts as one clip."""
        if not self._norms.isfinite().all():
            raise ValueError("the gradient is not finite")
        domains = torch.tensor([DOMAINS.index(domain) for domain in self.clips.index.domains])
        values = self._norms.cpu()[:, None, None, None].expand(-1, len(domains), 1, 1).clone()
        return LayerScores(values, torch.zeros(len(domains)), domains, (float("nan"),), step=step, measure="gradnorm")

    def _states(self, step: int):
        return pooled_states(self.model, self.storage_clips, self.config, step, progress=self.folder is not None)

    def _projections(self) -> dict[str, torch.Tensor]:
        return {domain: projection.weight.detach().cpu() for domain, projection in self.aligner.bitc.items()}

    def _try(self, step: int, measure):
        """measure(), or None with a line said: a probe that fails costs its time and nothing else."""
        try:
            return measure()
        except ValueError as failure:
            self.say(f"step {step}: the probe failed and training goes on: {failure}")
            return None

    def _decide(self, scores: LayerScores) -> None:
        """Align the layers that stand out: at the end of the warm-up, or before it once their choice is
        probe.confidence sure; on a refresh, at once."""
        schedule, align, step = self.config.probe, self.config.align, scores.step
        selection = replace(select_as(align, self._pooled(scores)), step=step)
        probabilities = [measured["top_k_probability"] for measured in selection.evidence.values()]
        sure = 0.0 if None in probabilities else min(probabilities)  # None: one clip says nothing about others
        known = f"{sure:.2f}" if None not in probabilities else "unknown"
        found = f"{selection.describe()} (with probability {known}{self._drift(scores)})"
        before = self.aligner.selection
        early = before is None and step < schedule.warmup_steps
        if early and sure <= schedule.confidence:
            self.say(f"step {step}: {scores.measure} leads with {found}")
            return
        self.aligner.select(selection)
        self.probes = []
        if not align.refresh:
            self._foga = None  # frozen: the memory of its graphs goes back
        if self.folder is not None:
            selection.save(self.folder / "selection.json")
        if before is not None:
            self.say(f"step {step}: {_change(before, selection)}: {found}")
            return
        saved = -(-(schedule.warmup_steps - step) // schedule.every) if early else 0
        self.say(
            f"step {step}: aligned from here on: {found}" + (f"; decided early, {saved} probes saved" if early else "")
        )

    def _pooled(self, scores: LayerScores) -> LayerScores:
        """The scores with those of recent probes, probe.pool together: of the same clips, or of further ones."""
        recent = self.probes
        self.probes = [*recent, scores][1 - self.config.probe.pool :] if self.config.probe.pool > 1 else []
        return scores.joined_with(recent) if scores.measure == "gradnorm" else scores.pooled_with(recent)

    def _drift(self, scores: LayerScores) -> str:
        """ "; rank correlation with the probe before: speech 0.93" """
        before, self.last = self.last, scores
        if before is None:
            return ""
        return "; rank correlation with the probe before: " + ", ".join(
            f"{domain} {scores.rank_correlation(before, domain):.2f}" for domain in scores.domains()
        )

    def _write(self, scores: LayerScores) -> None:
        if self.folder is not None:
            append_csv(self.folder / "attribution.csv", scores)

    def measure_storage(self, step: int) -> None:
        """Write down what layers store of the teacher. Every rank must call it."""
        for scores in self._try(step, lambda: storage_scores(self._states(step), self._projections())) or []:
            self._write(scores)

    def finish(self, step: int) -> dict[str, dict]:
        """Read what is under way, and measure what layers contribute and store at the end of a run. Returns the
        evidence of the choice; where it rests on no scores, that of the last FoG-A, {} when that failed."""
        under_way = self._read() if self.pending is not None else None  # too late to align anything
        if under_way is not None:
            self._write(under_way)
        scores = under_way
        if scores is None or (scores.measure, scores.step) != ("foga", step):
            scores = self._try(step, self.launch_foga(step).read)
        if scores is not None:
            self._write(scores)
        self.measure_storage(step)
        selection = self.aligner.selection
        evidence = selection.evidence if selection else {}
        return evidence or ({} if scores is None else scores.evidence())

    def state_dict(self) -> dict:
        """The aligner's state, recent probes, and the one under way, which is waited for."""
        if self.pending is not None:
            # Decided when a run without this checkpoint would: after the next step.
            self.pending = self._read()
        return {
            "aligner": self.aligner.state_dict(),
            "probes": [asdict(scores) for scores in self.probes],
            "last": None if self.last is None else asdict(self.last),
            "pending": None if self.pending is None else asdict(self.pending),
        }

    def load_state_dict(self, state: dict) -> None:
        self.aligner.load_state_dict(state["aligner"])
        self.probes = [LayerScores(**scores) for scores in state["probes"]]
        self.last, self.pending = (
            None if state[name] is None else LayerScores(**state[name]) for name in ("last", "pending")
        )


def _change(before: LayerSelection, after: LayerSelection) -> str:
    if before.layers == after.layers:
        return "the same layers with new weights"
    kept = {d: sorted(set(before.layers.get(d, ())) & set(layers)) for d, layers in after.layers.items()}
    return "chosen again, heads kept of " + (
        ", ".join(f"{d} " + ", ".join(f"L{k}" for k in layers) for d, layers in kept.items() if layers) or "none"
    )
