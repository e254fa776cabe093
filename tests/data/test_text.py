"""Transcripts to ids, and which clips a run takes that asks for them."""

import json
from dataclasses import replace
from importlib.machinery import PathFinder
from types import SimpleNamespace

import pytest
import torch

from agrepa_fast.config import Config, DataConfig
from agrepa_fast.data import matching
from agrepa_fast.data.batch import collate
from agrepa_fast.data.index import write_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.data.locations import Remote
from agrepa_fast.data.matching import count_transcribed, matching_index
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.data.reading import fixed_clips
from agrepa_fast.data.text import load_text, pinyin_symbols
from agrepa_fast.errors import UserError
from agrepa_fast.probing.fixed_clips import FixedClips
from agrepa_fast.training.dry_run import silent_clips

from ..attribution.test_peers import import_alone
from ..testing import write_small_shards

TEXTS = (
    "Please enter a new extension, followed by pound.",
    "the person you are calling is not at their desk; I will try",
    "...to leave the conference.",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002",  # Chinese, with its punctuation
    "\u91cd\u5e86\u7684\u91cd\u91cf\u662f\u4e00\u884c abc123",  # characters with two readings
    "\u6211\u5728 Google \u5de5\u4f5c\uff1b\u4ed6\u8bf4\u201c\u94f6\u884c\u884c\u957f\u201dhello",
    "caf\u00e9 \u2013 3\u00b0 na\u00efve",
    "\u3042\u308a\u304c\u3068\u3046 \ud55c\uad6d\uc5b4",  # Japanese, Korean
    " ",
)


def data(folder, **settings) -> DataConfig:
    settings = {"speaker": "campplus:none"} | settings
    return DataConfig(path=str(folder), sample_rate=16000, n_mels=8, f_max=8000.0, codebook=6, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("text") / "shards"
    write_small_shards(made, texts=True)
    return made


@pytest.fixture(scope="module")
def utils():
    return import_alone("f5_tts.model.utils")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_f5_tts(utils, text):
    path = PathFinder.find_spec("f5_tts").submodule_search_locations[0] + "/infer/examples/vocab.txt"
    symbols, size = utils.get_tokenizer(path, "custom")
    ours = load_text("package:f5")
    assert (ours.size, ours.symbols) == (size, symbols) == (2545, symbols)
    theirs = utils.convert_char_to_pinyin([text])
    assert pinyin_symbols(text) == theirs[0]
    assert ours.encode(text).tolist() == utils.list_str_to_idx(theirs, symbols)[0].tolist()
    assert load_text(f"pinyin:{path}").encode(text).tolist() == ours.encode(text).tolist()
    assert load_text(f"chars:{path}").encode(text).tolist() == utils.list_str_to_idx([text], symbols)[0].tolist()
    assert load_text("bytes").encode(text).tolist() == utils.list_str_to_tensor([text])[0].tolist()


@pytest.mark.parametrize("content", [" \na\nb\n", " \na\nb", " \r\na\r\nb\r\n", "\ufeff \na\nb\n"])
def test_a_vocabulary_has_a_symbol_per_line(tmp_path, content):
    (tmp_path / "vocab.txt").write_bytes(content.encode())
    text = load_text(f"chars:{tmp_path}/vocab.txt")
    assert (text.size, text.encode("ba?").tolist()) == (3, [2, 1, 0])


@pytest.mark.parametrize(
    ("content", "message"),
    [("a\nb\n", "begins with 'a', not with"), ("", "begins with nothing"), (" \na\nb\na\n", "'a' in line 2 and again")],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        load_text(f"chars:{tmp_path}/vocab.txt")


@pytest.mark.parametrize("spec", ["letters", "chars:", "package:e2", "bytes:x"])
def test_unknown_ids_are_refused(spec):
    with pytest.raises(UserError, match=f"data.text='{spec}': bytes, chars:FILE"):
        DataConfig(text=spec)


@pytest.mark.parametrize("missing", ["f5_tts", "pypinyin"])
def test_a_missing_package_is_named(monkeypatch, missing):
    find = PathFinder.find_spec
    monkeypatch.setattr(PathFinder, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(UserError, match=rf"{missing}.*pip install 'agrepa_fast\[f5\]'"):
        load_text("package:f5")


def test_clips_with_a_transcript_of_their_own_are_taken(folder):
    index = matching_index(data(folder, text="bytes"))
    assert index.domains == ("speech",)
    assert [index.clips(split, "speech") for split in ("train", "val")] == [14, 4]
    assert count_transcribed(index) == (
        "data.text=bytes: 256 ids; clips with a transcript of their own: speech 14 of 22 for training, 4 of 5 for "
        "validation; audio 0 of 22 for training, 0 of 5 for validation; the others are left out"
    )
    samples = fixed_clips(index, "train", "speech", 14)
    assert all(sample.text and not sample.cut for sample in samples)
    plan = BatchPlan(index, 0.5, 0, clips=7)
    assert plan.buckets[0].mean_frames == sum(sample.frames for sample in samples) / 14
    batches = TrainBatches(index, data(folder), BatchLayout(7, 1, 0, 1), seed=0, center=True, plan=plan)
    epoch = [next(batches), next(batches)]
    assert sorted(key for batch in epoch for key in batch.keys) == sorted(sample.key for sample in samples)
    text_of = {sample.key: sample.text for sample in samples}
    voice_of = {sample.key: sample.speaker.tolist() for sample in samples}
    for batch in epoch:
        assert batch.condition.speaker.tolist() == [voice_of[key] for key in batch.keys]
        for key, ids in zip(batch.keys, batch.condition.text, strict=True):
            assert bytes(ids[ids >= 0].tolist()).decode() == text_of[key]
            assert (ids >= 0).tolist() == sorted((ids >= 0).tolist(), reverse=True)  # -1 only behind them


def test_runs_without_text_take_all_clips_and_have_none(folder):
    index = matching_index(data(folder))
    assert [index.clips("train", domain) for domain in index.domains] == [22, 22]
    assert collate(fixed_clips(index, "val", "speech", 2), (0, 1), index).condition.text is None
    assert silent_clips(2, 9, index, torch.device("cpu"))[1].text is None


def test_shards_of_version_0_1_are_read_for_their_transcripts(folder, tmp_path):
    write_small_shards(tmp_path / "old", texts=True)
    new = matching_index(data(folder, text="bytes"))
    content = json.loads((tmp_path / "old" / "index.json").read_text())
    for entry in content["shards"]:
        del entry["transcribed"]
    write_index(tmp_path / "old", content)
    old = matching_index(data(tmp_path / "old", text="bytes"))
    assert [old.shards(split, "speech")[0].left_out for split in ("train", "val")] == [
        new.shards(split, "speech")[0].left_out for split in ("train", "val")
    ]


def test_shards_of_version_0_1_behind_a_url_are_not_read_whole(folder, monkeypatch):
    index = matching_index(data(folder))
    for entry in index.content["shards"]:
        del entry["transcribed"]
    monkeypatch.setattr(matching, "load_index", lambda *_, **__: replace(index, folder=Remote("https://x/shards")))
    with pytest.raises(UserError, match=r"https://x/shards/index\.json does not say which clips have a transcript"):
        matching_index(data(folder, text="bytes"))


def test_shards_without_transcripts_are_refused(tmp_path):
    write_small_shards(tmp_path / "shards")
    with pytest.raises(UserError, match=r"data\.text=bytes, but no training clip has a transcript of its own"):
        matching_index(data(tmp_path / "shards", text="bytes", speaker=None))


def test_a_transcript_longer_than_its_clip_is_a_fault(folder):
    index = matching_index(data(folder, text="bytes"))
    long = SimpleNamespace(encode=lambda text: index.text.encode(text * 9))
    with pytest.raises(UserError, match=r"\.json: \d+ ids of text for \d+ frames"):
        fixed_clips(replace(index, text=long), "val", "speech", 3)


def test_fixed_shapes_have_room_for_any_transcript(tmp_path):
    write_small_shards(tmp_path / "shards", (15, 25), texts=True)
    index = matching_index(data(tmp_path / "shards", text="bytes"))
    plan = BatchPlan(index, 1.0, 0, clips=3)
    batches = TrainBatches(index, data(tmp_path), BatchLayout(3, 1, 0, 1), seed=0, center=True, plan=plan)
    layouts = {}
    for _ in range(12):
        condition = next(batches).condition
        layouts.setdefault(condition.reference.shape[1], set()).add(condition.layout[:-1])
    assert {frames: len(of_bucket) for frames, of_bucket in layouts.items()} == {15: 1, 25: 1}
    silent = silent_clips(3, 25, index, torch.device("cpu"))[1]
    assert silent.text.shape == (3, 25) == next(iter(layouts[25]))[7]
    assert silent.speaker.shape == (3, 3) == next(iter(layouts[25]))[8]


def test_chunks_of_one_shape_have_text_of_one_length(folder):
    index = matching_index(data(folder, text="bytes"))
    config = Config(data=data(folder, text="bytes"))
    config = replace(config, probe=replace(config.probe, chunk=3))
    chunks = FixedClips(index, "train", 14, config, "cpu", one_shape=True).chunks()
    assert len({batch.condition.layout for batch, _ in chunks}) == 1
