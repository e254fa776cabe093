import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from agrepa_fast.checkpoints.shard_facts import shard_hash
from agrepa_fast.config import DOMAINS, DataConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data import clip_reader
from agrepa_fast.data.batch import collate
from agrepa_fast.data.clip_reader import Background, ClipReader
from agrepa_fast.data.index import load_index, read_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.order import ClipOrder
from agrepa_fast.data.plan import BatchPlan
from agrepa_fast.data.reading import Fault, fixed_clips, read_shard
from agrepa_fast.data.samples import ClipError
from agrepa_fast.errors import UserError

from ..testing import write_small_shards
from .test_shards import on, rewrite


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "shards"
    write_small_shards(folder)
    return load_index(folder)


@pytest.mark.parametrize(("world", "accumulation", "workers"), [(1, 1, 0), (2, 1, 0), (2, 2, 0), (1, 4, 0), (1, 2, 2)])
def test_the_global_batch_does_not_depend_on_how_it_is_spread(index, world, accumulation, workers):
    data = DataConfig(speech_share=0.5, workers=workers)
    for step in (5,) if workers else (0, 5):
        single = next(TrainBatches(index, DataConfig(), BatchLayout(8, 1, 0, 1), seed=0, center=True, step=step))
        keys = {}
        for rank in range(world):
            layout = BatchLayout(8, accumulation, rank, world)
            batches = TrainBatches(index, data, layout, seed=0, center=True, step=step)
            for _ in range(accumulation):
                batch = next(batches)
                keys |= dict(zip(batch.places, batch.keys, strict=True))
        assert [keys[place] for place in range(8)] == list(single.keys)


def test_resuming_at_a_step_gives_the_batches_from_there(index):
    layout = BatchLayout(6, 2, 0, 1)
    running = TrainBatches(index, DataConfig(), layout, seed=0, center=True)
    all_keys = [next(running).keys for _ in range(20)]
    resumed = TrainBatches(index, DataConfig(), layout, seed=0, center=True, step=7)
    assert [next(resumed).keys for _ in range(6)] == all_keys[14:]


def test_collate_normalises_and_centres_and_pads_with_zeros(index):
    samples = fixed_clips(index, "val", "speech", 2) + fixed_clips(index, "val", "audio", 1)
    batch = collate(samples, (0, 1, 2), index)
    for row, sample in enumerate(samples):
        wanted = (torch.from_numpy(sample.mel).float() - index.mel_mean) / index.mel_std
        assert torch.equal(batch.mel[row, : sample.frames], wanted)
        assert not batch.mel[row, sample.frames :].any()
        assert batch.condition.tokens[row, : len(sample.tokens)].tolist() == sample.tokens.tolist()
        assert batch.condition.lengths[row] == sample.frames
        mean = torch.from_numpy(index.teacher(sample.domain).mean)
        torch.testing.assert_close(batch.teacher[sample.domain][row], torch.from_numpy(sample.teacher).float() - mean)
    assert not batch.teacher["audio"][:2].any()
    assert batch.domain.tolist() == [0, 0, 1]
    raw = collate(samples, (0, 1, 2), index, center=False)
    assert torch.equal(raw.teacher["audio"][2], torch.from_numpy(samples[2].teacher).float())


def test_mels_stay_as_they_are_if_that_is_asked(index):
    data = load_config(str(index.folder / "preset.yaml"), ["data.normalize=false"]).data
    raw = matching_index(data)
    assert (raw.mel_mean, raw.mel_std) == (0.0, 1.0)
    samples = fixed_clips(index, "val", "speech", 2)
    batch = collate(samples, (0, 1), raw)
    for row, sample in enumerate(samples):
        assert torch.equal(batch.mel[row, : sample.frames], torch.from_numpy(sample.mel).float())
    assert (raw.code_mels() == index.code_mels()).all()
    assert shard_hash(raw) != shard_hash(index)


def test_the_whole_training_split_is_normalised(index):
    every = [s for domain in DOMAINS for s in fixed_clips(index, "train", domain, 22)]
    batch = collate(every, tuple(range(44)), index)
    frames = torch.cat([mel[:length] for mel, length in zip(batch.mel, batch.condition.lengths, strict=True)])
    assert frames.mean().item() == pytest.approx(0, abs=1e-4)
    assert frames.std().item() == pytest.approx(1, abs=1e-3)


def test_too_few_clips(index):
    with pytest.raises(UserError, match="6 audio clips of the val split are wanted, 5 are there"):
        fixed_clips(index, "val", "audio", 6)


def global_batches(index, plan, steps, world=1, accumulation=1, workers=0):
    """Of each step: the keys place by place, and all faults; everything that ranks share is checked on the way."""
    found = [({}, set()) for _ in range(steps)]
    for rank in range(world):
        layout = BatchLayout(None, accumulation, rank, world)
        data = DataConfig(workers=workers)
        batches = TrainBatches(index, data, layout, seed=0, center=True, plan=plan)
        for step, (keys, faults) in enumerate(found):
            bucket = plan.buckets[plan.bucket(step)[0]]
            for _ in range(accumulation):
                batch = next(batches)
                assert batch.mel.shape[:2] == (len(batch.keys), bucket.frames)
                assert batch.condition.tokens.shape[1] == bucket.frames  # no rate is known here
                assert batch.weight == len(batch.keys) * world * accumulation / bucket.clips
                keys |= dict(zip(batch.places, batch.keys, strict=True))
                faults |= set(batch.faults)
    assert all(sorted(keys) == list(range(len(keys))) for keys, _ in found)
    return [([keys[place] for place in range(len(keys))], faults) for keys, faults in found]


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucketed") / "shards"
    write_small_shards(folder, (13, 19, 25))
    return load_index(folder)


@pytest.mark.parametrize(("world", "accumulation", "workers"), [(2, 1, 0), (3, 1, 0), (2, 2, 0), (1, 3, 0)])
def test_batches_of_buckets_are_the_same_however_they_are_spread(bucketed, world, accumulation, workers):
    plan = BatchPlan(bucketed, 0.5, 0, budget=130, attention_cost=1 / 200)
    assert [bucket.clips for bucket in plan.buckets] == [9, 6, 4]
    wanted = global_batches(bucketed, plan, 24)
    assert global_batches(bucketed, plan, 24, world, accumulation, workers) == wanted
    assert len({len(keys) for keys, _ in wanted}) == 3


def test_no_clip_twice_before_every_clip_once(bucketed):
    plan = BatchPlan(bucketed, 0.5, 0, budget=130)
    lengths = {s.key: s.frames for d in DOMAINS for s in fixed_clips(bucketed, "train", d, 22)}
    seen = Counter()
    for step, (keys, _) in enumerate(global_batches(bucketed, plan, 60)):
        bound = plan.buckets[plan.bucket(step)[0]].frames
        assert all(lengths[key] <= bound and lengths[key] > {13: 0, 19: 13, 25: 19}[bound] for key in keys)
        for key in sorted(keys):
            seen[key] += 1
        for domain in DOMAINS:
            for frames in {b.frames for b in plan.buckets}:
                low = {13: 0, 19: 13, 25: 19}[frames]
                counts = [seen[k] for k in lengths if k.startswith(domain) and low < lengths[k] <= frames]
                assert max(counts) - min(counts) <= 1 + (max(counts) > 1)  # a batch may take the end of an epoch
    assert min(seen[key] for key in lengths) >= 2


def test_a_batch_has_the_mean_frames_of_its_bucket(bucketed):
    """By which flow.average=frame divides. Long batches have fewer clips: by the mean of all clips, a frame of theirs
    would count more."""
    plan = BatchPlan(bucketed, 0.3, 0, budget=130)
    batches = TrainBatches(bucketed, DataConfig(), BatchLayout(None, 1, 0, 1), seed=0, center=True, plan=plan)
    lengths = {number: [] for number in range(len(plan.buckets))}
    for step in range(20 * plan.cycle):
        batch = next(batches)
        number, _ = plan.bucket(step)
        assert batch.mean_frames == plan.buckets[number].mean_frames
        lengths[number] += batch.condition.lengths.tolist()
    for number, of_bucket in lengths.items():
        assert plan.buckets[number].mean_frames == pytest.approx(sum(of_bucket) / len(of_bucket), rel=0.01)


DAMAGE = {  # file -> what happens to it, and the kind of fault
    "train-speech-0000.tar": ("cut", "truncated"),
    "train-audio-0001.tar": ("bit", "checksum"),
    "train-audio-0002.tar": ("gone", "missing"),
    "train-speech-0001.tar": ("nan", "not_finite"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Two thirds of the clips of each domain, and of each damage some, are lost."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    write_small_shards(folder)
    for name, (what, _) in DAMAGE.items():
        file = folder / name
        content = bytearray(file.read_bytes())
        if what == "gone":
            file.unlink()
        elif what == "nan":
            whole = read_index(folder)
            shard = next(s for s in whole.shards("train", "speech") if s.path.name == name)
            key = read_shard(shard, whole)[2].key
            rewrite(file, on(f"{key}.mel.npy", lambda old: old[:-2] + b"\x00\x7e"))  # fp16's NaN
            index = json.loads((folder / "index.json").read_text())
            entry = next(entry for entry in index["shards"] if entry["file"] == name)
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            entry |= {"bytes": file.stat().st_size, "sha256": sha256}
            (folder / "index.json").write_text(json.dumps(index))
        else:
            content[3000] ^= 1
            file.write_bytes(content[:21500] if what == "cut" else content)  # within a mel
    return read_index(folder)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (1, 2)])
def test_faulty_clips_are_replaced_the_same_way_on_any_number_of_ranks(index, damaged, world, workers):
    plan, whole = (BatchPlan(i, 0.5, 0, budget=200.0) for i in (damaged, index))
    found = global_batches(damaged, plan, 12)
    assert global_batches(damaged, plan, 12, world, 1, workers) == found
    lost = {(f.file, f.clip): f for _, faults in found for f in faults}
    assert {(f.file, f.kind) for f in lost.values()} == {(name, kind) for name, (_, kind) in DAMAGE.items()}
    counts = Counter(file for file, _ in lost)
    assert counts["train-audio-0001.tar"] == 8
    assert counts["train-audio-0002.tar"] == 6
    assert counts["train-speech-0001.tar"] == 1
    assert counts["train-speech-0000.tar"] == 3  # of 8: the good ones before the cut are kept
    bad = lost["train-speech-0001.tar", 2]
    assert bad == Fault("train-speech-0001.tar", 2, bad.member, "not_finite", "not finite")
    assert bad.member.endswith(".mel.npy")
    for (keys, faults), (wanted, none) in zip(found, global_batches(index, whole, 12), strict=True):
        changed = sum(a != b for a, b in zip(keys, wanted, strict=True))
        assert not none
        assert changed == len(faults)  # nothing but the lost clips' places
        assert [key[:5] for key in keys] == [key[:5] for key in wanted]


def test_probe_and_validation_clips_are_never_replaced(damaged):
    with pytest.raises(UserError, match=r"train-speech-0000\.tar.*bytes, not"):
        fixed_clips(damaged, "train", "speech", 3)


def fake_shards(monkeypatch, shards=40, clips=6, broken=()):
    """An order of fake shards, a reader of it, and what it opens."""
    opened = []

    class Fake:
        def __init__(self, shard, _index):
            self.number = shard.number
            if any(shard is file for file in files):  # a thread of an earlier test may still read ahead
                opened.append(self.number)

        def __getitem__(self, clip):
            if self.number in broken:
                raise ClipError("missing", "", f"{self.number} does not exist")
            return self.number, clip

    monkeypatch.setattr(clip_reader, "OpenShard", Fake)
    paths = [SimpleNamespace(name=f"{n}.tar") for n in range(shards)]
    files = [SimpleNamespace(number=n, clips=clips, path=p, places=range(clips)) for n, p in enumerate(paths)]
    order = ClipOrder([clips] * shards, 4, 0, "speech")
    reader = ClipReader(SimpleNamespace(folder="x"), tuple(files), order, 4, Background(2))
    return order, reader, opened


def test_each_shard_is_opened_once_an_epoch_and_few_at_a_time(monkeypatch):
    _, reader, opened = fake_shards(monkeypatch)
    clips = [clip for step in range(60) for clip in reader.read(range(4 * step, 4 * step + 4))[0]]
    assert len(set(clips)) == len(clips) == 240
    assert Counter(opened).keys() == set(range(40))
    assert len(opened) <= 40 + 4  # and what the next epoch begins with
    assert len(reader._open) <= 6
    assert len(reader._ahead) <= 4


def test_the_next_shard_is_read_while_the_last_half_of_one_is_taken(monkeypatch):
    order, reader, opened = fake_shards(monkeypatch)
    first = order.find(0)
    assert first.remaining == 5
    reader.read([0, 4])  # 5 and 4 clips of the shard are left
    assert opened == [first.shard]
    following = order.next_shard(order.find(8))
    reader.read([8])
    reader._ahead[following].result(5)
    assert opened == [first.shard, following]


def test_shards_without_one_good_clip_end_the_reading(monkeypatch):
    order, reader, _ = fake_shards(monkeypatch, broken=range(40))
    first = order.find(0).shard
    with pytest.raises(UserError, match=rf"no good clip in 3 shards in a row, from {first}\.tar on: missing"):
        reader.read([0])
    order, reader, _ = fake_shards(monkeypatch, broken={order.find(0).shard})
    (sample,), (fault,) = reader.read([0])
    assert fault.kind == "missing"
    assert sample[0] != order.find(0).shard
