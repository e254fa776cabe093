"""agrepa listen: blind pages, honest listeners, known results."""

import json
import os
import re

import numpy as np
import pyloudnorm
import pytest
import soundfile
import torch

from agrepa_fast.audio.waves import decode, import_torchaudio
from agrepa_fast.cli import main
from agrepa_fast.errors import UserError
from agrepa_fast.reporting.listen import build
from agrepa_fast.reporting.listen.build import make_test
from agrepa_fast.reporting.listen.ratings import read_answers
from agrepa_fast.reporting.listen.results import rate
from agrepa_fast.reporting.listen.screening import screened

from .listening import SCORES, by_system, make_small_test, write_evaluation, write_ratings, write_recordings


def sounds_of(page) -> dict[str, tuple[np.ndarray, int]]:
    """The waves of a page by their ids."""
    import base64

    shown = json.loads(re.search(r'<script type="application/json" id="test">(.*?)</script>', page.read_text())[1])
    return {
        id_: decode(base64.b64decode(uri.removeprefix("data:audio/flac;base64,")), id_)
        for id_, uri in shown["sounds"].items()
    }


@pytest.mark.parametrize("kind", ["mos", "pairwise"])
def test_a_page_does_not_say_whose_clips_it_plays(tmp_path, kind):
    page, answers = make_small_test(tmp_path, kind)
    text = page.read_text()
    hidden = [*SCORES, *answers["clips"], answers["key"], str(tmp_path)]
    assert [word for word in hidden if re.search(rf"\b{re.escape(word)}\b", text)] == []
    ids = [*answers["stimuli"], *answers["trials"]]
    assert all(re.fullmatch("[0-9a-f]{16}", id_) for id_ in ids)
    assert len(set(ids)) == len(ids)
    assert list(sounds_of(page)) == sorted(answers["stimuli"]), "no order says more than chance"


def test_all_clips_have_one_loudness_and_the_anchor_no_high_frequencies(tmp_path):
    page, answers = make_small_test(tmp_path)
    measure = import_torchaudio().functional.loudness  # another implementation of BS.1770
    spectra = {}
    for number, (id_, (wave, rate_hz)) in enumerate(sounds_of(page).items()):
        assert pyloudnorm.Meter(rate_hz).integrated_loudness(wave) == pytest.approx(-23, abs=0.01)
        if number < 2:
            assert measure(torch.from_numpy(wave)[None], rate_hz) == pytest.approx(-23, abs=0.2)
        power = np.abs(np.fft.rfft(wave)) ** 2
        above = np.fft.rfftfreq(len(wave), 1 / rate_hz) > 3700
        spectra.setdefault(answers["stimuli"][id_]["system"], []).append(power[above].sum() / power.sum())
    assert answers["loudness"] == -23
    assert max(spectra["anchor"]) < 1e-4
    assert min(spectra["truth"]) > 0.3


def test_a_wave_of_high_peaks_lowers_all(tmp_path):
    ours, truth = (write_recordings(tmp_path / name, ["a", "b"]) for name in ("ours", "truth"))
    click = np.random.default_rng(0).normal(0, 0.01, 16000)
    click[4000] = 1.0
    soundfile.write(ours / "a.wav", click, 16000)
    make_test([ours], tmp_path / "page", "mos", 0, 2, truth=truth)
    answers = json.loads((tmp_path / "page/answers.json").read_text())
    assert answers["loudness"] < -25
    peaks = [np.abs(wave).max() for wave, _ in sounds_of(tmp_path / "page/listen.html").values()]
    assert 0.97 < max(peaks) < 0.99


def test_evaluated_runs_bring_their_truths_and_domains(tmp_path, capsys):
    clips = [f"c{number}" for number in range(8)]
    runs = [write_evaluation(tmp_path, name, clips) for name in ("a", "bb")]
    for truth in (runs[1] / "evaluate/wavs/truth").iterdir():  # the same sounds in other bytes
        soundfile.write(truth, *soundfile.read(truth), subtype="DOUBLE")
    main(["listen", *map(str, runs), "--out", str(tmp_path / "page"), "--clips", "4", "--kind", "pairwise"])
    assert "16 ratings of 4 clips at -23.0 LUFS" in capsys.readouterr().out
    answers = json.loads((tmp_path / "page/answers.json").read_text())
    assert list(answers["systems"]) == ["a", "bb"]
    assert sorted(answers["clips"].values()) == ["audio", "audio", "speech", "speech"]
    assert not any("~" in clip for clip in answers["clips"]), "the first draw alone has a truth"
    make_test(runs, tmp_path / "other", "mos", 1, 4)
    assert json.loads((tmp_path / "other/answers.json").read_text())["clips"] != answers["clips"]
    make_test(runs, tmp_path / "again", "pairwise", 0, 4)
    again = json.loads((tmp_path / "again/answers.json").read_text())
    assert again["clips"] == answers["clips"]
    assert again["stimuli"].keys().isdisjoint(answers["stimuli"]), "ids have a key that nobody can guess"


def test_opinions_and_differences_are_those_of_the_listeners(tmp_path, capsys):
    _, answers = make_small_test(tmp_path, clips=4)
    ratings = tmp_path / "ratings"
    write_ratings(ratings / "1.json", answers, "first", by_system)
    write_ratings(ratings / "2.json", answers, "second", lambda clip, system: SCORES[system] - (system == "ours"))
    write_ratings(ratings / "3.json", answers, "upside down", lambda clip, system: 6 - SCORES[system])
    main(["listen", "--ratings", str(ratings), "--answers", str(tmp_path / "page/answers.json")])
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: upside down (references are not rated above anchors on average)" in out
    results = json.loads((tmp_path / "page/results.json").read_text())
    assert results["listeners"] == ["first", "second"]
    assert list(results["left_out"]) == ["upside down"]
    assert {one["system"]: (one["value"], one["n"]) for one in results["opinions"]} == {
        "ours": (3.5, 8),
        "theirs": (2, 8),
        "truth": (5, 8),
        "anchor": (1, 8),
    }
    differences = {(one["system"], one["other"]): one for one in results["differences"]}
    assert differences["ours", "theirs"]["value"] == 1.5
    assert (differences["ours", "theirs"]["low"], differences["ours", "theirs"]["high"]) == (1, 2)
    assert "3.50 [3.00, 4.00]" in out
    assert "+1.50 [+1.00, +2.00]" in out


def test_preferences_are_shares_of_listeners_and_clips(tmp_path):
    _, answers = make_small_test(tmp_path, "pairwise", clips=4)
    ratings = tmp_path / "ratings"
    write_ratings(ratings / "1.json", answers, "first", by_system)
    write_ratings(ratings / "2.json", answers, "second", lambda c, s: 3 if s in ("ours", "theirs") else SCORES[s])
    write_ratings(ratings / "3.json", answers, "all the same", lambda clip, system: 1)
    results = rate(ratings, tmp_path / "page/answers.json")
    assert list(results.left_out) == ["all the same"]
    shares = {(one.name, one.other): one.interval.value for one in results.compared}
    assert shares == {("ours", "theirs"): 0.75, ("ours", "truth"): 0, ("theirs", "truth"): 0, ("truth", "anchor"): 1}


def test_simulated_listeners_find_the_true_difference(tmp_path):
    """Of thirty tests with eight listeners and twelve clips, the intervals miss the truth in few."""
    _, answers = make_small_test(tmp_path, clips=12)
    random, hits, left_out = np.random.default_rng(0), 0, 0
    quality = {"ours": 3.4, "theirs": 2.9, "truth": 4.2, "anchor": 1.8}
    for number in range(30):
        ratings = tmp_path / f"ratings{number}"
        of_clip = {(c, s): random.normal(0, 0.3) for c in answers["clips"] for s in quality}
        for listener in range(8):
            offset = random.normal(0, 0.4)

            def score(clip, system, offset=offset, of_clip=of_clip):
                return np.clip(round(quality[system] + offset + of_clip[clip, system] + random.normal(0, 0.6)), 1, 5)

            write_ratings(ratings / f"{listener}.json", answers, f"listener {listener}", score)
        results = rate(ratings, tmp_path / "page/answers.json")
        left_out += len(results.left_out)
        (difference,) = (one.interval for one in results.compared if (one.name, one.other) == ("ours", "theirs"))
        hits += difference.low <= 0.5 <= difference.high
        assert difference.low > 0 or difference.value < 0.5
    assert hits >= 26
    assert left_out <= 5, "listeners who do their best stay"


def test_listeners_are_screened_as_bs_1534_does():
    differences = np.ones((6, 21))
    differences[0, :3] = -1  # 15 % of 20
    differences[1, :4] = -1
    differences[2] = 0
    differences[2:, 20] = -1  # a clip whose anchor most take for the better one
    names = [f"l{number}" for number in range(6)]
    assert screened(names, differences) == {
        "l1": "the anchor is rated above the reference in 4 of 20 clips",
        "l2": "references are not rated above anchors on average",
    }
    alone = np.array([[1.0, 1.0, -1.0]])
    assert list(screened(["one"], alone)) == ["one"], "nobody else says that the clip is to blame"


class TestRefusals:
    @pytest.fixture
    def refused(self, capsys):
        def run(*arguments) -> str:
            with pytest.raises(SystemExit) as stopped:
                main(["listen", *map(str, arguments)])
            assert stopped.value.code == 2
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1
            return lines[0]

        return run

    def test_systems(self, tmp_path, refused, monkeypatch):
        clips = ["a", "b", "c"]
        ours, theirs, truth = (write_recordings(tmp_path / name, clips) for name in ("ours", "theirs", "truth"))
        few = write_recordings(tmp_path / "few", ["a", "d"])
        out = ("--out", tmp_path / "page", "--truth", truth)
        assert "ours and few have other clips: 3 are in one alone (b, c, d)" in refused(ours, few, *out)
        assert "has no truth: name the folder of the real recordings with --truth" in refused(ours, theirs, *out[:2])
        assert "the truth of d is missing" in refused(few, *out)
        assert "cannot be named twice" in refused(ours, ours, *out)
        assert "holds no recordings" in refused(tmp_path, *out)
        (tmp_path / "config.yaml").touch()
        assert "has 0 evaluations: run agrepa evaluate" in refused(tmp_path, *out)
        assert "name the systems to listen to and --out" in refused(ours)
        monkeypatch.setattr(build, "LIMIT", 250_000)
        assert re.search(r"the page would have 0.\d MB, above 0: about 2 clips fit", refused(ours, theirs, *out))
        assert not (tmp_path / "page").exists()

    def test_recordings(self, tmp_path, refused):
        truth = write_recordings(tmp_path / "truth", ["a"])
        out = ("--out", tmp_path / "page", "--truth", truth)
        silent = tmp_path / "silent"
        silent.mkdir()
        soundfile.write(silent / "a.wav", np.zeros(16000), 16000)
        assert "silent/a.wav is silent" in refused(silent, *out)
        short = write_recordings(tmp_path / "short", ["a"], seconds=0.3)
        assert "short/a.wav has 0.30 s: a loudness needs 0.4 s" in refused(short, *out)

    def test_other_truths(self, tmp_path, refused):
        one, two = (write_evaluation(tmp_path, name, ["a", "b"]) for name in ("one", "three"))
        soundfile.write(two / "evaluate-step00000005/wavs/truth/b.wav", np.ones(16000) / 2, 16000)
        assert "b has another truth in" in refused(one, two, "--out", tmp_path / "page")

    def test_an_evaluation_of_recordings_has_no_wavs_of_its_own(self, tmp_path, refused):
        run = write_evaluation(tmp_path, "one", ["a", "b"])
        for moved in ("truth", "sample"):  # of a list it has samples, of a folder neither
            (run / "evaluate-step00000005/wavs" / moved).rename(tmp_path / moved)
            line = refused(run, "--out", tmp_path / "page")
            assert "has no truths of its own" in line
            assert "name the folder of the samples, and --truth FOLDER" in line

    def test_a_test_is_not_written_over(self, tmp_path, refused):
        make_small_test(tmp_path)
        paths = [tmp_path / name for name in ("ours", "theirs")]
        line = refused(*paths, "--out", tmp_path / "page", "--truth", tmp_path / "truth")
        assert "holds a listening test: its answers would be lost" in line

    def test_ratings(self, tmp_path, refused):
        _, answers = make_small_test(tmp_path)
        ratings, file = tmp_path / "ratings", tmp_path / "page/answers.json"

        def refusal(**changes) -> str:
            write_ratings(ratings / "x.json", answers, "one", by_system, changes)
            return refused("--ratings", ratings, "--answers", file)

        whole = json.loads(write_ratings(ratings / "x.json", answers, "one", by_system).read_text())["ratings"]
        assert "x.json rates another test ('else'" in refusal(test="else")
        assert "x.json holds no ratings of a listening test" in refusal(format="else")
        assert "x.json rates 11 of 12 trials: let the listener end the test" in refusal(ratings=whole[1:])
        assert "a trial is rated twice" in refusal(ratings=[*whole, whole[0]])
        assert "0 is no answer to trial" in refusal(ratings=[*whole[1:], whole[0] | {"answer": 0}])
        assert "True is no answer" in refusal(ratings=[*whole[1:], whole[0] | {"answer": True}])
        assert "'' is no name" in refusal(listener=" ")
        assert r"'\x1b[2J' is no name" in refusal(listener="\x1b[2J")
        assert "x.json is damaged" in refusal(ratings=[1])
        for damaged in ("{", "[]", "[" * 100_000, "\ufffe"):
            (ratings / "x.json").write_text(damaged)
            assert "x.json is damaged" in refused("--ratings", ratings, "--answers", file)
        for name, listener in (("x", "Ann"), ("y", "ann ")):
            write_ratings(ratings / f"{name}.json", answers, listener, by_system)
        assert "y.json are both of the listener" in refused("--ratings", ratings, "--answers", file)
        assert "is no answers.json" in refused("--ratings", ratings, "--answers", ratings / "x.json")
        assert "belong together" in refused("--ratings", ratings)
        assert "--kind: without effect with --ratings" in refused(
            "--ratings", ratings, "--answers", file, "--kind", "mos"
        )
        (ratings / "y.json").unlink()
        write_ratings(ratings / "x.json", answers, "one", lambda clip, system: 6 - SCORES[system])
        assert "no listener is left (one: references" in refused("--ratings", ratings, "--answers", file)
        assert not (tmp_path / "page/results.json").exists()


def test_names_that_are_not_utf_8_are_blind_clips_like_others(tmp_path):
    clips = ["a", os.fsdecode(b"stra\xdfe")]
    ours, truth = (write_recordings(tmp_path / name, ["a", "b"]) for name in ("ours", "truth"))
    for folder in (ours, truth):
        (folder / "b.wav").rename(folder / f"{clips[1]}.wav")
    make_test([ours], tmp_path / "page", "mos", 0, 2, truth=truth)
    answers = json.loads((tmp_path / "page/answers.json").read_text())
    assert sorted(answers["clips"]) == clips
    assert len(sounds_of(tmp_path / "page/listen.html")) == 6


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e4, r"peak 10000, not in \[-1, 1\]")]
)
def test_a_recording_with_samples_of_no_sound_is_refused_by_name(value, said, tmp_path):
    ours, truth = (write_recordings(tmp_path / name, ["a", "b"]) for name in ("ours", "truth"))
    wave, rate_hz = soundfile.read(ours / "b.wav", dtype="float32")
    wave[9] = value
    soundfile.write(ours / "b.wav", wave, rate_hz, subtype="FLOAT")
    with pytest.raises(UserError, match=rf"ours/b.wav: {said}"):
        make_test([ours], tmp_path / "page", "mos", 0, 2, truth=truth)
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"manifest": "m"}'])
def test_results_of_an_evaluation_are_not_replaced(content, tmp_path, capsys):
    page, answers = make_small_test(tmp_path)
    (tmp_path / "ratings").mkdir()
    write_ratings(tmp_path / "ratings" / "a.json", answers, "a", by_system)
    command = ["listen", "--ratings", str(tmp_path / "ratings"), "--answers", str(page.with_name("answers.json"))]
    main(command)
    main(command)  # its own are
    other = tmp_path / "evaluate" / "results.json"
    other.parent.mkdir()
    other.write_text(content)
    with pytest.raises(SystemExit) as ended:
        main([*command, "--out", str(other.parent)])
    assert ended.value.code == 2
    assert "results.json" in capsys.readouterr().err
    assert other.read_text() == content


@pytest.mark.parametrize("kind", ["mos", "pairwise"])
@pytest.mark.parametrize(
    "change",
    [
        lambda answers: answers.update(kind="abx"),
        lambda answers: answers.update(systems=None),
        lambda answers: answers.update(trials=[]),
        lambda answers: answers.pop("test"),
        lambda answers: answers["clips"].update(clip0=None),
        lambda answers: answers["clips"].pop("clip0"),
        lambda answers: answers["stimuli"].popitem(),
        lambda answers: answers["trials"].popitem(),
        lambda answers: answers["trials"].update(more=next(iter(answers["trials"].values()))),
        lambda answers: next(iter(answers["trials"].values())).append("more"),
        lambda answers: next(iter(answers["trials"].values())).clear(),
        lambda answers: answers["trials"].update({next(iter(answers["trials"])): None}),
    ],
    ids=range(12),
)
def test_answers_that_were_changed_are_refused(change, kind, tmp_path):
    page, answers = make_small_test(tmp_path, kind)
    path = page.with_name("answers.json")
    read_answers(path)
    change(answers)
    path.write_text(json.dumps(answers))
    with pytest.raises(UserError, match=r"is no answers.json of agrepa listen"):
        read_answers(path)
