"""The benchmarks run, check before they time, and go on when a part fails. No number they print here means anything."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_ada_norm  # noqa: E402
import bench_block  # noqa: E402
import gpu_suite  # noqa: E402
from _bench import compare  # noqa: E402
from _decisions import decide  # noqa: E402

QUICK = ["--repeats", "2", "--compiler", "aot_eager"]


@pytest.fixture
def program(monkeypatch):
    """Runs a benchmark's script in this process; starting one that imports torch takes seconds."""

    def run(name: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")

    return run


@pytest.mark.parametrize(("name", "operations"), [("gated_residual", 3), ("velocity_change", 1)])
def test_an_operation(name, operations, program, tmp_path):
    program(f"bench_{name}.py", "--shapes", "64,7,2", *QUICK, "--out", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["command"].startswith(f"python benchmarks/bench_{name}.py --shapes 64,7,2")
    assert {"device", "torch", "triton", "backend", "commit"} <= written["machine"].keys()
    assert len(written["results"]) == operations
    for methods in (shapes["64, 7, 2"] for shapes in written["results"].values()):
        assert list(methods) == ["fused", "torch.compile", "eager"]
        for result in methods.values():
            median, low, high = result["forward"]["ms"]
            assert low <= median <= high
            assert ("backward" in result) == (name == "gated_residual")


@pytest.mark.drill
def test_the_block(program, tmp_path, capsys):
    program("bench_block.py", "--shapes", "128,9,1", *QUICK, "--profile", "--out", tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    results = written["results"]["128, 9, 1"]
    assert list(results)[:4] == ["released", "eager", "torch.compile", "ours"]
    assert results["released"]["over_released"] == 1
    assert "ours, three forwards and backwards" in capsys.readouterr().out


def test_probes_of_backbones(program, preset, tmp_path):
    """Their scores agree with leaving out one layer at a time, or the program ends."""
    few = ["--steps", 2, "--clips", 2, "--repeats", 2]
    program(
        "probe_backbones.py", "--cases", "voicebox", "f5", *few, "--shards", preset.parent, "--out", tmp_path / "o.json"
    )
    results = json.loads((tmp_path / "o.json").read_text())["results"]
    assert results["voicebox"]["leave-one-out"]["block_forwards"] == 16 * 8  # attention and FFN apart
    assert results["voicebox"]["prefix-shared"]["block_forwards"] == 2 * 8 * 9 // 2 + 8
    assert results["f5"]["prefix-shared"]["block_forwards"] == 8 * 9 // 2
    for found in results.values():
        assert len(found["foga"]) == len(found["foga-vjp"]) == found["layers"] == 8
        assert -1 <= found["rank_correlation"] <= 1


def test_a_wrong_gradient_is_not_timed():
    def off(x, modulation):
        """2 % on dscale and dshift, outputs right."""
        return bench_ada_norm.OP.fused(x, modulation + 0.02 * (modulation - modulation.detach()))

    results = compare(replace(bench_ada_norm.OP, fused=off), (32, 40, 2), 2, "aot_eager")
    assert results["fused"]["wrong"].startswith("dmodulation: RMS error")
    assert "median_s" in results["eager"]["forward"]


def test_a_wrong_compiler_is_not_timed():
    def compiler(graph, _inputs):
        return lambda *args: tuple(1.01 * output for output in graph(*args))

    results = compare(bench_ada_norm.OP, (32, 40, 2), 2, compiler)
    assert "RMS error" in results["torch.compile"]["wrong"]
    assert "wrong" not in results["fused"]
    assert bench_block.ratio(results, "torch.compile", "fused") is None


def suite(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.drill
def test_dry_run_of_the_gpu_suite(preset, tmp_path):
    done = suite("--dry-run", "--preset", preset, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())["results"]
    assert results.keys() == gpu_suite.LIMITS.keys()
    assert all(result["status"] == "ok" for result in results.values())
    assert results["demo"]["trained"]["probes that failed"] == 0
    assert results["demo"]["trained"]["val/flow_loss"] == results["demo"]["resumed"]["val/flow_loss"]
    assert results["accuracy"]["kernels/test_ada_norm"] == {"passed": 1, "failed": []}
    assert results["foga"]["block forwards"]["prefix-shared"] == 3 * 4 // 2
    assert results["foga"]["stacked max score difference"] < 1e-5
    for operation in (*results["ops"].values(), *results["alignment"].values()):
        if isinstance(operation, dict) and "fused" in operation:
            assert "wrong" not in operation["fused"]
    for methods in (value for name, value in results["attention"].items() if name.startswith("T")):
        assert "wrong" not in methods["attend"]
    assert all("wrong" not in method for method in results["fuse"]["64x12x2"].values() if isinstance(method, dict))
    assert {path.name for path in tmp_path.glob("trace_*")} == {"trace_step.json.gz", "trace_zero2.json.gz"}
    tables = done.stdout.partition("\ndecisions\n")[2]
    assert "probes and graphs in a run" in tables
    assert "1.5B parameters" in tables


def test_without_a_gpu_the_suite_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = suite()
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1
    assert "no GPU" in done.stdout


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("AGREPA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # so nothing can run it here
    failed = gpu_suite.run_part("foga", ["--dry-run"], tmp_path, 100)
    assert failed["status"].startswith("failed, ")
    assert "Error" in failed["log"][-1]
    stopped = gpu_suite.run_part("ceilings", ["--dry-run"], tmp_path, 0.1)
    assert stopped["status"] == "stopped after 0 s"
    assert stopped["log"] == []


def timing(seconds: float, **others) -> dict:
    return {"median_s": seconds, "p20_s": seconds, "p80_s": seconds, **others}


def answers(**results) -> dict[str, str]:
    return {row[0]: row[3] for row in decide(results)}


def test_a_run_without_a_choice_of_layers_is_no_success():
    graphs, losses = [3, 40], {"first": 1.0, "last": 0.5}
    right = {"probes that failed": 0, "graphs captured, replayed": graphs, "selection": "L1", "val/flow_loss": losses}
    assert set(answers(demo={"trained": right, "resumed": right}).values()) == {"yes", ""}
    for wrong in ({"probes that failed": 1}, {"graphs captured, replayed": [0, 0]}, {"selection": None}):
        assert answers(demo={"trained": right | wrong, "resumed": right})["probes and graphs in a run"] == "NO"
    other = right | {"val/flow_loss": {"first": 1.0, "last": 0.52}}
    assert answers(demo={"trained": right, "resumed": other})["a resumed run ends alike"] == "NO"


def test_a_change_that_gains_nothing_is_dropped():
    zero2 = {"eager": timing(0.1), "without: a": timing(0.11), "without: b": timing(0.1), "train.graphs": timing(0.09)}
    said = answers(zero2=zero2 | {"status": "ok"})
    assert said["ZeRO-2 step, without: a"] == "keep, 9.1%"
    assert said["ZeRO-2 step, without: b"] == "drop"
    assert said["ZeRO-2 step, train.graphs"] == "keep, 10.0%"


def test_the_tile_that_is_fastest_at_all_sizes_is_taken():
    sizes = {
        "ada_norm_bwd 60032 tokens": {"a": timing(2.0, gb_per_s=1500.0), "b": timing(1.8), "c": {"wrong": "y"}},
        "ada_norm_bwd 15008 tokens": {"a": timing(0.5), "b": timing(0.49), "c": timing(0.1)},
    }
    said = answers(tiles=sizes, ceilings={"copy_60k_tokens_gb_per_s": 3000.0})
    assert said["ada_norm_bwd, tile"] == "take b"
    assert said["ada_norm_bwd, of a copy's bandwidth"] == "missed"


def test_attention_that_is_wrong_is_named():
    methods = {
        "cudnn": {"wrong": "dqkv: nan"},
        "efficient": timing(0.2),
        "varlen_attn": timing(0.1),
        "attend": timing(0.1),
    }
    rows = decide({"attention": {"T960 padded": methods, "status": "ok"}})
    row = next(row for row in rows if row[0] == "attention, T960 padded")
    assert row[1].endswith("wrong: cudnn")
    assert row[3] == "keep"
    methods["attend"] = {"wrong": "out: nan"}
    assert answers(attention={"T960 padded": methods})["attention, T960 padded"] == "NO"


def test_parts_without_results_leave_their_questions_open():
    assert {row[1:] for row in decide({})} == {("not measured", "", "")}


def finish_run(job, losses, precision="fp32", seconds_since_step=0) -> None:
    """Write the files of a run that a sweep reads."""
    job.folder.mkdir(parents=True)
    lines = [{"step": 10 * n, "val/flow_loss": loss} for n, loss in enumerate(losses)]
    lines = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 20}])
    (job.folder / "metrics.jsonl").write_text(lines)
    summary = {"val/flow_loss": {"last": losses[-1], "ema": losses[-1]}, "steps": 20, "precision": precision}
    job.done.write_text(json.dumps(summary | {"seconds": {"train": 20}, "seconds_since_step": seconds_since_step}))


def test_a_sweep_of_finished_runs(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    curves = {
        "a-seed0": (1.0, 0.8, 0.2),
        "a-seed1": (1.0, 0.4, 0.3),
        "b-seed0": (1.0, 0.5, 0.5),
        "b-seed1": (1.0, 0.3, 0.2),
        "c-seed0": (1.0, 0.5, 0.3, 0.2),  # longer
        "c-seed1": (1.0, 0.5, 0.3, 0.2),
    }

    def finish(jobs, say) -> list:
        for job in jobs:
            resumed = 20 if job.folder.name == "c-seed0" else 10  # after its last step, or half-way
            finish_run(job, curves[job.folder.name], seconds_since_step=resumed)
        return []

    monkeypatch.setattr("agrepa_fast.evaluation.jobs.run_jobs", finish)
    arms = ("a:train.lr=1e-3,train.betas=[0.9,0.95]", "b:train.lr=2e-3", "c:train.steps=30")
    rest = ("--seeds", "0,1", "--goal", "0.4", "--out", tmp_path / "out.json", "train.steps=20")
    program("sweep.py", "lr", *arms, *rest)
    with pytest.raises(SystemExit) as refused:
        program("sweep.py", "lr", arms[0], "b:train.lr=4e-3", *rest)
    assert refused.value.code == 2
    assert "train.lr=2e-3, now train.lr=4e-3" in capsys.readouterr().err
    a, b, c = json.loads((tmp_path / "out.json").read_text())["arms"].values()
    assert a["settings"] == ["train.lr=1e-3", "train.betas=[0.9,0.95]"]
    assert a["loss"] == {"10": 0.6, "20": 0.25}
    assert (a["range"], a["last"], a["to_first"]) == (0.1, [0.2, 0.3], None)
    assert b["to_first"] == pytest.approx({"value": 0.1, "low": -2.441, "high": 2.641}, rel=1e-3)  # t(1) of 0.3, -0.1
    # seed 0 from 0.8 to 0.2: half of the two octaves, so step 15; seed 1 at step 10; 2 s per step
    assert (a["steps_to_goal"], a["s_to_goal"]) == (12.5, 25)
    assert (a["s_per_step"], a["s_per_step_by_seed"]) == (2, [2, 2])
    assert b["steps_to_goal"] is None  # one of its seeds never reaches it
    assert (c["loss"]["30"], c["s_per_step"], c["s_to_goal"]) == (0.2, None, None)


def test_a_wrong_arm_of_a_sweep_is_refused_before_the_plan(program, tmp_path, monkeypatch, capsys):
    """The corrected command runs. An arm may have no settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agrepa_fast.evaluation.jobs.run_jobs", lambda jobs, say: jobs)
    with pytest.raises(SystemExit) as refused:
        program("sweep.py", "width", "base:", "wide:model.dims=384")
    assert refused.value.code == 2
    assert "model.dims" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2 of 2 runs failed"):
        program("sweep.py", "width", "base:", "wide:model.dim=384")
    base, wide = (job["command"] for job in json.loads((tmp_path / "runs/sweep/width/plan.json").read_text()))
    assert "" not in base
    assert "model.dim=384" in wide


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=1e-3"], "no arm: name one as LABEL:section.field=value"),
        (["a:train.lr=1e-3", "a:train.lr=2e-3"], "the arms: a twice"),
        (["a:", "--seeds", "0,1,0"], "--seeds: 0 twice"),
    ],
)
def test_arms_and_seeds_of_a_sweep_differ(arguments, message, program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        program("sweep.py", "lr", *arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sweep_compares_precisions_only_if_they_were_set(program, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def finish(jobs, say) -> list:
        for job in jobs:
            finish_run(job, (1.0, 0.5), "bf16" if job.folder.name.startswith("b") else "fp32")
        return []

    monkeypatch.setattr("agrepa_fast.evaluation.jobs.run_jobs", finish)
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as refused:
        program("sweep.py", "auto", "a:train.precision=auto", "b:train.precision=bf16", "--out", out)
    assert refused.value.code == 2
    assert "different precisions do not compare (b-seed0 in bf16, a-seed0 in fp32)" in capsys.readouterr().err
    assert not out.exists()
    program("sweep.py", "set", "a:train.precision=fp32", "b:train.precision=bf16", "--out", out)
    assert json.loads(out.read_text())["arms"].keys() == {"a", "b"}
