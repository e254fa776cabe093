"""Names, transcripts and the held-out share of recordings; no audio is read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agrepa_fast.corpora import folder as sources
from agrepa_fast.corpora.recordings import Recording
from agrepa_fast.errors import UserError
from agrepa_fast.prepare import decode as clips


def test_librispeech_transcripts_and_odd_names(tmp_path):
    folder = tmp_path / "84" / "121"
    folder.mkdir(parents=True)
    for name in ("84-121-0000.flac", "84-121-0001.flac", "a.b.wav", "a_b.wav", "a b.WAV", "ä.ogg", "._junk.wav"):
        (folder / name).write_bytes(b"")
    (folder / "84-121.trans.txt").write_text("84-121-0000 GO ON\n84-121-0001 STOP\n")
    (folder / "a b.txt").write_text("  with\nspaces ")
    found = sources.folder_recordings(tmp_path, "speech")
    texts = {Path(recording.path).name: recording.text for recording in found}
    assert texts["84-121-0000.flac"] == "GO ON"
    assert texts["84-121-0001.flac"] == "STOP"
    assert texts["a b.WAV"] == "with spaces"
    assert "._junk.wav" not in texts
    names = [recording.name for recording in found]
    assert len(set(names)) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") for name in names)
    (folder / "84-121-0000.flac").unlink()
    fewer = {recording.name for recording in sources.folder_recordings(tmp_path, "speech")}
    assert fewer < set(names)  # a name depends on no neighbour


def test_validation_share_holds_for_any_count():
    for count in (2, 3, 9, 10, 11, 40, 137):
        made = [
            clips.Clip(Recording(f"r-{n}", "", "speech", "", (), "", "", "wav"), Path(), 1, 1.0) for n in range(count)
        ]
        held_out = clips.validation_groups(made, 0.1)
        assert np.ceil(0.1 * count) <= len(held_out) < count
        assert len(held_out) <= 0.25 * count + 1
        more = [*made, clips.Clip(Recording("new", "", "speech", "", (), "", "", "wav"), Path(), 1, 1.0)]
        assert len(held_out ^ clips.validation_groups(more, 0.1)) <= 2  # adding one recording moves no others around


def test_a_part_of_a_file_is_read_from_its_start(tmp_path):
    import soundfile

    ramp = (np.arange(4000) / 8000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", ramp, 1000, subtype="FLOAT")
    part = Recording("a", str(tmp_path / "a.wav"), "audio", "", (), "a.wav", "", "wav", start=1.5)
    wave, rate = part.read(0.25)
    np.testing.assert_array_equal(wave, ramp[1500:1750])
    assert rate == 1000
    assert part.stamp() != replace(part, start=0.0).stamp()
    (tmp_path / "a.wav").unlink()
    with pytest.raises(UserError, match=r"a\.wav cannot be read \(No such file"):
        part.stamp()
