"""Token topology B, a second token beside every one: preparation, shards, model, training, probes, samples."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from agrepa_fast import cli
from agrepa_fast.attribution.foga import foga
from agrepa_fast.config import DOMAINS, DataConfig, ModelConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.batch import collate
from agrepa_fast.data.index import load_index, write_index
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.reading import fixed_clips, read_shard
from agrepa_fast.errors import UserError
from agrepa_fast.models.audio_dit.conditioning import TokenCondition
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.prepare.fit_tokens import fit_tokens
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.tokenizers.base import tokens_of_frames
from agrepa_fast.tokenizers.vq import VqTokenizer
from agrepa_fast.tokenizers.vq_config import VqFitConfig
from agrepa_fast.training.builder import fit_to_shards

from ..ranks import run_training
from ..testing import EXTRA_CODES, small_batch, small_model, write_small_shards

EXTRA = 20


def pairs(seed: int = 5):
    """A small batch with second tokens."""
    mel, condition = small_batch()
    draw = torch.Generator().manual_seed(seed)
    extra = torch.randint(0, EXTRA, condition.tokens.shape, generator=draw)
    return mel, replace(condition, extra_tokens=extra)


def test_it_starts_as_topology_a():
    one, two = small_model(), small_model(extra_vocab=EXTRA)
    missing = two.load_state_dict(one.state_dict() | {"tokens.project.weight": two.tokens.project.weight}, strict=False)
    assert missing.missing_keys == ["tokens.extra_embedding.weight"]
    assert two.tokens.project.weight.shape == (24, 48)
    mel, condition = pairs()
    t = torch.full((3,), 0.4)
    torch.testing.assert_close(two(mel, t, condition).v, one(mel, t, condition).v)


def test_topology_a_has_the_parameters_it_had():
    names = {name for name, _ in small_model().named_parameters() if name.startswith("tokens.")}
    assert names == {"tokens.embedding.weight", "tokens.project.weight"}
    mel, condition = pairs()
    v = small_model()(mel, torch.full((3,), 0.4), condition).v
    assert torch.equal(v, small_model()(mel, torch.full((3,), 0.4), replace(condition, extra_tokens=None)).v)


def test_pairs_are_the_interleaved_tokens_embedded_concatenated_and_projected():
    """t1, b1, t2, b2, … as the paper writes it: even places from the first table, odd ones from the second."""
    torch.manual_seed(0)
    module = TokenCondition(30, 16, extra_vocab=EXTRA)
    torch.nn.init.normal_(module.project.weight)
    _, condition = pairs()
    condition = condition[:1]
    interleaved = torch.stack((condition.tokens, condition.extra_tokens), dim=-1).flatten(1)
    tables = (module.embedding, module.extra_embedding)
    embedded = torch.stack([tables[place % 2](interleaved[:, place]) for place in range(interleaved.shape[1])], dim=1)
    projected = module.project(embedded.unflatten(1, (-1, 2)).flatten(2))
    same_length = replace(condition, lengths=condition.token_lengths)
    frames = int(condition.token_lengths[0])
    wanted = torch.nn.functional.normalize(projected[:, :frames], dim=-1)
    torch.testing.assert_close(module(same_length, frames), wanted)


def test_both_tables_learn_and_drops_and_padding_reach_neither():
    model = small_model(extra_vocab=EXTRA)
    torch.nn.init.normal_(model.tokens.project.weight, std=0.2)
    mel, condition = pairs()
    condition = replace(condition, keep_tokens=torch.tensor([True, False, True]))
    model(mel, torch.full((3,), 0.4), condition).v.square().sum().backward()
    used = {int(i) for row in (0, 2) for i in condition.extra_tokens[row, : condition.token_lengths[row]]}
    gradient = model.tokens.extra_embedding.weight.grad
    assert {i for i in range(EXTRA) if gradient[i].any()} == used
    assert len(used) < EXTRA
    assert model.tokens.project.weight.grad[:, 24:].any()


def test_the_second_table_gets_a_gradient_soon_after_the_start():
    model = small_model(extra_vocab=EXTRA)
    mel, condition = pairs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(mel, torch.full((3,), 0.4), condition).v.square().sum().backward()
        optimizer.step()
    assert model.tokens.extra_embedding.weight.grad.any()


def test_a_condition_without_second_tokens_is_refused():
    mel, condition = small_batch()
    with pytest.raises(ValueError, match=r"model\.extra_vocab is set, and the condition has no extra_tokens"):
        small_model(extra_vocab=EXTRA)(mel, torch.full((3,), 0.4), condition)


def test_second_tokens_are_those_at_the_time_of_the_first():
    """By hand: 3 second tokens of a clip, each a third of it; the middles of 5 first ones at 0.1, 0.3, …, 0.9."""
    extra = np.array([7, 8, 9], np.int32)
    assert tokens_of_frames(extra, 5).tolist() == [7, 7, 8, 9, 9]
    assert tokens_of_frames(extra, 3).tolist() == [7, 8, 9]
    assert tokens_of_frames(extra, 1).tolist() == [8]
    assert tokens_of_frames(extra[:2], 6).tolist() == [7, 7, 7, 8, 8, 8]
    assert tokens_of_frames(extra, 5).dtype == np.int32


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """In two length buckets, so that the dry run takes place on a CPU too."""
    return write_small_shards(tmp_path_factory.mktemp("b") / "shards", buckets=(13, 25), extra=True)


def test_batches_carry_the_second_tokens_of_their_clips(preset):
    index = load_index(preset.parent)
    assert index.extra_vocab == EXTRA_CODES
    samples = fixed_clips(index, "val", "speech", 2) + fixed_clips(index, "val", "audio", 1)
    condition = collate(samples, (0, 1, 2), index).condition
    assert condition.extra_tokens.shape == condition.tokens.shape
    for row, sample in enumerate(samples):
        count = len(sample.tokens)
        assert condition.extra_tokens[row, :count].tolist() == sample.tokens2.tolist()
        assert not condition.extra_tokens[row, count:].any()
    assert len({int(i) for s in samples for i in s.tokens2}) > 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ids: ids[:-1], r"tokens2\.npy: \(\d,\) is not \(\d,\), as tokens"),
        (lambda ids: ids.astype(np.int64), r"tokens2\.npy: int64 .* is not int32"),
        (lambda ids: ids + EXTRA_CODES, r"tokens2\.npy: ids outside 0 to 8"),
        (lambda ids: ids - EXTRA_CODES, r"tokens2\.npy: ids outside 0 to 8"),
        (lambda ids: None, r"lacks 'tokens2\.npy'"),
    ],
    ids=["short", "int64", "high", "negative", "missing"],
)
def test_damaged_second_tokens_are_named(tmp_path, damage, message):
    from agrepa_fast.data.writing import write_shard

    write_small_shards(tmp_path / "shards", extra=True)
    index = load_index(tmp_path / "shards")
    shard = index.shards("val", "speech")[0]
    clips = read_shard(shard, index)
    clips[1].tokens2 = damage(clips[1].tokens2)
    entry = write_shard(shard.path, clips, "teacher_speech")
    where = next(e for e in index.content["shards"] if e["file"] == entry["file"])
    where.update(entry)
    write_index(index.folder, index.content)
    with pytest.raises(UserError, match=message):
        read_shard(load_index(index.folder).shards("val", "speech")[0], index)


def test_model_and_shards_must_agree(preset, tmp_path):
    config = load_config(preset)
    index = matching_index(config.data)
    assert fit_to_shards(config, index).model.extra_vocab == EXTRA_CODES
    assert fit_to_shards(load_config(preset, ["model.extra_vocab=null"]), index).model.extra_vocab is None
    with pytest.raises(UserError, match=r"model\.extra_vocab=5, but the shards in .* have 9 of them"):
        fit_to_shards(load_config(preset, ["model.extra_vocab=5"]), index)
    with pytest.raises(UserError, match=r"prepared with data\.extra_tokens=vq:none, the run has None"):
        matching_index(load_config(preset, ["data.extra_tokens=null"]).data)
    with pytest.raises(UserError, match=r"prepared with data\.speech_tokens=kmeans, the run has s3:x"):
        matching_index(load_config(preset, ["data.speech_tokens=s3:x"]).data)
    plain = write_small_shards(tmp_path / "plain")
    config = load_config(plain, ["model.extra_vocab=5"])
    with pytest.raises(UserError, match=r"have no second tokens: set model\.extra_vocab=null"):
        fit_to_shards(config, matching_index(config.data))


def test_foga_takes_topology_b(preset):
    config = fit_to_shards(load_config(preset), load_index(preset.parent))
    torch.manual_seed(0)
    model = AudioDiT(config.model)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.weight, std=0.2)
    torch.nn.init.normal_(model.tokens.project.weight, std=0.2)
    index = load_index(preset.parent)
    batch = collate(fixed_clips(index, "val", "speech", 3), (0, 1, 2), index)
    changed = replace(
        batch, condition=replace(batch.condition, extra_tokens=(batch.condition.extra_tokens + 1) % EXTRA_CODES)
    )
    scores = [foga(model, b, times=(0.5,)).per_clip("speech") for b in (batch, changed)]
    assert (scores[0] > 0).all()
    assert not torch.allclose(scores[0], scores[1]), "the second tokens are part of what is probed"


def test_a_run_trains_is_probed_and_sampled(preset, tmp_path, no_pictures):
    run_training(1, "--preset", str(preset), "run.dir=run", cwd=tmp_path)
    run = tmp_path / "run"
    saved = load_config(run / "config.yaml")
    assert (saved.model.extra_vocab, saved.data.extra_codebook) == (EXTRA_CODES, EXTRA_CODES)
    from agrepa_fast.checkpoints.find import resolve_checkpoint
    from agrepa_fast.checkpoints.weights import load_model

    model, _ = load_model(resolve_checkpoint(run), live=True)
    start = AudioDiT(saved.model)
    assert not torch.equal(model.tokens.extra_embedding.weight, start.tokens.extra_embedding.weight)
    assert model.tokens.project.weight[:, saved.model.token_dim :].abs().max() > 1e-4, "the second half trains"
    rows = list(csv.DictReader((run / "attribution.csv").open()))
    assert {row["domain"] for row in rows} >= set(DOMAINS)
    cli.main(["sample", str(run), "--clips", "1", "--out", str(tmp_path / "sample")])
    assert {path.name for path in (tmp_path / "sample").glob("*sample.wav")} == {f"{d}-1-sample.wav" for d in DOMAINS}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(14):
        t = np.arange(14000 + 900 * number) / 16000
        wave = 0.3 * np.sin(2 * np.pi * (200 + 50 * number + 100 * np.sin(6 * t)) * t)
        soundfile.write(folder / f"take{number}.wav", wave.astype(np.float32), 16000)
    return folder


@pytest.fixture(scope="module")
def fitted(whisper, corpus, tmp_path_factory):
    """Two tokenizers: every frame of the first layer, every second one of what the model returns."""
    pytest.importorskip("vector_quantize_pytorch", reason="pip install 'agrepa_fast[vq]'")
    folder = tmp_path_factory.mktemp("fitted")
    for name, spec, stride in (("own", f"{whisper}@1", 1), ("other", str(whisper), 2)):
        config = VqFitConfig(teacher=spec, codes=8, stride=stride, steps=3, batch=4)
        fit_tokens(corpus, config, folder / f"{name}.safetensors")
    return folder


def settings(whisper, *more):
    teachers = [f"data.{domain}_teacher={whisper}@1" for domain in DOMAINS]
    return load_config("demo", [*teachers, "data.codebook=8", "data.extra_codebook=8", "data.shard_clips=8", *more])


@pytest.mark.parametrize("primary", ["kmeans", "own", "other"])
def test_preparation_writes_both_tokens_whatever_teacher_they_are_of(primary, whisper, corpus, fitted, tmp_path):
    """`own` is of the domain's own teacher and costs no pass, `other` of another."""
    from agrepa_fast.corpora.folder import list_folder
    from agrepa_fast.prepare.decode import cut_wave
    from agrepa_fast.teachers import load_teacher
    from agrepa_fast.teachers.whisper import WhisperTeacher

    first = primary if primary == "kmeans" else f"vq:{fitted / primary}.safetensors"
    second = f"vq:{fitted}/{'other' if primary != 'other' else 'own'}.safetensors"
    config = settings(whisper, f"data.audio_tokens={first}", f"data.extra_tokens={second}")
    passes, frames = [], WhisperTeacher.frames
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            WhisperTeacher, "frames", lambda self, waves: passes.append((self.name, len(waves))) or frames(self, waves)
        )
        index = prepare_folder(config, corpus, "audio", tmp_path / "out")
    clips = {name: sum(count for n, count in passes if n == name) for name, _ in passes}
    assert sorted(clips.values()) == [14, 14], "each teacher once over the clips"

    entry = index.content["domains"]["audio"]
    assert entry["tokens"]["kind"] == ("kmeans" if primary == "kmeans" else "vq")
    assert entry["tokens"]["rate"] == (25 if primary == "other" else 50)
    assert entry["tokens2"]["rate"] == (25 if primary != "other" else 50)
    assert (entry["tokens"]["offset"], entry["tokens2"]["offset"]) == (8, 0)
    assert entry["tokens2"]["identity"]["sha256"] == VqTokenizer.load(Path(second[3:])).identity["sha256"]

    by_key = {recording.name: recording for recording in list_folder(corpus, "audio")[0]}
    for name, role in (("tokens", first), ("tokens2", second)):
        if role == "kmeans":
            continue
        tokenizer = VqTokenizer.load(Path(role[3:]))
        teacher = load_teacher(tokenizer.about["teacher"]["spec"])
        for shard in index.shards("train", "audio"):
            for clip in read_shard(shard, index):
                wave = cut_wave(by_key[clip.key], config.data, teacher.sample_rate)
                ids = tokenizer.encode(teacher.frames([wave])[0].astype(np.float16))
                if name == "tokens":
                    assert clip.tokens.tolist() == (ids + 8).tolist()
                else:
                    assert clip.tokens2.tolist() == tokens_of_frames(ids, len(clip.tokens)).tolist()
    assert len({int(i) for s in fixed_clips(index, "train", "audio", 5) for i in s.tokens2}) > 2


def test_preparation_refuses_what_does_not_fit(whisper, corpus, fitted, tmp_path):
    own = f"vq:{fitted}/own.safetensors"
    with pytest.raises(UserError, match=r"data\.audio_tokens=vq:.* has 8 codes, data\.codebook is 4: set data\.codeb"):
        prepare_folder(
            settings(whisper, "data.codebook=4", f"data.audio_tokens={own}"), corpus, "audio", tmp_path / "a"
        )
    with pytest.raises(
        UserError, match=r"data\.extra_tokens=vq:.* data\.extra_codebook is 4: set data\.extra_codebook"
    ):
        prepare_folder(
            settings(whisper, "data.extra_codebook=4", f"data.extra_tokens={own}"), corpus, "audio", tmp_path / "a"
        )
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((fitted / "own.safetensors").read_bytes())
    config = settings(whisper, f"data.extra_tokens=vq:{copy}")
    prepare_folder(config, corpus, "audio", tmp_path / "out")
    assert prepare_folder(config, corpus, "audio", tmp_path / "out").extra_vocab == 8
    copy.write_bytes((fitted / "other.safetensors").read_bytes())
    for domain in DOMAINS:  # the audio that is there, the speech that would be added
        with pytest.raises(UserError, match=r"prepared with another .*copy\.safetensors, which has changed since"):
            prepare_folder(config, corpus, domain, tmp_path / "out")
    copy.unlink()  # what was written does not need it any more
    other = settings(whisper, f"data.extra_tokens=vq:{copy}", "data.audio_tokens=s3:x")
    with pytest.raises(UserError, match=r"data\.audio_tokens=kmeans, not s3:x"):
        prepare_folder(other, corpus, "audio", tmp_path / "out")


def test_settings_are_checked():
    for wrong in (
        "data.speech_tokens=vq",
        "data.audio_tokens=mimi",
        "data.extra_tokens=kmeans",
    ):
        with pytest.raises(UserError, match=r"vq:FILE or s3:NAME"):
            load_config("demo", [wrong])
    with pytest.raises(UserError, match=r"model\.extra_vocab=0: at least 1, or null"):
        ModelConfig(extra_vocab=0)
    assert DataConfig(extra_tokens="s3:speech_tokenizer_v1").extra_codebook == 1024
    preset = load_config("agrepa-b")
    assert preset.model.extra_vocab == preset.data.extra_codebook == 1024
