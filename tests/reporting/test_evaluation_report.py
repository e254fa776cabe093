"""report.html of an evaluation."""

import json
import re
from pathlib import Path

import pytest

from agrepa_fast.evaluation.results import FIELDS, summarise, write_clips
from agrepa_fast.reporting import clip_rows
from agrepa_fast.reporting.report import write_report

from .listening import write_recordings

KEYS = {"speech": ["s1", "s2", "s3"], "audio": ["a1"]}
SCORES = {"truth": 4.0, "sample": 2.0, "codes": 1.5}


def write_evaluation(folder: Path) -> Path:
    """A folder as `agrepa evaluate` writes it, with two draws of the samples."""
    clips, rows = [key for keys in KEYS.values() for key in keys], []
    for name in SCORES:
        names = [*clips, *(f"{clip}~2" for clip in clips if name == "sample")]
        write_recordings(folder / "wavs" / name, names)
        for key in names:
            row = dict.fromkeys(FIELDS) | {"row": name, "key": key.partition("~")[0], "draw": int("~" in key)}
            domain = "speech" if key.startswith("s") else "audio"
            row |= {"domain": domain, "seconds": 0.45, "mel_l1": None if name == "truth" else 0.5, "sha256": ""}
            if domain == "speech":
                heard = "one <b> three" if name == "sample" else "one two three"
                row |= {"mos": SCORES[name], "words": 3, "errors": int(name == "sample"), "heard": heard}
                row["text"] = "one two three"
            rows.append(row)
    write_clips(rows, folder / "clips.csv")
    about = {"manifest": "ab12", "vocoder": "HiFi-GAN", "confidence": 0.95, "step": 400, "averaged": True}
    models = {"models": {"mos": {"spec": "package:distillmos"}}, "circular": {}, "left_out": {}, "failed": {}}
    flow = {"flow": {"steps": 31, "solver": "euler", "guidance": 3.0}}
    values = {"rows": summarise(rows, {}, {}, ["wer", "mos", "mel"], 0.95)}
    (folder / "results.json").write_text(json.dumps(about | flow | models | values))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_evaluation(tmp_path / "run" / "evaluate-step00000400")


def test_it_has_the_table_and_the_figures_of_each_clip(folder):
    text = write_report(folder).read_text()
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)]
    assert ["metric", "clips", "truth", "sample", "codes"] in rows
    (opinion,) = (row for row in rows if row[0] == "mos")
    assert [value.split()[0] for value in opinion[1:]] == ["3", "4.000", "2.000", "1.500"]
    assert "step 400, averaged weights".capitalize() in text
    names = re.findall(r"<h3>(\w+)", text)
    assert names == ["s1", "a1", "s2", "s3"], "domains in turns"
    assert re.findall(r'aria-pressed="false">(\w+)', text) == ["truth", "codes", "sample"] * 4
    assert "MOS 2.00 · mel L1 0.50 · 1 errors in 3 words · “one &lt;b&gt; three”" in text
    assert text.count("<q>one two three</q>") == 3
    assert "Truth, codes, sample. Codes: the mean mel" in text


def test_a_wav_that_cannot_be_read_is_named(folder):
    (folder / "wavs" / "codes" / "s2.wav").write_bytes(b"RIFF")
    text = write_report(folder).read_text()
    assert text.count("<audio") == 11
    assert re.search(r'<p class="note">codes: s2.wav: cannot be decoded', text)


def test_a_page_has_the_clips_that_fit(folder, monkeypatch):
    monkeypatch.setattr(clip_rows, "BUDGET", 120_000)
    text = write_report(folder).read_text()
    shown = text.count("<article")
    assert 1 <= shown < 4
    assert f"The first {shown} of 4." in text


def test_recordings_of_others_are_played_from_where_they_are(folder, tmp_path):
    results = json.loads((folder / "results.json").read_text())
    places = {"truth": tmp_path / "truth", "sample": tmp_path / "wavs" / "sample"}
    files = {row: {k: str(place / f"{k}.wav") for keys in KEYS.values() for k in keys} for row, place in places.items()}
    (folder / "wavs/truth").rename(tmp_path / "truth")
    (folder / "wavs").rename(tmp_path / "wavs")
    results |= {"folder": str(tmp_path / "wavs/sample"), "flow": None, "files": files}
    del results["step"], results["averaged"]
    (folder / "results.json").write_text(json.dumps(results))
    results["failed"] = {f"sample/s1.wav: {model}": "RuntimeError" for model in ("asr", "mos")}
    (folder / "results.json").write_text(json.dumps(results))
    text = write_report(folder).read_text()
    assert re.findall(r'aria-pressed="false">(\w+)', text) == ["truth", "sample"] * 4
    assert "Truth, sample." in text
    assert "the mean mel of each token" not in text
    assert "1 wavs could not be judged" in text
    (tmp_path / "truth").rename(tmp_path / "away")
    (tmp_path / "wavs").rename(tmp_path / "away too")
    assert "<audio" not in write_report(folder).read_text()


def test_it_plays_in_a_browser(folder, page):
    page.look(400, dark=False)
    page.open(write_report(folder))
    assert page.run("return document.documentElement.scrollWidth") <= 400
    page.click(".version button", 5)
    page.wait("const a = document.querySelectorAll('audio')[5]; return a.ended")
    assert page.complaints() == []
    assert page.requests() == []
