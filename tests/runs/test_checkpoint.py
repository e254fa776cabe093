"""Saves that are whole or absent, resumes on other ranks and stages, and what becomes of old checkpoints."""

import errno
import json
import os
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agrepa_fast import config_file
from agrepa_fast.checkpoints import save as checkpoint
from agrepa_fast.checkpoints.weights import damage, find_checkpoint, resolve_checkpoint
from agrepa_fast.config import Config
from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError
from agrepa_fast.files import write_atomically
from agrepa_fast.zero import recut as universal
from agrepa_fast.zero.state_files import tensors_only

from ..ranks import run_ranks, run_training
from ..testing import assert_same_curve, metrics

SETTINGS = ("train.save_every=3", "train.keep=9")


@pytest.fixture(scope="module")
def saved(preset, tmp_path_factory) -> Path:
    """Two ranks, stage 2, saved after steps 3 and 5, copied in the background."""
    folder = tmp_path_factory.mktemp("saved")
    args = ("--ds_config", "zero2.json", "--preset", str(preset), f"run.dir={folder}/run", *SETTINGS)
    run_training(2, *args, f"train.copy_to={folder}/copy", cwd=folder)
    return folder / "run"


@pytest.fixture
def made(preset, tmp_path, monkeypatch):
    """Checkpoints of one rank, without DeepSpeed: `made(keep=…)` returns them and a function that saves a step."""
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint, "full_weights", lambda engine: {"weight": torch.ones(3)})
    monkeypatch.setattr(checkpoint, "step_counters", lambda engine: {})
    index, said = load_index(preset.parent), []

    def write(state, path):
        torch.save(state, path)

    def save_checkpoint(where, tag, **_):
        engine.checkpoint_engine.save({"moments": torch.zeros(9)}, Path(where) / tag / "optim_states.pt")

    engine = SimpleNamespace(
        checkpoint_engine=SimpleNamespace(save=write),
        save_checkpoint=save_checkpoint,
        _copy_recovery_script=None,
        bfloat16_enabled=lambda: False,
        zero_optimization_stage=lambda: 2,
        config={},
    )
    ema = SimpleNamespace(applied=nullcontext, updates=3)
    aligner = SimpleNamespace(selection=None, export=lambda: {"bitc": torch.ones(1)})
    choice = SimpleNamespace(state_dict=dict, aligner=aligner)

    def make(**train):
        config = Config()
        config = replace(config, train=replace(config.train, **train), run=replace(config.run, id="this"))
        ours = checkpoint.Checkpoints(tmp_path / "checkpoints", 0, 1, config, index, said.append)
        return ours, lambda step, must=False: ours.save(engine, ema, choice, step, must=must)

    make.said = said
    return make


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
    ours.clean()
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
    ours.clean()
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
            patch.setattr(checkpoint, "save_file", full(checkpoint.save_file, lambda args: args[1]))
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
        save(3, must=True)


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
        ours.clean()
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


def test_other_ranks_and_stages_go_on_with_the_same_curve(saved, ds_configs, tmp_path):
    """2 ranks at stage 2, 1 rank at stage 3, 2 ranks at stage 1, from the background's copy of the run."""
    run = tmp_path / "run"
    shutil.copytree(saved.with_name("copy"), run)
    args = ("--resume", "step00000003", f"run.dir={run}", "train.copy_to=null", "train.save_every=4")
    output = run_training(1, "--ds_config", ds_configs[3], *args, cwd=tmp_path)
    assert "converting the optimizer's state" in output
    assert not list(run.glob("checkpoints/*/universal*"))  # the run has saved since
    assert_same_curve(saved, run)
    last = run / "checkpoints" / "step00000005-2"
    again = ("--resume", "step00000004", f"run.dir={run}")
    run_training(2, "--ds_config", "zero1.json", *again, cwd=tmp_path)
    assert_same_curve(saved, run)
    for name in ("model", "ema"):
        one, two = _tensors(last, name), _tensors(last.with_name("step00000005-3"), name)
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


def _tensors(folder: Path, name: str) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / f"{name}.safetensors")


def test_bf16_goes_on_at_stage_0_with_the_optimizer_of_stage_3(preset, ds_configs, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "train.precision=bf16", "align.strategy=none", *SETTINGS)
    run_training(1, "--ds_config", ds_configs[3], *args, "train.steps=4", cwd=tmp_path)
    uninterrupted = metrics(tmp_path / "run")
    run_training(1, "--ds_config", "zero0.json", "--resume", "step00000003", "run.dir=run", cwd=tmp_path)
    resumed = metrics(tmp_path / "run")
    assert resumed[4]["train/flow_loss"] == pytest.approx(uninterrupted[4]["train/flow_loss"], abs=2e-3)
    assert resumed[4]["val/flow_loss"] == pytest.approx(uninterrupted[4]["val/flow_loss"], abs=2e-3)


CUT = '''
"""Whole tensors, cut to this rank's part and gathered again, bit for bit; a save that one rank alone cannot make."""
import os, sys
from pathlib import Path
from types import SimpleNamespace
import deepspeed, torch
import torch.distributed as dist
from agrepa_fast import Config, load_config
from agrepa_fast.data.index import load_index
from agrepa_fast.checkpoints import save as checkpoint
from agrepa_fast.zero.ema import Ema
from agrepa_fast.zero.process_group import join_process_group
from agrepa_fast.zero.masters import full_weights, masters
from agrepa_fast.zero.masters import write_masters

join_process_group()
for stage in (0, 1, 2, 3):
    for bf16 in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1, bias=False))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        config = {"train_batch_size": 2, "zero_optimization": zero, "bf16": {"enabled": bf16}}
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)
        before, weights = [part.clone() for part in masters(engine)], full_weights(engine)
        names = [name for name, _ in engine.module.named_parameters()]
        shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters()}
        whole = {name: torch.randn(shapes[name]) for name in names}
        ema = Ema(engine, 0.9)
        ema.load(whole.__getitem__, 4)
        assert all(map(torch.equal, masters(engine), before))
        with ema.applied():
            averaged = full_weights(engine)
        if dist.get_rank() == 0:
            assert all(torch.equal(averaged[name], whole[name]) for name in names), (stage, bf16)
            assert all(torch.equal(full, weights[name]) for name, full in zip(names, weights.values()))
        parts = write_masters(engine, whole.__getitem__)
        assert all(map(torch.equal, parts, ema.average))
        if stage in (1, 2):  # one flat vector in the model's order, an equal share each
            flat = torch.cat([whole[name].flatten() for name in names])
            size = parts[0].numel()
            mine = flat[dist.get_rank() * size :][:size]
            assert torch.equal(parts[0][: mine.numel()], mine)

folder = Path(sys.argv[1])
index = load_index(Path(sys.argv[2]))
save = checkpoint.save_file
def fails(tensors, path):
    if "rank1" in str(path):
        raise OSError(28, "No space left on device")
    save(tensors, path)
said = []
ours = checkpoint.Checkpoints(folder, dist.get_rank(), 2, Config(), index, said.append)
aligner = SimpleNamespace(selection=None, export=lambda: {"bitc": torch.ones(1)})
choice = SimpleNamespace(state_dict=dict, aligner=aligner)
assert ours.save(engine, ema, choice, 1, must=False)
checkpoint.save_file = fails
assert not ours.save(engine, ema, choice, 2, must=False)
assert "No space left" in said[0]
dist.barrier()
assert {path.name for path in folder.glob("step*")} == {"step00000001"}
dist.destroy_process_group()
'''


def test_parts_of_whole_tensors_are_exact_on_two_ranks(preset, tmp_path):
    script = tmp_path / "cut.py"
    script.write_text(CUT)
    run_ranks(2, script, str(tmp_path / "checkpoints"), str(preset.parent))


def test_a_universal_checkpoint_is_complete_or_absent_and_made_once(saved, tmp_path, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    path, said = tmp_path / "step00000003", []
    shutil.copytree(saved / "checkpoints" / path.name, path)
    monkeypatch.setattr(universal, "on_rank_0", lambda action: action())
    weights = _tensors(path, "model")
    module = SimpleNamespace(named_parameters=lambda: weights.items())
    engine = SimpleNamespace(module=module)

    def half(arguments):
        (Path(arguments.output_folder) / "zero").mkdir(parents=True)
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ds_to_universal, "main", half)
        with pytest.raises(UserError, match=r"No space left on device.*resume with the ranks"):
            universal._whole_moments(engine, path, 2, said.append)
    assert not list(path.glob("universal*"))
    first = universal._whole_moments(engine, path, 2, said.append)("out.weight", "exp_avg")
    with monkeypatch.context() as patch:
        patch.setattr(ds_to_universal, "main", half)
        again = universal._whole_moments(engine, path, 2, said.append)("out.weight", "exp_avg")
    assert torch.equal(first, again)
    assert first.shape == weights["out.weight"].shape
    assert first.abs().sum() > 0
    assert len(said) == 2
    assert not list(path.glob("*universal.part")) + list(path.glob("latest_universal"))


def test_a_teacher_that_is_added_to_the_shards_is_no_change_of_the_run(preset):
    index = load_index(preset.parent)
    content = json.loads(json.dumps(index.content))
    content["domains"]["speech"]["teachers"]["later"] = {"spec": "other", "dim": 2, "rate": None, "files": None}
    assert checkpoint._identity(replace(index, content=content)) == checkpoint._identity(index)
    content["domains"]["speech"]["teachers"]["teacher_speech"]["mean"][0] += 1
    assert checkpoint._identity(replace(index, content=content)) != checkpoint._identity(index)


class Attack:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["ATTACKED"],)


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    torch.save({"optimizer_state_dict": Attack()}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    with pytest.raises(UserError, match="holds more than numbers"), tensors_only(tmp_path):
        TorchCheckpointEngine().load(str(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    with pytest.raises(UserError, match="cannot be converted"):
        universal._convert(tmp_path, tmp_path / "universal")
    assert not (tmp_path / "attacked").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_checkpoint_of_another_run_is_refused(saved, made):
    ours, _ = made()
    foreign = ours.folder / "step00000003"
    shutil.copytree(saved / "checkpoints" / foreign.name, foreign)
    with pytest.raises(UserError, match=r"another run.*train\.start_from="):
        ours.load(foreign, None, None, None)


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
        assert "the network is down): tried again" in made.said[-1]
        copy = tmp_path / "copy" / "checkpoints"
        assert not (copy / "step00000001" / "checkpoint.json").exists()
        monkeypatch.setattr(mirror, "_put", put)
        assert save(2)
        ours.close()
        assert names(copy) == {"step00000001", "step00000002"}
        assert all(damage(copy / name) is None for name in names(copy))

    def test_a_slow_copy_skips_to_the_newest_and_is_not_rotated_away(self, made, tmp_path, monkeypatch):
        import threading

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


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_under_a_real_run(preset, baseline, tmp_path):
    """The second save does not fit: training goes on. Nor does the last: exit code 2, and the first is there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3400k", "tmpfs", disk], check=True)
    try:
        args = ("--preset", str(preset), f"run.dir={disk}/run", "train.save_every=2")
        output = run_training(2, *args, cwd=tmp_path, wanted=2)
        lines = [line for line in output.splitlines() if "could not be saved" in line]
        assert len(lines) == 2, output
        assert "training goes on" in lines[0]
        assert "agrepa train: " in lines[1]
        assert "0 MiB free" in lines[1]
        assert "Traceback" not in output
        folder = disk / "run" / "checkpoints"
        assert names(folder) == {"step00000002"}
        assert (folder / "latest").read_text() == "step00000002"
        subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
        run_training(1, "--resume", "latest", f"run.dir={disk}/run", cwd=tmp_path)
        assert_same_curve(baseline, disk / "run")
        assert json.loads((folder / "step00000005" / "checkpoint.json").read_text())["step"] == 5
    finally:
        subprocess.run(["umount", disk], check=True)
