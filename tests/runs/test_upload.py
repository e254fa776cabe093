"""Copies of a run's checkpoints elsewhere (train.copy_to)."""

import threading
from pathlib import Path

import pytest

from agrepa_fast.checkpoints.find import damage
from agrepa_fast.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("step*")}


class TestMirror:
    def copies(self, made, to, **train):
        ours, save = made(copy_to=to, **train)
        return ours, save, ours.mirror

    @pytest.mark.parametrize("scheme", ["", "memory://"])
    def test_it_holds_what_the_run_holds(self, scheme, made, tmp_path):
        to = f"{scheme}{tmp_path}/copy"
        ours, save, mirror = self.copies(made, to, keep=2, keep_best=0)
        (tmp_path / "config.yaml").write_text("run: {}")
        for step in (1, 2, 3):
            assert save(step)
            ours.close()
        found = {path.removeprefix(mirror.root).lstrip("/") for path in mirror.fs.find(mirror.root)}
        here = {str(file.relative_to(tmp_path)) for file in ours.folder.rglob("*") if file.is_file()}
        assert found == here | {"config.yaml"}
        assert {name.split("/")[1] for name in found if "step" in name} == {"step00000002", "step00000003"}
        assert mirror.fs.cat(f"{mirror.root}/checkpoints/latest") == b"step00000003"
        assert not [line for line in made.said if "failed" in line]

    def test_a_failure_is_said_and_made_good_at_the_next_save(self, made, tmp_path, monkeypatch):
        ours, save, mirror = self.copies(made, f"{tmp_path}/copy", keep=2, keep_best=0)
        put = mirror._put

        def fails(file, name):
            if file.name == "ema.safetensors":
                raise OSError("the network is down")
            put(file, name)

        monkeypatch.setattr(mirror, "_put", fails)
        assert save(1)
        ours.close()
        assert [line for line in made.said if "failed" in line] == 2 * [
            f"the copy to {tmp_path}/copy failed (the network is down): tried again at the next save, or at the end"
        ]
        assert "is incomplete" in made.said[-1]
        copy = tmp_path / "copy" / "checkpoints"
        assert not (copy / "step00000001" / "checkpoint.json").exists()
        monkeypatch.setattr(mirror, "_put", put)
        assert save(2)
        ours.close()
        assert names(copy) == {"step00000001", "step00000002"}
        assert all(damage(copy / name) is None for name in names(copy))

    def test_a_failure_after_the_last_save_is_made_good_at_the_end(self, made, tmp_path, monkeypatch):
        ours, save, mirror = self.copies(made, f"{tmp_path}/copy", keep=2, keep_best=0)
        put, faults = mirror._put, [OSError("the network is down")]

        def fails_once(file, name):
            if faults:
                raise faults.pop()
            put(file, name)

        monkeypatch.setattr(mirror, "_put", fails_once)
        assert save(1)
        ours.close()
        assert damage(tmp_path / "copy" / "checkpoints" / "step00000001") is None
        assert not [line for line in made.said if "incomplete" in line]

    def test_missing_credentials_are_one_line(self, made, tmp_path, monkeypatch):
        def fails(self, path):
            raise RuntimeError("no credentials")  # botocore's are no OSError, either

        monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.isdir", fails)
        with pytest.raises(UserError, match=r"cannot be read \(no credentials\)"):
            made(copy_to=f"{tmp_path}/copy")

    def test_a_slow_copy_skips_to_the_newest_and_is_not_rotated_away(self, made, tmp_path, monkeypatch):
        ours, save, mirror = self.copies(made, f"{tmp_path}/copy", keep=1, keep_best=0)
        begun, go, put = threading.Event(), threading.Event(), mirror._put

        def slow(file, name):
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
        copy = tmp_path / "copy" / "checkpoints"
        assert names(copy) == {"step00000001", "step00000003"}  # the run drops the first at its next save
        assert all(damage(copy / name) is None for name in names(copy))

    def test_copies_of_another_run_are_not_dropped(self, made, tmp_path):
        """A new run with the settings of one whose disk was lost."""
        copy = tmp_path / "copy" / "checkpoints" / "step00000009"
        copy.mkdir(parents=True)
        (copy / "checkpoint.json").write_text('{"run": "other"}')
        with pytest.raises(UserError, match="holds step00000009 of another run"):
            made(copy_to=f"{tmp_path}/copy")
        (copy / "checkpoint.json").write_text('{"run": "this"}')
        made(copy_to=f"{tmp_path}/copy")

    def test_a_place_that_fsspec_does_not_know_is_refused(self, made):
        with pytest.raises(UserError, match=r"train\.copy_to=nowhere://x"):
            made(copy_to="nowhere://x")
