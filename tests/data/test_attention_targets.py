"""data.teacher_attention: queries and keys of the teacher, from its own maps to shards and batches."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agrepa_fast.alignment.registry import OBJECTIVES, check_shards
from agrepa_fast.config_file import load_config
from agrepa_fast.corpora.folder import folder_source
from agrepa_fast.data.batch import pack
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.verifying import verify_folder
from agrepa_fast.errors import UserError
from agrepa_fast.prepare.decode import cut_wave
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.prepare.sidecars import add_teacher
from agrepa_fast.prepare.targets import resample_frames
from agrepa_fast.teachers import load_teacher

from .audio_families import FAMILIES
from .test_prepare import read_all, settings, write_corpus

RATE = 16000
FRAMES = ("data.shard_clips=4", "data.teacher_rate=12.5")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def plain(whisper, corpus, tmp_path_factory):
    """Shards with the teacher's frames alone."""
    return prepare_folder(settings(whisper, *FRAMES), corpus, "speech", tmp_path_factory.mktemp("plain") / "shards")


@pytest.mark.parametrize(("layer", "told"), [(None, (1, 2)), (1, (1,))])
def test_products_of_whispers_queries_and_keys_are_its_attention(whisper, layer, told):
    """Against the maps that transformers' own encoder returns; the frames stay as they are, in a batch, too."""
    from transformers import WhisperModel

    eager = WhisperModel.from_pretrained(whisper, attn_implementation="eager").encoder.eval()
    teacher = load_teacher(str(whisper) if layer is None else f"{whisper}@{layer}")
    shape = teacher.attention_shape(len(told), 30)
    assert shape == (len(told), 2, 2, 16)
    draw = np.random.default_rng(1)
    wave = draw.standard_normal(30 * RATE).astype(np.float32)
    with torch.inference_mode():
        maps = eager(teacher._log_mel(wave)[None], output_attentions=True).attentions
    (found,) = teacher.frames_with_attention([wave], len(told))
    np.testing.assert_array_equal(found[:, : teacher.dim], teacher.frames([wave])[0])
    of_frames = torch.from_numpy(found[:, teacher.dim :]).unflatten(-1, shape)
    for number, of_layer in zip(told, of_frames.unbind(1), strict=True):
        q, k = of_layer.permute(1, 2, 0, 3)
        torch.testing.assert_close((q @ k.mT).softmax(-1), maps[number - 1][0], atol=1e-5, rtol=1e-3)
    waves = [draw.standard_normal(samples).astype(np.float32) for samples in (3200, 90, 7777)]
    alone = [teacher.frames_with_attention([wave], 1)[0] for wave in waves]
    teacher.room = 10**9  # one padded batch, as on a GPU
    for together, one in zip(teacher.frames_with_attention(waves, 1), alone, strict=True):
        np.testing.assert_allclose(together, one, atol=1e-5)


def test_attention_that_cannot_be_told_is_refused(whisper, tmp_path):
    teacher = load_teacher(f"{whisper}@1")
    with pytest.raises(UserError, match=r"data\.teacher_attention=2: teacher .*@1' runs 1 layers: set at most 1"):
        teacher.attention_shape(2, 10)
    with pytest.raises(UserError, match=r"attends over 30 s, and data\.max_seconds is 40: set data\.max_seconds=30"):
        teacher.attention_shape(1, 40.0)
    FAMILIES["hubert"].save(tmp_path)
    with pytest.raises(UserError, match=r"cannot tell its queries and keys: choose a Whisper, or set data\.teacher"):
        load_teacher(str(tmp_path)).attention_shape(1, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("data.teacher_attention=1",), r"needs the teacher's frames: set data\.teacher_rate=12\.5"),
        (("data.teacher_attention=0", "data.teacher_rate=12.5"), "teacher_attention"),
    ],
)
def test_settings_that_are_wrong(values, message):
    with pytest.raises(UserError, match=message):
        load_config("demo", values)


@pytest.mark.parametrize("setting", ["data.teacher_rate=25", "data.teacher_attention=1"])
def test_a_run_that_asks_for_other_frames_is_refused(setting, whisper, plain):
    """Without a word of them it takes those that are there."""
    path = f"data.path={plain.folder}"
    assert matching_index(settings(whisper, path, FRAMES[0]).data).teacher("speech").rate == 12.5
    name, _, value = setting.partition("=")
    given = float(value) if "rate" in name else int(value)
    with pytest.raises(UserError, match=rf"was prepared with {name}=\S+, the run has {given}: set {name}="):
        matching_index(settings(whisper, path, *FRAMES, setting).data)


def test_queries_and_keys_are_pooled_as_the_frames_that_they_belong_to(whisper, corpus, plain, tmp_path):
    index = prepare_folder(settings(whisper, *FRAMES, "data.teacher_attention=2"), corpus, "speech", tmp_path / "both")
    teacher = load_teacher(str(whisper))
    assert list(index.content["domains"]["speech"]["teachers"]) == [f"{teacher.name}_12p5hz_qk2"]
    assert index.teacher("speech").attention == (2, 2, 2, 16)
    np.testing.assert_array_equal(index.teacher("speech").mean, plain.teacher("speech").mean)
    frames = {clip.key: clip for split in read_all(plain).values() for clip in split}
    sources = {r.name: r for r in folder_source(corpus, "speech").recordings()}
    for clips in read_all(index).values():
        for clip in clips:
            assert frames[clip.key].attention is None
            np.testing.assert_array_equal(clip.teacher, frames[clip.key].teacher)
            np.testing.assert_array_equal(clip.tokens, frames[clip.key].tokens)
            assert clip.attention.shape == (len(clip.teacher), 2, 2, 2, 16)
            assert clip.attention.dtype == np.float16
            wave = cut_wave(sources[clip.key], settings(whisper).data, teacher.sample_rate)
            (whole,) = teacher.frames_with_attention([wave], 2)
            wanted = resample_frames(whole[:, teacher.dim :], len(clip.teacher)).reshape(clip.attention.shape)
            np.testing.assert_allclose(clip.attention, wanted, atol=2e-3)
    train = read_all(index)["train"][:2]
    batch = pack(train, (0, 1), index, teacher_frames=0, attention=True).unpack()
    values, counts = batch.teacher_frames["speech"]
    assert batch.attention["speech"].shape == (*values.shape[:2], 2, 2, 2, 16)
    for row, clip in enumerate(train):
        np.testing.assert_array_equal(batch.attention["speech"][row, : counts[row]].numpy(), clip.attention)
        assert not batch.attention["speech"][row, counts[row] :].any()
    assert not pack(train, (0, 1), index, teacher_frames=0).unpack().attention
    verify_folder(index.folder)
    with pytest.raises(UserError, match=r"data\.teacher_attention=2, not None: choose another --out"):
        prepare_folder(settings(whisper, *FRAMES), corpus, "speech", index.folder)


def test_attention_is_added_to_shards_that_have_none(whisper, corpus, plain, tmp_path):
    """The frames and attention that are read then are those that a preparation with the setting would have written."""
    out, sources = tmp_path / "shards", lambda: [folder_source(corpus, "speech")]
    out.mkdir()
    for path in plain.folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"data\.teacher_attention=2: teacher .* runs 1 layers: set at most 1"):
        add_teacher(settings(whisper, *FRAMES, "data.teacher_attention=2"), sources, out, f"{whisper}@1")
    given = *FRAMES, "data.teacher_attention=1"
    add_teacher(settings(whisper, *given), sources, out, f"{whisper}@1")
    add_teacher(settings(whisper, *FRAMES), sources, out, f"{whisper}@1")
    config = settings(whisper, *given, f"data.speech_teacher={whisper}@1")
    alone = prepare_folder(config, corpus, "speech", tmp_path / "alone")
    chosen = matching_index(replace(config.data, path=str(out)))
    assert chosen.teacher("speech").name == alone.teacher("speech").name
    np.testing.assert_array_equal(chosen.teacher("speech").mean, alone.teacher("speech").mean)
    expected = {clip.key: clip for split in read_all(alone).values() for clip in split}
    for clips in read_all(chosen).values():
        for clip in clips:
            np.testing.assert_array_equal(clip.attention, expected[clip.key].attention)
            np.testing.assert_array_equal(clip.teacher, expected[clip.key].teacher)
    without = matching_index(replace(config.data, path=str(out), teacher_attention=None))
    assert without.teacher("speech").attention is None
    align = load_config("demo", ["align.objective=haste"]).align
    check_shards(align, OBJECTIVES["haste"](), chosen)
    with pytest.raises(UserError, match=r"needs the teacher's queries and keys, .* has frames of speech without"):
        check_shards(align, OBJECTIVES["haste"](), without)
