"""What preparation adds to shards: length buckets, teacher frames at a rate, teachers added later, and --verify."""

import json
import re
import tarfile
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agrepa_fast.audio.mel import frame_count
from agrepa_fast.cli import main
from agrepa_fast.config import DataConfig
from agrepa_fast.corpora.folder import folder_source
from agrepa_fast.data.batch import collate, pack
from agrepa_fast.data.index import load_index, write_index
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.reading import read_shard
from agrepa_fast.data.verifying import verify_folder
from agrepa_fast.errors import UserError
from agrepa_fast.files import file_sha256
from agrepa_fast.prepare import sidecars
from agrepa_fast.prepare.out_folder import WORK, finish
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.prepare.sidecars import add_teacher
from agrepa_fast.prepare.targets import frame_tokens, resample_frames, stored_target

from .test_prepare import contents, read_all, settings, write_corpus
from .test_prepare_ranks import run_threads

BUCKETS = "data.bucket_seconds=[1.0,1.05,1.8]"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def frozen(whisper, corpus, tmp_path_factory):
    """Shards in length buckets, the teacher pooled; not to be changed."""
    out = tmp_path_factory.mktemp("frozen") / "shards"
    return prepare_folder(settings(whisper, BUCKETS, "data.shard_clips=4"), corpus, "speech", out)


@pytest.fixture
def prepared(frozen, tmp_path):
    """A copy of them."""
    out = tmp_path / "shards"
    out.mkdir()
    for path in frozen.folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return load_index(out)


def add(whisper, corpus, out, *overrides, ranks=None):
    config = settings(whisper, BUCKETS, "data.shard_clips=4", *overrides)
    more = {} if ranks is None else {"ranks": ranks}
    return add_teacher(config, lambda: [folder_source(corpus, "speech")], out, f"{whisper}@1", **more)


def test_train_shards_hold_one_length_bucket_each(frozen, whisper):
    data = settings(whisper, BUCKETS).data
    ends = [frame_count(round(s * data.sample_rate), data) for s in (*data.bucket_seconds, data.max_seconds)]
    starts = dict(zip(ends, [0, *ends], strict=False))
    train = frozen.shards("train", "speech")
    buckets = [shard.bucket for shard in train]
    assert set(buckets) == {ends[0], ends[2], ends[3]}  # no clip is 1.0 to 1.05 s long: no shard, and not an empty one
    assert buckets == sorted(buckets)
    assert len(set(buckets)) < len(buckets)
    for shard in train:
        frames = [clip.frames for clip in read_shard(shard, frozen)]
        assert all(starts[shard.bucket] < n <= shard.bucket for n in frames)
        assert sum(frames) == shard.frames
    assert all(shard.clips == 4 for shard, after in pairwise(train) if shard.bucket == after.bucket)
    assert {shard.bucket for shard in frozen.shards("val", "speech")} == {ends[-1]}


@pytest.mark.parametrize("ends", [[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, 10.0]], ids=str)
def test_buckets_must_rise_and_end_before_the_last(ends):
    with pytest.raises(UserError, match=r"data\.bucket_seconds=.*must rise"):
        DataConfig(bucket_seconds=ends)


@pytest.mark.parametrize(("frames", "count"), [(50, 10), (7, 7), (7, 3), (5, 12), (1, 4), (9, 1)])
def test_resampled_frames_are_means_over_equal_parts_of_the_clip(frames, count):
    values = np.random.default_rng(frames).normal(size=(frames, 3)).astype(np.float32) + 100
    # Each frame as `count` equal pieces: frames * count pieces, of which every result is the mean of `frames`.
    pieces = np.repeat(values.astype(np.float64), count, axis=0).reshape(count, frames, 3)
    found = resample_frames(values, count)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, pieces.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.mean(axis=0), values.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("seconds", [2.2, 4.0, 4.13, 10.0])
@pytest.mark.parametrize(
    ("rate", "start", "frames"),
    [
        pytest.param(6.25, 0.0075, lambda seconds: (seconds * 16000 - 240) // 2560, id="BEATs"),
        pytest.param(10.0, 0.0375, lambda seconds: (seconds * 16000 - 1200) // 1600, id="AST"),
        pytest.param(12.5, -0.035, lambda seconds: np.floor(seconds * 12.5) + 1, id="Parakeet"),
        pytest.param(3.2, 0.0, lambda seconds: np.ceil(seconds * 48000 / 15000), id="CLAP"),
    ],
)
def test_targets_and_tokens_keep_the_times_of_frames_that_do_not_span_the_clip(rate, start, frames, seconds):
    teacher, tokenizer = SimpleNamespace(rate=rate, start=start), SimpleNamespace(stride=1, encode=lambda f: f[:, 0])
    times = start + (np.arange(int(frames(seconds))) + 0.5) / rate  # of the middles of the frames, and their values
    values = times[:, None].astype(np.float32)

    def middles(count):
        return np.clip((np.arange(count) + 0.5) * seconds / count, times[0], times[-1])

    half = 0.5 / rate + 0.004  # a frame's, and rounding to fp16
    target = stored_target(teacher, values, seconds, 12.5)[:, 0]
    assert np.abs(target - middles(round(seconds * 12.5))).max() <= half
    if start >= 0:  # or else the second frame begins before the first target ends
        assert target[0] == np.float16(times[0])
    if times[-1] < seconds - 0.5 / rate:  # the last frame ends before the clip
        assert target[-1] == np.float16(times[-1])
    pooled = stored_target(teacher, values, seconds, None)
    np.testing.assert_allclose(pooled, target.mean(dtype=np.float32), atol=0.01)
    tokens = frame_tokens(teacher, tokenizer, values, seconds)
    assert np.abs(tokens - middles(round(seconds * rate))).max() <= half


def test_a_new_index_json_of_shards_from_before_speaker_vectors_says_nothing_of_them(prepared):
    """Runs on them are resumed, which compares what was said."""
    content = prepared.content
    del content["features"]["speaker"]
    before = dict(content["features"])
    (prepared.folder / WORK).mkdir()
    assert finish(prepared.folder, content, {}, "*").content["features"] == before


def test_frame_level_targets_are_the_teachers_frames_at_the_rate(whisper, corpus, frozen, tmp_path):
    from agrepa_fast.teachers import load_teacher

    config = settings(whisper, BUCKETS, "data.shard_clips=4", "data.teacher_rate=12.5")
    index = prepare_folder(config, corpus, "speech", tmp_path / "out")
    teacher = load_teacher(str(whisper))
    name = f"{teacher.name}_12p5hz"
    assert index.content["domains"]["speech"]["teachers"][name]["rate"] == 12.5
    pooled = {clip.key: clip for split in read_all(frozen).values() for clip in split}
    train = read_all(index)["train"]
    for clip in train:
        assert clip.teacher.shape == (max(1, round(clip.seconds * 12.5)), teacher.dim)
        assert clip.teacher.dtype == np.float16
        np.testing.assert_allclose(clip.pooled, pooled[clip.key].pooled, atol=3e-3)
        np.testing.assert_array_equal(clip.tokens, pooled[clip.key].tokens)
    assert len({tuple(row) for row in train[0].teacher}) > 1
    mean = np.mean([clip.pooled for clip in train], axis=0)
    np.testing.assert_allclose(index.teacher("speech").mean, mean, atol=1e-5)
    batch = collate(train[:2], (0, 1), index)
    torch.testing.assert_close(
        batch.teacher["speech"][1], torch.from_numpy(train[1].pooled - index.teacher("speech").mean)
    )
    assert not batch.teacher_frames
    values, counts = pack(train[:2], (0, 1), index, teacher_frames=0).unpack().teacher_frames["speech"]
    assert counts.tolist() == [len(clip.teacher) for clip in train[:2]]
    for row, clip in enumerate(train[:2]):
        centred = clip.teacher.astype(np.float32) - index.teacher("speech").mean
        np.testing.assert_array_equal(values[row, : counts[row]].numpy(), centred.astype(np.float16))
        assert not values[row, counts[row] :].any()
        assert len(clip.teacher) <= index.most_teacher_frames(clip.frames)


def test_added_teacher_leaves_the_shards_alone_and_is_read_with_them(whisper, corpus, prepared, frozen, tmp_path):
    index = add(whisper, corpus, prepared.folder)
    after = contents(index.folder)
    before = contents(frozen.folder)
    assert {name: after[name] for name in before if name != "index.json"} == {
        name: content for name, content in before.items() if name != "index.json"
    }
    name = f"{next(iter(frozen.content['domains']['speech']['teachers']))}_l1"
    assert set(after) - set(before) == {
        f"{p.path.stem}.{name}.tar" for s in ("train", "val") for p in index.shards(s, "speech")
    }
    assert not (index.folder / ".work").exists()
    # What is read is what a preparation with that teacher alone would have written.
    config = settings(whisper, BUCKETS, "data.shard_clips=4", f"data.speech_teacher={whisper}@1")
    alone = prepare_folder(config, corpus, "speech", tmp_path / "alone")
    chosen = matching_index(replace(config.data, path=str(index.folder)))
    assert chosen.teacher("speech").name == alone.teacher("speech").name == name
    np.testing.assert_array_equal(chosen.teacher("speech").mean, alone.teacher("speech").mean)
    for split, clips in read_all(chosen).items():
        expected = {clip.key: clip for clip in read_all(alone)[split]}
        for clip in clips:
            np.testing.assert_array_equal(clip.teacher, expected[clip.key].teacher)
    first = matching_index(replace(config.data, path=str(index.folder), speech_teacher=str(whisper)))
    assert first.teacher("speech").name == frozen.teacher("speech").name
    with pytest.raises(UserError, match=r"data\.speech_teacher=.* or .*@1, the run has package:other"):
        matching_index(replace(config.data, path=str(index.folder), speech_teacher="package:other"))
    verify_folder(index.folder)


def test_adding_is_resumed_and_idempotent_on_any_number_of_ranks(
    whisper, corpus, prepared, tmp_path, monkeypatch, capsys
):
    written, write_tar = [], sidecars.write_tar

    def stops(path, samples):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return write_tar(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(sidecars, "write_tar", stops)
        with pytest.raises(KeyboardInterrupt):
            add(whisper, corpus, prepared.folder)
    assert load_index(prepared.folder).content == prepared.content  # as if nothing had happened
    times = {name: (prepared.folder / name).stat().st_mtime_ns for name in written}
    run_threads(2, lambda ranks: add(whisper, corpus, prepared.folder, ranks=ranks))
    assert {name: (prepared.folder / name).stat().st_mtime_ns for name in written} == times
    other = tmp_path / "other"
    other.mkdir()
    for path in prepared.folder.iterdir():
        if path.name in contents(prepared.folder) and "_l1" not in path.name:
            (other / path.name).write_bytes(path.read_bytes())
    write_index(other, prepared.content)
    add(whisper, corpus, other)
    assert contents(other) == contents(prepared.folder)
    monkeypatch.setattr(sidecars, "load_teacher_on_every_rank", lambda *_: pytest.fail("teacher loaded again"))
    add(whisper, corpus, other)
    assert "nothing to do" in capsys.readouterr().out


def test_adding_refuses_what_the_shards_were_not_made_of(whisper, corpus, prepared, tmp_path):
    with pytest.raises(UserError, match=r"holds speech recordings of .* which are not"):
        add(whisper, write_corpus(tmp_path / "few", 6), prepared.folder)
    with pytest.raises(UserError, match=r"data\.teacher_precision=fp32, not fp16"):
        add_teacher(
            settings(whisper, BUCKETS, "data.shard_clips=4", "data.teacher_precision=fp16"),
            lambda: [folder_source(corpus, "speech")],
            prepared.folder,
            str(whisper),
        )
    with pytest.raises(UserError, match=r"data\.max_seconds=2\.2, not 2\.0"):
        add(whisper, corpus, prepared.folder, "data.max_seconds=2.0")
    audio = [folder_source(corpus, "audio")]
    with pytest.raises(UserError, match="holds no audio: prepare it first"):
        add_teacher(settings(whisper, BUCKETS, "data.shard_clips=4"), lambda: audio, prepared.folder, f"{whisper}@1")
    source = folder_source(corpus, "speech")
    longest, shortest = source.recordings()[-1], source.recordings()[0]
    swapped = [replace(r, path=longest.path) if r is shortest else r for r in source.recordings()]
    config = settings(whisper, BUCKETS, "data.shard_clips=4")
    with pytest.raises(UserError, match=rf"{re.escape(shortest.source)} has .* s, clip {shortest.name} of it"):
        add_teacher(config, lambda: [replace(source, recordings=lambda: swapped)], prepared.folder, f"{whisper}@1")
    with pytest.raises(UserError, match=rf"clip {shortest.name} .* is not among the recordings"):
        add_teacher(config, lambda: [replace(source, recordings=lambda: swapped[1:])], prepared.folder, f"{whisper}@1")
    name = prepared.teacher("speech").name
    (tmp_path / "copies" / whisper.name).parent.mkdir()
    (tmp_path / "copies" / whisper.name).symlink_to(whisper)
    with pytest.raises(UserError, match=f"that is called {name}, too: rename"):
        add_teacher(config, lambda: [source], prepared.folder, str(tmp_path / "copies" / whisper.name))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_verify_names_every_fault(whisper, corpus, prepared, capsys):
    index = add(whisper, corpus, prepared.folder)
    folder = index.folder
    main(["prepare", "--verify", str(folder)])
    assert "no faults" in capsys.readouterr().out
    shards = index.shards("train", "speech")
    name = list(index.content["domains"]["speech"]["teachers"])[1]
    side = [folder / f"{shard.path.stem}.{name}.tar" for shard in shards]
    flip(shards[0].path, 1500)
    side[1].unlink()
    side[2].write_bytes(side[2].read_bytes() + bytes(512))
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "--verify", str(folder)])
    assert ended.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line]
    damaged = [shards[0].path, side[1], side[2]]
    for line, path, what in zip(said, damaged, ("has SHA-256", "is missing", "bytes, not"), strict=False):
        assert line.startswith(f"{path} ")
        assert what in line
    assert len(said) == 4  # nothing is said twice, and not that what those files hold could not be read
    assert "has 3 faults" in said[3]


def rewrite(index, change):
    """Write index.json with a changed content, checksums of the files as they are now."""
    content = json.loads(json.dumps(index.content))
    domain = content["domains"]["speech"]
    change(content, domain)
    for entry in [*content["shards"], *(f for t in domain["teachers"].values() for f in (t["files"] or {}).values())]:
        path = index.folder / entry["file"]
        entry |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_index(index.folder, content)


def swap_sidecars(content, domain):
    files = list(domain["teachers"].values())[1]["files"]
    first, second = list(files)[:2]
    files[first], files[second] = files[second], files[first]


def set_(*path_and_value):
    *path, last, value = path_and_value

    def change(content, domain):
        place = {"content": content, "domain": domain}
        for key in path:
            place = place[key]
        place[last] = value

    return change


LIES = {
    "clips": (set_("domain", "clips", "train", 3), r"\d+ speech clips of train, not 3"),
    "frames of a shard": (set_("content", "shards", 0, "frames", 7), r"tar has \d+ mel frames, not 7"),
    "bucket": (set_("content", "shards", 0, "bucket", 20), "are more than the 20 of its bucket"),
    "transcripts": (
        set_("content", "shards", 0, "transcribed", {"frames": 1, "mask": "1"}),
        "has transcripts in other",
    ),
    "mel sum": (set_("domain", "mel", "sum", 1.0), r"speech mel sum is -\d+.* not 1\.0"),
    "sidecars swapped": (swap_sidecars, r"has clip \S+ out of order"),
}


@pytest.mark.parametrize("lie", LIES)
def test_verify_reads_what_checksums_cannot_show(whisper, corpus, prepared, lie, capsys):
    change, message = LIES[lie]
    index = add(whisper, corpus, prepared.folder)
    rewrite(index, change)
    errors = run_threads(2, lambda ranks: verify_folder(index.folder, ranks))
    assert all("has" in str(error) and "fault" in str(error) for error in errors)
    assert re.search(message, capsys.readouterr().err)


def test_verify_finds_a_key_twice_and_a_wrong_mean(prepared, capsys):
    first, second = [s for s in prepared.shards("train", "speech") if s.clips == 4][:2]
    second.path.write_bytes(first.path.read_bytes())
    mean = [0.0] * prepared.teacher("speech").dim

    def change(content, domain):
        entry = next(e for e in content["shards"] if e["file"] == second.path.name)
        like = next(e for e in content["shards"] if e["file"] == first.path.name)
        entry |= {name: like[name] for name in ("frames", "transcribed")}
        domain["teachers"][prepared.teacher("speech").name]["mean"] = mean

    rewrite(prepared, change)
    with pytest.raises(UserError, match=r"has \d+ faults"):
        verify_folder(prepared.folder)
    said = capsys.readouterr().err
    with tarfile.open(second.path) as tar:
        key = tar.getnames()[0].partition(".")[0]
    assert f"clip {key} is there 2 times" in said
    assert "the mean of speech's teacher" in said


def test_throughput_is_reported_apart_from_the_index(frozen):
    report = json.loads((frozen.folder / "prepare.json").read_text())
    assert list(report["speech"]) == ["decode", "teacher", "shards"]
    for stage in report["speech"].values():
        assert (stage["clips"], stage["found"], stage["ranks"]) == (24, 0, 1)
        assert 24 / stage["clips_per_s"] == pytest.approx(stage["wall_s"], abs=0.006)
        assert stage["audio_s"] == pytest.approx(sum(frozen.content["domains"]["speech"]["seconds"].values()), abs=0.1)
    assert "wall_s" not in (frozen.folder / "index.json").read_text()
