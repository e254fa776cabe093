"""agrepa prepare on several ranks: the same bytes as on one, whatever ends a run on the way, and on however many ranks
it goes on. Ranks are processes where one is killed or a launcher starts them, and threads elsewhere."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from agrepa_fast.cli import main
from agrepa_fast.corpora.folder import list_folder
from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError
from agrepa_fast.prepare import out_folder, passes
from agrepa_fast.prepare.passes import BATCH
from agrepa_fast.prepare.pipeline import prepare_folder
from agrepa_fast.ranks import Ranks
from agrepa_fast.teachers.whisper import WhisperTeacher

from ..ranks import ROOT, fork_ranks
from .test_prepare import contents, settings, write_bad, write_corpus

OVERRIDES = ("data.bucket_seconds=[1.0,1.1,1.8]", "data.teacher_rate=10", "data.shard_clips=4")
CLIPS = 24


def prepare_until(arguments: list[str], end: str, files: dict[int, int]) -> None:
    """One rank of the command. files: how many files a rank renames into place before it ends, by `end`: "kill" or
    "full"."""
    left, replace = files.get(int(os.environ["RANK"]), 0), Path.replace

    def count(self, target):
        nonlocal left
        left -= 1
        if left == 0 and end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace(self, target)

    Path.replace = count
    main(arguments)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), CLIPS)


@pytest.fixture(scope="module")
def single(whisper, corpus, tmp_path_factory):
    """What one rank writes without an interruption."""
    out = tmp_path_factory.mktemp("single") / "shards"
    return prepare_folder(settings(whisper, *OVERRIDES), corpus, "speech", out)


@pytest.fixture
def command(whisper, corpus, tmp_path):
    """Start `agrepa prepare folder` into tmp_path/out on some ranks; (exit code, output) of each."""
    overrides = [f"data.speech_teacher={whisper}", "data.codebook=8", *OVERRIDES]
    arguments = ["prepare", "folder", str(corpus), "--domain", "speech", "--out", str(tmp_path / "out"), *overrides]

    def run(ranks, end="", files=()):
        ended = fork_ranks(ranks, prepare_until, arguments, end, dict(files))
        return [(rank.code, rank.output) for rank in ended]

    return run


def run_threads(world, action):
    """action(ranks) on every rank, in threads that exchange what processes would through gloo; each one's result or
    UserError."""
    board, barrier, results, failed = [None] * world, threading.Barrier(world, timeout=120), [None] * world, set()
    loading = threading.Lock()

    class Store:
        set = staticmethod(lambda key, _: failed.add(key))
        check = staticmethod(lambda keys: failed >= set(keys))

    class Thread(Ranks):
        def _exchange(self, value):
            barrier.wait()
            board[self.rank] = value
            barrier.wait()
            return list(board)

        def _broadcast(self, value):
            return self._exchange(value)[0]

        def load_on_every_rank(self, name, load):
            def alone(device):  # transformers patches its classes while it loads: two threads would leave them so
                with loading:
                    return load(device)

            return super().load_on_every_rank(name, alone)

    def run(rank):
        ranks = Thread(rank, world, Store)
        try:
            try:
                results[rank] = action(ranks)
            except Exception as error:
                ranks.fail_everywhere(error)
                raise
        except UserError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def files_below(folder, pattern):
    return len(list(folder.glob(pattern)))


def places_of_mels(corpus, work):
    """Places, among the recordings, of those whose mel is there."""
    there = {path.name.rpartition("-")[0] for path in work.glob("*-mel-*/*/*.npz")}
    return [place for place, r in enumerate(list_folder(corpus, "speech")[0]) if r.name in there]


def test_any_number_of_ranks_writes_the_same_bytes(single, whisper, corpus, tmp_path):
    config, out = settings(whisper, *OVERRIDES), tmp_path / "out"
    indices = run_threads(3, lambda ranks: prepare_folder(config, corpus, "speech", out, ranks))
    assert [index.content for index in indices] == [single.content] * 3
    assert contents(out) == contents(single.folder)


def test_batches_do_not_depend_on_ranks_or_interruptions(whisper, corpus, tmp_path, monkeypatch):
    """On GPUs a clip's numbers depend on the batch that it is in; on a CPU a teacher is made to."""
    frames, write_work, written = WhisperTeacher.frames, passes.write_work, []

    def of_batch(self, waves):
        samples = sum(map(len, waves))
        return [found + samples % 97 / 97 for found in frames(self, waves)]

    def stops_amid_a_batch(file, **arrays):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(file)
        write_work(file, **arrays)

    monkeypatch.setattr(WhisperTeacher, "frames", of_batch)
    config, outs = settings(whisper), [tmp_path / name for name in ("single", "ranks", "resumed")]
    prepare_folder(config, corpus, "speech", outs[0])
    run_threads(3, lambda ranks: prepare_folder(config, corpus, "speech", outs[1], ranks))
    with monkeypatch.context() as patch:
        patch.setattr(passes, "write_work", stops_amid_a_batch)
        with pytest.raises(KeyboardInterrupt):
            prepare_folder(config, corpus, "speech", outs[2])
    run_threads(2, lambda ranks: prepare_folder(config, corpus, "speech", outs[2], ranks))
    assert contents(outs[1]) == contents(outs[2]) == contents(outs[0])


def test_shards_of_other_settings_are_never_taken_for_these(single, whisper, corpus, tmp_path, monkeypatch):
    """Runs that end before the index leave more shards than there are to be and, of another teacher, shards of the same
    names and sizes; notes of the first run for that teacher must not vouch for those of the second."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(out_folder, "write_index", lambda *_: 1 / 0)
        for change in ("data.shard_clips=2", "data.val_share=0.1", f"data.speech_teacher={whisper}@1"):
            with pytest.raises(ZeroDivisionError):
                prepare_folder(settings(whisper, *OVERRIDES, change), corpus, "speech", out)
    prepare_folder(settings(whisper, *OVERRIDES), corpus, "speech", out)
    assert contents(out) == contents(single.folder)


def test_interrupted_on_changing_numbers_of_ranks(command, single, whisper, corpus, tmp_path):
    out, work = tmp_path / "out", tmp_path / "out" / ".work"
    # Rank 1 of 2 finds the disk full at its 6th mel, and rank 0 has 12 to make: both end, in one line.
    (code_0, said_0), (code_1, said_1) = command(2, "full", {1: 6})
    assert (code_0, code_1) == (2, 2)
    lines = [line for said in (said_0, said_1) for line in said.splitlines() if line.startswith("agrepa prepare:")]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert "Traceback" not in said_0 + said_1
    mels = files_below(work, "*-mel-*/*/*.npz")
    assert 5 <= mels < CLIPS
    # Rank 0, to which every other recording belongs, is killed after its last mel and two clips' teacher frames; rank 1
    # does not wait for it.
    own = [place for place in places_of_mels(corpus, work) if place % 2 == 0]
    (code_0, _), (code_1, said_1) = command(2, "kill", {0: CLIPS // 2 - len(own) + 3})
    assert (code_0, code_1) == (-signal.SIGKILL, 2)
    assert "agrepa prepare: another rank has ended without a word" in said_1
    assert "Traceback" not in said_1
    assert files_below(work, "*-mel-*/*/*.npz") == CLIPS
    frames = files_below(work, "*-frames-*/*/*.npz")
    assert 2 <= frames < single.clips("train", "speech")
    with pytest.raises(UserError, match=r"has no index\.json"):
        load_index(out)
    # One rank ends it, and has repeated nothing but the batch under way.
    index = prepare_folder(settings(whisper, *OVERRIDES), corpus, "speech", out)
    assert contents(out) == contents(single.folder)
    report = json.loads((out / "prepare.json").read_text())["speech"]
    assert (report["decode"]["clips"], report["decode"]["found"]) == (0, CLIPS)
    assert report["teacher"]["found"] >= frames - BATCH + 1
    assert index.content == single.content


def test_two_ranks_write_the_same_bytes_through_gloo(command, single, tmp_path):
    (code_0, said_0), (code_1, _) = command(2)
    assert (code_0, code_1) == (0, 0), said_0
    assert contents(tmp_path / "out") == contents(single.folder)
    assert "speech: decode: 24 clips" in said_0
    assert "on 2 ranks" in said_0


@pytest.mark.drill
def test_launched_by_torchrun(single, whisper, corpus, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    prepare = ["-m", "agrepa_fast.cli", "prepare", "folder", str(corpus), "--domain", "speech", "--out", "out"]
    overrides = [f"data.speech_teacher={whisper}", "data.codebook=8", *OVERRIDES]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *prepare, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert contents(tmp_path / "out") == contents(single.folder)
    assert "speech: decode: 24 clips" in done.stdout
    assert "on 2 ranks" in done.stdout


def test_ranks_agree_on_what_is_wrong(whisper, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", 12)
    for kind in ("unreadable", "empty", "headeronly", "nan"):
        write_bad(corpus, kind)
    out = tmp_path / "out"
    errors = run_threads(3, lambda ranks: prepare_folder(settings(whisper), corpus, "speech", out, ranks))
    assert {str(error).partition(":")[0] for error in errors} == {"4 of 16 speech recordings cannot be used"}
    assert all(isinstance(error, UserError) for error in errors)


def test_another_domain_does_not_lose_what_an_interrupted_one_has(whisper, corpus, tmp_path, monkeypatch):
    config, out = settings(whisper, *OVERRIDES), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("agrepa_fast.prepare.pipeline.TeacherPass", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_folder(config, corpus, "speech", out)
    prepare_folder(config, corpus, "audio", out)
    assert files_below(out, ".work/speech-mel-*/*/*.npz") == CLIPS
    assert files_below(out, ".work/audio-*") == 0
    run_threads(3, lambda ranks: prepare_folder(config, corpus, "speech", out, ranks))
    assert json.loads((out / "prepare.json").read_text())["speech"]["decode"]["found"] == CLIPS
    assert not (out / ".work").exists()
