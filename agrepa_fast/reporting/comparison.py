"""`agrepa compare`: strategies by seeds, or finished runs; tables of differences with their intervals, and plots."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from math import isfinite
from pathlib import Path

import torch

from ..config import MEASURED, Config
from ..config_file import load_config
from ..data.matching import matching_index
from ..errors import UserError
from ..evaluation.compare import Difference, Evaluated, check_comparable, differences
from ..evaluation.jobs import ANOTHER, Arm, Experiment, Job, merge_plan, run_jobs, write_plan
from ..evaluation.stored import read_layers, read_losses, read_results
from ..files import FolderLock, write_atomically
from ..models.registry import make_model
from ..training.builder import check_together, fit_to_shards
from ..zero.ds_config import find_ds_config
from .comparison_plots import plot_curves, plot_forest
from .comparison_report import comparison_document, report_markdown
from .comparison_tables import Comparison, value_rows
from .opened import check_out
from .page.document import write_document

_PLAN = "plan.json"  # only a comparison that trains has it
_CHOSEN = ("val/flow_loss", "mmd", "mos", "wer_truth_capped", "mel_l1", "similarity")  # forest plots
_BITC = ("bitc_speech", "bitc_audio")  # of align: a run that aligns no layer trains it, too
_LONGEST = 200  # characters of a label; a name in a folder has at most 255 bytes
_OF_ARMS = ("align", "probe", "train", "flow.times", "flow.average", "flow.drop_tokens", "flow.drop_reference")


def compare_strategies(
    strategies: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str],
    *,
    preset: str,
    warmup: int | None,
    out: Path,
    baseline: str | None,
    ds_config: str,
    ranks: int | None,
    dry_run: bool,
) -> None:
    """Run `agrepa compare --strategies`: train every strategy with every seed from one warm-up per seed, evaluate, and
    compare. A signal ends the running job, and what is finished is compared; the same command goes on.

    Raises UserError for settings that do not fit, before anything is trained, and if a job failed.
    """
    experiment = _experiment(strategies, seeds, overrides, preset, warmup, out, ds_config, ranks)
    jobs, labels = experiment.jobs(), [arm.label for arm in experiment.arms]
    baseline = _baseline(baseline, labels)
    _print_plan(experiment, jobs)
    if dry_run:
        merge_plan(jobs, out / _PLAN)
        return
    check_out(out)
    with FolderLock(out, ANOTHER):
        write_plan(jobs, out / _PLAN)
        if evaluated := _evaluations(experiment)[0]:
            check_comparable(evaluated)  # not only after hours of training
        interrupted = None
        try:
            failed = run_jobs(jobs, print)
        except KeyboardInterrupt as signal:
            interrupted, failed = signal, [job for job in jobs if not job.finished]
        runs, unaligned = _evaluations(experiment)
        missing = [*(job.name for job in failed), *(f"{name} (chose no layers)" for name in unaligned)]
        shared = {run.seed for run in runs if run.label == baseline}
        alone = [f"{run.label}, seed {run.seed}" for run in runs if run.seed not in shared]
        missing += [f"{name} (its seed has no {baseline} to compare with)" for name in alone]
        runs = [run for run in runs if run.seed in shared]
        if len({run.label for run in runs}) < 2:
            raise interrupted or UserError(
                f"{out}: no run of the baseline {baseline!r} and of another strategy with one seed finished: "
                f"{', '.join(missing)}"
            )
        write_comparison(runs, baseline, out, _settings(experiment), missing)
        if interrupted is not None:
            raise interrupted
    if failed:
        raise UserError(
            f"{len(failed)} jobs failed twice, or need one that did; their cells are empty: "
            f"{', '.join(job.name for job in failed)}"
        )
    if unaligned:
        raise UserError(
            f"{'; '.join(unaligned)}: no probe could rank the layers, so nothing was aligned, and their cells are "
            "empty: lower probe.every, or raise probe.clips"
        )


def _evaluations(experiment: Experiment) -> tuple[list[Evaluated], list[str]]:
    """Return what is evaluated so far, and the runs that could not choose layers."""
    runs, unaligned = [], []
    for arm, seed in product(experiment.arms, experiment.seeds):
        folder = experiment.run_folder(arm, seed)
        if not (folder / "evaluate" / "results.json").is_file():
            continue
        if arm.strategy in experiment.measured and not read_layers(folder):
            unaligned.append(f"{arm.label}, seed {seed}")
        else:
            runs.append(_evaluated(folder / "evaluate", arm.label))
    return runs, unaligned


def compare_runs(folders: Sequence[Path], *, out: Path, baseline: str | None) -> None:
    """Run `agrepa compare RUN RUN …`: compare runs that `agrepa evaluate` has measured, as arms by align.* and pairs by
    run.seed."""
    runs, settings = _arms([_evaluated(folder, None) for folder in folders])
    labels = list(dict.fromkeys(run.label for run in runs))
    for number, run in enumerate(runs):
        for other in runs[number + 1 :]:
            if (run.label, run.seed) == (other.label, other.seed):
                raise UserError(
                    f"{run.folder} and {other.folder} are both {run.label} with seed {run.seed}: name one of them"
                )
    if len(labels) < 2:
        raise UserError(f"all runs have align.strategy={labels[0]}: there is nothing to compare")
    check_out(out)
    if (out / _PLAN).exists():
        raise UserError(f"--out {out} holds a comparison that trains, with a report of its own: choose another folder")
    with FolderLock(out, ANOTHER):
        write_comparison(runs, _baseline(baseline, labels), out, settings, [])


def _arms(runs: Sequence[Evaluated]) -> tuple[list[Evaluated], dict[str, object]]:
    """Return finished runs, labelled by align.strategy and the settings of align.* in which those that align differ,
    and the names of other settings of training in which they differ."""
    configs = [load_config(run.folder.parent / "config.yaml") for run in runs]
    aligns, labelled = [config.align for config in configs], []
    for run, align in zip(runs, aligns, strict=True):
        alike = _differing([one for one in aligns if (one.strategy == "none") == (align.strategy == "none")])
        own = [name for name in _differing(aligns) if name in (*alike, *_BITC) and name != "strategy"]
        label = ", ".join([run.label, *(f"{name}={getattr(align, name)}" for name in own)])
        labelled.append(replace(run, label=label))
    sections = ("model", "data", "flow", "probe", "train", "eval")
    others = [
        f"{section}.{name}" for section in sections for name in _differing([getattr(c, section) for c in configs])
    ]
    others = [name for name in others if name not in ("data.path", "train.start_from")]
    if len({run.results.get("step") for run in runs}) > 1:
        others.append("the step of the checkpoint")
    return labelled, {"settings that differ besides align": ", ".join(others)} if others else {}


def _differing(sections: Sequence[object]) -> list[str]:
    """Return the names of the settings in which configurations of one section differ."""
    names = [setting.name for setting in fields(sections[0])]
    return [name for name in names if any(getattr(one, name) != getattr(sections[0], name) for one in sections)]


def _experiment(strategies, seeds, overrides, preset, warmup, out, ds_config, ranks) -> Experiment:
    arms = tuple(Arm.parse(text) for text in strategies)
    if not all(arm.label for arm in arms):
        raise UserError("--strategies: an arm is a strategy or LABEL:section.field=value, and one has no label")
    for name, values in (("--strategies", [arm.label for arm in arms]), ("--seeds", list(seeds))):
        if repeated := [value for value in values if values.count(value) > 1]:
            raise UserError(f"{name}: {repeated[0]} twice")
    if len(arms) < 2:
        raise UserError("--strategies: at least two, of which the first is the baseline")
    metrics = tuple(one for one in overrides if one.startswith("metrics."))
    training = tuple(one for one in overrides if not one.startswith("metrics."))
    for name in ("align.strategy", "run.seed", "run.dir", "run.id", "train.start_from"):
        if given := [one for one in overrides if one.startswith(f"{name}=")]:
            raise UserError(f"{given[0]}: `agrepa compare` sets it itself")
    config = load_config(preset, [*overrides, "align.strategy=none"])  # its own may not fit the steps
    warmup = config.probe.warmup_steps if warmup is None else warmup
    if not 0 < warmup < config.train.steps:
        raise UserError(f"--warmup {warmup}: must leave steps of train.steps={config.train.steps} for the branches")
    find_ds_config(ds_config)
    steps = config.train.steps - warmup
    for arm in arms:  # so that no arm is refused after hours of training
        _check_arm(arm)
        probe = ("probe.start_step=1", "probe.warmup_steps=1") if arm.strategy in MEASURED else ()
        settings = (f"align.strategy={arm.strategy}", f"train.steps={steps}", *probe, *arm.overrides)
        branch = load_config(preset, [*training, *settings])
        if branch.train.copy_to is not None:
            raise UserError(
                f"train.copy_to={branch.train.copy_to}: the runs of a comparison would all copy into it: set "
                f"train.copy_to=null, and copy {out} afterwards"
            )
        _check_shards(branch)
    experiment = Experiment(
        arms, tuple(seeds), preset, warmup, steps, out, ds_config, ranks, training, metrics, frozenset(MEASURED)
    )
    _check_folders(experiment)
    return experiment


def _check_arm(arm: Arm) -> None:
    """Raise UserError for an override of one arm that would measure it otherwise than the others, or that the warm-up
    or another job has to share."""
    if arm.overrides and "," in arm.label:
        raise UserError(f"--strategies {arm.label}:…: an arm with settings of its own has an option of its own")
    for name in (override.partition("=")[0] for override in arm.overrides):
        shared = name not in _OF_ARMS and name.partition(".")[0] not in _OF_ARMS
        if shared or name == "train.start_from":
            raise UserError(f"--strategies {arm.label}: {name} has to be the same for all arms")


def _check_shards(config: Config) -> None:
    """Raise UserError if the shards, where there are some already, or the model do not go with an arm's alignment."""
    if not (Path(config.data.path) / "index.json").is_file():
        return
    index = matching_index(config.data)
    config = fit_to_shards(config, index)
    with torch.device("meta"):
        model = make_model(config.model, config.flow.prediction)
    check_together(config, model, index)


def _check_folders(experiment: Experiment) -> None:
    """Raise UserError if two arms would have one folder, whose runs the second would take for its own, or one that no
    file system makes."""
    taken = {experiment.warmup_folder(0): "the warm-up"}
    for arm in experiment.arms:
        other = taken.setdefault(experiment.run_folder(arm, 0), arm.label)
        if other != arm.label:
            raise UserError(
                f"--strategies: {arm.label!r} and {other} would share a folder: give one a label of other letters"
            )
        if len(arm.label) > _LONGEST:
            raise UserError(f"--strategies: {arm.label[:40]}… is no name of a folder: give it a shorter label")


def _baseline(given: str | None, labels: Sequence[str]) -> str:
    if given is not None and given not in labels:
        raise UserError(f"--baseline {given}: there are {', '.join(labels)}")
    return given or labels[0]


def _print_plan(experiment: Experiment, jobs: Sequence[Job]) -> None:
    done = sum(job.finished for job in jobs)
    branches = len(experiment.arms) * len(experiment.seeds)
    print(
        f"{len(experiment.seeds)} warm-ups of {experiment.warmup} steps, {branches} runs of {experiment.steps} steps, "
        f"{branches} evaluations: {len(jobs)} jobs, {done} done; the time left is printed once the first has run"
    )
    for job in jobs:
        print(f"  {'done' if job.finished else '    '}  {job.name}: {job.folder}")


def _settings(experiment: Experiment) -> dict[str, object]:
    return {
        "preset": experiment.preset,
        "warm-up steps": experiment.warmup,
        "steps after it": experiment.steps,
        "overrides": " ".join((*experiment.overrides, *experiment.metrics)) or "none",
        **{arm.label: f"{arm.strategy}, {' '.join(arm.overrides)}" for arm in experiment.arms if arm.overrides},
    }


def _evaluated(folder: Path, label: str | None) -> Evaluated:
    """Return the evaluation of a run's folder, or the folder that `agrepa evaluate` wrote itself."""
    found = [folder] if (folder / "results.json").is_file() else sorted(folder.glob("evaluate*/"))
    found = [path for path in found if (path / "results.json").is_file()]
    if len(found) != 1:
        raise UserError(
            f"{folder} holds {len(found) or 'no'} evaluation{'s' if found else ''}: "
            + ("name one of them" if found else f"run agrepa evaluate {folder} first")
        )
    run = found[0].parent if found[0] == folder else folder
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run (no config.yaml): its strategy and seed are unknown")
    config = load_config(run / "config.yaml")
    losses = read_losses(run, read_results(found[0] / "results.json"))
    return Evaluated(label or config.align.strategy, config.run.seed, found[0], losses)


def write_comparison(
    runs: Sequence[Evaluated], baseline: str, out: Path, settings: Mapping[str, object], failed: Sequence[str]
) -> None:
    """Write compare.csv, differences.csv, report.md, report.html and plots/, and print the report."""
    check_comparable(runs)
    found = differences(runs, baseline, runs[0].results["confidence"])
    comparison = Comparison(runs, found, baseline, settings, failed)
    report = report_markdown(comparison)  # reads all files, so that a damaged one leaves no half of a result
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    for old in (*(_forest(plots, metric) for metric in _CHOSEN), plots / "curves.png"):
        old.unlink(missing_ok=True)  # of an earlier comparison, which may have had metrics that this one lacks
    write_atomically(out / "compare.csv", _csv(_VALUES, value_rows(runs)))
    write_atomically(out / "differences.csv", _csv(_DIFFERENCES, [_difference_row(one, baseline) for one in found]))
    write_atomically(out / "report.md", report)
    for metric in _CHOSEN:
        part = [one for one in found if one.metric == metric]
        part = [one for one in part if not one.domain] or part  # the flow loss has rows of its domains in the tables
        if part:
            plot_forest(part, baseline, _forest(plots, metric))
    plot_curves({(run.label, run.seed): run.folder.parent / "metrics.jsonl" for run in runs}, plots / "curves.png")
    write_document(comparison_document(comparison, plots), out / "report.html")
    print(report)
    print(f"wrote {out}: report.html, report.md, compare.csv, differences.csv and plots")


def _forest(plots: Path, metric: str) -> Path:
    return plots / f"{metric.replace('/', '-')}.png"


_VALUES = ("strategy", "seed", "row", "domain", "metric", "value", "low", "high", "n")
_DIFFERENCES = (
    *("strategy", "baseline", "domain", "metric", "difference"),
    *("low_clips", "high_clips", "low_seeds", "high_seeds", "seeds", "p_holm"),
)


def _csv(header: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    return text.getvalue()


def _difference_row(one: Difference, baseline: str) -> dict[str, object]:
    row = {"strategy": one.label, "baseline": baseline, "domain": one.domain, "metric": one.metric}
    row |= {"difference": one.value, "p_holm": one.p, "seeds": one.seeds.n if one.seeds else 1}
    for name, interval in (("clips", one.clips), ("seeds", one.seeds)):
        if interval is not None and isfinite(interval.low):
            row |= {f"low_{name}": interval.low, f"high_{name}": interval.high}
    return row
