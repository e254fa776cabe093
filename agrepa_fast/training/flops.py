"""FLOPs of a training step, and the FLOP/s that a GPU can reach, for MFU."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..attribution.points import evaluation_mode
from ..config import ModelConfig, TrainConfig
from ..data.index import Index
from ..kernels import force_backend
from ..models.backbone import Backbone
from ..zero.ds_config import precision
from .context import RunContext
from .dry_run import silent_clips

# Dense bf16 TFLOP/s of tensor cores, from NVIDIA's data sheets; the first whose words the device's name has counts.
_PEAKS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "GH200": 989.0,
    "H200": 989.0,
    "GB200": 2500.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "H800": 989.0,
    "L40S": 362.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bf16 TFLOP/s of a GPU by its name; None if the table lacks it."""
    if "Laptop" in device_name:  # its clocks are lower
        return None
    return next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def peak_flops(train: TrainConfig, device: torch.device) -> float | None:
    """Return the FLOP/s that MFU is a share of: train.peak_tflops, or the table's value for a GPU in bf16. None if
    neither is known: no MFU is better than a false one."""
    tflops = train.peak_tflops
    if tflops is None and device.type == "cuda" and precision(train, device) == "bf16":
        tflops = peak_tflops(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def flop_counter(model: Backbone, context: RunContext) -> Callable[[Sequence[int]], float]:
    """Return a function from the clips' lengths in frames to the FLOPs of their forward and backward: by
    AudioDiT's formula, or by forwards of three lengths for another model. Every rank must call it."""
    if context.config.model.backbone == "audio_dit":
        return lambda lengths: step_flops(context.config.model, lengths)
    flops = forward_flops(model, context.index, context.device)
    return lambda lengths: 3 * sum(flops.clip + flops.frame * n + flops.pair * n * n for n in lengths)


class ForwardFlops(NamedTuple):
    """FLOPs of a forward: those of a clip of any length, of each frame, and of each pair of frames."""

    clip: float
    frame: float
    pair: float

    @property
    def attention_cost(self) -> float:
        """The cost of a pair of frames, in frames, as train.batch_frames counts it."""
        return max(0.0, self.pair / self.frame) if self.frame > 0 else 0.0


def forward_flops(model: Backbone, index: Index, device: torch.device) -> ForwardFlops:
    """Return the parabola through the FLOPs of forwards of three lengths, up to 256 frames or the shards' longest clip:
    the same on every machine."""
    long = min(256, max(shard.bucket for domain in index.domains for shard in index.shards("train", domain)))
    short, middle, long = lengths = (long // 4, long // 2, long)
    counted = [_count_flops(model, frames, index, device) for frames in lengths]
    first, second = ((b - a) / (n - m) for a, b, m, n in zip(counted, counted[1:], lengths, lengths[1:], strict=False))
    pair = (second - first) / (long - short)
    frame = first - pair * (short + middle)
    return ForwardFlops(counted[0] - frame * short - pair * short**2, frame, pair)


def _count_flops(model: Backbone, frames: int, index: Index, device: torch.device) -> int:
    """Return the FLOPs of the matrix products, convolutions and attention of one clip's forward, as they are counted in
    plain PyTorch."""
    mel, condition = silent_clips(1, frames, index, device)
    plain = force_backend("reference"), sdpa_kernel(SDPBackend.MATH)  # fused operations and attention are not counted
    counter = FlopCounterMode(display=False)
    with evaluation_mode(model), torch.no_grad(), plain[0], plain[1], counter:
        model(mel, mel.new_full((1,), 0.5), replace(condition, padded=False))
    return counter.get_total_flops()


def step_flops(model: ModelConfig, lengths: Sequence[int]) -> float:
    """Return the FLOPs of AudioDiT's forward and backward (three times the forward's) for clips of `lengths` frames:
    matrix products and attention, without padding.

    Not counted, each below 1 %: the projection and stretching of token embeddings, heads, elementwise work. Nor is the
    forward that activation checkpointing repeats, as is usual for MFU.
    """
    dim, inner = model.dim, int(model.dim * model.ffn_mult)
    frame = model.depth * (4 * dim * dim + 2 * dim * inner)  # multiply-adds
    frame += dim * (2 * model.n_mels + model.token_dim + model.n_mels)
    frame += 9 * dim if model.position == "rotary_conv" else 0
    clip = model.depth * 6 * dim * dim + 8 * dim * dim  # modulations, time embedding
    pair = model.depth * 2 * dim  # queries times keys, weights times values
    return 6.0 * sum(clip + frame * length + pair * length * length for length in lengths)
