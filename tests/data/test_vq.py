"""The vector quantiser over a teacher's frames, and its fit."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast import cli
from agrepa_fast.errors import UserError
from agrepa_fast.files import file_sha256
from agrepa_fast.prepare.fit_tokens import fit_tokens
from agrepa_fast.tokenizers import vq, vq_fit
from agrepa_fast.tokenizers.vq import FrameCodec, VqTokenizer
from agrepa_fast.tokenizers.vq_config import VqFitConfig
from agrepa_fast.tokenizers.vq_fit import FitFrames

pytest.importorskip("vector_quantize_pytorch", reason="pip install 'agrepa_fast[vq]'")
DIM = 8


def melodies(clips: int = 40, seed: int = 0) -> list[np.ndarray]:
    """Frames (S, DIM) fp16 of two slow paths, hence predictable from their neighbours, on an offset as big as they."""
    draw = np.random.default_rng(seed)
    mix, made = np.random.default_rng(9).normal(size=(2, DIM)), []
    for _ in range(clips):
        t = np.arange(draw.integers(40, 200)) / 50 + draw.uniform(0, 100)
        paths = np.stack([np.sin(7 * t), np.cos(4.3 * t)], axis=1)
        made.append((paths @ mix + 3 + 0.05 * draw.normal(size=(len(t), DIM))).astype(np.float16))
    return made


def codec(stride: int = 1) -> FrameCodec:
    """Random, with a codebook of what it encodes."""
    torch.manual_seed(0)
    made = FrameCodec(DIM, 30, stride)
    frames = torch.from_numpy(np.concatenate(melodies())[: 600 * stride]).float()[None]
    made.quantizer._codebook.init_embed_(made.encode(frames).detach())
    return made.eval()


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_clip_gives_the_same_whatever_it_is_padded_with(stride):
    model = codec(stride)
    tokenizer = VqTokenizer(model, {}, {})
    clips = [clip[:length] for clip, length in zip(melodies(3), (36, 25, 8), strict=True)]
    batch = torch.full((3, 36, DIM), 1e3)
    mask = torch.zeros(3, 36, dtype=torch.bool)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = torch.from_numpy(clip)
        mask[row, : len(clip)] = True
    coded = model(batch, mask)
    for row, clip in enumerate(clips):
        ids = tokenizer.encode(clip)
        assert ids.dtype == np.int32
        assert len(ids) == -(-len(clip) // stride)
        assert coded.ids[row, : len(ids)].tolist() == ids.tolist()
        assert (coded.ids[row, len(ids) :] == -1).all()
        torch.testing.assert_close(
            coded.reconstruction[row, : len(clip)], torch.from_numpy(tokenizer.reconstruct(clip)), atol=1e-4, rtol=1e-4
        )
    assert len(set(coded.ids.flatten().tolist())) > 5


def test_padding_counts_in_no_loss_and_no_code():
    """The same windows, alone and beside one that is nothing but padding from its 4th frame on."""
    model = codec().train()
    clip = torch.from_numpy(melodies()[0][:30]).float()[None]
    short = torch.cat((clip, clip))
    short[1, 4:] = 1e3
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, 4:] = False
    alone = codec().train()(clip[:, :4])
    full = codec().train()(clip)
    both = model(short, mask)
    torch.testing.assert_close(both.loss, (full.loss * 30 + alone.loss * 4) / 34)
    book, decay = model.quantizer._codebook, model.quantizer._codebook.decay
    counted = book.cluster_size.sum() - decay * codec().quantizer._codebook.cluster_size.sum()
    torch.testing.assert_close(counted, torch.tensor((1 - decay) * 34), atol=1e-2, rtol=0)


def test_the_encoder_learns_from_the_reconstruction_through_the_codebook():
    model = codec().train()
    model(torch.from_numpy(melodies()[0]).float()[None], commitment=0.0).loss.backward()
    assert model.enter.weight.grad.abs().sum() > 0
    assert model.widen.weight.grad.abs().sum() > 0


def train(config: VqFitConfig, frames: FitFrames, path) -> FrameCodec:
    return vq_fit.fit_codec(frames, config, "cpu", path / "state.safetensors")


CONFIG = VqFitConfig(teacher="none", codes=16, steps=150, batch=16, lr=3e-3)


@pytest.mark.drill
def test_it_keeps_more_of_held_out_frames_than_k_means_with_as_many_codes(tmp_path):
    frames = FitFrames(melodies(), melodies(4, seed=1))
    found = vq_fit.lost_variance(train(CONFIG, frames, tmp_path), frames, CONFIG, "cpu")
    assert found["vq"] < found["kmeans"] < 0.1
    assert found["used"] == 1.0
    assert found["perplexity"] > 10


def test_dead_codes_are_revived(tmp_path):
    """All codes but one are sent where no frame is: after some steps each is used again."""
    frames = FitFrames(melodies(), melodies(4, seed=1))
    model = train(replace(CONFIG, steps=1), frames, tmp_path).train()
    book = model.quantizer._codebook
    book.embed[:, 1:] = 1e3
    book.embed_avg[:, 1:] = 1e3 * 1e-6
    book.cluster_size[:, 1:] = 1e-6
    windows = vq_fit.Windows(frames.train, CONFIG)
    for step in range(3):
        ids = model(*windows.batch(step, count=16)).ids
    assert len(set(ids[ids >= 0].tolist())) == 16


def test_windows_hold_frames_of_one_clip_and_every_frame_is_reached():
    clips = [np.full((length, DIM), number, np.float16) for number, length in enumerate((200, 30, 97))]
    for clip in clips:
        clip[:, 1] = np.arange(len(clip))
    windows = vq_fit.Windows(clips, replace(CONFIG, stride=5))
    frames, mask = windows.batch("test", count=4000)
    assert frames.shape == (4000, 95, DIM)
    seen = {(int(a), int(b)) for a, b in frames[mask][:, :2].tolist()}
    assert seen == {(number, place) for number, clip in enumerate(clips) for place in range(len(clip))}
    of_clip = [{int(a) for a in row[valid][:, 0].tolist()} for row, valid in zip(frames, mask, strict=True)]
    assert all(len(owners) == 1 for owners in of_clip)
    share = np.mean([1 in owners for owners in of_clip])
    assert abs(share - 30 / 327) < 0.02, "clips are drawn by their frames"


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(vq_fit, "_SAVE_EVERY", 4)
    monkeypatch.setattr(vq, "_DEAD_SHARE", 1.0)  # some code is revived in every step
    config = replace(CONFIG, steps=10)
    frames = FitFrames(melodies(), melodies(4, seed=1))
    whole = train(config, frames, tmp_path)
    (tmp_path / "state.safetensors").unlink()

    def killed(path, model, optimizer, step, save=vq_fit._save_state):
        if step == 8:
            raise KeyboardInterrupt
        save(path, model, optimizer, step)

    with monkeypatch.context() as patched:
        patched.setattr(vq_fit, "_save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, frames, tmp_path)
    resumed = train(config, frames, tmp_path)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """20 recordings of gliding tones, one that is silent text, in two folders."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        t = np.arange(16000 + 800 * number) / 16000
        wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * number + 100 * np.sin(6 * t)) * t)
        path = folder / f"speaker{number % 2}" / f"take{number}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, wave.astype(np.float32), 16000)
    (folder / "broken.wav").write_bytes(b"RIFF, but nothing more")
    return folder


def test_tokens_fit_writes_a_tokenizer_and_goes_on_where_it_was_interrupted(
    whisper, corpus, tmp_path, monkeypatch, capsys
):
    from agrepa_fast.teachers.whisper import WhisperTeacher

    arguments = ["tokens", "fit", str(corpus), "--teacher", f"{whisper}@1", "--codes", "24", "--steps", "12"]
    arguments += ["--batch", "4", "--max-frames", "2000", "--out"]
    cli.main([*arguments, str(tmp_path / "whole.safetensors")])
    printed = capsys.readouterr().out
    assert re.search(r"of the variance of \d+ held-out frames \d+\.\d\d% are lost, by k-means with 24 codes", printed)
    assert "broken.wav" in printed

    calls, frames = [], WhisperTeacher.frames

    def dies(self, waves):
        calls.append(len(waves))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return frames(self, waves)

    with monkeypatch.context() as patched:
        patched.setattr(WhisperTeacher, "frames", dies)
        with pytest.raises(SystemExit, match="130"):
            cli.main([*arguments, str(tmp_path / "again.safetensors")])
    with monkeypatch.context() as patched:
        patched.setattr(WhisperTeacher, "frames", lambda self, waves: calls.append(len(waves)) or frames(self, waves))
        cli.main([*arguments, str(tmp_path / "again.safetensors")])
    assert calls in ([16, 4, 4], [15, 5, 5]), "the first 16 recordings went through the teacher twice"
    assert file_sha256(tmp_path / "again.safetensors") == file_sha256(tmp_path / "whole.safetensors")
    assert not (tmp_path / "again.safetensors.fit").exists()

    tokenizer = VqTokenizer.load(tmp_path / "whole.safetensors")
    about = tokenizer.about
    assert (about["codes"], about["stride"], about["rate"], about["dim"]) == (24, 1, 50.0, 32)
    assert about["teacher"]["spec"] == f"{whisper}@1"
    assert re.fullmatch("[0-9a-f]{64}", about["teacher"]["sha256"])
    ids = tokenizer.encode(np.random.default_rng(0).normal(size=(50, 32)).astype(np.float16))
    assert ids.shape == (50,)
    assert 0 <= ids.min() <= ids.max() < 24

    before = file_sha256(tmp_path / "whole.safetensors")
    cli.main([*arguments, str(tmp_path / "whole.safetensors")])
    assert "nothing to do" in capsys.readouterr().out
    assert file_sha256(tmp_path / "whole.safetensors") == before
    with pytest.raises(UserError, match=r"whole\.safetensors was fitted on other recordings, or with other settings"):
        fit_tokens(corpus, VqFitConfig(teacher=f"{whisper}@1", codes=20, steps=12), tmp_path / "whole.safetensors")


def test_refusals_name_the_thing_and_the_remedy(whisper, corpus, tmp_path):
    with pytest.raises(UserError, match=r"--codes=5000: .* gives only \d+ teacher frames .* lower --codes"):
        fit_tokens(corpus, VqFitConfig(teacher=str(whisper), codes=5000), tmp_path / "vq.safetensors")
    with pytest.raises(UserError, match=r"vq:.*none\.safetensors: no such file: fit one with `agrepa tokens fit"):
        VqTokenizer.load(tmp_path / "none.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors holds no vector quantiser"):
        VqTokenizer.load(tmp_path / "other.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"json": json.dumps({"format": "agrepa-vq-0"})})
    with pytest.raises(UserError, match=r"x\.safetensors holds no vector quantiser"):
        VqTokenizer.load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"--stride=9: must be from 1 to 8"):
        VqFitConfig(teacher="x", stride=9)


def test_the_rate_warms_up_and_decays_and_gradients_are_clipped(tmp_path, monkeypatch):
    rates = [vq_fit._schedule(step, 200) for step in range(200)]
    assert rates[:20] == pytest.approx(np.arange(1, 21) / 20)
    assert rates[20] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    steps = []

    class Adam(torch.optim.Adam):
        def step(self):
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            steps.append((self.param_groups[0]["lr"], float(torch.stack(norms).norm())))
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    clips = melodies()
    clips[0][:, 0] = 6e4  # an outlier, as some encoders have: without the bound the first steps run away
    train(replace(CONFIG, steps=20), FitFrames(clips, melodies(4, seed=1)), tmp_path)
    assert [rate for rate, _ in steps] == pytest.approx([CONFIG.lr * vq_fit._schedule(s, 20) for s in range(20)])
    assert max(norm for _, norm in steps) <= 1 + 1e-4
    assert max(norm for _, norm in steps) > 0.9, "something is clipped here"
