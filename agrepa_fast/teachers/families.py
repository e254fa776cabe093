"""The models of transformers that can be teachers, and how their encoder is read from a whole model's weights."""

import torch

from ..errors import UserError
from .base import Teacher, load_weights, quiet_transformers

# By config.model_type; tests/data/test_encoders.py has one of each encoder.
_WINDOWS = ["audioflamingo3", "audioflamingo3_encoder", "qwen2_audio", "qwen2_audio_encoder"]
_WINDOWS += ["voxtral", "voxtral_encoder"]
_CONFORMERS = ["canary", "granite_speech", "lasr_ctc", "lasr_encoder", "parakeet_ctc", "parakeet_encoder"]
_CONFORMERS += ["parakeet_rnnt", "parakeet_tdt", "seamless_m4t", "seamless_m4t_v2", "wav2vec2-bert"]
_OF_WAVES = ["data2vec-audio", "hubert", "moonshine", "omniasr", "omniasr_ctc", "sew", "sew-d", "unispeech"]
_OF_WAVES += ["unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm"]
_OF_MELS = ["audio-spectrogram-transformer", "clap", "clap_audio_model", "glmasr", "glmasr_encoder"]
_OF_MELS += ["speech_to_text", "whisper"]
MODEL_TYPES = sorted(_WINDOWS + _CONFORMERS + _OF_WAVES + _OF_MELS)
_REFUSED = {
    "cohere_asr": "its extractor cuts long recordings where they are quiet",
    "speecht5": "its encoder has no way in for waves",
    "pe_audio": "its layers carry a class token and its extractor reflects the wave's end",
} | dict.fromkeys(
    ("dac", "encodec", "mimi", "xcodec", "univnet"), "a codec or vocoder has no transformer encoder to take layers from"
)
# Attributes of a whole model that hold its audio encoder; the first that is a model by itself counts.
_PLACES = ("audio_tower", "audio_encoder", "speech_encoder", "audio_model", "encoder")


def load_encoder(
    config, base: str, source: str, layer: int | None, identity: dict, device: str = "cpu", dtype: str = "fp32"
) -> Teacher:
    """Return the teacher of a model of MODEL_TYPES other than Whisper, saved with its feature extractor. source: a
    folder or a hub name."""
    from transformers import AutoFeatureExtractor

    from .encoder import EncoderTeacher
    from .fixed_window import AstTeacher, ClapTeacher, WindowTeacher

    kind = config.model_type
    if kind not in MODEL_TYPES:
        because = f", and {_REFUSED[kind]}" if kind in _REFUSED else ""
        raise UserError(
            f"teacher {base!r} is a {kind!r} model{because}: those of type {', '.join(MODEL_TYPES)} can be teachers"
        )
    teacher_class = {"audio-spectrogram-transformer": AstTeacher, "clap": ClapTeacher, "clap_audio_model": ClapTeacher}
    teacher_class |= dict.fromkeys(_WINDOWS, WindowTeacher)
    extractor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
    encoder = _load(config, source, base)
    return teacher_class.get(kind, EncoderTeacher)(encoder, extractor, base, layer, identity, device, dtype)


def _load(config, source: str, base: str) -> torch.nn.Module:
    """Return the audio encoder in fp32. Reads no other weights of a larger model, so that a language model costs no
    memory."""
    from transformers import AutoModel, PreTrainedModel

    with torch.device("meta"), quiet_transformers():
        encoder = AutoModel.from_config(config, trust_remote_code=False)
    renamed = {}
    while True:
        inner = [name for name in _PLACES if isinstance(getattr(encoder, name, None), PreTrainedModel)]
        if not inner:
            title = f"teacher {base!r}"
            return load_weights(type(encoder), source, title, config=encoder.config, key_mapping=renamed or None)
        encoder = getattr(encoder, inner[0])
        renamed = {rf"^(?:\w+\.)*?{inner[0]}\.": ""}
