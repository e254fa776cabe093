"""CTranslate2's model.bin: reader, and Whisper's encoder in it as transformers' WhisperEncoder.

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
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    weights = {name: value for name, value in variables.items() if name.startswith("encoder/")}
    quantised = [name for name, value in weights.items() if name.endswith("/weight") and value.dtype.kind != "f"]
    if quantised:
        raise ValueError(f"{quantised[0]} is quantised")
    dim, mels, _ = weights["encoder/conv1/weight"].shape
    depth = len({name.split("/")[1] for name in weights if re.match(r"encoder/layer_\d", name)})
    config = WhisperConfig(
        d_model=dim,
        num_mel_bins=mels,
        encoder_layers=depth,
        encoder_attention_heads=dim // _HEAD_DIM,
        encoder_ffn_dim=len(weights["encoder/layer_0/ffn/linear_0/bias"]),
        max_source_positions=len(weights["encoder/position_encodings/encodings"]),
        decoder_layers=1,  # there is no decoder; the smallest number the configuration takes
        decoder_attention_heads=dim // _HEAD_DIM,
    )
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(_encoder_state(weights, depth))
    return encoder


def _encoder_state(weights: dict[str, np.ndarray], depth: int) -> dict[str, torch.Tensor]:
    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(weights[f"encoder/{name}"].astype(np.float32))

    state = {"embed_positions.weight": tensor("position_encodings/encodings")}

    def copy(target: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        state[f"{target}.weight"], state[f"{target}.bias"] = tensor(f"{source}/{weight}"), tensor(f"{source}/{bias}")

    def copy_norm(target: str, source: str) -> None:
        copy(target, source, "gamma", "beta")

    for name in ("conv1", "conv2"):
        copy(name, name)
    copy_norm("layer_norm", "layer_norm")
    for index in range(depth):
        target, source = f"layers.{index}", f"layer_{index}"
        copy_norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
        copy_norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
        copy(f"{target}.fc1", f"{source}/ffn/linear_0")
        copy(f"{target}.fc2", f"{source}/ffn/linear_1")
        copy(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
        fused = f"{source}/self_attention/linear_0"  # queries, keys and values stacked
        for part, weight, bias in zip(
            ("q", "k", "v"), tensor(f"{fused}/weight").chunk(3), tensor(f"{fused}/bias").chunk(3), strict=True
        ):
            state[f"{target}.self_attn.{part}_proj.weight"] = weight
            if part != "k":  # Whisper's keys have no bias; the file holds zeros
                state[f"{target}.self_attn.{part}_proj.bias"] = bias
    return state
