"""skipped.csv names everything that preparation has not taken; what is found bad late is left out as if found early."""

import csv
import shutil

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError
from agrepa_fast.prepare import roles, skipped
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.teachers.whisper import WhisperTeacher

from .test_decode import Signs
from .test_decoders import write_pyav
from .test_prepare import contents, read_all, settings, tone, write_bad, write_corpus
from .test_prepare_ranks import run_threads


def rows(out):
    with (out / "skipped.csv").open(newline="") as stream:
        return [tuple(row.values()) for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """12 good recordings; bad, short and silent ones; and a file of notes."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), 12)
    for kind in ("unreadable", "silent", "short", "nan"):
        write_bad(folder, kind)
    for number in range(5):
        soundfile.write(folder / f"loud{number}.wav", tone(1, 16000, number), 16000)
    soundfile.write(folder / "int16.wav", tone(1, 16000, 1) * 32767, 16000, subtype="FLOAT")
    (folder / "notes.pdf").touch()
    return folder


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_name_has_its_reason_on_any_number_of_ranks(corpus, whisper, tmp_path, ranks, capsys):
    out = tmp_path / "out"
    run_threads(ranks, lambda ranks: prepare_folder(settings(whisper), corpus, "speech", out, ranks))
    found = {name: (kind, reason) for domain, source, name, kind, reason in rows(out)}
    assert {(domain, source) for domain, source, *_ in rows(out)} == {("speech", str(corpus))}
    assert {name: kind for name, (kind, _) in found.items()} == {
        "bad-nan.wav": "bad recording",
        "bad-unreadable.wav": "bad recording",
        "bad-short.wav": "short recording",
        "bad-silent.wav": "silent recording",
        "int16.wav": "bad recording",
        "notes.pdf": ".pdf file",
    }
    assert "peak 12247" in found["int16.wav"][1]
    assert "not in [-1, 1]" in found["int16.wav"][1]
    in_index = load_index(out).content["domains"]["speech"]["skipped"]
    assert [(entry["source"], entry["reason"]) for entry in in_index] == sorted(
        (name, reason) for name, (kind, reason) in found.items() if "recording" in kind
    )
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed == (
        f"speech: 17 recordings of {corpus} taken; not taken: 3 x bad recording, 1 x short recording, "
        f"1 x silent recording, 1 x .pdf file; all names and reasons are in {out}/skipped.csv"
    )


def test_the_file_does_not_change_the_shards(corpus, whisper, tmp_path):
    """The same recordings without anything to skip give the same shards."""
    clean = tmp_path / "clean"
    shutil.copytree(corpus, clean)
    for name in ("bad-nan", "bad-unreadable", "bad-short", "bad-silent", "int16"):
        (clean / f"{name}.wav").unlink()
    (clean / "notes.pdf").unlink()
    prepare_folder(settings(whisper), corpus, "speech", tmp_path / "all")
    prepare_folder(settings(whisper), clean, "speech", tmp_path / "less")
    found = [contents(tmp_path / out) for out in ("all", "less")]
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"index.json", "skipped.csv"}
    assert rows(tmp_path / "less") == []
    (tmp_path / "less" / "skipped.csv").unlink()  # as in shards of an earlier version
    again = prepare_folder(settings(whisper), clean, "speech", tmp_path / "less")
    assert len(read_all(again)["train"]) == 15


def test_both_domains_share_the_file(corpus, whisper, tmp_path):
    sounds = write_corpus(tmp_path / "sounds", 12)
    write_bad(sounds, "short")
    out = tmp_path / "out"
    prepare_folder(settings(whisper), corpus, "speech", out)
    speech = rows(out)
    prepare_folder(settings(whisper), sounds, "audio", out)
    assert rows(out) == [("audio", str(sounds), "bad-short.wav", "short recording", rows(out)[0][-1]), *speech]


@pytest.mark.parametrize(
    "content", ["", "mine;too\n1;2\n", "domain,corpus\nspeech,x\n"], ids=["empty", "foreign", "old"]
)
def test_another_file_of_that_name_is_replaced(content, tmp_path):
    (tmp_path / "skipped.csv").write_text(content)
    skipped.write_skipped(tmp_path, "speech", "corpus", [skipped.PassedOver('a,\n"b"', "link", "gone")])
    assert rows(tmp_path) == [("speech", "corpus", 'a,\n"b"', "link", "gone")]


def test_short_and_silent_recordings_are_no_damage(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for number in range(6):
        soundfile.write(corpus / f"short{number}.wav", tone(0.2, 16000, number), 16000)
        soundfile.write(corpus / f"silent{number}.wav", np.zeros(16000), 16000)
    index = prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert sum(map(len, read_all(index).values())) == 12
    assert len(rows(tmp_path / "out")) == 12
    for path in corpus.rglob("take*"):
        path.unlink()
    with pytest.raises(UserError, match=r"12 of 12 speech recordings cannot be used: .* at least 2 must be good"):
        prepare_folder(settings(whisper), corpus, "speech", tmp_path / "none")


def test_long_recordings_are_left_out_instead_of_cut_if_that_is_asked(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 20)
    lengths = {path.name: soundfile.info(path).duration for path in corpus.rglob("take*") if path.suffix != ".txt"}
    long = sorted(name for name, seconds in lengths.items() if seconds > 2.25)
    assert len(long) > 1
    index = prepare_folder(settings(whisper, "data.long=skip"), corpus, "speech", tmp_path / "out")
    assert sorted((row[2].rpartition("/")[2], *row[3:]) for row in rows(tmp_path / "out")) == [
        (name, "long recording", "longer than data.max_seconds=2.2") for name in long
    ]
    clips = [clip for of_split in read_all(index).values() for clip in of_split]
    assert len(clips) == 20 - len(long)
    assert not any(clip.cut for clip in clips)
    with pytest.raises(UserError, match=r"was prepared with data\.long=skip, not cut"):
        prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")


def test_a_refusal_names_all_recordings_in_the_file(whisper, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for number in range(30):
        (corpus / f"bad\n{number:02d}.wav").write_bytes(b"")
    with pytest.raises(UserError, match=r"30 of 42 .* bad\?00\.wav .* and 27 more, all in .*skipped\.csv; at most 2%"):
        prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert [row[2] for row in rows(tmp_path / "out")] == [f"bad\n{number:02d}.wav" for number in range(30)]


def test_only_the_first_recordings_are_printed(whisper, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for number in range(30):
        soundfile.write(corpus / f"short{number:02d}.wav", tone(0.2, 16000, number), 16000)
    prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("speech: skipped short") == 20
    assert f"speech: skipped 10 more, named in {tmp_path}/out/skipped.csv\n" in printed


# Found late

LATE = ("take.3.ogg", "take.8.mp3")


def bad_frames(monkeypatch, values):
    """The teacher gives bad frames for the waves of two recordings, told by their length."""
    frames, lengths = WhisperTeacher.frames, {round(16000 * (0.6 + 0.1 * number)) for number in (3, 8)}

    def planted(self, waves):
        of_waves = frames(self, waves)
        late = [any(abs(len(wave) - length) < 800 for length in lengths) for wave in waves]
        return [values(of) if bad else of for of, bad in zip(of_waves, late, strict=True)]

    monkeypatch.setattr(WhisperTeacher, "frames", planted)


VALUES = {"nan": lambda frames: frames * np.nan, "too large": lambda frames: frames * 1e9, "none": lambda f: f[:0]}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("codes", [4, 8], ids="codebook of {} codes".format)
@pytest.mark.parametrize("kind", VALUES)
def test_frames_that_cannot_be_stored_leave_their_clip_out(whisper, tmp_path, monkeypatch, kind, codes, ranks):
    corpus, out = write_corpus(tmp_path / "corpus", 20), tmp_path / "out"
    bad_frames(monkeypatch, VALUES[kind])
    config = settings(whisper, f"data.codebook={codes}")
    run_threads(ranks, lambda ranks: prepare_folder(config, corpus, "speech", out, ranks))
    index = load_index(out)
    sources = {clip.source for split in read_all(index).values() for clip in split}
    assert len(sources) == 18
    assert not [source for source in sources if source.endswith(LATE)]
    assert sorted((row[2].rpartition("/")[2], row[3]) for row in rows(out)) == [(n, "bad recording") for n in LATE]
    reason = "gives no frames" if kind == "none" else "gives values that fp16 cannot hold"
    assert all(row[4].startswith("teacher ") and reason in row[4] for row in rows(out))
    assert len(index.content["domains"]["speech"]["skipped"]) == 2
    left = {path for path in corpus.rglob("take*") if path.name.endswith((*LATE, "take.3.txt", "take.8.txt"))}
    assert len(left) == 4
    for path in left:
        path.unlink()
    monkeypatch.undo()
    prepare_folder(config, corpus, "speech", tmp_path / "never there")
    there = read_all(load_index(tmp_path / "never there"))
    for split, clips in read_all(index).items():
        assert [clip.key for clip in clips] == [clip.key for clip in there[split]]


def test_an_interruption_after_bad_frames_changes_nothing(whisper, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", 20)
    bad_frames(monkeypatch, VALUES["nan"])
    prepare_folder(settings(whisper), corpus, "speech", tmp_path / "whole")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr("agrepa_fast.prepare.write.ShardStage.run", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(settings(whisper), corpus, "speech", tmp_path / "again")
    assert len(list((tmp_path / "again/.work").glob("*-teacher-*/*/*.unusable.npz"))) == 2
    monkeypatch.setattr(WhisperTeacher, "frames", lambda *_: pytest.fail("computed again"))
    prepare_folder(settings(whisper), corpus, "speech", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_too_many_bad_frames_end_it_with_all_names(whisper, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", 12)
    frames = WhisperTeacher.frames
    monkeypatch.setattr(WhisperTeacher, "frames", lambda self, waves: [f * np.nan for f in frames(self, waves)])
    with pytest.raises(UserError, match=r"gives values that fp16 cannot hold, for all of the first \d+ speech clips"):
        prepare_folder(settings(whisper, "data.codebook=4"), corpus, "speech", tmp_path / "out")
    calls = iter([1.0, 1.0] + [np.nan] * 99)  # the first clips are good, so that there is a codebook
    monkeypatch.setattr(WhisperTeacher, "frames", lambda self, waves: [f * next(calls) for f in frames(self, waves)])
    with pytest.raises(UserError, match=r"\d+ of 12 speech recordings cannot be used: .* all in .*skipped\.csv"):
        prepare_folder(settings(whisper, "data.codebook=4"), corpus, "speech", tmp_path / "half")
    assert len(rows(tmp_path / "half")) == 10


def fails(self, waves, frames=WhisperTeacher.frames):
    if any(abs(len(wave) / 16000 - 0.9) < 0.05 for wave in waves):
        raise RuntimeError("kernel size is greater\nthan input size")
    return frames(self, waves)


def test_a_clip_that_the_teacher_fails_on_is_left_out(whisper, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", 12)
    monkeypatch.setattr(WhisperTeacher, "frames", fails)
    index = prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert sum(map(len, read_all(index).values())) == 11
    [row] = rows(tmp_path / "out")
    assert row[2] == "speaker 0/take.3.ogg"
    assert row[4].endswith("fails: RuntimeError: kernel size is greater than input size")


@pytest.mark.parametrize("error", [RuntimeError("broken"), torch.OutOfMemoryError("full"), MemoryError()], ids=repr)
def test_a_teacher_that_fails_on_everything_ends_it(whisper, tmp_path, monkeypatch, error):
    def frames(self, waves):
        raise error

    monkeypatch.setattr(WhisperTeacher, "frames", frames)
    with pytest.raises(type(error)):
        prepare_folder(settings(whisper), write_corpus(tmp_path / "corpus", 12), "speech", tmp_path / "out")


class NoTokens(Signs):
    """None for the wave of take.3."""

    def encode(self, waves, texts):
        lengths = [0 if abs(len(wave) / 24000 - 0.9) < 0.05 else None for wave in waves]
        return [ids[:length] for ids, length in zip(super().encode(waves, texts), lengths, strict=True)]


def test_clips_without_tokens_are_left_out(whisper, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus", 12)
    monkeypatch.setattr(roles, "load_tokenizer", lambda spec, device: NoTokens())
    config = settings(whisper, "data.extra_tokens=s3:signs", "data.extra_codebook=2")
    index = prepare_folder(config, corpus, "speech", tmp_path / "out")
    assert sum(map(len, read_all(index).values())) == 11
    [row] = rows(tmp_path / "out")
    assert row[2:] == ("speaker 0/take.3.ogg", "bad recording", "tokenizer s3:signs gives no tokens")


def test_a_recording_that_vanishes_is_left_out(whisper, tmp_path, monkeypatch):
    from agrepa_fast.prepare import pipeline

    corpus, decode = write_corpus(tmp_path / "corpus", 12), pipeline.decode_recordings

    def after_listing(job, recordings, rates):
        (corpus / "speaker 0/take.3.ogg").unlink()
        return decode(job, recordings, rates)

    monkeypatch.setattr(pipeline, "decode_recordings", after_listing)
    prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    [row] = rows(tmp_path / "out")
    assert row[2:4] == ("speaker 0/take.3.ogg", "bad recording")
    assert "No such file" in row[4]


def test_waves_and_mels_are_checked_from_both_sides(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 12)
    spike = tone(1, 16000, 1)
    spike[1000] = 1e29
    for name, wave in {"spike": spike, "hot": tone(1, 16000, 1) * 9, "quiet": tone(1, 16000, 1) * 1e-3}.items():
        soundfile.write(corpus / f"{name}.wav", wave, 16000, subtype="FLOAT")
    index = prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert sum(map(len, read_all(index).values())) == 14  # mixes may be hotter than 1
    [row] = rows(tmp_path / "out")
    assert row[2:4] == ("spike.wav", "bad recording")
    assert row[4].startswith("peak 1e+29, not in [-1, 1]")


@pytest.mark.filterwarnings("error")
def test_waves_that_overflow_are_named_without_a_warning(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for name, values in {"huge": (3e38, 3e38), "opposite": (np.inf, -np.inf)}.items():
        wave = np.tile(np.float32(values), (16000, 1))
        soundfile.write(corpus / f"{name}.wav", wave, 16000, subtype="FLOAT")
    prepare_folder(settings(whisper), corpus, "speech", tmp_path / "out")
    assert [row[2:] for row in rows(tmp_path / "out")] == [
        (f"{name}.wav", "bad recording", "not finite") for name in ("huge", "opposite")
    ]


def test_phone_recordings_beside_wavs_are_prepared(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 6)
    for number in range(4):
        write_pyav(corpus / f"phone{number}.m4a", "aac", tone(1.5, 44100, number), 44100, "ipod")
    index = prepare_folder(settings(whisper), corpus, "audio", tmp_path / "out")
    assert sum(map(len, read_all(index, "audio").values())) == 10
