"""Sources account for everything that they see: it is a recording, or it is passed over with a reason."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import soundfile

from agrepa_fast.corpora import webdataset
from agrepa_fast.corpora.audioset import audioset_source
from agrepa_fast.corpora.folder import folder_source, list_folder
from agrepa_fast.corpora.librispeech import librispeech_source
from agrepa_fast.corpora.webdataset import webdataset_source
from agrepa_fast.errors import UserError

from .test_corpora import audio_bytes, audioset, librispeech, write_audio

__all__ = ["audioset", "librispeech"]  # fixtures


def reasons(source):
    return {entry.name: (entry.kind, entry.reason) for entry in source.passed_over()}


def taken(source):
    return sorted(recording.source for recording in source.recordings())


# Folders


def test_a_folder_accounts_for_every_name(tmp_path):
    root = tmp_path / "corpus"
    for folder in ("a/.git", "a/deep", "b"):
        (root / folder).mkdir(parents=True)
    used = ["a/x.wav", "a/x.txt", "a/deep/y.FLAC", "a/deep/84.trans.txt", "a/phone.m4a", "b/z.aiff", "b/video.mp4"]
    others = ["a/.git/config", "a/.DS_Store", "a/notes.pdf", "a/README", "b/lonely.txt", "b/old.trans.txt.bak"]
    beside = ["a/x.mp4", "a/x.M4A"]
    for name in (*used, *others, *beside):
        (root / name).touch()
    os.mkfifo(root / "b/pipe.wav")
    (root / "b/nowhere.wav").symlink_to("nothing")
    (root / "b/round.wav").symlink_to("round.wav")
    (root / "b/back").symlink_to("../a")
    source = folder_source(root, "audio")
    assert taken(source) == sorted(name for name in used if not name.endswith(".txt"))
    assert reasons(source) == {
        "a/.DS_Store": ("hidden file", "hidden"),
        "a/.git": ("hidden folder", "hidden"),
        "a/README": ("file without a suffix", "no suffix of a recording"),
        "a/notes.pdf": (".pdf file", "no suffix of a recording"),
        "a/x.M4A": (".m4a file of a recording that is taken", "x.wav is taken"),
        "a/x.mp4": (".mp4 file of a recording that is taken", "x.wav is taken"),
        "b/back": ("link", "a link to a folder that is read at another place"),
        "b/lonely.txt": (".txt file", "no suffix of a recording"),
        "b/nowhere.wav": ("link", "a link to nowhere"),
        "b/old.trans.txt.bak": (".bak file", "no suffix of a recording"),
        "b/pipe.wav": ("no regular file", "a pipe, a socket or a device"),
        "b/round.wav": ("link", "a link to nowhere"),
    }


def test_copies_of_a_recording_beside_each_other_are_one_recording(tmp_path):
    for name in ("a.mp3", "a.wav", "b.mp3", "b.ogg", "c.m4a", "c.mp4", "d.flac"):
        (tmp_path / name).touch()
    source = folder_source(tmp_path, "audio")
    assert taken(source) == ["a.wav", "b.ogg", "c.m4a", "d.flac"]
    assert reasons(source) == {
        "a.mp3": (".mp3 file of a recording that is taken", "a.wav is taken"),
        "b.mp3": (".mp3 file of a recording that is taken", "b.ogg is taken"),
        "c.mp4": (".mp4 file of a recording that is taken", "c.m4a is taken"),
    }


def test_an_empty_folder_says_what_it_holds(tmp_path):
    for name in ("a.pdf", "b.pdf", "c.zip"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"which hold 2 x \.pdf file, 1 x \.zip file"):
        folder_source(tmp_path, "audio")


def test_unreadable_files_and_folders_are_passed_over(tmp_path, monkeypatch):
    write_audio(tmp_path / "a.wav", 0)
    write_audio(tmp_path / "b.wav", 0)
    (tmp_path / "secret").mkdir()
    scandir, stat = os.scandir, os.stat

    def refuse(function, path, *rest, **options):
        if Path(path).name in ("secret", "b.wav"):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path, *rest, **options)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(scandir, path))
    monkeypatch.setattr(os, "stat", lambda path, **options: refuse(stat, path, **options))
    recordings, passed_over = list_folder(tmp_path, "audio")
    assert [recording.source for recording in recordings] == ["a.wav"]
    assert sorted(passed_over) == [
        ("b.wav", "unreadable file", "Permission denied"),
        ("secret", "unreadable folder", "Permission denied"),
    ]


def test_names_that_are_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"f\xfcr")
    folder.mkdir()
    write_audio(tmp_path / "a.wav", 0)
    (tmp_path / "a.wav").rename(folder / os.fsdecode(b"stra\xdfe.wav"))
    (folder / os.fsdecode(b"gr\xfcn.doc")).touch()
    source = folder_source(tmp_path, "audio")
    [recording] = source.recordings()
    assert recording.source == "f?r/stra?e.wav"
    assert recording.labels == ("f?r",)
    assert len(recording.read(9.0)[0]) > 0
    assert list(reasons(source)) == ["f?r/gr?n.doc"]
    assert folder_source(folder, "audio").name.endswith("/f?r")  # index.json holds it


def test_a_transcript_that_cannot_be_read_is_a_problem_of_its_recording(tmp_path):
    for name in ("good", "latin", "endless", "folder", "pipe"):
        write_audio(tmp_path / f"{name}.wav", 0)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes(b"stra\xdfe")
    (tmp_path / "endless.txt").write_bytes(bytes(2**20 + 1))
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    problems = {r.source: (r.text, r.problem) for r in folder_source(tmp_path, "speech").recordings()}
    assert problems == {
        "endless.wav": ("", "endless.txt: too long for a transcript"),
        "folder.wav": ("", ""),
        "good.wav": ("good", ""),
        "latin.wav": ("", "latin.txt: not UTF-8 (byte 4): convert it or remove it"),
        "pipe.wav": ("", ""),
    }


# WebDataset


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_keys_with_dots(tmp_path):
    sound, text = audio_bytes(0), json.dumps({"text": "hello"}).encode()
    members = {"plain.flac": sound, "plain.json": text, "plain.cls": b"1", "v1.2/a.flac": sound}
    for key in ("235342 Track 2.0 (Clean Version)", "Mr. Smith 1", "Mr. Smith 2", "take.1"):
        members |= {f"{key}.flac": sound, f"{key}.json": text, f"{key}.npy": b""}
    members |= {"pair.left.flac": sound, "pair.json": text, "pair.right.flac": sound}
    members |= {"Mr. Jones.flac": sound, "meta.data.json": text, "lost.npy": b"", "x.mp3": sound, "x.m4a": sound}
    source = webdataset_source(str(write_tar(tmp_path / "a.tar", members)), "audio")
    found = {recording.source.removeprefix("a.tar/"): recording for recording in source.recordings()}
    assert sorted(found) == sorted(
        [
            *("plain.flac", "v1.2/a.flac", "235342 Track 2.0 (Clean Version).flac", "Mr. Smith 1.flac", "x.mp3"),
            *("Mr. Smith 2.flac", "take.1.flac", "pair.left.flac", "pair.right.flac", "Mr. Jones.flac"),
        ]
    )
    texts = {name: recording.text for name, recording in found.items()}
    assert texts["Mr. Smith 2.flac"] == texts["take.1.flac"] == texts["pair.left.flac"] == "hello"
    assert len({recording.name for recording in source.recordings()}) == 10
    assert all(len(recording.read(9.0)[0]) and not recording.problem for recording in source.recordings())
    assert reasons(source) == {
        "a.tar/meta.data.json": ("member .json", "belongs to no recording"),
        "a.tar/lost.npy": ("member .npy", "belongs to no recording"),
        "a.tar/*.cls": (".cls members beside a recording", "1 members of samples that are taken"),
        "a.tar/*.0 (clean version).npy": (".npy members beside a recording", "1 members of samples that are taken"),
        "a.tar/*. smith 1.npy": (".npy members beside a recording", "1 members of samples that are taken"),
        "a.tar/*. smith 2.npy": (".npy members beside a recording", "1 members of samples that are taken"),
        "a.tar/*.1.npy": (".npy members beside a recording", "1 members of samples that are taken"),
        "a.tar/*.m4a": (".m4a members beside a recording", "1 members of samples that are taken"),
    }


def test_a_dotted_key_comes_once(tmp_path):
    sound = audio_bytes(0)
    write_tar(tmp_path / "a.tar", {"Mr. A.flac": sound, "b.flac": sound})
    write_tar(tmp_path / "a.tar", {"Mr. A.flac": sound}, "a")
    with pytest.raises(UserError, match=r"Mr\. A\.flac comes twice"):
        webdataset_source(str(tmp_path / "a.tar"), "audio")


def test_tars_of_several_tars(tmp_path):
    """`cat a.tar b.tar`: the second one is not lost."""
    sound = audio_bytes(0)
    parts = [write_tar(tmp_path / f"{name}.part", {f"{name}.flac": sound}).read_bytes() for name in "abc"]
    joined, rest = tmp_path / "joined.tar", tmp_path / "rest.tar"
    joined.write_bytes(b"".join(parts))
    source = webdataset_source(str(joined), "audio")
    assert taken(source) == [f"joined.tar/{name}.flac" for name in "abc"]
    assert all(len(recording.read(9.0)[0]) for recording in source.recordings())
    rest.write_bytes(parts[0] + b"no tar" * 100)
    assert reasons(webdataset_source(str(rest), "audio")) == {
        "rest.tar/": ("bytes after the end of a tar", f"600 bytes, from byte {len(parts[0])} on, are no tar")
    }
    joined.write_bytes(parts[0] + parts[1][:900])
    with pytest.raises(UserError, match=r"joined\.tar is (damaged|no tar), or cut short"):
        webdataset_source(str(joined), "audio")


def test_headers_of_tars_are_read_up_to_a_bound(tmp_path):
    write_tar(tmp_path / "a.tar", {"a.flac": audio_bytes(0)})
    for kind in (b"x", b"g", b"L", b"K"):
        header = tarfile.TarInfo("endless")
        header.type, header.size = kind, 2**32
        with (tmp_path / "b.tar").open("wb") as stream:
            stream.write(header.tobuf(tarfile.GNU_FORMAT))
            stream.truncate(2**32 + 2048)  # sparse on the disk, whole in memory
        with pytest.raises(UserError, match=r"b\.tar is no tar, or cut short \(a header of 4294967296 bytes\)"):
            webdataset_source(str(tmp_path), "audio")


def test_a_folder_of_tars_accounts_for_every_name(tmp_path):
    root = tmp_path / "shards"
    (root / ".cache").mkdir(parents=True)
    write_tar(root / "a.tar", {"a.flac": audio_bytes(0)})
    for name in (".a.tar", "b.tar.00", "b.tar.aa", "c.tar.part1", "d.tgz.001", "index.txt", "a.tar.idx", "e.zip"):
        (root / name).touch()
    with tarfile.open(root / "a.tar", "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.flac")
            link.type, link.linkname = kind, "a.flac" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("folder/._a.flac"))
        tar.addfile(tarfile.TarInfo("README"))
    kinds = {name: kind for name, (kind, _) in reasons(webdataset_source(str(root), "audio")).items()}
    assert kinds == {
        ".a.tar": "hidden file",
        ".cache": "hidden folder",
        **dict.fromkeys(("b.tar.00", "b.tar.aa", "c.tar.part1", "d.tgz.001"), "part of a split tar"),
        **{"index.txt": ".txt file", "a.tar.idx": ".idx file", "e.zip": ".zip file"},
        **{"a.tar/link1.flac": "link among members", "a.tar/link2.flac": "link among members"},
        "a.tar/link6.flac": "no plain member",
        **{"a.tar/folder/._a.flac": "member without a key", "a.tar/README": "member without a key"},
    }
    (root / "a.tar").unlink()
    with pytest.raises(UserError, match=r"holds no tars: .*; join the parts of a split tar, in their order, with cat"):
        webdataset_source(str(root), "audio")


def test_braces_are_expanded_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(webdataset, "_MAX_PARTS", 100)
    for pattern in ("x-{000000000..999999999}", "x-{1..20}-{1..20}", "x" + "{a,b}" * 40, "{1.." + "9" * 120 + "}"):
        with pytest.raises(UserError, match="the braces name more than 100 files"):
            webdataset_source(pattern, "audio")
    with pytest.raises(UserError, match=r"x-01\.tar: there is no such file"):
        webdataset_source("x-{01..99}.tar", "audio")


# Corpora with a layout


def test_audioset_accounts_for_files_and_lines(audioset):
    write_audio(audioset / "audio/no ytid.wav", 0)
    (audioset / "audio/----------Y.m4a").touch()
    found = reasons(audioset_source(audioset))
    assert found["balanced_train_segments.csv: deleted-vid, 30.000"] == ("segment without a file", "no such file")
    assert found["audio/ZZZZZZZZZZZ.wav"][0] == "file without a segment"
    assert found["audio/no ytid.wav"] == ("file without a segment", "its name has no YTID")
    assert found["audio/----------Y.m4a"][0] == "file without a segment"
    assert found["eval_segments.csv"] == ("table", "for evaluation")
    assert [kind for kind, _ in found.values()].count("second file of a segment") == 1


def test_audioset_takes_what_it_took_before_more_suffixes_were_read(audioset):
    source = audioset_source(audioset)
    for recording in source.recordings():  # an .aac comes before its .flac and .wav
        Path(recording.path).with_suffix(".aac").touch()
    again = audioset_source(audioset)
    assert taken(again) == taken(source)
    assert again.identity == source.identity
    assert [kind for kind, _ in reasons(again).values()].count(".aac file of a recording that is taken") >= 11


def test_a_linked_subset_beside_the_real_one_comes_once(librispeech):
    (librispeech / "an-alias").symlink_to("train-clean-100")
    source = librispeech_source(librispeech)
    assert {recording.labels for recording in source.recordings()} == {("train-clean-100",)}
    assert reasons(source)["an-alias"] == ("link", "a link to train-clean-100")


def test_lines_without_a_name_are_no_recordings(librispeech):
    transcript = librispeech / "train-clean-100/19/7/19-7.trans.txt"
    before = taken(librispeech_source(librispeech))
    transcript.write_bytes(transcript.read_bytes().replace(b"\n", b"\r\n") + b"\n \n\r\n")
    assert taken(librispeech_source(librispeech)) == before


def test_librispeech_accounts_for_files_outside_of_the_layout(librispeech):
    subset = librispeech / "train-clean-100"
    soundfile.write(subset / "19/loose.flac", [0.0] * 100, 16000)
    (subset / "19/7/19-7-0000.wav").touch()
    (subset / "notes.md").touch()
    (librispeech / "more recordings").mkdir()
    found = reasons(librispeech_source(librispeech))
    for name in ("more recordings", "SPEAKERS.TXT"):
        assert found.pop(name)[0] == "file or folder without speakers"
    assert found.pop("dev-clean") == ("subset", "for evaluation")
    assert {name: kind for name, (kind, _) in found.items()} == {
        "train-clean-100/19/loose.flac": "file outside of the layout",
        "train-clean-100/19/7/19-7-0000.wav": "file outside of the layout",
        "train-clean-100/notes.md": ".md file",
    }
