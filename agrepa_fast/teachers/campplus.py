"""CAM++ (Wang et al. 2023), the vector of a speaker's voice that CosyVoice is conditioned on, from its ONNX file."""

import numpy as np
import torch

from ..errors import UserError
from ..files import check_readable, file_sha256, local_path
from ..torchaudio_import import make_torchaudio_importable
from .onnx_session import open_session

_BINS, _WINDOW = 80, 400  # mel bands; samples


class CampPlus:
    """Vectors of voices; `spec` is data.speaker, campplus:FILE.onnx. dim: channels of a vector; identity: the facts
    that decide it."""

    sample_rate = 16000

    def __init__(self, spec: str):
        self._path = local_path(spec.partition(":")[2])
        check_readable(self._path)
        self._session = open_session(f"data.speaker={spec}", self._path, "speaker")
        self._input = self._session.get_inputs()[0].name
        self.identity = {"spec": spec, "sha256": file_sha256(self._path)}
        self.dim = len(self._run(spec, np.zeros((100, _BINS), np.float32)))

    def vector(self, wave: np.ndarray) -> np.ndarray:
        """Return the vector (dim,) fp32 of a wave at 16 kHz, as CosyVoice's frontend does (cosyvoice/cli/frontend.py of
        ace7c47). Raises ValueError if the wave is shorter than a window, or the vector is not finite."""
        make_torchaudio_importable()
        from torchaudio.compliance.kaldi import fbank

        options = {"num_mel_bins": _BINS, "dither": 0, "sample_frequency": self.sample_rate}
        if len(wave) < _WINDOW:
            raise ValueError("shorter than a window of 25 ms")
        mels = fbank(torch.from_numpy(wave).unsqueeze(0), **options)
        vector = self._run(str(self._path), (mels - mels.mean(0, keepdim=True)).numpy())
        if not np.isfinite(vector).all():
            raise ValueError("its vector is not finite")
        return vector

    def _run(self, name: str, mels: np.ndarray) -> np.ndarray:
        try:
            (vector,) = self._session.run(None, {self._input: mels[None]})[0]
        except Exception as error:  # onnxruntime's are of many kinds
            raise UserError(
                f"{name} is no CAM++: it takes no mels (1, frames, {_BINS}), or returns no (1, dim) "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        return np.asarray(vector, np.float32).reshape(-1)
