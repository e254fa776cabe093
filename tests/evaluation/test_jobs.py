"""The jobs of `agrepa compare`: arms, branches, what is run again, and what a signal or another process means."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.jobs import Arm, Experiment, Job, run_jobs, split_overrides, write_plan

from ..ranks import ROOT


def test_arms():
    assert Arm.parse("fixed:4,8") == Arm("fixed:4,8", "fixed:4,8")
    assert Arm.parse("k2:align.k=2,align.strategy=deep") == Arm("k2", "deep", ("align.k=2",))
    assert split_overrides("") == ()
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
    plain = replace(experiment, overrides=()).jobs()  # a new optimizer at its full rate would make large first steps
    assert not [part for job in plain for part in job.command if part.startswith("train.warmup_steps")]
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
import signal, sys
from pathlib import Path
from agrepa_fast.evaluation.jobs import Job, run_jobs
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, whose choice stays
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
    faster = replace(experiment, overrides=("train.lr=1e-3",))
    with pytest.raises(
        UserError, match=r"holds another comparison \(no train\.lr, now train\.lr=1e-3\): take another NAME"
    ):
        write_plan(faster.jobs(), tmp_path / "plan.json", "take another NAME")
    other = replace(experiment, ds_config="zero1.json")
    with pytest.raises(UserError, match=r"\(--ds_config zero2\.json, now --ds_config zero1\.json\)"):
        write_plan(other.jobs(), tmp_path / "plan.json")


def test_an_evaluation_that_has_not_finished_may_change(tmp_path):
    """One with a wrong model of a metric must not cost the training before it."""
    wrong, right = (
        Experiment(
            (Arm("none", "none"),), (0,), "demo", 20, 30, tmp_path, "zero2.json", None, (), (f"metrics.asr={asr}",)
        )
        for asr in ("nowhere", "package:whisper-base")
    )
    write_plan(wrong.jobs(), tmp_path / "plan.json")
    evaluation = right.jobs()[-1]
    evaluation.folder.mkdir(parents=True)
    write_plan(right.jobs(), tmp_path / "plan.json")
    assert "metrics.asr=package:whisper-base" in (tmp_path / "plan.json").read_text()
    evaluation.done.touch()
    with pytest.raises(UserError, match=r"remove .*evaluate to evaluate again, or choose another --out"):
        write_plan(wrong.jobs(), tmp_path / "plan.json")


def test_a_dry_run_refuses_what_the_command_refuses(tmp_path, capsys):
    given = ["compare", "--strategies", "none,shallow", "--seeds", "0", "--warmup", "2", "--out", str(tmp_path)]
    arms = (Arm("none", "none"), Arm("shallow", "shallow"))
    jobs = Experiment(arms, (0,), "demo", 2, 4, tmp_path, "zero2.json", None, ("train.steps=6",)).jobs()
    write_plan(jobs, tmp_path / "plan.json")
    main([*given, "--dry-run", "train.steps=6"])
    with pytest.raises(SystemExit) as ended:
        main([*given, "--dry-run", "train.steps=6", "train.lr=1e-5"])
    assert ended.value.code == 2
    assert "holds another comparison (no train.lr, now train.lr=1e-5): choose another --out" in capsys.readouterr().err


def test_arms_and_seeds_may_be_added(tmp_path):
    def jobs(*arms: str, seeds: tuple[int, ...]) -> list[Job]:
        of_name = tuple(Arm(name, name) for name in arms)
        return Experiment(of_name, seeds, "demo", 20, 30, tmp_path, "zero2.json", None).jobs()

    first, more = jobs("none", "foga", seeds=(0,)), jobs("none", "deep", seeds=(0, 1))
    write_plan(first, tmp_path / "plan.json")
    (tmp_path / "none-seed0").mkdir()  # has run
    write_plan(more, tmp_path / "plan.json")
    write_plan(first, tmp_path / "plan.json")
    names = [job["name"] for job in json.loads((tmp_path / "plan.json").read_text())]
    assert sorted(names) == sorted({job.name for job in (*first, *more)})


def test_a_plan_names_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment((Arm("none", "none"),), (0,), "demo", 20, 30, Path("out"), "zero2.json", None)
    write_plan(experiment.jobs(), Path("out/plan.json"))
    parts = [part for one in json.loads(Path("out/plan.json").read_text()) for part in one["command"]]
    assert [part for part in parts if "/" in part and not part.startswith(("out/", "run.dir=out/", "train.start"))] == [
        *2 * ["agrepa_fast/train.py"],
    ]


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '[{"name": "x"}]', '[{"folder": "x", "command": 1}]', "[" * 100_000]
)
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
