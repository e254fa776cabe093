"""aisfx, a network for sound effects (Ma & Lerch 2022, "Representation Learning for the Automatic Indexing of Sound
Effects Libraries", ISMIR; X-Sequential-CE): mel spectrograms of 2.3 s, every 1.2 s, to vectors of 512.

The package's code is under the MIT licence, its weights are under CC-BY-4.0 (A. B. Ma and A. Lerch).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..fetch import fetch_pip
from .metric_model import mel_triangles

PACKAGE, VERSION, LICENCE = "aisfx", "0.1.2", "CC-BY-4.0"
_SHA256 = "bfe219950715af179e9a1653e7117cc1852baef267cd6596c42cad74afe1d194"
_WEIGHTS = Path("aisfx/models/checkpoint.pth")
RATE, DIM = 44100, 512
_WINDOW, _HOP, _BANDS = 2048, 1024, 96  # samples, samples, mel bands from 0 Hz to half the rate
_LARGEST = 9.457798957824707  # of the training spectrograms: 1 for the network
_BLOCK, _STEP = 100, 50  # spectrogram frames of a block, and from one to the next


class Aisfx(torch.nn.Module):
    """The embedding network, with the names of the package's weights."""

    def __init__(self):
        super().__init__()
        widths = [1, 64, 128, 256, DIM]
        for number in range(1, len(widths)):
            self.add_module(f"conv_block{number}", _ConvBlock(*widths[number - 1 : number + 1]))
        filters = mel_triangles(RATE, _WINDOW // 2 + 1, _BANDS, 0.0, RATE / 2)
        self.register_buffer("filters", filters / filters.sum(dim=0), persistent=False)
        self.register_buffer("window", torch.hann_window(_WINDOW, periodic=False), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return (blocks, 512) of a wave (samples,) at 44.1 kHz. Silence fills up a clip shorter than a block; the last
        block of a longer one ends where the clip ends, so that all of it is heard."""
        spectrogram = self.spectrogram(wave)
        spectrogram = F.pad(spectrogram, (0, 0, 0, max(0, _BLOCK - len(spectrogram))))
        last = len(spectrogram) - _BLOCK
        x = torch.stack([spectrogram[start : start + _BLOCK] for start in [*range(0, last, _STEP), last]])[:, None]
        for number, block in enumerate(self.children()):
            x = block(F.max_pool2d(x, 2) if number else x)
        return x.mean(dim=3).amax(dim=2)

    def spectrogram(self, wave: torch.Tensor) -> torch.Tensor:
        """Return (frames, bands) of a wave (samples,) at 44.1 kHz, as Essentia computes it for the package: frames
        centred on multiples of the hop, with zeros beyond the wave's ends, power in mel bands, log10(10,000 x + 1)."""
        frames = F.pad(wave, (_WINDOW // 2, _WINDOW)).unfold(0, _WINDOW, _HOP)[: 1 - (-len(wave) // _HOP)]
        power = torch.fft.rfft(frames * self.window).abs().square()
        return torch.log10(1e4 * power @ self.filters + 1) / _LARGEST


class _ConvBlock(torch.nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = torch.nn.BatchNorm2d(width), torch.nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def load_aisfx() -> Aisfx:
    """Return the package's network, frozen. Raises UserError if the package cannot be fetched."""
    file = fetch_pip(PACKAGE, VERSION, _SHA256) / _WEIGHTS
    # The file also has the sizes of the training sets, as numpy integers; nothing else in it is let through.
    allowed = [(np._core.multiarray.scalar, "numpy.core.multiarray.scalar"), np.dtype, np.dtypes.Int64DType]
    with torch.serialization.safe_globals(allowed):
        weights, _ = torch.load(file, map_location="cpu", weights_only=True)
    prefix = "embedding_net."
    network = Aisfx()
    network.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return network.eval().requires_grad_(False)
