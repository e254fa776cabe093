"""DNSMOS P.835 (Reddy et al. 2022, "DNSMOS P.835: A Non-Intrusive Perceptual Objective Speech Quality Metric to
Evaluate Noise Suppressors"): predicted opinion scores of the speech itself, of the background, and of both.

A clip at 16 kHz is heard in windows of 9 s, at steps of 1 s; a shorter one is repeated until it fills a window.
"""

from pathlib import Path

import numpy as np

from ..fetch import fetch_pip
from ..files import file_sha256
from ..teachers.onnx_session import open_session

NAMES = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
PACKAGE, VERSION, LICENCE = "speechmos", "0.0.1.1", "MIT"
_SHA256 = "31c4c9d3234f6ee10102edff74333014c50006a3f389daf7ecacae34e68ebbf7"
_MODEL = Path("speechmos/dnsmos_models/sig_bak_ovr.onnx")
RATE = 16000
_SECONDS = 9.01  # of a window
# From the network's outputs to opinions: coefficients of x^2, x and 1, in the order of NAMES.
_POLYNOMIALS = np.array(
    [
        [-0.08397278, 1.22083953, 0.0052439],
        [-0.13166888, 1.60915514, -0.39604546],
        [-0.06766283, 1.11546468, 0.04602535],
    ]
)


class Dnsmos:
    """The package's network. sha256: of its file. Raises UserError, which begins with `title`, without onnxruntime, and
    if the package cannot be fetched."""

    def __init__(self, title: str):
        path = fetch_pip(PACKAGE, VERSION, _SHA256) / _MODEL
        self.sha256, self._session = file_sha256(path), open_session(title, path, "dnsmos")

    def scores(self, wave: np.ndarray) -> list[float]:
        """Return the scores of a wave (samples,) float32 at 16 kHz, in the order of NAMES."""
        size = int(_SECONDS * RATE)
        while len(wave) < size:
            wave = np.concatenate([wave, wave])
        # As its authors' code does: whole seconds count, and a window whose end is rounded a sample down is left out.
        seconds = range(int(len(wave) // RATE - _SECONDS) + 1)
        windows = [wave[n * RATE :][:size] for n in seconds if int((n + _SECONDS) * RATE) - n * RATE >= size]
        raw = np.stack([self._session.run(None, {"input_1": window[None]})[0][0] for window in windows])
        squared, linear, constant = _POLYNOMIALS.T
        return (squared * raw**2 + linear * raw + constant).mean(axis=0).tolist()
