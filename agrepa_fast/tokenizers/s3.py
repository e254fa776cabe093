"""S3 tokens, CosyVoice's supervised semantic tokens of speech, by the package s3tokenizer.

`s3:NAME` takes published weights, which the package fetches and checks. `s3:FILE` takes the published .onnx, or the
state_dict of the package's class as .safetensors or .pt; the weights give the sizes.

    speech_tokenizer_v1        4096 codes, 50 Hz      k-means-like codebook (Du et al. 2024, CosyVoice)
    speech_tokenizer_v1_25hz   4096 codes, 25 Hz
    speech_tokenizer_v2_25hz   6561 codes, 25 Hz      finite scalar quantisation (CosyVoice 2)
    speech_tokenizer_v3_25hz   6561 codes, 25 Hz      the same with more layers (CosyVoice 3)
"""

from pathlib import Path

import numpy as np
import torch

from ..audio.waves import import_torchaudio
from ..errors import UserError, nearest
from ..fetch import check_home_cache
from ..files import local_path
from ..teachers.base import batches_by_length, check_waves, weights_sha256
from .base import WaveTokenizer

NAMES = ("speech_tokenizer_v1", "speech_tokenizer_v1_25hz", "speech_tokenizer_v2_25hz", "speech_tokenizer_v3_25hz")
_HEAD_DIM = 64  # of every S3 tokenizer
_SHORTEST = 400  # samples of the spectrogram's window
_GPU_ROOM = 12_000  # mel frames of a batch, padding included


class S3Tokens(WaveTokenizer):
    """Ids of speech at 16 kHz; `name` is one of NAMES, `model` the package's class for it."""

    sample_rate = 16000

    def __init__(self, model, name: str, spec: str, device: str = "cpu"):
        self._model, self._device = model.eval().to(device), torch.device(device)
        self.codes = model.quantizer.codebook_size
        self.rate = 50.0 if name == "speech_tokenizer_v1" else 25.0
        self.identity = {"spec": spec, "name": name, "sha256": weights_sha256(model)}
        # On a CPU each clip is alone: padding changes the last bits of a GEMM, and so the choice between close codes.
        self.room = _GPU_ROOM if self._device.type == "cuda" else 1

    @torch.inference_mode()
    def encode(self, waves: list[np.ndarray], texts: list[str]) -> list[np.ndarray | str]:
        import_torchaudio()
        from s3tokenizer import log_mel_spectrogram, padding

        check_waves(waves)
        mels = []
        for wave in waves:
            wave = np.pad(wave, (0, max(0, _SHORTEST - len(wave))))
            mels.append(log_mel_spectrogram(torch.from_numpy(wave).to(self._device), self._model.config.n_mels))
        ids: list[np.ndarray] = [np.empty(0)] * len(waves)
        for group in batches_by_length([mel.shape[1] for mel in mels], self.room):
            batch, lengths = padding([mels[index] for index in group])
            codes, counts = self._model.quantize(batch, lengths.to(self._device))
            for index, row, count in zip(group, codes.cpu().numpy(), counts.tolist(), strict=True):
                ids[index] = row[:count].astype(np.int32)
        return ids


def load_s3(source: str, device: str = "cpu") -> S3Tokens:
    """Return the tokenizer of `s3:<source>`. Raises UserError for a missing package or file, an unknown name, and
    weights that have another shape or cannot be fetched."""
    import_torchaudio()
    try:
        import s3tokenizer
    except ImportError as error:
        raise UserError(f"s3:{source} needs s3tokenizer ({error}): pip install 'agrepa_fast[s3]'") from error
    path = local_path(source)
    try:
        if path.is_file():
            name, state = _read(path)
            model = _model(name, state)
        elif source in NAMES:
            check_home_cache()
            name, model = source, s3tokenizer.load_model(source)
        else:
            raise UserError(f"s3:{source}: no such file, and no such name: {nearest(source, NAMES)}")
    except UserError:
        raise
    except Exception as error:  # of the network, of onnx, of torch.load: the package catches none of them
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"s3:{source} cannot be loaded ({reason}): give {', '.join(NAMES)} (from the network) or a file"
        ) from error
    return S3Tokens(model, name, f"s3:{source}", device)


def _read(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the one of NAMES that a file holds, and its state_dict."""
    coarse, third = "25hz" in path.stem, "v3" in path.stem
    if path.suffix == ".onnx":
        import onnx
        from s3tokenizer import onnx2torch, onnx2torch_v3

        state = (onnx2torch_v3 if third else onnx2torch)(str(path))
        # The 25 Hz model differs from the 50 Hz one in a stride alone, and CosyVoice publishes both as
        # speech_tokenizer_v1.onnx.
        graph = onnx.load(str(path), load_external_data=False).graph
        strides = next(
            a.ints for node in graph.node if node.op_type == "Conv" for a in node.attribute if a.name == "strides"
        )
        coarse = strides[0] == 2
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if "quantizer._codebook.embed" in state:
        return NAMES[1] if coarse else NAMES[0], state
    return NAMES[3] if third else NAMES[2], state


def _model(name: str, state: dict[str, torch.Tensor]):
    """Return the package's model in the sizes of the weights, loaded."""
    from s3tokenizer import S3Tokenizer, S3TokenizerV2
    from s3tokenizer.model import ModelConfig
    from s3tokenizer.model_v2 import ModelConfig as ModelConfigV2
    from s3tokenizer.model_v3 import ModelConfigV3, S3TokenizerV3

    width, mels, _ = state["encoder.conv1.weight"].shape
    sizes = {
        "n_mels": mels,
        "n_audio_state": width,
        "n_audio_head": width // _HEAD_DIM,
        "n_audio_layer": len({key.split(".")[2] for key in state if key.startswith("encoder.blocks.")}),
    }
    if name == NAMES[2]:
        model = S3TokenizerV2(name, ModelConfigV2(**sizes))
    elif name == NAMES[3]:
        model = S3TokenizerV3(name, ModelConfigV3(**sizes))
    else:
        contexts, codes = len(state["encoder.positional_embedding"]), len(state["quantizer._codebook.embed"])
        model = S3Tokenizer(name, ModelConfig(**sizes, n_audio_ctx=contexts, n_codebook_size=codes))
    model.load_state_dict(state, strict=True)
    return model
