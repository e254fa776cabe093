"""Shards behind URLs: a real http server that fails, stalls and dies in the middle of a body."""

import time

import fsspec
import pytest

from agrepa_fast.config import DataConfig
from agrepa_fast.data import locations
from agrepa_fast.data.index import load_index
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.data.loading import TrainBatches
from agrepa_fast.data.locations import ReadError, Remote, locate, read_object, writable
from agrepa_fast.data.matching import matching_index
from agrepa_fast.data.reading import OpenShard, fixed_clips, read_shard
from agrepa_fast.errors import UserError

from ..testing import write_small_shards
from .server import serving

CONFIG = {"sample_rate": 16000, "n_mels": 8, "f_max": 8000.0, "codebook": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote") / "shards"
    write_small_shards(folder)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(locations, "BACK_OFF", 0.01)
    with serving(folder) as server:
        yield server


def remote(server, name="", **settings) -> Remote:
    return locate(f"{server.url}/{name}", **settings)


def test_a_folder_behind_a_url_reads_as_the_folder_itself(folder, server):
    local, there = load_index(folder), load_index(remote(server))
    assert there.content == local.content
    assert (there.code_mels() == local.code_mels()).all()
    ours, theirs = (fixed_clips(index, "train", "audio", 20) for index in (local, there))
    assert [clip.key for clip in ours] == [clip.key for clip in theirs]
    assert all((a.mel == b.mel).all() for a, b in zip(ours, theirs, strict=True))
    data = DataConfig(path=server.url, **CONFIG)
    assert matching_index(data).mel_mean == local.mel_mean


def test_any_file_system_of_fsspec(folder):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    index = load_index("memory://bucket")
    assert len(read_shard(index.shards("val", "speech")[0], index)) == 5


@pytest.mark.parametrize("moods", [["500", "500"], ["die", "500"], ["short", "die"], ["stall"], ["drip"]], ids=str)
def test_a_server_that_recovers_costs_nothing_but_time(moods, folder, server):
    name = "train-audio-0000.tar"
    server.moods[name] = list(moods)
    place = remote(server, name, timeout=2, attempts=3)
    content = (folder / name).read_bytes()
    assert read_object(place, len(content)) == content
    assert server.requests[name] == len(moods) + (moods != ["drip"])


def test_a_server_that_stays_broken_is_named_after_the_last_attempt(server, monkeypatch):
    name, waits = "train-audio-0000.tar", []
    server.moods[name] = ["500"] * 99
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(ReadError, match=rf"{name}: .*500.*\(5 attempts of 9 s\)") as raised:
        read_object(remote(server, name, timeout=9, attempts=5))
    assert raised.value.kind == "unreadable"
    assert "\n" not in str(raised.value)
    assert waits == [0.01, 0.02, 0.04, 0.08]


def test_a_stalled_server_is_not_waited_for(server):
    name = "train-audio-0000.tar"
    server.moods[name] = ["stall"] * 9
    start = time.perf_counter()
    with pytest.raises(ReadError, match="attempts"):
        read_object(remote(server, name, timeout=0.1, attempts=2))
    assert time.perf_counter() - start < 5


def test_what_does_not_exist_is_not_asked_for_again(server):
    with pytest.raises(ReadError, match=r"nothing\.tar does not exist") as raised:
        read_object(remote(server, "nothing.tar"))
    assert raised.value.kind == "missing"
    assert server.requests["nothing.tar"] == 1
    with pytest.raises(UserError, match="does not exist"):
        load_index(f"{server.url}/nowhere")


def test_a_body_that_stays_short_is_a_truncated_shard(folder, server):
    shard = load_index(remote(server, timeout=9, attempts=2)).shards("train", "speech")[0]
    server.moods[shard.path.name] = ["short"] * 2
    opened = OpenShard(shard, load_index(folder))
    assert opened.error.kind == "truncated"
    assert 0 < len(opened.clips) < shard.clips


def test_local_first_and_no_shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("pipe:touch here") == locate("pipe:touch here", 1, 1)
    with pytest.raises(UserError, match="is no folder"):
        load_index("pipe:touch here")
    assert not (tmp_path / "here").exists()
    local = tmp_path / "memory:" / "bucket"
    local.mkdir(parents=True)
    assert not isinstance(locate("memory://bucket"), Remote)
    assert isinstance(locate("memory://other"), Remote)
    with pytest.raises(UserError, match="chained"):
        locate("filecache::http://127.0.0.1/x")
    with pytest.raises(UserError, match="cannot be opened"):
        locate("nosuch://bucket/x")
    with pytest.raises(UserError, match=r"data\.path=memory://other: nothing is written"):
        writable("memory://other", "data.path")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_from_a_url_also_in_loader_processes(workers, folder, server):
    index = load_index(remote(server))
    read_shard(index.shards("val", "audio")[0], index)
    server.moods["train-speech-0001.tar"] = ["500"]
    batches = TrainBatches(index, DataConfig(workers=workers), BatchLayout(6, 1, 0, 1), seed=0, center=True)
    local = TrainBatches(load_index(folder), DataConfig(), BatchLayout(6, 1, 0, 1), seed=0, center=True)
    for _ in range(8):
        there, here = next(batches), next(local)
        assert there.keys == here.keys
        assert (there.mel == here.mel).all()
        assert not there.faults
