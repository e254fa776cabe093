"""Embeddings of clips, for Fréchet distance and MMD: one vector per clip, the mean over its time.

load_embedding("package:aisfx")                       # 512, for speech and sounds, without a model hub
load_embedding("microsoft/wavlm-base-plus@9")         # any teacher of data.speech_teacher and data.audio_teacher
load_embedding("vggish:/models/vggish-10086976.pth")  # papers' Fréchet audio distance

Whisper is a poor choice: its embeddings hardly notice noise, and they reward a model that was aligned with it.
"""

from abc import ABC, abstractmethod

import numpy as np
import torch

from ..errors import UserError
from ..prepare.targets import resample_frames
from ..teachers import Teacher, load_teacher
from ..teachers.base import split_layer
from ..teachers.packages import ENCODERS
from . import aisfx, vggish
from .metric_model import identity, unknown_package, wave_at


class Embedder(ABC):
    """A frozen encoder in fp32.

    dim       width of a vector
    identity  spec, sha256, licence and version; a teacher has the sha256 that it has in training, and its start
    """

    dim: int
    identity: dict[str, str | float | None]

    @abstractmethod
    def embed(self, wave: np.ndarray, rate: int) -> np.ndarray:
        """Return (dim,) float64 of a wave (samples,) float32 at `rate` Hz. Raises ValueError for a wave that is empty
        or not finite."""


class NetworkEmbedder(Embedder):
    """A network that takes a wave (samples,) at `sample_rate` Hz and returns (frames, dim)."""

    def __init__(self, network: torch.nn.Module, dim: int, sample_rate: int, facts: dict, device: str | torch.device):
        self.dim, self.identity = dim, facts
        self._network, self._sample_rate, self._device = network.to(device), sample_rate, torch.device(device)

    @torch.inference_mode()
    def embed(self, wave: np.ndarray, rate: int) -> np.ndarray:
        wave = torch.from_numpy(wave_at(wave, rate, self._sample_rate))
        return self._network(wave.to(self._device)).mean(dim=0, dtype=torch.float64).cpu().numpy()


class TeacherEmbedder(Embedder):
    def __init__(self, teacher: Teacher, spec: str):
        self._teacher, self.dim = teacher, teacher.dim
        known = teacher.identity
        self.identity = {"spec": spec, **{name: known.get(name) for name in ("sha256", "licence", "version")}}
        if teacher.start is not None:
            self.identity["start"] = teacher.start

    def embed(self, wave: np.ndarray, rate: int) -> np.ndarray:
        teacher = self._teacher
        wave = wave_at(wave, rate, teacher.sample_rate)
        (frames,) = teacher.frames([wave])
        if teacher.start is None:
            return frames.mean(axis=0, dtype=np.float64)
        # CLAP's last frame hangs over the end of the clip, where the clip begins anew.
        length = len(wave) / teacher.sample_rate * teacher.rate
        return resample_frames(frames, 1, -teacher.start * teacher.rate, length)[0].astype(np.float64)


def load_embedding(spec: str, device: str | torch.device = "cpu") -> Embedder:
    """Return the embedder of `package:aisfx`, of `vggish:FILE.pth`, or of any teacher: a folder saved with
    save_pretrained or a name on the model hub, with @N for its layer N, or beats:FILE.

    Raises UserError, in one line with the remedy, for a model that does not exist, cannot be fetched or cannot be read.
    """
    title = f"embedding {spec!r}"
    if spec.startswith("vggish:"):
        network = vggish.load_vggish(spec.removeprefix("vggish:"), title)
        return NetworkEmbedder(network, vggish.DIM, vggish.RATE, identity(spec, network, None, None), device)
    base, layer = split_layer(spec)
    if base == "package:aisfx":
        if layer is not None:
            raise UserError(f"{title} is no transformer with layers: leave @{layer} out")
        network = aisfx.load_aisfx()
        facts = identity(spec, network, aisfx.LICENCE, aisfx.VERSION)
        return NetworkEmbedder(network, aisfx.DIM, aisfx.RATE, facts, device)
    if base.startswith("package:") and base.removeprefix("package:") not in ENCODERS:
        raise unknown_package(title, base, ["aisfx", *ENCODERS])
    return TeacherEmbedder(load_teacher(spec, str(device)), spec)
