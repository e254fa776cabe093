"""Names, transcripts, linked folders and the held-out share of recordings; no audio is read."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agrepa_fast.corpora import folder as sources
from agrepa_fast.corpora.recordings import Recording
from agrepa_fast.corpora.walk import walk_folders
from agrepa_fast.errors import UserError
from agrepa_fast.prepare.decode import Clip
from agrepa_fast.prepare.split import name_hash, only_group, split_clips, validation_groups


def recording(name, path="", start=0.0, group=""):
    return Recording(name=name, path=path, domain="audio", source=name, licence="", start=start, group=group)


def clips_of(sizes):
    """Clips of groups: {group: number of clips}."""
    return [
        Clip(recording(f"{group}-{n}", group=group), Path(), 1, 1.0)
        for group, count in sizes.items()
        for n in range(count)
    ]


def test_librispeech_transcripts_and_odd_names(tmp_path):
    folder = tmp_path / "84" / "121"
    folder.mkdir(parents=True)
    for name in ("84-121-0000.flac", "84-121-0001.flac", "a.b.wav", "a_b.wav", "a b.WAV", "ä.ogg", "._junk.wav"):
        (folder / name).write_bytes(b"")
    (folder / "84-121.trans.txt").write_text("84-121-0000 GO ON\n84-121-0001 STOP\n")
    (folder / "a b.txt").write_text("  with\nspaces ")
    (folder / "ä.TXT").write_bytes(b"\xef\xbb\xbfupper\r\ncase\r\n")
    found, passed_over = sources.list_folder(tmp_path, "speech")
    assert [Path(entry.name).name for entry in passed_over] == ["._junk.wav"]
    texts = {Path(recording.path).name: recording.text for recording in found}
    assert texts["84-121-0000.flac"] == "GO ON"
    assert texts["84-121-0001.flac"] == "STOP"
    assert texts["a b.WAV"] == "with spaces"
    assert texts["ä.ogg"] == "upper case"
    assert "._junk.wav" not in texts
    names = [recording.name for recording in found]
    assert len(set(names)) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") for name in names)
    (folder / "84-121-0000.flac").unlink()
    fewer = {recording.name for recording in sources.list_folder(tmp_path, "speech")[0]}
    assert fewer < set(names)  # a name depends on no neighbour


def test_linked_folders_are_followed_once_and_real_paths_come_first(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "real" / "deep", root / ".hidden", outside / "inner"):
        folder.mkdir(parents=True)
        (folder / "take.wav").touch()
    (root / "a link to real").symlink_to(root / "real")
    (root / "linked").symlink_to(outside)
    (outside / "up").symlink_to(root)  # a loop
    (outside / "inner" / "self").symlink_to(outside / "inner")
    (root / "again").symlink_to(outside / "inner")
    (root / "nowhere.wav").symlink_to(tmp_path / "missing.wav")
    (root / "nowhere").symlink_to(tmp_path / "missing")
    walked = [Path(folder).relative_to(root).as_posix() for folder, _ in walk_folders(root)]
    assert walked == [".", "real", "real/deep", "again", "linked"]
    found = [r.source for r in sources.list_folder(root, "audio")[0]]
    assert found == ["again/take.wav", "real/deep/take.wav"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "secret").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [folder for folder, _ in walk_folders(tmp_path)] == [str(tmp_path)]
    assert capsys.readouterr().out == f"{tmp_path}/secret cannot be read (Permission denied): passed over\n"


def test_validation_share_holds_for_any_count():
    for count in (2, 3, 9, 10, 11, 40, 137):
        made = dict.fromkeys((f"r-{n}" for n in range(count)), 1)
        held_out = validation_groups(made, 0.1)
        assert np.ceil(0.1 * count) <= len(held_out) < count
        assert len(held_out) <= 0.25 * count + 1
        more = made | {"new": 1}
        assert len(held_out ^ validation_groups(more, 0.1)) <= 2  # adding one recording moves no others around


def test_clips_of_one_group_are_split_by_name():
    clips = clips_of({"one": 20})
    splits = split_clips(clips, 0.1)
    assert len(splits["val"]) == 2
    assert len(splits["train"]) == 18
    assert only_group(clips) == "one"
    assert only_group(clips_of({"a": 1, "b": 1})) is None


def test_a_large_group_is_not_held_out_if_another_can_be():
    first, second = sorted(("a", "b"), key=lambda group: name_hash("split", group))
    for sizes in (
        {first: 19, second: 1},
        {first: 1, second: 19},
        {first: 12, second: 8},
    ):  # in the last, both are large
        assert validation_groups(sizes, 0.1) == {min(sizes, key=sizes.get)}
    assert validation_groups({"only": 20}, 0.1) == set()


def test_a_part_of_a_file_is_read_from_its_start(tmp_path):
    import soundfile

    ramp = (np.arange(4000) / 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", ramp, 1000, subtype="FLOAT")
    part = recording("a.wav", str(tmp_path / "a.wav"), start=1.5)
    wave, rate = part.read(0.25)
    np.testing.assert_array_equal(wave, ramp[1500:1750])
    assert rate == 1000
    assert part.fingerprint() != replace(part, start=0.0).fingerprint()
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UserError, match=r"a\.wav cannot be read \(No such file"):
        part.fingerprint()
