"""Phones as tokens, on prompts of the demo corpus, against PocketSphinx's dictionary read as a text."""

import csv
import re
from itertools import groupby, product
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agrepa_fast.audio.waves import decode, resample
from agrepa_fast.config_file import load_config
from agrepa_fast.errors import UserError
from agrepa_fast.fetch import fetch_apt
from agrepa_fast.prepare.pipeline import prepare_folder

from .test_prepare import read_all, settings

pocketsphinx = pytest.importorskip("pocketsphinx", reason="pip install 'agrepa_fast[phones]'")
from agrepa_fast.tokenizers.phones import PHONES, load_phones  # noqa: E402

TEXTS = {  # of the package's own list
    "agent-pass": "Please enter your password followed by the pound key.",
    "all-circuits-busy-now": "All circuits are busy now.",
    "pls-hold-while-try": "Please hold while we try to connect you.",
    "vm-tocancelmsg": "press star to cancel this message",
    "vm-toenternumber": "press 1 to enter a number",
    "vm-msgsaved": "Your message has been saved.",
}


@pytest.fixture(scope="module")
def phones():
    return load_phones()


@pytest.fixture(scope="module")
def prompts():
    files = {file.stem: file for file in fetch_apt("asterisk-core-sounds-en-g722").rglob("*.g722")}
    return {name: resample(*decode(files[name], files[name].name), 16000) for name in TEXTS}


@pytest.fixture(scope="module")
def pronunciations():
    """Word -> its pronunciations, each a text of phones."""
    found = {}
    for line in Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text().splitlines():
        word, _, spoken = line.strip().partition(" ")
        found.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(spoken)
    return found


def collapsed(names) -> str:
    return " ".join(name for name, _ in groupby(names))


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_the_dictionary_s_phones_of_the_words_in_order(phones, prompts, pronunciations, name):
    [ids] = phones.encode([prompts[name]], [TEXTS[name]])
    assert ids.dtype == np.int32
    assert len(ids) == -(-len(prompts[name]) // 160)
    words = re.findall("[a-z]+", TEXTS[name].lower().replace("1", "one"))
    spoken = {collapsed(" ".join(choice).split()) for choice in product(*(pronunciations[word] for word in words))}
    assert collapsed(PHONES[i] for i in ids if PHONES[i] != "SIL") in spoken


def test_phones_stand_where_they_sound(phones, prompts):
    wave, text = prompts["agent-pass"], TEXTS["agent-pass"]
    quiet = np.random.default_rng(0).normal(0, 1e-4, 16000).astype(np.float32)
    ids, late = phones.encode([wave, np.concatenate((quiet, wave))], [text, text])
    assert not ids[:1].any() or PHONES[ids[0]] == "P"
    assert (late[:90] == PHONES.index("SIL")).all()
    assert (late[100:] == ids).mean() > 0.8
    levels = np.array([np.abs(wave[start : start + 160]).mean() for start in range(0, len(wave), 160)])
    hisses = np.isin(ids, [PHONES.index(name) for name in ("AE", "ER", "AW", "IY", "EH")])
    assert levels[hisses].mean() > 3 * levels[ids == PHONES.index("SIL")].mean()


def test_a_clip_alone_and_among_others_has_the_same_ids(phones, prompts):
    names = list(TEXTS)
    together = phones.encode([prompts[name] for name in names], [TEXTS[name] for name in names])
    for name, ids in reversed(list(zip(names, together, strict=True))):
        [alone] = phones.encode([prompts[name]], [TEXTS[name]])
        assert alone.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Unmute!", ["un", "mute"]),  # two words of the dictionary
        ("the IVR", ["the", "i", "v", "r"]),
        ("Don\N{RIGHT SINGLE QUOTATION MARK}t press 7", ["don't", "press", "seven"]),
    ],
)
def test_words_that_the_dictionary_lacks_are_spoken_by_its_own(phones, text, words):
    assert phones.spoken_words(text) == words


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it has no transcript"),
        ("...", "it has no transcript"),
        ("dial 8500", "no pronunciation of '8500'"),
        ("a xqzt", "no pronunciation of 'xqzt'"),
        ("MILADY AND ATHOS", "no pronunciation of 'ATHOS'"),  # LibriSpeech's capitals mean no acronym
        ("supercalifragilistic " * 9, "no pronunciation of|no place for every word"),
        ("please enter the password and then press the pound key " * 9, "no place for every word"),
    ],
)
def test_clips_without_phones_are_refused_with_a_reason(phones, prompts, text, reason):
    [said] = phones.encode([prompts["vm-msgsaved"]], [text])
    assert isinstance(said, str)
    assert re.search(reason, said)


def test_preparation_writes_phones_and_names_the_clips_without(phones, prompts, whisper, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, wave in prompts.items():
        soundfile.write(folder / f"{name}.wav", wave, 16000, subtype="FLOAT")
        if name != "agent-pass":
            (folder / f"{name}.txt").write_text(TEXTS[name])
    overrides = ("data.speech_tokens=phones", "data.long=skip", "data.max_seconds=6", "data.codebook=64")
    index = prepare_folder(settings(whisper, *overrides), folder, "speech", tmp_path / "shards")
    clips = {clip.key.rpartition("-")[0]: clip for split in read_all(index).values() for clip in split}
    assert set(clips) == set(TEXTS) - {"agent-pass"}
    for name, clip in clips.items():
        assert clip.tokens.tolist() == phones.encode([prompts[name]], [TEXTS[name]])[0].tolist()
    rows = list(csv.DictReader((tmp_path / "shards/skipped.csv").open()))
    [row] = [row for row in rows if row["kind"] == "recording without phones"]
    assert row["name"].endswith("agent-pass.wav")
    assert row["reason"] == "it has no transcript"


def test_settings_that_do_not_go_with_phones_are_refused(whisper, prompts, tmp_path):
    soundfile.write(tmp_path / "a.wav", prompts["agent-pass"], 16000)
    with pytest.raises(UserError, match=r"data\.speech_tokens=phones: set data\.long=skip"):
        load_config("demo", ["data.speech_tokens=phones"])
    with pytest.raises(UserError, match=r"data\.audio_tokens='phones': kmeans, vq:FILE or s3:NAME"):
        load_config("demo", ["data.audio_tokens=phones"])
    config = settings(whisper, "data.speech_tokens=phones", "data.long=skip", "data.codebook=8")
    with pytest.raises(UserError, match=r"data\.speech_tokens=phones has 40 codes, data\.codebook is 8"):
        prepare_folder(config, tmp_path, "speech", tmp_path / "shards")
