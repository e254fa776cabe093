"""Resemblyzer's voice encoder (Wan et al. 2018, "Generalized End-to-End Loss for Speaker Verification"): windows of
1.6 s, 1.3 per second, to unit vectors of 256.

The package also cuts long silences out, by a voice activity detector in C; here they stay in.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ..fetch import fetch_pip
from ..torchaudio_import import import_torchaudio

PACKAGE, VERSION, LICENCE = "Resemblyzer", "0.1.4", "Apache-2.0"
_SHA256 = "8f12eb2f1a9982d32e8db7856de754709b59c93a77bcf0ff536584b619a9dd1f"
_WEIGHTS = Path("resemblyzer/pretrained.pt")
RATE, DIM = 16000, 256
_FFT, _HOP, _BANDS = 400, 160, 40  # samples, samples, mel bands
_FRAMES, _STEP = 160, 77  # mel frames of a window, and from one to the next
_COVERED = 0.75  # of the last window by the clip, or it is left out
_LEVEL = 10 ** (-30 / 20)  # root mean square that a quieter clip is raised to


class Resemblyzer(torch.nn.Module):
    """The network, with the names of the package's weights."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(_BANDS, DIM, 3, batch_first=True)
        self.linear = torch.nn.Linear(DIM, DIM)
        triangles = import_torchaudio().functional.melscale_fbanks
        filters = triangles(_FFT // 2 + 1, 0.0, RATE / 2, _BANDS, RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(_FFT), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return (windows, 256) of a wave (samples,) at 16 kHz."""
        level = wave.square().mean().sqrt()
        if 0 < level < _LEVEL:
            wave = wave * (_LEVEL / level)
        frames = math.ceil((len(wave) + 1) / _HOP)
        starts = list(range(0, max(1, frames - _FRAMES + _STEP + 1), _STEP))
        if len(starts) > 1 and len(wave) - starts[-1] * _HOP < _COVERED * _FRAMES * _HOP:
            starts.pop()
        wave = F.pad(wave, (0, max(0, (starts[-1] + _FRAMES) * _HOP - len(wave))))
        spectra = torch.fft.rfft(F.pad(wave, (_FFT // 2, _FFT // 2)).unfold(0, _FFT, _HOP) * self.window)
        mel = spectra.abs().square() @ self.filters
        _, (hidden, _) = self.lstm(torch.stack([mel[start : start + _FRAMES] for start in starts]))
        return F.normalize(self.linear(hidden[-1]).relu())


def load_resemblyzer() -> Resemblyzer:
    """Return the package's network, frozen. Raises UserError if the package cannot be fetched."""
    file = fetch_pip(PACKAGE, VERSION, _SHA256) / _WEIGHTS
    weights = torch.load(file, map_location="cpu", weights_only=True)["model_state"]
    network = Resemblyzer()
    kept = {name: value for name, value in weights.items() if not name.startswith("similarity_")}  # of its training
    network.load_state_dict(kept)
    return network.eval().requires_grad_(False)
