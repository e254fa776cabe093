"""Files are whole or absent after a crash at any place, and a folder has one process that writes."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agrepa_fast.config_file import load_config, save_config
from agrepa_fast.errors import UserError
from agrepa_fast.fetch import cache_dir, check_home_cache
from agrepa_fast.files import (
    FolderLock,
    append_text,
    check_readable,
    check_writable,
    file_sha256,
    flush,
    local_path,
    read_text,
    replace_file,
    write_atomically,
)
from agrepa_fast.tensor_files import open_tensors, save_tensors

from ..ranks import ROOT


def test_a_file_is_written_as_text_or_bytes_and_hashed(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    write_atomically(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    with replace_file(path) as file:
        for part in (b"one ", b"two"):
            file.write(part)
    assert path.read_bytes() == b"one two"
    assert file_sha256(path) == hashlib.sha256(b"one two").hexdigest()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def parts():
        yield b"ne"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"), replace_file(path) as file:
        file.writelines(parts())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


KILLED_BEFORE_ITS_NAME = """
import os, signal, sys
from pathlib import Path
from agrepa_fast import files
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomically(Path(sys.argv[1]), b"new")
"""


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    for _ in range(2):
        command = [sys.executable, "-c", KILLED_BEFORE_ITS_NAME, str(path)]
        assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    left = {entry.name for entry in tmp_path.iterdir()} - {"file"}
    assert len(left) == 2  # two temporary files of two names
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_content_and_name_are_on_the_disk_in_this_order(tmp_path, monkeypatch):
    """A rename that reaches the disk before the content leaves an empty file after a power failure."""
    events, fsync, replace = [], os.fsync, Path.replace

    def record_fsync(opened: int) -> None:
        place = Path(f"/proc/self/fd/{opened}").readlink()
        events.append("folder" if place == tmp_path else "content" if place.read_bytes() == b"new" else "part")
        fsync(opened)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", lambda *args: events.append("rename") or replace(*args))
    write_atomically(tmp_path / "file", b"new")
    assert events == ["content", "rename", "folder"]


def test_a_folder_that_cannot_be_flushed_costs_nothing_but_other_failures_are_raised(tmp_path, monkeypatch):
    failure = OSError(errno.EINVAL, "Invalid argument")

    def fail(_opened: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    flush(tmp_path)
    failure = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        flush(tmp_path)


def test_a_kill_leaves_a_run_its_configuration(tmp_path, monkeypatch):
    """config.yaml is written again by every resume."""
    path = tmp_path / "config.yaml"
    save_config(load_config("demo", ["run.seed=7"]), path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_config(load_config("demo", ["run.seed=8"]), path)
    assert load_config(path).run.seed == 7


LOCK_AND_FORK = """
import os, sys
from pathlib import Path
from agrepa_fast.files import FolderLock
lock = FolderLock(Path(sys.argv[1]), "choose another run.dir").acquire()
child = os.fork()
if child == 0:
    os.read(0, 1)  # a loader process, which lives on for a while
    os._exit(0)
print(child, flush=True)
os.read(0, 1)
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", LOCK_AND_FORK, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    child = int(other.stdout.readline())
    line = rf"{tmp_path} is in use by process {other.pid} on .*: wait for it or end it, or choose x"
    for _ in range(2):  # the refused attempt itself leaves the lock as it is
        with pytest.raises(UserError, match=line):
            FolderLock(tmp_path, "choose x").acquire()
    other.kill()
    other.wait()
    os.kill(child, 0)  # a forked process of the holder is still there
    try:
        with FolderLock(tmp_path, "choose x"):
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_process_refuses_itself_and_keeps_its_lock(tmp_path):
    """A second open file of the lock, once closed, would end a record lock of the same process."""
    lock = FolderLock(tmp_path / "new", "choose x").acquire()
    with pytest.raises(UserError, match="in use by this process"):
        FolderLock(tmp_path / "new" / ".." / "new", "choose x").acquire()
    probe = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", probe, str(tmp_path / "new" / ".lock")]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode != 0
    lock.release()
    assert subprocess.run(command).returncode == 0
    with lock:
        pass


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with FolderLock(tmp_path, "choose x"):
        assert (tmp_path / ".lock").is_file()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written \(File exists\): choose another --out"):
        FolderLock(tmp_path / "file", "choose another --out").acquire()


class TestPlaces:
    def test_a_folder_is_checked_before_the_work_and_left_as_it_was(self, tmp_path):
        check_writable(tmp_path / "a" / "b", "--out")
        check_writable(tmp_path, "--out")
        assert not list(tmp_path.iterdir())
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "a", tmp_path / ("a" * 300), Path("/proc/a")):
            with pytest.raises(UserError, match=r"--out .* cannot be written \("):
                check_writable(folder, "--out")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_home_folders(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        assert local_path("~/a") == Path("/home/me/a")
        assert local_path("~") == Path("/home/me")
        assert local_path("a/~") == Path("a/~")
        with pytest.raises(UserError, match="no home folder is known here: set HOME"):
            local_path("~nobody-of-this-name/a")

    def test_a_process_without_home_and_user_entry(self, monkeypatch):
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 12345)  # no entry has it
        with pytest.raises(UserError, match="no home folder is known here: set HOME"):
            local_path("~/a")
        monkeypatch.delenv("AGREPA_CACHE", raising=False)
        with pytest.raises(UserError, match="set AGREPA_CACHE"):
            cache_dir()
        monkeypatch.setenv("AGREPA_CACHE", "relative")
        assert cache_dir() == Path.cwd() / "relative"

    def test_a_file_that_cannot_be_read_is_named_with_the_reason(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for read in (read_text, check_readable):
            with pytest.raises(UserError, match=r"nothing cannot be read: No such file"):
                read(tmp_path / "nothing")
            with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
                read(tmp_path)
            with pytest.raises(UserError, match=r"pipe cannot be read: no regular file"):
                read(tmp_path / "pipe")  # opened, it would wait for a writer


def test_a_log_that_cannot_be_written_costs_a_line(tmp_path):
    assert append_text(tmp_path / "log", "a\n") is None
    assert append_text(tmp_path / "log", "b\n") is None
    assert (tmp_path / "log").read_text() == "a\nb\n"
    assert append_text(tmp_path / "nothing" / "log", "a\n") == "No such file or directory"


def test_packages_that_download_have_a_home_first(monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # no entry has it
    with pytest.raises(UserError, match="no home folder is known here: set HOME"):
        check_home_cache()
    monkeypatch.setenv("HF_HOME", "/somewhere")
    check_home_cache()


class TestTensorFiles:
    @pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
    def test_the_umask_decides_who_may_read_weights(self, mask, tmp_path):
        before = os.umask(mask)
        try:
            save_tensors({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
            (tmp_path / "other").touch()
        finally:
            os.umask(before)
        assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_damage_and_absence_are_told_apart(self, tmp_path):
        save_tensors({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
        with open_tensors(tmp_path / "weights.safetensors", "take another") as file:
            assert file.get_tensor("a").tolist() == [1, 1]
        with pytest.raises(UserError, match="cannot be read: No such file"):
            open_tensors(tmp_path / "nothing", "take another")
        (tmp_path / "weights.safetensors").write_bytes(b"half")
        with pytest.raises(UserError, match=r"no whole safetensors file .*: take another"):
            open_tensors(tmp_path / "weights.safetensors", "take another")
