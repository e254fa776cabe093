"""DistillMOS (Stahl & Gamper 2025, "Distillation and Pruning for Scalable Self-Supervised Representation-Based Speech
Quality Assessment"), a small network that predicts the mean opinion score of speech, 1 to 5.

Waves at 16 kHz are heard in windows of 7.68 s at steps of at most 1 s, each scaled to a peak of 1; the score is their
mean. Zeros fill up shorter clips, which costs them points: the same voice has 4.3 in long clips and 3.5 in clips of
2.2 s. So compare clips of equal lengths only.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..fetch import fetch_pip

PACKAGE, VERSION, LICENCE = "distillmos", "0.9.1", "MIT"
_SHA256 = "f82e5326ed963ddc28a3e079ded4dbb1bd072ad54be5bdc4380290a9bce3536a"
_WEIGHTS = Path("distillmos/weights/distill_mos_v7.pt")
RATE = 16000
_SEGMENT, _STEP = 122_880, 16_000  # samples of a window, and the most from one to the next
_HOP, _FFT = 160, 320  # samples
_CHANNELS = (64, 64, 128, 256, 256, 256)  # of the convolutions
_FRAMES, _WIDTH, _HEADS, _LAYERS = 384, 200, 8, 7  # of the transformer


class DistillMos(torch.nn.Module):
    """The network, with the names of the package's weights."""

    def __init__(self):
        super().__init__()
        self.cnn = _SpectrumCnn()
        self.transformer_pool_attn = _Assessor(_CHANNELS[-1] * self.cnn.bands)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return the score, (), of a wave (samples,) at 16 kHz."""
        beyond = max(0, len(wave) - _SEGMENT)
        wave = F.pad(wave, (0, max(0, _SEGMENT - len(wave))))
        starts = (np.linspace(0, 1, math.ceil(beyond / _STEP) + 1) * beyond).astype(int)
        segments = torch.stack([wave[start : start + _SEGMENT] for start in starts])
        segments = segments / (segments.abs().amax(dim=1, keepdim=True) + 1e-8)
        return 1 + 4 * self.transformer_pool_attn(self.cnn(segments)).mean()


class _SpectrumCnn(torch.nn.Module):
    """Convolutions over the complex spectrum, its magnitudes to the power of 0.3."""

    def __init__(self):
        super().__init__()
        layers, channels, self.bands = [], 2, _FFT // 2 + 1
        for number, width in enumerate(_CHANNELS):
            stride = (2 if number else 1, 2 if number == len(_CHANNELS) - 1 else 1)
            layers += [torch.nn.Conv2d(channels, width, 3, stride, padding=(0, 1)), torch.nn.LeakyReLU(0.1)]
            channels, self.bands = width, (self.bands - 3) // stride[0] + 1
        self.cnn = torch.nn.Sequential(*layers)
        self.register_buffer("window", torch.hann_window(_FFT), persistent=False)

    def forward(self, segments: torch.Tensor) -> torch.Tensor:
        """Return (B, frames, width) of segments (B, samples)."""
        edge = (_FFT - _HOP) // 2
        padded = F.pad(segments, (edge, edge), mode="reflect")
        spectrum = torch.stft(padded, _FFT, _HOP, window=self.window, center=False, return_complex=True)
        magnitude = spectrum.abs().clamp(min=1e-12)
        compressed = torch.view_as_real(spectrum * magnitude ** (0.3 - 1))
        return self.cnn(compressed.permute(0, 3, 1, 2)).flatten(1, 2).transpose(1, 2)


class _Assessor(torch.nn.Module):
    """A transformer with attentive pooling: quality between 0 and 1."""

    def __init__(self, width: int):
        super().__init__()
        self.norm_input = torch.nn.BatchNorm1d(width)
        self.transformer = _Transformer(width)
        self.norm_trans = torch.nn.BatchNorm1d(_WIDTH)
        self.pool = _AttentivePool()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B,) of (B, frames, width)."""
        x = self.transformer(self.norm_input(x.mT))
        return self.pool(self.norm_trans(x.mT).mT).sigmoid()


class _Transformer(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(width)
        self.linear_proj = torch.nn.Linear(width, _WIDTH)
        self.position_encoding = torch.nn.ParameterDict({"pe": torch.zeros(1, _FRAMES, _WIDTH)})
        layer = torch.nn.TransformerEncoderLayer(_WIDTH, _HEADS, 2 * _WIDTH, dropout=0.0, batch_first=True)
        self.transformer_encoder = torch.nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, frames, 200) of (B, width, frames)."""
        return self.transformer_encoder(self.linear_proj(self.norm(x).mT) + self.position_encoding["pe"])


class _AttentivePool(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = torch.nn.Linear(_WIDTH, 2 * _WIDTH), torch.nn.Linear(2 * _WIDTH, 1)
        self.linear3 = torch.nn.Linear(_WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.linear2(self.linear1(x).relu()).softmax(dim=1)
        return self.linear3((weights * x).sum(dim=1))[:, 0]


def load_distillmos() -> DistillMos:
    """Return the package's network, frozen. Raises UserError if the package cannot be fetched."""
    file = fetch_pip(PACKAGE, VERSION, _SHA256) / _WEIGHTS
    network = DistillMos()
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["model"])
    return network.eval().requires_grad_(False)
