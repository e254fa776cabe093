"""When layers are measured during a run, and when a measurement becomes the layers that are aligned."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..alignment.aligner import Aligner
from ..attribution.csv import append_csv
from ..attribution.scores import LayerScores
from ..attribution.selection import LayerSelection, NotRankableError, select_as, unmeasured_selection
from ..attribution.stored import PooledStates, lasp
from ..config import DOMAINS, Config
from ..device import GRAPHS
from ..errors import UserError
from ..models.backbone import Backbone
from ..ranks import AgreedError
from .cost import probe_steps, refresh_period
from .fixed_clips import FixedClips
from .probe import ClipProbe, PendingScores
from .stored import pooled_states, storage_scores

MAX_FAILED = 3  # probes in a row


class LayerChoice:
    """The strategy of a run: when to measure, and which layers to align.

    A probe is launched after a step and read after the next one. foga and foga-vjp are only queued until then, and
    nothing waits for them.

    model: the module inside the engine. clips: for what layers contribute. storage_clips: for what they store. report:
    prints a line on rank 0. folder: the run's folder on rank 0, None elsewhere.
    """

    def __init__(
        self,
        config: Config,
        model: Backbone,
        aligner: Aligner,
        clips: FixedClips,
        storage_clips: FixedClips,
        report: Callable[[str], None],
        folder: Path | None = None,
    ):
        self.config, self.model, self.aligner, self.report, self.folder = config, model, aligner, report, folder
        self.clips, self.storage_clips = clips, storage_clips
        self.refresh = refresh_period(config, model, self._measured_clips()) if config.align.measured else 0
        self.probes: list[LayerScores] = []  # recent ones, to pool with the next
        self.last: LayerScores | None = None  # to compare with the next
        self.pending: PendingScores | LayerScores | None = None
        self._foga: ClipProbe | None = None
        self._norms: torch.Tensor | None = None  # (L,) of the step for gradnorm
        self._failures: list[str] = []  # of the last probes, in a row

    def start(self, domains: tuple[str, ...]) -> None:
        """Align from step 0 on if the strategy needs no scores."""
        align = self.config.align
        if not align.measured:
            depth = len(self.model.layers)
            self.aligner.select(unmeasured_selection(align, depth, domains, self.config.run.seed))

    def due(self, step: int) -> bool:
        """Return whether layers are measured after this many steps."""
        probe, align, selection = self.config.probe, self.config.align, self.aligner.selection
        if not align.measured or (align.stop is not None and step >= align.stop):
            return False
        if selection is None:
            since = step - probe.start_step
            return since >= 0 and (since % probe.every == 0 or step == probe.warmup_steps)
        return self.refresh > 0 and (step - selection.step) % self.refresh == 0

    def keep_gradient_norms(self, gradient_norms: Callable[[], torch.Tensor], step: int) -> None:
        """Keep the gradient norms (L,) of the blocks if gradnorm measures after this step. Call it between the last
        backward of a step and its update."""
        self._norms = None
        if self.config.align.strategy == "gradnorm" and self.due(step + 1):
            self._norms = gradient_norms()

    def after_step(self, step: int, timed: Callable[[], AbstractContextManager] = nullcontext) -> None:
        """Read the probe of the step before and choose layers, then launch a probe if one is due. Every rank must call
        it. timed: makes a context that measures the time of it. Raises UserError after MAX_FAILED probes in a row that
        failed: the run would align no layer to its end, or the wrong ones."""
        launches = self.due(step)  # before a choice changes the answer: gradient norms were kept by it
        with timed():
            self.read_pending()
            if launches and self.due(step):  # not if the layers have just been chosen
                self.pending = self._launch(step)
        align = self.config.align
        if align.measured and step == align.stop and self.aligner.selection is None:
            self.report(f"step {step}: align.stop={step} came before any layers were chosen: nothing was aligned")
        if len(self._failures) >= MAX_FAILED:
            chooses = f"align.strategy={self.config.align.strategy} chooses no layers"
            if self.aligner.selection is not None:
                chooses = "align.refresh chooses no layers again"
            raise AgreedError(
                f"{len(self._failures)} probes in a row failed, up to step {step}: {self._failures[-1]}; "
                f"without them {chooses}; checkpoints are as they were"
            )

    def read_pending(self) -> None:
        """Read the probe that is under way, if there is one, and decide."""
        if self.pending is None:
            return
        scores = self._take_pending()
        if scores is None:
            return
        self._write(scores)
        try:
            self._decide(scores)
        except NotRankableError as refusal:
            self.report(f"step {scores.step}: {scores.measure} does not rank yet: {refusal}")
        except ValueError as failure:
            self._report_failure(scores.step, failure)
            return
        self._failures = []

    def _take_pending(self) -> LayerScores | None:
        """Return the scores that are pending, and pend no longer; None if they failed."""
        pending, self.pending = self.pending, None
        if isinstance(pending, LayerScores):
            return pending
        return self._survive(pending.step, pending.read)

    def _launch(self, step: int) -> PendingScores | LayerScores | None:
        strategy = self.config.align.strategy
        if strategy == "gradnorm":
            return self._survive(step, lambda: self._gradient_scores(step))
        if strategy == "lasp":
            return self._survive(step, lambda: lasp(self._states(step), self._projections()))
        return self._launch_foga(step, strategy)

    def _launch_foga(self, step: int, measure: str = "foga") -> PendingScores:
        if self._foga is None or self._foga.measure != measure:
            self._foga = ClipProbe(self.model, self.clips, measure=measure)
        before = GRAPHS["captured"]
        pending = self._foga.launch(step, progress=self.folder is not None)
        if captured := GRAPHS["captured"] - before:
            self.report(f"step {step}: the probe is captured as {captured} CUDA graphs")
        return pending

    def _gradient_scores(self, step: int) -> LayerScores:
        """Return a step's gradient norms as scores. They are of the whole batch, hence the same for every domain, and
        a step counts as one clip."""
        if not self._norms.isfinite().all():
            raise ValueError("the gradient is not finite")
        domains = torch.tensor([DOMAINS.index(domain) for domain in self.clips.index.domains])
        values = self._norms.cpu()[:, None, None, None].expand(-1, len(domains), 1, 1).clone()
        return LayerScores(values, torch.zeros(len(domains)), domains, (float("nan"),), step=step, measure="gradnorm")

    def _states(self, step: int) -> PooledStates:
        return pooled_states(self.model, self.storage_clips, step, progress=self.folder is not None)

    def _projections(self) -> dict[str, torch.Tensor]:
        return {domain: projection.weight.detach().cpu() for domain, projection in self.aligner.bitc.items()}

    def _survive(self, step: int, measure: Callable):
        """Return measure(), or None after saying why it failed: that costs its time and nothing else."""
        try:
            return measure()
        except ValueError as failure:
            self._report_failure(step, failure)
            return None

    def _report_failure(self, step: int, failure: ValueError) -> None:
        self._failures.append(str(failure))
        self.report(f"step {step}: the probe failed and training goes on: {failure}")

    def _decide(self, scores: LayerScores) -> None:
        """Align the layers with the highest scores: at the end of the warm-up, before it once their choice is more
        than probe.confidence sure. On a refresh layers change only if the evidence says so."""
        probe, align, step = self.config.probe, self.config.align, scores.step
        before = self.aligner.selection
        selection = replace(select_as(align, probe, self._pool(scores), before), step=step)
        probabilities = [evidence["top_k_probability"] for evidence in selection.evidence.values()]
        known = None not in probabilities  # None: one clip says nothing about others
        sure = min(probabilities) if known else 0.0
        probability = f"{sure:.2f}" if known else "unknown"
        description = f"{selection.describe()} (with probability {probability}{self._compare_with_last(scores)})"
        early = before is None and step < probe.warmup_steps
        if early and sure <= probe.confidence:
            self.report(f"step {step}: {scores.measure} leads with {description}")
            return
        self.aligner.select(selection)
        if not self.refresh:
            self._foga = None  # the choice is final: free the memory of its graphs
        self._keep("selection.json", selection.save)
        if before is not None:
            self.report(f"step {step}: {_describe_change(before, selection)}: {description}")
        else:
            saved = -(-(probe.warmup_steps - step) // probe.every)
            ending = f"; decided early, {saved} probes saved" if early else ""
            self.report(f"step {step}: aligned from here on: {description}{ending}{self._describe_refresh()}")
        if selection.warning is not None and (before is None or before.layers != selection.layers):
            self.report(f"step {step}: warning: {selection.warning}")

    def _measured_clips(self) -> int:
        return len(self.storage_clips if self.config.align.strategy == "lasp" else self.clips)

    def _describe_refresh(self) -> str:
        """Return "; measured again every 200 steps, …", or "" if the choice is final."""
        if not self.refresh:
            return ""
        share = ""
        if self.config.train.batch_frames is None:
            steps = probe_steps(self.config, self.model, self._measured_clips())
            share = f", {steps / self.refresh:.1%} of training's block forwards"
        return f"; measured again every {self.refresh} steps{share}"

    def _pool(self, scores: LayerScores) -> LayerScores:
        """Return the scores together with those of recent probes, probe.pool in all. For gradnorm these are further
        clips, which count alike."""
        recent, pool = self.probes, self.config.probe.pool
        self.probes = [*recent, scores][1 - pool :] if pool > 1 else []
        return scores.joined_with(recent) if scores.measure == "gradnorm" else scores.pooled_with(recent, pool)

    def _compare_with_last(self, scores: LayerScores) -> str:
        """Return "; rank correlation with the probe before: speech 0.93", or "" for the first probe."""
        before, self.last = self.last, scores
        if before is None:
            return ""
        return "; rank correlation with the probe before: " + ", ".join(
            f"{domain} {scores.rank_correlation(before, domain):.2f}" for domain in scores.domains()
        )

    def _write(self, scores: LayerScores) -> None:
        self._keep("attribution.csv", lambda file: append_csv(file, scores))

    def _keep(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file of the run's folder, on rank 0. A full disk, or another program that wrote to the file, costs
        that file and nothing else."""
        if self.folder is None:
            return
        try:
            write(self.folder / name)
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            self.report(f"{name} could not be written ({reason}); training goes on")

    def finish(self, step: int) -> dict[str, dict]:
        """Measure what layers contribute and store at the end of a run. Every rank must call it.

        Returns the evidence of the choice. If the choice rests on no scores: that of the last FoG-A, {} if it failed.
        """
        scores = self._take_pending() if self.pending is not None else None  # too late to align anything
        if scores is not None:
            self._write(scores)
        if scores is None or (scores.measure, scores.step) != ("foga", step):
            scores = self._survive(step, self._launch_foga(step).read)
            if scores is not None:
                self._write(scores)
        for stored in self._survive(step, lambda: storage_scores(self._states(step), self._projections())) or []:
            self._write(stored)
        selection = self.aligner.selection
        evidence = selection.evidence if selection else {}
        return evidence or ({} if scores is None else scores.evidence())

    def state_dict(self) -> dict:
        """Return the aligner's state, recent probes, and the probe under way, which is waited for. Every rank must call
        it."""
        if self.pending is not None:
            # Decided when a run without this checkpoint would decide: after the next step.
            self.pending = self._take_pending()
        return {
            "aligner": self.aligner.state_dict(),
            "probes": [asdict(scores) for scores in self.probes],
            "last": None if self.last is None else asdict(self.last),
            "pending": None if self.pending is None else asdict(self.pending),
            "failures": self._failures,
        }

    def load_state_dict(self, state: dict) -> None:
        self.aligner.load_state_dict(state["aligner"])
        self.probes = [LayerScores(**scores) for scores in state["probes"]]
        self.last, self.pending = (
            None if state[name] is None else LayerScores(**state[name]) for name in ("last", "pending")
        )
        self._failures = state.get("failures", [])  # version 0.1 kept none


def _describe_change(before: LayerSelection, after: LayerSelection) -> str:
    if before.layers == after.layers:
        return "the same layers with new weights"
    kept = {d: sorted(set(before.layers.get(d, ())) & set(layers)) for d, layers in after.layers.items()}
    return "chosen again, heads kept of " + (
        ", ".join(f"{d} " + ", ".join(f"L{k}" for k in layers) for d, layers in kept.items() if layers) or "none"
    )
