"""Saves that are whole or absent, and what becomes of old checkpoints."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agrepa_fast import config_file
from agrepa_fast.checkpoints import save as checkpoint
from agrepa_fast.checkpoints.find import complete_checkpoints, damage, find_checkpoint, resolve_checkpoint
from agrepa_fast.checkpoints.load import load_checkpoint
from agrepa_fast.checkpoints.retention import remove_checkpoint
from agrepa_fast.checkpoints.shard_facts import shard_hash
from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError
from agrepa_fast.files import write_atomically


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("step*")}


def test_a_checkpoint_is_complete_last_of_all_and_the_newest_stay(made, tmp_path, monkeypatch):
    order = []

    def recorded(path: Path, text: str) -> None:
        order.append(path.name)
        write_atomically(path, text)

    monkeypatch.setattr(checkpoint, "write_atomically", recorded)
    ours, save = made(keep=2)
    for step in (1, 2, 3):
        assert save(step)
        assert damage(tmp_path / "checkpoints" / f"step{step:08d}") is None
    assert order == ["checkpoint.json", "latest"] * 3
    assert names(ours.folder) == {"step00000002", "step00000003"}
    assert find_checkpoint(tmp_path, "latest").name == "step00000003"
    (ours.folder / "step00000009").mkdir()  # an interrupted save
    with pytest.raises(UserError, match="no checkpoint 'step00000009'"):
        find_checkpoint(tmp_path, "step00000009")
    ours.remove_interrupted()
    assert not (ours.folder / "step00000009").exists()


def test_a_removal_that_is_cut_short_leaves_no_checkpoint(made, tmp_path, monkeypatch):
    ours, save = made(keep=1, keep_best=0)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: None)
    for step in (1, 2):
        assert save(step)
    assert (ours.folder / "step00000001" / "model.safetensors").is_file()
    with pytest.raises(UserError, match="no checkpoint 'step00000001'"):
        find_checkpoint(tmp_path, "step00000001")


def test_a_clock_that_was_set_back_does_not_make_the_newest_the_oldest(made, monkeypatch):
    ours, save = made(keep=2, keep_best=0)
    now = [2000, 3000, 1000, 1001]  # nanoseconds of each save
    monkeypatch.setattr(checkpoint.time, "time_ns", lambda: now.pop(0))
    for step in (1, 2, 3, 4):
        assert save(step)
    assert names(ours.folder) == {"step00000003", "step00000004"}
    assert find_checkpoint(ours.folder.parent, "latest").name == "step00000004"


def test_what_somebody_put_beside_the_checkpoints_stays(made, tmp_path):
    ours, save = made(keep=1, keep_best=1)
    ours.score = 1.0
    assert save(1)
    elsewhere = shutil.copytree(ours.folder / "step00000001", tmp_path / "step00000009")
    for name in ("keep", "step00000001-keep"):
        shutil.copytree(ours.folder / "step00000001", ours.folder / name)
    (ours.folder / "step00000009").symlink_to(elsewhere)
    (ours.folder / "notes").mkdir()
    ours.score = 2.0
    for step in (2, 3, 4):
        assert save(step)
    ours.remove_interrupted()
    kept = {"keep", "step00000001-keep", "step00000009", "notes", "step00000001", "step00000004"}
    assert {path.name for path in ours.folder.iterdir() if path.is_dir()} == kept
    assert damage(elsewhere) is None
    assert find_checkpoint(tmp_path, "best").name == "step00000001"


def test_every_file_is_on_the_disk_before_the_marker(made, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(Path(f"/proc/self/fd/{fd}").readlink()) or fsync(fd))
    ours, save = made()
    assert save(1)
    path = ours.folder / "step00000001"
    parts = [number for number, file in enumerate(flushed) if file.name.startswith(".checkpoint.json.")]
    before = flushed[: parts[0]]
    assert {file.name for file in path.iterdir()} - {"checkpoint.json"} <= {file.name for file in before}


def test_the_best_stay_beside_the_newest(made, tmp_path):
    ours, save = made(keep=1, keep_best=2)
    for step, score in enumerate((None, 3.0, 1.0, float("nan"), 1.0, 2.0, 4.0)):
        ours.score = score
        save(step)
    # of equal losses the earlier save; the newest beside them
    assert names(ours.folder) == {"step00000002", "step00000004", "step00000006"}
    assert find_checkpoint(tmp_path, "best").name == "step00000002"
    assert resolve_checkpoint(ours.folder / "best").name == "step00000002"
    assert resolve_checkpoint(ours.folder / "latest").name == resolve_checkpoint(tmp_path).name == "step00000006"


def test_a_resume_that_keeps_no_best_leaves_no_name_of_one(made, tmp_path):
    ours, save = made(keep=1, keep_best=1)
    for step, score in enumerate((1.0, 2.0)):
        ours.score = score
        save(step)
    assert find_checkpoint(tmp_path, "best").name == "step00000000"
    ours, save = made(keep=1, keep_best=0)
    made.resume(ours, 1)
    save(2)
    assert {path.name for path in ours.folder.iterdir()} == {"latest", "step00000002"}
    with pytest.raises(UserError, match="no checkpoint 'best': there are step00000002"):
        find_checkpoint(tmp_path, "best")


def test_losses_on_other_clips_or_times_are_no_rivals(made, tmp_path):
    """A resume may change what validation measures. Until it has measured once, the ranking of before stands."""
    ours, save = made(keep=1, keep_best=1)
    for step, score in enumerate((1.0, 2.0)):
        ours.score = score
        save(step)
    ours.config = replace(ours.config, eval=replace(ours.config.eval, times=[0.1]))
    made.resume(ours, 1)
    assert ours.score is None
    save(2)
    assert find_checkpoint(tmp_path, "best").name == "step00000000"
    for step, score in enumerate((4.0, 3.0, 5.0), start=3):
        ours.score = score
        save(step)
    assert find_checkpoint(tmp_path, "best").name == "step00000004"
    assert names(ours.folder) == {"step00000004", "step00000005"}
    made.resume(ours, 5)
    assert ours.score == 5.0


def test_a_disk_that_is_full_at_any_file_leaves_the_older_checkpoint(made, tmp_path, monkeypatch):
    ours, save = made(keep=1)
    assert save(1)
    before = sorted((path, path.stat().st_size) for path in ours.folder.rglob("*") if path.is_file())
    for victim in range(20):
        count = iter(range(99))

        def full(write, path_of, count=count, victim=victim):
            def instead(*args, **kwargs):
                if next(count) == victim:
                    path_of(args).write_bytes(b"half")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return write(*args, **kwargs)

            return instead

        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", full(torch.save, lambda args: Path(args[1])))
            patch.setattr(checkpoint, "save_tensors", full(checkpoint.save_tensors, lambda args: args[1]))
            patch.setattr(Path, "write_text", full(Path.write_text, lambda args: args[0]))
            for module in (checkpoint, config_file):
                half_written = full(write_atomically, lambda args: args[0].with_suffix(".part"))
                patch.setattr(module, "write_atomically", half_written)
            patch.setattr(Path, "mkdir", full(Path.mkdir, lambda args: tmp_path / "elsewhere"))
            ended = save(2)
        if ended:
            break
        assert "No space left" in made.said[-1]
        assert "the next save tries again" in made.said[-1]
        assert names(ours.folder) == {"step00000001"}, victim
        (ours.folder / "latest.part").unlink(missing_ok=True)
        assert before == sorted((path, path.stat().st_size) for path in ours.folder.rglob("*") if path.is_file())
        assert find_checkpoint(tmp_path, "latest").name == "step00000001"
    assert victim == 11  # the folder, nine files and `latest` failed one after the other
    assert names(ours.folder) == {"step00000002"}
    monkeypatch.setattr(torch, "save", full(torch.save, lambda args: Path(args[1]), iter([victim])))
    with pytest.raises(UserError, match="make room, then --resume latest"):
        save(3, must_succeed=True)


def unreadable(*_: object) -> None:
    raise UserError("step00000001/checkpoint.json cannot be read: Input/output error")


def test_an_older_checkpoint_that_cannot_be_read_costs_the_save(made, monkeypatch):
    ours, save = made(keep=1)
    assert save(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "complete_checkpoints", unreadable)
        assert not save(2)
    assert made.said[-1].endswith("cannot be read: Input/output error; training goes on, and the next save tries again")
    assert names(ours.folder) == {"step00000001"}
    assert save(2)


def test_a_part_that_cannot_be_removed_goes_at_the_next_start(made, monkeypatch):
    def read_only(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    ours, save = made()
    ours.world = 2
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_checkpoint", read_only)
        assert not save(1)
    assert names(ours.folder) == {"step00000001"}
    ours.remove_interrupted()
    assert not names(ours.folder)


def test_old_checkpoints_that_cannot_be_removed_stay_until_the_next_save(made, monkeypatch):
    ours, save = made(keep=1)
    assert save(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove_old", unreadable)
        assert save(2)
    assert "stay until the next save (step00000001/checkpoint.json cannot be read" in made.said[-1]
    assert save(3)
    assert names(ours.folder) == {"step00000003"}


def test_a_checkpoint_that_lacks_the_files_of_a_rank_is_none(made):
    ours, save = made()
    ours.world = 2
    assert not save(1)
    assert "rank1.safetensors is missing: run.dir has to be on storage that all nodes share" in made.said[-1]
    assert not names(ours.folder)


def test_a_kill_at_any_file_of_a_save_leaves_a_run_to_resume(saved, made, tmp_path):
    """Each file half written, with those before it: removed at the next start, and never taken for a checkpoint."""
    whole = saved / "checkpoints" / "step00000005"
    files = sorted((file for file in whole.iterdir()), key=lambda file: file.stat().st_mtime_ns)
    assert files[-1].name == "checkpoint.json"
    ours, _ = made()
    for number, victim in enumerate(files):
        shutil.copytree(whole.with_name("step00000003"), ours.folder / "step00000003", copy_function=os.link)
        part = ours.folder / "step00000005"
        part.mkdir()
        for file in files[:number]:
            os.link(file, part / file.name)
        name = victim.name if victim.name != "checkpoint.json" else "checkpoint.json.tmp"
        (part / name).write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        (ours.folder / "latest").write_text("step00000003")
        assert find_checkpoint(tmp_path, "latest").name == "step00000003"
        ours.remove_interrupted()
        assert names(ours.folder) == {"step00000003"}
        shutil.rmtree(ours.folder)


def test_files_that_a_crash_of_the_machine_cut_are_noticed(saved, tmp_path):
    """The marker was written, other files were not: `latest` falls back to the newest that is whole."""
    for file in (saved / "checkpoints" / "step00000005").iterdir():
        run = tmp_path / file.name
        shutil.copytree(saved / "checkpoints", run / "checkpoints")
        os.truncate(run / "checkpoints" / "step00000005" / file.name, file.stat().st_size // 2)
        said = []
        assert find_checkpoint(run, "latest", said.append).name == "step00000003"
        assert "step00000005 is damaged" in said[0]
        assert file.name in said[0]
        with pytest.raises(UserError, match="is damaged"):
            find_checkpoint(run, "step00000005")


def test_a_checkpoint_that_is_removed_amid_a_listing_is_in_it_or_not(saved, tmp_path, monkeypatch):
    """The one that the other process removes goes before the n-th look at a file."""
    first, second = "step00000003", "step00000005"
    for moment in range(999):
        folder, looks = tmp_path / f"{moment}", iter(range(9999))
        shutil.copytree(saved / "checkpoints", folder, copy_function=os.link)

        def removing(look, folder=folder, looks=looks, moment=moment):
            def instead(file, *args, **kwargs):
                if next(looks) == moment:
                    remove_checkpoint(folder / first)
                return look(file, *args, **kwargs)

            return instead

        with monkeypatch.context() as patch:
            for name in ("stat", "read_bytes"):
                patch.setattr(Path, name, removing(getattr(Path, name)))
            found = [path.name for path in complete_checkpoints(folder)]
        assert found in ([first, second], [second]), moment
        if next(looks) <= moment:
            break
    assert moment > 10
    assert found == [first, second]


def test_a_teacher_that_is_added_to_the_shards_is_no_change_of_the_run(preset):
    index = load_index(preset.parent)
    content = json.loads(json.dumps(index.content))
    content["domains"]["speech"]["teachers"]["later"] = {"spec": "other", "dim": 2, "rate": None, "files": None}
    assert shard_hash(replace(index, content=content)) == shard_hash(index)
    content["domains"]["speech"]["teachers"]["teacher_speech"]["mean"][0] += 1
    assert shard_hash(replace(index, content=content)) != shard_hash(index)


def test_a_checkpoint_of_another_run_is_refused(saved, made):
    ours, _ = made()
    foreign = ours.folder / "step00000003"
    shutil.copytree(saved / "checkpoints" / foreign.name, foreign)
    with pytest.raises(UserError, match=r"another run.*train\.start_from="):
        load_checkpoint(foreign, ours, None, None, None)


def test_a_save_that_fails_says_why(tmp_path):
    """safetensors has reasons that begin with an empty line."""

    def fail():
        raise RuntimeError("\n    Some tensors share memory\n")

    write = checkpoint._Writer(tmp_path)
    write(fail)
    assert "Some tensors share memory" in write.failure
    assert "\n" not in write.failure
