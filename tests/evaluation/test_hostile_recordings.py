"""Recordings of `agrepa evaluate FOLDER` that no model can judge, or that have odd names: named, and never a number."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agrepa_fast.cli import main
from agrepa_fast.evaluation import evaluate
from agrepa_fast.evaluation.metric_model import wave_at
from agrepa_fast.evaluation.scores import FAILED, ScoreCache
from agrepa_fast.evaluation.stored import read_clips

RATE = 16000
TONE = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)


class Model:
    """A predictor of opinions that refuses what real ones refuse. Noise has a low score."""

    identity, names = {"spec": "fake", "sha256": "0"}, ("mos",)

    def score(self, wave: np.ndarray, rate: int) -> dict[str, float]:
        wave = wave_at(wave, rate, RATE)
        if len(wave) < 1000:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        power = np.abs(np.fft.rfft(wave))
        return {"mos": 5 - 4 * min(1.0, 100 * float(np.median(power) / power.max()))}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three tones, of which the model says 5; the current folder is above."""
    monkeypatch.setattr(evaluate, "load_mos", lambda *_: Model())
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write(Path("tones", f"{name}.wav"), TONE)
    return Path("tones")


def write(path: Path, wave: np.ndarray, subtype: str = "FLOAT") -> None:
    path.parent.mkdir(exist_ok=True)
    soundfile.write(os.fsencode(path), wave, RATE, format="WAV", subtype=subtype)


def measured(folder: Path, *more: str) -> dict:
    main(["evaluate", str(folder), "--domain", "speech", "--out", "out", "metrics.only=[mos]", *more])
    text = Path("out", "results.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    return json.loads(text)


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (np.where(np.arange(RATE) == 99, np.nan, TONE), "not finite"),
        (np.where(np.arange(RATE) == 99, -np.inf, TONE), "not finite"),
        (32767 * TONE, "peak 9830.1, not in [-1, 1]"),
        (np.where(np.arange(RATE) == 99, 1e30, TONE), "peak 1e+30, not in [-1, 1]"),
        (TONE[:0], "at least one sample"),
        (TONE[:160], "Kernel size"),
    ],
    ids=["nan", "inf", "integers", "a sample", "empty", "short"],
)
def test_a_wave_that_cannot_be_judged_is_named_and_spoils_no_mean(wave, reason, folder):
    write(folder / "bad.wav", wave)
    write(folder / "0.wav", wave)  # the first: the self-test would use it
    results = measured(folder)
    assert results["failed"].keys() == {"sample/bad.wav: mos", "sample/0.wav: mos"}
    assert all(reason in said for said in results["failed"].values())
    mos = results["rows"]["sample"]["speech"]["mos"]
    assert (mos["n"], mos["value"]) == (3, pytest.approx(5, abs=0.01))
    assert results["left_out"] == {}


@pytest.mark.parametrize("content", [b"", b"RIFF", b"hello", bytes(5000)])
def test_a_file_that_is_no_recording_is_named(content, folder):
    """Its name closes a tag of rich's markup, which none has opened."""
    (folder / "[").mkdir()
    (folder / "[" / "b].wav").write_bytes(content)
    (folder / "[ b].wav").write_bytes(content)
    results = measured(folder)
    assert results["failed"].keys() == {"sample/b].wav: mos", "sample/[ b].wav: mos"}
    assert results["rows"]["sample"]["speech"]["mos"]["n"] == 3


def test_what_is_no_recording_is_counted(folder, capsys):
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "a.txt").write_text("a transcript")
    (folder / "notes").touch()
    assert measured(folder)["rows"]["sample"]["speech"]["mos"]["n"] == 3
    said = "tones: 3 recordings; not taken: "
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(said))
    kinds = line.removeprefix(said).split(", ")
    assert sorted(kinds) == ["1 x file without a suffix", "1 x link", "1 x no regular file"]


@pytest.mark.parametrize("content", ['{"text": "mine"}', "[1]", "{"])
def test_json_files_beside_recordings_are_not_read(content, folder):
    """Those of a synthesis hold distances of mels."""
    (folder / "a.json").write_text(content)
    main(["evaluate", str(folder), "--domain", "speech", "--out", "out", "metrics.only=[mos,mel]"])
    assert {row["text"] for row in read_clips(Path("out", "clips.csv"))} == {""}


def test_all_waves_bad_is_no_traceback(folder):
    for path in folder.iterdir():
        write(path, np.full(RATE, np.nan))
    results = measured(folder)
    assert results["rows"]["sample"]["speech"] == {}
    assert results["left_out"].keys() == {"mos"}


def test_loud_recordings_are_tested_and_judged(folder):
    """The noise of a self-test lifts them above the peak that a model takes."""
    for path in folder.iterdir():
        write(path, 9.5 / 0.3 * TONE)
    results = measured(folder)
    assert results["rows"]["sample"]["speech"]["mos"]["n"] == 3
    assert results["failed"] == results["left_out"] == {}


def test_a_text_that_cannot_be_read_is_refused_where_words_count(folder, capsys):
    (folder / "b.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(folder), "--domain", "speech", "--out", "out", "metrics.only=[wer,mos]"])
    assert ended.value.code == 2
    assert "b.txt" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert measured(folder)["rows"]["sample"]["speech"]["mos"]["n"] == 3


@pytest.mark.parametrize(("here", "given"), [("tones", "."), ("tones", "./"), ("tones/sub", ".."), ("tones", "sub/..")])
def test_a_folder_without_a_name_has_its_evaluation_beside_it(here, given, folder, monkeypatch):
    (folder / "sub").mkdir()
    outside = folder.absolute().parent
    monkeypatch.chdir(here)
    main(["evaluate", given, "--domain", "speech", "metrics.only=[mos]"])
    assert (outside / "evaluate-tones" / "results.json").is_file()
    assert {path.name for path in (outside / "tones").iterdir()} == {"a.wav", "b.wav", "c.wav", "sub"}


def test_names_that_are_not_utf_8(folder):
    """That of the folder, of a recording, and of one that fails, which results.md and report.html name."""
    (folder / "a.wav").rename(folder / os.fsdecode(b"stra\xdfe.wav"))
    (folder / os.fsdecode(b"schl\xfcssel.wav")).write_bytes(b"")
    results = measured(folder.rename(os.fsdecode(b"t\xf6ne")))
    assert results["rows"]["sample"]["speech"]["mos"]["n"] == 3
    assert "schl\\udcfcssel.wav" in Path("out", "results.md").read_text()
    assert "t\\udcf6ne" in Path("out", "report.html").read_text()


def test_lengths_are_those_of_the_sound(folder):
    """A header may lack the length: that of a FLAC from a pipe."""
    soundfile.write(folder / "d.flac", TONE, RATE)
    raw = bytearray((folder / "d.flac").read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    (folder / "d.flac").write_bytes(raw)
    measured(folder)
    assert {row["seconds"] for row in read_clips(Path("out", "clips.csv"))} == {1.0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--reference", "two"], "--reference two: a.flac has a copy, a.wav is taken: keep one"),
        (["--domain", "audio"], "all of them of speech"),
        (["metrics.only=[mmd,mel]"], "all of them of speech"),
    ],
)
def test_what_would_be_guessed_or_measure_nothing_is_refused(arguments, said, folder, capsys):
    for name in ("a.wav", "a.flac", "b.wav", "c.wav"):
        Path("two").mkdir(exist_ok=True)
        soundfile.write(Path("two", name), TONE, RATE)
    with pytest.raises(SystemExit) as ended:
        measured(folder, *arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_figures_that_are_not_finite_are_a_failure_and_failures_are_not_kept(tmp_path):
    scores = ScoreCache(tmp_path, "mos", {})
    for said in ({"mos": float("nan")}, {"vector": [1.0, float("inf")]}):
        assert "not finite" in scores.judge("key", lambda: (TONE, RATE), lambda *_, said=said: said)[FAILED]
    assert scores.judge("key", lambda: (TONE, RATE), lambda *_: {"mos": 3.0, "heard": "a", "none": None})["mos"] == 3.0
    scores.file("key").write_bytes(b"")  # as after a crash of the machine
    assert scores.judge("key", lambda: (TONE, RATE), lambda *_: {"mos": 4.0})["mos"] == 4.0
