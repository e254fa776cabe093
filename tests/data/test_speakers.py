"""Vectors of speakers' voices, by an ONNX file of CAM++'s interface: no package has the real one."""

import json
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from agrepa_fast.audio.waves import decode, resample
from agrepa_fast.checkpoints.shard_facts import shard_hash
from agrepa_fast.corpora.folder import folder_source
from agrepa_fast.data.batch import collate
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.reading import fixed_clips
from agrepa_fast.data.verifying import verify_folder
from agrepa_fast.errors import UserError
from agrepa_fast.prepare import pipeline
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.prepare.sidecars import add_speaker, add_teacher
from agrepa_fast.ranks import ALONE
from agrepa_fast.teachers.campplus import CampPlus
from agrepa_fast.torchaudio_import import import_torchaudio

from .test_prepare import contents, read_all, settings, tone, write_corpus
from .test_prepare_ranks import run_threads

onnx = pytest.importorskip("onnx", reason="pip install 'agrepa_fast[s3]'")
pytest.importorskip("onnxruntime", reason="pip install 'agrepa_fast[speaker]'")

DIM = 192
WEIGHT = np.random.default_rng(0).normal(size=(80, DIM)).astype(np.float32) / 9


def write_model(path, weight=WEIGHT):
    """mels (1, frames, 80) -> (1, 192): the mean over time of tanh(mels W)."""
    nodes = [
        onnx.helper.make_node("MatMul", ["input", "weight"], ["product"]),
        onnx.helper.make_node("Tanh", ["product"], ["bounded"]),
        onnx.helper.make_node("ReduceMean", ["bounded"], ["output"], axes=[1], keepdims=0),
    ]
    given = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, "frames", len(weight)])
    made = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, weight.shape[1]])
    graph = onnx.helper.make_graph(nodes, "voice", [given], [made], [onnx.numpy_helper.from_array(weight, "weight")])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("voice") / "campplus.onnx")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 12)


def expected(wave):
    """The vector of a wave at 16 kHz, from CosyVoice's features: 80 kaldi bins without their mean over time."""
    import_torchaudio()
    from torchaudio.compliance.kaldi import fbank

    mels = fbank(torch.from_numpy(wave)[None], num_mel_bins=80, dither=0, sample_frequency=16000).numpy()
    assert mels.shape == (1 + (len(wave) - 400) // 160, 80)
    return np.tanh((mels - mels.mean(0)) @ WEIGHT).mean(0)


def test_a_vector_is_the_models_of_cosyvoices_features(model):
    encoder, wave = CampPlus(f"campplus:{model}"), tone(1.3, 16000, 3)
    vector = encoder.vector(wave)
    assert (encoder.dim, vector.shape, vector.dtype) == (DIM, (DIM,), np.float32)
    np.testing.assert_allclose(vector, expected(wave), atol=1e-5)
    assert np.abs(vector - expected(tone(1.3, 16000, 4))).max() > 0.01
    with pytest.raises(ValueError, match="shorter than a window"):
        encoder.vector(wave[:399])


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_clip_has_the_vector_of_its_wave(model, corpus, whisper, tmp_path, ranks):
    config, out = settings(whisper, f"data.speaker=campplus:{model}"), tmp_path / "out"
    index = run_threads(ranks, lambda ranks: prepare_folder(config, corpus, "speech", out, ranks))[0]
    clips = [clip for of_split in read_all(index).values() for clip in of_split]
    assert index.speaker_dim == DIM
    assert len(clips) == 12
    for clip in clips:
        wave, rate = decode(str(corpus / clip.source), clip.source, 0.0, 2.2)
        np.testing.assert_allclose(clip.speaker, expected(resample(wave, rate, 16000)[:35200]), atol=2e-3)
    batch = collate(clips[:3], (0, 1, 2), index)
    assert torch.equal(batch.condition.speaker, torch.from_numpy(np.stack([clip.speaker for clip in clips[:3]])))
    alone = prepare_folder(config, corpus, "speech", tmp_path / "alone")
    assert contents(alone.folder) == contents(out)


def test_shards_say_that_they_have_vectors(model, corpus, whisper, tmp_path):
    mine = shutil.copy(model, tmp_path / "mine.onnx")
    config = settings(whisper, f"data.speaker=campplus:{mine}", f"data.path={tmp_path}/out")
    prepare_folder(config, corpus, "speech", tmp_path / "out")
    assert fixed_clips(matching_index(config.data), "train", "speech", 1)[0].speaker.shape == (DIM,)
    with pytest.raises(UserError, match=r"was prepared with data\.speaker=campplus:\S+, the run has None: set data"):
        matching_index(settings(whisper, f"data.path={tmp_path}/out").data)
    write_model(mine, WEIGHT[:, :7])
    with pytest.raises(UserError, match=r"was prepared with another \S+mine\.onnx, which has changed since"):
        prepare_folder(config, corpus, "audio", tmp_path / "out")


def test_vectors_are_added_to_shards_that_stay_as_they_are(model, corpus, whisper, tmp_path, capsys):
    spec, out = f"campplus:{model}", tmp_path / "out"
    with_them = read_all(prepare_folder(settings(whisper, f"data.speaker={spec}"), corpus, "speech", tmp_path / "new"))
    config = settings(whisper, f"data.path={out}")
    before = contents(prepare_folder(config, corpus, "speech", out).folder)
    folders = {"speech": corpus, "audio": tmp_path / "sounds"}
    shutil.copytree(corpus, folders["audio"] / "other")
    prepare_folder(config, folders["audio"], "audio", out)

    def add(domain, ranks=ALONE, spec=spec):
        return add_speaker(config, lambda: [folder_source(folders[domain], domain)], out, spec, ranks)

    speech = run_threads(2, lambda ranks: add("speech", ranks))[0]
    assert speech.speaker_dim is None  # audio has none: runs go on without
    assert matching_index(config.data).speaker_dim is None
    both = add("audio")
    assert before.keys() - {"index.json", "skipped.csv"} <= contents(out).keys()
    assert all(contents(out)[name] == content for name, content in before.items() if name.startswith(("train", "val")))
    added = read_all(both)
    for split, clips in with_them.items():
        assert [clip.key for clip in added[split]] == [clip.key for clip in clips]
        assert all(np.array_equal(a.speaker, b.speaker) for a, b in zip(added[split], clips, strict=True))
    verify_folder(out)
    config = settings(whisper, f"data.path={out}", f"data.speaker={spec}")
    assert matching_index(config.data).speaker_dim == DIM
    with pytest.raises(UserError, match=r"was prepared with data\.speaker=campplus:\S+, the run has None"):
        matching_index(settings(whisper, f"data.path={out}").data)

    hashed = shard_hash(matching_index(config.data))
    assert "nothing to do" not in capsys.readouterr().out
    add("speech")
    assert "has speaker vectors of campplus:" in capsys.readouterr().out
    other = write_model(tmp_path / "other.onnx", WEIGHT[:, :7])
    with pytest.raises(UserError, match=r"was prepared with data\.speaker=campplus:\S+, not campplus:\S+other"):
        add("speech", spec=f"campplus:{other}")
    with pytest.raises(UserError, match=r"another .*campplus\.onnx, which has changed|another \S+other\.onnx"):
        add("speech", spec=f"campplus:{shutil.copy(other, model)}")
    sidecar = next(out.glob("train-speech-0000.speaker.tar"))
    sidecar.write_bytes(sidecar.read_bytes()[:-512] + bytes(range(256)) * 2)
    with pytest.raises(UserError, match="has 1 fault"):
        verify_folder(out)
    assert f"{sidecar} has SHA-256" in capsys.readouterr().err
    content = json.loads((out / "index.json").read_text())
    content["domains"]["speech"]["speaker"]["files"]["train-speech-0000.tar"]["sha256"] = "0"
    (out / "index.json").write_text(json.dumps(content))
    assert shard_hash(matching_index(config.data)) != hashed  # a run on other vectors is another run


def test_a_preparation_goes_on_after_vectors_were_added(model, corpus, whisper, tmp_path, monkeypatch, capsys):
    config, spec, out = settings(whisper), f"campplus:{model}", tmp_path / "out"
    shutil.copytree(corpus, tmp_path / "sounds/other")
    prepare_folder(config, corpus, "speech", out)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.ShardStage, "run", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(config, tmp_path / "sounds", "audio", out)
    assert add_speaker(config, lambda: [folder_source(corpus, "speech")], out, spec).speaker_dim == DIM
    prepare_folder(config, corpus, "speech", out)
    add_teacher(config, lambda: [folder_source(corpus, "speech")], out, f"{whisper}@1")
    assert "nothing to do" in capsys.readouterr().out
    both = prepare_folder(config, tmp_path / "sounds", "audio", out)
    assert "12 were there" in capsys.readouterr().out
    assert (both.domains, both.speaker_dim) == (("speech", "audio"), None)  # as long as audio has none
    verify_folder(out)
    both = add_speaker(config, lambda: [folder_source(tmp_path / "sounds", "audio")], out, spec)
    assert both.speaker_dim == DIM
    verify_folder(out)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("campplus:none.onnx", r"none\.onnx cannot be read: No such file"),
        ("campplus:text.onnx", r"text\.onnx is no ONNX file that onnxruntime reads"),
        ("campplus:narrow.onnx", r"campplus:narrow\.onnx is no CAM\+\+: it takes no mels \(1, frames, 80\)"),
        ("ecapa:x", "data.speaker='ecapa:x': null or campplus:FILE.onnx"),
    ],
)
def test_what_is_no_model_is_refused(spec, message, corpus, whisper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.onnx").write_text("text")
    write_model(tmp_path / "narrow.onnx", WEIGHT[:40])
    with pytest.raises(UserError, match=message) as refusal:
        prepare_folder(settings(whisper, f"data.speaker={spec}"), corpus, "speech", tmp_path / "out")
    assert "\n" not in str(refusal.value)


def test_a_missing_onnxruntime_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime .*pip install 'agrepa_fast\[speaker\]'"):
        CampPlus(f"campplus:{model}")
