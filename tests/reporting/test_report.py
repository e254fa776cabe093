"""report.html of a run: what it says, and what it does in a browser."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from agrepa_fast.errors import UserError
from agrepa_fast.reporting.page import document
from agrepa_fast.reporting.page.chart import draw_lines
from agrepa_fast.reporting.page.media import mp3_uri
from agrepa_fast.reporting.report import write_report

RATE, SECONDS = 16000, 20.0  # long: a busy machine may look at a player late
PLAYING = "const a = document.querySelectorAll('audio')[arguments[0]]; return !a.paused && a.currentTime > arguments[1]"
STOPPED = "return [...document.querySelectorAll('audio')].every((audio) => audio.paused)"


@pytest.fixture(scope="module")
def run(baseline, tmp_path_factory) -> Path:
    """A finished run whose sounds are tones."""
    folder = tmp_path_factory.mktemp("report") / "a <run> & more"
    shutil.copytree(baseline, folder, ignore=shutil.ignore_patterns("checkpoints"))
    for number, path in enumerate(sorted((folder / "samples").glob("*.wav"))):
        wave = 0.1 * np.sin(2 * np.pi * 300 * (number + 1) * np.arange(RATE * SECONDS) / RATE)
        soundfile.write(path, wave, RATE)
    write_report(folder)
    return folder


def test_every_run_writes_a_report_at_its_end(baseline):
    text = (baseline / "report.html").read_text()
    summary = json.loads((baseline / "summary.json").read_text())
    assert f"{summary['val/flow_loss']['first']:.3f} → {summary['val/flow_loss']['last']:.3f}" in text
    assert summary["selection"] in text
    rows = re.findall(r'<th scope="row">(L\d)</th>', text)
    assert rows == ["L1", "L2", "L3", "L4"] * 2, "a table of layers per domain"
    selection = json.loads((baseline / "selection.json").read_text())
    assert text.count('class="bar strong"') == sum(map(len, selection["layers"].values()))
    mean, error = (selection["evidence"]["speech"][name][0] for name in ("mean", "stderr"))
    assert f"{mean:.4f} ± {error:.4f}" in text
    assert text.count("<audio") == len(summary["samples"]) == 6
    assert [*dict.fromkeys(re.findall(r'aria-pressed="false">(\w+)', text))] == ["truth", "codes", "sample"]


def test_a_report_holds_all_it_shows(run):
    text = (run / "report.html").read_text()
    assert "a &lt;run&gt; &amp; more" in text
    assert "a <run>" not in text
    links = re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', text)
    assert links == []
    assert "http" not in re.sub(r"http-equiv", "", text)


def test_its_players_play_and_switch_at_the_same_position(run, page):
    page.requests(), page.complaints()
    page.open(run / "report.html")
    assert page.run("return document.querySelectorAll('audio[controls]').length") == 0
    page.click(".version button", 0)
    page.wait(PLAYING, 0, 0.3)
    page.press("2")
    page.wait(PLAYING, 1, 0.0)
    assert page.run("return document.querySelectorAll('audio')[0].paused")
    left, taken_up = page.run("return [...document.querySelectorAll('audio')].map((audio) => audio.currentTime)")[:2]
    assert 0.3 < left < taken_up + 0.05 < left + 8, "the clock of one audio is not exactly that of the other"
    page.press("ARROW_DOWN")
    assert page.run(STOPPED), "another clip is in use"
    page.press(" ")
    page.wait(PLAYING, 3, 0.0)
    page.press(" ")
    page.wait(STOPPED)
    page.click(".mel", 4)  # in its middle
    page.wait(PLAYING, 4, SECONDS / 2 - 0.1)
    for _ in range(int(SECONDS)):
        page.press("ARROW_RIGHT")  # by half a second
    assert page.run(STOPPED), "it is at its end"
    assert page.run("return document.querySelectorAll('.playing').length") == 0
    page.press("1")
    page.wait(PLAYING, 3, 0.0)
    assert page.run("return document.querySelectorAll('audio')[3].currentTime") < SECONDS / 2, "from the start again"
    page.run("document.querySelectorAll('audio')[3].pause()")  # as headphones do
    page.wait("return document.querySelectorAll('.playing').length === 0")
    page.run("clips[1].move(arguments[0])", SECONDS - 0.3)
    page.press(" ")
    page.wait("return document.querySelectorAll('audio')[3].ended")
    page.wait("return document.querySelectorAll('.playing').length === 0 && clips[1].position === 0")
    assert page.complaints() == []
    assert page.requests() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_can_be_read_on_any_screen(run, page, width, dark):
    page.look(width, dark=dark)
    page.open(run / "report.html")
    assert page.run("return document.documentElement.scrollWidth") <= width
    paper, ink = (
        sum(map(int, re.findall(r"\d+", page.run(f"return getComputedStyle(document.body).{name}"))[:3]))
        for name in ("backgroundColor", "color")
    )
    assert (paper < ink) == dark
    assert abs(paper - ink) > 400
    assert page.run("return [...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert page.complaints() == []


def test_what_has_not_ended_has_no_report(tmp_path):
    with pytest.raises(UserError, match=r"has no summary.json and no results.json: name the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError, match="do not belong together"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("rate", [7000, 16000, 17000, 96000])
def test_sounds_of_any_rate_keep_their_length(rate):
    wave = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    kind, _, content = mp3_uri(wave, rate).partition(";base64,")
    assert kind == "data:audio/mpeg"
    decoded, other = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert len(decoded) / other == pytest.approx(2, abs=0.001)
    tone = np.abs(np.fft.rfft(decoded * np.hanning(len(decoded))))
    assert tone.argmax() * other / len(decoded) == pytest.approx(440, abs=1)


def test_a_page_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "LIMIT", 1000)
    with pytest.raises(UserError, match="show fewer clips"):
        document.write_document(document.Document("name", "about", {}, []), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_chart_has_round_ticks_and_leaves_out_what_is_not_finite():
    chart = draw_lines(
        "loss", "step", {"a": ("strong", [(0, 1.48), (400, 0.3), (500, float("nan"))]), "b": ("thin", [])}
    )
    assert chart.legend == [("strong", "a")]
    assert re.findall(r'text-anchor="end">([\d.]+)<', chart.svg) == ["0", "0.5", "1", "1.5", "400"]
    assert "nan" not in chart.svg
