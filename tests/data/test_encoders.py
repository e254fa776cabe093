"""Families of encoders: a small random model on disk, against calling transformers itself on one clip."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agrepa_fast.audio.waves import import_torchaudio
from agrepa_fast.errors import UserError
from agrepa_fast.teachers import load_teacher

from .audio_families import FAMILIES

import_torchaudio()  # before transformers

# Less than a frame of most, two of one length, lengths that end inside a frame, the last beyond the small windows.
LENGTHS = (300, 16000, 9000, 16000, 30011)
WAVES = [(np.random.default_rng(i).standard_normal(n) * 0.1).astype(np.float32) for i, n in enumerate(LENGTHS)]
WAVE = WAVES[2]
WINDOWED = {"qwen2_audio": 16000, "voxtral": 16000, "audioflamingo3": 16000, "audio-spectrogram-transformer": 19200}
# One family per code path: waves, mels (which also has no fp16), a conformer with a mask, a window, and the two whose
# frames are made of patches or of a map. The others, most of which differ in names alone, are drills.
COMMON = ("hubert", "speech_to_text", "parakeet", "qwen2_audio", "audio-spectrogram-transformer", "clap")

# Seconds. The middles of the first frames: AST's 16 windows at 0.0875 s; those of Parakeet at its first 25 ms, those of
# LASR at its first 13 windows, 0.0725 s; SeamlessM4T's 7 windows and 9 of padding, 0.0075 s.
STARTS = {"audio-spectrogram-transformer": 0.0375, "clap": 0.0, "lasr": 0.0525} | dict.fromkeys(
    ("parakeet", "canary"), -0.035
)
END_STARTS = dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), -0.0725)


def params(families) -> list:
    return [pytest.param(name, marks=() if name in COMMON else pytest.mark.drill) for name in families]


@pytest.fixture(scope="module", params=params(FAMILIES))
def saved(request, tmp_path_factory):
    """A family, the folder of its small model, and the model's encoder."""
    folder = tmp_path_factory.mktemp("model")
    family = FAMILIES[request.param]
    return SimpleNamespace(name=request.param, family=family, folder=folder, encoder=family.save(folder))


def teacher_of(saved, layer: int | None, dtype: str = "fp32"):
    return load_teacher(str(saved.folder) if layer is None else f"{saved.folder}@{layer}", dtype=dtype)


def layers_of(saved) -> tuple[int | None, ...]:
    return (None,) if saved.name == "clap" else (None, 2)


def own(saved, wave: np.ndarray, layer: int | None) -> np.ndarray:
    """(frames, dim) of one clip by transformers alone: its extractor as it comes, its encoder, its own mask."""
    from transformers import AutoFeatureExtractor

    extractor = AutoFeatureExtractor.from_pretrained(saved.folder)
    if saved.family.extractor == "GraniteSpeechFeatureExtractor":
        inputs = {"hidden_states": extractor(wave)["input_features"]}
    else:
        options = {"padding": "longest"} if saved.name == "glmasr" else {}  # as its processor does
        inputs = dict(extractor(wave, sampling_rate=extractor.sampling_rate, return_tensors="pt", **options))
    if saved.name == "audioflamingo3":
        inputs = dict(extractor(wave, sampling_rate=16000, return_tensors="pt", return_attention_mask=True))
        inputs["input_features_mask"] = inputs.pop("attention_mask")
    outputs = []
    with torch.inference_mode():
        if layer is None:
            result = saved.encoder(**inputs)
            output = result.last_hidden_state
        else:
            module = saved.encoder.get_submodule(saved.family.layers)[layer - 1]
            # A copy: Granite's encoder adds its CTC output to its middle layer's, in place.
            hook = module.register_forward_hook(lambda module, args, out: outputs.append(_first(out).clone()))
            result = saved.encoder(**inputs)
            hook.remove()
            output = outputs[0]
    frames = output[0].numpy()
    if saved.name == "audio-spectrogram-transformer":  # 2 class tokens, then 12 bands of 12 steps; 128 mel frames
        frames = frames[2:].reshape(12, 12, -1).mean(axis=0)
        return frames[: 1 + ((1 + (len(wave) - 400) // 160) - 16) // 10]
    if saved.name == "clap":  # (dim, 2 frequency rows, 32 time steps of 10 s)
        return frames.mean(axis=1).T[: -(-len(wave) // 15000)]
    if saved.name in WINDOWED:
        return frames[: -(-len(wave) * len(frames) // 16000)]
    mask = getattr(result, "attention_mask", None)
    if mask is None and inputs.get("attention_mask", torch.ones(1, 0)).shape[1] == len(frames):
        mask = inputs["attention_mask"]  # of wav2vec2-bert and seamless: one for each pair of mel frames
    return frames if mask is None else frames[: int(mask.sum())]


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def differs(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference in units of the frames' size."""
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    size = np.sqrt(np.mean(theirs**2))
    assert size > 1e-3
    return float(np.abs(ours - theirs).max() / size)


def test_frames_are_transformers_own(saved):
    for layer in layers_of(saved):
        teacher = teacher_of(saved, layer)
        for wave in (WAVE, WAVE[:8001], WAVE[:8960]):
            assert differs(teacher.frames([wave])[0], own(saved, wave, layer)) < 1e-4, (layer, len(wave))
        assert teacher.rate == pytest.approx(saved.family.end_rate if layer is None else saved.family.layer_rate)
        assert teacher.dim == own(saved, WAVE, layer).shape[1]
        start = (END_STARTS if layer is None else {}).get(saved.name, STARTS.get(saved.name))
        assert teacher.start == teacher.identity.get("start") == start


def middle_frame(before: np.ndarray, after: np.ndarray) -> float:
    """The centre of the change, in frames from the begin of the first; without those that attention spreads."""
    change = ((after - before) ** 2).sum(axis=1)
    change[change < 0.2 * change.max()] = 0
    return float((np.arange(len(change)) + 0.5) @ change / change.sum())


@pytest.mark.parametrize("saved", params(("parakeet", "canary", "lasr", "speech_to_text", "glmasr")), indirect=True)
def test_a_louder_moment_changes_the_frames_of_its_time(saved):
    teacher = teacher_of(saved, 1)
    wave = np.resize(WAVES[1], 2 * teacher.sample_rate)
    quiet, late = teacher.frames([wave])[0], []
    place = (len(quiet) / 2, 0.0) if teacher.start is None else (teacher.rate, teacher.start)  # rate, start
    for middle in range(8000, 24000, 1500):
        louder = wave.copy()
        louder[middle - 80 : middle + 80] *= 10
        time = middle_frame(quiet, teacher.frames([louder])[0]) / place[0] + place[1]
        late.append(time - middle / teacher.sample_rate)
    assert abs(np.mean(late)) < 0.02


def test_frames_do_not_depend_on_the_batch_and_cover_the_clip(saved):
    for layer in layers_of(saved):
        teacher = teacher_of(saved, layer)
        alone = [teacher.frames([wave])[0] for wave in WAVES]
        teacher.room = 10**9  # as on a GPU
        for together, one in zip(teacher.frames(WAVES), alone, strict=True):
            assert differs(together, one) < 1e-4
        for wave, frames in zip(WAVES, alone, strict=True):
            seconds = len(wave) / teacher.sample_rate
            assert 1 <= len(frames) <= int(np.ceil(seconds * teacher.rate))
            assert len(frames) >= (seconds - 0.2) * teacher.rate - 1  # what the last frame reads may be longer than it


def test_lengths_go_together_where_padding_changes_nothing(saved):
    if saved.name not in (*WINDOWED, "clap"):
        assert teacher_of(saved, None).equal_lengths != saved.family.padded


@pytest.mark.parametrize("saved", params(WINDOWED), indirect=True)
def test_long_clips_are_cut_into_windows(saved):
    window = WINDOWED[saved.name]  # up to the first sample of the next window's first frame
    teacher, wave = teacher_of(saved, 2), WAVES[4]
    frames, rest = teacher.frames([wave])[0], teacher.frames([wave[window:]])[0]
    assert differs(frames[-len(rest) :], rest) < 1e-4
    first = teacher.frames([wave[: 20720 if window == 19200 else 16000]])[0]
    assert differs(frames[: -len(rest)], first) < 1e-4


def test_half_precision_is_close_or_refused(saved):
    layer = layers_of(saved)[-1]
    if not saved.family.half:
        with pytest.raises(UserError, match=r"cannot compute in fp16.*data.teacher_precision=fp32"):
            teacher_of(saved, layer, "fp16")
        return
    half, full = teacher_of(saved, layer, "fp16"), teacher_of(saved, layer)
    difference = differs(half.frames([WAVE])[0], full.frames([WAVE])[0])
    assert 1e-6 < difference < 0.03  # computed in half, and no worse than half is
    saved_names = half._encoder.state_dict()
    for name, value in half._encoder.named_buffers():
        if name.endswith("inv_freq") and name not in saved_names:
            assert value.dtype == torch.float32, name  # in half, rotary positions 10 s into a clip are off by a radian
    assert half.identity["sha256"] == full.identity["sha256"]
    assert (half.identity["precision"], full.identity["precision"]) == ("fp16", "fp32")
