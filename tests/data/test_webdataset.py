"""Sources of `agrepa prepare`: WebDataset tars and Hugging Face datasets, small but real, and all identities."""

import io
import json
import os
import sys
import tarfile

import pytest

from agrepa_fast.corpora.audioset import audioset_source
from agrepa_fast.corpora.huggingface import hf_source
from agrepa_fast.corpora.librispeech import librispeech_source
from agrepa_fast.corpora.webdataset import webdataset_source
from agrepa_fast.errors import UserError

from .test_corpora import (
    RATE,
    YTIDS,
    assert_groups_stay_apart,
    audio_bytes,
    audioset,
    librispeech,
    prepared,
    seconds_of,
    write_audio,
)

__all__ = ["audioset", "librispeech"]  # fixtures

# WebDataset


@pytest.fixture
def shards(tmp_path):
    """Two tars of 6 samples, in every format, with .txt or .json; and what is to be ignored."""
    from webdataset.writer import TarWriter

    folder, number = tmp_path / "shards", 0
    folder.mkdir()
    for shard in range(2):
        path = folder / f"take-{shard:03d}.tar"
        with TarWriter(str(path), encoder=False) as tar:
            for suffix in ("flac", "wav", "mp3", "ogg", "opus", "WAV"):
                fields = {
                    "caption": f" say\n{number}",
                    "tags": ["a", number],
                    "speaker_id": number // 2,
                    "license": "x",
                }
                described = {"json": json.dumps(fields)} if number % 2 else {"txt": f"say {number}\n", "cls": "3"}
                described = {name: text.encode() for name, text in described.items()}
                tar.write(
                    {
                        "__key__": f"ä b/{number % 6}",
                        suffix: audio_bytes(number, "OGG" if suffix == "opus" else suffix.upper()),
                        **described,
                    }
                )
                number += 1
        with tarfile.open(path, "a") as tar:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                link = tarfile.TarInfo(f"link-{kind.decode()}.flac")
                link.type, link.linkname = kind, "/etc/passwd"
                tar.addfile(link)
            tar.addfile(tarfile.TarInfo("ä b/._0.flac"))
            tar.addfile(tarfile.TarInfo("README"))
    return folder


def test_webdataset(shards, whisper, tmp_path):
    pattern = str(shards / "take-{000..001}.tar")
    before = sorted(path for path in tmp_path.rglob("*"))
    clips, _ = prepared(whisper, tmp_path / "out", "speech", "webdataset", pattern, "--domain", "speech")
    assert sorted(p for p in tmp_path.rglob("*") if (tmp_path / "out") not in (p, *p.parents)) == before
    assert len(clips) == 12
    for clip, _ in clips.values():
        number = int(clip.text.removeprefix("say "))
        assert clip.seconds == pytest.approx(seconds_of(number), abs=0.1)  # mp3 pads
        assert clip.labels == (("a", str(number)) if number % 2 else ())
        assert clip.licence == ("x" if number % 2 else "unknown")
        assert clip.source.startswith(f"take-{number // 6:03d}.tar/ä b/{number % 6}.")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "shards").symlink_to(shards)
    linked = webdataset_source(str(tmp_path / "links"), "speech")
    assert [r.source for r in linked.recordings()] == [
        r.source for r in webdataset_source(str(shards), "speech").recordings()
    ]
    for other in (str(shards), str(shards / "*.tar"), str(shards / "take-*.tar")):
        source = webdataset_source(other, "speech")
        assert {recording.name for recording in source.recordings()} == set(clips)
    assert [r.group for r in source.recordings()[:4]] == ["", "0", "", "1"]


def make_tar(path, names, size=10):
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    return path


@pytest.mark.parametrize("name", ["/tmp/x.flac", "../x.flac", "a/../../x.flac", "..\\x.flac", "C:\\x.flac", "\\x.flac"])
def test_members_outside_are_refused_by_name(tmp_path, name):
    make_tar(tmp_path / "a.tar", ["fine.flac", name])
    with pytest.raises(UserError) as refused:
        webdataset_source(str(tmp_path / "a.tar"), "audio")
    assert f"a.tar: member {name!r} has an absolute or a parent path" in str(refused.value)


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "header":
        content[1024 + 148 : 1024 + 156] = b"0000000\0"  # the second member's checksum
    elif kind == "data":
        content = content[: 1024 + 512 + 3]
    elif kind == "no end":
        content = content[:3072]
    elif kind == "negative":  # the next member would be this one again, for ever
        header = content[2048:2560]
        header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base-256: -512
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[2048:2560] = header
    elif kind == "no tar":
        content = b"RIFF" * 1000
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["header", "data", "no end", "negative", "no tar"])
def test_damaged_tars_are_refused(tmp_path, kind):
    damage(make_tar(tmp_path / "a.tar", ["a.flac", "b.flac", "README"]), kind)
    with pytest.raises(UserError, match=r"a\.tar.*(damaged|cut short|no tar|negative size).*: make or fetch it again"):
        webdataset_source(str(tmp_path), "audio")


@pytest.mark.parametrize(("mode", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_compressed_tars_are_refused(tmp_path, mode, tool):
    with tarfile.open(tmp_path / f"a.tar.{mode}", f"w:{mode}"):
        pass
    with pytest.raises(UserError, match=f"is compressed.*: {tool} it"):
        webdataset_source(str(tmp_path), "audio")


def test_webdataset_refuses_what_it_cannot_use(tmp_path):
    def refused(pattern, names=None):
        if names:
            make_tar(tmp_path / "a.tar", names)
        with pytest.raises(UserError) as error:
            webdataset_source(str(tmp_path / pattern), "audio")
        return str(error.value)

    assert "holds no tars" in refused("")
    assert "b-1.tar: there is no such file" in refused("b-{1..3}.tar")
    assert "a brace is not closed" in refused("b-{1..3.tar")
    assert "a.flac comes twice" in refused("", ["a.flac", "b.flac", "a.flac"])
    assert "a.flac comes twice" in refused("", ["a.flac", "a.flac"])
    assert "holds no recordings: members <key>.wav" in refused("", ["a.npy", "README"])


def test_samples_with_a_problem_are_named(tmp_path):
    make_tar(tmp_path / "a.tar", ["a.flac", "a.json", "b.txt", "c.mp3", "c.wav", "d.flac", "e.flac", "e.txt"])
    with (tmp_path / "a.tar").open("r+b") as stream:  # e.txt: not UTF-8
        stream.seek(512 + 7 * 1024)
        stream.write(b"\xff")
    found = webdataset_source(str(tmp_path), "audio").recordings()
    problems = {recording.source: recording.problem for recording in found}
    assert problems.pop("a.tar/a.flac").startswith(".json cannot be read")
    assert problems.pop("a.tar/e.flac").startswith(".txt cannot be read ('utf-8' codec")
    assert problems == {
        "a.tar/b": "has 0 audio members, of txt",
        "a.tar/c.mp3": "has 2 audio members, of mp3, wav",
        "a.tar/d.flac": "",
    }


# Hugging Face datasets


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 'agrepa_fast[hf]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {
        "id": list(range(12)),
        "audio": [{"bytes": audio_bytes(number), "path": f"{number}.flac"} for number in range(12)],
        "sentence": [f"say  {number}" for number in range(12)],
        "label": [number % 3 - 1 for number in range(12)],
        "note": [f"note {number}" for number in range(12)],
        "speaker_id": [number // 3 for number in range(12)],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    return table.cast_column("label", datasets.ClassLabel(names=["dog", "cat"]))


def test_hf(dataset, whisper, tmp_path):
    import datasets

    path = tmp_path / "my set"
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
    arguments = ("hf", path, "--domain", "speech", "--split", "train")
    clips, _ = prepared(whisper, tmp_path / "out", "speech", *arguments)
    assert sorted(clips) == [f"my-set-train-{row:08d}" for row in range(12)]
    for key, (clip, _) in clips.items():
        number = int(key[-8:])
        assert clip.text == f"say {number}"
        assert clip.labels == (() if number % 3 == 0 else (["dog", "cat"][number % 3 - 1],))
        assert clip.source == f"my set/train row {number}"
        assert clip.seconds == pytest.approx(seconds_of(number), abs=1e-3)
    source = hf_source(path, "speech", split="train", text="note", label="id")
    assert {recording.group for recording in source.recordings()} == {"0", "1", "2", "3"}
    assert_groups_stay_apart(source, clips)
    assert [(r.text, r.labels) for r in source.recordings()[:2]] == [("note 0", ("0",)), ("note 1", ("1",))]


def test_hf_parquet_and_plain_columns(dataset, tmp_path):
    import datasets

    (tmp_path / "set/data").mkdir(parents=True)
    dataset.to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    found = hf_source(tmp_path / "set", "audio").recordings()
    assert [recording.text for recording in found] == [f"say {number}" for number in range(12)]
    assert len(found[3].read(9.0)[0]) == round(seconds_of(3) * RATE)

    write_audio(tmp_path / "paths/wav/1.wav", 1)
    write_audio(tmp_path / "outside.wav", 1)
    files = ["wav/1.wav", "../outside.wav", str(tmp_path / "outside.wav"), None]
    datasets.Dataset.from_dict({"audio": files}).to_parquet(tmp_path / "paths/train.parquet")
    inside, parent, absolute, empty = hf_source(tmp_path / "paths", "audio").recordings()
    assert len(inside.read(9.0)[0]) == round(seconds_of(1) * RATE)
    for outside in (parent, absolute):
        with pytest.raises(UserError, match=r"row \d: .*outside\.wav lies outside"):
            outside.read(9.0)
    with pytest.raises(UserError, match="row 3: audio is empty"):
        empty.read(9.0)


def test_hf_refuses_what_it_cannot_use(dataset, tmp_path, monkeypatch):
    import datasets

    path = tmp_path / "set"
    dataset.save_to_disk(path)
    for message, choice in {
        "has no splits: leave out --split": {"split": "train"},
        "has no column speech: its columns are id, audio, sentence": {"audio": "speech"},
        "has no column words": {"text": "words"},
        "has no column kind": {"label": "kind"},
        "column speaker_id holds no audio": {"audio": "speaker_id"},
    }.items():
        with pytest.raises(UserError, match=message):
            hf_source(path, "speech", **choice)
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "dict")
    for split in (None, "dev"):
        with pytest.raises(UserError, match="has the splits train, test: choose one with --split"):
            hf_source(tmp_path / "dict", "speech", split=split)
    dataset.remove_columns("audio").save_to_disk(tmp_path / "silent")
    with pytest.raises(UserError, match=r"0 of the columns id, .* look like audio: name one with --audio"):
        hf_source(tmp_path / "silent", "speech")
    with pytest.raises(UserError, match="holds no dataset"):
        hf_source(tmp_path / "cache", "speech")
    (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        hf_source(path, "speech")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        hf_source(tmp_path / "dict", "speech")


# All of them


def test_identity_follows_the_recordings(librispeech, audioset, shards, dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "set")
    listed = {
        lambda: librispeech_source(librispeech): librispeech / "train-clean-100/19/7/19-7-0000.flac",
        lambda: audioset_source(audioset): audioset / f"{YTIDS[2]}.flac",
        lambda: webdataset_source(str(shards), "speech"): shards / "take-001.tar",
        lambda: hf_source(tmp_path / "set", "speech"): next((tmp_path / "set").glob("*.arrow")),
    }
    for source, file in listed.items():
        before = source()
        assert source().identity == before.identity
        marks = [recording.fingerprint() for recording in before.recordings()]
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # written again, as long as before
        assert source().identity != before.identity
        assert [recording.fingerprint() for recording in source().recordings()] != marks
        json.dumps(marks)  # what decode_stage hashes
    lines = librispeech / "train-clean-100/19/7/19-7.trans.txt"
    before = librispeech_source(librispeech).identity
    lines.write_text(lines.read_text().replace("SAY", "SING", 1))
    assert librispeech_source(librispeech).identity != before
