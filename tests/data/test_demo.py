"""The demo corpus from every release that has its recordings: real packages here, and miniatures of other versions."""

import gzip
import hashlib
import re
from collections import defaultdict

import numpy as np
import pytest
import soundfile

from agrepa_fast.corpora import demo
from agrepa_fast.errors import UserError
from agrepa_fast.prepare.pipeline import prepare_demo

from .test_prepare import contents, read_all, settings, tone

PROMPTS = "usr/share/asterisk/sounds/en_US_f_Allison"
TEXTS = "usr/share/doc/asterisk-core-sounds-en"


def write_packages(root):
    """The demo's packages in miniature, laid out as Debian 12's."""
    roots = {package.name: root / f"{package.name}-1.0" for both in demo.DEMO_PACKAGES.values() for package in both}
    prompts = roots[demo.PROMPTS.name] / PROMPTS
    prompts.mkdir(parents=True)
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 256, 8800 + 800 * number, dtype=np.uint8)
        (prompts / f"say-{number}.g722").write_bytes(noise.tobytes())
    lines = [f"say-{number}: Say  {number}." for number in range(20)]
    (roots[demo.PROMPT_TEXTS.name] / TEXTS).mkdir(parents=True)
    text = "\n".join(["; comment", "", *lines, "beep: [a beep]"])
    (roots[demo.PROMPT_TEXTS.name] / TEXTS / "core-sounds-en.txt.gz").write_bytes(gzip.compress(text.encode()))
    samples = roots[demo.SAMPLES.name] / "usr/share/sonic-pi/samples"
    sounds = roots[demo.GAME_SOUNDS.name] / "usr/share/games/lincity-ng/sounds"
    samples.mkdir(parents=True)
    sounds.mkdir(parents=True)
    for number in range(12):
        soundfile.write(samples / f"bd_kick_{number}.flac", tone(0.4 + 0.6 * number, 44100, number), 44100)
        soundfile.write(sounds / f"FireStation{number}.wav", tone(1.0 + 0.3 * number, 11025, 50 + number), 11025)
    return roots


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The folders of the fetched packages by name, and a manifest of their recordings."""
    roots = write_packages(tmp_path / "packages")
    manifest = {}
    for package in (demo.PROMPTS, demo.SAMPLES, demo.GAME_SOUNDS):
        files = sorted(roots[package.name].rglob(f"*{package.suffix}"))
        manifest[package.name] = {f.stem: hashlib.sha256(f.read_bytes()).hexdigest()[:32] for f in files}
    monkeypatch.setattr(demo, "read_manifest", lambda: manifest)
    monkeypatch.setattr(demo, "fetch_apt", lambda name: roots[name])
    return roots


@pytest.mark.drill  # each run of .ci/run prepares the demo
def test_the_manifest_is_of_this_machines_packages():
    """Fetches the real ones. Debian 12 and 13 and Ubuntu 24.04 give these numbers."""
    speech = demo.demo_recordings("speech", 2.2, 0.5)
    audio = demo.demo_recordings("audio", 2.2, 0.5)
    assert (len(speech), len(audio)) == (362, 437)
    assert not [r.problem for r in (*speech, *audio) if r.problem]
    assert len({r.name for r in (*speech, *audio)}) == 362 + 437
    assert all(r.text and not r.text.startswith("[") for r in speech)
    assert {r.licence for r in (*speech, *audio)} == {"CC-BY-SA-3.0", "CC0", "GPL-2+"}


def test_shards_of_version_0_1_are_still_those_of_the_demo(tmp_path):
    """Its identities were hashes of the checksums of Debian 12's packages."""
    identities = {source.domain: source.identity for source in demo.demo_sources(settings("x").data)}
    assert identities == {"speech": "ef3da916bd79e923", "audio": "7aca5c9e67fa3f7e"}


def test_demo(packages, whisper, tmp_path):
    data = settings(whisper).data
    index = prepare_demo(settings(whisper), tmp_path / "out")
    assert index.domains == ("speech", "audio")
    speech = read_all(index)
    assert {clip.text for split in speech.values() for clip in split} == {f"Say {n}." for n in range(20)}
    for domain in index.domains:
        read = read_all(index, domain)
        assert len(read["val"]) >= 0.1 * (len(read["val"]) + len(read["train"]))
        splits_of = defaultdict(set)
        for split, found in read.items():
            for clip in found:
                splits_of[clip.source].add(split)
        assert all(len(splits) == 1 for splits in splits_of.values()), "parts of a recording met across the splits"
    audio = [clip for split in read_all(index, "audio").values() for clip in split]
    assert {clip.labels for clip in audio if "sonic" in clip.source} == {
        ("bass drum", f"kick {n}") for n in range(1, 12)
    }
    assert {clip.labels for clip in audio if "lincity" in clip.source} == {("fire station",)}
    assert len({clip.source for clip in audio}) == 11 + 12  # one is shorter than data.min_seconds
    longest = [clip for clip in audio if "bd_kick_11" in clip.source]  # 7.0 s in parts of 2.2 s and a rest of 0.4 s
    assert [clip.seconds for clip in longest] == [data.max_seconds] * 3
    assert all(clip.cut for clip in longest)
    assert len({clip.key for clip in longest}) == 3
    again = prepare_demo(settings(whisper), tmp_path / "out")
    assert again.content == index.content


def test_other_versions_of_the_packages_give_the_same_shards(packages, whisper, tmp_path):
    """As in Debian 13: another folder, files of the same content under another name, new files, changed other files."""
    prepare_demo(settings(whisper), tmp_path / "debian 12")
    sounds = packages[demo.GAME_SOUNDS.name] / "usr/share/games/lincity-ng/sounds"
    moved = packages[demo.GAME_SOUNDS.name] / "usr/share/lincity-ng/sounds"
    moved.parent.mkdir(parents=True)
    sounds.rename(moved)
    (moved / "FireStation3.wav").rename(moved / "Fanfare.wav")
    soundfile.write(moved / "Aaa.wav", tone(1.0, 11025, 99), 11025)
    (packages[demo.PROMPTS.name] / PROMPTS / "new.g722").write_bytes(bytes(20000))
    prepare_demo(settings(whisper), tmp_path / "debian 13")
    assert contents(tmp_path / "debian 13") == contents(tmp_path / "debian 12")


def test_a_few_missing_recordings_are_named_and_skipped(packages, whisper, tmp_path, capsys):
    prompts = packages[demo.PROMPTS.name] / PROMPTS
    (prompts / "say-3.g722").unlink()
    (prompts / "say-7.g722").write_bytes(bytes(9000))
    index = prepare_demo(settings(whisper), tmp_path / "out")
    assert "asterisk-core-sounds-en-g722-1.0 lacks 2 of 20 recordings: say-3, say-7\n" in capsys.readouterr().out
    assert index.clips("train", "speech") + index.clips("val", "speech") == 18
    skipped = {entry["source"]: entry["reason"] for entry in index.content["domains"]["speech"]["skipped"]}
    assert skipped == {
        f"asterisk-core-sounds-en-g722/say-{number}.g722": "in no file of the package, or changed" for number in (3, 7)
    }
    assert prepare_demo(settings(whisper), tmp_path / "out").content == index.content


def test_a_version_that_lacks_many_recordings_is_refused(packages):
    sounds = packages[demo.GAME_SOUNDS.name] / "usr/share/games/lincity-ng/sounds"
    for number in range(6):
        (sounds / f"FireStation{number}.wav").write_bytes(b"changed")
    message = "lincity-ng-data-1.0 lacks 6 of 12 recordings: FireStation0, FireStation1, FireStation2, FireStation3, "
    message += (
        "FireStation4 and 1 more; put the .deb of Debian 12, from packages.debian.org/bookworm/lincity-ng-data, into"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        demo.demo_recordings("audio", 2.2, 0.5)
