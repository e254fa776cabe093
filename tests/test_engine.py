import math

import pytest
import torch

from agrepa_fast.config import TrainConfig
from agrepa_fast.data.stream import BatchLayout
from agrepa_fast.training.engine import find_ds_config, lr_factor, resolve_ds_config


def test_schedule_counts_optimizer_steps():
    train = TrainConfig(steps=100, warmup_steps=10, final_lr=0.1)
    assert lr_factor(train, 0) == pytest.approx(0.1)
    assert lr_factor(train, 9) == pytest.approx(1.0)
    assert lr_factor(train, 55) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_factor(train, 100) == lr_factor(train, 1000) == pytest.approx(0.1)


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
