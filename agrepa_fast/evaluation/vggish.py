"""VGGish (Hershey et al. 2017, "CNN Architectures for Large-Scale Audio Classification"), the embedding of papers'
Fréchet audio distance (Kilgour et al. 2019): log-mels of 0.96 s, one after the other, to vectors of 128.

The vectors are those before the network's last rectifier and without its PCA, as in google-research's
frechet_audio_distance.
"""

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..files import local_path
from ..teachers.base import in_one_line
from .metric_model import mel_triangles

RATE, DIM = 16000, 128
_WINDOW, _HOP, _FFT = 400, 160, 512  # samples
_BANDS, _LOW, _HIGH = 64, 125.0, 7500.0  # mel bands, Hz, Hz
_EXAMPLE = 96  # frames


class Vggish(torch.nn.Module):
    """The network, with the names of torchvggish's weights."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width in (64, None, 128, None, 256, 256, None, 512, 512, None):
            if width is None:
                layers.append(torch.nn.MaxPool2d(2))
            else:
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU()]
                channels = width
        self.features = torch.nn.Sequential(*layers)
        sizes = (512 * (_EXAMPLE // 16) * (_BANDS // 16), 4096, 4096, DIM)
        linear = [torch.nn.Linear(*sizes[n : n + 2]) for n in range(3)]
        self.embeddings = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
        self.register_buffer("filters", mel_triangles(RATE, _FFT // 2 + 1, _BANDS, _LOW, _HIGH), persistent=False)
        self.register_buffer("window", torch.hann_window(_WINDOW), persistent=False)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return (examples, 128) of a wave (samples,) at 16 kHz. Zeros fill up a clip shorter than an example; what a
        longer one has beyond its last whole example is left out."""
        wave = F.pad(wave, (0, max(0, _WINDOW + (_EXAMPLE - 1) * _HOP - len(wave))))
        frames = wave.unfold(0, _WINDOW, _HOP) * self.window
        log_mel = torch.log(torch.fft.rfft(frames, _FFT).abs() @ self.filters + 0.01)
        examples = log_mel[: len(log_mel) // _EXAMPLE * _EXAMPLE].reshape(-1, 1, _EXAMPLE, _BANDS)
        return self.embeddings(self.features(examples).permute(0, 2, 3, 1).flatten(1))


def load_vggish(path: str, title: str) -> Vggish:
    """Return the network with the weights of a file, a state_dict as torchvggish publishes it, frozen. Raises
    UserError, which begins with `title`, if the file is missing or holds anything else."""
    file = local_path(path)
    if not file.is_file():
        raise UserError(f"{title}: no file {file}: give vggish:FILE.pth, the weights of torchvggish")
    network = Vggish()
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("pproc.")})
    except Exception as error:  # torch.load raises nearly anything for bytes that are no weights
        raise UserError(
            f"{title}: {file} does not hold VGGish's weights ({in_one_line(error)}): give those of torchvggish"
        ) from error
    return network.eval().requires_grad_(False)
