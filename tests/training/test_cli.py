"""probe, sample, doctor and prepare as a user types them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agrepa_fast import doctor
from agrepa_fast.cli import main
from agrepa_fast.cli.prepare import SOURCES
from agrepa_fast.config_file import load_config

from ..ranks import ROOT, run_training
from ..testing import write_small_shards

COMMANDS = ["train", "prepare", "tokens", "probe", "sample", "evaluate", "compare", "listen", "report", "export"]
COMMANDS += ["config", "doctor"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    preset = write_small_shards(folder / "shards")
    args = ("--preset", str(preset), f"run.dir={folder}/run", "train.lr=0.01", "model.token_dim=32")
    run_training(1, *args, cwd=folder)
    return folder / "run"


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_probe(run, tmp_path, capsys):
    main(["probe", str(run), "--out", str(tmp_path / "new" / "probe"), "probe.times=[0.25,0.5]", "--live", "align.k=1"])
    with (tmp_path / "new" / "probe" / "attribution.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["measure"], row["domain"], row["layer"], row["t"]) for row in rows} == {
        (measure, domain, str(layer), t)
        for measure in ("foga", "ridge", "cka", "lasp")
        for domain in ("speech", "audio")
        for layer in (1, 2, 3, 4)
        for t in ("mean", "0.25", "0.5")
    }
    rows = [row for row in rows if row["measure"] == "foga"]
    assert all(float(row["score"]) > 0 for row in rows)
    selection = json.loads((tmp_path / "new" / "probe" / "selection.json").read_text())
    best = {
        domain: max((r for r in rows if r["domain"] == domain and r["t"] == "mean"), key=lambda r: float(r["score"]))
        for domain in ("speech", "audio")
    }
    assert selection["layers"] == {domain: [int(row["layer"])] for domain, row in best.items()}
    for name in ("attribution", "layer_time", "store_contribute", "stability"):
        assert (tmp_path / "new" / "probe" / f"{name}.png").stat().st_size > 5000
    out = capsys.readouterr().out
    assert "L4" in out
    assert "speech: rank correlation with foga: ridge" in out


def test_official_recipe_is_named_and_scores_odd_layers_of_one_clip_a_domain(run, tmp_path, no_pictures):
    main(["probe", str(run), "--recipe", "official", "--out", str(tmp_path), "align.k=1"])
    with (tmp_path / "attribution.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["recipe"], row["t"]) for row in rows} == {("official", "mean"), ("official", "0.8")}
    foga, lasp = ([row for row in rows if row["measure"] == measure] for measure in ("foga", "lasp"))
    assert {row["layer"] for row in foga} == {"1", "3"}
    assert {row["clips"] for row in foga} == {"1"}
    assert {row["layer"] for row in lasp} == {"1", "2", "3", "4"}


def test_estimate_beside_the_exact_scores(run, tmp_path, capsys, no_pictures):
    main(["probe", str(run), "--out", str(tmp_path), "--measures", "foga,foga-vjp", "probe.draws=4"])
    assert "rank correlation with foga: foga-vjp" in capsys.readouterr().out
    with (tmp_path / "attribution.csv").open() as file:
        assert {row["measure"] for row in csv.DictReader(file)} == {"foga", "foga-vjp"}


def test_attention_and_ffn_apart(run, tmp_path, capsys, no_pictures):
    main(["probe", str(run), "--kind", "branch", "--out", str(tmp_path)])
    with (tmp_path / "attribution.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layer"] for row in rows} == {f"{layer}.{part}" for layer in (1, 2, 3, 4) for part in ("attn", "ffn")}
    assert "L3.ffn" in capsys.readouterr().out


def test_sample(run, tmp_path):
    import soundfile

    main(["sample", str(run), "--clips", "2", "--out", str(tmp_path), "flow.steps=3"])
    names = {
        f"{d}-{n}-{kind}.wav" for d in ("speech", "audio") for n in (1, 2) for kind in ("truth", "sample", "codes")
    }
    assert {path.name for path in tmp_path.iterdir()} == names | {"mel.png"}
    for name in names:
        wave, rate = soundfile.read(tmp_path / name)
        assert rate == 16000
        assert abs(wave).max() > 0


def test_doctor(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    for word in ("torch", "deepspeed", "kernels backend", "native", "CPU library", "demo shards"):
        assert word in out
    for extra in ("vocos", "datasets", "s3tokenizer", "speechbrain", "wandb", "flash-attn"):
        assert extra in out


def test_doctor_names_the_command_for_a_package_that_is_missing_or_too_old(capsys, monkeypatch):
    installed = {"scipy": "1.10", "vocos": None}
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: installed[name] if name in installed else found(name))
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "pip install 'scipy>=1.15'" in out
    assert "pip install 'vocos>=0.1'" in out


def test_config_prints_what_a_run_would_use(run, tmp_path, capsys):
    main(["config", "demo", "align.k=2"])
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "mine.yaml").align.k == 2
    main(["config", str(run), "train.steps=7"])
    assert "steps: 7" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "page"), [("--reference", "configuration.md"), ("--objectives", "objectives.md")])
def test_the_pages_of_settings_and_objectives_are_those_of_the_code(option, page, capsys):
    main(["config", option])
    printed = capsys.readouterr().out
    if "Left out, because their packages are not installed" in printed:
        pytest.skip("the page has models of packages that are not installed")
    assert printed == (ROOT / "docs" / page).read_text()
    for ignored in ("agrepa-a", "train.steps=7"):
        with pytest.raises(SystemExit) as ended:
            main(["config", option, ignored])
        assert ended.value.code == 2
        assert f"{ignored}: without effect with {option}" in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, "tokens fit", *(f"prepare {source}" for source in SOURCES)])
def test_help_fits_a_screen_and_has_an_example(command, capsys, monkeypatch):
    """A terminal of 80 columns and 24 lines, its prompt included."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"usage: agrepa {command}")
    assert lines[-1].startswith((f"example: agrepa {command}", "example: deepspeed"))


def test_the_list_of_commands_is_complete(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[:4] == "    " and line[4] != " "] == COMMANDS


def test_report(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "report.html"))
    main(["report", str(copied)])
    assert capsys.readouterr().out == f"wrote {copied}/report.html\n"
    assert (copied / "report.html").read_bytes() == (run / "report.html").read_bytes()
    assert "name the folder of a run or evaluation" in refused(capsys, "report", tmp_path)


class TestRefusals:
    def test_no_checkpoint(self, run, tmp_path, capsys):
        assert "is no checkpoint" in refused(capsys, "probe", tmp_path)
        empty = tmp_path / "run"
        (empty / "checkpoints").mkdir(parents=True)
        assert "no checkpoint to resume" in refused(capsys, "sample", empty)

    def test_a_checkpoint_of_another_architecture(self, run, tmp_path, capsys):
        copy = tmp_path / "copy"
        shutil.copytree(next((run / "checkpoints").glob("step*")), copy)
        (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("dim: 32", "dim: 16"))
        assert "another architecture than its config.yaml" in refused(capsys, "probe", copy)

    def test_settings(self, run, capsys):
        assert "did you mean 'clips'" in refused(capsys, "probe", run, "probe.clipz=3")
        assert "cannot be overridden" in refused(capsys, "probe", run, "model.gelu=tanh")
        source = ("prepare", "folder", run, "--domain", "speech", "--out", run)
        assert "train.lr has no effect here: data.* have" in refused(capsys, *source, "train.lr=0.1")
        for reading in ("data.normalize=false", "data.path=x"):
            assert "has no effect here: shards are read by it, not made" in refused(capsys, *source, reading)
        assert "train.copy_to has no effect here: data.*, flow.sigma" in refused(
            capsys, "sample", run, "train.copy_to=x"
        )
        assert "run.dir has no effect here" in refused(capsys, "sample", run, "run.dir=elsewhere")
        assert "flow.drop_all has no effect here" in refused(capsys, "sample", run, "flow.steps=2", "flow.drop_all=0.5")
        for name, value in (("eval.clips", 2), ("flow.reference", "infill"), ("flow.infill", [0.2, 0.3])):
            assert f"{name} has no effect here" in refused(capsys, "sample", run, f"{name}={value}")
        for name, value in (("eval.clips", 2), ("flow.guidance", 1), ("flow.steps", 2), ("probe.every", 3)):
            assert f"{name} has no effect here" in refused(capsys, "probe", run, f"{name}={value}")
        assert "23 speech clips" in refused(capsys, "probe", run, "probe.clips=23")

    def test_measures_that_do_not_fit(self, run, tmp_path, capsys):
        assert "only foga" in refused(capsys, "probe", run, "--kind", "branch", "--measures", "cka")
        assert "only foga" in refused(capsys, "probe", run, "--kind", "branch", "--recipe", "official")
        assert "not cka, foga-vjp" in refused(
            capsys, "probe", run, "--recipe", "official", "--measures", "cka,foga-vjp,lasp"
        )
        copy = tmp_path / "copy"
        shutil.copytree(next((run / "checkpoints").glob("step*")), copy)
        save_file({"heads.x": torch.zeros(1)}, copy / "heads.safetensors")
        assert "there are none of audio, speech" in refused(capsys, "probe", copy, "--measures", "lasp")
        (copy / "heads.safetensors").unlink()
        assert "heads.safetensors is missing" in refused(capsys, "probe", copy)

    def test_prepare(self, tmp_path, capsys):
        assert "nowhere" in refused(
            capsys, "prepare", "folder", tmp_path / "nowhere", "--domain", "speech", "--out", tmp_path
        )
