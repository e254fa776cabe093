import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agrepa_fast.config import TrainConfig
from agrepa_fast.config_file import load_config
from agrepa_fast.data.layout import BatchLayout
from agrepa_fast.errors import UserError
from agrepa_fast.lr_schedule import lr_factor
from agrepa_fast.models.audio_dit.dit import AudioDiT
from agrepa_fast.zero.ds_config import find_ds_config, resolve_ds_config

from ..ranks import ROOT, call_on_ranks, run_ranks
from .variants_on_ranks import compute_variants


def test_schedule_counts_optimizer_steps():
    train = TrainConfig(steps=100, warmup_steps=10, final_lr=0.1)
    assert lr_factor(train, 0) == pytest.approx(0.1)
    assert lr_factor(train, 9) == pytest.approx(1.0)
    assert lr_factor(train, 55) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_factor(train, 100) == lr_factor(train, 1000) == pytest.approx(0.1)


def test_a_linear_decay_is_torchs():
    """As F5-TTS's trainer puts it together, but for the warm-up, which there begins at 0."""
    train = TrainConfig(steps=50, warmup_steps=10, lr_decay="linear", final_lr=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-8, end_factor=1.0, total_iters=10)]
    parts += [torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=1e-8, total_iters=40)]
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[10])
    for step in range(60):
        ahead = 0.1 if step < 10 else 0.0
        assert lr_factor(train, step) == pytest.approx(optimizer.param_groups[0]["lr"] + ahead, abs=1e-7), step
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("stage", range(4))
def test_presets_are_filled_in_from_the_run(stage):
    values = find_ds_config(f"zero{stage}.json")
    layout = BatchLayout(16, 2, 0, 4)
    resolved = resolve_ds_config(values, TrainConfig(clip_norm=0.5), layout, torch.device("cpu"))
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 2
    assert resolved["train_batch_size"] == 16
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"]["enabled"] is False
    assert resolved["zero_optimization"]["stage"] == stage
    on_gpu = resolve_ds_config(values, TrainConfig(), layout, torch.device("cuda"))
    assert on_gpu["bf16"]["enabled"] is True
    asked = resolve_ds_config(values, TrainConfig(precision="bf16"), layout, torch.device("cpu"))
    assert asked["bf16"]["enabled"] is True


@pytest.mark.parametrize(
    ("ranks", "variants"),
    [
        (1, ["plain", "compiled"]),
        pytest.param(1, ["plain", "compiled by inductor"], marks=pytest.mark.drill),
        (
            2,
            [
                *("plain", "recomputed, partitioned", "offloaded", "offloaded, partitioned"),
                *("dropout", "dropout, recomputed, partitioned"),
            ],
        ),
    ],
)
def test_ways_to_compute_a_step_give_the_same_weights(ranks, variants, preset, tmp_path):
    """Partitioned, recomputed, compiled, offloaded; what each is for is seen to happen. And the update ratio."""
    everywhere = call_on_ranks(ranks, compute_variants, str(preset), tmp_path, variants)
    assert [found.pop("loaded", True) for found in everywhere] == [True] * ranks
    for name, found in everywhere[0].items():
        like = everywhere[0]["dropout" if "dropout" in name else "plain"]
        weights, wanted = (load_file(tmp_path / run / "weights.safetensors") for run in (name, like["name"]))
        assert weights.keys() == wanted.keys()
        for key in wanted:
            torch.testing.assert_close(weights[key], wanted[key], atol=5e-6, rtol=0)
        assert found["losses"] == pytest.approx(like["losses"], abs=1e-5), name
        assert found["ratio"] == pytest.approx(found["by_hand"], rel=1e-4), name
        norm = torch.stack([weight.square().sum() for weight in weights.values()]).sum().sqrt().item()
        assert found["norm"] == pytest.approx(norm, rel=1e-5), name
        forwards = {"recomputed": 6, "compiled": 0}
        assert found["forwards"] == next((n for what, n in forwards.items() if what in name), 3), name
        assert (found["graphs"] > 0) == name.startswith("compiled")
        assert found["breaks"] == 0
    if "dropout" in variants:
        assert everywhere[0]["dropout"]["losses"] != everywhere[0]["plain"]["losses"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak of resident memory")
def test_no_rank_holds_the_whole_model_under_zero3():
    sizes = ("model.dim=512", "model.depth=16", "model.heads=8", "model.token_dim=512")
    for output in run_ranks(2, ROOT / "tests" / "drills" / "build_memory.py", *sizes):
        found = json.loads(output.splitlines()[-1])
        assert found["whole_fp32"] == 4 * found["parameters"] > 3e8
        assert 0.45 * found["whole_fp32"] < found["build"]["peak"] < 0.8 * found["whole_fp32"]


def test_agrepa_xl_has_one_and_a_half_billion_parameters():
    config = replace(load_config("agrepa-xl").model, n_mels=100, vocab=8192)
    with torch.device("meta"):
        model = AudioDiT(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_537_785_700


def test_host_memory_is_offloaded_to_without_a_compiler_and_from_no_stage_0():
    layout, train, cpu = BatchLayout(16, 1, 0, 1), TrainConfig(), torch.device("cpu")
    for name in ("zero2_offload.json", "zero3_offload.json"):
        assert resolve_ds_config(find_ds_config(name), train, layout, cpu)["zero_force_ds_cpu_optimizer"] is False
    for zero, message in (
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "use stage 1, 2 or 3"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "'nvme' is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_ds_config({"zero_optimization": zero}, train, layout, cpu)
    with pytest.raises(UserError, match=r"train\.compile: ZeRO-3"):
        resolve_ds_config(find_ds_config("zero3.json"), TrainConfig(compile=True), layout, cpu)


@pytest.mark.parametrize(
    ("section", "fields", "named"),
    [
        ("bf16", {"check_grad_overflow": False}, "check_grad_overflow"),
        ("bf16", {"bf16_master_weights_and_grads": True}, "bf16_master_weights_and_grads"),
        ("bf16", {"bf16_optimizer_states": True}, "bf16_optimizer_states"),
        ("fp16", {"auto_cast": True}, "auto_cast"),
        ("zero_optimization", {"stage": 2, "elastic_checkpoint": 1}, "elastic_checkpoint"),
        ("bf16", {"bf16_optimizer_states": "true"}, "bf16_optimizer_states"),
        ("bf16", {"check_grad_overflow": 0}, "check_grad_overflow"),
        ("zero_optimization", {"stage": 2, "compute_grad_norm": False}, "compute_grad_norm"),
        ("zero_optimization", {"stage": 2, "elastic_checkpoint": True}, "elastic_checkpoint"),
        ("zero_optimization", {"stage": 2, "load_from_fp32_weights": False}, "load_from_fp32_weights"),
        (
            "zero_optimization",
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            "super_offload",
        ),
    ],
)
def test_fields_that_would_lose_a_step_a_resume_or_the_averages_are_refused(section, fields, named):
    layout = BatchLayout(16, 1, 0, 1)
    with pytest.raises(UserError, match=f"remove {named}, "):
        resolve_ds_config({section: fields}, TrainConfig(), layout, torch.device("cpu"))
