"""Voices as vectors: their cosine is the similarity of two clips' speakers, which papers call SIM.

load_speaker("package:resemblyzer")                   # 256, without a model hub
load_speaker("microsoft/wavlm-base-plus-sv")          # any x-vector model of transformers
"""

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import UserError
from ..teachers.base import cannot_load, load_weights, model_source
from ..torchaudio_import import import_torchaudio
from . import resemblyzer
from .embeddings import Embedder, NetworkEmbedder
from .metric_model import HUB, identity, unknown_package

_SHORTEST = 0.5  # seconds; the convolutions over an x-vector model's frames need 0.3


class XVector(torch.nn.Module):
    """An x-vector model of transformers with its feature extractor."""

    def __init__(self, model: torch.nn.Module, extractor):
        super().__init__()
        self.model, self._extractor = model, extractor

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return (1, dim) of a wave (samples,). Zeros fill up a very short one."""
        rate = self._extractor.sampling_rate
        wave = F.pad(wave, (0, max(0, int(_SHORTEST * rate) - len(wave)))).cpu().numpy()
        features = self._extractor(wave, sampling_rate=rate, return_tensors="pt").to(self.model.device)
        return self.model(**features).embeddings


def load_speaker(spec: str, device: str | torch.device = "cpu") -> Embedder:
    """Return the embedder of voices of `package:resemblyzer`, of a folder saved with save_pretrained, or of a name on
    the model hub, such as microsoft/wavlm-base-plus-sv.

    Raises UserError, in one line with the remedy, for an unknown model, without a network, and for a model that does
    not tell speakers apart.
    """
    title = f"metrics.speaker={spec}"
    if spec == "package:resemblyzer":
        network = resemblyzer.load_resemblyzer()
        facts = identity(spec, network, resemblyzer.LICENCE, resemblyzer.VERSION)
        return NetworkEmbedder(network, resemblyzer.DIM, resemblyzer.RATE, facts, device)
    if spec.startswith("package:"):
        raise unknown_package(title, spec, ["resemblyzer"])
    import_torchaudio()  # transformers imports it
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForAudioXVector
    from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES as KINDS

    ways = f"package:resemblyzer, {HUB}"
    source = model_source(spec, title, ways)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in KINDS:
            raise UserError(
                f"{title} is a {config.model_type!r} model: one of type {', '.join(sorted(KINDS))} with an x-vector "
                f"head tells speakers apart"
            )
        extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
        model = load_weights(AutoModelForAudioXVector, source, title)
    except (OSError, ValueError) as error:  # transformers' for a missing file and an unknown model type
        raise cannot_load(title, error, ways) from error
    facts = identity(spec, model, None, getattr(config, "_commit_hash", None))
    return NetworkEmbedder(XVector(model, extractor), config.xvector_output_dim, extractor.sampling_rate, facts, device)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of two vectors of voices, 0 if one of them is zero."""
    lengths = np.linalg.norm(one) * np.linalg.norm(other)
    return float(one @ other / lengths) if lengths else 0.0
