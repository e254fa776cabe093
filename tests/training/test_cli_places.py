"""Where a command reads and writes: looked at before the work, and said in one line if it cannot be used."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file

from agrepa_fast.checkpoints import weights
from agrepa_fast.checkpoints.find import resolve_checkpoint
from agrepa_fast.cli import main
from agrepa_fast.config_file import load_config
from agrepa_fast.data.index import read_index
from agrepa_fast.errors import UserError
from agrepa_fast.reporting import probe, samples
from agrepa_fast.training import folder
from agrepa_fast.training.folder import locate_run

from ..ranks import ROOT, run_training


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    *bars, line = capsys.readouterr().err.strip().splitlines()
    assert all("%|" in bar for bar in bars), bars
    return line


def no_work(*_: object, **__: object) -> None:
    raise AssertionError("work before the place was looked at")


@pytest.fixture
def blocked(tmp_path) -> Path:
    """A folder below a file: it cannot be made, by root neither, as on a disk that is read-only."""
    (tmp_path / "file").touch()
    return tmp_path / "file" / "out"


class TestBeforeTheWork:
    def test_probe_and_sample(self, baseline, blocked, capsys, monkeypatch):
        monkeypatch.setattr(probe, "measure_model", no_work)
        monkeypatch.setattr(samples, "sample_clips", no_work)
        monkeypatch.setattr(samples, "load_vocoder", no_work)
        for command in ("probe", "sample"):
            line = refused(capsys, command, baseline, "--out", blocked)
            assert f"--out {blocked} cannot be written (Not a directory)" in line
        assert "cannot be written" in refused(
            capsys, "probe", "--model", "nothing:x", "--blocks", "b", "--out", blocked
        )

    def test_export(self, baseline, blocked, capsys, monkeypatch):
        monkeypatch.setattr(weights, "load_model", no_work)
        assert "cannot be written" in refused(capsys, "export", baseline, "--out", blocked)

    def test_prepare_and_tokens(self, blocked, tmp_path, capsys):
        """The folder of recordings does not exist, and would be found missing later."""
        source = tmp_path / "nothing"
        line = refused(capsys, "prepare", "folder", source, "--domain", "speech", "--out", blocked)
        assert "--out" in line
        assert "cannot be written" in line
        assert "data.path" in refused(capsys, "prepare", "demo", f"data.path={blocked}")
        fit = ("tokens", "fit", source, "--teacher", "package:whisper-base", "--out")
        assert "cannot be written" in refused(capsys, *fit, blocked)
        assert "is a folder: name the .safetensors file" in refused(capsys, *fit, tmp_path)

    def test_train(self, preset, blocked, tmp_path):
        for setting in (f"run.dir={blocked}", f"train.copy_to={blocked}"):
            output = run_training(1, "--preset", str(preset), setting, cwd=tmp_path, wanted=2)
            assert f"agrepa train: {setting.partition('=')[0]} {blocked} cannot be written" in output
            assert "Traceback" not in output
        assert [path.name for path in tmp_path.iterdir()] == ["file"] or not list(tmp_path.glob("runs/*/config.yaml"))


class TestFailuresWhileWriting:
    def test_a_full_disk_during_an_export_leaves_nothing(self, baseline, tmp_path, monkeypatch, capsys):
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device", str(tmp_path / "new" / "config.yaml"))

        monkeypatch.setattr(weights, "save_config", full)
        line = refused(capsys, "export", baseline, "--out", tmp_path / "new")
        assert line.endswith("config.yaml: No space left on device")
        assert not list((tmp_path / "new").iterdir())

    def test_a_full_disk_during_samples_is_one_line(self, baseline, tmp_path, monkeypatch, capsys):
        def full(path: Path, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(samples, "write_atomically", full)
        assert "No space left" in refused(capsys, "sample", baseline, "--out", tmp_path, "--clips", "1", "flow.steps=1")

    @pytest.mark.parametrize(
        ("redirect", "code", "said"), [("> /dev/full", 2, "No space left"), ("| true", 0, ""), (">&-", 0, "")]
    )
    def test_stdout_that_takes_nothing(self, redirect, code, said):
        command = f"set -o pipefail; {sys.executable} -m agrepa_fast.cli config agrepa-a {redirect}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr


def test_what_is_written_may_be_read_by_whom_the_umask_says(baseline, tmp_path):
    """safetensors makes files of mode 0600."""
    mask = os.umask(0)
    os.umask(mask)
    main(["export", str(baseline), "--out", str(tmp_path / "new")])
    files = [path for folder in (baseline, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {
        str(path): oct(0o666 & ~mask) for path in files
    }
    assert load_file(tmp_path / "new" / "model.safetensors").keys()


class TestDamage:
    """Content that a disk, an editor or somebody else has changed: one line, before any work."""

    @pytest.mark.parametrize(
        "marker",
        [
            "",
            "[]",
            "{}",
            "null",
            '{"files": [], "saved": 1, "step": 5}',
            '{"files": {}, "saved": "x", "step": 5}',
            "\udcff",
        ],
    )
    def test_a_marker(self, marker, baseline, tmp_path, capsys):
        copy = self.copy(baseline, tmp_path)
        (copy / "checkpoint.json").write_bytes(marker.encode(errors="surrogateescape"))
        assert "checkpoint.json is damaged" in refused(capsys, "export", copy, "--out", tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("config.yaml", b"", "is no checkpoint's"),
            ("config.yaml", b"model: {dim: 64}", "is no checkpoint's"),
            ("config.yaml", "model: {}".encode("utf-16"), "is not UTF-8"),
            ("ema.safetensors", b"", "is no whole safetensors file"),
            ("ema.safetensors", b"\xff" * 100, "is no whole safetensors file"),
            ("shards.json", b"nul", "shards.json is damaged"),
            ("shards.json", b"[" * 100_000, "shards.json is damaged"),
        ],
    )
    def test_a_file_of_a_checkpoint(self, name, content, message, baseline, tmp_path, capsys):
        copy = self.copy(baseline, tmp_path)
        (copy / name).write_bytes(content)
        facts = json.loads((copy / "checkpoint.json").read_text())
        facts["files"][name] = len(content)
        (copy / "checkpoint.json").write_text(json.dumps(facts))
        assert message in refused(capsys, "export", copy, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_pointer(self, baseline, tmp_path):
        self.copy(baseline, tmp_path)
        for content in (b"", b"\xff\xfe", b"../../..", b"x" * 5000):
            (tmp_path / "run" / "checkpoints" / "latest").write_bytes(content)
            assert resolve_checkpoint(tmp_path / "run").name == "step00000005"

    @pytest.mark.parametrize("content", [b"step,measure\n1,2\n", b"\xff\xfe\0", b"a\0b\n1\n"])
    def test_a_table_of_another_kind_in_the_way_of_a_probe(self, content, baseline, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(probe, "measure_model", no_work)
        (tmp_path / "attribution.csv").write_bytes(content)
        line = refused(capsys, "probe", baseline, "--out", tmp_path)
        assert "attribution.csv is no" in line
        assert (tmp_path / "attribution.csv").read_bytes() == content

    def test_an_index_with_a_byte_order_mark_is_whole_and_one_of_another_encoding_is_damaged(self, preset, tmp_path):
        content = (preset.parent / "index.json").read_bytes()
        (tmp_path / "index.json").write_bytes(b"\xef\xbb\xbf" + content)
        assert read_index(tmp_path).content == json.loads(content)
        for damaged in (content.decode().encode("utf-16"), b"[" * 100_000):
            (tmp_path / "index.json").write_bytes(damaged)
            with pytest.raises(UserError, match="is damaged"):
                read_index(tmp_path)

    def copy(self, baseline: Path, tmp_path: Path) -> Path:
        """Return the checkpoint of a copy of the run, tmp_path/run."""
        shutil.copytree(baseline, tmp_path / "run")
        return next((tmp_path / "run" / "checkpoints").glob("step*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_weights_and_checkpoints_of_somebody_else_are_not_missing(baseline):
    with tempfile.TemporaryDirectory() as place:  # not pytest's, which is private
        Path(place).chmod(0o755)
        run = shutil.copytree(baseline, Path(place, "run"))
        (checkpoint,) = (run / "checkpoints").glob("step*")
        for path, mode in ((checkpoint / "ema.safetensors", 0o600), (checkpoint, 0o700), (run / "checkpoints", 0o700)):
            path.chmod(mode)
            os.seteuid(12345)
            try:
                with pytest.raises(UserError, match=rf"{path.name}.* cannot be read: Permission denied"):
                    weights.load_model(run)
            finally:
                os.seteuid(0)
                path.chmod(0o755)


def test_wavs_are_whole_or_absent(baseline, tmp_path):
    samples._write_wav(tmp_path / "a.wav", torch.zeros(100).numpy(), 16000)
    assert soundfile.info(tmp_path / "a.wav").frames == 100
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    """Without locks, and before anything is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda form: "20261128-153000")
    config = load_config("demo")
    found = [locate_run(config, None)[0].run for _ in range(50)]
    assert len({run.dir for run in found}) == len({run.id for run in found}) == 50
    assert all(run.dir == f"runs/demo-20261128-153000-{run.id[:6]}" for run in found)
    assert not list(tmp_path.iterdir())
