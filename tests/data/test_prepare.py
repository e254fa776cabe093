"""agrepa prepare, end to end on recordings and a small random Whisper written by the tests."""

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agrepa_fast.audio.mel import LogMel, frame_count
from agrepa_fast.audio.waves import decode, resample
from agrepa_fast.config_file import load_config
from agrepa_fast.corpora import recordings
from agrepa_fast.data.index import load_index
from agrepa_fast.data.reading import read_shard
from agrepa_fast.errors import UserError
from agrepa_fast.files import FolderLock
from agrepa_fast.prepare import pipeline as prepare
from agrepa_fast.prepare.job import read_work, write_work
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.prepare.write import ShardStage
from agrepa_fast.tokenizers.base import tokens_of_frames

CODES = 8


def tone(seconds, rate, number):
    rng = np.random.default_rng(number)
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * (200 + 40 * number) * time) + 0.02 * rng.standard_normal(len(time))
    return wave.astype(np.float32)


def write_corpus(folder, count=24):
    """Recordings of 0.6 to 2.9 s (some beyond data.max_seconds) in every format, stereo and at odd rates."""
    kinds = [("wav", 16000), ("flac", 44100), ("mp3", 22050), ("ogg", 32000), ("opus", 48000), ("WAV", 11025)]
    for number in range(count):
        suffix, rate = kinds[number % len(kinds)]
        path = folder / f"speaker {number % 3}" / f"take.{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = tone(0.6 + 0.1 * number, rate, number)
        form = {"opus": {"format": "OGG", "subtype": "OPUS"}}.get(suffix, {})
        soundfile.write(path, np.stack([wave, wave / 2], axis=1) if number % 2 else wave, rate, **form)
        path.with_suffix(".txt").write_text(f"take number {number}\n")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def settings(whisper, *more):
    teachers = [f"data.speech_teacher={whisper}", f"data.audio_teacher={whisper}"]
    return load_config("demo", [*teachers, f"data.codebook={CODES}", "data.shard_clips=8", *more])


@pytest.fixture(scope="module")
def prepared(whisper, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "shards"
    return prepare_folder(settings(whisper), corpus, "speech", out)


def read_all(index, domain="speech"):
    return {s: [c for shard in index.shards(s, domain) for c in read_shard(shard, index)] for s in ("train", "val")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "prepare.json"}  # of timings


def test_every_recording_becomes_one_clip(prepared, corpus):
    read = read_all(load_index(prepared.folder))
    names = [clip.key for split in read.values() for clip in split]
    assert len(names) == len(set(names)) == 24
    assert len(read["val"]) >= 3  # 10 % of 24, rounded up
    assert all("." not in name and "/" not in name and " " not in name for name in names)
    assert {clip.source for split in read.values() for clip in split} == {
        path.relative_to(corpus).as_posix() for path in corpus.rglob("take*") if path.suffix != ".txt"
    }
    assert not (prepared.folder / ".work").exists()
    assert [shard.clips for shard in prepared.shards("train", "speech")][:-1] == [8] * (len(read["train"]) // 8)


def test_clips_hold_the_features_of_the_cut_recording(prepared, corpus, whisper):
    from agrepa_fast.teachers import load_teacher

    data, teacher = settings(whisper).data, load_teacher(str(whisper))
    log_mel = LogMel(data)
    checked = 0
    for clip in read_all(prepared)["train"]:
        number = int(clip.source.split(".")[-2])
        assert clip.text == f"take number {number}"
        wave, rate = decode(corpus / clip.source, clip.source)
        seconds = min(len(wave) / rate, data.max_seconds)
        assert clip.seconds == pytest.approx(seconds, abs=2e-4)
        assert clip.cut == (len(wave) / rate > data.max_seconds)
        wave = wave[: round(seconds * rate)]
        mono = resample(wave, rate, data.sample_rate)[: round(data.max_seconds * data.sample_rate)]
        assert clip.frames == frame_count(len(mono), data)
        np.testing.assert_allclose(clip.mel, log_mel(mono), atol=0.02, rtol=2e-3)
        frames = teacher.frames([resample(wave, rate, teacher.sample_rate)])[0]
        np.testing.assert_allclose(clip.teacher, frames.mean(axis=0), atol=5e-3)
        assert abs(len(clip.tokens) - seconds * teacher.rate) <= 2
        assert 0 <= clip.tokens.min() <= clip.tokens.max() < CODES
        checked += 1
    assert checked >= 18


def test_statistics_are_those_of_the_train_clips(prepared):
    train = read_all(prepared)["train"]
    mels = np.concatenate([clip.mel for clip in train]).astype(np.float64)
    assert prepared.mel_mean == pytest.approx(mels.mean(), rel=1e-9)
    assert prepared.mel_std == pytest.approx(mels.std(), rel=1e-9)
    pooled = np.mean([clip.teacher.astype(np.float64) for clip in train], axis=0)
    np.testing.assert_allclose(prepared.teacher("speech").mean, pooled, rtol=1e-5, atol=1e-6)
    codes = np.concatenate([tokens_of_frames(clip.tokens, clip.frames) for clip in train])
    for code in np.unique(codes):
        np.testing.assert_allclose(prepared.code_mels()[code], mels[codes == code].mean(axis=0), rtol=1e-5, atol=1e-5)


def test_second_run_does_nothing(prepared, corpus, whisper, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()}
    monkeypatch.setattr(recordings, "decode", lambda *_: pytest.fail("decoded again"))
    monkeypatch.setattr(prepare, "load_teacher_on_every_rank", lambda *_: pytest.fail("teacher loaded again"))
    again = prepare_folder(settings(whisper), corpus, "speech", prepared.folder)
    assert again.content == prepared.content
    assert {path: path.stat().st_mtime_ns for path in prepared.folder.iterdir()} == before
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.f_max=7000", r"data\.f_max=8000\.0, not 7000\.0"),
        ("data.codebook=16", r"data\.codebook=8, not 16"),
        ("data.val_share=0.2", r"data\.val_share=0\.1, not 0\.2"),
        ("data.speech_teacher=other", r"data\.speech_teacher=.*, not other"),
        ("data.teacher_precision=fp16", r"data\.teacher_precision=fp32, not fp16"),
    ],
)
def test_other_settings_are_refused(prepared, corpus, whisper, override, message):
    before = contents(prepared.folder)
    with pytest.raises(UserError, match=message):
        prepare_folder(settings(whisper, override), corpus, "speech", prepared.folder)
    assert contents(prepared.folder) == before


def test_settings_that_shape_no_feature_may_change(prepared, corpus, whisper):
    index = prepare_folder(settings(whisper, "data.workers=2", "data.path=x"), corpus, "speech", prepared.folder)
    assert index.content == prepared.content


def test_other_recordings_are_refused(prepared, whisper, tmp_path):
    with pytest.raises(UserError, match=r"holds speech recordings of .* which are not"):
        prepare_folder(settings(whisper), write_corpus(tmp_path / "other", 6), "speech", prepared.folder)


def test_second_domain_leaves_the_first_alone(whisper, tmp_path):
    speech, audio, out = write_corpus(tmp_path / "s", 12), write_corpus(tmp_path / "a", 18), tmp_path / "out"
    first = prepare_folder(settings(whisper), speech, "speech", out)
    before = {name: content for name, content in contents(out).items() if name != "index.json"}
    both = prepare_folder(settings(whisper), audio, "audio", out)
    assert both.domains == ("speech", "audio")
    assert both.content["domains"]["speech"] == first.content["domains"]["speech"]
    assert {name: content for name, content in contents(out).items() if name in before} == before
    clips_of = {domain: read_all(both, domain)["train"] for domain in both.domains}
    assert all(c.tokens.min() >= CODES and c.tokens.max() < 2 * CODES for c in clips_of["audio"])
    assert clips_of["audio"][0].labels[0].startswith("speaker ")
    values = np.concatenate([c.mel for d in both.domains for c in clips_of[d]]).astype(np.float64)
    assert both.mel_mean == pytest.approx(values.mean(), rel=1e-9)
    assert both.mel_std == pytest.approx(values.std(), rel=1e-9)
    # and in the other order, the same bytes
    prepare_folder(settings(whisper), audio, "audio", tmp_path / "reverse")
    prepare_folder(settings(whisper), speech, "speech", tmp_path / "reverse")
    assert contents(tmp_path / "reverse") == contents(out)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from agrepa_fast.config_file import load_config
from agrepa_fast.prepare.pipeline import prepare_folder
left, replace = [int(sys.argv[1])], Path.replace
def count(self, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = count
prepare_folder(load_config("demo", {overrides!r}), Path({corpus!r}), "speech", Path({out!r}))
"""


@pytest.mark.drill
def test_killed_runs_are_resumed_to_the_same_bytes(prepared, corpus, whisper, tmp_path):
    config, out = settings(whisper), tmp_path / "out"
    overrides = [f"data.{n}={getattr(config.data, n)}" for n in ("speech_teacher", "codebook", "shard_clips")]
    script = KILLED.format(root=str(Path(__file__).parents[2]), overrides=overrides, corpus=str(corpus), out=str(out))
    stages = []
    # The n-th file of each run: amid 24 mels; 15 more mels, skipped.csv and amid the frames of train clips; then
    # skipped.csv and all of those (the batch that was cut short is repeated), the codebook, 24 clips' tokens, the first
    # shard and what it adds to the statistics, and the second shard.
    for number in (10, 15 + 1 + 8, 1 + prepared.clips("train", "speech") + 1 + 24 + 3):
        code = subprocess.run([sys.executable, "-c", script, str(number)], capture_output=True, timeout=120).returncode
        assert code == -signal.SIGKILL
        with pytest.raises(UserError, match=r"has no index\.json"):
            load_index(out)
        done = [list(out.glob(files)) for files in (".work/*-mel-*/*/*.npz", ".work/*-frames-*/*/*.npz", "*.tar")]
        stages.append([len(files) for files in done])
    assert stages == [[9, 0, 0], [24, 7, 0], [24, prepared.clips("train", "speech"), 1]]
    prepare_folder(config, corpus, "speech", out)
    assert contents(out) == contents(prepared.folder)


@pytest.mark.parametrize("override", ["data.f_max=7000", "data.max_seconds=1.5"])
def test_an_interrupted_run_goes_on_with_other_settings_as_if_it_had_begun_with_them(
    override, corpus, whisper, tmp_path, monkeypatch
):
    def interrupted(stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardStage, "_describe", interrupted)  # all shards are there, index.json is not
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    changed = prepare_folder(settings(whisper, override), corpus, "speech", tmp_path / "out")
    fresh = prepare_folder(settings(whisper, override), corpus, "speech", tmp_path / "fresh")
    assert changed.content == fresh.content


def test_one_writer_at_a_time(corpus, whisper, tmp_path):
    with (
        FolderLock(tmp_path / ".work", ""),
        pytest.raises(UserError, match=r"\.work is in use by this process: wait for it .* choose another --out"),
    ):
        prepare_folder(settings(whisper), corpus, "speech", tmp_path)


def write_bad(folder, kind):
    path = folder / f"bad-{kind}.wav"
    if kind == "unreadable":
        path.write_bytes(b"RIFF no wav")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        wave = {
            "silent": np.full(16000, 5e-5),
            "short": tone(0.49, 16000, 1),
            "headeronly": np.zeros(0),
            "nan": np.where(np.arange(16000) == 99, np.nan, tone(1, 16000, 1)),
            "inf": np.where(np.arange(16000) == 99, np.inf, tone(1, 16000, 1)),
        }[kind]
        soundfile.write(path, wave.astype(np.float32), 16000, subtype="FLOAT")


BAD = {
    "unreadable": "cannot be decoded",
    "empty": "cannot be decoded",
    "silent": "silent, peak 5e-05",
    "short": r"0\.49 s are shorter than data\.min_seconds=0\.5",
    "headeronly": "no samples",
    "nan": "not finite",
    "inf": "not finite",
}


@pytest.mark.parametrize(
    "kinds", [("unreadable", "silent", "short"), ("empty", "nan", "inf"), ("headeronly",)], ids=str
)
def test_bad_recordings_are_skipped_and_listed(whisper, tmp_path, kinds, capsys):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for kind in kinds:
        write_bad(corpus, kind)
    index = prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert index.clips("train", "speech") + index.clips("val", "speech") == 12
    skipped = {entry["source"]: entry["reason"] for entry in index.content["domains"]["speech"]["skipped"]}
    printed = capsys.readouterr().out
    assert set(skipped) == {f"bad-{kind}.wav" for kind in kinds}
    for kind in kinds:
        assert re.search(BAD[kind], skipped[f"bad-{kind}.wav"])
        assert f"bad-{kind}.wav" in printed


def test_too_many_bad_recordings_stop_it(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for kind in ("unreadable", "empty", "headeronly", "nan"):
        write_bad(corpus, kind)
    message = r"4 of 16 speech recordings cannot be used: bad-empty\.wav \(cannot be decoded .* and 1 more, all in "
    with pytest.raises(UserError, match=message):
        prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    write_corpus(tmp_path / "corpus", 12)  # the same again, and the bad ones removed: it goes on
    for path in corpus.glob("bad-*"):
        path.unlink()
    assert prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out").clips("train", "speech") > 0


def test_nothing_usable_is_an_error(whisper, tmp_path):
    write_bad(tmp_path, "silent")
    with pytest.raises(UserError, match="1 of 1 speech recordings cannot be used"):
        prepare_folder(settings(whisper), tmp_path, "speech", tmp_path / "out")


def test_bad_folders_are_named(whisper, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"nowhere is no folder"):
        prepare_folder(settings(whisper), tmp_path / "nowhere", "speech", out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("none")
    with pytest.raises(UserError, match=r"empty holds no recordings: \.wav, \.flac"):
        prepare_folder(settings(whisper), tmp_path / "empty", "speech", out)
    assert not out.exists()
    with pytest.raises(UserError, match=r"domain 'speach' is unknown: did you mean 'speech'"):
        prepare_folder(settings(whisper), tmp_path, "speach", out)
    out.write_text("a file")
    with pytest.raises(UserError, match=r"out/\.work cannot be written"):
        prepare_folder(settings(whisper), write_corpus(tmp_path / "corpus", 6), "speech", out)


def test_too_large_a_codebook_names_the_setting(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 6)
    with pytest.raises(UserError, match=r"data\.codebook=4096: the speech train clips have only \d+ teacher frames"):
        prepare_folder(settings(whisper, "data.codebook=4096"), corpus, "speech", tmp_path / "out")


def test_threads_read_arrays_without_the_parser_that_they_share(tmp_path, monkeypatch):
    """Two threads in `ast.parse` get SystemError on Python before 3.11.8: it failed a preparation in CI."""
    arrays = {
        "mel": np.arange(12, dtype=np.float16).reshape(3, 4),
        "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "wave": np.arange(5, dtype=np.int16),
        "nothing": np.zeros((0, 3), np.int64),
        "seconds": np.array(1.5),
        "cut": np.array(True),
        "reason": np.array("its mel is not finite"),
        "kind": np.array(""),
    }
    file = tmp_path / "work.npz"
    write_work(file, **arrays)
    monkeypatch.setattr(ast, "parse", lambda *_, **__: pytest.fail("ast.parse was called"))
    for read in (read_work(file), read_work(file, *reversed(arrays))):
        assert read.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape), name
            assert np.array_equal(read[name], array), name
    assert list(read_work(file, "cut")) == ["cut"]


def test_settings_that_version_0_1_had_not_are_taken_for_its_behaviour(corpus, prepared, whisper, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(prepared.folder, old)
    content = json.loads((old / "index.json").read_text())
    assert content["features"].pop("long") == "cut"
    (old / "index.json").write_text(json.dumps(content))
    prepare_folder(settings(whisper), corpus, "speech", old)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"prepared with data\.long=cut, not skip"):
        prepare_folder(settings(whisper, "data.long=skip"), corpus, "speech", old)
