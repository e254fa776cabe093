"""The precision of a new run on a CPU where train.precision is auto: bf16, if the processor is much faster in it."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints.upstream import is_upstream_file
from ..config import Config, ModelConfig
from ..config_file import load_config
from ..models.audio_dit.block import GatedDiTBlock
from ..ranks import from_rank_0

GAIN = 1.25  # times fp32's speed: bf16 rounds more, and has to be worth it
_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
_NARROW = 128  # models of a lower width spend their time between operations, not in them
_CLIPS, _FRAMES, _ROUNDS = 4, 200, 3


def choose_precision(
    config: Config, ds_values: dict, device: torch.device, resumed: Path | None
) -> tuple[Config, str | None]:
    """Return the settings with the precision that `auto` stands for, and a line that names it; None if it was set.

    bf16 is taken on a CPU with instructions for it, if forward and backward of a block run GAIN times as fast. A run
    that is resumed from a checkpoint, a narrow model, a user's model, and a ds_config that decides, keep their
    precision. One that starts from a run takes that run's: two measurements may differ, and branches of one warm-up are
    compared. Every rank must call it: the speed is rank 0's. Weights and random states stay as they are.
    """
    if resumed is not None and config.train.precision == "auto":  # as the command that began the run may say
        return replace(config, train=replace(config.train, precision=_precision_of(str(resumed)))), None
    decided = ds_values.get("bf16", {}).get("enabled", "auto") != "auto"
    if config.train.precision != "auto" or device.type != "cpu" or decided:
        return config, None
    instructions = [name for name in _INSTRUCTIONS if torch.cpu.get_capabilities().get(name)]
    if not instructions or config.model.backbone != "audio_dit" or config.model.dim < _NARROW:
        return config, None
    precision = _precision_of(config.train.start_from)
    line = f"train.precision=auto: {precision}, that of train.start_from={config.train.start_from}"
    if precision == "auto":
        gain = from_rank_0(lambda: bf16_gain(config.model))
        precision = "bf16" if gain >= GAIN else "fp32"
        line = (
            f"train.precision=auto: {precision}, since bf16 runs at {gain:.2f} x fp32's speed on this processor "
            f"({instructions[0]}; from {GAIN} x on it is taken)"
        )
    return replace(config, train=replace(config.train, precision=precision)), line


def _precision_of(start_from: str | None) -> str:
    """Return the precision of a checkpoint or an export; auto for a weight file, and for None."""
    if start_from is None or is_upstream_file(Path(start_from)):
        return "auto"
    return load_config(Path(start_from) / "config.yaml").train.precision


def bf16_gain(model: ModelConfig) -> float:
    """Return the speed of a block of the model in bf16, forward and backward, over that in fp32."""
    with torch.random.fork_rng([]):
        options = {"qk_norm": model.qk_norm, "gelu": model.gelu}
        block = GatedDiTBlock(model.dim, model.heads, model.ffn_mult, **options)
        x, cond = torch.randn(_CLIPS, _FRAMES, model.dim), torch.randn(_CLIPS, model.dim)
        seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
        for _ in range(1 + _ROUNDS):  # the first warms up
            for dtype, taken in seconds.items():
                block.to(dtype)
                start = time.perf_counter()
                out = block(x.to(dtype), cond.to(dtype))
                torch.autograd.grad(out.sum(), list(block.parameters()), allow_unused=True)
                taken.append(time.perf_counter() - start)
    fp32, bf16 = (min(taken[1:]) for taken in seconds.values())  # other processes only add to a time
    return fp32 / bf16
