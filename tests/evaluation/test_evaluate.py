"""agrepa evaluate from end to end, with metric models that say what a test wants."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from agrepa_fast.cli import main
from agrepa_fast.data.index import write_index
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation import evaluate, synthesis
from agrepa_fast.evaluation.evaluate import similarities
from agrepa_fast.evaluation.manifest import Clip
from agrepa_fast.evaluation.recogniser import Heard
from agrepa_fast.evaluation.selftest import SelfTest
from agrepa_fast.evaluation.synthesis import Wav
from agrepa_fast.reporting import evaluation
from agrepa_fast.reporting.evaluation import evaluate_checkpoint

from ..data.test_prepare_ranks import run_threads
from ..ranks import run_training
from ..testing import write_small_shards
from .conftest import Model, clips

FLAGS = ("eval.vocoder=griffin-lim", "metrics.clips=3", "metrics.reference_clips=6")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on shards with transcripts, whose speech teacher has the SHA-256 "ab"."""
    folder = tmp_path_factory.mktemp("texts")
    preset = write_small_shards(folder / "shards", texts=True)
    index = json.loads((folder / "shards" / "index.json").read_text())
    index["domains"]["speech"]["teachers"]["teacher_speech"]["identity"] = {"sha256": "ab"}
    write_index(folder / "shards", index)
    settings = ("train.steps=2", "align.strategy=none", "data.speaker=campplus:none", "run.dir=run")
    run_training(1, "--preset", str(preset), *settings, cwd=folder)
    return folder / "run"


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("clips.csv", "results.json", "results.md", "manifest.json")}


def test_a_run_is_sampled_measured_and_reported(run, tmp_path, calls, capsys):
    out = tmp_path / "out"
    main(["evaluate", str(run), "--out", str(out), *FLAGS, "metrics.draws=2"])
    printed = capsys.readouterr().out
    rows = clips(out)
    assert {(r["row"], r["domain"], r["draw"]) for r in rows} == {
        (row, domain, draw)
        for row, draws in (("truth", "0"), ("sample", "01"), ("codes", "0"))
        for domain in ("speech", "audio")
        for draw in draws
    }
    assert len(rows) == 6 * 4
    assert all((r["mos"] != "") == (r["domain"] == "speech") for r in rows)
    assert all((r["mel_l1"] != "") == (r["row"] != "truth") for r in rows)
    results = json.loads((out / "results.json").read_text())
    speech = results["rows"]["sample"]["speech"]
    assert {
        "wer",
        "wer_capped",
        "cer",
        "wer_truth",
        "mos",
        "similarity",
        "mel_l1",
        "mmd",
        "fad",
        "fad_inf",
    } <= speech.keys()
    assert speech["mos"]["n"] == speech["mmd"]["n"] == 3
    assert results["rows"]["sample"]["audio"].keys() == {"mel_l1", "mmd", "fad", "fad_inf"}
    assert results["rows"]["codes"]["speech"]["mel_l1"]["value"] > 0
    assert "wer_truth" not in results["rows"]["truth"]["speech"]
    assert results["models"]["asr"]["spec"] == "package:fake"
    assert results["step"] == 2
    assert results["manifest"] in printed
    assert "| speech | mos | 3 |" in (out / "results.md").read_text()
    assert (out / "report.html").read_text().count("<audio") == 3 * 6
    assert calls.count("asr") == 3 * 4


def test_the_same_command_does_nothing_twice_and_goes_on_after_an_interruption(run, tmp_path, calls):
    out = tmp_path / "out"
    command = ["evaluate", str(run), "--out", str(out), *FLAGS]
    main(command)
    first, done = contents(out), len(calls)
    main(command)
    assert len(calls) == done
    assert contents(out) == first
    wav = next((out / "wavs" / "sample").glob("*.wav"))
    before = wav.read_bytes()
    wav.unlink()
    next((tmp_path / "cache" / "scores").glob("mos-*/*.json")).unlink()
    (out / "results.json").unlink()
    main(command)
    assert wav.read_bytes() == before
    assert len(calls) == done + 1
    assert contents(out) == first
    speech = next(row for row in clips(out) if (row["row"], row["domain"]) == ("sample", "speech"))
    soundfile.write(out / "wavs" / "sample" / f"{speech['key']}.wav", np.zeros(4000), 16000)  # under the same name
    main(command)
    again = next(row for row in clips(out) if (row["row"], row["key"]) == ("sample", speech["key"]))
    assert float(again["mos"]) == 1 != float(speech["mos"])


def test_results_never_stand_beside_the_clips_of_another_evaluation(run, tmp_path, calls, monkeypatch):
    """A second one, with other texts, is interrupted after its clips are written."""
    command = ["evaluate", str(run), "--out", str(tmp_path), *FLAGS]
    main(command)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "write_embeddings", stop)
    with pytest.raises(SystemExit):
        main([*command, "metrics.text=f5"])
    assert not (tmp_path / "results.json").exists()


def test_a_self_test_counts_for_its_language_alone(run, tmp_path, calls, monkeypatch):
    tested = []

    def failing(gauge, _):
        tested.append(gauge)
        return SelfTest(-1.5, 1.0, 1.0, False)

    monkeypatch.setattr(evaluate, "self_test", failing)
    main(["evaluate", str(run), "--out", str(tmp_path / "en"), *FLAGS])
    first = len(tested)
    main(["evaluate", str(run), "--out", str(tmp_path / "again"), *FLAGS])
    assert len(tested) == first > 0
    main(["evaluate", str(run), "--out", str(tmp_path / "fr"), *FLAGS, "metrics.language=fr"])
    assert len(tested) == 2 * first


def test_ranks_share_the_work_and_change_nothing(run, tmp_path, calls):
    def on_rank(ranks):
        evaluate_checkpoint(run, FLAGS, ranks, live=False, domains=None, out=tmp_path / "two")

    results = run_threads(2, on_rank)
    assert results == [None, None], results
    main(["evaluate", str(run), "--out", str(tmp_path / "one"), *FLAGS])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_model_that_gives_the_truth_scores_as_the_truth(run, tmp_path, calls, monkeypatch):
    truth = synthesis.Synthesis._mels

    def oracle(self, batch, samples):
        for row, clip, mel, true in truth(self, batch, samples):
            yield row, clip, true if row == "sample" else mel, true

    monkeypatch.setattr(synthesis.Synthesis, "_mels", oracle)
    out = tmp_path / "out"
    main(["evaluate", str(run), "--out", str(out), *FLAGS])
    rows = json.loads((out / "results.json").read_text())["rows"]
    for domain in ("speech", "audio"):
        for metric, entry in rows["truth"][domain].items():
            assert rows["sample"][domain][metric] == entry, metric
        assert rows["sample"][domain]["mel_l1"]["value"] == 0
    assert rows["sample"]["speech"]["similarity"]["value"] == pytest.approx(1)
    assert rows["sample"]["speech"]["wer_truth"]["value"] == 0


def test_circular_and_failed_models_are_named(run, tmp_path, calls, monkeypatch, capsys):
    for name in ("load_recogniser", "load_mos"):

        def load(*_, name=name, **__):
            model = Model(calls)
            model.identity |= {"encoder_sha256": "ab"} if name == "load_recogniser" else {"sha256": "mos"}
            return model

        monkeypatch.setattr(evaluate, name, load)
    monkeypatch.setattr(evaluate, "opinion", lambda scorer, name: "opinion")
    monkeypatch.setattr(evaluate, "self_test", lambda gauge, _: SelfTest(1.0, 1.0, 1.0, gauge != "opinion"))
    out = tmp_path / "out"
    main(["evaluate", str(run), "--out", str(out), *FLAGS, "--domain", "speech"])
    printed = " ".join(capsys.readouterr().out.split())
    results = json.loads((out / "results.json").read_text())
    assert results["circular"] == {"asr": "the teacher of speech"}
    assert results["left_out"] == {"mos": "clean 1, noise at 20 dB 1, at 5 dB 1"}
    assert "mos" not in results["rows"]["sample"]["speech"]
    assert "rewards alignment by construction: asr is the teacher of speech" in printed
    assert "left out: mos failed its self-test: clean 1, noise" in printed
    assert "wer_truth †" in (out / "results.md").read_text()
    assert results["rows"]["sample"].keys() == {"speech"}


def test_a_wav_that_cannot_be_judged_counts_against_the_system(run, tmp_path, calls, monkeypatch):
    class Picky(Model):
        def transcribe(self, wave, rate):
            self.calls.append("asr")
            if len(self.calls) == 1:
                raise RuntimeError("too long")
            return Heard("say 22", -0.1)

    monkeypatch.setattr(evaluate, "load_recogniser", lambda *_, **__: Picky([]))
    out = tmp_path / "out"
    main(["evaluate", str(run), "--out", str(out), *FLAGS, "metrics.only=[wer]"])
    results = json.loads((out / "results.json").read_text())
    (failed,) = results["failed"].items()
    assert failed[0].startswith("truth/")
    assert failed[1] == "RuntimeError: too long"
    row = next(r for r in clips(out) if f"{r['row']}/{r['key']}.wav: asr" == failed[0])
    assert int(row["errors"]) == int(row["del"]) == int(row["words"]) > 0
    assert "1 wavs could not be judged" in (out / "results.md").read_text()


def test_what_does_not_fit_is_refused_in_one_line(run, tmp_path, calls, capsys):
    out = tmp_path / "out"
    main(["evaluate", str(run), "--out", str(out), *FLAGS, "metrics.only=[mel]"])
    capsys.readouterr()
    for arguments, message in (
        ([str(run), "--out", str(out), *FLAGS, "metrics.clips=2"], "holds an evaluation of other clips"),
        ([str(run), "--out", str(out), *FLAGS, "flow.guidance=1"], "holds an evaluation of other samples"),
        ([str(run), "--out", str(out), *FLAGS, "train.lr=1"], "train.lr has no effect here"),
        ([str(run), "--reference", str(tmp_path)], "has its truths in the shards"),
        ([str(run), "--out", str(run), *FLAGS], "holds a run or an export: choose another folder"),
        ([str(run), "metrics.only=[bleu]"], "metrics.only"),
        ([str(tmp_path / "none")], "is no checkpoint"),
        ([str(tmp_path)], "--domain is needed"),
        ([str(tmp_path), "--live", "--domain", "speech"], "has no weights"),
        ([str(tmp_path), "--domain", "speech", "metrics.draws=2"], "metrics.draws has no effect here"),
        ([str(run), "metrics.clips=99", "--out", str(tmp_path / "x")], "or lower metrics.clips"),
        ([str(run), "metrics.only=[mos]", "--domain", "audio", "--out", str(tmp_path / "x")], "audio is measured by"),
        ([str(run), *FLAGS, "flow.times=logit_normal"], "flow.times has no effect here"),
        ([str(run), *FLAGS, "flow.reference=infill"], "flow.reference has no effect here"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2, arguments
        assert message in error
        assert error.count("\n") == 1


def test_distances_without_training_clips_are_refused_before_anything_is_sampled():
    index = SimpleNamespace(folder="data/mine", clips=lambda split, domain: 1)
    clips = [Clip("audio", "a", 0, 8, "", "")]
    with pytest.raises(UserError, match="data/mine has fewer than two audio clips for training"):
        evaluation._check_measurable(clips, index, ["mmd", "mel"])
    evaluation._check_measurable(clips, index, ["mel"])
    evaluation._check_measurable([Clip("speech", "a", 0, 8, "", "")], index, ["wer"])  # against the truth's words


def test_speakers_are_compared_with_the_truth_of_the_same_clip():
    wavs = {
        (row, key): Wav(row, Clip("speech", key, 0, 8, "", ""), Path(f"{row}/{key}.wav"))
        for row in ("truth", "sample")
        for key in "ab"
    }
    vectors = {("truth", "a"): [1, 0], ("truth", "b"): [0, 2], ("sample", "a"): [3, 4], ("sample", "b"): [3, 4]}
    found = similarities({wavs[place]: {"vector": vector} for place, vector in vectors.items()})
    assert found == {wavs["sample", "a"]: {"similarity": 0.6}, wavs["sample", "b"]: {"similarity": 0.8}}
    assert similarities({wavs["sample", "a"]: {"vector": [1, 0]}}) == {}


def write_waves(folder: Path, names: tuple[str, ...], rate: int = 16000, loudness: float = 0.1) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in names:
        soundfile.write(folder / f"{name}.wav", loudness * draw.standard_normal(rate), rate)
        (folder / f"{name}.txt").write_text("say twenty two")
    return folder


def test_a_folder_of_recordings_is_measured_beside_the_true_ones(tmp_path, calls, capsys):
    mine, true = write_waves(tmp_path / "mine", ("a", "b", "c")), write_waves(tmp_path / "true", ("a", "b", "c", "d"))
    out = tmp_path / "out"
    main(["evaluate", str(mine), "--domain", "speech", "--reference", str(true), "--out", str(out)])
    results = json.loads((out / "results.json").read_text())
    assert results["rows"].keys() == {"truth", "sample"}
    assert results["rows"]["sample"]["speech"].keys() >= {"wer", "wer_truth", "mos", "similarity"}
    assert not results["rows"]["sample"]["speech"].keys() & {"mmd", "fad", "mel_l1"}
    assert results["rows"]["sample"]["speech"]["wer"]["value"] == 0
    assert {float(row["seconds"]) for row in clips(out)} == {1.0}
    assert (out / "report.html").read_text().count("<audio") == 6
    capsys.readouterr()
    other = write_waves(tmp_path / "other", ("a", "b", "c"), rate=8000)
    few = write_waves(tmp_path / "few", ("a",))
    with pytest.raises(SystemExit):
        main(["evaluate", str(mine), "--domain", "speech", "--out", str(tmp_path / "x"), "metrics.only=[similarity]"])
    assert "similarity needs these: give --reference FOLDER" in capsys.readouterr().err
    for reference, message in (
        (other, "rates of 8000 and 16000 Hz"),
        (few, "2 of 3 recordings have no partner: b.wav, c.wav"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "evaluate",
                    str(mine),
                    "--domain",
                    "speech",
                    "--reference",
                    str(reference),
                    "--out",
                    str(tmp_path / "x"),
                ]
            )
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_an_export_is_evaluated_as_its_checkpoint(run, tmp_path, calls):
    main(["export", str(run), "--out", str(tmp_path / "export")])
    for path, out in ((run, "a"), (tmp_path / "export", "b")):
        main(["evaluate", str(path), "--out", str(tmp_path / out), *FLAGS, "metrics.only=[mel,mmd]"])
    assert contents(tmp_path / "a")["clips.csv"] == contents(tmp_path / "b")["clips.csv"]


def test_a_reference_has_none_of_the_evaluated_clips(run, tmp_path, calls, monkeypatch):
    seen = {}

    def reference(judges, index, domain, vocoder):
        vectors = judged(judges, index, domain, vocoder)
        seen[domain] = len(vectors)
        return vectors

    judged = evaluation._reference
    monkeypatch.setattr(evaluation, "_reference", reference)
    out = tmp_path / "out"
    main(["evaluate", str(run), "--out", str(out), *FLAGS, "metrics.only=[mmd]"])
    evaluated = {clip["mel"] for clip in json.loads((out / "manifest.json").read_text())["clips"]}
    kept = {path.stem for path in (tmp_path / "cache" / "references").rglob("*.json")}
    assert seen == {"speech": 6, "audio": 6}
    assert len(kept) == 12
    assert not kept & evaluated
    assert len(evaluated) == 6


def test_a_reference_clip_that_cannot_be_judged_is_named_and_not_counted(run, tmp_path, calls, monkeypatch):
    vocoded, seen = evaluate._vocoded, []

    def fail_once(sample, vocoder):
        seen.append(sample.key)
        if len(seen) == 1:
            raise RuntimeError("too loud")
        return vocoded(sample, vocoder)

    monkeypatch.setattr(evaluate, "_vocoded", fail_once)
    main(["evaluate", str(run), "--out", str(tmp_path / "out"), *FLAGS, "metrics.only=[mmd]", "--domain", "speech"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["failed"] == {f"reference/{seen[0]}: speech-embedding": "RuntimeError: too loud"}
    assert results["reference_clips"] == {"speech": 5}
