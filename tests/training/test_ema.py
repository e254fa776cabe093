import torch

from agrepa_fast.zero.ema import Ema


class Engine:
    """What Ema asks of DeepSpeed's engine at stage 0 in fp32."""

    optimizer = None

    def __init__(self, module):
        self.module = module

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
