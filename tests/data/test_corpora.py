"""Sources of `agrepa prepare`: LibriSpeech and AudioSet, in small but real trees."""

import io
from pathlib import Path

import pytest
import soundfile

from agrepa_fast.cli import main
from agrepa_fast.corpora.audioset import audioset_source
from agrepa_fast.corpora.librispeech import librispeech_source
from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError

from .test_prepare import read_all, tone

RATE = 16000


def seconds_of(number):
    return 0.6 + 0.05 * number


def write_audio(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    form = "OGG" if path.suffix == ".opus" else path.suffix[1:].upper()
    soundfile.write(path, tone(seconds_of(number), RATE, number), RATE, format=form)


def audio_bytes(number, form="FLAC"):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(seconds_of(number), RATE, number), RATE, format=form)
    return buffer.getvalue()


def prepared(whisper, out, domain, *arguments):
    """The clips of `agrepa prepare …` by key, each with its split; and the index."""
    settings = [f"data.{domain}_teacher={whisper}", "data.codebook=8", "data.shard_clips=8", "data.val_share=0.2"]
    main(["prepare", *map(str, arguments), "--out", str(out), *settings])
    index = load_index(out)
    clips = {clip.key: (clip, split) for split, read in read_all(index, domain).items() for clip in read}
    assert len(clips) == sum(index.clips(split, domain) for split in ("train", "val"))
    return clips, index


def assert_groups_stay_apart(source, clips):
    """Every group is on one side, and both sides have some."""
    splits = {}
    for recording in source.recordings():
        if recording.name in clips:
            splits.setdefault(recording.split_group, set()).add(clips[recording.name][1])
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val"}


# LibriSpeech


@pytest.fixture
def librispeech(tmp_path):
    """5 speakers of 4 utterances, the last of them without a line; a development set of 2."""
    root, number = tmp_path / "corpus" / "LibriSpeech", 0
    for subset, speakers in {"train-clean-100": (19, 26, 27, 32, 1034), "dev-clean": (84,)}.items():
        for speaker in speakers:
            for chapter in (198, 7):
                folder, lines = root / subset / str(speaker) / str(chapter), []
                for utterance in range(2 if speaker != 84 else 1):
                    name = f"{speaker}-{chapter}-{utterance:04d}"
                    write_audio(folder / f"{name}.flac", number)
                    lines.append(f"{name} SAY {number}")
                    number += 1
                (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    transcript = root / "train-clean-100/1034/7/1034-7.trans.txt"
    transcript.write_text(transcript.read_text().splitlines()[0] + "\n")
    (root / "SPEAKERS.TXT").write_text(";ID |SEX\n")
    return root


def test_librispeech(librispeech, whisper, tmp_path, capsys):
    clips, index = prepared(whisper, tmp_path / "out", "speech", "librispeech", librispeech.parent)
    assert "dev-clean left out" in capsys.readouterr().out
    assert len(clips) == 19
    for key, (clip, _) in clips.items():
        number = int(clip.text.removeprefix("SAY "))
        assert clip.seconds == pytest.approx(seconds_of(number), abs=1e-3)
        assert clip.labels == ("train-clean-100",)
        assert clip.licence == "CC-BY-4.0"
        assert clip.source == f"train-clean-100/{'/'.join(key.split('-')[:2])}/{key}.flac"
    assert index.content["domains"]["speech"]["skipped"] == [
        {
            "name": "1034-7-0001",
            "source": "train-clean-100/1034/7/1034-7-0001.flac",
            "reason": "no transcript in 1034-7.trans.txt",
        }
    ]
    source = librispeech_source(librispeech)
    assert {recording.group for recording in source.recordings()} == {"19", "26", "27", "32", "1034"}
    assert_groups_stay_apart(source, clips)


def test_librispeech_paths_and_order(librispeech, monkeypatch):
    names = [recording.name for recording in librispeech_source(librispeech.parent).recordings()]
    assert names == sorted(path.stem for path in librispeech.glob("train-clean-100/*/*/*.flac"))  # torchaudio's walk
    assert names == [r.name for r in librispeech_source(librispeech / "train-clean-100").recordings()]
    monkeypatch.chdir(librispeech / "dev-clean")
    assert [r.source for r in librispeech_source(Path()).recordings()] == [
        "dev-clean/84/198/84-198-0000.flac",
        "dev-clean/84/7/84-7-0000.flac",
    ]


def test_librispeech_names_what_is_missing(librispeech, tmp_path):
    (librispeech / "dev-clean/84/7/84-7-0000.flac").unlink()
    (librispeech / "dev-clean/84/198/84-198.trans.txt").unlink()
    found = librispeech_source(librispeech / "dev-clean").recordings()
    assert [recording.problem for recording in found] == ["no transcript in 84-198.trans.txt", "the file is missing"]
    with pytest.raises(UserError, match=r"84-7-0000\.flac: the file is missing"):
        found[1].read(1.0)
    for path, message in {tmp_path / "none": "is no folder", tmp_path / "corpus": "holds no recordings"}.items():
        if path.exists():
            librispeech.rename(tmp_path / "elsewhere")
        with pytest.raises(UserError, match=message):
            librispeech_source(path)


# AudioSet

YTIDS = [f"{start}bcd_{number:02d}-ef_" for number, start in enumerate("--Y_Ya0Z-YYq")]
assert all(len(ytid) == 11 for ytid in YTIDS)
CONVENTIONS = [  # of downloaders, for the segment from 30 to 40 s
    "audio/{}.wav",
    "audio/Y{}.wav",
    "{}.flac",
    "unbalanced/part00/Y{}.WAV",
    "balanced/{}_30.000.wav",
    "balanced/{}_30_40.flac",
    "by label/Dog/{}_30.0-40.0.ogg",
    "ms/{}_30000_40000.flac",
    "ms/Y{}_30000.flac",
    "{}.mp3",
    "x/{}.opus",
    "x/Y{}.flac",
]


@pytest.fixture
def audioset(tmp_path):
    root = tmp_path / "AudioSet"
    for number, (ytid, convention) in enumerate(zip(YTIDS, CONVENTIONS, strict=True)):
        write_audio(root / convention.format(ytid), number)
    write_audio(root / "audio/ZZZZZZZZZZZ.wav", 0)  # in no table
    write_audio(root / f"balanced/{YTIDS[4]}_90.000.wav", 0)  # another part of the video
    write_audio(root / f"audio/{YTIDS[2]}.wav", 0)  # of several files for a segment, the first is taken
    (root / "ontology").mkdir()
    (root / "ontology/class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n'
    )
    head = "# Segments csv created Sun Mar  5\n# num_ytids=9\n# YTID, start_seconds, end_seconds, positive_labels\n"
    line = '{}, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n'
    balanced = [line.format(ytid) for ytid in [*YTIDS[:6], "deleted-vid"]]
    unbalanced = [line.format(ytid).replace("05zppz", "unknown") for ytid in YTIDS[5:]]  # one is in both
    (root / "balanced_train_segments.csv").write_text(head + "".join(balanced))
    (root / "unbalanced_train_segments.csv").write_text(head + "".join(unbalanced))
    (root / "eval_segments.csv").write_text(head + line.format("ZZZZZZZZZZZ"))
    return root


def test_audioset(audioset, whisper, tmp_path, capsys):
    clips, _ = prepared(whisper, tmp_path / "out", "audio", "audioset", audioset)
    out = capsys.readouterr().out
    assert "eval_segments.csv left out" in out
    assert "12 segments with a file, 1 lines without; 2 audio files belong to no segment" in out
    assert len(clips) == 12
    for number, ytid in enumerate(YTIDS):
        clip, _ = clips[f"audioset-{ytid}-30000"]
        assert clip.source == (CONVENTIONS[number].format(ytid) if number != 2 else f"{ytid}.flac")
        assert clip.seconds == pytest.approx(seconds_of(number), abs=0.1)  # mp3 and opus pad
        assert clip.labels == ("Speech", "Male speech, man speaking" if number < 6 else "/m/unknown")
        assert clip.text == ""
    source = audioset_source(audioset)
    assert {recording.group for recording in source.recordings()} == set(YTIDS)
    assert_groups_stay_apart(source, clips)


def test_audioset_by_one_table(audioset):
    assert [r.group for r in audioset_source(audioset / "eval_segments.csv").recordings()] == ["ZZZZZZZZZZZ"]
    assert [r.group for r in audioset_source(audioset / "balanced_train_segments.csv").recordings()] == YTIDS[:6]


def test_audioset_does_not_circle_in_links(audioset):
    expected = [r.source for r in audioset_source(audioset).recordings()]
    (audioset / "a loop").symlink_to(audioset)
    assert [r.source for r in audioset_source(audioset).recordings()] == expected


def test_audioset_takes_linked_folders(audioset, tmp_path):
    expected = {r.name for r in audioset_source(audioset).recordings()}
    (audioset / "balanced").rename(tmp_path / "elsewhere")
    (audioset / "balanced").symlink_to(tmp_path / "elsewhere")
    assert {r.name for r in audioset_source(audioset).recordings()} == expected


@pytest.mark.parametrize(
    "line",
    [
        "abcdefghijk, 30.000, 40.000",  # no labels
        "abcdefghijk, 30.000, 40.000, /m/09x0r,/m/05zppz",  # not quoted
        'abcdefghijk, thirty, 40.000, "/m/09x0r"',
        'abcdefghijk, 40.000, 30.000, "/m/09x0r"',
        'abcdefghijk, 0.000, nan, "/m/09x0r"',
        '../../abcde, 30.000, 40.000, "/m/09x0r"',
        'abc, 30.000, 40.000, "/m/09x0r"',
        'abcdefghijk, 30.000, 40.000, ""',
        'abcdefghijk, 30.000, 40.000, "/m/\xff"',
    ],
)
def test_audioset_names_the_wrong_line(audioset, line):
    with (audioset / "balanced_train_segments.csv").open("ab") as table:
        table.write(line.encode("latin-1") + b"\n")
    with pytest.raises(UserError, match=r"balanced_train_segments\.csv:\d+: ") as refused:
        audioset_source(audioset)
    assert ":11: " in str(refused.value) or "utf-8" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_audioset_refuses_what_it_cannot_use(audioset, capsys):
    labels = audioset / "ontology/class_labels_indices.csv"
    labels.write_text("index,mid\n0,/m/09x0r\n")
    with pytest.raises(UserError, match="has no column display_name"):
        audioset_source(audioset)
    labels.unlink()
    assert audioset_source(audioset).recordings()[0].labels == ("/m/09x0r", "/m/05zppz")
    assert "no class_labels_indices.csv" in capsys.readouterr().out
    for file in [file for file in audioset.rglob("*.*") if file.suffix != ".csv"]:
        file.unlink()
    with pytest.raises(UserError, match=r"0 segments with a file, 14 lines without: .* <YTID>_<start>"):
        audioset_source(audioset)
    for file in audioset.glob("*.csv"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds none of balanced_train_segments\.csv"):
        audioset_source(audioset)


def test_two_recordings_of_one_name_are_refused(librispeech):
    (librispeech / "train-clean-100/19/7").rename(librispeech / "train-clean-100/19/8")
    (librispeech / "train-clean-100/19/8/19-8.trans.txt").write_text("19-198-0000 COPY\n")
    with pytest.raises(UserError, match="another recording are both called 19-198-0000"):
        librispeech_source(librispeech)
