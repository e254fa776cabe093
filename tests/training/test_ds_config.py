"""Sections of a ds_config that DeepSpeed's users have: taken, left out, or refused in one line."""

import json
import re
from dataclasses import replace

import pytest
import torch

from agrepa_fast.config import TrainConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.errors import UserError
from agrepa_fast.lr_schedule import lr_factor
from agrepa_fast.zero.ds_config import resolve_ds_config
from agrepa_fast.zero.ds_sections import adopt_sections

from ..ranks import run_training
from ..testing import metrics

ADAMW = {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}


def warmup(kind: str, **params) -> dict:
    return {"scheduler": {"type": kind, "params": {"warmup_type": "linear", **params}}}


COSINE = warmup("WarmupCosineLR", total_num_steps=900, warmup_num_steps=50, cos_min_ratio=0.05, warmup_min_ratio=0)


def test_adamw_and_its_schedule_become_settings_of_the_run():
    values = {"zero_optimization": {"stage": 2}, "optimizer": ADAMW, **COSINE}
    passed, train, lines = adopt_sections(values, TrainConfig())
    assert passed == {"zero_optimization": {"stage": 2}}
    assert (train.lr, train.betas, train.weight_decay) == (3e-4, [0.9, 0.95], 0.1)
    assert (train.steps, train.warmup_steps, train.final_lr) == (900, 50, 0.05)
    assert lines == [
        'ds_config "optimizer": taken as train.optimizer=adamw, train.lr=0.0003, train.betas=[0.9, 0.95], '
        "train.weight_decay=0.1",
        'ds_config "scheduler": taken as train.steps=900, train.warmup_steps=50, train.final_lr=0.05, '
        "train.lr_decay=cosine",
    ]


def test_auto_and_what_is_not_given_stay_the_run_s():
    ours = TrainConfig(lr=2e-3, warmup_steps=7)
    values = {"optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto", "torch_adam": True}}}
    values |= warmup("WarmupLR", warmup_max_lr="auto", warmup_num_steps="auto")
    _, train, lines = adopt_sections(values, ours)
    assert (train.lr, train.warmup_steps, train.final_lr) == (2e-3, 7, 1.0)
    adamw = 'ds_config "optimizer": taken as train.optimizer=adamw'
    assert lines == [adamw, 'ds_config "scheduler": taken as train.final_lr=1.0']
    assert adopt_sections({"optimizer": {"type": "AdamW"}}, ours) == ({}, ours, [adamw])
    assert adopt_sections({"optimizer": {"type": "AdamW"}}, replace(ours, optimizer="muon")) == ({}, ours, [adamw])


@pytest.mark.parametrize("section", [COSINE, warmup("WarmupLR", warmup_max_lr=2e-3, warmup_num_steps=50)])
def test_a_schedule_that_is_taken_is_deepspeed_s(section):
    """But for the warm-up, which starts at 1/n of train.lr, not at 0, and so runs two steps ahead."""
    from deepspeed.runtime import lr_schedules

    kind, params = section["scheduler"]["type"], section["scheduler"]["params"]
    _, train, _ = adopt_sections(section, TrainConfig(lr=2e-3, steps=900))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=train.lr)
    schedule = getattr(lr_schedules, kind)(optimizer, **params)
    for step in range(900):
        theirs, ours = optimizer.param_groups[0]["lr"], train.lr * lr_factor(train, step)
        assert ours == pytest.approx(theirs, abs=train.lr * (2.01 / 50 if step <= 50 else 1e-9)), step
        schedule.step()


def test_a_default_of_deepspeed_s_that_is_another_is_named():
    values = {"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 5000}}}
    _, train, (line,) = adopt_sections(values, TrainConfig())
    assert (train.warmup_steps, train.final_lr) == (1000, 0.0001)
    assert line.endswith("; the warm-up is linear, DeepSpeed's default is logarithmic")


def test_the_command_line_may_say_the_same_and_nothing_else():
    ours = TrainConfig(lr=3e-4)
    assert adopt_sections({"optimizer": ADAMW}, ours, ["train.lr=3e-4"])[1].betas == [0.9, 0.95]
    with pytest.raises(
        UserError, match=r'"optimizer" sets train\.lr=0\.0003, the command line train\.lr=0\.001: leave'
    ):
        adopt_sections({"optimizer": ADAMW}, TrainConfig(lr=1e-3), ["train.lr=1e-3", "run.seed=1"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"type": "Lamb"}}, 'optimizer": remove it, this engine trains with AdamW or Muon, not Lamb'),
        ({"optimizer": {"type": "Muon"}}, 'optimizer": remove it and set train.optimizer=muon, '),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 1e-6}}}, "eps=1e-06: this engine has eps=1e-08"),
        ({"optimizer": {"type": "AdamW", "params": {"learning_rate": 1}}}, "learning_rate is unknown: "),
        ({"optimizer": "AdamW"}, "an object is wanted"),
        (warmup("WarmupDecayLR", total_num_steps=9), "remove it, WarmupDecayLR is neither WarmupCosineLR nor WarmupLR"),
        (warmup("WarmupLR", warmup_type="log"), "warmup_type=log: this engine has warmup_type=linear"),
        (warmup("WarmupLR", warmup_min_lr=1e-5), "warmup_min_lr=1e-05: this engine has warmup_min_lr=0"),
        (
            {"optimizer": ADAMW, **warmup("WarmupLR", warmup_max_lr=1e-3)},
            '"scheduler" sets 0.001: leave one of them out',
        ),
        ({"amp": {"enabled": True}}, r'"amp": remove it, .*train\.precision'),
        ({"elasticity": {"enabled": True}}, r"train\.batch_clips"),
        ({"curriculum_learning": {"enabled": True}}, r"data\."),
        ({"sparse_attention": {"mode": "fixed"}}, "attention is the model's"),
        ({"sparse_gradients": True}, "gradients are dense"),
        ({"compression_training": {"a": {"shared": {"enabled": True}}}}, "neither quantised nor pruned"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
        ({"optimiser": ADAMW}, "did you mean 'optimizer'"),
    ],
)
def test_what_contradicts_a_run_is_refused(values, message):
    with pytest.raises(UserError, match=message) as refusal:
        adopt_sections(values, TrainConfig())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"activation_checkpointing": {"partition_activations": True}},
            r"left out, train\.activation_checkpointing=true",
        ),
        ({"flops_profiler": {"enabled": True, "output_file": "/tmp/x"}}, "left out, .*train/mfu"),
        ({"tensorboard": {"enabled": True, "output_path": "/tmp"}}, "left out, .*tensorboard/"),
        ({"csv_monitor": {"enabled": True}}, r"left out, metrics\.jsonl"),
        ({"pipeline": {"stages": "auto"}}, "left out"),
        ({"checkpoint": {"load_universal": True}}, "left out"),
        ({"timers": {"throughput": {"enabled": True}}}, "left out, they wait for the GPU"),
        ({"wall_clock_breakdown": True}, r"left out, its timers end CUDA graphs, and train\.profile"),
    ],
)
def test_what_changes_no_number_is_left_out_with_a_line(values, message):
    passed, train, (line,) = adopt_sections(values, TrainConfig())
    assert (passed, train) == ({}, TrainConfig())
    assert re.search(message, line), line


def test_what_is_switched_off_is_passed_over():
    names = ("amp", "elasticity", "flops_profiler", "autotuning", "data_efficiency", "wandb", "csv_monitor")
    values = {name: {"enabled": False, "part": {"enabled": True}} for name in names}
    parts = {"shared_parameters": {"enabled": False}, "different_groups": {"all": {"params": {"bits": 8}}}}
    values |= {"sparse_gradients": False, "compression_training": {"weight_quantization": parts}}
    assert adopt_sections(values, TrainConfig()) == ({}, TrainConfig(), [])


def test_weights_and_biases():
    values = {"wandb": {"enabled": True, "project": "speech", "team": "lab", "group": None}}
    _, train, (line,) = adopt_sections(values, TrainConfig())
    assert train.wandb == "speech"
    assert line == 'ds_config "wandb": taken as train.wandb=speech; without team'


def test_a_deepspeed_user_s_file_trains(preset, tmp_path):
    """Whole, with all that DeepSpeed logs itself but its timers; the run has the optimizer and the schedule."""
    cosine = {"total_num_steps": 4, "warmup_num_steps": 2, "cos_min_ratio": 0.5, "warmup_type": "linear"}
    values = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupCosineLR", "params": cosine},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "communication_data_type": "fp32",
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": str(tmp_path / "profile")},
        "activation_checkpointing": {"partition_activations": True, "cpu_checkpointing": True},
        "tensorboard": {"enabled": True, "output_path": str(tmp_path / "events")},
        "wall_clock_breakdown": True,
    }
    (tmp_path / "ds.json").write_text(json.dumps(values))
    settings = ("run.dir=run", "align.strategy=none", "probe.warmup_steps=1")
    output = run_training(1, "--ds_config", "ds.json", "--preset", str(preset), *settings, cwd=tmp_path)
    assert len([line for line in output.splitlines() if line.startswith("ds_config ")]) == 6, output
    train = load_config(tmp_path / "run" / "config.yaml").train
    assert (train.lr, train.betas, train.weight_decay) == (1e-3, [0.9, 0.99], 0.1)
    assert (train.steps, train.warmup_steps, train.final_lr) == (4, 2, 0.5)
    rates = [values["train/lr"] for step, values in sorted(metrics(tmp_path / "run").items()) if "train/lr" in values]
    assert rates == pytest.approx([1e-3 * lr_factor(train, step) for step in range(1, 5)])
    assert {path.name for path in tmp_path.iterdir()} == {"ds.json", "run"}


def test_a_gpu_older_than_ampere_trains_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    train, gpu, layout = load_config("demo").train, torch.device("cuda"), BatchLayout(8, 1, 0, 1)
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda it=capability: it)
        assert resolve_ds_config({}, train, layout, gpu)["bf16"]["enabled"] is (capability == (8, 0))
    with pytest.raises(UserError, match=r"Tesla V100 does not compute in bf16: set train\.precision=fp32"):
        resolve_ds_config({}, replace(train, precision="bf16"), layout, gpu)
