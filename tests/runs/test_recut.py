"""Resumes on other ranks and at other stages, and conversions of a checkpoint's optimizer."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from agrepa_fast.checkpoints import save as checkpoint
from agrepa_fast.config import Config
from agrepa_fast.data.index import load_index
from agrepa_fast.errors import UserError
from agrepa_fast.zero import recut as universal
from agrepa_fast.zero.construction import partitioner
from agrepa_fast.zero.ema import Ema
from agrepa_fast.zero.masters import full_weights, masters, write_masters
from agrepa_fast.zero.state_files import tensors_only
from agrepa_fast.zero.update_ratio import weight_norm

from ..ranks import call_on_ranks, run_training
from ..testing import assert_same_curve, metrics


def test_other_ranks_and_stages_go_on_with_the_same_curve(saved, ds_configs, tmp_path):
    """2 ranks at stage 2, 1 rank at stage 3, 2 ranks at stage 1, from the background's copy of the run."""
    run = tmp_path / "run [1]+(2)"  # of a preset's name, say: patterns to glob and re
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
    return load_file(folder / f"{name}.safetensors")


def test_ranks_draw_dropout_masks_of_their_own(saved):
    one, two = (load_file(saved / "checkpoints/step00000003" / f"rank{rank}.safetensors") for rank in (0, 1))
    assert not torch.equal(one["cpu_rng"], two["cpu_rng"])


@pytest.mark.drill
def test_bf16_goes_on_at_stage_0_with_the_optimizer_of_stage_3(preset, ds_configs, tmp_path):
    args = ("--preset", str(preset), "run.dir=run", "train.precision=bf16", "train.optimizer=muon")
    args += ("align.strategy=none",)
    run_training(1, "--ds_config", ds_configs[3], *args, "train.save_every=3", "train.steps=4", cwd=tmp_path)
    uninterrupted = metrics(tmp_path / "run")
    run_training(1, "--ds_config", "zero0.json", "--resume", "step00000003", "run.dir=run", cwd=tmp_path)
    resumed = metrics(tmp_path / "run")
    assert resumed[4]["train/flow_loss"] == pytest.approx(uninterrupted[4]["train/flow_loss"], abs=2e-3)
    assert resumed[4]["val/flow_loss"] == pytest.approx(uninterrupted[4]["val/flow_loss"], abs=2e-3)


def small_engine(stage: int, bf16: bool):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
    config = {"train_batch_size": 2, "zero_optimization": zero, "bf16": {"enabled": bf16}}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    partitioner(config)(model)
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def cut_and_gather() -> None:
    """Cut whole tensors to this rank's parts and gather them again, at every stage. The ranks divide few of them."""
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is NaN
    for stage in (0, 1, 2, 3):
        for bf16 in (False, True):
            engine = small_engine(stage, bf16)
            before, weights = [part.clone() for part in masters(engine)], full_weights(engine)
            norm = weight_norm(engine)
            names = [name for name, _ in engine.module.named_parameters()]
            shapes = {n: getattr(p, "ds_shape", p.shape) for n, p in engine.module.named_parameters()}
            whole = {name: torch.randn(shapes[name]) for name in names}
            ema = Ema(engine, 0.9)
            ema.load(whole.__getitem__, 4)
            assert all(map(torch.equal, masters(engine), before)), (stage, bf16)
            with ema.applied():
                averaged = full_weights(engine)
            again = full_weights(engine)
            if dist.get_rank() == 0:
                whole_norm = torch.cat([weight.flatten() for weight in weights.values()]).norm()
                assert torch.isclose(norm, whole_norm), (stage, bf16, norm)
                assert all(torch.equal(averaged[name], whole[name]) for name in names), (stage, bf16)
                assert all(torch.equal(again[name], weights[name]) for name in names), (stage, bf16)
            parts = write_masters(engine, whole.__getitem__)
            assert all(map(torch.equal, parts, ema.average))
            if stage in (1, 2):  # one flat vector in the model's order, an equal share each
                flat = torch.cat([whole[name].flatten() for name in names])
                size = parts[0].numel()
                mine = flat[dist.get_rank() * size :][:size]
                assert torch.equal(parts[0][: mine.numel()], mine)


def test_parts_of_whole_tensors_are_exact_on_two_ranks():
    call_on_ranks(2, cut_and_gather)


def save_on_a_full_disk(folder: Path, shards: Path) -> None:
    """Save twice; the second time rank 1 has no room."""
    engine, said, save = small_engine(3, True), [], checkpoint.save_tensors

    def fails(tensors, path):
        if "rank1" in str(path):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    ours = checkpoint.Checkpoints(folder, dist.get_rank(), 2, Config(), load_index(shards), said.append)
    choice = SimpleNamespace(
        state_dict=dict, aligner=SimpleNamespace(selection=None, export=lambda: {"bitc": torch.ones(1)})
    )
    assert ours.save(engine, Ema(engine, 0.9), choice, 1, must_succeed=False)
    checkpoint.save_tensors = fails
    assert not ours.save(engine, Ema(engine, 0.9), choice, 2, must_succeed=False)
    assert "No space left" in said[0]
    dist.barrier()
    assert {path.name for path in folder.glob("step*")} == {"step00000001"}


def test_all_ranks_give_up_a_save_that_one_cannot_make(preset, tmp_path):
    call_on_ranks(2, save_on_a_full_disk, tmp_path / "checkpoints", preset.parent)


def test_a_universal_checkpoint_is_complete_or_absent_and_made_once(saved, tmp_path, monkeypatch):
    from deepspeed.checkpoint import ds_to_universal

    path, said = tmp_path / "step00000003", []
    shutil.copytree(saved / "checkpoints" / path.name, path)
    weights = _tensors(path, "model")
    module = SimpleNamespace(named_parameters=lambda: weights.items())
    engine = SimpleNamespace(module=module)

    monkeypatch.setattr(universal, "on_rank_0", lambda action: None)
    universal._whole_moments(engine, path, 2, 1, said.append)
    assert not said  # the other ranks do not look
    monkeypatch.setattr(universal, "on_rank_0", lambda action: action())

    def half(arguments):
        (Path(arguments.output_folder) / "zero").mkdir(parents=True)
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ds_to_universal, "main", half)
        with pytest.raises(UserError, match=r"No space left on device.*resume with the ranks"):
            universal._whole_moments(engine, path, 2, 1, said.append)
    assert not list(path.glob("universal*"))
    first = universal._whole_moments(engine, path, 2, 1, said.append)("out.weight", "exp_avg")
    with monkeypatch.context() as patch:
        patch.setattr(ds_to_universal, "main", half)
        again = universal._whole_moments(engine, path, 2, 1, said.append)("out.weight", "exp_avg")
    assert torch.equal(first, again)
    assert first.shape == weights["out.weight"].shape
    assert first.abs().sum() > 0
    assert len(said) == 2
    assert not list(path.glob("*universal.part")) + list(path.glob("latest_universal"))


class Attack:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["ATTACKED"],)


def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as for other programs that load old files
    torch.save({"optimizer_state_dict": Attack()}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    with pytest.raises(UserError, match="holds more than numbers"), tensors_only(tmp_path):
        TorchCheckpointEngine().load(str(tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    with pytest.raises(UserError, match="cannot be converted"):
        universal._convert(tmp_path, tmp_path / "universal")
    assert not (tmp_path / "attacked").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


class ByName:
    """Pickled as Python 3.11.2 pickles a member of an enum."""

    def __init__(self, owner: type, name: str):
        self.of = owner, name

    def __reduce__(self):
        return getattr, self.of


def test_a_zero_stage_that_python_3_11_2_wrote_is_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save(ByName(ZeroStageEnum, "gradients"), tmp_path / "stage.pt")
    torch.save(ByName(LossScaler, "backward"), tmp_path / "other.pt")
    with tensors_only(tmp_path):
        assert torch.load(tmp_path / "stage.pt") is ZeroStageEnum.gradients
    with pytest.raises(UserError, match="holds more than numbers"), tensors_only(tmp_path):
        torch.load(tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"PK\x03\x04" + b"x" * 100])
def test_a_file_of_a_checkpoint_that_is_damaged_is_not_called_a_stranger_s(content, tmp_path):
    (tmp_path / "state.pt").write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(UserError, match=r"is damaged .*take another checkpoint"), tensors_only(tmp_path):
            torch.load(tmp_path / "state.pt", map_location="cpu", mmap=mmap)
