"""Small random models of every family of audio encoders that transformers has and agrepa_fast takes as teachers."""

from dataclasses import dataclass
from pathlib import Path

import torch

_TEXT = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 2}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
_MELS = {"num_mel_bins": 80}
_CONFORMER = _SMALL | _MELS | {"conv_kernel_size": 5, "subsampling_conv_channels": 16}
_CONVOLUTIONS = {"conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4]}
_CONVOLUTIONS |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


@dataclass(frozen=True)
class Family:
    """A class of transformers with the fields of its configuration, and what its teacher must be."""

    model: str
    config: dict
    extractor: str
    settings: dict
    encoder: str  # where the audio encoder is in the model
    layers: str  # where the transformer's layers are in the encoder
    end_rate: float
    layer_rate: float
    padded: bool = False  # clips of several lengths may go together
    half: bool = True  # computes in fp16 on a CPU

    def save(self, folder: Path) -> torch.nn.Module:
        """Write model and extractor with save_pretrained. Returns the encoder; its weights have the usual sizes, so
        that neither fp16 nor a comparison loses them."""
        import transformers

        torch.manual_seed(0)
        kind = getattr(transformers, self.model)
        model = kind(kind.config_class(**self.config)).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        model.save_pretrained(folder)
        getattr(transformers, self.extractor)(**self.settings).save_pretrained(folder)
        return model.get_submodule(self.encoder)


def _of_waves(model: str, end_rate: float = 200, layer_rate: float = 200, padded: bool = False, **fields) -> Family:
    settings = {"do_normalize": True, "return_attention_mask": padded}
    config = _SMALL | _CONVOLUTIONS | (_LAYER_NORM if padded else {}) | fields
    extractor = "Wav2Vec2FeatureExtractor"
    return Family(model, config, extractor, settings, "", "encoder.layers", end_rate, layer_rate, padded)


def _in_window(model: str, end_rate: float, kind: str, text: str, sizes: dict) -> Family:
    audio = sizes | _MELS | {"max_source_positions": 50, "model_type": kind}
    config = {"audio_config": audio, "text_config": _TEXT | {"model_type": text}}
    extractor, settings = "WhisperFeatureExtractor", {"chunk_length": 1}  # a window of 1 s instead of 30
    return Family(model, config, extractor, settings, "model.audio_tower", "layers", end_rate, 50)


def _seamless(model: str) -> Family:
    sizes = {"vocab_size": 20, "t2u_vocab_size": 20, "hidden_size": 32, "conv_depthwise_kernel_size": 5}
    for part in ("encoder", "decoder", "t2u_encoder", "t2u_decoder", "speech_encoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    sizes |= {"speech_encoder_layers": 3, "speech_encoder_intermediate_size": 48}
    sizes |= {"unit_embed_dim": 16, "lang_embed_dim": 16, "spkr_embed_dim": 16, "upsample_initial_channel": 32}
    extractor = "SeamlessM4TFeatureExtractor"
    return Family(model, sizes, extractor, {}, "speech_encoder", "encoder.layers", 6.25, 50)


def _parakeet(model: str, config: dict, encoder: str) -> Family:
    settings = {"feature_size": 80}
    return Family(model, config, "ParakeetFeatureExtractor", settings, encoder, "layers", 12.5, 12.5, padded=True)


def _sides(*names: str, **sizes) -> dict:
    """encoder_SIZE and decoder_SIZE, or as the names say."""
    return {name.format(side): sizes.get(side, 2) for name in names for side in ("encoder", "decoder")}


_OMNI_AUDIO = _SMALL | _CONVOLUTIONS | {"model_type": "omniasr_audio"}
_QWEN_AUDIO = {"d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 48}
_GRANITE = {"model_type": "granite_speech_encoder", "hidden_dim": 32, "num_layers": 4, "num_heads": 2, "dim_head": 16}
_GRANITE |= {"input_dim": 160, "feedforward_mult": 2, "conv_kernel_size": 5, "context_size": 20, "output_dim": 12}
_QFORMER = _SMALL | {"model_type": "blip_2_qformer", "num_hidden_layers": 1, "encoder_hidden_size": 32}
_S2T = _sides("{}_ffn_dim", "{}_attention_heads") | _sides("{}_layers", encoder=3) | {"d_model": 32}
_MOONSHINE = _sides("{}_num_attention_heads", "{}_num_key_value_heads") | _sides("{}_num_hidden_layers", encoder=3)
_HTSAT = {"depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "hidden_size": 64, "patch_embeds_hidden_size": 8}
_CLAP = {"text_config": _SMALL | {"vocab_size": 20}, "audio_config": _HTSAT}

FAMILIES = {
    "wav2vec2": _of_waves("Wav2Vec2Model"),
    "wav2vec2, adapter": _of_waves("Wav2Vec2Model", end_rate=50, add_adapter=True, num_adapter_layers=2),
    "hubert": _of_waves("HubertModel", padded=True),
    "wavlm": _of_waves("WavLMModel", padded=True),
    "unispeech": _of_waves("UniSpeechModel"),
    "unispeech-sat": _of_waves("UniSpeechSatModel"),
    "data2vec-audio": _of_waves("Data2VecAudioModel", num_conv_pos_embeddings=2, conv_pos_kernel_size=3),
    "sew": _of_waves("SEWModel", layer_rate=100, squeeze_factor=2),
    "sew-d": Family(
        "SEWDModel",
        _SMALL | _CONVOLUTIONS | {"squeeze_factor": 2, "position_buckets": 16, "max_position_embeddings": 64},
        "Wav2Vec2FeatureExtractor",
        {},
        "",
        "encoder.encoder.layer",
        200,
        100,
    ),
    "wav2vec2-conformer": _of_waves("Wav2Vec2ConformerModel", position_embeddings_type="rotary"),
    "moonshine": Family(
        "MoonshineForConditionalGeneration",
        _MOONSHINE | {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 20},
        "Wav2Vec2FeatureExtractor",
        {"do_normalize": False, "return_attention_mask": True},
        "model.encoder",
        "layers",
        16000 / 384,
        16000 / 384,
    ),
    "omniasr": Family(
        "OmniASRForConditionalGeneration",
        {"audio_config": _OMNI_AUDIO, "text_config": _TEXT | {"model_type": "llama"}},
        "OmniASRFeatureExtractor",
        {},
        "model.audio_tower",
        "layers",
        200,
        200,
        padded=True,
    ),
    "wav2vec2-bert": Family(
        "Wav2Vec2BertModel",
        _SMALL | {"conv_depthwise_kernel_size": 5},
        "SeamlessM4TFeatureExtractor",
        {},
        "",
        "encoder.layers",
        50,
        50,
        padded=True,
    ),
    "seamless_m4t": _seamless("SeamlessM4TModel"),
    "seamless_m4t_v2": _seamless("SeamlessM4Tv2Model"),
    "speech_to_text": Family(
        "Speech2TextForConditionalGeneration",
        _S2T | {"vocab_size": 20, "conv_channels": 32},
        "Speech2TextFeatureExtractor",
        {},
        "model.encoder",
        "layers",
        25,
        25,
        half=False,  # its table of sinusoids is fp32
    ),
    "parakeet": _parakeet("ParakeetForCTC", {"vocab_size": 20, "encoder_config": _CONFORMER}, "encoder"),
    "canary": _parakeet(
        "CanaryForConditionalGeneration",
        {
            "vocab_size": 20,
            "encoder_config": _CONFORMER | {"model_type": "parakeet_encoder"},
            "decoder_config": _TEXT | {"head_dim": 8},
        },
        "model.encoder",
    ),
    "lasr": Family(
        "LasrForCTC",
        {"vocab_size": 20, "encoder_config": _CONFORMER},
        "LasrFeatureExtractor",
        {"feature_size": 80},
        "encoder",
        "layers",
        25,
        25,
        padded=True,
    ),
    "granite_speech": Family(
        "GraniteSpeechForConditionalGeneration",
        {
            "encoder_config": _GRANITE,
            "text_config": _TEXT | {"model_type": "granite"},
            "projector_config": _QFORMER,
        },
        "GraniteSpeechFeatureExtractor",
        {},
        "model.encoder",
        "layers",
        50,
        50,
    ),
    "glmasr": Family(
        "GlmAsrForConditionalGeneration",
        {
            "audio_config": _SMALL | _MELS | {"model_type": "glmasr_encoder"},
            "text_config": _TEXT | {"model_type": "llama"},
        },
        "WhisperFeatureExtractor",
        {},
        "model.audio_tower",
        "layers",
        50,
        50,
    ),
    "qwen2_audio": _in_window("Qwen2AudioForConditionalGeneration", 25, "qwen2_audio_encoder", "qwen2", _QWEN_AUDIO),
    "voxtral": _in_window("VoxtralForConditionalGeneration", 50, "voxtral_encoder", "llama", _SMALL),
    "audioflamingo3": _in_window(
        "AudioFlamingo3ForConditionalGeneration", 25, "audioflamingo3_encoder", "qwen2", _SMALL
    ),
    "audio-spectrogram-transformer": Family(
        "ASTModel", _SMALL | {"max_length": 128}, "ASTFeatureExtractor", {"max_length": 128}, "", "layers", 10, 10
    ),
    "clap": Family(
        "ClapModel", _CLAP, "ClapFeatureExtractor", {"truncation": "rand_trunc"}, "audio_model", "", 3.2, 3.2
    ),
}
