"""Log-mel spectrograms of waves.

Waves are never normalised to a peak or a loudness: models learn the level of a recording, and vocoders such as HiFi-GAN
expect it.
"""

import numpy as np
import torch

from ..config import DataConfig
from .waves import import_torchaudio

MEL_FLOOR = 1e-5  # smallest mel magnitude; log of it is -11.5


def frame_count(samples: int, data: DataConfig) -> int:
    """Return the number of mel frames that LogMel(data) makes of `samples` samples."""
    if data.center:
        return 1 + samples // data.hop_length
    return 1 + (samples + 2 * _edge(data) - data.n_fft) // data.hop_length


def _edge(data: DataConfig) -> int:
    return (data.n_fft - data.hop_length) // 2


class LogMel:
    """Natural log of the mel-filtered magnitude spectrum (power 1), floored at 1e-5.

    center=True: torchaudio's frames, centred on multiples of the hop (AG-REPA's release: 24 kHz, n_fft 1024, hop 256,
    100 htk mels). center=False: HiFi-GAN's, reflect-padded by (n_fft - hop) / 2 on both sides and not centred.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data
        self.mel = import_torchaudio().transforms.MelSpectrogram(
            sample_rate=data.sample_rate,
            n_fft=data.n_fft,
            hop_length=data.hop_length,
            f_min=0.0,
            f_max=data.f_max,
            n_mels=data.n_mels,
            power=1.0,
            center=data.center,
            norm=data.mel_norm,
            mel_scale=data.mel_scale,
        )

    @property
    def min_samples(self) -> int:
        """The fewest samples that fill a window; reflect padding at the edges needs them, too."""
        return self.data.n_fft

    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """Return (T, n_mels) float32 of a wave (samples,) float32 at data.sample_rate; T = frame_count(samples, data).
        Raises ValueError for less than a window."""
        if len(wave) < self.min_samples:
            raise ValueError(f"a wave of {len(wave)} samples is shorter than one window of {self.min_samples}")
        samples = torch.from_numpy(wave)
        if not self.data.center:
            edge = _edge(self.data)
            samples = torch.nn.functional.pad(samples[None], (edge, edge), mode="reflect")[0]
        return self.mel(samples).clamp(min=MEL_FLOOR).log().T.contiguous().numpy()
