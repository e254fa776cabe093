"""Comparisons of evaluated runs, and the jobs that make them."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.aggregate import SetDistances
from agrepa_fast.evaluation.compare import Evaluated, agreement, check_comparable, differences
from agrepa_fast.evaluation.jobs import Arm, Experiment, Job, run_jobs, write_plan
from agrepa_fast.evaluation.results import FIELDS, clip_rows, summarise, write_clips
from agrepa_fast.evaluation.stored import read_clips
from agrepa_fast.reporting import comparison

from ..ranks import ROOT
from ..reporting.listening import write_recordings

CLIPS = [f"clip{number:02}" for number in range(24)]


def evaluated(folder: Path, label: str, seed: int, *, worse: float = 0.0, manifest: str = "m") -> Evaluated:
    """An evaluation as `agrepa evaluate` writes it, of clips whose MOS is lower and whose embeddings are further off by
    `worse`."""
    folder.mkdir(parents=True)
    random, of_seed = np.random.default_rng(0), np.random.default_rng(seed)
    quality, vectors, reference = random.normal(3, 0.5, 24), random.normal(size=(24, 3)), random.normal(size=(40, 3))
    rows = []
    for name, value in zip(CLIPS, quality + 0.05 * of_seed.normal(size=24) - worse, strict=True):
        row = dict.fromkeys(FIELDS) | {"row": "sample", "domain": "speech", "key": name, "draw": 0, "seconds": 1.0}
        rows.append(row | {"mos": float(value), "words": 4, "errors": 1, "text": "a b", "heard": "a, b", "sha256": "0"})
    write_clips(rows, folder / "clips.csv")
    moved = vectors + worse
    np.savez(folder / "embeddings.npz", **{"speech/sample": moved, "speech/reference": reference})
    summary = summarise(rows, {}, {}, ["mos"], 0.95)
    distances = SetDistances(reference)
    summary["sample"]["speech"]["mmd"] = {"value": distances.value("mmd", moved), "low": None, "high": None, "n": 24}
    facts = {"manifest": manifest, "vocoder": "v", "flow": {}, "models": {}, "circular": {}, "confidence": 0.95}
    (folder / "results.json").write_text(json.dumps(facts | {"rows": summary}))
    return Evaluated(label, seed, folder, 0.3 + worse + 0.001 * seed)


def test_rows_of_clips_survive_their_file(tmp_path):
    rows = clip_rows([], [], lambda wav: 0.01, {})
    assert rows == []
    row = dict.fromkeys(FIELDS) | {
        "row": "truth",
        "domain": "audio",
        "key": "007",
        "draw": 1,
        "seconds": 0.25,
        "errors": 0,
    }
    row |= {"understood": False, "mos": 0.1 + 0.2, "text": "1, 2", "heard": "", "sha256": "00"}
    write_clips([row], tmp_path / "clips.csv")
    assert read_clips(tmp_path / "clips.csv") == [row]


def test_arms_that_are_the_same_do_not_differ(tmp_path):
    runs = [evaluated(tmp_path / f"{label}{seed}", label, seed) for label in ("none", "again") for seed in (0, 1, 2)]
    for one in differences(runs, "none", 0.95):
        assert one.value == 0, one.metric
        assert not one.clear
        assert one.p == 1
        for interval in filter(None, (one.clips, one.seeds)):
            assert (interval.low, interval.high) == (0, 0)


def test_a_planted_difference_is_found_with_its_sign(tmp_path):
    runs = [evaluated(tmp_path / f"none{seed}", "none", seed) for seed in (0, 1, 2)]
    runs += [evaluated(tmp_path / f"bad{seed}", "bad", seed + 0, worse=0.4) for seed in (0, 1, 2)]
    runs += [evaluated(tmp_path / f"same{seed}", "same", seed) for seed in (0, 1, 2)]
    found = {(one.label, one.metric): one for one in differences(runs, "none", 0.95)}
    mos = found["bad", "mos"]
    assert mos.value == pytest.approx(-0.4)
    assert mos.clear
    assert mos.p == 0.5  # 2 of 8 sign patterns, twice for two arms
    assert found["bad", "mmd"].value > 0
    assert found["bad", "mmd"].clips.low > 0
    assert found["bad", "val/flow_loss"].value == pytest.approx(0.4)
    assert found["bad", "val/flow_loss"].clips is None
    assert found["same", "mos"].value == 0
    assert found["bad", "wer"].value == 0


def test_one_seed_says_nothing_of_the_method(tmp_path):
    runs = [evaluated(tmp_path / label, label, 0, worse=worse) for label, worse in (("none", 0), ("bad", 0.4))]
    found = {one.metric: one for one in differences(runs, "none", 0.95)}
    assert found["mos"].seeds is None
    assert not found["mos"].clear
    assert found["val/flow_loss"].value == pytest.approx(0.4)


def test_a_seed_whose_run_diverged_has_no_part_in_the_interval_over_seeds(tmp_path):
    """No clip of it has a MOS."""
    runs = [evaluated(tmp_path / f"{label}{seed}", label, seed) for label in ("none", "foga") for seed in (0, 1, 2)]
    del runs[-1].results["rows"]["sample"]["speech"]["mos"]
    found = {one.metric: one for one in differences(runs, "none", 0.95)}
    assert found["mos"].seeds.n == 2
    assert found["mmd"].seeds.n == 3
    for run in runs[3:]:
        run.results["rows"]["sample"]["speech"].pop("mos", None)
    assert {one.metric: one for one in differences(runs, "none", 0.95)}["mos"].seeds is None


def test_other_clips_and_other_seeds_are_refused(tmp_path):
    runs = [evaluated(tmp_path / "a", "none", 0), evaluated(tmp_path / "b", "foga", 0, manifest="other")]
    with pytest.raises(UserError, match="were evaluated with other clips"):
        check_comparable(runs)
    with pytest.raises(UserError, match="no seed in common"):
        differences([runs[0], evaluated(tmp_path / "c", "foga", 1)], "none", 0.95)


def test_agreement_of_choices():
    assert agreement([{"speech": [1, 2]}, {"speech": [2, 3]}]) == pytest.approx(1 / 3)
    assert agreement([{"speech": [1]}]) is None


def test_runs_are_compared_by_strategy_and_seed(tmp_path, capsys):
    for label in ("none", "foga"):
        for seed in (0, 1):
            run = tmp_path / f"{label}-{seed}"
            evaluated(run / "evaluate", label, seed, worse=0.3 if label == "foga" else 0.0)
            write_recordings(run / "evaluate" / "wavs" / "sample", CLIPS[:1])
            (run / "config.yaml").write_text(f"align: {{strategy: {label}}}\nrun: {{seed: {seed}}}\n")
            (run / "summary.json").write_text(json.dumps({"val/flow_loss": {"ema": 0.5 + seed}}))
            (run / "metrics.jsonl").write_text('{"step": 1, "val/flow_loss": 0.5}\n{"step": 2, "val/flow_loss": 0.4}\n')
    (tmp_path / "foga-1" / "selection.json").write_text(json.dumps({"layers": {"speech": [1, 3]}}))
    (tmp_path / "none-1" / "selection.json").write_text(json.dumps({"layers": {}}))
    out = tmp_path / "out"
    folders = [str(path) for path in sorted(tmp_path.glob("*-?"))]
    main(["compare", *folders, "--baseline", "none", "--out", str(out)])
    page = (out / "report.html").read_text()
    assert re.findall(r'aria-pressed="false">(\w+)', page) == ["foga", "none"], "of the clip that has its wavs"
    assert "-0.300" in page
    assert "speech L1 L3" in page
    report = (out / "report.md").read_text()
    assert "| foga | speech | mos | -0.300 |" in report
    assert "speech L1 L3" in report
    assert "| none | 1 | none |" in report
    assert "With 2 seeds no p-value can be below 0.500" in report
    assert {path.name for path in (out / "plots").iterdir()} >= {
        "mos.png",
        "mmd.png",
        "val-flow_loss.png",
        "curves.png",
    }
    assert (out / "differences.csv").read_text().startswith("strategy,baseline,domain,metric,difference")
    assert len((out / "compare.csv").read_text().splitlines()) > 8
    for bad, message in (
        ([folders[0]], "at least two runs"),
        ([folders[0], folders[0]], "are both foga with seed 0"),
        ([folders[0], folders[1]], "all runs have align.strategy=foga"),
        ([folders[0], str(tmp_path)], "holds no evaluation"),
        ([folders[0], "train.steps=3"], "without effect but with --strategies"),
        ([folders[0], folders[2], "--baseline", "deep"], "there are foga, none"),
        ([folders[0], folders[2], "--out", folders[2]], "holds a run or an export: choose another folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["compare", "--out", str(tmp_path / "other"), *bad])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategies", "none,none"], "--strategies: none twice"),
        (["--strategies", "none,foga", "--seeds", "0,1,0"], "--seeds: 0 twice"),
        (["--strategies", "none"], "at least two"),
        (["--strategies", "none,fog"], "'fog' is unknown"),
        (["--strategies", "none,lasp", "model.token_dim=64"], "lasp"),
        (["--strategies", "none,foga", "--warmup", "400"], "must leave steps"),
        (["--strategies", "none,foga", "runs/a"], "name runs or --strategies"),
        (["--strategies", "none,foga", "run.seed=3"], "run.seed=3: `agrepa compare` sets it itself"),
        (["--strategies", "none,foga", "--strategies", "k:align.kk=2"], "align.kk"),
        (["--strategies", "a b:align.k=1", "--strategies", "a-b:align.k=2"], "'a-b' and a b would share a folder"),
        (["--strategies", "none", "--strategies", "warmup:align.k=1"], "'warmup' and the warm-up would share a folder"),
        (["--strategies", "none", "--strategies", ":align.k=1"], "one has no label"),
        (["--strategies", ","], "one has no label"),
        (["--strategies", "none", "--strategies", "x" * 300 + ":align.k=1"], "give it a shorter label"),
        (["--strategies", "none,foga", "--ds_config", "nope.json"], "nope.json"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_anything_is_trained(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_plan_may_be_shorter_than_the_preset_s_own_warm_up(tmp_path, capsys):
    main(
        [
            "compare",
            "--strategies",
            "none,foga",
            "--warmup",
            "80",
            "--dry-run",
            "train.steps=160",
            "--out",
            str(tmp_path / "x"),
        ]
    )
    assert "3 warm-ups of 80 steps, 6 runs of 80 steps" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_arms():
    assert Arm.parse("fixed:4,8") == Arm("fixed:4,8", "fixed:4,8")
    assert Arm.parse("k2:align.k=2,align.strategy=deep") == Arm("k2", "deep", ("align.k=2",))
    assert Arm.parse("far:probe.times=[0.1,0.9],align.k=1").overrides == ("probe.times=[0.1,0.9]", "align.k=1")


def test_branches_begin_with_the_warm_up_of_their_seed(tmp_path):
    arms = (Arm("none", "none"), Arm("foga", "foga"))
    experiment = Experiment(
        *(arms, (0, 7), "demo", 20, 30, tmp_path, "zero2.json", 2),
        overrides=("train.steps=50", "train.warmup_steps=4"),
        measured=frozenset({"foga"}),
    )
    jobs = {job.name: job for job in experiment.jobs()}
    assert len(jobs) == 2 + 4 + 4
    foga, none = jobs["foga, seed 7"], jobs["none, seed 7"]
    assert {f"train.start_from={tmp_path}/warmup-seed7", "run.seed=7", "train.steps=30", "probe.start_step=1"} <= set(
        foga.command
    )
    assert "probe.start_step=1" not in none.command
    assert foga.command[3:5] == ("--num_gpus", "2")
    assert {"align.strategy=none", "train.steps=20", "train.final_lr=1.0"} <= set(jobs["warm-up, seed 7"].command)
    for job, steps in ((foga, 30), (none, 30), (jobs["warm-up, seed 7"], 20)):  # the last of a name counts
        assert [one for one in job.command if one.startswith("train.steps=")][-1] == f"train.steps={steps}"
        assert [one for one in job.command if one.startswith("train.warmup_steps=")][-1] == "train.warmup_steps=4"


def job(folder: Path, name: str, script: str, steps: int = 1) -> Job:
    command = (sys.executable, "-c", f"from pathlib import Path\nfolder = Path({str(folder / name)!r})\n{script}")
    return Job(name, command, folder / name, folder / name / "summary.json", steps)


WRITE = "folder.mkdir(parents=True, exist_ok=True); (folder / 'summary.json').write_text('{}')"


def test_jobs_run_once_and_a_failed_one_is_tried_once_more(tmp_path):
    count = f"log = Path({str(tmp_path / 'count')!r}); log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n"
    jobs = [
        job(tmp_path, "good", count + WRITE),
        job(
            tmp_path,
            "second",
            f"ok = folder.with_suffix('.tried')\nif ok.exists(): {WRITE}\nelse: ok.touch(); raise SystemExit(3)",
        ),
        job(tmp_path, "bad", "print('the reason'); raise SystemExit(3)"),
    ]
    said = []
    assert [one.name for one in run_jobs(jobs, said.append)] == ["bad"]
    assert "bad: failed twice; its output is in" in said[-1]
    assert (tmp_path / "bad.log").read_text().count("the reason") == 2
    assert [one.name for one in run_jobs(jobs, said.append)] == ["bad"]
    assert (tmp_path / "count").read_text() == "x"


def test_each_launch_has_a_free_port(tmp_path, monkeypatch):
    launcher = tmp_path / "deepspeed"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said; mkdir -p $4; touch $4/summary.json\n')
    monkeypatch.setattr("agrepa_fast.evaluation.jobs._LAUNCHER", ("sh", str(launcher)))
    for name in ("first", "second"):
        folder = tmp_path / name
        assert not run_jobs(
            [Job(name, ("sh", str(launcher), "train.py", str(folder)), folder, folder / "summary.json", 1)], print
        )
    ports = [line.split()[1] for line in (tmp_path / "said").read_text().splitlines()]
    assert all(line.startswith("--master_port ") for line in (tmp_path / "said").read_text().splitlines())
    assert len({*ports}) == 2
    assert "29500" not in ports


def test_what_needs_a_failed_job_is_not_run(tmp_path):
    warmup = job(tmp_path, "warmup", "raise SystemExit(1)")
    branch = job(tmp_path, "branch", WRITE)
    branch = replace(branch, command=(*branch.command, f"train.start_from={warmup.folder}"))
    assert [one.name for one in run_jobs([warmup, branch], lambda line: None)] == ["warmup", "branch"]
    assert not branch.folder.exists()


SIGNALLED = """
import sys
from pathlib import Path
from agrepa_fast.evaluation.jobs import Job, run_jobs
folder = Path(sys.argv[1])
long, after = folder / "long", folder / "after"
script = f'''
import signal, time
from pathlib import Path
folder = Path({str(long)!r})
folder.mkdir()
signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), exit(0)))
(folder / "began").touch()
time.sleep(60)
'''
jobs = [Job("long", (sys.executable, "-c", script), long, long / "done", 1)]
jobs += [Job("after", ("mkdir", str(after)), after, after / "done", 1)]
run_jobs(jobs, print)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_lets_the_running_job_save_and_starts_no_other(tmp_path, number):
    command = [sys.executable, "-c", SIGNALLED, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "long" / "began").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert (tmp_path / "long" / "saved").exists()
    assert not (tmp_path / "after").exists()


LOCKED = """
from pathlib import Path
from agrepa_fast.files import FolderLock
lock = FolderLock(Path({folder!r}), "").acquire()
print("locked", flush=True)
input()
"""


def test_a_run_that_outlived_its_comparison_is_left_alone(tmp_path):
    """The comparing process was killed, and its training is still in the folder, without a checkpoint."""
    again = job(tmp_path, "again", WRITE)
    again.folder.mkdir()
    (again.folder / "metrics.jsonl").touch()
    code = LOCKED.format(folder=str(again.folder))
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1, text=True) as alive:
        assert alive.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"again is in use by process {alive.pid} .*, or choose another --out"):
            run_jobs([again], print)
        assert (again.folder / "metrics.jsonl").exists()
        alive.communicate("\n")
    assert not run_jobs([again], print)
    assert not (again.folder / "metrics.jsonl").exists()  # begun again


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    experiment = Experiment(
        (Arm("none", "none"), Arm("foga", "foga")), (0,), "demo", 20, 30, tmp_path, "zero2.json", None
    )
    write_plan(experiment.jobs(), tmp_path / "plan.json")
    write_plan(experiment.jobs(), tmp_path / "plan.json")
    longer = Experiment(experiment.arms, (0,), "demo", 20, 40, tmp_path, "zero2.json", None)
    with pytest.raises(UserError, match=r"train\.steps=30, now train\.steps=40.*choose another --out"):
        write_plan(longer.jobs(), tmp_path / "plan.json")


def test_a_plan_names_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment((Arm("none", "none"),), (0,), "demo", 20, 30, Path("out"), "zero2.json", None)
    write_plan(experiment.jobs(), Path("out/plan.json"))
    parts = [part for one in json.loads(Path("out/plan.json").read_text()) for part in one["command"]]
    assert [part for part in parts if "/" in part and not part.startswith(("out/", "run.dir=out/", "train.start"))] == [
        *2 * ["agrepa_fast/train.py"],
    ]


def test_a_comparison_that_a_signal_ends_compares_what_is_finished(tmp_path, monkeypatch):
    """Of two seeds of three arms: seed 0 has two arms, seed 1 has no baseline yet."""
    finished = {("none", 0), ("shallow", 0), ("shallow", 1)}
    written = []

    def stop(jobs, say):
        for label, seed in finished:
            folder = tmp_path / "out" / f"{label}-seed{seed}" / "evaluate"
            folder.mkdir(parents=True)
            (folder / "results.json").touch()
        raise KeyboardInterrupt

    def evaluated(folder, label):
        return Evaluated(label, int(folder.parent.name[-1]), folder)

    monkeypatch.setattr(comparison, "run_jobs", stop)
    monkeypatch.setattr(comparison, "_evaluated", evaluated)
    monkeypatch.setattr(comparison, "write_comparison", lambda *given: written.append(given))
    arms = ["none", "shallow", "deep:align.strategy=deep,align.k=2"]
    given = {"preset": "demo", "warmup": 2, "baseline": None, "ds_config": "zero2.json", "ranks": 1, "dry_run": False}
    with pytest.raises(KeyboardInterrupt):
        comparison.compare_strategies(arms, [0, 1], ["train.steps=4"], out=tmp_path / "out", **given)
    ((runs, baseline, _, settings, failed),) = written
    assert [(run.label, run.seed) for run in runs] == [("none", 0), ("shallow", 0)]
    assert baseline == "none"
    assert settings["deep"] == "deep, align.k=2"  # of an arm with settings of its own
    assert "none" not in settings
    assert "deep, seed 0" in [job.name for job in failed]


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '[{"name": "x"}]', "[" * 100_000])
def test_a_damaged_plan_is_refused(content, tmp_path):
    jobs = Experiment((Arm("none", "none"),), (0,), "demo", 20, 30, tmp_path, "zero2.json", None).jobs()
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan.json is damaged.*choose another --out"):
        write_plan(jobs, tmp_path / "plan.json")


def test_a_folder_of_somebody_else_in_the_place_of_a_run_is_not_removed(tmp_path):
    """A run without a checkpoint is begun again, in an empty folder."""
    jobs = Experiment((Arm("none", "none"),), (0,), "demo", 20, 30, tmp_path, "zero2.json", None).jobs()
    mine = tmp_path / "none-seed0" / "thesis.tex"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UserError, match="none-seed0 is there, and not of this comparison: choose another --out"):
        write_plan(jobs, tmp_path / "plan.json")
    assert mine.exists()
    assert not (tmp_path / "plan.json").exists()
