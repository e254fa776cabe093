"""Comparisons of evaluated runs, and plans that are refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation.aggregate import SetDistances
from agrepa_fast.evaluation.compare import Evaluated, agreement, check_comparable, differences
from agrepa_fast.evaluation.results import FIELDS, clip_rows, summarise, write_clips
from agrepa_fast.evaluation.stored import read_clips
from agrepa_fast.reporting import comparison
from agrepa_fast.reporting.comparison_report import report_markdown
from agrepa_fast.reporting.comparison_tables import Comparison
from agrepa_fast.reporting.evaluation_report import recorded_clips

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
    return Evaluated(label, seed, folder, {"": 0.3 + worse + 0.001 * seed})


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
    runs += [evaluated(tmp_path / f"bad{seed}", "bad", seed, worse=0.39 + 0.01 * seed) for seed in (0, 1, 2)]
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


def test_clips_without_a_figure_have_no_part_in_either_interval(tmp_path):
    """A run that diverged has no MOS, and another lacks that of its worst clips."""
    runs = [evaluated(tmp_path / f"{label}{seed}", label, seed) for label in ("none", "foga") for seed in (0, 1, 2)]
    for row in runs[2].clips:
        row["mos"] += 1  # of seed 2, which has no other side
    for row in runs[5].clips:
        row["mos"] = None
    for row in runs[4].clips[:3]:
        row["mos"] = None
    found = {one.metric: one for one in differences(runs, "none", 0.95)}
    assert found["mos"].of_seeds == pytest.approx([0, 0])
    assert (found["mos"].clips.low, found["mos"].clips.high) == pytest.approx((0, 0))
    assert found["mos"].seeds.n == 2
    assert found["mmd"].seeds.n == 3
    for row in (row for run in runs[3:] for row in run.clips):
        row["mos"] = None
    assert "mos" not in {one.metric for one in differences(runs, "none", 0.95)}


def test_other_clips_and_other_seeds_are_refused(tmp_path):
    runs = [evaluated(tmp_path / "a", "none", 0), evaluated(tmp_path / "b", "foga", 0, manifest="other")]
    with pytest.raises(UserError, match="were evaluated with other clips"):
        check_comparable(runs)
    runs[1].results["manifest"] = "m"
    runs[1].results["reference_clips"] = {"speech": 511}
    check_comparable(runs)  # the first was written before they were counted
    runs[0].results["reference_clips"] = {"speech": 512}
    with pytest.raises(UserError, match="were evaluated with other numbers of reference clips"):
        check_comparable(runs)
    runs[1].results["reference_clips"] = runs[0].results["reference_clips"]
    runs[1].results["confidence"] = 0.9
    with pytest.raises(UserError, match=r"were evaluated with another metrics\.confidence"):
        check_comparable(runs)
    runs[0].results["confidence"] = 0.9
    runs[0].results["averaged"], runs[1].results["averaged"] = True, False
    with pytest.raises(UserError, match="were evaluated with averaged and with live weights"):
        check_comparable(runs)
    with pytest.raises(UserError, match="no seed in common"):
        differences([runs[0], evaluated(tmp_path / "c", "foga", 1)], "none", 0.95)


def test_a_report_tells_the_facts_of_every_run(tmp_path):
    """The teacher of any that judges it, the seeds that both arms have, and no sample of another run."""
    runs = [evaluated(tmp_path / f"{label}{seed}", label, seed) for label, seed in (("none", 0), ("a", 0), ("a", 1))]
    sound = write_recordings(tmp_path / "elsewhere", CLIPS[:1]) / f"{CLIPS[0]}.wav"
    runs[0].results["files"] = {"sample": {CLIPS[0]: str(sound)}}
    runs[2].results["circular"] = {"asr": "the teacher of speech"}
    comparison = Comparison(runs, differences(runs, "none", 0.95), "none", {}, [])
    report = report_markdown(comparison)
    assert "* asr is the teacher of speech and rewards alignment by construction" in report
    assert "One seed: the table says nothing of the methods" in report
    (clip,) = recorded_clips({run.label: (run.folder, run.results, run.clips) for run in runs[:2]})
    assert clip.files == {"none": sound}


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
            by_domain = {"speech": 0.5 + seed, "audio": 0.75 if label == "foga" else 0.5}
            losses = {"val/flow_loss": {"ema": 0.5 + seed}, "val/flow_loss_by_domain": by_domain}
            (run / "summary.json").write_text(json.dumps({"steps": 5, **losses}))
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
    assert "| foga | both | val/flow_loss | +0.000 | — | [+0.000, +0.000] |" in report
    assert "| foga | audio | val/flow_loss | +0.250 | — | [+0.250, +0.250] |" in report
    assert "| audio | val/flow_loss | 0.750 | 0.500 |" in report
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
    results = tmp_path / "foga-1" / "evaluate" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "mmd": None, "step": 3, "averaged": True}))
    (out / "plots" / "mos.png").write_text("of an earlier comparison")
    (out / "plots" / "similarity.png").write_text("of an earlier comparison")
    main(["compare", *folders, "--baseline", "none", "--out", str(out)])
    assert "of an earlier comparison" not in {path.read_text("latin1") for path in (out / "plots").iterdir()}
    rows = [row.split(",") for row in (out / "compare.csv").read_text().splitlines()]
    losses = {(row[0], row[1]) for row in rows if row[4] == "val/flow_loss" and not row[3]}
    assert losses == {("foga", "0"), ("none", "0"), ("none", "1")}, "the loss of foga-1 is of step 5"
    (tmp_path / "trains").mkdir()
    (tmp_path / "trains" / "plan.json").write_text("[]")
    for bad, message in (
        ([folders[0]], "at least two runs"),
        ([folders[0], folders[0]], "are both foga with seed 0"),
        ([folders[0], folders[1]], "all runs have align.strategy=foga"),
        ([folders[0], str(tmp_path)], "holds no evaluation"),
        ([folders[0], "train.steps=3"], "without effect but with --strategies"),
        ([*folders, "--ds_config", "zero2.json", "--dry-run"], "--ds_config, --dry-run: without effect but with"),
        ([folders[0], folders[2], "--baseline", "deep"], "there are foga, none"),
        ([folders[0], folders[2], "--out", folders[2]], "holds a run or an export: choose another folder"),
        ([folders[0], folders[2], "--out", str(tmp_path / "trains")], "holds a comparison that trains"),
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
        (["--strategies", "none,foga", "run.id=x"], "run.id=x: `agrepa compare` sets it itself"),
        (["--strategies", "none,foga", "train.copy_to=x"], "train.copy_to=x: the runs of a comparison would all copy"),
        (["--strategies", "none", "--strategies", "c:train.copy_to=x"], "train.copy_to=x: the runs of a comparison"),
        (["--strategies", "none,foga", "--strategies", "k:align.kk=2"], "align.kk"),
        (["--strategies", "a b:align.k=1", "--strategies", "a-b:align.k=2"], "'a-b' and a b would share a folder"),
        (["--strategies", "none", "--strategies", "warmup:align.k=1"], "'warmup' and the warm-up would share a folder"),
        (["--strategies", "none", "--strategies", ":align.k=1"], "one has no label"),
        (["--strategies", ","], "one has no label"),
        (["--strategies", "none", "--strategies", "x" * 300 + ":align.k=1"], "give it a shorter label"),
        (["--strategies", "none,foga", "--ds_config", "nope.json"], "nope.json"),
        (["--strategies", "none", "--strategies", "g:flow.guidance=1"], "g: flow.guidance has to be the same"),
        (["--strategies", "none", "--strategies", "s:run.seed=7"], "s: run.seed has to be the same for all arms"),
        (["--strategies", "none", "--strategies", "d:model.depth=6"], "d: model.depth has to be the same"),
        (["--strategies", "none", "--strategies", "f:train.start_from=x"], "f: train.start_from has to be the same"),
        (["--strategies", "none,k5:align.k=5", "--strategies", "foga"], "has an option of its own"),
        (["--strategies", "shallow,foga", "align.weighting=raw2x"], "shallow has no scores, give normalized"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_anything_is_trained(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments, "--dry-run", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("last:align.strategy=deep,align.objective=layersync", "takes the last"),
        ("far:align.strategy=fixed:99", "numbered 1 to 4"),
        ("mine:align.strategy=shallow,align.objective=nomodule:Nope", "nomodule"),
    ],
)
def test_an_arm_that_its_shards_or_model_refuse_is_refused_before_the_warm_up(arm, message, preset, tmp_path, capsys):
    plan = ["--preset", str(preset), "--warmup", "2", "--dry-run", "train.steps=6", "--out", str(tmp_path / "out")]
    main(["compare", "--strategies", "none,shallow", *plan])
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--strategies", "none,shallow", "--strategies", arm, *plan])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plan_may_be_shorter_than_the_preset_s_own_warm_up(tmp_path, capsys):
    plan = ["--warmup", "80", "--dry-run", "train.steps=160", "--out", str(tmp_path / "x")]
    main(["compare", "--strategies", "none,foga", *plan])
    assert "3 warm-ups of 80 steps, 6 runs of 80 steps" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


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
    assert "deep, seed 0" in failed
    assert "shallow, seed 1 (its seed has no none to compare with)" in failed


def test_an_arm_that_has_chosen_no_layers_is_not_compared_as_if_it_had(tmp_path, monkeypatch, capsys):
    written = []

    def finish(jobs, say):
        for job in jobs:
            job.done.parent.mkdir(parents=True, exist_ok=True)
            job.done.touch()
        layers = {"speech": [1, 2]}
        (tmp_path / "out" / "foga-seed1" / "selection.json").write_text(json.dumps({"layers": layers}))
        return []

    monkeypatch.setattr(comparison, "run_jobs", finish)
    monkeypatch.setattr(comparison, "_evaluated", lambda folder, label: Evaluated(label, int(str(folder)[-10]), folder))
    monkeypatch.setattr(comparison, "write_comparison", lambda *given: written.append(given))
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--strategies", "none,foga", "--seeds", "0,1", "--ranks", "1", "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    ((runs, *_, missing),) = written
    assert [(run.label, run.seed) for run in runs] == [("none", 0), ("none", 1), ("foga", 1)]
    assert missing == ["foga, seed 0 (chose no layers)"]
    assert "foga, seed 0: no probe could rank the layers" in capsys.readouterr().err


def test_evaluations_that_cannot_be_compared_are_refused_before_more_is_trained(tmp_path, monkeypatch, capsys):
    trained = []

    def finish(jobs, say):
        trained.append(jobs)
        for label, manifest in (("none", "m"), ("shallow", "other")):
            evaluated(tmp_path / "out" / f"{label}-seed0" / "evaluate", label, 0, manifest=manifest)
        return []

    monkeypatch.setattr(comparison, "run_jobs", finish)
    monkeypatch.setattr(comparison, "_evaluated", lambda folder, label: Evaluated(label, 0, folder))
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["compare", "--strategies", "none,shallow", "--seeds", "0", "--out", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert "were evaluated with other clips" in capsys.readouterr().err
    assert len(trained) == 1


def test_finished_runs_are_labelled_by_their_settings_of_alignment(tmp_path, capsys):
    shallow = "strategy: shallow, weight"
    aligns = (f"{shallow}: 0.1", f"{shallow}: 1", f"{shallow}: 1", "strategy: none", "strategy: deep, bitc_audio: 0.2")
    for number, (align, steps) in enumerate(zip(aligns, (5, 5, 6, 5, 5), strict=True)):
        run = tmp_path / f"run{number}"
        evaluated(run / "evaluate", f"run{number}", 0)
        settings = f"align: {{{align}}}\ntrain: {{steps: {steps}}}\nprobe: {{clips: {steps}}}\n"
        (run / "config.yaml").write_text(settings)
    main(["compare", *(str(tmp_path / f"run{n}") for n in (3, 0, 1)), "--out", str(tmp_path / "one")])
    report = (tmp_path / "one" / "report.md").read_text()
    assert "| shallow, weight=0.1 | speech | mos |" in report
    assert "| shallow, weight=1.0 | speech | mos |" in report
    assert "settings that differ" not in report
    main(["compare", *(str(tmp_path / f"run{n}") for n in (3, 0, 4)), "--out", str(tmp_path / "four")])
    report = (tmp_path / "four" / "report.md").read_text()
    assert "# none, bitc_audio=1.0 · shallow, weight=0.1, bitc_audio=1.0 · deep, weight=1.0, bitc_audio=0.2" in report
    results = tmp_path / "run2" / "evaluate" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "step": 6}))
    main(["compare", *(str(tmp_path / f"run{n}") for n in (3, 0, 2)), "--out", str(tmp_path / "two")])
    report = (tmp_path / "two" / "report.md").read_text()
    assert "settings that differ besides align: probe.clips, train.steps, the step of the checkpoint" in report
