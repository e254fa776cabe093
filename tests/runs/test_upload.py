"""Copies of a run's checkpoints elsewhere (train.copy_to)."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from agrepa_fast.checkpoints.find import damage
from agrepa_fast.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("step*")}


@pytest.fixture
def copy(tmp_path_factory) -> Path:
    """A folder outside the run's, which holds a copy."""
    return tmp_path_factory.mktemp("copy")


class TestMirror:
    def copies(self, made, to, **train):
        ours, save = made(copy_to=to, **train)
        return ours, save, ours.mirror

    @pytest.mark.parametrize("scheme", ["", "memory://"])
    def test_it_holds_what_the_run_holds(self, scheme, made, tmp_path, copy):
        to = f"{scheme}{copy}"
        ours, save, mirror = self.copies(made, to, keep=2, keep_best=0)
        for step in (1, 2, 3):
            assert save(step)
            ours.close()
        found = {path.removeprefix(mirror.root).lstrip("/") for path in mirror.fs.find(mirror.root)}
        here = {str(file.relative_to(tmp_path)) for file in ours.folder.rglob("*") if file.is_file()}
        assert found == here | {"config.yaml"}
        assert {name.split("/")[1] for name in found if "step" in name} == {"step00000002", "step00000003"}
        assert mirror.fs.cat(f"{mirror.root}/checkpoints/latest") == b"step00000003"
        assert not [line for line in made.said if "failed" in line]

    def test_a_failure_is_said_and_made_good_at_the_next_save(self, made, copy, monkeypatch):
        ours, save, mirror = self.copies(made, f"{copy}", keep=2, keep_best=0)
        put = mirror._put

        def fails(file, name):
            if file.name == "ema.safetensors":
                raise OSError("the network is down")
            put(file, name)

        monkeypatch.setattr(mirror, "_put", fails)
        assert save(1)
        ours.close()
        assert [line for line in made.said if "failed" in line] == 2 * [
            f"the copy to {copy} failed (the network is down): tried again at the next save, or at the end"
        ]
        assert "is incomplete" in made.said[-1]
        assert not (copy / "checkpoints" / "step00000001" / "checkpoint.json").exists()
        monkeypatch.setattr(mirror, "_put", put)
        assert save(2)
        ours.close()
        assert names(copy / "checkpoints") == {"step00000001", "step00000002"}
        assert all(damage(path) is None for path in (copy / "checkpoints").glob("step*"))

    def test_a_failure_after_the_last_save_is_made_good_at_the_end(self, made, copy, monkeypatch):
        ours, save, mirror = self.copies(made, f"{copy}", keep=2, keep_best=0)
        put, faults = mirror._put, [OSError("the network is down")]

        def fails_once(file, name):
            if faults:
                raise faults.pop()
            put(file, name)

        monkeypatch.setattr(mirror, "_put", fails_once)
        assert save(1)
        ours.close()
        assert damage(copy / "checkpoints" / "step00000001") is None
        assert not [line for line in made.said if "incomplete" in line]

    def test_a_best_that_the_run_no_longer_keeps_goes_from_the_copy(self, made, copy):
        for step, keep_best in ((1, 1), (2, 0)):
            ours, save, _ = self.copies(made, f"{copy}", keep=1, keep_best=keep_best)
            ours.score = 1.0
            assert save(step)
            ours.close()
            found = {path.name for path in (copy / "checkpoints").iterdir()}
            assert found == {"latest", f"step{step:08d}"} | ({"best"} if keep_best else set())

    def test_missing_credentials_are_one_line(self, made, copy, monkeypatch):
        def fails(self, path):
            raise RuntimeError("no credentials")  # botocore's are no OSError, either

        monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.isdir", fails)
        with pytest.raises(UserError, match=r"cannot be read \(no credentials\)"):
            made(copy_to=f"{copy}")

    def test_a_slow_copy_skips_to_the_newest_and_is_not_rotated_away(self, made, copy, monkeypatch):
        ours, save, mirror = self.copies(made, f"{copy}", keep=1, keep_best=0)
        begun, go, put = threading.Event(), threading.Event(), mirror._put

        def slow(file, name):
            if file.name != "config.yaml":  # which is copied before every checkpoint
                begun.set()
                assert go.wait(60)
            put(file, name)

        monkeypatch.setattr(mirror, "_put", slow)
        assert save(1)
        assert begun.wait(60)
        for step in (2, 3):
            assert save(step)
        assert names(ours.folder) == {"step00000001", "step00000003"}
        go.set()
        ours.close()
        assert names(copy / "checkpoints") == {"step00000001", "step00000003"}  # the next save drops the first
        assert all(damage(path) is None for path in (copy / "checkpoints").glob("step*"))

    def test_a_run_that_is_stopped_leaves_its_copy_to_the_resume(self, made, copy, monkeypatch):
        ours, save, mirror = self.copies(made, f"{copy}", keep=1)
        ended = threading.Event()

        def slow(*_):
            assert ended.wait(60)
            raise OSError("the process has ended")

        monkeypatch.setattr(mirror, "_put", slow)
        assert save(1)
        ours.leave_copy()
        ours.close()
        assert made.said == [f"the copy to {copy} is incomplete: --resume completes it"]
        thread = mirror._thread
        ended.set()
        thread.join()
        ours, _, _ = self.copies(made, f"{copy}", keep=1)
        made.resume(ours, 1)
        ours.continue_copy()
        ours.close()
        assert damage(copy / "checkpoints" / "step00000001") is None

    def test_copies_of_another_run_are_not_dropped(self, made, copy):
        """A new run with the settings of one whose disk was lost."""
        copied = copy / "checkpoints" / "step00000009"
        copied.mkdir(parents=True)
        with pytest.raises(UserError, match="holds step00000009 of another run"):
            made(copy_to=f"{copy}")
        (copied / "checkpoint.json").write_text('{"run": "other"}')
        with pytest.raises(UserError, match="holds step00000009 of another run"):
            made(copy_to=f"{copy}")
        (copied / "checkpoint.json").write_text('{"run": "this"}')
        made(copy_to=f"{copy}")
        (copy / "config.yaml").write_text("run:\n  id: other")
        with pytest.raises(UserError, match=r"holds config\.yaml of another run"):
            made(copy_to=f"{copy}")

    @pytest.mark.parametrize("place", [".", "checkpoints", "..", "link"])
    def test_the_run_s_own_folder_is_refused(self, place, made, tmp_path, copy):
        """A run goes on from its copy, with settings that name the copy's folder."""
        (copy / "link").symlink_to(tmp_path)
        to = copy / "link" if place == "link" else tmp_path / place
        with pytest.raises(UserError, match=r"train\.copy_to=.* set train\.copy_to=null or another folder"):
            made(copy_to=f"{to}")

    def test_another_run_that_came_later_ends_the_round(self, made, copy):
        """Two runs that both began before either had copied."""
        ours, save, _ = self.copies(made, f"{copy}", keep=1)
        foreign = copy / "checkpoints" / "step00000001"
        foreign.mkdir(parents=True)
        (foreign / "checkpoint.json").write_text('{"run": "other"}')
        assert save(1)
        ours.close()
        assert [line for line in made.said if "holds step00000001 of another run: choose a folder of its own" in line]
        assert [path.name for path in foreign.iterdir()] == ["checkpoint.json"]
        assert (foreign / "checkpoint.json").read_text() == '{"run": "other"}'

    def test_folders_that_the_run_did_not_make_stay(self, made, copy):
        theirs = copy / "checkpoints" / "whisper" / "model.bin"
        theirs.parent.mkdir(parents=True)
        theirs.touch()
        ours, save, _ = self.copies(made, f"{copy}", keep=1)
        assert save(1)
        ours.close()
        shutil.copytree(ours.folder / "step00000001", ours.folder / "keep")
        assert save(2)
        ours.close()
        assert {path.name for path in theirs.parents[1].glob("*/")} == {"whisper", "step00000002"}
        assert [path.name for path in theirs.parent.iterdir()] == ["model.bin"]

    def test_a_whole_copy_of_a_damaged_checkpoint_stays(self, made, copy):
        ours, save, mirror = self.copies(made, f"{copy}", keep=1)
        assert save(1)
        ours.close()
        os.truncate(ours.folder / "step00000001" / "model.safetensors", 3)
        mirror._round()
        assert damage(copy / "checkpoints" / "step00000001") is None

    def test_a_checkpoint_that_was_saved_again_is_copied_again(self, made, copy):
        """A run that went on from an older checkpoint reaches a step once more."""
        ours, save, _ = self.copies(made, f"{copy}", keep=1)
        assert save(1)
        ours.close()
        shutil.rmtree(ours.folder / "step00000001")
        assert save(1)
        ours.close()
        marker = Path("checkpoints", "step00000001", "checkpoint.json")
        assert (copy / marker).read_bytes() == (ours.folder.parent / marker).read_bytes()

    def test_a_place_that_fsspec_does_not_know_is_refused(self, made):
        with pytest.raises(UserError, match=r"train\.copy_to=nowhere://x"):
            made(copy_to="nowhere://x")
