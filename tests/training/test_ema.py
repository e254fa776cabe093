import pytest
import torch

from agrepa_fast.zero import ema as averages
from agrepa_fast.zero.ema import Ema

from ..ranks import run_training
from ..testing import assert_same_curve


class Engine:
    """What Ema asks of DeepSpeed's engine at stage 0 in fp32."""

    optimizer = None

    def __init__(self, module):
        self.module, self.basic_optimizer = module, torch.optim.AdamW(module.parameters())

    def zero_optimization_stage(self) -> int:
        return 0

    def bfloat16_enabled(self) -> bool:
        return False


def test_average_by_hand_and_the_live_weights_come_back():
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    ema, wanted = Ema(Engine(module), decay=0.3), 1.0
    for n, weight in enumerate((2.0, 4.0, -1.0, 5.0)):
        module.weight.data.fill_(weight)
        ema.update()
        decay = min(0.3, (1 + n) / (10 + n))  # 0.1, 0.18, 0.25, then 0.3
        wanted = decay * wanted + (1 - decay) * weight
    pointer = module.weight.data_ptr()
    with ema.applied():
        torch.testing.assert_close(module.weight.item(), wanted)
        assert module.weight.data_ptr() == pointer
    assert module.weight.item() == 5.0
    restored = Ema(Engine(module), decay=0.3)
    restored.load({"weight": torch.tensor([[wanted]])}.__getitem__, 4)
    assert restored.updates == 4
    assert module.weight.item() == 5.0
    with restored.applied():
        torch.testing.assert_close(module.weight.item(), wanted)


class LateStream:
    """A stand-in for a side stream of a GPU that does its work as late as it may: when it is joined."""

    def __init__(self, device):
        self.queued = []

    def run(self, call):
        self.queued.append(call)

    def join(self):
        queued, self.queued = self.queued, []
        for call in queued:
            call()


def plant_late_stream() -> None:
    averages.SideStream = LateStream


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.drill), 3])
def test_the_average_may_be_updated_late(stage, preset, baseline, ds_configs, tmp_path):
    """Until the next optimizer step, or until it is read: by a checkpoint, by the end of the run."""
    given = (
        "--ds_config",
        ds_configs[stage],
        "--preset",
        str(preset),
        "run.dir=run",
        "train.save_every=2",
        "train.keep=3",
    )
    run_training(1, *given, cwd=tmp_path, plant=plant_late_stream)
    assert_same_curve(baseline, tmp_path / "run")
    run_training(1, *given, "--resume", "step00000002", cwd=tmp_path, plant=plant_late_stream)
    assert_same_curve(baseline, tmp_path / "run")
