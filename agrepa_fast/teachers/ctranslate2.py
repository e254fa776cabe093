"""CTranslate2's model.bin: reader, and the Whisper in it, or its encoder alone, as transformers' classes.

Format (little-endian): version u32 · spec name · revision u32 · number of variables u32 · variables · number of aliases
u32 · aliases. A variable is name · rank u8 · shape u32[rank] · dtype u8 · bytes u32 · data. A text is length u16 and
that many bytes, the last of them zero.
"""

import re
import struct
from typing import BinaryIO

import numpy as np
import torch

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_HEAD_DIM = 64  # of every Whisper


def read_variables(stream: BinaryIO) -> dict[str, np.ndarray]:
    """Return all tensors by name, with aliases. Raises ValueError for a file that is cut off or of another format."""

    def numbers(layout: str) -> tuple[int, ...]:
        size = struct.calcsize("<" + layout)
        return struct.unpack("<" + layout, _exactly(stream, size))

    def text() -> str:
        return _exactly(stream, numbers("H")[0])[:-1].decode()

    numbers("I")
    if text() != "WhisperSpec":
        raise ValueError("no CTranslate2 model of a Whisper")
    _, count = numbers("II")
    variables = {}
    for _ in range(count):
        name, (rank,) = text(), numbers("B")
        shape = numbers(f"{rank}I")
        dtype, size = numbers("BI")
        variables[name] = np.frombuffer(_exactly(stream, size), _DTYPES[dtype]).reshape(shape)
    for _ in range(numbers("I")[0]):
        alias, name = text(), text()
        variables[alias] = variables[name]
    return variables


def _exactly(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise ValueError(f"the file ends {size - len(data)} bytes early")
    return data


def whisper_encoder(variables: dict[str, np.ndarray]) -> torch.nn.Module:
    """Return transformers' WhisperEncoder with the encoder's weights in fp32. Raises ValueError for quantised ones."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    # There is no decoder: the smallest number that the configuration takes.
    config = _config(_floats(variables, "encoder/"), decoder_layers=1)
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(_half_state(_floats(variables, "encoder/"), "encoder", config.encoder_layers))
    return encoder


def whisper_model(variables: dict[str, np.ndarray], tokens: dict[str, int]) -> torch.nn.Module:
    """Return transformers' WhisperForConditionalGeneration, the encoder with its decoder, in fp32. tokens: the fields
    of WhisperConfig that the file does not have, pad_token_id and its like. Raises ValueError for quantised weights."""
    from transformers import WhisperForConditionalGeneration

    weights = _floats(variables, "encoder/", "decoder/")
    vocab, _ = weights["decoder/embeddings/weight"].shape
    depth = _depth(weights, "decoder")
    config = _config(
        weights,
        **tokens,
        vocab_size=vocab,
        decoder_layers=depth,
        decoder_ffn_dim=len(weights["decoder/layer_0/ffn/linear_0/bias"]),
        max_target_positions=len(weights["decoder/position_encodings/encodings"]),
    )
    model = WhisperForConditionalGeneration(config)
    state = {}
    for half, layers in (("encoder", config.encoder_layers), ("decoder", depth)):
        state |= {f"model.{half}.{name}": value for name, value in _half_state(weights, half, layers).items()}
    model.load_state_dict(state | {"proj_out.weight": state["model.decoder.embed_tokens.weight"]})
    return model


def _floats(variables: dict[str, np.ndarray], *prefixes: str) -> dict[str, np.ndarray]:
    """Return the variables with a prefix. Raises ValueError if one of their weights is quantised."""
    weights = {name: value for name, value in variables.items() if name.startswith(prefixes)}
    quantised = [name for name, value in weights.items() if name.endswith("/weight") and value.dtype.kind != "f"]
    if quantised:
        raise ValueError(f"{quantised[0]} is quantised")
    return weights


def _depth(weights: dict[str, np.ndarray], half: str) -> int:
    return len({name.split("/")[1] for name in weights if re.match(rf"{half}/layer_\d", name)})


def _config(weights: dict[str, np.ndarray], **fields):
    """Return the WhisperConfig of an encoder's weights; `fields` are the others."""
    from transformers import WhisperConfig

    dim, mels, _ = weights["encoder/conv1/weight"].shape
    return WhisperConfig(
        d_model=dim,
        num_mel_bins=mels,
        encoder_layers=_depth(weights, "encoder"),
        encoder_attention_heads=dim // _HEAD_DIM,
        encoder_ffn_dim=len(weights["encoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(weights["encoder/position_encodings/encodings"]),
        decoder_attention_heads=dim // _HEAD_DIM,
        **fields,
    )


def _half_state(weights: dict[str, np.ndarray], half: str, depth: int) -> dict[str, torch.Tensor]:
    """Return the state of transformers' WhisperEncoder (`half`: encoder) or WhisperDecoder (decoder)."""
    state = {}

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(weights[f"{half}/{name}"].astype(np.float32))

    def copy(target: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensor(f"{source}/{weight}"), tensor(f"{source}/{bias}")

    def copy_norm(target: str, source: str) -> None:
        copy(target, source, "gamma", "beta")

    def split(target: str, source: str, parts: str) -> None:
        """Copy projections that the file has stacked. Whisper's keys have no bias; the file holds zeros."""
        stacked = (tensor(f"{source}/{kind}").chunk(len(parts)) for kind in ("weight", "bias"))
        for part, weight, bias in zip(parts, *stacked, strict=True):
            state[f"{target}.{part}_proj.weight"] = weight
            if part != "k":
                state[f"{target}.{part}_proj.bias"] = bias

    state["embed_positions.weight"] = tensor("position_encodings/encodings")
    copy_norm("layer_norm", "layer_norm")
    if half == "encoder":
        copy("conv1", "conv1")
        copy("conv2", "conv2")
    else:
        state["embed_tokens.weight"] = tensor("embeddings/weight")
    for index in range(depth):
        target, source = f"layers.{index}", f"layer_{index}"
        copy_norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        split(f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
        copy(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        if half == "decoder":
            copy_norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            split(f"{target}.encoder_attn", f"{source}/attention/linear_0", "q")
            split(f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
            copy(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
        copy_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        copy(f"{target}.fc1", f"{source}/ffn/linear_0")
        copy(f"{target}.fc2", f"{source}/ffn/linear_1")
    return state
