"""The wavs of an evaluation: the same on any number of ranks and after an interruption, and of the right clips."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast import load_model
from agrepa_fast.audio.vocoder import Vocoder
from agrepa_fast.audio.waves import decode, wave_fault
from agrepa_fast.data.index import load_index
from agrepa_fast.data.reading import fixed_clips
from agrepa_fast.errors import UserError
from agrepa_fast.evaluation import manifest, synthesis
from agrepa_fast.evaluation.manifest import Clip, clips_of, evaluated_samples, manifest_hash
from agrepa_fast.evaluation.results import write_manifest
from agrepa_fast.evaluation.synthesis import Synthesis, prefix_frames
from agrepa_fast.metrics_config import MetricsConfig
from agrepa_fast.models.audio_dit.conditioning import valid_frames
from agrepa_fast.ranks import ALONE, Ranks
from agrepa_fast.reporting.evaluation import _mel_distances

from ..data.test_prepare_ranks import run_threads


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))


class Made:
    """The parts of an evaluation of a small run."""

    def __init__(self, run, folder, draws: int = 1):
        self.model, self.config = load_model(run)
        self.index = load_index(self.config.data.path)
        self.samples = evaluated_samples(self.index, MetricsConfig(clips=4), self.index.domains)
        self.clips = clips_of(self.samples, draws)
        self.folder = folder

    def run(self, ranks: Ranks = ALONE, samples=None, clips=None) -> Synthesis:
        def hum(mel: torch.Tensor) -> torch.Tensor:
            """A vocoder that keeps the mel: its frames, one after the other."""
            return (mel[0] / 20).flatten()[None]

        vocoder = Vocoder("hum", self.config.data, hum)
        made = Synthesis(self.model, self.index, self.config.flow, vocoder, self.folder, torch.device("cpu"))
        made.run(clips or self.clips, samples or self.samples, ranks, lambda count: None)
        return made

    def contents(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*.*") if p.is_file()}


def test_clips_of_two_domains_with_one_name_are_refused(monkeypatch):
    """Their wavs would have one name: recordings of two folders may have the same paths inside them."""
    index = SimpleNamespace(folder="data/mine", clips=lambda split, domain: 1)
    monkeypatch.setattr(manifest, "fixed_clips", lambda *_: [SimpleNamespace(domain=_[2], key="001-8177")])
    with pytest.raises(UserError, match=r"clip 001-8177 of speech and one of audio: evaluate the domains apart"):
        evaluated_samples(index, MetricsConfig(), ("speech", "audio"))
    assert len(evaluated_samples(index, MetricsConfig(), ("audio",))) == 1


def test_a_domain_without_validation_clips_is_refused(monkeypatch):
    monkeypatch.setattr(manifest, "fixed_clips", lambda *_: [SimpleNamespace(domain=_[2], key="1")])
    index = SimpleNamespace(folder="data/mine", clips=lambda split, domain: int(domain == "speech"))
    with pytest.raises(UserError, match=r"data/mine has no audio clips for validation: .* a larger data.val_share"):
        evaluated_samples(index, MetricsConfig(), ("speech", "audio"))
    assert len(evaluated_samples(index, MetricsConfig(), ("speech",))) == 1
    with pytest.raises(UserError, match=r"1 audio clips of the val split are wanted, 0 are there: prepare more \w+$"):
        fixed_clips(index, "val", "audio", 0)
    with pytest.raises(UserError, match=r"2 speech clips .*, 1 are there: .* lower metrics.clips$"):
        fixed_clips(index, "val", "speech", 2, "metrics.clips")


def test_every_row_has_its_wavs_and_truth_is_the_truth(baseline, tmp_path):
    made = Made(baseline, tmp_path / "wavs", draws=2)
    wavs = made.run().wavs(made.clips)
    assert {(w.row, w.clip.draw) for w in wavs} == {("truth", 0), ("sample", 0), ("sample", 1), ("codes", 0)}
    assert len(wavs) == 8 * 4
    assert all(wav.path.is_file() for wav in wavs)
    of_key = {sample.key: sample for sample in made.samples}
    for wav in wavs:
        wave, rate = soundfile.read(wav.path)
        sample = of_key[wav.clip.key]
        assert rate == 16000
        assert len(wave) == sample.mel.size
        if wav.row == "truth":
            np.testing.assert_allclose(wave, sample.mel.astype(float).clip(-20, 20).T.ravel() / 20, atol=1e-4)
            assert not wav.path.with_suffix(".json").exists()
        else:
            assert json.loads(wav.path.with_suffix(".json").read_text())["mel_l1"] > 0
    first, second = (next(w for w in wavs if w.row == "sample" and w.clip.draw == draw) for draw in (0, 1))
    assert first.path.read_bytes() != second.path.read_bytes()


def test_the_wavs_are_the_same_on_two_ranks_and_after_an_interruption(baseline, tmp_path, monkeypatch):
    monkeypatch.setattr(
        synthesis, "batches_by_length", lambda clips: [list(clips)[n : n + 3] for n in range(0, len(clips), 3)]
    )
    one, two, resumed = (Made(baseline, tmp_path / name) for name in ("one", "two", "resumed"))
    one.run()
    run_threads(2, lambda ranks: two.run(ranks))
    assert two.contents() == one.contents()
    resumed.run(clips=resumed.clips[:3])
    dropped = sorted((tmp_path / "resumed").rglob("*.wav"))[1]
    dropped.unlink()
    kept = sorted((tmp_path / "resumed").rglob("*.wav"))[0]
    resumed.run()
    assert kept.is_file()
    assert resumed.contents() == one.contents()


def test_files_that_a_crash_of_the_machine_has_emptied_are_made_again(baseline, tmp_path):
    made = Made(baseline, tmp_path / "wavs")
    made.run()
    whole = made.contents()
    of_row = {row: sorted((tmp_path / "wavs" / row).iterdir()) for row in ("truth", "sample", "codes")}
    emptied = [of_row["truth"][0], of_row["sample"][0], of_row["sample"][3], *(tmp_path / "cache" / "wavs").iterdir()]
    for path in emptied:
        path.write_bytes(b"")
    of_row["codes"][2].unlink()  # a .json
    assert {path.suffix for path in (*emptied, of_row["codes"][2])} == {".wav", ".json"}
    made.run()
    assert made.contents() == whole


def test_a_model_that_diverged_is_named_and_never_judged(baseline, tmp_path, monkeypatch):
    made, sample = Made(baseline, tmp_path / "wavs"), synthesis.sample
    monkeypatch.setattr(synthesis, "sample", lambda *arguments: sample(*arguments) * float("nan"))
    wavs, failed = made.run().wavs(made.clips), {}
    assert {wav.row for wav in _mel_distances(wavs, failed)} == {"codes"}
    samples = [wav.path for wav in wavs if wav.row == "sample"]
    assert failed.keys() == {f"sample/{path.name}: mel" for path in samples}
    assert {wave_fault(decode(path, path.name)[0]) for path in samples} == {"not finite"}


def test_noise_belongs_to_the_clip_and_not_to_its_place(baseline, tmp_path):
    made, turned = Made(baseline, tmp_path / "made"), Made(baseline, tmp_path / "turned")
    made.run()
    turned.run(clips=turned.clips[::-1])
    for name in made.contents():
        if name.endswith(".wav"):
            a, b = (soundfile.read(folder / name)[0] for folder in (tmp_path / "made", tmp_path / "turned"))
            np.testing.assert_allclose(a, b, atol=2e-4, err_msg=name)


def test_a_model_that_gives_the_truth_has_no_distance_from_it(baseline, tmp_path, monkeypatch):
    made = Made(baseline, tmp_path / "wavs")
    of_length = {}

    def oracle(model, condition, keys, flow):
        rows = [of_length[int(key)] for key in keys]
        mels = torch.zeros(len(rows), condition.reference.shape[1], made.index.n_mels)
        for row, sample in enumerate(rows):
            mels[row, : sample.frames] = (
                torch.from_numpy(sample.mel).float() - made.index.mel_mean
            ) / made.index.mel_std
        assert torch.equal(
            condition.reference.abs().sum(2) > 0, valid_frames(prefix_frames(condition.lengths, flow), mels.shape[1])
        )
        return mels

    of_length = {clip.noise_key: sample for clip, sample in zip(made.clips, made.samples, strict=True)}
    monkeypatch.setattr(synthesis, "sample", oracle)
    for wav in made.run().wavs(made.clips):
        if wav.row == "sample":
            assert json.loads(wav.path.with_suffix(".json").read_text())["mel_l1"] < 1e-5


@pytest.mark.parametrize(
    "change",
    [{"text": "other"}, {"draw": 1}, {"frames": 9}, {"mel": "ff"}, {"key": "z"}, {"domain": "audio"}],
    ids=lambda change: next(iter(change)),
)
def test_the_manifest_changes_with_the_content_of_a_clip_and_not_with_the_order(change):
    clips = [Clip("speech", key, 0, 8, "a text", "00") for key in "abc"]
    assert manifest_hash(clips) == manifest_hash(clips[::-1])
    assert manifest_hash(clips) != manifest_hash([*clips[:2], replace(clips[2], **change)])


def test_another_evaluation_in_the_same_folder_is_refused(tmp_path):
    clips, file = [Clip("speech", key, 0, 8, "", "00") for key in "abc"], tmp_path / "manifest.json"
    made = {"weights": "1", "flow": {"steps": 4}}
    assert write_manifest(clips, made, file) == write_manifest(clips[::-1], made, file) == manifest_hash(clips)
    with pytest.raises(UserError, match=r"of other clips .*choose another --out"):
        write_manifest(clips[1:], made, file)
    with pytest.raises(UserError, match=r"of other samples \(weights 1 and 2\): choose another --out"):
        write_manifest(clips, made | {"weights": "2"}, file)
    for content in ("", "[]", "null", "{}", "[" * 100_000, '{"manifest": 7, "made": []}'):
        file.write_text(content)
        with pytest.raises(UserError, match=r"choose another --out"):
            write_manifest(clips, made, file)


def test_texts_of_cut_clips_are_left_out(baseline, tmp_path):
    samples = Made(baseline, tmp_path).samples
    cut = [replace(samples[0], cut=True, text="the whole"), replace(samples[1], cut=False, text="its own")]
    assert [clip.text for clip in clips_of(cut, 1)] == ["", "its own"]
